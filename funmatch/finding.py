"""What a check finds: a sentence of what is so, and one of what to do. Checks yield these and never raise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "look", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor."""

    state: State
    """ok; look: it works, but perhaps not as you think; broken: a run would end on it."""
    check: str
    """What was looked at, in a word or two."""
    says: str
    """What is so: one line, without a full stop."""
    do: str = ""
    """What to do about it; "" where it is ok."""

    def __str__(self) -> str:
        cure = f". To do: {self.do}" if self.do else ""
        return f"{self.state:8}{self.check:20} {self.says}{cure}"


def ok(check: str, says: str) -> Finding:
    """All is well."""
    return Finding(state="ok", check=check, says=_one_line(says))


def look(check: str, says: str, do: str) -> Finding:
    """It works, but perhaps not as you think."""
    return Finding(state="look", check=check, says=_one_line(says), do=do)


def broken(check: str, says: str, do: str) -> Finding:
    """A run would end on it."""
    return Finding(state="broken", check=check, says=_one_line(says), do=do)


def _one_line(sentence: str) -> str:
    return " ".join(sentence.split()).rstrip(".")
