"""What a run leaves in its folder beside its record (metrics.py) and its checkpoints (checkpoint.py).

    config.json          the settings, resolved             at each start
    run.json             what the settings do not say       at each start
    first_batch.png      views as student and teacher saw   with the first step of each start
    model.safetensors    the student                        at the end
    summary.json         the last numbers; written last: a folder that has it is of a finished run
    report.png           the curves

Reading it back is record.py's. Rejected: one file for all; each of these is whole by itself, whenever the run is
killed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from google.protobuf.json_format import MessageToDict
from torch import nn

import models
from protos import teacher_pb2 as pb
from student_trainer import report
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
    (config.run_dir / "config.json").write_text(json.dumps(settings(config), indent=1) + "\n")
    facts = {
        "num_train": num_train,
        "num_classes": getattr(student, "num_classes", None),
        "parameters": sum(p.numel() for p in student.parameters()),
        "steps": total_steps,
        "teacher": [MessageToDict(one, preserving_proto_field_name=True) for one in who],
    }
    (config.run_dir / "run.json").write_text(json.dumps(facts, indent=1) + "\n")


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
    first_batch_sheet(path, own[:num].numpy(), theirs, captions, student_mixed=mixed.permute(0, 2, 3, 1).numpy())


def finish(
    config: Config, world: World, student: nn.Module, card: models.ModelCard, total_steps: int
) -> dict[str, Any]:
    """Write model.safetensors, summary.json and report.png; return the summary."""
    summary: dict[str, Any] = {}
    if world.is_main:
        models.save(config.run_dir / "model.safetensors", student, card)
        summary = _summary(config, total_steps)
        (config.run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        report.draw(config.run_dir)
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
