"""Prompt lookup: drafts without heads and without training, the continuation of the longest earlier match in the text.

(As prompt_lookup_num_tokens in transformers; A. Saxena, 2023.) The text itself is kept in the cache, as one more layer
whose "keys" are the ids: accepted paths are moved there, rows replaced, earlier turns kept, as for any other layer.
"""
import torch
from torch import Tensor
from loading.trees import DEEPEST
from tinymedusa import Decoder, Sampling, State, Tree

LONGEST = 8         # tokens that a match may have

class Lookup:
    """In the place of heads: one guess for each depth, whatever the noise."""
    kind, recent, draft_size = "lookup", 1, 1
    chain = [[0] * depth for depth in range(1, 5)]      # the default tree

    def __len__(self) -> int:
        return DEEPEST

    def draft(self, tree: Tree, state: State, noise: Tensor | None, sampling: Sampling) -> Tensor:
        """What followed the last place where the longest end of the text stood before: [B, N - 1]."""
        text = read_ids(state.cache).scatter(1, state.length[:, None], state.token[:, None])        # [B, S]
        end, slot = state.length[:, None], torch.arange(text.shape[1], device=text.device)          # [B, 1], [S]
        matched = alive = (slot < end).long()                                                       # [B, S]
        for back in range(LONGEST):
            last = text.gather(1, (end - back).clamp(min=0))                                        # [B, 1]
            alive = alive * (text.roll(back, dims=1) == last) * (slot >= back)
            matched = matched + alive
        match = (matched * text.shape[1] + slot).masked_fill(slot >= end, -1).argmax(1, keepdim=True)
        period = (end - match).clamp(min=1)             # past the end of the text: the same again
        return text.gather(1, match + 1 + (tree.depth[1:] - 1) % period)

def read_ids(cache: Tensor) -> Tensor:
    """The ids in the last layer of a cache, a byte in each number, exact in 16 bits: [B, S]."""
    low, high = cache[-1, :, :, :, 0, :2].long().unbind(dim=2)                                      # [B, S, 2] each
    return low[..., 0] + 256 * low[..., 1] + 65536 * high[..., 0]

class LookupDecoder(Decoder):
    """A decoder that writes the ids of all that it reads into the cache."""
    def new_cache(self, prompts: list, max_new_tokens: int) -> Tensor:
        cache = super().new_cache(prompts, max_new_tokens)
        return torch.cat((cache, torch.zeros_like(cache[:1])))

    def forward(self, ids, depth, ancestors, cache: Tensor, length: Tensor, window: int) -> Tensor:
        row = torch.arange(len(ids), device=ids.device)[:, None]
        slot = length[:, None] + torch.arange(ids.shape[1], device=ids.device)
        bytes_of = torch.stack((ids % 256, ids // 256 % 256, ids // 65536, ids // 65536), dim=-1)   # [B, T, 4]
        cache[-1, row, slot, :, 0, :2] = bytes_of.unflatten(-1, (2, 2)).to(cache.dtype)
        return super().forward(ids, depth, ancestors, cache, length, window)
