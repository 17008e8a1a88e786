"""`funmatch WORD ...`: which command it becomes, what --help costs, what TAB offers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from funmatch.main import main, overview, train_command
from funmatch.words import WORDS
from student_trainer.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
DOOR = [sys.executable, "-P", "-m", "funmatch.main"]


def funmatch(*args: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([*DOOR, *args], capture_output=True, text=True, check=False, **more)


def test_the_command_is_installed_as_its_module_says():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["funmatch"] == "funmatch.main:main"
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages >= {word.module.partition(".")[0] for word in WORDS.values()}


def test_help_lists_every_word(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview() + "\n"
    assert all(f"  {word} " in overview() for word in WORDS)
    assert main([]) == 2


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("docter", "doctor"), ("reports", "report")])
def test_for_an_unknown_word_the_nearest_is_suggested(typed, meant, capsys):
    assert main([typed]) == 2
    assert f"did you mean `funmatch {meant}`?" in capsys.readouterr().err


@pytest.mark.parametrize("word", WORDS)
def test_each_word_explains_itself_with_an_example_and_without_torch(word):
    # Two seconds on a quiet core: what would take longer is to import torch.
    spy = (
        "import runpy, sys\n"
        "def fail(name):\n"
        "    if name == 'torch': raise ImportError('a --help imported torch')\n"
        "sys.meta_path.insert(0, type('Spy', (), {'find_spec': staticmethod(lambda name, *_: fail(name))}))\n"
        "sys.argv = ['x', *sys.argv[1:]]\n"
        "runpy.run_module('MODULE', run_name='__main__', alter_sys=True)"
    )
    said = funmatch(word, "--help", env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert said.returncode == 0
    assert f"example: {WORDS[word].example}" in said.stdout
    assert "Traceback" not in said.stderr
    if WORDS[word].says_more and word not in ("train", "doctor"):
        own = [sys.executable, "-c", spy.replace("MODULE", WORDS[word].module), "--help"]
        run = subprocess.run(own, capture_output=True, text=True, check=False, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip()[-40:] in said.stdout


@pytest.mark.parametrize("word", ["serve", "views"])  # a room's, and one of the door's own
def test_help_into_a_pipe_that_closes_ends_without_a_word(word):
    pipe = ["bash", "-c", '"$@" --help | head -n 1', "bash", *DOOR, word]
    run = subprocess.run(pipe, capture_output=True, text=True, check=True)
    assert run.stdout == f"funmatch {word}: {WORDS[word].does}.\n"
    assert run.stderr == ""


@pytest.mark.parametrize("module", ["models.zoo", "student_trainer.recipes"])
def test_a_list_into_a_pipe_that_nobody_reads_ends_without_a_word(module):
    run = subprocess.run(
        ["bash", "-c", '"$@" | true', "bash", sys.executable, "-m", module],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert run.stderr == ""


def test_a_recipe_s_settings_are_explained_with_its_own_values():
    said = funmatch("train", "--recipe", "digits/demo", "--help")
    assert said.returncode == 0
    assert "--optim.lr" in said.stdout
    assert f"(default: {RECIPES['digits/demo'].config.optim.epochs:g})" in said.stdout


def test_a_word_becomes_the_room_s_own_command_which_is_printed(tmp_path):
    run = funmatch("prepare", "folder", "--source", "nowhere", "--out", "new", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.splitlines()[0].endswith("-m data_prep.prepare folder --source nowhere --out new")
    assert run.stderr.startswith("$ ")


def test_a_folder_of_the_user_s_does_not_stand_in_for_a_room(tmp_path):
    (tmp_path / "data_prep").mkdir()
    (tmp_path / "data_prep" / "__init__.py").write_text("raise SystemExit('the wrong room')")
    assert "is not a folder" in funmatch("prepare", "folder", "--source", "x", "--out", "new", cwd=tmp_path).stderr


def test_one_process_needs_no_torchrun_and_several_have_it():
    script = str(ROOT / "student_trainer" / "main.py")
    assert train_command(["--recipe", "a/b"]) == [sys.executable, script, "--recipe", "a/b"]
    eight = train_command(["--recipe", "a/b", "--processes", "8", "--seed=1"])
    assert eight[3:] == ["funmatch.ranks", "--standalone", "--nproc_per_node=8", script, "--recipe", "a/b", "--seed=1"]
    assert "--nproc_per_node=gpu" in train_command(["--processes=gpu"])


@pytest.mark.parametrize("args", [["--processes", "0"], ["--processes=many"], ["--processes"], ["--processes=-1"]])
def test_a_number_of_processes_that_is_none_is_refused(args):
    with pytest.raises(ValueError, match="`gpu`"):
        train_command(args)


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    assert main(["serve", "--model", "x"]) == 2
    assert "needs torch, not installed here: pip install 'funmatch[teacher]'" in capsys.readouterr().err


@pytest.mark.suite
def test_several_processes_end_with_the_sentence_of_a_rank_and_no_traceback(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import sys; sys.exit('rank 0: the sentence')")
    ranks = [sys.executable, "-P", "-m", "funmatch.ranks", "--standalone", "--nproc_per_node=1"]
    run = subprocess.run([*ranks, script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "rank 0: the sentence" in run.stderr
    assert "Traceback" not in run.stderr

    script.write_text(f"import time; open({str(tmp_path / 'runs')!r}, 'w').close(); time.sleep(60)")
    process = subprocess.Popen([*ranks, script], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "runs").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said


def offered(script: str, *words: str) -> set[str]:
    """What bash would offer for the last of the words."""
    ask = (
        f"{script}\nCOMP_WORDS=(funmatch {' '.join(repr(word) for word in words)}); COMP_CWORD={len(words)}\n"
        '_funmatch; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    run = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


@pytest.mark.suite  # asks every word for its settings
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_words_settings_recipes_and_files():
    script = funmatch("completion", "bash").stdout
    assert offered(script, "") == set(WORDS)
    assert offered(script, "re") == {"report"}
    assert offered(script, "completion", "") == {"bash", "zsh", "fish"}
    assert offered(script, "train", "--recipe", "digits/") == {name for name in RECIPES if name.startswith("digits/")}
    assert {"--optim.lr", "--optim.batch-size"} <= offered(script, "train", "--optim.")
    assert offered(script, "train", "--proc") == {"--processes"}
    assert "--max-rows" in offered(script, "serve", "--max")
    assert offered(script, "doctor", "--tls-n") == {"--tls-name"}
    assert offered(script, "report", "pyproj") == {"pyproject.toml"}


def test_another_shell_is_refused(capsys):
    assert main(["completion", "csh"]) == 2
    assert "one of bash, zsh, fish" in capsys.readouterr().err
