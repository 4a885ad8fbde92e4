"""Acceptance rules against temperature: tokens per step, speed, and what becomes of the text.

    python benchmarks/acceptance.py                      # the table of README.md

Rows: `match` (lossless), `match` in the nucleus of top-p 0.8 (the official code's `nucleus`, done losslessly) and
typical acceptance with the official epsilon 0.09 and delta 0.3. Plain decoding with the same sampling stands beside
each for the ratio; of typical it is plain sampling. Quality: mean log-likelihood of a token of the output under the
base at temperature 1, and the share of different 4-grams among all 4-grams of all outputs. Greedy search and typical
acceptance raise the first and lower the second; the distribution itself has the values of the `match` row.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.command_line import command_line, set_threads, threads  # noqa: E402
from llama import Llama  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from loading.trees import read_tree  # noqa: E402
from tinymedusa import Decoder, PlainDecoder, Sampling, Tree, accept  # noqa: E402
from variants.heads import load_heads  # noqa: E402
from variants.typical import Typical  # noqa: E402

# name → options of the sampling, the acceptance rule
RULES = {"match": ({}, accept), "match, top-p 0.8": ({"top_p": 0.8}, accept), "typical": ({}, Typical(0.09, 0.3))}


def decode(decoder, ids, seed, args) -> tuple[list, int, float]:
    """(new tokens, steps, seconds)"""
    begin = time.perf_counter()
    news = [new for (new,) in decoder.generate([ids], args.max_new_tokens, [seed])]
    return [t for new in news for t in new], len(news) - 1, time.perf_counter() - begin


@torch.inference_mode()
def log_likelihood(model, ids, new) -> float:
    """Mean log-probability of the new tokens behind ids, at temperature 1."""
    logits = model.lm_head(model(torch.tensor([ids + new[:-1]]))[0, len(ids) - 1:])
    return logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).mean().item()


def distinct(outputs, n=4) -> float:
    grams = [tuple(new[i:i + n]) for new in outputs for i in range(len(new) - n + 1)]
    return len(set(grams)) / len(grams)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "model"))
    parser.add_argument("--openings", default=str(ROOT / "benchmarks" / "openings.txt"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.3, 0.7, 1.0])
    parser.add_argument("--threads", type=threads, default="auto")
    args = parser.parse_args()
    model = Llama.from_pretrained(args.model)
    folder = Path(args.model) / "medusa"
    heads = load_heads(folder, model)
    paths, source = read_tree(folder, len(heads), heads.draft_size)
    tree = Tree.from_paths(paths)
    tokenizer = Tokenizer(args.model, model.config)
    prompts = [tokenizer.encode(o) for o in Path(args.openings).read_text(encoding="utf-8").splitlines()[:args.limit]]
    set_threads(model, args.threads)
    print(f"{len(prompts)} openings, {args.max_new_tokens} new tokens or to the end of the story, tree of "
          f"{len(tree.paths)} nodes ({source}), {torch.get_num_threads()} thread(s)\n")
    print("| temperature | rule | tokens per step | Medusa tokens/s | plain tokens/s | speed-up | "
          "log-likelihood | distinct 4-grams |\n|---|---|---|---|---|---|---|---|")
    for temperature in args.temperatures:
        for rule, (options, acceptance) in RULES.items():
            if temperature == 0 and rule != "match":
                continue                                                         # all rules are one there
            sampling, runs = Sampling(temperature, **options), []
            plainly, drafting = PlainDecoder(model, sampling), Decoder(model, heads, tree, sampling)
            drafting.accept = acceptance
            decode(drafting, prompts[0], 0, args)
            for seed, ids in enumerate(tqdm(prompts, desc=f"{temperature} {rule}", leave=False)):
                runs.append((decode(plainly, ids, seed, args), decode(drafting, ids, seed, args)))
            plain, medusa = zip(*runs, strict=True)
            speed = lambda rows: statistics.median(len(new) / seconds for new, _, seconds in rows)
            ratio = statistics.median((len(m[0]) / m[2]) / (len(p[0]) / p[2]) for p, m in runs)
            outputs = [new for new, _, _ in medusa]
            per_step = sum(len(new) - 1 for new in outputs) / sum(steps for _, steps, _ in medusa)
            likely = statistics.mean(log_likelihood(model, ids, new) for ids, new in zip(prompts, outputs, strict=True))
            print(f"| {temperature} | {rule} | {per_step:.3f} | {speed(medusa):.0f} | {speed(plain):.0f} | "
                  f"{ratio:.2f} | {likely:.3f} | {distinct(outputs):.3f} |", flush=True)


if __name__ == "__main__":
    command_line(main)
