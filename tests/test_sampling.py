"""Chi-square: Medusa's samples follow the base's distribution, enumerated exactly. Independent of the equality test."""
import itertools

import pytest
import torch
from conftest import tiny_heads, tiny_llama
from test_accept import slow_warp

from tinymedusa import Decoder, Sampling, Tree

ROWS, BATCHES, V = 20000, 10, 6


def exact(model, prompt, sampling) -> torch.Tensor:
    """The probability of each of the V^3 continuations of three tokens, by one forward per prefix."""
    probability = torch.ones(V, V, V, dtype=torch.float64)
    for n in range(3):
        for prefix in itertools.product(range(V), repeat=n):
            logits = model.lm_head(model(torch.tensor([[*prompt, *prefix]]))[0, -1]).tolist()
            p = torch.tensor(slow_warp(logits, *sampling), dtype=torch.float64)
            probability[prefix] *= (p / p.sum()).view(-1, *[1] * (2 - n))
    return probability.flatten()


@pytest.mark.parametrize("kind, sampling", [
    ("medusa", Sampling(1.0)), ("hydra", Sampling(0.7)), ("medusa", Sampling(1.0, 3)), ("hydra", Sampling(1.0, 0, 0.8)),
    ("hydra", Sampling(1.4, 5, 0.9))], ids=str)
def test_three_token_continuations(kind, sampling):
    model = tiny_llama(vocab_size=V, num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1,
                       num_key_value_heads=1, std=0.5, dtype=torch.float32)
    heads, tree = tiny_heads(model, 2, noise=0.05, kind=kind), Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0]])
    prompt, counts, drafted, steps = [1, 4, 3], torch.zeros(V ** 3, dtype=torch.float64), 0, 0
    decoder = Decoder(model, heads, tree, sampling, eos=())
    with torch.no_grad():
        probability = exact(model, prompt, sampling)
    for batch in range(BATCHES):
        rows = [[] for _ in range(ROWS)]
        seeds = range(batch * ROWS, (batch + 1) * ROWS)
        for i, new in enumerate(decoder.generate([prompt] * ROWS, 3, seeds)):
            for row, ids in zip(rows, new, strict=True):
                row += ids
            lengths = list(map(len, new))
            busy = sum(map(bool, lengths))
            steps += busy if i else 0                                            # the prefill is none
            drafted += sum(lengths) - busy
        rows = torch.tensor(rows)
        counts += torch.bincount(rows @ torch.tensor([V * V, V, 1]), minlength=V ** 3)
    assert counts[probability == 0].sum() == 0
    expected, seen = ROWS * BATCHES * probability, counts[probability > 0]
    expected = expected[expected > 0]
    rare = expected < 5                                                          # pooled, as the test demands
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])) if rare.any() else expected
    seen = torch.cat((seen[~rare], seen[rare].sum()[None])) if rare.any() else seen
    chi2, dof = ((seen - expected) ** 2 / expected).sum().item(), len(expected) - 1
    # Wilson-Hilferty: the cube root of chi2 / dof is normal
    z = ((chi2 / dof) ** (1 / 3) - (1 - 2 / (9 * dof))) / (2 / (9 * dof)) ** 0.5
    print(f"{sampling}: {ROWS * BATCHES} samples, chi2 {chi2:.1f} for {dof} degrees, z {z:.2f}, "
          f"{drafted / steps:.2f} drafts accepted a step")
    assert z < 3.5 and drafted / steps > 0.2
