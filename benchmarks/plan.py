"""How many teachers keep how many students busy, and what a run costs, before anybody rents a GPU.

    python -m benchmarks.plan --recipe imagenet/funmatch/9600 --teacher-rate 3000 --student-rate 8250
    python -m benchmarks.plan --recipe digits/demo --tiny

Rates that are not given are measured here, on one GPU or on the CPU: rows a second of each teacher's forward pass and
of a training step, views a second that one core decodes. GPUs of a side are taken to be alike. Settings of the recipe
may follow, as at student_trainer/main.py: --optim.batch-size 1024, --views.setting fix/cc, --data DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.capacity import Answer, Demand, Eye, Rates, answer, demand_of, with_cores
from data_prep.index import DATASET_FILE, Index
from models import zoo
from student_trainer.config import Config, override
from student_trainer.recipes import RECIPES, imagenet, small
from student_trainer.tiny import make_parts, teacher_sizes, tiny
from teacher_server.gate import wire_dtype

_GPUS = (1, 8, 32)
_PICTURE_BYTES = 110_000.0  # of an ImageNet JPEG, mean
_PICTURES = {
    "imagenet": imagenet._NUM_TRAIN,
    **{one.name: one.num_train for one in (small.FLOWERS102, small.PETS, small.FOOD101, small.SUN397)},
}
"""Of training splits, by the name of their folder: for those that are not here."""
_MEASURED_S = 3.0


def main(args: Sequence[str] | None = None) -> None:
    """Ask, measure what is missing, answer."""
    asked, config = parse(args)
    index = _index(config)
    picture_bytes = asked.picture_bytes or (float(index.size.mean()) if index else _PICTURE_BYTES)
    teachers = _teachers(config, asked, index)
    demand = demand_of(
        config, _num_pictures(config, asked, index), teachers, picture_bytes=picture_bytes, ranks=max(asked.gpus)
    )
    rates, sources = _rates(config, asked, demand, index)
    answers = [answer(demand, rates, num) for num in asked.gpus]
    print("\n".join(screen(config, demand, rates, sources, picture_bytes, asked.cores, answers)))
    if asked.json:
        record = {
            "demand": dataclasses.asdict(demand) | {"images": demand.images},
            "rates": dataclasses.asdict(rates), "sources": sources, "picture_bytes": picture_bytes,
            "answers": [dataclasses.asdict(one) | {"gpu_hours": one.gpu_hours} for one in answers],
        }  # fmt: skip
        asked.json.write_text(json.dumps(record, indent=1, default=lambda dtype: np.dtype(dtype).name) + "\n")


def parse(args: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """The planner's own arguments, and the recipe's config."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    rate = _positive
    parser.add_argument("--recipe", required=True, metavar="NAME", help="python -m student_trainer.recipes lists them")
    parser.add_argument("--tiny", action="store_true", help="the recipe's tiny form")
    parser.add_argument("--teacher-rate", type=rate, nargs="+", metavar="ROWS", help="a second, one number a teacher")
    parser.add_argument("--student-rate", type=rate, metavar="ROWS", help="a second and GPU, while training")
    parser.add_argument("--decode-rate", type=rate, metavar="VIEWS", help="a second that one core decodes")
    parser.add_argument("--gpus", type=_whole, nargs="+", default=_GPUS, metavar="N", help="of the student")
    parser.add_argument("--cores", type=_whole, metavar="N", help="that decode beside each GPU; default: enough")
    parser.add_argument("--pictures", type=_whole, metavar="N", help="of the training split, where it is not here")
    parser.add_argument("--classes", type=_whole, metavar="N", help="of the teacher, where its name does not say it")
    parser.add_argument("--picture-bytes", type=rate, metavar="BYTES", help="of a picture's file, on average")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answer there, too")
    asked, rest = parser.parse_known_args(args)
    if asked.recipe not in RECIPES:
        parser.error(f"no recipe is called {asked.recipe!r}: python -m student_trainer.recipes lists them")
    config = RECIPES[asked.recipe].config
    config = override(tiny(config) if asked.tiny else config, rest)
    if config.targets == "labels":
        parser.error(f"{asked.recipe} learns from labels and has no teacher: there is nothing to plan")
    num_teachers = len(config.teacher.model) or 1
    if asked.teacher_rate and len(asked.teacher_rate) != num_teachers:
        parser.error(f"--teacher-rate has {len(asked.teacher_rate)} numbers, {asked.recipe} {num_teachers} teachers")
    if not asked.teacher_rate and not config.teacher.model:
        parser.error(
            f"{asked.recipe} does not name its teacher: give --teacher.model FILE to measure it, or --teacher-rate"
        )
    if asked.tiny:
        make_parts(config)
    return asked, config


def screen(
    config: Config, demand: Demand, rates: Rates, sources: dict[str, str], picture_bytes: float,
    cores: int | None, answers: Sequence[Answer],
) -> list[str]:  # fmt: skip
    """The answer, for people."""
    student = f"{config.student.architecture} at {config.student.size} px"
    who = " and ".join(f"{one.name} at {one.size} px" for one in demand.teachers)
    bounded = f", with {cores} cores that decode beside each GPU" if cores else ""
    lines = [
        f"{demand.recipe}: {student} learns from {who}",
        f"{demand.steps:,} steps of {demand.batch:,} rows: {demand.images:,} images, "
        f"{config.optim.epochs:,g} epochs of {demand.num_pictures:,} pictures of {picture_bytes:,.0f} bytes",
        f"rows/s of a GPU: student {_number(rates.student)} ({sources['student']}), "
        f"teacher {' and '.join(_number(rate) for rate in rates.teachers)} ({sources['teacher']}){bounded}",
        f"views/s of a core: {_number(rates.student_decodes)} at the student's size ({sources['decode']})",
        "a row at a teacher: " + "; ".join(
            f"{cost.views:.3f} views decoded, {cost.up['reference']:.0f} bytes up by reference, "
            f"{cost.up['encoded']:,.0f} as files, {cost.up['pixels']:,.0f} as pixels, {cost.down:,.0f} down"
            for cost in demand.costs
        ),
    ]  # fmt: skip
    if demand.fixed_views:
        hours = answers[0].fill_gpu_s / 3600
        lines.append(
            f"the teacher's views are fixed: filled once in {_number(hours)} GPU-hours; then no teacher is asked"
        )
    lines.append("")
    lines += _table(_columns(demand, rates, answers))
    return lines


def _columns(demand: Demand, rates: Rates, answers: Sequence[Answer]) -> list[tuple[str, list[str]]]:
    rows: list[tuple[str, list[str]]] = [("student GPUs", [f"{one.student_gpus}" for one in answers])]
    for place, teacher in enumerate(demand.teachers):
        exact = 0.0 if demand.fixed_views else rates.student / rates.teachers[place]
        name = "teacher GPUs" + (f", {teacher.name}" if len(demand.teachers) > 1 else "")
        rows.append((f"{name} ({exact:.3g} a student)", [f"{one.replicas[place]}" for one in answers]))
    rows += [
        ("images/s", [_number(one.images_per_s) for one in answers]),
        ("wall time", [_duration(one.wall_s) for one in answers]),
        ("GPU-hours, student", [_number(one.student_gpu_hours) for one in answers]),
        ("GPU-hours, teacher", [_number(one.teacher_gpu_hours) for one in answers]),
        ("GPU-hours, both", [_number(one.gpu_hours) for one in answers]),
        ("network to all teachers, by reference", [_speed(one.up["reference"]) for one in answers]),
        ("    as picture files", [_speed(one.up["encoded"]) for one in answers]),
        ("    as pixels", [_speed(one.up["pixels"]) for one in answers]),
        ("network from all teachers", [_speed(one.down) for one in answers]),
        ("to the busiest teacher, by reference", [_speed(_most(one, "reference")) for one in answers]),
        ("    as picture files", [_speed(_most(one, "encoded")) for one in answers]),
        ("    as pixels", [_speed(_most(one, "pixels")) for one in answers]),
        ("from the busiest teacher", [_speed(max(one.down_each)) for one in answers]),
        ("cores that decode for the students, if no GPU does", [_number(one.student_cores) for one in answers]),
        ("cores that decode beside each teacher", [_number(max(one.teacher_cores)) for one in answers]),
    ]
    return rows


def _table(rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    widths = [max(len(values[i]) for _, values in rows) + 3 for i in range(len(rows[0][1]))]
    first = max(len(name) for name, _ in rows)
    return [
        f"{name:{first}}" + "".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
        for name, values in rows
    ]


def _rates(
    config: Config, asked: argparse.Namespace, demand: Demand, index: Index | None
) -> tuple[Rates, dict[str, str]]:
    """What was given, and the rest measured; and which is which."""
    given = {"student": asked.student_rate, "teacher": asked.teacher_rate, "decode": asked.decode_rate}
    student, teachers, decodes = given.values()
    sizes = {config.student.size, *(one.size for one in demand.teachers)}
    where = "here"
    if not all(given.values()):
        from benchmarks import rates as measured  # torch and DALI: not for those who know their rates
        from teacher_server.model import be_reproducible, choose_device

        device = choose_device("auto")
        where = "on one GPU" if device.type == "cuda" else "on this CPU"
        student = student or measured.of_student(config, demand.teachers[0].num_classes, device, _MEASURED_S)
        if not teachers:
            be_reproducible(len(os.sched_getaffinity(0)))
            teachers = [
                measured.of_teacher(one.name, one.size, one.num_classes, device, _MEASURED_S) for one in demand.teachers
            ]
        views = {size: decodes or measured.of_decoding(config, size, index, _MEASURED_S) for size in sizes}
    else:
        views = dict.fromkeys(sizes, decodes)
    rates = Rates(
        teachers=tuple(teachers), student=student, student_decodes=views[config.student.size],
        teacher_decodes=tuple(views[one.size] for one in demand.teachers),
    )  # fmt: skip
    if asked.cores:
        rates = with_cores(demand, rates, asked.cores)
    return rates, {name: "given" if value else f"measured {where}" for name, value in given.items()}


def _teachers(config: Config, asked: argparse.Namespace, index: Index | None) -> list[Eye]:
    from teacher_server.model import choose_device, choose_precision

    precision = "float16" if asked.teacher_rate else choose_precision("auto", choose_device("auto"))
    names = config.teacher.model or ("its teacher",)
    sizes = _sizes(config)
    return [
        Eye(name=name, size=size, num_classes=_num_classes(name, asked, index), dtype=wire_dtype(precision))
        for name, size in zip(names, sizes, strict=True)
    ]


def _sizes(config: Config) -> tuple[int, ...]:
    """Tiny teachers say theirs in their cards; released ones in their names."""
    files = [Path(name) for name in config.teacher.model]
    if files and all(file.suffix == ".safetensors" and file.exists() for file in files):
        import models

        return tuple(models.load(str(file))[1].size for file in files)
    sizes = teacher_sizes(config)
    return sizes if len(sizes) == len(files) else sizes[:1] * max(1, len(files))


def _num_classes(name: str, asked: argparse.Namespace, index: Index | None) -> int:
    if name.startswith(zoo.PREFIX):
        return zoo.released(name).num_classes
    number = asked.classes or (len(index.classes) if index else 0)
    return number or sys.exit(f"how many classes has {name}? Give --classes N, or --data DIR with its data set")


def _num_pictures(config: Config, asked: argparse.Namespace, index: Index | None) -> int:
    number = asked.pictures or (len(index.splits[config.data.train]) if index else _PICTURES.get(config.data.root.name))
    return number or sys.exit(
        f"how many pictures has {config.data.root}? It is not here: give --pictures N, or --data DIR"
    )


def _index(config: Config) -> Index | None:
    return Index.open(config.data.root) if (config.data.root / DATASET_FILE).exists() else None


def _most(one: Answer, way: str) -> float:
    return max(up[way] for up in one.up_each)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _speed(bytes_per_s: float) -> str:
    for unit in ("B/s", "kB/s", "MB/s", "GB/s"):
        if bytes_per_s < 1000 or unit == "GB/s":
            break
        bytes_per_s /= 1000
    return f"{bytes_per_s:.3g} {unit}"


def _duration(seconds: float) -> str:
    for size, name in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {name}"
    return f"{seconds:.3g} s"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no rate: give a number above 0")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of things: give 1 or more")
    return int(text)


if __name__ == "__main__":
    main()
