"""The static cache: however the tokens come in, the hidden states are those of one forward without a cache."""
import random

import pytest
import torch
from conftest import random_prompt, random_tree, tiny_heads, tiny_llama

import tinymedusa
from llama import keep_rows, mask_table, new_cache, visible
from tinymedusa import GREEDY, Tree, feed, prefill, small_cache, start, step, whole_cache, window_of

CHAIN = lambda n: (torch.arange(n), mask_table(torch.ones(n, n).tril().bool()))


def rows_of(rng, batch):
    return [random_prompt(rng) for _ in range(batch)]


@pytest.mark.parametrize("seed", range(8))
def test_no_cache_is_prefill_and_one_is_one_by_one_is_chunked(seed, monkeypatch):
    rng = random.Random(seed)
    model, prompts = tiny_llama(seed), rows_of(rng, 3)
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([p]))[0, -1] for p in prompts])
        for chunk in (512, rng.randint(1, 20), 1):                              # whole, in pieces, one by one
            monkeypatch.setattr(tinymedusa, "PREFILL_CHUNK", chunk)
            length, last = prefill(model, prompts, new_cache(model.config, 3, 140, like=model.norm))
            assert length.tolist() == [len(p) for p in prompts]
            assert torch.allclose(last[:, 0], expected, atol=1e-12)
        monkeypatch.setattr(tinymedusa, "PREFILL_CHUNK", 512)
        longer = [p + [5] for p in prompts]                                     # prefill, then one more token
        cache = new_cache(model.config, 3, 140, like=model.norm)
        length, _ = prefill(model, prompts, cache)
        last = feed(model, torch.full((3, 1), 5), *CHAIN(1), cache, length, torch.arange(128))[:, -1]
        assert torch.allclose(last, torch.stack([model(torch.tensor([p]))[0, -1] for p in longer]), atol=1e-12)


def slow_visible(length, ancestors, window):
    seen = torch.tensor([[[s < n or (s - n < len(ancestors) and bool(ancestors[i][s - n])) for s in range(window)]
                          for i in range(len(ancestors))] for n in length])
    return torch.where(seen, 0.0, -torch.inf)


@pytest.mark.parametrize("seed", range(6))
def test_visible_against_its_definition(seed):
    rng = random.Random(seed)
    tree = Tree.from_paths(random_tree(rng), 4, 12)
    length = [rng.randint(0, 30) for _ in range(4)]
    expected = slow_visible(length, tree.ancestors.tolist(), 57)
    assert torch.equal(visible(torch.tensor(length), tree.mask, torch.arange(57)), expected)


def test_keep_rows_moves_only_the_path():
    cache = torch.arange(2 * 2 * 9 * 2 * 1 * 1.0).view(2, 2, 9, 2, 1, 1)        # L 2, B 2, S 9
    before = cache.clone()
    keep_rows(cache, torch.tensor([3, 1]), torch.tensor([[0, 2, 4], [0, 1, 2]]))
    expected = before.clone()
    expected[:, 0, 4], expected[:, 0, 5] = before[:, 0, 5], before[:, 0, 7]
    assert torch.equal(cache, expected)                                         # row 1's path is where it stands


@pytest.mark.parametrize("seed", range(12))
def test_after_each_commit_the_cache_is_a_fresh_prefill(seed):
    rng = random.Random(seed)
    model = tiny_llama(seed)
    heads = tiny_heads(model, recent=3)
    tree = heads.tree(random_tree(rng, nodes=30))
    prompts, eos = rows_of(rng, 2), torch.tensor([], dtype=torch.long)
    with torch.inference_mode():
        state, report = start(model, prompts, 25, tree, GREEDY, eos, [0, 1], 3, small_cache(model, 2, 61, 25, 31))
        new = lambda report: [ids[:count] for count, _, *ids in report.tolist()]
        texts = [p + n for p, n in zip(prompts, new(report), strict=True)]
        accepted = 0
        while state.remaining.any():
            state, report = step(model, heads, tree, state, window_of(128, state.cache), GREEDY, eos)
            texts = [t + n for t, n in zip(texts, new(report), strict=True)]
            accepted += int((report[:, 0] > 1).sum())
            assert state.length.tolist() == [len(t) - 1 for t in texts]         # all but the pending token
            assert state.token.tolist() == [t[-1] for t in texts]
            for b, text in enumerate(texts):
                fresh = new_cache(model.config, 1, 140, like=model.norm)
                _, last = prefill(model, [text[:-1]], fresh, 3)
                n = len(text) - 1
                assert torch.allclose(state.cache[:, b, :n], fresh[:, 0, :n], atol=1e-11)
                assert torch.allclose(state.recent[b], last[0], atol=1e-11)
    assert accepted or len(tree.paths) < 8


@torch.inference_mode()
def test_stale_rows_are_never_seen():
    """Garbage beyond `length` (masked, so its weight is exactly 0) changes nothing, in any bit."""
    model, prompt = tiny_llama(), [[1, 5, 6, 7, 3, 9, 4]]
    results = []
    for garbage in (0.0, 1e3):
        cache = new_cache(model.config, 1, 100, like=model.norm)
        length, _ = prefill(model, prompt, cache)
        cache[:, :, 7:] = garbage
        results.append(feed(model, torch.tensor([[4, 8]]), *CHAIN(2), cache, length, torch.arange(64)))
    assert torch.equal(*results)


def test_a_finished_row_stays_as_it_is():
    model = tiny_llama()
    heads, tree, eos = tiny_heads(model), Tree.from_paths([[0], [1], [0, 0]], 4, 12), torch.tensor([2])
    with torch.inference_mode():
        state, _ = start(model, [[1, 4, 5], [1, 6]], 9, tree, GREEDY, eos, [0, 1], 1, whole_cache(model, 2))
        state = state._replace(remaining=torch.tensor([0, 5]))
        after, report = step(model, heads, tree, state, window_of(64, state.cache), GREEDY, eos)
    assert report[0, 0] == 0 and report[1, 0] > 0
    for name in ("length", "token", "recent", "emitted", "remaining"):
        assert torch.equal(getattr(after, name)[0], getattr(state, name)[0]), name
    assert torch.equal(after.cache[:, 0, :3], state.cache[:, 0, :3])
