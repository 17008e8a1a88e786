"""A real server on a free port and a real client: answers, refusals, overload, draining."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import models
import reference_render
from conftest import wait_until
from data_prep.index import Index
from decoded_files import files_decoded
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import from_message, to_message
from teacher_server import admission, pictures, service
from teacher_server.config import Config
from teacher_server.gate import GateError
from teacher_server.server import MAX_MESSAGE_BYTES, Server, create_server
from views.draw import ViewLaw
from views.render import Renderer
from views.setting import FixedViews
from views.view import Rows, view_digest
from views.wire import ask_by_reference, ask_encoded, ask_for_mean, ask_pixels

SIZE = 32
TIMEOUT_S = 60


class Client:
    """The stubs of one server."""

    def __init__(self, address: str) -> None:
        limits = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self.channel = grpc.insecure_channel(address, options=limits)
        self.stub = pb_grpc.TeacherStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)
        self._described: pb.Description | None = None

    @property
    def description(self) -> pb.Description:
        self._described = self._described or self.stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
        return self._described

    def health(self, name: str = "") -> int:
        return self._health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status

    def watch_health(self) -> Iterator[health_pb2.HealthCheckResponse]:
        return self._health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)

    def signed(self, request: pb.PredictRequest, request_id: str = "r1") -> pb.PredictRequest:
        request.fingerprint, request.request_id = self.description.fingerprint, request_id
        return request

    def predict(self, request: pb.PredictRequest) -> pb.PredictReply:
        return self.stub.Predict(self.signed(request), timeout=TIMEOUT_S)

    def begin(self, request: pb.PredictRequest) -> grpc.Future:
        return self.stub.Predict.future(self.signed(request), timeout=TIMEOUT_S)

    def logits(self, request: pb.PredictRequest) -> np.ndarray:
        return from_message(self.predict(request).logits, "logits", np.float32, (None, 6))


@contextmanager
def serving(config: Config) -> Iterator[tuple[Server, Client]]:
    server, address = create_server(config)
    client = Client(address)
    try:
        server.load()
        yield server, client
    finally:
        client.channel.close()
        server.drain()


@pytest.fixture(scope="module")
def config(tiny_data: Path, tiny_model: Path) -> Config:
    return Config(
        model=str(tiny_model), data=(tiny_data,), address="127.0.0.1:0", device="cpu", threads=1,
        batch_rows=8, max_rows=40, max_pending_rows=80, gate_images=8, drain_s=20,
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(config: Config) -> Iterator[tuple[Server, Client]]:
    with serving(config) as both:
        yield both


@pytest.fixture(scope="module")
def client(running: tuple[Server, Client]) -> Client:
    return running[1]


@pytest.fixture(scope="module")
def index(tiny_data: Path) -> Index:
    return Index.open(tiny_data)


def draw(index: Index, num_rows: int, seed: int = 0) -> Rows:
    """Rows of random pictures and boxes, partners rolled by one, as a step of mixup has them."""
    rng = np.random.default_rng((9, seed))
    sample = rng.integers(0, len(index), num_rows)
    height, width = index.height[sample], index.width[sample]
    h, w = rng.integers(8, height + 1), rng.integers(8, width + 1)
    y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    return Rows(
        sample=sample,
        box=np.stack([y, x, h, w], axis=1).astype(np.int32),
        flip=rng.random(num_rows) < 0.5,
        partner=np.roll(np.arange(num_rows, dtype=np.int32), 1),
        lam=rng.random(num_rows, dtype=np.float32),
    )


def files(index: Index, rows: Rows) -> list[bytes]:
    return [picture.tobytes() for picture in index.read(np.unique(rows.sample))]


def rendered(index: Index, rows: Rows) -> np.ndarray:
    """The views by the slow reference, uint8 [V, S, S, 3]."""
    shown = zip(index.read(rows.sample), rows.box, rows.flip, strict=True)
    return np.stack([reference_render.render(picture, box, SIZE, flip) for picture, box, flip in shown])


def by_hand(index: Index, rows: Rows, model_file: Path) -> np.ndarray:
    """Logits by Pillow, numpy in float64, and the network as it lies in its file, one row at a time."""
    model, card = models.load(model_file)
    views = rendered(index, rows) / 255.0
    lam = rows.lam.astype(np.float64)[:, None, None, None]
    mixed = lam * views[: len(rows)] + (1 - lam) * views[rows.partner]
    inputs = torch.from_numpy(((mixed - card.mean) / card.std).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        return torch.cat([model.eval()(row[None]) for row in inputs]).numpy()


# --- who is there ---------------------------------------------------------------------------------------------------


def test_the_description_says_what_is_served(client, index, tiny_model):
    description = client.description
    assert description.model == "resnetv2_14x05_bit"
    assert (description.num_classes, description.precision, description.max_rows) == (6, "float32", 40)
    assert (description.rendering.size, description.rendering.interpolation) == (SIZE, "linear")
    assert description.weights_digest == models.weights_digest(models.load(tiny_model)[0])
    assert [(d.name, d.digest, d.num_samples) for d in description.data_sets] == [(index.name, index.digest, 24)]
    assert description.renders
    assert description.batch_invariant
    assert len(bytes.fromhex(description.fingerprint)) == 32


def test_the_standard_health_stub_sees_a_serving_teacher(client):
    for name in ("", "funmatch.v1.Teacher"):
        assert client.health(name) == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as error:
        client.health("other")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_service_and_its_methods(client):
    database = ProtoReflectionDescriptorDatabase(client.channel)
    assert {"funmatch.v1.Teacher", "grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("funmatch.v1.Teacher")
    assert [method.name for method in file.service[0].method] == ["Describe", "Predict"]


def test_the_port_answers_not_serving_while_the_model_is_not_loaded(config):
    server, address = create_server(config)
    client = Client(address)
    try:
        assert client.health() == health_pb2.HealthCheckResponse.NOT_SERVING
        assert client.health("funmatch.v1.Teacher") == health_pb2.HealthCheckResponse.NOT_SERVING
        for call, request in ((client.stub.Describe, pb.DescribeRequest()), (client.stub.Predict, pb.PredictRequest())):
            with pytest.raises(grpc.RpcError, match=r"still loading") as error:
                call(request, timeout=5)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    finally:
        client.channel.close()
        server.drain()


def test_equal_settings_give_equal_fingerprints_and_other_settings_others(config, client):
    prints = {client.description.fingerprint}
    for change in ({}, {"size": 40}, {"interpolation": "cubic"}, {"antialias": True}, {"batch_rows": 4}):
        with serving(dataclasses.replace(config, **change)) as (_, other):
            prints.add(other.description.fingerprint)
    assert len(prints) == 5


def test_an_address_in_use_is_refused(client, running, config):
    with pytest.raises(ValueError, match=r"--address"):
        create_server(dataclasses.replace(config, address=running[0].address))


# --- answers --------------------------------------------------------------------------------------------------------


def test_logits_equal_those_computed_slowly_by_hand(client, index, tiny_model):
    rows = draw(index, 19)
    logits = client.logits(ask_by_reference(rows, index.digest))
    expected = by_hand(index, rows, tiny_model)
    assert expected.std(axis=0).min() > 0.1, "a network that always says the same proves nothing"
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_three_transports_give_the_same_bits(client, index):
    rows = draw(index, 13)
    by_reference = client.logits(ask_by_reference(rows, index.digest))
    np.testing.assert_array_equal(client.logits(ask_encoded(rows, files(index, rows))), by_reference)
    np.testing.assert_array_equal(client.logits(ask_pixels(rows, rendered(index, rows))), by_reference)


def test_split_and_merged_requests_give_the_same_bits(client, index):
    rows = draw(index, 37)
    whole = client.logits(ask_by_reference(rows, index.digest))
    bounds = [0, 1, 9, 17, 30, 37]
    parts = [rows.take(start, stop) for start, stop in itertools.pairwise(bounds)]
    with ThreadPoolExecutor() as pool:  # at once: they share batches
        answers = list(pool.map(lambda part: client.logits(ask_by_reference(part, index.digest)), parts))
    np.testing.assert_array_equal(np.concatenate(answers), whole)


def test_many_clients_at_once_get_their_own_rows(client, index):
    every = [draw(index, 1 + seed % 7, seed) for seed in range(24)]
    alone = [client.logits(ask_by_reference(rows, index.digest)) for rows in every]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda rows: client.logits(ask_by_reference(rows, index.digest)), every))
    for ours, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_many_views_of_one_picture_send_it_once(client, index):
    rows = draw(index, 10)
    rows = dataclasses.replace(rows, sample=np.full(10, 3), box=np.tile(np.int32([1, 2, 20, 25]), (10, 1)))
    request = ask_encoded(rows, files(index, rows))
    assert len(request.encoded.image) == 1
    np.testing.assert_array_equal(client.logits(request), client.logits(ask_by_reference(rows, index.digest)))


def test_the_reply_carries_the_request_id_and_the_fingerprint(client, index):
    reply = client.predict(ask_by_reference(draw(index, 2), index.digest))
    assert (reply.request_id, reply.fingerprint) == ("r1", client.description.fingerprint)
    assert not reply.HasField("audit_digest")


def test_the_audit_vouches_for_the_rendered_views_and_shows_them_on_request(client, index):
    rows = draw(index, 6).take(0, 5)  # its last view is a partner only
    request = ask_by_reference(rows, index.digest)
    request.audit.CopyFrom(to_message(np.int32([5, 0])))
    views = rendered(index, rows)
    reply = client.predict(request)
    assert reply.audit_digest.data == view_digest(views[5]) + view_digest(views[0])
    assert not reply.HasField("audit_pixels")
    request.audit_pixels = True
    pixels = from_message(client.predict(request).audit_pixels, "pixels", np.uint8, (2, SIZE, SIZE, 3))
    np.testing.assert_array_equal(pixels, views[[5, 0]])


def test_half_precision_travels_as_float16_and_is_close(config, client, index):
    rows = draw(index, 8)
    with serving(dataclasses.replace(config, precision="bfloat16")) as (_, half):
        reply = half.predict(ask_by_reference(rows, index.digest))
        logits = from_message(reply.logits, "logits", np.float16, (8, 6))
        assert half.description.precision == "bfloat16"
    expected = client.logits(ask_by_reference(rows, index.digest))
    assert 0 < np.abs(logits - expected).max() < 0.2 * expected.std()


# --- refusals -------------------------------------------------------------------------------------------------------


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


# --- overload, cancellation, failure, end ---------------------------------------------------------------------------


@contextmanager
def renderers_held(server: Server) -> Iterator[None]:
    """Handlers that need to render wait, as they would for a slow disk."""
    pool = server._service._desk.pictures._renderers
    held: list[Renderer] = [pool.get(timeout=10) for _ in range(2)]
    try:
        yield
    finally:
        for renderer in held:
            pool.put(renderer)


def pushback_ms(error: grpc.RpcError) -> int:
    return int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])


def test_too_many_waiting_rows_are_refused_with_a_time_to_come_back(running, index):
    server, client = running
    batcher = server._service._desk.batcher
    request = ask_by_reference(draw(index, 20), index.digest)
    with renderers_held(server):
        waiting = [client.begin(request) for _ in range(4)]
        wait_until(lambda: batcher.pending_rows == 80)
        with pytest.raises(grpc.RpcError, match=r"80 rows are in progress, of at most 80") as error:
            client.predict(request)
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 1 <= pushback_ms(error.value) <= 10_000
        assert client.health() == health_pb2.HealthCheckResponse.SERVING
    for call in waiting:
        assert len(from_message(call.result().logits, "logits", np.float32, (20, 6))) == 20
    assert len(client.logits(request)) == 20


def test_when_every_place_is_taken_health_and_describe_still_answer(running, index):
    server, client = running
    request = ask_by_reference(draw(index, 1), index.digest)
    with renderers_held(server):
        waiting = [client.begin(request) for _ in range(admission.MAX_IN_PROGRESS)]
        wait_until(lambda: server._service._desk.batcher.pending_rows == len(waiting))
        refused = [client.begin(request) for _ in range(100)]
        for call in refused:
            assert call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert pushback_ms(call) >= 1
        began = time.monotonic()
        assert client.health("funmatch.v1.Teacher") == health_pb2.HealthCheckResponse.SERVING
        assert client.stub.Describe(pb.DescribeRequest(), timeout=5).model
        assert time.monotonic() - began < 2
    answers = {call.result().logits.data for call in waiting}
    assert len(answers) == 1


def test_requests_whose_caller_gave_up_do_not_reach_the_model(running, index, monkeypatch):
    server, client = running
    batcher = server._service._desk.batcher
    launched: list[int] = []
    run = batcher._run
    monkeypatch.setattr(
        batcher, "_run", lambda parts: (launched.extend(p.stop - p.start for p in parts), run(parts))[1]
    )
    with renderers_held(server):
        cancelled = client.begin(ask_by_reference(draw(index, 5), index.digest))
        late = client.stub.Predict.future(client.signed(ask_by_reference(draw(index, 7), index.digest)), timeout=0.3)
        wait_until(lambda: batcher.pending_rows == 12)
        cancelled.cancel()
        assert late.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(client.logits(ask_by_reference(draw(index, 3), index.digest))) == 3
    wait_until(lambda: batcher.pending_rows == 0)
    assert launched == [3]


def test_a_failing_model_fails_its_requests_and_ends_a_server_that_does_not_recover(config, index, caplog):
    with serving(config) as (server, client):
        desk = server._service._desk
        request = ask_by_reference(draw(index, 2), index.digest)
        run, desk.batcher._run = desk.batcher._run, lambda parts: 1 / 0
        for attempt in range(3):
            assert not server.ended.is_set(), f"{attempt} failures are not yet the end"
            with pytest.raises(grpc.RpcError, match=r"division by zero") as error:
                client.predict(request)
            assert error.value.code() == grpc.StatusCode.INTERNAL
            if attempt == 0:
                failing, desk.batcher._run = desk.batcher._run, run
                assert len(client.logits(request)) == 2, "one failure is forgiven"
                desk.batcher._run = failing
                with pytest.raises(grpc.RpcError):
                    client.predict(request)
        assert server.ended.wait(5)
        assert server.broken
        assert client.health() == health_pb2.HealthCheckResponse.NOT_SERVING
    assert "ZeroDivisionError" in caplog.text


def test_logits_that_do_not_fit_the_wire_are_an_error_that_names_the_row(config, index):
    with serving(config) as (server, client):
        batcher = server._service._desk.batcher
        batcher._run = lambda parts: np.float32([[1] * 6, [1] * 6, [np.inf] * 6])
        with pytest.raises(grpc.RpcError, match=r"row 2, sample.*not finite") as error:
            client.predict(ask_by_reference(draw(index, 3), index.digest))
        assert error.value.code() == grpc.StatusCode.INTERNAL


def test_draining_answers_what_is_in_progress_and_refuses_what_comes(config, index):
    server, address = create_server(config)
    server.load()
    client = Client(address)
    request = ask_by_reference(draw(index, 9), index.digest)
    statuses = client.watch_health()
    assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
    with ThreadPoolExecutor() as pool:
        with renderers_held(server):
            waiting = client.begin(request)
            wait_until(lambda: server._service._desk.batcher.pending_rows == 9)
            ending: Future[None] = pool.submit(server.drain)
            wait_until(lambda: server._service._desk is None)
            with pytest.raises(grpc.RpcError) as error:
                client.predict(request)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert not ending.done()
        assert len(from_message(waiting.result().logits, "logits", np.float32, (9, 6))) == 9
        ending.result(timeout=20)
    client.channel.close()


def test_a_network_beyond_the_gates_bounds_is_not_served(config):
    server, _ = create_server(dataclasses.replace(config, precision="bfloat16", gate_max_kl=1e-9))
    with pytest.raises(GateError, match=r"--gate-max-kl.*--precision float32"):
        server.load()
    assert not server.serving
    server.drain()


def crops(num_views: int) -> FixedViews:
    return FixedViews(law=ViewLaw(crop="ic", flip=True, mixup=False), num_views=num_views)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("ask", ["reference", "encoded"])
def test_many_views_of_a_picture_are_averaged_as_a_slow_computation_averages_them(
    client, index, tiny_model, average, ask
):
    rows = crops(20).rows(np.array([3, 11]), index.height, index.width)
    request = ask_by_reference(rows, index.digest) if ask == "reference" else ask_encoded(rows, files(index, rows))
    if ask == "encoded":
        assert len(request.encoded.image) == 2, "each picture travels once"
    ask_for_mean(request, 20, average)
    every = by_hand(index, rows, tiny_model).astype(np.float64).reshape(2, 20, 6)
    p = np.exp(every) / np.exp(every).sum(-1, keepdims=True)
    expected = every.mean(axis=1) if average == "logits" else np.log(p.mean(axis=1))
    np.testing.assert_allclose(client.logits(request), expected, atol=2e-2)


def test_an_average_equals_that_of_its_rows_asked_one_by_one(client, index):
    rows = crops(10).rows(np.array([5, 6]), index.height, index.width)
    one_by_one = [client.logits(ask_by_reference(rows.take(row, row + 1), index.digest)) for row in range(20)]
    every = np.concatenate(one_by_one).astype(np.float64).reshape(2, 10, 6)
    request = ask_by_reference(rows, index.digest)
    ask_for_mean(request, 10, "logits")
    np.testing.assert_allclose(client.logits(request), every.mean(axis=1), atol=1e-6)
    ask_for_mean(request, 10, "probabilities")
    p = np.exp(every) / np.exp(every).sum(-1, keepdims=True)
    np.testing.assert_allclose(client.logits(request), np.log(p.mean(axis=1)), atol=1e-6)


@pytest.mark.parametrize("ask", ["reference", "encoded"])
def test_a_picture_of_many_views_travels_once_and_is_decoded_once(tiny_data, tiny_model, index, ask):
    """1000 crops, as in the paper: one file in the request, one in the decoder; the reply is one row."""
    rows = crops(1000).rows(np.array([3]), index.height, index.width)
    request = ask_by_reference(rows, index.digest) if ask == "reference" else ask_encoded(rows, files(index, rows))
    ask_for_mean(request, 1000, "probabilities")
    (picture,) = files(index, rows)
    assert request.ByteSize() < 30_000 + len(picture), "30 bytes a view, and at most one file"
    config = Config(model=str(tiny_model), data=(tiny_data,), address="127.0.0.1:0", device="cpu", threads=1,
                    batch_rows=100, gate_images=8)  # fmt: skip
    with serving(config) as (_, client), files_decoded() as decoded:
        assert client.logits(request).shape == (1, 6)
    assert decoded == [picture]


def test_the_mean_of_probabilities_stays_finite_where_the_teacher_is_certain():
    certain = np.array([[400.0, -400.0, 0.0], [380.0, -420.0, 0.0]], np.float32)
    mean = service.averaged(certain, 2, "probabilities")
    assert np.isfinite(mean).all()
    np.testing.assert_allclose(mean[0, 1], -800 + np.log(1.0), rtol=1e-5)


def test_rows_that_cannot_be_averaged_are_refused(client, index):
    rows = crops(10).rows(np.array([5, 6]), index.height, index.width)
    request = ask_by_reference(rows, index.digest)
    request.mean_of = 10
    refused(client, request, "mean_of needs average")
    ask_for_mean(request, 7, "logits")
    refused(client, request, "20 rows cannot be averaged 7 at a time")
    mixed = ask_by_reference(draw(index, 20), index.digest)
    ask_for_mean(mixed, 10, "logits")
    refused(client, mixed, "row 0: a row that is averaged is not mixed")


def refused(client: Client, request: pb.PredictRequest, sentence: str) -> None:
    with pytest.raises(grpc.RpcError, match=re.escape(sentence)) as error:
        client.predict(request)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
