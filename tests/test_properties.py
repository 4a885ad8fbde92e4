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

from extras.chat import keep_prefix
from llama import new_cache
from loading.heads import KINDS
from loading.trees import check_paths
from tinymedusa import Decoder, PlainDecoder, Sampling, Tree
from variants import batches

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
        if len(parent) < len(heads) and (*parent, rank) not in paths:
            paths.append((*parent, rank))
    paths = [list(path) for path in draw(st.permutations(paths)) if path]
    return Tree.from_paths(check_paths(paths, len(heads), heads.draft_size))


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
                        draw(st.sampled_from([1.0, 0.9, 0.2])), draw(st.sampled_from([0.0, 0.0, 0.05, 0.3])))
    prompts = draw(st.lists(prompt, min_size=1, max_size=5))
    return SimpleNamespace(
        model=model, heads=heads, tree=draw(trees(heads)), sampling=sampling, prompts=prompts,
        seeds=draw(st.lists(st.integers(0, 2 ** 62), min_size=len(prompts), max_size=len(prompts))),
        eos=tuple(draw(st.sets(st.integers(0, vocab - 1), max_size=2))), new_tokens=draw(st.integers(1, 70)),
        batch_size=draw(st.none() | st.integers(1, 5)), kept=draw(st.integers(0, context)),
        behind=draw(prompt))


@long_or_short
@given(cases())
def test_tokens_and_cache_are_those_of_plain_decoding(case):
    options = case.sampling, case.eos
    rows, decoder = len(case.prompts), Decoder(case.model, case.heads, case.tree, *options)
    with torch.no_grad():
        expected = [naive(case.model, p, case.new_tokens, case.sampling, s, case.eos)
                    for p, s in zip(case.prompts, case.seeds, strict=True)]
    assert collect(decoder.generate(case.prompts, case.new_tokens, case.seeds), rows)[0] == expected
    waiting = batches.generate(decoder, case.prompts, case.new_tokens, case.seeds, case.batch_size)
    assert collect(waiting, rows)[0] == expected
    plain = PlainDecoder(case.model, *options)
    assert collect(plain.generate(case.prompts, case.new_tokens, case.seeds), rows)[0] == expected

    keep_prefix(decoder)
    assert collect(decoder.generate(case.prompts[:1], case.new_tokens, case.seeds[:1]), 1)[0] == expected[:1]
    text = case.prompts[0] + expected[0]
    cache, fresh = decoder.new_cache(None, 0), new_cache(case.model.config, 1, 140, like=case.model.norm.weight)
    with torch.inference_mode():
        plain.prefill([text[:-1]], fresh, 1)
    assert torch.allclose(cache[:, :, :len(text) - 1], fresh[:, :, :len(text) - 1], atol=1e-9, rtol=1e-7)

    decoder.cached = text[:-1]                                                   # another prompt that begins like this
    prompt = (text[:case.kept] + case.behind)[:case.model.config.max_position_embeddings - 1]
    with torch.no_grad():
        following = naive(case.model, prompt, case.new_tokens, case.sampling, case.seeds[0], case.eos)
    assert collect(decoder.generate([prompt], case.new_tokens, case.seeds[:1]), 1)[0] == [following]
