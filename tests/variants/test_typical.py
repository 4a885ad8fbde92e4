"""Typical acceptance against section 2.3.1 of the paper, a path at a time."""
import math

import torch
from test_accept import NONE, TREE, accepted, logits_choosing

from tinymedusa import GREEDY, Sampling, accept, gumbel_noise, truncate
from variants.typical import Typical


def slow_typical(ids, probs, epsilon, delta):
    """Section 2.3.1 a path at a time: the longest whose every token is likely enough, the likeliest of these."""
    best = ((0, 0.0), [0], [])
    for path in TREE.paths:
        nodes = [TREE.paths.index(path[:d]) for d in range(len(path) + 1)]
        likely = [probs[a][ids[b]] for a, b in zip(nodes, nodes[1:], strict=False)]
        least = [min(epsilon, delta * math.exp(sum(p * math.log(p) for p in probs[a] if p))) for a in nodes[:-1]]
        if all(p > t for p, t in zip(likely, least, strict=True)):
            merit = len(path), sum(map(math.log, likely))
            best = max(best, (merit, nodes, [ids[n] for n in nodes[1:]]), key=lambda one: one[0])
    end = best[1][-1]
    return best[1], best[2] + [max(range(10), key=lambda t: probs[end][t])]


def test_typical_acceptance_equals_its_slow_definition():
    generator, lengths = torch.Generator().manual_seed(0), []
    for trial in range(300):
        temperature, epsilon, delta = ((0.7, 0.09, 0.3), (1.0, 0.3, 0.6), (0.3, 0.02, 0.1))[trial % 3]
        logits = 2 * torch.randn(1, 6, 10, dtype=torch.float64, generator=generator)
        ids = torch.randperm(10, generator=generator)[None, :6]
        noise = gumbel_noise(torch.tensor([trial]), torch.arange(4)[None], 10)   # nothing is drawn: it is not used
        path, out, count = Typical(epsilon, delta)(TREE, ids, logits, noise, Sampling(temperature))
        nodes, tokens = slow_typical(ids[0].tolist(), (logits[0] / temperature).softmax(-1).tolist(), epsilon, delta)
        assert (path[0, :count].tolist(), out[0, :count].tolist()) == (nodes, tokens)
        lengths.append(len(tokens))
    assert {1, 2, 3, 4} <= set(lengths)


def test_rows_are_accepted_each_on_its_own():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20, 6, 10, dtype=torch.float64, generator=generator)
    ids = torch.stack([torch.randperm(10, generator=generator)[:6] for _ in range(20)])
    rule, sampling = Typical(0.09, 0.3), Sampling(0.7)
    path, out, count = rule(TREE, ids, logits, None, sampling)
    for b in range(20):
        alone = rule(TREE, ids[b:b + 1], logits[b:b + 1], None, sampling)
        for batch, one in zip((path, out, count), alone, strict=True):
            assert torch.equal(batch[b], one[0])
    assert len(count.unique()) > 2


def test_typical_acceptance_at_temperature_0_is_match():
    ids, choices = [3, 4, 5, 6, 7, 8], [4, 6, 0, 8, 0, 1]
    args = TREE, torch.tensor([ids]), logits_choosing(*choices), None
    for a, b in zip(accept(*args, GREEDY), Typical(epsilon=0.09)(*args, Sampling()), strict=True):
        assert torch.equal(a, b)
    _, out, count = Typical()(*args, GREEDY)
    assert out[0, :truncate(out, count, torch.tensor([99]), NONE)].tolist() == accepted(ids, choices)[1] == [4, 6, 8, 1]
