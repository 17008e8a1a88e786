"""The likeliest mistakes, made with the real commands: each is a sentence that says what and what to do, a code that is
not 0, and no traceback.

Each command runs as a process of its own, forked from one that has imported torch and DALI: five seconds once and not
thirty times.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import serve
from data_prep.prepare import prepare
from make_pictures import jpeg, write_files

ROOT = Path(__file__).resolve().parents[1]

FORKS = """
import json, os, runpy, sys, traceback
import student_trainer.train, teacher_server.server, data_prep.layouts, data_prep.shards, student_trainer.report
from funmatch.words import WORDS

def run(args, folder, environment, prelude):
    os.chdir(folder); os.environ.update(environment)
    exec(prelude, {})
    try:
        if args[0] == "train":
            sys.argv = [ROOT + "/student_trainer/main.py", *args[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.argv = [args[0], *args[1:]]
            runpy.run_module(WORDS[args[0]].module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0

ROOT = sys.argv[1]
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        said = os.open(asked.pop("said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1); os.dup2(said, 2)
        code = run(**asked)
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Desk:
    """A folder with pictures, data sets and models in it, at which commands are given."""

    folder: Path
    process: subprocess.Popen
    teachers: dict[str, str]
    taken: int
    """A port at which somebody listens."""

    def say(self, command: str, prelude: str = "", **environment: str) -> tuple[int, str]:
        """Run a command; its exit code, and what it said, in one line."""
        places = {**self.teachers, "taken": self.taken}
        said = self.folder / "said"
        args = [word.format(**places) for word in command.split()]
        asked = {"args": args, "folder": str(self.folder), "environment": environment, "prelude": prelude}
        self.process.stdin.write(json.dumps({**asked, "said": str(said)}) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return code, " ".join(said.read_text().replace("│", " ").split())


@pytest.fixture(scope="module")
def closed(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses of servers that do not let everybody in: one wants a token, one TLS. Neither has a model."""
    from teacher_server.config import Config
    from teacher_server.server import create_server

    folder = tmp_path_factory.mktemp("closed")
    (folder / "token").touch(0o600)
    (folder / "token").write_text("the-right-one-of-all")
    tls = {"tls_cert": keys / "server.pem", "tls_key": keys / "server.key"}
    places = {"guarded": {"token_file": folder / "token"}, "tls": tls}
    made = {
        name: create_server(Config(model="none", address="127.0.0.1:0", device="cpu", **files))
        for name, files in places.items()
    }
    yield {name: address for name, (_, address) in made.items()}
    for server, _ in made.values():
        server._server.stop(None).wait()


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path, large_model: Path,
    closed: dict[str, str],
):  # fmt: skip
    folder = tmp_path_factory.mktemp("desk")
    lay_out(folder, tiny_data)
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    models = (tiny_model, tiny_data), (large_model, tiny_data)
    with serve(*models) as (first, second), socket.create_server(("127.0.0.1", 0)) as somebody:
        yield Desk(folder, process, {"first": first, "second": second, **closed}, somebody.getsockname()[1])
    with process:  # closes its standard input, at whose end it ends
        pass


def lay_out(folder: Path, tiny_data: Path) -> None:
    shutil.copytree(tiny_data, folder / "data")
    shutil.copytree(tiny_data, folder / "moved")
    (folder / "moved" / "train-000000.tar").unlink()
    shutil.copytree(tiny_data, folder / "rotten")
    for shard in (folder / "rotten").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    pictures = {f"{name}/{number}.jpg": jpeg(number) for name in ("ant", "bee") for number in range(4)}
    write_files(folder / "pictures", pictures)
    prepare("folder", folder / "pictures", folder / "animals", workers=1, progress=False, hold_out=0.25)
    for split in ("train", "val"):
        (folder / "crawled").mkdir(exist_ok=True)
        with tarfile.open(folder / "crawled" / f"{split}-0.tar", "w") as shard:
            for number in range(8):
                shard.add(folder / "pictures" / "ant" / f"{number % 4}.jpg", f"{split}{number}.jpg")
    prepare("shards", folder / "crawled", folder / "unlabelled", workers=1, progress=False)
    (folder / "wrong_token").touch(0o600)
    (folder / "wrong_token").write_text("another-one-altogether")
    (folder / "teacher.pth").write_bytes(b"a pickle")
    (folder / "empty").mkdir()
    (folder / "corrupt" / "cats").mkdir(parents=True)
    (folder / "corrupt" / "cats" / "1.jpg").write_bytes(b"no picture")
    (folder / "file").write_text("a file")
    (folder / "junk.safetensors").write_bytes(b"no weights" * 9)


TRAIN = (
    "train --recipe digits/demo --device cpu --run-dir {run} --data data --data.evaluate val --student.size 32 "
    "--student.architecture resnetv2_14x05_bit --optim.batch-size 6 --optim.epochs 1 --optim.warmup-steps 1 "
    "--teacher.patience-s 1 "
)
LOCAL = "--address 127.0.0.1:0 --device cpu "

MISTAKES = {
    # of preparing
    "a source that is not there": (
        "prepare folder --source nowhere --out new",
        "not a folder; give the one that holds",
    ),
    "a source without pictures": ("prepare folder --source empty --out new", "no pictures"),
    "no picture decodes": ("prepare folder --source corrupt --out new --workers 1", "decodes; the first: cats/1.jpg"),
    "a data set by the wrong name": ("prepare flowers --out new", "Expected one of ('flowers102',"),
    "no source where none can be downloaded": ("prepare folder --out new", "pass --source FOLDER"),
    "an output that is something else": ("prepare digits --out file", "choose another --out or remove it"),
    "an output that cannot be": (
        "prepare digits --out file/new",
        "cannot be made (File exists",
    ),
    # of serving
    "a port that is taken": (
        "serve --model junk.safetensors --address 127.0.0.1:{taken}",
        "somebody listens there already: end that, or choose another --address",
    ),
    "weights that are not there": (f"serve {LOCAL} --model nowhere.safetensors", "no such weight file: nowhere"),
    "weights that are none": (f"serve {LOCAL} --model junk.safetensors", "not a .safetensors file"),
    "a model by the wrong name": (f"serve {LOCAL} --model resnet5O", "the nearest known names are"),
    "a pickle as a teacher": (f"serve {LOCAL} --model teacher.pth", "runs code when it is opened; convert it to"),
    "views too large": (f"serve {LOCAL} --model junk.safetensors --size 2000", "--size must lie in 16..1024, got 2000"),
    "a teacher without its data": (f"serve {LOCAL} --model junk.safetensors --data empty", "make one with"),
    "a teacher in public": (
        "serve --model junk.safetensors --address 0.0.0.0:0",
        "give --tls-cert FILE --tls-key FILE",
    ),
    "a teacher's GPU that is not there": (
        "serve --model junk.safetensors --address 127.0.0.1:0 --device cuda",
        "this machine has 0 CUDA devices",
    ),
    # of training
    "no recipe of that name": ("train --recipe digits/demmo", "Did you mean digits/demo"),
    "a typing error in a setting": (TRAIN + "--optim.epoch 3", "Did you mean --optim.epochs"),
    "a word for a number": (TRAIN + "--optim.epochs many", "could not convert string to float: 'many'"),
    "a number out of range": (TRAIN + "--optim.lr 0", "it must be greater than 0"),
    "a student by the wrong name": (TRAIN + "--student.architecture resnet5O", "the nearest known names are"),
    "a student's views too large": (TRAIN + "--student.size 4096", "--student.size is 4096; give 8 to 1024 pixels"),
    "epochs shorter than the warm-up": (
        TRAIN + "--optim.warmup-steps 100",
        "warmup_steps is 100, but the run has 3 steps: give it at least 0 and fewer",
    ),
    "no data folder": (
        "train --recipe own/student --device cpu --run-dir {run}",
        "which pictures? own/student names none",
    ),
    "the wrong data folder": (
        TRAIN + "--data empty",
        "empty holds no prepared data set (no dataset.json); make one with",
    ),
    "shards that were moved": (TRAIN + "--data moved", "train-000000.tar is missing; prepare or copy the set again"),
    "shards that rotted": (TRAIN + "--data rotten --targets labels", "re-reads a data set; prepare it anew"),
    "a split that is not there": (TRAIN + "--data.evaluate test", "has no split 'test'; it has ['train', 'val']"),
    "a GPU that is not there": (TRAIN + "--device cuda", "or use --device cpu"),
    "a folder that cannot be": (
        TRAIN + "--run-dir file/new",
        "cannot be made (Not a directory); choose another folder",
    ),
    "no teacher": (TRAIN + "--teacher.model", "give the addresses of running ones (--teacher HOST:PORT)"),
    "a teacher that is not reachable": (TRAIN + "--teacher 127.0.0.1:1", "127.0.0.1:1"),
    "an address that is none": (
        TRAIN + "--teacher localhost",
        "give HOST:PORT, HOST:FIRST-LAST, unix:/PATH or dns:///NAME:PORT",
    ),
    "one teacher given as two": (TRAIN + "--teacher {first} {first}", "replicas of one teacher are given with commas"),
    "a teacher of other classes": (
        TRAIN + "--teacher {first} --data animals --optim.warmup-steps 0",
        "the teacher has 6 classes, animals 2: is it a teacher for this data set?",
    ),
    "pictures without labels and no teacher": (
        TRAIN + "--targets labels --data unlabelled --optim.warmup-steps 0",
        "has pictures without labels; --targets labels needs them all: learn from a teacher",
    ),
    "a token that is not the teacher's": (
        TRAIN + "--teacher {guarded} --teacher.token-file wrong_token",
        "--teacher.token-file",
    ),
    "no token": (TRAIN + "--teacher {guarded}", "--teacher.token-file"),
    "a teacher that wants TLS": (TRAIN + "--teacher {tls}", "does it want TLS? --teacher.tls-ca"),
    "a key that is not there": (TRAIN + "--teacher {tls} --teacher.tls-ca nowhere", "--teacher.tls-ca"),
    "a teacher that renders otherwise": (
        TRAIN + "--teacher {first} --student.antialias",
        "Start it with the same --interpolation and --antialias",
    ),
    "a store that is not reachable": (
        TRAIN + "--teacher {first} --views.setting fix/cc --teacher.store redis://127.0.0.1:1",
        "choose another store",
    ),
    "a batch that cannot be divided": (TRAIN + "--optim.batch-size 0", "--optim.batch-size is 0"),
    # of looking at it
    "a report of nothing": ("report empty", "is it the folder of a run?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence_and_no_traceback(desk: Desk, mistake: str, tmp_path: Path) -> None:
    command, sentence = MISTAKES[mistake]
    code, said = desk.say(command.replace("{run}", str(tmp_path)))
    assert sentence in said
    assert code not in (0, 70)
    assert "Traceback" not in said


@pytest.mark.suite
def test_a_run_does_not_go_on_with_other_settings_data_or_teachers(desk: Desk, tmp_path: Path) -> None:
    train = TRAIN.replace("{run}", str(tmp_path))
    assert desk.say(train + "--teacher {first}")[0] == 0
    for other, sentence in (
        ("--teacher {first} --optim.lr 0.5", "optim.lr: 0.003 in the checkpoint, 0.5 now"),
        ("--teacher {second}", "in the checkpoint"),
    ):
        # Of a finished run the numbers are said again, whoever asks.
        (tmp_path / "summary.json").unlink(missing_ok=True)
        code, said = desk.say(train + other)
        assert (code, "Traceback" in said) == (1, False)
        assert sentence in said
        assert "or start a new run in another folder" in said


# What a machine without GPUs, and a test of seconds, can only act: (settings, what befalls the run, what is said).
BEFALLEN = {
    "a full GPU": (
        "",
        "import torch, student_trainer.train\n"
        "def train(*_): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')\n"
        "student_trainer.train.train = train",
        "out of GPU memory with 6 rows of --optim.batch-size 6 on each GPU: CUDA out of memory. Tried to allocate 2.00 "
        "GiB. Try more GPUs, --precision bfloat16, a smaller batch",
    ),
    "too little shared memory": (
        "",
        "import torch, student_trainer.train\n"
        "def train(*_):\n"
        "    raise torch.distributed.DistBackendError('NCCL error: unhandled system error\\nLast error:\\n'\n"
        "        'Error while creating shared memory segment /dev/shm/nccl-1: No space left on device')\n"
        "student_trainer.train.train = train",
        "the ranks of this run cannot speak with each other: NCCL error: unhandled system error Last error: Error "
        "while creating shared memory segment /dev/shm/nccl-1: No space left on device. /dev/shm is too small: docker "
        "run --shm-size 1g, or shm_size in compose",
    ),
    "a full disk": (
        "--targets labels",
        "import errno, torch\ndef save(*_): raise OSError(errno.ENOSPC, 'No space left on device')\ntorch.save = save",
        "for the checkpoint of step 3; there are whole ones of step (none): make room, or move the run's folder",
    ),
    "a teacher of another release": (
        "--teacher {first}",
        "import student_trainer.audit\nstudent_trainer.audit.RENDER_VERSION = 'funmatch-render-0'",
        "this run with interpolation linear, antialias False, version funmatch-render-0. Start it with the same "
        "--interpolation and --antialias, from the same release",
    ),
    "Weights & Biases without its package": (
        "--wandb mine --teacher 127.0.0.1:1",
        "import importlib.util\nimportlib.util.find_spec = lambda name: None",
        "--wandb needs a package that is not here: pip install 'funmatch[wandb]'",
    ),
    "Weights & Biases without a key": (
        "--wandb mine --teacher 127.0.0.1:1",
        "import os\n[os.environ.pop(name, None) for name in ('WANDB_API_KEY', 'WANDB_MODE')]\n"
        "os.environ['HOME'] = os.environ['NETRC'] = 'empty'",
        "does not know who you are. Say `wandb login` once on this machine",
    ),
}


@pytest.mark.parametrize("befallen", BEFALLEN)
def test_what_befalls_a_run_gets_a_sentence_and_no_traceback(desk: Desk, befallen: str, tmp_path: Path) -> None:
    more, prelude, sentence = BEFALLEN[befallen]
    code, said = desk.say(TRAIN.replace("{run}", str(tmp_path)) + more, prelude=prelude)
    assert sentence in said
    assert code == 1
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("prepare folder --source nowhere --out new", 70),
        (f"serve {LOCAL} --model nowhere.safetensors", 2),
        ("train --recipe digits/demo --device cpu --data empty --run-dir {run}", 70),
    ],
)
def test_who_asks_for_the_traceback_gets_it(desk: Desk, command: str, code: int, tmp_path: Path) -> None:
    found, said = desk.say(command.replace("{run}", str(tmp_path)), FUNMATCH_TRACEBACK="1")
    assert (found, "Traceback" in said) == (code, True)
