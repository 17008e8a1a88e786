"""What a run learns from: which pictures, in which order, through which views, for how many steps.

All of it follows from the settings and the data set; nothing here knows a network or asks a teacher. What does not fit
the data set is refused here, before a teacher is waited for.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from data_prep.index import Index
from student_trainer.config import Config
from student_trainer.loader import Lesson
from student_trainer.schedule import Schedule, num_steps, warmup_of
from student_trainer.world import World
from views.draw import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Course:
    """The lessons of one process."""

    index: Index
    """Pictures to learn from."""
    eval_index: Index
    """Pictures to evaluate on; the same object unless they are of another data set."""
    plan: Plan
    """What the student sees of the whole batch."""
    asked_plan: Plan
    """What live teachers see of it; the same object unless their crops are their own (ind/*)."""
    first_row: int
    """Where this process's share of the batch begins."""
    num_rows: int
    """How many rows of the batch are this process's."""
    schedule: Schedule

    def lesson(self, step: int) -> Lesson:
        """What this process looks at in a step."""
        share = self.first_row, self.first_row + self.num_rows
        rows = self.plan.rows(step, *share)
        return Lesson(step, rows, rows if self.asked_plan is self.plan else self.asked_plan.rows(step, *share))


def course_of(config: Config, world: World) -> Course:
    """Open the data sets and lay out the steps.

    Raises:
        ValueError: no data set, a split that it does not have, pictures without labels where labels are to be learned,
            or a batch that cannot be shared out.
        FileNotFoundError: a data set's folder or shard is not there.
    """
    if config.data.root == Path():
        raise ValueError(
            f"which pictures? {config.recipe} names none: give --data DIR, a folder that `funmatch prepare` wrote"
        )
    index = Index.open(config.data.root)
    elsewhere = config.data.evaluate_root
    eval_index = Index.open(elsewhere) if elsewhere else index
    for of, split in ((index, config.data.train), (eval_index, config.data.evaluate)):
        if split not in of.splits:
            raise ValueError(
                f"{of.root} has no split {split!r}; it has {list(of.splits)}. Choose one by --data.evaluate, or "
                "prepare own pictures with --hold-out 0.1, which makes a split val"
            )
    samples = index.splits[config.data.train]
    if config.targets == "labels":
        if elsewhere:
            raise ValueError("--targets labels evaluates on the data set whose labels it learns: no evaluate_root")
        if not index.classes or (index.label[samples.start : samples.stop] < 0).any():
            raise ValueError(
                f"{config.data.root} has pictures without labels; --targets labels needs them all: learn from a "
                "teacher (--teacher HOST:PORT), which needs none, or prepare class folders"
            )
    if config.optim.batch_size % world.size:
        raise ValueError(f"--optim.batch-size {config.optim.batch_size} is no multiple of {world.size} processes")
    plan = Plan(
        seed=config.seed, batch_size=config.optim.batch_size, law=config.views.student,
        samples=samples, height=index.height, width=index.width,
    )  # fmt: skip
    steps = num_steps(config.optim.epochs, len(samples), config.optim.batch_size)
    num_rows = config.optim.batch_size // world.size
    return Course(
        index=index,
        eval_index=eval_index,
        plan=plan,
        # ind/: the teacher looks at the same pictures in the same order, through crops and flips of its own.
        asked_plan=dataclasses.replace(plan, stream="teacher") if config.views.kind == "ind" else plan,
        first_row=world.rank * num_rows,
        num_rows=num_rows,
        schedule=Schedule(
            num_steps=steps,
            warmup_steps=warmup_of(config.optim.warmup_steps, steps),
            decay=config.optim.decay,
            stairs=config.optim.stairs,
        ),
    )
