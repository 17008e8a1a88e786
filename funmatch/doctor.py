"""`funmatch doctor`: is this machine, and what a run would use, fit for it? One line a finding, and what to do.

    funmatch doctor
    funmatch doctor --data data/mine --teacher 127.0.0.1:50051,127.0.0.1:50052 --run-dir runs/mine
    funmatch doctor --run-dir runs/mine --recipe digits/demo -- --optim.lr 0.01

Exit code: 0 nothing is broken, 1 something is, 2 a flag is wrong. It changes nothing, and takes about ten seconds,
most of them torch's. What is not named is not asked about. A data set is looked at by one picture a shard; all of it
is `python -m data_prep.check`.

Not here: the checks themselves (machine.py, sources.py, replicas.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from funmatch import machine
from funmatch.finding import Finding, broken


def main(argv: Sequence[str] | None = None) -> int:
    """Look, print, and say by the exit code whether something is broken."""
    asked = _parse(argv)
    found = []
    for finding in examine(asked):
        found.append(finding)
        if not asked.json:
            print(finding, flush=True)
    num_broken = sum(finding.state == "broken" for finding in found)
    if asked.json:
        print(json.dumps({"broken": num_broken, "findings": [dataclasses.asdict(one) for one in found]}, indent=1))
    else:
        print(f"{num_broken} broken, {sum(one.state == 'look' for one in found)} to look at, of {len(found)}")
    return 1 if num_broken else 0


def examine(asked: argparse.Namespace) -> Iterator[Finding]:
    """All findings, as they come."""
    yield from machine.check_python()
    yield from machine.check_packages()
    yield from machine.check_cuda(asked.device)
    yield from machine.check_gpus()
    yield from machine.check_dali()
    yield from machine.check_shared_memory(asked.shm)
    yield from machine.check_ports(asked.port)
    try:
        yield from _examine_run(asked)
    except ImportError as error:
        yield broken(
            "packages", f"{error}", "pip install 'funmatch[data,teacher,student]', or all of requirements.lock"
        )


def _examine_run(asked: argparse.Namespace) -> Iterator[Finding]:
    """What a run would read, ask and write; imports the rooms, whose packages may be missing."""
    from funmatch import replicas, sources
    from student_trainer.fleet import Credentials, Token

    indexes = []
    for root in asked.data:
        index, finding = sources.open_index(root)
        yield finding
        if index is not None:
            indexes.append(index)
            yield from sources.check_pictures(index)
    met: list[replicas.Met] = []
    try:
        credentials = Credentials(
            ca=asked.tls_ca, cert=asked.tls_cert, key=asked.tls_key, name=asked.tls_name,
            token=Token(asked.token_file) if asked.token_file else None,
        )  # fmt: skip
    except ValueError as error:
        yield broken("credentials", str(error), "correct the --tls and --token settings")
    else:
        for entry in asked.teacher:
            met.append(replicas.meet(entry, credentials, indexes, asked.timeout_s))
            yield from met[-1].findings
        yield from replicas.check_ensemble(asked.teacher, met)
    if asked.store:
        yield from sources.check_store(asked.store)
    if asked.run_dir:
        known = [one.description.fingerprint for one in met if one.description is not None]
        fingerprints = known if len(known) == len(met) else []
        yield from sources.check_run(asked.run_dir, asked.config, indexes, fingerprints)
    folders = [asked.run_dir or Path("runs")]
    if asked.store and "://" not in asked.store:
        folders.append(Path(asked.store))
    for folder in folders:
        yield from machine.check_disk(folder)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="funmatch doctor", usage="funmatch doctor [FLAGS] [-- SETTINGS OF THE RECIPE]", allow_abbrev=False,
        description="Flags; each names something more to look at.",
    )  # fmt: skip
    flags.add_argument("--data", type=Path, nargs="+", default=[], metavar="DIR", help="prepared data sets")
    flags.add_argument("--teacher", nargs="+", default=[], metavar="ADDR", help="as at train: an entry a teacher, "
                       "commas between replicas; HOST:PORT, HOST:FIRST-LAST, unix:/PATH, dns:///NAME:PORT")  # fmt: skip
    flags.add_argument("--run-dir", type=Path, metavar="DIR", help="a run's folder, new or to go on in")
    flags.add_argument("--recipe", metavar="NAME", help="with --run-dir: the recipe, whose settings are compared")
    flags.add_argument("--store", metavar="URL", help="where a fixed teacher's logits are kept: a folder or redis://")
    flags.add_argument("--port", type=int, nargs="+", default=[], metavar="N", help="ports to serve at")
    flags.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="cuda: without one all is "
                       "broken; cpu: none is missed. Default: auto")  # fmt: skip
    flags.add_argument("--timeout-s", type=float, default=5.0, metavar="S", help="seconds a teacher may take to "
                       "answer. Default: 5")  # fmt: skip
    flags.add_argument("--shm", type=Path, default=Path("/dev/shm"), metavar="DIR", help="shared memory. Default: "  # noqa: S108
                       "/dev/shm")  # fmt: skip
    for name, help_ in (
        ("ca", "certificate of the teachers' authority (PEM): ask over TLS"),
        ("cert", "our certificate (PEM), for teachers that ask for one"),
        ("key", "its key (PEM)"),
    ):
        flags.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=help_)
    flags.add_argument("--tls-name", default="", metavar="NAME", help="the name in the teachers' certificates")
    flags.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token that teachers want to see")
    flags.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return flags


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = list(sys.argv[1:] if argv is None else argv)
    cut = args.index("--") if "--" in args else len(args)
    flags = parser()
    asked = flags.parse_args(args[:cut])
    asked.config = None
    if asked.recipe or args[cut + 1 :]:
        from student_trainer.config import override
        from student_trainer.recipes import RECIPES

        if asked.recipe not in RECIPES:
            flags.error(f"no recipe is called {asked.recipe!r}; `python -m student_trainer.recipes` lists them")
        asked.config = override(RECIPES[asked.recipe].config, args[cut + 1 :])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the rooms do: before torch
    return asked


if __name__ == "__main__":
    sys.exit(main())
