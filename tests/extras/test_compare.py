"""--compare: where two outputs part, and the margin there, the distance from another sample."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama

from extras.compare import first_difference, margin, noise_at
from tinymedusa import GREEDY, PlainDecoder, Sampling, gumbel_noise, sample, warp
from variants.penalty import penalize

SAMPLINGS = [GREEDY, Sampling(0.9), Sampling(0.7, top_k=4), Sampling(1.3, top_p=0.8), Sampling(0.7, 5, 0.9),
             Sampling(1.1, min_p=0.1)]


def test_margin():
    logits = torch.tensor([0.0, 2.0, 1.5]).double()
    assert margin(logits, None, GREEDY) == pytest.approx(0.5)
    noise = torch.tensor([0.0, -0.5, 0.1])
    assert margin(logits, noise, Sampling(0.5)) == pytest.approx(0.4)            # 4 - 0.5 and 3 + 0.1
    half = torch.zeros(2).double()
    assert margin(half, torch.tensor([0.3, 0.2]), Sampling(1.0)) == pytest.approx(0.1)
    assert margin(torch.zeros(3).double(), torch.rand(3), Sampling(1.0, 1)) == 0.0     # a tie at the edge of the top-k
    far = torch.tensor([0.0, 9.0, 0.0])                                          # the two best are 10 apart
    assert margin(logits, far, Sampling(0.5, 2)) == pytest.approx(3)             # the second and the third: 3 and 0
    assert margin(logits, far, Sampling(0.5, 1)) == pytest.approx(1)             # the first and the second: 4 and 3
    assert margin(logits, far, Sampling(0.5, 3)) == pytest.approx(10)            # there is no edge
    assert margin(half, far[:2], Sampling(1.0, 0, 0.52)) == pytest.approx(0.02)  # the nucleus: 0.5, then all
    skewed = torch.tensor([0.6, 0.3, 0.1]).double().log()
    assert margin(skewed, far, Sampling(1.0, 0, 0.85)) == pytest.approx(0.05)    # the nucleus: 0.6, 0.9, then all
    assert margin(skewed, far, Sampling(1.0, 2, 0.65)) == pytest.approx(2 / 3 - 0.65)  # of what the top-k left
    assert margin(skewed, far, Sampling(1.0, min_p=0.4)) == pytest.approx(math.log(0.5 / 0.4))   # 0.3, half of 0.6
    assert margin(skewed, far, Sampling(1.0, min_p=0.2)) == pytest.approx(math.log(0.2 * 6))     # 0.1, a sixth
    assert margin(skewed, far, Sampling(1.0, 2, min_p=0.2)) == pytest.approx(math.log(0.5 / 0.2))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.6), Sampling(1.5), Sampling(0.8, 3),
                                      Sampling(0.8, min_p=0.2)], ids=str)
def test_nothing_nearer_than_the_margin_changes_the_sample(sampling):
    """A little more than the margin does: it is the least change of the gap of two logits (by T) that can."""
    generator, at_the_edge = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        logits = torch.randn(9, dtype=torch.float64, generator=generator)
        noise = noise_at(seed, 5, logits, sampling)
        room, temperature = margin(logits, noise, sampling), sampling.temperature or 1
        chosen = sample(logits, noise, sampling)
        for _ in range(20):                                                      # a gap changes by twice as much
            signs = torch.randint(2, (9,), generator=generator) * 2 - 1
            assert sample(logits + 0.499 * room * temperature * signs, noise, sampling) == chosen
        ranked = (logits if noise is None else warp(logits, sampling) + noise).topk(2)
        if ranked.values[0] - ranked.values[1] > room:
            at_the_edge += 1
            continue
        toward = torch.zeros(9, dtype=torch.float64)
        toward[ranked.indices] = torch.tensor([-0.501, 0.501], dtype=torch.float64) * room * temperature
        assert sample(logits + toward, noise, sampling) == ranked.indices[1]
    assert (at_the_edge > 0) == (sampling.top_k > 0 or sampling.min_p > 0) and at_the_edge < 190


@pytest.mark.parametrize("sampling, penalty", [*((s, None) for s in SAMPLINGS), (GREEDY, 1.4), (Sampling(0.9), 0.7)],
                         ids=str)
def test_the_first_difference_and_its_margin(sampling, penalty):
    """At each position of a text of plain decoding: the margin is that of the very draw that decoding made there."""
    model, prompt, seed = tiny_llama(), [1, 5, 9, 3], 11
    args = SimpleNamespace(max_steps=None, device="cpu", sampling=sampling, repetition_penalty=penalty)
    decoder = PlainDecoder(model, sampling, eos=())
    if penalty:
        penalize(decoder, penalty)
    plain = [i for step in decoder.generate([prompt], 20, [seed]) for i in step[0]]
    part = lambda ours, theirs=plain: first_difference(model, prompt, ours, theirs, args, seed)
    assert part(plain) is None and len(plain) == 20 and len(set(plain)) > 2
    for position in range(20):
        with torch.no_grad():
            logits = model.lm_head(model(torch.tensor([prompt + plain[:position]]))[0, -1])
        for token in {*prompt, *plain[:position]} if penalty else ():
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        noise = None if sampling == GREEDY else gumbel_noise(torch.tensor([seed]), torch.tensor([[position]]), 12)[0, 0]
        assert sample(logits, noise, sampling) == plain[position]
        wrong = [(token + (i >= position)) % 12 for i, token in enumerate(plain)]        # and all behind it
        least = margin(logits, noise, sampling)
        expected = {"position": position, "margin": pytest.approx(least, abs=1e-9)}
        assert 0 < least < 100 and part(wrong) == expected
        assert part(plain[:position]) == expected and part(plain, plain[:position]) == expected
    args.max_steps = 3                                                           # then one may be longer, but no other
    assert part(plain[:5]) is None and part(plain, plain[:5]) is None
    assert part([*plain[:4], plain[4] ^ 1, *plain[5:]], plain[:9])["position"] == 4


def test_typical_acceptance_may_differ(tiny_folder, cli):
    """So no margin is reported, as there is no sample that it would be nearest to; at temperature 0 it may not."""
    args = ["--model", tiny_folder, "--prompt", "the dog", "--compare", "--max-new-tokens", 30, "--acceptance",
            "typical", "--epsilon", 1e-9, "--threads", 1]
    result = json.loads(cli("generate", *args, "--temperature", 3, "--json")[1])
    assert result["identical"] is False and result["first_difference"] is None
    assert "identical: no, as acceptance is typical" in cli("generate", *args, "--temperature", 3)[1]
    assert json.loads(cli("generate", *args, "--json")[1])["identical"] is True
