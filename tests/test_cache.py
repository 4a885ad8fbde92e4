"""The static cache: however the tokens come in, the hidden states are those of one forward without a cache."""
import random

import pytest
import torch
from conftest import random_prompt, random_tree, tiny_heads, tiny_llama

import tinymedusa
from llama import attention_mask, keep_path, new_cache
from tinymedusa import Decoder, PlainDecoder, Tree, call


def rows_of(rng, batch):
    return [random_prompt(rng) for _ in range(batch)]


def cache_for(model, rows, slots=140):
    return new_cache(model.config, rows, slots, like=model.norm.weight)


def chain(decoder, ids, cache, length, window):
    """The hidden states of tokens that follow each other, ids [B, T], behind each row's prefix."""
    depth = torch.arange(ids.shape[1])
    return decoder.forward(ids, depth, depth[:, None] >= depth, cache, length, window)


@pytest.mark.parametrize("seed", range(8))
def test_no_cache_is_prefill_and_one_is_one_by_one_is_chunked(seed, monkeypatch):
    rng = random.Random(seed)
    model, prompts = tiny_llama(seed), rows_of(rng, 3)
    decoder = PlainDecoder(model)
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([p]))[0, -1] for p in prompts])
        for chunk in (512, rng.randint(1, 20), 1):                              # whole, in pieces, one by one
            monkeypatch.setattr(tinymedusa, "PREFILL_CHUNK", chunk)
            length, last = decoder.prefill(prompts, cache_for(model, 3), 1)
            assert length.tolist() == [len(p) for p in prompts]
            assert torch.allclose(last[:, 0], expected, atol=1e-12)
        monkeypatch.setattr(tinymedusa, "PREFILL_CHUNK", 512)
        longer = [p + [5] for p in prompts]                                     # prefill, then one more token
        cache = cache_for(model, 3)
        length, _ = decoder.prefill(prompts, cache, 1)
        last = chain(decoder, torch.full((3, 1), 5), cache, length, 128)[:, -1]
        assert torch.allclose(last, torch.stack([model(torch.tensor([p]))[0, -1] for p in longer]), atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_prefill_returns_the_newest_hidden_states_with_zeros_in_front(seed, monkeypatch):
    rng = random.Random(seed)
    model, prompts = tiny_llama(seed), [*rows_of(rng, 2), [1, 4], [1]]
    recent = rng.randint(1, 6)
    monkeypatch.setattr(tinymedusa, "PREFILL_CHUNK", rng.choice([512, 7, 2, 1]))
    with torch.no_grad():
        _, last = PlainDecoder(model).prefill(prompts, cache_for(model, 4), recent)
        for row, prompt in zip(last, prompts, strict=True):
            every = torch.cat((torch.zeros(recent, 32, dtype=torch.float64), model(torch.tensor([prompt]))[0]))
            assert torch.allclose(row, every[-recent:], atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_prefill_behind_a_kept_beginning(seed, monkeypatch):
    """The slots of the beginning are there already: they are neither computed nor written again."""
    rng = random.Random(seed)
    model, beginning = tiny_llama(seed), random_prompt(rng, 20)
    prompts = [beginning + [rng.randrange(3, 12) for _ in range(rng.randint(1, 30))] for _ in range(3)]
    monkeypatch.setattr(tinymedusa, "PREFILL_CHUNK", rng.choice([512, 7, 1]))
    decoder, whole, cache, calls = PlainDecoder(model), cache_for(model, 3), cache_for(model, 3), []
    with torch.no_grad():
        length, last = decoder.prefill(prompts, whole, 1)
        decoder.prefill([beginning] * 3, cache, 1)
        before = cache.clone()
        model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
        length_behind, last_behind = decoder.prefill(prompts, cache, 1, kept=len(beginning))
    assert sum(calls) == max(map(len, prompts)) - len(beginning)
    assert torch.equal(length_behind, length) and torch.allclose(last_behind, last, atol=1e-12)
    assert torch.equal(cache[:, :, :len(beginning)], before[:, :, :len(beginning)])
    for b, prompt in enumerate(prompts):
        assert torch.allclose(cache[:, b, :len(prompt)], whole[:, b, :len(prompt)], atol=1e-12)


def slow_mask(length, ancestors, window):
    return torch.tensor([[[s < n or (s - n < len(ancestors) and bool(ancestors[i][s - n])) for s in range(window)]
                          for i in range(len(ancestors))] for n in length])


@pytest.mark.parametrize("seed", range(6))
def test_attention_mask_against_its_definition(seed):
    rng = random.Random(seed)
    length = [rng.randint(0, 30) for _ in range(4)]
    anything = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed)) < 0.5
    for ancestors in (Tree.from_paths(random_tree(rng)).ancestors, anything):
        mask = attention_mask(torch.tensor(length), ancestors, 57)
        assert mask.dtype == torch.bool and torch.equal(mask, slow_mask(length, ancestors.tolist(), 57))


def test_keep_path_moves_only_the_path():
    cache = torch.arange(2 * 2 * 9 * 2 * 1 * 1.0).view(2, 2, 9, 2, 1, 1)        # L 2, B 2, S 9
    before = cache.clone()
    keep_path(cache, torch.tensor([3, 1]), torch.tensor([[0, 2, 4], [0, 1, 2]]))
    expected = before.clone()
    expected[:, 0, 4], expected[:, 0, 5] = before[:, 0, 5], before[:, 0, 7]
    assert torch.equal(cache, expected)                                         # row 1's path is where it was


@pytest.mark.parametrize("seed", range(12))
def test_after_each_commit_the_cache_is_a_fresh_prefill(seed):
    rng = random.Random(seed)
    model = tiny_llama(seed)
    heads = tiny_heads(model, recent=3)
    tree = Tree.from_paths(random_tree(rng, nodes=30))
    decoder, prompts = Decoder(model, heads, tree, eos=()), rows_of(rng, 2)
    new = lambda out, count: [ids[:n] for ids, n in zip(out.tolist(), count.tolist(), strict=True)]
    with torch.inference_mode():
        state, out, count = decoder.start(prompts, 25, [0, 1], decoder.new_cache(prompts, 25))
        texts = [p + n for p, n in zip(prompts, new(out, count), strict=True)]
        accepted = 0
        while state.remaining.any():
            state, out, count = decoder.step(state, decoder.window(128, state.cache), call)
            texts = [t + n for t, n in zip(texts, new(out, count), strict=True)]
            accepted += int((count > 1).sum())
            assert state.length.tolist() == [len(t) - 1 for t in texts]         # all but the pending token
            assert state.token.tolist() == [t[-1] for t in texts]
            for b, text in enumerate(texts):
                n, fresh = len(text) - 1, cache_for(model, 1)
                _, last = decoder.prefill([text[:-1]], fresh, 3)
                assert torch.allclose(state.cache[:, b, :n], fresh[:, 0, :n], atol=1e-11)
                assert torch.allclose(state.recent_hidden[b], last[0], atol=1e-11)
    assert [len(t) - len(p) for t, p in zip(texts, prompts, strict=True)] == [25, 25]
    assert accepted or len(tree.paths) < 8


@torch.inference_mode()
def test_stale_slots_are_never_seen():
    """Garbage beyond `length` (masked, so its weight is exactly 0) changes nothing, in any bit."""
    model, prompt = tiny_llama(), [[1, 5, 6, 7, 3, 9, 4]]
    decoder, results = PlainDecoder(model), []
    for garbage in (0.0, 1e3):
        cache = cache_for(model, 1, 100)
        length, _ = decoder.prefill(prompt, cache, 1)
        cache[:, :, 7:] = garbage
        results.append(chain(decoder, torch.tensor([[4, 8]]), cache, length, 64))
    assert torch.equal(*results)


def test_a_finished_row_stays_as_it_is():
    model = tiny_llama()
    decoder = Decoder(model, tiny_heads(model), Tree.from_paths([[0], [1], [0, 0]]), eos=(2,))
    with torch.inference_mode():
        state, _, _ = decoder.start([[1, 4, 5], [1, 6]], 9, [0, 1], cache_for(model, 2, 96 + 4))
        state = state._replace(remaining=torch.tensor([0, 5]))
        committed = state.cache[:, 0, :3].clone()
        after, _, count = decoder.step(state, decoder.window(64, state.cache), call)
    assert count[0] == 0 and count[1] > 0
    for name in ("length", "token", "recent_hidden", "emitted", "remaining", "seed"):
        assert torch.equal(getattr(after, name)[0], getattr(state, name)[0]), name
    assert torch.equal(after.cache[:, 0, :3], committed)
