"""`python -m teacher_server.probe` asks a real health service, in clear, over TLS and with a certificate of its own."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from teacher_server.probe import SERVES, SERVES_NOT, SILENT, WRONG, main

ROOT = Path(__file__).resolve().parents[1]
STATUS = health_pb2.HealthCheckResponse


@contextmanager
def answering(status: int, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """A server whose health says `status`; yields its address."""
    servicer = health.HealthServicer()
    servicer.set("", status)
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def tls(keys: Path, ask_for_certificate: bool) -> grpc.ServerCredentials:
    pair = (keys / "server.key").read_bytes(), (keys / "server.pem").read_bytes()
    ca = (keys / "ca.pem").read_bytes() if ask_for_certificate else None
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ask_for_certificate)


@pytest.mark.parametrize(
    ("status", "flags", "code"),
    [
        (STATUS.SERVING, [], SERVES),
        (STATUS.NOT_SERVING, [], SERVES_NOT),
        (STATUS.NOT_SERVING, ["--alive"], SERVES),
        (STATUS.SERVING, ["--service=funmatch.v1.Student"], SERVES_NOT),
    ],
)
def test_the_exit_code_is_the_answer(status, flags, code):
    with answering(status) as address:
        assert main(["--address", address, *flags]) == code


def test_where_nobody_answers_it_says_so_even_to_a_question_for_life():
    with answering(STATUS.SERVING) as address:
        pass
    assert main(["--address", address, "--alive"]) == SILENT


def test_one_that_hangs_is_given_up_in_time():
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)  # its only thread is taken
        free = pool.submit(time.sleep, 1.5)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        began = time.monotonic()
        assert main(["--address", f"127.0.0.1:{port}", "--timeout-s=0.3"]) == SILENT
        assert time.monotonic() - began < 1.2
        free.result()
        server.stop(None).wait()


def test_tls_is_checked_against_our_own_authority(keys, other_keys):
    with answering(STATUS.SERVING, tls(keys, ask_for_certificate=False)) as address:
        ask = ["--address", address]
        ca = f"--tls-ca={keys / 'ca.pem'}"
        assert main([*ask, ca]) == SERVES
        assert main([*ask, ca, "--tls-name=teacher"]) == SERVES
        assert main([*ask, ca, "--tls-name=somebody.else"]) == SILENT
        assert main(ask) == SILENT, "in clear"
        assert main([*ask, f"--tls-ca={other_keys / 'ca.pem'}"]) == SILENT, "another authority"


def test_a_server_that_wants_a_certificate_gets_it(keys):
    with answering(STATUS.SERVING, tls(keys, ask_for_certificate=True)) as address:
        ask = ["--address", address, f"--tls-ca={keys / 'ca.pem'}"]
        assert main([*ask, f"--tls-cert={keys / 'client.pem'}", f"--tls-key={keys / 'client.key'}"]) == SERVES
        assert main(ask) == SILENT


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tls-ca=/does/not/exist.pem"], "No such file"),
        (["--tls-name=teacher"], "need --tls-ca"),
        (["--tls-cert=a.pem"], "belong together"),
    ],
)
def test_wrong_flags_and_files_have_a_code_of_their_own(flags, sentence, capsys):
    assert main(flags) == WRONG
    assert sentence in capsys.readouterr().err


def test_it_imports_nothing_heavy():
    code = "import sys, teacher_server.probe; print(sorted({'torch', 'numpy', 'nvidia', 'tyro'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
