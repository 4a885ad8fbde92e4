"""Trains Medusa heads for a Llama: Medusa-1 (frozen base model) or Medusa-2 (arXiv 2401.10774, section 2.2).

    python train_heads.py --data data/greedy.bin --out heads                            # the paper's heads
    python train_heads.py --data data/greedy.bin --out heads --kind hydra --width 512 --tie-lm-head --draft-vocab 1024
    python train_heads.py --data data/held-out.bin --out heads --eval                   # what they are worth
    python train_heads.py --data data/greedy.bin --out new_model --medusa-2             # base model and heads
    python train_heads.py --export vllm heads --out heads_for_vllm                      # nothing is trained
    torchrun --nproc-per-node 2 train_heads.py --data data/greedy-*.bin --out heads     # the same steps, shared

Head k = 1..K sees the base model's hidden state at position t and learns the token at t + 1 + k (the base model's own
lm_head already guesses t + 1), where the token file says that it carries loss. Its loss is the mean cross entropy,
weighted by --coefficient times --decay to the power k. A row of a batch is one whole document, so nothing attends
across documents, just as at generation; --pack cuts the stream into rows of equal length, as the original did: there a
document sees what precedes it in its row. Every 50th is held out. What is printed: see `evaluate` and `simulate`.
"""
if __name__ == "__main__":      # Ctrl-C while torch is imported: an end without a traceback, as `command_line`'s later
    import signal
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN or signal.signal(signal.SIGINT, signal.SIG_DFL)
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from extras.command_line import ArgumentParser, command_line, set_threads, shard
from extras.forecast import noise_given, simulate
from extras.options import HEADS_FIRST, check_train_options, train_options
from extras.training import (Log, all_reduce, claimed, end_processes, hidden_file, interruptible, known,
                             load_checkpoint, report, save_checkpoint, save_results, save_trees, settings,
                             start_processes)
from llama import Llama, LlamaConfig
from loading.checkpoint import find
from loading.documents import HELD_OUT, Document, beside, read_tokens
from loading.export import export
from loading.files import UserError, keep_sources
from loading.tokenizer import Tokenizer
from tinymedusa import GREEDY, MedusaHeads, Sampling, Tree, perturbed, warp
from variants.heads import build_heads, draftable, ids_of, load_heads, token_map_of
from variants.medusa2 import Joint

IGNORE = -100           # cross_entropy's own mark for positions that carry no loss
MISS = 2 ** 30          # the rank of a token that a head can't draft, or of no label
WRITTEN = "config.json", "model.safetensors", "tree.json", "metrics.jsonl", "checkpoint.pt"      # to --out
LOGITS = 2 ** 22        # logits in memory at once: positions are taken in chunks of LOGITS / (K D)

def length_batches(documents: list, tokens: int, seed: int) -> list[list]:
    """One epoch: lists of documents of like length, `tokens` with their padding, in random order. Lengths are jittered,
    so the batches differ between epochs; a last partial batch is kept."""
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
    return [d[i:i + length] for d in documents for i in range(0, len(d), length)]

class Batch(NamedTuple):
    """What the heads learn from some rows. Only places where at least one head has a label are kept."""
    ids: Tensor        # [B, T] for the base model
    index: Tensor      # [n] the places, in the flattened [B T]
    tokens: Tensor     # [n, K] the ids that follow each place: 1 to K places on
    labels: Tensor     # [K, n] what head k should guess, the id k + 1 places on, or IGNORE
    own: Tensor        # [n] bool: the root (1 place on) and the token behind it carry loss, so a step can begin here
    row: Tensor        # [n] the row of each place
    next: Tensor       # [B T] the id 1 place on if it carries loss, or IGNORE: what the base model itself should guess
    temperature: Tensor     # [n] that the base model wrote the row at; NaN: it did not
    hidden: Tensor | None   # [B, T, H] the base model's hidden states, where they are kept

    def to(self, device) -> "Batch":
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))

def make_batch(rows: list[Document], num_heads: int) -> Batch:
    """Rows padded on the right; labels never cross from one document into the next."""
    length = max(map(len, rows))
    room = 1 + num_heads                                                # for labels beyond the longest row
    padded = lambda row: np.pad(row.astype(np.int64), (0, length + room - len(row)))
    ids, loss, starts = (torch.from_numpy(np.stack([padded(getattr(row, name)) for row in rows]))
                         for name in ("ids", "loss", "starts"))         # [B, T + 1 + K]
    loss, document = loss == 1, starts.cumsum(1)
    ahead = lambda t, n: t[:, n:n + length]
    learn = lambda n: ahead(loss, n) & (ahead(document, n) == ahead(document, 0))
    labels = torch.stack([ahead(ids, 1 + k).masked_fill(~learn(1 + k), IGNORE) for k in range(1, num_heads + 1)])
    index = (labels != IGNORE).any(0).flatten().nonzero()[:, 0]
    tokens = torch.stack([ahead(ids, k) for k in range(1, num_heads + 1)], -1)              # [B, T, K]
    own = learn(1) & (labels[0] != IGNORE)
    row, hidden = index // length, None
    temperature = torch.tensor([math.nan if d.temperature is None else d.temperature for d in rows])
    if rows[0].hidden is not None:
        hidden = torch.zeros(len(rows), length, rows[0].hidden.shape[1], dtype=torch.float16)
        for states, d in zip(hidden, rows, strict=True):
            states[:len(d)] = torch.from_numpy(d.hidden)
    return Batch(ahead(ids, 0), index, tokens.flatten(0, 1)[index], labels.flatten(1)[:, index],
                 own.flatten()[index], row, ahead(ids, 1).masked_fill(~learn(1), IGNORE).flatten(),
                 temperature[row], hidden)

def draft_labels(heads: MedusaHeads, labels: Tensor) -> Tensor:
    """Ids → indices of the draft vocabulary; IGNORE for what the heads can't draft."""
    token_map = token_map_of(heads)
    if token_map is None:
        return labels
    table = torch.full((heads.model[0].config.vocab_size,), IGNORE, device=labels.device)
    table[token_map] = torch.arange(len(token_map), device=labels.device)
    return torch.where(labels == IGNORE, IGNORE, table[labels.clamp(min=0)])

def rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many tokens come before each label, of equal logits the lower ids: logits [K, n, D], labels [K, n] → [K, n].
    0 is a top-1 hit, MISS no label. NaN never is a hit."""
    place = labels.clamp(min=0)[..., None]
    target, ids = logits.gather(2, place), torch.arange(logits.shape[-1], device=labels.device)
    before = ~(logits <= target) | (logits == target) & (ids < place)
    return before.sum(-1).masked_fill(labels == IGNORE, MISS)

def head_results(heads: MedusaHeads, batch: Batch, hidden: Tensor, teacher=None, room: int = LOGITS):
    """hidden [B, T, H] → chunk by chunk: each head's summed cross entropy [K]; its logits [K, chunk, D] and what it
    should guess [K, chunk] (see `draft_labels`); the place in [B T] whose token the base model samples there.

    Text that the base model sampled at a temperature T is learned at T, by softmax(logits / T). teacher: hidden states
    [.., H] → the base model's logits [.., D], to learn the distribution that a token was sampled from. room: the number
    of logits in memory at once.
    """
    chunk, length = max(1, room // (len(heads) * heads.draft_size)), hidden.shape[1]
    back = torch.arange(heads.recent, device=hidden.device)
    padded, hidden = F.pad(hidden, (0, 0, heads.recent - 1, 0)), hidden.flatten(0, 1)       # zeros in front of a row
    for i in range(0, len(batch.index), chunk):
        at, labels = batch.index[i:i + chunk], draft_labels(heads, batch.labels[:, i:i + chunk])
        recent_hidden = padded[(at // length)[:, None], (at % length)[:, None] + back]              # [chunk, R, H]
        logits = heads(recent_hidden, batch.tokens[i:i + chunk]).transpose(0, 1)                    # [K, chunk, D]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        later = at + torch.arange(1, len(heads) + 1, device=at.device)[:, None]                     # [K, chunk]
        later = later.clamp(max=len(hidden) - 1)                            # beyond the row: without a label
        written_at = batch.temperature[i:i + chunk]                                                 # [chunk]
        temperature = torch.where(written_at > 0, written_at, 1.0).to(logits.dtype)[:, None]
        log_probs = (logits / temperature).log_softmax(dim=-1)
        losses = F.nll_loss(log_probs.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
        losses = losses.view(labels.shape)
        if teacher is not None and (written_at != 0).any():
            with torch.no_grad():
                target = (teacher(hidden[later]).to(logits.dtype) / temperature).softmax(dim=-1)
            soft = -(target * log_probs).sum(dim=-1).masked_fill(labels == IGNORE, 0)
            losses = torch.where(written_at == 0, losses, soft)         # greedy text: all of the mass is on its token
        yield losses.sum(1), logits.detach(), labels, later

def keep_hidden(model: Llama, path, documents: list, batch_tokens: int, bf16: bool) -> None:
    """Gives all documents of a token file the base model's hidden states, so that it is run over a text only once: in
    float16 from the file beside it, where what is missing is computed. A row's first state is written last."""
    states, begin, (rank, world) = hidden_file(model, path, sum(map(len, documents)), bf16), 0, shard()
    for d in documents:
        d.hidden = states[begin:begin + len(d)]
        begin += len(d)
    rows = cut(documents, model.config.max_position_embeddings)[rank::world]
    missing = [row for row in rows if not row.hidden[0].any()]
    for rows in tqdm(length_batches(missing, batch_tokens, 0), desc="hidden states", disable=rank > 0 or not missing):
        ids = make_batch(rows, 1).ids.to(model.norm.weight.device)
        with torch.inference_mode(), torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            hidden = model(ids).clamp(-65504, 65504).to("cpu", torch.float16).numpy()               # [B, T, H]
        for row, new in zip(rows, hidden, strict=True):
            row.hidden[1:] = new[1:len(row)]
            row.hidden[0] = new[0]
    all_reduce(torch.zeros(1, device=model.norm.weight.device))             # what others compute is there as well

def teacher_of(model: Llama, heads: MedusaHeads):
    """The base model's logits for the ids that the heads may draft, from its hidden states."""
    lm_head = getattr(heads, "vocabulary", model.lm_head)
    return lambda hidden: lm_head(hidden.to(model.norm.weight.dtype))

@torch.no_grad()
def base_loss(model: Llama, hidden: Tensor, labels: Tensor) -> float:
    """The base model's own cross entropy, summed over the places with a label: hidden [T, H], labels [T]."""
    places = (labels != IGNORE).nonzero()[:, 0].split(max(1, LOGITS // model.config.vocab_size))
    return sum(float(F.cross_entropy(model.lm_head(hidden[at]).float(), labels[at], reduction="sum")) for at in places)

@torch.no_grad()
def evaluate(model: Llama, heads: MedusaHeads, documents: list, batch_tokens: int, sampling: Sampling = GREEDY):
    """(figures, ranks, own) on some documents; ranks and own: for each document, see `extras.forecast.simulate`.
    head_loss: mean cross entropy of each head's drafted tokens, nats. top: for each head, the share of the tokens to
    learn that are among its first 1, 2, .. 10 guesses. base_loss: the base model's mean cross entropy, nats per token.
    sampling: how the base model wrote them; at a temperature, guesses are made with noise by which it writes just this.
    """
    ranks, owns, losses, loss, tokens, labels = [], [], 0.0, 0.0, 0, 0
    room = LOGITS * heads.draft_size // model.config.vocab_size if sampling.temperature else LOGITS
    generator = torch.Generator().manual_seed(0)
    for rows in tqdm(length_batches(documents, batch_tokens, 0), desc="evaluating", disable=shard()[0] > 0):
        batch = make_batch(rows, len(heads)).to(model.norm.weight.device)
        hidden, rank = model(batch.ids), []                                                         # [B, T, H]
        loss += base_loss(model, hidden.flatten(0, 1), batch.next)
        tokens += int((batch.next != IGNORE).sum())
        states = hidden.to(next(heads.parameters()).dtype)
        for sums, logits, right, later in head_results(heads, batch, states, room=room):
            losses = losses + sums.double()
            if sampling.temperature:
                noise = noise_of(model, heads, hidden.flatten(0, 1)[later], right, sampling, generator)
                logits = perturbed(logits, noise, Sampling(sampling.temperature))           # as heads draft
            rank.append(rank_of(logits, right).cpu())
        if not rank:
            continue
        labels = labels + (batch.labels != IGNORE).sum(1)
        sizes = torch.bincount(batch.row.cpu()).tolist()
        ranks += torch.cat(rank, 1).split(sizes, 1)
        owns += batch.own.cpu().split(sizes)
    if not ranks:
        raise UserError("the documents hold nothing for the heads to guess: give longer ones")
    every, labels = torch.cat(ranks, 1), labels.cpu()
    drafted = (every < MISS).sum(1)
    top = torch.stack([(every <= r).sum(1) / labels.clamp(min=1) for r in range(10)], 1)                     # [K, 10]
    rounded = lambda values: [round(v, 4) for v in values.tolist()]
    return {"documents": len(documents), "head_loss": known(rounded(losses.cpu() / drafted.clamp(min=1)), drafted),
            "top": known(map(rounded, top), labels), "base_loss": round(loss / max(1, tokens), 4)}, ranks, owns

def noise_of(model: Llama, heads: MedusaHeads, hidden: Tensor, labels: Tensor, sampling: Sampling, generator):
    """Noise by which the base model samples what the heads should guess: hidden [K, n, H], labels [K, n] → [.., D]."""
    ids = ids_of(heads, labels.clamp(min=0))
    return draftable(heads, noise_given(warp(model.lm_head(hidden), sampling), ids, generator))

def learning_rate(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the full rate: linear warm-up, then a cosine to zero, or constant."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

def head_backward(model: Llama, heads: MedusaHeads, batch: Batch, hidden: Tensor, weights: Tensor, args,
                  ranked: bool) -> Tensor:
    """Adds the heads' gradients of a batch, chunk by chunk → sums over its labels [3, K]: loss, top-1 and top-5 hits.
    hidden [B, T, H] of the base model, weights [K] of one label each; not ranked: no hits."""
    sums = weights.new_zeros(3, len(heads))
    teacher = teacher_of(model, heads) if args.target == "distill" else None
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=args.bf16):
        for loss, logits, labels, _ in head_results(heads, batch, hidden, teacher):
            (weights * loss).sum().backward()
            rank = rank_of(logits, labels) if ranked else torch.full_like(labels, MISS)     # a quarter faster
            sums += torch.stack((loss.detach(), (rank < 1).sum(1), (rank < 5).sum(1)))
    return sums

def backward(model: Llama, heads: MedusaHeads, batch: Batch, weights: Tensor, base_weight: float, args,
             ranked: bool) -> Tensor:
    """Adds the gradients of a batch, Medusa-1: the base model is frozen and runs in its own dtype, as at generation.
    base_weight, of one label of the base model's, is for variants/medusa2.py, where it learns, too."""
    with torch.no_grad():
        hidden = model(batch.ids) if batch.hidden is None else batch.hidden
    return head_backward(model, heads, batch, hidden.to(weights.dtype), weights, args, ranked)

def train_step(model: Llama, heads: MedusaHeads, batches: list, backward, weights: Tensor, trained: list, args,
               ranked: bool, stop: bool) -> tuple[Tensor, Tensor, int, bool]:
    """Leaves in the `trained` parameters the gradient of the mean loss over the rows of some batches. Of several
    processes each takes every n-th row; sums and not means are exchanged, so that they make the very step that one
    process would make, however many labels each has. Returns for these batches, everywhere: each head's summed loss,
    top-1 and top-5 [3, K], the labels they count [3, K], the tokens with loss, and whether any process is to stop."""
    rank, world = shard()
    own = [make_batch(rows[rank::world], len(heads)) for rows in batches if rows[rank::world]]
    own = [batch.to(model.norm.weight.device) for batch in own]
    labels = sum(((b.labels != IGNORE).sum(1) for b in own), torch.zeros_like(weights, dtype=torch.long))
    drafted = sum(((draft_labels(heads, b.labels) != IGNORE).sum(1) for b in own), torch.zeros_like(labels))
    tokens = torch.tensor([sum(int((b.next != IGNORE).sum()) for b in own), stop], device=labels.device)
    all_reduce(labels, drafted, tokens)
    sums = weights.new_zeros(3, len(heads))
    for batch in own:
        sums += backward(model, heads, batch, weights / drafted.clamp(min=1), 1 / max(1, int(tokens[0])), args, ranked)
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    all_reduce(sums, *(p.grad for p in trained))
    return sums, torch.stack((drafted, labels, labels)), int(tokens[0]), bool(tokens[1])

def schedule(documents: list, args) -> tuple[list, int]:
    """The batches of each step, and how many steps warm up."""
    batches = [b for epoch in range(args.epochs)
               for b in length_batches(documents, args.batch_tokens, args.seed + epoch)]
    steps = [batches[i:i + args.accumulate] for i in range(0, len(batches), args.accumulate)]
    warmup = min(40, len(steps) // 10) if args.warmup is None else args.warmup
    if len(steps) < 50 and shard()[0] == 0:
        print(f"only {len(steps)} steps, heads need hundreds: raise --epochs or lower --batch-tokens", file=sys.stderr)
    if warmup >= len(steps):
        print(f"--warmup {warmup} exceeds the run of {len(steps)} steps: --lr is never reached", file=sys.stderr)
    return steps, warmup

def optimizer_of(model: Llama, heads: MedusaHeads, args) -> torch.optim.Optimizer:
    """Its first group is the heads, with --medusa-2 the second the base model; `rate` is a group's full rate."""
    groups = [{"params": list(heads.parameters()), "rate": args.lr}]
    groups += [{"params": list(model.parameters()), "rate": args.base_lr}] if args.medusa_2 else []
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0)

def train(model: Llama, heads: MedusaHeads, documents: list, args) -> None:
    """Trains the heads in place, and with args.medusa_2 the base model; writes metrics.jsonl and checkpoint.pt to out.
    Everything of a step follows from the seed and its number, the data's order too, so a resumed training has the very
    weights of an uninterrupted one."""
    model.requires_grad_(False)
    joint = Joint(model, head_backward) if args.medusa_2 else None
    optimizer = optimizer_of(model, heads, args)
    steps, warmup = schedule(documents, args)
    weights = args.coefficient * args.decay ** torch.arange(1, len(heads) + 1).to(next(heads.parameters()))     # [K]
    checkpoint, fixed, done = Path(args.out) / "checkpoint.pt", settings(args), 0
    if args.resume:
        done = load_checkpoint(checkpoint, model, heads, optimizer, fixed)
    elif checkpoint.exists():
        raise UserError(f"{checkpoint} is left from a training that was stopped: add --resume, or delete it")
    log, labels, first = Log(Path(args.out) / "metrics.jsonl", done), 0, shard()[0] == 0
    bar = tqdm(total=len(steps), initial=done, desc="training heads", unit=" steps", disable=not first)
    with bar, interruptible() as received:
        for step, batches in enumerate(steps[done:], done + 1):
            together = joint is not None and step > HEADS_FIRST * len(steps)
            model.requires_grad_(together)
            rate = learning_rate(step - 1, len(steps), warmup, args.schedule)
            groups = optimizer.param_groups if together else optimizer.param_groups[:1]
            for group in groups:
                group["lr"] = rate * group["rate"]
            trained = [p for group in groups for p in group["params"]]
            logged = step == len(steps) or step % args.log_every == 0
            sums, counts, tokens, stop = train_step(model, heads, batches, joint if together else backward, weights,
                                                    trained, args, logged, bool(received))
            if args.clip:
                torch.nn.utils.clip_grad_norm_(trained, args.clip)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            log.tokens += tokens
            labels = labels + counts[0]
            if logged:
                line = log.add(step, rate * args.lr, sums, counts, weights)
                bar.set_postfix(loss=f"{line['loss']:.3f}", top1=" ".join(f"{v or 0:.2f}" for v in line["top1"]))
            if step < len(steps) and (stop or step % args.save_every == 0):
                if first:
                    save_checkpoint(checkpoint, model, heads, optimizer, step, fixed)
                if stop:
                    all_reduce(torch.zeros(1, device=weights.device))      # none leaves before all are here
                    raise KeyboardInterrupt
    model.requires_grad_(False)
    if first and (without := [str(k) for k, count in enumerate(labels.tolist(), 1) if not count]):
        print(f"no label for head {' and '.join(without)} in steps {done + 1} to {len(steps)}, so it learned nothing: "
              "give longer texts, or fewer --num-heads", file=sys.stderr)

def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="Examples: at the top of train_heads.py.")
    train_options(parser)
    args = parser.parse_args(argv)
    check_train_options(parser, args)
    return args

def exported(args) -> str:
    """--export: file to file, no model is built."""
    base = find(args.model)
    with torch.device("meta"):          # for its shapes
        model = Llama(LlamaConfig.from_dict(base.config))
    base.check(parameters := dict(model.named_parameters()))
    return export(*args.export, args.out, args.model, base, parameters, model.config)

def most_frequent(documents: list, size: int, vocab_size: int) -> Tensor:
    """The `size` ids that carry loss most often, ascending."""
    counts = sum(np.bincount(d.ids[d.loss], minlength=vocab_size) for d in documents)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))

def split(args, tokenizer: Tokenizer, model: Llama) -> tuple[list, list]:
    """The documents to train on, cut to the context or packed, and those held out (--eval: none, all)."""
    files, context = {path: read_tokens(path, tokenizer) for path in args.data}, model.config.max_position_embeddings
    if not (args.eval or args.pack or args.medusa_2):       # packed rows see each other, --medusa-2 changes the base
        for path, documents in files.items():
            keep_hidden(model, path, documents, args.batch_tokens, args.bf16)
    documents = [d for found in files.values() for d in found if len(d) > 2]
    if args.eval:
        return [], cut(documents, context)
    rest = [d for i, d in enumerate(documents) if i % HELD_OUT]
    if not rest:
        raise UserError(f"{' and '.join(args.data)}: at least 2 documents of 3 tokens are needed, one is held out")
    rest = cut([Document.joined(rest)], min(args.pack, context)) if args.pack else cut(rest, context)
    return rest, cut(documents[::HELD_OUT], context)

def documents_by_temperature(documents: list) -> dict:
    """Documents in which there is something to guess, by the temperature that the base model wrote them at, the lowest
    first; what it did not write: 0."""
    groups = {}
    for d in documents:
        if d.loss[2:].any():
            groups.setdefault(d.temperature or 0.0, []).append(d)
    return dict(sorted(groups.items())) or {0.0: documents}

def untrained(args, model: Llama, documents: list) -> MedusaHeads:
    """New heads, in at least float32 to be trained in."""
    token_map = args.draft_vocab and most_frequent(documents, args.draft_vocab, model.config.vocab_size)
    heads = build_heads(model, args.num_heads, args.num_layers, args.kind, args.width, args.recent, args.tie_lm_head,
                        args.trunk, token_map)
    weight = model.norm.weight
    heads = heads.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    if args.draft_vocab and not args.medusa_2:          # the base model stays as it is
        with torch.no_grad():
            heads.freeze()
    return heads

def main():
    args = arguments()
    if Path(args.out).is_file():
        raise UserError(f"{args.out} is a file: --out names a folder")
    if Path(args.out).resolve() == Path(args.model).resolve():
        raise UserError(f"{args.out} is the model's own folder: give --out another one, such as {args.out}/medusa")
    if "export" in args:
        return print(exported(args))
    if not args.eval:
        keep_sources((Path(args.out, folder, name) for folder in ("", "medusa") for name in WRITTEN),
                     [args.model, *(file for path in args.data for file in beside(path))])
    start_processes(args)
    torch.manual_seed(args.seed)
    model = Llama.from_pretrained(args.model, device=args.device, dtype=torch.float32 if args.medusa_2 else None)
    set_threads(model, rows=64)
    tokenizer = Tokenizer(args.model, model.config)
    documents, held_out = split(args, tokenizer, model)
    out, groups = {"out": str(args.out)}, documents_by_temperature(held_out)
    evaluated = lambda heads: {t: evaluate(model, heads, texts, args.batch_tokens, Sampling(t))
                               for t, texts in groups.items()}
    if args.eval:
        heads = load_heads(args.out, model)
        trees = {t: Tree.from_pretrained(args.out, heads, t) for t in groups}
        found = evaluated(heads)
    else:
        heads = untrained(args, model, documents)
        out |= {"base_loss_before": [*evaluated(heads).values()][0][0]["base_loss"]} if args.medusa_2 else {}
        with claimed(args.out):
            train(model, heads, documents, args)
            end_processes()
            if shard()[0] > 0:
                return
            folder = save_results(args, model, heads)
            heads = load_heads(folder, model)                                    # as stored
            found = evaluated(heads)
            trees = save_trees(folder, found, args.tree_nodes)
            (Path(args.out) / "checkpoint.pt").unlink(missing_ok=True)
    first, *more = [{"temperature": t} | figures | {"acceptance": simulate(trees[t], ranks, own)}
                    for t, (figures, ranks, own) in found.items()]
    parameters = sum(p.numel() for p in heads.parameters())
    result = out | {"kind": getattr(heads, "kind", "medusa"), "parameters": parameters} | first | {"sampled": more}
    print(json.dumps(result) if args.json else report(result))

if __name__ == "__main__":
    command_line(main)
