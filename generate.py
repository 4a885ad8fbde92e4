"""Writes text with Medusa, profiled.

    python generate.py                                        # the embedded story model, a fixed opening
    python generate.py --compare --profile                    # and by plain decoding: same tokens? where is the time?
    python generate.py --prompt "The little dog" --temperature 0.8 --seed 3
    python generate.py --model DIR_OR_HUB_ID --heads DIR_OR_HUB_ID --prompt "Hello" --json

steps counts decoding steps. The prefill emits the first token, so tokens_per_step = (new_tokens - 1) / steps, which is
exactly 1 for plain decoding. seconds is prefill and decoding together, without loading and without printing.
"""
import json
import time
from argparse import ArgumentTypeError
from pathlib import Path

import torch

from llama import (
    DTYPES,
    SEED,
    ArgumentParser,
    Llama,
    Tokenizer,
    UserError,
    command_line,
    device,
    locate,
    number,
    threads,
)
from tinymedusa import (
    MedusaHeads,
    Sampling,
    Stages,
    Tree,
    call,
    check_prompts,
    choice_margin,
    generate,
    load_tree,
    set_threads,
    uniforms,
)

REPEATS = 3     # timed runs of each mode with --compare, in turns; the median is reported
OPENING = "Once upon a time, there was a little girl named Lily who loved to play in the garden."


# ---------------------------------------------------------------------------------------------------------- loading

def load_heads(args, model: Llama) -> tuple[MedusaHeads | None, Tree | None]:
    """The heads of --heads, by default those in `medusa/` inside the model's folder, and their tree."""
    folder = args.heads
    if folder is None and (config := locate(args.model, "medusa/config.json", args.revision, required=False)):
        for name in ("medusa/model.safetensors", "medusa/tree.json"):      # from a hub: fetched beside the config
            locate(args.model, name, args.revision, required=False)
        folder = config.parent
    if folder in (None, "none"):
        if args.tree is not None:
            raise UserError("--tree needs heads: give --heads FOLDER")
        return None, None
    heads = MedusaHeads.from_pretrained(folder, model)
    return heads, load_tree(folder, heads, args.tree)


# ------------------------------------------------------------------------------------------------------- generating

def run(model: Llama, tokenizer: Tokenizer, ids: list, args, seed: int, heads, tree, emit) -> dict:
    """One prompt, plain (heads None) or Medusa → tokens, steps, times. `emit` gets the new text as it comes."""
    stages = Stages(args.device)
    decode = tokenizer.stream(ids)
    steps = generate(model, [ids], args.max_new_tokens, heads=heads, tree=tree, sampling=sampling(args), seeds=[seed],
                     max_steps=args.max_steps, run=stages if args.profile else call)
    new, count, seconds, text = [], -1, 0.0, ""             # the first that `generate` yields is the prefill's token
    while True:
        begin = time.perf_counter()
        tokens = next(steps, None)
        seconds += time.perf_counter() - begin
        piece = decode([], end=True) if tokens is None else decode(tokens[0])
        text += piece
        emit(piece)
        if tokens is None:
            break
        new, count = new + tokens[0], count + 1
    totals = {name: {"calls": len(t), "total_ms": round(1000 * sum(t), 3)} for name, t in stages.seconds.items()}
    return {"text": text, "token_ids": new, "new_tokens": len(new), "steps": count,
            "tokens_per_step": round((len(new) - 1) / count, 4) if count > 0 else None,
            "seconds": round(seconds, 6), "tokens_per_second": round(len(new) / seconds, 2), "stages": totals}


def sampling(args) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p)


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


def printer(args, before: str):
    """Prints text as it comes, `before` in front of the first; nothing with --json."""
    def emit(text):
        nonlocal before
        if not args.json:
            print(before + text, end="", flush=True)
        before = ""
    return emit


def one_prompt(model: Llama, tokenizer: Tokenizer, prompt: str, ids: list, seed: int, heads, tree, args) -> dict:
    """Everything about one prompt, as `--json` prints it; without --json the text streams to the terminal meanwhile."""
    decode = lambda heads, tree, emit=lambda text: None: run(model, tokenizer, ids, args, seed, heads, tree, emit)
    if not args.compare:
        return {"prompt": prompt, "prompt_tokens": len(ids), **decode(heads, tree, printer(args, prompt))}
    # once to read, which warms both up too, then in turns, so that what else the machine does hits both alike
    decode(None, None, printer(args, f"--- plain\n{prompt}"))
    decode(heads, tree, printer(args, f"\n\n--- {'medusa' if heads else 'plain'}\n{prompt}"))
    runs = [(decode(None, None), decode(heads, tree)) for _ in range(REPEATS)]
    baseline, result = (sorted(rs, key=lambda r: r["seconds"])[REPEATS // 2] for rs in zip(*runs, strict=True))
    result = {"prompt": prompt, "prompt_tokens": len(ids), **result}
    same = min(len(baseline["token_ids"]), len(result["token_ids"])) if args.max_steps else None
    part = first_difference(model, ids, result["token_ids"], baseline["token_ids"], args, seed)
    return result | {
        "baseline": baseline, "identical": baseline["token_ids"][:same] == result["token_ids"][:same],
        "speedup": round(baseline["seconds"] / result["seconds"], 3), "first_difference": part}


# ---------------------------------------------------------------------------------------------------------- report

def report(result: dict, heads) -> str:
    """The figures of one prompt as text, the stage tables with --profile."""
    line = lambda name, r: (f"{name:<8}{r['new_tokens']:>5} tokens {r['steps']:>5} steps "
                            f"{r['tokens_per_step'] or 0:>6.2f} tokens/step {r['seconds']:>8.3f} s "
                            f"{r['tokens_per_second']:>9.1f} tokens/s")
    name, baseline = "medusa" if heads else "plain", result.get("baseline")
    lines = [line("plain", baseline)] if baseline else []
    lines.append(line(name, result))
    if baseline:
        where = result["first_difference"]
        same = "yes" if result["identical"] else f"NO, they part at {where}"
        lines.append(f"identical: {same}   speed-up: {result['speedup']:.2f}x")
    for title, r in (("plain", baseline), (name, result)):
        if r and r["stages"]:
            total = sum(s["total_ms"] for s in r["stages"].values())
            lines += ["", f"{title + ' stage':<16}{'calls':>7}{'mean ms':>10}{'share':>8}"]
            lines += [f"{stage:<16}{s['calls']:>7}{s['total_ms'] / s['calls']:>10.3f}{s['total_ms'] / total:>8.1%}"
                      for stage, s in r["stages"].items()]
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256)
    parser.add_argument("--max-steps", type=number(int, 1), help="end after so many decoding steps, plain or Medusa")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="0: always the most likely token")
    parser.add_argument("--top-k", type=number(int, 0), default=0, help="0: no limit")
    parser.add_argument("--top-p", type=number(float, 1e-9, 1), default=1.0)
    parser.add_argument("--seed", type=SEED, default=0, help="prompt i draws from seed + i")
    parser.add_argument("--tree", metavar="JSON|FILE", help="list of paths of ranks, or an object with 'paths' "
                        "(default: tree.json in the heads' folder, else 15 nodes of the published mc_sim_7b_63)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on the CPU, else the checkpoint's")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--threads", type=threads, default="auto", help="a number, or auto: measured at start")
    parser.add_argument("--compare", action="store_true", help="decode plainly too: same tokens? what speed-up?")
    parser.add_argument("--profile", action="store_true", help="time each stage")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, nothing else on stdout")
    return parser.parse_args(argv)


def main():
    args = arguments()
    model = Llama.from_pretrained(args.model, dtype=DTYPES.get(args.dtype), device=args.device, revision=args.revision)
    tokenizer = Tokenizer(args.model, model.config, args.revision)
    heads, tree = load_heads(args, model)
    set_threads(model, args.threads)
    prompts = args.prompt or [OPENING]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    check_prompts(encoded, model.config.max_position_embeddings)
    for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        result = one_prompt(model, tokenizer, prompt, ids, args.seed + index, heads, tree, args)
        print(json.dumps(result) if args.json else "\n\n" + report(result, heads), flush=True)


if __name__ == "__main__":
    command_line(main)
