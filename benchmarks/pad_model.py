"""Writes a larger Llama that computes exactly what a small one computes: its text, at the larger shape's cost.

    python benchmarks/pad_model.py 110M padded/110M          # model/ and its heads in the shape "110M"

So the acceptance of trained heads can be timed at shapes that nobody trained here. In exact arithmetic every hidden
state of the small model stands in the first columns of the larger one; its greedy text is the same, token for token:
- widths: zeros. A norm over W columns of which H are used divides by sqrt(H / W) of what it should, so its weight is
  multiplied by sqrt(H / W) and its eps by H / W;
- head_dim: the small head's frequencies theta^(-2i/d) are those of pair i D/d of the wide one; its pairs go there, and
  queries are multiplied by sqrt(D / d), since attention divides by sqrt(D);
- surplus heads and layers read like any others and add nothing: their output projections are zero.
The heads are padded likewise; the inner width of their blocks, which is no size of the model, stays as it is. At 1B and
7B they get vocabulary matrices of their own, as published heads have, over the same draft vocabulary.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.cli import command_line  # noqa: E402
from llama import Llama, LlamaConfig, UserError, model_name, write_json  # noqa: E402
from tinymedusa import MedusaHeads, load_tree  # noqa: E402

SHAPES = {  # what is over and above the small model's own config; own: vocabulary matrices of the heads' own
    "v0": {"vocab_size": 32000},  # TinyLLama-v0
    "110M": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "head_dim": 48,
    },
    "1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "dtype": "bfloat16",
        "own": True,
    },
    "7B": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "dtype": "bfloat16",
        "own": True,
    },
}


def padded_config(config: LlamaConfig, **shape) -> LlamaConfig:
    """The larger config; UserError where a shape can't hold the small model."""
    wide = replace(config, **shape)
    factor = config.hidden_size / wide.hidden_size
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
    ):
        if getattr(wide, field) < getattr(config, field):
            raise UserError(f"{field} {getattr(wide, field)} is smaller than the model's {getattr(config, field)}")
    grouping = [c.num_attention_heads // c.num_key_value_heads for c in (config, wide)]
    if wide.head_dim % config.head_dim or grouping[0] != grouping[1] or config.attention_bias or config.mlp_bias:
        raise UserError(f"head_dim must be a multiple of {config.head_dim}, queries a key {grouping[0]}, and no biases")
    return replace(wide, rms_norm_eps=config.rms_norm_eps * factor)


def placed(tensor: torch.Tensor, shape: tuple, *at) -> torch.Tensor:
    """Zeros of `shape` with `tensor` at the indices `at` (one a dimension: None its first ones, or positions)."""
    index = [torch.arange(n) if i is None else i for n, i in zip(tensor.shape, at, strict=True)]
    return torch.zeros(shape).index_put_(torch.meshgrid(*index, indexing="ij"), tensor)


@torch.no_grad()
def pad(small: Llama, config: LlamaConfig) -> Llama:
    """The larger model, float32; `small` in float32 as well."""
    c, wide = small.config, Llama(config)
    step, root = config.head_dim // c.head_dim, (c.hidden_size / config.hidden_size) ** 0.5
    pairs = torch.arange(c.head_dim // 2)
    within = torch.stack((2 * step * pairs, 2 * step * pairs + 1), 1).flatten()  # (a0 b0 a1 b1 ..), `interleaved`
    rows = lambda first, heads: (
        first * config.head_dim + config.head_dim * torch.arange(heads)[:, None] + within
    ).flatten()
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    qkv = torch.cat(
        (
            rows(0, c.num_attention_heads),
            rows(queries, c.num_key_value_heads),
            rows(queries + keys, c.num_key_value_heads),
        )
    )
    gate_up = torch.cat(
        (torch.arange(c.intermediate_size), config.intermediate_size + torch.arange(c.intermediate_size))
    )
    norm = lambda weight: placed(weight * root, (config.hidden_size,), None)
    for i, layer in enumerate(wide.layers):
        if i >= len(small.layers):
            layer.o_proj.zero_(), layer.down_proj.zero_()
            continue
        s = small.layers[i]
        turned = s.qkv_proj.clone()
        turned[: c.num_attention_heads * c.head_dim] *= step**0.5
        layer.input_layernorm.copy_(norm(s.input_layernorm))
        layer.post_attention_layernorm.copy_(norm(s.post_attention_layernorm))
        layer.qkv_proj.copy_(placed(turned, layer.qkv_proj.shape, qkv, None))
        layer.o_proj.copy_(placed(s.o_proj, layer.o_proj.shape, None, rows(0, c.num_attention_heads)))
        layer.gate_up_proj.copy_(placed(s.gate_up_proj, layer.gate_up_proj.shape, gate_up, None))
        layer.down_proj.copy_(placed(s.down_proj, layer.down_proj.shape, None, None))
    wide.norm.copy_(norm(small.norm))
    wide.embed_tokens.weight.copy_(placed(small.embed_tokens.weight, wide.embed_tokens.weight.shape, None, None))
    wide.lm_head.weight.copy_(
        placed(
            small.lm_head.weight.mean(0, keepdim=True)
            .expand(config.vocab_size, -1)
            .clone()
            .index_copy_(0, torch.arange(c.vocab_size), small.lm_head.weight),
            wide.lm_head.weight.shape,
            None,
            None,
        )
    )
    return wide


@torch.no_grad()
def pad_heads(heads: MedusaHeads, small: Llama, wide: Llama, own: bool) -> MedusaHeads:
    """The heads of `small` for `wide`: the same guesses. own: each with a vocabulary matrix of its own."""
    inside = small.config.hidden_size
    token_map = torch.arange(small.config.vocab_size) if heads.token_map is None else heads.token_map
    result = MedusaHeads.untrained(
        wide,
        heads.num_heads,
        num_layers=heads.num_layers,
        tie_lm_head=not own and heads.tie_lm_head,
        width=heads.width,
        kind=heads.kind,
        recent=heads.recent,
        token_map=token_map,
    )
    hidden = torch.arange(inside)
    for j, (block, old) in enumerate(zip(result.blocks, heads.blocks, strict=True)):
        parts = old.up_weight.shape[-1] if heads.width else old.linear_weight.shape[-1]
        columns = (torch.arange(parts // inside)[:, None] * wide.config.hidden_size + hidden).flatten()
        scale = torch.ones(parts)
        if j == 0:  # behind the hidden states stand embeddings, scaled to RMS 1 over the columns there are
            scale[heads.recent * inside :] = (inside / wide.config.hidden_size) ** 0.5
        for name, p in old.named_parameters():
            target = getattr(block, name)
            at = (None,) * p.dim() if name.endswith("bias") or name == "down_weight" else (None, None, columns)
            target.copy_(placed(p if p.dim() < 3 or name == "down_weight" else p * scale, target.shape, *at))
    if result.vocabulary is not None:
        matrix = heads.lm_head.expand(heads.num_heads, -1, -1) if heads.vocabulary is None else heads.vocabulary
        result.vocabulary.copy_(placed(matrix, result.vocabulary.shape, None, None, None))
    return result


def write(folder: Path, shape: str, model=ROOT / "model", heads=None, dtype=None) -> None:
    """A whole model folder with heads in `medusa/`, in the shape's dtype: model, tokenizer, tree."""
    fields = dict(SHAPES[shape])
    own, dtype = fields.pop("own", False), dtype or fields.pop("dtype", "float32")
    small = Llama.from_pretrained(model)
    small_heads = MedusaHeads.from_pretrained(heads or Path(model) / "medusa", small)
    config = padded_config(small.config, **{**fields, "dtype": dtype})
    wide = pad(small, config)
    wide_heads = pad_heads(small_heads, small, wide, own)
    stored = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    wide.save(folder, stored)
    wide_heads.save(folder / "medusa", f"padded {shape} of {model_name(model)}", stored)
    write_json(
        folder / "medusa" / "tree.json",
        {"paths": load_tree(heads or Path(model) / "medusa", small_heads)[0].paths[1:], "source": "the small model's"},
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (Path(model) / name).exists():
            (folder / name).write_bytes((Path(model) / name).read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=str(ROOT / "model"))
    parser.add_argument("--heads", help="default: medusa/ in the model's folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the shape's own")
    args = parser.parse_args()
    write(args.folder, args.shape, args.model, args.heads, args.dtype)
    print(f"{args.folder}: padded {args.shape}")


if __name__ == "__main__":
    command_line(main)
