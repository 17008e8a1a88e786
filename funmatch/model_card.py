"""The README.md of an exported student: what it is, who taught it, what it reaches, how it is fed and loaded.

Everything stands in the run's folder; no path of this machine is told. The licence is a placeholder, and says so:
weights inherit terms from teacher and pictures that no program knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from funmatch.timm_folder import Preprocessing
from models import ModelCard
from student_trainer.record import Run

# Keys of summary.json, what the card calls them, how it writes them.
_NUMBERS = (
    ("student_top1", "top-1 of this model", "{:.2%}"),
    ("teacher_top1", "top-1 of its teacher", "{:.2%}"),
    ("agreement_top1", "agreement of the two, top-1", "{:.2%}"),
    ("agreement_top5", "teacher's first among this model's five", "{:.2%}"),
    ("kl", "KL(teacher, this model), nats", "{:.4f}"),
    ("examples", "pictures evaluated", "{:,.0f}"),
    ("images_seen", "pictures seen in training", "{:,.0f}"),
    ("steps", "steps", "{:,.0f}"),
)
_TOLD = (
    "recipe", "views.setting", "optim.optimizer", "optim.batch_size", "optim.epochs", "optim.lr", "optim.weight_decay",
    "optim.temperature", "seed",
)  # fmt: skip

_FRONT = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, knowledge-distillation]
license: other
license_name: choose-one
---
"""

_LICENCE = """## Licence

PLACEHOLDER, to be replaced before this folder is given away. The weights were learned from a teacher and from pictures
that have terms of their own; whoever publishes them must know those, and put a licence here and in the lines above."""


def text(run: Run, card: ModelCard, seen: Preprocessing, classes: Sequence[str], tried: Mapping[str, str]) -> str:
    """The whole card.

    Args:
        run: whose student it is.
        card: the student's.
        seen: how pictures are fed to it.
        classes: names of its outputs; empty if they are not known.
        tried: kind of file -> a line about how it was compared.
    """
    parts = [
        f"{_FRONT}\n# {card.architecture}, distilled on {card.data_set or 'unnamed pictures'}",
        f"A {card.architecture} of {run.facts.get('parameters', 0):,} parameters and {card.num_classes} outputs, "
        f"trained by funmatch {_how(run)}.",
        _table("Numbers", _numbers(run)),
        _table("Teacher and data", _origin(run, card)),
        _table("Recipe", {name: _plain(run.settings[name]) for name in _TOLD if name in run.settings}),
        _feeding(card, seen, antialias=bool(run.settings.get("student.antialias"))),
        _loading(card, tried),
        _outputs(classes),
        _LICENCE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how(run: Run) -> str:
    if run.settings.get("targets") == "labels":
        return "from labels"
    views = str(run.settings.get("views.setting"))
    same = ", each looking at the same views as the other (function matching)" if views.startswith("same/") else ""
    return f"to answer as its teacher does{same}, after Beyer et al., CVPR 2022"


def _numbers(run: Run) -> dict[str, str]:
    found = {name: form.format(run.summary[key]) for key, name, form in _NUMBERS if run.summary.get(key) is not None}
    if run.summary and "student_top1" not in run.summary:
        found["labels"] = "the pictures of evaluation have none, so no accuracy is known"
    return found or {"numbers": "the run left none"}


def _origin(run: Run, card: ModelCard) -> dict[str, str]:
    teachers: list[Mapping[str, Any]] = run.facts.get("teacher", [])
    told = {
        f"teacher {number}" if len(teachers) > 1 else "teacher": f"{one.get('model')}, {one.get('precision')}, at "
        f"{one.get('rendering', {}).get('size')} px, weights {one.get('weights_digest', '')[:12]}"
        for number, one in enumerate(teachers, 1)
    }
    told = told or {"teacher": "none: learned from labels"}
    return told | {
        "data set": card.data_set or "not named",
        "pictures of training": f"{run.facts.get('num_train', 0):,}",
    }


def _feeding(card: ModelCard, seen: Preprocessing, *, antialias: bool) -> str:
    cut = (
        "the whole picture, squashed to a square"
        if seen.crop_mode == "squash"
        else f"the centre, {seen.crop_pct:.4g} of the short side"
    )
    return (
        "## Preprocessing\n\n"
        f"RGB; {cut}; {card.size} x {card.size} pixels, {seen.interpolation}; divided by 255; less mean "
        f"{_plain(card.mean)}, over std {_plain(card.std)}. In training and in the numbers above, pictures were shrunk "
        f"{'with' if antialias else 'without'} a low-pass filter and truncated to whole grey levels. timm's own "
        "transform filters and rounds: its pixels differ a little, and what that does to accuracy was not measured."
    )


def _loading(card: ModelCard, tried: Mapping[str, str]) -> str:
    ways = ["## Use"]
    if "timm" in tried:
        ways += [
            "```python\nimport timm\n\n"
            'model = timm.create_model("local-dir:.", pretrained=True).eval()  # or hf-hub:YOU/NAME, once it is there\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```",
            f"Needs timm 1.0.20 or later and nothing else. Read back when it was written: {tried['timm']}.",
        ]
    if "ONNX" in tried:
        ways += [
            "```python\nimport onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            '(logits,) = session.run(["logits"], {"images": images})\n```',
            f"`images` is float32 [N, 3, {card.size}, {card.size}]. Pictures are scaled and normalised before, as "
            f"above. Read back when it was written: {tried['ONNX']}.",
        ]
    return "\n\n".join(ways)


def _outputs(classes: Sequence[str]) -> str:
    if not classes:
        return "## Outputs\n\nWhat they mean is not written here: the data set was not at hand, or has no classes."
    return "## Outputs\n\n" + ", ".join(f"{number} {name}" for number, name in enumerate(classes))


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
