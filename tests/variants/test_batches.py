"""Batches of a few rows: finished rows leave or take the next prompt, and each text is what it is alone."""
import pytest
import torch
from conftest import tiny_heads, tiny_llama
from test_generate import collect

from loading.trees import published_tree
from tinymedusa import Decoder, PlainDecoder, Sampling, Tree
from variants import batches

DRAWN = Sampling(1.0)


def alone(decoder, prompts, new_tokens):
    """Each prompt's text, decoded by itself."""
    return [collect(decoder.generate([prompt], new_tokens, [i]), 1)[0][0] for i, prompt in enumerate(prompts)]


def test_finished_rows_leave_the_batch():
    """Rows end at different lengths; each step's forward holds only the living ones, give or take a quarter."""
    model, rows, alive = tiny_llama(), [], []

    def spy(name, function, *args):
        if name == "base_inference":
            rows.append(len(args[0].token))
        return function(*args)
    prompts = [[1, 3 + i % 9, 3 + i // 9] for i in range(40)]
    steps = list(batches.generate(PlainDecoder(model, DRAWN, run=spy), prompts, 60))
    for i, step in enumerate(steps[1:]):
        alive.append(len(step))
        assert alive[-1] <= rows[i] and (i == 0 or rows[i] * 0.75 <= alive[-1] + 1)
    assert rows[0] == 40 and min(rows) < 10
    assert collect(steps, 40)[0] == alone(PlainDecoder(model, DRAWN), prompts, 60)


@pytest.mark.parametrize("medusa", [False, True], ids=["plain", "medusa"])
def test_a_finished_row_takes_the_next_prompt(medusa):
    """All rows stay at work while a prompt waits, and each text is what it is alone."""
    model, rows = tiny_llama(std=0.5), []

    def spy(name, function, *args):
        if name in ("base_inference", "medusa"):
            rows.append(len(args[0].token))
            for row in (args[0].remaining == 0).nonzero():                       # none: replaced, or gone
                raise AssertionError(f"row {row} is finished and is in the batch")
        return function(*args)
    prompts = [[1, 3 + i % 9, *[5] * (i % 7 * 10)] for i in range(30)]
    decoder, plain = PlainDecoder(model, DRAWN, run=spy), PlainDecoder(model, DRAWN)
    if medusa:
        decoder = Decoder(model, tiny_heads(model), Tree.from_paths(published_tree(4)), DRAWN, run=spy)
    steps = list(batches.generate(decoder, prompts, 40, batch_size=4))
    texts, _ = collect(steps, 30)
    assert texts == alone(plain, prompts, 40)
    last = max(i for i, step in enumerate(steps) if len(step) >= 4)
    assert len({*map(len, texts)}) > 5 and set(rows[:last]) == {4} and len(rows) < 0.4 * sum(map(len, texts))
    assert all(i in steps[0] for i in range(4)) and [i for s in steps for i in s if i > 3][0] == 4    # in their order


@pytest.mark.parametrize("medusa", [False, True], ids=["plain", "medusa"])
def test_a_row_that_the_caller_ends_is_free_at_once(medusa):
    """Texts end behind their first 7 or their 1st to 9th token: each is cut there, and no step computes it further."""
    model, rows = tiny_llama(std=0.3), []

    def spy(name, function, *args):
        if name in ("base_inference", "medusa"):
            rows.append(len(args[0].token))
            assert args[0].remaining.all()                                       # replaced, or gone from the batch
        return function(*args)
    prompts, seen = [[1, 3 + i % 9, *[5] * (i % 7 * 10)] for i in range(30)], [[] for _ in range(30)]

    def is_over(i, new):
        for n, token in enumerate(new, 1):
            seen[i].append(token)
            if token == 7 or len(seen[i]) == 1 + i % 9:
                del new[n:]
                return True
        return False
    decoder, expected = PlainDecoder(model, DRAWN, (), spy), alone(PlainDecoder(model, DRAWN, ()), prompts, 20)
    if medusa:
        heads = tiny_heads(model, noise=0.05)
        decoder = Decoder(model, heads, Tree.from_paths(published_tree(4)), DRAWN, (), spy)
    ends = [next(n for n, token in enumerate(text, 1) if token == 7 or n == 1 + i % 9)
            for i, text in enumerate(expected)]
    steps = list(batches.generate(decoder, prompts, 20, None, 4, is_over))
    assert collect(steps, 30)[0] == [text[:n] for text, n in zip(expected, ends, strict=True)] == seen
    last = max(i for i, step in enumerate(steps) if len(step) >= 4)
    assert set(rows[:last]) == {4} and len(set(ends)) > 6
    assert sum(rows) < sum(ends) - 30 + 8                                        # rows at work, but at the very end
    assert not medusa or any(len(ids) > 1 for step in steps for ids in step.values())


def test_nothing_of_a_finished_row_is_seen_not_even_nan():
    model = tiny_llama()
    model.embed_tokens.weight.data[0] = torch.nan                                # a token that spoils its row
    prompts = [[1, 0, 4, 4, 4, 4], [1, 4]]
    heads = tiny_heads(model, token_map=torch.arange(1, 12))                     # a draft of it would spoil the tree
    plain = PlainDecoder(model, eos=())
    for decoder in (plain, Decoder(model, heads, Tree.from_paths([[1], [2]]), eos=())):
        texts, _ = collect(batches.generate(decoder, prompts, 12, batch_size=1), 2)
        assert texts[1] == collect(plain.generate(prompts[1:], 12), 1)[0][0] and 0 not in texts[1]


def test_a_row_admitted_keeps_its_own_seed_and_recent_hidden_states():
    """Heads that see the past, drawn: whatever row and moment a prompt is admitted at, its steps are the same too."""
    model = tiny_llama(std=0.3)
    heads = tiny_heads(model, noise=0.05, recent=3, kind="hydra")
    decoder = Decoder(model, heads, Tree.from_paths([[0], [1], [0, 0], [0, 0, 0]]), DRAWN, eos=(2, 5))
    prompts, seeds = [[1, *[3 + i % 9] * (1 + i % 5)] for i in range(17)], [10 ** 6 - 7 * i for i in range(17)]
    expected = [[new[0] for new in decoder.generate([p], 30, [s]) if new[0]]
                for p, s in zip(prompts, seeds, strict=True)]
    assert sum(len(ids) > 1 for steps in expected for ids in steps) > 20
    for batch_size in (1, 2, 5, 17, 40):
        seen = [[] for _ in prompts]
        for step in batches.generate(decoder, prompts, 30, seeds, batch_size):
            for i, ids in step.items():
                seen[i].append(ids)
        assert [sum(steps, []) for steps in seen] == [sum(steps, []) for steps in expected]
        firsts = [len(steps[0]) for steps in seen]                               # a first token, alone or with a step
        assert seen == expected and set(firsts) == {1}
