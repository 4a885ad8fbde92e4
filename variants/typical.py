"""Typical acceptance, the paper's lossy rule (section 2.3.1): `decoder.accept = Typical(epsilon, delta)`."""
import math
from typing import NamedTuple
import torch
from torch import Tensor
from tinymedusa import Sampling, Tree, accept, warp

class Typical(NamedTuple):
    """A draft stays where its probability exceeds min(epsilon, delta exp(-entropy)); nothing is drawn, as in the
    official code. What Medusa writes then is not what sampling would write. At temperature 0: plain acceptance."""
    epsilon: float = 0.09
    delta: float = 0.3

    def __call__(self, tree: Tree, ids: Tensor, logits: Tensor, noise: Tensor | None, sampling: Sampling):
        """As tinymedusa.accept: the most likely of the longest acceptable paths; drafts, then the choice at its end."""
        if sampling.temperature == 0:
            return accept(tree, ids, logits, noise, sampling)
        log_probs = warp(logits.double(), sampling).log_softmax(dim=-1)                             # [B, N, V]
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(dim=-1)
        least = (math.log(self.delta) - entropy).clamp(max=math.log(self.epsilon))                  # [B, N]
        drafted = log_probs[:, tree.parent].gather(2, ids[..., None])[..., 0]                       # [B, N]
        confirmed = drafted > least[:, tree.parent]
        confirmed[:, 0] = True
        alive = (confirmed[:, None] | ~tree.ancestors).all(dim=-1)                                  # [B, N]
        likely = drafted.clamp(min=-1e4)
        likely[:, 0] = 0                                                                            # the root is given
        likelihood = likely @ tree.ancestors.t().to(likely.dtype)                                   # of a node's path
        merit = tree.depth + 1 / (1 - likelihood)               # below 1 more for every path: the depth comes first
        last = merit.masked_fill(~alive, -1).argmax(dim=-1)
        path, count = tree.retrieve[last], tree.depth[last] + 1
        choice = logits.argmax(dim=-1).gather(1, path)                                              # [B, P]
        drafts = torch.cat((ids.gather(1, path)[:, 1:], choice[:, -1:]), dim=1)
        inner = torch.arange(path.shape[1], device=path.device) < tree.depth[last][:, None]
        return path, torch.where(inner, drafts, choice), count
