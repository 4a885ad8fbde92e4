"""Sampling and accepting: hand-made logits, limits and end-of-text in mid-path; warping and noise against slow
definitions; draws against their probabilities."""
import math
from itertools import islice

import pytest
import torch

import tinymedusa
from tinymedusa import (
    GREEDY,
    ROOT,
    Sampling,
    State,
    Tree,
    accept,
    commit,
    gumbel_noise,
    mix64,
    newest,
    sample,
    truncate,
    warp,
)

TREE = Tree.from_paths([[0], [1], [0, 0], [0, 1], [0, 0, 0]])                    # nodes: root 0 1 00 01 000
NONE = torch.tensor([], dtype=torch.long)


# ------------------------------------------------------------------------------------------- accepting, committing

def logits_choosing(*tokens):
    """[1, N, V] whose argmax at node i is tokens[i]."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), 10).double()


def accepted(ids, choices, remaining=99, eos=NONE):
    path, out, count = accept(TREE, torch.tensor([ids]), logits_choosing(*choices), None, GREEDY)
    count = truncate(out, count, torch.tensor([remaining]), eos)
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


def test_a_node_is_sampled_with_the_noise_of_its_depth():
    """Logits that say nothing: the noise of output position emitted + depth alone decides, the same at all siblings."""
    noise = 10 * torch.nn.functional.one_hot(torch.tensor([[4, 6, 8, 1]]), 10).double()             # [1, P, V]
    for ids, nodes, tokens in (
            ([3, 4, 5, 6, 7, 8], [0, 1, 3, 5], [4, 6, 8, 1]), ([3, 4, 5, 7, 6, 8], [0, 1, 4], [4, 6, 8]),
            ([3, 5, 4, 6, 7, 8], [0, 2], [4, 6]), ([3, 6, 8, 4, 1, 8], [0], [4])):
        path, out, count = accept(TREE, torch.tensor([ids]), torch.zeros(1, 6, 10).double(), noise, Sampling(1.0))
        assert (path[0, :count].tolist(), out[0, :count].tolist()) == (nodes, tokens)
    path, out, count = accept(ROOT, torch.tensor([[3]]), torch.zeros(1, 1, 10).double(), noise[:, :1], Sampling(1.0))
    assert (path.tolist(), out.tolist(), count.tolist()) == ([[0]], [[4]], [1])


def test_rows_are_accepted_each_on_its_own():
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]] * 3)
    logits = torch.cat([logits_choosing(*c) for c in ([4, 6, 0, 8, 0, 1], [9, 0, 0, 0, 0, 0], [5, 6, 2, 0, 0, 0])])
    path, out, count = accept(TREE, ids, logits, None, GREEDY)
    assert count.tolist() == [4, 1, 2]
    assert [p[:n] for p, n in zip(path.tolist(), count, strict=True)] == [[0, 1, 3, 5], [0], [0, 2]]
    assert [t[:n] for t, n in zip(out.tolist(), count, strict=True)] == [[4, 6, 8, 1], [9], [5, 2]]


def test_newest_is_the_end_of_both_together():
    old, new = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    for counts in ((0, 4), (1, 2), (3, 0), (4, 1)):
        expected = [(old[b].tolist() + new[b, :n].tolist())[-3:] for b, n in enumerate(counts)]
        assert newest(old, new, torch.tensor(counts)).tolist() == expected


def test_commit_ends_the_row_at_eos_and_takes_the_last_nodes_hidden():
    cache = torch.zeros(2, 1, 20, 2, 2, 8)
    recent_hidden = torch.tensor([-3.0, -2, -1])[None, :, None].expand(1, 3, 32)
    zero = torch.tensor([0])
    before = State(cache, torch.tensor([5]), torch.tensor([3]), recent_hidden, zero, torch.tensor([99]), zero + 7)
    hidden = torch.arange(6.0)[None, :, None].expand(1, 6, 32)                   # node i's hidden is all i
    path, out = torch.tensor([[0, 1, 3, 5]]), torch.tensor([[4, 6, 8, 1]])
    for count, eos, left in ((4, NONE, 95), (2, torch.tensor([6]), 0), (3, torch.tensor([6]), 96)):
        after = commit(before, hidden, path, out, torch.tensor([count]), eos)
        assert after.length.item() == 5 + count and after.emitted.item() == count and after.seed.item() == 7
        assert after.token.item() == out[0, count - 1] and after.remaining.item() == left
        seen = [-3, -2, -1, *path[0, :count].tolist()]                           # the last three, newest last
        assert after.recent_hidden[0, :, 0].tolist() == seen[-3:]


# ---------------------------------------------------------------------------------------------------------- warping

def slow_warp(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The definition, token by token."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    weight = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
    total, nucleus, mass = sum(weight.values()), [], 0.0
    for i in kept:
        if top_p == 1 or not nucleus or mass < top_p:
            nucleus.append(i)
            mass += weight[i] / total
    kept = {i for i in nucleus if weight[i] >= min_p}                            # the largest weight is 1
    return [weight[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_warp_against_its_definition(temperature, min_p, top_k, top_p):
    logits = torch.randn(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(top_k))
    logits[::2] = logits[::2].round()                                            # ties: the lower id
    probs = warp(logits, Sampling(temperature, top_k, top_p, min_p)).softmax(-1)
    for row, expected in zip(probs.tolist(), logits.tolist(), strict=True):
        want = slow_warp(expected, temperature, top_k, top_p, min_p)
        assert row == pytest.approx([w / sum(want) for w in want], abs=1e-12)
        assert [p > 0 for p in row] == [w > 0 for w in want]


@pytest.mark.parametrize("size, spread", [(63, 0.1), (64, 0.1), (65, 0.1), (1025, 0.1), (3000, 0.1), (3000, 4.0)])
def test_warp_of_a_large_vocabulary(size, spread):
    """Where the nucleus is larger than what is looked at first, or ties reach beyond it; each row as alone."""
    logits = spread * torch.randn(6, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    logits[1::2] = logits[1::2].round(decimals=1 if spread < 1 else 0)
    for limits in ((0, 0.97), (0, 0.5), (0, 0.05), (size // 2, 0.9), (size, 0.9), (size + 1, 1.0), (70, 1.0),
                   (0, 1.0, 0.9), (70, 0.97, 0.8)):
        sampling = Sampling(0.9, *limits)
        warped = warp(logits, sampling)
        for row, expected in zip(warped, logits.tolist(), strict=True):
            assert (row > -math.inf).tolist() == [w > 0 for w in slow_warp(expected, *sampling)]
        assert torch.equal(torch.cat([warp(row[None], sampling) for row in logits]), warped)


def test_top_k_alone_leaves_out_nothing_that_is_merely_rare():
    """In float32 the mass in front of the second token is rounded to 1."""
    warped = warp(torch.tensor([0.0, -20.0, -21.0]), Sampling(1.0, 2))
    assert warped.tolist() == [0.0, -20.0, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limits", [(0, 1.0), (5, 1.0), (0, 0.9), (5, 0.3)])
def test_a_temperature_near_0_is_the_argmax(limits, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.randperm(50, generator=generator) for _ in range(40)]).to(dtype)    # none equal
    noise = gumbel_noise(torch.arange(40), torch.zeros(40, 1).long(), 50)[:, 0]
    for temperature in (1e-3, 1e-9, 1e-30, 1e-45, 1e-100, 1e-300, 5e-324):
        sampling = Sampling(temperature, *limits)
        warped = warp(logits, sampling)
        assert not warped.isnan().any() and (warped.amax(-1) == 0).all()
        assert limits != (0, 1.0) or warped.isfinite().all()
        assert torch.equal(sample(logits, noise, sampling), logits.argmax(-1))
    assert torch.equal(sample(logits, None, GREEDY), logits.argmax(-1))


def test_of_equal_logits_the_lower_id_is_the_most_likely():
    generator = torch.Generator().manual_seed(0)
    for size in (4096, 128 * 33, 1000, 7):
        logits = torch.randint(0, 40, (2, 9, size), generator=generator).float()     # many ties for the best
        first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert torch.equal(sample(logits.to(dtype), None, GREEDY), first)
    assert sample(torch.zeros(1, 8, 4096), None, GREEDY).eq(0).all()


# ------------------------------------------------------------------------------------------------------- the noise

def splitmix64(seed):
    """SplitMix64 as published (Steele, Lea and Flood 2014), on Python's integers."""
    state, mask = seed, 2 ** 64 - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        yield z ^ z >> 31


def nth(seed, n):
    """Output n of the generator that starts from this seed, 0 the first."""
    return next(islice(splitmix64(seed), n, None))


def mixed(seed):
    """SplitMix64's function of its state: what it puts out whose state becomes this seed."""
    return nth((seed - 0x9E3779B97F4A7C15) % 2 ** 64, 0)


def slow_noise(seed, position, token):
    """A row's seed, mixed, seeds a generator with an output for each position, which seeds one for the tokens there."""
    bits = nth(nth(mixed(seed), position), token) >> 32
    v = (bits + 0.5) / 2 ** 32
    return -math.log(-math.log1p(-v)), v


def test_splitmix64_is_the_published_one():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
                 16408922859458223821]
    assert list(islice(splitmix64(1234567), 5)) == published
    states = [1234567 + n * 0x9E3779B97F4A7C15 for n in range(1, 6)]
    signed = lambda numbers: [(n + 2 ** 63) % 2 ** 64 - 2 ** 63 for n in numbers]
    assert mix64(torch.tensor(signed(states))).tolist() == signed(published)


def test_noise_against_its_definition():
    seeds = [0, 1, 2, 77, 10 ** 6, 2 ** 32, 2 ** 62, 2 ** 63 - 1]
    positions = [0, 1, 2, 5, 31, 400]
    noise = gumbel_noise(torch.tensor(seeds), torch.tensor([positions] * len(seeds)), 50)
    assert noise.dtype == torch.float32 and noise.shape == (8, 6, 50)
    for b, seed in enumerate(seeds):
        for p, position in enumerate(positions):
            for token in range(50):
                slow, v = slow_noise(seed, position, token)
                rounding = 1e-6 + 2 ** -24 / (1 - v) + 3e-7 * abs(slow)           # of v in float32, of the logarithms
                assert noise[b, p, token].item() == pytest.approx(slow, abs=rounding), (seed, position, token)


def test_noise_depends_on_seed_position_and_token_alone():
    """In any batch, any subset and any order of seeds and positions, in any vocabulary: the same in every bit."""
    seeds = torch.tensor([7, 0, 3, 2 ** 62 + 5, 12345])
    positions = torch.stack([torch.arange(9) + start for start in (0, 4, 100, 3, 0)])
    noise = gumbel_noise(seeds, positions, 101)
    for b in range(5):
        for p in range(9):
            alone = gumbel_noise(seeds[b:b + 1], positions[b:b + 1, p:p + 1], 101)
            assert torch.equal(alone[0, 0], noise[b, p])
    rows, columns = torch.tensor([4, 0, 0, 2]), torch.tensor([8, 1, 5])
    assert torch.equal(gumbel_noise(seeds[rows], positions[rows][:, columns], 101), noise[rows][:, columns])
    for vocab_size in (1, 2, 37, 100, 1000):
        both = min(vocab_size, 101)
        assert torch.equal(gumbel_noise(seeds, positions, vocab_size)[..., :both], noise[..., :both])
    assert torch.equal(noise[0, 4:], gumbel_noise(seeds[:1], positions[1:2], 101)[0, :5])       # from position 4 on


@pytest.mark.parametrize("seed", [0, 1, 123456789, 2 ** 62, 2 ** 63 - 1])
def test_every_bit_of_a_seed_matters(seed):
    seeds = [seed] + [seed ^ 1 << bit for bit in range(63)]
    noise = gumbel_noise(torch.tensor(seeds), torch.zeros(64, 1).long(), 64)[:, 0]
    for i in range(64):
        for j in range(i):
            assert (noise[i] == noise[j]).sum() <= 1                              # of 64: a coincidence at most


def test_noise_is_finite_and_no_corner_is_special():
    """mix64(0) is 0, the largest noise there is: neither seed 0 nor position 0 nor token 0 may come to that."""
    noise = gumbel_noise(torch.arange(200), torch.arange(20).expand(200, -1), 200)
    assert noise.isfinite().all() and noise.min() >= -2.82 and noise.max() < 20
    corners = torch.cat((noise[:2, :2, :2].flatten(), noise[0, 0], noise[0, :, 0], noise[:, 0, 0]))
    assert corners.max() < 9                                                     # 428 values: 0.05 are larger
    assert noise.double().mean().item() == pytest.approx(0.5772157, abs=0.005)   # Euler's constant
    assert noise.double().var().item() == pytest.approx(math.pi ** 2 / 6, abs=0.02)


# ------------------------------------------------------------------------------------------------------- the draws

def draws(logits, seeds, positions, sampling) -> torch.Tensor:
    """Tokens [B, P] sampled from the same logits [V], a few rows at a time."""
    out = []
    for some in torch.arange(len(seeds)).split(max(1, 60000 // (positions.shape[1] * len(logits)))):
        noise = gumbel_noise(seeds[some], positions[some], len(logits))
        out.append(sample(logits.expand(noise.shape), noise, sampling))
    return torch.cat(out)


def deviation(seen, probability) -> float:
    """How far counts are from a probability, as a normal deviate: chi-square by Wilson and Hilferty."""
    expected = probability / probability.sum() * seen.sum()
    assert expected.min() > 5
    chi2, dof = ((seen - expected) ** 2 / expected).sum().item(), len(expected) - 1
    return ((chi2 / dof) ** (1 / 3) - (1 - 2 / (9 * dof))) / (2 / (9 * dof)) ** 0.5


def test_draws_follow_the_probabilities():
    """Chi-squares over seeds and over positions, at some temperatures and limits; the deviates are normal together."""
    deviates = []
    for case in range(24):
        generator = torch.Generator().manual_seed(case)
        logits = 1.2 * torch.randn(32, generator=generator)
        sampling = (Sampling(1.0), Sampling(0.8), Sampling(2.0), Sampling(1.0, 12), Sampling(1.3, 0, 0.9))[case % 5]
        seeds, positions = torch.arange(30000)[:, None] + 10 ** 9 * case, torch.zeros(30000, 1).long()
        if case % 2:                                                             # a text's positions instead of seeds
            seeds, positions = seeds[:30], torch.arange(1000).expand(30, -1)
        seen = torch.bincount(draws(logits, seeds[:, 0], positions, sampling).flatten(), minlength=32).double()
        probability = torch.tensor(slow_warp(logits.tolist(), *sampling), dtype=torch.float64)
        assert seen[probability == 0].sum() == 0
        deviates.append(deviation(seen[probability > 0], probability[probability > 0]))
    deviates = torch.tensor(deviates)
    print(f"24 chi-squares as normal deviates: mean {deviates.mean():.2f}, deviation {deviates.std():.2f}, "
          f"largest {deviates.abs().max():.2f}")
    assert deviates.mean().abs() < 0.8 and 0.5 < deviates.std() < 1.6 and deviates.abs().max() < 3.5


def test_the_tail_of_the_noise_is_exact(monkeypatch):
    """A token of p = 1e-8 is drawn where its noise exceeds about 18.4: so often must that be, and not only about."""
    lowest = 2 ** torch.arange(32) - 1                                           # of the generator's upper 32 bits
    monkeypatch.setattr(tinymedusa, "mix64", lambda z: z if z.dim() < 3 else lowest.expand(z.shape) << 32)
    noise = gumbel_noise(torch.tensor([3]), torch.tensor([[0]]), 32)[0, 0].double()
    reached = -torch.expm1(-torch.exp(-noise))                                   # P(at least that noise)
    expected = (lowest + 0.5) / 2 ** 32                                          # numbers below, and half of this one
    assert ((reached / expected)[:-1] - 1).abs().max() < 2e-5                    # the last: 1 - 2 ** -24, not 1
    assert noise[5] > 18.4 > noise[6]                                            # 1e-8 is 43 of 2 ** 32 numbers


def test_rare_tokens_are_drawn_at_their_rate():
    """1,000 tokens of p = 1e-6 each beside a sure one, in float32: a token that rounds to "never" would show."""
    logits = torch.full((1001,), math.log(1e-6))
    logits[500] = math.log(1 - 1e-3)
    size = 50000
    tokens = draws(logits, torch.arange(size) + 3 * 10 ** 9, torch.zeros(size, 1).long(), Sampling(1.0)).flatten()
    rare = tokens[tokens != 500]
    print(f"{len(rare)} rare tokens where {size * 1e-3:.0f} were due")
    assert abs(len(rare) - 50) < 4 * 50 ** 0.5                                   # Poisson: four deviations
    assert len(rare.unique()) > 0.85 * len(rare)                                 # and not always the same ones
    assert 0.25 < (rare < 500).double().mean() < 0.75


@pytest.mark.parametrize("name, seed, position", [
    ("neighbouring seeds", 1, 0), ("neighbouring positions", 0, 1), ("seed and position", 1, 1), ("crosswise", 1, -1),
    ("a power of two", 2 ** 32, 0), ("the high bits", 2 ** 61, 0), ("positions far apart", 0, 1024)])
def test_draws_of_neighbours_are_independent(name, seed, position):
    """A chi-square on pairs of draws: their joint counts against the product of the probabilities."""
    logits, size = torch.tensor([0.0, 0.3, -0.4, 0.8, -1.0, 0.1]), 200
    seeds = 17 + 3 * torch.arange(size)                                          # even and odd, no pair overlaps
    positions = (1 + 3 * torch.arange(size)).expand(size, -1)
    first = draws(logits, seeds, positions, Sampling(1.0))
    second = draws(logits, seeds + seed, positions + position, Sampling(1.0))
    pairs = torch.bincount((6 * first + second).flatten(), minlength=36).double()
    p = logits.double().softmax(-1)
    z = deviation(pairs, (p[:, None] * p).flatten())
    print(f"{name}: {size * size} pairs, deviate {z:.2f}")
    assert abs(z) < 3.5


def test_a_token_of_probability_0_is_never_drawn():
    generator = torch.Generator().manual_seed(0)
    for limits in ((1.0, 3, 1.0), (2.0, 0, 0.3), (0.7, 10, 0.8), (5.0, 1, 1.0), (1.0, 40, 0.99)):
        sampling = Sampling(*limits)
        logits = torch.randn(200, 50, generator=generator)
        logits[:100] = logits[:100].round()                                      # ties at the edge
        noise = gumbel_noise(torch.arange(200), torch.arange(100).expand(200, -1), 50)
        tokens = sample(logits[:, None].expand(-1, 100, -1), noise, sampling)    # [200, 100]
        possible = warp(logits, sampling) > -torch.inf
        assert possible.gather(1, tokens).all()
        wanted = [[w > 0 for w in slow_warp(row, *sampling)] for row in logits[:100].double().tolist()]
        assert torch.tensor(wanted).gather(1, tokens[:100]).all()
    large = torch.randn(32000, generator=generator)                              # float32, a real vocabulary
    tokens = sample(large.expand(40, -1), gumbel_noise(torch.arange(40), torch.zeros(40, 1).long(), 32000)[:, 0],
                    Sampling(1.0, 50))
    assert set(tokens.tolist()) <= set(large.topk(50).indices.tolist()) and len(tokens.unique()) > 10
