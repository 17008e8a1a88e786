"""Fetch a data set's official files, through torchvision's classes, which know addresses and checksums."""

from __future__ import annotations

from pathlib import Path


def download(name: str, folder: Path) -> None:
    """Download (or find complete) the archives of a data set below `folder`.

    Raises:
        ValueError: the set cannot be downloaded by a program; says where a person gets it.
    """
    if name not in ("flowers102", "pets", "food101", "sun397"):
        where = {
            "imagenet": "ask for it at https://image-net.org/download.php, then pass --source FOLDER with "
            "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz",
        }.get(name, "pass --source FOLDER")
        raise ValueError(f"{name} has no public address to download from; {where}")
    from torchvision import datasets

    folder.mkdir(parents=True, exist_ok=True)
    if name == "flowers102":
        datasets.Flowers102(folder, download=True)
    elif name == "pets":
        datasets.OxfordIIITPet(folder, download=True)
    elif name == "food101":
        datasets.Food101(folder, download=True)
    else:
        datasets.SUN397(folder, download=True)
