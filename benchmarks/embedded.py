"""What the embedded model and its heads are worth: the figures of README.md and model/README.md.

    python benchmarks/embedded.py                        # tokens per step and speed over 100 held-out openings
    python benchmarks/embedded.py --temperature 0.8
    python benchmarks/embedded.py --valid held-out.txt             # the held-out loss and bits per byte as well

Plain decoding and Medusa alternate on each opening (one stream, one run each, both warmed up), so the speed-up is a
ratio within one run: its median over the openings is printed with its quartiles.
"""
import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.cli import command_line, threads  # noqa: E402
from llama import Llama, Tokenizer  # noqa: E402
from prepare_data import texts, tokenised  # noqa: E402
from tinymedusa import (  # noqa: E402
    MedusaHeads,
    Sampling,
    choice_margin,
    generate,
    load_tree,
    published_tree,
    set_threads,
    uniforms,
)


@torch.no_grad()
def held_out_loss(model, tokenizer, path) -> dict:
    """Mean nats of a token (eos counts, bos is given) and bits per byte of the texts (their separators not counted)."""
    stories = list(texts(path, "<|endoftext|>"))
    nats, tokens = 0.0, 0
    for document in tqdm(tokenised(iter(stories), tokenizer), total=len(stories), desc="held-out loss"):
        ids = torch.from_numpy(document.astype("int64") // 4)
        log_probs = model.lm_head(model(ids[None, :-1])[0]).log_softmax(-1)
        nats -= log_probs.gather(1, ids[1:, None]).sum().item()
        tokens += len(ids) - 1
    size = sum(len(t.encode()) for t in stories)
    return {"stories": len(stories), "tokens": tokens, "nats_per_token": nats / tokens,
            "bits_per_byte": nats / math.log(2) / size, "bytes_per_token": size / tokens}


def timed(model, ids, args, seed, heads, tree):
    """(new tokens, tokens of each step, seconds) of one prompt."""
    begin = time.perf_counter()
    steps = [new[0] for new in generate(model, [ids], args.max_new_tokens, heads=heads, tree=tree, seeds=[seed],
                                        sampling=Sampling(args.temperature))]
    return [t for new in steps for t in new], list(map(len, steps[1:])), time.perf_counter() - begin


@torch.no_grad()
def margin_where_they_part(model, ids, plain, medusa, seed, args) -> float:
    """How near plain decoding's choice was to another where the outputs part: float32 rounds a tree differently."""
    at = next(i for i, (a, b) in enumerate(zip(plain, medusa, strict=False)) if a != b)
    logits = model.lm_head(model(torch.tensor([ids + plain[:at]]))[0, -1])
    return choice_margin(logits, uniforms([seed], at + 1)[0, -1].item(), Sampling(args.temperature))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "model"))
    parser.add_argument("--heads", help="default: medusa/ in the model's folder")
    parser.add_argument("--openings", default=str(ROOT / "benchmarks" / "openings.txt"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--published", type=int, metavar="NODES", help="that many nodes of the published mc_sim_7b_63, "
                        "the root not counted, instead of the heads' own tree.json")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=threads, default="auto")
    parser.add_argument("--valid", metavar="FILE")
    args = parser.parse_args()
    model = Llama.from_pretrained(args.model)
    folder = Path(args.heads or Path(args.model) / "medusa")
    heads = MedusaHeads.from_pretrained(folder, model)
    published = json.dumps(published_tree(heads.num_heads, args.published)) if args.published else None
    tree, tree_source = load_tree(folder, heads, published)
    tokenizer = Tokenizer(args.model, model.config)
    model.pack()
    set_threads(model, args.threads)
    print(f"{torch.get_num_threads()} thread(s), temperature {args.temperature}, {args.max_new_tokens} new tokens or "
          f"to the end of the story, {heads.kind} heads, {heads.size()} parameters, tree of "
          f"{len(tree.paths)} nodes (root included), {tree_source}")
    if args.valid:
        print(" ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                       for k, v in held_out_loss(model, tokenizer, args.valid).items()))
    prompts = [tokenizer.encode(o) for o in Path(args.openings).read_text(encoding="utf-8").splitlines()[:args.limit]]
    timed(model, prompts[0], args, 0, heads, tree), timed(model, prompts[0], args, 0, None, None)          # warm-up
    results = [(timed(model, ids, args, i, None, None), timed(model, ids, args, i, heads, tree))
               for i, ids in enumerate(tqdm(prompts, desc="openings"))]
    plain, medusa = zip(*results, strict=True)
    accepted = [n for _, steps, _ in medusa for n in steps]
    speed = lambda runs: statistics.median(len(tokens) / seconds for tokens, _, seconds in runs)
    ratio = statistics.quantiles([p[2] / m[2] for p, m in results if p[0] == m[0]], n=4)
    per_opening = [(len(tokens) - 1) / len(steps) for tokens, steps, _ in medusa]
    margins = [margin_where_they_part(model, ids, p[0], m[0], i, args)
               for i, (ids, (p, m)) in enumerate(zip(prompts, results, strict=True)) if p[0] != m[0]]
    print(f"identical outputs: {sum(p[0] == m[0] for p, m in results)} of {len(results)}" + "".join(
        f", one parts where the choice's margin is {margin:.1e}" for margin in margins))
    print(f"tokens per step: {sum(accepted) / len(accepted):.3f} over {len(accepted)} steps, "
          f"mean over the openings {statistics.mean(per_opening):.3f}")
    print("steps that emitted 1, 2, ... tokens: " + " ".join(
        f"{accepted.count(n) / len(accepted):.1%}" for n in range(1, tree.path.shape[1] + 1)))
    print(f"distinct tokens in the stories: {len({t for tokens, _, _ in plain for t in tokens})}, "
          f"new tokens: {sum(len(tokens) for tokens, _, _ in plain)}")
    print(f"plain {speed(plain):.0f} tokens/s, Medusa {speed(medusa):.0f} tokens/s (medians), "
          f"speed-up {ratio[1]:.2f} (quartiles {ratio[0]:.2f} to {ratio[2]:.2f})")


if __name__ == "__main__":
    command_line(main)
