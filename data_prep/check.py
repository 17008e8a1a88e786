"""`python -m data_prep.check DIR`: re-read a prepared set and say what is in it and what is wrong with it.

Everything is read again: the digests of shards and columns, every tar header, every picture to its last
line; then counts, sizes, class balance, and contact_sheet.png for a person's eyes. Exit status 0: all is
as it was written; 1: something is not, and is named.

Not here: repair. A damaged set is prepared again.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data_prep import pool
from data_prep.archive import Stored, members_of_tar
from data_prep.index import COLUMNS_FOLDER, DATASET_FILE, Index, content_errors
from data_prep.picture import Undecodable, show, size_as_viewed
from data_prep.prepare import summary

SHEET_FILE = "contact_sheet.png"
_MAX_NAMED = 20  # of the errors of one shard; the rest are counted


def check(root: Path, *, workers: int | None = None, progress: bool = True) -> list[str]:
    """Sentences about everything that is wrong with the set below `root`; empty: it is whole."""
    try:
        index = Index.open(root)
    except (ValueError, OSError) as error:
        return [str(error)]
    errors = content_errors(index)
    errors += _stray_files(index)
    with tqdm(total=len(index), unit="picture", disable=None if progress else True) as bar:
        shards = range(len(index.shards))
        for shard, (seen, found) in enumerate(pool.run(partial(_shard_errors, index), shards, workers)):
            bar.update(seen)
            errors += found[:_MAX_NAMED]
            if len(found) > _MAX_NAMED:
                errors.append(f"... and {len(found) - _MAX_NAMED} more in {index.shards[shard].name}")
    errors += [
        f"{index.where(int(row))} has label {index.label[row]}, outside -1 .. {len(index.classes) - 1}"
        for row in np.flatnonzero((index.label < -1) | (index.label >= len(index.classes)))[:_MAX_NAMED]
    ]
    return errors


def statistics(index: Index) -> str:
    """Counts, sizes and class balance of each split, as a table."""
    head = f"{'split':8}{'pictures':>10}{'unlabelled':>12}{'classes':>9}   pictures per class   height x width"
    lines = [head]
    for split, rows in index.splits.items():
        part = slice(rows.start, rows.stop)
        labels = index.label[part]
        counts = np.bincount(labels[labels >= 0], minlength=len(index.classes))
        present = counts[counts > 0]
        spread = _spread(present) if len(present) else "-"
        size = f"{_spread(index.height[part])} x {_spread(index.width[part])}"
        lines.append(f"{split:8}{len(rows):>10}{int((labels < 0).sum()):>12}{len(present):>9}   {spread:21}{size}")
    lines.append("(smallest/median/largest)")
    return "\n".join(lines)


def contact_sheet(index: Index, columns: int = 12, rows_per_split: int = 2, side: int = 112) -> Image.Image:
    """Pictures spread evenly over each split, whole and upright, with their classes' names."""
    margin, caption, title = 12, 18, 34
    cell_width, cell_height = side + margin, side + caption + margin
    shown = {split: _evenly(rows, columns * rows_per_split) for split, rows in index.splits.items()}
    num_lines = {split: -(-len(samples) // columns) for split, samples in shown.items()}
    width = columns * cell_width + margin
    height = margin + sum(title + lines * cell_height for lines in num_lines.values())
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(17), ImageFont.load_default(11)
    top = margin
    for split, samples in shown.items():
        text = f"{index.name} / {split}: {len(index.splits[split]):,} pictures"
        draw.text((margin, top), text, fill="#222222", font=large)
        top += title
        for number, sample in enumerate(samples):
            line, column = divmod(number, columns)
            left, y = margin + column * cell_width, top + line * cell_height
            thumbnail = _thumbnail(index, sample, side)
            sheet.paste(thumbnail, (left + (side - thumbnail.width) // 2, y + side - thumbnail.height))
            name = _fitted(_class_name(index, sample), small, side)
            draw.text((left + side / 2, y + side + 4), name, fill="#555555", font=small, anchor="ma")
        top += num_lines[split] * cell_height
    return sheet


def main(
    root: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
    /,
    workers: int | None = None,
) -> int:
    """Re-read a prepared data set: digests, tars, every picture; print what is in it, draw a contact sheet.

    Args:
        root: the folder that data_prep.prepare made.
        workers: processes; by default one per core.
    """
    errors = check(root, workers=workers)
    for error in errors:
        print(f"wrong: {error}", file=sys.stderr)
    if errors:
        print(f"{len(errors)} things are wrong with {root}; prepare it again", file=sys.stderr)
        return 1
    index = Index.open(root)
    print(summary(index))
    print(statistics(index))
    contact_sheet(index).save(root / SHEET_FILE)
    print(f"all is as it was written; some of it is on {root / SHEET_FILE}")
    return 0


def _shard_errors(index: Index, shard: int) -> tuple[int, list[str]]:
    """(rows looked at, what is wrong with them) for one shard."""
    samples = np.flatnonzero(index.shard == shard).tolist()
    file = index.root / index.shards[shard].name
    try:
        members = {member.offset: member for member in members_of_tar(file)}
    except (ValueError, OSError) as error:
        return len(samples), [str(error)]
    found = (_row_error(index, sample, members.get(int(index.offset[sample]))) for sample in samples)
    return len(samples), [error for error in found if error is not None]


def _row_error(index: Index, sample: int, member: Stored | None) -> str | None:
    key = bytes(index.key[sample]).decode("utf-8", "replace")
    if member is None or member.size != index.size[sample] or not member.name.startswith(f"{key}."):
        return f"{index.where(sample)} is not where the index says"
    return _picture_error(index, sample)


def _picture_error(index: Index, sample: int) -> str | None:
    try:
        height, width = size_as_viewed(index.read([sample])[0].tobytes())
    except (Undecodable, OSError) as error:
        return f"{index.where(sample)} does not decode: {error}"
    if (height, width) != (index.height[sample], index.width[sample]):
        expected = f"{index.height[sample]}x{index.width[sample]}"
        return f"{index.where(sample)} is {height}x{width} pixels, the index says {expected}"
    return None


def _stray_files(index: Index) -> list[str]:
    expected = {shard.name for shard in index.shards} | {DATASET_FILE, COLUMNS_FOLDER, SHEET_FILE}
    return [f"{path} does not belong to the set" for path in sorted(index.root.iterdir()) if path.name not in expected]


def _spread(values: NDArray[np.integer]) -> str:
    return f"{values.min()}/{int(np.median(values))}/{values.max()}"


def _evenly(rows: range, count: int) -> list[int]:
    """At most `count` rows, first and last among them."""
    picked = np.unique(np.linspace(rows.start, rows.stop - 1, min(count, len(rows))).round().astype(int))
    return [int(row) for row in picked]


def _thumbnail(index: Index, sample: int, side: int) -> Image.Image:
    """The whole picture at `side` pixels or less; small ones are enlarged in whole steps, pixels visible."""
    picture = show(index.read([sample])[0].tobytes())
    factor = side // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _class_name(index: Index, sample: int) -> str:
    label = int(index.label[sample])
    return index.classes[label] if label >= 0 else "(no label)"


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
