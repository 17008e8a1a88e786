"""teacher_server/replay.py and the way of a batch to the device: what can be seen without one, and with one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import models
from teacher_server.batcher import Part
from teacher_server.model import Scene, Teacher
from views.mix import mix

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def scene(num_views: int = 9, seed: int = 0) -> Scene:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (num_views, 32, 32, 3), dtype=torch.uint8, generator=generator)
    num_rows = num_views - 1
    return Scene(pixels, torch.randperm(num_rows, generator=generator) + 1, torch.rand(num_rows, generator=generator))


def a_card(mean, std) -> models.ModelCard:
    return models.ModelCard(architecture="resnetv2_14x05_bit", num_classes=3, size=32, mean=mean, std=std)


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (2, 5), (7, 8)])
def test_what_crosses_to_the_device_is_each_view_once_and_makes_the_same_rows(start, stop):
    shown, card = scene(), a_card((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    used, place = shown.seen_by(start, stop)
    assert len(used) == len(set(used.tolist())) < 2 * (stop - start) + 1
    num_rows = stop - start
    partner = torch.arange(num_rows, 2 * num_rows)
    rows = mix(shown.pixels[used][place], partner, shown.lam[start:stop], card.mean, card.std)
    assert torch.equal(rows, shown.rows(start, stop, card))


def test_a_batch_may_be_begun_before_the_one_before_it_is_asked_for(tiny_model):
    check_begun_together(tiny_model, torch.device("cpu"), "float32")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_on_cuda_too(tiny_model, precision):
    check_begun_together(tiny_model, torch.device("cuda", 0), precision)


def check_begun_together(model, device, precision):
    module, card = models.load(model)
    teacher = Teacher(module, card, device=device, precision=precision, batch_rows=8)
    first, second = scene(seed=1), scene(seed=2)
    batches = [[Part(first, 0, 8)], [Part(second, 3, 7), Part(first, 0, 2)], [Part(second, 0, 1)]]
    alone = [teacher.answer(batch) for batch in batches]
    begun = [teacher.begin(batch) for batch in batches]
    for waits, expected in zip(begun, alone, strict=True):
        answer = waits()
        assert answer.dtype == np.float32
        np.testing.assert_array_equal(answer, expected)
    np.testing.assert_array_equal(alone[1][4:], alone[0][:2])


@pytest.mark.gpu
@needs_gpu
def test_on_cuda_pixels_of_either_side_are_mixed_as_on_the_cpu(tiny_model):
    module, card = models.load(tiny_model)
    shown, device = scene(), torch.device("cuda", 0)
    there = Scene(shown.pixels.to(device), shown.partner, shown.lam)
    for one in (shown, there):
        torch.testing.assert_close(one.rows_on(device, 2, 7, card).cpu(), shown.rows(2, 7, card), rtol=0, atol=1e-6)
    here = Teacher(copy.deepcopy(module), card, device=torch.device("cpu"), precision="float32", batch_rows=8)
    far = Teacher(module, card, device=device, precision="float16", batch_rows=8)
    np.testing.assert_allclose(far.answer([Part(there, 0, 8)]), here.answer([Part(shown, 0, 8)]), atol=0.1)


@pytest.mark.gpu
@needs_gpu
def test_on_cuda_a_network_that_cannot_be_recorded_answers_all_the_same():
    class Asks(torch.nn.Module):
        head = torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3)) * float(x.abs().max().isfinite())

    half = (0.5, 0.5, 0.5)
    teacher = Teacher(Asks(), a_card(half, half), device=torch.device("cuda", 0), precision="float32", batch_rows=8)
    rows = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(teacher.logits(rows).cpu(), rows.mean(dim=(2, 3)))
