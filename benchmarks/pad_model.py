"""Writes a larger Llama that computes exactly what a small one computes: its text, at the larger shape's cost.

    python benchmarks/pad_model.py 110M padded/110M          # model/ and its heads in the shape "110M"

So the acceptance of trained heads can be timed at shapes that nobody trained here. In exact arithmetic every hidden
state of the small model is in the first columns of the larger one; its greedy text is the same, token for token:
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
from extras.command_line import command_line  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from loading.files import UserError, model_name, write_json  # noqa: E402
from tinymedusa import MedusaHeads, Tree  # noqa: E402
from variants.heads import build_heads, load_heads, save, token_map_of  # noqa: E402

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
    firsts = step * torch.arange(c.head_dim // 2)
    within = torch.cat((firsts, config.head_dim // 2 + firsts))  # dimensions i and i + D/2 of a head are a pair
    rows = lambda heads: (config.head_dim * torch.arange(heads)[:, None] + within).flatten()
    queries, keys = rows(c.num_attention_heads), rows(c.num_key_value_heads)
    places = {  # of a matrix's rows and columns, None the first ones
        "self_attn.q_proj": (queries, None),
        "self_attn.k_proj": (keys, None),
        "self_attn.v_proj": (keys, None),
        "self_attn.o_proj": (None, queries),
        "mlp.gate_proj": (None, None),
        "mlp.up_proj": (None, None),
        "mlp.down_proj": (None, None),
    }

    def copy(name: str, factor: float, *at) -> None:
        target = wide.get_parameter(name)
        target.copy_(placed(small.get_parameter(name) * factor, target.shape, *at))

    for i, layer in enumerate(wide.layers):
        if i >= len(small.layers):
            layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
            continue
        for part, at in places.items():
            copy(f"layers.{i}.{part}.weight", step**0.5 if "q_proj" in part else 1, *at)
        for part in ("input_layernorm", "post_attention_layernorm"):
            copy(f"layers.{i}.{part}.weight", root, None)
    copy("norm.weight", root, None)
    copy("embed_tokens.weight", 1, None, None)
    matrix = small.lm_head.weight
    surplus = matrix.mean(0, keepdim=True).expand(config.vocab_size - c.vocab_size, -1)  # never the largest logits
    wide.lm_head.weight.copy_(placed(torch.cat((matrix, surplus)), wide.lm_head.weight.shape, None, None))
    return wide


@torch.no_grad()
def pad_heads(heads: MedusaHeads, small: Llama, wide: Llama, own: bool) -> MedusaHeads:
    """The heads of `small` for `wide`: the same guesses. own: each with a vocabulary matrix of its own."""
    inside, token_map = small.config.hidden_size, token_map_of(heads)
    tied, blocks = getattr(heads, "tie_lm_head", False), getattr(heads, "num_layers", len(heads[0]) - 1)
    result = build_heads(
        wide,
        len(heads),
        num_layers=blocks,
        kind=getattr(heads, "kind", "medusa"),
        width=getattr(heads, "width", None),
        recent=heads.recent,
        tie_lm_head=tied and not own,
        trunk=getattr(heads, "trunk_width", None),
        token_map=torch.arange(small.config.vocab_size) if token_map is None else token_map,
    )
    old, trunk = dict(heads.named_parameters()), getattr(heads, "trunk_width", None)
    parts_of = lambda parts: (torch.arange(parts)[:, None] * wide.config.hidden_size + torch.arange(inside)).flatten()
    for name, target in result.named_parameters():
        head, block, part = name.replace("trunk.", "trunk.0.").split(".", 2)
        states = heads.recent if head == "trunk" or trunk is None else 1  # what a first block sees before embeddings
        if head == "trunk" and part == "down.weight":  # an output for each head
            target.copy_(placed(old[name], target.shape, parts_of(len(heads)), None))
        elif int(block) == blocks:
            target.copy_(placed(heads.lm_head_rows() if tied else old[name], target.shape, None, None))
        elif part in ("linear.weight", "up.weight"):  # what it sees: hidden states and embeddings, one behind the other
            parts = old[name].shape[1] // inside
            scale = torch.ones(parts * inside)
            if block == "0":  # the embeddings are scaled to RMS 1 over the columns there are
                scale[states * inside :] = (inside / wide.config.hidden_size) ** 0.5
            target.copy_(placed(old[name] * scale, target.shape, None, parts_of(parts)))
        else:
            target.copy_(placed(old[name], target.shape, *(None,) * target.dim()))
    return result


def write(folder: Path, shape: str, model=ROOT / "model", heads=None, dtype=None) -> None:
    """A whole model folder with heads in `medusa/`, in the shape's dtype: model, tokenizer, tree."""
    fields = dict(SHAPES[shape])
    own, dtype = fields.pop("own", False), dtype or fields.pop("dtype", "float32")
    small = Llama.from_pretrained(model)
    heads = heads or Path(model) / "medusa"
    small_heads = load_heads(heads, small)
    config = padded_config(small.config, **{**fields, "dtype": dtype})
    wide = pad(small, config)
    wide_heads = pad_heads(small_heads, small, wide, own)
    stored = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    wide.save(folder, stored)
    save(folder / "medusa", wide_heads, wide, f"padded {shape} of {model_name(model)}", stored)
    write_json(
        folder / "medusa" / "tree.json",
        {"paths": Tree.from_pretrained(heads, small_heads).paths[1:], "source": "the small model's"},
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
