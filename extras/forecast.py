"""Growing trees from what heads guessed right, and simulating decoding from their ranks alone."""
import itertools
from collections import Counter
import torch
from torch import Tensor
from loading.trees import DEEPEST
from tinymedusa import Tree

def joint_hits(ranks: list, widest: int = 32) -> Counter:
    """For each path of ranks below `widest`, the places where all of it was right (joint counts, not a product). ranks:
    for each text [K, n], the rank that head k gave the right token at each place (0: its first guess)."""
    hits = Counter()
    for place in itertools.chain.from_iterable(rank.t().tolist() for rank in ranks):
        right = list(itertools.takewhile(lambda r: r < widest, place))
        hits.update(tuple(right[:depth]) for depth in range(1, len(right) + 1))
    return hits

def noise_given(logits: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel noise under the condition that argmax(logits + noise) is these ids: logits [.., V], ids [..] → [.., V].
    The largest sum is Gumbel with the logits' logsumexp as location, whichever token has it; all others are cut off
    there (Maddison, Tarlow and Minka 2014)."""
    def gumbel(like: Tensor) -> Tensor:
        uniform = torch.rand(like.shape, generator=generator).clamp(min=1e-30).to(like)
        return -torch.log(-torch.log(uniform))
    largest = logits.logsumexp(-1, keepdim=True)
    largest = largest + gumbel(largest)
    noise = gumbel(logits)
    noise = torch.where(logits > -torch.inf, -torch.logaddexp(-largest, -(logits + noise)) - logits, noise)
    return noise.scatter(-1, ids[..., None], largest - logits.gather(-1, ids[..., None]))

def grow_tree(hits: dict[tuple, int], nodes: int, deepest: int = DEEPEST) -> list[list[int]]:
    """The `nodes` paths that were right most often: a tree, since a path is right only where its ancestors are, and of
    its size the one with the most expected accepted tokens (section 2.3.3, with joint counts)."""
    paths = [path for path in hits if len(path) <= deepest]
    return [list(path) for path in sorted(paths, key=lambda path: (-hits[path], len(path), path))[:nodes]]

def simulate(tree: Tree, ranks: list, own: list) -> dict:
    """Decode known texts with a tree, from the heads' ranks alone (see `joint_hits`), in the steps of generation.
    own: for each text bool [n], where the root is a token of the model and another follows. tokens_per_step: new tokens
    behind the first / steps; depth_reach: the share of steps that accept at least 0, 1, .. drafts; node_reach: each."""
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
    by_depth = torch.zeros(tree.retrieve.shape[1]).index_add(0, tree.depth, reach)
    rounded = lambda values: [round(v, 4) for v in values.tolist()]
    return {"nodes": len(tree.paths), "steps": int(ends.sum()),
            "tokens_per_step": round(sum(int(m.sum()) for m in own) / steps, 4), "depth_reach": rounded(by_depth),
            "node_reach": dict(zip((" ".join(map(str, path)) or "root" for path in tree.paths), rounded(reach),
                                   strict=True))}
