"""Writes text with Medusa, profiled.

    python generate.py                                        # the embedded story model, a fixed opening
    python generate.py --compare --profile                    # and by plain decoding: same tokens? where is the time?
    python generate.py --prompt "The little dog" --temperature 0.8 --seed 3
    python generate.py --model DIR_OR_HUB_ID --heads DIR_OR_HUB_ID --prompt "Hello" --json
    python generate.py --interactive --show-accepted          # a conversation; colours tell which head guessed a token
    python generate.py --prompts-file prompts.txt --batch-size 8 --json > texts.jsonl
    python generate.py --tune openings.txt                    # fit the tree to these heads and this machine

steps counts decoding steps. The prefill emits the first token, so tokens_per_step = (new_tokens - 1) / steps, which is
exactly 1 for plain decoding. seconds is prefill and decoding together, without loading and without printing.
"""
if __name__ == "__main__":      # Ctrl-C while torch is imported: an end without a traceback, as `command_line`'s later
    import signal
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
import json
import os
import statistics
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter
from contextlib import nullcontext, suppress
from itertools import chain, takewhile
from pathlib import Path

import torch
from tqdm import tqdm

from llama import (DTYPES, LARGE, SEED, ArgumentParser, Llama, Tokenizer, UserError, command_line, device, locate,
                   model_name, number, read_json, threads, write_atomic, write_json)
from prepare_data import SYSTEM, continuations, json_lines, mended, openings_of, question, read_lines
from tinymedusa import (LARGEST_COMPILED, MedusaHeads, Sampling, Stages, Tree, base_of, call, check_prompts,
                        choice_margin, generate, grow_tree, load_tree, path_hits, set_threads, uniforms, walk,
                        whole_cache)
from train_heads import evaluate

TUNE_NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)       # sizes of tree that --tune compares, the root included
TUNE_NODES_COMPILED = (2, 4, 8, 16)
TUNE_ROUNDS, TUNE_STEPS = 6, 10                            # each is timed that often, for that many steps
REPEATS = 3     # timed runs of each mode with --compare, in turns; the median is reported
OPENING = "Once upon a time, there was a little girl named Lily who loved to play in the garden."


# ---------------------------------------------------------------------------------------------------------- loading

def mode(args) -> str:
    """What a step costs depends on this; `--tune` keeps a tree for each, and for each --batch-size."""
    return torch.device(args.device).type + (" compiled" if args.compile is not None else "")


def prompts_of(path) -> list[str]:
    """The prompts of a file: its lines that are not empty; of a .jsonl a string or an object with "prompt" a line."""
    if Path(path).suffix != ".jsonl":
        prompts = [line.rstrip("\r\n") for line in read_lines(path) if line.strip()]
    else:
        prompts = []
        for place, value in json_lines(path):
            prompt = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(prompt, str):
                raise UserError(f'{place}: expected a string or an object with a "prompt"')
            prompts.append(mended(prompt))
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one a line")
    return prompts


def load_heads(args, model: Llama) -> tuple[MedusaHeads | None, Tree | None, str | None]:
    """The heads of --heads, by default those in `medusa/` in the model's folder; their tree, and where that is
    from (with --tune: no tree yet, and where to write it)."""
    folder = args.heads
    if folder is None and (config := locate(args.model, "medusa/config.json", args.revision, required=False)):
        for name in ("medusa/model.safetensors", "medusa/tree.json"):      # from a hub: fetched beside the config
            locate(args.model, name, args.revision, required=False)
        folder = config.parent
    elif folder is None and "medusa_num_heads" in read_json(locate(args.model, "config.json", args.revision)):
        folder = args.model                                                # its heads are among its own tensors
    if folder in (None, "none"):
        if args.tree is not None:
            raise UserError("--tree needs heads: give --heads FOLDER")
        return None, None, None
    heads = MedusaHeads.from_pretrained(folder, model, args.revision if folder == args.model else None)
    if not args.tune:
        tree, source = load_tree(folder, heads, args.tree, mode(args), args.batch_size)
        return heads if len(tree.paths) > 1 else None, tree, source
    if not args.tree and not Path(args.heads or args.model).is_dir():
        raise UserError(f"{args.heads or args.model} is on the hub: say with --tree FILE where to write the tree")
    return heads, None, args.tree or str(Path(folder) / "tree.json")


# ------------------------------------------------------------------------------------------------------- generating

def run(model: Llama, tokenizer: Tokenizer, ids: list, args, seed: int, heads, tree, emit, past=None) -> dict:
    """One prompt, plain (heads None) or Medusa → tokens, steps, times. `emit(text, head)` gets the new text as it comes
    and the head that guessed it, 0: the base itself."""
    stages = Stages(args.device)
    decode, runner = tokenizer.stream(ids), stages if args.profile else call
    if args.trace:
        def runner(name, *do, inner=runner):
            with torch.profiler.record_function(name):
                return inner(name, *do)
    steps = generate(model, [ids], args.max_new_tokens, heads=heads, tree=tree, sampling=sampling(args), seeds=[seed],
                     max_steps=args.max_steps, run=runner, compiled=args.compile, past=past)
    new, seconds, text, accepted = [], 0.0, "", Counter()   # the first that `generate` yields is the prefill's token
    with torch.profiler.profile() if args.trace else nullcontext() as profiler:
        while True:
            begin = time.perf_counter()
            tokens = next(steps, None)
            seconds += time.perf_counter() - begin
            for head, token in enumerate(tokens[0] if tokens else (None,), 1):
                piece = decode([] if token is None else [token], end=token is None)
                text += piece
                emit(piece, head if tokens and head < len(tokens[0]) else 0)
            if tokens is None:
                break
            accepted[len(tokens[0]) - 1] += len(new) > 0
            new += tokens[0]
    if args.trace:
        write_atomic(args.trace, lambda path: export_trace(profiler, path))
    return {"text": text, "token_ids": new, **figures(len(new), 1, accepted, seconds, stages)}


def export_trace(profiler, path: Path) -> None:
    """torch's own export, which after a failure only prints something and leaves a file behind."""
    profiler.export_chrome_trace(str(path))
    if not path.exists():
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        raise UserError("can't write the trace: is the disk full?")


def figures(tokens: int, texts: int, accepted: Counter, seconds: float, stages: Stages) -> dict:
    """What is reported of the new tokens of so many texts; accepted: a text's steps by the drafts they accepted."""
    steps = accepted.total()
    totals = {name: {"calls": len(t), "total_ms": round(1000 * sum(t), 3)} for name, t in stages.seconds.items()}
    return {"new_tokens": tokens, "steps": steps,
            "tokens_per_step": round((tokens - texts) / steps, 4) if steps else None,
            "accepted": [accepted[n] for n in range(max(accepted, default=-1) + 1)],
            "seconds": round(seconds, 6), "tokens_per_second": round(tokens / seconds, 2), "stages": totals}


def many(model: Llama, tokenizer: Tokenizer, prompts: list, encoded: list, heads, tree, args):
    """--batch-size prompts at once. Yields what `one_prompt` gives, in the prompts' order, each as soon as it and all
    before it are done; at last the figures of all together. A text's seconds are those of a row shared with others.
    """
    stages, begin = Stages(args.device), time.perf_counter()
    steps = generate(model, encoded, args.max_new_tokens, heads=heads, tree=tree, sampling=sampling(args),
                     seeds=range(args.seed, args.seed + len(prompts)), run=stages if args.profile else call,
                     compiled=args.compile, batch_size=args.batch_size)
    rows, done, everything, tokens, now, following = {}, {}, Counter(), 0, 0.0, 0
    for step in chain(steps, [{}]):                         # a text is done when a step is without it
        before, now = now, time.perf_counter() - begin
        for i in [i for i in rows if i not in step]:
            ids, accepted, since = rows.pop(i)
            done[i] = {"prompt": prompts[i], "prompt_tokens": len(encoded[i]),
                       "text": tokenizer.stream(encoded[i])(ids, end=True), "token_ids": ids,
                       **figures(len(ids), 1, accepted, before - since, Stages("cpu"))}
            everything, tokens = everything + accepted, tokens + len(ids)
        while following in done:
            yield done.pop(following)
            following += 1
        for i, new in step.items():
            if i in rows:
                rows[i][1][len(new) - 1] += 1
            rows.setdefault(i, ([], Counter(), before))[0].extend(new)
    yield figures(tokens, len(prompts), everything, now, stages)


def sampling(args) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p,
                    args.epsilon if args.acceptance == "typical" else None, args.delta)


def ready(model: Llama, args) -> None:
    """Gets a model ready to decode, and for nothing else: weights packed (but not those to compile), threads chosen."""
    large = model.size() > LARGE
    if model.norm.device.type == "cpu" and (args.compile is None or not large or model.size() > LARGEST_COMPILED):
        model.pack()
    # a compiled step has its threads built in, and of a small model waits for them more than they help
    set_threads(model, 1 if args.threads == "auto" and args.compile is not None and not large else args.threads,
                args.batch_size)


def compile_ahead(model: Llama, heads, tree, rows: int, args) -> None:
    """Compiles what will be needed, so that no run's time counts it; where that can't be done, goes on without."""
    try:
        for h, t in ((heads, tree), (None, None)) if args.compare else ((heads, tree),):
            for _ in generate(model, [[0]] * rows, 2, heads=h, tree=t, sampling=sampling(args), compiled=args.compile):
                pass
    except UserError as error:
        print(f"{error}; going on without --compile", file=sys.stderr)
        args.compile = None


def first_difference(model: Llama, prompt: list, ours: list, plain: list, args, seed: int) -> dict | None:
    """Where two outputs part, and how near the base's choice was to another there (0: a tie)."""
    common = min(len(ours), len(plain))
    position = next((i for i in range(common) if ours[i] != plain[i]), common)
    if ours == plain or position == common and args.max_steps:      # with --max-steps one may simply be longer
        return None
    with torch.inference_mode():
        ids = torch.tensor([prompt + plain[:position]], device=args.device)
        logits = model.lm_head(model(ids)[0, -1])
    u = uniforms([seed], position + 1)[0, -1].item()
    return {"position": position, "margin": choice_margin(logits, u, sampling(args))}


COLOURS = (36, 32, 33, 35, 34, 31)      # of heads 1, 2, ..; what the base wrote itself has the terminal's own


def printer(args, before: str):
    """Prints text as it comes, `before` in front of the first; nothing with --json."""
    coloured = args.show_accepted and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def emit(text, head):
        nonlocal before
        if not args.json:
            shown = f"\033[{COLOURS[(head - 1) % len(COLOURS)]}m{text}\033[0m" if coloured and head and text else text
            print(before + shown, end="", flush=True)
        before = ""
    return emit


def one_prompt(model: Llama, tokenizer: Tokenizer, prompt: str, ids: list, seed: int, heads, tree, args) -> dict:
    """Everything about one prompt, as `--json` prints it; without --json the text streams to the terminal meanwhile."""
    decode = lambda heads, tree, emit=lambda text, head: None: run(model, tokenizer, ids, args, seed, heads, tree, emit)
    if not args.compare:
        return {"prompt": prompt, "prompt_tokens": len(ids), **decode(heads, tree, printer(args, prompt))}
    # once to read, which warms both up too, then in turns, so that what else the machine does hits both alike
    decode(None, None, printer(args, f"--- plain\n{prompt}"))
    decode(heads, tree, printer(args, f"\n\n--- {'medusa' if heads else 'plain'}\n{prompt}"))
    runs = [(decode(None, None), decode(heads, tree)) for _ in range(REPEATS)]
    baseline, result = (sorted(rs, key=lambda r: r["seconds"])[REPEATS // 2] for rs in zip(*runs, strict=True))
    result = {"prompt": prompt, "prompt_tokens": len(ids), **result}
    same = min(len(baseline["token_ids"]), len(result["token_ids"])) if args.max_steps else None
    part = first_difference(model, ids, result["token_ids"], baseline["token_ids"], args, seed) \
        if not sampling(args).is_typical else None
    return result | {
        "baseline": baseline, "identical": baseline["token_ids"][:same] == result["token_ids"][:same],
        "speedup": round(baseline["seconds"] / result["seconds"], 3), "first_difference": part}


# ------------------------------------------------------------------------------------------------------- interactive

ROLES, VICUNA = ("USER", "ASSISTANT"), "vicuna_v1.1"
HELP = """!!exit or an empty line: leave            !!reset: begin anew
!!remove: take back the last round         !!regen: answer the last message anew
!!save FILE, !!load FILE: the conversation as JSON
Ctrl-C stops an answer."""


class Chat:
    """A conversation: rounds [message, answer, the answer's ids]. What the cache holds of it is not computed again.

    With the vicuna template a round is a question and its answer. Plain, a message goes on with the text so far, and
    behind an end of text begins a new one.
    """
    def __init__(self, model: Llama, tokenizer: Tokenizer, heads, tree, chat: bool, args):
        self.model, self.tokenizer, self.heads, self.tree = model, tokenizer, heads, tree
        self.chat, self.args = chat, args
        self.rounds, self.system, self.answers = [], args.system, 0
        self.cache, self.cached = whole_cache(model, 1), []     # and the ids whose keys and values it holds

    def encode(self, rounds: list, message: str) -> list:
        """The ids of some rounds and of a message behind them, up to where its answer begins."""
        ids = []
        for i, (text, answer, answer_ids) in enumerate([*rounds, (message, None, None)]):
            text = question(i, text, self.system) if self.chat else text
            if answer is not None and answer_ids is None:                                   # from a file
                text += f" {answer}" if self.chat else answer
            new = self.tokenizer.encode(text)
            ids += (new if i == 0 else new[len(self.tokenizer.bos):]) + (answer_ids or [])
            if self.chat and answer is not None and ids[-1:] != self.tokenizer.eos[:1]:     # an answer cut short
                ids += self.tokenizer.eos[:1]
        return ids

    def prompt(self, message: str) -> list:
        """All that the model is to see, without the oldest rounds where the context can't hold them and an answer."""
        ended = [i for i, r in enumerate(self.rounds) if not self.chat and r[2] and r[2][-1] in self.tokenizer.eos]
        rounds, context = self.rounds[ended[-1] + 1 if ended else 0:], self.model.config.max_position_embeddings
        room, dropped = context - min(self.args.max_new_tokens, context // 2), 0
        while len(ids := self.encode(rounds[dropped:], message)) > room and dropped < len(rounds):
            dropped += 1
        if dropped:
            print(f"(the context of {context} tokens is full: the first {dropped} rounds are no longer seen)")
        return ids

    def answer(self, message: str) -> dict:
        """The model's answer, streamed to the terminal; each one has a seed of its own."""
        ids, args = self.prompt(message), self.args
        check_prompts([ids], self.model.config)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, self.cached, strict=False)))
        self.cached, seed = ids[:kept], args.seed + self.answers        # all that is sure if Ctrl-C stops it
        self.answers += 1
        result = run(self.model, self.tokenizer, ids, args, seed, self.heads, self.tree,
                     printer(args, "ASSISTANT:" if self.chat else message), (self.cache, kept))
        self.cached = ids + result["token_ids"][:-1]
        self.rounds.append([message, result["text"].strip() if self.chat else result["text"], result["token_ids"]])
        return result

    def show(self) -> None:
        for message, answer, _ in self.rounds:
            print(f"USER: {message}\nASSISTANT: {answer}" if self.chat else message + answer)

    def save(self, path: str) -> None:
        """In the format of FastChat, the original's."""
        write_json(path, {"template_name": VICUNA if self.chat else "plain", "system_message": self.system,
                          "roles": ROLES, "offset": 0,
                          "messages": [pair for r in self.rounds for pair in zip(ROLES, r[:2], strict=True)]})

    def load(self, path: str) -> None:
        data, name = read_json(path), VICUNA if self.chat else "plain"
        messages = data.get("messages")
        if data.get("template_name") != name:
            raise UserError(f"{path} has the template {data.get('template_name')!r}, this conversation {name!r}")
        if not isinstance(messages, list) or not isinstance(data.get("system_message"), str) or not all(
                isinstance(m, list) and len(m) == 2 and m[0] == ROLES[i % 2] and (isinstance(m[1], str) or m[1] is None)
                for i, m in enumerate(messages)):
            raise UserError(f"{path} is not a saved conversation: expected messages of {' and '.join(ROLES)} in turn")
        pairs = zip(messages[::2], messages[1::2], strict=False)
        self.rounds = [[m[1], a[1], None] for m, a in pairs if m[1] is not None and a[1] is not None]
        self.system = data["system_message"]


def read_message(args, label: str) -> str:
    """What the user types; with --multiline up to Ctrl-D. Empty at the end of the input."""
    with suppress(EOFError, KeyboardInterrupt):
        if not args.multiline:
            return input(label)
        lines = [input(f"{label.rstrip(': ')} [ctrl-d/z on empty line to end]: ")]
        with suppress(EOFError):
            while True:
                lines.append(input())
        return "\n".join(lines)
    print()
    return ""


def command(chat: Chat, name: str, file: str) -> str | None:
    """One of the original's commands; a message to be answered once more, if any."""
    if name in ("!!save", "!!load") and not file:
        print(f"usage: {name} <filename>")
    elif name == "!!save":
        path = file if "." in file else file + ".json"
        print(f"saving... {path}")
        chat.save(path)
    elif name == "!!load":
        path = next((f for f in (file, file + ".json") if Path(f).is_file()), None)
        print(f"loading... {path}" if path else f"file not found: {file}")
        if path:
            chat.load(path)
            chat.show()
    elif name == "!!reset":
        print("resetting...")
        chat.rounds = []
    elif name in ("!!remove", "!!regen") and not chat.rounds:
        print(f"No messages to {'remove' if name == '!!remove' else 'regenerate'}.")
    elif name in ("!!remove", "!!regen"):
        print("removing last message..." if name == "!!remove" else "regenerating last message...")
        message = chat.rounds.pop()[0]
        chat.show()
        return message if name == "!!regen" else None
    else:
        print(HELP)
    return None


def interactive(chat: Chat) -> None:
    """Reads messages and commands until !!exit, an empty line or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    while (text := read_message(chat.args, "USER: " if chat.chat else "> ")).strip() not in ("", "!!exit"):
        try:
            if text.strip().startswith("!!"):
                name, _, file = text.strip().partition(" ")
                text = command(chat, name, file.strip())
            if text is None:
                continue
            result = chat.answer(text)
            print(f"\n[{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, "
                  f"{result['tokens_per_step'] or 0:.2f} tokens/step]")
            if chat.args.profile:
                print("\n".join([original_table(result), *(histogram(result) if chat.heads else [])]))
        except KeyboardInterrupt:
            print("\nstopped generation.")
            chat.show()
        except UserError as error:
            print(error, file=sys.stderr)
    print("exit...")


# ------------------------------------------------------------------------------------------------------- the best tree

def own_texts(model: Llama, tokenizer: Tokenizer, args) -> list:
    """The model's continuations of the openings in --tune, as documents of a token file, shortest openings first."""
    openings = tokenizer.encode_batch(openings_of(args.tune))
    if len(openings) < 4:
        raise UserError(f"{args.tune} holds {len(openings)} openings: --tune needs at least 4, better 200, one a line")
    check_prompts(openings, model.config)
    write = lambda prompts, seeds: generate(model, prompts, args.max_new_tokens, sampling=sampling(args), seeds=seeds)
    texts = continuations(dict(enumerate(openings, args.seed)), write, batch_size=64)
    return list(tqdm(texts, desc="writing texts", total=len(openings)))


def step_seconds(model: Llama, heads, trees: list, prompts: list, args) -> list[float]:
    """Seconds of a whole decoding step with each tree (None: plain), in turns, behind the prompts.

    The lower quartile: what else the machine does only ever adds.
    """
    seconds = [[] for _ in trees]
    for tree in tqdm(trees, desc="compiling") if args.compile is not None else ():
        for _ in generate(model, prompts, 2, heads=heads, tree=tree, sampling=sampling(args), compiled=args.compile):
            pass
    for _ in tqdm(range(TUNE_ROUNDS), desc="timing"):
        for tree, times in zip(trees, seconds, strict=True):
            steps = generate(model, prompts, 10 * TUNE_STEPS, heads=heads, tree=tree, sampling=sampling(args),
                             max_steps=TUNE_STEPS, compiled=args.compile)
            next(steps)                                                          # the prefill
            begin = time.perf_counter()
            for _ in steps:
                times.append(time.perf_counter() - begin)
                begin = time.perf_counter()
    return [statistics.quantiles(times)[0] for times in seconds]


def tune(model: Llama, tokenizer: Tokenizer, heads: MedusaHeads, path: str, args) -> None:
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
    ready(model, args)                  # only now: what is packed can't be evaluated with
    trees = [heads.tree(paths) for paths in grown.values()]
    longest = max(documents, key=len)
    batch, name = args.batch_size, mode(args) + (f" batch {args.batch_size}" if args.batch_size > 1 else "")
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
        "sampling": sampling(args)._asdict(), "threads": torch.get_num_threads(),
        "hits": [round(hits[tuple(p)] / places, 5) for p in paths], "chosen": chosen,
        "plain_step_ms": round(1000 * plain, 4), "candidates": rows}
    before = read_json(path) if Path(path).is_file() else {}
    write_json(path, {"paths": paths if name == "cpu" else before.get("paths", paths),
                      "modes": before.get("modes", {}) | {name: tuned}})
    if args.json:
        return print(json.dumps({"tree": path, "mode": name, **tuned}))
    print(f"{'nodes':>5}{'depth':>7}{'tokens/step':>13}{'step ms':>10}{'tokens/s':>10}")
    print(f"{1:>5}{0:>7}{1:>13.3f}{1000 * plain:>10.3f}{batch / plain:>10.1f}   plain decoding")
    for i, row in enumerate(rows):
        print("{:>5}{:>7}{:>13.3f}{:>10.3f}{:>10.1f}".format(*row.values()) + "   <- best tree" * (i == best))
    print(f"{path}: {tuned['remark']}\n{trees[best]}")


# ---------------------------------------------------------------------------------------------------------- report

def report(result: dict, heads, args) -> str:
    """The figures of one prompt as text, the stage tables and accepted drafts with --profile."""
    line = lambda name, r: (f"{name:<8}{r['new_tokens']:>5} tokens {r['steps']:>5} steps "
                            f"{r['tokens_per_step'] or 0:>6.2f} tokens/step {r['seconds']:>8.3f} s "
                            f"{r['tokens_per_second']:>9.1f} tokens/s")
    name, baseline = "medusa" if heads else "plain", result.get("baseline")
    lines = [line("plain", baseline)] if baseline else []
    lines.append(line(name, result))
    if "tree" in result:
        lines.append(f"tree: {result['tree']}")
    if baseline:
        where = result["first_difference"]
        parts = f"NO, they part at {where}" if where else "no, as acceptance is typical"
        same = "yes" if result["identical"] else parts
        lines.append(f"identical: {same}   speed-up: {result['speedup']:.2f}x")
    for title, r in (("plain", baseline), (name, result)):
        if r and r["stages"]:
            total = sum(s["total_ms"] for s in r["stages"].values())
            lines += ["", f"{title + ' stage':<16}{'calls':>7}{'mean ms':>10}{'share':>8}"]
            lines += [f"{stage:<16}{s['calls']:>7}{s['total_ms'] / s['calls']:>10.3f}{s['total_ms'] / total:>8.1%}"
                      for stage, s in r["stages"].items()]
    return "\n".join(lines + (histogram(result) if heads and args.profile else [])) + "\n"


def histogram(result: dict) -> list[str]:
    """How many of the steps accepted 0, 1, .. drafts, as lines."""
    most, total = max(result["accepted"], default=0), max(1, result["steps"])
    return ["", "accepted drafts in a step"] + [
        f"{n:>4} {steps:>6}{steps / total:>8.1%}  {'#' * round(40 * steps / most)}"
        for n, steps in enumerate(result["accepted"])]


def original_table(result: dict) -> str:
    """The stage table of the student project, 50 columns: seconds of each stage of one answer, and their shares."""
    row = lambda label, value: label + f"{value:.3f}".rjust(50 - len(label))
    seconds = {name: s["total_ms"] / 1000 for name, s in result["stages"].items()}
    total, shown = sum(seconds.values()), "medusa" in seconds
    names = {"init": "init", "medusa": "medusa", "tree": "Tree", "posterior": "Posterior", "update": "Update"}
    lines = [row(f"Wall time {label}: ", seconds[name]) for name, label in names.items()] if shown else \
        [row("Wall time base inference: ", total)]
    lines += ["-" * 50] + [row(f"Wall time portion {label}: ", seconds[name] / total)
                           for name, label in names.items() if name != "init"] if shown else []
    return "\n".join(["=" * 50, *lines, "-" * 50, row("Tokens/second: ", result["new_tokens"] / total), "=" * 50])


def print_many(results, texts: int, about: dict, heads, args) -> None:
    """Prints what `many` yields as it comes; the figures of all go to stderr with --json."""
    with tqdm(total=texts, desc="writing texts", unit=" texts") as progress:
        for result in results:
            if "prompt" in result:
                progress.write(json.dumps(result | about) if args.json else f"{result['prompt']}{result['text']}\n")
                progress.update()
    print(report(result | about, heads, args), end="", file=sys.stderr if args.json else sys.stdout, flush=True)


def text_argument(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text


def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="Examples: at the top of generate.py.")
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"), help="folder or hub id")
    parser.add_argument("--heads", help="folder, hub id or 'none' (default: medusa/ in the model's folder)")
    parser.add_argument("--revision", help="of the model on the hub")
    parser.add_argument("--prompt", action="append", type=text_argument, metavar="TEXT", help="may be repeated")
    parser.add_argument("--prompts-file", metavar="FILE", help="prompts, one a line; of a .jsonl a string or an object "
                        'with "prompt" a line')
    parser.add_argument("--batch-size", type=number(int, 1, 4096), default=1, help="with --prompts-file: so many at "
                        "once, the next prompt taking the place of a finished one; with --tune: what to tune for")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256)
    parser.add_argument("--max-steps", type=number(int, 1), help="end after so many decoding steps, plain or Medusa")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="0: always the most likely token")
    parser.add_argument("--acceptance", choices=["match", "typical"], default="match", help="match: plain decoding's "
                        "tokens; typical: the paper's rule, whose text is not what sampling at this temperature writes")
    parser.add_argument("--epsilon", type=number(float, 1e-9, 1), default=0.09, help="of typical acceptance")
    parser.add_argument("--delta", type=number(float, 1e-9, 1e9), default=0.3, help="of typical acceptance")
    parser.add_argument("--top-k", type=number(int, 0), default=0, help="0: no limit")
    parser.add_argument("--top-p", type=number(float, 1e-9, 1), default=1.0)
    parser.add_argument("--seed", type=SEED, default=0, help="prompt i draws from seed + i")
    parser.add_argument("--tune", metavar="FILE", help="openings, one a line: find the tree that decodes such texts "
                        "fastest here, write it to --tree (default: tree.json in the heads' folder) and stop")
    parser.add_argument("--tree", metavar="JSON|FILE", help="list of paths of ranks, or an object with 'paths' "
                        "(default: tree.json in the heads' folder, else 15 nodes of the published mc_sim_7b_63)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on the CPU, else the checkpoint's")
    parser.add_argument("--quantize", choices=["int8"], help="weights in 8 bits, a scale for each output")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--threads", type=threads, default="auto", help="a number, or auto: measured at start")
    parser.add_argument("--compile", action="store_const", const={},
                        help="compile the step: a minute once, then it is kept on disk")
    parser.add_argument("--compare", action="store_true", help="decode plainly too: same tokens? what speed-up?")
    parser.add_argument("--profile", action="store_true", help="time each stage")
    parser.add_argument("--trace", metavar="FILE", help="write a trace of the (last) generation, for ui.perfetto.dev")
    parser.add_argument("--show-accepted", action="store_true", help="on a terminal: the colour of a token tells the "
                        "head that guessed it (none: the model itself)")
    parser.add_argument("--interactive", action="store_true", help="a conversation; !!help lists its commands")
    parser.add_argument("--multiline", action="store_true", help="with --interactive: a message ends with Ctrl-D")
    parser.add_argument("--template", choices=["vicuna", "plain"], help="how a message is put to the model (default: "
                        "vicuna_v1.1 for a model named so, else plain: it goes on with the text)")
    parser.add_argument("--system", type=text_argument, help="the system message of the vicuna template")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, nothing else on stdout")
    return parser.parse_args(argv)


def template_of(args) -> str:
    """"vicuna" or "plain": as asked for, else by the model's name in its own config, its folder or its hub id."""
    config = read_json(locate(args.model, "config.json", args.revision))
    named = f"{config.get('_name_or_path', '')} {model_name(args.model)}".lower()
    template = args.template or ("vicuna" if "vicuna" in named else "plain")
    if args.system is not None and template == "plain":
        raise UserError("--system needs a chat model: this one goes on with plain text (or say --template vicuna)")
    return template


def main():
    args = arguments()
    if args.interactive and (args.json or args.compare or args.tune or args.prompt):
        raise UserError("--interactive is for people: leave out --json, --compare, --tune and --prompt")
    if args.prompts_file and (args.prompt or args.compare or args.interactive or args.tune or args.trace):
        raise UserError("--prompts-file leaves no room for --prompt, --compare, --interactive, --tune and --trace")
    if args.batch_size > 1 and not (args.prompts_file or args.tune):
        raise UserError("--batch-size needs --prompts-file (or --tune)")
    if base := base_of(args.model, args.revision):
        args.model, args.heads = base, args.heads or args.model     # the name of published heads alone
    model = Llama.from_pretrained(args.model, dtype=DTYPES.get(args.dtype), device=args.device, revision=args.revision,
                                  int8=args.quantize == "int8")
    tokenizer = Tokenizer(args.model, model.config, args.revision)
    heads, tree, tree_source = load_heads(args, model)
    if args.tune:
        if heads is None or args.acceptance != "match":
            raise UserError("--tune needs heads: give --heads FOLDER" if heads is None else
                            "--tune forecasts acceptance by match: leave out --acceptance")
        return tune(model, tokenizer, heads, tree_source, args)
    chat = template_of(args) == "vicuna"
    args.system = SYSTEM if args.system is None else args.system
    ready(model, args)
    prompts = [] if args.interactive else args.prompt or [OPENING]
    prompts = prompts_of(args.prompts_file) if args.prompts_file else prompts
    asked = [question(0, prompt, args.system) if chat else prompt for prompt in prompts]
    encoded = [tokenizer.encode(text) for text in asked]
    check_prompts(encoded, model.config)
    if args.compile is not None:
        compile_ahead(model, heads, tree, min(args.batch_size, len(prompts)), args)
    if args.interactive:
        return interactive(Chat(model, tokenizer, heads, tree, chat, args))
    about = {"tree": f"{len(tree.paths)} nodes, {tree_source}"} if tree else {}
    if args.prompts_file:
        results = many(model, tokenizer, prompts, encoded, heads, tree, args)
        return print_many(results, len(prompts), about, heads, args)
    for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        result = one_prompt(model, tokenizer, prompt, ids, args.seed + index, heads, tree, args) | about
        print(json.dumps(result) if args.json else "\n\n" + report(result, heads, args), flush=True)


if __name__ == "__main__":
    command_line(main)
