"""The report page and the views sheet in a browser: they look right at every width, and ask nobody for anything."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from docs.browser import chromium, installed
from funmatch.views_page import write
from funmatch.views_seen import Vouched, look
from student_trainer.contact_sheet import first_batch_sheet
from student_trainer.report import main
from test_report import a_run
from test_views_sheet import STEP, config_for

pytestmark = pytest.mark.skipif(
    installed() is None, reason="no Chromium on this machine to open pages in: apt-get install chromium"
)

# What is wrong with a page as it is laid out now, in words: an empty list for a page that is right.
FAULTS = """(async () => {
  const faults = [], width = document.documentElement.clientWidth;
  const called = (e) => `<${e.tagName}> ${(e.alt || e.textContent).trim().slice(0, 50)}`;
  const scrolls = (e) => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
  const inline = (e) => getComputedStyle(e).display === 'inline';

  if (document.documentElement.scrollWidth > width)
    faults.push(`scrolls sideways: ${document.documentElement.scrollWidth} px in ${width}`);
  for (const e of document.body.querySelectorAll('*')) {
    if (e.closest('svg') && e.tagName !== 'svg') continue;
    if (!inline(e) && !scrolls(e) && e.scrollWidth > e.clientWidth) faults.push('overflows: ' + called(e));
    if (e.tagName === 'TD' && e.clientHeight > 8 * parseFloat(getComputedStyle(e).lineHeight))
      faults.push('shredded: ' + called(e));
    const box = e.getBoundingClientRect(), around = e.parentElement.closest('.wide');
    if (!(around && scrolls(around)) && (box.left < 0 || box.right > width + 0.5)) faults.push('cut off: ' + called(e));
  }

  for (const e of document.querySelectorAll('script, link, iframe, object, embed, base, meta[http-equiv]'))
    faults.push('may ask for more: ' + e.outerHTML.slice(0, 50));

  const drawn = [...document.querySelectorAll('svg image')].map((e) => e.href.baseVal);
  for (const source of [...[...document.images].map((e) => e.src), ...drawn]) {
    const picture = new Image();
    picture.src = source;
    await picture.decode().catch(() => {});
    if (!picture.naturalWidth || !picture.naturalHeight) faults.push('no picture: ' + source.slice(0, 50));
  }

  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => channels(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const places = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, range = document.createRange();
    if (!walker.currentNode.data.trim()) continue;
    range.selectNodeContents(walker.currentNode);
    const [dark, bright] = [light(getComputedStyle(e).color), light(paper(e))].sort((a, b) => a - b);
    if ((bright + 0.05) / (dark + 0.05) < 4.5) faults.push('pale: ' + called(e));
    if (parseFloat(getComputedStyle(e).fontSize) < 11) faults.push('small: ' + called(e));
    for (const box of range.getClientRects()) places.push([called(e), box]);
  }
  places.forEach(([one, a], i) => places.slice(i + 1).forEach(([other, b]) => {
    const over = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (over > 1 && down > 4) faults.push(`written over: ${one}; ${other}`);
  }));
  return faults;
})()"""


def unlabeled(run):
    """The run as it would be with pictures that have no labels: nothing in it is an accuracy."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if not name.endswith(("student_top1", "teacher_top1"))}
            for line in lines]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"student_top1": None, "teacher_top1": None}))
    return run


def with_first_batch(run):
    views = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    captions = [f"{number} (12,3) 40x50 flipped" for number in range(8)]
    first_batch_sheet(run / "first_batch.png", views, views, captions, student_mixed=views / np.float32(255))
    return run


def reported(root, *runs):
    main([*map(str, runs), "--out", str(root / "page")])
    return root / "page" / "report.html"


def several(root):
    """Runs of several kinds: as they are in a report, each lacks something else."""
    names = [f"a_folder_with_a_name_that_is_rather_long_{number}" for number in range(2)]
    runs = [
        with_first_batch(a_run(root / "finished")),
        a_run(root / "going_on", num_steps=25),
        a_run(root / names[0], seed=1, setting="ind/ic+mix"),
        a_run(root / names[1], seed=2, setting="ind/ic+mix", **{"optim.lr": 0.0003, "data.train": "a_word_" * 30}),
        unlabeled(a_run(root / "unlabeled", seed=5)),
    ]
    return reported(root, *runs)


def sheet(root, data, is_true=True):
    """A views sheet; or that of a teacher that saw something else in one view."""
    seen = look(config_for(data), STEP, range(3), None, (40,))
    if not is_true:
        lies = Vouched(("0" * 32, *seen.looks[1].digests[1:]), (3, 0, 0, 0), 0)
        seen = dataclasses.replace(seen, looks=(seen.looks[0], dataclasses.replace(seen.looks[1], vouched=lies)))
    write(seen, root / "sheet.html")
    return root / "sheet.html"


PAGES = {
    "one finished run": lambda root, _: reported(root, with_first_batch(a_run(root / "finished"))),
    "several runs": lambda root, _: several(root),
    "a run that goes on": lambda root, _: reported(root, a_run(root / "going_on", num_steps=25)),
    "a run without labels": lambda root, _: reported(root, unlabeled(with_first_batch(a_run(root / "unlabeled")))),
    "a run that has not begun": lambda root, _: reported(root, a_run(root / "begun", num_steps=0)),
    "a views sheet": sheet,
    "a views sheet whose digests differ": lambda root, data: sheet(root, data, is_true=False),
}


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


class Opened:
    """A page in a browser, and what it did."""

    def __init__(self, browser, file, prefers="light"):
        self.page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=prefers)
        self.asked, self.complaints = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("websocket", lambda socket: self.asked.append(socket.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        self.page.goto(file.as_uri())

    def faults_at(self, width):
        """What is wrong with it in a window of so many pixels."""
        self.page.set_viewport_size({"width": width, "height": 800})
        return self.page.evaluate(FAULTS)

    def pixels(self):
        """Grey levels of the whole page, [height, width]; closes it."""
        picture = Image.open(io.BytesIO(self.page.screenshot(full_page=True)))
        self.page.close()
        return np.asarray(picture.convert("L"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_looks_right_at_every_width_and_asks_for_nothing_but_itself(name, browser, tmp_path, tiny_data):
    file = PAGES[name](tmp_path, tiny_data)
    opened = Opened(browser, file)
    for width in (801, 800, 400, 1280):
        assert opened.faults_at(width) == [], f"at {width} px"
    assert [address for address in opened.asked if not address.startswith("data:")] == [file.as_uri()]
    assert opened.complaints == []
    light, dark = opened.pixels(), Opened(browser, file, prefers="dark").pixels()
    np.testing.assert_array_equal(light, dark, "a page is a light one, whatever its reader prefers")
    upper, lower = np.array_split(light, 2)
    assert all(0.005 < (half < 250).mean() < 0.9 for half in (upper, lower)), "ink on paper"
    assert len(np.unique(light)) > 50


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<p>words</p>", None),
        ("<p style='width: 1500px'>too wide</p>", "scrolls sideways"),
        ("<table style='table-layout: fixed; width: 60px'><tr><td>unbreakable_word</td></tr></table>", "overflows"),
        ("<p style='position: relative; left: -90px'>leaves the window</p>", "cut off"),
        ("<img src='data:image/png;base64,AAAA'>", "no picture"),
        ("<svg><image href='data:image/png;base64,AAAA'/></svg>", "no picture"),
        ("<p style='color: #bbb'>hard to read</p>", "pale"),
        ("<p style='font-size: 8px'>hard to read</p>", "small"),
        (
            "<table><tr><td style='line-height: 1; width: 1em; overflow-wrap: anywhere'>a_name_of_many_letters",
            "shredded",
        ),
        ("<link rel='preconnect' href='http://example.org'>", "may ask for more"),
        ("<p>one</p><p style='margin-top: -2em'>two</p>", "written over"),
    ],
)
def test_what_would_look_wrong_is_found(body, fault, tmp_path, browser):
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{body}</body>")
    opened = Opened(browser, tmp_path / "page.html")
    found = opened.faults_at(1280)
    opened.page.close()
    assert any(one.startswith(fault) for one in found) if fault else found == []


def test_a_request_and_an_error_are_heard(tmp_path, browser):
    (tmp_path / "page.html").write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('bad')</script>")
    opened = Opened(browser, tmp_path / "page.html")
    assert opened.asked[1:] == ["http://127.0.0.1:9/x.png"]
    assert "bad" in opened.complaints
    opened.page.close()
