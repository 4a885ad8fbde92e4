"""Medusa (arXiv 2401.10774) on a frozen Llama: heads draft, a tree verifies, the longest accepted path stays.

Plain decoding, Medusa, batches and sampling are one function of tensors, `step`:

    state (cache, length[B], token[B], recent[B, R, H], ...)         token: emitted, not yet in the cache
      draft    heads(recent) → top ranks → ids[B, N], ids[:, 0] = token                             "medusa"
      verify   one forward over all nodes of the tree → hidden[B, N, H], logits[B, N, V]            "tree"
      accept   choose a token at every node, walk while it matches a child → path, out, count       "posterior"
      commit   keep the path's keys and values; token and hidden states of its end                  "update"

Plain decoding is `step` with `Tree.root()` and no heads. Since a node's token is kept only where it equals what the
base itself chose there, the output is plain decoding's, token for token, at any temperature (see `choose`).

Shape letters: B rows, N nodes of the tree (root included), P path length (tree depth + 1), K heads, R hidden states a
               head sees, T tokens, W window of the cache, H hidden, V vocabulary, D draft vocabulary
"""
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
import warnings
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils._pytree import tree_flatten, tree_unflatten

import llama
from llama import (HEADS_INSIDE, MOST, ROTARY_SLACK, SMALL_HEAD, Int8Head, Llama, LlamaConfig, UserError,
                   at_least_float32, check_tensors, keep_rows, locate, mask_table, new_cache, open_tensors, read_json,
                   read_tensors, some_rows, visible, warn, weight_files, write_atomic, write_json, write_tensors)

# ------------------------------------------------------------------------------------------------------------- tree

# mc_sim_7b_63 of the official code, best first, so any prefix is a tree: "01" is rank 0 of head 1, rank 1 of head 2
PUBLISHED_TREE = [[int(rank) for rank in path] for path in (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 0000 "
    "011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070").split()]


LARGEST_TREE = 2048     # paths: each pair of nodes has entries in its tables


def published_tree(num_heads: int, nodes: int = 15, vocab_size: int = 10) -> list[list[int]]:
    """The first `nodes` paths of mc_sim_7b_63 that `num_heads` heads with so many tokens to draft can have."""
    return [path for path in PUBLISHED_TREE if len(path) <= num_heads and max(path) < vocab_size][:nodes]


class Level(NamedTuple):
    """The nodes that one call of the heads drafts: those of heads `first + 1` to `last`, read at M nodes."""
    first: int
    last: int
    at: Tensor         # [M, first + 1] the nodes from the root to each node that is read at
    head: Tensor       # [n] for every node drafted: which of these heads guesses it,
    slot: Tensor       # [n] read at which of the M nodes,
    rank: Tensor       # [n] and which of the guesses it is
    ranks: int         # guesses needed of a head


class Tree(NamedTuple):
    """A static tree of candidates. Node 0 is the root, the base's own token; parents precede their children."""
    paths: list        # node → the ranks on its way from the root: [] the root, [0, 2] rank 2 of head 2 after rank 0
    parent: Tensor     # [N] (the root is its own parent)
    depth: Tensor      # [N]
    ancestors: Tensor  # [N, N] bool, ancestors[i, j]: j is i or an ancestor of i
    mask: Tensor       # [N, N + 2] what a node may see: see `mask_table`
    on_path: Tensor    # [N, N] float, on_path[j, i]: j is i or an ancestor of i, and not the root
    path: Tensor       # [N, P] the nodes from the root to node n; beyond its depth path[n, j] = j (any j.. would do)
    levels: list       # how it is drafted: all nodes at once from the root, or depth by depth (`sequential`)

    @classmethod
    def from_paths(cls, paths, num_heads: int, vocab_size: int, sequential: bool = False) -> "Tree":
        """From a list of paths of ranks such as [[0], [0, 0], [1]], in any order; the root is implied.

        Raises UserError that names the path: not a list of ranks, twice, an ancestor missing, deeper than the heads
        or a rank beyond the vocabulary.
        """
        if not isinstance(paths, (list, tuple)):
            raise UserError(f"tree: expected a list of paths such as [[0], [0, 0], [1]], got {paths!r}")
        if len(paths) > LARGEST_TREE:
            raise UserError(f"tree: {len(paths)} paths, at most {LARGEST_TREE} are supported")
        for p in paths:
            if not isinstance(p, (list, tuple)) or not p or any(type(r) is not int or r < 0 for r in p):
                raise UserError(f"tree: {p!r} is not a path: expected a list of ranks such as [0, 2]")
        nodes = sorted([(), *map(tuple, paths)], key=lambda p: (len(p), p))
        index = {p: i for i, p in enumerate(nodes)}
        for p in nodes[1:]:
            if p[:-1] not in index:
                raise UserError(f"tree: path {list(p)} has no ancestor {list(p[:-1])}: add it")
            if len(p) > min(num_heads, ROTARY_SLACK):
                raise UserError(f"tree: path {list(p)} has depth {len(p)}, there are only {num_heads} heads")
            if max(p) >= vocab_size:
                raise UserError(f"tree: path {list(p)} has rank {max(p)}, the vocabulary only {vocab_size} entries")
        if len(index) < len(nodes):
            twice = next(p for i, p in enumerate(nodes) if index[p] != i)
            raise UserError(f"tree: path {list(twice)} stands in it twice")
        deepest = len(nodes[-1])
        path = torch.tensor([[index[p[:j]] if j <= len(p) else j for j in range(deepest + 1)] for p in nodes])
        depth = torch.tensor([len(p) for p in nodes])
        ancestors = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for i, p in enumerate(nodes):
            ancestors[i, path[i, :len(p) + 1]] = True
        spans = [(d, d + 1) for d in range(deepest)] if sequential else [(0, deepest)][:deepest]
        levels = []
        for first, last in spans:
            new = [p for p in nodes if first < len(p) <= last]
            at = sorted({p[:first] for p in new})
            head, slot, rank = torch.tensor([(len(p) - 1 - first, at.index(p[:first]), p[-1]) for p in new]).unbind(1)
            seen = torch.tensor([[index[a[:j]] for j in range(first + 1)] for a in at])
            levels.append(Level(first, last, seen, head, slot, rank, 1 + int(rank.max())))
        on_path = ancestors.t().float().index_fill(0, torch.tensor(0), 0)
        return cls([list(p) for p in nodes], torch.tensor([index[p[:-1]] for p in nodes]), depth, ancestors,
                   mask_table(ancestors), on_path, path, levels)

    @classmethod
    def root(cls) -> "Tree":
        """The tree of plain decoding: one node."""
        return cls.from_paths([], 0, 1)

    def to(self, device) -> "Tree":
        move = lambda fields: [f.to(device) if isinstance(f, Tensor) else f for f in fields]
        return Tree(*move(self[:-1]), [Level(*move(level)) for level in self.levels])

    def draw(self) -> list[tuple[int, str]]:
        """The tree as text: for each node from top to bottom, its number and the branches in front of it."""
        def lines(node, before):
            children = [i for i in range(1, len(self.paths)) if self.parent[i] == node]
            for child in children:
                last = child == children[-1]
                yield child, f"{before}{'└─' if last else '├─'}"
                yield from lines(child, before + ("  " if last else "│ "))
        return [(0, ""), *lines(0, "")]

    def __str__(self) -> str:
        """The tree with a node's rank a line."""
        return "\n".join(branches + (str(self.paths[node][-1]) if node else "root") for node, branches in self.draw())


def path_hits(ranks: list, widest: int = 32) -> Counter:
    """For each path of ranks below `widest`, the places where all of it was right (joint counts, not a product).

    ranks: for each text [K, n], the rank that head k gave the right token at each place (0: its first guess).
    """
    hits = Counter()
    for place in itertools.chain.from_iterable(rank.t().tolist() for rank in ranks):
        right = list(itertools.takewhile(lambda r: r < widest, place))
        hits.update(tuple(right[:depth]) for depth in range(1, len(right) + 1))
    return hits


def grow_tree(hits: dict[tuple, int], nodes: int, deepest: int = ROTARY_SLACK) -> list[list[int]]:
    """The `nodes` paths that were right most often; `hits`: path of ranks → places where all of it was right.

    A path is right only where its ancestors are, so the most frequent ones always form a tree, and of all trees of
    this size it is the one with the most expected accepted tokens at a place (section 2.3.3, with joint counts).
    """
    paths = [path for path in hits if len(path) <= deepest]
    return [list(path) for path in sorted(paths, key=lambda path: (-hits[path], len(path), path))[:nodes]]


def walk(tree: Tree, ranks: list, own: list) -> dict:
    """Decodes known texts with a tree, from their ranks alone.

    ranks: see `path_hits`; own: for each text bool [n], where the root is a token of the model and another follows.
    The steps of `generate`, but for ties: one begins at the first place and the next where the last one ended. A mean
    over all places instead would overstate, since steps land on the places that were hard to guess.
    tokens_per_step: new tokens behind the first / steps; depth_reach: the share of steps that accept at least 0, 1, ..
    drafts; node_reach: that accept each node, by its path.
    """
    ends = torch.zeros(len(tree.paths))
    for rank, mine in zip(ranks, own, strict=True):
        node = torch.zeros(rank.shape[1], dtype=torch.long)             # the deepest right node at each place
        for i, path in enumerate(tree.paths[1:], 1):
            node[(rank[:len(path)] == torch.tensor(path)[:, None]).all(0)] = i
        taken, allowed, begun, place = (tree.depth[node] + 1).tolist(), mine.tolist(), [], 0
        while place < len(taken):
            if allowed[place]:
                begun.append(place)
            place += taken[place] if allowed[place] else 1
        ends += torch.bincount(node[begun], minlength=len(ends))
    steps = max(1, int(ends.sum()))
    reach = ends @ tree.ancestors.float() / steps                       # an accepted node's ancestors are accepted
    by_depth = torch.zeros(tree.path.shape[1]).index_add(0, tree.depth, reach)
    rounded = lambda values: [round(v, 4) for v in values.tolist()]
    return {"nodes": len(tree.paths), "steps": int(ends.sum()),
            "tokens_per_step": round(sum(int(m.sum()) for m in own) / steps, 4), "depth_reach": rounded(by_depth),
            "node_reach": dict(zip((" ".join(map(str, path)) or "root" for path in tree.paths), rounded(reach),
                                   strict=True))}


# ------------------------------------------------------------------------------------------------------------ heads

KINDS = ("medusa", "root", "hydra")     # what a head sees beside the hidden state: see MedusaHeads


class ResidualBlock(nn.Module):
    """x + SiLU(W z + b), or wide: x + D SiLU(U z + b) with U [width, ..], D [H, width]; K heads at once.

    z [inputs] is x, and in the first block all that the head sees. Starts as the identity (W, b and D zero), so that an
    untrained head repeats the base.
    """
    def __init__(self, num_heads: int, hidden_size: int, width: int | None, inputs: int):
        super().__init__()
        if width is None:
            self.linear_weight = nn.Parameter(torch.zeros(num_heads, hidden_size, inputs))
            self.linear_bias = nn.Parameter(torch.zeros(num_heads, hidden_size))
        else:
            self.up_weight = nn.Parameter(torch.empty(num_heads, width, inputs))
            self.up_bias = nn.Parameter(torch.zeros(num_heads, width))
            self.down_weight = nn.Parameter(torch.zeros(num_heads, hidden_size, width))
            nn.init.normal_(self.up_weight, std=hidden_size ** -0.5)

    def forward(self, x: Tensor, z: Tensor, first: int) -> Tensor:
        """x [k, T, H], z [k, T, inputs or fewer] for k heads from the one with index `first` on → [k, T, H]."""
        heads, wide = slice(first, first + len(x)), hasattr(self, "up_weight")
        weight, bias = (self.up_weight, self.up_bias) if wide else (self.linear_weight, self.linear_bias)
        y = F.silu(torch.baddbmm(bias[heads, None], z, weight[heads, :, :z.shape[-1]].transpose(1, 2)))
        return torch.baddbmm(x, y, self.down_weight[heads].transpose(1, 2)) if wide else x + y


class MedusaHeads(nn.Module):
    """K heads; head k = 1..K guesses the token k+1 places after the one whose hidden state it sees (section 2.1).

    A head is `num_layers` residual blocks, each with weights of its own, then a vocabulary matrix: its own (the
    paper's), or the base's `lm_head` (`tie_lm_head`). `width`: the blocks' inner width, None for the paper's square.
    `kind` says what a head sees beside the hidden state: "medusa" nothing; "root" the token that the base has chosen
    already, the root of the tree; "hydra" all tokens between the hidden state and its guess, k of them (Hydra,
    arXiv 2402.05109), so it drafts depth by depth. Tokens are seen as the base's embeddings, scaled to RMS 1.
    `recent`: it sees the hidden states of so many last positions (the paper: 1), zeros in front of the text.
    `token_map` [D]: the ids that the heads may draft, None for all V. Verification sees every id, so it stays exact.
    Parameters are stacked over the heads; on disk they have the official names `{k}.{j}.linear.weight`, ... (`names`).
    """
    def __init__(self, model: Llama, num_heads: int, num_layers: int = 1, tie_lm_head: bool = False,
                 width: int | None = None, kind: str = "medusa", recent: int = 1, token_map: Tensor | None = None):
        super().__init__()
        self.num_heads, self.num_layers, self.tie_lm_head, self.width = num_heads, num_layers, tie_lm_head, width
        self.kind, self.recent = kind, recent
        self.hidden_size, self.vocab_size = model.config.hidden_size, model.config.vocab_size
        self.register_buffer("token_map", token_map)
        self.draft_size = self.vocab_size if token_map is None else len(token_map)
        self.blocks = nn.ModuleList(
            ResidualBlock(num_heads, self.hidden_size, width, self.hidden_size if j else self.inputs(num_heads))
            for j in range(num_layers))
        self.vocabulary = None if tie_lm_head else \
            nn.Parameter(torch.empty(num_heads, self.draft_size, self.hidden_size))

    def borrow(self, model: Llama) -> None:
        """What is the base's own and not a parameter here: scaled embeddings [V, H], and the `lm_head` rows [D, H]."""
        embeddings, lm_head = model.embed_tokens.weight[:], model.lm_head.weight[:]     # views: no parameters of ours
        if self.kind != "medusa":
            embeddings = F.rms_norm(embeddings, (self.hidden_size,), eps=1e-6)
        self.register_buffer("embeddings", embeddings, persistent=False)
        rows = lm_head if self.token_map is None else lm_head[self.token_map]
        self.register_buffer("lm_head", rows, persistent=False)

    @classmethod
    def untrained(cls, model: Llama, num_heads: int, **options) -> "MedusaHeads":
        """New heads that repeat the base: blocks are the identity, own vocabulary matrices copies of its `lm_head`."""
        heads = cls(model, num_heads, **options)
        heads.to(model.norm.device, at_least_float32(model.norm.dtype))     # to be trained in
        heads.borrow(model)
        if heads.vocabulary is not None:
            heads.vocabulary.data.copy_(heads.lm_head.detach().expand_as(heads.vocabulary))
        return heads

    def seen(self, k: int) -> int:
        """How many tokens behind the hidden state head k sees."""
        return {"medusa": 0, "root": 1, "hydra": k}[self.kind]

    def inputs(self, k: int) -> int:
        """Numbers that head k sees: hidden states, then embeddings."""
        return self.hidden_size * (self.recent + self.seen(k))

    def forward(self, recent: Tensor, tokens: Tensor, first: int, last: int) -> Tensor:
        """The heads `first + 1` to `last`, as many as may run at once: logits [last - first, T, D].

        recent [T, R, H] of the base in the heads' dtype, newest last; tokens [T, n]: the ids that follow, at least
        those seen.
        """
        z = recent.flatten(1)
        if seen := self.seen(last):
            embedded = F.embedding(tokens[:, :seen], self.embeddings).flatten(1)
            z = torch.cat((z, embedded.to(z.dtype)), 1)                                             # [T, inputs]
        x, z = (t.expand(last - first, *t.shape) for t in (recent[:, -1], z))
        for block in self.blocks:
            x = z = block(x, z, first)
        if self.vocabulary is None:
            return F.linear(x, self.lm_head.to(x.dtype))
        return torch.bmm(x, self.vocabulary[first:last].transpose(1, 2))

    def all_logits(self, recent: Tensor, tokens: Tensor) -> Tensor:
        """Every head on the true tokens, as in training: recent [T, R, H], tokens [T, K] → [K, T, D]."""
        if self.kind != "hydra":
            return self(recent, tokens, 0, self.num_heads)
        return torch.cat([self(recent, tokens, k, k + 1) for k in range(self.num_heads)])

    def tree(self, paths) -> Tree:
        """The tree of some paths for these heads. UserError: see `Tree.from_paths`."""
        return Tree.from_paths(paths, self.num_heads, self.draft_size, sequential=self.kind == "hydra")

    def names(self) -> dict[str, Tensor]:
        """The official v0.1 names (and `{k}.{j}.up.weight` ... for wide blocks) → views of the stacked parameters."""
        named = {f"{k}.{j}.{name.replace('_', '.')}": p[k] for k in range(self.num_heads)
                 for j, block in enumerate(self.blocks) for name, p in block.named_parameters()}
        for k in range(self.num_heads):         # of a Hydra head's first matrix only the columns that it uses
            first = f"{k}.0.{'up' if self.width else 'linear'}.weight"
            named[first] = named[first][:, :self.inputs(k + 1)]
        if self.vocabulary is not None:
            named |= {f"{k}.{self.num_layers}.weight": self.vocabulary[k] for k in range(self.num_heads)}
        return named if self.token_map is None else named | {"token_map": self.token_map}

    def size(self) -> int:
        """How many parameters they have (the id map not counted)."""
        return sum(t.numel() for name, t in self.names().items() if name != "token_map")

    def save(self, folder, base_model: str, dtype: torch.dtype | None = None) -> None:
        """`model.safetensors` and `config.json`: the weights first, so that a config never stands without them."""
        tensors = {name: t.detach().to("cpu", dtype if t.is_floating_point() else None).contiguous().clone()
                   for name, t in self.names().items()}
        write_tensors(Path(folder) / "model.safetensors", tensors)
        write_json(Path(folder) / "config.json", {
            "base_model_name_or_path": base_model, "medusa_num_heads": self.num_heads,
            "medusa_num_layers": self.num_layers, "tie_lm_head": self.tie_lm_head, "medusa_width": self.width,
            "medusa_kind": self.kind, "medusa_recent": self.recent,
            "hidden_size": self.hidden_size, "vocab_size": self.vocab_size,
            "draft_vocab_size": None if self.token_map is None else self.draft_size})

    @classmethod
    def from_pretrained(cls, name_or_path, model: Llama, revision=None) -> "MedusaHeads":
        """Heads for `model`, in its dtype and on its device: ours, or a published checkpoint (see `head_files`).

        How many heads and blocks there are, and whether with vocabulary matrices, is read off the tensors' names.
        UserError: the config says otherwise, a tensor is missing or not understood, or the model is of another shape.
        """
        config, vocab_size = read_json(locate(name_or_path, "config.json", revision)), model.config.vocab_size
        whole = lambda v: type(v) is int and 1 <= v <= MOST
        for key, fits, want in (
                ("medusa_num_heads", whole, "a whole number"), ("medusa_num_layers", whole, "a whole number"),
                ("tie_lm_head", lambda v: v in (None, True, False), "true or false"),
                ("medusa_width", lambda v: v is None or whole(v), "a whole number or null"),
                ("medusa_kind", lambda v: v in (None, *KINDS), f"one of {', '.join(KINDS)}"),
                ("medusa_recent", lambda v: v is None or whole(v), "a whole number"),
                ("draft_vocab_size", lambda v: v is None or whole(v) and v <= vocab_size, "at most the vocabulary")):
            if not fits(config.get(key)):
                raise UserError(f"{name_or_path}: not Medusa heads, config.json has {key} {config.get(key)!r}, "
                                f"expected {want}")
        for key in ("hidden_size", "vocab_size"):
            if config.get(key, getattr(model.config, key)) != getattr(model.config, key):
                raise UserError(f"{name_or_path}: the heads expect {key} {config[key]}, the model has "
                                f"{getattr(model.config, key)}: train heads for this model or pass --heads none")
        what, size = f"heads {name_or_path}", config.get("draft_vocab_size")
        found = open_tensors(head_files(name_or_path, config, revision), what)
        if "model_type" in config:                              # the base's tensors are in the same files
            found = {n: at for n, at in found.items() if n.startswith(HEADS_INSIDE)}
        found = {n.removeprefix(HEADS_INSIDE): at for n, at in found.items()}
        num_heads, num_layers, tied = count_heads(found, config, what)
        with torch.device("meta"):
            heads = cls(model, num_heads, num_layers, tied, config.get("medusa_width"),
                        config.get("medusa_kind") or "medusa", config.get("medusa_recent") or 1,
                        None if size is None else torch.arange(size))
        check_tensors(found, heads.names(), what)
        heads = heads.to(model.norm.dtype).to_empty(device=model.norm.device)   # only now does it take memory
        warn(read_tensors(found, heads.names(), what), what)
        ids = torch.arange(1) if heads.token_map is None else heads.token_map
        if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) < len(ids):
            raise UserError(f"{what}: token_map must hold different ids below {vocab_size}")
        heads.borrow(model)
        return heads.requires_grad_(False).eval()


def head_files(name_or_path, config: dict, revision=None) -> list[Path]:
    """Where heads are kept: ours, the official ones beside a config (v0.1), or inside a whole model's files (v1.0)."""
    if "model_type" in config:
        return weight_files(name_or_path, revision)
    for name in ("model.safetensors", "medusa_lm_head.safetensors", "medusa_lm_head.pt"):
        if file := locate(name_or_path, name, revision, required=False):
            return [file]
    return [locate(name_or_path, "model.safetensors", revision)]


def count_heads(found: dict, config: dict, what: str) -> tuple[int, int, bool]:
    """How many heads and blocks the tensors' names tell, and whether there is no vocabulary matrix; see `names`.

    Published configs name fewer heads than their files hold: all are used, and a line on stderr says so.
    """
    blocks = [re.fullmatch(r"(\d{1,9})\.(\d{1,9})\.(?:linear|up)\.weight", name) for name in found]
    numbers = [tuple(map(int, match.groups())) for match in blocks if match]
    if not numbers:
        raise UserError(f"{what}: no Medusa heads among its tensors, expected names such as 0.0.linear.weight")
    num_heads, num_layers = (1 + max(column) for column in zip(*numbers, strict=True))
    if num_heads * num_layers > len(found):
        raise UserError(f"{what}: the tensors' names tell {num_heads} heads of {num_layers} blocks, but there are only "
                        f"{len(found)} tensors")
    tied, said = f"0.{num_layers}.weight" not in found, config["medusa_num_heads"]
    if said < num_heads:
        print(f"{what}: config.json says {said} heads, the file holds {num_heads}: all are used", file=sys.stderr)
    for key, value, fits in (("medusa_num_heads", num_heads, said <= num_heads),
                             ("medusa_num_layers", num_layers, config["medusa_num_layers"] == num_layers),
                             ("tie_lm_head", tied, config.get("tie_lm_head") in (None, tied))):
        if not fits:
            raise UserError(f"{what}: config.json has {key} {config[key]!r}, the tensors tell {value!r}")
    return num_heads, num_layers, tied


def base_of(name_or_path, revision=None) -> str | None:
    """The model that some heads belong to, if the name is that of heads alone, as published: else None."""
    config = read_json(locate(name_or_path, "config.json", revision))
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and "model_type" not in config else None


def read_tree(text, mode: str | None = None, rows: int = 1) -> tuple[list, str | None]:
    """A tree from JSON, text or a file: a list of paths, or an object whose `paths` is one → the paths and a remark.

    Where such an object has been tuned for `mode` ("cpu", "cpu compiled", "cpu batch 8", ..), in `modes`, that entry's
    count: the one for so many rows, or the next fewer.
    """
    source = str(text).strip()
    if source[:1] not in ("[", "{"):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"can't read the tree {text}: {error}") from error
    try:
        tree = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the tree is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        return tree, None
    modes = tree.get("modes", {})
    if not isinstance(modes, dict) or not all(isinstance(entry, dict) for entry in (*modes.values(), tree)):
        raise UserError("the tree: 'modes' must be an object of objects")
    named = {name: re.fullmatch(rf"{mode}(?: batch (\d{{1,9}}))?", name) for name in modes}
    tuned = {int(match[1] or 1): modes[name] for name, match in named.items() if match}
    tree = tuned.get(max((n for n in tuned if n <= rows), default=None), tree)
    if "paths" not in tree:
        raise UserError("the tree is a JSON object without the key 'paths'")
    return tree["paths"], tree.get("remark")


def load_tree(folder, heads: MedusaHeads, given=None, mode: str | None = None, rows: int = 1) -> tuple[Tree, str]:
    """The tree of some heads and where it is from: the one given (JSON or a file), else `tree.json` in their folder,
    else the published one. What was tuned for `mode` and the rows may be the root alone: plain decoding is faster."""
    source = given if given is not None else locate(folder, "tree.json", required=False)
    if source is None:
        paths = published_tree(heads.num_heads, vocab_size=heads.draft_size)
        return heads.tree(paths), "mc_sim_7b_63, published"
    try:
        paths, remark = read_tree(source, mode, rows)
        return heads.tree(paths), f"{source}: {remark}" if remark else str(source)
    except UserError as error:
        raise error if source is given else UserError(f"{source}: {error}") from error


# --------------------------------------------------------------------------------------------------- choosing a token

class Sampling(NamedTuple):
    """temperature 0: the most likely token. top_k 0 and top_p 1: no limit.

    epsilon None: a draft stays where it equals the base's own choice, so the output is plain decoding's. Else typical
    acceptance (section 2.3.1), if temperature > 0: see `typical`; then what Medusa writes is not what sampling would.
    """
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    epsilon: float | None = None
    delta: float = 0.3

    @property
    def is_typical(self) -> bool:
        return self.epsilon is not None and self.temperature > 0


GREEDY = Sampling()


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [..., V] → probabilities in float64: temperature, then top-k (ties: the lower id), then top-p, as HF does.

    top-p keeps the fewest most likely tokens that together reach top_p, at least one.
    """
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature     # the largest is 0 at any temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[..., -1:]
        above, ties = logits > kth, logits == kth
        keep = above | (ties & (ties.cumsum(-1) <= sampling.top_k - above.sum(-1, keepdim=True)))
        logits = logits.masked_fill(~keep, -torch.inf)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
        cut = (ordered.cumsum(-1) - ordered) >= sampling.top_p         # what stands before it reaches top_p already
        cut[..., 0] = False
        probs = probs.masked_fill(torch.zeros_like(cut).scatter_(-1, ids, cut), 0)
    return probs


def most_likely(logits: Tensor) -> Tensor:
    """logits.argmax(-1), ties to the lower id; through the maxima of blocks of 128, which torch finds much faster."""
    if logits.shape[-1] % 128 or logits.numel() < 16384:
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, 128))
    best = blocks.amax(-1).argmax(-1, keepdim=True)                                                 # [..., 1]
    inside = blocks.gather(-2, best[..., None].expand(*best.shape, 128))[..., 0, :].argmax(-1)
    return best[..., 0] * 128 + inside


def choose(logits: Tensor, uniform: Tensor | None, sampling: Sampling) -> Tensor:
    """One token a node: logits [B, N, V] and a uniform in [0, 1) each [B, N] → ids [B, N].

    The randomness is an input: the uniform inverts the CDF in vocabulary order. A node's draw depends on its own
    logits and on the uniform of its *position* only, so it is the very draw that plain decoding makes there.
    """
    if sampling.temperature == 0:
        return most_likely(logits)
    cdf = warp(logits, sampling).cumsum(-1)
    ids = torch.searchsorted(cdf, (uniform * cdf[..., -1])[..., None], right=True).squeeze(-1)
    return ids.clamp(max=logits.shape[-1] - 1)      # only ever needed when the logits are NaN


def typical(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """What typical acceptance goes by, for logits [..., V]: most likely ids [...], log-probabilities [..., V] and the
    least one that a draft may have [...]: min(epsilon, delta exp(-entropy)). Nothing is drawn, as in the official code.
    """
    log_probs = warp(logits, sampling).log()
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)
    least = (math.log(sampling.delta) - entropy).clamp(max=math.log(sampling.epsilon))
    return most_likely(logits), log_probs, least


def choice_margin(logits: Tensor, uniform: float, sampling: Sampling) -> float:
    """How near `choose` was to another token: logits [V] → gap of the two best, or in probability to the nearest edge.

    The edges are those of the CDF around the uniform, of the top-k and of the nucleus.
    """
    if sampling.temperature == 0:
        best, second = logits.double().topk(2).values.tolist()
        return best - second
    cdf = warp(logits, sampling).cumsum(-1)
    margins = [(cdf / cdf[-1] - uniform).abs().min().item()]
    if 0 < sampling.top_k < len(logits):
        edge = warp(logits, Sampling(sampling.temperature)).topk(sampling.top_k + 1).values
        margins.append((edge[-2] - edge[-1]).item())
    if sampling.top_p < 1:
        nucleus = warp(logits, sampling._replace(top_p=1.0)).sort(descending=True).values.cumsum(-1)
        margins.append((nucleus - sampling.top_p).abs().min().item())
    return min(margins)


def uniforms(seeds, count: int) -> Tensor:
    """[B, count] float64: the t-th number of a row depends on the row's seed and t alone, never on the batch."""
    draw = lambda seed: torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.stack([draw(seed) for seed in seeds])


# ---------------------------------------------------------------------------------------------------------- the step

class State(NamedTuple):
    """Everything that changes while decoding. Invariant: emitted tokens = those in the cache behind the prompt + 1."""
    cache: Tensor      # [L, B, S, 2, G, D], the one tensor written in place
    length: Tensor     # [B] committed slots of the cache
    token: Tensor      # [B] emitted, not yet in the cache: the root of the next tree
    recent: Tensor     # [B, R, H] the newest hidden states; the last one chose `token`
    emitted: Tensor    # [B] new tokens so far
    remaining: Tensor  # [B] new tokens that may still follow; 0: the row is finished
    uniform: Tensor    # [B, ...] float64, one a position


def call(name, function, *args):
    """How `step` runs its stages; `Stages` is the same with a clock."""
    return function(*args)


def draft(heads: MedusaHeads | None, tree: Tree, state: State) -> Tensor:
    """The candidates: ids [B, N], the root's and what each call of the heads adds (Hydra: one a depth).

    The heads read the hidden states up to the one that chose the root, and the ids on the way to where they are read.
    """
    ids = state.token[:, None]
    for level in tree.levels:
        rows, places = len(ids), len(level.at)
        recent = state.recent[:, None].expand(-1, places, -1, -1).flatten(0, 1)                     # [B M, R, H]
        logits = heads(recent, ids[:, level.at].flatten(0, 1), level.first, level.last)             # [k, B M, D]
        top = logits.topk(level.ranks).indices.unflatten(1, (rows, places))                         # [k, B, M, ranks]
        new = top[level.head, :, level.slot, level.rank].t()                                        # [B, n]
        ids = torch.cat((ids, new if heads.token_map is None else heads.token_map[new]), 1)
    return ids


def feed(model: Llama, ids: Tensor, depth: Tensor, mask: Tensor, cache: Tensor, length: Tensor,
         window: Tensor) -> Tensor:
    """New tokens ids [B, T] behind each row's committed prefix: writes their keys and values → hidden [B, T, H]."""
    slots = length[:, None] + torch.arange(ids.shape[1], device=ids.device)
    return model(ids, length[:, None] + depth, visible(length, mask, window), cache, slots)


def verify(model: Llama, tree: Tree, ids: Tensor, state: State, window: Tensor) -> tuple[Tensor, Tensor]:
    """One forward over all nodes: hidden [B, N, H], logits [B, N, V]."""
    hidden = feed(model, ids, tree.depth, tree.mask, state.cache, state.length, window)
    return hidden, model.lm_head(hidden)


def accept(tree: Tree, ids: Tensor, logits: Tensor, state: State, sampling: Sampling, eos: Tensor):
    """The longest path whose every token is what the base chose at its parent → path [B, P], out [B, P], count [B].

    out[:count] are the new tokens: the choices at the path's nodes, the last one at its end. `count` also ends at the
    row's limit and with the first end-of-text token. Siblings differ, so at most one node a depth survives; by
    `typical` acceptance several may, and of the longest paths the most likely one is kept.
    """
    if sampling.is_typical:
        choice, log_probs, least = typical(logits, sampling)                                        # [B, N], the root's
        drafted = log_probs[:, tree.parent].gather(2, ids[..., None])[..., 0]                       # [B, N]
        refused = drafted <= least[:, tree.parent]
        # of the longest paths the most likely: below 1 for every path, since a log-probability is above -1e4
        merit = 1 / (1 - drafted.clamp(min=-1e4).to(tree.on_path.dtype) @ tree.on_path)
    else:
        uniform = None if sampling.temperature == 0 else state.uniform.gather(1, state.emitted[:, None] + tree.depth)
        choice, merit = choose(logits, uniform, sampling), 0                                        # [B, N]
        refused = ids != choice[:, tree.parent]
    wrong = refused.float() @ tree.on_path                                      # [B, N] refusals on the way to a node
    last = (tree.depth + 1 + merit - len(tree.depth) * wrong).argmax(-1)        # [B] the deepest node without one
    path = tree.path[last]                                                                          # [B, P]
    out = choice.gather(1, path)                                                                    # [B, P]
    if sampling.is_typical:                                                     # drafts, then the choice at the end
        inner = torch.arange(out.shape[1] - 1, device=out.device) < tree.depth[last][:, None]
        out = torch.cat((torch.where(inner, ids.gather(1, path[:, 1:]), out[:, :-1]), out[:, -1:]), 1)
    ends = ending(out, eos)
    place = torch.arange(1, out.shape[1] + 1, device=out.device)
    until = torch.where(ends, place, out.shape[1]).amin(1)                      # up to the first end-of-text token
    return path, out, torch.minimum(torch.minimum(until, tree.depth[last] + 1), state.remaining)


def ending(ids: Tensor, eos: Tensor) -> Tensor:
    """Which ids are one of eos [E]: bool, as ids."""
    return (ids[..., None] == eos).any(-1)


def latest(recent: Tensor, new: Tensor, count: Tensor) -> Tensor:
    """The newest R things when the first count [B] of new [B, T, ..] follow recent [B, R, ..]: [B, R, ..]."""
    index = count[:, None] + torch.arange(recent.shape[1], device=count.device)                     # [B, R]
    return torch.cat((recent, new), 1)[torch.arange(len(count), device=count.device)[:, None], index]


def commit(state: State, hidden: Tensor, path: Tensor, out: Tensor, count: Tensor, eos: Tensor) -> State:
    """Keeps the cache rows of the path and moves on by `count` tokens; count 0 leaves a row as it was.

    All P rows are copied whatever was accepted, so the shapes stay static: the surplus is garbage beyond `length`.
    """
    rows = torch.arange(len(count), device=count.device)[:, None]
    if path.shape[1] > 1:
        keep_rows(state.cache, state.length, path)
    token = latest(state.token[:, None], out, count)[:, 0]
    remaining = (state.remaining - count).masked_fill(ending(token, eos), 0)
    return state._replace(length=state.length + count, token=token,
                          recent=latest(state.recent, hidden[rows, path], count),
                          emitted=state.emitted + count, remaining=remaining)


def reported(state: State, out: Tensor, count: Tensor) -> tuple[State, Tensor]:
    """A state and what the host reads of it, in one tensor [B, 2 + P]: count, remaining, out."""
    return state, torch.cat((count[:, None], state.remaining[:, None], out), 1)


def step(model: Llama, heads: MedusaHeads | None, tree: Tree, state: State, window: Tensor, sampling: Sampling,
         eos: Tensor, run=call) -> tuple[State, Tensor]:
    """One decoding step → the next state and what the host reads, [B, 2 + P]: count, remaining, out.

    Row b emits out[b, :count[b]]. window [W] = 0, 1, ..: the slots of the cache that attention reads, at least all that
    are in use.
    """
    ids = run("medusa", draft, heads, tree, state)
    hidden, logits = run("tree", verify, model, tree, ids, state, window)
    path, out, count = run("posterior", accept, tree, ids, logits, state, sampling, eos)
    return reported(run("update", commit, state, hidden, path, out, count, eos), out, count)


# -------------------------------------------------------------------------------------------------- the compiled step

LARGEST_COMPILED = 2 ** 30      # bytes of parameters: a compiled graph brings its own copy, packed for its kernels

COMPILE_OPTIONS = {     # of torch's Inductor; each was measured to pay
    "freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN",    # weights packed for C++ GEMMs
    "realize_opcount_threshold": 8, "realize_reads_threshold": 2,                # the mask once, not in each layer anew
    "cpp.enable_floating_point_contract_flag": "fast",                           # fused multiply-adds
    "size_asserts": False, "nan_asserts": False, "alignment_asserts": False,
    "autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}


class StepGraph(nn.Module):
    """`step` with all that stays the same, as torch.export wants it: tensors in, tensors out."""

    def __init__(self, model: Llama, heads: MedusaHeads | None, tree: Tree, sampling: Sampling, eos: Tensor):
        super().__init__()
        self.model, self.heads, self.sampling = model, heads, sampling
        leaves, self.spec = tree_flatten((tree, eos))
        self.names = [f"constant_{i}" if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
        for name, leaf in zip(self.names, leaves, strict=True):
            if isinstance(leaf, Tensor):
                self.register_buffer(name, leaf)

    def forward(self, window: Tensor, *state: Tensor) -> tuple:
        constants = [getattr(self, name) if isinstance(name, str) else name for name in self.names]
        tree, eos = tree_unflatten(constants, self.spec)
        state, report = step(self.model, self.heads, tree, State(*state), window, self.sampling, eos)
        return *state[1:], report                                               # the cache is written in place


def graph_key(graph: StepGraph, state: State) -> str:
    """A name for a compiled step: a hash of everything that it depends on, the code and the weights included."""
    digest = hashlib.sha256(repr((
        torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), COMPILE_OPTIONS,
        graph.model.config, graph.sampling, graph.names, [(t.shape, t.dtype, t.stride()) for t in state])).encode())
    for file in (__file__, llama.__file__):
        digest.update(Path(file).read_bytes())
    for name, tensor in itertools.chain(graph.named_parameters(), graph.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def compile_step(model: Llama, heads: MedusaHeads | None, tree: Tree, state: State, sampling: Sampling, eos: Tensor):
    """`step` as one graph: a function (window, *state) → (*state without the cache, report), for states of this shape.

    On a CPU ahead of time (AOTInductor): a minute or less, then kept beside torch's own cache, from where it loads in
    milliseconds. Elsewhere by torch.compile with CUDA graphs. UserError where it can't be done.
    """
    graph = StepGraph(model, heads, tree, sampling, eos)
    if model.norm.device.type != "cpu":
        return torch.compile(graph, fullgraph=True, dynamic=False, mode="reduce-overhead")
    if model.size() > LARGEST_COMPILED or isinstance(model.lm_head, Int8Head) or model.lm_head.weight is None:
        raise UserError("the step of a packed or quantised model, or of one above 1 GiB, is not compiled: its graph "
                        "would hold the weights once more")
    path = Path(cache_dir()) / "tinymedusa" / f"{graph_key(graph, state)}.pt2"
    try:
        if not path.exists():
            print(f"compiling a step of {len(tree.paths)} nodes, to be kept in {path.parent}", file=sys.stderr)
            windows = 32 * torch.export.Dim("w", min=1, max=max(2, state.cache.shape[2] // 32))
            shapes = ({0: windows}, (None,) * len(state))
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(graph, (torch.arange(64), *state), dynamic_shapes=shapes, strict=False)
                write_atomic(path, lambda temporary: torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(temporary), inductor_configs={**COMPILE_OPTIONS}))   # torch adds to it
        run = torch._inductor.aoti_load_package(str(path)).loader.run
    except UserError:
        raise
    except Exception as error:      # the compiler raises what it likes
        raise UserError(f"the step can't be compiled here: {str(error).strip().partition(chr(10))[0]}") from error
    return lambda *tensors: run(list(tensors))


# --------------------------------------------------------------------------------------------------------- generation

PREFILL_CHUNK = 512     # prompt tokens a forward: bounds the memory of the mask and of the activations
SMALL_CHUNK = 64        # the same where attention is written out: its scores then stay in the CPU's cache, 3.5x faster


def window_of(slots: int, cache: Tensor) -> Tensor:
    """0, 1, .. up to at least `slots`, so that a short text does not pay for the context: the next multiple of 32, on a
    GPU the next power of two (a compiled graph has a window of its own there, and there should be few)."""
    slots = -(-slots // 32) * 32 if cache.device.type == "cpu" else max(128, 1 << (slots - 1).bit_length())
    return torch.arange(min(slots, cache.shape[2]), device=cache.device)


def prefill(model: Llama, prompts: list, cache: Tensor, recent: int = 1, kept: int = 0) -> tuple[Tensor, Tensor]:
    """Fills the cache with the prompts (chains of nodes), chunk by chunk → length [B], the last hidden [B, R, H].

    kept: so many slots hold the beginnings of the prompts already.
    """
    device, longest = cache.device, max(map(len, prompts))
    ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)              # [B, T]
    total = torch.tensor([len(p) for p in prompts], device=device)
    length = torch.full_like(total, kept)
    last = cache.new_zeros(len(prompts), recent, model.config.hidden_size)
    size = min(PREFILL_CHUNK, SMALL_CHUNK) if model.config.head_dim < SMALL_HEAD else PREFILL_CHUNK
    for begin in range(kept, longest, size):
        chunk = ids[:, begin:begin + size]
        depth = torch.arange(chunk.shape[1], device=device)
        hidden = feed(model, chunk, depth, mask_table(depth[:, None] >= depth), cache, length,
                      window_of(begin + chunk.shape[1], cache))
        new = (total - begin).clamp(0, chunk.shape[1])
        last, length = latest(last, hidden, new), length + new
    return length, last


def whole_cache(model: Llama, rows: int) -> Tensor:
    """A cache for the whole context, whatever is decoded in it."""
    return new_cache(model.config, rows, model.config.max_position_embeddings + PREFILL_CHUNK, like=model.norm)


def small_cache(model: Llama, rows: int, longest: int, max_new_tokens: int, nodes: int) -> Tensor:
    """A cache for prompts of up to `longest` tokens, and what is decoded behind them with a tree of so many nodes."""
    slots = min(longest + max_new_tokens, model.config.max_position_embeddings)
    return new_cache(model.config, rows, slots + max(nodes, min(longest, PREFILL_CHUNK)), like=model.norm)


def start(model: Llama, prompts: list, max_new_tokens: int, tree: Tree, sampling: Sampling, eos: Tensor, seeds,
          recent: int, cache: Tensor, kept: int = 0) -> tuple[State, Tensor]:
    """The stage `init`: prefill, then the first token, by the same accept and commit as every other one.

    kept: so many slots of the cache hold the beginnings of the prompts already.
    """
    context, device = model.config.max_position_embeddings, model.norm.device
    # the newest hidden states are not kept, so their tokens are read once more
    length, last = prefill(model, prompts, cache, recent, max(0, min(kept, min(map(len, prompts)) - recent)))
    remaining = torch.tensor([min(max_new_tokens, context - len(p)) for p in prompts], device=device)
    draws = 1 if sampling.temperature == 0 else context + tree.path.shape[1]
    root, token = Tree.root().to(device), torch.tensor([p[-1] for p in prompts], device=device)
    # as if the prompt's last token were the root of a tree of one node, already verified: its hidden state is the new
    # one, those before it the recent ones (the roll puts it first, where `latest` drops it)
    state = State(cache, length - 1, token, last.roll(1, 1), torch.zeros_like(length), remaining,
                  uniforms(seeds, draws).to(device))
    hidden = last[:, -1:]
    chosen, out, count = accept(root, token[:, None], model.lm_head(hidden), state, sampling, eos)
    return reported(commit(state, hidden, chosen, out, count, eos), out, count)


def replaced(state: State, row: int, new: State) -> State:
    """A state whose row is the one row of a new state (that has its keys and values in this row's cache already)."""
    at = torch.tensor([row], device=state.length.device)
    return State(state.cache, *(t.index_copy(0, at, n) for t, n in zip(state[1:], new[1:], strict=True)))


def check_prompts(prompts: list, config: LlamaConfig) -> None:
    """UserError: an empty prompt, or one that leaves no room in the context."""
    context = config.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt:
            raise UserError(f"{name} is empty: give at least one token")
        if len(prompt) >= context:
            raise UserError(f"{name} has {len(prompt)} tokens, the context holds {context}{config.why_no_longer}: "
                            "shorten the prompt")


@torch.inference_mode()
def generate(model: Llama, prompts: list, max_new_tokens: int, *, heads: MedusaHeads | None = None,
             tree: Tree | None = None, sampling: Sampling = GREEDY, seeds=None, eos=None, batch_size: int | None = None,
             max_steps: int | None = None, run=call, compiled=None, past: tuple[Tensor, int] | None = None):
    """Yields, for the prefill and then for each step, {a prompt's index: its new ids} of all prompts at work.

    A text ends with the first end-of-text token (`eos`, default the model's; it is yielded), at `max_new_tokens` or at
    the context's end; after `max_steps` steps all end. No heads or no tree: plain decoding. Prompt i's draws come from
    seeds[i] (default 0, 1, ...), so its tokens are the same alone and in any batch, with heads and without.
    batch_size: so many rows at once (default: all); a finished one takes the next prompt, whose first token, the
    prefill's, is yielded with the others' step.
    compiled: None, or a dict that keeps compiled steps from call to call: decode with `compile_step`.
    past: a `whole_cache` of an earlier call, and how many of its slots hold the beginnings of all prompts.
    Raises UserError: see `check_prompts`, `compile_step`.
    """
    check_prompts(prompts, model.config)
    device, max_new_tokens = model.norm.device, min(max_new_tokens, model.config.max_position_embeddings)
    plain = heads is None or tree is None or len(tree.paths) == 1
    heads, tree = (None, Tree.root().to(device)) if plain else (heads, tree.to(device))
    sampling = sampling._replace(epsilon=None) if plain else sampling
    eos = torch.tensor(model.config.eos_token_ids if eos is None else tuple(eos), dtype=torch.long, device=device)
    waiting, nodes, seeds = deque(range(len(prompts))), len(tree.paths), seeds or range(len(prompts))
    rows = [waiting.popleft() for _ in range(min(batch_size or len(prompts), len(prompts)))]    # the prompts at work

    def begin(which, cache, kept=0):
        return run("init", start, model, [prompts[i] for i in which], max_new_tokens, tree, sampling, eos,
                   [seeds[i] for i in which], 1 if plain else heads.recent, cache, kept)
    if past is None:
        past = whole_cache(model, len(rows)) if compiled is not None else \
            small_cache(model, len(rows), max(map(len, prompts)), max_new_tokens, nodes), 0
    state, report = begin(rows, *past)
    if compiled is not None:
        if device.type == "cuda":
            torch._dynamo.mark_static_address(state.cache)     # CUDA graphs write to it in place
        key = (len(rows), sampling, str(tree.paths), tuple(eos.tolist()))
        if key not in compiled:
            compiled[key] = compile_step(model, heads, tree, state, sampling, eos)
    lengths, steps = [len(prompts[i]) - 1 for i in rows], 0    # state.length, without reading it back
    while True:
        report = report.tolist()                               # the one read-back of a step
        new = {i: ids[:count] for i, (count, _, *ids) in zip(rows, report, strict=True) if count}
        lengths = [a + count for a, (count, *_) in zip(lengths, report, strict=True)]
        for row in range(len(rows)):
            while waiting and not report[row][1]:
                cache, rows[row] = state.cache[:, row:row + 1], waiting.popleft()
                cache[:, :, :lengths[row] + nodes] = 0         # a NaN left there would reach through the mask
                one, first = begin([rows[row]], cache)
                state, report[row], lengths[row] = replaced(state, row, one), *first.tolist(), len(prompts[rows[row]])
                new[rows[row]] = report[row][2:3]
        yield new
        alive = [row for row, (_, remaining, *_) in enumerate(report) if remaining]
        if not alive or steps == max_steps:
            return
        if 4 * len(alive) <= 3 * len(rows) and compiled is None:    # a finished row costs as much as another
            keep = torch.tensor(alive, device=device)
            state = State(some_rows(state.cache, keep), *(t[keep] for t in state[1:]))
            rows, lengths = [rows[row] for row in alive], [lengths[row] for row in alive]
        window, steps = window_of(max(lengths) + nodes, state.cache), steps + 1
        if compiled is not None:
            *moved, report = run("base_inference" if plain else "step", compiled[key], window, *state)
            state = State(state.cache, *moved)
        elif plain:
            state, report = run("base_inference", step, model, heads, tree, state, window, sampling, eos)
        else:
            state, report = step(model, heads, tree, state, window, sampling, eos, run)


class Stages:
    """A `run` for `generate` that clocks each stage (the original's profile); without it no clock is read at all.

    The heads' products are in `medusa` (the original's were hidden in `tree`); `base_inference` is a whole plain step.
    """
    def __init__(self, device):
        cuda = torch.device(device).type == "cuda"
        self.sync = (lambda: torch.cuda.synchronize(device)) if cuda else lambda: None
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name, function, *args):
        self.sync()
        begin = time.perf_counter()
        result = function(*args)
        self.sync()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)
        return result


def set_threads(model: Llama, threads: int | str = "auto", rows: int = 1) -> None:
    """torch's CPU threads: a number, or `auto`: 1 or all cores, whichever decodes `rows` rows faster here and now.

    On a tiny model threads mostly wait for each other, ten times longer when anything else runs on the machine.
    """
    if threads != "auto":
        return torch.set_num_threads(threads)
    if model.norm.device.type != "cpu" or model.config.max_position_embeddings < 16:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fastest = {}
    for count in {1, cores}:
        torch.set_num_threads(count)
        clock = Stages("cpu")
        for _ in generate(model, [[0]] * rows, 7, eos=(), run=clock):
            pass
        fastest[count] = min(clock.seconds["base_inference"]) * (1 if count == 1 else 1.1)     # more must win clearly
    torch.set_num_threads(min(fastest, key=fastest.get))
