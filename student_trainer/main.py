"""The door: `torchrun student_trainer/main.py --recipe NAME [--setting value ...]`, or plain python for one process.

torchrun --nproc_per_node=2 student_trainer/main.py --recipe digits/demo --teacher 127.0.0.1:50051
python student_trainer/main.py --recipe digits/demo --help
python student_trainer/main.py --recipe imagenet/ensemble/9600 --tiny      # a minute on two cores: see tiny.py
"""

import sys
from pathlib import Path

# torchrun puts this folder first on the path: its files would shadow the standard library's, and the rooms beside
# it would not be found. The repository's root takes its place.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402

# Threads that spin at a barrier steal the cores of the teacher, or of whoever else is on this machine: with both
# cores of a two-core machine in use, a step of two spinning threads took 3.7 s that takes 0.2 s alone. Effective
# only before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from student_trainer import log, world  # noqa: E402
from student_trainer.config import Config, override  # noqa: E402
from student_trainer.recipes import RECIPES  # noqa: E402
from student_trainer.tiny import SHRINKS, make_parts, tiny  # noqa: E402


def parse(args: list[str]) -> tuple[Config, bool]:
    """The recipe's config with the command line's settings, and whether it was made tiny."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", metavar="NAME")
    parser.add_argument("--tiny", action="store_true")
    chosen, rest = parser.parse_known_args(args)
    if chosen.recipe not in RECIPES:
        wrong = f"no recipe is called {chosen.recipe!r}" if chosen.recipe else "which recipe? give --recipe NAME"
        sys.exit(f"{wrong}; there are:\n  " + "\n  ".join(RECIPES))
    config = RECIPES[chosen.recipe].config
    return override(tiny(config) if chosen.tiny else config, rest), chosen.tiny


def main() -> None:
    """Run a recipe. Exit code 1, with a sentence and no traceback, for what the caller can mend."""
    config, is_tiny = parse(sys.argv[1:])
    log.set_up(config.log_format, int(os.environ.get("RANK", 0)))
    # After the settings are known to be right: these import torch and DALI.
    from student_trainer.fleet import TeacherError
    from student_trainer.local_teacher import TeacherDiedError
    from student_trainer.logit_store import StoreGoneError
    from student_trainer.pictures import PictureError
    from student_trainer.report import print_table
    from student_trainer.train import NonFiniteLossError, train

    expected = ValueError, OSError, TeacherError, TeacherDiedError, StoreGoneError, PictureError, NonFiniteLossError
    with world.join(config.device) as processes:
        try:
            if is_tiny:
                if processes.is_main:
                    print(SHRINKS, flush=True)
                    make_parts(config)
                processes.barrier()
            summary = train(config, processes)
        except expected as error:
            logging.getLogger("funmatch").debug("where it happened", exc_info=True)
            sys.exit(f"rank {processes.rank}: {type(error).__name__}: {error}")
        if processes.is_main and not summary.get("stopped"):
            print_table(summary)


if __name__ == "__main__":
    main()
