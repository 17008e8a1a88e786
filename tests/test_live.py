"""The live view: what is shown is what was told; in a terminal, without one, and on one that goes away."""

import contextlib
import json
import logging
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from conftest import serve
from student_trainer import log, report, run_folder
from student_trainer.config import Config
from student_trainer.fleet.dispatch import FleetState, ReplicaState
from student_trainer.live import Progress, Rate, as_line, follow
from student_trainer.screen import Screen, draw, duration
from student_trainer.world import World

ROOT = Path(__file__).resolve().parents[1]
LINE = {"loss": 0.5, "kl": 0.25, "agreement_top1": 0.75, "lr": 0.001, "images_per_s": 9.0, "teacher_wait_s": 0.2,
        "data_wait_s": 0.1}  # fmt: skip
CONFIG = Config(recipe="digits/demo", run_dir=Path("runs/of_mine"))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class TwoReplicas:
    """A fleet of which one replica answers 64 rows for each that the other does, and the other is gone."""

    description = SimpleNamespace(model="resnet_of_the_teacher")
    rows = 0

    def state(self):
        one = ReplicaState("10.0.0.1:50051", True, 3, 4, self.rows, 0.25, "answered")
        other = ReplicaState("10.0.0.2:50051", False, 0, 2, 7, 0.0, "cannot be reached: refused")
        return FleetState(waiting=5, retries=6, hedges=0, rows=self.rows + 7, replicas=(one, other))


def progress_of(num_steps=40, seconds_a_step=0.5, fleets=(), first_step=10, total=100):
    clock = Clock()
    progress = Progress("digits/demo", first_step, total, 32, fleets, clock)
    progress.now()
    for step in range(first_step + 1, first_step + 1 + num_steps):
        clock.now += seconds_a_step
        for fleet in fleets:
            fleet.rows += 32
        progress.step(step, LINE)
    return progress, clock


def shown(now, width=100, height=40):
    console = Console(width=width, height=height)
    with console.capture() as capture:
        console.print(draw(now, height))
    return capture.get()


def test_rates_shares_and_the_time_that_is_left_follow_from_what_was_told():
    progress, clock = progress_of()
    now = progress.now()
    assert (now.step, now.total, now.elapsed_s) == (50, 100, 20.0)
    assert now.images_per_s == pytest.approx(64.0, rel=0.1), "32 rows each half a second"
    assert now.left_s == pytest.approx(25.0), "50 steps of half a second"
    assert now.teacher_wait == pytest.approx(0.4) and now.data_wait == pytest.approx(0.2)
    clock.now += 1000
    later = progress.now()
    assert later.idle_s == 1000 and later.left_s > 500, "a run that stands still has further to go"


def test_noisy_numbers_are_averaged_and_others_are_the_last():
    progress, _ = progress_of(0)
    for step, loss in enumerate([4.0, 2.0, 0.0], 11):
        progress.step(step, LINE | {"loss": loss, "lr": loss})
    assert progress.now().numbers["loss"] == 2.0 and progress.now().numbers["lr"] == 0.0


def test_a_rate_is_of_the_last_seconds_and_needs_little_memory():
    rate = Rate(10.0)
    for tenth in range(100_000):
        rate.tell(tenth / 1000, tenth / 1000 if tenth < 50_000 else 50 + 3 * (tenth / 1000 - 50))
    assert rate.per_s(99.999) == pytest.approx(3.0, rel=0.02)
    assert len(rate._told) < 250


def test_each_replica_has_the_rate_of_its_own_rows():
    progress, _ = progress_of(fleets=(TwoReplicas(),))
    (teacher,) = progress.now().teachers
    assert teacher.rows_per_s["10.0.0.1:50051"] == pytest.approx(64.0, rel=0.1)
    assert teacher.rows_per_s["10.0.0.2:50051"] == 0.0


@pytest.mark.parametrize("width", [60, 100])
def test_the_view_has_progress_speed_waits_fleet_agreement_and_the_last_evaluation(width):
    progress, clock = progress_of(fleets=(TwoReplicas(),))
    assert "not evaluated yet" in shown(progress.now())
    progress.evaluated(40, {"eval/student_top1": 0.5, "eval/teacher_top1": 0.9, "eval/kl": 1.5, "loss": 9.0})
    clock.now += 6
    text = " ".join(shown(progress.now(), width).split())
    for part in ("step 50 of 100 (50.0%)", "images/s", "to go", "agreement 75.0%", "waiting for the teacher 31%",
                 "after step 40: student 50.00% teacher 90.00% KL 1.5000", "no step for 6 s", "3 of 4", "250 ms",
                 "5 requests wait", "6 sent again", "10.0.0.2:50051 away", "cannot be reached: refused"):  # fmt: skip
        assert part in text, part


def test_a_low_terminal_shows_fewer_replicas_and_counts_the_others():
    class Many(TwoReplicas):
        def state(self):
            few = super().state()
            return FleetState(0, 0, 0, 0, few.replicas[:1] * 40)

    text = shown(progress_of(fleets=(Many(),))[0].now(), height=24)
    assert text.count("10.0.0.1:50051") == 11 and "and 29 more" in text
    assert len(text.splitlines()) <= 24


def test_the_line_for_machines_is_pairs_of_a_name_and_a_value():
    progress, _ = progress_of(fleets=(TwoReplicas(),))
    progress.evaluated(40, {"eval/student_top1": 0.5})
    pairs = dict(pair.split("=") for pair in as_line(progress.now()).split(" "))
    told = {"step": "50", "steps": "100", "loss": "0.5", "agreement_top1": "0.75", "eta_s": "25", "replicas": "1/2",
            "retries": "6", "eval_step": "40", "eval_top1": "0.5"}  # fmt: skip
    assert told.items() <= pairs.items()
    assert "loss" not in as_line(progress_of(0)[0].now()), "what is not known is not said"


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.2, "12 s"), (185, "3:05"), (7390, "2:03:10"), (353_000, "4 d 02:03")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_a_step_costs_the_loop_far_less_than_a_millisecond():
    progress, _ = progress_of()
    began = time.process_time()
    for step in range(2000):
        progress.step(step, LINE)
    assert (time.process_time() - began) / 2000 < 0.0005


class Terminal:
    """A pseudo-terminal of 100 columns, and what was written to it."""

    def __init__(self):
        self._master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w", buffering=1)
        self._read, self._leave = b"", False
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self):
        with contextlib.suppress(OSError):
            while (data := os.read(self._master, 65536)) and not self._leave:
                self._read += data
        os.close(self._master)

    def goes_away(self):
        self._leave = True
        self.file.write("the last words")
        self._thread.join(timeout=5)

    def text(self):
        self.file.close()
        self._thread.join(timeout=5)
        return self._read.decode()


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes standard error a terminal, where the log goes: to be called in the test, after pytest has
    put its own there."""
    made = Terminal()

    def sit_down() -> Terminal:
        monkeypatch.setattr(sys, "stderr", made.file)
        log.set_up("text")
        return made

    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    yield sit_down
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    logging.captureWarnings(False)
    with contextlib.suppress(OSError):
        made.file.close()


def test_in_a_terminal_lines_scroll_by_above_a_view_that_ends_with_the_last_numbers(terminal, monkeypatch):
    terminal = terminal()
    monkeypatch.setattr(sys, "stdout", terminal.file)
    with follow(CONFIG, World(), 0, 3, [TwoReplicas()]) as progress:
        for step in (1, 2, 3):
            progress.step(step, LINE)
            logging.getLogger("somewhere").warning("something at step %d", step)
        progress.say("step 3: evaluated")
        assert sys.stderr is not terminal.file, "what is written meanwhile goes above the view"
    assert sys.stderr is terminal.file
    logging.getLogger("somewhere").warning("afterwards")
    text = terminal.text()
    for part in ("something at step 2", "step 3: evaluated", "step 3 of 3 (100.0%)", "done", "afterwards"):
        assert part in text, part
    assert text.rindex("afterwards") > text.rindex("step 3 of 3"), "the log has its old place again"


def test_what_is_printed_arrives_in_the_file_that_standard_output_is(terminal, monkeypatch, tmp_path):
    terminal()
    with (tmp_path / "out.txt").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with follow(CONFIG, World(), 0, 3, []) as progress:
            progress.say("step 1: evaluated")
    assert (tmp_path / "out.txt").read_text() == "step 1: evaluated\n"


def test_a_terminal_that_goes_away_ends_the_view_and_not_the_run(terminal, monkeypatch):
    terminal = terminal()
    monkeypatch.setattr(sys, "stdout", terminal.file)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    progress = Progress("mine", 0, 3, 32)
    with Screen(progress, every_s=0.01):
        progress.step(1, LINE)
        terminal.goes_away()
        time.sleep(0.1)
        progress.step(2, LINE)
        progress.say("nobody reads this")
    assert sys.stderr is terminal.file


def test_a_fault_of_the_drawing_ends_the_view_and_not_the_run(terminal):
    terminal = terminal()

    class Broken(TwoReplicas):
        def state(self):
            raise RuntimeError("no state")

    with follow(CONFIG, World(), 0, 3, [Broken()]) as progress:
        progress.step(1, LINE)
        time.sleep(0.1)
        assert sys.stderr is terminal.file
    assert "Traceback" not in terminal.text()


@pytest.mark.parametrize("style", ["text", "json"])
def test_without_a_terminal_or_for_json_there_are_lines_of_the_log(style, terminal, monkeypatch, caplog, tmp_path):
    terminal = terminal()
    config = Config(recipe="digits/demo", log_format=style)
    with (tmp_path / "err.txt").open("w") as file:
        if style == "text":
            monkeypatch.setattr(sys, "stderr", file)
        log.set_up(style)
        with follow(config, World(), 0, 3, [TwoReplicas()]) as progress:
            for step in (1, 2, 3):
                progress.step(step, LINE)
            progress.evaluated(3, {"eval/student_top1": 0.5})
    text = terminal.text() if style == "json" else (tmp_path / "err.txt").read_text()
    (line,) = text.splitlines()
    message = json.loads(line)["message"] if style == "json" else line
    assert "step=3 steps=3" in message and "eval_top1=0.5" in message and "replicas=1/2" in message
    assert "\x1b" not in text


def test_other_ranks_say_nothing(capsys, caplog):
    with follow(CONFIG, World(rank=1, size=2), 0, 3, []) as progress:
        progress.step(1, LINE)
        progress.evaluated(1, LINE)
        progress.say("not heard")
    assert capsys.readouterr() == ("", "") and not caplog.records


def test_a_run_in_a_terminal_shows_its_fleet_and_leaves_exactly_the_files_that_are_documented(
    tiny_model, tiny_data, tmp_path
):
    master, slave = pty.openpty()
    run_dir = tmp_path / "run"
    with serve((tiny_model, tiny_data)) as (address,):
        command = [
            sys.executable, str(ROOT / "student_trainer" / "main.py"), "--recipe=digits/demo", f"--data={tiny_data}",
            f"--run-dir={run_dir}", "--data.evaluate=val", "--student.architecture=test_byobnet", "--student.size=32",
            "--optim.batch-size=16", f"--optim.epochs={6 * 16 / 18}", "--optim.warmup-steps=2", "--device=cpu",
            f"--teacher={address}", "--evaluate-every=0", "--decode-threads=1", "--checkpoint-every=3",
        ]  # fmt: skip
        terms = {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **terms}, stdout=slave, stderr=slave)
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):  # the terminal's other end is closed: the run has ended
            while data := os.read(master, 65536):
                text += data
        assert process.wait() == 0, text.decode()[-3000:]
    for part in ("step 6 of 6 (100.0%)", "images/s", "agreement", address, "evaluated after step 6: student"):
        assert part in text.decode(), part
    report.main([str(run_dir)])
    told = run_folder.__doc__
    there = sorted(path.name for path in run_dir.iterdir())
    assert there == ["checkpoints", "config.json", "curves.png", "first_batch.png", "metrics.jsonl",
                     "model.safetensors", "report.html", "report.png", "run.json", "summary.json",
                     "tensorboard"]  # fmt: skip
    assert not [name for name in there if name not in told], "each is documented"
