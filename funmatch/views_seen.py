"""What both sides of a run saw at one step: computed again from the plan, and compared with whatever can be asked.

The teacher's half is what the same renderer makes here at the teacher's size, unless a teacher is there to vouch for
its own pixels. Nothing here is drawn.

Rejected: running the loader. It reads ahead, asks for logits, and knows no single step.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.index import Index
from student_trainer import metrics
from student_trainer.audit import teacher_rendering
from student_trainer.config import Config
from student_trainer.fleet import Fleet
from student_trainer.pictures import Pictures
from student_trainer.record import Run
from student_trainer.schedule import num_steps
from student_trainer.teachers import fleets
from student_trainer.tiny import teacher_sizes
from views.draw import Plan
from views.mix import mix
from views.render import MAX_PIXEL_DIFFERENCE, RENDER_VERSION, Renderer, Rendering
from views.view import Rows, view_digest


@dataclass(frozen=True, eq=False)
class Vouched:
    """What a teacher that was asked said of the views."""

    digests: tuple[str, ...]
    """[V]."""
    difference: tuple[int, ...]
    """[V] largest difference from what is rendered here, grey levels."""
    bound: int
    """The largest that is still the same view."""


@dataclass(frozen=True, eq=False)
class Look:
    """One side's look at the rows. Legend: R rows, V views, S pixels a side."""

    name: str
    size: int
    rows: Rows
    views: NDArray[np.uint8]
    """[V, S, S, 3], each alone."""
    mixed: NDArray[np.uint8]
    """[R, S, S, 3], as the network sees them but for the normalisation."""
    digests: tuple[str, ...]
    """[V]."""
    vouched: Vouched | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """One step."""

    config: Config
    step: int
    first_row: int
    index: Index
    looks: tuple[Look, ...]
    """The student's, then each teacher's."""
    of_many: int
    """fix/ic_ens: the teacher's answer is the average over so many views, of which the first is shown; else 1."""
    on_record: float | None
    """view_mismatch of this step in the run's record, if the run compared views then."""

    @property
    def num_rows(self) -> int:
        """How many rows are shown."""
        return len(self.looks[0].rows)

    @property
    def differs(self) -> bool:
        """Whether a teacher saw something else than it should."""
        return any(max(look.vouched.difference) > look.vouched.bound for look in self.looks if look.vouched)

    def verdict(self) -> str:
        """What was compared, in a sentence or two."""
        told = []
        for look in self.looks:
            if look.vouched:
                worst, num = max(look.vouched.difference), len(look.digests)
                told.append(
                    f"{look.name} rendered the same pixels: the digests of all {num} views are equal." if worst == 0
                    else f"{look.name} rendered other pixels: they differ by up to {worst} grey levels, of which "
                    f"{look.vouched.bound} are allowed."
                )  # fmt: skip
        if not told and len(self.looks) > 1:
            told.append(
                "No teacher was asked: its views were rendered here, at its size, from the same plan. "
                "--teacher HOST:PORT asks a running one."
            )
        if self.on_record is not None:
            told.append(
                "The run itself compared views with its teacher at this step: the largest difference was "
                f"{self.on_record:g} grey levels."
            )
        return " ".join(told) or "This run learns from labels: there is no teacher to compare with."


def look(config: Config, step: int, rows: range, run_dir: Path | None, sizes: tuple[int, ...]) -> Seen:
    """See again what rows of a step's global batch showed.

    Args:
        config: of the run. Teachers that it names are asked; without, the teacher's half is rendered here.
        step: updates done before.
        rows: of the global batch.
        run_dir: the run's folder, for what is on record there.
        sizes: of the teachers' views, pixels; empty: as on record, or the recipe's.

    Raises:
        ValueError: a step or rows that the run has not; another data set than the run's.
        TeacherError: a teacher that does not answer, or is of another kind.
        PictureError: a picture that does not decode.
    """
    run = Run(run_dir) if run_dir else None
    index = Index.open(config.data.root)
    if config.data.train not in index.splits:
        raise ValueError(f"{index.root} has no split {config.data.train!r}; it has {list(index.splits)}")
    plan = Plan(
        seed=config.seed, batch_size=config.optim.batch_size, law=config.views.student,
        samples=index.splits[config.data.train], height=index.height, width=index.width,
    )  # fmt: skip
    _refuse_what_is_not_of_the_run(config, plan, index, step, rows, run)
    shown = plan.rows(step, rows.start, rows.stop)
    asked = _asked(config, plan, index, step, rows, shown)
    rendering = Rendering(
        size=config.student.size, interpolation=config.student.interpolation, antialias=config.student.antialias
    )
    looks = [_look("the student", shown, index, rendering)]
    if config.targets == "teacher":
        if config.teacher.addresses:
            looks += _ask(config, asked, index, rendering)
        else:
            sizes = sizes or _sizes_on_record(run) or teacher_sizes(config)
            names = [f"teacher {number}" if len(sizes) > 1 else "the teacher" for number in range(1, len(sizes) + 1)]
            looks += [
                _look(name, asked, index, dataclasses.replace(rendering, size=size))
                for name, size in zip(names, sizes, strict=True)
            ]
    of_many = config.views.fixed.num_views if config.views.kind == "fix" else 1
    return Seen(config, step, rows.start, index, tuple(looks), of_many, _on_record(run, step))


def _refuse_what_is_not_of_the_run(
    config: Config, plan: Plan, index: Index, step: int, rows: range, run: Run | None
) -> None:
    total = num_steps(config.optim.epochs, len(plan.samples), config.optim.batch_size)
    if not 0 <= step < total:
        raise ValueError(f"--step is {step}; this run has the steps 0 to {total - 1}")
    if rows.start < 0 or rows.stop > config.optim.batch_size:
        raise ValueError(
            f"rows {rows.start} to {rows.stop - 1}: a batch of this run has the rows 0 to {config.optim.batch_size - 1}"
            " (--first-row, --rows)"
        )
    if run is None:
        return
    num_train, there = run.facts.get("num_train"), len(plan.samples)
    teachers = run.facts.get("teacher") or []
    known = {each["digest"] for teacher in teachers for each in teacher.get("data_sets", [])}
    if (num_train is not None and num_train != there) or (known and index.digest not in known):
        raise ValueError(
            f"{index.root} is not the data set that {run.folder} learned from (digest {index.digest[:12]}, {there} "
            f"pictures in {config.data.train!r}; the run had {num_train}): give the right one by --data"
        )
    versions = {teacher["rendering"]["version"] for teacher in teachers if teacher.get("rendering", {}).get("version")}
    if versions - {RENDER_VERSION}:
        raise ValueError(
            f"{run.folder} was rendered by {', '.join(sorted(versions))}, and this is {RENDER_VERSION}: the same box "
            "has other pixels now. Look at it with the version it was made by"
        )


def _asked(config: Config, plan: Plan, index: Index, step: int, rows: range, shown: Rows) -> Rows:
    """What the teacher looks at: the same, or by draws of its own (ind/), or what never changes (fix/)."""
    if config.views.kind == "ind":
        return dataclasses.replace(plan, stream="teacher").rows(step, rows.start, rows.stop)
    if config.views.kind == "fix":
        first = dataclasses.replace(config.views.fixed, num_views=1)
        return first.rows(shown.sample[: len(shown)], index.height, index.width)
    return shown


def _look(name: str, rows: Rows, index: Index, rendering: Rendering) -> Look:
    renderer = Renderer(rendering, rows.num_views, None, num_threads=1)
    pixels = Pictures(index, rows).render(renderer, rows)
    partner, lam = torch.from_numpy(rows.partner).long(), torch.from_numpy(rows.lam)
    mixed = mix(pixels, partner, lam, (0, 0, 0), (1, 1, 1)).permute(0, 2, 3, 1)
    views = pixels.numpy()
    return Look(
        name, rendering.size, rows, views, (mixed * 255).round().to(torch.uint8).numpy(),
        tuple(view_digest(view).hex() for view in views),
    )  # fmt: skip


def _ask(config: Config, asked: Rows, index: Index, rendering: Rendering) -> list[Look]:
    addresses = [entry.split(",") for entry in config.teacher.addresses]
    looks = []
    with contextlib.ExitStack() as cleanup:
        for fleet in cleanup.enter_context(fleets(config, addresses, index.digest, "views sheet")):
            one = _look(
                f"teacher {fleet.description.model}", asked, index, teacher_rendering(fleet.description, rendering)
            )
            looks.append(dataclasses.replace(one, vouched=_vouched(fleet, one, index)))
    return looks


def _vouched(fleet: Fleet, own: Look, index: Index) -> Vouched:
    num = own.rows.num_views
    answer = fleet.ask(
        own.rows.alone(0, num), picture=lambda sample: index.read([sample])[0].tobytes(), pixels=own.views,
        num_audits=num, audit_pixels=True,
    )  # fmt: skip
    answer.result()
    audit = answer.audit()
    assert audit is not None
    assert audit.pixels is not None
    apart = np.abs(own.views.astype(np.int16) - audit.pixels.astype(np.int16)).reshape(num, -1).max(axis=1)
    bound = MAX_PIXEL_DIFFERENCE["cuda" if fleet.description.rendering.decoder == "gpu" else "cpu"]
    return Vouched(tuple(digest.tobytes().hex() for digest in audit.digests), tuple(apart.tolist()), bound)


def _sizes_on_record(run: Run | None) -> tuple[int, ...]:
    teachers: list[dict[str, Any]] = (run.facts.get("teacher") or []) if run else []
    return tuple(int(teacher["rendering"]["size"]) for teacher in teachers if teacher.get("rendering", {}).get("size"))


def _on_record(run: Run | None, step: int) -> float | None:
    """A line tells how many updates were done after its step."""
    lines = metrics.read(run.folder) if run else []
    told = [line.get("view_mismatch") for line in lines if line["step"] == step + 1]
    return next((float(value) for value in told if value is not None), None)
