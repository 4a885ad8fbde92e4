"""The great equality: whatever the tree, heads, temperature and batch, Medusa's tokens are plain decoding's."""
import random

import pytest
import torch
from conftest import MODEL, ROOT, random_prompt, random_tree, tiny_heads, tiny_llama
from test_accept import slow_warp

from llama import Llama, Tokenizer, UserError
from tinymedusa import (
    GREEDY,
    KINDS,
    MedusaHeads,
    Sampling,
    Stages,
    Tree,
    choice_margin,
    generate,
    published_tree,
    uniforms,
)

CASES = 320


def naive(model, prompt, new_tokens, sampling, seed, eos):
    """Plain decoding as its definition: the whole text again for every token, no cache, the CDF walked in Python."""
    text, draws = list(prompt), uniforms([seed], new_tokens)[0].tolist()
    while len(text) - len(prompt) < new_tokens and len(text) < model.config.max_position_embeddings:
        logits = model.lm_head(model(torch.tensor([text]))[0, -1]).tolist()
        if sampling.temperature == 0:
            token = max(range(len(logits)), key=lambda i: logits[i])
        else:
            probs = slow_warp(logits, *sampling[:3])
            target, total = draws[len(text) - len(prompt)] * sum(probs), 0.0
            for token, p in enumerate(probs):                                   # noqa: B007
                total += p
                if total > target:
                    break
        text.append(token)
        if token in eos:
            break
    return text[len(prompt):]


def collect(steps, rows):
    """The rows' tokens, and how many steps accepted 0, 1, 2, ... drafts."""
    out, accepted = [[] for _ in range(rows)], {}
    for new in steps:
        for row, ids in new.items():
            if out[row]:                                                         # not the prefill's token
                accepted[len(ids) - 1] = accepted.get(len(ids) - 1, 0) + 1
            out[row] += ids
    return out, accepted


def test_the_great_equality():
    models = [tiny_llama(seed, num_key_value_heads=kv, std=0.3) for seed, kv in ((0, 2), (1, 4), (2, 1))]
    accepted, full, at_eos, at_context = {}, 0, 0, 0
    for case in range(CASES):
        rng = random.Random(case)
        model = models[case % 3]
        heads = tiny_heads(model, noise=rng.choice([0.02, 0.1]), width=rng.choice([None, 16]),
                           tie_lm_head=rng.random() < 0.5, num_layers=rng.choice([1, 2]), kind=rng.choice(KINDS),
                           recent=rng.choice([1, 1, 3]),
                           token_map=rng.choice([None, torch.tensor([2, 3, 4, 6, 7, 9, 11])]))
        tree = heads.tree(random_tree(rng, rng.randint(1, 4), ranks=5, nodes=rng.choice([6, 40, 80])))
        sampling = Sampling(rng.choice([0, 0.5, 0.8, 1.3]), rng.choice([0, 0, 4]), rng.choice([1.0, 0.9]))
        prompts = [random_prompt(rng, rng.choice([8, 85])) for _ in range(rng.randint(1, 5))]
        seeds, new_tokens = [rng.randrange(10 ** 6) for _ in prompts], rng.randint(1, 60)
        batch_size = rng.choice([None, 1, 2, 3])                                 # the others wait for a row
        eos = rng.choice([(), (2,), (2, 7)])
        with torch.no_grad():
            expected = [naive(model, p, new_tokens, sampling, s, eos) for p, s in zip(prompts, seeds, strict=True)]
        options = {"sampling": sampling, "eos": eos}
        plain, none = collect(generate(model, prompts[-1:], new_tokens, seeds=seeds[-1:], **options), 1)
        medusa, some = collect(generate(model, prompts, new_tokens, heads=heads, tree=tree, seeds=seeds, **options,
                                        batch_size=batch_size), len(prompts))
        assert plain == expected[-1:] and set(none) <= {0}
        assert medusa == expected, f"case {case}"
        for drafts, count in some.items():
            accepted[drafts] = accepted.get(drafts, 0) + count
        deepest = tree.path.shape[1] - 1
        full += some.get(deepest, 0) if deepest > 1 else 0
        at_eos += sum(bool(t) and t[-1] in eos for t in medusa)
        at_context += sum(len(p) + len(t) == 96 for p, t in zip(prompts, medusa, strict=True))
    share = sum(n for drafts, n in accepted.items() if drafts) / sum(accepted.values())
    print(f"{CASES} cases, steps by accepted drafts {dict(sorted(accepted.items()))}, {share:.0%} accept one, "
          f"{full} at full depth, {at_eos} rows ended by eos, {at_context} by the context")
    assert share > 0.2 and full > 20 and at_eos > 50 and at_context > 20


def test_yields_tokens_as_they_come_and_stops_exactly():
    model = tiny_llama()
    heads, tree = MedusaHeads.untrained(model, 3), Tree.from_paths(published_tree(3), 3, 12)
    steps = list(generate(model, [[1, 5, 6]], 20, heads=heads, tree=tree, eos=()))
    assert len(steps[0][0]) == 1 and sum(len(s[0]) for s in steps) == 20
    whole = [t for s in steps for t in s[0]]
    for limit in range(1, 20):
        some = [t for s in generate(model, [[1, 5, 6]], limit, heads=heads, tree=tree, eos=()) for t in s[0]]
        assert some == whole[:limit]
    first = whole.index(whole[7])
    ended = [t for s in generate(model, [[1, 5, 6]], 20, heads=heads, tree=tree, eos=(whole[7],)) for t in s[0]]
    assert ended == whole[:first + 1]
    assert len(list(generate(model, [[1, 5, 6]], 20, heads=heads, tree=tree, eos=(), max_steps=4))) == 5   # prefill + 4


def test_finished_rows_leave_the_batch():
    """Rows end at different lengths; each step's forward holds only the living ones, give or take a quarter."""
    model, rows, alive = tiny_llama(), [], []

    def spy(name, function, *args):
        if name == "base_inference":
            rows.append(len(args[3].token))
        return function(*args)
    prompts = [[1, 3 + i % 9, 3 + i // 9] for i in range(40)]
    steps = list(generate(model, prompts, 60, sampling=Sampling(1.0), run=spy))
    for i, step in enumerate(steps[1:]):
        alive.append(len(step))
        assert alive[-1] <= rows[i] and (i == 0 or rows[i] * 0.75 <= alive[-1] + 1)
    assert rows[0] == 40 and min(rows) < 10
    alone = [[t for s in generate(model, [p], 60, sampling=Sampling(1.0), seeds=[i]) for t in s[0]]
             for i, p in enumerate(prompts)]
    assert [[t for s in steps for t in s.get(i, [])] for i in range(40)] == alone


def test_a_finished_row_takes_the_next_prompt():
    """All rows stay at work while a prompt waits, and each text is what it is alone."""
    model, rows = tiny_llama(std=0.5), []

    def spy(name, function, *args):
        if name == "base_inference":
            rows.append(len(args[3].token))
            for row in (args[3].remaining == 0).nonzero():                       # none: it was replaced
                raise AssertionError(f"row {row} is finished and stands in the batch")
        return function(*args)
    prompts = [[1, 3 + i % 9, *[5] * (i % 7 * 10)] for i in range(30)]
    sampling = Sampling(1.0)
    steps = list(generate(model, prompts, 40, sampling=sampling, run=spy, batch_size=4))
    texts, _ = collect(steps, 30)
    assert texts == [collect(generate(model, [p], 40, sampling=sampling, seeds=[i]), 1)[0][0]
                     for i, p in enumerate(prompts)]
    last = max(i for i, step in enumerate(steps) if len(step) >= 4)
    assert len({*map(len, texts)}) > 5 and set(rows[:last]) == {4} and len(rows) < 0.4 * sum(map(len, texts))
    assert all(i in steps[0] for i in range(4)) and [i for s in steps for i in s if i > 3][0] == 4    # in their order


def test_nothing_of_a_finished_row_is_seen_not_even_nan():
    model = tiny_llama()
    model.embed_tokens.weight.data[0] = torch.nan                                # a token that spoils its row
    prompts = [[1, 0, 4, 4, 4, 4], [1, 5]]
    heads = tiny_heads(model, token_map=torch.arange(1, 12))                     # a draft of it would spoil the tree
    for options in ({}, {"heads": heads, "tree": heads.tree([[1], [2]])}):
        texts, _ = collect(generate(model, prompts, 12, eos=(), batch_size=1, **options), 2)
        alone, _ = collect(generate(model, prompts[1:], 12, eos=()), 1)
        assert texts[1] == alone[0] and 0 not in texts[1]


def test_prompts_that_cannot_be():
    model = tiny_llama()
    with pytest.raises(UserError, match="prompt 2 is empty"):
        next(generate(model, [[1], []], 5))
    with pytest.raises(UserError, match="has 96 tokens, the context holds 96"):
        next(generate(model, [[1] * 96], 5))
    assert [len(s[0]) for s in generate(model, [[1] * 95], 5, eos=())] == [1]      # one place left


def test_stage_names_and_calls():
    model = tiny_llama()
    heads, tree = tiny_heads(model), Tree.from_paths(published_tree(4), 4, 12)
    clock = Stages("cpu")
    steps = len(list(generate(model, [[1, 4]], 30, heads=heads, tree=tree, eos=(), run=clock))) - 1
    assert {k: len(v) for k, v in clock.seconds.items()} == {
        "init": 1, "medusa": steps, "tree": steps, "posterior": steps, "update": steps}
    clock = Stages("cpu")
    list(generate(model, [[1, 4]], 30, eos=(), run=clock))
    assert {k: len(v) for k, v in clock.seconds.items()} == {"init": 1, "base_inference": 29}
    assert all(t > 0 for v in clock.seconds.values() for t in v)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(1.0, 40, 0.95)], ids=str)
def test_embedded_model(sampling):
    """float32, real weights and heads, ten held-out openings in one batch: a difference only at a near-tie."""
    model = Llama.from_pretrained(MODEL)
    heads = MedusaHeads.from_pretrained(MODEL / "medusa", model)
    tokenizer, tree = Tokenizer(MODEL, model.config), Tree.from_paths(
        published_tree(heads.num_heads), heads.num_heads, 4096)
    openings = (ROOT / "benchmarks" / "openings.txt").read_text().splitlines()[:10]
    prompts = [tokenizer.encode(o) for o in openings]
    plain, _ = collect(generate(model, prompts, 80, sampling=sampling), 10)
    medusa, accepted = collect(generate(model, prompts, 80, heads=heads, tree=tree, sampling=sampling), 10)
    ties = 0
    for row, (prompt, a, b) in enumerate(zip(prompts, plain, medusa, strict=True)):
        if a != b:
            at = next(i for i in range(len(a)) if a[i] != b[i])
            with torch.no_grad():
                logits = model.lm_head(model(torch.tensor([prompt + a[:at]]))[0, -1])
            assert choice_margin(logits, uniforms([row], at + 1)[0, -1].item(), sampling) < 1e-4
            ties += 1
    drafts = sum(n * count for n, count in accepted.items())
    print(f"{sampling}: {ties} near-ties in 10 rows, {1 + drafts / sum(accepted.values()):.2f} tokens per step")
    assert ties <= 1 and drafts > 0.5 * sum(accepted.values())
