"""A sweep over a tiny grid, with real trials and a real teacher, killed in the middle and shared by two workers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna import Study
from optuna.trial import TrialState

from student_trainer import sweep as room
from student_trainer.recipes import RECIPES
from student_trainer.sweep import Sweep, evaluate_weights, parse
from student_trainer.sweep_points import Point, give_back, open_study
from student_trainer.world import World

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
# Nine processes that import torch one after another, on two cores that others may use as well.
pytestmark = pytest.mark.timeout(900)
GRID = [Point(lr, 0.0003, T) for lr in (0.001, 0.01) for T in (1.0, 5.0)]


def command(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "student_trainer.sweep", "digits/demo", "--grid", "lr=0.001,0.01", "wd=0.0003", "T=1,5",
        "--report-on=train", "--heartbeat-s=2", f"--data={data}", f"--run-dir={run_dir}",
        "--student.architecture=test_byobnet", "--student.size=32", "--optim.batch-size=16",
        f"--optim.epochs={STEPS * 16 / 18}", "--optim.warmup-steps=2", "--device=cpu", "--checkpoint-every=3",
        "--evaluate-every=0", "--decode-threads=1", "--teacher.audit-every=0", *more,
    ]  # fmt: skip


def opened(sweep: Sweep) -> Study:
    return open_study(sweep.config, sweep.grid, sweep.storage, sweep.heartbeat_s)


def without_temperature(args: list[str]) -> list[str]:
    return [arg for arg in args if not arg.startswith("T=")]


def start(args: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        args, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@contextlib.contextmanager
def teacher(model: Path, data: Path, folder: Path) -> Iterator[str]:
    file = folder / "address"
    with subprocess.Popen(
        [sys.executable, "-m", "teacher_server.main", f"--model={model}", f"--data={data}", "--address=127.0.0.1:0",
         f"--address-file={file}", "--device=cpu", "--threads=1", "--exit-when-stdin-closes"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        wait_until(process, file.exists)
        yield file.read_text().strip()
        process.stdin.close()


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output[-4000:]
    return output


def lines(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []  # the last line may be half-written
    return [json.loads(line) for line in whole]


def wait_until(process: subprocess.Popen, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError((process.communicate()[0] or "")[-4000:])
        time.sleep(0.01)


def begun(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("trials/*"), key=lambda folder: folder.stat().st_ctime)


def starts(folder: Path) -> int:
    """How often a trial's process came so far as to train."""
    return (folder / "trial.log").read_text().count("rank 0 of 1")


def processes_of(run_dir: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"--run-dir={run_dir}/trials/".encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def swept(tiny_model, tiny_data, tmp_path_factory):
    """A sweep with a teacher of its own, killed in its second trial; then two workers at once, which share a fleet.
    Returns its folder, that of the trial that was killed, and what the workers said.
    """
    run_dir = tmp_path_factory.mktemp("sweep") / "run"
    first = start(command(tiny_data, run_dir, f"--teacher.model={tiny_model}"))
    wait_until(first, lambda: len(begun(run_dir)) == 2 and len(lines(begun(run_dir)[1])) >= 5)
    killed = begun(run_dir)[1]
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 20
    while processes_of(run_dir):
        assert time.monotonic() < deadline, "the trial outlived its worker"
        time.sleep(0.05)
    with teacher(tiny_model, tiny_data, run_dir) as address:
        workers = [start(command(tiny_data, run_dir, f"--teacher={address}")) for _ in range(2)]
        outputs = [finish(worker) for worker in workers]
    return run_dir, killed, outputs


@pytest.mark.suite
def test_every_trial_ran_once_and_the_killed_one_went_on_from_its_checkpoint(swept):
    run_dir, killed, _ = swept
    folders = {run_dir / "trials" / point.name for point in GRID}
    assert set(begun(run_dir)) == folders
    assert {folder: starts(folder) for folder in folders} == {folder: 1 + (folder == killed) for folder in folders}
    assert re.search(r"going on from step [369]\b", (killed / "trial.log").read_text())
    for folder in folders:
        assert [line["step"] for line in lines(folder)] == list(range(1, STEPS + 1)), "no step twice"
        config = json.loads((folder / "config.json").read_text())
        found = config["optim.lr"], config["optim.weight_decay"], config["optim.temperature"]
        assert Point(*found).name == folder.name


@pytest.mark.suite
def test_the_best_on_one_split_is_chosen_and_evaluated_on_the_other(swept, tiny_data):
    run_dir, _, outputs = swept
    record = json.loads((run_dir / "sweep.json").read_text())
    top1 = {
        point: json.loads((run_dir / "trials" / point.name / "summary.json").read_text())["student_top1"]
        for point in GRID
    }
    assert [trial["top1"] for trial in record["trials"]] == list(top1.values())
    best = max(GRID, key=lambda point: top1[point])  # max takes the first of equal ones
    assert Path(record["best"]["run_dir"]).name == best.name
    assert record["report"]["examples"] == 18, "all of the other split"
    for output in outputs:
        assert f"top-1 of the chosen on train: {record['report']['student_top1']:.2%}" in output
        assert "<- chosen" in output
    said = "".join(outputs)
    assert "[4/4]" in said and said.count("top-1 on val") == 2


@pytest.mark.suite
def test_weights_evaluated_afterwards_score_as_they_did_in_their_run(swept, tiny_data):
    run_dir, _, _ = swept
    sweep = parse(command(tiny_data, run_dir)[3:])
    for point in GRID:
        folder = sweep.folder(point)
        score = evaluate_weights(sweep.config, folder / "model.safetensors", "val", World())
        summary = json.loads((folder / "summary.json").read_text())
        assert score["student_top1"] == summary["student_top1"]
        assert score["student_xent"] == pytest.approx(summary["student_xent"], rel=1e-5)


@pytest.mark.suite
def test_trials_ask_the_teacher_beside_their_worker_and_start_none(swept):
    run_dir, _, outputs = swept
    assert not list(run_dir.glob("trials/*/teacher*.log"))
    assert (run_dir / "teacher.log").exists()
    assert not any("starting a teacher" in output for output in outputs), "theirs was given"


@pytest.mark.suite
def test_a_finished_sweep_says_its_table_again_and_needs_no_teacher(swept, tiny_data):
    run_dir, _, _ = swept
    output = finish(start(command(tiny_data, run_dir)))
    assert "<- chosen" in output and "trial lr_" not in output


@pytest.mark.suite
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_sweep_goes_on_with_its_own_settings_only(swept, tiny_data):
    run_dir, _, _ = swept
    with pytest.raises(ValueError, match="seed: 0 then, 3 now"):
        opened(parse(command(tiny_data, run_dir, "--seed=3")[3:]))
    with pytest.raises(ValueError, match=r"data\.evaluate: 'val' then, 'train' now"):
        opened(parse(command(tiny_data, run_dir, "--select-on=train")[3:]))


@pytest.mark.suite
def test_a_loss_that_is_no_number_is_a_result_and_another_failure_ends_the_sweep(tiny_data, tmp_path):
    """From labels, which needs no teacher and has no temperature."""
    labels = without_temperature(command(tiny_data, tmp_path / "run", "--targets=labels"))
    diverging = [arg.replace("lr=0.001,0.01", "lr=0.001,1e30") for arg in labels]
    output = finish(start([*diverging, "--student.weights=absent.safetensors"]), code=1)
    assert "no such weight file: absent.safetensors" in output and "lr_1e+30" not in output
    output = finish(start(diverging))
    assert "lr_1e+30_wd_0.0003_T_2: diverged" in output and "lr_0.001_wd_0.0003_T_2: top-1" in output
    record = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [trial["top1"] is None for trial in record["trials"]] == [False, True]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_point_that_is_queued_twice_is_run_once(tiny_data, tmp_path, monkeypatch):
    """Two workers that start at the same moment may both queue all points."""
    sweep = parse(command(tiny_data, tmp_path)[3:])
    study = opened(sweep)
    for point in GRID:
        study.enqueue_trial({}, user_attrs={"lr": point.lr, "wd": point.wd, "T": point.T})
    ran = []
    monkeypatch.setattr(room, "run_trial", lambda _sweep, point, _addresses: ran.append(point) or 0.5)
    room.run_trials(sweep, study, ())
    assert sorted(ran) == GRID


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_worker_who_was_only_slow_goes_on_with_the_next_trial(tiny_data, tmp_path, monkeypatch):
    """Others gave its trial up for dead and queued the point again; whoever takes it finds the run finished."""
    sweep = parse(command(tiny_data, tmp_path)[3:])
    study = opened(sweep)
    ran = []

    def run_trial(_sweep, point, _addresses):
        ran.append(point)
        if len(ran) == 1:
            study.tell(0, state=TrialState.FAIL)
            give_back(study, study.get_trials()[0])
        return 0.5

    monkeypatch.setattr(room, "run_trial", run_trial)
    room.run_trials(sweep, study, ())
    assert ran == [*GRID, GRID[0]]
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 4


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_trial_that_two_workers_took_at_one_moment_has_one_result(tiny_data, tmp_path, monkeypatch):
    """A sqlite file locks no row: both may find the same trial waiting."""
    sweep = parse(command(tiny_data, tmp_path)[3:])
    study = opened(sweep)
    ran = []

    def run_trial(_sweep, point, _addresses):
        ran.append(point)
        if len(ran) == 1:
            study.tell(0, 0.5)  # the other one was done first
        return 0.5

    monkeypatch.setattr(room, "run_trial", run_trial)
    room.run_trials(sweep, study, ())
    assert ran == GRID
    assert [trial.value for trial in study.get_trials(states=(TrialState.COMPLETE,))] == [0.5] * 4


def test_two_workers_are_never_at_work_in_one_folder(tmp_path):
    entered = []

    def second():
        with room._alone_in(tmp_path):
            entered.append("second")

    thread = threading.Thread(target=second)
    with room._alone_in(tmp_path):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        entered.append("first")
    thread.join()
    assert entered == ["first", "second"]


def test_the_grid_is_the_papers_unless_told_otherwise():
    whole = parse(["flowers102/funmatch/10k"]).grid
    assert len(set(whole)) == len(whole) == 4 * 5 * 4
    chosen = RECIPES["flowers102/funmatch/10k"].config.optim
    assert Point(chosen.lr, chosen.weight_decay, chosen.temperature) in whole
    assert parse(["pets/funmatch/1k", "--grid", "T=1", "wd=1e-3,1e-5"]).grid[:2] == (
        Point(0.0003, 1e-05, 1.0), Point(0.0003, 1e-03, 1.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["pets/funmatch/7"], "no recipe is called 'pets/funmatch/7'"),
        (["pets/funmatch/1k", "--grid", "lr=fast"], "numbers with commas between"),
        (["pets/funmatch/1k", "--grid", "lr=-1"], "greater than 0"),
        (["pets/funmatch/1k", "--grid", "momentum=1"], "give each of lr=, wd= and T= once"),
        (["pets/funmatch/1k", "--optim.lr=0.5"], "give --grid lr=0.5"),
        (["pets/scratch", "--grid", "T=2"], "has no temperature"),
        (["pets/funmatch/1k", "--optim.leaning-rate=0.5"], "unknown setting --optim.leaning-rate"),
    ],
)
def test_a_wrong_command_ends_with_a_sentence(args, sentence):
    with pytest.raises(SystemExit, match=sentence):
        parse(args)


@pytest.mark.suite
def test_ctrl_c_saves_the_trial_and_hands_it_back(tiny_data, tmp_path):
    args = without_temperature(command(tiny_data, tmp_path, "--targets=labels", f"--optim.epochs={999 * 16 / 18}"))
    process = start(args)
    folder = tmp_path / "trials" / "lr_0.001_wd_0.0003_T_2"
    wait_until(process, lambda: lines(folder))
    process.send_signal(signal.SIGINT)
    output = finish(process, code=1)
    assert "stopped; the same command goes on from here" in output and "Traceback" not in output
    assert "stopped at step" in (folder / "trial.log").read_text()
    assert not processes_of(tmp_path)
