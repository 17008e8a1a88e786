"""Checks of teachers: each replica's reachability and health, one fingerprint an entry, classes, data sets, release."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from data_prep.index import Index
from funmatch.finding import Finding, broken, look, ok
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc as pb_grpc
from student_trainer.fleet import Credentials
from student_trainer.fleet.addresses import Addresses, Place, look_up, name_and_port, why_not


@dataclass
class Met:
    """What one entry, the replicas of one teacher, turned out to be."""

    findings: list[Finding]
    description: pb.Description | None = None
    """Of the first replica that answered."""


def meet(entry: str, credentials: Credentials, indexes: Sequence[Index], timeout_s: float) -> Met:
    """Ask the replicas of one teacher, given as --teacher takes them: addresses with commas between."""
    met = Met([])
    try:
        places, lost = _places(entry)
    except ValueError as error:
        met.findings.append(broken("teacher", str(error), "correct --teacher"))
        return met
    met.findings += lost
    answered: dict[str, pb.Description] = {}
    for place in places:
        finding, description = _ask(place, credentials, timeout_s)
        met.findings.append(finding)
        if description is not None:
            answered[place.target] = description
            met.description = met.description or description
    met.findings += _one_teacher(answered)
    if met.description is not None:
        met.findings += _fits(entry, met.description, indexes)
    return met


def check_ensemble(entries: Sequence[str], met: Sequence[Met]) -> Iterator[Finding]:
    """Entries must be different teachers."""
    seen: dict[str, str] = {}
    for entry, one in zip(entries, met, strict=True):
        if one.description is None:
            continue
        first = seen.get(one.description.fingerprint)
        seen.setdefault(one.description.fingerprint, entry)
        if first is not None:
            says = f"{first} and {entry} are one and the same teacher, and were given as two"
            yield broken("teachers", says, f"commas between replicas: --teacher {first},{entry}")


def _places(entry: str) -> tuple[list[Place], list[Finding]]:
    addresses = Addresses(entry.split(","))
    places, lost = set(addresses.fixed), []
    for named in addresses.names:
        name, port = name_and_port(named) or ("", "")
        try:
            places |= {Place(target, name=name) for target in look_up(name, port)}
        except OSError as error:
            lost.append(broken("teacher", why_not(name, error), "correct it, or start the service that has it"))
    return sorted(places), lost


def _ask(place: Place, credentials: Credentials, timeout_s: float) -> tuple[Finding, pb.Description | None]:
    try:
        channel = credentials.channel(place)
    except ValueError as error:
        return broken("teacher", str(error), "correct the --tls and --token settings"), None
    with channel:
        try:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
            if health.status != health_pb2.HealthCheckResponse.SERVING:
                says = f"{place.target} answers and does not serve: it loads, drains, or is broken"
                return look("teacher", says, "wait for it, or read its log"), None
            description = pb_grpc.TeacherStub(channel).Describe(  # type: ignore[no-untyped-call]
                pb.DescribeRequest(), timeout=timeout_s, metadata=credentials.metadata()
            )
        except grpc.RpcError as error:
            return _refused(place, error, credentials), None
    return ok("teacher", f"{place.target} serves {_in_words(description)}"), description


def _refused(place: Place, error: grpc.RpcError, credentials: Credentials) -> Finding:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return broken("teacher", f"{place.target} does not let us in: {details}", "give its token by --token-file")
    says = f"{place.target} cannot be reached: {code.name}: {details}{credentials.hint(details)}"
    return broken("teacher", says, "start it (`funmatch serve`), or correct address, port, firewall or TLS files")


def _one_teacher(answered: dict[str, pb.Description]) -> Iterator[Finding]:
    """Replicas of one entry must have one fingerprint."""
    first, *others = answered.items() or [("", pb.Description())]
    for target, one in others:
        if one.fingerprint != first[1].fingerprint:
            says = f"{first[0]} is {_in_words(first[1])}, {target} is {_in_words(one)}: not replicas of one teacher"
            yield broken("fingerprint", says, "start both with the same model, size, precision, batch rows and release")


def _fits(entry: str, who: pb.Description, indexes: Sequence[Index]) -> Iterator[Finding]:
    """Whether a run with these data sets could learn from it."""
    known = {data.digest for data in who.data_sets}
    for index in indexes:
        if index.classes and who.num_classes != len(index.classes):
            says = f"{entry} has {who.num_classes} classes, {index.root} {len(index.classes)}"
            yield broken("classes", says, "serve a teacher for this data set, or give its own by --data.evaluate-root")
        if index.digest not in known:
            says = f"{entry} does not have {index.root}: pictures would travel as files"
            yield look("data at teacher", says, "start it with --data and the same prepared folder")
        else:
            yield ok("data at teacher", f"{entry} has {index.root}: pictures travel as row numbers")
    try:
        from views.render import RENDER_VERSION
    except (ImportError, OSError):  # DALI is broken, which is a finding of its own
        return
    if who.renders and who.rendering.version != RENDER_VERSION:
        says = f"{entry} renders by {who.rendering.version}, this installation by {RENDER_VERSION}"
        yield broken("release", says, "run teachers and students of the same release")


def _in_words(who: pb.Description) -> str:
    return (
        f"{who.model} of {who.num_classes} classes at {who.rendering.size} px in {who.precision}, fingerprint "
        f"{who.fingerprint[:12]}"
    )
