"""More than a teacher can do: who gets what, what is dropped unread and unrendered, and how much memory it costs."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from conftest import plain_rows, wait_until
from data_prep.index import Index
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import to_message
from teacher_server import admission
from teacher_server.config import Config
from teacher_server.server import Server, create_server
from teacher_server.shares import Shares
from views.wire import ask_by_reference

ROOT = Path(__file__).resolve().parents[1]
PREDICT = "/funmatch.v1.Teacher/Predict"
OK, BUSY, INVALID = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def server(tiny_model: Path, tiny_data: Path) -> Iterator[Server]:
    server, _ = create_server(
        Config(model=str(tiny_model), data=(tiny_data,), address="127.0.0.1:0", device="cpu", threads=1,
               batch_rows=8, max_rows=64, max_pending_rows=512, gate_images=4, drain_s=5)
    )  # fmt: skip
    server.load()
    yield server
    server.drain()


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def ask(server: Server, tiny_data: Path) -> Callable[..., pb.PredictRequest]:
    index = Index.open(tiny_data)

    def make(num_rows: int, client: str = "", request_id: str = "") -> pb.PredictRequest:
        request = ask_by_reference(plain_rows(num_rows, side=30), index.digest)
        request.fingerprint = server._desk.description.fingerprint
        request.client, request.request_id = client, request_id
        return request

    return make


def pushback_ms(error: grpc.RpcError) -> int:
    return int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])


# --- before the message ---------------------------------------------------------------------------------------------


def never() -> Iterator[bytes]:
    """A message that does not come."""
    threading.Event().wait(20)
    yield b""


def test_a_call_that_cannot_be_let_in_is_refused_before_its_message_is_read(server, channel):
    with contextlib.ExitStack() as seats:
        for _ in range(admission.MAX_SEATS):
            seats.enter_context(server._admission.seat())
        began = time.monotonic()
        with pytest.raises(grpc.RpcError, match="calls are in progress already") as error:
            channel.stream_unary(PREDICT)(never(), timeout=10)
        assert time.monotonic() - began < 5
    assert error.value.code() == BUSY
    assert pushback_ms(error.value) >= 1


def test_callers_that_never_send_their_message_lose_their_seats(server, channel, ask, monkeypatch):
    calls = [channel.stream_unary(PREDICT).future(never(), timeout=20) for _ in range(admission.MAX_SEATS)]
    stub = pb_grpc.TeacherStub(channel)
    assert stub.Describe(pb.DescribeRequest(), timeout=1).model, "and meanwhile nobody else waits for them"
    wait_until(lambda: len(server._admission._arriving) == admission.MAX_READING)
    monkeypatch.setattr(admission, "_ARRIVAL_S", 0.2)
    for call in calls:
        assert call.code() == grpc.StatusCode.CANCELLED
    assert stub.Predict(ask(3), timeout=20).logits.shape[0] == 3


@pytest.mark.parametrize(
    ("message", "sentence"),
    [(b"\xff" * 50, "this is no PredictRequest"), (b"", "the request is for teacher"), (None, "without a request")],
)
def test_what_is_no_request_is_refused_in_a_sentence(channel, message, sentence):
    with pytest.raises(grpc.RpcError, match=sentence) as error:
        channel.stream_unary(PREDICT)(iter([] if message is None else [message]), timeout=10)
    assert error.value.code() == (INVALID if message != b"" else grpc.StatusCode.FAILED_PRECONDITION)


def test_a_name_longer_than_the_wire_says_is_refused(channel, ask):
    stub = pb_grpc.TeacherStub(channel)
    assert stub.Predict(ask(1, "ü" * 32), timeout=10)
    with pytest.raises(grpc.RpcError, match="client has 66 bytes, at most 64") as error:
        stub.Predict(ask(1, "ü" * 33), timeout=10)
    assert error.value.code() == INVALID


def test_messages_that_are_too_large_together_are_refused_with_a_time_to_come_back(server, channel, ask):
    request = ask(8)
    size = request.ByteSize()
    server._admission._bytes = Shares("bytes of messages", 2 * size)
    stub = pb_grpc.TeacherStub(channel)
    held = threading.Event()
    run = server._desk.batcher._run
    server._desk.batcher._run = lambda parts: held.wait(20) and run(parts)
    first = [stub.Predict.future(request, timeout=20) for _ in range(2)]
    wait_until(lambda: server._admission._bytes.total == 2 * size)
    with pytest.raises(grpc.RpcError, match=f"{2 * size} bytes of messages are in progress") as error:
        stub.Predict(request, timeout=10)
    assert error.value.code() == BUSY
    assert pushback_ms(error.value) >= 1
    held.set()
    assert [call.code() for call in first] == [OK, OK]
    assert server._admission._bytes.total == server._admission._requests.total == 0


# --- dropped at every stage -----------------------------------------------------------------------------------------


def test_what_nobody_waits_for_is_neither_rendered_nor_run(server, channel, ask, monkeypatch):
    """Cancelled, or past its deadline: while waiting for a turn, while rendered, while waiting for the model."""
    desk = server._desk
    stub = pb_grpc.TeacherStub(channel)
    rendered, launched = [], []
    render, run = desk.pictures._render, desk.batcher._run
    rendering, model = threading.Semaphore(0), threading.Semaphore(0)

    def counted_render(question, part, index):
        rendered.append(len(question.lam))
        rendering.acquire(timeout=20)
        return render(question, part, index)

    def counted_run(parts):
        launched.extend(part.stop - part.start for part in parts)
        model.acquire(timeout=20)
        return run(parts)

    monkeypatch.setattr(desk.pictures, "_render", counted_render)
    desk.batcher._run = counted_run

    in_model = stub.Predict.future(ask(1), timeout=20)
    rendering.release()
    wait_until(lambda: launched == [1])
    in_queue = stub.Predict.future(ask(2), timeout=20)
    rendering.release()
    wait_until(lambda: len(desk.batcher._queue) == 1)
    in_rendering = [stub.Predict.future(ask(num), timeout=20) for num in (3, 4, 5)]
    late_in_rendering = stub.Predict.future(ask(6), timeout=1.0)
    wait_until(lambda: len(rendered) == 6)
    in_line = [stub.Predict.future(ask(7), timeout=20) for _ in range(3)]
    late_in_line = stub.Predict.future(ask(8), timeout=1.0)
    wait_until(lambda: len(desk.turns._waiting) == 4)
    for call in (in_queue, *in_rendering, *in_line):
        call.cancel()
    assert late_in_rendering.code() == late_in_line.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    time.sleep(0.2)  # a cancelled call is news to the server a moment later
    rendering.release(100)
    model.release(100)
    assert in_model.code() == OK
    wait_until(lambda: desk.batcher.pending_rows == 0)
    assert len(stub.Predict(ask(9), timeout=20).logits.data) > 0
    assert sorted(rendered) == [1, 2, 3, 4, 5, 6, 9], "who waited for a turn was not rendered"
    assert sum(launched) == 1 + 9, "who was rendered in vain was not run"


# --- shares ---------------------------------------------------------------------------------------------------------


class Flood:
    """A client that asks with so many requests under way, and comes back when it is told to."""

    def __init__(self, stub: pb_grpc.TeacherStub, request: pb.PredictRequest, window: int) -> None:
        self.rows, self.codes = 0, set()
        self.seconds: list[float] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(stub, request)) for _ in range(window)]
        for thread in self._threads:
            thread.start()

    def _run(self, stub: pb_grpc.TeacherStub, request: pb.PredictRequest) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                stub.Predict(request, timeout=30)
            except grpc.RpcError as error:
                self.codes.add(error.code())
                self._over.wait(pushback_ms(error) / 1000)
            else:
                self.rows += request.lam.shape[0]
                self.seconds.append(time.monotonic() - began)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def slow_down(server: Server, seconds_per_batch: float) -> None:
    answers = np.zeros((8, 6), np.float32)

    def run(parts):
        time.sleep(seconds_per_batch)
        return answers[: sum(part.stop - part.start for part in parts)]

    server._desk.batcher._run = run


def test_three_clients_get_equal_shares_however_many_requests_they_keep_under_way(server, channel, ask):
    slow_down(server, 0.02)
    stub = pb_grpc.TeacherStub(channel)
    floods = [Flood(stub, ask(rows, name), window) for name, rows, window in
              (("few", 16, 3), ("many", 16, 20), ("large", 64, 6))]  # fmt: skip
    time.sleep(1.0)
    before = [flood.rows for flood in floods]
    time.sleep(4.0)
    rows = np.array([flood.rows for flood in floods]) - before
    for flood in floods:
        flood.stop()
    share = rows / rows.sum()
    assert share.min() > 0.25, dict(zip(("few", "many", "large"), rows, strict=True))
    assert share.max() < 0.42, dict(zip(("few", "many", "large"), rows, strict=True))
    assert set.union(*(flood.codes for flood in floods)) <= {BUSY}


def test_one_small_request_does_not_wait_behind_anothers_queue(server, channel, ask):
    slow_down(server, 0.02)
    stub = pb_grpc.TeacherStub(channel)
    flood = Flood(stub, ask(64, "flood"), 20)  # 512 rows in progress: 64 batches, 1.3 s
    time.sleep(1.0)
    waits = []
    for number in range(10):
        began = time.monotonic()
        for _ in itertools.count():
            try:
                stub.Predict(ask(2, "small", f"s{number}"), timeout=20)
            except grpc.RpcError as error:
                time.sleep(pushback_ms(error) / 1000)
            else:
                break
        waits.append(time.monotonic() - began)
    flood.stop()
    # The first may have to wait until a place is free. Later ones, too, if the flood has taken its place meanwhile.
    assert np.median(waits) < 0.5, waits
    assert np.median(flood.seconds) > 1


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_mib(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def test_a_flood_of_large_messages_costs_no_more_memory_than_is_stated(tiny_model, tmp_path):
    """40 callers send messages of 20 MB at once, again and again, that are refused only when they have been read."""
    address_file = tmp_path / "address"
    command = [
        sys.executable, "-m", "teacher_server.main", f"--model={tiny_model}", "--address=127.0.0.1:0", "--device=cpu",
        "--threads=1", "--batch-rows=4", "--gate-images=4", f"--address-file={address_file}",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_for = time.monotonic() + 120
        while not address_file.exists():
            assert process.poll() is None and time.monotonic() < wait_for
            time.sleep(0.05)
        before = peak_mib(process.pid)
        picture = bytes(10**7)
        request = pb.PredictRequest(
            encoded=pb.EncodedImages(image=[picture, picture]),
            views=pb.Views(
                image=to_message(np.int32([0, 1])),
                box=to_message(np.tile(np.int32([0, 0, 9, 9]), (2, 1))),
                flip=to_message(np.zeros(2, np.uint8)),
            ),
            partner=to_message(np.int32([0, 1])),
            lam=to_message(np.ones(2, np.float32)),
        )
        address = address_file.read_text().strip()
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.TeacherStub(channel)
            request.fingerprint = stub.Describe(pb.DescribeRequest(), timeout=10).fingerprint
            message = request.SerializeToString()

            def one(_: int) -> grpc.StatusCode:
                try:
                    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as own:
                        own.unary_unary(PREDICT)(message, timeout=60)
                except grpc.RpcError as error:
                    return error.code()
                return OK

            with ThreadPoolExecutor(40) as pool:
                codes = set(pool.map(one, range(120)))
        mib = len(message) / 2**20
        cost = peak_mib(process.pid) - before
        assert codes <= {INVALID, BUSY}, codes
        stated = 3 * admission.MAX_READING * mib + 2 * admission.MAX_IN_PROGRESS * mib + 40 * 4
        assert cost < stated, f"{cost:.0f} MiB of {stated:.0f}"
    finally:
        process.kill()
        process.wait()
