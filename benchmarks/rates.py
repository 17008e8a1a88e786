"""How fast this machine teaches, learns and decodes: what the planner measures where nobody says it.

Each by itself, with the code of a run: the server's network with its fixed shape, a training step up to the update,
the graph that both sides render with. Weights are random where a file would have to be downloaded: they change no rate.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import models
from data_prep.index import Index
from models import ModelCard, zoo
from student_trainer.config import Config
from student_trainer.loss import distillation_loss
from student_trainer.optimizer import clip_gradients, make_optimizer
from teacher_server.model import Teacher, choose_batch_rows, choose_precision
from views.draw import Plan
from views.render import Renderer, Rendering

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.bfloat16}
_LARGEST_SHARE = {"cpu": 32, "cuda": 256}  # rows of a step that is timed: enough to fill the device
_MIN_RUNS = 2
_HEIGHT, _WIDTH = 375, 500  # of a picture, where there is no data set here: ImageNet's most common size
_VIEWS = 64


def of_teacher(name: str, size: int, num_classes: int, device: torch.device, seconds: float) -> float:
    """Rows a second of a teacher's forward pass, in the server's precision and batch shape."""
    if Path(name).exists():
        module, card = models.load(name)
    else:
        architecture = zoo.released(name).architecture if name.startswith(zoo.PREFIX) else name
        half = (0.5, 0.5, 0.5)
        module = models.create(architecture, num_classes)
        card = ModelCard(architecture=architecture, num_classes=num_classes, size=size, mean=half, std=half)
    rows = choose_batch_rows(None, device)
    teacher = Teacher(module, card, device=device, precision=choose_precision("auto", device), batch_rows=rows)
    batch = torch.randn(rows, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return rows / median_s(lambda: teacher.logits(batch), device, seconds)


def of_student(config: Config, num_classes: int, device: torch.device, seconds: float) -> float:
    """Rows a second of one process's step: forward, loss, backward, clipping, update."""
    student, size = config.student, config.student.size
    rows = min(config.optim.batch_size, _LARGEST_SHARE[device.type])
    model = models.create(student.architecture, num_classes).to(device).train()
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config.optim)
    images = torch.randn(rows, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.randn(1, rows, num_classes, device=device)

    def step() -> None:
        with torch.autocast(device.type, _DTYPES[config.precision], enabled=config.precision != "float32"):
            logits = model(images).float()
        optimizer.zero_grad(set_to_none=True)
        loss = distillation_loss(logits, targets, config.optim.temperature)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(model.parameters(), config.optim.clip_norm)
        optimizer.step()

    return rows / median_s(step, device, seconds)


def of_decoding(config: Config, size: int, index: Index | None, seconds: float) -> float:
    """Views a second of one core, by the recipe's law of views: of the data set where it is here, else of one JPEG."""
    samples = index.splits[config.data.train] if index else range(_VIEWS)
    height = index.height if index else np.full(_VIEWS, _HEIGHT, np.int32)
    width = index.width if index else np.full(_VIEWS, _WIDTH, np.int32)
    plan = Plan(
        seed=0, batch_size=_VIEWS, law=config.views.student, samples=samples, height=height, width=width
    )  # fmt: skip
    rendering = Rendering(
        size=size, interpolation=config.student.interpolation, antialias=config.student.antialias
    )  # fmt: skip
    renderer = Renderer(rendering, _VIEWS + 1, None, 1)
    picture = None if index else _a_picture()
    number = 0

    def run() -> None:
        nonlocal number
        rows = plan.rows(number)
        number += 1
        own = slice(0, _VIEWS)
        files = index.read(rows.sample[own]) if index else [picture] * _VIEWS
        renderer.render(files, np.arange(_VIEWS, dtype=np.int32), rows.box[own], rows.flip[own])  # type: ignore[arg-type]

    return _VIEWS / median_s(run, torch.device("cpu"), seconds)


def median_s(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Of one call, after one that warms up; calls go on for so many seconds, and there are at least two."""

    def timed() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed()
    times: list[float] = []
    while len(times) < _MIN_RUNS or sum(times) < seconds:
        times.append(timed())
    return statistics.median(times)


def _a_picture() -> np.ndarray:
    """A JPEG with structure at several scales, about as heavy as ImageNet's."""
    rng = np.random.default_rng(0)
    total = np.zeros((_HEIGHT, _WIDTH, 3))
    for cells in (3, 8, 20, 60, 200):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    Image.fromarray((total / 5).astype(np.uint8)).save(file, "JPEG", quality=95)
    return np.frombuffer(file.getvalue(), np.uint8)
