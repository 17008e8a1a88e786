"""docker, docker-compose and kubectl on a page: what this repository decides about such a command is true.

Services, profiles, files, names of jobs and secrets are read from the compose files and the manifests. The flags are
those that our pages use; another one fails the test until it is written down here. None of these programs is run.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from shell_blocks import ROOT

PROGRAMS = ("docker", "docker-compose", "kubectl")
_MANIFESTS = sorted((ROOT / "docker" / "k8s").glob("*.yaml"))


def check(argv: Sequence[str], compose_files: Sequence[str]) -> list[str]:
    """Raise ValueError, or end as argparse does, where the command would not be taken; returns what runs inside."""
    match list(argv):
        case ["docker", "compose"]:
            pass  # its name, in a sentence
        case ["docker-compose", *args] | ["docker", "compose", *args]:
            return _check_compose(_COMPOSE.parse_args(args), compose_files)
        case ["docker", *args]:
            return _check_docker(_DOCKER.parse_args(args))
        case [_, *args]:
            return _check_kubectl(_KUBECTL.parse_args(args))
    return []


def _check_compose(asked: argparse.Namespace, compose_files: Sequence[str]) -> list[str]:
    parts = [_read(file) for file in asked.file or compose_files or ["docker-compose.yml"]]
    services: dict[str, Any] = {}
    for part in parts:
        services |= {name: services.get(name, {}) | service for name, service in part["services"].items()}
    profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
    if unknown := set(asked.profile) - profiles:
        raise ValueError(f"the compose files have no profile {unknown.pop()}")
    scaled = [one.partition("=") for one in getattr(asked, "scale", [])]
    for name in [*getattr(asked, "services", []), *(name for name, _, _ in scaled)]:
        if name not in services:
            raise ValueError(f"the compose files have no service {name}")
        if (wants := services[name].get("profiles")) and not set(wants) & set(asked.profile):
            raise ValueError(f"{name} needs --profile {wants[0]}")
    if any(not number.isdecimal() for _, _, number in scaled):
        raise ValueError("--scale wants SERVICE=NUMBER")
    return [*shlex.split(asked.entrypoint), *asked.args] if getattr(asked, "entrypoint", "") else []


def _check_docker(asked: argparse.Namespace) -> list[str]:
    if asked.verb == "build" and not (ROOT / asked.file).is_file():
        raise ValueError(f"there is no {asked.file}")
    return asked.args if asked.verb == "exec" else []


def _check_kubectl(asked: argparse.Namespace) -> list[str]:
    manifests = [one for path in _MANIFESTS for one in yaml.safe_load_all(path.read_text()) if "kind" in one]
    kinds = {(one["kind"].lower(), one["metadata"]["name"]) for one in manifests if "name" in one.get("metadata", {})}
    for name in filter(None, [*(getattr(asked, "manifest", None) or []), getattr(asked, "folder", "")]):
        if not (ROOT / name).exists():
            raise ValueError(f"there is no {name}")
    target = getattr(asked, "target", "")
    if target and tuple(target.split("/")) not in kinds:
        raise ValueError(f"the manifests have no {target}")
    if (pod := getattr(asked, "pod", "").partition(":")[0]) and ("pod", pod) not in kinds:
        raise ValueError(f"the manifests have no pod {pod}")
    if getattr(asked, "from_file", None):
        mounted = "\n".join(path.read_text() for path in _MANIFESTS)
        made = (ROOT / "docker" / "make_keys.sh").read_text()
        if f"secretName: {asked.name}," not in mounted:
            raise ValueError(f"no pod mounts a secret {asked.name}")
        for file in asked.from_file:
            stem = file.rpartition("/")[2].partition(".")[0]
            if stem not in made:
                raise ValueError(f"docker/make_keys.sh makes no {file}")
    if selected := getattr(asked, "selector", ""):
        labels = {("app", one["spec"]["selector"].get("app")) for one in manifests if one["kind"] == "Service"}
        if tuple(selected.split(",")[0].split("=")) not in labels:
            raise ValueError(f"no service of the manifests selects {selected}")
    return list(getattr(asked, "args", []))


def _read(file: str) -> Any:
    if not (ROOT / file).is_file():
        raise ValueError(f"there is no compose file {file}")
    return yaml.safe_load((ROOT / file).read_text())


def _compose() -> argparse.ArgumentParser:
    parser, verbs = _parser("docker-compose")
    parser.add_argument("-f", "--file", action="append")
    parser.add_argument("--profile", action="append", default=[])
    for verb, flags in {"build": "", "up": "d", "logs": "f", "ps": "aq", "run": "", "down": "v"}.items():
        one = verbs.add_parser(verb, allow_abbrev=False)
        for flag in flags:
            one.add_argument(f"-{flag}", action="store_true")
        if verb in ("up", "run"):
            one.add_argument("--no-deps", action="store_true")
        if verb == "up":
            one.add_argument("--no-recreate", action="store_true")
            one.add_argument("--scale", action="append", default=[])
        if verb == "run":
            one.add_argument("--rm", action="store_true")
            one.add_argument("--entrypoint", default="")
            one.add_argument("services", nargs=1)
            one.add_argument("args", nargs=argparse.REMAINDER)
        elif verb != "down":
            one.add_argument("services", nargs="*")
    return parser


def _docker() -> argparse.ArgumentParser:
    parser, verbs = _parser("docker")
    build = verbs.add_parser("build", allow_abbrev=False)
    build.add_argument("-f", "--file", required=True)
    build.add_argument("-t", required=True)
    build.add_argument("context", choices=["."])
    for verb, flag in {"push": "", "kill": "", "rm": "", "cp": "", "stop": "-t", "inspect": "-f"}.items():
        one = verbs.add_parser(verb, allow_abbrev=False)
        if flag:
            one.add_argument(flag)
        one.add_argument("names", nargs="*")  # inspect's come through xargs
    verbs.add_parser("info")
    inside = verbs.add_parser("exec", allow_abbrev=False)
    inside.add_argument("container")
    inside.add_argument("args", nargs=argparse.REMAINDER)
    return parser


def _kubectl() -> argparse.ArgumentParser:
    parser, verbs = _parser("kubectl")
    parser.add_argument("-n", choices=["funmatch"])
    _, kinds = _parser("create", verbs.add_parser("create"))
    _, secrets = _parser("secret", kinds.add_parser("secret"))
    generic = secrets.add_parser("generic")
    generic.add_argument("name")
    generic.add_argument("--from-file", action="append", required=True)
    apply = verbs.add_parser("apply").add_mutually_exclusive_group(required=True)
    apply.add_argument("-f", dest="manifest", action="append")
    apply.add_argument("-k", dest="folder")
    logs = verbs.add_parser("logs")
    logs.add_argument("-f", action="store_true")
    logs.add_argument("--tail", type=int)
    logs.add_argument("-l", dest="selector", required=True)
    _, rollouts = _parser("rollout", verbs.add_parser("rollout"))
    rollouts.add_parser("restart").add_argument("target")
    status, wait, delete = rollouts.add_parser("status"), verbs.add_parser("wait"), verbs.add_parser("delete")
    wait.add_argument("--for", required=True)
    for one in (status, wait):
        one.add_argument("--timeout", required=True)
    for one in (status, wait, delete):
        one.add_argument("target")
    inside, copy = verbs.add_parser("exec"), verbs.add_parser("cp")
    inside.add_argument("pod")
    inside.add_argument("args", nargs=argparse.REMAINDER)
    copy.add_argument("pod")
    copy.add_argument("to")
    return parser


def _parser(name: str, parser: argparse.ArgumentParser | None = None) -> tuple[argparse.ArgumentParser, Any]:
    parser = parser or argparse.ArgumentParser(prog=name, allow_abbrev=False)
    return parser, parser.add_subparsers(dest="verb", required=True)


_COMPOSE, _DOCKER, _KUBECTL = _compose(), _docker(), _kubectl()

FLAGS = frozenset({"--scale", "--no-deps", "--no-recreate", "--profile", "--entrypoint", "--rm"})
"""Of docker-compose, where a sentence names one by itself."""
