"""What the scripts' command lines share: options that are checked, errors of one line, an end at any moment."""
import argparse
import os
import signal
import sys
from pathlib import Path
from threading import Timer
import torch
from fast import engines
from llama import Llama
from loading.files import UserError
from tinymedusa import Stages

class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all others are."""
    def error(self, message):
        raise UserError(f"{message} (see --help)")

COUNTABLE, FINITE = 10 ** 9, 1e30   # of options without a limit: what islice, tensors and float32 can still hold

def number(kind, least, most=None):
    """An argparse type: an int or float from `least` to `most`."""
    largest = most or (COUNTABLE if kind is int else FINITE)
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= largest:
            limited = most or value is not None and value > largest
            limit = f"from {least} to {largest}" if limited else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a{' whole' if kind is int else ''} number {limit}")
        return value
    return parse

SEED = number(int, 0, 2 ** 63 - 1)

def row_seed(seed: int, index: int) -> int:
    """The seed of the text with this index: the next ones, and behind the largest from 0 on."""
    return (seed + index) % 2 ** 63

threads = lambda text: text if text == "auto" else number(int, 1, 1024)(text)       # an argparse type, too

def shard() -> tuple[int, int]:
    """(rank, processes) as torchrun says it; alone (0, 1). Process r takes every item whose index is r modulo them."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() and len(text) < 9 for text in (rank, world)) or int(rank) >= int(world):
        raise UserError(f"RANK is {rank[:9]!r} of WORLD_SIZE {world[:9]!r}: unset both, or start with torchrun")
    return int(rank), int(world)

def set_threads(model: Llama, threads: int | str = "auto", rows: int = 1) -> None:
    """The engine's CPU threads: a number, or `auto`: 1 or all cores, whichever decodes `rows` rows faster here and now.
    On a tiny model threads mostly wait for each other, ten times longer when anything else runs on the machine."""
    if threads != "auto":
        return engines.set_threads(model, threads)
    chosen = shard()[1] > 1 or "OMP_NUM_THREADS" in os.environ                      # by torchrun or the user
    if chosen or model.norm.weight.device.type != "cpu" or model.config.max_position_embeddings < 16:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fastest = {}
    for count in {1, cores}:
        engines.set_threads(model, count)
        clock = Stages("cpu")
        for _ in engines.decoder(model, eos=(), run=clock).generate([[0]] * rows, 7):
            pass
        fastest[count] = min(clock.seconds["base_inference"]) * (1 if count == 1 else 1.1)     # more must win clearly
    engines.set_threads(model, min(fastest, key=fastest.get))

def device(text: str) -> str:
    """An argparse type: a torch device that exists here."""
    try:
        torch.empty(1, device=text).cpu()
        return text
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} can't be used here: {reason}") from error

def command_line(main) -> None:
    """Runs a script: an input error is one line on stderr and status 2, Ctrl-C status 130, SIGTERM 143, a closed pipe
    the end. What was being written is taken away (`write_atomic`)."""
    def interrupt(number, frame):
        received.append(number)
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)       # once is enough
            sys.exit(128 + number)
        raise KeyboardInterrupt
    def swallowed(error):                               # by a __del__, say, in which it came: once more
        if not received or not isinstance(error.exc_value, (KeyboardInterrupt, SystemExit)):
            return sys.__unraisablehook__(error)
        signal.signal(received[-1], interrupt)
        Timer(0.1, os.kill, (os.getpid(), received[-1])).start()
    before, received, hook = {}, [], sys.unraisablehook
    try:
        sys.unraisablehook = swallowed
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.getsignal(number)
                signal.signal(number, interrupt)
        sys.stdout, sys.stderr = (file or open(os.devnull, "w") for file in (sys.stdout, sys.stderr))  # where closed
        sys.stdin = sys.stdin or open(os.devnull)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")    # a terminal without é is no reason to stop
        main()
        sys.stdout.flush()
    except BaseException as error:
        if received or isinstance(error, KeyboardInterrupt):       # safetensors makes an error of its own of a Ctrl-C
            print("stopped", file=sys.stderr)
            sys.exit(128 + (received or [signal.SIGINT])[-1])
        if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "allocate" in str(error):
            reason = str(error).partition(" GPU ")[0]       # CUDA's goes on for a paragraph
            error = UserError(f"not enough memory: smaller batches or fewer new tokens need less ({reason})")
        try:
            sys.stdout.flush()
        except OSError:                                         # else Python complains once more at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return
        if isinstance(error, (UserError, OSError)):
            line = " ".join(str(error).split())
            line = line if len(line) < 900 else f"{line[:600]} [...] {line[-200:]}"        # a file may hold a novel
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
            sys.exit(2)
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
