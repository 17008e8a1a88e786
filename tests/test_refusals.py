"""What a teacher does not answer: each refusal is a status and a sentence, and the server goes on."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2

from data_prep.index import Index
from one_teacher import SIZE, TIMEOUT_S, Client, draw, files, rendered, serving, small
from protos import teacher_pb2 as pb
from protos.arrays import from_message, to_message
from teacher_server import pictures
from teacher_server.config import Config
from teacher_server.server import MAX_MESSAGE_BYTES
from views.view import Rows
from views.wire import ask_by_reference, ask_encoded, ask_pixels


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_data: Path) -> Config:
    return small(tiny_model, tiny_data)


@pytest.fixture(scope="module")
def client(config: Config) -> Iterator[Client]:
    with serving(config) as (_, client):
        yield client


def replaced(array: np.ndarray, at: int, value: float) -> pb.Array:
    array = array.copy()
    array[at] = value
    return to_message(array)


def set_array(path: str, change) -> object:
    """A damage: replace the array at path, given the rows."""

    def damage(request: pb.PredictRequest, rows: Rows) -> None:
        message = request
        *parents, last = path.split(".")
        for name in parents:
            message = getattr(message, name)
        getattr(message, last).CopyFrom(change(rows))

    return damage


def encoded_damage(change) -> object:
    def damage(request: pb.PredictRequest, rows: Rows) -> None:
        change(request.encoded.image)

    return damage


def set_item(at: int, change) -> object:
    def damage(images) -> None:
        images[at] = change(images[at])

    return encoded_damage(damage)


def field(name: str, value: object) -> object:
    def damage(request: pb.PredictRequest, rows: Rows) -> None:
        setattr(request, name, value)

    return damage


def clear(name: str) -> object:
    return lambda request, rows: request.ClearField(name)


def box(row: int, yxhw: list[int]) -> object:
    return set_array("views.box", lambda rows: replaced(rows.box, row, yxhw))


def raw(dtype: int, shape: list[int], data: bytes) -> pb.Array:
    return pb.Array(dtype=dtype, shape=shape, data=data)


def image_of(row: int, rows: Rows) -> int:
    """The position of a row's picture among those sent."""
    return int(np.searchsorted(np.unique(rows.sample), rows.sample[row]))


INVALID, RANGE, PRECONDITION = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
)
BIG = 2**31 - 1

MALFORMED = {
    # name: (transport, damage, code, sentence)
    "no rows": ("reference", set_array("lam", lambda r: to_message(r.lam[:0])), INVALID, "no rows"),
    "lam NaN": ("reference", set_array("lam", lambda r: replaced(r.lam, 2, np.nan)), INVALID, "row 2.*lam.*nan"),
    "lam too large": ("reference", set_array("lam", lambda r: replaced(r.lam, 3, 1.5)), INVALID, "row 3.*1.5"),
    "lam negative": ("pixels", set_array("lam", lambda r: replaced(r.lam, 3, -0.1)), INVALID, "row 3.*-0.1"),
    "lam of float16": (
        "reference",
        set_array("lam", lambda r: to_message(r.lam.astype(np.float16))),
        INVALID,
        "lam has dtype float16",
    ),
    "lam absent": ("reference", clear("lam"), INVALID, "lam"),
    "partner too large": (
        "reference",
        set_array("partner", lambda r: replaced(r.partner, 1, 6)),
        INVALID,
        "row 1.*partner.*6",
    ),
    "partner negative": ("encoded", set_array("partner", lambda r: replaced(r.partner, 1, -1)), INVALID, "row 1.*-1"),
    "partners too few": (
        "reference",
        set_array("partner", lambda r: to_message(r.partner[:4])),
        INVALID,
        "partner.*shape",
    ),
    "unknown dtype": ("reference", set_array("partner", lambda r: raw(77, [6], bytes(24))), INVALID, "partner.*dtype"),
    "no dtype": ("reference", set_array("partner", lambda r: raw(0, [6], bytes(24))), INVALID, "partner.*dtype"),
    "too few bytes": (
        "reference",
        set_array("partner", lambda r: raw(2, [6], bytes(23))),
        INVALID,
        "partner.*23 bytes",
    ),
    "huge shape": ("reference", set_array("partner", lambda r: raw(2, [2**31, 2**31], b"")), INVALID, "partner.*shape"),
    "box of three": (
        "reference",
        set_array("views.box", lambda r: to_message(r.box[:, :3].copy())),
        INVALID,
        "views.box.*shape",
    ),
    "box empty": ("reference", box(4, [0, 0, 0, 5]), INVALID, "view 4|row 4"),
    "box negative": ("encoded", box(4, [-1, 0, 5, 5]), INVALID, "view 4|row 4"),
    "box too low": ("reference", box(4, [0, 0, 5000, 5]), INVALID, "row 4, sample.*h=5000.*leaves"),
    "box overflows": ("reference", box(2, [BIG, 0, BIG, 5]), INVALID, "row 2, sample.*leaves"),
    "box too wide, encoded": ("encoded", box(5, [0, 60, 5, 500]), INVALID, "row 5, sample.*w=500.*leaves"),
    "flip of two": (
        "reference",
        set_array("views.flip", lambda r: to_message(np.full(6, 2, np.uint8))),
        INVALID,
        "(view|row) 0.*flip",
    ),
    "unequal V": ("reference", set_array("views.flip", lambda r: to_message(r.flip[:5])), INVALID, "views.flip.*shape"),
    "views absent": ("reference", clear("views"), INVALID, "views"),
    "fewer views than rows": (
        "pixels",
        set_array("pixels", lambda r: to_message(np.zeros((5, SIZE, SIZE, 3), np.uint8))),
        INVALID,
        "6 rows need",
    ),
    "more views than rows use": (
        "pixels",
        set_array("pixels", lambda r: to_message(np.zeros((13, SIZE, SIZE, 3), np.uint8))),
        INVALID,
        "at most 12 views",
    ),
    "pixels of another size": (
        "pixels",
        set_array("pixels", lambda r: to_message(np.zeros((6, 16, 16, 3), np.uint8))),
        INVALID,
        "pixels.*shape",
    ),
    "pixels of float": (
        "pixels",
        set_array("pixels", lambda r: to_message(np.zeros((6, SIZE, SIZE, 3), np.float32))),
        INVALID,
        "pixels.*dtype",
    ),
    "no pictures": ("reference", clear("references"), INVALID, "no pictures"),
    "image too large": (
        "encoded",
        set_array("views.image", lambda r: replaced(np.zeros(6, np.int32), 3, 99)),
        INVALID,
        "(view|row) 3.*99",
    ),
    "image negative": (
        "reference",
        set_array("views.image", lambda r: replaced(np.zeros(6, np.int32), 3, -2)),
        INVALID,
        "(view|row) 3.*-2",
    ),
    "sample unknown": (
        "reference",
        set_array("references.sample", lambda r: to_message(np.unique(r.sample) + 24)),
        RANGE,
        "row \\d, sample.*samples 0..23",
    ),
    "sample negative": (
        "reference",
        set_array("references.sample", lambda r: to_message(np.unique(r.sample) - 30)),
        RANGE,
        "row \\d, sample -",
    ),
    "sample huge": (
        "reference",
        set_array("references.sample", lambda r: to_message(np.unique(r.sample) + 2**62)),
        RANGE,
        "row \\d, sample",
    ),
    "other data set": (
        "reference",
        lambda q, r: setattr(q.references, "digest", "ab" * 32),
        PRECONDITION,
        "abababababab is not here.*tiny",
    ),
    "no digest": ("reference", lambda q, r: setattr(q.references, "digest", ""), PRECONDITION, "no digest"),
    "path as digest": (
        "reference",
        lambda q, r: setattr(q.references, "digest", "../../etc"),
        PRECONDITION,
        "not here",
    ),
    "truncated JPEG": (
        "encoded",
        lambda q, r: set_item(image_of(3, r), lambda b: b[: len(b) // 2])(q, r),
        INVALID,
        "row \\d, sample.*decode|row \\d, sample.*picture",
    ),
    "no JPEG": (
        "encoded",
        lambda q, r: set_item(image_of(3, r), lambda b: b"hello" * 40)(q, r),
        INVALID,
        "row \\d, sample.*decode",
    ),
    "garbage in a JPEG": (
        "encoded",
        lambda q, r: set_item(image_of(0, r), lambda b: b[:4] + bytes(200) + b"\xff\xd9")(q, r),
        INVALID,
        "row \\d, sample.*decode",
    ),
    "empty picture": (
        "encoded",
        lambda q, r: set_item(image_of(2, r), lambda b: b"")(q, r),
        INVALID,
        "row \\d, sample.*empty",
    ),
    "pictures nobody shows": (
        "encoded",
        lambda q, r: (q.encoded.image.extend([b"x"] * 20), q.encoded.ClearField("sample")),
        INVALID,
        "at most as many pictures",
    ),
    "names for other pictures": (
        "encoded",
        set_array("encoded.sample", lambda r: to_message(np.arange(3))),
        INVALID,
        "encoded.sample.*shape",
    ),
    "audit out of range": (
        "reference",
        set_array("audit", lambda r: to_message(np.int32([0, 6]))),
        INVALID,
        "audit entry 1.*6",
    ),
    "audit negative": (
        "reference",
        set_array("audit", lambda r: to_message(np.int32([-1]))),
        INVALID,
        "audit entry 0.*-1",
    ),
}


def ask(transport: str, index: Index, rows: Rows) -> pb.PredictRequest:
    if transport == "reference":
        return ask_by_reference(rows, index.digest)
    if transport == "encoded":
        return ask_encoded(rows, files(index, rows))
    return ask_pixels(rows, rendered(index, rows))


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_refused_in_a_sentence_while_others_are_answered(client, index, name):
    transport, damage, code, sentence = MALFORMED[name]
    rows, neighbour = draw(index, 6), draw(index, 3, seed=1)
    expected = client.logits(ask_by_reference(neighbour, index.digest))
    request = ask(transport, index, rows)
    damage(request, rows)

    good = client.begin(ask_by_reference(neighbour, index.digest))
    with pytest.raises(grpc.RpcError) as error:
        client.predict(request)

    assert error.value.code() == code, error.value.details()
    assert re.search(sentence, error.value.details()), error.value.details()
    np.testing.assert_array_equal(from_message(good.result().logits, "logits", np.float32, (3, 6)), expected)


def test_too_many_rows_are_refused(client, index):
    with pytest.raises(grpc.RpcError, match=r"row 40 is one too many.*at most 40 rows") as error:
        client.predict(ask_by_reference(draw(index, 41), index.digest))
    assert error.value.code() == INVALID


@pytest.mark.parametrize("asked_for", ["", "ab" * 32])
def test_a_request_for_another_teacher_is_refused(client, index, asked_for):
    request = client.signed(ask_by_reference(draw(index, 2), index.digest))
    request.fingerprint = asked_for
    with pytest.raises(grpc.RpcError, match=r"call Describe again") as error:
        client.stub.Predict(request, timeout=TIMEOUT_S)
    assert error.value.code() == PRECONDITION


def test_a_shard_that_vanished_is_named_and_the_server_goes_on(config, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "set")
    index = Index.open(tmp_path / "set")
    with serving(dataclasses.replace(config, data=(tmp_path / "set",), gate_images=1)) as (_, client):
        shard = int(index.shard[-1])
        assert shard != index.shard[0], "the gate must not have opened it"
        (tmp_path / "set" / index.shards[shard].name).unlink()
        rows = draw(index, 5)
        here = dataclasses.replace(rows, sample=np.flatnonzero(index.shard == 0)[:5], box=np.int32([[0, 0, 9, 9]] * 5))
        gone = dataclasses.replace(here, sample=np.r_[here.sample[:4], len(index) - 1])
        with pytest.raises(
            grpc.RpcError, match=rf"row 4, sample {len(index) - 1}.*{index.shards[shard].name}"
        ) as error:
            client.predict(ask_by_reference(gone, index.digest))
        assert error.value.code() == PRECONDITION
        assert client.logits(ask_by_reference(here, index.digest)).shape == (5, 6)


def test_a_message_beyond_the_limit_is_refused_and_the_server_goes_on(client, index):
    request = ask_encoded(draw(index, 1), [bytes(MAX_MESSAGE_BYTES)])
    with pytest.raises(grpc.RpcError) as error:
        client.predict(request)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.health() == health_pb2.HealthCheckResponse.SERVING


def test_refusals_are_logged_with_request_id_and_client(client, index, caplog):
    request = client.signed(pb.PredictRequest(client="flowers seed 3"), "step 12 part 3")
    with caplog.at_level("INFO", logger="teacher_server"), pytest.raises(grpc.RpcError):
        client.stub.Predict(request, timeout=TIMEOUT_S)
    [line] = [record.fields for record in caplog.records if getattr(record, "event", "") == "refused"]
    assert (line["request_id"], line["client"]) == ("step 12 part 3", "flowers seed 3")
    assert line["code"] == "INVALID_ARGUMENT"
    assert line["peer"].startswith("ipv4:127.0.0.1:")


def test_without_a_renderer_only_pixels_are_answered(config, client, index, monkeypatch):
    monkeypatch.setitem(sys.modules, "views.render", None)  # what an import sees without DALI
    assert pictures.make_renderers(32, "linear", False, device=torch.device("cpu"), num_threads=1, num=1) == ([], "")
    rows = draw(index, 4)
    with serving(config) as (_, blind):
        assert not blind.description.renders
        np.testing.assert_array_equal(
            blind.logits(ask_pixels(rows, rendered(index, rows))),
            client.logits(ask_pixels(rows, rendered(index, rows))),
        )
        for request in (ask_by_reference(rows, index.digest), ask_encoded(rows, files(index, rows))):
            with pytest.raises(grpc.RpcError, match=r"send rendered pixels") as error:
                blind.predict(request)
            assert error.value.code() == PRECONDITION
