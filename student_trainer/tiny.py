"""`--tiny`: any recipe in a minute on two CPU cores, through the same code, to see that all of it runs.

SHRINKS, which a tiny run prints, says what is not the recipe's own.

A finished one is not run again, like any other run: remove runs/tiny/runs.

`tiny` changes a config and touches nothing; `make_parts` writes what it named, where that is missing, and nothing that
the command line named instead. A dictionary of tiny recipes beside the real ones was rejected: it would drift.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np

from models import zoo
from student_trainer.config import Config

FOLDER = Path("runs/tiny")
"""Where data and weights of tiny runs are kept."""

SHRINKS = """\
--tiny shrinks pictures (scikit-learn's digits; for out of domain, noise), networks (a small BiT, or MobileNetV3 for
one; teachers with random weights, initial weights drawn on the spot), views (the student's to 32 px, teachers' in
proportion), crops of an ensemble (8) and length (8 steps of 32; 26 for Shampoo). It keeps view setting, targets, kind
of ensemble, optimizer, schedule's shape, temperature, precision, store and evaluation. The accuracy means nothing."""

_ROOT = Path(__file__).resolve().parents[1]
_BATCH, _SIZE = 32, 32
_STEPS = {"adam": 8, "sgdm": 8, "shampoo": 26}  # Shampoo's own directions begin with its 25th step
_NUM_TRAIN = {"digits": 1198, "noise": 64}
_NUM_CLASSES = 10
_TEACHER = "resnetv2_14x05_bit"


def tiny(config: Config, folder: Path = FOLDER) -> Config:
    """The same run, tiny; data and weights lie in folder."""
    elsewhere = config.data.evaluate_root is not None
    pictures = "noise" if elsewhere else "digits"
    scale = _SIZE / config.student.size
    steps = _STEPS[config.optim.optimizer]
    return dataclasses.replace(
        config,
        run_dir=folder / "runs" / config.recipe,
        data=dataclasses.replace(
            config.data, root=folder / pictures, evaluate_root=folder / "digits" if elsewhere else None
        ),
        views=dataclasses.replace(config.views, num_crops=8),
        student=dataclasses.replace(
            config.student,
            architecture=_small(config.student.architecture),
            size=_SIZE,
            weights=str(folder / "initial.npz") if config.student.weights else "",
        ),
        teacher=dataclasses.replace(
            config.teacher,
            model=tuple(str(folder / f"teacher_{round(px * scale)}.safetensors") for px in teacher_sizes(config)),
            store=str(folder / "logits"),
            rows_per_request=16,
            audit_every=4,
        ),
        optim=dataclasses.replace(
            config.optim, batch_size=_BATCH, epochs=steps * _BATCH / _NUM_TRAIN[pictures], warmup_steps=2,
            inverse_every=8,
        ),
        evaluate_every=0, eval_batch=64, checkpoint_every=steps, log_every=1, decode_threads=1,
    )  # fmt: skip


def teacher_sizes(config: Config) -> tuple[int, ...]:
    """Pixels a side at which the teachers of a config look: released ones say it in their names."""
    if config.targets == "labels":
        return ()
    names = config.teacher.model
    sizes = tuple(zoo.released(name).size for name in names if name.startswith(zoo.PREFIX))
    return sizes or (config.teacher.size or config.student.size,)


def make_parts(config: Config, folder: Path = FOLDER) -> None:
    """Write the data sets and weights that `tiny(..., folder)` named, where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in (config.data.root, config.data.evaluate_root, *config.teacher.model, config.student.weights):
        path = Path(part or "")
        if path.parent == folder and not path.exists():
            print(f"making {path}", flush=True)
            _MAKE[path.suffix](path)


def _small(architecture: str) -> str:
    if architecture.startswith("mobilenetv3"):
        return "mobilenetv3_small_050_gn8" if architecture.endswith("_gn8") else "mobilenetv3_small_050"
    return "resnetv2_14x05_bit"


def _make_data(root: Path) -> None:
    if root.name == "digits":
        command = ["digits", "--out", str(root)]
    else:
        pictures = root.with_name(f"{root.name}_pictures")
        _draw_noise(pictures)
        command = ["folder", "--source", str(pictures), "--out", str(root)]
    subprocess.run(
        [sys.executable, "-m", "data_prep.prepare", *(str(Path(c).absolute()) if "/" in c else c for c in command)],
        cwd=_ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _draw_noise(folder: Path) -> None:
    """Pictures of nothing, in classes that the teacher does not know."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(_NUM_TRAIN["noise"]):
        path = folder / f"kind_{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(path)


def _make_teacher(path: Path) -> None:
    import torch

    import models

    size = int(path.stem.partition("_")[2])
    with torch.random.fork_rng():
        torch.manual_seed(size)  # teachers of two sizes are two networks
        model = models.create(_TEACHER, _NUM_CLASSES)
        torch.nn.init.normal_(model.head.fc.weight, 0.0, 0.1)  # type: ignore[union-attr, arg-type]
    half = (0.5, 0.5, 0.5)
    card = models.ModelCard(architecture=_TEACHER, num_classes=_NUM_CLASSES, size=size, mean=half, std=half)
    models.save(path, model, card)


def _make_initial_weights(path: Path) -> None:
    """A small BiT of 21 classes under big_vision's names, as a released .npz has them."""
    import torch

    import models
    from models import bit

    with torch.random.fork_rng():
        torch.manual_seed(21)
        model = models.create(_TEACHER, 21)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    partial = path.with_name(f"partial_{path.name}")
    np.savez(partial, allow_pickle=False, **bit.native(tensors))
    partial.replace(path)


_MAKE = {"": _make_data, ".safetensors": _make_teacher, ".npz": _make_initial_weights}
