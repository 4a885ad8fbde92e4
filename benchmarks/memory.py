"""Peak memory of train_heads.py at a real vocabulary: TinyLLama-v0's shape, random weights, 8 rows of 512, 4 heads.

    python benchmarks/memory.py                         # own vocabulary matrices, the paper's heads
    python benchmarks/memory.py --kind hydra --width 512 --tie-lm-head

Trains a few steps in a process of its own and prints its largest resident size. All logits at once would be
8 * 512 * 4 * 32000 * 4 bytes = 2.1 GB, three times over with softmax and gradient.
"""
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import models  # noqa: E402

from llama import Llama, LlamaConfig  # noqa: E402
from loading.documents import document, write_tokens  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402


def main():
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=16,
                             num_key_value_heads=16, head_dim=4)
        Llama(config).save(folder)
        Backend(models.WordLevel({f"w{i}": i for i in range(32000)}, "w0")).save(f"{folder}/tokenizer.json")
        random = torch.randint(3, 32000, (40, 511), generator=torch.Generator().manual_seed(0)).numpy()
        documents = (document(([1], False), (ids, True)) for ids in random)
        write_tokens(f"{folder}/random.bin", documents, Tokenizer(folder, config), 32000, {})
        command = [sys.executable, str(ROOT / "train_heads.py"), "--model", folder, "--data", f"{folder}/random.bin",
                   "--out", f"{folder}/heads", "--epochs", "1", "--batch-tokens", "4096", "--num-heads", "4"]
        subprocess.run(command + sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
        steps = [json.loads(line) for line in Path(folder, "heads", "metrics.jsonl").read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{steps[-1]['step']} steps of 8 x 512 tokens, 4 heads, vocabulary 32000: peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
