"""Fits the tree to some heads, a machine, a mode and a batch size: `generate.py --tune OPENINGS`."""
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from llama import Llama, Tokenizer, UserError, read_json, write_json
from prepare_data import continuations, openings_of
from tinymedusa import MedusaHeads, check_prompts, generate, grow_tree, path_hits, walk
from train_heads import evaluate

TUNE_NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)       # sizes of tree that --tune compares, the root included
TUNE_NODES_COMPILED = (2, 4, 8, 16)
TUNE_ROUNDS, TUNE_STEPS = 6, 10                            # each is timed that often, for that many steps


def own_texts(model: Llama, tokenizer: Tokenizer, args) -> list:
    """The model's continuations of the openings in --tune, as documents of a token file, shortest openings first."""
    openings = tokenizer.encode_batch(openings_of(args.tune))
    if len(openings) < 4:
        raise UserError(f"{args.tune} holds {len(openings)} openings: --tune needs at least 4, better 200, one a line")
    check_prompts(openings, model.config)
    write = lambda prompts, seeds: generate(model, prompts, args.max_new_tokens, sampling=args.sampling, seeds=seeds)
    texts = continuations(dict(enumerate(openings, args.seed)), write, batch_size=64)
    return list(tqdm(texts, desc="writing texts", total=len(openings)))


def step_seconds(model: Llama, heads, trees: list, prompts: list, args) -> list[float]:
    """Seconds of a whole decoding step with each tree (None: plain), in turns, behind the prompts.

    The lower quartile: what else the machine does only ever adds.
    """
    seconds = [[] for _ in trees]
    for tree in tqdm(trees, desc="compiling") if args.compile is not None else ():
        for _ in generate(model, prompts, 2, heads=heads, tree=tree, sampling=args.sampling, compiled=args.compile):
            pass
    for _ in tqdm(range(TUNE_ROUNDS), desc="timing"):
        for tree, times in zip(trees, seconds, strict=True):
            steps = generate(model, prompts, 10 * TUNE_STEPS, heads=heads, tree=tree, sampling=args.sampling,
                             max_steps=TUNE_STEPS, compiled=args.compile)
            next(steps)                                                          # the prefill
            begin = time.perf_counter()
            for _ in steps:
                times.append(time.perf_counter() - begin)
                begin = time.perf_counter()
    return [statistics.quantiles(times)[0] for times in seconds]


def tune(model: Llama, tokenizer: Tokenizer, heads: MedusaHeads, path: str, mode: str, ready, args) -> None:
    """Writes to `path`, for this mode and --batch-size, the tree with the most expected tokens per second here.

    The openings at even places grow the trees (joint hits), those at odd places forecast their tokens per step by a
    walk; a step's cost is measured (Sequoia, arXiv 2402.12374, sizes trees by cost likewise). A tree must beat plain
    decoding by 3 %, else the entry is the root alone.
    """
    documents = own_texts(model, tokenizer, args)
    ranks, own = zip(*(evaluate(model, heads, half, 4096)[1:]
                       for half in (documents[::2], documents[1::2])), strict=True)
    hits = path_hits(ranks[0])
    depths = [d for d in (1, 2, 3, 4, 5, 6, 8, 12, 16) if d < heads.num_heads] if heads.kind == "hydra" else []
    if args.compile is not None:                                                 # each size costs half a minute
        depths = []
    grown = {json.dumps(paths): paths for nodes in (TUNE_NODES if args.compile is None else TUNE_NODES_COMPILED)
             for deepest in (*depths, heads.num_heads) if (paths := grow_tree(hits, nodes - 1, deepest))}
    if not grown or not any(map(torch.any, own[1])):
        raise UserError("no guess of these heads was right in any text: raise --max-new-tokens or train them longer")
    ready()                             # only now: what is packed can't be evaluated with
    trees = [heads.tree(paths) for paths in grown.values()]
    longest = max(documents, key=len)
    batch, name = args.batch_size, mode + (f" batch {args.batch_size}" if args.batch_size > 1 else "")
    prompts = [(longest[:len(longest) // 2] // 4).tolist()] * batch
    plain, *costs = step_seconds(model, heads, [None, *trees], prompts, args)
    rows = []
    for tree, cost in zip(trees, costs, strict=True):
        per_step = walk(tree, ranks[1], own[1])["tokens_per_step"]
        rows.append({"nodes": len(tree.paths), "depth": len(tree.paths[-1]), "tokens_per_step": per_step,
                     "step_ms": round(1000 * cost, 4), "tokens_per_second": round(batch * per_step / cost, 1)})
    best = max(range(len(rows)), key=lambda i: rows[i]["tokens_per_second"])
    chosen, places = rows[best], sum(rank.shape[1] for rank in ranks[0])
    pays, paths = chosen["tokens_per_second"] * plain > 1.03 * batch, trees[best].paths[1:]
    says = (f"a step of {chosen['nodes']} nodes costs {chosen['step_ms'] / 1000 / plain:.2f} plain steps and yields "
            f"{chosen['tokens_per_step']:.2f} tokens")
    tuned = {
        "paths": paths if pays else [], "remark": f"tuned for {name}: " + says if pays else
        f"plain decoding is faster on {name}: {says}",
        "source": f"--tune: {len(documents)} openings of {Path(args.tune).name}",
        "sampling": args.sampling._asdict(), "threads": torch.get_num_threads(),
        "hits": [round(hits[tuple(p)] / places, 5) for p in paths], "chosen": chosen,
        "plain_step_ms": round(1000 * plain, 4), "candidates": rows}
    before = read_json(path) if Path(path).is_file() else {}
    top = {"paths": paths} if name == "cpu" else {"paths": paths} | before
    write_json(path, top | {"modes": before.get("modes", {}) | {name: tuned}})
    if args.json:
        return print(json.dumps({"tree": path, "mode": name, **tuned}))
    print(f"{'nodes':>5}{'depth':>7}{'tokens/step':>13}{'step ms':>10}{'tokens/s':>10}")
    print(f"{1:>5}{0:>7}{1:>13.3f}{1000 * plain:>10.3f}{batch / plain:>10.1f}   plain decoding")
    for i, row in enumerate(rows):
        print("{:>5}{:>7}{:>13.3f}{:>10.3f}{:>10.1f}".format(*row.values()) + "   <- best tree" * (i == best))
    print(f"{path}: {tuned['remark']}\n{trees[best]}")
