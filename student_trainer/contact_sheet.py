"""Views as pictures on one sheet: the first batch as student and teacher saw it, `first_batch.png`, or any step's.

Most bugs of a distillation pipeline are visible here and nowhere else: another crop, a missing flip, swapped
channels, mixing with the wrong partner. Every row of the batch is a card: the student's view, the teacher's
view of the same box at its own size, and what both look like mixed. Only drawing lives here; nothing is rendered.

Rejected: torchvision's `make_grid`. It cannot set captions beside pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_TILE = 160  # pixels; views of any size are shown at this one, side by side
_GAP, _MARGIN, _LINE = 4, 20, 18
_INK, _FAINT, _PAPER = (33, 33, 33), (117, 117, 117), (255, 255, 255)
_BOX, _EMPTY = (213, 94, 0), (238, 238, 238)

Tiles = list[tuple[str, NDArray[np.uint8]]]


def first_batch_sheet(
    path: Path,
    student_views: NDArray[np.uint8],
    teacher_views: NDArray[np.uint8] | None,
    captions: Sequence[str],
    student_mixed: NDArray[np.float32] | None = None,
    teacher_mixed: NDArray[np.float32] | None = None,
    title: str = "The first batch",
    max_rows: int = 12,
) -> None:
    """Write the sheet as a PNG.

    Args:
        path: where to; replaced if it exists.
        student_views: uint8 [N, S, S, 3], row r's own view, not mixed.
        teacher_views: uint8 [N, T, T, 3], the teacher's views of the same rows; None when supervised or when
            the teacher did not send its pixels.
        captions: N texts, one under each row of the batch; what does not fit is cut.
        student_mixed: float [N, S, S, 3] in 0..1, what the student's network saw; None to leave out.
        teacher_mixed: float [N, T, T, 3] in 0..1, likewise of the teacher.
        title: one line on top.
        max_rows: at most so many rows are shown.
    """
    columns: Tiles = [("student", student_views)]
    for name, views in (
        ("teacher", teacher_views),
        ("student, mixed", _bytes(student_mixed)),
        ("teacher, mixed", _bytes(teacher_mixed)),
    ):
        if views is not None:
            columns.append((name, views))
    _check(columns, captions)
    shown = min(len(student_views), max_rows)
    titles = [f"{name}  {views.shape[1]} px" for name, views in columns]
    cards = [
        _card([(title, views[row]) for title, (_, views) in zip(titles, columns, strict=True)], captions[row])
        for row in range(shown)
    ]
    note = f"{shown} of {len(student_views)} rows" if shown < len(student_views) else f"{shown} rows"
    _sheet(cards, title, note).save(path, format="PNG")


def step_sheet(path: Path, cards: Sequence[tuple[Tiles, str]], title: str, note: str) -> None:
    """Write a sheet of cards, each of pictures uint8 [S, S, 3] with a word above, and a caption; as a PNG."""
    _sheet([_card(tiles, caption) for tiles, caption in cards], title, note).save(path, format="PNG")


def with_box(picture: Image.Image, box: Sequence[int]) -> NDArray[np.uint8]:
    """A whole picture on a square tile, with a box (y, x, h, w) of its pixels drawn: uint8 [S, S, 3]."""
    scale = _TILE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    left, top = (_TILE - width) // 2, (_TILE - height) // 2
    tile = Image.new("RGB", (_TILE, _TILE), _EMPTY)
    tile.paste(picture.resize((width, height)), (left, top))
    y, x, h, w = (scale * value for value in box)
    corners = (left + x, top + y, left + max(x + 1, x + w - 1), top + max(y + 1, y + h - 1))
    draw = ImageDraw.Draw(tile)
    draw.rectangle(corners, outline=_PAPER, width=3)
    draw.rectangle(corners, outline=_BOX, width=2)
    return np.asarray(tile)


def _check(columns: Tiles, captions: Sequence[str]) -> None:
    num_rows = len(columns[0][1])
    if num_rows == 0:
        raise ValueError("the first batch has no rows to show")
    for name, views in columns:
        if views.ndim != 4 or views.shape[0] != num_rows or views.shape[3] != 3:
            raise ValueError(f"{name} views have shape {views.shape}, expected [{num_rows}, S, S, 3]")
    if len(captions) != num_rows:
        raise ValueError(f"{len(captions)} captions for {num_rows} rows")


def _bytes(mixed: NDArray[np.float32] | None) -> NDArray[np.uint8] | None:
    if mixed is None:
        return None
    return (np.clip(mixed, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def _card(tiles: Tiles, caption: str) -> Image.Image:
    """One row of the batch: its pictures side by side, a word above each, the caption below."""
    width = len(tiles) * (_TILE + _GAP) - _GAP
    card = Image.new("RGB", (width, _LINE + _TILE + _LINE), _PAPER)
    draw = ImageDraw.Draw(card)
    for column, (name, pixels) in enumerate(tiles):
        x = column * (_TILE + _GAP)
        draw.text((x, 0), name, fill=_FAINT, font=_font(11))
        # Nearest: a sheet that smooths would hide exactly the differences it is there to show.
        tile = Image.fromarray(pixels).resize((_TILE, _TILE), Image.Resampling.NEAREST)
        card.paste(tile, (x, _LINE))
    draw.text((0, _LINE + _TILE + 3), _fit(draw, caption, width), fill=_INK, font=_font(12))
    return card


def _sheet(cards: list[Image.Image], title: str, note: str) -> Image.Image:
    """Cards in a grid of about twice as wide as high, under a title."""
    card_width, card_height = cards[0].width + _MARGIN, cards[0].height + _MARGIN // 2
    num_columns = max(1, min(len(cards), round(math.sqrt(2 * len(cards) * card_height / card_width))))
    num_lines = math.ceil(len(cards) / num_columns)
    top = _MARGIN + 34
    size = (num_columns * card_width + _MARGIN, top + num_lines * card_height + _MARGIN // 2)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 4), title, fill=_INK, font=_font(18))
    draw.text((_MARGIN + draw.textlength(title, font=_font(18)) + 12, _MARGIN + 2), note, _FAINT, _font(12))
    for position, card in enumerate(cards):
        line, column = divmod(position, num_columns)
        sheet.paste(card, (_MARGIN + column * card_width, top + line * card_height))
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, or as much of it as fits, with an ellipsis."""
    if draw.textlength(text, font=_font(12)) <= width:
        return text
    while text and draw.textlength(text + "...", font=_font(12)) > width:
        text = text[:-1]
    return text + "..."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
