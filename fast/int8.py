"""Weights in 8 bits, a scale for each output: `quantize(model)`, or `load` straight from the files in little memory."""
from itertools import groupby
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from llama import Llama, LlamaConfig
from loading import checkpoint

class Int8Linear(nn.Module):
    """An nn.Linear in 8 bits: only the weights are rounded, what they are multiplied with keeps its dtype."""
    def __init__(self, linear: nn.Linear):
        """Each weight becomes the nearest of 255 values symmetric about 0, the largest of a row being the last."""
        super().__init__()
        weight = linear.weight.detach()                                                 # [O, I]
        scale = weight.new_empty(len(weight))
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for part, by, into in zip(weight.split(256), scale.split(256), values.split(256), strict=True):
            by.copy_((part.abs().amax(dim=1).float() / 127).clamp(min=1e-12))
            into.copy_((part.float() / by.float()[:, None]).round_().clamp_(-127, 127))
        self.register_buffer("values", values)                                          # [O, I] int8
        self.register_buffer("scale", scale)                                            # [O]
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The rounded weights in the scale's dtype: [O, I]."""
        return self.values * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.values.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias

def quantize(module: nn.Module) -> None:
    """Replace every nn.Linear inside by an Int8Linear, one after the other, so that the memory stays bounded."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize(child)

@torch.no_grad()
def load(name_or_path, dtype=None, device="cpu", revision=None, context=None) -> Llama:
    """As Llama.from_pretrained, then `quantize`; never more in memory than the result and one matrix in `dtype`."""
    files = checkpoint.find(name_or_path, revision)
    config = LlamaConfig.from_dict(files.config, context)
    with torch.device("meta"):
        model = Llama(config)
    model.to(dtype or checkpoint.default_dtype(config.dtype, device))
    parameters = dict(model.named_parameters())
    files.check(parameters)
    for owner, pieces in groupby(files.read(parameters), key=lambda piece: piece[0].rpartition(".")[0]):
        part = model.get_submodule(owner).to_empty(device=device)
        for name, rows, values in pieces:
            model.get_parameter(name)[rows].copy_(values)
        if isinstance(part, nn.Linear):
            model.set_submodule(owner, Int8Linear(part))
    model.tie_weights()
    quantize(model)                     # a tied lm_head, which no file holds
    model.fill_rotary_table()
    return model.eval()
