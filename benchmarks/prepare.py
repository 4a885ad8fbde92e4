"""What prepare_data.py costs: tokenising against a bare `encode_batch`, and self-distillation in batches.

    python benchmarks/prepare.py --text stories.txt                 # grown to 100 MB by repetition, if it is shorter
    python benchmarks/prepare.py --distill benchmarks/openings.txt

Tokenising: both sides alternate three times, medians; memory is the peak of a process of its own. Self-distillation:
plain and Medusa, one opening at a time and in batches, tokens of the continuations per second.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare_data  # noqa: E402
from extras.command_line import command_line, set_threads  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from loading.documents import openings_of, texts  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from prepare_data import continued, of_like_size  # noqa: E402
from tinymedusa import Decoder, PlainDecoder, Tree  # noqa: E402
from variants import batches  # noqa: E402
from variants.heads import load_heads  # noqa: E402

PEAK = ("import resource, sys; sys.path.insert(0, '.'); import prepare_data; prepare_data.main(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")


def tokenising(path, model, megabytes):
    source = Path(path).read_text(encoding="utf-8")
    tokenizer = Tokenizer(model, LlamaConfig.from_pretrained(model))
    with tempfile.TemporaryDirectory() as folder:
        big, out = Path(folder) / "big.txt", Path(folder) / "big.bin"
        big.write_text("\n<|endoftext|>\n".join([source] * max(1, round(megabytes * 1e6 / len(source.encode())))))
        bare, whole = [], []
        for _ in range(3):
            begin, tokens = time.perf_counter(), 0
            for batch in of_like_size(texts(big, "<|endoftext|>")):
                tokens += sum(map(len, tokenizer.backend.encode_batch(batch)))
            bare.append(tokens / (time.perf_counter() - begin))
            begin = time.perf_counter()
            facts = prepare_data.prepare(prepare_data.arguments(
                ["--model", model, "--text", str(big), "--out", str(out)]))[1]
            whole.append(facts["tokens"] / (time.perf_counter() - begin))
        done = subprocess.run([sys.executable, "-c", PEAK, "--model", model, "--text", str(big), "--out", str(out)],
                              capture_output=True, text=True, cwd=ROOT, check=True)
        a, b = statistics.median(bare), statistics.median(whole)
        print(f"{big.stat().st_size / 1e6:.0f} MB, {facts['documents']} documents, {facts['tokens']} tokens: bare "
              f"encode_batch {a:.0f} tokens/s, prepare_data.py {b:.0f} ({b / a:.2f} of it), peak memory "
              f"{int(done.stdout.split()[-1]) / 1024:.0f} MB")


def distilling(path, model_name, heads_name, batch_sizes, limit):
    model = Llama.from_pretrained(model_name)
    heads = load_heads(heads_name, model)
    medusa = Decoder(model, heads, Tree.from_pretrained(heads_name, heads))
    encoded = dict(enumerate(Tokenizer(model_name, model.config).encode_batch(openings_of(path))))
    for rows in (1, *batch_sizes):
        set_threads(model, rows=rows)
        chosen = dict(list(encoded.items())[:min(limit, len(encoded)) if rows == 1 else None])
        for name, decoder in (("plain", PlainDecoder(model)), ("medusa", medusa)):
            begin, tokens = time.perf_counter(), 0
            for _, new in continued(chosen, lambda p, s, d=decoder, n=rows: batches.generate(d, p, 400, s, n)):
                tokens += len(new)
            print(f"{rows:>4} at a time, {name:<7}{tokens / (time.perf_counter() - begin):>8.0f} tokens/s "
                  f"({tokens} tokens)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "model"))
    parser.add_argument("--heads", default=str(ROOT / "model" / "medusa"))
    parser.add_argument("--text", metavar="FILE")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--distill", metavar="FILE", help="openings, one a line")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--limit", type=int, default=20, help="openings written one at a time")
    args = parser.parse_args()
    if args.text:
        tokenising(args.text, args.model, args.megabytes)
    if args.distill:
        distilling(args.distill, args.model, args.heads, args.batch_sizes, args.limit)


if __name__ == "__main__":
    command_line(main)
