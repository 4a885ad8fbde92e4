"""Prompt lookup: drafts without heads and without training, the continuation of the longest earlier match in the text.

(As prompt_lookup_num_tokens in transformers; A. Saxena, 2023.) The text itself is kept in the cache, as one more layer
whose numbers are the ids, so that it is there wherever a row of the cache goes.
"""
import torch
from torch import Tensor
from llama import LlamaConfig
from loading.trees import DEEPEST
from tinymedusa import Decoder, Sampling, State, Tree

LONGEST = 8         # tokens that a match may have

class Lookup:
    """In the place of heads: one guess for each depth, whatever the noise."""
    kind, recent, draft_size = "lookup", 1, 1
    chain = [[0] * depth for depth in range(1, 5)]      # the default tree

    def __init__(self, config: LlamaConfig):
        self.config = config

    def __len__(self) -> int:
        return DEEPEST

    def draft(self, tree: Tree, state: State, noise: Tensor | None, sampling: Sampling) -> Tensor:
        """What followed the last place where the longest end of the text stood before: [B, N - 1]."""
        text = read_ids(ids_layer(state.cache, self.config))                                        # [B, S]
        text = text.scatter(1, state.length[:, None], state.token[:, None])
        end, slot = state.length[:, None], torch.arange(text.shape[1], device=text.device)          # [B, 1], [S]
        matched = alive = (slot < end).long()                                                       # [B, S]
        for back in range(LONGEST):
            last = text.gather(1, (end - back).clamp(min=0))                                        # [B, 1]
            alive = alive * (text.roll(back, dims=1) == last) * (slot >= back)
            matched = matched + alive
        match = (matched * text.shape[1] + slot).masked_fill(slot >= end, -1).argmax(1, keepdim=True)
        period = (end - match).clamp(min=1)             # past the end of the text: the same again
        return text.gather(1, match + 1 + (tree.depth[1:] - 1) % period)

def ids_layer(cache: Tensor, config: LlamaConfig) -> Tensor:
    """The last layer of a cache by slots, whatever the order of its numbers: [B, S, numbers of a slot]."""
    slot_size = 2 * config.num_key_value_heads * config.head_dim
    return cache[-1].flatten(1).unflatten(1, (-1, slot_size))

def read_ids(layer: Tensor) -> Tensor:
    """The ids in it, a byte in each number, exact in 16 bits: [B, S]."""
    low, middle, high = layer[..., :3].long().unbind(-1)
    return low + 256 * middle + 65536 * high

class LookupDecoder(Decoder):
    """A decoder that writes the ids of all that it commits into the cache."""
    def new_cache(self, prompts: list, max_new_tokens: int) -> Tensor:
        cache = super().new_cache(prompts, max_new_tokens)
        with_text = len(cache) > self.model.config.num_hidden_layers                    # that of fast/graphs.py has it
        return cache if with_text else torch.cat((cache, torch.zeros_like(cache[:1])))

    def write(self, cache: Tensor, row, slot: Tensor, ids: Tensor) -> None:
        """Token ids [B, T] into the slots [B, T] of rows."""
        layer = ids_layer(cache, self.model.config)
        layer[row, slot, :3] = torch.stack((ids % 256, ids // 256 % 256, ids // 65536), dim=-1).to(cache.dtype)

    def prefill(self, prompts: list, cache: Tensor, recent: int, kept: int = 0) -> tuple[Tensor, Tensor]:
        for row, prompt in enumerate(prompts):
            ids = torch.tensor(prompt, device=cache.device)
            self.write(cache, row, torch.arange(len(prompt), device=cache.device), ids)
        return super().prefill(prompts, cache, recent, kept)

    def commit(self, state: State, hidden: Tensor, path: Tensor, out: Tensor, count: Tensor):
        ids = torch.cat((state.token[:, None], out[:, :-1]), dim=1)             # the path's
        slot = state.length[:, None] + torch.arange(ids.shape[1], device=ids.device)
        done = super().commit(state, hidden, path, out, count)
        self.write(state.cache, torch.arange(len(ids), device=ids.device)[:, None], slot, ids)
        return done
