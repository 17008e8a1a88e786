"""A step's views on one page (.html) or one picture (.png).

The page holds everything that it shows and asks nobody for anything: views as they are, to the last bit; originals made
small. Rejected: the picture alone. Captions do not fit beside 160 pixels, and nobody can copy a digest from it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data_prep.index import Index
from funmatch.views_seen import Look, Seen
from student_trainer.contact_sheet import Tiles, step_sheet, with_box

_ORIGINAL = 320  # pixels of the longer side of an original on the page

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1270px; margin: 1.5em auto; padding: 0 1em }
h1 { font-size: 1.4em; margin-bottom: .2em } h2 { font-size: 1.05em; margin: 0 0 .6em } h2 small { color: #555;
font-weight: normal } .note { color: #555 } .bad { color: #b00020; font-weight: 600 } .good { color: #00694e }
article { border-top: 1px solid #ccc; padding: 1em 0 } .sides { display: flex; flex-wrap: wrap; gap: .9em 1.4em }
.side { margin: 0 } .side > p { margin: 0 0 .3em; color: #555 } .strip { display: flex; flex-wrap: wrap; gap: .5em }
figure { margin: 0; width: 138px } figure img, figure svg { width: 100%; height: auto; max-height: 138px;
display: block; image-rendering: pixelated } figcaption { font-size: 12px; line-height: 1.35; color: #444;
margin-top: .25em; overflow-wrap: anywhere } code { font-size: 11px }
@media (max-width: 520px) { .strip { gap: .4em } figure { width: calc((100vw - 2em - 1.2em) / 3) } }
"""


def write(seen: Seen, out: Path) -> None:
    """Write the sheet; the ending of out says which kind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        step_sheet(out, [_card(seen, row) for row in range(seen.num_rows)], _title(seen), seen.verdict())
    else:
        out.write_text(_page(seen), encoding="utf-8")


def _title(seen: Seen) -> str:
    return f"{seen.config.recipe}, step {seen.step}"


# ---- the page ------------------------------------------------------------------------------------------------------


def _page(seen: Seen) -> str:
    setting = seen.config.views.setting
    facts = (
        f"seed {seen.config.seed}, views {setting}, rows {seen.first_row} to {seen.first_row + seen.num_rows - 1} of "
        f"{seen.config.optim.batch_size}, data set {seen.index.name} ({seen.index.digest[:12]})"
    )
    of_many = [
        f"The teacher's answer is the average over {seen.of_many} crops of each picture; the first of them is shown."
    ]
    notes = [seen.verdict(), *(of_many if seen.of_many > 1 else [])]
    body = [
        f"<h1>{html.escape(_title(seen))}</h1>",
        f'<p class="note">{html.escape(facts)}</p>',
        *(
            f'<p class="{"bad" if seen.differs else ""}">{html.escape(note[0].upper() + note[1:])}</p>'
            for note in notes
        ),
        *(_article(seen, row) for row in range(seen.num_rows)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{html.escape(_title(seen))}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _article(seen: Seen, row: int) -> str:
    student = seen.looks[0]
    own, partner, lam = row, int(student.rows.partner[row]), float(student.rows.lam[row])
    mixed = f"{lam:.1%} of sample {student.rows.sample[own]}"
    if partner != own:
        mixed += f" + {1 - lam:.1%} of sample {student.rows.sample[partner]}, &lambda; = {lam:.6f}"
    else:
        mixed = f"sample {student.rows.sample[own]}, not mixed"
    sides = "".join([
        *(_originals(seen, look, row, who) for look, who in _whose_boxes(seen.looks)),
        *(_renderings(look, row) for look in seen.looks),
    ])  # fmt: skip
    return (
        f'<article><h2>row {seen.first_row + row} <small>{mixed}</small></h2><div class="sides">{sides}</div></article>'
    )


def _originals(seen: Seen, look: Look, row: int, who: str) -> str:
    return _side(f"where {who}", [_original(seen, look, view) for view in _views(look, row)])


def _whose_boxes(looks: Sequence[Look]) -> list[tuple[Look, str]]:
    apart = _telling_apart(looks)
    if len(apart) == 1 < len(looks):
        return [(apart[0], "both look" if len(looks) == 2 else "all look")]
    return [(look, f"{look.name} looks") for look in apart]


def _renderings(look: Look, row: int) -> str:
    """Each view alone, and what the network sees."""
    figures = [_view(look, view) for view in _views(look, row)]
    if len(figures) > 1:
        figures.append(_figure(_png(look.mixed[row]), "mixed: what the network sees"))
    return _side(f"{look.name}, {look.size} px", figures)


def _views(look: Look, row: int) -> list[int]:
    """A row's own view and its partner's."""
    return list(dict.fromkeys((row, int(look.rows.partner[row]))))


def _side(words: str, figures: Sequence[str]) -> str:
    return f'<div class="side"><p>{html.escape(words)}</p><div class="strip">{"".join(figures)}</div></div>'


def _original(seen: Seen, look: Look, view: int) -> str:
    sample = int(look.rows.sample[view])
    picture = _picture(seen.index, sample)
    width, height = picture.size
    small = picture.copy()
    small.thumbnail((_ORIGINAL, _ORIGINAL))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=85)
    y, x, h, w = look.rows.box[view].tolist()
    line = max(width, height) / 75
    rectangle = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="none"'
    drawing = (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="xMinYMin" role="img" '
        f'aria-label="sample {sample} with the box drawn">'
        f'<image href="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}" width="{width}" '
        f'height="{height}"/>{rectangle} stroke="#fff" stroke-width="{1.8 * line:.1f}"/>'
        f'{rectangle} stroke="#d55e00" stroke-width="{line:.1f}"/></svg>'
    )
    label = int(seen.index.label[sample])
    name = f", {seen.index.classes[label]}" if 0 <= label < len(seen.index.classes) else ""
    flip = ", mirrored" if look.rows.flip[view] else ""
    lines = [f"sample {sample}{name}", f"{width} × {height} pixels", f"box {w} × {h} at ({x},\u00a0{y}){flip}"]
    words = "<br>".join(html.escape(line) for line in lines)
    return f"<figure>{drawing}<figcaption>{words}</figcaption></figure>"


def _view(look: Look, view: int) -> str:
    words = f"view of sample {look.rows.sample[view]}" + (", mirrored" if look.rows.flip[view] else "")
    caption = f'{html.escape(words)}<br><code title="{look.digests[view]}">{look.digests[view][:16]}</code>'
    if look.vouched:
        same, apart = look.digests[view] == look.vouched.digests[view], look.vouched.difference[view]
        caption += (
            '<br><span class="good">the teacher\'s digest is equal</span>' if same
            else f'<br><span class="bad">the teacher\'s is<br><code>{look.vouched.digests[view][:16]}</code><br>'
            f"up to {apart} grey levels away</span>"
        )  # fmt: skip
    return _figure(_png(look.views[view]), caption)


def _figure(data: str, caption: str) -> str:
    return f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _png(pixels: NDArray[np.uint8]) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


def _picture(index: Index, sample: int) -> Image.Image:
    """The original, upright."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(index.read([sample])[0].tobytes()))).convert("RGB")


# ---- the picture ---------------------------------------------------------------------------------------------------


def _card(seen: Seen, row: int) -> tuple[Tiles, str]:
    student = seen.looks[0].rows
    partner = int(student.partner[row])
    tiles: Tiles = []
    for look in _telling_apart(seen.looks):
        tiles += [
            (f"sample {look.rows.sample[view]}", with_box(_picture(seen.index, int(look.rows.sample[view])),
                                                          look.rows.box[view].tolist())) for view in _views(look, row)
        ]  # fmt: skip
    for look in seen.looks:
        word = look.name.removeprefix("the ")
        tiles.append((f"{word}  {look.size} px", look.views[row]))
        if int(look.rows.partner[row]) != row:
            tiles.append((f"{word}, mixed", look.mixed[row]))
    y, x, h, w = student.box[row].tolist()
    caption = f"row {seen.first_row + row}: {student.sample[row]} ({y},{x}) {h}x{w}"
    caption += " flipped" if student.flip[row] else ""
    if partner != row:
        caption += f", {student.lam[row]:.1%}; {student.sample[partner]}, {1 - student.lam[row]:.1%}"
    if equal := [_equal(look, row) for look in seen.looks if look.vouched]:
        caption += "; " + ("digests equal" if all(equal) else "DIGESTS DIFFER")
    return tiles, caption


def _equal(look: Look, row: int) -> bool:
    assert look.vouched
    return look.digests[row] == look.vouched.digests[row]


def _telling_apart(looks: Sequence[Look]) -> list[Look]:
    """Those whose boxes are not the first one's: originals are drawn once for all that look alike."""
    own = looks[0]
    return [own, *(look for look in looks[1:2] if not np.array_equal(look.rows.box, own.rows.box))]
