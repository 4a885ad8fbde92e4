"""What --quantize int8 costs and brings: size, held-out loss, acceptance and speed beside the plain dtypes.

    python benchmarks/quantize.py model --valid FILE             # stories between lines of <|endoftext|>
    python benchmarks/quantize.py FOLDER --valid FILE --dtypes bfloat16 --threads 2

Rows take turns at each opening (median tokens/s); a padded model (pad_model.py) has the embedded model's text. Peak
memory is what loading the model adds to a process that has loaded model/ already (Linux).
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from embedded import held_out_loss  # noqa: E402

from extras.cli import command_line  # noqa: E402
from llama import DTYPES, Llama, Tokenizer  # noqa: E402
from prepare_data import texts  # noqa: E402
from tinymedusa import MedusaHeads, generate, load_tree  # noqa: E402

LOAD = """import sys
sys.path.insert(0, sys.argv[1])
from llama import DTYPES, Llama
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
Llama.from_pretrained(sys.argv[1] + "/model")       # what code and libraries take
before = peak()
model = Llama.from_pretrained(sys.argv[2], dtype=DTYPES[sys.argv[3]], int8=sys.argv[4] == "int8")
print((peak() - before) * 1024)"""


def size_of(model) -> int:
    """Bytes of all weights, each storage once (views of one matrix are one)."""
    tensors = [*model.parameters(), *(t for w in model.weights or () for m in w if m is not None
                                      for t in (m if isinstance(m, tuple) else (m,)))]
    tensors += list(model.lm_head.matrix) if hasattr(model.lm_head, "matrix") else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder with heads in medusa/")
    parser.add_argument("--valid", required=True, metavar="FILE", help="held-out stories")
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tree", help="paths as JSON (default: the heads' own)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    some = Path(args.valid).with_name(f"first-{args.stories}.txt")
    stories = [text for text, _ in zip(texts(args.valid, "<|endoftext|>"), range(args.stories), strict=False)]
    some.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    rows = {}
    for dtype in args.dtypes:
        for kind in ("", "int8"):
            loaded = subprocess.run([sys.executable, "-c", LOAD, str(ROOT), args.model, dtype, kind], check=True,
                                    capture_output=True, text=True)
            model = Llama.from_pretrained(args.model, dtype=DTYPES[dtype], int8=kind == "int8")
            tokenizer, folder = Tokenizer(args.model, model.config), Path(args.model) / "medusa"
            row = {"model": model, "heads": MedusaHeads.from_pretrained(folder, model), "peak": float(loaded.stdout),
                   "size": size_of(model), "loss": held_out_loss(model, tokenizer, some), "runs": []}
            row["tree"], _ = load_tree(folder, row["heads"], args.tree)
            model.pack()
            rows[f"{dtype} {kind}".strip()] = row
    some.unlink()
    openings = (ROOT / "benchmarks" / "openings.txt").read_text(encoding="utf-8").splitlines()[:args.prompts]
    for i, ids in enumerate(tqdm([tokenizer.encode(text) for text in [openings[0], *openings]], desc="openings")):
        for row in rows.values():
            pair = []
            for heads in (None, row["heads"]):
                begin = time.perf_counter()
                news = [n[0] for n in generate(row["model"], [ids], args.max_new_tokens, heads=heads, tree=row["tree"])]
                pair.append((sum(map(len, news)), len(news) - 1, time.perf_counter() - begin, sum(news, [])))
            if i:                                                                # the first one warms up
                row["runs"].append(pair)
    print(f"{args.model}, {args.threads} thread(s), {args.prompts} openings x {args.max_new_tokens} tokens, loss over "
          f"{args.stories} stories\n\n| | weights MB | peak memory of loading MB | nats per token | plain tokens/s | "
          "Medusa tokens/s | tokens per step | Medusa equals plain |\n|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        plain, medusa = zip(*row["runs"], strict=True)
        speed = lambda runs: statistics.median(tokens / seconds for tokens, _, seconds, _ in runs)
        per_step = sum(m[0] - 1 for m in medusa) / sum(m[1] for m in medusa)
        same = sum(p[3] == m[3] for p, m in row["runs"])
        print(f"| {name} | {row['size'] / 1e6:.1f} | {row['peak'] / 1e6:.0f} | {row['loss']['nats_per_token']:.4f} | "
              f"{speed(plain):.1f} | {speed(medusa):.1f} | {per_step:.3f} | {same} of {len(plain)} |")


if __name__ == "__main__":
    command_line(main)
