"""How replicas are spoken to, against gRPC servers of the test's own with keys that docker/make_keys.sh made."""

from __future__ import annotations

import contextlib
import os
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from protos import teacher_pb2_grpc as pb_grpc
from scripted_teacher import DIGEST, ScriptedTeacher, batch, expected_logits
from student_trainer.fleet import Fleet, TeacherRefusedError, TeachersGoneError
from student_trainer.fleet.addresses import Place
from student_trainer.fleet.credentials import Credentials, Token

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-of-thirty-two-characters"


class Door(grpc.ServerInterceptor):
    """Lets in who shows a token, and remembers what was shown."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.shown: list[str] = []

    def intercept_service(self, continuation, details):
        shown = dict(details.invocation_metadata).get("authorization", "")
        self.shown.append(shown)
        if shown == f"Bearer {self.token}":
            return continuation(details)
        return grpc.unary_unary_rpc_method_handler(
            lambda _request, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token, or an unknown one")
        )


@contextlib.contextmanager
def serving(
    keys: Path | None = None, *, client_ca: Path | None = None, door: Door | None = None, address: str = "127.0.0.1:0"
):
    server = grpc.server(futures.ThreadPoolExecutor(8), interceptors=[door] if door else [])
    pb_grpc.add_TeacherServicer_to_server(ScriptedTeacher(), server)
    if keys is None:
        port = server.add_insecure_port(address)
    else:
        pair = ((keys / "server.key").read_bytes(), (keys / "server.pem").read_bytes())
        roots = client_ca.read_bytes() if client_ca else None
        port = server.add_secure_port(address, grpc.ssl_server_credentials([pair], roots, client_ca is not None))
    server.start()
    try:
        yield address if address.startswith("unix:") else f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def ask(*replicas: str, look_up=None, **credentials) -> None:
    """A batch through a fleet with these credentials."""
    named = {"look_up": look_up} if look_up else {}
    with Fleet(
        replicas, data_digest=DIGEST, credentials=Credentials(**credentials), patience_s=2.0, deadline_s=5, **named
    ) as fleet:
        assert (fleet.ask(batch()).result() == expected_logits(batch())).all()


def test_tls_checks_who_the_teacher_is(keys, other_keys):
    with serving(keys) as address:
        ask(address, ca=keys / "ca.pem")
        with pytest.raises(TeachersGoneError, match=r"its certificate is not of --teacher.tls-ca"):
            ask(address, ca=other_keys / "ca.pem")


def test_a_certificate_must_have_the_name_that_was_looked_up_or_told(keys):
    with serving(keys) as address:
        port = address.rpartition(":")[2]
        looked_up = {"look_up": lambda name, port: frozenset({address})}
        ask(f"dns:///teacher:{port}", ca=keys / "ca.pem", **looked_up)
        ask(f"dns:///anything:{port}", ca=keys / "ca.pem", name="teacher", **looked_up)
        with pytest.raises(TeachersGoneError, match=r"UNAVAILABLE.*--teacher.tls-name"):
            ask(f"dns:///anything:{port}", ca=keys / "ca.pem", **looked_up)


def test_mutual_tls_shows_our_certificate(keys, other_keys):
    with serving(keys, client_ca=keys / "ca.pem") as address:
        ask(address, ca=keys / "ca.pem", cert=keys / "client.pem", key=keys / "client.key")
        with pytest.raises(TeachersGoneError, match=r"does it want a certificate of ours\? --teacher.tls-cert"):
            ask(address, ca=keys / "ca.pem")


def test_the_wrong_language_is_guessed_at(keys):
    with serving(keys) as address, pytest.raises(TeachersGoneError, match=r"does it want TLS\? --teacher.tls-ca"):
        ask(address)
    with serving() as address, pytest.raises(TeachersGoneError, match=r"it does not speak TLS"):
        ask(address, ca=keys / "ca.pem")


@pytest.mark.parametrize("how", ["tls", "loopback", "unix"])
def test_a_token_is_shown_with_every_call(keys, tmp_path, how):
    token = (keys / "token").read_text().strip()
    door = Door(token)
    address = f"unix:{tmp_path / 's'}" if how == "unix" else "127.0.0.1:0"
    tls = {"ca": keys / "ca.pem"} if how == "tls" else {}
    with serving(keys if how == "tls" else None, door=door, address=address) as address:
        ask(address, token=Token(keys / "token"), **tls)
    assert len(door.shown) > 1 and set(door.shown) == {f"Bearer {token}"}


def test_without_the_right_token_a_run_ends_at_once_and_says_which_setting(keys, tmp_path):
    (tmp_path / "wrong").write_text("another-token-that-nobody-knows\n")
    with serving(door=Door(TOKEN)) as address:
        for credentials in ({}, {"token": Token(tmp_path / "wrong")}):
            with pytest.raises(TeacherRefusedError, match=r"does not know us: UNAUTHENTICATED.*--teacher.token-file"):
                ask(address, **credentials)


def test_a_token_that_is_renewed_is_taken_up(tmp_path):
    door = Door(TOKEN)
    file = tmp_path / "token"
    file.write_text(TOKEN)
    with serving(door=door) as address:
        credentials = Credentials(token=Token(file))
        with Fleet([address], data_digest=DIGEST, credentials=credentials, patience_s=20) as fleet:
            fleet.ask(batch()).result()
            door.token = "renewed-" + TOKEN
            file.write_text(door.token + "\nan older one\n")
            os.utime(file, (1, 1))  # whatever the clock's grain
            assert (fleet.ask(batch()).result() == expected_logits(batch())).all()


def test_a_token_never_crosses_a_network_in_clear(keys):
    token = Token(keys / "token")
    with pytest.raises(ValueError, match=r"would cross the network to 10.0.0.1:5 in clear.*--teacher.tls-ca"):
        ask("10.0.0.1:5", token=token)
    with pytest.raises(TeachersGoneError, match=r"would cross the network to 10.0.0.2:5 in clear"):
        ask("dns:///teacher:5", token=token, look_up=lambda name, port: frozenset({"10.0.0.2:5"}))
    Credentials(token=token, ca=keys / "ca.pem").channel(Place("10.0.0.1:5")).close()


def test_files_that_are_not_what_they_should_be_are_named(keys, tmp_path):
    no_pem = tmp_path / "x.pem"
    no_pem.write_text("hello")
    with pytest.raises(ValueError, match=r"cannot read .*absent.pem \(--teacher.tls-ca\): No such file"):
        Credentials(ca=tmp_path / "absent.pem")
    with pytest.raises(ValueError, match=r"x.pem \(--teacher.tls-ca\) is no PEM file"):
        Credentials(ca=no_pem)
    with pytest.raises(ValueError, match="give both, or neither"):
        Credentials(ca=keys / "ca.pem", cert=keys / "client.pem")
    with pytest.raises(ValueError, match=r"--teacher.tls-cert needs --teacher.tls-ca"):
        Credentials(cert=keys / "client.pem", key=keys / "client.key")
    with pytest.raises(ValueError, match=r"cannot read .*absent \(--teacher.token-file\)"):
        Token(tmp_path / "absent")
    no_pem.write_text("\n \n")
    with pytest.raises(ValueError, match=r"holds no token"):
        Token(no_pem)
