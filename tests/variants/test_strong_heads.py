"""Stronger heads: their formulas, official names, the start as the base model, save and load, and what they draft."""
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import random_tree, save_heads, tiny_heads, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file

from loading.files import read_json
from loading.heads import KINDS
from tinymedusa import GREEDY, Decoder, MedusaHeads, Sampling, State, Tree, gumbel_noise
from variants.heads import CLASSES, HydraHeads, build_heads, load_heads, token_map_of

OPTIONS = [{"num_layers": 2}, {"tie_lm_head": True}, {"width": 16, "tie_lm_head": True},
           {"width": 48, "num_layers": 2}, {"kind": "root"}, {"kind": "hydra", "width": 16, "tie_lm_head": True},
           {"kind": "hydra", "num_layers": 2, "token_map": torch.tensor([2, 3, 5, 7, 11])},
           {"kind": "root", "width": 8, "tie_lm_head": True, "token_map": torch.tensor([1, 4, 9])},
           {"recent": 3}, {"kind": "hydra", "recent": 2, "width": 16},
           {"trunk": 24, "recent": 2}, {"kind": "root", "trunk": 24, "width": 8, "num_layers": 2},
           {"kind": "hydra", "trunk": 24, "recent": 3, "width": 16, "tie_lm_head": True,
            "token_map": torch.tensor([2, 3, 5, 7, 11])}]
TOKEN_MAP = torch.tensor([0, 3, 4, 6, 7, 9, 11])


def slow_logits(tensors, k, layers, recent_hidden, tokens, model):
    """Head k's logits, from the saved tensors by their official names, each block by itself.

    recent_hidden [T, R, H]; tokens: those behind the newest hidden state that head k sees (none for the paper's heads).
    """
    embedded = model.embed_tokens.weight[tokens]                                 # [T, n, H]
    embedded = embedded / (embedded.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    x, z = recent_hidden[:, -1], torch.cat((recent_hidden.flatten(1), embedded.flatten(1)), 1)
    if "trunk.up.weight" in tensors:                        # it sees the root, the head itself what is behind that
        z = torch.cat((recent_hidden.flatten(1), embedded[:, :1].flatten(1)), 1)
        y = F.silu(z @ tensors["trunk.up.weight"].T + tensors["trunk.up.bias"])
        x = x + (y @ tensors["trunk.down.weight"].T).view(len(x), -1, x.shape[1])[:, k]
        z = torch.cat((x, embedded[:, 1:].flatten(1)), 1)
    for j in range(layers):
        if f"{k}.{j}.linear.weight" in tensors:
            x = x + F.silu(z @ tensors[f"{k}.{j}.linear.weight"].T + tensors[f"{k}.{j}.linear.bias"])
        else:
            y = F.silu(z @ tensors[f"{k}.{j}.up.weight"].T + tensors[f"{k}.{j}.up.bias"])
            x = x + y @ tensors[f"{k}.{j}.down.weight"].T
        z = x
    lm_head = model.lm_head.weight[tensors["token_map"]] if "token_map" in tensors else model.lm_head.weight
    return x @ tensors.get(f"{k}.{layers}.weight", lm_head).T


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_formula_names_and_round_trip(options, tmp_path):
    model = tiny_llama()
    heads, kind, token_map = tiny_heads(model, 3, **options), options.get("kind", "medusa"), options.get("token_map")
    save_heads(heads, tmp_path, model, "some/base")
    tensors, layers = load_file(tmp_path / "model.safetensors"), options.get("num_layers", 1)
    again = load_heads(tmp_path, model)
    assert type(again) is type(heads) is (MedusaHeads if options == {"num_layers": 2} else CLASSES[kind])
    recent_hidden = torch.randn(5, options.get("recent", 1), 32, dtype=torch.float64)
    following = torch.randint(0, 12, (5, 3))
    seen = {"root": lambda k: 1, "hydra": lambda k: k + 1}.get(kind, lambda k: 0)
    with torch.no_grad():
        expected = torch.stack([slow_logits(tensors, k, layers, recent_hidden, following[:, :seen(k)], model)
                                for k in range(3)], dim=1)
        for each in (heads, again):
            assert torch.allclose(each(recent_hidden, following), expected, atol=1e-12)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_json(tmp_path / "config.json") == {
        "base_model_name_or_path": "some/base", "medusa_num_heads": 3, "medusa_num_layers": layers,
        "tie_lm_head": options.get("tie_lm_head", False), "medusa_width": options.get("width"), "medusa_kind": kind,
        "medusa_recent": options.get("recent", 1), "hidden_size": 32, "vocab_size": 12,
        "draft_vocab_size": None if token_map is None else len(token_map),
        **({"medusa_trunk": options["trunk"]} if "trunk" in options else {})}
    stored = sum(t.numel() for name, t in tensors.items() if name != "token_map")
    assert all(sum(p.numel() for p in each.parameters()) == stored for each in (heads, again))
    assert not any(p.requires_grad for p in again.parameters())
    assert all((token_map_of(each) is None) == (token_map is None) for each in (heads, again))
    assert token_map is None or torch.equal(token_map_of(again), token_map) and again.draft_size == len(token_map)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_untrained_heads_repeat_the_base_model(options):
    model = tiny_llama()
    heads, recent_hidden = build_heads(model, 3, **options), torch.randn(4, options.get("recent", 1), 32).double()
    base = model.lm_head(recent_hidden[:, -1])[:, options.get("token_map", slice(None))]
    with torch.no_grad():
        logits = heads(recent_hidden, torch.randint(0, 12, (4, 3)))
    assert torch.allclose(logits, base[:, None].expand(-1, 3, -1), atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_block_and_head_has_weights_of_its_own(options):
    model = tiny_llama()
    tensors = [*build_heads(model, 3, **options).state_dict().values(), *model.parameters()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


def test_tied_heads_have_no_vocabulary_matrix():
    story_model = tiny_llama(hidden_size=64, vocab_size=32000)                   # TinyLLama-v0's
    heads = build_heads(story_model, 1, tie_lm_head=True)
    assert sum(p.numel() for p in heads.parameters()) == 4160
    assert {name: tuple(t.shape) for name, t in heads.state_dict().items()} == {
        "0.0.linear.weight": (64, 64), "0.0.linear.bias": (64,)}


@pytest.mark.parametrize("token_map", [None, TOKEN_MAP[:5]], ids=["all", "draft vocabulary"])
def test_tied_heads_follow_the_lm_head_as_it_is_now(token_map):
    """They share it, however it changes; with a draft vocabulary its rows are picked anew while training."""
    model = tiny_llama()
    heads, recent_hidden = build_heads(model, 2, tie_lm_head=True, token_map=token_map), torch.randn(4, 1, 32).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(-3)
        expected = model.lm_head(recent_hidden[:, 0])
        logits = heads(recent_hidden, torch.zeros(4, 1, dtype=torch.long))
    expected = expected if token_map is None else expected[:, token_map]
    assert torch.allclose(logits, expected[:, None].expand(-1, 2, -1), atol=1e-12)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(1.2, 9, 0.95)], ids=str)
@pytest.mark.parametrize("token_map", [None, TOKEN_MAP], ids=["all", "draft vocabulary"])
@pytest.mark.parametrize("trunk", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_node_is_its_heads_guess_behind_its_parents(kind, trunk, token_map, sampling, seed):
    """Slow definition: node [.., r] of depth d is head d's rank r, given the tokens from the root to its parent, by its
    logits and the noise of the output position emitted + d - 1, at which its parent is sampled."""
    model = tiny_llama()
    heads = tiny_heads(model, kind=kind, token_map=token_map, recent=2, trunk=trunk)
    tree, ids_of = Tree.from_paths(random_tree(random.Random(seed), nodes=25)), torch.arange(12)
    recent_hidden, token = torch.randn(3, 2, 32, dtype=torch.float64), torch.tensor([4, 5, 6])
    zero, emitted, seeds = torch.zeros(3, dtype=torch.long), torch.tensor([0, 7, 30]), torch.tensor([5, 0, 9])
    state = State(None, zero, token, recent_hidden, emitted, zero + 99, seeds)
    with torch.inference_mode():
        ids, noise = Decoder(model, heads, tree, sampling).draft(state)
        assert (noise is None) == (sampling == GREEDY) and ids.shape == (3, len(tree.paths))
        for b in range(3):
            for i, p in enumerate(tree.paths):
                if not p:
                    assert ids[b, i] == token[b]
                    continue
                before = torch.stack([ids[b, tree.paths.index(p[:j])] for j in range(len(p))])
                padded = F.pad(before, (0, 4 - len(p)))[None]                    # what a head must not see: zeros
                score = heads(recent_hidden[b:b + 1], padded)[0, len(p) - 1]     # [D]
                if sampling.temperature:
                    drawn = gumbel_noise(seeds[b:b + 1], emitted[b:b + 1, None] + len(p) - 1, 12)[0, 0]
                    score = score / sampling.temperature + drawn[slice(None) if token_map is None else token_map]
                draftable = ids_of if token_map is None else token_map
                at = (draftable == ids[b, i]).nonzero().item()                   # none: an id that can't be drafted
                assert score[at] == score.sort(descending=True).values[p[-1]]
                siblings = [j for j, q in enumerate(tree.paths) if q and q[:-1] == p[:-1]]
                assert len(ids[b, siblings].unique()) == len(siblings)


def test_hydra_heads_see_what_the_heads_before_them_drafted():
    """Of two siblings' children, other drafts are behind them, so some guesses differ; a root head's never do."""
    model, tree = tiny_llama(), Tree.from_paths([[0], [1], [0, 0], [1, 0], [0, 1], [1, 1]])
    zero, hidden = torch.zeros(20, dtype=torch.long), torch.randn(20, 1, 32, dtype=torch.float64)
    state = State(None, zero, torch.arange(20) % 12, hidden, zero, zero + 99, zero)
    children = [[tree.paths.index((sibling, rank)) for rank in range(2)] for sibling in range(2)]
    with torch.inference_mode():
        for kind in KINDS:
            heads = tiny_heads(model, 2, noise=0.5, kind=kind, recent=1, width=16)
            ids, _ = Decoder(model, heads, tree).draft(state)
            differ = (ids[:, children[0]] != ids[:, children[1]]).any()
            assert differ == isinstance(heads, HydraHeads)
