"""What the site's pages take from the code while they are built: tables of recipes, and the wire.

mkdocs calls these functions (mkdocs.yml, hooks). A page says where something goes by a comment of its own line:

    <!-- recipes: 3.2, table 4 -->    the recipes of that section of the paper; `ours` for those without
    <!-- wire -->                     protos/teacher.proto, message by message, its comments as text

Not here: the reference of the Python rooms, which mkdocstrings takes from docstrings. Rejected: pages generated once
and committed; they would be true on the day they were made.
"""

from __future__ import annotations

import logging
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the mkdocs command has its own folder first on the path, not the repository's

from student_trainer.recipes import RECIPES, Recipe  # noqa: E402

OURS = "ours"  # the section of recipes that no paper has

_log = logging.getLogger("mkdocs.hooks.funmatch")
_RECIPES = re.compile(r"^<!-- recipes: (.+) -->$", re.M)
_WIRE = re.compile(r"^<!-- wire -->$", re.M)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*?\bsrc=["']?(?:https?:)?//[^"'\s>]+"""
                     r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*?\bhref=["']?(?:https?:)?//[^"'\s>]+"""
                     r"""|url\(["']?(?:https?:)?//[^)]+""")  # fmt: skip


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what the page asks for, and unlink what the site does not have."""
    shown = _RECIPES.findall(markdown)
    if shown and (forgotten := {_section(recipe) for recipe in RECIPES.values()} - set(shown)):
        _log.warning("%s shows no recipes of %s", page.file.src_uri, ", ".join(sorted(forgotten)))
    markdown = _RECIPES.sub(lambda found: recipe_table(found[1]), markdown)
    markdown = _WIRE.sub(lambda _: wire_page((ROOT / "protos" / "teacher.proto").read_text(encoding="utf-8")), markdown)
    return unlink(markdown, posixpath.dirname(page.file.src_uri))


def on_post_build(config: Any, **_: Any) -> None:
    """Warn of everything that a page or a style would load from another host: with --strict the build fails."""
    for path in Path(config.site_dir).rglob("*"):
        if path.suffix in (".html", ".css"):
            for found in _LOADED.findall(path.read_text(encoding="utf-8")):
                _log.warning("%s would load from another host: %s", path.relative_to(config.site_dir), found)


def recipe_table(section: str) -> str:
    """The recipes of a section as a Markdown table.

    Raises:
        ValueError: there are none.
    """
    found = [recipe for recipe in RECIPES.values() if _section(recipe) == section]
    if not found:
        known = sorted({_section(recipe) for recipe in RECIPES.values()})
        raise ValueError(f"no recipe is of section {section!r}; there are {', '.join(known)}")
    head = ["recipe", "top-1, %", "epochs", "lr", "decay", "T", "student", "px", "what"]
    rows = [head, ["---"] + ["---:"] * 5 + ["---", "---:", "---"], *map(_row, found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(recipe: Recipe) -> list[str]:
    optim, student = recipe.config.optim, recipe.config.student
    top1 = "" if recipe.expected is None else f"{recipe.expected:.2f}"
    temperature = f"{optim.temperature:g}" if recipe.config.targets == "teacher" else ""
    return [
        f"`{recipe.name}`", top1, f"{optim.epochs:,.4g}" if optim.epochs < 1000 else f"{optim.epochs:,.0f}",
        f"{optim.lr:g}", f"{optim.weight_decay:g}", temperature, student.architecture, str(student.size), recipe.says,
    ]  # fmt: skip


def _section(recipe: Recipe) -> str:
    return recipe.section or OURS


def wire_page(proto: str) -> str:
    """A proto file as Markdown: what stands before each message, enum and service as text, the definition as code."""
    parts = []
    for comment, kind, name, code in _definitions(proto):
        title = f"## {name}" if kind else ""
        parts.append("\n\n".join(filter(None, [title, comment, f"```proto\n{code}\n```" if code else ""])))
    return "\n\n".join(parts)


def _definitions(proto: str) -> Iterator[tuple[str, str, str, str]]:
    """The comment at the top, then each top-level definition: (comment, kind, name, code)."""
    for block in re.split(r"\n\n(?=\S)", proto.strip()):
        lines = block.split("\n")
        num_comment = next((n for n, line in enumerate(lines) if not line.startswith("//")), len(lines))
        comment, code = lines[:num_comment], "\n".join(lines[num_comment:])
        named = re.match(r"(service|message|enum) (\w+)", code)
        if named:
            yield _prose(comment), named[1], named[2], code
        elif comment:
            yield _prose(comment), "", "", ""


def _prose(comment: list[str]) -> str:
    """Text as it is; lines that are indented further, a table of words, as code."""
    lines = [line.removeprefix("//").removeprefix(" ") for line in comment]
    out: list[str] = []
    for line, before in zip(lines, ["", *lines], strict=False):
        if line.startswith("  ") != before.startswith("  "):
            out.append("")
        out.append(f"  {line}" if line.startswith("  ") else line)
    return "\n".join(out).strip("\n")


def unlink(markdown: str, folder: str) -> str:
    """A link to a file of the repository that is not below docs/, as the file's name: the site does not have it."""

    def name_of(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        return found[1] if target.startswith("../") else found[0]

    return _LINK.sub(name_of, markdown)
