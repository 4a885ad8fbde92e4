"""Medusa heads: the official formula and key names, the start as the base, save and load, errors."""
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_heads, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llama import UserError, read_json, write_json
from tinymedusa import MedusaHeads

KINDS = [{}, {"num_layers": 2}, {"tie_lm_head": True}, {"width": 16, "tie_lm_head": True},
         {"width": 48, "num_layers": 2}, {"kind": "root"}, {"kind": "hydra", "width": 16, "tie_lm_head": True},
         {"kind": "hydra", "num_layers": 2, "token_map": torch.tensor([2, 3, 5, 7, 11])},
         {"kind": "root", "width": 8, "tie_lm_head": True, "token_map": torch.tensor([1, 4, 9])},
         {"recent": 3}, {"kind": "hydra", "recent": 2, "width": 16}]


def slow_logits(tensors, k, layers, recent, tokens, model):
    """Head k as the official code computes it (each block its own), from the saved tensors by their official names.

    recent [T, R, H]; tokens: those behind the newest hidden state that head k sees (none for the paper's heads).
    """
    embedded = model.embed_tokens.weight[tokens]                                 # [T, n, H]
    embedded = embedded / (embedded.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    x, z = recent[:, -1], torch.cat((recent.flatten(1), embedded.flatten(1)), 1)
    for j in range(layers):
        if f"{k}.{j}.linear.weight" in tensors:
            x = x + F.silu(z @ tensors[f"{k}.{j}.linear.weight"].T + tensors[f"{k}.{j}.linear.bias"])
        else:
            y = F.silu(z @ tensors[f"{k}.{j}.up.weight"].T + tensors[f"{k}.{j}.up.bias"])
            x = x + y @ tensors[f"{k}.{j}.down.weight"].T
        z = x
    lm_head = model.lm_head.weight[tensors["token_map"]] if "token_map" in tensors else model.lm_head.weight
    return x @ tensors.get(f"{k}.{layers}.weight", lm_head).T


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_formula_names_and_round_trip(kind, tmp_path):
    model = tiny_llama()
    heads = tiny_heads(model, 3, **kind)
    heads.save(tmp_path, "some/base")
    tensors, layers = load_file(tmp_path / "model.safetensors"), kind.get("num_layers", 1)
    again = MedusaHeads.from_pretrained(tmp_path, model)
    recent = torch.randn(5, kind.get("recent", 1), 32, dtype=torch.float64)
    tokens = torch.randint(0, 12, (5, 3))
    seen = {"root": lambda k: 1, "hydra": lambda k: k + 1}.get(kind.get("kind"), lambda k: 0)
    with torch.no_grad():
        expected = [slow_logits(tensors, k, layers, recent, tokens[:, :seen(k)], model) for k in range(3)]
        assert torch.allclose(again.all_logits(recent, tokens), torch.stack(expected), atol=1e-12)
        first, last = (1, 2) if again.kind == "hydra" else (0, 2)                # some of the heads alone
        assert torch.allclose(again(recent, tokens[:, :2], first, last), torch.stack(expected[first:last]), atol=1e-12)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = read_json(tmp_path / "config.json")
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (3, layers)
    assert config["tie_lm_head"] == kind.get("tie_lm_head", False) and config["base_model_name_or_path"] == "some/base"
    assert config["medusa_recent"] == kind.get("recent", 1)
    assert config["medusa_width"] == kind.get("width") and config["medusa_kind"] == kind.get("kind", "medusa")
    stored = sum(t.numel() for name, t in tensors.items() if name != "token_map")
    assert again.size() == heads.size() == stored and not any(p.requires_grad for p in again.parameters())


def test_plain_heads_have_the_official_names_and_shapes():
    heads = MedusaHeads(tiny_llama(), 2)
    assert {name: tuple(t.shape) for name, t in heads.names().items()} == {
        "0.0.linear.weight": (32, 32), "0.0.linear.bias": (32,), "0.1.weight": (12, 32),
        "1.0.linear.weight": (32, 32), "1.0.linear.bias": (32,), "1.1.weight": (12, 32)}
    story_model = tiny_llama(hidden_size=64, vocab_size=32000)                       # TinyLLama-v0's
    assert MedusaHeads(story_model, 1, tie_lm_head=True).size() == 4160
    assert MedusaHeads(story_model, 1).size() == 2052160


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_untrained_heads_repeat_the_base(kind):
    model = tiny_llama()
    heads, recent = MedusaHeads.untrained(model, 3, **kind), torch.randn(4, kind.get("recent", 1), 32).double()
    base = model.lm_head(recent[:, -1])[:, kind.get("token_map", slice(None))]
    with torch.no_grad():
        logits = heads.all_logits(recent, torch.randint(0, 12, (4, 3)))
    assert torch.allclose(logits, base.expand(3, *base.shape), atol=1e-12)


def test_every_block_and_head_has_weights_of_its_own():
    heads = MedusaHeads.untrained(tiny_llama(), 2, num_layers=2)
    tensors = list(heads.names().values())
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


@pytest.fixture
def saved(tmp_path):
    model = tiny_llama()
    tiny_heads(model, 2).save(tmp_path, "base")
    return model, tmp_path


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("1.0.linear.bias"), "missing: 1.0.linear.bias"),
    (lambda t: t.update({"2.1.weight": torch.zeros(3)}), "unexpected: 2.1.weight"),
    (lambda t: t.update({"0.1.weight": torch.zeros(13, 32)}), "0.1.weight has shape [13, 32], expected [12, 32]"),
])
def test_tensors_that_do_not_fit_are_named(saved, change, says):
    model, folder = saved
    edit(folder, change)
    with pytest.raises(UserError) as error:
        MedusaHeads.from_pretrained(folder, model)
    assert says in str(error.value)


def test_heads_of_another_model(saved):
    _, folder = saved
    with pytest.raises(UserError, match="heads expect hidden_size 32, the model has 64"):
        MedusaHeads.from_pretrained(folder, tiny_llama(hidden_size=64))
    with pytest.raises(UserError, match="heads expect vocab_size 12, the model has 20"):
        MedusaHeads.from_pretrained(folder, tiny_llama(vocab_size=20))
    write_json(folder / "config.json", {"model_type": "llama"})
    with pytest.raises(UserError, match="not Medusa heads"):
        MedusaHeads.from_pretrained(folder, tiny_llama())
