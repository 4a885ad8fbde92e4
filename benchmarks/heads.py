"""The table of heads: what each kind is worth, at equal trees, on one machine.

    python benchmarks/heads.py model/medusa model/medusa-paper                 # tokens per step at 8, 16 and 32 nodes
    python benchmarks/heads.py model/medusa --published trees.json             # against published trees of equal size

Trees are grown from the model's texts of the openings in model/tune.txt; `forecast` walks every second of those texts,
which did not grow the tree; `measured` decodes benchmarks/openings.txt with the tree (in batches, the tokens are the
same) and counts: new tokens behind the first / steps. Draft and step: medians of single-row steps, in milliseconds.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.cli import command_line, threads  # noqa: E402
from extras.tune import own_texts  # noqa: E402
from llama import Llama, Tokenizer  # noqa: E402
from prepare_data import openings_of  # noqa: E402
from tinymedusa import MedusaHeads, Sampling, Stages, generate, grow_tree, path_hits, set_threads, walk  # noqa: E402
from train_heads import evaluate  # noqa: E402


def decode(model, prompts, heads, tree, args):
    """Tokens per step over all steps of all prompts."""
    emitted = steps = 0
    for i in range(0, len(prompts), 50):
        rows = prompts[i:i + 50]
        run = generate(model, rows, args.max_new_tokens, heads=heads, tree=tree, seeds=range(i, i + len(rows)),
                       sampling=Sampling(args.temperature))
        next(run)
        for new in run:
            emitted += sum(map(len, new.values()))
            steps += len(new)
    return emitted / steps


def timed(model, ids, heads, tree, args):
    """Median milliseconds of the draft and of a whole step, one row, 40 steps."""
    clock = Stages("cpu")
    list(generate(model, [ids], 200, heads=heads, tree=tree, eos=(), run=clock, max_steps=40,
                  sampling=Sampling(args.temperature)))
    stages = [clock.seconds[name] for name in ("medusa", "tree", "posterior", "update")]
    return 1000 * statistics.median(stages[0]), 1000 * statistics.median(map(sum, zip(*stages, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="HEADS")
    parser.add_argument("--model", default=str(ROOT / "model"))
    parser.add_argument("--tune", default=str(ROOT / "model" / "tune.txt"))
    parser.add_argument("--openings", default=str(ROOT / "benchmarks" / "openings.txt"))
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--deepest", type=int, help="a second tree of each size, at most so deep")
    parser.add_argument("--published", metavar="FILE", help="an object of lists of paths, best first")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--threads", type=threads, default="auto")
    parser.add_argument("--seed", type=int, default=10 ** 6)
    parser.add_argument("--no-times", action="store_true", help="count only, as while something else runs")
    args = parser.parse_args()
    args.sampling = Sampling(args.temperature)
    model = Llama.from_pretrained(args.model)
    tokenizer = Tokenizer(args.model, model.config)
    model.pack()
    set_threads(model, args.threads)
    documents = own_texts(model, tokenizer, args)
    prompts = [tokenizer.encode(o) for o in openings_of(args.openings)]
    published = json.loads(Path(args.published).read_text(encoding="utf-8")) if args.published else {}
    print(f"{'heads':<28}{'kind':>7}{'K':>3}{'parameters':>11}{'nodes':>6}  {'tree':<26}{'forecast':>9}{'measured':>9}"
          f"{'off':>7}{'draft ms':>9}{'step ms':>8}{'tokens/s':>9}")
    for folder in args.folders:
        heads = MedusaHeads.from_pretrained(folder, model)
        halves = [evaluate(model, heads, half, 4096)[1:] for half in (documents[::2], documents[1::2])]
        hits = path_hits(halves[0][0])
        for nodes in args.nodes:
            trees = {"own": grow_tree(hits, nodes - 1)}
            if args.deepest:
                trees[f"own, {args.deepest} deep"] = grow_tree(hits, nodes - 1, args.deepest)
            for name, paths in published.items():
                paths = [p for p in paths if len(p) <= heads.num_heads][:nodes - 1]
                if not name.startswith("_") and len(paths) == nodes - 1 and paths not in trees.values():
                    trees[name] = paths                        # of several with the same first nodes the first
            for name, paths in trees.items():
                tree = heads.tree(paths)
                forecast = walk(tree, *halves[1])["tokens_per_step"]
                measured = decode(model, prompts, heads, tree, args)
                times = [timed(model, prompts[0], heads, tree, args) for _ in range(0 if args.no_times else 3)]
                draft, step = map(statistics.median, zip(*times, strict=True)) if times else (0, 0)
                print(f"{Path(folder).name:<28}{heads.kind:>7}{heads.num_heads:>3}{heads.size():>11}"
                      f"{len(tree.paths):>6}  {name:<26}{forecast:>9.3f}{measured:>9.3f}{forecast / measured - 1:>7.1%}"
                      f"{draft:>9.3f}{step:>8.3f}{1000 * measured / step if step else 0:>9.0f}", flush=True)
    print(f"{torch.get_num_threads()} thread(s), temperature {args.temperature}, "
          f"{len(documents)} texts for trees and forecasts, {len(prompts)} openings decoded")


if __name__ == "__main__":
    command_line(main)
