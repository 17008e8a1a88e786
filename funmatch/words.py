"""The words of the front door: for each what it does, an example, and which room answers.

Every setting is explained by the room that has it; here is what one wants to know before. Rejected: one parser of
subcommands over all settings. It would import every room to say one sentence, and each setting would have two homes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Word:
    """One word of the door."""

    does: str
    """In a line."""
    module: str
    """The room's main: a module for `python -m`, or of this package, with main(argv) -> exit code."""
    needs: tuple[str, ...] = ()
    """Packages without which it cannot begin; looked for and not imported."""
    extra: str = ""
    """The extra of pyproject.toml that brings them."""
    example: str
    more: str = ""
    """Units and defaults that are worth knowing first; shown by --help."""
    says_more: bool = True
    """Whether the room's own --help comes within a second or two, and is shown after ours."""


WORDS = {
    "doctor": Word(
        does="check this machine, data, teachers, store and run folder; say what to do about each finding",
        module="funmatch.doctor",
        needs=("numpy",),
        example="funmatch doctor --data data/mine --teacher 127.0.0.1:50051 --run-dir runs/mine",
    ),
    "prepare": Word(
        does="pictures (archives, class folders, WebDataset shards) to shards with an index",
        module="data_prep.prepare",
        needs=("tyro", "PIL", "tqdm"),
        extra="data",
        example="funmatch prepare folder --source pictures --out data/mine",
        more="Sides of pictures are in pixels. By default a process per core, 1000 pictures in a shard, sizes kept.",
    ),
    "serve": Word(
        does="answer with a frozen teacher's logits over gRPC, until SIGTERM",
        module="teacher_server.main",
        needs=("tyro", "torch", "grpc", "grpc_health"),
        extra="teacher",
        example="funmatch serve --model teacher.safetensors --data data/mine --address 127.0.0.1:50051",
        more="Sizes: pixels; times: seconds. By default 127.0.0.1:50051, the GPU if there is one, float16 there.",
    ),
    "train": Word(
        does="distil a student, on one process or one per GPU; the same command goes on after a stop",
        module="student_trainer.main",
        needs=("tyro", "torch", "grpc"),
        extra="student",
        example="funmatch train --processes 8 --recipe flowers102/funmatch/10k --data data/flowers102 "
        "--teacher 127.0.0.1:50051",
        more="--recipe NAME     which run; `python -m student_trainer.recipes` lists them\n"
        "--processes N     ranks on this machine, one GPU each where there are GPUs; `gpu`: as many. Default: 1,\n"
        "                  without torchrun. Several machines: torchrun's own command line, see docs/deployment.md\n"
        "--tiny            the recipe in small: a minute on two cores\n"
        "--SETTING VALUE   changes the recipe; --recipe NAME --help lists all settings, with units and NAME's values.\n"
        "                  Batches are rows over all ranks, lengths epochs, sizes pixels, times seconds.",
    ),
    "study": Word(
        does="the consistency study: every view setting and seed as a run of its own, beside one teacher",
        module="benchmarks.study",
        needs=("benchmarks", "tyro", "torch"),
        extra="student",
        example="funmatch study --data data/flowers102 --teacher teacher/model.safetensors --out runs/study",
        more="Hours on two cores; by default all eight settings, seeds 0 and 1, two runs at a time.",
    ),
    "report": Word(
        does="what happened in one run or several: a page with curves, numbers, differences",
        module="student_trainer.report",
        needs=("matplotlib", "numpy"),
        extra="student",
        example="funmatch report runs/flowers102 runs/another --out runs/page",
        more="Runs may be going on. By default the page goes into the first run's folder.",
    ),
    "views": Word(
        does="a sheet of what student and teacher saw at a step of a run, from the plan alone",
        module="funmatch.views_sheet",
        needs=("PIL", "torch"),
        extra="student",
        example="funmatch views --recipe digits/demo --step 100",
    ),
    "plan": Word(
        does="how many teachers keep how many students busy, and what a run costs, before a GPU is rented",
        module="benchmarks.plan",
        needs=("benchmarks", "tyro", "torch"),
        extra="student",
        example="funmatch plan --recipe imagenet/funmatch/9600 --teacher-rate 3000 --student-rate 8250",
        more="--recipe NAME           which run; needed. --tiny: in small. --SETTING VALUE changes it, as at train\n"
        "--teacher-rate ROWS     rows a second of a teacher GPU, a number per teacher. Default: measured here\n"
        "--student-rate ROWS     rows a second of a student GPU, while training. Default: measured here\n"
        "--decode-rate VIEWS     views a second that one core decodes. Default: measured here\n"
        "--gpus N [N ...]        GPUs of the student. Default: 1 8 32\n"
        "--cores N               that decode beside each GPU. Default: enough\n"
        "--pictures N            of the training split, --classes N of the teacher, --picture-bytes BYTES of a file,\n"
        "                        on average: where they are neither here nor known by their names\n"
        "--json FILE             the answer there, too",
        says_more=False,  # its imports take as long as the answer
    ),
    "export": Word(
        does="a distilled student for others: safetensors that timm loads with a model card, ONNX with a parity check",
        module="funmatch.export",
        needs=("torch", "timm"),
        extra="export",
        example="funmatch export runs/flowers102 --out exported/flowers102 --onnx",
        more="RUN               the folder of a finished run; needed\n"
        "--out DIR         folder to make, which must not exist; needed\n"
        "--onnx            model.onnx too. Default: no\n"
        "--only-onnx       model.onnx and nothing for timm. Default: no",
        says_more=False,
    ),
    "completion": Word(
        does="print what makes TAB complete these words and their settings, for bash, zsh or fish",
        module="funmatch.completion",
        example="funmatch completion bash > ~/.local/share/bash-completion/completions/funmatch",
        more="A few seconds: once, and anew after an upgrade.",
        says_more=False,
    ),
}
