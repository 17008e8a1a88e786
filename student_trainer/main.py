"""The door: `torchrun student_trainer/main.py --recipe NAME [--setting value ...]`, or plain python for one process.

torchrun --nproc_per_node=2 student_trainer/main.py --recipe digits/demo --teacher 127.0.0.1:50051
python student_trainer/main.py --recipe digits/demo --help
"""

import sys
from pathlib import Path

# torchrun puts this folder first on the path: its files would shadow the standard library's, and the rooms beside
# it would not be found. The repository's root takes its place.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402
import logging  # noqa: E402

from student_trainer import world  # noqa: E402
from student_trainer.config import Config, override  # noqa: E402
from student_trainer.recipes import RECIPES  # noqa: E402


def parse(args: list[str]) -> Config:
    """The recipe's config with the command line's settings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", metavar="NAME")
    chosen, rest = parser.parse_known_args(args)
    if chosen.recipe not in RECIPES:
        wrong = f"no recipe is called {chosen.recipe!r}" if chosen.recipe else "which recipe? give --recipe NAME"
        sys.exit(f"{wrong}; there are:\n  " + "\n  ".join(RECIPES))
    return override(RECIPES[chosen.recipe](), rest)


def main() -> None:
    """Run a recipe."""
    config = parse(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from student_trainer.report import print_table
    from student_trainer.train import train  # after the settings are known to be right: it imports torch and DALI

    with world.join(config.device) as processes:
        summary = train(config, processes)
        if processes.is_main and not summary.get("stopped"):
            print_table(summary)


if __name__ == "__main__":
    main()
