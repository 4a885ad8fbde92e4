"""Llama in plain PyTorch, with a static key/value cache and an attention mask that can be a tree.

Whatever the model reads into its cache is a tree of new tokens ("nodes") after the committed ones: a prompt is a chain
of nodes, a plain decoding step is a single node, a Medusa step is a tree. One forward and one mask serve all three.

Parameters have Hugging Face's names (without "model." in front), so a checkpoint is copied by name, as it is.
loading/ finds the files and checks what is in them; fast/ replaces modules by faster or smaller ones, int8 for example.

Shapes: B rows, T new tokens, S cache slots, W window (the first W slots, all that attention reads), H hidden size,
        V vocabulary size, A attention heads, G key/value heads, D head_dim, L layers, P length of a path through the
        tree; B S: both in one dimension
"""
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loading import checkpoint
from loading.config import check_config, read_config
from loading.trees import DEEPEST


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that define a Llama, with HF's defaults. loading/config.py reads and checks them."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32               # from_dict: num_attention_heads where a file has none
    head_dim: int = 128                         # from_dict: hidden_size / num_attention_heads where a file has none
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None            # None, or rope_type "linear", "llama3", "yarn", "dynamic", its numbers
    sliding_window: int | None = None           # Mistral's: from_dict ends the context with it
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"                      # of the checkpoint
    bos_token_id: int | None = 1
    eos_token_ids: tuple = (2,)

    @classmethod
    def from_dict(cls, data: dict, context: int | None = None) -> "LlamaConfig":
        """From a config.json's contents, old spelling or new; context None: its own. UserError: not that of a Llama."""
        return cls(**check_config(data, asdict(cls()), context))

    @classmethod
    def from_pretrained(cls, name_or_path, revision=None) -> "LlamaConfig":
        """From a model's folder or hub id. UserError: see `from_dict`, or no such file."""
        return cls.from_dict(read_config(name_or_path, revision))

# ---------------------------------------------------------------------------------------------- rotary embeddings
# The next two functions are mostly about contexts longer than the original's; decoding goes on at `rotary_table`.
def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per position for each pair of dimensions: [D/2]."""
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequency = 1.0 / config.rope_theta ** exponent
    scaling = config.rope_scaling or {}                     # "dynamic" changes nothing within the original context
    if scaling.get("rope_type") == "linear":
        return frequency / scaling["factor"]
    if scaling.get("rope_type") == "llama3":                # slow down pairs with few turns in the original context
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * frequency / scaling["factor"] + keep * frequency
    if scaling.get("rope_type") == "yarn":
        slow, keep = 1.0 / (scaling["factor"] * config.rope_theta ** exponent), yarn_ramp(config)
        return slow * (1 - keep) + frequency * keep
    return frequency

def yarn_ramp(config: LlamaConfig) -> Tensor:
    """As in Llama 3, pairs with many turns keep their frequency (1), those with few are slowed down (0), but between
    them the ramp is one of dimensions: [D/2]. arXiv 2309.00071"""
    scaling, size = config.rope_scaling, config.head_dim
    def dimension(turns):                                   # that makes so many turns in the original context
        wavelength = scaling["original_max_position_embeddings"] / turns
        return size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))
    first, last = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    ramp = (torch.arange(size // 2) - first) / (last - first or 0.001)
    return 1 - ramp.clamp(0, 1)

def rotary_table(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's D/2 angles, twice over: [positions, D] each; the first half of sin negated. Both
    are multiplied by YaRN's attention factor."""
    positions = torch.arange(config.max_position_embeddings + DEEPEST)      # room for a tree at the very end
    angle = positions[:, None] * rotary_frequencies(config)
    factor = (config.rope_scaling or {}).get("attention_factor", 1.0)
    cos, sin = factor * angle.cos(), factor * angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of x [B, T, heads, D] by its position; cos and sin [B, T, 1, D] of `rotary_table`.

    Dimensions i and i + D/2 form a pair (a, b), which becomes (a cos - b sin, b cos + a sin).
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)                                     # (b, a)
    return torch.addcmul(x * cos, swapped, sin)

# ----------------------------------------------------------------------------------------------- cache and mask
def new_cache(config: LlamaConfig, rows: int, slots: int, like: Tensor) -> Tensor:
    """Keys and values of all layers in one tensor: [L, B, S, 2, G, D], in the dtype and on the device of `like`.

    Zeros rather than empty memory: a masked weight of 0 times a stale NaN is still NaN.
    """
    return like.new_zeros(config.num_hidden_layers, rows, slots, 2, config.num_key_value_heads, config.head_dim)

def keep_path(cache: Tensor, length: Tensor, path: Tensor) -> None:
    """Move the nodes of a path to the end of the prefix: slot length + path[j] to slot length + j, in place.

    length [B], path [B, P]: node path[b, j] has depth j and its key was rotated by length + j, so it fits there; j = 0
    is the root, node 0, which is in its place. All is read before anything is written.
    """
    if path.shape[1] == 1:
        return
    row = torch.arange(len(path), device=path.device)[:, None]
    step = torch.arange(1, path.shape[1], device=path.device)
    cache[:, row, length[:, None] + step] = cache[:, row, length[:, None] + path[:, 1:]]

def attention_mask(length: Tensor, ancestors: Tensor, window: int) -> Tensor:
    """Which slots each new token sees: bool [B, T, W].

    The new tokens of row b are in slots length[b] .. length[b] + T - 1. A token sees the committed slots, those below
    length[b], and its ancestors among the new tokens: ancestors [T, T], where every token is its own ancestor.
    """
    slot = torch.arange(window, device=length.device)
    node = slot - length[:, None]                                                   # [B, W], negative: committed
    is_new = (node >= 0) & (node < len(ancestors))
    is_ancestor = ancestors[:, node.clamp(0, len(ancestors) - 1)]                   # [T, B, W], by token and slot
    sees = (node < 0) | is_new & is_ancestor
    return sees.transpose(0, 1)

class CacheView(NamedTuple):
    """What one forward writes and reads of a cache: for each layer views of the same memory."""
    cache: tuple       # of [B S, 2 G, D]: the rows of S slots one behind the other
    slots: Tensor      # [B T] where in it the keys and values of the new tokens go
    keys: tuple        # of [B, G, W, D]: the window that attention reads
    values: tuple      # of [B, G, W, D]
    mask: Tensor       # [B, 1, T, W] added to the scores of all heads: 0 where `attention_mask` is True, else -inf

    @classmethod
    def new(cls, cache: Tensor, length: Tensor, ancestors: Tensor, window: int) -> "CacheView":
        """For new tokens after each row's `length` [B] committed slots: see `attention_mask`."""
        layers, rows, slots = cache.shape[:3]
        first = torch.arange(rows, device=length.device) * slots + length
        new_slots = first[:, None] + torch.arange(len(ancestors), device=length.device)
        keys, values = cache[:, :, :window].permute(3, 0, 1, 4, 2, 5)               # [L, B, G, W, D] each
        sees = attention_mask(length, ancestors, window)
        mask = cache.new_zeros(sees.shape).masked_fill_(~sees, -torch.inf)
        cache = cache.view(layers, rows * slots, -1, cache.shape[-1])
        return cls(cache.unbind(), new_slots.flatten(), keys.unbind(), values.unbind(), mask[:, None])

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values [B, T, G, D]; return all in the window: [B, G, W, D] each."""
        new = torch.cat((key, value), dim=2).flatten(0, 1)                          # [B T, 2 G, D]
        self.cache[layer].index_copy_(0, self.slots, new)
        return self.keys[layer], self.values[layer]

# ------------------------------------------------------------------------------------------------------- layers
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, which F.rms_norm computes in at least float32."""
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

class Attention(nn.Module):
    """Self-attention with rotary positions; each key/value head serves A / G query heads."""
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: CacheView | None) -> Tensor:
        by_head = (*x.shape[:2], -1, self.head_dim)
        query = apply_rotary(self.q_proj(x).view(by_head), cos, sin)                # [B, T, A, D]
        key = apply_rotary(self.k_proj(x).view(by_head), cos, sin)                  # [B, T, G, D]
        value = self.v_proj(x).view(by_head)                                        # [B, T, G, D]
        if view is None:                                                            # without a cache: causal
            mask, key, value = None, key.transpose(1, 2), value.transpose(1, 2)     # [B, G, T, D]
        else:
            key, value = view.update(self.layer, key, value)                        # [B, G, W, D]
            mask = view.mask
        query = query.transpose(1, 2)                                               # [B, A, T, D]
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=view is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))                          # [B, T, H]

class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, number: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, number)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: CacheView | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, view)
        return x + self.mlp(self.post_attention_layernorm(x))

# -------------------------------------------------------------------------------------------------------- model
class Llama(nn.Module):
    """The whole model. `forward` returns hidden states; the caller applies `lm_head` to the ones it needs."""
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        embeddings = torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1)     # normal_ is slow on "meta"
        self.embed_tokens = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.fill_rotary_table()

    def tie_weights(self) -> None:
        """Let lm_head share the matrix of embed_tokens, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def fill_rotary_table(self) -> None:
        device = self.norm.weight.device
        if device.type != "meta":                       # there are only shapes there, nothing to compute with
            self.cos, self.sin = (table.to(device) for table in rotary_table(self.config))  # [positions, D] each

    def new_cache(self, rows: int, slots: int) -> Tensor:               # [L, B, S, 2, G, D], see `new_cache`
        return new_cache(self.config, rows, slots, like=self.norm.weight)

    def forward(self, ids: Tensor, position_ids: Tensor | None = None, view: CacheView | None = None) -> Tensor:
        """ids [B, T] → hidden states after the final norm [B, T, H]. Training: ids alone (causal, positions 0 .. T-1).
        Decoding: position_ids [B, T] and a view of the cache."""
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = self.embed_tokens(ids)                                             # [B, T, H]
        cos = self.cos[position_ids].to(hidden.dtype)[:, :, None]                   # [B, T, 1, D]
        sin = self.sin[position_ids].to(hidden.dtype)[:, :, None]
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, view)
        return self.norm(hidden)

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, name_or_path, dtype=None, device="cpu", revision=None, context=None) -> "Llama":
        """Load a local folder or a hub id in HF's layout: config.json and safetensors (or .bin) files. dtype None:
        float32 on a CPU, else the checkpoint's; context None: the config's. Never more in memory than the model and a
        few rows. UserError: a file is missing, damaged or not a Llama's, or a tensor has another name, shape, type."""
        files = checkpoint.find(name_or_path, revision)
        config = LlamaConfig.from_dict(files.config, context)
        with torch.device("meta"):                  # shapes only: no memory, no random initialisation
            model = cls(config)
        model.to(dtype or checkpoint.default_dtype(config.dtype, device))
        files.check(dict(model.named_parameters()))     # a tensor for every one, of its shape, and no other
        model.to_empty(device=device)               # which unties tied weights
        model.tie_weights()
        model.fill_rotary_table()
        parameters = dict(model.named_parameters())
        for name, rows, values in files.read(parameters):
            parameters[name][rows].copy_(values)
        return model.eval()

    def save(self, folder, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors as HF does, in `dtype` or as they are; transformers loads them."""
        checkpoint.save(folder, asdict(self.config), dict(self.named_parameters()), dtype)
