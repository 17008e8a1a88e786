"""Weights & Biases: wandb itself, offline, and what it has in its own file then; and what its faults cost a run.

wandb has no reader of that file in Python. It is LevelDB's log format (records in blocks of 32 KiB) of wandb's own
messages, and is read here by that.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest

from conftest import free_port
from student_trainer import metrics, weights_and_biases, world
from student_trainer.config import Config, DataConfig
from student_trainer.recipes import RECIPES
from student_trainer.train import train
from student_trainer.weights_and_biases import ID_FILE, WeightsAndBiases

messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")

_BLOCK = 32 * 1024


def records(file: Path) -> list:
    """All of a .wandb file's messages."""
    data, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # no room for a head: the rest of the block is empty
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or its last piece
            found.append(messages.Record.FromString(whole))
            whole = b""
    return found


def kept(run_dir: Path) -> list[list]:
    """The messages of each start of a run, in order."""
    return [records(file) for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]


def on_a_board(line: dict) -> dict[str, float]:
    """A line of metrics.jsonl as TensorBoard names it."""
    named = {name if "/" in name or name == "step" else f"train/{name}": value for name, value in line.items()}
    return {name: value for name, value in named.items() if value is not None}


def settings_of(messages_of: list) -> dict:
    updates = [item for record in messages_of if record.HasField("config") for item in record.config.update]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}


def history(of: list) -> list[dict[str, float]]:
    lines = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in of if record.HasField("history")
    ]  # fmt: skip
    return [{name: value for name, value in line.items() if not name.startswith("_")} for line in lines]


def config_for(data: Path, run_dir: Path) -> Config:
    run_dir.mkdir()  # as the loop does, first
    demo = RECIPES["digits/demo"].config
    return dataclasses.replace(
        demo, run_dir=run_dir, targets="labels", device="cpu", decode_threads=1, evaluate_every=4, checkpoint_every=2,
        log_every=2, wandb="us/funmatch", data=DataConfig(root=data, evaluate="val"),
        student=dataclasses.replace(demo.student, architecture="test_byobnet", size=32),
        optim=dataclasses.replace(demo.optim, batch_size=6, epochs=2.0, warmup_steps=1),
    )  # fmt: skip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def signals_as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.suite
def test_every_line_is_there_with_settings_and_name_and_a_run_goes_on_under_its_id(
    tiny_data: Path, tmp_path: Path, offline: None, signals_as_they_were: None
) -> None:
    config = config_for(tiny_data, tmp_path / "run")
    with world.join("cpu") as alone:
        train(config, alone)
        lines = [on_a_board(line) for line in metrics.read(config.run_dir)]
        # As if it had been killed before its last steps.
        (config.run_dir / "summary.json").unlink()
        (config.run_dir / "checkpoints" / "step_00000006.pt").unlink()
        train(dataclasses.replace(config, wandb="elsewhere"), alone)
        again = [on_a_board(line) for line in metrics.read(config.run_dir)]
    first, second = kept(config.run_dir)
    assert [line["step"] for line in lines] == [1, 3, 4, 5, 6]
    assert history(first) == lines
    assert history(second) == again[3:]
    assert {"train/loss", "eval/student_top1"} <= history(second)[-1].keys()
    identity = (config.run_dir / ID_FILE).read_text().strip()
    for messages_of, entity, project in ((first, "us", "funmatch"), (second, "", "elsewhere")):
        run = next(record.run for record in messages_of if record.HasField("run"))
        assert (run.run_id, run.entity, run.project) == (identity, entity, project)
        assert run.display_name == "digits/demo:run"
        assert settings_of(messages_of)["optim.lr"] == config.optim.lr
        assert messages_of[-1].exit.exit_code == 0


def test_a_service_that_is_not_there_costs_a_sentence_and_the_run_is_kept_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, offline: None
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(weights_and_biases, "_START_S", 1.0)
    config = config_for(tmp_path, tmp_path / "run")
    with pytest.raises(TimeoutError, match="of the run's own"), WeightsAndBiases(config) as board:
        board.write(1, {"train/loss": 0.5})
        raise TimeoutError("of the run's own")
    assert "did not begin: " in caplog.text and "Training goes on" in caplog.text
    (messages_of,) = kept(config.run_dir)
    assert history(messages_of) == [{"train/loss": 0.5, "step": 1}]
    assert messages_of[-1].exit.exit_code == 1


def test_after_an_error_nothing_more_is_handed_over_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, offline: None
) -> None:
    config = config_for(tmp_path, tmp_path / "run")
    with WeightsAndBiases(config) as board:
        assert board._run is not None
        monkeypatch.setattr(board._run, "log", broken)
        board.write(1, {"train/loss": 0.5})
        board.write(2, {"train/loss": 0.25})
    assert caplog.text.count("takes nothing more since step 1: the pipe is broken") == 1


def broken(_: object) -> None:
    raise BrokenPipeError("the pipe is broken")
