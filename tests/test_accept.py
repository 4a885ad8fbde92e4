"""Choosing and accepting on hand-made logits: limits and end-of-text in mid-path, warping against a slow definition."""
import math

import pytest
import torch

from tinymedusa import GREEDY, Sampling, State, Tree, accept, choice_margin, choose, commit, uniforms, warp

TREE = Tree.from_paths([[0], [1], [0, 0], [0, 1], [0, 0, 0]], 3, 10)             # nodes: root 0 1 00 01 000
NONE = torch.tensor([], dtype=torch.long)


def logits_choosing(*tokens):
    """[1, N, V] whose argmax at node i is tokens[i]."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), 10).double()


def state(remaining=99, uniform=None):
    zero = torch.zeros(1, dtype=torch.long)
    return State(None, zero, torch.tensor([3]), None, zero, torch.tensor([remaining]), uniform)


def accepted(ids, choices, remaining=99, eos=NONE):
    path, out, count = accept(TREE, torch.tensor([ids]), logits_choosing(*choices), state(remaining), GREEDY, eos)
    return path[0].tolist()[:count], out[0].tolist()[:count]


def test_walks_while_a_child_matches():
    ids = [3, 4, 5, 6, 7, 8]                                                     # drafts at root, 0, 1, 00, 01, 000
    assert accepted(ids, [9, 0, 0, 0, 0, 0]) == ([0], [9])                       # nothing matches
    assert accepted(ids, [4, 9, 0, 0, 0, 0]) == ([0, 1], [4, 9])
    assert accepted(ids, [5, 6, 9, 0, 0, 0]) == ([0, 2], [5, 9])                 # the second child
    assert accepted(ids, [4, 7, 0, 0, 2, 0]) == ([0, 1, 4], [4, 7, 2])
    assert accepted(ids, [4, 6, 0, 8, 0, 1]) == ([0, 1, 3, 5], [4, 6, 8, 1])     # full depth
    assert accepted(ids, [9, 6, 0, 8, 0, 1]) == ([0], [9])                       # a match below a mismatch


def test_limits_in_mid_path():
    ids, choices = [3, 4, 5, 6, 7, 8], [4, 6, 0, 8, 0, 1]
    for n in range(5):
        assert accepted(ids, choices, remaining=n)[1] == [4, 6, 8, 1][:n]
    assert accepted(ids, choices, eos=torch.tensor([6]))[1] == [4, 6]            # ends with the eos, inside the path
    assert accepted(ids, choices, eos=torch.tensor([8, 4]))[1] == [4]            # any of several ids, the first one
    assert accepted(ids, choices, eos=torch.tensor([1]))[1] == [4, 6, 8, 1]
    assert accepted(ids, choices, remaining=1, eos=torch.tensor([6]))[1] == [4]


def test_commit_ends_the_row_at_eos_and_takes_the_last_nodes_hidden():
    cache = torch.zeros(2, 1, 20, 2, 2, 8)
    recent = torch.tensor([-3.0, -2, -1])[None, :, None].expand(1, 3, 32)
    before = state()._replace(cache=cache, length=torch.tensor([5]), recent=recent)
    hidden = torch.arange(6.0)[None, :, None].expand(1, 6, 32)                   # node i's hidden is all i
    path, out = torch.tensor([[0, 1, 3, 5]]), torch.tensor([[4, 6, 8, 1]])
    for count, eos, left in ((4, NONE, 95), (2, torch.tensor([6]), 0), (3, torch.tensor([6]), 96)):
        after = commit(before, hidden, path, out, torch.tensor([count]), eos)
        assert after.length.item() == 5 + count and after.emitted.item() == count
        assert after.token.item() == out[0, count - 1] and after.remaining.item() == left
        seen = [-3, -2, -1, *path[0, :count].tolist()]                           # the last three, newest last
        assert after.recent[0, :, 0].tolist() == seen[-3:]


def slow_warp(logits, temperature, top_k, top_p):
    """The definition, token by token."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    weight = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
    total, nucleus, mass = sum(weight.values()), [], 0.0
    for i in kept:
        if top_p == 1 or not nucleus or mass < top_p:
            nucleus.append(i)
            mass += weight[i] / total
    return [weight[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.01])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_warp_against_its_definition(temperature, top_k, top_p):
    logits = torch.randn(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(top_k))
    logits[::2] = logits[::2].round()                                            # ties: the lower id
    probs = warp(logits, Sampling(temperature, top_k, top_p))
    for row, expected in zip(probs.tolist(), logits.tolist(), strict=True):
        want = slow_warp(expected, temperature, top_k, top_p)
        assert [p / sum(row) for p in row] == pytest.approx([w / sum(want) for w in want], abs=1e-12)


def test_choose_inverts_the_cdf_and_never_a_token_of_probability_0():
    logits = torch.tensor([0, 0.5, 0, 0.5, 0]).double().log()[None, None]
    draw = lambda u: choose(logits, torch.tensor([[u]], dtype=torch.float64), Sampling(1.0)).item()
    assert [draw(u) for u in (0.0, 0.4999, 0.5, 0.5001, 0.9999, 1 - 2 ** -53)] == [1, 1, 3, 3, 3, 3]
    tilted = torch.randn(1, 1, 32000, generator=torch.Generator().manual_seed(0))      # float32 in
    top = choose(tilted, torch.full((1, 1), 1 - 2 ** -53, dtype=torch.float64), Sampling(1.0, 50)).item()
    assert top == tilted.flatten().topk(50).indices.max()
    assert choose(tilted, None, GREEDY).item() == tilted.argmax()


def test_uniforms_depend_on_seed_and_position_only():
    short, long = uniforms([7, 3], 5), uniforms([3, 9, 7], 400)
    assert torch.equal(short[0], long[2, :5]) and torch.equal(short[1], long[0, :5])
    assert not torch.equal(long[0], long[1]) and long.dtype == torch.float64


def test_margin():
    logits = torch.tensor([0.0, 2.0, 1.5]).double()
    assert choice_margin(logits, 0.5, GREEDY) == pytest.approx(0.5)
    half = torch.zeros(2).double()                                               # CDF 0.5, 1
    assert choice_margin(half, 0.6, Sampling(1.0)) == pytest.approx(0.1)
    assert choice_margin(torch.zeros(3).double(), 0.5, Sampling(1.0, 1)) == 0.0  # a tie at the edge of the top-k
    assert choice_margin(half, 0.2, Sampling(1.0, 0, 0.52)) == pytest.approx(0.02)


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
        sampling = Sampling(temperature, epsilon=epsilon, delta=delta)
        path, out, count = accept(TREE, ids, logits, state(), sampling, NONE)
        nodes, tokens = slow_typical(ids[0].tolist(), (logits[0] / temperature).softmax(-1).tolist(), epsilon, delta)
        assert (path[0, :count].tolist(), out[0, :count].tolist()) == (nodes, tokens)
        lengths.append(len(tokens))
    assert {1, 2, 3, 4} <= set(lengths)


def test_typical_acceptance_at_temperature_0_is_match():
    ids, choices = [3, 4, 5, 6, 7, 8], [4, 6, 0, 8, 0, 1]
    args = torch.tensor([ids]), logits_choosing(*choices), state()
    for a, b in zip(accept(TREE, *args, GREEDY, NONE), accept(TREE, *args, Sampling(epsilon=0.09), NONE), strict=True):
        assert torch.equal(a, b)
