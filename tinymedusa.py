"""Medusa (arXiv 2401.10774) on a frozen Llama: heads draft, a tree is verified, the longest accepted path stays.

A decoding step, plain or Medusa, for one prompt or a batch, is `Decoder.step`:

    state (cache, length[B], token[B], recent_hidden[B, R, H], ...)       token: emitted, not yet in the cache
      draft    heads(recent_hidden) → top ranks → ids[B, N], ids[:, 0] = token                      "medusa"
      verify   one forward over all nodes of the tree → hidden[B, N, H], logits[B, N, V]            "tree"
      accept   sample a token at every node, follow it while it is one of the drafts → path, out    "posterior"
      commit   keep the path's keys and values; token and hidden states of its end                  "update"

Plain decoding is a tree of one node. A draft is kept only where it equals the token that the base model itself samples
there, so the output is plain decoding's, token for token, at any temperature (`sample`; near-ties of rounding aside).

Elsewhere, behind the same signatures: stronger heads, typical acceptance, prompts that wait for a row (variants/).

Shapes: B rows, N nodes of the tree (root included), P path length (tree depth + 1), K heads, R hidden states that a
        head sees, V vocabulary size; T, S, W, H, L, G, D as in llama.py
"""
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import CacheView, Llama, keep_path
from loading.trees import read_tree

PREFILL_CHUNK = 256     # prompt tokens per forward: bounds the memory of the mask and the activations
WINDOW_STEP = 32        # attention reads a window of the cache that grows in steps of this many slots

# ---------------------------------------------------------------------------------------------------------- tree
class Tree(NamedTuple):
    """A static tree of candidates. Node 0 is the root, the base model's own token; parents precede children."""
    paths: list         # node → the ranks that lead to it: (0, 2) is head 2's third guess behind head 1's first
    parent: Tensor      # [N], the root is its own parent
    depth: Tensor       # [N], the head that guesses the node; 0 for the root
    rank: Tensor        # [N], which of that head's guesses it is, 0 the first
    ancestors: Tensor   # [N, N] bool: ancestors[i, j] is True if j is i or an ancestor of i
    retrieve: Tensor    # [N, P] the nodes from the root to node n, then j itself: `keep_path` copies it to where it is

    @classmethod
    def from_paths(cls, paths) -> "Tree":
        """From paths of ranks such as [[0], [0, 0], [1]], in any order; the root is implied, every ancestor given."""
        paths = [(), *map(tuple, paths)]
        paths.sort(key=lambda path: (len(path), path))                                      # the deepest last
        index = {path: node for node, path in enumerate(paths)}
        ancestors = torch.zeros(len(paths), len(paths), dtype=torch.bool)
        retrieve = torch.arange(len(paths[-1]) + 1).repeat(len(paths), 1)
        for node, path in enumerate(paths):
            way = [index[path[:depth]] for depth in range(len(path) + 1)]
            ancestors[node, way] = True
            retrieve[node, :len(way)] = torch.tensor(way)
        parent = torch.tensor([index[path[:-1]] for path in paths])
        depth = torch.tensor([len(path) for path in paths])
        rank = torch.tensor([path[-1] if path else 0 for path in paths])
        return cls(paths, parent, depth, rank, ancestors, retrieve)

    @classmethod
    def from_pretrained(cls, folder, heads: "MedusaHeads", temperature: float = 0.0) -> "Tree":
        """The tree.json in the heads' folder, for the nearest temperature, else 15 nodes of the official tree
        mc_sim_7b_63. UserError: these heads can't draft it."""
        paths, _ = read_tree(folder, len(heads), heads.draft_size, temperature=temperature)
        return cls.from_paths(paths)

    def to(self, device) -> "Tree":
        return Tree(self.paths, *(tensor.to(device) for tensor in self[1:]))

ROOT = Tree.from_paths([])      # the tree of plain decoding

# --------------------------------------------------------------------------------------------------------- heads
class ResBlock(nn.Module):
    """x + SiLU(W x + b). W and b are zero at first, so an untrained head repeats the base model."""
    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))

class MedusaHeads(nn.ModuleList):
    """K heads; head k = 1..K guesses the token k + 1 places after the one whose hidden state it sees (section 2.1).

    A head is a sequence of residual blocks and a vocabulary matrix, which starts as a copy of the base model's.
    Parameters have the official names, {k}.{j}.linear.weight. Stronger heads are in variants/heads.py: they see the
    root or earlier hidden states, share the lm_head, draft from fewer ids; Hydra's see drafts, by their own `draft`.
    """
    recent = 1          # hidden states that a head sees

    def __init__(self, model: Llama, num_heads: int, num_layers: int = 1):
        super().__init__()
        size, self.draft_size = model.config.hidden_size, model.config.vocab_size
        for _ in range(num_heads):
            blocks = [ResBlock(size) for _ in range(num_layers)]
            vocabulary = nn.Linear(size, self.draft_size, bias=False)
            vocabulary.weight.data.copy_(model.lm_head.weight)
            self.append(nn.Sequential(*blocks, vocabulary))
        self.to(model.norm.weight.dtype)

    def forward(self, recent_hidden: Tensor, following: Tensor) -> Tensor:
        """Logits of every head: recent_hidden [B, R, H], newest last → [B, K, V].

        `following` [B, 1 or more]: the tokens after the newest hidden state. Stronger heads see them, these do not.
        """
        hidden = recent_hidden[:, -1]
        return torch.stack([head(hidden) for head in self], dim=1)

    def draft(self, tree: Tree, state: "State", noise: Tensor | None, sampling: "Sampling") -> Tensor:
        """Candidate ids for every node but the root: [B, N - 1].

        A node guesses what its parent, one depth up, will sample, so it ranks with the parent's noise.
        """
        deepest = len(tree.paths[-1])
        ranks = 1 + max((path[-1] for path in tree.paths[1:]), default=0)
        logits = self(state.recent_hidden, state.token[:, None])[:, :deepest]
        if noise is not None:
            noise = noise[:, :deepest]
        guesses = self.best(logits, noise, sampling, ranks)                                 # [B, deepest, ranks]
        return guesses[:, tree.depth[1:] - 1, tree.rank[1:]]                                # [B, N - 1]

    def best(self, logits: Tensor, noise: Tensor | None, sampling: "Sampling", ranks: int) -> Tensor:
        """The ids of the first ranks [..., ranks], as the base model samples (see `sample`), but from all tokens: what
        top-k and top-p leave of a head's own logits is accepted less often than what its whole distribution draws."""
        everything = Sampling(sampling.temperature)
        return perturbed(logits, noise, everything).topk(ranks).indices

class NoHeads:
    """Nothing to draft with: plain decoding."""
    recent = 1

    def draft(self, tree: Tree, state: "State", noise: Tensor | None, sampling: "Sampling") -> Tensor:
        return state.token.new_empty(len(state.token), 0)

# ------------------------------------------------------------------------------------------------------ sampling
class Sampling(NamedTuple):
    """temperature 0: the most likely token. top_k 0, top_p 1 and min_p 0: no limit."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

GREEDY = Sampling()

def most_likely(logits: Tensor, ranked: Tensor, count: Tensor) -> Tensor:
    """-inf for all but the `count` [.., 1] largest of logits [.., V], of equal ones the lower ids. ranked: sorted."""
    edge = ranked.gather(-1, count - 1)                                                 # the smallest one that stays
    above = logits > edge
    equal = logits == edge
    room = count - above.sum(dim=-1, keepdim=True)
    number = equal.cumsum(dim=-1)
    stays = above | equal & (number <= room)
    return logits.masked_fill(~stays, -torch.inf)

def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Divide by the temperature T; -inf for what top-k, top-p, then min-p leave out, as in HF, ties aside: [..., V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / max(sampling.temperature, 1e-30)                                  # the largest is 0, never NaN
    vocab_size = logits.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        ranked = logits.topk(sampling.top_k).values
        count = torch.full_like(ranked[..., :1], sampling.top_k, dtype=torch.long)
        logits = most_likely(logits, ranked, count)
    if sampling.top_p < 1:
        total = logits.logsumexp(dim=-1, keepdim=True)
        for size in (64, 1024, vocab_size):                                             # a whole sort is seldom needed
            ranked = logits.topk(min(size, vocab_size)).values
            probs = (ranked - total).exp()
            before = probs.cumsum(dim=-1) - probs                                       # the mass before a token
            stays = before < sampling.top_p
            if not stays[..., -1].any():
                break
        count = stays.sum(dim=-1, keepdim=True).clamp(min=1)                            # the first one always stays
        logits = most_likely(logits, ranked, count)
    if sampling.min_p > 0:
        least = math.log(sampling.min_p)                                                # beside the largest, which is 0
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits

GOLDEN = 0x9E3779B97F4A7C15 - 2 ** 64       # SplitMix64's increment as an int64; products wrap

def mix64(z: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), on int64; a mask makes a shift unsigned."""
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2 ** 64)
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2 ** 64)
    return z ^ (z >> 31 & 0x1FFFFFFFF)

def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise for every token at some positions of the output: seed [B], position [B, P] → [B, P, V] float32.

    A counter-based generator: the same noise in any batch, after any drafts, on any device. v keeps all its 32 bits
    near 0, where -log(-log(1 - v)) is large, so rare tokens are drawn at their true rate.
    """
    token = torch.arange(1, vocab_size + 1, device=seed.device)
    row_key = mix64(seed)[:, None]                                                          # [B, 1]
    key = mix64(row_key + GOLDEN * (position + 1))                                          # [B, P]; + 1: mix64(0) is 0
    number = mix64(key[..., None] + GOLDEN * token)                                         # [B, P, V]
    bits = number >> 32 & 0xFFFFFFFF
    v = (bits.float() + 0.5) / 2 ** 32
    v = v.clamp(max=1 - 2 ** -24)                                                           # float() may round up to 1
    return -torch.log(-torch.log1p(-v))

def perturbed(logits: Tensor, noise: Tensor | None, sampling: Sampling) -> Tensor:
    """What sampling ranks tokens by: logits [..., V], as they are where noise is None (temperature 0)."""
    return logits if noise is None else warp(logits, sampling) + noise

def sample(logits: Tensor, noise: Tensor | None, sampling: Sampling) -> Tensor:
    """One token for each row of logits [..., V] → ids [...]; noise [..., V], None at temperature 0.

    The Gumbel-max trick: argmax(logits / T + noise) is a draw from softmax(logits / T). The noise belongs to a
    position of the output, not to a node or a step, so a node draws exactly what plain decoding draws at its position.
    """
    return perturbed(logits, noise, sampling).argmax(dim=-1)

# ------------------------------------------------------------------------------------------------------ the step
class State(NamedTuple):
    """Everything that changes while decoding. The cache holds the prompt and all emitted tokens but the last one."""
    cache: Tensor           # [L, B, S, 2, G, D], the only tensor written in place
    length: Tensor          # [B] committed slots of the cache
    token: Tensor           # [B] emitted, not yet in the cache: the root of the next tree
    recent_hidden: Tensor   # [B, R, H] the newest hidden states; `token` was sampled from the last one
    emitted: Tensor         # [B] new tokens so far
    remaining: Tensor       # [B] new tokens that may still follow; 0: the row is finished
    seed: Tensor            # [B] of the row's noise

def accept(tree: Tree, ids: Tensor, logits: Tensor, noise: Tensor | None, sampling: Sampling):
    """The longest path on which every draft is the token sampled at its parent.

    ids [B, N], logits [B, N, V], noise [B, P, V] → path [B, P], out [B, P], count [B]: row b emits out[b, :count[b]],
    the tokens sampled along its path. All but the last equal the path's drafts; the last is the root of the next tree.
    Siblings differ, so at most one node per depth survives.
    """
    if noise is not None:
        noise = noise[:, tree.depth]            # [B, N, V]: what a node samples comes at position emitted + its depth
    sampled = sample(logits, noise, sampling)                                               # [B, N]
    confirmed = ids == sampled[:, tree.parent]                                              # [B, N]
    confirmed[:, 0] = True                                                                  # the root is given
    alive = (confirmed[:, None] | ~tree.ancestors).all(dim=-1)                              # [B, N]
    count, last = (alive * (tree.depth + 1)).max(dim=-1)                                    # [B], 1 for the root alone
    path = tree.retrieve[last]                                                              # [B, P]
    return path, sampled.gather(1, path), count

def is_one_of(ids: Tensor, eos: Tensor) -> Tensor:
    """Which ids are end-of-text ids: bool, as ids."""
    return (ids[..., None] == eos).any(dim=-1)

def truncate(out: Tensor, count: Tensor, remaining: Tensor, eos: Tensor) -> Tensor:
    """How many of the tokens out[:, :count] stay: up to the row's limit and its first end-of-text token: [B]."""
    position = torch.arange(1, out.shape[1] + 1, device=out.device)
    first_eos = torch.where(is_one_of(out, eos), position, out.shape[1]).amin(dim=1)
    return torch.minimum(torch.minimum(first_eos, count), remaining)

def newest(old: Tensor, new: Tensor, count: Tensor) -> Tensor:
    """The last R things when new[:, :count] come after old: old [B, R, ..], new [B, T, ..], count [B] → [B, R, ..]."""
    row = torch.arange(len(count), device=count.device)[:, None]
    index = count[:, None] + torch.arange(old.shape[1], device=count.device)                # [B, R]
    return torch.cat((old, new), dim=1)[row, index]

def commit(state: State, hidden: Tensor, path: Tensor, out: Tensor, count: Tensor, eos: Tensor) -> State:
    """Keep the path's keys and values and move on by `count` tokens; with a count of 0 a row's state stays as it was.

    All P nodes of the path are copied whatever was accepted, so shapes are static. The keys and values of rejected
    drafts stay behind `length`, where no mask shows them, until the next step writes over them.
    """
    row = torch.arange(len(count), device=count.device)[:, None]
    keep_path(state.cache, state.length, path)
    token = newest(state.token[:, None], out, count)[:, 0]
    remaining = (state.remaining - count).masked_fill(is_one_of(token, eos), 0)
    recent_hidden = newest(state.recent_hidden, hidden[row, path], count)
    return state._replace(
        length=state.length + count,
        token=token,
        recent_hidden=recent_hidden,
        emitted=state.emitted + count,
        remaining=remaining)

# ---------------------------------------------------------------------------------------------------- generation
def call(name, function, *args):
    """How a decoder runs its stages; `Stages` is the same with a clock."""
    return function(*args)

class Decoder:
    """What stays the same while decoding, and the step. fast/ and variants/ replace its methods, never its loop.

    eos: the end-of-text ids, None: the model's own. run: how stages are run, see `call`.
    """
    def __init__(self, model: Llama, heads, tree: Tree, sampling: Sampling = GREEDY, eos=None, run=call):
        self.model = model
        self.heads = heads
        self.sampling = sampling
        self.run = run
        self.device = model.norm.weight.device
        self.tree = tree.to(self.device)
        self.root = ROOT.to(self.device)
        eos = model.config.eos_token_ids if eos is None else tuple(eos)
        self.eos = torch.tensor(eos, dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def step(self, state: State, window: int, run) -> tuple[State, Tensor, Tensor]:
        """One decoding step → the next state, out [B, P], count [B]: see `accept`. run: self.run, unless the step is
        clocked as a whole."""
        ids, noise = run("medusa", self.draft, state)
        hidden, logits = run("tree", self.verify, state, ids, window)
        path, out, count = run("posterior", self.accept, self.tree, ids, logits, noise, self.sampling)
        return run("update", self.commit, state, hidden, path, out, count)

    def draft(self, state: State) -> tuple[Tensor, Tensor | None]:
        """The candidates, ids [B, N], and the noise used to rank and then to sample."""
        noise = self.noise(state)
        drafts = self.heads.draft(self.tree, state, noise, self.sampling)
        return torch.cat((state.token[:, None], drafts), dim=1), noise

    def noise(self, state: State) -> Tensor | None:
        """The noise of the positions that this step may emit: [B, P, V]; None at temperature 0."""
        if self.sampling.temperature == 0:
            return None
        depth = torch.arange(self.tree.retrieve.shape[1], device=self.device)
        position = state.emitted[:, None] + depth                                           # [B, P]
        return gumbel_noise(state.seed, position, self.model.config.vocab_size)

    def verify(self, state: State, ids: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """One forward over all nodes: hidden [B, N, H], logits [B, N, V]."""
        tree = self.tree
        hidden = self.forward(ids, tree.depth, tree.ancestors, state.cache, state.length, window)
        return hidden, self.logits(state, ids, tree, hidden)

    def logits(self, state: State, ids: Tensor, tree: Tree, hidden: Tensor) -> Tensor:
        """Of the tokens behind the nodes: [B, N, V]. variants/penalty.py also looks at the text before them."""
        return self.model.lm_head(hidden)

    accept = staticmethod(accept)       # variants/typical.py assigns another rule

    def commit(self, state: State, hidden: Tensor, path: Tensor, out: Tensor, count: Tensor):
        count = truncate(out, count, state.remaining, self.eos)
        state = commit(state, hidden, path, out, count, self.eos)
        return state, out, count

    def forward(self, ids, depth, ancestors, cache: Tensor, length: Tensor, window: int) -> Tensor:
        """New tokens ids [B, T] after each row's prefix: write their keys and values → hidden [B, T, H]."""
        view = CacheView.new(cache, length, ancestors, window)
        position_ids = length[:, None] + depth
        return self.model(ids, position_ids, view)

    def window(self, used: int, cache: Tensor) -> int:
        """How many slots attention reads, so that a short text does not pay for the whole cache."""
        steps = -(-used // WINDOW_STEP)                                                     # rounded up
        return min(steps * WINDOW_STEP, cache.shape[2])

    def prefill(self, prompts: list, cache: Tensor, recent: int, kept: int = 0) -> tuple[Tensor, Tensor]:
        """Write the prompts to the cache, as chains of nodes, chunk by chunk → length [B], last hidden [B, recent, H].

        kept: the number of slots that hold the beginnings of all prompts already (a chat's earlier turns). Behind its
        `length` a shorter prompt's row gets padding, which no mask shows.
        """
        total = [len(prompt) for prompt in prompts]
        longest = max(total)
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
        ids = torch.tensor(padded, device=self.device)                                      # [B, longest]
        total = torch.tensor(total, device=self.device)                                     # [B]
        length = torch.full_like(total, kept)
        last = cache.new_zeros(len(prompts), recent, self.model.config.hidden_size)
        for begin in range(kept, longest, PREFILL_CHUNK):
            chunk = ids[:, begin:begin + PREFILL_CHUNK]
            size = chunk.shape[1]
            depth = torch.arange(size, device=self.device)
            causal = depth[:, None] >= depth                # a chain: all before a token are its ancestors
            window = self.window(begin + size, cache)
            hidden = self.forward(chunk, depth, causal, cache, length, window)
            count = (total - begin).clamp(0, size)
            last = newest(last, hidden, count)
            length = length + count
        return length, last

    @torch.inference_mode()
    def start(self, prompts: list, max_new_tokens: int, seeds, cache: Tensor) -> tuple[State, Tensor, Tensor]:
        """Prefill, then the first new token, accepted and committed like any other.

        As if the prompt's last token had just been emitted: the root of one node, whose forward the prefill has done.
        """
        length, hidden = self.prefill(prompts, cache, self.heads.recent + 1)                # [B], [B, R + 1, H]
        before, hidden = hidden[:, :-1], hidden[:, -1:]
        room = self.model.config.max_position_embeddings - length
        root = [prompt[-1:] for prompt in prompts]
        root = torch.tensor(root, device=self.device)                                       # [B, 1]
        state = State(
            cache=cache,
            length=length - 1,
            token=root[:, 0],
            recent_hidden=before,
            emitted=torch.zeros_like(length),
            remaining=room.clamp(0, max_new_tokens),
            seed=torch.tensor(list(seeds), device=self.device))
        logits = self.logits(state, root, self.root, hidden)                                # [B, 1, V]
        noise = self.noise(state)                               # of the tree's depths; the root samples with the first
        path, out, count = self.accept(self.root, root, logits, noise, self.sampling)
        return self.commit(state, hidden, path, out, count)

    @torch.inference_mode()
    def new_cache(self, prompts: list, max_new_tokens: int) -> Tensor:
        """A cache for the prompts, what follows them, and the tree behind that."""
        longest = max(map(len, prompts)) + max_new_tokens
        slots = min(longest, self.model.config.max_position_embeddings) + len(self.tree.paths)
        return self.model.new_cache(len(prompts), slots)

    def generate(self, prompts: list, max_new_tokens: int, seeds=None):
        """Yield the new ids of every prompt, a list of B lists: once for the prefill, then for each step.

        A text ends with the first end-of-text token (it is yielded), at max_new_tokens or at the end of the context.
        Prompt i draws from seeds[i] (default i): with the same seed its tokens are the same alone and in any batch.
        """
        cache = self.new_cache(prompts, max_new_tokens)
        seeds = seeds or range(len(prompts))
        state, out, count = self.run("init", self.start, prompts, max_new_tokens, seeds, cache)
        while True:
            yield [ids[:n] for ids, n in zip(out.tolist(), count.tolist(), strict=True)]
            if not any(state.remaining.tolist()):
                return
            used = max(state.length.tolist()) + len(self.tree.paths)
            window = self.window(used, cache)
            state, out, count = self.step(state, window, self.run)

class PlainDecoder(Decoder):
    """Plain decoding: the same step with a tree of one node, clocked as a whole."""
    def __init__(self, model: Llama, sampling: Sampling = GREEDY, eos=None, run=call):
        super().__init__(model, NoHeads(), ROOT, sampling, eos, run)

    def step(self, state: State, window: int, run) -> tuple[State, Tensor, Tensor]:
        return run("base_inference", super().step, state, window, call)

class Stages:
    """A `run` that clocks each stage, as the original's profile did; without it no clock is read at all."""
    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name, function, *args):
        begin = self.now()
        result = function(*args)
        self.seconds.setdefault(name, []).append(self.now() - begin)
        return result

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
