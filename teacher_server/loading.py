"""What must be there before a teacher serves: data sets, decoders, the network, warm and past its gate.

May take minutes; nothing here listens or answers (server.py).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import models
from data_prep.index import Index
from models import ModelCard
from protos import teacher_pb2 as pb
from teacher_server import events, gate
from teacher_server.config import Config
from teacher_server.model import (
    Teacher,
    be_reproducible,
    choose_batch_rows,
    choose_device,
    choose_for_onnx,
    choose_precision,
    fingerprint,
    load,
)
from teacher_server.pictures import Pictures, make_renderers

_NUM_RENDERERS = 2  # one renders while the other's pictures are read


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A teacher that may serve."""

    description: pb.Description
    pictures: Pictures
    teacher: Teacher
    report: gate.Report


def load_teacher(config: Config) -> Loaded:
    """Load everything that the config names.

    Raises:
        ValueError, OSError: model, data set or device are not what the config says.
        GateError: the network must not be served.
    """
    indexes = [Index.open(root) for root in config.data]
    device = choose_device(config.device)
    be_reproducible(config.num_threads)
    module, card = load(config)
    renderers, version = make_renderers(
        card.size, config.interpolation, config.antialias,
        device=device, num_threads=config.num_threads, num=_NUM_RENDERERS,
    )  # fmt: skip
    pictures = Pictures(indexes, renderers, max_pixels=config.max_picture_pixels, max_bytes=config.max_picture_bytes)
    weights_digest = models.weights_digest(module)
    teacher, report = _gated_teacher(module, card, config, device, pictures)
    description = _describe(config, teacher, weights_digest, version, pictures)
    description.batch_invariant = report.batch_invariant
    return Loaded(description=description, pictures=pictures, teacher=teacher, report=report)


def _gated_teacher(
    module: nn.Module, card: ModelCard, config: Config, device: torch.device, pictures: Pictures
) -> tuple[Teacher, gate.Report]:
    """The teacher, warm; GateError if it must not serve."""
    asked, asked_rows = config.precision, config.batch_rows
    if isinstance(module, models.OnnxNetwork):
        asked, asked_rows = "float32", choose_for_onnx(module, config.precision, config.batch_rows)
    precision = choose_precision(asked, device)
    batch_rows = choose_batch_rows(asked_rows, device)
    shape: dict[str, Any] = {"device": device, "batch_rows": batch_rows}
    reference = None
    if precision != "float32":
        reference = Teacher(copy.deepcopy(module), card, precision="float32", **shape)
    teacher = Teacher(module, card, precision=precision, **shape)
    pixels, source = _gate_pixels(config, card, pictures)
    report = gate.measure(teacher, reference, pixels)
    events.event("gate", pictures=source, precision=precision, **asdict(report))
    gate.judge(report, config)
    return teacher, report


def _gate_pixels(config: Config, card: ModelCard, pictures: Pictures) -> tuple[torch.Tensor, str]:
    """Views for the gate, and where they are from: whole pictures, spread over the first data set."""
    index = next(iter(pictures.data_sets.values()), None)
    if index is None or not pictures.renders:
        return gate.synthetic_pixels(config.gate_images, card.size), "synthetic"
    sample = np.unique(np.linspace(0, len(index) - 1, config.gate_images).astype(np.int64))
    return pictures.whole(index, sample), index.name


def _describe(
    config: Config, teacher: Teacher, weights_digest: str, render_version: str, pictures: Pictures
) -> pb.Description:
    card = teacher.card
    decoder = "" if not pictures.renders else "gpu" if teacher.device.type == "cuda" else "cpu"
    rendering = pb.Rendering(
        size=card.size,
        interpolation=config.interpolation,
        antialias=config.antialias,
        version=render_version,
        decoder=decoder,
    )
    return pb.Description(
        fingerprint=fingerprint(
            {
                "architecture": card.architecture,
                "weights": weights_digest,
                "num_classes": card.num_classes,
                "mean": card.mean,
                "std": card.std,
                "precision": teacher.precision,
                "device": teacher.device.type,
                "kernels": teacher.kernels,
                "batch_rows": teacher.batch_rows,
                "rendering": [card.size, config.interpolation, config.antialias, render_version, decoder],
            }
        ),
        model=card.architecture,
        num_classes=card.num_classes,
        precision=teacher.precision,
        rendering=rendering,
        max_rows=config.max_rows,
        data_sets=[
            pb.DataSet(name=index.name, digest=index.digest, num_samples=len(index))
            for index in pictures.data_sets.values()
        ],
        weights_digest=weights_digest,
        renders=pictures.renders,
    )
