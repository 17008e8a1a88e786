"""A run's folder: its layout, which stays as it is, and the files that are written here.

    config.json          the settings, resolved             at each start
    run.json             what the settings do not say       at each start
    first_batch.png      views as student and teacher saw   with the first step of each start
    metrics.jsonl        the record: a JSON object a line   as it goes on (metrics.py)
    tensorboard/         the same numbers for TensorBoard   as it goes on (metrics.py)
    wandb/, wandb_id.txt what went to Weights & Biases, and the run's id there (--wandb; weights_and_biases.py)
    checkpoints/         step_00001200.pt, the newest two   every --checkpoint-every steps (checkpoint.py)
    teacher.log          what a teacher beside the run says while there is one; the next ones' teacher_1.log, ...
    model.safetensors    the student                        at the end
    summary.json         the last numbers                   at the end: a folder that has it is of a finished run
    report.png           the curves                         at the end, and by `funmatch report`
    report.html          the page                           by `funmatch report`, also while the run goes on
    curves.png           the page's curves                  likewise

Nothing else is written there. What a later version adds gets a name of its own; a name that is here keeps its meaning.
Reading a folder back is record.py's. Rejected: one file for all; each of these is whole by itself, whenever the run is
killed or read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf.json_format import MessageToDict
from torch import nn

import models
from protos import teacher_pb2 as pb
from student_trainer.audit import ViewAudit
from student_trainer.config import Config, settings
from student_trainer.contact_sheet import first_batch_sheet
from student_trainer.loader import Batch, Lesson
from student_trainer.metrics import read
from student_trainer.world import World
from views.mix import mix
from views.view import Rows

_SHEET_VIEWS = 8  # pairs on the sheet of the first batch


def write_facts(
    config: Config, student: nn.Module, who: Sequence[pb.Description], num_train: int, total_steps: int
) -> None:
    """config.json, and run.json with what that does not say and a report needs."""
    _write_whole(config.run_dir / "config.json", settings(config))
    facts = {
        "num_train": num_train,
        "num_classes": getattr(student, "num_classes", None),
        "parameters": sum(p.numel() for p in student.parameters()),
        "steps": total_steps,
        "teacher": [MessageToDict(one, preserving_proto_field_name=True) for one in who],
    }
    _write_whole(config.run_dir / "run.json", facts)


def _write_whole(path: Path, what: dict[str, Any]) -> None:
    """As JSON, and never half of it: a report may read while this writes."""
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(what, indent=1) + "\n")
    half.replace(path)


def draw_first_batch(config: Config, batch: Batch, asked: Rows, audits: Sequence[ViewAudit]) -> None:
    """first_batch.png: the first views as student and teacher saw them, and mixed."""
    num = min(_SHEET_VIEWS, len(batch.rows))
    rows = batch.rows.take(0, num)
    own = batch.pixels[torch.from_numpy(batch.rows.views_of(0, num))].cpu()
    mixed = mix(own, torch.from_numpy(rows.partner).long(), torch.from_numpy(rows.lam), (0, 0, 0), (1, 1, 1))
    captions = [
        f"{sample} ({y},{x}) {h}x{w}{' flipped' if flip else ''}"
        for sample, (y, x, h, w), flip in zip(rows.sample[:num], rows.box[:num], rows.flip[:num], strict=True)
    ]
    theirs = audits[0].sheet(Lesson(batch.lesson.step, batch.rows, asked), num) if audits else None
    path = config.run_dir / "first_batch.png"
    half = path.with_suffix(".tmp")  # a report of a run that goes on must not read half a picture
    first_batch_sheet(half, own[:num].numpy(), theirs, captions, student_mixed=mixed.permute(0, 2, 3, 1).numpy())
    half.replace(path)


def finish(
    config: Config, world: World, student: nn.Module, card: models.ModelCard, total_steps: int
) -> dict[str, Any]:
    """Write model.safetensors, summary.json and report.png; return the summary."""
    summary: dict[str, Any] = {}
    if world.is_main:
        from student_trainer.run_picture import draw  # and matplotlib, which no rank shall wait for when it begins

        models.save(config.run_dir / "model.safetensors", student, card)
        summary = _summary(config, total_steps)
        _write_whole(config.run_dir / "summary.json", summary)
        draw(config.run_dir)
    return world.broadcast_object(summary)


def _summary(config: Config, total_steps: int) -> dict[str, Any]:
    """The numbers that a run comes down to, from its record."""
    lines = read(config.run_dir)
    last = next(line for line in reversed(lines) if "eval/student_top1" in line or "eval/kl" in line)
    rates = [line["images_per_s"] for line in lines if line.get("images_per_s")]
    audits = [line["view_mismatch"] for line in lines if line.get("view_mismatch") is not None]
    return {
        "recipe": config.recipe,
        "steps": total_steps,
        "images_seen": total_steps * config.optim.batch_size,
        **{name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")},
        "images_per_s": float(np.median(np.array(rates, dtype=float))),
        "view_mismatch_max": max((value for value in audits if value is not None), default=None),
        "views_audited_at_steps": len(audits),
    }
