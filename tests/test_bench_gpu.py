"""benchmarks/gpu and its parts: the logic, with a tiny BiT on the CPU."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

import benchmarks.gpu.__main__ as gpu
from benchmarks import figure, turns
from benchmarks.figure import Figure
from benchmarks.gpu import forward, limits
from benchmarks.gpu.limits import Machine
from benchmarks.turns import Contender
from teacher_server import gate

pytestmark = pytest.mark.suite  # they set what all of torch shares, as a benchmark may

CPU = torch.device("cpu")
TINY = "resnetv2_14x05_bit"


def test_contenders_have_their_turns_one_after_the_other_each_for_as_long():
    now, order = 0.0, []

    def contender(name: str, seconds: float) -> Contender:
        def call() -> None:
            nonlocal now
            now += seconds
            order.append(name)

        return Contender(1, call)

    both = {"a": contender("a", 1.0), "b": contender("b", 2.5)}
    times = turns.in_turns(both, CPU, rounds=3, burst_s=5.0, clock=lambda: now)
    assert times == {"a": [1.0] * 3, "b": [2.5] * 3}
    assert "".join(order) == "abab" + ("aaaaa" + "bb") * 3


def test_settings_are_those_of_the_contender_whose_turn_it_is():
    flag = torch.backends.cudnn.benchmark
    seen = []
    both = {
        "ours": Contender(1, lambda: seen.append(torch.backends.cudnn.benchmark)),
        "timm": Contender(1, lambda: seen.append(torch.backends.cudnn.benchmark), forward._as_timm),
    }
    turns.in_turns(both, CPU, rounds=1, burst_s=0)
    assert seen == [flag, True] + [False, True] * 2
    assert torch.backends.cudnn.deterministic


def test_a_ratio_is_of_rows_and_of_the_turns_beside_each_other():
    both = {"ours": Contender(128, int), "theirs": Contender(256, int)}
    times = {"ours": [1.0, 2.0, 1.0], "theirs": [4.0, 8.0, 400.0]}  # the last was disturbed
    assert turns.paired(both, times, "ours", "theirs") == 2.0
    assert turns.rates(both, times) == {"ours": 128.0, "theirs": 32.0}


def test_parity_is_the_gates():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(20, 7, generator=generator)
    ours = reference + 0.3 * torch.randn(20, 7, generator=generator)
    seen = forward.Parity.of(ours, reference)
    kl = functional.kl_div(ours.double().log_softmax(1), reference.double().log_softmax(1), reduction="batchmean",
                           log_target=True)  # fmt: skip
    assert seen.mean_kl == pytest.approx(float(kl))
    assert seen.max_difference == pytest.approx(float((ours - reference).abs().max()))
    assert seen.agreement_top1 == (ours.argmax(1) == reference.argmax(1)).float().mean()
    assert forward.Parity.of(reference, reference) == forward.Parity(0.0, 0.0, 1.0)


def test_operations_and_bytes_are_counted_as_by_hand(monkeypatch):
    def small(_: str) -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8))

    monkeypatch.setattr(limits, "_shape_of", small)
    assert limits.flops_per_image("small", 10) == 2 * 3 * 8 * 3 * 3 * 100
    assert limits.half_bytes_per_image("small", 10) == 2 * (300 + 800 + 800 + 800)


def test_a_large_bit_costs_what_the_paper_says():
    """46.95 billion multiplications in timm's table, some of them outside of convolutions."""
    assert limits.flops_per_image("resnetv2_152x2_bit", 224) == pytest.approx(2 * 46.95e9, rel=0.03)


@pytest.fixture(scope="module")
def figures() -> list[Figure]:
    machine = Machine(flops=1e11, bytes_per_s=1e10)
    return list(forward.measure(TINY, 32, CPU, machine, rounds=2, burst_s=0, compiled=False))


def test_ours_and_timms_are_measured_and_compared_with_float32_before_that(figures):
    beside, of_floor = figures
    assert beside.value > 0 and beside.alternative > 0 and beside.judged > 0
    assert beside.floor == pytest.approx(1e11 / limits.flops_per_image(TINY, 32))
    assert beside.note.count("KL") == 2 and "batch invariant: True" in beside.note
    assert of_floor.judged == pytest.approx(of_floor.value / of_floor.floor)


def test_a_part_yields_the_rows_that_it_is_expected_to(figures):
    expected = [one.name for one in forward.unmeasured(TINY, 32, "")]
    assert [one.name for one in figures] == expected[:2]


def test_a_fast_wrong_logit_is_no_result(monkeypatch):
    def undecided(architecture: str, num_classes: int = 1000) -> nn.Module:
        module = random_bit(architecture, num_classes)
        module.head.fc.weight.data *= 1e3
        return module

    random_bit = forward.random_bit
    monkeypatch.setattr(forward, "random_bit", undecided)
    with pytest.raises(gate.GateError, match="differs too much"):
        next(forward.measure(TINY, 32, CPU, Machine(1e11, 1e10), rounds=1, burst_s=0, compiled=False))


def test_rates_of_a_machine_are_those_of_a_product_and_a_copy():
    machine = Machine.measured(CPU, side=64, num_bytes=2**16)
    assert 1e6 < machine.flops < 1e13
    assert 1e6 < machine.bytes_per_s < 1e13


def a_figure(name: str, value: float | None = 1.0) -> Figure:
    return Figure(row="1", name=name, value=value, unit="images/s", goal=(">=", 2.0), judged=value)


def run(code: str, seconds: float = 60.0) -> tuple[list[Figure], str]:
    seen: set[str] = set()
    figures, command = [], gpu._run([sys.executable, "-c", code], seconds, seen)
    while True:
        try:
            figures.append(next(command))
        except StopIteration as end:
            assert seen == {one.name for one in figures}
            return figures, end.value


def test_what_a_part_has_printed_is_kept_when_it_fails():
    line = json.dumps(dataclasses.asdict(a_figure("one")))
    figures, why = run(f"print({line!r}); print('[1, 2]'); print('a warning'); raise SystemExit(3)")
    assert figures == [a_figure("one")]
    assert "printed no such figure" in why


def test_a_part_that_hangs_is_cut_off_with_all_that_it_has_started():
    line = json.dumps(dataclasses.asdict(a_figure("one")))
    code = f"import subprocess; print({line!r}, flush=True); subprocess.run(['sleep', '300'])"
    began = time.monotonic()
    figures, why = run(code, seconds=2.0)
    assert figures == [a_figure("one")]
    assert why == "cut off after 2 s"
    assert time.monotonic() - began < 60


def test_rows_that_a_part_did_not_print_say_why(monkeypatch):
    def fake(_command: list[str], _seconds: float, seen: set[str]):
        seen.add("one")
        yield a_figure("one")
        return "cut off after 9 s"

    monkeypatch.setattr(gpu, "_run", fake)
    part = gpu.Part(("x",), 9, (a_figure("one", None), a_figure("two", None)))
    one, two, late_one, late_two = gpu.run_all([part, dataclasses.replace(part, budget_s=0)], 100)
    assert one == a_figure("one")
    assert (two.value, two.note) == (None, "cut off after 9 s")
    assert {late_one.note, late_two.note} == {"no time was left for it"}


def test_after_each_figure_all_so_far_are_in_the_file(tmp_path):
    file = tmp_path / "runs" / "gpu.json"
    for number, _ in enumerate(gpu._kept(map(a_figure, "abc"), file), 1):
        written = json.loads(file.read_text())
        assert [one["name"] for one in written["figures"]] == list("abc")[:number]
        assert written["machine"] == figure.machine() | {"load": written["machine"]["load"]}


def test_everything_together_fits_ten_minutes_with_the_most_important_first():
    budgets = [part.budget_s for part in gpu.parts(quick=False)]
    assert gpu._ALL_S < 600
    assert sum(budgets[:5]) < gpu._ALL_S
    assert gpu.parts(quick=False)[0].expected[0].row == "1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_there_are_rows_and_no_numbers():
    figures = list(gpu.measure(quick=True))
    assert {one.row for one in figures} == {"1", "2", "3", "4", "5"}
    assert all((one.value, one.met, one.note) == (None, None, "no GPU on this machine") for one in figures)
