"""Stores of logits: a file, and a real redis-server."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import RedisServer, redis_server_binary
from student_trainer import redis_store
from student_trainer.file_store import FileStore
from student_trainer.logit_store import (
    OVERHEAD_BYTES,
    Counts,
    StoreGoneError,
    StoreKey,
    absent,
    open_store,
    pack,
    redacted,
    unpack,
    unpack_all,
)
from views.setting import ViewSetting

NUM_SAMPLES, NUM_CLASSES = 1000, 7


def make_key(**changes) -> StoreKey:
    facts = {
        "fingerprint": "f00d", "data_digest": "cafe", "views": ViewSetting(setting="fix/ic_ens").fixed,
        "num_samples": NUM_SAMPLES, "num_classes": NUM_CLASSES, "dtype": "float32",
    }  # fmt: skip
    return StoreKey(**(facts | changes))


def logits_of(samples: np.ndarray, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(NUM_SAMPLES, NUM_CLASSES)).astype(np.float16).astype(np.float32)[samples]


@pytest.fixture(params=["file", "redis"])
def where(request, tmp_path) -> str:
    if request.param == "file":
        return str(tmp_path / "store")
    return request.getfixturevalue("redis_server").url


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_put_is_found_by_the_next_who_opens_the_store(where, dtype):
    key = make_key(dtype=dtype)
    store = open_store(where, key)
    samples = np.random.default_rng(1).permutation(NUM_SAMPLES)[:300]
    store.put(samples, logits_of(samples))
    store.close()
    again = open_store(where, key)
    asked = np.array([samples[5], 3, samples[200], samples[5]])
    logits, found = again.get(asked)
    assert found.tolist() == [True, 3 in samples, True, True]
    np.testing.assert_array_equal(logits[found], logits_of(asked)[found])
    assert again.counts == Counts(found=int(found.sum()), absent=int((~found).sum()))
    assert store.counts.written == 300
    assert set(absent(again, np.arange(NUM_SAMPLES))) == set(range(NUM_SAMPLES)) - set(samples.tolist())


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "beef"},
        {"data_digest": "babe"},
        {"views": ViewSetting(setting="fix/cc").fixed},
        {"views": ViewSetting(setting="fix/ic_ens", num_crops=999).fixed},
        {"views": ViewSetting(setting="fix/ic_ens", average="logits").fixed},
        {"views": ViewSetting(setting="fix/ic_ens", min_area=0.08).fixed},
        {"num_samples": NUM_SAMPLES + 1},
        {"num_classes": NUM_CLASSES + 1},
        {"dtype": "float16"},
    ],
)
def test_another_teacher_data_set_view_or_average_finds_nothing(where, change):
    samples = np.arange(50)
    open_store(where, make_key()).put(samples, logits_of(samples))
    _, found = open_store(where, make_key(**change)).get(samples)
    assert not found.any()


def test_a_flipped_bit_anywhere_is_found_and_counted():
    key = make_key()
    value = pack(key, 5, logits_of(np.array([5]))[0])
    assert len(value) == key.value_bytes == OVERHEAD_BYTES + 4 * NUM_CLASSES
    counts = Counts()
    for byte in range(len(value)):
        for bit in range(8):
            rotten = bytearray(value)
            rotten[byte] ^= 1 << bit
            assert unpack(key, 5, bytes(rotten), counts) is None
    assert counts == Counts(damaged=8 * len(value))
    assert unpack(key, 5, value[:-1], counts) is None
    assert unpack(key, 5, value, counts) is not None


def test_values_of_stores_that_were_filled_before_are_read():
    """Written by hand from the layout: header, little-endian data, keyed BLAKE2b of both."""
    key, logits = make_key(dtype="float16"), logits_of(np.array([5]))[0]
    body = b"FL\x01\x01" + (7).to_bytes(4, "little") + logits.astype("<f2").tobytes()
    salt = bytes.fromhex(key.digest) + (5).to_bytes(8, "little")
    value = body + hashlib.blake2b(body, digest_size=8, key=salt).digest()
    counts = Counts()
    np.testing.assert_array_equal(unpack(key, 5, value, counts), logits)
    assert pack(key, 5, logits) == value
    assert key.digest == "ffb90eefa9ee2cc39a01db617c659af9"


def test_sound_damaged_and_absent_values_of_one_batch_are_told_apart():
    key, samples = make_key(), np.array([3, 900, 3, 17, 18, 19, 20])
    values: list[bytes | None] = [pack(key, int(sample), logits_of(np.array([sample]))[0]) for sample in samples]
    values[1], values[3], values[4] = None, values[3][:-1], values[0]
    values[5], values[6] = bytes(key.value_bytes), bytes(3)
    counts = Counts()
    logits, found = unpack_all(key, samples, values, counts)
    assert found.tolist() == [True, False, True, False, False, False, False]
    assert counts == Counts(found=2, absent=3, damaged=2)
    np.testing.assert_array_equal(logits, np.where(found[:, None], logits_of(samples), 0))


def test_a_value_half_old_and_half_new_is_damaged():
    """As a kill in the middle of a write may leave it; wherever the middle is."""
    key, counts = make_key(), Counts()
    old, new = (pack(key, 5, logits_of(np.array([5]), seed)[0]) for seed in (0, 1))
    torn = {new[:cut] + old[cut:] for cut in range(len(new))} - {old, new}
    for value in torn | {new[:cut] + bytes(len(new) - cut) for cut in range(1, len(new))}:
        assert unpack(key, 5, value, counts) is None
    assert counts.damaged >= len(new) and counts.absent == counts.found == 0


def test_a_value_under_another_samples_name_or_key_is_refused():
    key, counts = make_key(), Counts()
    value = pack(key, 5, logits_of(np.array([5]))[0])
    assert unpack(key, 6, value, counts) is None
    assert unpack(make_key(fingerprint="beef"), 5, value, counts) is None
    assert counts.damaged == 2


def test_a_thousand_half_precision_logits_stay_below_the_allocators_step():
    assert make_key(num_classes=1000, dtype="float16").value_bytes <= 2048


def test_views_that_are_new_at_every_step_have_no_key():
    """The type is the guarantee: only fix/* settings have FixedViews, and a key cannot be made without."""
    for setting in ("same/rc", "same/ic", "same/ic+mix", "ind/rc", "ind/ic"):
        with pytest.raises(ValueError, match="no fixed views"):
            make_key(views=ViewSetting(setting=setting).fixed)
    assert {field.name: field.type for field in dataclasses.fields(StoreKey)}["views"] == "FixedViews"


# ---- the file ----------------------------------------------------------------------------------------------


def test_a_damaged_record_of_the_file_is_absent_and_counted(tmp_path):
    key, samples = make_key(), np.arange(20)
    store = FileStore(tmp_path, key)
    store.put(samples, logits_of(samples))
    with store.path.open("r+b") as file:
        file.seek(7 * key.value_bytes + 12)
        file.write(b"\xff")
    _, found = store.get(samples)
    assert np.flatnonzero(~found).tolist() == [7]
    assert store.counts.damaged == 1
    store.put(np.array([7]), logits_of(np.array([7])))
    assert store.get(samples)[1].all()


def test_a_file_that_was_cut_is_refused_with_the_cure(tmp_path):
    store = FileStore(tmp_path, make_key())
    os.truncate(store.path, 100)
    with pytest.raises(StoreGoneError, match=r"has 100 bytes, 1000 values need \d+.*Delete it"):
        FileStore(tmp_path, make_key())


def test_a_write_that_the_system_refuses_is_told_and_leaves_what_was_there(tmp_path):
    store = FileStore(tmp_path, make_key())
    store.put(np.arange(10), logits_of(np.arange(10)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * make_key().value_bytes + 9, hard))  # in the middle of a record
    try:
        with pytest.raises(StoreGoneError, match=r"only a part was written.*Make room"):
            store.put(np.array([99, 100]), logits_of(np.array([99, 100])))
        with pytest.raises(StoreGoneError, match="Make room"):
            store.put(np.array([101]), logits_of(np.array([101])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert np.flatnonzero(store.get(np.arange(NUM_SAMPLES))[1]).tolist() == [*range(10), 99]
    assert store.counts.damaged == 1


def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StoreGoneError, match="choose another folder"):
        FileStore(tmp_path / "taken", make_key())


def test_the_facts_of_the_key_lie_beside_the_file(tmp_path):
    store = FileStore(tmp_path, make_key())
    facts = json.loads(store.path.with_suffix(".json").read_text())
    assert facts == make_key().facts()
    assert facts["views"]["num_views"] == 1000


def fill_part(folder: Path, part: int) -> None:
    store = FileStore(folder, make_key())
    samples = np.arange(part, NUM_SAMPLES, 2)
    for start in range(0, len(samples), 10):
        store.put(samples[start : start + 10], logits_of(samples[start : start + 10]))


def test_processes_that_open_and_fill_one_file_at_once_do_not_disturb_each_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=fill_part, args=(tmp_path, part)) for part in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    everything = np.arange(NUM_SAMPLES)
    logits, found = FileStore(tmp_path, make_key()).get(everything)
    assert found.all()
    np.testing.assert_array_equal(logits, logits_of(everything))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".logits"]


# ---- Redis -------------------------------------------------------------------------------------------------


def test_samples_lie_in_few_keys(redis_server):
    store = open_store(redis_server.url, make_key())
    everything = np.arange(NUM_SAMPLES)
    store.put(everything, logits_of(everything))
    client = redis_server.client()
    assert client.dbsize() == 8, "1000 samples in hashes of 128"
    assert sum(client.hlen(name) for name in client.scan_iter()) == NUM_SAMPLES


def test_a_batch_is_one_round_trip(redis_server):
    store = open_store(redis_server.url, make_key())
    samples = np.arange(0, NUM_SAMPLES, 3)
    store.put(samples, logits_of(samples))
    client = redis_server.client()
    client.config_resetstat()
    store.get(samples)
    reads = client.info("stats")["total_reads_processed"]
    assert reads <= 4, "not one for each of 334 samples, nor for each of 8 hashes"


def test_evicted_values_are_absent(redis_server):
    store = open_store(redis_server.url, make_key())
    store.put(np.arange(300), logits_of(np.arange(300)))
    client = redis_server.client()
    client.delete(client.keys()[0])
    assert 0 < len(absent(store, np.arange(300))) <= 128
    client.flushdb()
    assert len(absent(store, np.arange(300))) == 300
    assert store.counts.damaged == 0


def test_a_server_that_went_away_is_told_within_seconds(redis_server):
    store = open_store(redis_server.url, make_key())
    redis_server.stop()
    for call in (lambda: store.get(np.arange(3)), lambda: store.put(np.arange(3), logits_of(np.arange(3)))):
        began = time.monotonic()
        with pytest.raises(StoreGoneError, match=r"the logit store unix://.* Start it again"):
            call()
        assert time.monotonic() - began < 3
    redis_server.start()
    store.put(np.arange(3), logits_of(np.arange(3)))
    assert store.get(np.arange(3))[1].all(), "back again, without a new store"


def test_a_server_that_hangs_is_told_within_seconds(redis_server, monkeypatch):
    monkeypatch.setattr(redis_store, "_TIMEOUT_S", 0.5)
    store = open_store(redis_server.url, make_key())
    store.put(np.arange(3), logits_of(np.arange(3)))
    began = time.monotonic()
    with redis_server.hung(), pytest.raises(StoreGoneError, match=r"Timeout.* Start it again"):
        store.get(np.arange(3))
    assert 1.4 < time.monotonic() - began < 5, "three times the timeout"
    logits, found = store.get(np.arange(3))
    assert found.all(), "back again, and no answer of before is taken for one of now"
    np.testing.assert_array_equal(logits, logits_of(np.arange(3)))


def test_nobody_there_is_told_at_once():
    began = time.monotonic()
    with pytest.raises(StoreGoneError, match="Start it again"):
        open_store("redis://127.0.0.1:9/0", make_key())
    assert time.monotonic() - began < 4


def test_a_full_server_says_that_it_is_full(redis_server):
    store = open_store(redis_server.url, make_key())
    client = redis_server.client()
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 20_000)
    client.config_set("maxmemory-policy", "noeviction")
    with pytest.raises(StoreGoneError, match="raise its maxmemory"):
        for start in range(0, NUM_SAMPLES, 100):
            store.put(np.arange(start, start + 100), logits_of(np.arange(start, start + 100)))


def test_an_acl_user_needs_few_rights_and_a_wrong_password_is_told_without_being_shown(redis_server, monkeypatch):
    redis_server.client().acl_setuser(
        "trainer",
        enabled=True,
        passwords=["+s3cret"],
        keys=["funmatch:logits:*"],
        commands=["+hmget", "+hset", "+ping"],
    )
    samples = np.arange(10)
    port = redis_server.port
    store = open_store(f"redis://trainer:s3cret@127.0.0.1:{port}/0", make_key())
    store.put(samples, logits_of(samples))
    assert store.get(samples)[1].all()
    with pytest.raises(StoreGoneError, match="REDISCLI_AUTH") as refused:
        open_store(f"redis://trainer:wr0ng@127.0.0.1:{port}/0", make_key())
    assert "wr0ng" not in str(refused.value)
    monkeypatch.setenv("REDISCLI_AUTH", "s3cret")
    assert open_store(f"redis://trainer@127.0.0.1:{port}/0", make_key()).get(samples)[1].all()


def test_tls_by_url(tmp_path):
    binary = redis_server_binary()
    listed = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
    if "libssl" not in listed:
        pytest.skip("this redis-server was built without TLS")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", str(key), "-out", str(certificate),
         "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    from conftest import free_port

    port = free_port()
    (tmp_path / "redis").mkdir()
    server = RedisServer(
        tmp_path / "redis", "--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no",
    )  # fmt: skip
    try:
        store = open_store(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}", make_key())
        store.put(np.arange(4), logits_of(np.arange(4)))
        assert store.get(np.arange(4))[1].all()
        with pytest.raises(StoreGoneError, match="certificate verify failed"):
            open_store(f"rediss://127.0.0.1:{port}/0", make_key())
    finally:
        server.stop()


def test_passwords_are_not_written_down():
    assert redacted("redis://user:pa:ss@host:6379/0") == "redis://user:***@host:6379/0"
    assert redacted("rediss://:secret@host/0") == "rediss://:***@host/0"
    assert redacted("redis://user:p@ss@host/0") == "redis://user:***@host/0"
    assert redacted("unix://user:secret@/run/redis.sock?db=1") == "unix://user:***@/run/redis.sock?db=1"
    assert redacted("rediss://h/0?ssl_password=secret&db=1") == "rediss://h/0?ssl_password=***&db=1"
    assert redacted("unix:///run/redis.sock?password=secret") == "unix:///run/redis.sock?password=***"
    assert redacted("runs/logits") == "runs/logits"
    assert redacted("redis://host:6379") == "redis://host:6379"


def test_an_address_that_cannot_be_read_is_told_without_a_piece_of_the_password():
    with pytest.raises(StoreGoneError, match=r"no address of a Redis server.*%2F for /") as refused:
        open_store("redis://user:pi/ece@host/0", make_key())
    assert "pi" not in str(refused.value) and refused.value.__cause__ is None
