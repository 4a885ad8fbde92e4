"""The step as a CUDA graph: its hundreds of small kernels are recorded once and started with a single call."""
import weakref
from dataclasses import replace
import torch
from torch import Tensor
from llama import new_cache
from tinymedusa import Decoder, PlainDecoder, State, call
from variants.lookup import LookupDecoder

WINDOW = 256        # attention's window grows in these steps, as do caches: each size is recorded once
PARTS = "model", "heads", "tree", "sampling", "eos", "draft", "verify", "logits", "accept", "commit"    # of a step

def recorded(function, device):
    """What replays the kernels that `function` starts, on the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        function()
    return graph.replay

class GraphDecoder(Decoder):
    """Decoder for one GPU whose step is replayed, unless its stages are watched or top-p looks at numbers on the way.

    A graph reads and writes the memory that it was recorded on: `memory` is that state. A generation that begins when
    the last one is over gets its cache again, and so its graphs.
    """
    memory, cache, lent = None, None, staticmethod(lambda: None)

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        if name in PARTS:                               # what was recorded has another one
            self.memory = None

    @torch.inference_mode()
    def step(self, state: State, window: int, run):
        if run is not call or self.sampling.top_p < 1:
            return super().step(state, window, run)
        ours = self.memory and all(a is b for a, b in zip(state[1:], self.memory[1:], strict=True))
        if not ours:                                    # not the one that we returned last
            self.take(state)
        if window not in self.replays:
            self.replays[window] = self.record(window)
        self.replays[window]()
        return State(state.cache, *self.memory[1:]), self.out, self.count

    def take(self, state: State) -> None:
        """Go on from another state: in the same memory if it has the same cache."""
        mine, theirs = self.memory and self.memory.cache, state.cache
        if mine is not None and (mine.data_ptr(), mine.shape) == (theirs.data_ptr(), theirs.shape):
            values = [tensor.clone() for tensor in state[1:]]                   # some may be ours
            for into, value in zip(self.memory[1:], values, strict=True):
                into.copy_(value)
        else:
            self.memory, self.replays = None, {}
            if self.cache is not None and self.cache.data_ptr() != theirs.data_ptr():
                self.cache = None                       # it will not be asked for again
            self.out = state.token.new_zeros(len(state.token), self.tree.retrieve.shape[1])
            self.count = torch.zeros_like(state.token)
            self.memory = State(theirs.detach(), *(tensor.clone() for tensor in state[1:]))

    def record(self, window: int):
        """The step that reads self.memory and writes it, self.out and self.count."""
        ours = *self.memory[1:], self.out, self.count
        def step():
            state, out, count = super(GraphDecoder, self).step(self.memory, window, call)
            for into, value in zip(ours, (*state[1:], out, count), strict=True):
                into.copy_(value)
        super().step(self.memory, window, call)         # allocates; what it writes, the replay writes again
        return recorded(step, self.device)

    def window(self, used: int, cache: Tensor) -> int:
        return min(-(-used // WINDOW) * WINDOW, cache.shape[2])

    @torch.inference_mode()
    def new_cache(self, prompts: list, max_new_tokens: int) -> Tensor:
        """The last one again, if it has the size and nobody holds it any longer."""
        config, longest = self.model.config, max(map(len, prompts)) + max_new_tokens
        slots = min(-(-longest // WINDOW) * WINDOW, config.max_position_embeddings) + len(self.tree.paths)
        size = config.num_hidden_layers + isinstance(self, LookupDecoder), len(prompts), slots      # it keeps the text
        if self.cache is None or self.cache.shape[:3] != size or self.lent() is not None:
            self.memory, self.cache, self.replays = None, None, {}              # there may be no room for both
            self.cache = new_cache(replace(config, num_hidden_layers=size[0]), *size[1:], like=self.model.norm.weight)
        cache = self.cache.zero_().detach()
        self.lent = weakref.ref(cache)
        return cache

class GraphPlainDecoder(GraphDecoder, PlainDecoder):
    """Plain decoding by graphs."""

class GraphLookupDecoder(LookupDecoder, GraphDecoder):
    """Prompt lookup by graphs."""
