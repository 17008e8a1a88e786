"""The released BiT files of the paper and its students' starting points, by name: `bit:R152x2_T_224`.

    python -m models.zoo      lists them, and which are here

A file is downloaded once, with a progress bar, into FUNMATCH_WEIGHTS or ~/.cache/funmatch/weights, and gets its name
only when it is whole; processes of one machine that want the same file wait for the one that downloads it. It is
checked against the MD5 that the server announces, and later against the SHA-256 of the first use; what it holds is
checked against the table when it is loaded. A file put there by hand is as good. A list of SHA-256 in this source was
the alternative, but we never had the files to take them from.

Names and addresses: timm's model table, big_transfer's README, and big_vision configs/proj/distill/common.py. That the
four 128-px teachers lie beside the others under the same public address is inferred from their gs:// names, and was
never tried.
"""

from __future__ import annotations

import base64
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests

PREFIX = "bit:"
ADDRESS = "https://storage.googleapis.com/bit_models/"
_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Released:
    """One released file."""

    file: str
    """Below ADDRESS."""
    architecture: str
    num_classes: int
    size: int
    """Height and width in pixels for which it was made."""
    what: str


RELEASED = {
    "R152x2_T_224": Released("distill/R152x2_T_224.npz", "resnetv2_152x2_bit", 1000, 224, "teacher, ImageNet, 83.0 %"),
    "R152x2_T_384": Released("distill/R152x2_T_384.npz", "resnetv2_152x2_bit", 1000, 384, "teacher, ImageNet, 83.7 %"),
    "R152x2_T_flowers128": Released(
        "distill/R152x2_T_flowers128.npz", "resnetv2_152x2_bit", 102, 128, "teacher, Flowers102, 97.82 %"
    ),
    "R152x2_T_pet128": Released("distill/R152x2_T_pet128.npz", "resnetv2_152x2_bit", 37, 128, "teacher, pets, 91.03 %"),
    "R152x2_T_food128": Released(
        "distill/R152x2_T_food128.npz", "resnetv2_152x2_bit", 101, 128, "teacher, Food101, 86.24 %"
    ),
    "R152x2_T_sun128": Released(
        "distill/R152x2_T_sun128.npz", "resnetv2_152x2_bit", 397, 128, "teacher, Sun397, 74.22 %"
    ),
    "R50x1_224": Released("distill/R50x1_224.npz", "resnetv2_50x1_bit", 1000, 224, "distilled student, 82.8 %"),
    "R50x1_160": Released("distill/R50x1_160.npz", "resnetv2_50x1_bit", 1000, 160, "distilled student, 80.5 %"),
    "BiT-M-R50x1": Released(
        "BiT-M-R50x1.npz", "resnetv2_50x1_bit", 21843, 224, "ImageNet-21k, to start a student from"
    ),
    "BiT-M-R152x2": Released(
        "BiT-M-R152x2.npz", "resnetv2_152x2_bit", 21843, 224, "ImageNet-21k, to fine-tune into a teacher"
    ),
    "BiT-M-R152x2-ILSVRC2012": Released(
        "BiT-M-R152x2-ILSVRC2012.npz", "resnetv2_152x2_bit", 1000, 448, "fine-tuned at 448 px; not the paper's teacher"
    ),
}


def folder() -> Path:
    """Where files are kept."""
    return Path(os.environ.get("FUNMATCH_WEIGHTS", Path.home() / ".cache" / "funmatch" / "weights"))


def released(name: str) -> Released:
    """The entry of a name, with or without the prefix.

    Raises:
        ValueError: no such file was released.
    """
    plain = name.removeprefix(PREFIX)
    if plain not in RELEASED:
        raise ValueError(f"no released BiT file is called {plain!r}; there are {', '.join(RELEASED)}")
    return RELEASED[plain]


def fetch(name: str, address: str = ADDRESS) -> Path:
    """The file of a name, downloaded if it is not here yet.

    Raises:
        ValueError: an unknown name, or a file that is not what it was.
        OSError: it cannot be downloaded; says what to fetch by hand, and where to put it.
    """
    entry = released(name)
    path = folder() / Path(entry.file).name
    with _alone(path):
        if not path.exists():
            _download(address + entry.file, path)
        _compare_with_first_time(path)
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Eight ranks that start from one file would download it eight times, and read its hash while it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path) -> None:
    try:
        head = requests.head(url, timeout=_TIMEOUT_S, allow_redirects=True)
        head.raise_for_status()
        downloader = pooch.HTTPDownloader(progressbar=True, timeout=_TIMEOUT_S)
        pooch.retrieve(url, known_hash=_announced_md5(head), fname=path.name, path=path.parent, downloader=downloader)
    except (requests.RequestException, ValueError, OSError) as error:
        raise OSError(
            f"cannot download {url}: {error}. Fetch that file by hand, and put it there: {path} (another folder: "
            "FUNMATCH_WEIGHTS)"
        ) from error


def _announced_md5(head: requests.Response) -> str | None:
    """Google's storage says `x-goog-hash: crc32c=..., md5=...`, in base64; pooch wants hex."""
    for entry in head.headers.get("x-goog-hash", "").split(","):
        kind, _, digest = entry.strip().partition("=")
        if kind == "md5":
            return f"md5:{base64.b64decode(digest).hex()}"
    return None


def _compare_with_first_time(path: Path) -> None:
    remembered = path.with_name(path.name + ".sha256")
    now = pooch.file_hash(str(path))
    if not remembered.exists():
        partial = path.with_name(f".{remembered.name}.tmp")
        partial.write_text(now + "\n")
        partial.replace(remembered)  # a kill must not leave an empty one, which would condemn a good file
    elif remembered.read_text().strip() != now:
        raise ValueError(
            f"{path} is not the file it was: its SHA-256 is {now}, {remembered.name} says "
            f"{remembered.read_text().strip()}. Delete both to download it anew"
        )


def main() -> None:
    """List the released files."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    print(f"kept in {folder()} (FUNMATCH_WEIGHTS)\nfrom    {ADDRESS}\n")
    print(f"{'name':31}{'architecture':20}{'classes':>7}{'px':>5}  {'here':6}{'file':38}what")
    for name, entry in RELEASED.items():
        here = "yes" if (folder() / Path(entry.file).name).exists() else "no"
        network = f"{entry.architecture:20}{entry.num_classes:7}{entry.size:5}"
        print(f"{PREFIX + name:31}{network}  {here:6}{entry.file:38}{entry.what}")


if __name__ == "__main__":
    main()
