"""README and docs/: every command would be taken as it is written, and what they name is there.

What the commands do is tried by test_afternoon.py and test_guides.py, by test_compose.py where there is a Docker
engine, and by .ci/run for make's verbs; kubectl is run by none. docs/LOG.md is a diary: its commands were right on
their day.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import page_commands
from page_commands import WrongError, all_flags, check, mentions, words
from shell_blocks import ROOT, Block, blocks, session, shell_blocks
from student_trainer.config import settings
from student_trainer.recipes import RECIPES

PAGES = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "LOG.md"}
)
CONFIG = RECIPES["digits/demo"].config
OURS = ("tests/test_docs.py",)  # holds names of nothing
OTHER_LANGUAGES = {"text", "env", "proto", "python", "json", "yaml"}

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "make", "git"))), reason="needs bash, make and git, as a checkout's user has"
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """What a page has in `single quotes of code`."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


@functools.cache
def tracked() -> tuple[str, ...]:
    """Names of the repository's files, those included that are not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return tuple(listed.stdout.splitlines())


@functools.cache
def source() -> str:
    """All text of the repository but its pages: where a name of a page must come from."""
    ends = (".py", ".sh", ".proto", ".yml", ".yaml", ".toml", ".json", ".example", "Makefile")
    files = [name for name in tracked() if name.endswith(ends) and not name.startswith("docs/") and name not in OURS]
    return "\n".join((ROOT / name).read_text() for name in files if (ROOT / name).is_file())


def faults(typed: list[Block], folder: Path) -> list[str]:
    """What is wrong with the commands of some blocks."""
    done = session(typed, folder)
    wrong = [f"bash ends with {done.code}: {done.stderr.strip()}"] if done.code else []
    for command in done.commands:
        try:
            check(command)
        except WrongError as error:
            wrong.append(str(error))
    known = (ROOT / ".env.example").read_text()
    written = done.env + "".join(block.text for block in typed if block.language == "env")
    names = re.findall(r"^(\w+)=", written, re.M)
    return wrong + [f"{name} is no variable of .env.example" for name in names if f"\n{name}=" not in known]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_block_would_be_taken(page, tmp_path):
    assert (
        faults([block for block in blocks(page.read_text()) if block.language in ("", "bash", "sh", "env")], tmp_path)
        == []
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_says_what_it_is(page):
    """One without a language is typed into a shell: a listing that is not, is seen by the test above."""
    assert {block.language for block in blocks(page.read_text())} <= {"", "bash", "sh"} | OTHER_LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_reader_who_types_bare_names_was_told_to_activate_the_environment(page):
    bare = re.search(r"^(?:\w+=\S+ )?(funmatch|python|torchrun|tensorboard) ", "\n".join(
        block.text for block in shell_blocks(page.read_text())), re.M)  # fmt: skip
    assert bare is None or "source .venv/bin/activate" in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_command_that_a_sentence_names_could_be(page):
    wrong = []
    for argv in map(words, spans(page)):
        if len(argv) > 1 and (argv[0].startswith(".venv/bin/") or argv[0] in page_commands.KNOWN):
            try:
                mentions(argv)
            except WrongError as error:
                wrong.append(str(error))
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_flag_that_a_sentence_names_is_one(page):
    text = [span for span in spans(page) if span.startswith("--")]
    flags = {arg.partition("=")[0] for span in text for arg in span.split() if arg.startswith("--")}
    assert flags - all_flags() == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_have_one_spelling_in_all_pages_that_of_help(page):
    """The parsers take - and _ alike."""
    assert re.findall(r"(?<![\w-])--[\w.-]*_[\w.-]*", page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_module_recipe_and_name_in_code_is_there(page):
    assert [span for span in spans(page) if not _is_there(span)] == []


def _is_there(span: str) -> bool:
    """Whether what looks like a name of ours is one; what does not is let through."""
    top = {name.partition("/")[0] for name in tracked()}
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", span):
        first = span.partition("/")[0]
        if first in {name.partition("/")[0] for name in RECIPES}:
            return any(f"{name}/".startswith(span.rstrip("/") + "/") for name in RECIPES)
        return first not in top or (ROOT / span).exists()
    if re.fullmatch(r"[\w-]+\.(py|sh|md|yml|yaml|proto|toml|lock)", span):
        return any(f"/{name}".endswith(f"/{span}") for name in tracked()) or span in source()
    if re.fullmatch(r"[\w-]+\.(jsonl?|html|png|pem|key|css)", span):
        return span in source()
    if re.fullmatch(r"[a-z_]+(\.\w+)+", span) and span.partition(".")[0] in top:
        return _is_ours(span)
    if re.fullmatch(r"[A-Za-z]\w*_\w*", span):
        return re.search(rf"\b{span}\b", source()) is not None
    return True


def _is_ours(dotted: str) -> bool:
    """A module, something in a module, or a setting."""
    if dotted in settings(CONFIG):
        return True
    parts = dotted.split(".")
    for number in range(len(parts), 0, -1):
        module = ".".join(parts[:number])
        if (ROOT / Path(*parts[:number])).is_dir() or (ROOT / Path(*parts[:number])).with_suffix(".py").is_file():
            if importlib.util.find_spec(module) is None:
                return False
            found = importlib.import_module(module)
            return number == len(parts) or hasattr(found, parts[number])
    return False


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "LOG.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_every_link_leads_somewhere(page):
    lost = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if "://" in target or target.startswith("mailto:"):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert lost == []


def anchors(page: Path) -> set[str]:
    """Of its headings, as the site and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


# --- that these tests can fail


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("funmatch trian --recipe digits/demo", "trian"),
        ("funmatch train --recipe digits/dema", "digits/dema"),
        ("funmatch train --recipe digits/demo --optim.epoch 3", "optim.epoch"),
        ("funmatch train --recipe digits/demo --optim.epochs many", "many"),
        ("funmatch train --recipe digits/demo --views.setting same/it", "same/it"),
        ("funmatch train --recipe digits/demo --student.architecture resnet5o", "resnet5o"),
        ("funmatch train --recipe digits/demo --student.weights bit:R51", "R51"),
        ("funmatch train --recipe digits/demo --teacher localhost", "localhost"),
        ("funmatch train --processes none --recipe digits/demo", "--processes"),
        ("NETS=x\nfunmatch train --recipe digits/demo --student.architecture $NET", "NET: unbound"),
        ("funmatch serve --model tf_efficientnet_lite2.in2k", "in2k"),
        ("funmatch serve --model x.safetensors --adress 127.0.0.1:1", "adress"),
        ("funmatch serve --model x.safetensors --address 0.0.0.0:1", "--tls-cert"),
        ("funmatch prepare folder --out data/x --hold-uot 0.1", "hold-uot"),
        ("funmatch export --onnx --out x", "RUN"),
        ("funmatch views --step 1", "--run-dir"),
        ("funmatch plan --recipe imagenet/funmatch/9600 --teacher-rate 0", "--teacher-rate"),
        ("funmatch doctor --prot 1", "--prot"),
        ("funmatch report --uot x runs/demo", "--uot"),
        ("funmatch completion csh", "bash"),
        (".venv/bin/torchrun --nprocs=2 student_trainer/main.py --recipe digits/demo", "nprocs"),
        (".venv/bin/torchrun --nproc-per-node=2 student_trainer/man.py --recipe digits/demo", "script"),
        (".venv/bin/pyhton -m data_prep.check x", "No such file"),
        ("python -m data_prep.chek x", "data_prep.chek"),
        ("python -m student_trainer.recipes digits/dema", "digits/dema"),
        ("python -m student_trainer.sweep flowers102/laptop --grid lr=a", "lr=1,2"),
        ("python -m benchmarks.bench waire", "waire"),
        ("python -c 'import timm; print('", "never closed"),
        ("make demmo", "demmo"),
        ("make demo DATE=digits", "DATE"),
        ("make demo DATA=digit", "digit"),
        ("tensorboard --logdri runs", "logdri"),
        ("docker/make_kyes.sh keys", "No such file"),
        ("sh docker/make_kyes.sh keys", "make_kyes"),
        ("cp .env.exampel .env", ".env.exampel"),
        ("printf 'ADRESS=1\n' >> .env", "ADRESS"),
        ("export COMPOSE_FILE=docker-compose.yml:compose.gpu.yml\ndocker-compose up -d", "compose.gpu.yml"),
        ("docker-compose up -d techer", "techer"),
        ("docker compose up -d --scale techer=2", "techer"),
        ("docker-compose up -d redis", "--profile redis"),
        ("docker-compose --profile grafana up -d", "grafana"),
        ("docker-compose up --no-dep", "--no-dep"),
        ("docker-compose run --entrypoint 'python -m student_trainer.repotr' student x", "repotr"),
        ("docker build -f docker/student.dockerfile -t x .", "student.dockerfile"),
        ("kubectl -n funmatch apply -f docker/k8s/studnet.yaml", "studnet"),
        ("kubectl -n funmatch logs -f job/techer", "job/techer"),
        ("kubectl -n funmatch create secret generic teacher-key --from-file=keys/token", "teacher-key"),
        ("for one in a b; do funmatch doctor; dome", "syntax error"),
        ("sudo rm -rf everything", "'rm'"),
        ("flowers/train/rose/0001.jpg", "No such file"),
    ],
)  # fmt: skip
def test_a_broken_command_is_found(typed, says, tmp_path):
    found = faults(shell_blocks(f"```bash\n{typed}\n```\n"), tmp_path)
    assert found and says in " ".join(found)


@pytest.mark.parametrize(
    "span",
    [
        "funmatch serve --adress X", "funmatch train --recipe digits/dema", "make demmo",
        "python -m data_prep.prepare folder --hold-uot 0.1", "docker-compose up -d techer", "funmatch srve --model x",
        ".venv/bin/pytest -n0 tests/test_drawn.py", ".venv/bin/pytest -n0 -m container",
    ],
)  # fmt: skip
def test_a_broken_command_in_a_sentence_is_found(span):
    with pytest.raises(WrongError):
        mentions(words(span))


@pytest.mark.parametrize(
    "span",
    ["tests/test_drawn.py", "views.drawn", "views.draw.Plam", "flowers102/funmatch/11k", "rendr.py", "techer_wait_s",
     "reprot.html"],
)  # fmt: skip
def test_a_name_of_nothing_is_found(span):
    assert not _is_there(span)


def test_a_link_to_nothing_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page, with `code`\n\n[a](#a-page-with-code) [b](#b) [c](c.md) [d](https://example.org/d)\n")
    assert anchors(page) == {"a-page-with-code"}
    with pytest.raises(AssertionError, match=r"#b.*c\.md"):
        test_every_link_leads_somewhere(page)
