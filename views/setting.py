"""The view settings of the paper (section 3.1.1): what the student sees, and what its teacher sees meanwhile.

    name          the teacher sees                         the student sees            the targets are
    fix/rs        the whole picture                        the same                    constant
    fix/cc        the central crop                         a mild random crop          constant
    fix/ic_ens    `num_crops` inception crops, averaged    an inception crop           constant
    ind/rc        a mild random crop                       another one, independent    new at every step
    ind/ic        an inception crop                        another one, independent    new
    same/rc       a mild random crop                       the same                    new
    same/ic       an inception crop                        the same                    new
    same/ic+mix   an inception crop, mixed                 the same, mixed alike       new: this is FunMatch

Both sides draw by the same law; ind/ draws the teacher's crops and flips from a stream of its own (draw.py). `+mix`
also goes with the other same/ and ind/ settings. It does not go with fix/: a target of a mixed picture is no
constant, and mixing constants is another algorithm.

A fixed teacher's views are a type of their own, `FixedViews`: a store of logits can be made for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from views.draw import Crop, ViewLaw, draw_boxes, draw_flips
from views.view import Rows

Average = Literal["logits", "probabilities"]

SETTINGS = ("fix/rs", "fix/cc", "fix/ic_ens", "ind/rc", "ind/ic", "same/rc", "same/ic", "same/ic+mix")
"""The eight of the paper, in its order."""

# Crop laws (teacher's, student's) of the fixed settings.
_FIXED: dict[str, tuple[Crop, Crop]] = {"rs": ("rs", "rs"), "cc": ("cc", "rc"), "ic_ens": ("ic", "ic")}
_FRESH: dict[str, tuple[Crop, ...]] = {"ind": ("rc", "ic"), "same": ("rs", "cc", "rc", "ic")}
_MOVING = ("rc", "ic")  # only these are mirrored: a whole picture, or its centre, is the same one always

# Crops of fix/ic_ens belong to the picture and not to the run: runs of all seeds share one store.
_FIXED_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedViews:
    """The views of a picture that never change: one, or many whose answers are averaged."""

    law: ViewLaw
    num_views: int = 1
    """K, views of a picture."""
    average: Average = "probabilities"
    """What is averaged over the K views, in float32. The paper does not say; its teacher is a probability vector."""

    def __post_init__(self) -> None:
        if self.law.mixup:
            raise ValueError("fixed views are not mixed: a mixed picture has no fixed partner")
        if self.num_views < 1:
            raise ValueError(f"a picture needs at least one view, got {self.num_views}")

    def rows(self, sample: NDArray[np.int64], height: NDArray[np.int32], width: NDArray[np.int32]) -> Rows:
        """The K views of each sample [N], one sample after the other: N * K rows, alone.

        height and width are the index's whole columns, as in Plan.
        """
        each = np.repeat(sample, self.num_views)
        view = np.tile(np.arange(self.num_views, dtype=np.int64), len(sample))
        sizes = height[each].astype(np.int64), width[each].astype(np.int64)
        return Rows(
            sample=each,
            box=draw_boxes(self.law, _FIXED_SEED, view, each, *sizes, stream="fixed"),
            flip=draw_flips(self.law, _FIXED_SEED, view, each, stream="fixed"),
            partner=np.arange(len(each), dtype=np.int32),
            lam=np.ones(len(each), dtype=np.float32),
        )

    def facts(self) -> dict[str, Any]:
        """All that can change an answer, as plain values: part of a stored logit's key. Numbers of no effect are left
        out, so that they do not make a key miss.
        """
        facts: dict[str, Any] = {"crop": self.law.crop, "num_views": self.num_views}
        if self.law.crop in ("cc", "rc"):
            facts["keep"] = self.law.keep
        if self.law.crop == "ic":
            facts["min_area"] = self.law.min_area
        if self.law.crop in _MOVING:
            facts |= {"flip": self.law.flip, "seed": _FIXED_SEED}
        if self.num_views > 1:
            facts["average"] = self.average
        return facts


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSetting:
    """What is seen while training. `setting` is the paper's name; the numbers are those of the crop laws."""

    setting: str = "same/ic+mix"
    """fix/rs, fix/cc, fix/ic_ens, ind/rc, ind/ic, same/rc, same/ic, or same/ic+mix: FunMatch. Learning from labels uses
    the student's half."""
    flip: bool = True
    """Mirror rc and ic crops with probability 1/2; rs and cc are never mirrored."""
    min_area: float = 0.05
    """ic: smallest crop, as a share of the picture's area; the largest is the whole picture."""
    keep: float = 128 / 160
    """rc, cc: the share of a side that the crop keeps."""
    mixup_alpha: float = 1.0
    """+mix: lambda ~ Beta(alpha, alpha), one for a step."""
    fold_lambda: bool = True
    """+mix: lambda is max(a, 1 - a) as in the released code; no: a itself, as the paper says."""
    mixup_groups: int = 1
    """+mix: 1: partners are neighbours in the global batch, as in the code since 2024; the number of devices: within
    each device's share, as in that of 2022."""
    num_crops: int = 1000
    """fix/ic_ens: crops of a picture over which the teacher is averaged."""
    average: Average = "probabilities"
    """fix/ic_ens: what is averaged."""

    def __post_init__(self) -> None:
        kind, crop, mixup = self._parts()
        known = crop in _FIXED and not mixup if kind == "fix" else crop in _FRESH.get(kind, ())
        if not known:
            raise ValueError(
                f"there is no view setting {self.setting!r}; the paper's are {', '.join(SETTINGS)}. "
                "+mix goes with same/ and ind/"
            )
        _ = self.student  # checks the numbers

    @property
    def kind(self) -> Literal["fix", "ind", "same"]:
        """Whether the teacher's views are fixed, independent of the student's, or the same."""
        return self._parts()[0]  # type: ignore[return-value]

    @property
    def student(self) -> ViewLaw:
        """How the student's views are drawn; with ind/ and same/ also the teacher's."""
        kind, crop, mixup = self._parts()
        return self._law(_FIXED[crop][1] if kind == "fix" else crop, mixup)  # type: ignore[arg-type]

    @property
    def fixed(self) -> FixedViews:
        """What a fixed teacher sees.

        Raises:
            ValueError: the setting is not fix/.
        """
        kind, crop, _ = self._parts()
        if kind != "fix":
            raise ValueError(f"{self.setting} has no fixed views: its teacher's views are new at every step")
        law = self._law(_FIXED[crop][0], mixup=False)
        return FixedViews(law=law, num_views=self.num_crops if crop == "ic_ens" else 1, average=self.average)

    def _law(self, crop: Crop, mixup: bool) -> ViewLaw:
        flip = self.flip and crop in _MOVING
        return ViewLaw(
            crop=crop, flip=flip, mixup=mixup, mixup_alpha=self.mixup_alpha, fold_lambda=self.fold_lambda,
            mixup_groups=self.mixup_groups, min_area=self.min_area, keep=self.keep,
        )  # fmt: skip

    def _parts(self) -> tuple[str, str, bool]:
        kind, _, crop = self.setting.partition("/")
        return kind, crop.removesuffix("+mix"), crop.endswith("+mix")
