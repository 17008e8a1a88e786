"""A recipe over a grid of lr, weight decay and T (section 3.1): `python -m student_trainer.sweep RECIPE [...]`.

    python -m student_trainer.sweep pets/funmatch/1k --data data/pets --teacher 10.0.0.2:50051 --run-dir runs/sweep
    python -m student_trainer.sweep pets/funmatch/1k --grid lr=0.003,0.01 wd=0.001 --nproc 8 ...

Trials differ in lr, wd and T alone, look at `val` while they train, and share one fleet of teachers: the addresses
given, or teachers started once beside the sweep. When all are done the weights that were best on `val` are evaluated
on `test`. Whatever is no option of the sweep is a setting of main.py, the same for all trials.

    RUN_DIR/study.db                          Optuna's record: who has which trial, and what came out
    RUN_DIR/trials/lr_0.003_wd_0.001_T_5/     a run as any other, and trial.log
    RUN_DIR/sweep.json                        the table, the choice, and its score on `test`

The same command goes on after a kill: finished trials are not run again, the others go on from their checkpoints. It
may be started as often as there are machines, on one RUN_DIR that they all see, with `--storage` naming a database
(sqlite files do not stand several machines): each trial is taken by one worker. A worker that dies takes its trial's
process with it (leash.py), and stops its heartbeat; another one, or the next start, then goes on with the trial. The
grid of a sweep only grows: a later start may add values, and each worker helps with all.

A loss that is no number is a result, and such a trial is not run again. Any other failure ends this worker, for it
would befall the next trial too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

from student_trainer import sweep_points as points
from student_trainer.config import Config, flag, override, settings
from student_trainer.recipes import RECIPES
from student_trainer.sweep_points import PAPER_GRID, SETTING_OF, Point

if TYPE_CHECKING:
    from student_trainer.world import World

_ROOT = Path(__file__).resolve().parents[1]


class TrialFailedError(RuntimeError):
    """A trial's process ended without a result."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was asked for."""

    config: Config
    """The recipe with the settings given; run_dir is the sweep's folder, data.evaluate the split that selects."""
    rest: tuple[str, ...]
    """The settings as they were given."""
    grid: tuple[Point, ...]
    report_on: str
    """Split on which the chosen weights are evaluated."""
    nproc: int
    """Processes of a trial, by torchrun; 1: without."""
    storage: str
    """SQLAlchemy's URL of a database, or empty: a sqlite file in the sweep's folder."""
    heartbeat_s: int

    def folder(self, point: Point) -> Path:
        """The run_dir of a trial."""
        return self.config.run_dir / "trials" / point.name


def parse(args: Sequence[str]) -> Sweep:
    """The command line; what is wrong ends the program with a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m student_trainer.sweep", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", help="comes first; `python -m student_trainer.recipes` lists them")
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME=VALUE,...",
                        help="lr=, wd= or T=; what is not given is the paper's")  # fmt: skip
    parser.add_argument("--select-on", default="val", metavar="SPLIT", help="choose by top-1 on this split (val)")
    parser.add_argument("--report-on", default="test", metavar="SPLIT", help="evaluate the choice on this one (test)")
    parser.add_argument("--nproc", type=int, default=1, help="processes of a trial, by torchrun; 1: without")
    parser.add_argument("--storage", default="", metavar="URL", help="a database that all machines reach, as in "
                        "postgresql://user:password@host/name; default: RUN_DIR/study.db")  # fmt: skip
    parser.add_argument("--heartbeat-s", type=int, default=20, help="a trial whose worker was silent three times as "
                        "long is taken over (20)")  # fmt: skip
    known, rest = parser.parse_known_args(args)
    if known.recipe not in RECIPES:
        sys.exit(f"no recipe is called {known.recipe!r}; `python -m student_trainer.recipes` lists them")
    recipe = dataclasses.replace(RECIPES[known.recipe].config, run_dir=Path("runs/sweeps") / known.recipe)
    config = override(recipe, [*rest, f"--data.evaluate={known.select_on}"])
    if known.nproc < 1 or known.heartbeat_s < 1:
        sys.exit("--nproc and --heartbeat-s must be at least 1")
    _refuse_what_the_grid_decides(recipe, config)
    return Sweep(
        config=config, rest=tuple(rest), grid=_grid(known.grid, config), report_on=known.report_on,
        nproc=known.nproc, storage=known.storage, heartbeat_s=known.heartbeat_s,
    )  # fmt: skip


def _refuse_what_the_grid_decides(recipe: Config, config: Config) -> None:
    before, after = settings(recipe), settings(config)
    for name, setting in SETTING_OF.items():
        if before[setting] != after[setting]:
            sys.exit(f"{flag(setting)} is what the sweep chooses; for one value give --grid {name}={after[setting]}")


def _grid(given: Sequence[str], config: Config) -> tuple[Point, ...]:
    values: dict[str, tuple[float, ...]] = {}
    for entry in given:
        name, _, numbers = entry.partition("=")
        if name not in PAPER_GRID or name in values:
            sys.exit(f"--grid {entry}: give each of lr=, wd= and T= once, as in --grid lr=0.001,0.003 T=1")
        try:
            values[name] = tuple(sorted({float(number) for number in numbers.split(",")}))
        except ValueError:
            sys.exit(f"--grid {entry}: numbers with commas between, as in {name}=1,2")
        if not all(0 < value < float("inf") for value in values[name]):
            sys.exit(f"--grid {entry}: values must be greater than 0")
    if config.targets == "labels":
        if "T" in values:
            sys.exit("--grid T=...: learning from labels has no temperature")
        values["T"] = (config.optim.temperature,)
    return tuple(Point(*point) for point in itertools.product(*({**PAPER_GRID, **values}.values())))


# ---- the trials ----------------------------------------------------------------------------------------------------


def run_trials(sweep: Sweep, study: optuna.Study, addresses: Sequence[Sequence[str]]) -> None:
    """Take one trial after the other, until none waits and none is in anybody's hands.

    Raises:
        TrialFailedError: a trial failed, other than by a loss that is no number.
    """

    def run(trial: optuna.Trial) -> float:
        point = points.point_of(trial)
        if point is None:
            raise points.TakenError("nothing waits")
        points.refuse_what_is_taken(study, trial, point)
        for name, value in dataclasses.asdict(point).items():  # so that Optuna's own tools know them
            trial.suggest_float(name, value, value)
        print(f"trial {point.name} begins; its output goes to {sweep.folder(point) / 'trial.log'}", flush=True)
        top1 = run_trial(sweep, point, addresses)
        _say_progress(study, point, top1)
        if top1 is None:
            raise optuna.TrialPruned("its loss became no number")
        return top1

    said = False
    while unfinished := points.unfinished(study):
        optuna.storages.fail_stale_trials(study)
        if any(trial.state == TrialState.WAITING for trial in unfinished):
            _optimize_once(study, run)
            said = False
            continue
        if not said:
            others = ", ".join(point.name for trial in unfinished if (point := points.point_of(trial)))
            print(f"waiting for what other workers have, or had: {others}", flush=True)
            said = True
        time.sleep(min(5.0, sweep.heartbeat_s / 2))


def _optimize_once(study: optuna.Study, run: Callable[[optuna.Trial], float]) -> None:
    taken: list[optuna.Trial] = []

    def remember(trial: optuna.Trial) -> float:
        taken.append(trial)
        return run(trial)

    try:
        study.optimize(remember, n_trials=1, catch=points.TakenError)
    except (ValueError, AssertionError):
        # Optuna does not let us report on a trial that others have reported on: they heard no heartbeat of ours and
        # gave it up for dead (and optuna 5.0 trips over its own log line about it), or a sqlite file, which locks no
        # row, gave one trial to two workers at the same moment. The folder has one worker at a time (`_alone_in`), so
        # whoever comes second finds the run done, and the same number.
        if not taken or not study.get_trials(deepcopy=False)[taken[0].number].state.is_finished():
            raise
        print("this trial had been given to another worker as well", flush=True)


def run_trial(sweep: Sweep, point: Point, addresses: Sequence[Sequence[str]]) -> float | None:
    """Run main.py to its end; top-1 on the split that selects, or None when the loss became no number.

    Raises:
        TrialFailedError: it ended without a result. Quotes the end of its log.
    """
    folder = sweep.folder(point)
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "trial.log"
    with _alone_in(folder), log_file.open("ab") as output:
        output.seek(0, os.SEEK_END)
        start = output.tell()
        process = subprocess.Popen(
            _command(sweep, point, addresses), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; the trial then hears a single SIGTERM, and saves
        )  # fmt: skip
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    summary = folder / "summary.json"
    if code == 0 and summary.exists():
        numbers = json.loads(summary.read_text())
        if "student_top1" not in numbers:
            raise TrialFailedError(f"split {sweep.config.data.evaluate!r} has no labels to select by")
        return float(numbers["student_top1"])
    text = log_file.read_bytes()[start:].decode(errors="replace")
    if "NonFiniteLossError" in text:
        return None
    tail = "\n  ".join(text.splitlines()[-12:])
    raise TrialFailedError(f"trial {point.name} ended with exit code {code} and no result. {log_file}:\n  {tail}")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for whoever is at work in a folder: a silent heartbeat may be that of a worker who is only slow."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, by us or by a kill
        yield


def _command(sweep: Sweep, point: Point, addresses: Sequence[Sequence[str]]) -> list[str]:
    """A torchrun ends its ranks when it is asked to end; a single process may be killed, and goes on as well."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={sweep.nproc}"]
    end_by = "SIGTERM" if sweep.nproc > 1 else "SIGKILL"
    command = [
        sys.executable, str(Path(__file__).with_name("leash.py")), end_by, str(os.getpid()),
        sys.executable, *(torchrun if sweep.nproc > 1 else []), str(_ROOT / "student_trainer" / "main.py"),
        "--recipe", sweep.config.recipe, *sweep.rest,
        # Of a setting given twice the last one counts.
        *point.flags, f"--run-dir={sweep.folder(point)}", f"--data.evaluate={sweep.config.data.evaluate}",
    ]  # fmt: skip
    if addresses:
        command += ["--teacher.addresses", *(",".join(replicas) for replicas in addresses)]
    return command


def _say_progress(study: optuna.Study, point: Point, top1: float | None) -> None:
    """This trial is not yet in the study's record."""
    results = points.results(study) | {point: top1}
    num_points = points.count(study)
    shown = "diverged: its loss became no number" if top1 is None else f"top-1 {top1:.2%}"
    best = points.best_of(results)
    so_far = f"; best so far {best.name}, {results[best]:.2%}" if best else ""
    print(f"[{len(results)}/{num_points}] {point.name}: {shown}{so_far}", flush=True)


# ---- the end -------------------------------------------------------------------------------------------------------


def finish(sweep: Sweep, study: optuna.Study, world: World) -> None:
    """Choose, evaluate the choice, write sweep.json and print the table.

    Raises:
        ValueError: points of the grid without a result, or none that did not diverge.
    """
    results = points.results(study)
    if missing := [point.name for point in sweep.grid if point not in results]:
        raise ValueError(
            f"{len(missing)} trials failed at another worker: {', '.join(missing)}. The same command runs them again"
        )
    best = points.best_of(results)
    if best is None:
        raise ValueError(f"all {len(results)} trials diverged: lower the learning rates")
    chosen = sweep.folder(best)
    score = evaluate_weights(sweep.config, chosen / "model.safetensors", sweep.report_on, world)
    record = {
        "recipe": sweep.config.recipe,
        "selected_on": sweep.config.data.evaluate,
        "reported_on": sweep.report_on,
        "trials": [dataclasses.asdict(point) | {"top1": top1, "run_dir": str(sweep.folder(point))}
                   for point, top1 in results.items()],
        "best": dataclasses.asdict(best) | {"top1": results[best], "run_dir": str(chosen)},
        "report": score,
    }  # fmt: skip
    path = sweep.config.run_dir / "sweep.json"
    partial = path.with_name(f"sweep.{os.getpid()}.tmp")  # other workers end at about the same time
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    _print_table(sweep, results, best, score)


def evaluate_weights(config: Config, weights: Path, split: str, world: World) -> dict[str, float]:
    """Top-1 and cross-entropy of a finished run's weights on any split, as training would evaluate them there."""
    import models
    from data_prep.index import Index
    from student_trainer.evaluate import Evaluation
    from views.render import Renderer, Rendering

    config = dataclasses.replace(config, data=dataclasses.replace(config.data, evaluate=split))
    index = Index.open(config.data.evaluate_root or config.data.root)
    student, card = models.load(weights)
    student.to(world.device)
    shape = config.student
    rendering = Rendering(size=shape.size, interpolation=shape.interpolation, antialias=shape.antialias)
    device_id = world.device.index if world.device.type == "cuda" else None
    renderer = Renderer(rendering, config.eval_batch, device_id, config.decode_threads)
    numbers = Evaluation(config, world, index, renderer, [], card).run(student)
    return {name.removeprefix("eval/"): value for name, value in numbers.items()}


def _print_table(sweep: Sweep, results: dict[Point, float | None], best: Point, score: dict[str, float]) -> None:
    print(f"{'lr':>10} {'wd':>10} {'T':>6}   top-1 on {sweep.config.data.evaluate}")
    for point, top1 in results.items():
        value = "diverged" if top1 is None else f"{top1:.2%}"
        print(f"{point.lr:>10g} {point.wd:>10g} {point.T:>6g}   {value}{'  <- chosen' if point == best else ''}")
    print(f"top-1 of the chosen on {sweep.report_on}: {score['student_top1']:.2%}", flush=True)


def _check_splits(sweep: Sweep) -> None:
    """Before the first trial, not after the last."""
    from data_prep.index import Index

    config = sweep.config.data
    index = Index.open(config.evaluate_root or config.root)
    for split in (config.evaluate, sweep.report_on):
        if split not in index.splits:
            raise ValueError(f"{index.root} has no split {split!r}; it has {list(index.splits)}")


def main() -> None:
    """Run a sweep, or help with it. Exit code 1, with a sentence and no traceback, for what the caller can mend."""
    sweep = parse(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it reports each trial that gives way as a failure
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # its heartbeat
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # After the settings are known to be right: these import torch and gRPC.
    from student_trainer import world
    from student_trainer.local_teacher import TeacherDiedError
    from student_trainer.teachers import services

    try:
        _check_splits(sweep)
        sweep.config.run_dir.mkdir(parents=True, exist_ok=True)
        study = points.open_study(sweep.config, sweep.grid, sweep.storage, sweep.heartbeat_s)
        alone = world.join(sweep.config.device)
        try:
            if sweep.config.targets == "labels" or not points.unfinished(study):
                run_trials(sweep, study, ())
            else:
                with services(sweep.config, alone) as addresses:
                    run_trials(sweep, study, addresses)
        except KeyboardInterrupt:
            points.enqueue(study, sweep.grid)  # what we had in our hands is for the others
            sys.exit("stopped; the same command goes on from here")
        finish(sweep, study, alone)
    except (ValueError, OSError, TrialFailedError, TeacherDiedError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
