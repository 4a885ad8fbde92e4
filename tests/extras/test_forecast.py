"""Trees grown from joint hits and decoding simulated from ranks, both against slow definitions."""
import itertools
import math

import pytest
import torch

from extras.forecast import grow_tree, joint_hits, noise_given, simulate
from loading.trees import check_paths
from tinymedusa import Tree


def random_ranks():
    """Low ranks most often, head 3 worse than the others, heads 1 and 2 right together more often than by chance."""
    g = torch.Generator().manual_seed(0)
    ranks = [(4 * torch.rand(3, n, generator=g) ** 2).long() * torch.tensor([[1], [1], [3]]) for n in (150, 250)]
    for rank in ranks:
        rank[1, ::2] = rank[0, ::2]
        rank[:, ::9], rank[0, ::7] = 40, 40                                      # beyond what is counted: no hit
    return ranks


def test_the_tree_is_grown_from_joint_hits():
    """Slow definition: a node's worth is the number of places where its whole path is right; take the best."""
    ranks = random_ranks()
    places = [tuple(place) for rank in ranks for place in rank.t().tolist()]
    worth = {p: sum(place[:len(p)] == p for place in places)
             for d in (1, 2, 3) for p in itertools.product(range(10), repeat=d)}
    for nodes in (1, 6, 12, 20, 30):
        best = grow_tree(joint_hits(ranks), nodes)
        assert sum(worth[tuple(p)] for p in best) == sum(sorted(worth.values(), reverse=True)[:nodes])
        check_paths(best, 3, 10)                                                 # no node without its ancestors
    assert sum(joint_hits(ranks).values()) == sum(worth.values())
    assert max(map(len, grow_tree(joint_hits(ranks), 30, deepest=2))) == 2


def test_noise_given_a_sample_is_noise_by_which_it_was_sampled():
    """Ids drawn from softmax(logits), then noise given them: by it they are sampled, and over all ids it is plain
    Gumbel noise: each entry's mean, variance and quantiles, and none goes with another or with its own logit."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(6, dtype=torch.float64, generator=generator).expand(40000, -1)
    ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    noise = noise_given(logits, ids, generator)
    assert torch.equal((logits + noise).argmax(-1), ids)
    assert (noise.mean(0) - 0.5772).abs().max() < 0.03 and (noise.var(0) - math.pi ** 2 / 6).abs().max() < 0.08
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        below = (noise < -math.log(-math.log(share))).double().mean(0)
        assert (below - share).abs().max() < 5 * (share * (1 - share) / 40000) ** 0.5
    assert (torch.corrcoef(noise.T) - torch.eye(6)).abs().max() < 0.025
    limited = logits.masked_fill(torch.arange(6) >= 4, -torch.inf)               # top-k 4: noise is noise there too
    ids = torch.multinomial(limited.softmax(-1), 1, generator=generator)[:, 0]
    noise = noise_given(limited, ids, generator)
    assert noise.isfinite().all() and torch.equal((limited + noise).argmax(-1), ids)
    assert (noise.mean(0) - 0.5772).abs().max() < 0.03


def test_the_simulation_against_its_definition():
    ranks, tree = random_ranks(), Tree.from_paths([[0], [1], [0, 0], [0, 1], [0, 1, 3], [1, 0]])
    own = [torch.ones(rank.shape[1], dtype=torch.bool) for rank in ranks]
    own[1][100:130] = False                                                      # a question in between
    steps, reached = 0, {}
    for rank, mine in zip(ranks, own, strict=True):
        place = 0
        while place < rank.shape[1]:
            if not mine[place]:
                place += 1
                continue
            steps += 1
            path = ()
            while path in tree.paths:
                reached[path] = reached.get(path, 0) + 1
                path += (int(rank[len(path), place]) if len(path) < 3 else None,)
            place += len(path)
    found = simulate(tree, ranks, own)
    assert found["steps"] == steps
    near = lambda value: pytest.approx(value, abs=6e-5)                          # rounded
    assert found["tokens_per_step"] == near(370 / steps)
    assert len(found["node_reach"]) == len(tree.paths) == found["nodes"]
    for path, (name, share) in zip(tree.paths, found["node_reach"].items(), strict=True):
        assert name == (" ".join(map(str, path)) or "root") and share == near(reached.get(path, 0) / steps)
    assert found["depth_reach"][1] == near(sum(reached.get((r,), 0) for r in (0, 1)) / steps)
