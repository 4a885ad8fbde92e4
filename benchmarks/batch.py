"""Where does Medusa stop paying? Tokens per second at batch sizes 1 to 32, plain decoding and trees of several sizes.

    python benchmarks/batch.py --threads 1                                  # the embedded model
    python benchmarks/batch.py --threads 1 --fast --name model-fast         # by the C++ engine
    python benchmarks/batch.py --model DIR --name 110M --threads 2          # a folder of benchmarks/pad_model.py

Prompts wait for a row as with `generate.py --prompts-file`. Every contestant of a batch size decodes the same prompts,
in turns, so that what else the machine does hits all alike; medians over the rounds. Trees are grown from the hits in
the heads' tree.json. Writes docs/results/batch-NAME.json and .md, or PREFIX.json and .md with --out PREFIX.
"""
import argparse
import os
import platform
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from compare import known_hits, processor  # noqa: E402

from extras.command_line import command_line, set_threads  # noqa: E402
from extras.forecast import grow_tree  # noqa: E402
from fast import engines  # noqa: E402
from loading.checkpoint import TORCH_DTYPES  # noqa: E402
from loading.documents import openings_of  # noqa: E402
from loading.files import write_atomic, write_json  # noqa: E402
from loading.templates import Plain, load_template  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from tinymedusa import Tree  # noqa: E402
from variants import batches  # noqa: E402
from variants.heads import load_heads  # noqa: E402


def decode(decoder, prompts, batch, args) -> dict:
    """One run over all prompts: texts, seconds, steps, and the tokens that a row's step emits."""
    begin, texts, steps, counts = time.perf_counter(), [[] for _ in prompts], 0, Counter()
    for step in batches.generate(decoder, prompts, args.max_new_tokens, batch_size=batch):
        steps += 1
        for i, ids in step.items():
            counts[len(ids)] += bool(texts[i])
            texts[i] += ids
    tokens = sum(map(len, texts))
    return {"texts": texts, "tokens_per_second": tokens / (time.perf_counter() - begin), "steps": steps - 1,
            "tokens_per_step": (tokens - len(prompts)) / counts.total()}


def measured(decoders, encoded, batch, args) -> list[dict]:
    """A row of the table for plain decoding and for each tree, at one batch size."""
    prompts = (encoded * 99)[:max(args.prompts, args.waves * batch)]
    runs = {nodes: [] for nodes in decoders}
    for round_number in tqdm(range(args.rounds + 1), desc=f"batch {batch}"):
        for nodes, decoder in decoders.items():
            run = decode(decoder, prompts, batch, args)
            runs[nodes] += [run] * (round_number > 0)                           # the first one warms up
    rows = []
    for nodes, some in runs.items():
        speeds = [run["tokens_per_second"] for run in some]
        low, _, high = statistics.quantiles(speeds) if len(speeds) > 1 else speeds * 3
        same = sum(a == b for a, b in zip(some[0]["texts"], runs[1][0]["texts"], strict=True))
        tokens = sum(map(len, some[0]["texts"]))
        rows.append({"mode": "native" if args.fast else "eager", "batch": batch, "nodes": nodes,
                     "prompts": len(prompts), "tokens": tokens,
                     "tokens_per_second": round(statistics.median(speeds), 1), "quartiles": [round(low), round(high)],
                     "tokens_per_step": round(some[0]["tokens_per_step"], 3), "identical": same,
                     "step_ms": round(1000 * tokens / statistics.median(speeds) / some[0]["steps"], 3)})
    return rows


def table(result) -> str:
    """Markdown: for each mode and batch size plain decoding, every tree as a ratio to it, and the best one."""
    sizes = sorted({row["nodes"] for row in result["rows"]} - {1})
    lines = [f"### {result['title']}", "", f"`{result['command']}`; {result['machine']}", "",
             f"| | batch | plain tokens/s | {' | '.join(f'{n} nodes' for n in sizes)} | best tokens/s | same texts |",
             "|---" * (len(sizes) + 5) + "|"]
    for mode, batch in dict.fromkeys((row["mode"], row["batch"]) for row in result["rows"]):
        rows = {r["nodes"]: r for r in result["rows"] if (r["mode"], r["batch"]) == (mode, batch)}
        plain, best = rows[1], max(rows.values(), key=lambda r: r["tokens_per_second"])
        ratio = [f"{rows[n]['tokens_per_second'] / plain['tokens_per_second']:.2f}" if n in rows else "" for n in sizes]
        ratio = [f"**{r}**" if n == best["nodes"] else r for n, r in zip(sizes, ratio, strict=True)]
        name = "plain" if best is plain else f"{best['nodes']} nodes"
        lines.append(f"| {mode} | {batch} | {plain['tokens_per_second']:.0f} | " + " | ".join(ratio) +
                     f" | {best['tokens_per_second']:.0f}, {name} | "
                     f"{sum(r['identical'] for r in rows.values())} of {sum(r['prompts'] for r in rows.values())} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "model"))
    parser.add_argument("--heads", help="default: medusa/ in the model's folder")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, help="of the model (default: generate.py's)")
    parser.add_argument("--openings", default=str(ROOT / "benchmarks" / "openings.txt"))
    parser.add_argument("--name", default="model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3, 4, 6, 8, 16])
    parser.add_argument("--prompts", type=int, default=16, help="at least so many,")
    parser.add_argument("--waves", type=int, default=2, help="and so many times the batch size")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="decode with the C++ engine, plain and Medusa")
    parser.add_argument("--out", metavar="PREFIX")
    args = parser.parse_args()
    model = engines.load(args.model, TORCH_DTYPES.get(args.dtype), fast=args.fast)
    args.fast = engines.mode(model) == "cpu fast"                               # it may not be there
    folder = Path(args.heads or Path(args.model) / "medusa")
    heads, hits = load_heads(folder, model), known_hits(folder)
    trees = {nodes: grow_tree(hits, nodes - 1) for nodes in sorted({1, *args.nodes})}
    decoders = {n: engines.decoder(model, heads, Tree.from_paths(paths)) if paths else engines.decoder(model)
                for n, paths in trees.items()}
    tokenizer = Tokenizer(args.model, model.config)
    template = load_template(args.model, tokenizer) or Plain(tokenizer)
    encoded = [template.prompt(opening) for opening in openings_of(args.openings)]
    set_threads(model, args.threads)
    out = Path(args.out or ROOT / "docs" / "results" / f"batch-{args.name}")
    result = {"title": f"{args.name}, {args.threads} thread{'s' * (args.threads > 1)}, batches",
              "command": " ".join(["python", "benchmarks/batch.py", *(Path(a).name if a.startswith("/") else a
                                                                      for a in sys.argv[1:])]),
              "machine": f"{len(os.sched_getaffinity(0))} cores, {processor()['processor']}, Python "
                         f"{platform.python_version()}, torch {torch.__version__}",
              "trees": trees, "rows": []}
    for batch in args.batch_sizes:
        result["rows"] += measured(decoders, encoded, batch, args)
        write_json(Path(f"{out}.json"), result)
        write_atomic(Path(f"{out}.md"), lambda path: path.write_text(table(result), encoding="utf-8"))
    print(table(result))


if __name__ == "__main__":
    command_line(main)
