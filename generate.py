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
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from extras.chat import Chat, interactive
from extras.cli import SEED, ArgumentParser, command_line, device, number, threads
from extras.explain import explaining
from extras.report import printer, report
from extras.tune import tune
from llama import DTYPES, LARGE, Llama, Tokenizer, UserError, locate, model_name, read_json, write_atomic
from prepare_data import SYSTEM, json_lines, mended, question, read_lines
from tinymedusa import (LARGEST_COMPILED, MedusaHeads, Sampling, Stages, Tree, base_of, call, check_prompts,
                        choice_margin, generate, load_tree, set_threads, uniforms)

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
    lost = folder is None and Path(args.model, "medusa/model.safetensors").is_file()        # without its config
    if folder is None and (config := locate(args.model, "medusa/config.json", args.revision, required=lost)):
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
    if args.explain:
        runner, emit = explaining(tokenizer, ids), lambda text, head: None
    if args.trace:
        def runner(name, *do, inner=runner):
            with torch.profiler.record_function(name):
                return inner(name, *do)
    steps = generate(model, [ids], args.max_new_tokens, heads=heads, tree=tree, sampling=args.sampling, seeds=[seed],
                     max_steps=args.explain or args.max_steps, run=runner, compiled=args.compile, past=past)
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
    steps = generate(model, encoded, args.max_new_tokens, heads=heads, tree=tree, sampling=args.sampling,
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
            for _ in generate(model, [[0]] * rows, 2, heads=h, tree=t, sampling=args.sampling, compiled=args.compile):
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
    return {"position": position, "margin": choice_margin(logits, u, args.sampling)}


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
        if not args.sampling.is_typical else None
    return result | {
        "baseline": baseline, "identical": baseline["token_ids"][:same] == result["token_ids"][:same],
        "speedup": round(baseline["seconds"] / result["seconds"], 3), "first_difference": part}


def print_many(results, texts: int, about: dict, heads, args) -> None:
    """Prints what `many` yields as it comes; the figures of all go to stderr with --json."""
    with tqdm(total=texts, desc="writing texts", unit=" texts") as progress:
        for result in results:
            if "prompt" in result:
                shown = json.dumps(result | about) if args.json else f"{result['prompt']}{result['text']}\n"
                progress.write(shown + "\n", end="")           # whole lines, wherever it is stopped
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
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt a line; of a .jsonl a string or "
                        'an object with "prompt" a line')
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
    parser.add_argument("--tune", type=Path, metavar="FILE", help="openings, one a line: find the tree that decodes "
                        "such texts fastest here, write it to --tree (default: tree.json beside the heads) and stop")
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
    parser.add_argument("--explain", type=number(int, 1), metavar="N", help="tell the first N steps: the tree with its "
                        "tokens, what the base chooses behind each, what is kept, what the cache holds")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace of the (last) generation, for "
                        "ui.perfetto.dev")
    parser.add_argument("--show-accepted", action="store_true", help="on a terminal: the colour of a token tells the "
                        "head that guessed it (none: the model itself)")
    parser.add_argument("--interactive", action="store_true", help="a conversation; !!help lists its commands")
    parser.add_argument("--multiline", action="store_true", help="with --interactive: a message ends with Ctrl-D")
    parser.add_argument("--template", choices=["vicuna", "plain"], help="how a message is put to the model (default: "
                        "vicuna_v1.1 for a model named so, else plain: it goes on with the text)")
    parser.add_argument("--system", type=text_argument, help="the system message of the vicuna template")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, nothing else on stdout")
    args = parser.parse_args(argv)
    args.sampling = Sampling(args.temperature, args.top_k, args.top_p,
                             args.epsilon if args.acceptance == "typical" else None, args.delta)
    return args


def template_of(args) -> str:
    """"vicuna" or "plain": as asked for, else by the model's name in its own config, its folder or its hub id."""
    config = read_json(locate(args.model, "config.json", args.revision))
    named = f"{config.get('_name_or_path', '')} {model_name(args.model)}".lower()
    template = args.template or ("vicuna" if "vicuna" in named else "plain")
    if args.system is not None and template == "plain":
        raise UserError("--system needs a chat model: this one goes on with plain text (or say --template vicuna)")
    return template


APART = {       # options → those that make no sense beside them
    "--interactive": "--json --compare --prompt",
    "--prompts-file": "--prompt --interactive --compare --trace --max-steps --show-accepted",
    "--tune": "--prompt --interactive --prompts-file --compare --profile --trace --max-steps --show-accepted",
    "--explain": "--json --compile --interactive --prompts-file --compare --tune --profile --trace --max-steps"}


def main():
    args = arguments()
    given = {f"--{name.replace('_', '-')}" for name, value in vars(args).items() if value not in (None, False)}
    for option, others in APART.items():
        if option in given and (wrong := given.intersection(others.split())):
            raise UserError(f"{option} does not go with {', '.join(sorted(wrong))}: leave out one or the other")
    if args.batch_size > 1 and not (args.prompts_file or args.tune):
        raise UserError("--batch-size needs --prompts-file (or --tune)")
    prompts = [] if args.interactive else args.prompt or [OPENING]
    if args.prompts_file:
        prompts = prompts_of(args.prompts_file)
        args.batch_size = min(args.batch_size, len(prompts))
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
        return tune(model, tokenizer, heads, tree_source, mode(args), lambda: ready(model, args), args)
    if args.explain and heads is None:
        raise UserError("--explain shows trees, and this is plain decoding: give --heads FOLDER, or a larger --tree")
    chat = template_of(args) == "vicuna"
    args.system = SYSTEM if args.system is None else args.system
    ready(model, args)
    asked = [question(0, prompt, args.system) if chat else prompt for prompt in prompts]
    encoded = [tokenizer.encode(text) for text in asked]
    check_prompts(encoded, model.config)
    if args.compile is not None:
        compile_ahead(model, heads, tree, args.batch_size, args)
    if args.interactive:
        return interactive(Chat(model, tokenizer, chat, args, lambda ids, seed, emit, past: run(
            model, tokenizer, ids, args, seed, heads, tree, emit, past)))
    about = {"tree": f"{len(tree.paths)} nodes, {tree_source}"} if tree else {}
    if args.prompts_file:
        results = many(model, tokenizer, prompts, encoded, heads, tree, args)
        return print_many(results, len(prompts), about, heads, args)
    for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        result = one_prompt(model, tokenizer, prompt, ids, args.seed + index, heads, tree, args) | about
        shown = f"\ntree: {result['tree']}" if args.explain else "\n\n" + report(result, heads, args)
        print(json.dumps(result) if args.json else shown, flush=True)


if __name__ == "__main__":
    command_line(main)
