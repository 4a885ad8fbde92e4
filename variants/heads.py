"""Stronger heads: they see more, are wider, share the lm_head, or draft from fewer ids. `load_heads` builds any kind.

    medusa   sees hidden states only, as the paper's do
    root     also the token that the base model has sampled already, the root of the tree
    hydra    every token between the hidden state and its guess (arXiv 2402.05109), so it drafts depth by depth

With every kind go `recent` hidden states, an inner `width`, `tie_lm_head`, a `token_map`: D ids that may be drafted,
and a `trunk`: one wide block that all heads share sees the hidden states and the root; head k goes on from its output
k, so that its own blocks can be small.
"""
from functools import lru_cache
from itertools import islice
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from llama import Llama
from loading.checkpoint import check_token_map
from loading.heads import find_heads, save_heads
from tinymedusa import MedusaHeads, Sampling, State, Tree

class Block(nn.Module):
    """x + SiLU(W z + b), or wide: x + D SiLU(U z + b); z [T, inputs] is all that a head sees. The identity at first."""
    def __init__(self, inputs: int, size: int, width: int | None):
        super().__init__()
        self.wide = width is not None
        if not self.wide:
            self.linear = nn.Linear(inputs, size)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        else:
            self.up, self.down = nn.Linear(inputs, width), nn.Linear(width, size, bias=False)
            if not self.up.weight.is_meta:
                nn.init.normal_(self.up.weight, std=size ** -0.5)
            nn.init.zeros_(self.up.bias)
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return x + (self.down(F.silu(self.up(z))) if self.wide else F.silu(self.linear(z)))

class StrongHeads(MedusaHeads):
    """Heads that see `recent` hidden states and, in the classes below, tokens; parameters have the official names."""
    kind = "medusa"

    def __init__(self, model: Llama, num_heads: int, num_layers: int = 1, width: int | None = None, recent: int = 1,
                 tie_lm_head: bool = False, trunk: int | None = None, token_map: Tensor | None = None):
        nn.ModuleList.__init__(self)
        size = model.config.hidden_size
        self.num_layers, self.width, self.recent, self.tie_lm_head = num_layers, width, recent, tie_lm_head
        self.trunk_width = trunk
        self.register_buffer("token_map", token_map)
        self.draft_size = model.config.vocab_size if token_map is None else len(token_map)
        self.rows = self.drafted = None             # of lm_head and embeddings, at the ids of token_map: see `freeze`
        self.model = [model]                        # in a list, so that its parameters are not ours
        for k in range(1, num_heads + 1):
            inputs = size * (recent + self.seen(k) if trunk is None else max(1, self.seen(k)))
            head = nn.ModuleList(Block(size if j else inputs, size, width) for j in range(num_layers))
            if not tie_lm_head:
                head.append(nn.Linear(size, self.draft_size, bias=False))
                if not head[-1].weight.is_meta:
                    head[-1].weight.data.copy_(self.lm_head_rows())
            self.append(head)
        if trunk is not None:
            self.trunk = Block(size * (recent + self.seen(1)), size * num_heads, trunk)
        self.to(model.norm.weight.dtype)

    def __len__(self) -> int:
        return len(self._modules) - ("trunk" in self._modules)

    def seen(self, k: int) -> int:
        return 0        # tokens behind the hidden state that head k sees

    def lm_head_rows(self) -> Tensor:
        weight = self.model[0].lm_head.weight
        return weight if self.token_map is None else weight[self.token_map]

    def vocabulary(self, x: Tensor) -> Tensor:
        """Logits [..., D] by the base model's lm_head, whatever module it has become."""
        if self.token_map is None and x.dtype == self.model[0].norm.weight.dtype:
            return self.model[0].lm_head(x)
        return F.linear(x, (self.lm_head_rows() if self.rows is None else self.rows).to(x.dtype))

    def embedded(self, ids: Tensor) -> Tensor:
        """The base model's embeddings, scaled to RMS 1: ids [..] → [.., H]."""
        x = self.model[0].embed_tokens(ids)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (norm * norm / x.shape[-1] + 1e-6).rsqrt()

    def freeze(self) -> None:
        """Pick what a draft vocabulary needs of the base model's matrices once and for all."""
        if self.token_map is not None:
            self.rows, self.drafted = self.lm_head_rows(), self.embedded(self.token_map)

    def context(self, recent_hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """What each head starts from and what its first block sees beside tokens: recent_hidden [T, R, H], embedded [T,
        1, H] of the root → x [T, K, H], z [T, K, ..]. A trunk has seen the root, so the heads see what is behind it."""
        newest, z = recent_hidden[:, -1], recent_hidden.flatten(1)
        if self.trunk_width is None:
            return newest[:, None].expand(-1, len(self), -1), z[:, None].expand(-1, len(self), -1)
        if self.seen(1):
            z = torch.cat((z, embedded.flatten(1)), dim=1)
        x = self.trunk(newest.repeat(1, len(self)), z).unflatten(-1, (len(self), -1))
        return x, x

    def head(self, k: int, x: Tensor, z: Tensor) -> Tensor:
        """Logits of head k = 1..K: x [.., H], z [.., ..] with the tokens that it sees → [.., D]."""
        for block in islice(self[k - 1], self.num_layers):
            x = z = block(x, z)
        return self.vocabulary(x) if self.tie_lm_head else self[k - 1][-1](x)

    def forward(self, recent_hidden: Tensor, following: Tensor) -> Tensor:
        """Logits of every head: recent_hidden [T, R, H], following [T, at least those seen] → [T, K, D]."""
        embedded = self.embedded(following[:, :self.seen(len(self))]).to(recent_hidden.dtype)
        x, z = self.context(recent_hidden, embedded[:, :1])
        tokens = [embedded[:, self.first:self.seen(k)].flatten(1) for k in range(1, len(self) + 1)]
        out = [self.head(k, x[:, k - 1], torch.cat((z[:, k - 1], seen), dim=1)) for k, seen in enumerate(tokens, 1)]
        return torch.stack(out, dim=1)

    @property
    def first(self) -> int:
        """The first token that the heads see themselves."""
        return 0 if self.trunk_width is None else 1

    def best(self, logits: Tensor, noise: Tensor | None, sampling: Sampling, ranks: int) -> Tensor:
        return ids_of(self, super().best(logits, draftable(self, noise), sampling, ranks))

class RootHeads(StrongHeads):
    """Heads that see the root of the tree: it is known before drafting, so they still run all at once."""
    kind = "root"

    def seen(self, k: int) -> int:
        return 1

@lru_cache(maxsize=64)
def levels_of(paths: tuple, first: int, device) -> list[tuple]:
    """The nodes of each depth as Hydra drafts them: the number M of their parents; of each the nodes from depth `first`
    on that lead to it, counted from there [M depth]; for each node which of all M x ranks guesses it is; ranks."""
    levels, begin = [], sum(len(path) < first for path in paths)
    for depth in range(1, len(paths[-1]) + 1):
        nodes = [path for path in paths if len(path) == depth]
        parents, ranks = sorted({path[:-1] for path in nodes}), 1 + max(path[-1] for path in nodes)
        way = [paths.index(parent[:d]) - begin for parent in parents for d in range(first, depth)]
        pick = [parents.index(path[:-1]) * ranks + path[-1] for path in nodes]
        levels.append((len(parents), *(torch.tensor(t, dtype=torch.long, device=device) for t in (way, pick)), ranks))
    return levels

class HydraHeads(StrongHeads):
    """Head k sees the k tokens before its guess, the root and the drafts behind it."""
    kind = "hydra"

    def seen(self, k: int) -> int:
        return k

    def draft(self, tree: Tree, state: State, noise: Tensor | None, sampling: Sampling) -> Tensor:
        """Depth by depth, since a head sees what the heads before it drafted: [B, N - 1]."""
        embedded = self.embedded(state.token[:, None])                                      # [B, 1, H] of the root
        x, z = self.context(state.recent_hidden, embedded)
        embedded, noise, drafts = embedded[:, self.first:], draftable(self, noise), [state.token[:, None][:, :0]]
        for k, (parents, way, pick, ranks) in enumerate(levels_of(tuple(tree.paths), self.first, x.device), 1):
            start, seen = (t[:, k - 1:k].expand(-1, parents, -1) for t in (x, z))           # for each parent [B, M, ..]
            if len(way):
                new = self.embedded(ids_of(self, drafts[-1])) if self.drafted is None else self.drafted[drafts[-1]]
                embedded = torch.cat((embedded, new), dim=1)
                tokens = embedded.index_select(1, way).view(len(x), parents, -1)
                seen = torch.cat((seen, tokens), dim=-1)
            noise_here = None if noise is None else noise[:, k - 1:k]                       # [B, 1, D]
            guesses = MedusaHeads.best(self, self.head(k, start, seen), noise_here, sampling, ranks)
            drafts.append(guesses.flatten(1).index_select(1, pick))                         # [B, nodes of this depth]
        return ids_of(self, torch.cat(drafts, dim=1))

CLASSES = {heads.kind: heads for heads in (StrongHeads, RootHeads, HydraHeads)}

def build_heads(model: Llama, num_heads: int, num_layers: int = 1, kind: str = "medusa", width: int | None = None,
                recent: int = 1, tie_lm_head: bool = False, trunk: int | None = None,
                token_map: Tensor | None = None) -> MedusaHeads:
    """Untrained heads, which repeat the base model: the paper's where nothing more is requested."""
    if (kind, width, recent, tie_lm_head, trunk) == ("medusa", None, 1, False, None) and token_map is None:
        return MedusaHeads(model, num_heads, num_layers)
    return CLASSES[kind](model, num_heads, num_layers, width, recent, tie_lm_head, trunk, token_map)

@torch.no_grad()
def load_heads(name_or_path, model: Llama, revision=None, required=True) -> MedusaHeads | None:
    """Heads for `model`, in its dtype and on its device: ours, or a published checkpoint. None: see `find_heads`.
    UserError: not heads, not for this model, or a tensor is missing, unexpected or of another shape."""
    stored = find_heads(name_or_path, model.config, revision, required)
    if stored is None:
        return None
    options = dict(stored.config)
    size = options.pop("draft_size")
    with torch.device("meta"):                          # shapes only, until they are checked
        heads = build_heads(model, **options, token_map=None if size is None else torch.arange(size))
    stored.check(heads.state_dict())
    heads.to_empty(device=model.norm.weight.device)
    tensors = heads.state_dict()
    for name, rows, values in stored.read(tensors):
        tensors[name][rows].copy_(values)
    if size is not None:
        check_token_map(heads.token_map, model.config.vocab_size, stored.source)
        heads.freeze()
    return heads.requires_grad_(False).eval()

def save(folder, heads: MedusaHeads, model: Llama, base_name: str, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, which `load_heads` reads; plain ones load in the official code too."""
    get = lambda name, default: getattr(heads, name, default)
    save_heads(folder, heads.state_dict(), {
        "base_model_name_or_path": base_name, "medusa_num_heads": len(heads),
        "medusa_num_layers": get("num_layers", len(heads[0]) - 1), "tie_lm_head": get("tie_lm_head", False),
        "medusa_width": get("width", None), "medusa_kind": get("kind", "medusa"), "medusa_recent": heads.recent,
        "hidden_size": model.config.hidden_size, "vocab_size": model.config.vocab_size,
        "draft_vocab_size": None if token_map_of(heads) is None else heads.draft_size} |
        ({"medusa_trunk": heads.trunk_width} if get("trunk_width", None) else {}), dtype)

def token_map_of(heads: MedusaHeads) -> Tensor | None:
    """The ids that the heads may draft; None: all."""
    return getattr(heads, "token_map", None)

def ids_of(heads: MedusaHeads, drafted: Tensor) -> Tensor:
    """Numbers within the draft vocabulary → ids."""
    token_map = token_map_of(heads)
    return drafted if token_map is None else token_map[drafted]

def draftable(heads: MedusaHeads, values: Tensor | None) -> Tensor | None:
    """The logits or the noise of the ids that the heads may draft: [.., V] → [.., D]."""
    token_map = token_map_of(heads)
    return values if values is None or token_map is None else values[..., token_map]
