"""Trains Medusa heads for a frozen Llama: Medusa-1 of the paper (arXiv 2401.10774, section 2.2.1).

    python train_heads.py --data data/distilled.bin --out model/medusa
    python train_heads.py --model DIR_OR_HUB_ID --data a.bin b.bin --num-heads 3 --tie-lm-head --width 256 --out heads

Head k = 1..K sees the base's hidden state at position t and learns the token at t + 1 + k (the base's own lm_head
already guesses t + 1). Its loss is the mean cross entropy, weighted by --decay to the power k. A row of a batch is one
whole document, so nothing attends across documents. Every 50th document is held out: at the end it gives each head's
accuracy, and `tree.json`, the candidate tree that fits these heads.
"""
import copy
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llama import (
    SEED,
    ArgumentParser,
    Llama,
    Tokenizer,
    UserError,
    at_least_float32,
    command_line,
    device,
    model_name,
    number,
    write_json,
)
from prepare_data import read_tokens
from tinymedusa import MedusaHeads, grow_tree, set_threads

IGNORE = -100           # cross_entropy's own mark for positions that carry no loss
LOGITS = 2 ** 22        # logits in memory at once: positions are taken in chunks of LOGITS / (K V)


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


def padded(documents: list) -> tuple[Tensor, Tensor]:
    """Documents → ids [B, T], padded on the right with 0, and length [B]."""
    length = torch.tensor([len(d) for d in documents])
    ids = torch.zeros(len(documents), int(length.max()), dtype=torch.long)
    for row, document in zip(ids, documents, strict=True):
        row[:len(document)] = torch.as_tensor(document.astype("int64"))
    return ids, length


def head_labels(ids: Tensor, length: Tensor, num_heads: int) -> Tensor:
    """[K, B, T]: what head k = 1..K should guess at position t, ids[t + 1 + k]; IGNORE beyond the document."""
    labels = torch.full((num_heads, *ids.shape), IGNORE)
    for k in range(1, num_heads + 1):
        labels[k - 1, :, :-1 - k] = ids[:, 1 + k:]
    target = torch.arange(ids.shape[1]) + 1 + torch.arange(1, num_heads + 1)[:, None]                # [K, T]
    return labels.masked_fill(target[:, None] >= length[:, None], IGNORE)


def head_results(heads: MedusaHeads, lm_head, hidden: Tensor, labels: Tensor):
    """hidden [T, H], labels [K, T] → chunk by chunk, each head's summed cross entropy [K] and labels' ranks [K, chunk].

    Rank 0 is a top-1 hit; an ignored label has rank V.
    """
    chunk = max(1, LOGITS // (heads.num_heads * heads.vocab_size))
    for h, y in zip(hidden.split(chunk), labels.split(chunk, 1), strict=True):
        logits = heads.logits(heads.features(h), lm_head)                                           # [K, chunk, V]
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction="none")
        with torch.no_grad():
            target = logits.gather(2, y.clamp(min=0)[..., None])
            rank = (logits > target).sum(-1).masked_fill(y == IGNORE, heads.vocab_size)
        yield losses.view(y.shape).sum(1), rank


def batch_hidden(model: Llama, documents: list, num_heads: int) -> tuple[Tensor, Tensor]:
    """The base's hidden states where at least head 1 has a label [T, H], and the labels there [K, T]."""
    ids, length = padded(documents)
    labels = head_labels(ids, length, num_heads).flatten(1)                                         # [K, B * T]
    with torch.no_grad():
        hidden = model(ids.to(model.lm_head.weight.device)).flatten(0, 1)
    used, hidden = labels[0] != IGNORE, hidden.to(at_least_float32(hidden.dtype))
    return hidden[used.to(hidden.device)], labels[:, used].to(hidden.device)


def wide_lm_head(model: Llama):
    """The base's lm_head in at least float32: heads are trained in it, whatever the base's dtype."""
    return copy.deepcopy(model.lm_head).to(at_least_float32(model.lm_head.weight.dtype))


@torch.no_grad()
def evaluate(model: Llama, heads: MedusaHeads, documents: list, batch_tokens: int) -> tuple[dict, Tensor]:
    """Per head: mean cross entropy in nats, share of labels ranked first and in the first 5; and all ranks [K, T]."""
    lm_head = wide_lm_head(model)
    results = [r for batch in length_batches(documents, batch_tokens, seed=0)
               for r in head_results(heads, lm_head, *batch_hidden(model, batch, heads.num_heads))]
    loss, rank = sum(sums.double() for sums, _ in results), torch.cat([r for _, r in results], 1)
    count = (rank < heads.vocab_size).sum(1).clamp(min=1)
    figures = {"loss": loss / count, "top1": (rank < 1).sum(1) / count, "top5": (rank < 5).sum(1) / count}
    return {name: [round(v, 4) for v in figure.tolist()] for name, figure in figures.items()}, rank


def path_hits(rank: Tensor, widest: int = 10) -> Counter:
    """Ranks of the right tokens [K, T] → for each path of ranks below `widest`, the places where it was right."""
    hits = Counter()
    for place in rank.t().tolist():
        right = list(itertools.takewhile(lambda r: r < widest, place))
        hits.update(tuple(right[:depth]) for depth in range(1, len(right) + 1))
    return hits


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak: linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: Llama, heads: MedusaHeads, documents: list, *, epochs: int, lr: float, warmup: int, decay: float,
          batch_tokens: int, seed: int) -> None:
    """AdamW on the heads; the base is frozen. Gradients are taken chunk by chunk, so logits are never all in memory."""
    weights = decay ** torch.arange(1, heads.num_heads + 1, device=model.lm_head.weight.device)
    lm_head = wide_lm_head(model.requires_grad_(False))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, weight_decay=0.0)
    epoch_batches = [length_batches(documents, batch_tokens, seed + epoch) for epoch in range(epochs)]
    steps = sum(map(len, epoch_batches))
    with tqdm(total=steps, desc="training heads", unit=" steps") as bar:
        for step, batch in enumerate(batch for batches in epoch_batches for batch in batches):
            hidden, labels = batch_hidden(model, batch, heads.num_heads)
            count = (labels != IGNORE).sum(1).clamp(min=1)                                          # [K]
            losses, correct = torch.zeros_like(weights), torch.zeros_like(count)
            for sums, rank in head_results(heads, lm_head, hidden, labels):
                (weights * sums / count).sum().backward()
                losses, correct = losses + sums.detach() / count, correct + (rank == 0).sum(1)
            optimizer.param_groups[0]["lr"] = lr * learning_rate(step, steps, warmup)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if step % 20 == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{(weights * losses).sum():.3f}",
                                top1=" ".join(f"{v:.2f}" for v in (correct / count).tolist()))


def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="See the top of train_heads.py for examples.")
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"), help="the base: folder or hub id")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="token files of prepare_data.py")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--num-heads", type=number(int, 1, 64), default=4)
    parser.add_argument("--num-layers", type=number(int, 1), default=1, help="residual blocks a head")
    parser.add_argument("--width", type=number(int, 1), help="inner width of the blocks (default: square, the paper's)")
    parser.add_argument("--tie-lm-head", action="store_true", help="use the base's lm_head, not a matrix a head")
    parser.add_argument("--epochs", type=number(int, 1), default=2)
    parser.add_argument("--lr", type=number(float, 0), default=1e-3)
    parser.add_argument("--warmup", type=number(int, 0), default=40, help="steps")
    parser.add_argument("--decay", type=number(float, 0), default=0.8, help="head k's loss counts decay**k")
    parser.add_argument("--batch-tokens", type=number(int, 1), default=4096)
    parser.add_argument("--tree-nodes", type=number(int, 1), default=15, help="of tree.json, the root not counted")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", type=device, default="cpu")
    return parser.parse_args(argv)


def main():
    args = arguments()
    if Path(args.out).is_file():
        raise UserError(f"{args.out} is a file: --out names a folder")
    torch.manual_seed(args.seed)
    model = Llama.from_pretrained(args.model, device=args.device)
    set_threads(model, rows=64)
    tokenizer = Tokenizer(args.model, model.config)
    context = model.config.max_position_embeddings
    documents = [piece for path in args.data for d in read_tokens(path, tokenizer)
                 for piece in (d[i:i + context] for i in range(0, len(d), context)) if len(piece) > 2]
    held_out, documents = documents[::50], [d for i, d in enumerate(documents) if i % 50]
    if not documents:
        raise UserError(f"{' and '.join(args.data)}: at least 2 documents of 3 tokens are needed, one is held out")
    heads = MedusaHeads.untrained(model, args.num_heads, num_layers=args.num_layers, width=args.width,
                                  tie_lm_head=args.tie_lm_head)
    train(model, heads, documents, epochs=args.epochs, lr=args.lr, warmup=args.warmup, decay=args.decay,
          batch_tokens=args.batch_tokens, seed=args.seed)
    heads.save(args.out, base_model=model_name(args.model))
    figures, rank = evaluate(model, heads, held_out, args.batch_tokens)
    write_json(Path(args.out) / "tree.json", {"paths": grow_tree(path_hits(rank), args.tree_nodes),
                                              "source": f"{rank.shape[1]} held-out places of the heads' own data"})
    print(json.dumps({"out": args.out, "parameters": sum(p.numel() for p in heads.parameters()),
                      "held_out_documents": len(held_out), **figures}))


if __name__ == "__main__":
    command_line(main)
