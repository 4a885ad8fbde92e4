"""The baseline that heads must beat: no heads at all, drafts from a table of n-grams of self-distilled text.

    python benchmarks/ngram.py --data data/greedy.bin

The table maps the last 4, 3, 2 or 1 tokens (the longest context it has seen) to the token that followed most often. It
drafts a chain; tokens per step is counted on the model's own greedy continuations of held-out openings, step by step,
exactly as decoding would go (new tokens behind the first / steps).
"""
import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.command_line import command_line  # noqa: E402
from llama import Llama  # noqa: E402
from loading.documents import openings_of, read_tokens  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from prepare_data import continued  # noqa: E402
from tinymedusa import PlainDecoder  # noqa: E402
from variants import batches  # noqa: E402


def build(documents, longest):
    """Context (tuple of 1 to `longest` ids) → the id that followed most often."""
    counts = defaultdict(Counter)
    for document in tqdm(documents, desc="counting"):
        ids = document.ids.tolist()
        for i in range(1, len(ids)):
            for n in range(1, min(longest, i) + 1):
                counts[tuple(ids[i - n:i])][ids[i]] += 1
    return {context: counter.most_common(1)[0][0] for context, counter in counts.items()}


def steps_of(ids, begin, table, longest, chain):
    """Decoding steps for ids[begin:], the first of which the prefill gave."""
    steps, root = 0, begin
    while root < len(ids) - 1:
        text = ids[:root + 1]
        while len(text) <= root + chain and len(text) < len(ids):
            n = next((n for n in range(longest, 0, -1) if tuple(text[-n:]) in table), None)
            if n is None or table[tuple(text[-n:])] != ids[len(text)]:
                break
            text = ids[:len(text) + 1]
        steps, root = steps + 1, len(text)
    return steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "model"))
    parser.add_argument("--data", nargs="+", required=True, help="token files of self-distilled text")
    parser.add_argument("--openings", default=str(ROOT / "benchmarks" / "openings.txt"))
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--longest", type=int, default=4)
    args = parser.parse_args()
    model = Llama.from_pretrained(args.model)
    tokenizer = Tokenizer(args.model, model.config)
    table = build([d for path in args.data for d in read_tokens(path, tokenizer)], args.longest)
    prompts = dict(enumerate(tokenizer.encode_batch(openings_of(args.openings))))
    decoder = PlainDecoder(model)
    new = dict(continued(prompts, lambda p, seeds: batches.generate(decoder, p, args.max_new_tokens, seeds, 64)))
    emitted = sum(len(ids) - 1 for ids in new.values())
    for chain in (2, 4, 8):
        steps = sum(steps_of(prompts[i] + new[i], len(prompts[i]), table, args.longest, chain) for i in new)
        print(f"chain of {chain} ({chain + 1} nodes): {emitted / steps:.3f} tokens per step, {len(table)} contexts")


if __name__ == "__main__":
    command_line(main)
