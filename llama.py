"""Llama in one file: Hugging Face checkpoints straight in, a static key/value cache, a mask that can be a tree.

Everything fed to the model is a tree of new tokens ("nodes") behind a committed prefix: a prompt is a chain, a plain
decoding step is a single node, a Medusa step is a tree. `visible` writes the attention mask for all three.

Shape letters: B rows, T tokens fed, S cache slots, W window (the first W slots), H hidden, V vocabulary,
               A attention heads, G key/value heads, D head_dim, L layers
"""
import json
import math
import os
import sys
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class UserError(Exception):
    """Something the user can mend: the text says what was wrong and what to do. Scripts print it and exit with 2."""


# ---------------------------------------------------------------------------------------------------- configuration

MOST, LONGEST = 2 ** 19, 2 ** 22    # a size, so that no product of three is too large for torch; a context

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


ROPE_NUMBERS = {        # what each way to stretch rotary embedding needs; "dynamic" changes nothing within the context
    "default": (), "dynamic": ("factor",), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of an HF `config.json` that describe a Llama; the defaults are those of HF's own LlamaConfig."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None      # None: num_attention_heads (no grouping)
    head_dim: int | None = None                 # None: hidden_size // num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None            # None, or rope_type "linear", "llama3" or "dynamic" and its numbers
    sliding_window: int | None = None           # Mistral's; the context ends with it
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    bos_token_id: int | None = 1
    eos_token_id: int | tuple | None = 2

    def __post_init__(self):
        def must_be(want, test, *names):
            for name in names:
                if not test(getattr(self, name)):
                    raise UserError(f"config: {name} is {getattr(self, name)!r}, it must be {want}")
        whole = lambda v, most=MOST: type(v) is int and 1 <= v <= most
        token = lambda v: type(v) is int and 0 <= v < self.vocab_size
        positive = lambda v: type(v) in (int, float) and 1e-18 < v < 1e18      # else float32 overflows somewhere
        must_be(f"a whole number from 1 to {MOST}", whole, "vocab_size", "hidden_size", "intermediate_size",
                "num_hidden_layers", "num_attention_heads")
        must_be(f"a whole number from 1 to {LONGEST}", lambda v: whole(v, LONGEST), "max_position_embeddings")
        must_be(f"a whole number from 1 to {MOST}", lambda v: v is None or whole(v), "num_key_value_heads", "head_dim")
        must_be("a positive number, below 1e18", positive, "rms_norm_eps", "rope_theta")
        for name in ROPE_NUMBERS[(self.rope_scaling or {}).get("rope_type", "default")]:
            value = self.rope_scaling[name]
            if not positive(value):
                raise UserError(f"config: rope_scaling has {name} {value!r}, it must be a positive number, below 1e18")
        must_be("a whole number of at least 1", lambda v: v is None or whole(v, float("inf")), "sliding_window")
        must_be("true or false", lambda v: type(v) is bool, "tie_word_embeddings", "attention_bias", "mlp_bias")
        must_be(f"one of {', '.join(DTYPES)}", lambda v: v in tuple(DTYPES), "dtype")
        must_be("a token id", lambda v: v is None or token(v), "bos_token_id")
        must_be("a token id or a list of them", lambda v: v is None or all(map(token, self.eos_token_ids)),
                "eos_token_id")
        fill = lambda name, value: getattr(self, name) is None and object.__setattr__(self, name, value)
        fill("num_key_value_heads", self.num_attention_heads)
        if self.sliding_window:
            limit = min(self.max_position_embeddings, self.sliding_window)
            object.__setattr__(self, "max_position_embeddings", limit)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(f"config: hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                            f"{self.num_attention_heads} and no head_dim is given")
        fill("head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                            f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise UserError(f"config: head_dim {self.head_dim} is odd, rotary embedding needs an even one")

    @property
    def why_no_longer(self) -> str:
        """What keeps the context from being longer, for an error; empty if only the model's own length does."""
        if self.sliding_window == self.max_position_embeddings:
            return " (beyond it this model attends to a sliding window only, which is not supported)"
        if (self.rope_scaling or {}).get("rope_type") == "dynamic":
            return " (beyond it rope_scaling 'dynamic' would change the keys that are cached already: not supported)"
        return ""

    @property
    def eos_token_ids(self) -> tuple:
        """End-of-text ids; empty if the model has none."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    @classmethod
    def from_dict(cls, data: dict) -> "LlamaConfig":
        """From the contents of an HF `config.json`, old spelling or new. Raises UserError for what is not done here."""
        def refuse(field, value, want):
            raise UserError(f"config: {field} is {value!r}, only {want} is supported")
        if data.get("model_type", "llama") not in ("llama", "mistral"):
            refuse("model_type", data["model_type"], "'llama' (or 'mistral')")
        if data.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", data["hidden_act"], "'silu'")
        for field in ("rope_scaling", "rope_parameters"):
            if not isinstance(data.get(field) or {}, dict):
                refuse(field, data[field], "an object")
        rope = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type")) or "default"
        if kind not in tuple(ROPE_NUMBERS):
            refuse("rope_parameters" if data.get("rope_parameters") else "rope_scaling", kind,
                   " or ".join(map(repr, ROPE_NUMBERS)))
        data = {"dtype": data.get("torch_dtype"), **data}
        data["rope_theta"] = rope.get("rope_theta", data.get("rope_theta"))
        data["rope_scaling"] = None if kind == "default" else {"rope_type": kind} | {
            name: rope.get(name) for name in ROPE_NUMBERS[kind]}
        if kind == "dynamic" and rope.get("original_max_position_embeddings"):
            data["max_position_embeddings"] = rope["original_max_position_embeddings"]
        if data.get("model_type") == "mistral":
            data = {"sliding_window": 4096, "num_key_value_heads": 8, "intermediate_size": 14336,
                    "max_position_embeddings": 4096 * 32, **data}
        nullable = ("bos_token_id", "eos_token_id")      # null elsewhere: the default, as if it were absent
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
                      if k in cls.__dataclass_fields__ and (v is not None or k in nullable)})

    def to_dict(self) -> dict:
        """As HF writes it, in the spelling that old and new transformers both read."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **asdict(self),
                "torch_dtype": self.dtype}


# ------------------------------------------------------------------------------------------------- rotary embedding

ROTARY_SLACK = 64   # positions beyond the context: the nodes of a tree that stands at the context's very end


def frequencies(config: LlamaConfig) -> Tensor:
    """Radians a position of every pair: [D/2]. Llama 3 slows down those with few turns in its original context."""
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        return inverse / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        factor, low, high, original = (scaling[name] for name in ROPE_NUMBERS["llama3"])
        turns = original / (2 * math.pi / inverse)
        keep = ((turns - low) / (high - low)).clamp(0, 1)       # 0: slowed down by the factor, 1: left as it is
        return (1 - keep) * inverse / factor + keep * inverse
    return inverse


def rotary_table(config: LlamaConfig, dtype=torch.float32) -> Tensor:
    """cos and sin of every position times every frequency: [positions, D/2, 2], computed as HF does, in float32."""
    angle = torch.arange(config.max_position_embeddings + ROTARY_SLACK).float()[:, None] * frequencies(config)
    return torch.stack((angle.cos(), angle.sin()), -1).to(dtype)


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """HF's half-split rows of q_proj or k_proj, (a0 a1 .. | b0 b1 ..) a head → ours and Meta's (a0 b0 a1 b1 ..).

    Pair i of a head is (a_i, b_i), and turning it by an angle is one complex product if the two are neighbours.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """The way back, for files that HF reads."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def rotation(table: Tensor, position_ids: Tensor, turning: int, still: int) -> Tensor:
    """cos and sin [B, T, turning + still, D/2, 2] for all heads of a token's queries, keys and values at once.

    Queries and keys turn with their position, position_ids [B, T]; the values behind them turn by 0. Complex numbers
    [B, T, turning + still, D/2], but for the compiler, which knows none and fuses the real ones.
    """
    turned = table[position_ids][:, :, None]                                                    # [B, T, 1, D/2, 2]
    unturned = torch.stack((torch.ones_like(turned[..., 0]), torch.zeros_like(turned[..., 0])), -1)
    by = torch.cat((turned.expand(-1, -1, turning, -1, -1), unturned.expand(-1, -1, still, -1, -1)), 2)
    return by if torch.compiler.is_compiling() else torch.view_as_complex(by)


def apply_rotary(x: Tensor, by: Tensor) -> Tensor:
    """Turns the pairs (a, b) of x [B, T, heads, D] by `rotation`: (a cos - b sin, b cos + a sin)."""
    pairs = x.unflatten(-1, (-1, 2))
    pairs = pairs.float() if x.element_size() < 4 else pairs
    if by.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * by).flatten(-2).to(x.dtype)
    (a, b), (cos, sin) = pairs.unbind(-1), by.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


# -------------------------------------------------------------------------------------------------- cache and mask

SMALL_HEAD = 16     # below this head_dim, attention is written out (`small_attention`) and the cache laid out for it


def new_cache(config: LlamaConfig, rows: int, slots: int, like: Tensor) -> Tensor:
    """One allocation for all keys and values: [L, B, S, 2, G, D], in the dtype and on the device of `like`.

    With small heads the slots lie innermost in memory, so that sums over them are contiguous. Zeros, not empty:
    a masked weight of 0 times a stale NaN would still be NaN. UserError: there is not so much memory.
    """
    layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    try:
        if size >= SMALL_HEAD:
            return like.new_zeros(layers, rows, slots, 2, heads, size)
        return like.new_zeros(layers, 2, rows, heads, size, slots).permute(0, 2, 5, 1, 3, 4)
    except RuntimeError as error:
        size = layers * rows * slots * 2 * heads * size * like.element_size() / 1e9
        raise UserError(f"no memory for the keys and values of {rows} x {slots} tokens, {size:.1f} GB: decode fewer at "
                        "once, or fewer new tokens") from error


def some_rows(cache: Tensor, rows: Tensor) -> Tensor:
    """A copy of the batch rows [n] of a cache, laid out in memory as `new_cache` does."""
    if cache.shape[-1] >= SMALL_HEAD:
        return cache[:, rows]
    return cache.permute(0, 3, 1, 4, 5, 2)[:, :, rows].permute(0, 2, 5, 1, 3, 4)


def keep_rows(cache: Tensor, length: Tensor, path: Tensor) -> None:
    """Moves slot length + path[j] to slot length + j for every j, in place; cache [L, B, S, 2, G, D], path [B, P].

    Parents precede children, so path[j] >= j; the whole of `path` is read before anything is written.
    """
    layers = torch.arange(len(cache), device=path.device)[:, None, None]
    rows = torch.arange(len(path), device=path.device)[:, None]
    to = length[:, None] + torch.arange(path.shape[1], device=path.device)                                # [B, P]
    cache.index_put_((layers, rows, to), cache[layers, rows, length[:, None] + path])


def mask_table(ancestors: Tensor) -> Tensor:
    """What the nodes of a tree may see, for `visible`: ancestors bool [N, N] → [N, N + 2], 0 or minus infinity.

    Column 0 stands for all committed slots, column 1 + j for node j, the last one for all slots beyond the tree.
    """
    seen = F.pad(F.pad(ancestors, (1, 0), value=True), (0, 1), value=False)
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def visible(length: Tensor, table: Tensor, window: Tensor) -> Tensor:
    """The attention mask of every forward with a cache, to be added to the scores: [B, N, W], 0 where a key is seen.

    The N new tokens of row b stand in slots length[b] .. length[b] + N - 1; window [W] = 0, 1, ..: the slots that are
    looked at. table: see `mask_table`; a row's committed slots are those below length[b].
    """
    column = (window - length[:, None] + 1).clamp(0, table.shape[0] + 1)                                  # [B, W]
    return table[:, column].transpose(0, 1)


# --------------------------------------------------------------------------------------------------------- layers

def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor | None, zero: Tensor, floor: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (None: ones) over the last dimension H, in at least float32 as HF does.

    Written as sqrt(H) x weight / hypot(|x|, floor), floor = sqrt(H eps): a third of the kernels that F.rms_norm has
    on a CPU. zero, floor: these numbers as tensors, in the dtype to compute in.
    """
    y = x if x.dtype == zero.dtype else x.to(zero.dtype)
    size = torch.hypot(torch.linalg.vector_norm(y, 2, -1, True), floor)
    y = torch.addcdiv(zero, y if weight is None else y * weight, size, value=x.shape[-1] ** 0.5)
    return y if x.dtype == y.dtype else y.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x [T, I] times weight [I, O], plus bias [O], plus residual [T, O]: one kernel where there are no biases."""
    if isinstance(weight, Int8) or weight.is_mkldnn:
        y = weight.linear(x, bias) if isinstance(weight, Int8) else packed_linear(x, weight, bias)
        return y if residual is None else residual + y
    if residual is None:
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
    return torch.addmm(residual if bias is None else residual + bias, x, weight)


def pack(weight: Tensor) -> Tensor:
    """A matrix [O, I] in oneDNN's own layout, which is read at nearly the memory's speed for 1 to 16 rows of x."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 8)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, I] times a packed weight → [T, O]. Four rows are read faster than one: fewer are filled up with zeros."""
    filled = x if len(x) >= 4 else F.pad(x, (0, 0, 0, 4 - len(x)))
    return torch.ops.mkldnn._linear_pointwise(filled, weight, bias, "none", [], "")[:len(x)]


class PackedHead(nn.Module):
    """An `lm_head` whose matrix is packed, for many rows; for a single one the plain `weight`, unless it was let go."""

    def __init__(self, weight: Tensor, keep: bool):
        super().__init__()
        self.weight, self.packed = weight if keep else None, pack(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.weight is not None and (hidden.shape[:-1].numel() == 1 or torch.compiler.is_compiling()):
            return F.linear(hidden, self.weight)
        return packed_linear(hidden.reshape(-1, hidden.shape[-1]), self.packed, None).view(*hidden.shape[:-1], -1)


class Int8(NamedTuple):
    """A matrix [O, I] in 8 bits, a scale for each output; what it is multiplied with keeps its dtype (weight-only)."""
    values: Tensor      # [O, I] int8
    scale: Tensor       # [O]

    @classmethod
    def of(cls, weight: Tensor) -> "Int8":
        """The nearest of 255 values symmetric about 0, the largest weight of a row being the last."""
        scale = (weight.detach().abs().amax(1).float() / 127).clamp(min=1e-12).to(weight.dtype)
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for part, by, into in zip(weight.detach().split(1024), scale.split(1024), values.split(1024), strict=True):
            into.copy_((part.float() / by.float()[:, None]).round_().clamp_(-127, 127))
        return cls(values, scale)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, I] → [T, O]. A few rows on a CPU have a kernel of torch's, more are faster by unpacking the matrix."""
        if x.device.type == "cpu" and len(x) <= {torch.bfloat16: 16, torch.float32: 1}.get(x.dtype, 0):
            y = torch._weight_int8pack_mm(x.contiguous(), self.values, self.scale)
        else:
            y = (x @ self.values.to(x.dtype).t()) * self.scale
        return y if bias is None else y + bias


class Int8Head(nn.Module):
    """An `lm_head` in 8 bits."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.matrix = Int8.of(weight)

    @property
    def weight(self) -> Tensor:
        """Unpacked, for heads that use its rows: [V, H]."""
        return self.matrix.values * self.matrix.scale[:, None]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.matrix.linear(hidden.reshape(-1, hidden.shape[-1]), None).view(*hidden.shape[:-1], -1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Training's attention, no cache: [B, A, T, D], [B, G, T, D] twice → [B, A, T, D]. model/pretrain.py swaps it."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])


def small_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention for a few numbers a head, where torch's own kernel wastes its time: query [n, T, D], key [n, D, W],
    value [n, W, D], bias [n, T, W] → [n, T, D]. Compiled, the products over D are sums of D fused terms."""
    scale = query.shape[-1] ** -0.5
    if not torch.compiler.is_compiling():
        return torch.bmm(torch.baddbmm(bias, query, key, alpha=scale).softmax(-1), value)
    terms = [query[:, :, d, None] * key[:, None, d] for d in range(query.shape[-1])]
    scores = sum(terms[1:], terms[0]) * scale + bias
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = torch.stack([(weights * value[:, None, :, d]).sum(-1) for d in range(query.shape[-1])], -1)
    return out / weights.sum(-1, keepdim=True)


class Past:
    """The cache as attention uses it in one forward: where the new tokens are written, and which slots are read."""

    def __init__(self, cache: Tensor, slots: Tensor, bias: Tensor, heads: int):
        """cache [L, B, S, 2, G, D], slots [B, T], bias [B, T, W] of `visible`."""
        (layers, rows), groups, self.cache = cache.shape[:2], cache.shape[4], cache
        self.small, self.each = cache.shape[5] < SMALL_HEAD, heads // groups        # queries that share a key
        numbers = torch.arange(layers, device=cache.device)[:, None, None].unbind(0)
        b = torch.arange(rows, device=cache.device)[:, None]
        self.at = [(number, b, slots) for number in numbers]    # a layer's number as a tensor: compiled, it is in place
        key, value = cache[:, :, :bias.shape[-1]].unbind(3)                                     # [L, B, W, G, D] each
        if self.small:                                          # `view`, not `reshape`: a copy would be stale
            each_row = (layers, rows * groups, cache.shape[5], -1)
            key = key.permute(0, 1, 3, 4, 2).view(each_row)
            value = value.permute(0, 1, 3, 4, 2).view(each_row).transpose(2, 3)
            bias = bias[:, None, None].expand(-1, groups, self.each, -1, -1).flatten(2, 3).flatten(0, 1)
        else:
            key, value, bias = key.transpose(2, 3), value.transpose(2, 3), bias[:, None]
        self.keys, self.values, self.bias = key.unbind(0), value.unbind(0), bias

    def attention(self, layer: int, query: Tensor, new: Tensor) -> Tensor:
        """Writes the new keys and values [B, T, 2, G, D], then attends from query [B, T, A, D] → [B, T, A, D]."""
        self.cache.index_put_(self.at[layer], new)
        key, value, (rows, tokens, _, size) = self.keys[layer], self.values[layer], query.shape
        if not self.small:
            if tokens == 1 and query.element_size() == 2 and query.device.type == "cpu":
                query = query.expand(-1, 2, -1, -1)     # in 16 bits two queries take a fifth of the time of one
            out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, self.bias, enable_gqa=self.each > 1)
            return out[:, :, :tokens].transpose(1, 2)
        query = query.view(rows, tokens, -1, self.each, size).permute(0, 2, 3, 1, 4).reshape(len(key), -1, size)
        out = small_attention(query, key, value, self.bias)                                     # [B G, each T, D]
        return out.view(rows, -1, self.each, tokens, size).permute(0, 3, 1, 2, 4)


class Layer(nn.Module):
    """The parameters of one layer: q, k and v stand in one matrix, as do gate and up."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        matrix = lambda rows, columns: nn.Parameter(nn.init.normal_(torch.empty(rows, columns), std=0.02))
        vector = lambda size, wanted: nn.Parameter(torch.zeros(size)) if wanted else None
        query = c.num_attention_heads * c.head_dim
        qkv = query + 2 * c.num_key_value_heads * c.head_dim
        self.input_layernorm = nn.Parameter(torch.ones(c.hidden_size))
        self.qkv_proj, self.qkv_bias = matrix(qkv, c.hidden_size), vector(qkv, c.attention_bias)
        self.o_proj, self.o_bias = matrix(c.hidden_size, query), vector(c.hidden_size, c.attention_bias)
        self.post_attention_layernorm = nn.Parameter(torch.ones(c.hidden_size))
        self.gate_up_proj = matrix(2 * c.intermediate_size, c.hidden_size)
        self.gate_up_bias = vector(2 * c.intermediate_size, c.mlp_bias)
        self.down_proj = matrix(c.hidden_size, c.intermediate_size)
        self.down_bias = vector(c.hidden_size, c.mlp_bias)

    def weights(self) -> tuple:
        """As `forward` uses them, matrices transposed [in, out]."""
        return (self.input_layernorm, self.qkv_proj.t(), self.qkv_bias, self.o_proj.t(), self.o_bias,
                self.post_attention_layernorm, self.gate_up_proj.t(), self.gate_up_bias,
                self.down_proj.t(), self.down_bias)

    def folded(self) -> list:
        """`weights`, the norms' own multiplied into the matrices behind them (not in bfloat16: one more rounding)."""
        w = list(self.weights())
        if w[0].dtype == at_least_float32(w[0].dtype):
            for norm, matrix in ((0, 1), (5, 6)):
                w[matrix], w[norm] = (w[matrix].t() * w[norm]).t(), None
        return w

    def let_go(self, layout, weights=None) -> list:
        """`weights` with layout(matrix [in, out]) in place of each matrix, one after the other; the layer's own go."""
        weights = list(weights or self.weights())
        for i, name in ((1, "qkv_proj"), (3, "o_proj"), (6, "gate_up_proj"), (8, "down_proj")):
            setattr(self, name, None)
            weights[i] = layout(weights[i])
        return weights


HEADS_INSIDE = "medusa_head."   # how the names begin of heads that stand in the model's own file, as Medusa 1.0 writes
LARGE = 64 * 2 ** 20     # bytes of weights that are surely read from memory, not from a cache, in each step


class Llama(nn.Module):
    """The whole model. `forward` returns hidden states; the caller applies `lm_head` to the rows it wants."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.set_buffers(torch.float32, self.norm.device)       # on "meta" nothing is computed
        self.weights = None

    def set_buffers(self, dtype, device) -> None:
        """What follows from the config alone, in the dtype that norms and rotary embedding are computed in."""
        floor = (self.config.hidden_size * self.config.rms_norm_eps) ** 0.5
        for name, buffer in (("rotary", rotary_table(self.config, dtype)),                      # [positions, D/2, 2]
                             ("zero_and_floor", torch.tensor([0, floor], dtype=dtype))):
            self.register_buffer(name, buffer.to(device), persistent=False)

    def _apply(self, *args, **options):
        self.weights = None                                     # moved or converted: to be collected anew
        return super()._apply(*args, **options)

    def layer_weights(self) -> list:
        """`Layer.weights` of all layers, kept for inference: to look them up costs as much as to multiply by them."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return [layer.weights() for layer in self.layers]
        if self.weights is None:
            self.weights = [layer.weights() for layer in self.layers]
        return self.weights

    def forward(self, ids: Tensor, position_ids: Tensor | None = None, bias: Tensor | None = None,
                cache: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """ids [B, T] → hidden after the final norm [B, T, H].

        Training: ids alone (causal, positions 0 .. T-1). Everything else: a cache [L, B, S, 2, G, D], the slots
        [B, T] to write the new keys and values to, their position_ids [B, T] and the bias [B, T, W] of `visible`.
        """
        c, (rows, tokens), (zero, floor) = self.config, ids.shape, self.zero_and_floor.unbind()
        hidden = self.embed_tokens(ids.flatten())               # [B T, H]
        if position_ids is None:
            position_ids = torch.arange(tokens, device=ids.device)[None]
        queries, groups = c.num_attention_heads, c.num_key_value_heads
        by = rotation(self.rotary, position_ids, queries + groups, groups)
        past = None if cache is None else Past(cache, slots, bias.to(hidden.dtype), queries)
        for number, weights in enumerate(self.layer_weights()):
            norm_1, qkv, qkv_bias, o, o_bias, norm_2, gate_up, gate_up_bias, down, down_bias = weights
            x = linear(rms_norm(hidden, norm_1, zero, floor), qkv, qkv_bias)
            query, new = apply_rotary(x.view(rows, tokens, -1, c.head_dim), by).split((queries, 2 * groups), 2)
            if past is None:
                key, value = new.transpose(1, 2).chunk(2, 1)                                    # [B, G, T, D] each
                x = causal_attention(query.transpose(1, 2), key, value).transpose(1, 2)
            else:
                x = past.attention(number, query, new.view(rows, tokens, 2, groups, c.head_dim))
            hidden = linear(x.reshape(rows * tokens, -1), o, o_bias, hidden)
            gate, up = linear(rms_norm(hidden, norm_2, zero, floor), gate_up, gate_up_bias).chunk(2, -1)
            hidden = linear(F.silu(gate) * up, down, down_bias, hidden)
        return rms_norm(hidden, self.norm, zero, floor).view(rows, tokens, -1)

    def size(self) -> int:
        """Bytes of all parameters."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    @torch.no_grad()
    def pack(self) -> None:
        """For decoding on a CPU and nothing else: norms folded, matrices as `pack` lays them out.

        Of a model that the CPU's cache can hold only the lm_head is packed; of a larger one all matrices are, the plain
        ones are let go, and one row costs what eight do.
        """
        if not isinstance(self.lm_head, nn.Linear):
            return                                              # packed already, or in 8 bits
        if not torch.backends.mkldnn.is_available() or self.norm.dtype not in (torch.float32, torch.bfloat16):
            return
        large = self.size() > LARGE
        self.lm_head = PackedHead(self.lm_head.weight, keep=not large)
        if large:
            self.weights = [layer.let_go(lambda matrix: pack(matrix.t()), layer.folded()) for layer in self.layers]
        else:
            self.weights = [layer.folded() for layer in self.layers]

    def tensors(self, only: int | None = None) -> dict[str, Tensor]:
        """HF's names → views of our parameters (the rows of q_proj and k_proj `interleaved`).

        only: those of the layer with this number, -1: those of no layer.
        """
        c = self.config
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        parts = {"qkv": {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key},
                 "o": {"self_attn.o_proj": c.hidden_size}, "down": {"mlp.down_proj": c.hidden_size},
                 "gate_up": {"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size}}
        named = {}
        for i in range(len(self.layers)) if only is None else [only] * (only >= 0):
            for name, p in self.layers[i].named_parameters():
                owner, _, kind = name.rpartition("_")           # qkv_proj → a weight, qkv_bias → a bias
                split = parts.get(owner, {name: len(p)})
                named |= {f"model.layers.{i}.{part}.{'bias' if kind == 'bias' else 'weight'}": view
                          for part, view in zip(split, p.detach().split(list(split.values())), strict=True)}
        if only is None or only < 0:
            named |= {"model.embed_tokens.weight": self.embed_tokens.weight.detach(),
                      "model.norm.weight": self.norm.detach()}
            named |= {} if c.tie_word_embeddings else {"lm_head.weight": self.lm_head.weight.detach()}
        return named

    @classmethod
    def from_pretrained(cls, name_or_path, *, dtype=None, device="cpu", revision=None, int8=False) -> "Llama":
        """From a local folder or a hub id, in HF's own layout. dtype None: float32 on the CPU, else the checkpoint's.

        Never more in memory than the model and some rows of a matrix; int8: than the quantised model (see `Int8`), its
        embeddings and one layer, and only for decoding. Medusa heads inside the file are left to MedusaHeads.
        Raises UserError: no such folder or file, not a Llama, tensors missing, unexpected or of another shape.
        """
        config = load_config(name_or_path, revision)
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else DTYPES[config.dtype]
        what = f"model {name_or_path}"
        found = open_tensors(weight_files(name_or_path, revision), what)
        found = {name: at for name, at in found.items() if not name.startswith(HEADS_INSIDE)}
        if "lm_head.weight" in found:                # though the config may say tied: HF, too, takes the file's word
            config = replace(config, tie_word_embeddings=False)
        if config.num_hidden_layers > len(found):    # before they are built
            raise UserError(f"{what}: config.json says {config.num_hidden_layers} layers, the files hold only "
                            f"{len(found)} tensors: they don't belong together")
        with torch.device("meta"):
            model = cls(config)                      # shapes only: no random initialisation
        model = model.to(dtype)
        check_tensors(found, model.tensors(), what)
        model.to_empty(device=device)                # takes no memory before it is written to
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        model.set_buffers(at_least_float32(dtype), device)
        odd = read_tensors(found, model.tensors(only=-1), what)
        if int8:
            model.lm_head = Int8Head(model.lm_head.weight)
        for number, layer in enumerate(model.layers):
            tensors = model.tensors(only=number)
            odd_here = read_tensors(found, tensors, what)
            odd = odd or odd_here
            for name, tensor in tensors.items():
                if "q_proj" in name or "k_proj" in name:
                    tensor.copy_(interleaved(tensor, config.head_dim))
            if int8:
                model.weights = [*(model.weights or ()), layer.let_go(lambda matrix: Int8.of(matrix.t()))]
        warn(odd, what)
        return model.eval()

    def save(self, folder, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json` and `model.safetensors` as HF would; transformers loads the folder."""
        tensors = {name: half_split(t, self.config.head_dim) if "q_proj" in name or "k_proj" in name else t
                   for name, t in self.tensors().items()}
        tensors = {name: t.to("cpu", dtype).contiguous() for name, t in tensors.items()}
        stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        write_tensors(Path(folder) / "model.safetensors", tensors)
        write_json(Path(folder) / "config.json", self.config.to_dict() | {"dtype": stored, "torch_dtype": stored})


# ------------------------------------------------------------------------------------------- checkpoint files

def model_name(name_or_path) -> str:
    """How a model is named in what is written down: a folder by its own name without its path, a hub id whole."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else str(name_or_path)


def load_config(name_or_path, revision=None) -> LlamaConfig:
    """`config.json`; a `generation_config.json` beside it overrules the end-of-text ids, as in HF's generate."""
    data = read_json(locate(name_or_path, "config.json", revision))
    if generation := locate(name_or_path, "generation_config.json", revision, required=False):
        data |= {k: v for k, v in read_json(generation).items() if k == "eos_token_id"}
    return LlamaConfig.from_dict(data)


def locate(name_or_path, filename: str, revision=None, required=True, repo_type="model") -> Path | None:
    """The local path of one file of a model: a folder's, or downloaded from the hub (only the files asked for)."""
    try:
        folder = Path(name_or_path).expanduser()
        folder.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{str(name_or_path)[:80]} is not a folder: {error}") from error
    if (folder / filename).is_file():
        return folder / filename
    if folder.is_dir():
        if not required:
            return None
        raise UserError(f"{folder} has no {filename}: give a folder in Hugging Face layout")
    if folder.exists() or str(name_or_path).startswith((".", "/", "~")) or str(name_or_path).count("/") != 1:
        raise UserError(f"{name_or_path} is not a folder: give a model folder or a hub id such as Maykeye/TinyLLama-v0")
    from huggingface_hub import errors, hf_hub_download
    try:
        return Path(hf_hub_download(str(name_or_path), filename, revision=revision, repo_type=repo_type))
    except errors.LocalEntryNotFoundError as error:
        if not required:
            return None                              # offline: the cache has what an earlier run needed
        raise UserError(f"{name_or_path}: the hub can't be reached and {filename} is not in its cache; "
                        "give a local folder or try again with a network") from error
    except errors.EntryNotFoundError as error:
        if not required:
            return None
        raise UserError(f"{name_or_path} on the hub has no {filename}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"{name_or_path}: no such folder here, and the hub says: {said}") from error


def weight_files(name_or_path, revision=None) -> list[Path]:
    """The weights of a model: safetensors, else PyTorch's pickles; one file, or the shards that an index names."""
    for one, many in (("model.safetensors", "model.safetensors.index.json"),
                      ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if index := locate(name_or_path, many, revision, required=False):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not {str}.issuperset(map(type, weight_map.values() or [None])):
                raise UserError(f"{index}: weight_map must be an object of file names")
            shards = sorted(set(weight_map.values()))
            for name in shards:
                if Path(name).name != name:
                    raise UserError(f"{index} names the shard {name!r}: a shard must lie beside its index")
            return [locate(name_or_path, name, revision) for name in shards]
        if file := locate(name_or_path, one, revision, required=False):
            return [file]
    return [locate(name_or_path, "model.safetensors", revision)]


def open_file(file: Path, what: str) -> dict:
    """A safetensors file, or a pickle of tensors and nothing else: name → something with a shape to take rows [a:b] of.

    Mapped, not read: what is used of it counts as memory until it is closed.
    """
    try:
        if file.suffix == ".safetensors":
            handle = safe_open(file, "pt")
            return {name: handle.get_slice(name) for name in handle.keys()}
        with warnings.catch_warnings(action="ignore"):      # about what a damaged pickle calls
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:      # of a damaged pickle it may be any
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{what}: can't read {file}, is it whole? {said}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{what}: {file} is not a dictionary of tensors")
    return tensors


def open_tensors(files, what: str) -> dict[str, tuple]:
    """The names in some files → the file that holds each, its shape, its dtype, its name there; none is read yet."""
    found = {}
    for file in files:
        for name, t in open_file(Path(file), what).items():
            if name in found:
                raise UserError(f"{what}: {name} stands in {found[name][0]} and in {file}: which one is meant?")
            plain = isinstance(t, Tensor)
            found[name] = (file, tuple(t.shape if plain else t.get_shape()), t.dtype if plain else t.get_dtype(), name)
    return found


FLOATS = ("F64", "F32", "F16", "BF16", *DTYPES.values())    # as safetensors names them, and torch


def check_tensors(found: dict, into: dict[str, Tensor], what: str) -> None:
    """UserError that names every missing, unexpected and wrongly shaped or typed tensor of `open_tensors`."""
    problems = []
    # inv_freq: rotary frequencies that old transformers stored; they are derived from the config
    unexpected = [n for n in found if n not in into and not n.endswith("rotary_emb.inv_freq")]
    for title, names in (("missing", [n for n in into if n not in found]), ("unexpected", unexpected)):
        if names:
            problems.append(f"{title}: {', '.join(names)}")
    problems += [f"{n} has shape {list(found[n][1])}, expected {list(tensor.shape)}"
                 for n, tensor in into.items() if n in found and found[n][1] != tuple(tensor.shape)]
    problems += [f"{n} holds {found[n][2]}, expected {'floats' if tensor.is_floating_point() else 'integers'}"
                 for n, tensor in into.items()
                 if n in found and (found[n][2] in FLOATS) != tensor.is_floating_point()]
    if problems:
        raise UserError(f"{what}: the tensors do not fit the config: {'; '.join(problems)}")


def copy(rows: Tensor, to: Tensor) -> bool:
    """Copies, and tells whether all numbers are finite and of a size that can be squared: sums do, of parts that a
    core's own cache holds, next to no work there; where one looks odd, each number is looked at."""
    step, fine = max(1, 2 ** 19 // max(1, rows[:1].numel() * rows.element_size())), True
    for part, place in zip(rows.split(step), to.split(step), strict=True):
        place.copy_(part)
        fine = fine and (abs(part.sum().item()) < 1e18 or bool((part.double().abs() < 1e18).all()))
    return fine


READ_AT_ONCE = 2 ** 24      # bytes that are read of a mapped file before it is opened anew


@torch.no_grad()
def read_tensors(found: dict, into: dict[str, Tensor], what: str) -> str | None:
    """Reads `open_tensors` into tensors of the same names, some rows at a time, into their dtype and device; the name
    of the first one that holds what is no number (see `copy`)."""
    opened, used, odd = {}, 0, None
    for name, tensor in into.items():
        file, shape, _, there = found[name]
        step = max(1, READ_AT_ONCE // max(1, 4 * math.prod(shape[1:])))
        for begin in range(0, len(tensor), step):
            if used >= READ_AT_ONCE:
                opened, used = {}, 0                # unmapped: else all that was read would count as ours
            if file not in opened:
                opened[file] = open_file(Path(file), what)
            rows = tensor[begin:begin + step]
            try:
                fine = copy(opened[file][there][begin:begin + step], rows)
            except (RuntimeError, SafetensorError) as error:    # a sparse tensor, one without data
                raise UserError(f"{what}: can't read {there} of {file}: {error}") from error
            used += 4 * rows.numel()
            odd = odd if fine else odd or name
    return odd


def warn(odd: str | None, what: str) -> None:
    """A line about what `read_tensors` found."""
    if odd:
        print(f"{what}: {odd} holds NaN or numbers too large to compute with: expect nonsense", file=sys.stderr)


def read_json(path) -> dict:
    """A JSON object; UserError says which file is missing or damaged, and where."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def write_atomic(path, write) -> None:
    """Calls write(temporary path), then renames, so that no reader ever meets half a file."""
    path = Path(path)
    temporary = path.parent / f".tmp{os.getpid()}.{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        umask = os.umask(0o077)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)              # safetensors makes files that only their owner may read
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or error
        said = "torch could not write all of it: is the disk full?" if isinstance(error, RuntimeError) else said
        raise UserError(f"can't write {path}: {said}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path, data: dict) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8"))


def write_tensors(path, tensors: dict) -> None:
    """safetensors with the metadata that transformers insists on."""
    write_atomic(path, lambda p: save_file(tensors, p, metadata={"format": "pt"}))


# -------------------------------------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """`tokenizer.json`, else SentencePiece's `tokenizer.model`, through the `tokenizers` library; Llama's texts start
    with bos."""

    def __init__(self, name_or_path, config: LlamaConfig, revision=None):
        from tokenizers import Tokenizer as Backend

        from formats import sentencepiece
        path = locate(name_or_path, "tokenizer.json", revision, required=False) \
            or locate(name_or_path, "tokenizer.model", revision, required=False) \
            or locate(name_or_path, "tokenizer.json", revision)
        self.before = lambda text: text     # what is done to a text before the library's part
        with self.reading(f"can't read the tokenizer {path}"):
            if path.suffix == ".model":
                self.backend, self.before = sentencepiece.read(path)
            else:
                self.backend = Backend.from_file(str(path))
        self.backend.no_truncation()        # what a training run may have left in the file
        self.backend.no_padding()
        settings = locate(name_or_path, "tokenizer_config.json", revision, required=False)
        settings = read_json(settings) if settings else {}
        add_bos = settings.get("add_bos_token")
        if add_bos is None:                 # as in HF: Llama's own classes add it, others leave it to the file
            add_bos = str(settings.get("tokenizer_class", "Llama")).startswith("Llama")
        self.bos = [config.bos_token_id] if add_bos and config.bos_token_id is not None else []
        self.eos = list(config.eos_token_ids)
        self.path, self.size, self.vocab_size = path, self.backend.get_vocab_size(), config.vocab_size
        if self.size > config.vocab_size:
            raise UserError(f"{path} has {self.size} entries, the model only {config.vocab_size}: "
                            "they don't belong together")

    @staticmethod
    @contextmanager
    def reading(what: str):
        """The library raises bare Exceptions, and a panic of its Rust is not even one."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            raise UserError(f"{what}: {error}") from error

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, bos first (whether or not the file's own post-processor writes it)."""
        with self.reading(f"{self.path} can't encode this text"):
            encoded = [e.ids for e in self.backend.encode_batch_fast([self.before(text) for text in texts])]
        largest = max((max(ids, default=0) for ids in encoded), default=0)
        if largest >= self.vocab_size:
            raise UserError(f"{self.path} has the id {largest}, the model only {self.vocab_size} entries: "
                            "they don't belong together")
        return [ids if ids[:1] == self.bos else self.bos + ids for ids in encoded]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids) -> str:
        with self.reading(f"{self.path} can't decode"):
            return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, prompt_ids):
        """A function (new ids, end) → the text they add to what it returned before, never half a character.

        Text is decoded together with what stands before it, so that a leading space is kept; what may be the
        beginning of a character waits for the rest, or for the end.
        """
        before, pending = list(prompt_ids[-8:]), []

        def add(new_ids, end=False) -> str:
            nonlocal before, pending
            pending = pending + list(new_ids)
            text = self.decode(before + pending)
            if not pending or text.endswith("\N{REPLACEMENT CHARACTER}") and not end:
                return ""
            added, before, pending = text[len(self.decode(before)):], pending, []
            return added
        return add
