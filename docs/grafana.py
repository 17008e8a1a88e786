"""The dashboard's picture: Grafana and Prometheus beside a job on this machine, or a Grafana that runs elsewhere.

Prometheus must look before the job begins; so both are started by whoever does the job (make_screenshots.py). The
dashboard is docker/grafana's, unchanged. Rejected: drawing the panels ourselves. It would be no picture of Grafana.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from playwright.sync_api import Browser

from docs.processes import answers, ended, free_port

DASHBOARDS = Path(__file__).resolve().parents[1] / "docker" / "grafana" / "dashboards"
_HOMES = (Path("/usr/share/grafana"), Path("/usr/local/share/grafana"))
_WIDTH, _HEIGHT = 1280, 1150  # what a first look is for: the fleet, and the student below it


@contextlib.contextmanager
def beside(elsewhere: str | None, work: Path, teachers: Sequence[int], student: int) -> Iterator[str | None]:
    """The address of a Grafana that shows the job; None where there is no way to have one.

    Args:
        elsewhere: one that runs already.
        work: a folder for what Prometheus and Grafana keep.
        teachers: ports of this machine at which the teachers' metrics are.
        student: likewise the student's.
    """
    program = shutil.which("grafana") or shutil.which("grafana-server")
    if elsewhere or not program or not shutil.which("prometheus"):
        yield elsewhere
        return
    folder = (work / "monitoring").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    with prometheus(folder, teachers, student) as source, _grafana(Path(program), folder, source) as address:
        yield address


@contextlib.contextmanager
def prometheus(folder: Path, teachers: Sequence[int], student: int) -> Iterator[str]:
    """A Prometheus that asks these ports of this machine; yields its address."""
    jobs = [
        {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
        for name, ports in (("teacher", teachers), ("student", [student]))
    ]
    address = f"127.0.0.1:{free_port()}"
    config = _written(folder / "prometheus.yml", {"global": {"scrape_interval": "2s"}, "scrape_configs": jobs})
    command = [
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'series'}",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log, _started(command, log):
        answers(f"http://{address}/-/ready")
        yield f"http://{address}"


@contextlib.contextmanager
def _grafana(program: Path, folder: Path, source: str) -> Iterator[str]:
    where = {
        "name": "Prometheus", "uid": "prometheus", "type": "prometheus", "access": "proxy", "url": source,
        "isDefault": True, "jsonData": {"timeInterval": "2s"},
    }  # fmt: skip
    provider = {"name": "funmatch", "type": "file", "options": {"path": str(DASHBOARDS)}}
    _written(folder / "provisioning" / "datasources" / "all.yml", {"apiVersion": 1, "datasources": [where]})
    _written(folder / "provisioning" / "dashboards" / "all.yml", {"apiVersion": 1, "providers": [provider]})
    port = free_port()
    settings = {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1", "GF_SERVER_HTTP_PORT": str(port), "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false", "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_PATHS_PROVISIONING": str(folder / "provisioning"), "GF_PATHS_DATA": str(folder / "grafana"),
    }  # fmt: skip
    home = next(filter(Path.is_dir, [*_HOMES, program.resolve().parents[1]]))
    command = [str(program), *(["server"] if program.name == "grafana" else []), f"--homepath={home}"]
    with (folder / "grafana.log").open("wb") as log, _started(command, log, settings):
        answers(f"http://127.0.0.1:{port}/api/health")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _started(command: Sequence[str], log: IO[bytes], settings: dict[str, str] | None = None) -> Iterator[None]:
    environment = {**os.environ, **(settings or {})}
    with ended(subprocess.Popen(command, stdout=log, stderr=log, env=environment)):
        yield


def _written(path: Path, what: object) -> Path:
    """As JSON, which is YAML too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    return path


def photograph(browser: Browser, address: str, minutes: float, picture: Path) -> None:
    """The dashboard over the last minutes."""
    shown = f"{address.rstrip('/')}/d/funmatch?kiosk&theme=light&from=now-{max(1, round(minutes))}m&to=now"
    page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
    page.goto(shown)
    page.wait_for_function("document.querySelectorAll('[data-viz-panel-key], .panel-content').length > 5")
    page.wait_for_function("!document.querySelector('[aria-label=\"Panel loading bar\"]')")
    page.screenshot(path=picture)
    page.close()
