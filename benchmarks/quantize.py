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

from extras.command_line import command_line  # noqa: E402
from fast import int8  # noqa: E402
from llama import Llama  # noqa: E402
from loading.checkpoint import TORCH_DTYPES  # noqa: E402
from loading.documents import texts  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from loading.trees import read_tree  # noqa: E402
from tinymedusa import Decoder, PlainDecoder, Tree  # noqa: E402
from variants.heads import load_heads  # noqa: E402

LOAD = """import sys
sys.path.insert(0, sys.argv[1])
from fast import int8
from llama import Llama
from loading.checkpoint import TORCH_DTYPES
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
Llama.from_pretrained(sys.argv[1] + "/model")       # what code and libraries take
before = peak()
load = int8.load if sys.argv[4] == "int8" else Llama.from_pretrained
model = load(sys.argv[2], dtype=TORCH_DTYPES[sys.argv[3]])
print((peak() - before) * 1024)"""


def size_of(model) -> int:
    """Bytes of all weights, tied ones once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
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
            load = int8.load if kind else Llama.from_pretrained
            model = load(args.model, dtype=TORCH_DTYPES[dtype])
            tokenizer, folder = Tokenizer(args.model, model.config), Path(args.model) / "medusa"
            heads = load_heads(folder, model)
            paths, _ = read_tree(folder, len(heads), heads.draft_size, args.tree)
            rows[f"{dtype} {kind}".strip()] = {
                "decoders": (PlainDecoder(model), Decoder(model, heads, Tree.from_paths(paths))),
                "peak": float(loaded.stdout), "size": size_of(model), "loss": held_out_loss(model, tokenizer, some),
                "runs": []}
    some.unlink()
    openings = (ROOT / "benchmarks" / "openings.txt").read_text(encoding="utf-8").splitlines()[:args.prompts]
    for i, ids in enumerate(tqdm([tokenizer.encode(text) for text in [openings[0], *openings]], desc="openings")):
        for row in rows.values():
            pair = []
            for decoder in row["decoders"]:
                begin = time.perf_counter()
                news = [new for (new,) in decoder.generate([ids], args.max_new_tokens)]
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
