"""The great equality: whatever the tree, heads, temperature and batch, Medusa's tokens are plain decoding's."""
import math
import random
from itertools import islice

import pytest
import torch
from conftest import MODEL, ROOT, random_prompt, random_tree, tiny_heads, tiny_llama
from test_accept import slow_warp

from extras.compare import margin, noise_at
from llama import Llama
from loading.heads import KINDS
from loading.tokenizer import Tokenizer
from loading.trees import check_paths, published_tree
from tinymedusa import GREEDY, Decoder, MedusaHeads, PlainDecoder, Sampling, Stages, Tree, gumbel_noise
from variants import batches
from variants.heads import load_heads

CASES = 160
TOKEN_MAPS = (None, torch.tensor([2, 3, 4, 6, 7, 9, 11]))


def chosen(logits, text, noise, sampling, penalty):
    """The next token behind a text by its definition; a penalty divides the logits of the tokens that are in the text,
    and multiplies those below 0.

    Drawing is the Gumbel-max trick written out: the largest log p + noise, the noise of this seed and output position.
    """
    for i in set(text):
        logits[i] = logits[i] * penalty if logits[i] < 0 else logits[i] / penalty
    if sampling.temperature == 0:
        return max(range(len(logits)), key=lambda i: logits[i])
    drawn = [math.log(p) + gumbel if p else -math.inf
             for p, gumbel in zip(slow_warp(logits, *sampling), noise, strict=True)]
    return max(range(len(logits)), key=lambda i: drawn[i])


def naive(model, prompt, new_tokens, sampling, seed, eos, penalty=1.0, written=None):
    """Plain decoding as its definition: the whole text again for every token, no cache, nothing in a batch.

    written: what is believed to be that text. One forward over it has the logits of all its tokens: the result is the
    same, but ends with the first token that differs from `written`.
    """
    text, context = list(prompt), model.config.max_position_embeddings
    noise = gumbel_noise(torch.tensor([seed]), torch.arange(new_tokens)[None], model.config.vocab_size)[0].tolist()
    if written is not None:
        hidden = model(torch.tensor([(text + written)[:context]]))[0, len(text) - 1:]
        known = model.lm_head(hidden).tolist()                                   # [tokens written, and one more]
    while (position := len(text) - len(prompt)) < new_tokens and len(text) < context:
        logits = known[position] if written is not None else model.lm_head(model(torch.tensor([text]))[0, -1]).tolist()
        text.append(chosen(logits, text, noise[position], sampling, penalty))
        if text[-1] in eos or written is not None and written[position:position + 1] != text[-1:]:
            break
    return text[len(prompt):]


def collect(steps, rows):
    """The rows' tokens, and how many steps accepted 0, 1, 2, ... drafts; steps are lists, or dicts of those at work."""
    out, accepted = [[] for _ in range(rows)], {}
    for new in steps:
        for row, ids in new.items() if isinstance(new, dict) else enumerate(new):
            if out[row] and ids:                                                 # not the prefill's token
                accepted[len(ids) - 1] = accepted.get(len(ids) - 1, 0) + 1
            out[row] += ids
    return out, accepted


def random_heads(rng, model):
    """Heads of any kind: the paper's, and all that variants/ has."""
    noise, num_layers = rng.choice([0.02, 0.1]), rng.choice([1, 2])
    if rng.random() < 0.2:
        return tiny_heads(model, noise=noise, num_layers=num_layers)
    return tiny_heads(model, noise=noise, num_layers=num_layers, width=rng.choice([None, 16]),
                      tie_lm_head=rng.random() < 0.5, kind=rng.choice(KINDS), recent=rng.choice([1, 1, 3]),
                      trunk=rng.choice([None, None, 16]), token_map=rng.choice(TOKEN_MAPS))


def test_the_great_equality():
    models = [tiny_llama(seed, num_key_value_heads=kv, std=0.3) for seed, kv in ((0, 2), (1, 4), (2, 1))]
    accepted, seen, full, at_eos, at_context = {}, {}, 0, 0, 0
    for case in range(CASES):
        rng = random.Random(case)
        model = models[case % 3]
        heads = random_heads(rng, model)
        paths = [] if rng.random() < 0.1 else random_tree(rng, rng.randint(1, 4), 5, rng.choice([6, 40, 80]))
        tree = Tree.from_paths(check_paths(paths, len(heads), heads.draft_size))
        sampling = Sampling(rng.choice([0, 0.5, 0.8, 1.3]), rng.choice([0, 0, 4]), rng.choice([1.0, 0.9]),
                            (0.0, 0.0, 0.1, 0.3)[case % 4])
        prompts = [random_prompt(rng, rng.choice([8, 85])) for _ in range(rng.randint(1, 9))]
        seeds, new_tokens = [rng.randrange(10 ** 6) for _ in prompts], rng.randint(1, 60)
        batch_size = rng.choice([None, 1 + len(prompts) // 4, 2, 3])             # the others wait for a row
        eos = rng.choice([(), (2,), (2, 7)])
        plain, decoder = PlainDecoder(model, sampling, eos), Decoder(model, heads, tree, sampling, eos)
        steps = plain.generate(prompts, new_tokens, seeds)
        if case % 2:
            steps = batches.generate(plain, prompts, new_tokens, seeds, batch_size)
        texts, none = collect(steps, len(prompts))
        with torch.no_grad():
            expected = [naive(model, p, new_tokens, sampling, s, eos, written=None if case % 8 == 0 else text)
                        for p, s, text in zip(prompts, seeds, texts, strict=True)]
        medusa, some = collect(decoder.generate(prompts, new_tokens, seeds), len(prompts))
        waiting, _ = collect(batches.generate(decoder, prompts, new_tokens, seeds, batch_size), len(prompts))
        assert texts == expected and set(none) <= {0}, f"case {case}"
        assert medusa == expected, f"case {case}"
        assert waiting == expected, f"case {case}"
        at_eos += sum(bool(t) and t[-1] in eos for t in medusa)
        at_context += sum(len(p) + len(t) == 96 for p, t in zip(prompts, medusa, strict=True))
        if not paths:
            seen["root alone"] = seen.get("root alone", 0) + 1
            assert set(some) <= {0}
            continue
        kind = type(heads).__name__, bool(sampling.temperature)
        seen[kind] = seen.get(kind, 0) + sum(count for drafts, count in some.items() if drafts)
        for drafts, count in some.items():
            accepted[drafts] = accepted.get(drafts, 0) + count
        deepest = tree.retrieve.shape[1] - 1
        full += some.get(deepest, 0) if deepest > 1 else 0
    share = sum(n for drafts, n in accepted.items() if drafts) / sum(accepted.values())
    print(f"{CASES} cases, steps by accepted drafts {dict(sorted(accepted.items()))}, {share:.0%} accept one, "
          f"{full} at full depth, {at_eos} rows ended by eos, {at_context} by the context; where: {seen}")
    assert share > 0.2 and full > 20 and at_eos > 50 and at_context > 20
    assert len(seen) == 9 and min(seen.values()) > 10                            # four kinds, greedy and drawn


def test_yields_tokens_as_they_come_and_stops_exactly():
    model = tiny_llama()
    heads, tree = MedusaHeads(model, 3), Tree.from_paths(published_tree(3))
    decoder = Decoder(model, heads, tree, eos=())
    steps = list(decoder.generate([[1, 5, 6]], 20))
    assert len(steps[0][0]) == 1 and sum(len(s[0]) for s in steps) == 20
    whole = [t for s in steps for t in s[0]]
    for limit in range(1, 20):
        some = [t for s in decoder.generate([[1, 5, 6]], limit) for t in s[0]]
        assert some == whole[:limit]
    first = whole.index(whole[7])
    ended = [t for s in Decoder(model, heads, tree, eos=(whole[7],)).generate([[1, 5, 6]], 20) for t in s[0]]
    assert ended == whole[:first + 1]
    assert list(islice(decoder.generate([[1, 5, 6]], 20), 5)) == steps[:5]        # the prefill and four steps


def test_a_finished_row_yields_nothing_more():
    model = tiny_llama()
    prompts = [[1, 3 + i % 9, 3 + i // 9] for i in range(20)]
    steps = list(PlainDecoder(model, Sampling(1.0)).generate(prompts, 60))
    ends = [max(i for i, step in enumerate(steps) if step[row]) for row in range(20)]
    assert all([len(step[row]) for step in steps] == [1] * (end + 1) + [0] * (len(steps) - end - 1)
               for row, end in enumerate(ends))
    assert len(set(ends)) > 5 and max(ends) == len(steps) - 1                    # the last one ends it


def test_one_place_left_in_the_context():
    model = tiny_llama()
    heads, tree = tiny_heads(model), Tree.from_paths(published_tree(4))
    for decoder in (PlainDecoder(model, eos=()), Decoder(model, heads, tree, eos=())):
        assert [len(s[0]) for s in decoder.generate([[1] * 95], 5)] == [1]
        assert [len(t) for t in collect(decoder.generate([[1] * 95, [1] * 90, [1]], 9), 3)[0]] == [1, 6, 9]


def test_stage_names_and_calls():
    model = tiny_llama()
    heads, tree = tiny_heads(model), Tree.from_paths(published_tree(4))
    clock = Stages("cpu")
    steps = len(list(Decoder(model, heads, tree, eos=(), run=clock).generate([[1, 4]], 30))) - 1
    assert {k: len(v) for k, v in clock.seconds.items()} == {
        "init": 1, "medusa": steps, "tree": steps, "posterior": steps, "update": steps}
    clock = Stages("cpu")
    list(PlainDecoder(model, eos=(), run=clock).generate([[1, 4]], 30))
    assert {k: len(v) for k, v in clock.seconds.items()} == {"init": 1, "base_inference": 29}
    assert all(t > 0 for v in clock.seconds.values() for t in v)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(1.0, 40, 0.95)], ids=str)
def test_embedded_model(sampling):
    """float32, real weights and heads, ten held-out openings in one batch: a difference only at a near-tie."""
    model = Llama.from_pretrained(MODEL)
    heads = load_heads(MODEL / "medusa", model)
    tokenizer, tree = Tokenizer(MODEL, model.config), Tree.from_paths(published_tree(len(heads)))
    openings = (ROOT / "benchmarks" / "openings.txt").read_text().splitlines()[:10]
    prompts = [tokenizer.encode(o) for o in openings]
    plain, _ = collect(PlainDecoder(model, sampling).generate(prompts, 80), 10)
    medusa, accepted = collect(Decoder(model, heads, tree, sampling).generate(prompts, 80), 10)
    ties = 0
    for row, (prompt, a, b) in enumerate(zip(prompts, plain, medusa, strict=True)):
        if a != b:
            at = next(i for i in range(len(a)) if a[i] != b[i])
            with torch.no_grad():
                logits = model.lm_head(model(torch.tensor([prompt + a[:at]]))[0, -1])
            assert margin(logits, noise_at(row, at, logits, sampling), sampling) < 1e-4
            ties += 1
    drafts = sum(n * count for n, count in accepted.items())
    print(f"{sampling}: {ties} near-ties in 10 rows, {1 + drafts / sum(accepted.values()):.2f} tokens per step")
    assert ties <= 1 and drafts > 0.5 * sum(accepted.values())


def test_five_lines_of_library_use(monkeypatch):
    """As README.md has them, in float32 on the embedded model: plain decoding's text."""
    from llama import Llama
    from tinymedusa import Decoder, Tree
    from variants.heads import load_heads
    monkeypatch.chdir(ROOT)
    model = Llama.from_pretrained("model")
    heads = load_heads("model/medusa", model)
    tree = Tree.from_pretrained("model/medusa", heads)
    ids, out = Tokenizer("model", model.config).encode("Once upon a time, there was a cat."), []
    for new in Decoder(model, heads, tree).generate([ids], 100):
        out.append(new[0])
    plain = [t for new in PlainDecoder(model).generate([ids], 100) for t in new[0]]
    assert [t for new in out for t in new] == plain and len(plain) > 50
    assert len(out) - 1 < 0.6 * (len(plain) - 1)                                 # in far fewer steps
