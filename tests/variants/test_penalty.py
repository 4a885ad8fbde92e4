"""A repetition penalty: the text is that of its definition (tests/test_generate.py), whatever drafts it."""
import random

import pytest
import torch
from conftest import random_prompt, random_tree, tiny_heads, tiny_llama
from test_generate import collect, naive

from extras.chat import keep_prefix
from fast.graphs import GraphDecoder
from loading.heads import KINDS
from loading.trees import check_paths
from tinymedusa import GREEDY, Decoder, PlainDecoder, Sampling, Tree
from variants import batches
from variants.lookup import Lookup, LookupDecoder
from variants.penalty import penalize, penalized


def test_logits_of_tokens_in_the_text():
    logits = torch.tensor([3.0, -3.0, 0.0, 2.0, -2.0])
    seen = torch.tensor([True, True, True, False, False])
    assert penalized(logits, seen, 1.5).tolist() == [2.0, -4.5, 0.0, 2.0, -2.0]
    assert penalized(logits, seen, 0.5).tolist() == [6.0, -1.5, 0.0, 2.0, -2.0]
    assert penalized(logits.bfloat16(), seen, 1.3)[0] == torch.tensor(3.0) / 1.3            # not rounded to 16 bits


def test_the_logits_of_a_node_are_those_behind_its_path():
    """Of a text, the same as a plain forward's, penalized by all tokens of the text, the path's own included."""
    model, tree = tiny_llama(std=0.3, vocab_size=60), Tree.from_paths([[0], [1], [0, 0], [1, 1], [0, 0, 0], [1, 1, 0]])
    decoder, changed = Decoder(model, tiny_heads(model, 3), tree, eos=()), 0
    penalize(decoder, 1.7)
    texts = [[1, 8, 8, 3], [5], [*range(20)]]
    with torch.inference_mode():
        cache = decoder.new_cache(texts, 40)
        state, out, count = decoder.start(texts, 40, range(3), cache)
        for _ in range(5):
            texts = [text + ids[:n].tolist() for text, ids, n in zip(texts, out, count, strict=True)]
            ids, noise = decoder.draft(state)
            hidden, logits = decoder.verify(state, ids, cache.shape[2])
            for row, text in enumerate(texts):
                for node, path in enumerate(tree.paths):
                    way = text[:-1] + ids[row, tree.retrieve[node][:len(path) + 1]].tolist()
                    expected = model.lm_head(model(torch.tensor([way]))[0, -1])
                    for token in set(way):
                        expected[token] *= 1.7 if expected[token] < 0 else 1 / 1.7
                    assert torch.allclose(logits[row, node], expected, atol=1e-9)
                    changed += len(set(way) - set(text)) > 2
            accepted = decoder.accept(tree, ids, logits, noise, GREEDY)
            state, out, count = decoder.commit(state, hidden, *accepted)
    assert changed > 5


def test_the_text_is_that_of_the_definition():
    """Trees whose paths repeat a token, prompts in batches and waiting for a row, chats that keep a prefix."""
    accepted = changed = 0
    for case in range(9):
        rng = random.Random(case)
        model = tiny_llama(case % 3, std=0.3, vocab_size=50)                     # most ids are not in the text yet
        sampling = (GREEDY, Sampling(0.8), Sampling(1.2, 6, 0.95, 0.02))[case % 3]
        penalty, eos = rng.choice([1.1, 1.6, 0.7]), rng.choice([(), (2, 7)])
        prompts = [random_prompt(rng, rng.choice([3, 3, 85]), 50) for _ in range(rng.randint(1, 3))]
        seeds, new_tokens = [rng.randrange(10 ** 6) for _ in prompts], rng.randint(5, 15)
        heads = tiny_heads(model, noise=0.02, kind=rng.choice(KINDS), recent=rng.choice([1, 3]))
        tree = Tree.from_paths(check_paths(random_tree(rng, 4, 5, 40), len(heads), heads.draft_size))
        with torch.no_grad():
            expected = [naive(model, p, new_tokens, sampling, s, eos, penalty)
                        for p, s in zip(prompts, seeds, strict=True)]
        plain = PlainDecoder(model, sampling, eos).generate(prompts, new_tokens, seeds)
        changed += collect(plain, len(prompts))[0] != expected
        kinds = [PlainDecoder(model, sampling, eos), Decoder(model, heads, tree, sampling, eos),
                 LookupDecoder(model, Lookup(model.config), Tree.from_paths(Lookup.chain), sampling, eos)]
        for decoder in kinds:
            penalize(decoder, penalty)
            assert collect(decoder.generate(prompts, new_tokens, seeds), len(prompts))[0] == expected, case
            waiting = batches.generate(decoder, prompts, new_tokens, seeds, 2)
            texts, steps = collect(waiting, len(prompts))
            assert texts == expected, case
            accepted += sum(count for drafts, count in steps.items() if drafts)
            keep_prefix(decoder)
            for prompt, seed, text in zip(prompts, seeds, expected, strict=True):
                assert collect(decoder.generate([prompt], new_tokens, [seed]), 1)[0] == [text]
                decoder.cached = prompt + text[:-1]
    assert accepted > 10 and changed > 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_text_is_read_from_a_cache_of_16_bits(dtype):
    """Ids of three bytes: of a flat distribution only what the text holds is chosen, once it is made likelier."""
    model = tiny_llama(dtype=dtype, vocab_size=70000, std=0.02, num_hidden_layers=1)
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[:, 0] = 1e-3
    model.norm.weight.data.fill_(1)
    for prompt in ([69999, 255, 65536, 257], [300, 1, 69998]):
        decoder = PlainDecoder(model, eos=())
        sign = model.lm_head(model(torch.tensor([prompt]))[0, -1])[0] > 0
        penalize(decoder, 1e-3 if sign else 1e3)
        chosen = collect(decoder.generate([prompt], 1), 1)[0][0]
        assert chosen == [min(prompt)] if sign else chosen[0] not in prompt


def test_a_graph_of_the_step_reads_the_text_too(recordings):
    model = tiny_llama(vocab_size=40, std=0.3)
    heads, tree, found = tiny_heads(model, noise=0.05), Tree.from_paths([[0], [1], [0, 0]]), []
    for kind in (GraphDecoder, Decoder):
        decoder = kind(model, heads, tree, GREEDY, ())
        penalize(decoder, 1.4)
        found.append(collect(decoder.generate([[1, 5, 9], [1, *range(30)]], 50), 2)[0])
    assert found[0] == found[1] and len(found[0][0]) == 50
