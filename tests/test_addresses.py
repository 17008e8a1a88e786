"""Names that are looked up again: with a list that changes, and with a name server that the system's resolver asks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from student_trainer.fleet import addresses
from student_trainer.fleet.addresses import Addresses, Place

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(addresses, "LOOK_UP_EVERY_S", 0.02)


class Watcher:
    """What a fleet would hear."""

    def __init__(self) -> None:
        self.places: list[set[str]] = []
        self.words: list[str] = []
        self.changed = threading.Event()

    def on_change(self, places: frozenset[Place]) -> None:
        self.places.append({place.target for place in places})
        self.changed.set()

    def hear(self, _entry: str, words: str) -> None:
        self.words.append(words)

    def wait(self) -> set[str]:
        assert self.changed.wait(10), "nothing changed"
        self.changed.clear()
        return self.places[-1]


def test_places_stay_and_names_are_followed(soon):
    now = {"10.0.0.1:5"}
    where = Addresses(["a:1", "unix:/b", "dns:///teachers:5"])
    assert {place.target for place in where.fixed} == {"a:1", "unix:/b"}
    assert where.names == ("dns:///teachers:5",)
    watcher = Watcher()
    where.watch(watcher.on_change, watcher.hear, lambda name, port: frozenset(now))
    fixed = {"a:1", "unix:/b"}
    assert watcher.wait() == {*fixed, "10.0.0.1:5"}
    now.add("10.0.0.2:5")
    assert watcher.wait() == {*fixed, "10.0.0.1:5", "10.0.0.2:5"}
    now.remove("10.0.0.1:5")
    assert watcher.wait() == {*fixed, "10.0.0.2:5"}
    assert {place.name for place in where.places()} == {"", "teachers"}, "certificates name the name"
    where.close()


def test_a_name_that_says_nothing_keeps_what_it_said(soon):
    answers = iter([socket.gaierror(-2, "Name or service not known"), {"10.0.0.1:5"}, socket.gaierror(-3, "later")])
    last = None

    def look_up(name, port):
        nonlocal last
        last = next(answers, last)
        if isinstance(last, Exception):
            raise last
        return frozenset(last)

    where, watcher = Addresses(["dns:///teachers:5"]), Watcher()
    where.watch(watcher.on_change, watcher.hear, look_up)
    assert watcher.wait() == {"10.0.0.1:5"}
    while watcher.words[-1] == watcher.words[1]:
        time.sleep(0.01)
    where.close()
    assert watcher.words[0] == "teachers cannot be looked up: Name or service not known"
    assert watcher.words[1] == "stands for 10.0.0.1:5"
    assert watcher.words[2] == "teachers cannot be looked up: later; what it stood for is kept"
    assert watcher.places == [{"10.0.0.1:5"}]


@pytest.mark.parametrize("entry", ["a:9-8", "a:1-257"])
def test_ports_that_are_none_are_refused(entry):
    with pytest.raises(ValueError, match="256 of them at most: HOST:50051-50058"):
        Addresses([entry])


def test_of_a_range_of_ports_those_are_teachers_at_which_somebody_listens(soon):
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        first, last = max(1, port - 2), min(65535, port + 2)
        where, watcher = Addresses([f"127.0.0.1:{first}-{last}"]), Watcher()
        assert where.names and not where.fixed
        where.watch(watcher.on_change, watcher.hear)
        assert f"127.0.0.1:{port}" in watcher.wait()
    while not watcher.words or "nobody listens" not in watcher.words[-1]:
        time.sleep(0.01)
    where.close()
    assert watcher.words[-1] == f"127.0.0.1: nobody listens at ports {first}-{last}; what it stood for is kept"


@pytest.mark.parametrize(
    "entry", ["host", "http://x", "a:-5", "a:5-", "dns:///:5", "dns:///name", "dns:///name:port", ""]
)
def test_what_is_no_address_is_refused_with_the_forms_there_are(entry):
    with pytest.raises(ValueError, match="dns:///NAME:PORT"):
        Addresses([entry])


def test_no_address_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one address"):
        Addresses([])


def test_an_address_given_twice_is_one_replica():
    assert len(Addresses(["a:1", " a:1", "a:1"]).fixed) == 1


@pytest.mark.parametrize(
    ("target", "here"),
    [("127.0.0.1:5", True), ("127.8.0.1:5", True), ("[::1]:5", True), ("localhost:5", True), ("unix:/x", True),
     ("10.0.0.1:5", False), ("[fe80::1]:5", False), ("localhost.example:5", False), ("teacher:5", False)],
)  # fmt: skip
def test_what_stays_on_this_machine_is_known(target, here):
    assert Place(target).stays_here == here


def test_the_systems_own_resolver_is_asked():
    assert addresses.look_up("localhost", "50051") <= {"127.0.0.1:50051", "[::1]:50051"}


NAME_SERVER = """
import socket, struct, sys, threading, time
sys.path.insert(0, {root!r})
from student_trainer.fleet import addresses

known = []

def serve(wire):
    while True:
        query, caller = wire.recvfrom(512)
        end = query.index(b"\\0", 12) + 5
        (kind,) = struct.unpack("!H", query[end - 4 : end - 2])
        found = known if kind == 1 else []
        answer = query[:2] + struct.pack("!HHHHH", 0x8180 if known else 0x8183, 1, len(found), 0, 0) + query[12:end]
        for host in found:
            answer += b"\\xc0\\x0c" + struct.pack("!HHIH", 1, 1, 0, 4) + socket.inet_aton(host)
        wire.sendto(answer, caller)

wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
wire.bind(("127.0.0.1", 53))
threading.Thread(target=serve, args=(wire,), daemon=True).start()
addresses.LOOK_UP_EVERY_S = 0.05
where = addresses.Addresses(["dns:///teachers.test:5"])
where.watch(lambda places: None, lambda entry, words: None)
for now in ([], ["10.1.0.1"], ["10.1.0.1", "10.1.0.2", "10.1.0.3"], ["10.1.0.3"]):
    known[:] = now
    wanted = {{f"{{host}}:5" for host in now}}
    deadline = time.monotonic() + 10
    while (seen := {{place.target for place in where.places()}}) != wanted:
        assert time.monotonic() < deadline, (seen, wanted)
        time.sleep(0.01)
print("followed")
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"),
    reason="a name server on port 53, and a resolv.conf of the test's own, need root and namespaces",
)
def test_a_real_name_server_that_changes_its_mind_is_followed(tmp_path):
    settings = tmp_path / "resolv.conf"
    settings.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:3\n")
    names = tmp_path / "nsswitch.conf"
    names.write_text("hosts: files dns\n")
    script = tmp_path / "script.py"
    script.write_text(NAME_SERVER.format(root=str(ROOT)))
    inside = (
        f"ip link set lo up && mount --bind {settings} /etc/resolv.conf && mount --bind {names} /etc/nsswitch.conf "
        f"&& exec {sys.executable} {script}"
    )
    probe = subprocess.run(["unshare", "-nm", "true"], check=False, capture_output=True)
    if probe.returncode:
        pytest.skip("namespaces are not allowed here")
    run = subprocess.run(
        ["unshare", "-nm", "sh", "-c", inside], check=False, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == "followed", run.stderr
