"""A long run in one process: many prompts, ends of text and of the context, plain and Medusa, alone and in batches.

    python benchmarks/soak.py                               # 200,000 tokens of the embedded model; docs/results/soak.md

Memory must be flat after the warm-up (the first fifth), and the stages' times must add up to the wall time within 5 %;
else the exit status is 1.
"""
import argparse
import platform
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.command_line import command_line  # noqa: E402
from llama import Llama  # noqa: E402
from loading.documents import openings_of  # noqa: E402
from loading.files import write_atomic  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from tinymedusa import Decoder, PlainDecoder, Sampling, Stages, Tree  # noqa: E402
from variants import batches  # noqa: E402
from variants.heads import load_heads  # noqa: E402

GROWTH = 1.02       # what memory may grow after the warm-up


def resident() -> float:
    """Megabytes of this process in memory now (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def runs(prompts: list):
    """Endlessly: prompts, and how they are decoded. The last kind runs into the context's end."""
    number = 0
    while True:
        for batch, many, new_tokens, eos, temperature, medusa in (
                (1, 1, 400, None, 0.0, True), (1, 1, 400, None, 0.0, False), (4, 10, 300, None, 0.7, True),
                (8, 12, 200, None, 1.0, False), (1, 1, 10 ** 6, (), 0.8, True)):
            yield [prompts[(number + i) % len(prompts)] for i in range(many)], new_tokens, batch, eos, \
                Sampling(temperature), medusa, range(number, number + many)
            number += many


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "model"))
    parser.add_argument("--tokens", type=int, default=200_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = Llama.from_pretrained(args.model)
    heads, tokenizer = load_heads(f"{args.model}/medusa", model), Tokenizer(args.model, model.config)
    tree = Tree.from_pretrained(f"{args.model}/medusa", heads)
    prompts = tokenizer.encode_batch(openings_of(ROOT / "benchmarks" / "openings.txt"))
    tokens = texts = at_context = 0
    wall, stages, memory = 0.0, Counter(), []
    with tqdm(total=args.tokens, unit=" tokens") as progress:
        for some, new_tokens, batch, eos, sampling, medusa, seeds in runs(prompts):
            clock, lengths = Stages("cpu"), list(map(len, some))
            decoder = Decoder(model, heads, tree, sampling, eos, clock) if medusa else \
                PlainDecoder(model, sampling, eos, clock)
            begin = time.perf_counter()
            for step in batches.generate(decoder, some, new_tokens, seeds, batch):
                for i, ids in step.items():
                    lengths[i] += len(ids)
            wall += time.perf_counter() - begin
            for name, seconds in clock.seconds.items():
                stages[name] += sum(seconds)
            new = sum(lengths) - sum(map(len, some))
            tokens, texts = tokens + new, texts + len(some)
            at_context += sum(n == model.config.max_position_embeddings for n in lengths)
            progress.update(new)
            memory.append((tokens, resident()))
            if tokens >= args.tokens:
                break
    warm = [mb for at, mb in memory if at > args.tokens / 5]
    grown, share = max(warm) / warm[0], sum(stages.values()) / wall
    fine = grown <= GROWTH and share >= 0.95
    marks = [next(mb for at, mb in memory if at >= args.tokens * i / 10) for i in range(1, 11)]
    report = "\n".join([
        "### A long run in one process", "",
        f"`python benchmarks/soak.py{'' if args.tokens == 200_000 else f' --tokens {args.tokens}'}`; "
        f"Python {platform.python_version()}, torch {torch.__version__}", "",
        f"{tokens} tokens in {texts} texts, {at_context} of them up to the context's end, in {wall:.0f} s: "
        f"{'flat' if fine else 'NOT FLAT, OR STAGES MISSING'}.",
        f"Memory after the first run {memory[0][1]:.1f} MB, after the warm-up {warm[0]:.1f}, at most {max(warm):.1f}, "
        f"at the end {warm[-1]:.1f}; at each tenth: " + ", ".join(f"{mb:.1f}" for mb in marks) + ".",
        f"Stages: {share:.1%} of the wall time (" + ", ".join(f"{k} {v:.1f} s" for k, v in stages.items()) + ").", ""])
    print(report)
    write_atomic(ROOT / "docs" / "results" / "soak.md", lambda path: path.write_text(report, encoding="utf-8"))
    sys.exit(not fine)


if __name__ == "__main__":
    command_line(main)
