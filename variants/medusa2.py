"""Medusa-2 (section 2.2.2): after the heads, base model and heads learn together, the base held to its old self."""
import copy
import torch
import torch.nn.functional as F
from torch import Tensor
from llama import Llama

def kl_losses(model: Llama, hidden: Tensor, labels: Tensor, original: Llama, before: Tensor):
    """KL(original || now) at the places with a label, summed, chunk by chunk: hidden, before [T, H], labels [T]."""
    places = (labels >= 0).nonzero()[:, 0]
    for at in places.split(max(1, 2 ** 22 // model.config.vocab_size)):
        logits = model.lm_head(hidden[at]).float()
        with torch.no_grad():
            teacher = original.lm_head(before[at]).float().log_softmax(-1)
        yield F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")

class Joint:
    """train_heads.backward for base model and heads together; `head_backward` adds the heads' own gradients."""
    def __init__(self, model: Llama, head_backward):
        self.original, self.head_backward = copy.deepcopy(model), head_backward

    def __call__(self, model: Llama, heads, batch, weights: Tensor, base_weight: float, args, ranked: bool) -> Tensor:
        autocast = lambda: torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=args.bf16)
        with autocast():
            hidden = model(batch.ids)                                                               # [B, T, H]
        # a leaf of its own: chunks add up in its gradient, then the base model is walked back once
        leaf = hidden.detach().to(weights.dtype).requires_grad_()
        with autocast():
            with torch.no_grad():
                before = self.original(batch.ids).flatten(0, 1)
            for loss in kl_losses(model, leaf.flatten(0, 1), batch.next, self.original, before):
                (base_weight * loss).backward()
            sums = self.head_backward(model, heads, batch, leaf, weights, args, ranked)
        hidden.backward(leaf.grad.to(hidden.dtype))
        return sums
