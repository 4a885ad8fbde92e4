"""Models in other layouts: what compare.py writes for llama2.c, which rotates neighbours, is the model that we read;
smollm2.py's config.json is that of its GGUF."""
import struct
import sys
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_llama

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare  # noqa: E402
import smollm2  # noqa: E402

from llama import Llama, LlamaConfig  # noqa: E402


def rotated(x, angle):
    """Dimensions 2i and 2i + 1 are turned by angle i, as in run.c: x [T, heads, D], angle [T, D/2]."""
    a, b, cos, sin = x[..., ::2], x[..., 1::2], angle.cos()[:, None], angle.sin()[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def llama2c_logits(path, ids, eps, theta):
    """run.c's forward: read its file → logits [T, V]."""
    data = path.read_bytes()
    dim, inner, layers, heads, groups, vocab, context = struct.unpack("7i", data[:28])
    size, at = dim // heads, 7
    floats = torch.from_numpy(np.frombuffer(data, np.float32).copy())

    def take(*shape):
        nonlocal at
        at += (number := int(np.prod(shape)))
        return floats[at - number:at].view(shape)
    embed, rows = take(-vocab, dim), groups * size
    norm1, q, k, v, o, norm2, gate, down, up = (take(layers, *shape) for shape in (
        (dim,), (dim, dim), (rows, dim), (rows, dim), (dim, dim), (dim,), (inner, dim), (dim, inner), (inner, dim)))
    final = take(dim)
    take(context, size)
    matrix = take(-vocab, dim)
    assert at == len(floats)
    norm = lambda x, weight: F.rms_norm(x, (dim,), weight, eps)
    angle = torch.arange(len(ids))[:, None] / theta ** (torch.arange(0, size, 2) / size)
    x = embed[ids]
    for i in range(layers):
        h = norm(x, norm1[i])
        query, key = (rotated((h @ w[i].t()).unflatten(-1, (-1, size)), angle).transpose(0, 1) for w in (q, k))
        value = (h @ v[i].t()).unflatten(-1, (-1, size)).transpose(0, 1)
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, enable_gqa=True)[0]
        x = x + out.transpose(0, 1).flatten(1) @ o[i].t()
        h = norm(x, norm2[i])
        x = x + (F.silu(h @ gate[i].t()) * (h @ up[i].t())) @ down[i].t()
    return norm(x, final) @ matrix.t()


@torch.inference_mode()
def test_the_file_for_llama2c(tmp_path):
    model = tiny_llama(dtype=torch.float32)
    model.save(tmp_path)
    compare.llama2c(tmp_path, Namespace(llama2c="run", scratch=tmp_path, eos=[2], threads=1, max_new_tokens=1))
    ids = torch.randint(0, 12, (40,), generator=torch.Generator().manual_seed(0))
    config, ours = model.config, Llama.from_pretrained(tmp_path)
    logits = llama2c_logits(next(tmp_path.glob("*-llama2c.bin")), ids, config.rms_norm_eps, config.rope_theta)
    expected = ours.lm_head(ours(ids[None])[0])
    assert torch.allclose(logits, expected, atol=1e-3) and expected.std() > 0.5


def test_the_config_of_a_gguf():
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
             "rope_theta": 100000.0, "bos_token_id": 1, "eos_token_id": 2}
    meta = {at: sizes.get(name) for name, at in smollm2.FIELDS.items()}
    meta |= {"llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06, "tokenizer.ggml.padding_token_id": 2}
    read = smollm2.config_of(meta, True, "bfloat16")
    config = LlamaConfig.from_dict(read)
    expected = sizes | {"eos_token_id": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16"}
    assert {name: getattr(config, name, None) for name in expected} == expected and config.eos_token_ids == (2,)
    assert read["pad_token_id"] == 2
