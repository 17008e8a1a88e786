"""The pictures of the documentation, made anew: `python -m docs.make_screenshots`, into docs/images.

A real job on handwritten digits, three to eight minutes on two cores: a teacher is trained, served twice, and two
students learn from it, one from the teacher's own views and one from others. Photographed are, as a reader sees them,

    terminal.svg      the live view of the run, in its middle
    report.png        the page about the two runs
    views.png         what student and teacher saw at a step, the teachers vouching for it
    tensorboard.png   the runs in TensorBoard
    grafana.png       the dashboard, where there is Grafana: a `grafana` or `grafana-server` and a `prometheus` on the
                      path, or --grafana, the address of one that shows this job or another (docker-compose's does)

No number in them is made up. Needs Chromium. What is left out is said. Rejected: pictures that are taken by hand. They
show how it once looked.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, FloatRect, ViewportSize

from docs import grafana, terminal
from docs.browser import chromium, installed
from docs.processes import answers, ended, free_port

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
_STUDENTS = {"same_views": "same/ic+mix", "other_views": "ind/ic+mix"}  # each run's folder and --views.setting
_PHOTOGRAPHED = "same_views"
_REPLICAS = 2  # of the teacher
_COLUMNS, _LINES = 104, 18
_WIDTH = 1280  # of a window, pixels
_BOARD = ViewportSize(width=1400, height=1030)  # TensorBoard's
_REPORT = 1770  # pixels of the report from its top: what follows is the second run's first batch
_MIDDLE = 0.6  # of the run that is photographed
_VIEWS_STEP = 300
_MAX_BYTES = 250_000


def main() -> None:
    """Make the pictures of the documentation anew, from a real job."""
    parser = argparse.ArgumentParser(prog="python -m docs.make_screenshots", description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/screenshots"), help="where the job lies (%(default)s); "
                        "what is finished there is not done again")  # fmt: skip
    parser.add_argument("--out", type=Path, default=IMAGES, help="where the pictures go (docs/images)")
    parser.add_argument("--grafana", metavar="URL", help="a Grafana that has the dashboard: http://127.0.0.1:3000")
    args = parser.parse_args()
    if installed() is None:
        parser.error("no Chromium on this machine: apt-get install chromium")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the teachers end with this
    args.out.mkdir(parents=True, exist_ok=True)
    make(args.work, args.out, args.grafana)


def make(work: Path, out: Path, grafana_address: str | None) -> None:
    """Do the job in `work`, and write the pictures into `out`."""
    data, teacher = work / "digits", work / "teacher" / "model.safetensors"
    if not data.exists():
        _do("prepare", "digits", "--out", str(data))
    if not teacher.exists():
        _do("train", "--recipe", "digits/demo_teacher", "--data", str(data), "--run-dir", str(work / "teacher"))
    began, student, ports = time.monotonic(), free_port(), [(free_port(), free_port()) for _ in range(_REPLICAS)]
    with contextlib.ExitStack() as serving:
        for port, metrics in ports:
            serving.enter_context(_teacher(teacher, data, port, metrics))
        watched = grafana.beside(grafana_address, work, teachers=[metrics for _, metrics in ports], student=student)
        dashboard = serving.enter_context(watched)
        replicas = ",".join(f"127.0.0.1:{port}" for port, _ in ports)
        for name, setting in _STUDENTS.items():
            picture = out / "terminal.svg" if name == _PHOTOGRAPHED else None
            _student(work / "students" / name, setting, data, replicas, student, picture)
        _do("views", "--run-dir", str(work / "students" / _PHOTOGRAPHED), "--step", str(_VIEWS_STEP), "--rows", "3",
            "--teacher", replicas, "--out", str(work / "views.html"))  # fmt: skip
        _do("report", *(str(work / "students" / name) for name in _STUDENTS), "--out", str(work))
        with chromium() as browser:
            _page(browser, work / "views.html", out / "views.png")
            _page(browser, work / "report.html", out / "report.png", _REPORT)
            _tensorboard(browser, work / "students", out / "tensorboard.png")
            _dashboard(browser, dashboard, (time.monotonic() - began) / 60, out / "grafana.png")


def _do(*words: str) -> None:
    """One command of funmatch."""
    print("funmatch", *words, flush=True)
    subprocess.run([sys.executable, "-m", "funmatch.main", *words], env=_environment(), check=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def _teacher(model: Path, data: Path, port: int, metrics: int) -> Iterator[None]:
    command = [
        sys.executable, "-m", "teacher_server.main", "--model", str(model), "--data", str(data), "--address",
        f"127.0.0.1:{port}", "--metrics-address", f"127.0.0.1:{metrics}", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
    with ended(subprocess.Popen(command, env=_environment(), stderr=subprocess.DEVNULL)):
        answers(f"http://127.0.0.1:{metrics}/metrics")
        yield


def _student(run: Path, setting: str, data: Path, replicas: str, metrics: int, picture: Path | None) -> None:
    if (run / "summary.json").exists() and (picture is None or picture.exists()):
        return
    shutil.rmtree(run, ignore_errors=True)
    command = [
        sys.executable, "-m", "funmatch.main", "train", "--recipe", "digits/demo", "--data", str(data), "--run-dir",
        str(run), "--teacher", replicas, "--views.setting", setting, "--metrics-address", f"127.0.0.1:{metrics}",
    ]  # fmt: skip
    _learn(command, picture)


def _learn(command: Sequence[str], picture: Path | None) -> None:
    """A run in a terminal; photographed in its middle, if a picture is wanted."""
    print(*command, flush=True)
    taken = picture is None
    with terminal.running(command, _COLUMNS, _LINES, _environment()) as watched:
        while watched.goes_on():
            lines = watched.screen.whole[-_LINES:]
            if not taken and picture and _is_in_the_middle(terminal.plain(lines)):
                terminal.photograph(lines, picture, _COLUMNS, "funmatch train --recipe digits/demo")
                taken = True
        if watched.end() or not taken:
            raise SystemExit("the run failed:\n" + terminal.plain(watched.screen.whole[-_LINES:]))


def _is_in_the_middle(text: str) -> bool:
    found = re.search(r"step ([\d,]+) of ([\d,]+)", text)
    if not found:
        return False
    step, total = (int(number.replace(",", "")) for number in found.groups())
    return step >= _MIDDLE * total and "evaluated after step" in text


def _page(browser: Browser, file: Path, picture: Path, height: int | None = None) -> None:
    page = browser.new_page(viewport={"width": _WIDTH, "height": 800})
    page.goto(file.resolve().as_uri())
    part = FloatRect(x=0, y=0, width=_WIDTH, height=height) if height else None
    page.screenshot(path=picture, full_page=True, clip=part)
    page.close()
    _smaller(picture)


def _tensorboard(browser: Browser, work: Path, picture: Path) -> None:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(work),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    with ended(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)):
        answers(f"http://127.0.0.1:{port}/")
        shown = "smoothing=0&tagFilter=student_top1%7Cagreement_top1%7Ckl%7Closs&darkMode=false"
        page = browser.new_page(viewport=_BOARD)
        page.goto(f"http://127.0.0.1:{port}/?{shown}#timeseries")
        page.wait_for_function("document.querySelectorAll('line-chart').length > 5")
        page.get_by_role("button", name="Settings").click()
        time.sleep(3)  # curves come in one by one, and nothing says which is the last
        page.screenshot(path=picture)
        page.close()
    _smaller(picture)


def _dashboard(browser: Browser, address: str | None, minutes: float, picture: Path) -> None:
    if address is None:
        print(f"{picture.name} is left out: no Grafana with a Prometheus on the path, and no --grafana URL")
        return
    grafana.photograph(browser, address, minutes, picture)
    _smaller(picture)


def _smaller(picture: Path) -> None:
    """With 256 colours: text and curves look the same in a fifth of the bytes."""
    with Image.open(picture) as whole:
        # Maximum coverage: others give the few pixels of a curve the colour of something else.
        few = whole.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    data = io.BytesIO()
    few.save(data, format="PNG", optimize=True)
    picture.write_bytes(data.getvalue())
    if len(data.getvalue()) > _MAX_BYTES:
        print(f"{picture} has {len(data.getvalue()):,} bytes, which is much for a page: show less on it")


if __name__ == "__main__":
    main()
