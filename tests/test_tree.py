"""The tree: derived tables against slow definitions, node logits against decoding the path in sequence, drafts."""
import random

import pytest
import torch
from conftest import random_prompt, random_tree, tiny_heads, tiny_llama

from llama import new_cache
from tinymedusa import GREEDY, ROOT, Decoder, NoHeads, PlainDecoder, Sampling, State, Tree, gumbel_noise


def state_of(token, recent_hidden=None, cache=None, length=None):
    zero = torch.zeros(len(token), dtype=torch.long)
    return State(cache, zero if length is None else length, token, recent_hidden, zero, zero + 99,
                 torch.arange(len(token)))


@pytest.mark.parametrize("seed", range(10))
def test_tables_against_their_definition(seed):
    paths = random_tree(random.Random(seed))
    tree = Tree.from_paths(paths)
    assert tree.paths[0] == () and sorted(tree.paths[1:]) == sorted(map(tuple, paths))
    for i, p in enumerate(tree.paths):
        assert tree.depth[i] == len(p) and tree.rank[i] == (p[-1] if p else 0)
        assert tree.paths[tree.parent[i]] == p[:-1] and tree.parent[i] <= i
        for j, q in enumerate(tree.paths):
            assert tree.ancestors[i, j] == (p[:len(q)] == q)
        for j in range(tree.retrieve.shape[1]):
            assert tree.retrieve[i, j] >= j                                      # an unread slot is never overwritten
            assert tree.retrieve[i, j] == (tree.paths.index(p[:j]) if j <= len(p) else j)
    assert tree.retrieve.shape == (len(tree.paths), 1 + max(map(len, tree.paths)))


@pytest.mark.parametrize("seed", range(10))
@torch.inference_mode()
def test_node_logits_are_those_of_the_path_in_sequence(seed):
    rng = random.Random(seed)
    model, prompt, tree = tiny_llama(seed), random_prompt(rng), Tree.from_paths(random_tree(rng))
    ids = torch.randint(0, 12, (1, len(tree.paths)), generator=torch.Generator().manual_seed(seed))
    cache = new_cache(model.config, 1, 160, like=model.norm.weight)
    decoder = Decoder(model, NoHeads(), tree)
    length, _ = decoder.prefill([prompt], cache, 1)
    hidden, logits = decoder.verify(state_of(ids[:, 0], cache=cache, length=length), ids, 128)
    for i, path in enumerate(tree.retrieve):
        sequence = prompt + ids[0, path[:tree.depth[i] + 1]].tolist()
        expected = model(torch.tensor([sequence]))[0, -1]
        assert torch.allclose(hidden[0, i], expected, atol=1e-11)
        assert torch.allclose(logits[0, i], model.lm_head(expected), atol=1e-11)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(1.2, 9, 0.95)], ids=str)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_every_node_is_its_heads_guess(num_layers, sampling):
    """Slow definition: node [.., r] of depth d is the rank r of head d, by its logits and the parent's noise.

    The parent of depth d - 1 is sampled at the output position emitted + d - 1. See variants/ for heads that see more.
    """
    model = tiny_llama()
    heads = tiny_heads(model, num_layers=num_layers)
    token, recent_hidden = torch.tensor([4, 5, 6]), torch.randn(3, 1, 32, dtype=torch.float64)
    state = state_of(token, recent_hidden)._replace(emitted=torch.tensor([0, 7, 30]), seed=torch.tensor([5, 0, 9]))
    with torch.inference_mode():
        logits = heads(recent_hidden, token[:, None])
        for seed in range(4):
            tree = Tree.from_paths(random_tree(random.Random(seed), nodes=25))
            ids, noise = Decoder(model, heads, tree, sampling).draft(state)
            assert (noise is None) == (sampling.temperature == 0) and ids.shape == (3, len(tree.paths))
            for b in range(3):
                for i, p in enumerate(tree.paths):
                    if not p:
                        assert ids[b, i] == token[b]
                        continue
                    score = logits[b, len(p) - 1]
                    if sampling.temperature:
                        position = state.emitted[b:b + 1, None] + len(p) - 1
                        score = score / sampling.temperature + gumbel_noise(state.seed[b:b + 1], position, 12)[0, 0]
                    assert score[ids[b, i]] == score.sort(descending=True).values[p[-1]]     # -inf more than once
                    siblings = [j for j, q in enumerate(tree.paths) if q and q[:-1] == p[:-1]]
                    assert len(ids[b, siblings].unique()) == len(siblings)


@torch.inference_mode()
def test_the_root_alone():
    assert ROOT.paths == [()] and ROOT.retrieve.tolist() == [[0]] and ROOT.ancestors.tolist() == [[True]]
    assert (ROOT.parent.tolist(), ROOT.depth.tolist(), ROOT.rank.tolist()) == ([0], [0], [0])
    model = tiny_llama()
    decoder, cache = PlainDecoder(model), new_cache(model.config, 1, 70, like=model.norm.weight)
    length, _ = decoder.prefill([[1, 3]], cache, 1)
    state = state_of(torch.tensor([7]), cache=cache, length=length)
    ids, noise = decoder.draft(state)
    assert ids.tolist() == [[7]] and noise is None
    hidden, logits = decoder.verify(state, ids, 64)
    expected = model(torch.tensor([[1, 3, 7]]))[0, -1]
    assert torch.allclose(hidden[0, 0], expected, atol=1e-12)
    assert torch.allclose(logits[0, 0], model.lm_head(expected), atol=1e-12)
