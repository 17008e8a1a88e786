"""Thousands of damaged Predict messages against a real server process: it answers every one with a documented status,
lives on, answers the next honest request bit for bit as before, and does not grow.

Messages are damaged as bytes (flipped, cut, repeated) and as fields (shapes that overflow, other dtypes, numbers at the
ends of their range, pictures that lie). hypothesis draws the damage, from fixed seeds.
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import peak_mb
from data_prep.index import Index
from make_pictures import awkward_pictures, broken_pictures, encode, jpeg, smooth
from one_teacher import draw as draw_rows
from one_teacher import files, rendered
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import to_message
from protos.outline import check_outline
from test_picture_limits import SIDE, ihdr, png, with_scans, with_size
from views.wire import ask_by_reference, ask_encoded, ask_for_mean, ask_pixels

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = {"OK", "INVALID_ARGUMENT", "OUT_OF_RANGE", "FAILED_PRECONDITION"}  # of those, what a lone client can get
PATH = "/funmatch.v1.Teacher/Predict"
ROUND = 500  # examples of one run of hypothesis, which remembers all that it drew

ENDS = [0, 1, 2, 7, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS = {
    pb.Array.UINT8: [0, 1, 2, 255],
    pb.Array.INT32: [-(2**31), -1, 0, 1, 5, 6, 12, 2**31 - 1],
    pb.Array.INT64: [-(2**63), -1, 0, 1, 23, 24, 2**31, 2**32, 2**63 - 1],
    pb.Array.FLOAT16: [0.0, 1.0, np.nan, np.inf],
    pb.Array.FLOAT32: [-0.0, 1.0, 0.5, np.nan, np.inf, -np.inf, 1e-45, 1.0000001, -1e-45],
}
DTYPES = {1: np.uint8, 2: np.int32, 3: np.int64, 4: np.float16, 5: np.float32}
WORDS = ["", "x", "x" * 64, "x" * 65, "x" * 100_000, "\0", "\n\r{}%s", "\N{SNOWMAN}" * 40, "../../etc/passwd"]

Draw = Callable[[st.SearchStrategy[Any]], Any]


def one_of(draw: Draw, values: list[Any]) -> Any:
    return values[draw(st.integers(0, len(values) - 1))]


def place_in(draw: Draw, message: bytes) -> int:
    return draw(st.integers(0, max(0, len(message) - 1)))


# --- damage to bytes


def flip_bit(draw: Draw, message: bytes) -> bytes:
    if not message:
        return b"\x08"
    place = place_in(draw, message)
    return message[:place] + bytes([message[place] ^ 1 << draw(st.integers(0, 7))]) + message[place + 1 :]


def set_byte(draw: Draw, message: bytes) -> bytes:
    place = place_in(draw, message)
    return message[:place] + bytes([draw(st.integers(0, 255))]) + message[place + 1 :]


def cut(draw: Draw, message: bytes) -> bytes:
    place = place_in(draw, message)
    return message[:place] + message[place + one_of(draw, [1, 2, 5, 50, 10**9]) :]


def insert(draw: Draw, message: bytes) -> bytes:
    place = place_in(draw, message)
    return message[:place] + draw(st.binary(min_size=1, max_size=20)) + message[place:]


def repeat(draw: Draw, message: bytes) -> bytes:
    place = place_in(draw, message)
    return message[: place + one_of(draw, [1, 4, 40, 400])] + message[place:]


def add_unknown(draw: Draw, message: bytes) -> bytes:
    nested = b"\x7a\x00"  # field 15, a message
    for _ in range(one_of(draw, [1, 20])):
        nested = b"\x7a" + bytes([len(nested) & 0x7F]) + nested[:127]
    return message + one_of(draw, [nested, b"\xf8\x07\x01" * 50, b"\xfb\x07\xfc\x07", b"\x0b" * 200, b"\xff" * 12])


# --- damage to fields


def some_array(draw: Draw, request: pb.PredictRequest) -> pb.Array:
    """One of those that belong there, mostly; choosing another puts it there."""
    everywhere = [lambda: request.lam, lambda: request.partner, lambda: request.audit, lambda: request.views.image,
                  lambda: request.views.box, lambda: request.views.flip]  # fmt: skip
    of = {"references": lambda: request.references.sample, "encoded": lambda: request.encoded.sample,
          "pixels": lambda: request.pixels}  # fmt: skip
    name = request.WhichOneof("pictures")
    own = [of[name]] if name else []
    array: pb.Array = one_of(draw, [*everywhere, *everywhere, *own, *own, *of.values()])()
    return array


def change_shape(draw: Draw, request: pb.PredictRequest) -> None:
    array = some_array(draw, request)
    shape = list(array.shape)
    match draw(st.integers(0, 4)):
        case 0:
            shape = [one_of(draw, ENDS) for _ in range(draw(st.integers(0, 5)))]
        case 1 if shape:
            shape[draw(st.integers(0, len(shape) - 1))] = one_of(draw, ENDS)
        case 2:
            shape = [*shape, one_of(draw, [0, 1, 2**32 - 1])]
        case 3:
            shape, array.data = [2**32 - 1, 2**32 - 1, 2, 2], b""  # overflows 64 bits
        case 4:
            shape, array.data = one_of(draw, [([0], b""), ([0, 0], b""), ([1] * 900, b"\0"), ([2**31, 2**31], b"")])
    array.shape[:] = shape


def change_dtype(draw: Draw, request: pb.PredictRequest) -> None:
    some_array(draw, request).dtype = one_of(draw, [0, 1, 2, 3, 4, 5, 6, 77, -1, 2**31 - 1])


def change_number(draw: Draw, request: pb.PredictRequest) -> None:
    array = some_array(draw, request)
    if array.dtype not in DTYPES or not array.data:
        array.CopyFrom(to_message(np.array([one_of(draw, NUMBERS[pb.Array.INT32])], np.int32)))
        return
    item = np.dtype(DTYPES[array.dtype]).itemsize
    numbers = np.frombuffer(array.data[: len(array.data) // item * item], DTYPES[array.dtype]).copy()
    if len(numbers):
        numbers[draw(st.integers(0, len(numbers) - 1))] = one_of(draw, NUMBERS[array.dtype])
    array.data = numbers.tobytes()


def change_data(draw: Draw, request: pb.PredictRequest) -> None:
    array = some_array(draw, request)
    array.data = one_of(draw, [b"", array.data[:-1], array.data + b"\0", array.data * 2, bytes(len(array.data))])


def change_setting(draw: Draw, request: pb.PredictRequest) -> None:
    match draw(st.integers(0, 7)):
        case 0:
            request.mean_of = one_of(draw, ENDS)
        case 1:
            request.average = one_of(draw, [0, 1, 2, 3, 77, -1])
        case 2:
            request.fingerprint = one_of(draw, WORDS)
        case 3:
            request.request_id = one_of(draw, WORDS)
        case 4:
            request.client = one_of(draw, WORDS)
        case 5:
            request.audit_pixels = not request.audit_pixels
        case 6:
            request.references.digest = one_of(draw, WORDS)
        case 7:
            request.audit.CopyFrom(to_message(np.array([one_of(draw, [-1, 0, 5, 6, 2**31 - 1])] * 3, np.int32)))


def clear(draw: Draw, request: pb.PredictRequest) -> None:
    request.ClearField(one_of(draw, ["lam", "partner", "views", "pixels", "references", "encoded", "audit", "average"]))


def change_picture(draw: Draw, request: pb.PredictRequest) -> None:
    if request.WhichOneof("pictures") != "encoded" or not request.encoded.image:
        request.encoded.image.append(one_of(draw, PICTURES))
        return
    images = request.encoded.image
    which = draw(st.integers(0, len(images) - 1))
    match draw(st.integers(0, 3)):
        case 0:
            images[which] = one_of(draw, PICTURES)
        case 1:
            images[which] = flip_bit(draw, images[which])
        case 2:
            images[which] = cut(draw, images[which])
        case 3:
            images[which] = repeat(draw, images[which])


def some_files() -> list[bytes]:
    image = Image.fromarray(smooth(1, 30, 40))
    return [
        *awkward_pictures().values(), *broken_pictures().values(), encode(image, "PNG"), encode(image, "WEBP"),
        jpeg(3, progressive=True), with_size(jpeg(1), 50, 60), with_size(jpeg(1), SIDE, SIDE), png(SIDE, 8),
        with_scans(jpeg(2, progressive=True), 150), png(20, 20, ihdr(9, 9)), with_size(jpeg(1), 65535, 1),
    ]  # fmt: skip


PICTURES = some_files()
OF_BYTES = [flip_bit, set_byte, cut, insert, repeat, add_unknown]
OF_FIELDS = [change_shape, change_dtype, change_number, change_number, change_data, change_setting, clear,
             change_picture, change_picture]  # fmt: skip


class Message(bytes):
    """Bytes that hypothesis does not print in full."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes"


@st.composite
def damaged(draw: Draw, honest: list[bytes]) -> Message:
    """An honest message after one to three kinds of damage."""
    message = one_of(draw, honest)
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 2)):
            request = pb.PredictRequest()
            try:
                request.ParseFromString(message)
            except DecodeError:  # it was damaged before: damage the bytes again
                message = flip_bit(draw, message)
                continue
            one_of(draw, OF_FIELDS)(draw, request)
            message = request.SerializeToString()
        else:
            message = one_of(draw, OF_BYTES)(draw, message)
    return Message(message)


# --- the server


@dataclass
class Target:
    """A server process, and messages that it answers."""

    process: subprocess.Popen
    channel: grpc.Channel
    honest: list[bytes]
    log: Path
    codes: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._predict = self.channel.unary_unary(PATH)  # bytes in, bytes out
        self.answers = [self._predict(message, timeout=60) for message in self.honest]

    def send(self, message: bytes) -> None:
        """Send one, and check what comes back."""
        try:
            reply = pb.PredictReply.FromString(self._predict(message, timeout=60))
        except grpc.RpcError as error:
            code, sentence = error.code().name, error.details()
        else:
            code, sentence = "OK", check_answer(pb.PredictRequest.FromString(message), reply)
        self.codes[code] += 1
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        if code not in DOCUMENTED or not sentence:
            (self.log.parent / "message").write_bytes(message)
            pytest.fail(f"{code}: {sentence!r} to the bytes in {self.log.parent / 'message'}")

    def is_well(self) -> None:
        """Honest messages are answered as on the first day."""
        assert [self._predict(message, timeout=60) for message in self.honest] == self.answers

    def memory_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 2**20


def check_answer(request: pb.PredictRequest, reply: pb.PredictReply) -> str:
    """An answer is one to this request, whatever was damaged in it."""
    assert reply.request_id == request.request_id and reply.fingerprint == request.fingerprint
    rows = request.lam.shape[0] // max(1, request.mean_of)
    assert list(reply.logits.shape) == [rows, 6]
    assert np.isfinite(np.frombuffer(reply.logits.data, np.float32)).all()
    return "answered"


@pytest.fixture(scope="module")
def target(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-m", "teacher_server.main", f"--model={tiny_model}", "--data", str(tiny_data),
               "--address=127.0.0.1:0", "--device=cpu", "--threads=2", "--batch-rows=8", "--max-rows=40",
               "--gate-images=4", f"--address-file={folder / 'address'}"]  # fmt: skip
    log = folder / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink)
    deadline = time.monotonic() + 120
    while not (folder / "address").exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    with grpc.insecure_channel((folder / "address").read_text().strip()) as channel:
        description = pb_grpc.TeacherStub(channel).Describe(pb.DescribeRequest(), timeout=60)
        yield Target(process, channel, honest_messages(Index.open(tiny_data), description), log)
    process.kill()
    process.wait()


def honest_messages(index: Index, description: pb.Description) -> list[bytes]:
    """Of all three transports; with means, audits, and pictures of all formats."""
    rows = draw_rows(index, 6)
    means = draw_rows(index, 6)
    means = type(means)(sample=means.sample, box=means.box, flip=means.flip, partner=np.arange(6, dtype=np.int32),
                        lam=np.ones(6, np.float32))  # fmt: skip
    averaged = ask_by_reference(means, index.digest)
    ask_for_mean(averaged, 3, "probabilities")
    audited = ask_encoded(rows, files(index, rows))
    audited.audit.CopyFrom(to_message(np.array([0, 5], np.int32)))
    audited.audit_pixels = True
    as_png = ask_encoded(rows, [in_format(file, "PNG") for file in files(index, rows)])
    as_webp = ask_encoded(rows, [in_format(file, "WEBP", lossless=True) for file in files(index, rows)])
    requests = [ask_by_reference(rows, index.digest), averaged, audited, as_png, as_webp,
                ask_pixels(rows, rendered(index, rows))]  # fmt: skip
    for number, request in enumerate(requests):
        request.request_id, request.client, request.fingerprint = f"r{number}", "fuzz", description.fingerprint
    return [request.SerializeToString() for request in requests]


def in_format(file: bytes, kind: str, **options: object) -> bytes:
    return encode(Image.open(io.BytesIO(file)), kind, **options)


def attack(target: Target, num: int, first_seed: int = 0) -> None:
    """Send so many damaged messages, in rounds; honest ones after each round."""
    for round_ in range(num // ROUND):

        @seed(first_seed + round_)
        @settings(max_examples=ROUND, database=None, deadline=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(damaged(target.honest))
        def send(message: bytes) -> None:
            target.send(bytes(message))

        send()
        target.is_well()


def test_damaged_messages_get_documented_answers_and_the_server_is_well(target):
    attack(target, 2000)
    assert set(target.codes) == DOCUMENTED, target.codes  # each was reached


def packed(tag: int, body: bytes) -> bytes:
    """A field of bytes: its tag, its length, its contents."""
    length, number = b"", len(body)
    while number > 127:
        length, number = length + bytes([number & 127 | 128]), number >> 7
    return bytes([tag]) + length + bytes([number]) + body


MANY = 2**24
SWOLLEN = {
    "empty pictures": packed(0x22, b"\x0a\x00" * MANY),
    "dimensions": packed(0x3A, packed(0x12, bytes(MANY))),
    "dimensions one by one": packed(0x3A, b"\x10\x00" * MANY),
    "unknown fields": b"\xf8\x07\x00" * MANY,
    "a field again and again": packed(0x3A, b"") * MANY,
    "messages in messages": packed(0x32, packed(0x12, b"") * MANY),
}


@pytest.mark.parametrize("name", SWOLLEN)
def test_a_message_of_many_small_parts_is_refused_unparsed(target, name):
    Path(f"/proc/{target.process.pid}/clear_refs").write_text("5")
    before = peak_mb(target.process.pid)
    with pytest.raises(grpc.RpcError, match="no PredictRequest: it has more than 1080 parts") as error:
        target.channel.unary_unary(PATH)(SWOLLEN[name], timeout=60)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    sent = len(SWOLLEN[name]) / 2**20
    assert peak_mb(target.process.pid) - before < 3 * sent + 20, "MB; parsing costs up to sixteen times what is sent"
    target.is_well()


def test_an_audit_of_more_views_than_there_are_is_refused(target):
    """Four bytes sent for each would be a whole view in memory: 3 GB for these."""
    request = pb.PredictRequest.FromString(target.honest[2])
    request.audit.CopyFrom(to_message(np.zeros(2**20, np.int32)))
    with pytest.raises(grpc.RpcError, match="audit names 1048576 views of 6") as error:
        target.channel.unary_unary(PATH)(request.SerializeToString(), timeout=60)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_refusal_does_not_repeat_what_would_not_fit_an_answer(target):
    """A status travels in a header, which gRPC bounds: beyond, the caller sees another status."""
    for damage in (packed(0x3A, b"\x10\xff\xff\xff\xff\x0f" * 900), packed(0x0A, b"x" * 10**6)):
        with pytest.raises(grpc.RpcError) as error:
            target.channel.unary_unary(PATH)(b"\x12\x01x" + target.honest[0] + damage, timeout=60)
            pytest.fail("answered")
        assert error.value.code().name in DOCUMENTED and len(error.value.details()) < 1000


def test_an_honest_message_has_the_outline_of_one_and_a_cut_one_has_not(target):
    for message in target.honest:
        check_outline(message, pb.PredictRequest, 200)
        with pytest.raises(ValueError, match="more than 20 parts"):
            check_outline(message, pb.PredictRequest, 20)
        with pytest.raises(ValueError, match="ends too early"):
            check_outline(message[:-1], pb.PredictRequest, 200)


@pytest.mark.suite
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_damaged_messages_leave_no_trace(target):
    attack(target, 20_000, first_seed=1000)
    memory_mb = target.memory_mb()
    attack(target, 80_000, first_seed=2000)
    print(target.codes, f"{memory_mb:.0f} MB -> {target.memory_mb():.0f} MB")
    assert target.memory_mb() < 1.05 * memory_mb
