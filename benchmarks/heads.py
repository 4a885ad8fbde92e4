"""The table of heads: what each kind is worth, at equal trees, on one machine.

    python benchmarks/heads.py model/medusa model/medusa-paper                 # tokens per step at 8, 16 and 32 nodes
    python benchmarks/heads.py model/medusa --published trees.json             # against published trees of equal size

Trees are grown from the model's texts of the openings in model/tune.txt; `forecast` simulates decoding every second of
those texts, which did not grow the tree; `measured` decodes benchmarks/openings.txt with the tree (in batches, the
tokens are the same) and counts: new tokens behind the first / steps. Draft and step: medians of single-row steps, in
milliseconds.
"""
import argparse
import json
import statistics
import sys
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from acceptance import per_step  # noqa: E402

from extras.command_line import command_line, set_threads, threads  # noqa: E402
from extras.forecast import grow_tree, joint_hits, simulate  # noqa: E402
from extras.tune import own_texts  # noqa: E402
from llama import Llama  # noqa: E402
from loading.documents import openings_of  # noqa: E402
from loading.templates import Plain  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from loading.trees import check_paths  # noqa: E402
from tinymedusa import Decoder, Sampling, Stages, Tree  # noqa: E402
from train_heads import evaluate  # noqa: E402
from variants.heads import load_heads  # noqa: E402


def timed(model, ids, heads, tree, sampling):
    """Median milliseconds of the draft and of a whole step, one row, 40 steps."""
    clock = Stages("cpu")
    list(islice(Decoder(model, heads, tree, sampling, eos=(), run=clock).generate([ids], 200), 41))
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
    set_threads(model, args.threads)
    documents = own_texts(model, Plain(tokenizer), openings_of(args.tune), args)
    prompts = [tokenizer.encode(o) for o in openings_of(args.openings)]
    published = json.loads(Path(args.published).read_text(encoding="utf-8")) if args.published else {}
    print(f"{'heads':<28}{'kind':>7}{'K':>3}{'parameters':>11}{'nodes':>6}  {'tree':<26}{'forecast':>9}{'measured':>9}"
          f"{'off':>7}{'draft ms':>9}{'step ms':>8}{'tokens/s':>9}")
    for folder in args.folders:
        heads = load_heads(folder, model)
        kind, size = getattr(heads, "kind", "medusa"), sum(p.numel() for p in heads.parameters())
        halves = [evaluate(model, heads, half, 4096, args.sampling)[1:] for half in (documents[::2], documents[1::2])]
        hits = joint_hits(halves[0][0])
        for nodes in args.nodes:
            trees = {"own": grow_tree(hits, nodes - 1)}
            if args.deepest:
                trees[f"own, {args.deepest} deep"] = grow_tree(hits, nodes - 1, args.deepest)
            for name, paths in published.items():
                paths = [p for p in paths if len(p) <= len(heads)][:nodes - 1]
                if not name.startswith("_") and len(paths) == nodes - 1 and paths not in trees.values():
                    trees[name] = paths                        # of several with the same first nodes the first
            for name, paths in trees.items():
                tree = Tree.from_paths(check_paths(paths, len(heads), heads.draft_size))
                forecast = simulate(tree, *halves[1])["tokens_per_step"]
                measured = per_step(Decoder(model, heads, tree, args.sampling), prompts, args)
                times = [timed(model, prompts[0], heads, tree, args.sampling) for _ in range(0 if args.no_times else 3)]
                draft, step = map(statistics.median, zip(*times, strict=True)) if times else (0, 0)
                print(f"{Path(folder).name:<28}{kind:>7}{len(heads):>3}{size:>11}"
                      f"{len(tree.paths):>6}  {name:<26}{forecast:>9.3f}{measured:>9.3f}{forecast / measured - 1:>7.1%}"
                      f"{draft:>9.3f}{step:>8.3f}{1000 * measured / step if step else 0:>9.0f}", flush=True)
    print(f"{torch.get_num_threads()} thread(s), temperature {args.temperature}, "
          f"{len(documents)} texts for trees and forecasts, {len(prompts)} openings decoded")


if __name__ == "__main__":
    command_line(main)
