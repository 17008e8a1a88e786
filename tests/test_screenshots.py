"""How the documentation's pictures are made: what is photographed is what was on the screen."""

import io
import os
import re
import shutil
import sys
import time

import prometheus_client
import pytest
import requests
from PIL import Image
from prometheus_client import CollectorRegistry, Gauge
from rich.console import Console
from rich.live import Live
from rich.text import Text

from docs import grafana
from docs.browser import chromium, installed
from docs.terminal import Screen, photograph, plain, running


def written_by_a_live_view(views, between=()):
    """What rich writes to a terminal that shows these views one after another, and a line between two."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, height=20, color_system="truecolor")
    with Live(console=console, auto_refresh=False) as live:
        for number, view in enumerate(views):
            live.update(Text(view, style="bold red"), refresh=True)
            if number < len(between):
                console.print(between[number])
    return file.getvalue().replace("\n", "\r\n")  # as a terminal's driver does


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_view_that_is_drawn_over_itself_is_there_once_below_the_lines_that_scrolled_by(size):
    text = written_by_a_live_view(["one\ntwo\nthree", "four", "five\nsix\nseven\neight"], ["first line", "second line"])
    screen = Screen()
    for begin in range(0, len(text), size):
        screen.feed(text[begin : begin + size])
    assert plain(screen.lines).rstrip() == "first line\nsecond line\nfive\nsix\nseven\neight"


def test_a_view_is_taken_whole_or_not_at_all():
    text = written_by_a_live_view([f"{number}\n{number}\n{number}" for number in range(5)])
    screen, seen = Screen(), set()
    for letter in text:
        screen.feed(letter)
        seen.add(plain(screen.whole).rstrip())
    assert seen == {"", *(f"{number}\n{number}\n{number}" for number in range(5))}


def test_a_photograph_has_the_words_in_their_colours_and_asks_nobody_for_a_font(tmp_path):
    photograph(["\x1b[31mred\x1b[0m words", "and [brackets] & more"], tmp_path / "a.svg", 40, "a title")
    drawing = (tmp_path / "a.svg").read_text()
    for words in ("red", "words", "[brackets]", "a&#160;title"):
        assert words in drawing, words
    assert len(set(re.findall(r"fill: (#\w+)", drawing))) >= 2, "two colours of text"
    assert not re.findall(r"@font-face|url\((?!#)|@import|href", drawing)


def test_a_program_has_a_terminal_of_the_size_that_is_wanted():
    with running(["sh", "-c", "stty size; printf '%s x %s' $COLUMNS $LINES"], 71, 23, dict(os.environ)) as watched:
        while watched.goes_on():
            pass
        assert watched.end() == 0
    assert plain(watched.screen.lines).splitlines() == ["23 71", "71 x 23"]


@pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus on this machine: apt-get install prometheus")
def test_prometheus_asks_the_job_that_is_photographed(tmp_path):
    registry = CollectorRegistry()
    Gauge("funmatch_student_step", "updates done", registry=registry).set(7)
    servers = [prometheus_client.start_http_server(0, "127.0.0.1", registry) for _ in range(2)]
    (teacher, student), deadline = (server.server_port for server, _ in servers), time.monotonic() + 20
    with grafana.prometheus(tmp_path / "new", [teacher], student) as address:
        found = []
        while len(found) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            answer = requests.get(f"{address}/api/v1/query", {"query": "funmatch_student_step"}, timeout=5).json()
            found = answer["data"]["result"]
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()
    assert {(one["metric"]["job"], one["value"][1]) for one in found} == {("teacher", "7"), ("student", "7")}


def test_where_there_is_no_grafana_there_is_no_picture_of_it_and_elsewhere_it_is_that_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for given in (None, "http://127.0.0.1:3000"):
        with grafana.beside(given, tmp_path, [1], 2) as address:
            assert address == given
    assert list(tmp_path.iterdir()) == []


STAND_IN = """#!{python}
import http.server, json, os, pathlib, sys

assert sys.argv[1] == "server" and sys.argv[2].startswith("--homepath="), sys.argv
provisioning = pathlib.Path(os.environ["GF_PATHS_PROVISIONING"])
(source,) = json.loads((provisioning / "datasources" / "all.yml").read_text())["datasources"]
(provider,) = json.loads((provisioning / "dashboards" / "all.yml").read_text())["providers"]
(file,) = pathlib.Path(provider["options"]["path"]).glob("*.json")
dashboard = json.loads(file.read_text())
panels = "".join(f"<p class=panel-content>{{panel['title']}}</p>" for panel in dashboard["panels"])
page = f"<style>body {{{{ background: #f00 }}}}</style><a href='{{source['url']}}'></a>{{panels}}"
answers = {{"/api/health": "ok", f"/d/{{dashboard['uid']}}": page}}

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        found = answers.get(self.path.partition("?")[0])
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write((found or "").encode())

address = os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])
http.server.ThreadingHTTPServer(address, Answer).serve_forever()
"""
"""Answers as a Grafana does at the addresses that are asked, out of the files that it is given. It draws nothing."""


@pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus on this machine: apt-get install prometheus")
@pytest.mark.skipif(installed() is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_grafana_is_given_the_dashboard_and_a_prometheus_and_is_photographed(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "grafana"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with grafana.beside(None, tmp_path, [1], 2) as address, chromium() as browser:
        assert address
        grafana.photograph(browser, address, 5, tmp_path / "grafana.png")
    with Image.open(tmp_path / "grafana.png") as picture:
        assert picture.convert("RGB").getpixel((picture.width - 5, 5)) == (255, 0, 0), "of that page"
    with pytest.raises(requests.ConnectionError):  # it ended, too
        requests.get(address, timeout=5)
