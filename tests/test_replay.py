"""teacher_server/replay.py and the way of a batch to the device: what can be seen without one, and with one."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch

import models
from teacher_server.batcher import Part
from teacher_server.model import Scene, Teacher
from teacher_server.replay import Replay
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


class Stream:
    """Stands in for one of CUDA's: everything happens at once, and what waits for what is written down."""

    said: list[str]

    def __init__(self, *_: object) -> None:
        pass

    def wait_stream(self, _: Stream) -> None:
        self.said.append("wait for a stream")

    def synchronize(self) -> None:
        self.said.append("wait")


class Event(Stream):
    def __init__(self, *, blocking: bool) -> None:
        assert blocking, "a core is burnt by waiting"

    def record(self, _: Stream) -> None:
        self.said.append("logits are on their way")


class Recording:
    """Stands in for a recorded graph: what is in the input now, through the network, into the same output."""

    def __init__(self, replay: Replay) -> None:
        self.output, self._replay = replay._output.clone(), replay

    def replay(self) -> None:
        Stream.said.append("replay")
        self.output.copy_(self._replay._forward(self._replay._input))


@pytest.fixture
def no_device(monkeypatch):
    """What replay.py asks of CUDA, without one."""
    monkeypatch.setattr(Stream, "said", [], raising=False)
    for name, stands_in in (("Stream", Stream), ("Event", Event)):
        monkeypatch.setattr(torch.cuda, name, stands_in)
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **kinds: empty(*sizes, **kinds))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)

    def recorded(self):
        recording = Recording(self)
        self._output = recording.output
        return recording

    monkeypatch.setattr(Replay, "_recorded", recorded)


def test_a_replayed_pass_answers_as_the_network_does_whatever_the_batches_before_it_left(tiny_model, no_device):
    module, card = models.load(tiny_model)
    teacher = Teacher(module, card, device=torch.device("cpu"), precision="float32", batch_rows=8)
    with torch.inference_mode():
        replay = Replay(teacher._module, (8, 3, 32, 32), torch.float32, teacher.device)
        first, second = scene(seed=1), scene(seed=2)
        Stream.said.clear()
        for batch in ([(first, 0, 8)], [(second, 3, 7), (first, 0, 2)], [(second, 0, 1)]):
            wait = replay.begin(lambda: [shown.rows_on(teacher.device, *where, card) for shown, *where in batch])  # noqa: B023
            answer = wait()
            np.testing.assert_array_equal(answer, teacher.answer([Part(*rows) for rows in batch]))
            assert Stream.said == ["wait for a stream"] * 2 + ["replay", "logits are on their way", "wait"]
            Stream.said.clear()
        rows = torch.randn(3, 3, 32, 32)
        assert torch.equal(replay.logits(rows), teacher.logits(rows))


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
