"""What TAB offers: `funmatch completion bash|zsh|fish` prints a script for the shell's start-up file.

    funmatch completion bash > ~/.local/share/bash-completion/completions/funmatch
    funmatch completion zsh > ~/.funmatch.zsh       # and in ~/.zshrc, after compinit: source ~/.funmatch.zsh
    funmatch completion fish > ~/.config/fish/completions/funmatch.fish

Words, each word's settings, recipes after --recipe, files elsewhere. All of it is in the script: TAB starts no Python.
Printing it asks every word for its settings, a few seconds: write it to a file, anew after an upgrade.

Rejected: shtab or tyro's own completion. They know one parser; here each word's is in another room, and train's comes
after the recipe.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

from funmatch.words import WORDS

SHELLS = ("bash", "zsh", "fish")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script for a shell."""
    args = list(sys.argv[1:] if argv is None else argv)
    if len(args) != 1 or args[0] not in SHELLS:
        print(f"funmatch: completion needs one of {', '.join(SHELLS)}: funmatch completion bash", file=sys.stderr)
        return 2
    from student_trainer.recipes import RECIPES

    flags = {word: _flags(word) for word in WORDS}
    print(_fish(flags, list(RECIPES)) if args[0] == "fish" else _bash(flags, list(RECIPES), zsh=args[0] == "zsh"))
    return 0


def _flags(word: str) -> list[str]:
    """The settings that a word's --help names."""
    if word == "completion":
        return []
    recipe = ["--recipe", "digits/demo"] if word == "train" else []
    said = subprocess.run(
        [sys.executable, "-P", "-m", "funmatch.main", word, *recipe, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"(?<![\w-])--[a-z][\w.-]*\b", said.stdout)
    return sorted({flag for flag in found if flag not in ("--help", "--recipe")} | ({"--recipe"} if word in
                  ("train", "plan", "views", "doctor") else set()))  # fmt: skip


def _bash(flags: dict[str, list[str]], recipes: Sequence[str], *, zsh: bool) -> str:
    cases = "\n".join(f'        {word}) offered="{" ".join(names)}" ;;' for word, names in flags.items() if names)
    head = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    return f"""{head}_funmatch() {{
    local typed="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" offered=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(flags)}" -- "$typed"))
        return
    fi
    if [ "$before" = --recipe ]; then
        COMPREPLY=($(compgen -W "{" ".join(recipes)}" -- "$typed"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
        completion) COMPREPLY=($(compgen -W "{" ".join(SHELLS)}" -- "$typed")); return ;;
{cases}
    esac
    case "$typed" in
        -*) COMPREPLY=($(compgen -W "$offered --help" -- "$typed")) ;;
        *) COMPREPLY=($(compgen -f -- "$typed")) ;;
    esac
}}
complete -o filenames -F _funmatch funmatch"""


def _fish(flags: dict[str, list[str]], recipes: Sequence[str]) -> str:
    lines = ["complete -c funmatch -n __fish_use_subcommand -f"]
    for word, names in flags.items():
        does = WORDS[word].does.replace("'", "\\'")
        lines.append(f"complete -c funmatch -n __fish_use_subcommand -a {word} -d '{does}'")
        within = f"-n '__fish_seen_subcommand_from {word}'"
        lines += [
            f"complete -c funmatch {within} -l {name.removeprefix('--')} -r" for name in names if name != "--recipe"
        ]
        if "--recipe" in names:
            lines.append(f"complete -c funmatch {within} -l recipe -x -a '{' '.join(recipes)}'")
    lines.append(f"complete -c funmatch -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
