"""Fits the tree to some heads, a machine, a device and a batch size: `generate.py --tune OPENINGS`."""
import json
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
import torch
from tqdm import tqdm
from extras.command_line import row_seed, set_threads
from extras.forecast import grow_tree, joint_hits, simulate
from fast import engines
from llama import Llama
from loading.config import check_prompts
from loading.documents import Document, document
from loading.files import UserError, keep_sources, read_json, writable, write_json
from loading.templates import Plain
from loading.trees import by_temperature, drawing, parse_tree, with_temperatures
from tinymedusa import ROOT, MedusaHeads, Tree
from variants import batches

NODES, ROUNDS, STEPS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), 6, 10   # sizes of tree; each is timed 6 x 10 steps
SPREAD, CHEAPER = 1.4, 1.05     # costs that differ more are disturbed, as are trees that beat a plain step by more

def own_texts(model: Llama, template: Plain, openings: list, args) -> list[Document]:
    openings = [template.prompt(opening) for opening in openings]
    if len(openings) < 4:
        raise UserError(f"{args.tune} holds {len(openings)} openings: --tune needs at least 4, better 200, one a line")
    check_prompts(openings, model.config)
    prompts = sorted(openings, key=len)
    seeds = [row_seed(args.seed, i) for i in range(len(prompts))]
    plain = engines.decoder(model, sampling=args.sampling, eos=template.tokenizer.eos)
    steps = batches.generate(plain, prompts, args.max_new_tokens, seeds, batch_size=64)
    bar = tqdm(batches.finished(steps), desc="writing texts", total=len(prompts))
    new = {i: sum(ids, []) for i, ids, _ in bar}
    return [document((prompt, False), (new[i], True)) for i, prompt in enumerate(prompts)]

def step_times(makers: dict, prompts: list, count: int, rounds: int = 1) -> dict:
    """Seconds of `count` whole decoding steps a round behind the prompts: name → a decoder's maker → name → times."""
    found = {name: [] for name in makers}
    for name, make in list(makers.items()) * rounds:
        steps = islice(make().generate(prompts, 20 * count), count + 1)
        next(steps)                                                              # the prefill
        begin = time.perf_counter()
        for _ in steps:
            found[name].append(time.perf_counter() - begin)
            begin = time.perf_counter()
    return found

def turn_seconds(model: Llama, heads: MedusaHeads, trees: list, prompts: list, args) -> list[float]:
    """Seconds of a whole decoding step with each tree (None: plain) behind the prompts: the lower quartile of a few."""
    makers = {i: partial(engines.decoder, model, tree and heads, tree or ROOT, args.sampling, ())
              for i, tree in enumerate(trees)}
    return [sorted(times)[len(times) // 4] for times in step_times(makers, prompts, STEPS).values()]

def step_seconds(model: Llama, heads: MedusaHeads, trees: list, prompts: list, args) -> list[float]:
    """The median plain step; for each tree, that times the median of its step over the plain step of the same turn, as
    the machine's speed changes. Where turns contradict each other there are more; a line on stderr says if in vain."""
    turns = []
    for doing in ("timing", "timing again", "and again"):
        turns += [turn_seconds(model, heads, trees, prompts, args) for _ in tqdm(range(ROUNDS), desc=doing)]
        plain, n = sorted(turn[0] for turn in turns), len(turns)
        ratios = [sorted(turn[i] / turn[0] for turn in turns) for i in range(len(turns[0]))]
        costs = [ratio[n // 2] for ratio in ratios]
        spread = max(ratio[3 * n // 4] / ratio[n // 4] for ratio in ratios)
        if spread < SPREAD and min(costs) > 1 / CHEAPER:
            break
    else:
        print(f"--tune: something else runs on this machine: a tree's step took {spread:.1f} times as many plain steps "
              f"in some turns as in others, and one {min(costs):.2f} plain steps; try again when it is quiet",
              file=sys.stderr)
    return [plain[n // 2] * cost for cost in costs]

def grown_trees(hits: dict, heads: MedusaHeads) -> list[Tree]:
    """Trees of all sizes; for Hydra, whose every depth costs a call of a head, also shallower ones."""
    sequential = getattr(heads, "kind", "medusa") == "hydra"
    depths = [d for d in (1, 2, 3, 4, 5, 6, 8, 12, 16) if d < len(heads)] if sequential else []
    grown = {json.dumps(paths): paths for nodes in NODES for deepest in (*depths, len(heads))
             if (paths := grow_tree(hits, nodes - 1, deepest))}
    return [Tree.from_paths(paths) for paths in grown.values()]

def written(path: str, name: str) -> tuple[dict, dict]:
    """What `path` holds already; of it what was tuned for the mode `name`, by temperature. UserError: it is no tree."""
    before, found = read_json(path) if writable(path).exists() else {"paths": []}, {}
    try:
        parse_tree(json.dumps(before))
        if name in (modes := before.get("modes", {})):
            found = {t: e for t, e in by_temperature(modes[name]).items() if "paths" in e}
    except UserError as error:
        raise UserError(f"{path}: {error}: delete it, or name another one with --tree") from error
    return before, found

def candidates(trees: list, costs: list, ranks: list, own: list, batch: int) -> list[dict]:
    """What each tree is worth: `simulate` forecasts the tokens of a step, costs are its seconds."""
    rows = []
    for tree, cost in zip(trees, costs, strict=True):
        per_step = simulate(tree, ranks, own)["tokens_per_step"]
        rows.append({"nodes": len(tree.paths), "depth": len(tree.paths[-1]), "tokens_per_step": per_step,
                     "step_ms": round(1000 * cost, 4), "tokens_per_second": round(batch * per_step / cost, 1)})
    return rows

def tune(model: Llama, template: Plain, openings: list, heads: MedusaHeads | None, path: str, evaluate, args) -> None:
    """Writes to `path`, for this device and --batch-size, the smallest tree within 3 % of the most expected tokens per
    second here, or the root alone where none beats plain decoding by 3 %. Every second text grows the trees, the others
    forecast tokens per step; the cost of a step is measured (as in Sequoia, arXiv 2402.12374). evaluate: the script's.
    """
    if heads is None or args.acceptance != "match":
        raise UserError("--tune needs heads: give --heads FOLDER" if heads is None else
                        "--tune forecasts acceptance by match: leave out --acceptance")
    batch, name = args.batch_size, engines.mode(model)
    name += f" batch {batch}" if batch > 1 else ""
    keep_sources([path], [args.tune])
    before, found = written(path, name)             # or an error, before the work
    documents = own_texts(model, template, openings, args)
    halves = documents[::2], documents[1::2]
    ranks, own = zip(*(evaluate(model, heads, half, 4096, args.sampling)[1:] for half in halves), strict=True)
    hits = joint_hits(ranks[0])
    trees = grown_trees(hits, heads)
    if not trees or not any(map(torch.any, own[1])):
        raise UserError("no guess of these heads was right in any text: raise --max-new-tokens or train them longer")
    set_threads(model, args.threads, batch)
    longest = max(documents, key=len).ids
    plain, *costs = step_seconds(model, heads, [None, *trees], [longest[:len(longest) // 2].tolist()] * batch, args)
    rows = candidates(trees, costs, ranks[1], own[1], batch)
    fastest = max(row["tokens_per_second"] for row in rows)
    best = next(i for i, row in enumerate(rows) if 1.03 * row["tokens_per_second"] >= fastest)   # fewest nodes first
    chosen, places = rows[best], sum(rank.shape[1] for rank in ranks[0])
    pays, paths = chosen["tokens_per_second"] * plain > 1.03 * batch, [list(p) for p in trees[best].paths[1:]]
    cost = (f"a step of {chosen['nodes']} nodes costs {chosen['step_ms'] / 1000 / plain:.2f} plain steps and yields "
            f"{chosen['tokens_per_step']:.2f} tokens")
    tuned = {
        "paths": paths if pays else [], "remark": f"tuned for {name}: {cost}" if pays else
        f"plain decoding is faster on {name}: {cost}",
        "source": f"--tune: {len(documents)} openings of {Path(args.tune).name}",
        "sampling": args.sampling._asdict() | {"epsilon": None, "delta": args.delta},
        "threads": torch.get_num_threads(), "hits": [round(hits[tuple(p)] / places, 5) for p in paths],
        "chosen": chosen, "plain_step_ms": round(1000 * plain, 4), "candidates": rows}
    entry = with_temperatures(found | {args.temperature: tuned})
    plain_entries = {t: {"paths": e["paths"], "sampling": {"temperature": t}} for t, e in by_temperature(entry).items()}
    modes = before.pop("modes", {})                 # the top is for library users and other devices
    top = with_temperatures((by_temperature(before) if "sampling" in before else {}) | plain_entries)
    write_json(path, top | (before if name != "cpu" else {}) | {"modes": modes | {name: entry}})
    if args.json:
        return print(json.dumps({"tree": path, "mode": name, **tuned}))
    print(f"{'nodes':>5}{'depth':>7}{'tokens/step':>13}{'step ms':>10}{'tokens/s':>10}\n"
          f"{1:>5}{0:>7}{1:>13.3f}{1000 * plain:>10.3f}{batch / plain:>10.1f}   plain decoding" + ": best" * (not pays))
    for i, row in enumerate(rows):
        print("{:>5}{:>7}{:>13.3f}{:>10.3f}{:>10.1f}".format(*row.values()) + "   <- best tree" * (pays and i == best))
    print(f"{path}: {tuned['remark']}\n{drawing([(), *tuned['paths']])}")
