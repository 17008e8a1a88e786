"""The view of a run in a terminal, drawn anew every second by a thread of its own: screen of live.py's numbers.

What is printed or logged meanwhile scrolls by above it. The last picture stays when the run ends. A terminal that goes
away, or any fault of the drawing, ends the view and not the run.

Rejected: a full-screen program (an alternate screen with keys). Scrolling back, copying, `tee` and a log of the session
would be lost, for a view that has nothing to choose.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from student_trainer.live import Now, Progress, TeacherNow

log = logging.getLogger(__name__)

_EVERY_S = 1.0
_BAR = 60  # columns
_AWAY = 3  # replicas whose last words are shown
_LINES_ABOVE = 13  # that everything but the replicas takes; a terminal that is too low shows fewer replicas
_LONG_S = 5.0  # without a step
_COLOUR = {"training": "green", "done": "green", "ended by an error": "red"}  # of what it does; all else is yellow


def can_draw() -> bool:
    """Whether standard error can move its cursor."""
    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal


class Screen:
    """Shows a run's progress until it is closed."""

    def __init__(self, progress: Progress, every_s: float = _EVERY_S) -> None:
        self._progress = progress
        self._every_s = every_s
        self._console = Console(stderr=True)
        # Standard output is left alone where it goes to a file: it must arrive there.
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=sys.stdout.isatty(), vertical_overflow="crop"
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="screen", daemon=True)
        self._handlers = contextlib.ExitStack()
        self._is_gone = False

    def __enter__(self) -> Screen:
        before = sys.stderr
        try:
            self._live.start()
            self._console.show_cursor(True)  # a run that is killed would leave the terminal without one
        except OSError:
            log.debug("no view of this run", exc_info=True)
            self._stop()
            return self
        self._handlers.enter_context(_logging_to(before))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._progress.ended(error)
        self._draw()
        self._stop()

    def _work(self) -> None:
        while not self._over.is_set() and self._draw():
            self._over.wait(self._every_s)

    def _draw(self) -> bool:
        if self._is_gone:
            return False
        try:
            self._live.update(draw(self._progress.now(), self._console.height), refresh=True)
        except Exception:  # whatever it is, the run goes on
            log.debug("the view of this run ends", exc_info=True)
            self._stop()
            return False
        return True

    def _stop(self) -> None:
        self._is_gone = True
        self._handlers.close()
        with contextlib.suppress(Exception):  # a terminal that is gone
            self._live.stop()


@contextlib.contextmanager
def _logging_to(before: object) -> Iterator[None]:
    """Handlers that write to what was standard error write to what it is now: above the view."""
    moved = [
        handler for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is before
    ]  # fmt: skip
    for handler in moved:
        handler.setStream(sys.stderr)
    yield
    for handler in moved:
        handler.setStream(before)


def draw(now: Now, height: int = 50) -> RenderableType:
    """A moment of a run as lines of a terminal of so many lines."""
    room = max(3, height - _LINES_ABOVE) // max(1, len(now.teachers))
    parts: list[RenderableType] = [Text(), _headline(now), _bar(now), _pace(now), _numbers(now)]
    if waits := _waits(now):
        parts.append(waits)
    parts.append(_evaluation(now))
    parts += [_fleet(teacher, room) for teacher in now.teachers]
    return Group(*parts)


def _headline(now: Now) -> Text:
    line = Text(now.title, style="bold", no_wrap=True, overflow="ellipsis")
    line.append(f"   {now.doing}", style=_COLOUR.get(now.doing, "yellow"))
    if now.doing == "training" and now.step < now.total and now.idle_s > _LONG_S:
        line.append(f", no step for {duration(now.idle_s)}", style="yellow")
    return line


def _bar(now: Now) -> Table:
    line = Table.grid()  # a bar alone has no end of line
    line.add_row(
        ProgressBar(
            total=max(1, now.total), completed=now.step, width=_BAR, complete_style="green", finished_style="green"
        )
    )
    return line


def _pace(now: Now) -> Text:
    told = [f"step {now.step:,} of {now.total:,} ({now.step / max(1, now.total):.1%})"]
    told += [] if now.images_per_s is None else [f"{now.images_per_s:,.0f} images/s"]
    told += [f"{duration(now.elapsed_s)} gone"]
    told += [] if now.left_s is None or now.step == now.total else [f"{duration(now.left_s)} to go"]
    return Text("   ".join(told))


def _numbers(now: Now) -> Text:
    forms = {"loss": ("loss", ".4f"), "kl": ("KL", ".4f"), "agreement_top1": ("agreement", ".1%"), "lr": ("lr", ".3g")}
    told = [f"{name} {now.numbers[key]:{form}}" for key, (name, form) in forms.items() if key in now.numbers]
    if now.worst_mismatch is not None:
        told.append(f"view mismatch {now.worst_mismatch:g}")
    return Text("   ".join(told) or "the first step is on its way", overflow="ellipsis")


def _waits(now: Now) -> Text | None:
    if now.data_wait is None or now.teacher_wait is None:
        return None
    line = Text("waiting for the teacher ", style="dim")
    line.append(f"{now.teacher_wait:.0%}", style="yellow" if now.teacher_wait > 0.2 else "")
    line.append(" of the time, for pictures ")
    line.append(f"{now.data_wait:.0%}", style="yellow" if now.data_wait > 0.2 else "")
    return line


def _evaluation(now: Now) -> Text:
    if now.evaluated is None:
        return Text("not evaluated yet", style="dim")
    step, scores = now.evaluated
    forms = {
        "student_top1": ("student", ".2%"), "teacher_top1": ("teacher", ".2%"), "agreement_top1": ("agreement", ".2%"),
        "kl": ("KL", ".4f"),
    }  # fmt: skip
    told = [f"{name} {scores[key]:{form}}" for key, (name, form) in forms.items() if scores.get(key) is not None]
    return Text(f"evaluated after step {step:,}: " + "   ".join(told), style="cyan")


def _fleet(teacher: TeacherNow, room: int) -> Group:
    """The replicas, the busiest first; what finds no room is counted; and what those say who are away."""
    state = teacher.state
    notes = [f"{state.rows:,} rows answered"]
    notes += [f"{state.waiting} requests wait"] if state.waiting else []
    notes += [f"{state.retries} sent again"] if state.retries else []
    notes += [f"{state.hedges} sent twice"] if state.hedges else []
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("replica", "", "rows/s", "under way", "latency"):
        table.add_column(name, justify="left" if name in ("replica", "") else "right", no_wrap=True)
    shown = sorted(state.replicas, key=lambda one: -(teacher.rows_per_s.get(one.target) or 0.0))
    for one in shown[:room]:
        rate = teacher.rows_per_s.get(one.target)
        table.add_row(
            one.target, Text("serves", "green") if one.serves else Text("away", "red"),
            "" if rate is None else f"{rate:,.0f}", f"{one.in_flight} of {one.window}",
            f"{1000 * one.latency_s:,.0f} ms" if one.latency_s else "",
        )  # fmt: skip
    if len(shown) > room:
        table.add_row(f"and {len(shown) - room} more")
    away = [f"{one.target}: {one.words}" for one in state.replicas if not one.serves and one.words][:_AWAY]
    last_words = [Text(words, "red", no_wrap=True, overflow="ellipsis") for words in away]
    return Group(Text(f"teacher {teacher.name}: " + ", ".join(notes)), table, *last_words)


def duration(seconds: float) -> str:
    """12 s, 3:05, 2:03:10, 4 d 02:03."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24:02}:{minutes % 60:02}"
    if hours:
        return f"{hours}:{minutes % 60:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}" if minutes else f"{whole} s"
