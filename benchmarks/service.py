"""Row 3: what a replica delivers of what its network can: `python -m benchmarks.service`.

A real server process with a real prepared data set, asked by a real fleet: JPEG references in, logits out, 256 rows a
request, mixed. Beside it the same network alone, on rows that are ready, in a process with the same threads and
settings (benchmarks/forward.py). On the CPU client, decoding and network share the cores, so that their ratio has a
floor below 1: decoding and mixing take what they take. Weights are random; they change no time.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import models
from benchmarks import figure, photographs
from benchmarks.figure import Figure
from data_prep.index import Index
from student_trainer.fleet import Fleet
from views.draw import Plan, ViewLaw
from views.mix import mix
from views.render import Renderer, Rendering
from views.view import Rows

_ROOT = Path(__file__).resolve().parents[1]
_ROWS = 256  # of a request
_UNDER_WAY = 3  # requests: one on the network, one decoded, one waiting
_CLASSES = 1000
_PAIRS = 4
_NETWORKS = ("resnetv2_50x1_bit", 128), ("tf_efficientnet_lite0", 224)
"""The paper's student as a teacher, and one that costs a third of it."""
_SETTINGS = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # the server's own, for both
_DEADLINE_S = 300.0  # of a request on a slow machine


@dataclass(frozen=True, slots=True)
class _Costs:
    """Core seconds a row, beside the network's."""

    decoding: float
    mixing: float


def measure(quick: bool) -> Iterator[Figure]:
    """Both networks; one small one if quick."""
    networks = (("resnetv2_14x05_bit", 64),) if quick else _NETWORKS
    with tempfile.TemporaryDirectory() as folder:
        index = photographs.prepared(Path(folder), 32 if quick else _ROWS)
        for architecture, size in networks:
            model = _model(Path(folder), architecture, size)
            yield _figure(index, model, architecture, size, quick)


def _model(folder: Path, architecture: str, size: int) -> Path:
    torch.manual_seed(0)
    half = (0.5, 0.5, 0.5)
    card = models.ModelCard(architecture=architecture, num_classes=_CLASSES, size=size, mean=half, std=half)
    file = folder / f"{architecture}.safetensors"
    models.save(file, models.create(architecture, _CLASSES), card)
    return file


def _figure(index: Index, model: Path, architecture: str, size: int, quick: bool) -> Figure:
    cores = len(os.sched_getaffinity(0))
    rows = _plan(index).rows(3, 0, _ROWS)
    costs = _costs(index, rows, size)
    pairs, requests, seconds = (1, 1, 0.5) if quick else (_PAIRS, 2, 6.0)
    with _server(model, index) as address, _network_alone(model, cores) as rate_alone:
        service, alone = [], [rate_alone(seconds)]
        for _ in range(pairs):
            service.append(_rate(address, index, rows, requests))
            alone.append(rate_alone(seconds))
    # Beside the mean of what was before and after it: a machine gains or loses a third within minutes.
    ratios = sorted(rate / statistics.mean(alone[i : i + 2]) for i, rate in enumerate(service))
    network = cores / statistics.median(alone)
    floor = cores / (network + costs.decoding + costs.mixing)
    return Figure(
        row="3", name=f"replica, JPEG references in, logits out, {architecture} at {size}, {cores} cores",
        value=statistics.median(service), unit="rows/s", beside="its network alone, rows ready",
        alternative=statistics.median(alone), floor=floor, goal=(">=", 0.85),
        judged=statistics.median(ratios),
        note=f"client, decoding and network share the cores: a row takes {1000 * network:.1f} core ms in the network, "
        f"{1000 * costs.decoding:.2f} to decode, {1000 * costs.mixing:.2f} to mix; floor: these alone, a ratio of "
        f"{floor / statistics.median(alone):.3f}; pictures of {photographs.WIDTH} x {photographs.HEIGHT}, "
        f"{_ROWS} rows a request, {_UNDER_WAY} under way; {pairs} ratios, {ratios[0]:.3f} to {ratios[-1]:.3f}",
    )  # fmt: skip


def _plan(index: Index) -> Plan:
    return Plan(
        seed=0, batch_size=_ROWS, law=ViewLaw(), samples=range(len(index)), height=index.height, width=index.width
    )


def _costs(index: Index, rows: Rows, size: int) -> _Costs:
    """Decoding and mixing by themselves, on one thread each, in time of this process's cores."""
    used, image = np.unique(rows.sample, return_inverse=True)
    pictures = index.read(used)
    renderer = Renderer(Rendering(size=size), 128, None, 1)
    pixels = renderer.render(pictures, image.astype(np.int32), rows.box, rows.flip)
    decoding = _core_s(lambda: renderer.render(pictures, image.astype(np.int32), rows.box, rows.flip))
    partner, lam = torch.from_numpy(rows.partner).long(), torch.from_numpy(rows.lam)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    part = slice(0, 32)  # a batch of the network
    own = partner[part].clamp(max=32)
    mixing = _core_s(lambda: mix(pixels[:33], own, lam[part], (0.5,) * 3, (0.5,) * 3))
    torch.set_num_threads(threads)
    return _Costs(decoding / _ROWS, mixing / 32)


def _core_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


def _rate(address: str, index: Index, rows: Rows, requests: int) -> float:
    """Rows a second, from nothing asked to all answered: the cores end up with no work that is not counted."""
    with Fleet([address], data_digest=index.digest, client="benchmark", rows_per_request=_ROWS, window=_UNDER_WAY,
               deadline_s=_DEADLINE_S) as fleet:  # fmt: skip
        began = time.perf_counter()
        answers = [asked.result() for asked in [fleet.ask(rows) for _ in range(requests)]]
        seconds = time.perf_counter() - began
    assert all(np.array_equal(answer, answers[0]) for answer in answers), "the same rows got other logits"
    return requests * len(rows) / seconds


@contextlib.contextmanager
def _server(model: Path, index: Index) -> Iterator[str]:
    file = model.with_suffix(".address")
    command = [
        sys.executable, "-m", "teacher_server.main", f"--model={model}", f"--data={index.root}", "--device=cpu",
        "--address=127.0.0.1:0", f"--address-file={file}", "--gate-images=8", "--exit-when-stdin-closes",
    ]  # fmt: skip
    with (
        model.with_suffix(".log").open("wb") as log,
        subprocess.Popen(command, cwd=_ROOT, env=_SETTINGS, stdin=subprocess.PIPE, stdout=log, stderr=log) as process,
    ):
        try:
            while not file.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended: {model.with_suffix('.log').read_text()}")
                time.sleep(0.05)
            yield file.read_text().strip()
        finally:
            process.kill()


@contextlib.contextmanager
def _network_alone(model: Path, threads: int) -> Iterator[Callable[[float], float]]:
    """A function of seconds that answers the rows/s of the network alone."""
    command = [sys.executable, "-m", "benchmarks.forward", str(model), str(threads)]
    with subprocess.Popen(
        command, cwd=_ROOT, env=_SETTINGS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        assert stdout.readline().strip() == "ready"

        def rate(seconds: float) -> float:
            stdin.write(f"{seconds}\n")
            stdin.flush()
            return float(stdout.readline())

        yield rate
        stdin.close()


if __name__ == "__main__":
    figure.present(measure, __doc__)
