"""Trains Medusa heads for a Llama: Medusa-1 (frozen base) or Medusa-2 of the paper (arXiv 2401.10774, section 2.2).

    python train_heads.py --data data/greedy.bin --out heads                            # the paper's heads
    python train_heads.py --data data/greedy.bin --out heads --kind hydra --width 512 --tie-lm-head --draft-vocab 1024
    python train_heads.py --data data/greedy.bin --out heads --resume                   # after Ctrl-C
    python train_heads.py --data data/held-out.bin --out heads --eval                   # what they are worth
    python train_heads.py --data data/greedy.bin --out new_model --medusa-2             # base and heads together
    torchrun --nproc-per-node 2 train_heads.py --data data/greedy-*.bin --out heads     # the same steps, shared

Head k = 1..K sees the base's hidden state at position t and learns the token at t + 1 + k (the base's own lm_head
already guesses t + 1), where the token file says that it carries loss. Its loss is the mean cross entropy, weighted by
--coefficient times --decay to the power k. A row of a batch is one whole document, so nothing attends across documents,
just as at generation; --pack cuts the stream into rows of equal length instead, as the original did: there a document
sees what stands before it in its row, but no head is asked to guess across a boundary.
Every 50th document is held out. Definitions of what is printed at the end: see `evaluate` and `tinymedusa.walk`.
"""
if __name__ == "__main__":      # Ctrl-C while torch is imported: an end without a traceback, as `command_line`'s later
    import signal
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
import copy
import json
import math
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:     # not on every system
    fcntl = None
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from extras.cli import SEED, ArgumentParser, command_line, device, number
from llama import (DTYPES, Llama, Tokenizer, UserError, at_least_float32, locate, model_name, read_json, write_atomic,
                   write_json)
from prepare_data import HELD_OUT, read_tokens, shard
from tinymedusa import KINDS, MedusaHeads, grow_tree, load_tree, path_hits, set_threads, walk

IGNORE = -100           # cross_entropy's own mark for positions that carry no loss
MISS = 2 ** 30          # the rank of a token that a head can't draft, or of no label
LOGITS = 2 ** 22        # logits in memory at once: positions are taken in chunks of LOGITS / (K D)
HEADS_FIRST = 0.5       # --medusa-2: the share of the steps that trains the heads alone


# ---------------------------------------------------------------------------------------------------------- batches

def length_batches(documents: list, tokens: int, seed: int) -> list[list]:
    """One epoch: lists of documents of like length, `tokens` with their padding, in random order.

    Lengths are jittered, so the batches differ between epochs; a last partial batch is kept.
    """
    g = torch.Generator().manual_seed(seed)
    jitter = (1 + 0.06 * torch.rand(len(documents), generator=g)).tolist()
    groups, group, widest = [], [], 0
    for i in sorted(range(len(documents)), key=lambda i: len(documents[i]) * jitter[i]):
        group.append(documents[i])
        widest = max(widest, len(documents[i]))
        if widest * len(group) >= tokens:
            groups.append(group)
            group, widest = [], 0
    groups += [group] if group else []
    return [groups[i] for i in torch.randperm(len(groups), generator=g).tolist()]


def cut(documents: list, length: int) -> list:
    """Documents → pieces of at most `length` entries."""
    return [d[i:i + length] for d in documents for i in range(0, len(d), length)]


class Batch(NamedTuple):
    """What the heads learn from some rows. Only places where at least one head has a label are kept."""
    ids: Tensor        # [B, T] for the base
    index: Tensor      # [n] the places, in the flattened [B T]
    tokens: Tensor     # [n, K] the ids that follow each place: 1 to K places on
    labels: Tensor     # [K, n] what head k should guess, the id k + 1 places on, or IGNORE
    own: Tensor        # [n] bool: the root (1 place on) and the token behind it carry loss, so a step can begin here
    row: Tensor        # [n] the row of each place
    next: Tensor       # [B T] the id 1 place on if it carries loss, or IGNORE: what the base itself should guess


def make_batch(rows: list, num_heads: int) -> Batch:
    """Rows of entries, padded on the right; labels never cross from one document into the next."""
    width = max(map(len, rows)) + 1 + num_heads                # room for labels beyond the longest row
    stream = torch.from_numpy(np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int64))
    ids, loss, document = stream // 4, stream % 2 == 1, (stream & 2).cumsum(1)              # [B, T + 1 + K]
    length = width - 1 - num_heads
    ahead = lambda t, n: t[:, n:n + length]
    same = lambda n: ahead(loss, n) & (ahead(document, n) == ahead(document, 0))
    labels = torch.stack([ahead(ids, 1 + k).masked_fill(~same(1 + k), IGNORE) for k in range(1, num_heads + 1)])
    index = (labels != IGNORE).any(0).flatten().nonzero()[:, 0]
    tokens = torch.stack([ahead(ids, k) for k in range(1, num_heads + 1)], -1)              # [B, T, K]
    own = same(1) & (labels[0] != IGNORE)
    return Batch(ahead(ids, 0), index, tokens.flatten(0, 1)[index], labels.flatten(1)[:, index],
                 own.flatten()[index], index // length, ahead(ids, 1).masked_fill(~same(1), IGNORE).flatten())


# ------------------------------------------------------------------------------------------------------------- loss

def draft_labels(heads: MedusaHeads, labels: Tensor) -> Tensor:
    """Ids → indices of the draft vocabulary; IGNORE for what the heads can't draft."""
    if heads.token_map is None:
        return labels
    table = torch.full((heads.vocab_size,), IGNORE, device=labels.device)
    table[heads.token_map] = torch.arange(heads.draft_size, device=labels.device)
    return torch.where(labels == IGNORE, IGNORE, table[labels.clamp(min=0)])


def head_results(heads: MedusaHeads, batch: Batch, hidden: Tensor, distill: bool, ranked: bool = True):
    """hidden [B, T, H] → chunk by chunk, each head's summed cross entropy [K] and its label's rank [K, chunk].

    distill: against the base's own distribution where it chooses that token, instead of the token alone. Rank 0 is a
    top-1 hit (of equal logits the lower id comes first), MISS a token that the heads can't draft or no label; not
    ranked: all MISS, a quarter faster. A chunk's logits are freed before the next one's.
    """
    chunk, length = max(1, LOGITS // (heads.num_heads * heads.draft_size)), hidden.shape[1]
    back = torch.arange(heads.recent, device=hidden.device)
    padded, hidden = F.pad(hidden, (0, 0, heads.recent - 1, 0)), hidden.flatten(0, 1)       # zeros in front of a row
    for i in range(0, len(batch.index), chunk):
        at, labels = batch.index[i:i + chunk], draft_labels(heads, batch.labels[:, i:i + chunk])
        recent = padded[(at // length)[:, None], (at % length)[:, None] + back]                     # [chunk, R, H]
        logits = heads.all_logits(recent, batch.tokens[i:i + chunk])                                # [K, chunk, D]
        logits = logits.to(at_least_float32(logits.dtype))
        rank = torch.full_like(labels, MISS)
        if ranked:
            with torch.no_grad():
                place = labels.clamp(min=0)[..., None]
                target, ids = logits.gather(2, place), torch.arange(heads.draft_size, device=labels.device)
                before = ~(logits <= target) | (logits == target) & (ids < place)       # so NaN never is a hit
                rank = before.sum(-1).masked_fill(labels == IGNORE, MISS)
        if distill:
            with torch.no_grad():
                later = at + torch.arange(1, heads.num_heads + 1, device=at.device)[:, None]        # [K, chunk]
                later = later.clamp(max=len(hidden) - 1)             # beyond the row: without a label
                teacher = F.linear(hidden[later], heads.lm_head.to(hidden.dtype)).to(logits).softmax(-1)
            losses = -(teacher * logits.log_softmax(-1)).sum(-1).masked_fill(labels == IGNORE, 0)
        else:
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE,
                                     reduction="none").view(labels.shape)
        yield losses.sum(1), rank


def base_results(model: Llama, hidden: Tensor, batch: Batch, original=None):
    """hidden [B T, H] → chunk by chunk the summed loss of the base's own guesses of `batch.next`.

    original: the (lm_head, hidden) of the base as it was → KL(original || now); None: cross entropy with the text.
    """
    places = (batch.next != IGNORE).nonzero()[:, 0]
    for at in places.split(max(1, LOGITS // model.config.vocab_size)):
        logits = model.lm_head(hidden[at]).float()
        if original is None:
            yield F.cross_entropy(logits, batch.next[at], reduction="sum")
        else:
            lm_head, before = original
            with torch.no_grad():
                teacher = lm_head(before[at]).float().log_softmax(-1)
            yield F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")


# ------------------------------------------------------------------------------------------------- what heads are worth

@torch.no_grad()
def evaluate(model: Llama, heads: MedusaHeads, documents: list, batch_tokens: int):
    """(figures, ranks, own) on some documents; ranks and own: for each document, see `tinymedusa.walk`.

    head_loss: mean cross entropy of each head's drafted tokens, nats. top: for each head, the share of the tokens to
    learn that are among its first 1, 2, .. 10 guesses. base_loss: the base's mean cross entropy, nats a token.
    """
    ranks, owns, losses, base_loss, tokens, labels = [], [], 0.0, 0.0, 0, 0
    for rows in tqdm(length_batches(documents, batch_tokens, 0), desc="evaluating", disable=shard()[0] > 0):
        batch = to_device(make_batch(rows, heads.num_heads), model)
        hidden = model(batch.ids)                                                                   # [B, T, H]
        base_loss += sum(float(loss) for loss in base_results(model, hidden.flatten(0, 1), batch))
        tokens += int((batch.next != IGNORE).sum())
        hidden = hidden.to(next(heads.parameters()).dtype)
        results = [(sums, rank) for sums, rank in head_results(heads, batch, hidden, False)]
        if not results:
            continue
        losses = losses + sum(sums.double() for sums, _ in results)
        labels = labels + (batch.labels != IGNORE).sum(1)
        rank, sizes = torch.cat([r for _, r in results], 1).cpu(), torch.bincount(batch.row.cpu()).tolist()
        ranks += rank.split(sizes, 1)
        owns += batch.own.cpu().split(sizes)
    if not ranks:
        raise UserError("the documents hold nothing for the heads to guess: give longer ones")
    every = torch.cat(ranks, 1)
    rounded = lambda values: [round(v, 4) for v in values.tolist()]
    drafted = (every < MISS).sum(1).clamp(min=1)
    top = torch.stack([(every <= r).sum(1) / labels.cpu().clamp(min=1) for r in range(10)], 1)               # [K, 10]
    return {"documents": len(documents), "head_loss": rounded(losses.cpu() / drafted),
            "top": [rounded(head) for head in top], "base_loss": round(base_loss / max(1, tokens), 4)}, ranks, owns


# --------------------------------------------------------------------------------------------------------- training

def learning_rate(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the full rate: linear warm-up, then a cosine to zero, or constant."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def to_device(batch: Batch, model: Llama) -> Batch:
    return Batch(*(t.to(model.norm.device) for t in batch))


def all_reduce(*tensors: Tensor) -> None:
    """Sums over the processes, in place."""
    if dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t)


def backward(model: Llama, heads: MedusaHeads, batch: Batch, original: Llama | None, weights: Tensor,
             base_weight: float, args, ranked: bool) -> Tensor:
    """Adds a batch's gradients, chunk by chunk → sums over its labels [3, K]: loss and, if ranked, top-1, top-5 hits.

    weights [K] and base_weight belong to one label each: already divided by how many the whole step has everywhere.
    original: the base before it was trained; None: the base is frozen. --bf16 is for what is trained: a frozen base
    runs in its own dtype, as at generation.
    """
    joint = original is not None
    autocast = lambda on: torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=args.bf16 and on)
    with autocast(joint), torch.set_grad_enabled(joint):
        hidden = model(batch.ids)                                                                   # [B, T, H]
    # a leaf of its own: chunks add up in its gradient, then the base is walked back once
    leaf = hidden.detach().to(weights.dtype).requires_grad_(joint)
    sums = weights.new_zeros(3, heads.num_heads)
    with autocast(True):
        if joint:
            heads.borrow(model)
            with torch.no_grad():
                before = original.lm_head, original(batch.ids).flatten(0, 1)
            for loss in base_results(model, leaf.flatten(0, 1), batch, before):
                (base_weight * loss).backward()
        for loss, rank in head_results(heads, batch, leaf, args.target == "distill", ranked):
            (weights * loss).sum().backward()
            sums += torch.stack((loss.detach(), (rank < 1).sum(1), (rank < 5).sum(1)))
            if joint:
                heads.borrow(model)        # rows of an lm_head that is trained: a graph serves one backward only
    if joint:
        hidden.backward(leaf.grad.to(hidden.dtype))
    return sums


def train_step(model: Llama, heads: MedusaHeads, batches: list, original: Llama | None, weights: Tensor,
               trained: list, args, ranked: bool, asked: bool) -> tuple[Tensor, int, bool]:
    """Leaves in the `trained` parameters the gradient of the mean loss over the rows of some batches.

    Of several processes each takes every so many-th row; sums and not means are exchanged, so that they make the very
    step that one process would make, however many labels each has. Returns for these batches, everywhere: each head's
    mean loss, top-1 and top-5 [3, K], the tokens with loss, and whether any process was asked to stop.
    """
    rank, world = shard()
    own = [make_batch(rows[rank::world], heads.num_heads) for rows in batches if rows[rank::world]]
    own = [to_device(batch, model) for batch in own]
    labels = sum(((b.labels != IGNORE).sum(1) for b in own), torch.zeros_like(weights, dtype=torch.long))
    drafted = sum(((draft_labels(heads, b.labels) != IGNORE).sum(1) for b in own), torch.zeros_like(labels))
    tokens = torch.tensor([sum(int((b.next != IGNORE).sum()) for b in own), asked], device=labels.device)
    all_reduce(labels, drafted, tokens)
    sums = weights.new_zeros(3, heads.num_heads)
    for batch in own:
        sums += backward(model, heads, batch, original, weights / drafted.clamp(min=1), 1 / max(1, int(tokens[0])),
                         args, ranked)
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    all_reduce(sums, *(p.grad for p in trained))
    return sums / torch.stack((drafted, labels, labels)).clamp(min=1), int(tokens[0]), bool(tokens[1])


@contextmanager
def claimed(folder):
    """Keeps another training out of a folder; nothing is left of the lock when the process ends, however it does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl and shard()[0] == 0:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another training is writing to {folder}: give --out another folder") from None
    finally:
        os.close(handle)


@contextmanager
def interruptible():
    """Ctrl-C and SIGTERM only fill the list that this yields: the training ends behind the current step, not in it."""
    asked = []
    before = {n: signal.signal(n, lambda n, _: asked.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def metrics_of(step: int, figures: Tensor, weights: Tensor) -> dict:
    """figures [3, K] of `train_step` → a line of metrics.jsonl. UserError where the training has diverged."""
    loss, top1, top5 = figures.tolist()
    if not math.isfinite(sum(loss)):
        raise UserError(f"the loss is no longer finite at step {step}: train again with a lower --lr")
    return {"step": step, "loss": float(weights @ figures[0]), "head_loss": loss, "top1": top1, "top5": top5}


def train(model: Llama, heads: MedusaHeads, documents: list, args) -> None:
    """Trains the heads in place, and with args.medusa_2 the base; writes metrics.jsonl and checkpoint.pt to args.out.

    Everything of a step follows from the seed and its number, the data's order too, so a resumed training has the very
    weights of an uninterrupted one.
    """
    heads.borrow(model.requires_grad_(False))
    original = copy.deepcopy(model) if args.medusa_2 else None
    groups = [{"params": list(heads.parameters()), "rate": args.lr}]
    groups += [{"params": list(model.parameters()), "rate": args.base_lr}] if args.medusa_2 else []
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0)
    batches = [b for epoch in range(args.epochs)
               for b in length_batches(documents, args.batch_tokens, args.seed + epoch)]
    steps = -(-len(batches) // args.accumulate)
    weights = args.coefficient * args.decay ** torch.arange(1, heads.num_heads + 1).to(groups[0]["params"][0])    # [K]
    checkpoint, metrics, done = Path(args.out) / "checkpoint.pt", Path(args.out) / "metrics.jsonl", 0
    first, fixed = shard()[0] == 0, settings(args)
    if args.resume:
        done = load_checkpoint(checkpoint, model, heads, optimizer, fixed)
    elif checkpoint.exists():
        raise UserError(f"{checkpoint} is left from a training that was stopped: add --resume, or delete it")
    log = [line for line in (metrics.read_text().splitlines() if done else []) if json.loads(line)["step"] <= done]
    with tqdm(total=steps, initial=done, desc="training heads", unit=" steps", disable=not first) as bar, \
            interruptible() as asked:
        begin, seen = time.perf_counter(), 0
        for step in range(done + 1, steps + 1):
            joint = args.medusa_2 and step > HEADS_FIRST * steps
            model.requires_grad_(joint)
            trained = [p for group in groups[:1 + joint] for p in group["params"]]
            rate = learning_rate(step - 1, steps, args.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            logged = step == steps or step % args.log_every == 0
            figures, tokens, stop = train_step(
                model, heads, batches[(step - 1) * args.accumulate:step * args.accumulate], original if joint else None,
                weights, trained, args, logged, bool(asked))
            if args.clip:
                torch.nn.utils.clip_grad_norm_(trained, args.clip)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            seen += tokens
            if logged:
                line = metrics_of(step, figures, weights)
                speed = {"lr": rate * args.lr, "tokens_per_second": seen / (time.perf_counter() - begin)}
                log.append(json.dumps(line | speed))
                bar.set_postfix(loss=f"{line['loss']:.3f}", top1=" ".join(f"{v:.2f}" for v in line["top1"]))
            if first and (logged or stop):
                write_atomic(metrics, lambda p: p.write_text("".join(line + "\n" for line in log)))
            if step < steps and (stop or step % args.save_every == 0):
                if first:
                    save_checkpoint(checkpoint, model, heads, optimizer, step, fixed)
                if stop:
                    all_reduce(torch.zeros(1, device=weights.device))      # none leaves before all are here
                    raise KeyboardInterrupt
    heads.borrow(model.requires_grad_(False))


def settings(args) -> dict:
    """What a resumed training must share with the one it goes on with; of the data, the contents."""
    free = ("resume", "eval", "json", "device", "out", "save_every", "log_every", "tree_nodes", "data")
    digests = [read_json(f"{path}.json").get("sha256") for path in args.data]
    return {k: v for k, v in vars(args).items() if k not in free} | {"data": digests, "processes": shard()[1]}


def save_checkpoint(path, model, heads, optimizer, step: int, fixed: dict) -> None:
    state = {"step": step, "heads": heads.state_dict(), "optimizer": optimizer.state_dict(), "settings": fixed,
             "threads": torch.get_num_threads()}
    if fixed["medusa_2"]:
        state["model"] = model.state_dict()
    write_atomic(path, lambda p: torch.save(state, p))


def load_checkpoint(path, model, heads, optimizer, fixed: dict) -> int:
    """Puts everything back → the steps done."""
    try:
        state = torch.load(path, map_location=heads.embeddings.device, weights_only=True)
        for key, value in fixed.items():
            if state["settings"][key] != value:
                raise UserError(f"{path} was trained with {key} {state['settings'][key]!r}, not {value!r}: "
                                "resume with the same data and options")
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        if fixed["medusa_2"]:
            model.load_state_dict(state["model"])
        torch.set_num_threads(state["threads"])              # sums of another order would differ in the last bit
        return state["step"]
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint to resume from: train without --resume") from None
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # torch raises whatever unpickling and loading do
        raise UserError(f"can't read {path}: {type(error).__name__} {error}") from error


# ------------------------------------------------------------------------------------------------------------- main

def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="See the top of train_heads.py for examples.")
    add = parser.add_argument
    add("--model", default=str(Path(__file__).parent / "model"), help="the base: folder or hub id")
    add("--data", nargs="+", required=True, metavar="FILE", help="token files of prepare_data.py")
    add("--out", required=True, metavar="FOLDER", help="the heads' folder; with --medusa-2 the new model's")
    add("--eval", action="store_true", help="train nothing: what the heads in --out are worth on all of --data")
    add("--json", action="store_true", help="print the result as one JSON object")
    add("--kind", choices=KINDS, default="medusa", help="what a head sees beside the hidden state: nothing, the token "
        "already decided (root), all tokens drafted before its own (hydra)")
    add("--num-heads", type=number(int, 1, 64), default=4)
    add("--num-layers", type=number(int, 1), default=1, help="residual blocks a head")
    add("--width", type=number(int, 1), help="inner width of the blocks (default: square, the paper's)")
    add("--tie-lm-head", action="store_true", help="use the base's lm_head, not a matrix a head")
    add("--recent", type=number(int, 1, 64), default=1, help="hidden states that a head sees, of the last positions")
    add("--draft-vocab", type=number(int, 1), help="only the so many most frequent tokens can be drafted")
    add("--target", choices=("tokens", "distill"), default="tokens", help="learn the data's tokens, or the base's "
        "own distribution at their place")
    add("--medusa-2", action="store_true", help=f"after the first {HEADS_FIRST:.0%}% of the steps train the base too, "
        "held to its old self by a KL term; writes a whole model, its heads in medusa/")
    add("--epochs", type=number(int, 1), default=2)
    add("--lr", type=number(float, 0, 10), default=1e-3, help="of the heads")
    add("--base-lr", type=number(float, 0, 10), default=1e-4, help="of the base (--medusa-2)")
    add("--schedule", choices=("cosine", "constant"), default="cosine")
    add("--warmup", type=number(int, 0), default=40, help="steps")
    add("--decay", type=number(float, 0), default=0.8, help="head k's loss counts coefficient * decay**k")
    add("--coefficient", type=number(float, 0), default=0.2)
    add("--clip", type=number(float, 0), default=1.0, help="largest norm of the gradient, 0: no limit")
    add("--batch-tokens", type=number(int, 1), default=4096)
    add("--accumulate", type=number(int, 1), default=1, help="batches a step")
    add("--pack", type=number(int, 8), metavar="LENGTH", help="rows of this length, cut from the stream of documents")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--tree-nodes", type=number(int, 1), default=15, help="of tree.json, the root not counted")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    add("--log-every", type=number(int, 1), default=20, help="steps between lines of metrics.jsonl")
    add("--seed", type=SEED, default=0)
    add("--device", type=device, default="cpu")
    return parser.parse_args(argv)


def report(result: dict) -> str:
    """The figures as text, with what they mean."""
    lines = [f"{result['out']}: {result['kind']}, {result['parameters']} parameters; {result['documents']} documents",
             f"base: {result['base_loss']} nats a token",
             "top: share of the tokens to learn among the head's first 1, 2, .. 10 guesses",
             "head   loss  " + "".join(f"{f'top-{r}':>7}" for r in range(1, 11))]
    lines += [f"{k:>4}{loss:>7.3f}  " + "".join(f"{v:>7.3f}" for v in top)
              for k, (loss, top) in enumerate(zip(result["head_loss"], result["top"], strict=True), 1)]
    found = result["acceptance"]
    lines += [f"tree of {found['nodes']} nodes, root included: {found['tokens_per_step']} tokens per step",
              "  = new tokens behind the first / steps, had the model written these very documents (prompts given)",
              "steps that accept at least 0, 1, .. drafts: " + " ".join(f"{v:.3f}" for v in found["depth_reach"]),
              "steps that accept the node: " + "  ".join(f"[{n}] {v:.3f}" for n, v in found["node_reach"].items())]
    return "\n".join(lines)


def most_frequent(documents: list, size: int, vocab_size: int) -> Tensor:
    """The `size` ids that carry loss most often, ascending."""
    stream = np.concatenate(documents)
    counts = np.bincount(stream[stream % 2 == 1] // 4, minlength=vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def split(args, tokenizer: Tokenizer, context: int) -> tuple[list, list]:
    """The documents to train on, cut to the context or packed, and those held out (--eval: none, all)."""
    documents = [d for path in args.data for d in read_tokens(path, tokenizer) if len(d) > 2]
    if args.eval:
        return [], cut(documents, context)
    rest = [d for i, d in enumerate(documents) if i % HELD_OUT]
    if not rest:
        raise UserError(f"{' and '.join(args.data)}: at least 2 documents of 3 tokens are needed, one is held out")
    rest = cut([np.concatenate(rest)], min(args.pack, context)) if args.pack else cut(rest, context)
    return rest, cut(documents[::HELD_OUT], context)


def save(args, model: Llama, heads: MedusaHeads) -> Path:
    """Writes heads, or with --medusa-2 the new base in HF's layout with its tokenizer → the heads' folder.

    Heads in the dtype that their base is stored in; with --medusa-2 all in float32, lest small updates be rounded away.
    """
    out = Path(args.out)
    folder = out / "medusa" if args.medusa_2 else out
    (folder / "tree.json").unlink(missing_ok=True)           # an older one does not fit
    if not args.medusa_2:
        heads.save(folder, model_name(args.model), DTYPES[model.config.dtype])
        return folder
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        if file := locate(args.model, name, required=False):
            write_atomic(out / name, lambda p, file=file: p.write_bytes(file.read_bytes()))
    model.save(out, torch.float32)
    heads.save(folder, model_name(out), torch.float32)
    return folder


def untrained(args, model: Llama, documents: list) -> MedusaHeads:
    token_map = args.draft_vocab and most_frequent(documents, args.draft_vocab, model.config.vocab_size)
    return MedusaHeads.untrained(model, args.num_heads, num_layers=args.num_layers, width=args.width,
                                 tie_lm_head=args.tie_lm_head, kind=args.kind, recent=args.recent, token_map=token_map)


def save_tree(folder: Path, heads: MedusaHeads, ranks: list, own: list, nodes: int):
    """Writes the tree of the paths that were right most often in the held-out text: see `evaluate`."""
    paths = grow_tree(path_hits(ranks), nodes)
    write_json(folder / "tree.json", {"paths": paths, "source": f"joint hits at {sum(map(len, own))} held-out places "
                                      "of the heads' own data"})
    return heads.tree(paths)


def main():
    args = arguments()
    if Path(args.out).is_file():
        raise UserError(f"{args.out} is a file: --out names a folder")
    if Path(args.out).resolve() == Path(args.model).resolve():
        raise UserError(f"{args.out} is the model's own folder: give --out another one, such as {args.out}/medusa")
    rank, world = shard()
    if world > 1:
        cuda = args.device.startswith("cuda")
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else args.device
        try:
            dist.init_process_group("nccl" if cuda else "gloo")
        except ValueError as error:
            raise UserError(f"WORLD_SIZE is {world}, but: {error}: start it with torchrun") from error
    torch.manual_seed(args.seed)
    model = Llama.from_pretrained(args.model, device=args.device, dtype=torch.float32 if args.medusa_2 else None)
    if world == 1:          # torchrun has set the threads of its processes
        set_threads(model, rows=64)
    tokenizer = Tokenizer(args.model, model.config)
    documents, held_out = split(args, tokenizer, model.config.max_position_embeddings)
    out, evaluated = {"out": str(args.out)}, lambda heads: evaluate(model, heads, held_out, args.batch_tokens)
    if args.eval:
        heads = MedusaHeads.from_pretrained(args.out, model)
        tree, _ = load_tree(args.out, heads)
        figures, ranks, own = evaluated(heads)
    else:
        heads = untrained(args, model, documents)
        out |= {"base_loss_before": evaluated(heads)[0]["base_loss"]} if args.medusa_2 else {}
        with claimed(args.out):
            train(model, heads, documents, args)
            if world > 1:
                dist.barrier()                 # none may leave while another still listens
                dist.destroy_process_group()
            if rank > 0:
                return
            folder = save(args, model, heads)
            heads = MedusaHeads.from_pretrained(folder, model)                   # as stored
            figures, ranks, own = evaluated(heads)
            tree = save_tree(folder, heads, ranks, own, args.tree_nodes)
            (Path(args.out) / "checkpoint.pt").unlink(missing_ok=True)
    result = out | {"kind": heads.kind, "parameters": heads.size(), **figures,
                    "acceptance": walk(tree, ranks, own)}
    print(json.dumps(result) if args.json else report(result))


if __name__ == "__main__":
    command_line(main)
