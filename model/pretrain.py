"""Pretrains the embedded checkpoint: TinyLLama-v0's architecture, from scratch, on TinyStories. See model/README.md.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 model/pretrain.py --train stories.txt --valid held-out.txt

One thread a process: at this size two processes with a thread each are faster than one with two threads. A row is one
whole story, `<s> story </s>`; rows of like length share a batch. The checkpoint resumes exactly: the order of the data
is a function of seed and epoch, and nothing else is random. The learning rate is constant after the warm-up, then falls
linearly over the last --decay steps, so that a run can be lengthened or brought to its end from any checkpoint.
"""
import argparse
import ctypes
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent), str(ROOT)]
import attention  # noqa: E402

import llama  # noqa: E402
from loading.files import write_atomic  # noqa: E402
from train_heads import length_batches  # noqa: E402

attention.install()     # torch's own kernel at head_dim 4 takes two thirds of a training step
# glibc gives large blocks back to the kernel and faults them in again at every step: 1.2 times the time. Keep them.
for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    ctypes.CDLL(None).mallopt(option, value)
CONFIG = llama.LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=256, num_hidden_layers=8,
                           num_attention_heads=16, num_key_value_heads=16, head_dim=4, max_position_embeddings=2048)
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def load_stories(path: str, tokenizer: Tokenizer) -> tuple[list[list[int]], int]:
    """Stories as ids with bos and eos, and the text's length in bytes."""
    texts = [t.strip() for t in Path(path).read_text(encoding="utf-8").split("<|endoftext|>") if t.strip()]
    return [e.ids + [2] for e in tokenizer.encode_batch(texts)], sum(len(t.encode()) for t in texts)


class CrossEntropySum(torch.autograd.Function):
    """Sum of F.cross_entropy(hidden @ weight.T, labels), gradients included, with one chunk's logits in memory."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):                                                   # [T, H], [V, H], [T]
        d_hidden, d_weight, total = torch.empty_like(hidden), torch.zeros_like(weight), 0.0
        for h, label, d in zip(hidden.split(256), labels.split(256), d_hidden.split(256), strict=True):
            logits = h @ weight.t()
            norm = logits.logsumexp(-1, keepdim=True)
            total = total + (norm - logits.gather(1, label[:, None])).sum()
            logits.sub_(norm).exp_().scatter_add_(1, label[:, None], logits.new_full((len(label), 1), -1))
            torch.mm(logits, weight, out=d)
            d_weight.addmm_(logits.t(), h)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None


def loss_sum(model, body, rows: list) -> torch.Tensor:
    """Sum of the nats of all tokens after bos; padding counts nothing. `body` is the model, compiled or not."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    real = torch.arange(1, width) < torch.tensor([len(r) for r in rows])[:, None]
    return CrossEntropySum.apply(body(ids[:, :-1])[real], model.lm_head.weight, ids[:, 1:][real])


@torch.no_grad()
def evaluate(model, stories: list, size: int) -> dict:
    """Held-out loss, each process's rows summed over all; eos counts among the tokens, not among the `size` bytes."""
    rows = sorted(stories, key=len)[RANK::WORLD]
    total = sum(loss_sum(model, model, rows[i:i + 16]).double() for i in range(0, len(rows), 16))
    if WORLD > 1:
        dist.all_reduce(total)
    tokens = sum(len(s) - 1 for s in stories)
    return {"valid_loss": total.item() / tokens, "valid_bits_per_byte": total.item() / math.log(2) / size}


def initialise(model):
    """Small embeddings, matrices that keep the scale, and layers that start as the identity."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 if "embed" in name or "lm_head" in name else 0.5 * p.shape[1] ** -0.5
            p.data.normal_(0, 0 if "o_proj" in name or "down_proj" in name else std)


def make_optimizers(model, args) -> list:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    inside = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in inside]
    return [torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="original"),
            torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)]


def sum_gradients(model, loss: torch.Tensor) -> float:
    """Adds up gradients and loss over the processes, clips the gradient at norm 1, returns the loss."""
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients] + [loss.detach()[None]])
    if WORLD > 1:
        dist.all_reduce(flat)
    flat[:-1] *= (1 / flat[:-1].norm()).clamp(max=1)
    parts = flat[:-1].split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
    return flat[-1].item()


def data_from(stories: list, tokens: int, step: int):
    """(epoch, stories of the step) from `step` on, without end; the order is a function of the epoch alone."""
    epoch, first = 0, 0
    while True:
        groups = [g for g in length_batches(stories, tokens, seed=epoch) if len(g) >= WORLD]     # a share for each
        for i, group in enumerate(groups):
            if first + i >= step:
                yield epoch, group
        epoch, first = epoch + 1, first + len(groups)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--out", default=str(ROOT / "pretrained"), help="checkpoint, log and the model at the end")
    parser.add_argument("--steps", type=int, default=8800)
    parser.add_argument("--decay", type=int, default=5000, help="of these, the last with a falling learning rate")
    parser.add_argument("--tokens", type=int, default=8192, help="a step, padding included, over all processes")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's, for the matrices inside the layers")
    parser.add_argument("--adam-lr", type=float, default=0.004, help="AdamW's, for embeddings, lm_head and norms")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--save-every", type=int, default=250)
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(1)
    if WORLD > 1:
        dist.init_process_group("gloo")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(ROOT / "tokenizer.json"))
    train, _ = load_stories(args.train, tokenizer)
    valid, valid_bytes = load_stories(args.valid, tokenizer)
    sample = valid[:200], sum(len(tokenizer.decode(s).encode()) for s in valid[:200])

    model = llama.Llama(CONFIG)
    initialise(model)
    body, optimizers, step, seconds = torch.compile(model, dynamic=True), make_optimizers(model, args), 0, 0.0
    checkpoint, peaks, data = out / "checkpoint.pt", (args.lr, args.adam_lr), [args.tokens, WORLD, len(train)]
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["data"] != data:
            sys.exit(f"{checkpoint} is of another run (tokens a step, processes, stories: {saved['data']}, now {data})")
        model.load_state_dict(saved["model"])
        for o, state in zip(optimizers, saved["optimizers"], strict=True):
            o.load_state_dict(state)
        step, seconds = saved["step"], saved["seconds"]

    bar = tqdm(total=args.steps, initial=step, disable=RANK > 0, smoothing=0.02)
    since, seen, losses = time.perf_counter(), 0, []
    for epoch, rows in data_from(train, args.tokens, step):
        if step >= args.steps:
            break
        count = sum(len(r) - 1 for r in rows)
        loss = loss_sum(model, body, rows[RANK::WORLD]) / count
        loss.backward()
        losses.append(sum_gradients(model, loss))
        scale = min(1, (step + 1) / 200, (args.steps - step) / max(args.decay, 1))
        for o, peak in zip(optimizers, peaks, strict=True):
            o.param_groups[0]["lr"] = peak * scale
            o.step()
            o.zero_grad()
        step, seen = step + 1, seen + count
        bar.update()
        if step % args.save_every == 0 or step == args.steps:
            took = time.perf_counter() - since
            seconds += took
            line = {"step": step, "epoch": epoch, "loss": sum(losses) / len(losses), "tokens_per_second": seen / took,
                    "seconds": seconds, "lr": args.lr * scale,
                    **evaluate(model, *((valid, valid_bytes) if step == args.steps else sample))}
            since, seen, losses = time.perf_counter(), 0, []
            if RANK == 0:
                bar.set_postfix(loss=f"{line['loss']:.3f}", valid=f"{line['valid_bits_per_byte']:.4f}")
                state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                         "step": step, "seconds": seconds, "data": data}
                write_atomic(checkpoint, lambda path, state=state: torch.save(state, path))
                with (out / "log.jsonl").open("a") as log:
                    print(json.dumps({k: round(v, 5) for k, v in line.items()}), file=log)
    if RANK == 0:
        model.save(out, torch.bfloat16)


if __name__ == "__main__":
    main()
