"""The great equality once more, over whatever hypothesis can think of: configurations, heads, trees, prompts, batches.

    TINYMEDUSA_EXAMPLES=2000 python -m pytest tests/test_properties.py        # the long version
"""
import os
from types import SimpleNamespace

import torch
from conftest import tiny_heads, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_generate import collect, naive

from llama import new_cache
from tinymedusa import KINDS, Sampling, generate, prefill, whole_cache

EXAMPLES = int(os.environ.get("TINYMEDUSA_EXAMPLES", 60))
long_or_short = settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES <= 60,
                         suppress_health_check=list(HealthCheck))


@st.composite
def models(draw):
    """Any small Llama in float64: grouped or not, of odd widths, with biases, stretched, tied."""
    group, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    scaling = draw(st.sampled_from([
        None, {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
         "original_max_position_embeddings": 16}]))
    return tiny_llama(
        draw(st.integers(0, 99)), std=draw(st.sampled_from([0.05, 0.3, 0.6])), vocab_size=draw(st.integers(3, 30)),
        hidden_size=draw(st.integers(3, 20)), intermediate_size=draw(st.integers(1, 30)), rope_scaling=scaling,
        num_hidden_layers=draw(st.integers(1, 3)), num_attention_heads=group * groups, num_key_value_heads=groups,
        head_dim=2 * draw(st.integers(1, 10)), max_position_embeddings=draw(st.integers(6, 60)),
        rope_theta=draw(st.sampled_from([10.0, 10000.0])), attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()), tie_word_embeddings=draw(st.booleans()))


@st.composite
def trees(draw, heads):
    """Any tree that the heads can draft, the root alone too, in any order."""
    paths, ranks = [()], min(heads.draft_size, 4)
    for parent, rank in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, ranks - 1)), max_size=25)):
        parent = paths[parent % len(paths)]
        if len(parent) < heads.num_heads and (*parent, rank) not in paths:
            paths.append((*parent, rank))
    return heads.tree([list(path) for path in draw(st.permutations(paths)) if path])


@st.composite
def cases(draw):
    model = draw(models())
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    some = st.none() | st.lists(st.integers(0, vocab - 1), min_size=2, unique=True).map(torch.tensor)
    heads = tiny_heads(model, draw(st.integers(1, 4)), noise=draw(st.sampled_from([0.01, 0.2])),
                       kind=draw(st.sampled_from(KINDS)), recent=draw(st.integers(1, 3)), token_map=draw(some),
                       width=draw(st.none() | st.integers(1, 9)), num_layers=draw(st.integers(1, 2)),
                       tie_lm_head=draw(st.booleans()))
    prompt = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=context - 1)
    sampling = Sampling(draw(st.sampled_from([0, 0.3, 1.0, 5.0])), draw(st.integers(0, 4)),
                        draw(st.sampled_from([1.0, 0.9, 0.2])))
    prompts = draw(st.lists(prompt, min_size=1, max_size=5))
    return SimpleNamespace(
        model=model, heads=heads, tree=draw(trees(heads)), sampling=sampling, prompts=prompts,
        seeds=draw(st.lists(st.integers(0, 2 ** 62), min_size=len(prompts), max_size=len(prompts))),
        eos=tuple(draw(st.sets(st.integers(0, vocab - 1), max_size=2))), new_tokens=draw(st.integers(1, 70)),
        batch_size=draw(st.none() | st.integers(1, 5)))


@long_or_short
@given(cases())
def test_tokens_and_cache_are_those_of_plain_decoding(case):
    options = {"heads": case.heads, "tree": case.tree, "sampling": case.sampling, "eos": case.eos}
    with torch.no_grad():
        expected = [naive(case.model, p, case.new_tokens, case.sampling, s, case.eos)
                    for p, s in zip(case.prompts, case.seeds, strict=True)]
    texts, _ = collect(generate(case.model, case.prompts, case.new_tokens, seeds=case.seeds,
                                batch_size=case.batch_size, **options), len(case.prompts))
    assert texts == expected
    cache = whole_cache(case.model, 1)
    alone, _ = collect(generate(case.model, case.prompts[:1], case.new_tokens, seeds=case.seeds[:1], past=(cache, 0),
                                **options), 1)
    assert alone == expected[:1]
    text, fresh = case.prompts[0] + alone[0], new_cache(case.model.config, 1, 140, like=case.model.norm)
    with torch.inference_mode():
        prefill(case.model, [text[:-1]], fresh)
    assert torch.allclose(cache[:, :, :len(text) - 1], fresh[:, :, :len(text) - 1], atol=1e-9, rtol=1e-7)
