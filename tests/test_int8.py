"""--quantize int8, loading in little memory, pickles: against the plain weights."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_heads, tiny_llama

from llama import Int8, Llama
from tinymedusa import MedusaHeads, Tree, generate


def test_a_matrix_in_8_bits():
    torch.manual_seed(0)
    weight = torch.randn(24, 64) * torch.rand(24, 1) * 3
    weight[3] = 0                                                                # a row of zeros stays one
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float64, 1e-6), (torch.float16, 0.01)):
        matrix = Int8.of(weight.to(dtype))
        assert matrix.values.dtype == torch.int8 and matrix.scale.dtype == dtype
        restored = matrix.values.float() * matrix.scale.float()[:, None]
        step = weight.to(dtype).float().abs().amax(1, keepdim=True) / 127
        most = 0.8 if dtype == torch.bfloat16 else 0.52                          # a scale in bfloat16 is a rounded one
        assert ((restored - weight.to(dtype).float()).abs() <= most * step + 1e-6).all()
        assert (matrix.values.int().abs().amax(1) >= torch.tensor([126] * 3 + [0] + [126] * 20)).all()
        for rows in (1, 3, 16, 17, 40):                                          # both kernels
            x, bias = torch.randn(rows, 64).to(dtype), torch.randn(24).to(dtype)
            expected = x.float() @ restored.t() + bias.float()
            assert (matrix.linear(x, bias).float() - expected).abs().max() <= near * expected.abs().max()


@pytest.mark.parametrize("over", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_a_model_in_8_bits_is_the_model_with_rounded_weights(over, tmp_path):
    model = tiny_llama(dtype=torch.float32, hidden_size=64, intermediate_size=96, vocab_size=64, **over)
    for name, p in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save(tmp_path)
    int8 = Llama.from_pretrained(tmp_path, int8=True)
    with torch.no_grad():
        tied = model.lm_head.weight is model.embed_tokens.weight
        for name, p in list(model.named_parameters()):
            if p.dim() == 2 and name != "embed_tokens.weight":
                matrix = Int8.of(p)
                p.copy_(matrix.values * matrix.scale[:, None])
        if tied:                                                                 # rounded as lm_head, not as embeddings
            matrix = Int8.of(model.embed_tokens.weight)
            model.lm_head = torch.nn.Linear(64, 64, bias=False)
            model.lm_head.weight = torch.nn.Parameter(matrix.values * matrix.scale[:, None])
        ids = torch.randint(3, 64, (2, 30))
        expected, out = model.lm_head(model(ids)), int8.lm_head(int8(ids))
    assert expected.std() > 0.5 and (expected - out).abs().max() < 1e-4
    for prompt in ([1, 5, 9], [1, 20, 30, 40]):
        plain = [t for new in generate(model, [prompt], 40, eos=()) for t in new[0]]
        assert plain == [t for new in generate(int8, [prompt], 40, eos=()) for t in new[0]]


@pytest.mark.parametrize("tied", [True, False])
def test_heads_on_a_model_in_8_bits(tied, tmp_path):
    """Medusa's tokens are plain decoding's on the same model; tied heads see the rounded vocabulary matrix."""
    model = tiny_llama(dtype=torch.float32, hidden_size=64, vocab_size=64)
    model.save(tmp_path)
    tiny_heads(model, 3, tie_lm_head=tied).save(tmp_path / "medusa", "tiny")
    int8 = Llama.from_pretrained(tmp_path, int8=True)
    heads = MedusaHeads.from_pretrained(tmp_path / "medusa", int8)
    tree, steps = Tree.from_paths([[0], [1], [0, 0], [0, 1]], 3, 64), 0
    for seed in range(6):
        prompt = torch.randint(3, 64, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        plain = [t for new in generate(int8, [prompt], 40, eos=()) for t in new[0]]
        news = [new[0] for new in generate(int8, [prompt], 40, heads=heads, tree=tree, eos=())]
        assert [t for new in news for t in new] == plain
        steps += len(news) - 1
    assert steps < 6 * 39                                                        # some drafts were accepted


def test_the_command(cli):
    import json
    results = []
    for args in ([], ["--quantize", "int8"], ["--quantize", "int8", "--compile"]):
        status, out, err = cli("generate", "--json", "--compare", "--max-new-tokens", 60, "--threads", 1, *args)
        assert status == 0 and ("packed or quantised model" in err) == ("--compile" in args), err
        results.append(json.loads(out))
    assert all(r["identical"] for r in results) and results[1]["token_ids"] == results[2]["token_ids"]
    same = sum(a == b for a, b in zip(*(r["token_ids"] for r in results[:2]), strict=False))
    assert same >= 20 and results[1]["tokens_per_step"] > 2                      # the story, at least at its beginning


LOAD = """
import sys, torch
sys.path.insert(0, {root!r})
from llama import DTYPES, Llama
Llama.from_pretrained({tiny!r})                                                  # what code and libraries take
before = int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) / 1024
model = Llama.from_pretrained({folder!r}, dtype=DTYPES[{dtype!r}], int8={int8})
after = int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) / 1024
print(after - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_loading_takes_little_more_memory_than_the_model(file, tmp_path):
    """A float32 file of 250 MB: read as float32, as bfloat16 and in 8 bits, each in a process of its own."""
    model = tiny_llama(dtype=torch.float32, vocab_size=8000, hidden_size=1024, intermediate_size=4096,
                       num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=3)
    size = model.size() / 2 ** 20
    embeddings, layer = model.embed_tokens.weight.numel() / 2 ** 20, 32                      # MB in 8 bits, in bfloat16
    model.save(tmp_path)
    tiny_llama().save(tmp_path / "tiny")
    if file == "bin":
        from safetensors.torch import load_file
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    del model
    for dtype, int8, expected in (("float32", False, size), ("bfloat16", False, size / 2),
                                  ("bfloat16", True, size / 4 + embeddings)):
        script = LOAD.format(root=str(ROOT), folder=str(tmp_path), tiny=str(tmp_path / "tiny"), dtype=dtype, int8=int8)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        print(f"{file} to {dtype}{' in 8 bits' * int8}: {float(done.stdout):.0f} MB, the model has {expected:.0f}")
        assert float(done.stdout) < 1.2 * expected + (2 * layer if int8 else 8)


