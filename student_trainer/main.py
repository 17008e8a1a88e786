"""The door: `torchrun student_trainer/main.py --recipe NAME [--setting value ...]`, or plain python for one process.

torchrun --nproc-per-node=2 student_trainer/main.py --recipe digits/demo --teacher 127.0.0.1:50051
python student_trainer/main.py --recipe digits/demo --help
python student_trainer/main.py --recipe imagenet/ensemble/9600 --tiny      # a minute on two cores: see tiny.py
"""

import sys
from pathlib import Path

if not __package__:
    # As a script, torchrun's too, this folder is first on the path: its files would shadow the standard library's, and
    # the rooms beside it would not be found. The repository's root takes its place.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import difflib
import os
import signal
from typing import NoReturn

# Threads that spin at a barrier steal the cores of the teacher, or of whoever else is on this machine: with both
# cores of a two-core machine in use, a step of two spinning threads took 3.7 s that takes 0.2 s alone. Effective
# only before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from student_trainer import log
from student_trainer.config import Config, override
from student_trainer.recipes import RECIPES

STOPPED = 128 + signal.SIGTERM
"""A run that a signal to any of its processes stopped is not done: where torchrun's agent of one host was told to stop,
those of the others must not take this for an end, but wait for it to come back (--max-restarts) and go on."""


def parse(args: list[str]) -> tuple[Config, bool]:
    """The recipe's config with the command line's settings, and whether it was made tiny."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", metavar="NAME")
    parser.add_argument("--tiny", action="store_true")
    chosen, rest = parser.parse_known_args(args)
    if not chosen.recipe:
        sys.exit("which recipe? give --recipe NAME; there are:\n  " + "\n  ".join(RECIPES))
    if chosen.recipe not in RECIPES:
        guess = difflib.get_close_matches(chosen.recipe, RECIPES, n=3)
        hint = f" Did you mean {' or '.join(guess)}?" if guess else ""
        sys.exit(f"no recipe is called {chosen.recipe!r}.{hint} `python -m student_trainer.recipes` lists them")
    config = RECIPES[chosen.recipe].config
    if chosen.tiny:
        from student_trainer.tiny import tiny  # imports torch, which --help is quicker without

        config = tiny(config)
    return override(config, rest), chosen.tiny


def main() -> None:
    """Run a recipe. Exit code 1, with a sentence and no traceback, for what the caller can mend; STOPPED if not done.

    FUNMATCH_TRACEBACK=1 in the environment asks for the traceback.
    """
    config, is_tiny = parse(sys.argv[1:])
    rank = int(os.environ.get("RANK", 0))
    log.set_up(config.log_format, rank)
    # After the settings are known to be right: these import torch and DALI.
    import torch

    from student_trainer import world
    from student_trainer.fleet import TeacherError
    from student_trainer.local_teacher import TeacherDiedError
    from student_trainer.logit_store import StoreGoneError
    from student_trainer.pictures import PictureError
    from student_trainer.tiny import SHRINKS, make_parts
    from student_trainer.train import NonFiniteLossError, train

    expected = ValueError, OSError, TeacherError, TeacherDiedError, StoreGoneError, PictureError, NonFiniteLossError
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _give_up(rank, f"--run-dir {config.run_dir} cannot be made ({error.strerror}); choose another folder", error)
    try:
        with world.join(config.device) as processes:
            if is_tiny:
                if processes.is_main:
                    print(SHRINKS, flush=True)
                    make_parts(config)
                processes.barrier()
            summary = train(config, processes)
            if summary.get("stopped"):
                sys.exit(STOPPED)
            if processes.is_main:
                from student_trainer.report import print_table  # and matplotlib

                print_table(summary)
    except torch.OutOfMemoryError as error:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        share = f"{config.optim.batch_size // ranks} rows of --optim.batch-size {config.optim.batch_size} on each GPU"
        cure = "more GPUs, --precision bfloat16, a smaller batch or --student.size; nvidia-smi says who else is there"
        _give_up(rank, f"out of GPU memory with {share}: {str(error).splitlines()[0]} Try {cure}", error)
    except torch.distributed.DistError as error:  # of NCCL, or of a rank that has gone
        _give_up(rank, f"the ranks of this run cannot speak with each other: {_why_not(str(error))}", error)
    except expected as error:
        _give_up(rank, f"{type(error).__name__}: {error}", error)


def _why_not(said: str) -> str:
    """What torch.distributed says in a page, in a sentence, and what to do."""
    reason = " ".join(said.split())[-500:]
    if "shared memory" in said or "/dev/shm" in said:  # noqa: S108  (where NCCL's ranks of a machine meet)
        return f"{reason}. /dev/shm is too small: docker run --shm-size 1g, or shm_size in compose"
    return f"{reason}. What another rank says may be the reason; `funmatch doctor` looks at GPUs and shared memory"


def _give_up(rank: int, sentence: str, error: Exception) -> NoReturn:
    if os.environ.get("FUNMATCH_TRACEBACK"):
        raise error
    sys.exit(f"rank {rank}: {sentence}")


if __name__ == "__main__":
    main()
