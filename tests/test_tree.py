"""The tree: derived tables against slow definitions, node logits against decoding the path in sequence, errors."""
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import random_prompt, random_tree, tiny_heads, tiny_llama

from llama import UserError, new_cache
from tinymedusa import KINDS, PUBLISHED_TREE, State, Tree, draft, feed, prefill, published_tree, verify


@pytest.mark.parametrize("seed", range(10))
def test_tables_against_their_definition(seed):
    paths = random_tree(random.Random(seed))
    tree = Tree.from_paths(paths, 4, 12)
    assert tree.paths[0] == [] and sorted(tree.paths[1:]) == sorted(paths)
    for i, p in enumerate(tree.paths):
        assert tree.depth[i] == len(p)
        assert tree.paths[tree.parent[i]] == p[:-1] and tree.parent[i] <= i
        for j, q in enumerate(tree.paths):
            assert tree.ancestors[i, j] == (p[:len(q)] == q)
        for j in range(tree.path.shape[1]):
            assert tree.path[i, j] >= j                                          # an unread row is never overwritten
            assert j > len(p) or tree.paths[tree.path[i, j]] == p[:j]


@pytest.mark.parametrize("seed", range(10))
@torch.inference_mode()
def test_node_logits_are_those_of_the_path_in_sequence(seed):
    rng = random.Random(seed)
    model, prompt, tree = tiny_llama(seed), random_prompt(rng), Tree.from_paths(random_tree(rng), 4, 12)
    ids = torch.randint(0, 12, (1, len(tree.paths)), generator=torch.Generator().manual_seed(seed))
    cache = new_cache(model.config, 1, 160, like=model.norm)
    length, _ = prefill(model, [prompt], cache)
    with torch.inference_mode():
        hidden = feed(model, ids, tree.depth, tree.mask, cache, length, torch.arange(128))[0]
        for i, path in enumerate(tree.path):
            sequence = prompt + ids[0, path[:tree.depth[i] + 1]].tolist()
            expected = model(torch.tensor([sequence]))[0, -1]
            assert torch.allclose(model.lm_head(hidden[i]), model.lm_head(expected), atol=1e-11)


@pytest.mark.parametrize("token_map", [None, torch.tensor([0, 3, 4, 6, 7, 9, 11])], ids=["all", "draft vocabulary"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_every_node_is_its_heads_guess_behind_its_parents(kind, token_map, seed):
    """Slow definition: node [.., r] of depth d is head d's rank r, given the tokens from the root to its parent."""
    model = tiny_llama()
    heads = tiny_heads(model, kind=kind, token_map=token_map, recent=2)
    tree = heads.tree(random_tree(random.Random(seed), nodes=25))
    recent, token = torch.randn(3, 2, 32, dtype=torch.float64), torch.tensor([4, 5, 6])
    empty = torch.zeros(3, dtype=torch.long)
    with torch.inference_mode():
        ids = draft(heads, tree, State(None, empty, token, recent, empty, empty, None))
        for b in range(3):
            for i, p in enumerate(tree.paths):
                if not p:
                    assert ids[b, i] == token[b]
                    continue
                before = torch.stack([ids[b, tree.paths.index(p[:j])] for j in range(len(p))])
                padded = F.pad(before, (0, 4 - len(p)))[None]                    # what a head must not see: zeros
                order = heads.all_logits(recent[b:b + 1], padded)[len(p) - 1, 0].argsort(descending=True)
                assert ids[b, i] == (order if token_map is None else token_map[order])[p[-1]]


@torch.inference_mode()
def test_the_root_alone():
    tree = Tree.root()
    assert tree.paths == [[]] and tree.path.tolist() == [[0]] and tree.ancestors.tolist() == [[True]]
    model = tiny_llama()
    cache = new_cache(model.config, 1, 70, like=model.norm)
    length, _ = prefill(model, [[1, 3]], cache)
    state = State(cache, length, torch.tensor([7]), None, None, None, None)
    with torch.inference_mode():
        assert torch.allclose(verify(model, tree, draft(None, tree, state), state, torch.arange(64))[0][0, 0],
                              model(torch.tensor([[1, 3, 7]]))[0, -1], atol=1e-12)


def test_draw():
    tree = Tree.from_paths([[0], [1], [0, 0], [0, 2], [0, 0, 1]], 3, 12)
    assert str(tree).splitlines() == ["root", "├─0", "│ ├─0", "│ │ └─1", "│ └─2", "└─1"]


@pytest.mark.parametrize("paths, says", [
    ([[0, 0]], "path [0, 0] has no ancestor [0]"),
    ([[0], [0, 1], [0, 1, 2], [0, 1, 2, 0]], "path [0, 1, 2, 0] has depth 4, there are only 3 heads"),
    ([[0], [12]], "path [12] has rank 12, the vocabulary only 12 entries"),
    ([[0], [0]], "path [0] stands in it twice"),
    ([[0], []], "[] is not a path"),
    ([[0], [-1]], "[-1] is not a path"),
    ([[0.5]], "[0.5] is not a path"),
    ([[True]], "[True] is not a path"),
    ([0], "0 is not a path"),
    ("01", "expected a list of paths"),
])
def test_errors_name_the_path(paths, says):
    with pytest.raises(UserError) as error:
        Tree.from_paths(paths, 3, 12)
    assert says in str(error.value)


def test_published_tree():
    assert len(PUBLISHED_TREE) == 63 and len(set(map(tuple, PUBLISHED_TREE))) == 63
    assert [sum(len(p) == d for p in PUBLISHED_TREE) for d in (1, 2, 3, 4)] == [10, 28, 23, 2]
    assert published_tree(4)[:6] == [[0], [0, 0], [1], [0, 1], [2], [0, 0, 0]]
    for heads in (1, 2, 3, 4):
        for nodes in (1, 5, 15, 63):
            paths = published_tree(heads, nodes)
            Tree.from_paths(paths, heads, 32)                                    # every prefix is a tree
            assert all(len(p) <= heads for p in paths)
