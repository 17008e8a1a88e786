"""Servers that answer without looking, each in a process of its own, for benchmarks of what is around a teacher.

    bare      gRPC alone: a handler that gives back the same bytes, whatever it gets
    pause     right-shaped logits after so many seconds, using no core meanwhile: a teacher on another machine

`python -m benchmarks.echo KIND ...` prints its address and ends with standard input; `serving` is the door for
benchmarks. The real service without pictures and network is in benchmarks/blank.py, teachers with a rate and a queue
are in benchmarks/fleet.py. Rejected: servers inside of the benchmark's process, which would share one interpreter lock
with the client that is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from protos.arrays import to_message

_ROOT = Path(__file__).resolve().parents[1]

DIGEST, FINGERPRINT = "d" * 64, "f" * 64
"""As long as real ones."""
NUM_SAMPLES, NUM_CLASSES, SIZE = 1_281_167, 1000, 224
"""ImageNet's."""
HEIGHT, WIDTH = 375, 500
"""Pixels of its every picture here."""
BARE_METHOD = "/echo/Echo"

_THREADS = 40  # of the bare server: as many as a teacher has
_CLIENT_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@contextlib.contextmanager
def serving(*command: str) -> Iterator[str]:
    """The address of a server: `echo bare ...`, `echo pause ...`, `blank`."""
    command = (sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:])
    with subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the server did not start: {' '.join(command)}")
        yield address
        process.stdin.close()


def bare_channel(address: str) -> grpc.Channel:
    """A connection to a bare server."""
    return grpc.insecure_channel(address, options=[*_CLIENT_OPTIONS, ("grpc.enable_http_proxy", 0)])


def description(num_classes: int = NUM_CLASSES) -> pb.Description:
    """What these teachers say they are."""
    return pb.Description(
        fingerprint=FINGERPRINT, model="echo", num_classes=num_classes, precision="float16", max_rows=1024,
        renders=True, rendering=pb.Rendering(size=SIZE, interpolation="linear", version="none", decoder="cpu"),
        data_sets=[pb.DataSet(name="blank", digest=DIGEST, num_samples=NUM_SAMPLES)],
    )  # fmt: skip


def some_logits(num_rows: int, num_classes: int) -> NDArray[np.float32]:
    """Numbers such as logits are; the same row by row, whoever asks."""
    return np.random.default_rng(8).normal(0, 3, (num_rows, num_classes)).astype(np.float32)


class _Pause(pb_grpc.TeacherServicer):
    """Answers everything after the same time."""

    def __init__(self, seconds: float, num_classes: int) -> None:
        self._seconds = seconds
        self._description = description(num_classes)
        self._logits = some_logits(1024, num_classes).astype(np.float16)
        self._messages: dict[int, pb.Array] = {}
        self._lock = threading.Lock()

    def Describe(self, _request: pb.DescribeRequest, _context: grpc.ServicerContext) -> pb.Description:
        return self._description

    def Predict(self, request: pb.PredictRequest, _context: grpc.ServicerContext) -> pb.PredictReply:
        until = time.monotonic() + self._seconds
        rows = request.partner.shape[0]
        with self._lock:
            logits = self._messages.setdefault(rows, to_message(self._logits[:rows]))
        time.sleep(max(0.0, until - time.monotonic()))
        return pb.PredictReply(request_id=request.request_id, fingerprint=FINGERPRINT, logits=logits)


def _serve_bare(num_bytes: int) -> str:
    answer = bytes(num_bytes)
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
        lambda _request, _context: answer
    )
    service, method = BARE_METHOD[1:].split("/")
    server = _server()
    server.add_registered_method_handlers(service, {method: handler})
    return _start(server)


def _serve_pause(seconds: float, num_classes: int) -> str:
    server = _server()
    pb_grpc.add_TeacherServicer_to_server(_Pause(seconds, num_classes), server)  # type: ignore[no-untyped-call]
    return _start(server)


_running: list[grpc.Server] = []  # a server that nobody holds is ended by its finaliser


def _server() -> grpc.Server:
    return grpc.server(ThreadPoolExecutor(_THREADS), options=[("grpc.so_reuseport", 0), *_CLIENT_OPTIONS])


def _start(server: grpc.Server) -> str:
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    _running.append(server)
    return f"127.0.0.1:{port}"


def main() -> None:
    """Serve, print the address, and end with standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("bare").add_argument("num_bytes", type=int)
    pause = kinds.add_parser("pause")
    pause.add_argument("seconds", type=float)
    pause.add_argument("num_classes", type=int)
    asked = parser.parse_args()
    bare = asked.kind == "bare"
    print(_serve_bare(asked.num_bytes) if bare else _serve_pause(asked.seconds, asked.num_classes), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
