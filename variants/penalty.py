"""A repetition penalty as in HF (CTRL, arXiv 1909.05858): tokens of the text so far, prompt too, get less likely."""
from typing import NamedTuple
import torch
from torch import Tensor
from llama import Llama
from tinymedusa import Decoder, State, Tree
from variants.lookup import LookupDecoder, ids_layer, read_ids

def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [.., V], of the tokens seen [.., V] divided by the penalty, or times it below 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    changed = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, changed, logits)

class RepetitionPenalty(NamedTuple):
    """In the place of Decoder.logits, of a decoder whose cache holds the text. At a node the text is what was committed
    and the path to the node, so the logits are those of a plain step there."""
    model: Llama
    penalty: float

    def __call__(self, state: State, ids: Tensor, tree: Tree, hidden: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)                                                         # [B, N, V]
        text = read_ids(ids_layer(state.cache, self.model.config))                                  # [B, S]
        committed = torch.arange(text.shape[1], device=text.device) < state.length[:, None]
        text = torch.where(committed, text, ids[:, :1])             # in the slots behind it the root once more
        path = torch.where(tree.ancestors, ids[:, None], ids[:, :, None])                           # [B, N, N]
        before = torch.cat((text[:, None].expand(-1, ids.shape[1], -1), path), dim=2)
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(2, before, True)
        return penalized(logits, seen, self.penalty)

def penalize(decoder: Decoder, penalty: float) -> None:
    """Let a decoder of any engine, plain or with heads, keep its text in the cache and decode with this penalty."""
    if not isinstance(decoder, LookupDecoder):
        decoder.__class__ = type("TextDecoder", (LookupDecoder, type(decoder)), {})
    decoder.logits = RepetitionPenalty(decoder.model, penalty)
