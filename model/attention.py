"""Causal attention for head_dim 4 on CPU (attention.cpp), usable under torch.compile(fullgraph=True).

causal_attention(q, k, v) equals F.scaled_dot_product_attention(q, k, v, is_causal=True)
for float32 [B, heads, T, 4]; `install()` lets every Llama that is built from then on train with it. The first import
compiles the extension (about half a minute, then cached); it needs g++, ninja and AVX-512. `python model/attention.py`
with 16 heads, B=16, T=256, one thread, 2 cores of an AMD EPYC (Zen 4): 2.8 ms forward and 7.3 ms backward, torch's
kernel 36 and 94. `python model/attention.py train_heads.py ARGUMENTS` (or torchrun) runs a script of the project with
it.
"""
import runpy
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import llama  # noqa: E402

load(name="tiny_attention", sources=[str(Path(__file__).with_name("attention.cpp"))], is_python_module=False,
     extra_cflags=["-O3", "-march=native", "-mprefer-vector-width=512"])
_ops = torch.ops.tiny_attention


def _like(q):  # the kernels return transposed views of [B, T, heads, 4]
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@torch.library.register_fake("tiny_attention::forward")
def _(q, k, v):
    return _like(q), q.new_empty(q.shape[0], q.shape[1], 2, q.shape[2])


@torch.library.register_fake("tiny_attention::backward")
def _(dout, q, k, v, out, stats):
    return _like(q), _like(q), _like(q)


torch.library.register_autograd(
    "tiny_attention::forward",
    lambda ctx, dout, dstats: _ops.backward(dout, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


def causal_attention(q, k, v):
    return _ops.forward(q, k, v)[0]


class Attention(llama.Attention):
    """llama.Attention, without a cache by `causal_attention`."""

    def forward(self, x, cos, sin, view):
        if view is not None:
            return super().forward(x, cos, sin, view)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = llama.apply_rotary(q, cos, sin), llama.apply_rotary(k, cos, sin)
        out = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(out.transpose(1, 2).flatten(2))


def install():
    llama.Attention = Attention


def check_and_time():
    """Against torch's own kernel: largest relative difference of output and gradients, and milliseconds."""
    import statistics
    import time

    import torch.nn.functional as F
    torch.set_num_threads(1)
    kernels = {"torch": lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), "ours": causal_attention}
    for rows, length in ((3, 1), (3, 17), (2, 333), (16, 256)):
        q, k, v, d_out = (torch.randn(rows, length, 16, 4).transpose(1, 2).requires_grad_() for _ in range(4))
        results, times = {}, {}
        for name, kernel in kernels.items():
            for _ in range(9):
                begin = time.perf_counter()
                out = kernel(q, k, v)
                middle = time.perf_counter()
                grads = torch.autograd.grad(out, (q, k, v), d_out)
                times.setdefault(name, []).append((middle - begin, time.perf_counter() - middle))
            results[name] = (out, *grads)
        error = max(((a - b).norm() / (a.norm() + 1)).item() for a, b in zip(*results.values(), strict=True))
        forward, backward = ({n: 1000 * statistics.median(t[i] for t in times[n]) for n in times} for i in (0, 1))
        print(f"B={rows} T={length}: difference {error:.1e}, forward {forward['ours']:.2f} ms (torch "
              f"{forward['torch']:.2f}), backward {backward['ours']:.2f} ms (torch {backward['torch']:.2f})")
        assert error < 1e-5


def run_script(arguments):
    """Runs a script of the project, its training attention replaced by this one."""
    install()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    run_script(sys.argv[1:]) if sys.argv[1:] else check_and_time()
