"""What fast/ replaces, against the plain model: weights in 8 bits, loaded in little memory, by the command too."""
import copy
import json
import sys
from functools import cache

import forked
import pytest
import torch
from conftest import ROOT, save_heads, tiny_heads, tiny_llama
from safetensors.torch import load_file
from torch import nn

from fast import int8
from fast.int8 import Int8Linear, quantize
from llama import Llama
from loading.heads import KINDS
from tinymedusa import Decoder, PlainDecoder, Sampling, Tree
from variants.heads import load_heads

CONFIGS = {
    "gqa": {}, "mqa": {"num_key_value_heads": 1}, "one for one": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 10}, "odd widths": {"hidden_size": 37, "intermediate_size": 51, "head_dim": 6},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}, "one layer": {"num_hidden_layers": 1},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 16}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "tied with biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}}
TREE = Tree.from_paths([[0], [1], [0, 0], [0, 1]])


def quantized(folder, dtype):
    model = Llama.from_pretrained(folder, dtype=dtype)
    quantize(model)
    return model


# each: (a model's folder, dtype) → the model with its layers replaced
REPLACEMENTS = {"int8.quantize": quantized, "int8.load": int8.load}


def linear_of(weight, bias=None):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def rounded(model):
    """A plain model whose nn.Linear weights are those that 8 bits can express, computed without fast/."""
    model = copy.deepcopy(model)
    if model.config.tie_word_embeddings:                                         # rounded as lm_head, not as embeddings
        model.lm_head = linear_of(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                step = (module.weight.abs().amax(1, keepdim=True).float() / 127).to(module.weight.dtype)
                module.weight.copy_((module.weight.float() / step.float()).round() * step)
    return model


def random_biases(model):
    for name, p in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(p, std=0.3)
    return model


def text(decoder, prompt, seed=0, new_tokens=40):
    """The tokens, and in how many steps behind the prefill."""
    steps = list(decoder.generate([prompt], new_tokens, [seed]))
    return [t for new in steps for t in new[0]], len(steps) - 1


PROMPT, SAMPLINGS = [1, 20, 30], (Sampling(), Sampling(0.8), Sampling(1.1, 9, 0.9))


@cache
def reference(name, folder):
    """A saved model with heads of all kinds; the plain model of its rounded weights, and what that writes."""
    model = random_biases(tiny_llama(vocab_size=40, **CONFIGS[name]))
    model.save(folder)
    plain = rounded(model)
    written = {sampling: text(PlainDecoder(plain, sampling, eos=()), PROMPT, 5, 24) for sampling in SAMPLINGS}
    by_heads = {}
    for kind in KINDS:
        save_heads(tiny_heads(model, 3, noise=0.02, kind=kind, tie_lm_head=kind != "medusa"), folder / kind, model)
        heads = load_heads(folder / kind, plain)
        by_heads |= {(kind, sampling): text(Decoder(plain, heads, TREE, sampling, eos=()), PROMPT, 5, 24)
                     for sampling in SAMPLINGS}
    return model, plain, written, by_heads


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_a_replacement_is_the_plain_model_with_rounded_weights(replacement, name, tmp_path_factory):
    """In float64: hidden states, logits, greedy and drawn texts, plain and by heads of any kind."""
    folder = tmp_path_factory.getbasetemp() / f"int8 {name}"
    model, plain, written, by_heads = reference(name, folder)
    fast = REPLACEMENTS[replacement](folder, dtype=torch.float64)
    linear = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linear and all(isinstance(fast.get_submodule(n), Int8Linear) for n in linear)
    assert not fast.training and torch.equal(fast.cos, Llama.from_pretrained(folder).cos)
    ids = torch.randint(3, 40, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, hidden = plain(ids), fast(ids)
        assert torch.allclose(expected, hidden, atol=1e-9)
        logits = plain.lm_head(expected)
        assert torch.allclose(logits, fast.lm_head(hidden), atol=1e-9) and logits.std() > 0.5
        assert (logits - model.lm_head(model(ids))).abs().max() > 1e-3           # rounding does something
    for sampling in SAMPLINGS:
        assert text(PlainDecoder(fast, sampling, eos=()), PROMPT, 5, 24) == written[sampling]
        for kind in KINDS:
            ours = text(Decoder(fast, load_heads(folder / kind, fast), TREE, sampling, eos=()), PROMPT, 5, 24)
            assert ours == by_heads[kind, sampling]
            assert ours[0] == written[sampling][0] and ours[1] <= written[sampling][1]


def test_a_matrix_in_8_bits():
    torch.manual_seed(0)
    weight = torch.randn(24, 64) * torch.rand(24, 1) * 3
    weight[3] = 0                                                                # a row of zeros stays one
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float64, 1e-6), (torch.float16, 0.01)):
        bias = torch.randn(24).to(dtype)
        matrix, without = Int8Linear(linear_of(weight.to(dtype), bias)), Int8Linear(linear_of(weight.to(dtype)))
        assert matrix.values.dtype == torch.int8 and matrix.scale.dtype == matrix.weight.dtype == dtype
        restored = matrix.values.float() * matrix.scale.float()[:, None]
        step = weight.to(dtype).float().abs().amax(1, keepdim=True) / 127
        most = 0.8 if dtype == torch.bfloat16 else 0.52                          # a scale in bfloat16 is a rounded one
        assert ((restored - weight.to(dtype).float()).abs() <= most * step + 1e-6).all()
        assert torch.equal(matrix.weight, restored.to(dtype)) or dtype == torch.float64
        assert (matrix.values.int().abs().amax(1) >= torch.tensor([126] * 3 + [0] + [126] * 20)).all()
        for rows in (1, 3, 16, 17, 40):
            x = torch.randn(rows, 64).to(dtype)
            expected = x.float() @ restored.t()
            for each, by in ((matrix, bias.float()), (without, 0)):
                out = each(x)
                assert out.dtype == dtype
                assert (out.float() - expected - by).abs().max() <= near * (expected + by).abs().max()


def test_a_tied_matrix_is_rounded_as_lm_head_not_as_embeddings(tmp_path):
    model = tiny_llama(dtype=torch.float32, tie_word_embeddings=True)
    model.save(tmp_path)
    for replacement in REPLACEMENTS.values():
        fast = replacement(tmp_path, dtype=torch.float32)
        assert torch.equal(fast.embed_tokens.weight, model.embed_tokens.weight)
        assert not torch.equal(fast.lm_head.weight, model.embed_tokens.weight)


@pytest.mark.parametrize("over", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_a_model_in_8_bits_in_float32(over, tmp_path):
    model = random_biases(tiny_llama(dtype=torch.float32, hidden_size=64, intermediate_size=96, vocab_size=64, **over))
    model.save(tmp_path)
    plain, fast = rounded(model), int8.load(tmp_path)
    ids = torch.randint(3, 64, (2, 30))
    with torch.no_grad():
        expected, out = plain.lm_head(plain(ids)), fast.lm_head(fast(ids))
    assert out.dtype == torch.float32 and expected.std() > 0.5 and (expected - out).abs().max() < 1e-4
    for prompt in ([1, 5, 9], [1, 20, 30, 40]):
        assert text(PlainDecoder(plain, eos=()), prompt) == text(PlainDecoder(fast, eos=()), prompt)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_on_a_model_in_8_bits(tied, tmp_path):
    """Medusa's tokens are plain decoding's on the same model; tied heads see the rounded vocabulary matrix."""
    model = tiny_llama(dtype=torch.float32, hidden_size=64, vocab_size=64)
    model.save(tmp_path)
    save_heads(tiny_heads(model, 3, tie_lm_head=tied), tmp_path / "medusa", model)
    fast = int8.load(tmp_path)
    heads, total = load_heads(tmp_path / "medusa", fast), 0
    for seed in range(6):
        prompt = torch.randint(3, 64, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        ours, steps = text(Decoder(fast, heads, TREE, eos=()), prompt)
        assert ours == text(PlainDecoder(fast, eos=()), prompt)[0]
        total += steps
    assert total < 6 * 39                                                        # some drafts were accepted


@pytest.mark.parametrize("token_map", [None, torch.tensor([3, 5, 7, 20])], ids=["all", "draft vocabulary"])
def test_tied_heads_see_the_rounded_lm_head(token_map, tmp_path):
    model = tiny_llama(vocab_size=64)
    model.save(tmp_path)
    untrained = tiny_heads(model, 2, noise=0.0, tie_lm_head=True, token_map=token_map)      # they repeat the model
    save_heads(untrained, tmp_path / "medusa", model)
    fast, hidden = int8.load(tmp_path, dtype=torch.float64), torch.randn(5, 1, 32, dtype=torch.float64)
    with torch.no_grad():
        logits = load_heads(tmp_path / "medusa", fast)(hidden, torch.zeros(5, 1, dtype=torch.long))
        expected = fast.lm_head(hidden)[..., slice(None) if token_map is None else token_map]
    assert torch.allclose(logits, expected.expand(-1, 2, -1), atol=1e-12)


def test_the_command(cli):
    results = []
    for args in ([], ["--quantize", "int8"]):
        status, out, err = cli("generate", "--json", "--compare", "--max-new-tokens", 60, "--threads", 1, *args)
        assert status == 0, err
        results.append(json.loads(out))
    assert all(r["identical"] for r in results)
    same = sum(a == b for a, b in zip(*(r["token_ids"] for r in results), strict=False))
    assert same >= 20 and results[1]["tokens_per_step"] > 2                      # the story, at least at its beginning


LOAD = """
import sys, torch
sys.path.insert(0, {root!r})
from fast import int8
from llama import Llama
from loading.checkpoint import TORCH_DTYPES
Llama.from_pretrained({tiny!r})                                                  # what code and libraries take
before = int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) / 1024
model = {load}({folder!r}, dtype=TORCH_DTYPES[{dtype!r}])
after = int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) / 1024
print(after - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_loading_takes_little_more_memory_than_the_model(file, tmp_path):
    """A float32 file of 250 MB: read as float32, as bfloat16 and in 8 bits, each in a process of its own."""
    model = tiny_llama(dtype=torch.float32, vocab_size=8000, hidden_size=1024, intermediate_size=4096,
                       num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=3)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2 ** 20
    embeddings, layer = model.embed_tokens.weight.numel() / 2 ** 20, 32                      # MB in 8 bits, in bfloat16
    model.save(tmp_path)
    tiny_llama().save(tmp_path / "tiny")
    if file == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    del model
    for dtype, load, expected in (("float32", "Llama.from_pretrained", size),
                                  ("bfloat16", "Llama.from_pretrained", size / 2),
                                  ("bfloat16", "int8.load", size / 4 + embeddings)):
        script = LOAD.format(root=str(ROOT), folder=str(tmp_path), tiny=str(tmp_path / "tiny"), dtype=dtype, load=load)
        done = forked.run("-c", script)
        assert done.returncode == 0, done.stderr
        print(f"{file} to {dtype} by {load}: {float(done.stdout):.0f} MB, the model has {expected:.0f}")
        assert float(done.stdout) < 1.2 * expected + (2 * layer if load == "int8.load" else 8)
