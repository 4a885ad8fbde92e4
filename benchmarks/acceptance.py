"""Acceptance rules against temperature: tokens per step, speed, and what becomes of the text.

    python benchmarks/acceptance.py --threads 1                    # the table of docs/acceptance.md
    python benchmarks/acceptance.py --threads 1 --fast             # the same, decoded by the C++ engine
    python benchmarks/acceptance.py --threads 1 --heads model/medusa-paper --temperatures 0
    python benchmarks/acceptance.py --model smollm2 --heads heads/smollm2-135m-instruct --dtype bfloat16 --fast \
        --openings benchmarks/questions.jsonl --tune heads/smollm2-135m-instruct/tune.jsonl --nodes 6

Rows: `match` (lossless), `match` in the nucleus of top-p 0.8 (the official code's `nucleus`, done losslessly), typical
acceptance with the official epsilon 0.09 and delta 0.3, and prompt lookup in the heads' place. Each has the tree that
tree.json holds for the temperature; "at 8 nodes" is a tree of --nodes nodes grown at the temperature, from every second
of the model's texts of model/tune.txt. Tokens per step are counted over the texts of all openings, each with 5 seeds
where tokens are drawn; the forecast simulates decoding the other texts of tune.txt. Plain decoding with the same
sampling and seed runs beside each text's first for the ratio; of typical it is plain sampling. Quality: mean
log-likelihood of a token of the output under the base at temperature 1, and the share of different 4-grams among all
4-grams of all outputs. Greedy search and typical acceptance raise the first and lower the second; the distribution
itself has the values of the `match` row.
"""
import argparse
import statistics
import sys
import time
from argparse import Namespace
from functools import cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compare import processor  # noqa: E402

from extras.command_line import command_line, set_threads, threads  # noqa: E402
from extras.forecast import grow_tree, joint_hits, simulate  # noqa: E402
from extras.tune import own_texts  # noqa: E402
from fast import engines  # noqa: E402
from loading.checkpoint import TORCH_DTYPES  # noqa: E402
from loading.documents import openings_of  # noqa: E402
from loading.files import write_json  # noqa: E402
from loading.templates import Plain, load_template  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from loading.trees import read_tree  # noqa: E402
from tinymedusa import Sampling, Tree  # noqa: E402
from train_heads import evaluate  # noqa: E402
from variants import batches  # noqa: E402
from variants.heads import load_heads  # noqa: E402
from variants.lookup import Lookup  # noqa: E402
from variants.typical import Typical  # noqa: E402

# name → options of the sampling, the acceptance rule if it is not the decoder's own
RULES = {"match": ({}, None), "match, top-p 0.8": ({"top_p": 0.8}, None), "typical": ({}, Typical(0.09, 0.3)),
         "prompt lookup": ({}, None)}
TIMED = "Medusa tokens/s", "plain tokens/s", "speed-up", "identical", "log-likelihood", "distinct 4-grams"
SEEDS = 5               # texts of an opening that are counted: with one each, the count itself varies by 1.5 %


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


def halves(model, template, heads, args, sampling) -> list:
    """(ranks, own), as `simulate` takes them, of every second of the model's texts at this sampling and of the rest."""
    documents = own_texts(model, template, openings_of(args.tune), Namespace(
        tune=args.tune, sampling=sampling, max_new_tokens=args.max_new_tokens, seed=10 ** 6))
    return [evaluate(model, heads, half, 4096, sampling)[1:] for half in (documents[::2], documents[1::2])]


def per_step(decoder, prompts, args) -> float:
    """Tokens per step over all steps of all prompts, decoded in a batch: the tokens are the same."""
    emitted = steps = 0
    run = batches.generate(decoder, prompts, args.max_new_tokens, batch_size=50)
    next(run)
    for new in run:
        emitted += sum(map(len, new.values()))
        steps += len(new)
    return emitted / steps


def in_turns(model, plainly, drafting, prompts, name, args) -> list:
    """The values of TIMED: both decoders, in turns at each prompt."""
    decode(drafting, prompts[0], 0, args)
    runs = [(decode(plainly, ids, seed, args), decode(drafting, ids, seed, args))
            for seed, ids in enumerate(tqdm(prompts, desc=name, leave=False))]
    plain, medusa = zip(*runs, strict=True)
    speed = lambda runs: statistics.median(len(new) / seconds for new, _, seconds in runs)
    ratio = statistics.median((len(m[0]) / m[2]) / (len(p[0]) / p[2]) for p, m in runs)
    outputs = [new for new, _, _ in medusa]
    likely = statistics.mean(log_likelihood(model, ids, new) for ids, new in zip(prompts, outputs, strict=True))
    same = sum(p[0] == m[0] for p, m in runs)
    return [round(speed(medusa), 1), round(speed(plain), 1), round(ratio, 3), same, round(likely, 3),
            round(distinct(outputs), 3)]


def distinct(outputs, n=4) -> float:
    grams = [tuple(new[i:i + n]) for new in outputs for i in range(len(new) - n + 1)]
    return len(set(grams)) / len(grams)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "model"))
    parser.add_argument("--dtype", choices=TORCH_DTYPES, help="of the model (default: generate.py's)")
    parser.add_argument("--quantize", choices=["int8"])
    parser.add_argument("--heads", help="default: medusa/ in the model's folder")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--tune", default=str(ROOT / "model" / "tune.txt"))
    parser.add_argument("--openings", default=str(ROOT / "benchmarks" / "openings.txt"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.3, 0.7, 1.0])
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--threads", type=threads, default="auto")
    parser.add_argument("--fast", action="store_true", help="decode with the C++ engine, plain and Medusa")
    parser.add_argument("--no-times", action="store_true", help="count only, as while something else runs")
    parser.add_argument("--out", metavar="FILE", help="the table as JSON too")
    args = parser.parse_args()
    model = engines.load(args.model, TORCH_DTYPES.get(args.dtype), quantize=args.quantize, fast=args.fast)
    folder = Path(args.heads or Path(args.model) / "medusa")
    heads = load_heads(folder, model)
    tokenizer = Tokenizer(args.model, model.config)
    template = load_template(args.model, tokenizer) or Plain(tokenizer)
    decoder_of = partial(engines.decoder, model, eos=tokenizer.eos)
    prompts = [template.prompt(opening) for opening in openings_of(args.openings)[:args.limit]]
    set_threads(model, args.threads)
    setting = (f"{folder.name}: {len(prompts)} openings, up to {args.max_new_tokens} new tokens, "
               f"{torch.get_num_threads()} thread(s), {engines.mode(model)}, "
               f"{args.quantize or args.dtype or 'default dtype'}")
    print(f"{setting}\n")
    columns = ["temperature", "rule", f"tokens per step at {args.nodes} nodes", "forecast", "nodes of its tree",
               "tokens per step", "forecast of it", *(() if args.no_times else TIMED)]
    print(f"| {' | '.join(columns)} |\n|" + "---|" * len(columns))
    rows, halves_at = [], cache(partial(halves, model, template, heads, args))
    for temperature in args.temperatures:
        for rule, (options, acceptance) in RULES.items():
            if rule not in args.rules or temperature == 0 and rule in ("match, top-p 0.8", "typical"):
                continue                                                         # all rules are one there
            sampling = Sampling(temperature, **options)
            if rule == "prompt lookup":
                drafter, trees = Lookup(model.config), [Tree.from_paths(Lookup.chain)]
                forecasts = [None]
            else:
                (ranks, _), others = halves_at(sampling)
                mode = engines.mode(model)
                paths, _ = read_tree(folder, len(heads), heads.draft_size, mode=mode, temperature=temperature)
                drafter = heads
                trees = [Tree.from_paths(grow_tree(joint_hits(ranks), args.nodes - 1)), Tree.from_paths(paths)]
                forecasts = [None if acceptance else simulate(t, *others)["tokens_per_step"] for t in trees]
            decoders = [decoder_of(drafter, tree, sampling) for tree in trees]
            if acceptance:
                for decoder in decoders:
                    decoder.accept = acceptance
            texts = prompts * (SEEDS if temperature and not acceptance else 1)
            counts, drafting = [round(per_step(decoder, texts, args), 3) for decoder in decoders], decoders[-1]
            at_nodes = (counts[0], forecasts[0]) if len(counts) == 2 else (None, None)
            row = [temperature, rule, *at_nodes, len(trees[-1].paths), counts[-1], forecasts[-1]]
            if not args.no_times:
                row += in_turns(model, decoder_of(sampling=sampling), drafting, prompts, f"{temperature} {rule}", args)
            rows.append(dict(zip(columns, row, strict=True)))
            print("|", " | ".join("" if v is None else str(v) for v in rows[-1].values()), "|", flush=True)
    if args.out:
        command = f"python benchmarks/acceptance.py {' '.join(sys.argv[1:])}"
        write_json(args.out, {"command": command, "setting": setting, "machine": processor(), "rows": rows})


if __name__ == "__main__":
    command_line(main)
