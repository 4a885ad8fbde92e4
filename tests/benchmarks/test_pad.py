"""benchmarks/pad_model.py: the larger model computes what the small one computes."""
import json
import sys

import pytest
import torch
from conftest import MODEL, ROOT, tiny_heads, tiny_llama

sys.path.insert(0, str(ROOT / "benchmarks"))
import pad_model  # noqa: E402

from llama import Llama  # noqa: E402
from loading.files import UserError  # noqa: E402
from loading.heads import KINDS  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from tinymedusa import Decoder, PlainDecoder, Tree  # noqa: E402
from variants.heads import load_heads  # noqa: E402

WIDE = {"vocab_size": 30, "hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 4, "head_dim": 24,
        "num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"width": 40, "num_layers": 2}, {"tie_lm_head": True, "recent": 3},
                                     {"trunk": 24, "width": 16, "recent": 2, "tie_lm_head": True}])
@torch.inference_mode()
def test_hidden_states_logits_and_guesses(kind, options):
    small = tiny_llama(dtype=torch.float32)
    heads = tiny_heads(small, kind=kind, token_map=torch.tensor([4, 2, 9, 7, 1]), **options)
    wide = pad_model.pad(small, pad_model.padded_config(small.config, **WIDE)).eval()
    wide_heads = pad_model.pad_heads(heads, small, wide, own=True)
    ids = torch.randint(0, 12, (2, 40), generator=torch.Generator().manual_seed(0))
    hidden, wide_hidden = small(ids), wide(ids)
    assert torch.allclose(wide_hidden[..., :32], hidden, atol=1e-4) and wide_hidden[..., 32:].abs().max() == 0
    logits, wide_logits = small.lm_head(hidden), wide.lm_head(wide_hidden)
    assert torch.allclose(wide_logits[..., :12], logits, atol=1e-4)
    assert (wide_logits[..., 12:].amax(-1) < wide_logits[..., :12].amax(-1)).all()
    recent = hidden[0].unfold(0, heads.recent, 1).transpose(1, 2)                # [n, R, H]
    wide_recent = wide_hidden[0].unfold(0, heads.recent, 1).transpose(1, 2)
    after = ids[0].unfold(0, 4, 1)[:len(recent)]
    guesses = heads(recent[:len(after)], after)
    assert torch.allclose(wide_heads(wide_recent[:len(after)], after), guesses, atol=2e-3)
    assert guesses.std() > 0.1


def test_the_embedded_model_in_the_shape_of_tinyllama_v0(tmp_path):
    pad_model.write(tmp_path, "v0")
    small, wide = Llama.from_pretrained(MODEL), Llama.from_pretrained(tmp_path)
    assert wide.config.vocab_size == 32000 and sum(p.numel() for p in wide.parameters()) == 4_621_376
    tokenizer = Tokenizer(tmp_path, wide.config)
    runs = []
    for model, folder in ((small, MODEL), (wide, tmp_path)):
        heads = load_heads(folder / "medusa", model)
        tree = Tree.from_pretrained(folder / "medusa", heads)
        for decoder in (PlainDecoder(model), Decoder(model, heads, tree)):
            runs.append(list(decoder.generate([tokenizer.encode("One day, a little dog went")], 60)))
    plain, medusa, wide_plain, wide_medusa = runs
    assert wide_plain == plain and wide_medusa == medusa and len(medusa) < 0.5 * len(plain)
    config = json.loads((tmp_path / "medusa" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "padded v0 of model"


def test_shapes_that_cannot_hold_the_model():
    small = tiny_llama().config
    for over, says in (({"hidden_size": 16}, "hidden_size 16 is smaller"), ({"head_dim": 12}, "multiple of 8"),
                       ({"num_key_value_heads": 4}, "queries a key 2")):
        with pytest.raises(UserError, match=says):
            pad_model.padded_config(small, **over)
