"""Can a damaged or hostile file break generate.py? Seeded mutations of a healthy folder's files, a process for each.

    python benchmarks/fuzz.py                             # 10,000 mutations, about ten minutes
    python benchmarks/fuzz.py --only 1234                 # one of them again, with all that it printed

Whatever a file holds, the program must end with one line and status 2, or with a right answer: Medusa's tokens are
plain decoding's (a mutated weight is another model; near ties are counted), and where only `medusa/` was touched, or
nothing that counts, the text is the healthy folder's. Everything else is a failure: another exception, a signal, no end
within --timeout, or more than twice the healthy run's peak memory. Linux only; the exit status is 1 after a failure.
"""
import argparse
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0"}
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import byte_tokenizer, tiny_heads, tiny_llama  # noqa: E402

import generate  # noqa: E402
from extras import compare  # noqa: E402
from extras.command_line import command_line  # noqa: E402
from llama import Llama  # noqa: E402
from loading.files import write_json  # noqa: E402
from variants.heads import load_heads, save  # noqa: E402

NEAR_TIE = 1e-4                 # gap of two float32 logits below which Medusa may choose the other one
SPACE = 4 * 2 ** 30             # bytes of addresses that a run may ask for beyond those it begins with
RUN = ["--prompt", "The dog. Café 你好", "--max-new-tokens", "12", "--compare", "--json", "--threads", "1"]

# ----------------------------------------------------------------------------------------------------- healthy folders

BOTH = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "medusa/config.json", "medusa/model.safetensors", "medusa/tree.json"]
FILES = {"plain": BOTH, "shards": ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json",
                                   "config.json", "medusa/config.json", "medusa/model.safetensors"],
         "pickle": ["pytorch_model.bin"], "pieces": ["tokenizer.model"]}
TARGETS = [(folder, file) for folder, files in FILES.items() for file in files]


def build(root: Path) -> None:
    """A model in safetensors; the same in two shards, with heads of another kind; as a pickle; with SentencePiece."""
    tree = {"paths": [[0], [1], [0, 0], [0, 1], [0, 0, 0]], "remark": "small",
            "modes": {"cpu": {"paths": [[0], [1], [0, 0]], "remark": "tuned"}}}
    for name in FILES:
        folder, vocab_size = root / name, 700 if name == "pieces" else 300
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32} if name == "shards" else None
        model = tiny_llama(dtype=torch.float32, vocab_size=vocab_size, max_position_embeddings=64, rope_scaling=rope)
        model.save(folder)
        write_json(folder / "generation_config.json", {"eos_token_id": 2, "max_length": 64})
        write_json(folder / "tokenizer_config.json", {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"})
        other = {"kind": "hydra", "token_map": torch.arange(3, 300, 2), "recent": 2} if name == "shards" else {}
        save(folder / "medusa", tiny_heads(model, 3, **other), model, "tiny")
        write_json(folder / "medusa" / "tree.json", tree)
        if name == "pieces":
            shutil.copy(ROOT / "tests" / "small.model", folder / "tokenizer.model")
        else:
            byte_tokenizer(folder / "tokenizer.json")
        tensors = load_file(folder / "model.safetensors")
        if name == "pickle":
            torch.save(tensors, folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        if name == "shards":
            files = {n: f"model-{1 + i % 2}.safetensors" for i, n in enumerate(tensors)}
            for shard in set(files.values()):
                save_file({n: t for n, t in tensors.items() if files[n] == shard}, folder / shard)
            write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": files})
            (folder / "model.safetensors").unlink()
        load_heads(folder / "medusa", Llama.from_pretrained(folder))    # torch imports here what loading needs


# ---------------------------------------------------------------------------------------------------------- mutations

DEEP = 5000
VALUES = ["null", "true", "false", "0", "-1", "1", "2", str(2 ** 31), str(2 ** 63), str(10 ** 9), str(10 ** 30),
          "9" * 5000, "1" + "0" * 400, "0.5", "1e308", "1e999", "-0.0", "NaN", "Infinity", "-Infinity", '""', '"x"',
          f'"{"x" * 20000}"', r'"\ud800"', r'"\u0000"', "[]", "{}", "[null]", "[[]]", '{"": null}',
          "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "0" + "}" * DEEP, *(f'"{dtype}"' for dtype in (
              "F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "I64", "I8", "U16", "BOOL", "float16", "int8"))]
KEYS = ["", "x", "../x", r"\ud800", "99999999.0.linear.weight", "0.99999999.linear.weight", "99999999.1.weight",
        "9" * 5000 + ".0.linear.weight", "0.0.up.weight", "medusa_head.0.0.linear.weight", "__metadata__", "model_type",
        "model.layers.99999999.mlp.up_proj.weight", "token_map", "base_model_name_or_path", "medusa_num_heads",
        "medusa_width", "medusa_kind", "medusa_recent", "draft_vocab_size", "tie_lm_head", "rope_scaling",
        "rope_parameters", "sliding_window", "head_dim", "torch_dtype", "tie_word_embeddings", "paths", "modes",
        "normalizer", "added_tokens", "truncation", "padding", "byte_fallback", "model.safetensors", "_name_or_path"]


def mutate_json(text: str, rng: random.Random) -> str:
    """One change at a random place, as likely near the top as deep down. What Python can't hold is put in as text."""
    data, raw = json.loads(text), []

    def later(value: str) -> str:
        raw.append(value)
        return f"@{len(raw) - 1}@"
    at = data
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], (dict, list)) or not at[key] or rng.random() < 0.3:
            break
        at = at[key]
    old, nasty = at[key], rng.choice(VALUES)
    near = [old + 1, old - 1, old * 1000, -old, str(old)] if type(old) in (int, float) else \
        [old + "x", old[:-1], len(old)] if isinstance(old, str) else \
        [old[::-1], old * 2, old * 1000, old[:-1], [*old, later(nasty)], rng.sample(old, len(old))] \
        if isinstance(old, list) else \
        [list(old.values()), dict(reversed(old.items()))] if isinstance(old, dict) else [later(nasty)]
    what = rng.choice(["value"] * 4 + ["near"] * 4 + ["delete", "twice", "rename", "add", "add"])
    if what == "value" or what == "near":
        at[key] = later(nasty) if what == "value" else rng.choice(near)
    elif what == "delete":
        del at[key]
    elif isinstance(at, list):
        at.insert(rng.randrange(len(at) + 1), later(nasty) if what == "add" else old)
    else:
        new = rng.choice(KEYS + list(at))
        both = [f"{json.dumps(key)}: {nasty}, {json.dumps(key)}", f'"{new}"']
        items = {k: v for k, v in at.items() if k != key or what == "add"}
        items[later(f'"{new}"' if what != "twice" else both[0])] = later(nasty) if what == "add" else old
        at.clear()
        at.update(items)
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    for i, value in enumerate(raw):
        text = text.replace(f'"@{i}@"', value)
    return text


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes, half of them in the first 2 KB: there is what tells how the rest is to be read."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        end = len(data) if rng.random() < 0.5 else min(2048, len(data))
        begin = len(data) - 512 if rng.random() < 0.1 and len(data) > 512 else 0        # a zip's list stands at its end
        a, size = rng.randrange(begin, max(end, begin + 1)), rng.choice((1, 2, 4, 8, 64, 1000))
        some = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), data[a:a + size]))
        b = rng.randrange(len(data) + 1)
        kind = rng.choice(("flip", "flip", "over", "insert", "delete", "cut", "copy", "swap"))
        if kind == "flip" and a < len(data):
            data[a] ^= 1 << rng.randrange(8)
        elif kind == "over":
            data[a:a + size] = some
        elif kind == "insert":
            data[a:a] = some
        elif kind == "delete":
            del data[a:a + size]
        elif kind == "cut":
            del data[a:]
        elif kind == "copy":
            data[b:b] = data[a:a + size]
        elif kind == "swap":
            data[a:a + size], data[b:b + size] = data[b:b + size], data[a:a + size]
    return bytes(data)


def mutate_numbers(data: bytes, rng: random.Random) -> bytes:
    """Some float32 weights of a safetensors file are no numbers, or of no size that a weight has."""
    size, = struct.unpack_from("<Q", data)
    data, nasty = bytearray(data), rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e30, 1e17, 1e-40, 0.0))
    for _ in range(rng.choice((1, 1, 10, 10000))):
        struct.pack_into("<f", data, 8 + size + 4 * rng.randrange((len(data) - 8 - size) // 4), nasty)
    return bytes(data)


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """The pickle inside a zip, whose checksums fit again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, mutate_bytes(old.read(name), rng) if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


def parts(file: str, data: bytes) -> tuple:
    """What a file says, to compare: JSON parsed, safetensors as header and tensors, others as they are."""
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("readers differ about a key that stands there twice")
        return dict(pairs)
    canonical = lambda text: json.dumps(json.loads(text, object_pairs_hook=once), sort_keys=True)   # 0 is not false
    try:
        if file.endswith(".json"):
            return (canonical(data),)
        if file.endswith(".safetensors"):
            size, = struct.unpack_from("<Q", data)
            return canonical(data[8:8 + size]), data[8 + size:]
    except (ValueError, RecursionError, struct.error):
        pass
    return (data,)


class Job(NamedTuple):
    seed: int
    folder: str
    file: str
    data: bytes
    same: bool          # the file still says what it did


def target(seed: int) -> tuple[str, str]:
    return TARGETS[seed % len(TARGETS)]


def job(seed: int, healthy: Path) -> Job:
    """The mutation with this number."""
    rng, (folder, file) = random.Random(seed), target(seed)
    data = old = (healthy / folder / file).read_bytes()
    if file.endswith(".json") and rng.random() < 0.8:
        data = mutate_json(data.decode(), rng).encode()
    elif file.endswith(".bin") and rng.random() < 0.6:
        data = mutate_pickle(data, rng)
    elif file.endswith(".safetensors") and rng.random() < 0.15:
        data = mutate_numbers(data, rng)
    elif file.endswith(".safetensors") and rng.random() < 0.5:
        size, = struct.unpack_from("<Q", data)
        header = mutate_json(data[8:8 + size].decode(), rng).encode()
        data = struct.pack("<Q", len(header)) + header + data[8 + size:]
    else:
        data = mutate_bytes(data, rng)
    return Job(seed, folder, file, data, parts(file, data) == parts(file, old))


# --------------------------------------------------------------------------------------------------------------- runs

class Result(NamedTuple):
    status: int         # of the exit; below 0: minus the signal's number; None: no end in time
    out: str
    err: str
    seconds: float
    memory: int         # bytes, the largest resident size


def start(folder: Path) -> int:
    """generate.py on a folder, in a copy of this process; what it prints is left beside the folder."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        torch.set_num_threads(1)
        sys.stdout, sys.stderr = (open(f"{folder}.{name}", "w", encoding="utf-8", errors="backslashreplace")
                                  for name in ("out", "err"))
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPACE
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["generate.py", "--model", str(folder), *RUN]
        compare.REPEATS = 1
        command_line(generate.main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def run(jobs, healthy: Path, workers: int, timeout: float):
    """Yields every job with its result, as they end. A job is a Job, or the name of a healthy folder."""
    jobs, running = iter(jobs), {}
    with tempfile.TemporaryDirectory() as scratch:
        while True:
            while len(running) < workers and (job := next(jobs, None)) is not None:
                name, folder = (job.folder, Path(scratch, str(job.seed))) if isinstance(job, Job) else (job, None)
                folder = folder or Path(scratch, job)
                for file in (healthy / name).rglob("*.*"):
                    link = folder / file.relative_to(healthy / name)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file)
                if isinstance(job, Job):
                    (folder / job.file).unlink()
                    (folder / job.file).write_bytes(job.data)
                begin, pid = time.perf_counter(), start(folder)
                running[os.pidfd_open(pid)] = job, folder, pid, begin
            if not running:
                return
            ended = select.select(list(running), [], [], 0.5)[0]
            for handle, (job, folder, pid, begin) in list(running.items()):
                seconds = time.perf_counter() - begin
                if late := handle not in ended and seconds > timeout:
                    os.kill(pid, signal.SIGKILL)
                if late or handle in ended:
                    _, status, usage = os.wait4(pid, 0)
                    os.close(handle)
                    del running[handle]
                    out, err = (Path(f"{folder}.{name}").read_text(encoding="utf-8", errors="replace")
                                for name in ("out", "err"))
                    yield job, Result(None if late else os.waitstatus_to_exitcode(status), out, err, seconds,
                                      usage.ru_maxrss * 1024)
                    shutil.rmtree(folder)


def judge(job: Job, result: Result, healthy: Result) -> tuple[str, str]:
    """("error", "") or ("answer", "") where all is well, ("panic", "") where the tokenizer library printed something
    above the error, ("near tie" or "not numbers", "") where that excuses an answer, else ("failure", what is wrong)."""
    lines = result.err.strip().splitlines() or [""]
    wrong = lambda what: ("failure", what)
    if result.status is None:
        return wrong(f"no end after {result.seconds:.0f} s")
    if result.status < 0:
        return wrong(f"killed by {signal.Signals(-result.status).name}: {lines[-1][:200]}")
    if result.memory > 2 * healthy.memory:
        return wrong(f"{result.memory / healthy.memory:.1f} times the healthy run's memory: {lines[-1][:200]}")
    if result.status == 2:
        panic = "panicked at" in result.err         # the tokenizer library's Rust says so itself, before we do
        told = lines[-1:] if panic else [
            line for line in lines if ": all are used" not in line and "expect nonsense" not in line]
        if len(told) != 1 or not told[0].startswith("generate.py: ") or "allocate" in told[0] or len(told[0]) > 1000:
            return wrong(f"not one short line on stderr: {result.err.strip()[:400]}")
        if job.same:
            return wrong(f"a file that is as good as before is refused: {lines[0]}")
        return "panic" if panic else "error", ""
    if result.status:
        return wrong(next((line for line in lines[::-1] if line[:1].strip()), "")[:300])
    answer, expected = json.loads(result.out), json.loads(healthy.out)
    warned = "expect nonsense" in result.err
    touched = not (job.same or job.file.startswith("medusa/"))
    if not touched and answer["baseline"]["text"] != expected["text"]:
        return wrong(f"the text is {answer['baseline']['text']!r} instead of {expected['text']!r}")
    if answer["identical"]:
        return "answer", ""
    margin = (answer["first_difference"] or {}).get("margin", float("inf"))
    if margin < NEAR_TIE:
        return "near tie", ""
    if touched and (warned or margin != margin):
        return "not numbers", ""
    return wrong(f"Medusa's text is not plain decoding's, whose choice there has the margin {margin}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first one; the next ones count on")
    parser.add_argument("--only", type=int, metavar="SEED", help="this one alone, with all that it prints")
    parser.add_argument("--file", default="", help="of all these, only mutations of files with this in their name")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=20, help="seconds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [seed for seed in range(args.seed, args.seed + args.mutations) if args.file in "/".join(target(seed))] \
        if args.only is None else [args.only]
    with tempfile.TemporaryDirectory() as root:
        healthy = Path(root)
        build(healthy)
        reference = dict(run(FILES, healthy, 1, 60))
        assert all(r.status == 0 and json.loads(r.out)["identical"] for r in reference.values()), reference
        rows = {}
        for made, result in run(tqdm((job(s, healthy) for s in seeds), total=len(seeds), desc="mutations"), healthy,
                                args.workers, args.timeout):
            verdict, why = judge(made, result, reference[made.folder])
            rows.setdefault((made.folder, made.file), []).append(
                (verdict, result.seconds, result.memory / reference[made.folder].memory))
            if why:
                tqdm.write(f"seed {made.seed}, {made.folder}/{made.file}: {why}", file=sys.stderr)
            if args.only is not None:
                print(made.data[:2000], result.out, result.err, sep="\n")
    rows = {f"{file} ({folder})": rows[folder, file] for folder, file in TARGETS if (folder, file) in rows}
    rows["all"] = sum(rows.values(), [])
    kinds = ["error", "panic", "answer", "near tie", "not numbers", "failure"]
    print(f"\n| file (folder) | mutations | {' | '.join(kinds)} | slowest, s | memory to healthy |\n|---{'|---' * 9}|")
    for name, found in rows.items():
        counts = [sum(verdict == kind for verdict, *_ in found) for kind in kinds]
        print(f"| {name} | {len(found)} | {' | '.join(map(str, counts))} | {max(f[1] for f in found):.2f} | "
              f"{max(f[2] for f in found):.2f} |")
    sys.exit(1 if any(verdict == "failure" for verdict, *_ in rows["all"]) else 0)


if __name__ == "__main__":
    main()
