"""Prompt lookup: what it drafts against its definition, and plain decoding's text in every case."""
import random

import pytest
import torch
from conftest import random_prompt, tiny_llama

from llama import LlamaConfig
from loading.trees import check_paths
from tinymedusa import GREEDY, PlainDecoder, Sampling, Tree
from variants import batches
from variants.lookup import LONGEST, Lookup, LookupDecoder, ids_layer, read_ids


def slow_chain(text, drafts):
    """The place before the end with the longest match of up to LONGEST tokens, the last of them; what follows it, and
    past the end of the text the same again."""
    def matched(place):
        n = 0
        while n < LONGEST and n <= place and text[place - n] == text[-1 - n]:
            n += 1
        return n
    best = max(range(len(text) - 1), key=lambda place: (matched(place), place))
    out = list(text)
    for _ in range(drafts):
        out.append(out[best + 1])
        best += 1
    return out[len(text):]


def chain(depth):
    return Tree.from_paths([[0] * n for n in range(1, depth + 1)])


@pytest.mark.parametrize("dtype, vocab_size", [(torch.float64, 5), (torch.bfloat16, 70000), (torch.float16, 300)])
def test_drafts_continue_the_longest_earlier_match(dtype, vocab_size):
    """Ids of three bytes are exact in 16 bits; the text is read from the cache, behind a prefill in chunks too."""
    model, rng = tiny_llama(dtype=dtype, vocab_size=vocab_size, max_position_embeddings=400), random.Random(0)
    decoder = LookupDecoder(model, Lookup(model.config), chain(7), GREEDY, eos=())
    ids = [rng.randrange(vocab_size) for _ in range(5)] + [vocab_size - 1]
    prompts = [[rng.choice(ids) for _ in range(rng.choice([2, 9, 40, 300]))] for _ in range(12)]
    with torch.inference_mode():
        cache = decoder.new_cache(prompts, 60)
        state, out, _ = decoder.start(prompts, 60, range(12), cache)
        texts = [p + [int(t)] for p, t in zip(prompts, out[:, 0], strict=True)]
        for _ in range(6):
            kept = read_ids(ids_layer(state.cache, model.config))
            for row, text in enumerate(texts):
                assert kept[row, :len(text) - 1].tolist() == text[:-1]
            drafted, _ = decoder.draft(state)
            assert drafted[:, 1:].tolist() == [slow_chain(text, 7) for text in texts]
            state, out, count = decoder.step(state, cache.shape[2], decoder.run)
            texts = [text + out[row, :count[row]].tolist() for row, text in enumerate(texts)]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.6), Sampling(1.0, 4, 0.9)], ids=str)
def test_the_text_is_plain_decodings(sampling):
    model, rng, steps = tiny_llama(std=0.3), random.Random(1), 0
    prompts = [random_prompt(rng, 40) for _ in range(9)]
    expected = [sum((new for (new,) in PlainDecoder(model, sampling).generate([p], 50, [i])), [])
                for i, p in enumerate(prompts)]
    for depth in (1, 4):
        decoder = LookupDecoder(model, Lookup(model.config), chain(depth), sampling)
        for size in (1, 3, 9):                                                   # rows that wait and are replaced
            texts = [[] for _ in prompts]
            for new in batches.generate(decoder, prompts, 50, batch_size=size):
                steps += len(new)
                for i, ids in new.items():
                    texts[i] += ids
            assert texts == expected
    tokens = 6 * sum(map(len, expected))
    print(f"{tokens} tokens in {steps} steps")
    assert tokens > 1.1 * steps                                                  # and drafts are accepted


def test_a_chain_is_all_it_can_draft(cli, tiny_folder):
    assert check_paths(Lookup.chain, len(Lookup(LlamaConfig())), Lookup.draft_size) == Lookup.chain
    status, _, err = cli("generate", "--model", tiny_folder, "--heads", "lookup", "--tree", "[[0],[1]]")
    assert status == 2 and "path [1] has rank 1" in err
    (tiny_folder / "o.txt").write_text("a\nb\nc\nd\n")
    status, _, err = cli("generate", "--model", tiny_folder, "--heads", "lookup", "--tune", tiny_folder / "o.txt")
    assert status == 2 and "prompt lookup drafts a chain" in err
