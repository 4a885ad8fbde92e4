"""Compiles native.cpp with the machine's own compiler on first use and keeps it in the user's cache folder."""
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-pthread")
COMPILERS = ("c++", "clang++", "g++")

class Unavailable(Exception):
    """Why there is no native engine here, in one line."""

def folders() -> list[Path]:
    """Where the compiled engine may be kept, the first choice first."""
    temporary = Path(tempfile.gettempdir(), f"tinymedusa-{os.getuid()}")
    try:
        return [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tinymedusa"), temporary]
    except RuntimeError:                    # a user whom the system does not know has no home
        return [temporary]

def processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))

def compile_to(file: Path, command: list[str]) -> None:
    """Compile into `file`, whole or not at all, whoever else does. Its last 32 bytes are the hash of those before."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder, "native.so")
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            message = done.stderr.strip() or f"status {done.returncode}"
            if "No space left" in message:
                raise OSError("no space left on the device")
            raise Unavailable(f"{command[0]} can't compile {SOURCE.name}: {message.splitlines()[-1]}")
        code = made.read_bytes()
        made.write_bytes(code + hashlib.sha256(code).digest())
        os.replace(made, file)

def is_whole(file: Path) -> bool:
    code = file.read_bytes() if file.is_file() else b""
    return hashlib.sha256(code[:-32]).digest() == code[-32:]

@lru_cache
def library(*options: str) -> ctypes.CDLL:
    """The engine, compiled if no folder has one for this source, compiler and processor. options: of the compiler, in
    the place of -march=native; CXX and CXXFLAGS of the environment count. Unavailable: it can't be compiled here."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), COMPILERS[0])
    if not shutil.which(compiler):
        raise Unavailable(f"there is no C++ compiler here: install {', '.join(COMPILERS)}, or name one in CXX")
    more = os.environ.get("CXXFLAGS", "").split()
    command = [compiler, *FLAGS, *(options or ("-march=native",)), *more, str(SOURCE)]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\n".join((SOURCE.read_text(), version, *command, processor())).encode()).hexdigest()
    for folder in folders():
        file = folder / f"native-{key[:24]}.so"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = folder.lstat()                   # what is in it is run, and others can make one in /tmp
            if not stat.S_ISDIR(made.st_mode) or made.st_uid != os.getuid() or made.st_mode & 0o022:
                raise OSError(f"{folder} is no folder that only you can write to")
            if not is_whole(file):
                compile_to(file, command)
            return ctypes.CDLL(str(file))
        except OSError as error:
            problem = error
    raise Unavailable(f"the compiled step can't be kept: {problem}")
