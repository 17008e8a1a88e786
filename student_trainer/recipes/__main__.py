"""`python -m student_trainer.recipes [NAME ...]`: the list of recipes, or all about some of them."""

import argparse
import signal
import textwrap

from student_trainer.config import flag, settings
from student_trainer.recipes import RECIPES, Recipe


def main() -> None:
    """Print."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    parser = argparse.ArgumentParser(prog="python -m student_trainer.recipes", description=__doc__)
    parser.add_argument("name", nargs="*", help="recipes to explain")
    names = parser.parse_args().name
    if not names:
        _list()
    for name in names:
        if name not in RECIPES:
            parser.error(f"no recipe is called {name!r}")
        _explain(RECIPES[name])


def _list() -> None:
    print("Expected: the paper's top-1 of the student, in percent. Each runs by\n")
    print("    torchrun student_trainer/main.py --recipe NAME [--data DIR] [--teacher HOST:PORT] [--tiny]\n")
    print(f"{'name':35}{'section':17}{'expected':>8}  what")
    for data_set in dict.fromkeys(name.partition("/")[0] for name in RECIPES):
        print()
        for recipe in RECIPES.values():
            if recipe.name.startswith(f"{data_set}/"):
                expected = f"{recipe.expected:.2f}" if recipe.expected else ""
                what = textwrap.shorten(recipe.says, 58, placeholder=" ...")
                print(f"{recipe.name:35}{recipe.section:17}{expected:>8}  {what}")
    print("\nAll about one: python -m student_trainer.recipes NAME")


def _explain(recipe: Recipe) -> None:
    print(f"{recipe.name}\n\n  {recipe.says}")
    if recipe.section:
        print(f"  Paper: section {recipe.section}" + (f"; top-1 {recipe.expected} %" if recipe.expected else ""))
    for choice in recipe.choices:
        print(textwrap.fill(choice, 116, initial_indent="  Follows: ", subsequent_indent="    "))
    print(f"\n  {recipe.command}\n")
    for name, value in settings(recipe.config).items():
        print(f"  {flag(name)} {value}")
    print()


if __name__ == "__main__":
    main()
