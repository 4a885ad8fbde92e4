"""What the embedded model and its heads are worth: the figures of README.md and model/README.md.

    python benchmarks/embedded.py                        # tokens per step and speed over 100 held-out openings
    python benchmarks/embedded.py --temperature 0.8
    python benchmarks/embedded.py --fast                           # decoded by the C++ engine
    python benchmarks/embedded.py --valid held-out.txt             # the held-out loss and bits per byte as well

Plain decoding and Medusa alternate on each opening (one stream, one run each, both warmed up), so the speed-up is a
ratio within one run: its median over the openings is printed with its quartiles.
"""
import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.command_line import command_line, set_threads, threads  # noqa: E402
from extras.compare import margin, noise_at  # noqa: E402
from fast import engines  # noqa: E402
from loading.documents import texts  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from loading.trees import published_tree, read_tree  # noqa: E402
from prepare_data import tokenised  # noqa: E402
from tinymedusa import Sampling, Tree  # noqa: E402
from variants.heads import load_heads  # noqa: E402


@torch.no_grad()
def held_out_loss(model, tokenizer, path) -> dict:
    """Mean nats of a token (eos counts, bos is given) and bits per byte of the texts (their separators not counted)."""
    stories = list(texts(path, "<|endoftext|>"))
    nats, tokens = 0.0, 0
    for document in tqdm(tokenised(iter(stories), tokenizer), total=len(stories), desc="held-out loss"):
        ids = torch.from_numpy(document.ids)
        log_probs = model.lm_head(model(ids[None, :-1])[0]).log_softmax(-1)
        nats -= log_probs.gather(1, ids[1:, None]).sum().item()
        tokens += len(ids) - 1
    size = sum(len(t.encode()) for t in stories)
    return {"stories": len(stories), "tokens": tokens, "nats_per_token": nats / tokens,
            "bits_per_byte": nats / math.log(2) / size, "bytes_per_token": size / tokens}


def timed(decoder, ids, args, seed):
    """(new tokens, tokens of each step, seconds) of one prompt."""
    begin = time.perf_counter()
    steps = [new for (new,) in decoder.generate([ids], args.max_new_tokens, [seed])]
    return [t for new in steps for t in new], list(map(len, steps[1:])), time.perf_counter() - begin


@torch.no_grad()
def margin_where_they_part(decoder, ids, plain, medusa, seed) -> float:
    """How near plain decoding's choice was to another where the outputs part: float32 rounds a tree differently."""
    at = next(i for i, (a, b) in enumerate(zip(plain, medusa, strict=False)) if a != b)
    logits = decoder.model.lm_head(decoder.model(torch.tensor([ids + plain[:at]]))[0, -1])
    return margin(logits, noise_at(seed, at, logits, decoder.sampling), decoder.sampling)


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
    parser.add_argument("--fast", action="store_true", help="decode with the C++ engine, plain and Medusa")
    parser.add_argument("--valid", metavar="FILE")
    args = parser.parse_args()
    model = engines.load(args.model, fast=args.fast)
    folder = Path(args.heads or Path(args.model) / "medusa")
    heads = load_heads(folder, model)
    if args.published:
        paths = published_tree(len(heads), args.published)
        tree_source = str(paths)
    else:
        paths, tree_source = read_tree(folder, len(heads), heads.draft_size, mode=engines.mode(model),
                                       temperature=args.temperature)
    tree, sampling, tokenizer = Tree.from_paths(paths), Sampling(args.temperature), Tokenizer(args.model, model.config)
    plainly = engines.decoder(model, sampling=sampling)
    drafting = engines.decoder(model, heads, tree, sampling)
    set_threads(model, args.threads)
    kind, size = getattr(heads, "kind", "medusa"), sum(p.numel() for p in heads.parameters())
    print(f"{engines.mode(model)}, {torch.get_num_threads()} thread(s), temperature {args.temperature}, "
          f"{args.max_new_tokens} new tokens or to the end of the story, {kind} heads, {size} parameters, tree of "
          f"{len(tree.paths)} nodes (root included), {tree_source}")
    if args.valid:
        print(" ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                       for k, v in held_out_loss(model, tokenizer, args.valid).items()))
    prompts = [tokenizer.encode(o) for o in Path(args.openings).read_text(encoding="utf-8").splitlines()[:args.limit]]
    timed(drafting, prompts[0], args, 0), timed(plainly, prompts[0], args, 0)          # warm-up
    results = [(timed(plainly, ids, args, i), timed(drafting, ids, args, i))
               for i, ids in enumerate(tqdm(prompts, desc="openings"))]
    plain, medusa = zip(*results, strict=True)
    accepted = [n for _, steps, _ in medusa for n in steps]
    speed = lambda runs: statistics.median(len(tokens) / seconds for tokens, _, seconds in runs)
    ratio = statistics.quantiles([p[2] / m[2] for p, m in results if p[0] == m[0]], n=4)
    per_opening = [(len(tokens) - 1) / len(steps) for tokens, steps, _ in medusa]
    margins = [margin_where_they_part(plainly, ids, p[0], m[0], i)
               for i, (ids, (p, m)) in enumerate(zip(prompts, results, strict=True)) if p[0] != m[0]]
    print(f"identical outputs: {sum(p[0] == m[0] for p, m in results)} of {len(results)}" + "".join(
        f", one parts where the choice's margin is {margin:.1e}" for margin in margins))
    print(f"tokens per step: {sum(accepted) / len(accepted):.3f} over {len(accepted)} steps, "
          f"mean over the openings {statistics.mean(per_opening):.3f}")
    print("steps that emitted 1, 2, ... tokens: " + " ".join(
        f"{accepted.count(n) / len(accepted):.1%}" for n in range(1, tree.retrieve.shape[1] + 1)))
    print(f"distinct tokens in the stories: {len({t for tokens, _, _ in plain for t in tokens})}, "
          f"new tokens: {sum(len(tokens) for tokens, _, _ in plain)}")
    print(f"plain {speed(plain):.0f} tokens/s, Medusa {speed(medusa):.0f} tokens/s (medians), "
          f"speed-up {ratio[1]:.2f} (quartiles {ratio[0]:.2f} to {ratio[2]:.2f})")


if __name__ == "__main__":
    command_line(main)
