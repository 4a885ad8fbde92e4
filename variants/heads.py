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
        self.rows = None                            # of the lm_head, at the ids of token_map
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
        return sum(name.isdigit() for name in self._modules)        # without the trunk

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
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()

    def context(self, recent_hidden: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        """What head k starts from and what its first block sees beside tokens: recent_hidden [T, R, H], root [T] →
        x [T, K, H], z [T, K, ..]."""
        newest, z = recent_hidden[:, -1], recent_hidden.flatten(1)
        if self.trunk_width is None:
            return (t[:, None].expand(-1, len(self), -1) for t in (newest, z))
        if self.seen(1):
            z = torch.cat((z, self.embedded(root)), dim=-1)
        x = self.trunk(newest.repeat(1, len(self)), z).unflatten(-1, (len(self), -1))
        return x, x

    def head(self, k: int, x: Tensor, z: Tensor, embedded: Tensor) -> Tensor:
        """Head k's logits, or with tie_lm_head what the lm_head takes: embedded [.., n, H] of the tokens it sees."""
        begin = 0 if self.trunk_width is None else 1                                # the trunk has seen the root
        z = torch.cat((z, embedded[..., begin:self.seen(k), :].flatten(-2).to(z.dtype)), dim=-1)
        for block in islice(self[k - 1], self.num_layers):
            x = z = block(x, z)
        return x if self.tie_lm_head else self[k - 1][-1](x)

    def forward(self, recent_hidden: Tensor, following: Tensor) -> Tensor:
        """Logits of every head: recent_hidden [T, R, H], following [T, at least those seen] → [T, K, D]."""
        x, z = self.context(recent_hidden, following[:, 0])
        embedded = self.embedded(following[:, :self.seen(len(self))])
        out = [self.head(k, x[:, k - 1], z[:, k - 1], embedded) for k in range(1, len(self) + 1)]
        out = torch.stack(out, dim=1)
        return self.vocabulary(out) if self.tie_lm_head else out

    def best(self, logits: Tensor, noise: Tensor | None, sampling: Sampling, ranks: int) -> Tensor:
        if self.token_map is None:
            return super().best(logits, noise, sampling, ranks)
        noise = None if noise is None else noise[..., self.token_map]
        return self.token_map[super().best(logits, noise, sampling, ranks)]

class RootHeads(StrongHeads):
    """Heads that see the root of the tree: it is known before drafting, so they still run all at once."""
    kind = "root"

    def seen(self, k: int) -> int:
        return 1

@lru_cache(maxsize=64)
def levels_of(paths: tuple, device) -> list[tuple]:
    """The nodes of each depth as Hydra drafts them. Their M parents, each as the nodes from the root to it: way
    [M, depth]; for each of the n nodes its parent's number among the M, and which guess it is: slot, rank [n]."""
    levels, tensor = [], lambda values: torch.tensor(values, device=device)
    for depth in range(1, len(paths[-1]) + 1):
        nodes = [path for path in paths if len(path) == depth]
        parents = sorted({path[:-1] for path in nodes})
        way = [[paths.index(parent[:d]) for d in range(depth)] for parent in parents]
        slot, rank = [parents.index(path[:-1]) for path in nodes], [path[-1] for path in nodes]
        levels.append((tensor(way), tensor(slot), tensor(rank), 1 + max(rank)))
    return levels

class HydraHeads(StrongHeads):
    """Head k sees the k tokens before its guess, the root and the drafts behind it."""
    kind = "hydra"

    def seen(self, k: int) -> int:
        return k

    def draft(self, tree: Tree, state: State, noise: Tensor | None, sampling: Sampling) -> Tensor:
        """Depth by depth, since a head sees what the heads before it drafted: [B, N - 1]."""
        ids = state.token[:, None]                                                          # [B, nodes so far]
        embedded = state.recent_hidden[:, :0]
        x, z = self.context(state.recent_hidden, state.token)
        for k, (way, slot, rank, ranks) in enumerate(levels_of(tuple(tree.paths), ids.device), 1):
            embedded = torch.cat((embedded, self.embedded(ids[:, embedded.shape[1]:])), dim=1)
            start, seen = (t[:, k - 1:k].expand(-1, len(way), -1) for t in (x, z))          # for each parent [B, M, ..]
            logits = self.head(k, start, seen, embedded[:, way])
            logits = self.vocabulary(logits) if self.tie_lm_head else logits                # [B, M, D]
            noise_here = None if noise is None else noise[:, k - 1:k]                       # [B, 1, V]
            guesses = self.best(logits, noise_here, sampling, ranks)                        # [B, M, ranks]
            ids = torch.cat((ids, guesses[:, slot, rank]), dim=1)
        return ids[:, 1:]

CLASSES = {heads.kind: heads for heads in (StrongHeads, RootHeads, HydraHeads)}

def build_heads(model: Llama, num_heads: int, num_layers: int = 1, kind: str = "medusa", width: int | None = None,
                recent: int = 1, tie_lm_head: bool = False, trunk: int | None = None,
                token_map: Tensor | None = None) -> MedusaHeads:
    """Untrained heads, which repeat the base model: the paper's where nothing more is requested."""
    if (kind, width, recent, tie_lm_head, trunk) == ("medusa", None, 1, False, None) and token_map is None:
        return MedusaHeads(model, num_heads, num_layers)
    return CLASSES[kind](model, num_heads, num_layers, width, recent, tie_lm_head, trunk, token_map)

@torch.no_grad()
def load_heads(name_or_path, model: Llama, revision=None) -> MedusaHeads:
    """Heads for `model`, in its dtype and on its device: ours, or a published checkpoint (see loading/heads.py).
    UserError: not heads, not for this model, or a tensor is missing, unexpected or of another shape."""
    stored = find_heads(name_or_path, model.config, revision)
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
        heads.rows = heads.lm_head_rows()
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
