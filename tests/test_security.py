"""Who may come in, and by which keys: real servers, keys made by docker/make_keys.sh.

Most of the servers here have not loaded a model: whoever is let in hears UNAVAILABLE, whoever is not, something else.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from conftest import make_keys, peak_mb
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from student_trainer.fleet.addresses import Place
from student_trainer.fleet.credentials import Credentials, Token
from teacher_server.config import Config
from teacher_server.server import create_server

ROOT = Path(__file__).resolve().parents[1]
TOKEN, OTHER_TOKEN = "a-token-of-the-tests", "another-token-of-theirs"
LOADING = grpc.StatusCode.UNAVAILABLE, "the teacher is still loading"
CLOSED = grpc.StatusCode.UNAVAILABLE, ""  # no connection at all; gRPC's sentence says something about SSL


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return write_secret(tmp_path / "token", TOKEN + "\n")


def write_secret(file: Path, text: str) -> Path:
    file.touch(0o600)
    file.write_text(text)
    return file


def config(**settings: object) -> Config:
    return Config(**{"model": "none", "address": "127.0.0.1:0", "drain_s": 1.0, **settings})


def tls(keys: Path) -> dict[str, Path]:
    return {"tls_cert": keys / "server.pem", "tls_key": keys / "server.key"}


@contextmanager
def listening(**settings: object) -> Iterator[str]:
    """A server without a model; yields its address."""
    server, address = create_server(config(**settings))
    yield address
    server._server.stop(None).wait()  # drain would wait for the channels of these tests to say goodbye


def secure(address: str, ca: Path, client: Path | None = None, name: str = "localhost") -> grpc.Channel:
    """A channel that trusts one authority, perhaps with a client's certificate of these keys."""
    pair = ((client / "client.key").read_bytes(), (client / "client.pem").read_bytes()) if client else (None, None)
    credentials = grpc.ssl_channel_credentials((ca / "ca.pem").read_bytes(), *pair)
    return grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)])


def described(channel: grpc.Channel, token: str | None = None, scheme: str = "Bearer") -> tuple[grpc.StatusCode, str]:
    """How Describe ends: the status, and the server's sentence or "" if there was no connection."""
    metadata = [("authorization", f"{scheme} {token}")] if token is not None else []
    with channel, pytest.raises(grpc.RpcError) as error:
        pb_grpc.TeacherStub(channel).Describe(pb.DescribeRequest(), timeout=10, metadata=metadata)
    sentence = error.value.details()
    return error.value.code(), "" if "connect" in sentence else sentence


# --- where a teacher listens


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:50051", "[::]:50051", "10.1.2.3:50051", "teacher:50051", ":50051", "::1:5005", "", "127.0.0.1,0.0.0.0:1",
     "ipv4:0.0.0.0:1", "[::ffff:10.0.0.1]:1", "unix-abstract:x"],
)  # fmt: skip
def test_off_the_loopback_nobody_listens_without_tls_and_token(address, tmp_path):
    files = {"tls_cert": tmp_path / "c", "tls_key": tmp_path / "k"}
    with pytest.raises(ValueError, match=r"--tls-cert FILE --tls-key FILE and --token-file FILE .*--insecure"):
        config(address=address)
    with pytest.raises(ValueError, match="give --token-file FILE"):
        config(address=address, **files)
    with pytest.raises(ValueError, match="give --tls-cert FILE --tls-key FILE,"):
        config(address=address, token_file=tmp_path / "t")
    config(address=address, **files, token_file=tmp_path / "t")
    config(address=address, **files, tls_client_ca=tmp_path / "ca")
    config(address=address, insecure=True)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.1.2.3:5", "localhost:50051", "[::1]:0", "unix:/run/teacher"])
def test_this_machine_alone_needs_neither(address, tmp_path):
    config(address=address)
    config(address=address, token_file=tmp_path / "t")


def test_the_command_line_refuses_to_listen_in_public_with_exit_code_2():
    ended = subprocess.run(
        [sys.executable, "-m", "teacher_server.main", "--model=none", "--address=0.0.0.0:0"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 2
    said = " ".join(ended.stderr.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", "").split())  # tyro draws a box around it
    assert "can be reached from other machines" in said and "--insecure" in said


def test_a_unix_socket_belongs_to_its_user_alone(tmp_path):
    with listening(address=f"unix:{tmp_path}/teacher") as address:
        assert stat.S_IMODE((tmp_path / "teacher").stat().st_mode) & 0o077 == 0
        assert described(grpc.insecure_channel(address)) == LOADING
    assert stat.S_IMODE(write_secret(tmp_path / "after", "").stat().st_mode) == 0o600


# --- keys


def test_keys_are_made_once_and_a_missing_name_makes_a_new_certificate(keys, tmp_path):
    copy = Path(shutil.copytree(keys, tmp_path / "copy"))
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    assert set(before) == {"ca.pem", "ca.key", "server.pem", "server.key", "client.pem", "client.key", "token"}
    make_keys(copy, "teacher", "localhost")
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    make_keys(copy, "teacher", "10.0.0.9")
    changed = {file.name for file in copy.iterdir() if file.read_bytes() != before[file.name]}
    assert changed == {"server.pem", "server.key"}
    private = [file for file in copy.iterdir() if file.suffix == ".key" or file.name == "token"]
    assert [file.stat().st_mode & 0o077 for file in private] == [0] * len(private)


def test_tls_lets_in_who_trusts_our_authority_and_no_plain_text(keys, other_keys):
    with listening(**tls(keys)) as address:
        assert described(secure(address, ca=keys)) == LOADING
        assert described(secure(address, ca=keys, name="teacher")) == LOADING
        assert described(secure(address, ca=keys, name="elsewhere")) == CLOSED
        assert described(secure(address, ca=other_keys)) == CLOSED
        assert described(grpc.insecure_channel(address))[0] == grpc.StatusCode.UNAVAILABLE


def test_mtls_wants_a_certificate_of_the_authority_named(keys, other_keys):
    with listening(**tls(keys), tls_client_ca=keys / "ca.pem") as address:
        assert described(secure(address, ca=keys, client=keys)) == LOADING
        for channel in (secure(address, ca=keys), secure(address, ca=keys, client=other_keys)):
            code, sentence = described(channel)
            assert code == grpc.StatusCode.UNAVAILABLE and sentence != LOADING[1]


def test_renewed_keys_are_taken_up_without_a_restart_and_never_half(keys, other_keys, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    now = Path(shutil.copytree(keys, tmp_path / "now"))
    with listening(**tls(now)) as address:
        assert described(secure(address, ca=keys)) == LOADING
        shutil.copy(other_keys / "server.pem", now)  # the key is still the old one
        assert described(secure(address, ca=keys)) == LOADING
        assert "is not the key of" in caplog.text
        shutil.copy(other_keys / "server.key", now)
        assert described(secure(address, ca=other_keys)) == LOADING
        assert described(secure(address, ca=keys)) == CLOSED
        (now / "server.key").unlink()
        assert described(secure(address, ca=other_keys)) == LOADING


def encrypted(keys: Path, tmp_path: Path) -> dict[str, Path]:
    file = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", keys / "server.key", "-out", file, "-passout", "pass:secret"], check=True
    )
    return {"tls_key": file}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda keys, theirs, tmp: {"tls_cert": tmp / "none.pem"}, r"cannot read .*none\.pem: No such file"),
        (lambda keys, theirs, tmp: {"tls_key": theirs / "server.key"}, r"server\.key .*is not the key of"),
        (lambda keys, theirs, tmp: {"tls_key": keys / "token"}, r"token \(--tls-key\) holds no PEM block"),
        (lambda keys, theirs, tmp: {"tls_cert": keys / "server.key"}, r"\(--tls-cert\) holds no PEM block"),
        (lambda keys, theirs, tmp: {"tls_client_ca": keys / "token"}, r"\(--tls-client-ca\) holds no PEM"),
        (lambda keys, theirs, tmp: encrypted(keys, tmp), "without a password"),
        (lambda keys, theirs, tmp: {"tls_key": None}, "--tls-cert and --tls-key belong together"),
        (lambda keys, theirs, tmp: {"tls_cert": None, "tls_key": None, "tls_client_ca": keys / "ca.pem"}, "inside TLS"),
    ],
)
def test_a_wrong_key_file_is_named_with_what_is_wrong(keys, other_keys, tmp_path, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_server(config(**(tls(keys) | wrong(keys, other_keys, tmp_path))))


# --- tokens


@pytest.fixture
def guarded(token_file: Path) -> Iterator[str]:
    with listening(token_file=token_file) as address:
        yield address


def test_a_call_without_the_token_is_unauthenticated_whatever_it_is(guarded):
    with grpc.insecure_channel(guarded) as channel:
        teacher, health = pb_grpc.TeacherStub(channel), health_pb2_grpc.HealthStub(channel)
        reflection = ProtoReflectionDescriptorDatabase(channel)
        calls = {
            "Describe": lambda: teacher.Describe(pb.DescribeRequest(), timeout=10),
            "Predict": lambda: teacher.Predict(pb.PredictRequest(), timeout=10),
            "reflection": reflection.get_services,
            "health watch": lambda: next(health.Watch(health_pb2.HealthCheckRequest(), timeout=10)),
        }
        for name, call in calls.items():
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED, name
            assert "--teacher.token-file" in error.value.details()
        for name in ("", "funmatch.v1.Teacher"):
            check = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert check.status == health_pb2.HealthCheckResponse.NOT_SERVING, "probes have no token"


@pytest.mark.parametrize(
    ("shown", "scheme"),
    [("", "Bearer"), (TOKEN[:-1], "Bearer"), (TOKEN + "x", "Bearer"), (TOKEN.upper(), "Bearer"), (TOKEN, "Basic"),
     (f" {TOKEN}", "Bearer"), ("", TOKEN)],
)  # fmt: skip
def test_what_is_not_exactly_a_token_is_none(guarded, shown, scheme):
    code, sentence = described(grpc.insecure_channel(guarded), shown, scheme)
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert "does not know" in sentence and TOKEN not in sentence


def test_with_the_token_everything_opens(guarded):
    for scheme in ("Bearer", "bearer"):
        assert described(grpc.insecure_channel(guarded), TOKEN, scheme) == LOADING


def test_the_token_travels_as_call_credentials_inside_tls(keys, token_file):
    with listening(**tls(keys), token_file=token_file) as address:
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials((keys / "ca.pem").read_bytes()), grpc.access_token_call_credentials(TOKEN)
        )
        assert described(grpc.secure_channel(address, credentials)) == LOADING
        assert described(secure(address, ca=keys))[0] == grpc.StatusCode.UNAUTHENTICATED


def test_a_student_comes_in_with_the_files_that_make_keys_wrote(keys, other_keys):
    with listening(**tls(keys), tls_client_ca=keys / "ca.pem", token_file=keys / "token") as address:
        place = Place(address)
        ours = Credentials(
            ca=keys / "ca.pem", cert=keys / "client.pem", key=keys / "client.key", token=Token(keys / "token")
        )
        assert described(ours.channel(place)) == LOADING
        stolen = replace(ours, token=Token(other_keys / "token"))
        assert described(stolen.channel(place))[0] == grpc.StatusCode.UNAUTHENTICATED


def test_a_token_is_rotated_by_two_lines_and_the_server_runs_on(guarded, token_file, caplog):
    caplog.set_level(logging.INFO)

    def opens(token: str) -> bool:
        return described(grpc.insecure_channel(guarded), token) == LOADING

    assert (opens(TOKEN), opens(OTHER_TOKEN)) == (True, False)
    token_file.write_text(f"{TOKEN}\n\n{OTHER_TOKEN}\n")
    assert (opens(TOKEN), opens(OTHER_TOKEN)) == (True, True)
    token_file.write_text(OTHER_TOKEN)
    assert (opens(TOKEN), opens(OTHER_TOKEN)) == (False, True)
    token_file.write_text("")
    assert (opens(TOKEN), opens(OTHER_TOKEN)) == (False, True), "an empty file changes nothing"
    token_file.unlink()
    assert (opens(TOKEN), opens(OTHER_TOKEN)) == (False, True)
    assert "tokens_not_renewed" in caplog.text
    assert TOKEN not in caplog.text and OTHER_TOKEN not in caplog.text, "tokens are never logged"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no token"),
        (" \n\n", "holds no token"),
        (f"{TOKEN}\nshort\n", r"line 2 of .* is no token: 5 characters; it needs 16"),
        ("sixteen characters with spaces", "line 1 .*without spaces"),
        ("tökentökentökentöken", "not ASCII"),
    ],
)
def test_a_file_that_holds_no_good_token_is_refused_without_showing_it(tmp_path, text, sentence):
    file = write_secret(tmp_path / "tokens", text)
    with pytest.raises(ValueError, match=sentence) as error:
        create_server(config(token_file=file))
    assert "short" not in str(error.value) and "sixteen" not in str(error.value)


def test_a_secret_that_everyone_may_read_is_reported(token_file, caplog):
    caplog.set_level(logging.INFO)
    with listening(token_file=token_file):
        assert "secret_readable_by_all" not in caplog.text
    token_file.chmod(0o644)
    with listening(token_file=token_file):
        assert "secret_readable_by_all" in caplog.text


STRANGER = """
import sys, threading
from pathlib import Path
from teacher_server.config import Config
from teacher_server.server import create_server
server, address = create_server(Config(model="none", address="127.0.0.1:0", token_file=Path(sys.argv[1])))
print(address, flush=True)
sys.stdin.read()
import os; os._exit(0)
"""


def test_the_messages_of_strangers_are_not_even_read(token_file):
    """Sixteen strangers send 64 MiB each at once, half of them as health checks; the memory does not notice."""
    with subprocess.Popen(
        [sys.executable, "-c", STRANGER, token_file], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as server:  # fmt: skip
        assert server.stdout is not None and server.stdin is not None
        address = server.stdout.readline().strip()
        assert described(grpc.insecure_channel(address), TOKEN) == LOADING
        before = peak_mb(server.pid)
        message = bytes(64 * 2**20)
        answers = []

        def knock(method: str) -> None:
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
            with grpc.insecure_channel(address, options) as channel:
                try:
                    answers.append(channel.unary_unary(method)(message, timeout=30))
                except grpc.RpcError as error:
                    answers.append(error.code())

        methods = ["/funmatch.v1.Teacher/Predict", "/grpc.health.v1.Health/Check"] * 8
        strangers = [threading.Thread(target=knock, args=(method,)) for method in methods]
        for stranger in strangers:
            stranger.start()
        for stranger in strangers:
            stranger.join()
        not_serving = health_pb2.HealthCheckResponse(status="NOT_SERVING").SerializeToString()
        assert sorted(map(str, answers)) == sorted([str(grpc.StatusCode.UNAUTHENTICATED), str(not_serving)] * 8)
        assert peak_mb(server.pid) - before < 100, "MB; the messages are 1024"
        server.stdin.close()
