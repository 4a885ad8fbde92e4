"""The engine's compiler: once for a source and a processor, kept whole, by any number of processes; else one line."""
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from fast import build
from fast.build import COMPILERS, Unavailable, is_whole

library = build.library.__wrapped__         # without its memory of what was loaded before
STUB = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The commands that compile; a tiny source in the engine's place, and fresh folders to keep it in."""
    commands, run = [], subprocess.run

    def spy(command, **options):
        commands.extend([command] if "-o" in command else [])
        return run(command, **options)
    (tmp_path / "stub.cpp").write_text(STUB)
    monkeypatch.setattr(build, "SOURCE", tmp_path / "stub.cpp")
    monkeypatch.setattr(build.subprocess, "run", spy)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXXFLAGS", raising=False)
    return commands


def kept(tmp_path) -> list[Path]:
    return sorted(path for path in tmp_path.glob("*/tinymedusa*/*"))


def test_compiled_once_for_a_source_and_its_options(compiled, tmp_path, monkeypatch):
    assert library().answer() == 42 and len(compiled) == 1
    file, = kept(tmp_path)                                                       # and no folder of the compiler's left
    assert file.parent == tmp_path / "cache" / "tinymedusa" and is_whole(file)
    assert file.parent.stat().st_mode & 0o777 == 0o700                           # nobody else writes what we run
    assert library().answer() == 42 and len(compiled) == 1
    assert library("-O0").answer() == 42 and len(compiled) == 2
    assert "-march=native" in compiled[0] and "-march=native" not in compiled[1] and "-O0" in compiled[1]
    build.SOURCE.write_text(STUB.replace("42", "43"))
    assert library().answer() == 43 and len(compiled) == 3
    monkeypatch.setattr(build, "processor", lambda: "another one")
    assert library().answer() == 43 and len(compiled) == 4 and len(kept(tmp_path)) == 4


def test_flags_of_the_environment(compiled, monkeypatch):
    library()
    monkeypatch.setenv("CXXFLAGS", " -O1  -DX=1 ")
    assert library().answer() == 42 and len(compiled) == 2
    assert {"-O1", "-DX=1", "-march=native"} <= set(compiled[1])


def test_a_process_compiles_and_loads_once(compiled):
    build.library.cache_clear()
    try:
        assert build.library() is build.library() and build.library().answer() == 42
        assert len(compiled) == 1
    finally:
        build.library.cache_clear()                                              # for the tests of the real engine


def test_the_processor_is_what_native_depends_on():
    if sys.platform.startswith("linux"):
        names = {line.partition(":")[0].strip() for line in build.processor().splitlines()}
        assert names & {"flags", "Features"} and names <= {"model name", "flags", "Features"}


@pytest.mark.parametrize("damage", [
    lambda code: b"", lambda code: code[:100], lambda code: code[:-1], lambda code: code[:len(code) // 2],
    lambda code: b"\0" * len(code), lambda code: b"garbage" * 1000, lambda code: code[:5000] + b"x" + code[5001:],
    lambda code: code + b"\0"],
    ids=["empty", "its beginning", "a byte less", "half", "zeros", "garbage", "one byte wrong", "a byte more"])
def test_a_damaged_file_is_built_anew(damage, compiled, tmp_path, monkeypatch):
    library()
    file, = kept(tmp_path)
    whole = file.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "damaged"))              # the first one is loaded: leave it
    again = tmp_path / "damaged" / "tinymedusa" / file.name
    again.parent.mkdir(parents=True)
    again.write_bytes(damage(whole))
    assert not is_whole(again)
    assert library().answer() == 42 and len(compiled) == 2
    assert is_whole(again) and ctypes.CDLL(str(again)).answer() == 42


def test_an_interrupted_compiler_leaves_nothing_that_is_used(compiled, tmp_path, monkeypatch):
    def interrupted(made, file):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build.os, "replace", interrupted)
        library()
    assert kept(tmp_path) == []
    assert library().answer() == 42 and len(compiled) == 2


# ---------------------------------------------------------------------------------------------------- where it is kept

def a_file(folder: Path) -> None:
    folder.write_text("not a folder")


def a_file_inside(folder: Path) -> None:
    folder.mkdir()
    next_to_it = "tinymedusa" if folder.name == "cache" else f"tinymedusa-{os.getuid()}"
    (folder / next_to_it).write_text("not a folder")


@pytest.mark.parametrize("spoil", [a_file, a_file_inside], ids=lambda function: function.__name__)
def test_a_cache_that_cannot_be_written_gives_way_to_the_temporary_folder(spoil, compiled, tmp_path):
    spoil(tmp_path / "cache")
    assert library().answer() == 42 and len(compiled) == 1
    file, = kept(tmp_path)
    assert file.parent == tmp_path / "temporary" / f"tinymedusa-{os.getuid()}"
    assert library().answer() == 42 and len(compiled) == 1                       # found there


@pytest.mark.parametrize("spoil", [a_file, a_file_inside], ids=lambda function: function.__name__)
def test_nowhere_to_keep_it_is_one_line(spoil, compiled, tmp_path):
    spoil(tmp_path / "cache")
    spoil(tmp_path / "temporary")
    with pytest.raises(Unavailable, match="^the compiled step can't be kept: .+") as refused:
        library()
    assert "\n" not in str(refused.value) and str(tmp_path / "temporary") in str(refused.value)


def test_a_user_without_a_home(compiled, tmp_path, monkeypatch):
    """As a container may have, whose user id is in no list."""
    def nowhere():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert library().answer() == 42
    file, = kept(tmp_path)
    assert file.parent.parent == tmp_path / "temporary"


@pytest.mark.parametrize("full", ["the compiler says so", "when it is put in its place", "when its hash is added"])
def test_a_full_disk_is_one_line(full, compiled, tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")
    if full == "the compiler says so":
        compiler(tmp_path, 'echo "ld: final link failed: No space left on device" >&2\nexit 1', monkeypatch)
    elif full == "when it is put in its place":
        monkeypatch.setattr(build.os, "replace", no_space)
    else:
        monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(Unavailable, match="^the compiled step can't be kept: .*[nN]o space left on .*device$"):
        library()
    assert kept(tmp_path) == []
    monkeypatch.undo()


def test_a_folder_that_code_cannot_be_loaded_from(compiled, tmp_path, monkeypatch):
    """Mounted noexec, say."""
    load, tried = ctypes.CDLL, []

    def refuse(name):
        tried.append(name)
        if str(tmp_path / "cache") in name:
            raise OSError("failed to map segment from shared object")
        return load(name)
    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    assert library().answer() == 42 and library().answer() == 42
    assert len(tried) == 4 and len(compiled) == 2                                # one for each folder, then none


# ------------------------------------------------------------------------------------------------------- the compiler

def compiler(folder: Path, script: str, monkeypatch) -> Path:
    """A compiler of our own in CXX."""
    file = folder / "own-compiler"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))
    return file


@pytest.mark.parametrize("variable, value", [("CXX", "/nonexistent"), ("PATH", "/nonexistent")])
def test_without_a_compiler_the_line_names_those_that_would_do(variable, value, compiled, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(Unavailable) as refused:
        library()
    line, = str(refused.value).splitlines()
    assert line.startswith("there is no C++ compiler here: install ") and "CXX" in line
    assert all(name in line for name in COMPILERS) and not compiled


def test_the_compiler_that_is_found_first_or_named(compiled, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    library()
    assert compiled[0][0] in COMPILERS
    named = compiler(tmp_path, f'exec {compiled[0][0]} "$@"', monkeypatch)
    assert library().answer() == 42
    assert compiled[1][0] == str(named)


@pytest.mark.parametrize("script, line", [
    ("echo one >&2; echo two: the reason >&2; exit 1", "two: the reason"), ("exit 3", "status 3"),
    ("kill -9 $$", "status -9")], ids=["two lines", "silent", "killed"])
def test_a_compiler_that_fails_is_one_line(script, line, compiled, tmp_path, monkeypatch):
    file = compiler(tmp_path, script, monkeypatch)
    with pytest.raises(Unavailable) as refused:
        library()
    assert str(refused.value) == f"{file} can't compile stub.cpp: {line}"
    assert kept(tmp_path) == []


def test_a_source_that_does_not_compile_is_one_line(compiled, tmp_path):
    build.SOURCE.write_text("int main( {\nreturn nothing; }\n")
    with pytest.raises(Unavailable, match="can't compile stub.cpp: .+") as refused:
        library()
    assert "\n" not in str(refused.value) and kept(tmp_path) == []


# -------------------------------------------------------------------------------------------------------- many at once

AT_ONCE = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from fast import build
build.SOURCE = Path({source!r})
print(build.library().answer())
"""


def test_processes_that_build_at_once_all_work(tmp_path):
    """With a compiler that begins when both of them have called it."""
    (tmp_path / "stub.cpp").write_text(STUB)
    slow = tmp_path / "slow"
    slow.write_text(f"""#!/bin/sh
case "$*" in *stub.cpp*)
    echo compiling >> {tmp_path}/log
    for i in $(seq 300); do [ $(wc -l < {tmp_path}/log) -ge 2 ] && break; sleep 0.1; done
esac
exec {next(filter(shutil.which, COMPILERS))} "$@"
""")
    slow.chmod(0o755)
    script = AT_ONCE.format(root=str(ROOT), source=str(tmp_path / "stub.cpp"))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(slow), "CXXFLAGS": ""}
    running = [subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate() for process in running] == [("42\n", "")] * 2
    assert (tmp_path / "log").read_text() == "compiling\n" * 2
    file, = (tmp_path / "cache" / "tinymedusa").iterdir()
    assert is_whole(file)


def open_to_all(folder, tmp_path):
    folder.mkdir()
    folder.chmod(0o777)


def a_link(folder, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "theirs")


def of_another(folder, tmp_path):
    if os.geteuid():
        pytest.skip("only root gives folders away")
    folder.mkdir(mode=0o700)
    os.chown(folder, 1234, 1234)


@pytest.mark.parametrize("made", [open_to_all, a_link, of_another], ids=lambda function: function.__name__)
def test_what_others_can_write_to_is_not_run(made, compiled, tmp_path, monkeypatch):
    """A folder with our name in the place for temporary files, made by somebody who knows it."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    (tmp_path / "temporary").mkdir()
    folder = tmp_path / "temporary" / f"tinymedusa-{os.getuid()}"
    made(folder, tmp_path)
    with pytest.raises(Unavailable, match=f"can't be kept: {folder} is no folder that only you can write to"):
        library()
    assert not compiled and not list(folder.iterdir())
    if made is open_to_all:
        folder.chmod(0o700)
        assert library().answer() == 42
