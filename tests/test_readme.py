"""The README's commands run as they stand (but its set-up and the tests themselves, which .ci/run does)."""
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()
            if line.startswith("python ") and "  # takes " not in line]


def test_the_readme_names_its_two_commands_first():
    assert len(BLOCKS) >= 2 and len(COMMANDS) >= 3
    for block, ending in zip(BLOCKS[:2], ("python generate.py --compare --profile", "python -m pytest"), strict=True):
        line, = block.strip().splitlines()
        assert line.startswith("python3 -m venv .venv") and line.endswith(ending)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all commands, since later ones read what earlier ones wrote; nothing lands in the project."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("model", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder):
    _, script, *args = shlex.split(command, comments=True)
    done = subprocess.run([sys.executable, ROOT / script, *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout and "Traceback" not in done.stderr
