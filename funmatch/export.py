"""`funmatch export RUN --out DIR`: a finished run's student as others use it: for timm, and as ONNX.

    DIR/model.safetensors, DIR/config.json   timm.create_model("local-dir:DIR", pretrained=True)
    DIR/model.onnx                           with --onnx, for any ONNX runtime
    DIR/README.md                            the model card

Nothing is written that was not read back and compared with the run's own student, on pictures of its evaluation split
where they are still there: timm's to the last bit, ONNX within a bound. DIR appears by one rename: one that exists is
whole.

Not here: how the two kinds of files are written (timm_folder.py, onnx_file.py), what the card says (model_card.py).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import nn

import models
from data_prep.index import Index
from funmatch import model_card, onnx_file, timm_folder
from funmatch.timm_folder import Preprocessing
from models import ModelCard
from student_trainer.pictures import Pictures
from student_trainer.record import Run
from teacher_server.gate import synthetic_pixels
from views.draw import ViewLaw
from views.mix import mix
from views.render import Renderer, Rendering
from views.setting import FixedViews

_NUM_PICTURES = 64
_BOUND = 1e-3
"""ONNX may differ from torch by this share of the logits' range: a hundred times what float32 costs, and a hundredth of
what would change an answer that is not on the edge."""


class Refused(ValueError):  # noqa: N818  (the sentence is the error)
    """What was written does not answer as the run's student does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far an exported file is from the run's own student."""

    num_pictures: int
    pictures: str
    """Where they are from."""
    max_difference: float
    """Largest |difference| of all logits."""
    spread: float
    """Greatest less least of all logits."""
    agreement_top1: float
    """Share of pictures with the same top-1 class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    timm: Parity | None
    onnx: Parity | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Student:
    """A finished run's network, what it was trained on, and pictures to try it with."""

    run: Run
    model: nn.Module
    card: ModelCard
    seen: Preprocessing
    classes: tuple[str, ...]
    images: torch.Tensor
    """float32 [N, 3, S, S] as the network sees them."""
    pictures: str


def export(run: Path, out: Path, *, onnx: bool = False, only_onnx: bool = False) -> Exported:
    """Write the student of a finished run to a new folder.

    Args:
        run: the run's folder.
        out: the folder to make.
        onnx: write model.onnx too.
        only_onnx: write model.onnx and nothing for timm, for a network that timm has not.

    Raises:
        ValueError, OSError: the run has no student yet, `out` exists, or a file cannot be written.
        Refused: a file was written that answers otherwise; nothing is left of it.
    """
    student = _read(run)
    with torch.inference_mode():
        expected = timm_folder.answers(student.model, student.images).numpy()
    with _whole(out) as folder:
        of_timm, of_onnx = None, None
        if not only_onnx:
            read_back = timm_folder.write(folder, student.model, student.card, student.seen, student.classes)
            of_timm = _parity(student, expected, timm_folder.answers(read_back, student.images).numpy())
            if of_timm.max_difference > 0:
                raise Refused(_sentence("timm's folder", of_timm, 0.0))
        if onnx or only_onnx:
            file = folder / onnx_file.FILE
            onnx_file.write(file, student.model, student.card)
            of_onnx = _parity(student, expected, onnx_file.answers(file, student.images.numpy()))
            if not of_onnx.max_difference <= _BOUND * of_onnx.spread:  # a NaN is refused too
                raise Refused(_sentence("the ONNX file", of_onnx, _BOUND * of_onnx.spread))
        exported = Exported(folder=out, timm=of_timm, onnx=of_onnx)
        text = model_card.text(student.run, student.card, student.seen, student.classes, _tried(exported))
        (folder / "README.md").write_text(text, encoding="utf-8")
    return exported


def main(argv: list[str] | None = None) -> int:
    """`funmatch export`; returns the exit code."""
    return tyro.cli(_export, args=argv, prog="funmatch export")


def _export(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    out: Path,
    onnx: bool = False,
    only_onnx: bool = False,
) -> int:
    """Write a finished run's student for others: a folder that timm reads, a model card, and with --onnx an ONNX file.

    Example: funmatch export runs/flowers102 --out exported/flowers102 --onnx

    Args:
        run: the folder of a finished run.
        out: folder to make; it must not exist, and appears when everything in it was read back and compared.
        onnx: write model.onnx too, for any ONNX runtime; needs the extra `export`.
        only_onnx: write model.onnx and nothing for timm, for the few networks that timm has not.
    """
    try:
        exported = export(run, out, onnx=onnx, only_onnx=only_onnx)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for what, line in _tried(exported).items():
        print(f"{what}: {line}")
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}. Choose a licence in README.md")
    return 0


def _read(folder: Path) -> _Student:
    run = Run(folder)
    file = folder / "model.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no model.safetensors: the run has not finished; go on with it first")
    model, card = models.load(file)
    settings = run.settings
    if not settings:
        raise FileNotFoundError(f"{folder} has no config.json, which says how its student sees pictures")
    whole = settings["data.eval_crop"] == "rs"
    seen = Preprocessing(
        interpolation={"linear": "bilinear", "cubic": "bicubic"}[settings["student.interpolation"]],
        crop_mode="squash" if whole else "center",
        crop_pct=1.0 if whole else float(settings["data.eval_keep"]),
    )
    index, why_not = _data_set(settings)
    pixels = synthetic_pixels(_NUM_PICTURES, card.size) if index is None else _evaluation_views(index, settings, card)
    num = len(pixels)
    return _Student(
        run=run,
        model=model.eval(),
        card=card,
        seen=seen,
        classes=index.classes if index is not None and len(index.classes) == card.num_classes else (),
        images=mix(pixels, torch.arange(num), torch.ones(num), card.mean, card.std).contiguous(),
        pictures=f"synthetic pictures ({why_not})" if index is None else f"pictures of {index.name}",
    )


def _data_set(settings: dict[str, Any]) -> tuple[Index | None, str]:
    """The data set that the run was evaluated on, if it is still there; and why not."""
    root = settings["data.evaluate_root"] or settings["data.root"]
    try:
        index = Index.open(root)
    except (OSError, ValueError):
        return None, "the data set is not here any more"
    if settings["data.evaluate"] not in index.splits:
        return None, "the data set has another division now"
    return index, ""


def _evaluation_views(index: Index, settings: dict[str, Any], card: ModelCard) -> torch.Tensor:
    """Views as the run evaluates, spread over the split: uint8 [N, S, S, 3]."""
    split = index.splits[settings["data.evaluate"]]
    samples = np.unique(np.linspace(split.start, split.stop - 1, _NUM_PICTURES).astype(np.int64))
    law = ViewLaw(crop=settings["data.eval_crop"], flip=False, mixup=False, keep=settings["data.eval_keep"])
    rows = FixedViews(law=law).rows(samples, index.height, index.width)
    rendering = Rendering(
        size=card.size, interpolation=settings["student.interpolation"], antialias=settings["student.antialias"]
    )
    return Pictures(index, rows).render(Renderer(rendering, len(samples), None, num_threads=1), rows)


def _parity(student: _Student, expected: Any, found: Any) -> Parity:
    return Parity(
        num_pictures=len(expected),
        pictures=student.pictures,
        max_difference=float(np.abs(expected - found).max()),
        spread=float(expected.max() - expected.min()),
        agreement_top1=float((expected.argmax(1) == found.argmax(1)).mean()),
    )


def _sentence(what: str, parity: Parity, bound: float) -> str:
    return (
        f"{what} does not answer as the run's student does: on {parity.num_pictures} {parity.pictures} logits differ "
        f"by up to {parity.max_difference:.3g}, bound {bound:.3g}, and top-1 agrees on {parity.agreement_top1:.1%}. "
        "Nothing was kept; please report it with the name of the network"
    )


def _tried(exported: Exported) -> dict[str, str]:
    """What was read back and compared, in a line each."""
    return {
        what: f"logits differ from the run's student by at most {parity.max_difference:.2g} (their range is "
        f"{parity.spread:.3g}) and top-1 agrees on {parity.agreement_top1:.1%} of {parity.num_pictures} "
        f"{parity.pictures}"
        for what, parity in {"timm": exported.timm, "ONNX": exported.onnx}.items()
        if parity is not None
    }


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it at the end, or nothing."""
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out, or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
