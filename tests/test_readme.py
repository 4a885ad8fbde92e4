"""README.md and docs/: commands and examples run as they stand, drawings are what the code prints, links are right."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import MODEL, ROOT

import tinymedusa
from loading.trees import drawing, read_tree
from tinymedusa import PlainDecoder

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, *DOCS = (page.read_text(encoding="utf-8") for page in PAGES)


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """What is run here: not the set-up and the tests themselves, nor what takes long and says so."""
    return [line for block in blocks(text, "sh") for line in block.splitlines()
            if line.startswith("python ") and not line.startswith("python -m ") and "  # takes " not in line]


COMMANDS = list(dict.fromkeys(command for text in (README, *DOCS) for command in commands(text)))
FIRST = {command.split()[1]: command for command in reversed(COMMANDS)}.values()
EXAMPLES = [pytest.param(block, id=f"{page.stem}{i}") for page, text in zip(PAGES, (README, *DOCS), strict=True)
            for i, block in enumerate(blocks(text, "python"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all commands, since later ones read what earlier ones wrote; nothing is written to the project."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("model", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    return folder


def run(command: str, folder: Path) -> str:
    """What it prints. The first command of each script starts as people start it, the others are forked."""
    _, script, *args = shlex.split(command, comments=True)
    by_people = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, ROOT / script, *args], cwd=folder, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, env=by_people) if command in FIRST else \
        forked.run(ROOT / script, *args, cwd=folder, env=by_people if "--fast" in args else None)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


# -------------------------------------------------------------------------------------------------------- README.md

def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 260
    assert len(README.encode()) <= 16 * 1024
    assert sum(line.startswith("|") for line in lines) <= 30


def test_the_readme_names_its_two_commands_first():
    for block, ending in zip(blocks(README, "sh")[:2], (
            ". .venv/bin/activate && pip install -q -r requirements.txt && python generate.py --compare --profile",
            ". .venv/bin/activate && pip install -q -r requirements-dev.txt && "
            "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder"), strict=True):
        assert block == f"python3 -m venv .venv && {ending}\n"


def test_the_drawings_are_those_of_the_code(folder):
    plain = blocks(README)
    step = re.search(r"^    (state .*?)\n\n", tinymedusa.__doc__, re.DOTALL | re.MULTILINE)[1]
    assert step.replace("\n    ", "\n") + "\n" in plain
    paths, _ = read_tree(MODEL / "medusa", 5, 1536)
    assert drawing([(), *sorted(map(tuple, paths), key=lambda path: (len(path), path))]) + "\n" in plain
    told, _, tree = run("python generate.py --explain 1", folder).partition("\ntree: ")
    assert told.strip("\n") + "\n" in plain and tree


def test_the_library_example_writes_plain_decodings_tokens(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    example, = blocks(README, "python")
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    *printed, last = capsys.readouterr().out.split("|")
    plain = PlainDecoder(names["model"], names["decoder"].sampling)
    expected = [ids for (ids,) in plain.generate([names["prompt"]], 40, [3])]
    assert "".join(printed) == names["tokenizer"].stream(names["prompt"])(sum(expected, [])) and last == ""
    assert 1 < len(printed) < len(expected) == 40


# -------------------------------------------------------------------------------------------------------- all pages

def test_something_is_run_of_most_pages():
    assert len(COMMANDS) >= 10 and len(EXAMPLES) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder):
    assert run(command, folder)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(example, "example", "exec"), {})


@pytest.mark.parametrize("page", [*PAGES, MODEL / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    scripts = re.findall(r"python ((?:[\w/]+/)?\w+\.py)", text)
    tests = re.findall(r"pytest (tests/\S+\.py)", text)
    assert links
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in scripts + tests if not (ROOT / name).exists()]
    assert not missing
