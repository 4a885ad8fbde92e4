"""Stopped at any moment, by Ctrl-C, SIGTERM or kill -9, or by a full disk: no traceback, nothing that passes for whole.

Scripts run in processes forked by a server that has torch imported, so that dozens of them take seconds.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from conftest import ROOT

from extras.command_line import command_line
from llama import Llama, LlamaConfig
from loading.documents import beside, read_tokens
from loading.files import UserError
from loading.tokenizer import Tokenizer
from loading.trees import read_tree
from tinymedusa import Tree
from variants.heads import load_heads

# with constants by which it is quick, though other tests disturb its timings
TUNE = f"""
import extras.tune, runpy
extras.tune.NODES, extras.tune.ROUNDS = (2, 4, 8), 2
runpy.run_path({str(ROOT / "generate.py")!r}, run_name="__main__")
"""


def run(script, *argv, folder, delay=0.0, number=0, largest=0):
    """→ exit status, stderr, stdout, seconds (behind the signal, if it gets one: after a delay, or when a log has
    so many lines)."""
    begin = None

    def meanwhile(process):
        nonlocal begin
        if number:
            while isinstance(delay, Path) and not (delay.exists() and delay.read_bytes().count(b"\n") > 12):
                time.sleep(0.001)
            time.sleep(0 if isinstance(delay, Path) else delay)
            process.send_signal(number)
        begin = time.perf_counter()
    command = ["-c", TUNE] if "--tune" in argv else [ROOT / f"{script}.py"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = forked.run(*command, *argv, cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"},
                      meanwhile=meanwhile, largest=largest)
    return done.returncode, done.stderr, done.stdout, time.perf_counter() - begin


@pytest.fixture
def work(tiny_folder, tmp_path):
    """A folder with texts, and what the three scripts are asked to do in it."""
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"the dog {i} saw a cat " * 3 for i in range(120)))
    (tmp_path / "o.txt").write_text("\n".join(f"the dog {i}" for i in range(30)))
    model = ["--model", tiny_folder]
    return tmp_path, {
        "generate": ["generate", *model, "--prompt", "the dog", "--prompt", "a", "--json", "--max-new-tokens", "50"],
        "batch": ["generate", *model, "--prompts-file", "o.txt", "--batch-size", "4", "--max-new-tokens", "50"],
        "tune": ["generate", *model, "--tune", "o.txt", "--max-new-tokens", "20", "--tree", "tree.json"],
        "interactive": ["generate", *model, "--interactive"],
        "tokenise": ["prepare_data", *model, "--text", "t.txt", "--out", "a.bin"],
        "distill": ["prepare_data", *model, "--openings", "o.txt", "--out", "a.bin", "--max-new-tokens", "50"],
        "train": ["train_heads", *model, "--data", "d.bin", "--out", "h", "--epochs", "10", "--save-every", "5"]}


def whole_or_absent(folder):
    """No temporary file, and whatever stands there can be used."""
    model, left = Llama.from_pretrained(folder / "tiny"), [p.name for p in folder.rglob("*") if ".tmp" in p.name]
    tokenizer = Tokenizer(folder / "tiny", model.config)
    assert not left, left
    if (folder / "a.bin.json").exists():
        assert read_tokens(folder / "a.bin", tokenizer)
    if (folder / "h" / "config.json").exists():
        heads = load_heads(folder / "h", model)
        Tree.from_pretrained(folder / "h", heads)
    if (folder / "tree.json").exists():
        heads = load_heads(folder / "tiny/medusa", model)
        read_tree(folder / "tiny/medusa", len(heads), heads.draft_size, str(folder / "tree.json"), "cpu")


@pytest.mark.parametrize("name", ["generate", "batch", "tune", "tokenise", "distill", "train"])
def test_a_signal_at_any_moment(name, work):
    folder, does = work
    run("prepare_data", "--model", folder / "tiny", "--text", "t.txt", "--out", "d.bin", folder=folder)
    whole, rng, seen = run(*does[name], folder=folder)[3], random.Random(name), set()
    times, ends = int(os.environ.get("STOPS", 4 if name == "train" else 8)), {130, 143}
    if name == "train":
        ends = {130}                                                             # a training ends by both alike
    for i in range(6 * times):
        if i >= times and ends <= seen:                                          # where all came too early or too late
            break
        number, delay = (signal.SIGINT, signal.SIGTERM)[i % 2], whole * (i % times + rng.random()) / times
        for stale in (*beside(folder / "a.bin"), folder / "a.bin.partial", folder / "h/checkpoint.pt"):
            stale.unlink(missing_ok=True)
        status, err, out, seconds = run(*does[name], folder=folder, delay=delay, number=number)
        assert "Traceback" not in err and "rror" not in err, err
        assert status in (0, 128 + number, 130, -number) and seconds < 10, (status, err)
        assert status >= 0 or "stopped" not in err                               # below 0: before main, or behind it
        assert [json.loads(line) for line in out.splitlines()] if name == "generate" and out.endswith("\n") else True
        whole_or_absent(folder)
        seen.add(status)
    assert ends <= seen, seen


def as_another_error(number):
    """safetensors' slices answer a Ctrl-C inside them with a ValueError."""
    try:
        signal.raise_signal(number)
    except BaseException:
        raise ValueError("could not determine the shape") from None


def swallowed(number):
    """Python only tells what is raised in a `__del__`, and goes on."""
    class Bar:
        def __del__(self):
            signal.raise_signal(number)
    Bar()
    time.sleep(10)
    raise ValueError("went on")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("way", [as_another_error, swallowed])
def test_a_signal_that_foreign_code_gets(way, number, capsys):
    begin, before = time.perf_counter(), {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stop:
            command_line(lambda: way(number))
        assert stop.value.code == 128 + number and capsys.readouterr().err == "stopped\n"
        assert time.perf_counter() - begin < 5
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_signal_before_the_tokenizer_library_is_called():
    """Between the guard and what it guards: the guard is thrown away, which is no error of the library's."""
    guard = Tokenizer.reading("can't encode")
    guard.__enter__()
    guard.gen.close()
    for stop in KeyboardInterrupt, SystemExit:
        with pytest.raises(stop), Tokenizer.reading("can't encode"):
            raise stop


def test_closed_outputs(monkeypatch):
    """`>&-` and `2>&-`: Python has None there."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    command_line(lambda: print(sys.stdout.write("text"), file=sys.stderr))


def test_ctrl_c_while_torch_is_imported(work):
    """In a process of its own: the scripts take care before they import anything that takes long."""
    folder, does = work
    for name in ("generate", "tokenise", "train"):
        script, *argv = map(str, does[name])
        process = subprocess.Popen([sys.executable, ROOT / f"{script}.py", *argv], cwd=folder, stderr=subprocess.PIPE,
                                   stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(
                                       signal.SIGINT, signal.default_int_handler))
        time.sleep(0.25)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == -signal.SIGINT and not out and b"Traceback" not in err, err


def test_kill_9_loses_no_more_than_the_last_interval(work):
    folder, does = work
    run("prepare_data", "--model", folder / "tiny", "--text", "t.txt", "--out", "d.bin", folder=folder)
    status, err, whole, _ = run(*does["train"], "--log-every", 1, "--json", folder=folder)
    assert status == 0, err
    shutil.rmtree(folder / "h")
    status, *_ = run(*does["train"], "--log-every", 1, folder=folder, delay=folder / "h/metrics.jsonl",
                     number=signal.SIGKILL)
    assert status == -signal.SIGKILL and not (folder / "h/config.json").exists()
    logged = [json.loads(line)["step"] for line in (folder / "h/metrics.jsonl").read_text().splitlines()]
    status, err, out, _ = run(*does["train"], "--log-every", 1, "--resume", "--json", folder=folder)
    assert status == 0, err
    first = int(err.split("training heads:")[1].split("/")[0].rpartition(" ")[2])            # where its bar begins
    assert logged[-1] - 5 <= first <= logged[-1] + 1 and first % 5 == 0 and first >= 5
    assert json.loads(out) == json.loads(whole)                                  # the very same training


@pytest.mark.parametrize("name", ["tokenise", "distill"])
def test_kill_9_while_data_are_prepared_leaves_nothing_to_take_for_whole(name, work):
    folder, does = work
    tokenizer = Tokenizer(folder / "tiny", LlamaConfig(vocab_size=300))
    killed, seconds = 0, run(*does[name], folder=folder)[3]
    for delay in (0.1 * seconds, 0.3 * seconds, 0.5 * seconds, 0.7 * seconds, 0.9 * seconds):
        for path in folder.glob("*a.bin*"):
            path.unlink()
        killed += run(*does[name], folder=folder, delay=delay, number=signal.SIGKILL)[0] == -signal.SIGKILL
        try:
            assert read_tokens(folder / "a.bin", tokenizer)
        except UserError as error:
            assert "no token file" in str(error) or "was the preparation of" in str(error)
    assert killed >= 2


@pytest.mark.parametrize("name, more, largest", [
    ("tokenise", [], 5000), ("distill", [], 500), ("tune", [], 500), ("generate", ["--trace", "t.json"], 2000),
    ("train", ["--epochs", 1], 5000), ("train", ["--epochs", 1, "--save-every", 1], 100_000),
    ("train", ["--epochs", 1], 100), ("train", ["--epochs", 1, "--medusa-2"], 50_000), ("generate", [], 200)])
def test_a_full_disk(name, more, largest, work):
    """Files may not grow beyond a size: one line, status 2, no half file, and what stood there before still stands."""
    folder, does = work
    run("prepare_data", "--model", folder / "tiny", "--text", "t.txt", "--out", "d.bin", folder=folder)
    (folder / "a.bin").write_bytes(b"old")
    status, err, out, _ = run(*does[name], *more, folder=folder, largest=largest)
    line = err.replace("\r", "\n").splitlines()[-1]
    assert status == 2 and "Traceback" not in err, err
    assert "--trace" not in more or err.count("\n") == 1                         # none of the profiler's own
    assert line.startswith(f"{does[name][0]}.py: ") and ("can't write" in line or "File too large" in line), err
    assert (folder / "a.bin").read_bytes() == b"old" and not list(folder.glob("h/config.json"))
    assert {p.name for p in folder.glob("*a.bin*")} - {"a.bin.partial"} == {"a.bin"}
    (folder / "a.bin").unlink()
    whole_or_absent(folder)


def test_two_runs_that_write_the_same_file(work):
    """Token files: the last one wins whole. Heads: the second training is refused while the first one runs."""
    folder, does = work
    tokenizer = Tokenizer(folder / "tiny", LlamaConfig(vocab_size=300))
    with open(os.devnull, "r+") as nothing:
        start = lambda name, *more: forked.Process(
            ROOT / f"{does[name][0]}.py", *does[name][1:], *more, cwd=folder, streams=[nothing.fileno()] * 3)
        both = [start("tokenise", "--limit", limit) for limit in (100, 110)]
        assert [p.wait() for p in both] == [0, 0]
        assert len(read_tokens(folder / "a.bin", tokenizer)) in (100, 110) and not list(folder.glob(".tmp*"))
        for written, name in zip(beside(folder / "a.bin"), beside(folder / "d.bin"), strict=True):
            written.rename(name)
        first = start("train", "--epochs", 4000)
    while not (folder / "h/metrics.jsonl").exists():
        assert not first.ended(0.01)
    status, err, _, _ = run(*does["train"], folder=folder)
    assert status == 2 and "another training is writing to h: give --out another folder" in err
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 130
    status, err, _, _ = run(*does["train"], "--epochs", 4000, "--resume", folder=folder, delay=0.5,
                            number=signal.SIGINT)
    assert status == 130 and (folder / "h/checkpoint.pt").exists()
