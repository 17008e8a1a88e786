"""Fixed teachers and a real redis-server: filled, killed, gone, damaged, swapped; and runs that never ask it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import photograph, serve
from data_prep.prepare import prepare
from student_trainer.checkpoint import load_latest
from student_trainer.config import Config, DataConfig, OptimConfig, StudentConfig, TeacherConfig
from student_trainer.logit_store import StoreGoneError
from student_trainer.train import train
from student_trainer.world import World
from views.setting import SETTINGS, ViewSetting

ROOT = Path(__file__).resolve().parents[1]
NUM_TRAIN, BATCH, STEPS = 1020, 32, 30


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """1020 pictures to train on, as Flowers102 has, but small."""
    folder = tmp_path_factory.mktemp("fixed")
    rng = np.random.default_rng(3)
    few = [photograph(rng, 24, 30) for _ in range(17)]
    for number in range(NUM_TRAIN + 12):
        split = "train" if number < NUM_TRAIN else "val"
        path = folder / "pictures" / split / f"class_{number % 6}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        few[number % 17].rotate(7 * (number // 17)).save(path, quality=90)
    prepare("folder", folder / "pictures", folder / "prepared", workers=1, progress=False)
    return folder / "prepared"


class Monitor:
    """What `redis-cli monitor` shows: every command that the server is given, word by word."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._socket.sendall(b"MONITOR\r\n")
        assert self._socket.recv(5) == b"+OK\r\n"
        self.commands: list[list[str]] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            for line in self._socket.makefile("r", encoding="latin-1"):
                self.commands.append(re.findall(r'"((?:[^"\\]|\\.)*)"', line))

    def close(self) -> list[list[str]]:
        time.sleep(0.3)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=10)
        self._socket.close()
        return self.commands

    def stored(self) -> collections.Counter[str]:
        """How often each sample was written."""
        counts: collections.Counter[str] = collections.Counter()
        for name, *words in (command for command in self.commands if command):
            if name.upper() == "HSET":
                counts.update(words[1::2])
        return counts


def a_run(data: Path, address: str, store: str, run_dir: Path, setting: str = "fix/cc", **teacher) -> Config:
    return Config(
        recipe="test",
        run_dir=run_dir,
        data=DataConfig(root=data, evaluate="val"),
        views=ViewSetting(setting=setting, num_crops=4),
        student=StudentConfig(architecture="resnetv2_14x05_bit", size=32),
        teacher=TeacherConfig(addresses=(address,), store=store, rows_per_request=8, **teacher),
        optim=OptimConfig(batch_size=BATCH, epochs=STEPS * BATCH / NUM_TRAIN, warmup_steps=2, lr=1e-3),
        device="cpu", decode_threads=1, evaluate_every=0, checkpoint_every=STEPS,
    )  # fmt: skip


def lines(config: Config) -> list[dict]:
    path = config.run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(config: Config) -> list[float]:
    return [line["loss"] for line in lines(config)]


@pytest.mark.suite
def test_a_fill_that_is_killed_halfway_goes_on_and_each_picture_is_stored_once(
    data, tiny_model, redis_server, tmp_path, capsys
):
    monitor = Monitor(tmp_path / "redis" / "redis.sock")
    client = redis_server.client()

    def kept() -> int:
        return sum(client.hlen(name) for name in client.scan_iter("funmatch:logits:*"))

    with serve((tiny_model, data)) as (address,):
        config = a_run(data, address, redis_server.url, tmp_path / "run")
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "student_trainer" / "main.py"), "--recipe=digits/demo",
             "--views.setting=fix/cc", f"--data={data}", "--data.evaluate=val", f"--teacher={address}",
             f"--teacher.store={redis_server.url}", "--teacher.rows-per-request=8",
             f"--run-dir={tmp_path / 'killed'}", "--device=cpu"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while kept() < 400:
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        there = kept()
        assert 400 <= there < NUM_TRAIN, "killed in the middle of the fill"
        train(config, World())
    assert f"{there} pictures were there, {NUM_TRAIN - there} computed, 0 of those" in capsys.readouterr().out
    monitor.close()
    stored = monitor.stored()
    assert len(stored) == NUM_TRAIN
    assert set(stored.values()) == {1}, "each once"
    assert {line["recomputed_share"] for line in lines(config)} == {0.0}


def test_a_fill_is_shared_by_the_ranks(data, tiny_model, redis_server, tmp_path, capsys):
    """Each rank of two, by itself: what it computes is its half, and nobody computes the other's."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Half(World):
        pass

    with serve((tiny_model, data)) as (address,):
        for rank in range(2):
            config = a_run(data, address, redis_server.url, tmp_path / f"rank{rank}")
            train(config, Half(rank=rank, size=2))
    client = redis_server.client()
    assert sum(client.hlen(name) for name in client.scan_iter()) == NUM_TRAIN
    assert "0 pictures were there, 510 computed" in capsys.readouterr().out


@pytest.fixture(scope="module")
def undisturbed(data, tiny_model, tmp_path_factory) -> list[float]:
    """The losses of a run with a file for a store."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with serve((tiny_model, data)) as (address,):
        config = a_run(data, address, str(folder / "logits"), folder / "run")
        train(config, World())
    return losses(config)


def stop_at_step(server, config: Config, step: int) -> threading.Thread:
    def wait() -> None:
        while len(lines(config)) < step:
            time.sleep(0.005)
        server.stop()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.suite
def test_redis_gone_while_training_stops_the_run_with_a_sentence_and_a_checkpoint(
    data, tiny_model, redis_server, tmp_path, undisturbed
):
    with serve((tiny_model, data)) as (address,):
        config = a_run(data, address, redis_server.url, tmp_path / "run")
        stopper = stop_at_step(redis_server, config, 5)
        with pytest.raises(StoreGoneError, match=r"the logit store unix://.*cannot be used.*Start it again"):
            train(config, World())
        stopper.join()
        assert 5 <= len(lines(config)) < STEPS
        assert load_latest(config.run_dir)["step"] == len(lines(config)), "of the step that could not be made"
        redis_server.start()  # and empty
        train(config, World())
    assert losses(config) == undisturbed


@pytest.mark.suite
def test_redis_gone_while_training_changes_no_target_where_the_teacher_may_be_asked(
    data, tiny_model, redis_server, tmp_path, undisturbed
):
    with serve((tiny_model, data)) as (address,):
        config = a_run(data, address, redis_server.url, tmp_path / "run", store_failure="ask")
        stopper = stop_at_step(redis_server, config, 5)
        train(config, World())
        stopper.join()
    assert losses(config) == undisturbed
    shares = [line["recomputed_share"] for line in lines(config)]
    assert shares[0] == 0 and shares[-1] == 1, "counted: first found, then computed again"


@pytest.mark.suite
def test_a_value_flipped_by_hand_is_computed_again_and_counted(
    data, tiny_model, redis_server, tmp_path, undisturbed, capsys
):
    with serve((tiny_model, data)) as (address,):
        train(a_run(data, address, redis_server.url, tmp_path / "first"), World())
        client = redis_server.client()
        name = sorted(client.scan_iter())[0]
        field, value = next(iter(client.hgetall(name).items()))
        rotten = bytearray(value)
        rotten[10] ^= 4
        client.hset(name, field, bytes(rotten))
        capsys.readouterr()
        config = a_run(data, address, redis_server.url, tmp_path / "second")
        train(config, World())
        assert client.hget(name, field) == value, "mended"
    assert (
        "1019 pictures were there, 1 computed, 1 of those because what was there was damaged" in capsys.readouterr().out
    )
    assert losses(config) == undisturbed


@pytest.mark.suite
def test_a_value_that_rots_or_is_evicted_while_training_is_computed_again(
    data, tiny_model, redis_server, tmp_path, undisturbed
):
    with serve((tiny_model, data)) as (address,):
        config = a_run(data, address, redis_server.url, tmp_path / "run")

        def spoil() -> None:
            while len(lines(config)) < 5:
                time.sleep(0.005)
            client = redis_server.client()
            evicted, *others = sorted(client.scan_iter())
            client.delete(evicted)
            for name in others:
                client.hset(name, mapping=dict.fromkeys(client.hkeys(name), b"rotten"))

        spoiler = threading.Thread(target=spoil)
        spoiler.start()
        train(config, World())
        spoiler.join()
    assert losses(config) == undisturbed
    shares = [line["recomputed_share"] for line in lines(config)]
    assert shares[0] == 0 and max(shares) == 1


def test_a_swapped_teacher_finds_nothing_of_the_other(
    data,
    tiny_model,
    large_model,
    redis_server,
    tmp_path,
    capsys,
):
    with serve((tiny_model, data), (large_model, data)) as (one, other):
        train(a_run(data, one, redis_server.url, tmp_path / "one"), World())
        capsys.readouterr()
        train(a_run(data, other, redis_server.url, tmp_path / "other"), World())
    assert "0 pictures were there, 1020 computed" in capsys.readouterr().out


@pytest.mark.parametrize("setting", [name for name in SETTINGS if not name.startswith("fix/")])
def test_the_store_hears_nothing_of_a_run_with_new_views(data, tiny_model, redis_server, tmp_path, setting):
    monitor = Monitor(tmp_path / "redis" / "redis.sock")
    with serve((tiny_model, data)) as (address,):
        config = a_run(data, address, redis_server.url, tmp_path / "run", setting)
        optim = dataclasses.replace(config.optim, epochs=4 * BATCH / NUM_TRAIN)
        train(dataclasses.replace(config, optim=optim), World())
    assert monitor.close() == [], "zero commands"


def test_many_crops_are_filled_once_and_training_asks_the_teacher_nothing(data, tiny_model, redis_server, tmp_path):
    """The teacher is taken away after the fill and the evaluation's answers: the run must not notice."""
    with serve((tiny_model, data)) as (address,):
        train(a_run(data, address, redis_server.url, tmp_path / "one", "fix/ic_ens"), World())
        again = a_run(data, address, redis_server.url, tmp_path / "two", "fix/ic_ens")
        train(again, World())
    assert {line["recomputed_share"] for line in lines(again)} == {0.0}
    assert max(line["teacher_wait_s"] for line in lines(again)) < 0.05
