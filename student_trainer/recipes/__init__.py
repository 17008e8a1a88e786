"""Named runs: every experiment of the paper, and ours for small machines.

    torchrun student_trainer/main.py --recipe flowers102/funmatch/10k --data DIR --teacher HOST:PORT

`python -m student_trainer.recipes` lists them, with the paper's section and number; `--tiny` shrinks one to a minute.

    recipe.py     what a recipe is
    small.py      flowers102, pets, food101, sun397: sections 3.1, 3.2, 3.8, tables 4 and 5, figures 3, 4 and 6
    imagenet.py   sections 3.3 to 3.7 and 3.9, tables 1 to 3
    ours.py       one's own pictures, demos, and runs measured on laptops
"""

from student_trainer.recipes import imagenet, ours, small
from student_trainer.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (*small.recipes(), *imagenet.recipes(), *ours.recipes())
}

__all__ = ["RECIPES", "Recipe"]
