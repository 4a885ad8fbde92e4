"""Which engine runs a model: plain torch, or with --fast the C++ step on a CPU and CUDA graphs on a GPU."""
import sys
import torch
from torch import nn
from fast import int8
from fast.build import Unavailable
from fast.graphs import GraphDecoder, GraphLookupDecoder, GraphPlainDecoder
from fast.native import NativeDecoder, NativeLlama, NativeLookupDecoder
from llama import Llama
from tinymedusa import GREEDY, ROOT, Decoder, PlainDecoder, Sampling, Tree, call
from variants.lookup import Lookup, LookupDecoder

def load(name_or_path, dtype=None, device="cpu", revision=None, quantize=None, fast=False, context=None) -> nn.Module:
    """The model of a folder or hub id, for the engine that is to run it. Where the fast one can't be had, a line on
    stderr says why, and torch's is loaded. UserError: see Llama.from_pretrained."""
    if fast and torch.device(device).type == "cpu":
        try:
            return NativeLlama.from_pretrained(name_or_path, dtype, revision, bool(quantize), context)
        except Unavailable as reason:
            print(f"--fast: {reason}; going on in plain torch", file=sys.stderr)
    read = int8.load if quantize else Llama.from_pretrained
    model = read(name_or_path, dtype, device, revision, context)
    model.graphs = fast and torch.device(device).type == "cuda"
    return model

def decoder(model, heads=None, tree: Tree = ROOT, sampling: Sampling = GREEDY, eos=None, run=call) -> Decoder:
    """The decoder that belongs to the model; without heads it decodes plainly."""
    lookup = isinstance(heads, Lookup)
    if isinstance(model, NativeLlama):
        kind = NativeLookupDecoder if lookup else NativeDecoder
        return kind(model, heads, tree, sampling, eos, run)
    graphs = getattr(model, "graphs", False)
    if heads is None:
        return (GraphPlainDecoder if graphs else PlainDecoder)(model, sampling, eos, run)
    kinds = (GraphLookupDecoder, GraphDecoder) if graphs else (LookupDecoder, Decoder)
    return kinds[not lookup](model, heads, tree, sampling, eos, run)

def set_threads(model, threads: int) -> None:
    """The CPU threads that the model's engine uses."""
    if isinstance(model, NativeLlama):
        model.set_threads(threads)
    torch.set_num_threads(threads)

def mode(model) -> str:
    """What a tree is tuned for: "cpu", "cpu fast", "cuda", .."""
    fast = isinstance(model, NativeLlama) or getattr(model, "graphs", False)
    return model.norm.weight.device.type + (" fast" if fast else "")
