"""Stored logits of model/, so that the comparison with transformers also runs where it is not installed.

`python tests/test_golden.py` (with transformers) computes them anew.
"""
import json
import sys
from pathlib import Path

import torch

MODEL, GOLDEN = Path(__file__).resolve().parent.parent / "model", Path(__file__).with_name("golden.json")
TEXT = "Once upon a time, there was a little girl named Lily. She had a red ball and a small dog named Max."


def test_golden_logits():
    from llama import Llama
    from loading.tokenizer import Tokenizer
    from tinymedusa import PlainDecoder
    golden, model = json.loads(GOLDEN.read_text()), Llama.from_pretrained(MODEL)
    assert Tokenizer(MODEL, model.config).encode(TEXT) == golden["ids"]
    with torch.no_grad():
        logits = model.lm_head(model(torch.tensor([golden["ids"]]))[0])
    for position, row in golden["logits"].items():
        seen = logits[int(position), golden["columns"]]
        assert (seen - torch.tensor(row)).abs().max() <= 1e-4
    assert [t for new in PlainDecoder(model).generate([golden["ids"]], 60) for t in new[0]] == golden["greedy"]


def write_golden():
    from transformers import AutoTokenizer, LlamaForCausalLM
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(MODEL)(TEXT).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False, pad_token_id=0)[0, len(ids):]
    columns = list(range(0, logits.shape[1], 128))
    rows = {p: [round(v, 6) for v in logits[p, columns].tolist()] for p in range(0, len(ids), 6)}
    GOLDEN.write_text(json.dumps({"ids": ids, "columns": columns, "logits": rows, "greedy": greedy.tolist()}) + "\n")


if __name__ == "__main__":
    sys.exit(write_golden())
