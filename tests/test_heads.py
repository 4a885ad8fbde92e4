"""The paper's heads: the official formula and key names, the start as the base model, save and load, errors."""
import pytest
import torch
import torch.nn.functional as F
from conftest import save_heads, tiny_heads, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loading.files import UserError, read_json, write_json
from tinymedusa import MedusaHeads
from variants.heads import load_heads

LAYERS = [1, 2, 3]


def slow_logits(tensors, k, layers, hidden):
    """Head k as the official code computes it (each block its own), from the saved tensors by their official names."""
    for j in range(layers):
        weight, bias = tensors[f"{k}.{j}.linear.weight"], tensors[f"{k}.{j}.linear.bias"]
        hidden = hidden + F.silu(hidden @ weight.T + bias)
    return hidden @ tensors[f"{k}.{layers}.weight"].T


@pytest.mark.parametrize("layers", LAYERS)
def test_formula_names_and_round_trip(layers, tmp_path):
    model = tiny_llama()
    heads = tiny_heads(model, 3, num_layers=layers)
    save_heads(heads, tmp_path, model, "some/base")
    tensors = load_file(tmp_path / "model.safetensors")
    again = load_heads(tmp_path, model)
    assert type(again) is MedusaHeads and not again.training
    recent_hidden, following = torch.randn(5, 1, 32, dtype=torch.float64), torch.randint(0, 12, (5, 3))
    with torch.no_grad():
        expected = torch.stack([slow_logits(tensors, k, layers, recent_hidden[:, -1]) for k in range(3)], dim=1)
        for each in (heads, again):
            assert torch.allclose(each(recent_hidden, following), expected, atol=1e-12)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_json(tmp_path / "config.json") == {
        "base_model_name_or_path": "some/base", "medusa_num_heads": 3, "medusa_num_layers": layers,
        "tie_lm_head": False, "medusa_width": None, "medusa_kind": "medusa", "medusa_recent": 1, "hidden_size": 32,
        "vocab_size": 12, "draft_vocab_size": None}
    stored = sum(t.numel() for t in tensors.values())
    assert all(sum(p.numel() for p in each.parameters()) == stored for each in (heads, again))
    assert not any(p.requires_grad for p in again.parameters())
    assert {name: t.tolist() for name, t in again.state_dict().items()} == {n: t.tolist() for n, t in tensors.items()}


def test_they_have_the_official_names_and_shapes():
    heads = MedusaHeads(tiny_llama(), 2)
    assert {name: tuple(t.shape) for name, t in heads.state_dict().items()} == {
        "0.0.linear.weight": (32, 32), "0.0.linear.bias": (32,), "0.1.weight": (12, 32),
        "1.0.linear.weight": (32, 32), "1.0.linear.bias": (32,), "1.1.weight": (12, 32)}
    story_model = tiny_llama(hidden_size=64, vocab_size=32000)                       # TinyLLama-v0's
    assert sum(p.numel() for p in MedusaHeads(story_model, 1).parameters()) == 2052160


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("tied", [False, True])
def test_untrained_heads_repeat_the_base_model(layers, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    heads, recent_hidden = MedusaHeads(model, 3, layers), torch.randn(4, 1, 32).double()
    base = model.lm_head(recent_hidden[:, -1])
    with torch.no_grad():
        logits = heads(recent_hidden, torch.randint(0, 12, (4, 3)))
    assert torch.allclose(logits, base[:, None].expand(4, 3, 12), atol=1e-12)


def test_every_block_and_head_has_weights_of_its_own():
    model = tiny_llama()
    heads = MedusaHeads(model, 2, num_layers=2)
    tensors = [*heads.state_dict().values(), *model.parameters()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_heads_have_the_dtype_of_the_model_they_are_for(dtype, tmp_path):
    model = tiny_llama()
    save_heads(tiny_heads(model, 2), tmp_path, model)
    stored, heads = load_file(tmp_path / "model.safetensors"), load_heads(tmp_path, tiny_llama(dtype=dtype))
    for each in (heads, MedusaHeads(tiny_llama(dtype=dtype), 1)):
        assert {p.dtype for p in each.parameters()} == {dtype}
    assert all(torch.equal(t, stored[name].to(dtype)) for name, t in heads.state_dict().items())


@pytest.fixture
def saved(tmp_path):
    model = tiny_llama()
    save_heads(tiny_heads(model, 2), tmp_path, model, "base")
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
        load_heads(folder, model)
    assert says in str(error.value)


def test_heads_of_another_model(saved):
    _, folder = saved
    with pytest.raises(UserError, match="heads expect hidden_size 32, the model has 64"):
        load_heads(folder, tiny_llama(hidden_size=64))
    with pytest.raises(UserError, match="heads expect vocab_size 12, the model has 20"):
        load_heads(folder, tiny_llama(vocab_size=20))
    write_json(folder / "config.json", {"model_type": "llama"})
    with pytest.raises(UserError, match="not Medusa heads"):
        load_heads(folder, tiny_llama())
