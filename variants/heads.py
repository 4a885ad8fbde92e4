"""Stronger heads: they see more, are wider, share the lm_head, or draft from fewer ids. `load_heads` builds any kind.

    medusa   sees hidden states only, as the paper's do
    root     also the token that the base model has sampled already, the root of the tree
    hydra    every token between the hidden state and its guess (arXiv 2402.05109), so it drafts depth by depth

With every kind go `recent` hidden states, an inner `width`, `tie_lm_head`, and a `token_map`: D ids that may be drafted
"""
from functools import lru_cache
from itertools import islice
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from llama import Llama
from loading.heads import check_token_map, find_heads, save_heads
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
                 tie_lm_head: bool = False, token_map: Tensor | None = None):
        nn.ModuleList.__init__(self)
        size = model.config.hidden_size
        self.num_layers, self.width, self.recent, self.tie_lm_head = num_layers, width, recent, tie_lm_head
        self.register_buffer("token_map", token_map)
        self.draft_size = model.config.vocab_size if token_map is None else len(token_map)
        self.rows = None                            # of the lm_head, at the ids of token_map
        self.model = [model]                        # in a list, so that its parameters are not ours
        for k in range(1, num_heads + 1):
            inputs = size * (recent + self.seen(k))
            head = nn.ModuleList(Block(size if j else inputs, size, width) for j in range(num_layers))
            if not tie_lm_head:
                head.append(nn.Linear(size, self.draft_size, bias=False))
                if not head[-1].weight.is_meta:
                    head[-1].weight.data.copy_(self.lm_head_rows())
            self.append(head)
        self.to(model.norm.weight.dtype)

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

    def logits(self, heads: range, recent_hidden: Tensor, following: Tensor) -> Tensor:
        """Logits of some heads (0 the first): recent_hidden [T, R, H], following [T, n] → [T, heads, D]."""
        x, z = recent_hidden[:, -1], recent_hidden.flatten(1)
        if seen := self.seen(heads[-1] + 1):                    # tokens: the base model's embeddings, scaled to RMS 1
            embedded = self.model[0].embed_tokens(following[:, :seen])
            embedded = F.rms_norm(embedded, embedded.shape[-1:], eps=1e-6).flatten(1)
            z = torch.cat((z, embedded.to(z.dtype)), dim=1)
        out = []
        for k in heads:
            y, inputs = x, z[:, :x.shape[1] * (self.recent + self.seen(k + 1))]
            for block in islice(self[k], self.num_layers):
                y = inputs = block(y, inputs)
            out.append(y if self.tie_lm_head else self[k][-1](y))
        out = torch.stack(out, dim=1)
        return self.vocabulary(out) if self.tie_lm_head else out

    def forward(self, recent_hidden: Tensor, following: Tensor) -> Tensor:
        """Logits of every head: recent_hidden [T, R, H], following [T, at least those seen] → [T, K, D]."""
        return self.logits(range(len(self)), recent_hidden, following)

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
        ids, rows = state.token[:, None], len(state.token)
        for k, (way, slot, rank, ranks) in enumerate(levels_of(tuple(tree.paths), ids.device)):
            recent_hidden = state.recent_hidden[:, None].expand(-1, len(way), -1, -1).flatten(0, 1) # [B M, R, H]
            logits = self.logits(range(k, k + 1), recent_hidden, ids[:, way].flatten(0, 1))         # [B M, 1, D]
            logits = logits.view(rows, len(way), -1)                                                # [B, M, D]
            noise_here = None if noise is None else noise[:, k:k + 1]                               # [B, 1, V]
            guesses = self.best(logits, noise_here, sampling, ranks)                                # [B, M, ranks]
            ids = torch.cat((ids, guesses[:, slot, rank]), dim=1)
        return ids[:, 1:]

CLASSES = {heads.kind: heads for heads in (StrongHeads, RootHeads, HydraHeads)}

def build_heads(model: Llama, num_heads: int, num_layers: int = 1, kind: str = "medusa", width: int | None = None,
                recent: int = 1, tie_lm_head: bool = False, token_map: Tensor | None = None) -> MedusaHeads:
    """Untrained heads, which repeat the base model: the paper's where nothing more is requested."""
    if (kind, width, recent, tie_lm_head) == ("medusa", None, 1, False) and token_map is None:
        return MedusaHeads(model, num_heads, num_layers)
    return CLASSES[kind](model, num_heads, num_layers, width, recent, tie_lm_head, token_map)

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
        "draft_vocab_size": None if token_map_of(heads) is None else heads.draft_size}, dtype)

def token_map_of(heads: MedusaHeads) -> Tensor | None:
    """The ids that the heads may draft; None: all."""
    return getattr(heads, "token_map", None)
