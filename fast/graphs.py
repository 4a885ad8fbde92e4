"""The step as a CUDA graph: its hundreds of small kernels are recorded once and started with a single call."""
import torch
from tinymedusa import Decoder, State, call

WINDOW = 256        # attention's window grows in these steps: each size is recorded once

def recorded(function):
    """What replays the kernels that `function` starts, on the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay

class GraphDecoder(Decoder):
    """Decoder for one GPU whose step is replayed, unless its stages are watched or top-p looks at numbers on the way.
    The state lives in the same memory from step to step."""
    @torch.inference_mode()
    def step(self, state: State, window: int, run):
        if run is not call or self.sampling.top_p < 1:
            return super().step(state, window, run)
        if state is not getattr(self, "state", None):
            self.state, self.replays = State(state.cache, *(tensor.clone() for tensor in state[1:])), {}
        if window not in self.replays:
            self.replays[window] = self.record(window)
        self.replays[window]()
        return self.state, self.out, self.count

    def record(self, window: int):
        """The step that reads self.state and writes it, self.out and self.count."""
        _, out, count = super().step(self.state, window, call)  # allocates; what it writes, the replay writes again
        self.out, self.count = out.clone(), count.clone()
        def step():
            state, out, count = super(GraphDecoder, self).step(self.state, window, call)
            for into, value in zip((*self.state[1:], self.out, self.count), (*state[1:], out, count), strict=True):
                into.copy_(value)
        return recorded(step)

    def window(self, used: int, cache) -> int:
        return min(-(-used // WINDOW) * WINDOW, cache.shape[2])
