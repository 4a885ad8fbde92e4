"""The C++ step: Medusa writes plain decoding's tokens from its very logits, bit for bit, and the model is torch's.

    TINYMEDUSA_EXAMPLES=500 python -m pytest tests/fast/test_native.py -k every_bit        # the long version
"""
import copy
import os
import platform
import random
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import MODEL, ROOT, native_llama, random_tree, save_heads, tiny_heads, tiny_llama
from torch import nn

from extras.chat import keep_prefix
from extras.compare import margin
from fast import build
from fast.build import Unavailable
from fast.int8 import Int8Linear, quantize
from fast.native import (
    NativeDecoder,
    NativeLinear,
    NativeLlama,
    NativeLookupDecoder,
    Packed,
    Screen,
    allocate,
    engine,
)
from llama import Llama
from loading.files import UserError
from loading.heads import KINDS
from loading.tokenizer import Tokenizer
from loading.trees import published_tree
from tinymedusa import GREEDY, Decoder, PlainDecoder, Sampling, Stages, State, Tree, call, gumbel_noise, sample
from variants import batches
from variants.heads import HydraHeads, load_heads
from variants.lookup import Lookup, LookupDecoder
from variants.penalty import penalize
from variants.typical import Typical

EXAMPLES = int(os.environ.get("TINYMEDUSA_EXAMPLES", 40))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
SAMPLINGS = (GREEDY, Sampling(0.7), Sampling(1.2, 5), Sampling(0.8, 0, 0.9), Sampling(1.0, 9, 0.8),
             Sampling(0.9, 0, 1.0, 0.2), Sampling(1.1, 40, 0.95, 0.1))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
ALONE = Tree.from_paths([])                                                   # the root, which is all of plain decoding
TREE = Tree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def packed(model, dtype=None) -> NativeLlama:
    """The engine's copy of a torch model; int8: quantized."""
    return native_llama(model, *((torch.float32, True) if dtype == torch.int8 else (dtype,)))


def rounded_heads(model, **options):
    """Heads whose weights bfloat16 holds, as the engine keeps them, so that torch's draft the same."""
    heads = tiny_heads(model, noise=0.05, **options)
    for p in heads.parameters():
        p.data = p.data.bfloat16().float()
    return heads


def written(decoder, prompts, new_tokens, seeds=None) -> list:
    """Each prompt's new ids, step by step; of a generation that does not end one step too many."""
    rows = [[] for _ in prompts]
    for step in islice(decoder.generate(prompts, new_tokens, seeds), new_tokens + 1):
        for row, ids in zip(rows, step, strict=True):
            row.append(ids)
    return rows


def texts(decoder, prompts, new_tokens, seeds=None) -> list:
    return [sum(row, []) for row in written(decoder, prompts, new_tokens, seeds)]


def in_a_batch(decoder, prompts, new_tokens, batch_size) -> list:
    """The texts of prompts that wait for a row."""
    rows = [[] for _ in prompts]
    for step in batches.generate(decoder, prompts, new_tokens, batch_size=batch_size):
        for row, ids in step.items():
            rows[row] += ids
    return rows


# ------------------------------------------------------------------------------------------------- the great equality

class Watch:
    """A `run` that keeps the logits of all nodes of each step, and row by row those of the accepted ones."""
    def __init__(self, rows: int):
        self.names, self.steps, self.rows = [], [], [[] for _ in range(rows)]

    def __call__(self, name, function, *args):
        result = function(*args)
        self.names.append(name)
        if name == "tree":
            self.steps.append(result[1])
        if name == "posterior":
            self.path = result[0].clone()
        if name == "update":
            for row, count in enumerate(result[2].tolist()):
                self.rows[row] += self.steps[-1][row, self.path[row, :count]]
        return result


def random_model(rng: random.Random, pairs: bool) -> Llama:
    """A model of odd sizes that mostly repeats a token, or pairs: of which two tokens mostly follow each other."""
    groups, heads_of_a_group = rng.choice([(1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (3, 2)])
    model = tiny_llama(
        rng.randrange(10 ** 6), torch.float32, vocab_size=rng.choice([n for n in range(40, 301) if n % 32]),
        num_attention_heads=groups * heads_of_a_group, num_key_value_heads=groups,
        head_dim=rng.choice([2, 4, 6, 10, 16, 64, 128]), num_hidden_layers=rng.randint(1, 3),
        hidden_size=rng.choice([rng.randint(5, 70)] * 9 + [515]),                # 512 inputs are multiplied at a time
        intermediate_size=rng.choice([rng.randint(1, 90)] * 4 + [1031]),
        max_position_embeddings=rng.choice([72, 100, 160]), attention_bias=rng.random() < 0.5,
        mlp_bias=rng.random() < 0.5, tie_word_embeddings=not pairs and rng.random() < 0.5,
        rope_scaling=rng.choice([None, {"rope_type": "linear", "factor": 2.5}, LLAMA3]))
    strength = rng.choice([0.3, 0.7, 1.5])                                       # of the layers, against the embeddings
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=strength / p.shape[1] ** 0.5)
        elif name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    nn.init.normal_(model.embed_tokens.weight)
    model.norm.weight.data.mul_(rng.choice([1.0, 3.0]) / model.config.hidden_size ** 0.5)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.data = swapped(model.embed_tokens.weight) if pairs else model.embed_tokens.weight + 0.1
    return model


def swapped(rows):
    """Each even row and the odd one behind it in each other's place."""
    return rows.detach()[(torch.arange(len(rows)) ^ 1).clamp(max=len(rows) - 1)]


def random_heads(rng: random.Random, model: Llama, pairs: bool):
    """Heads of any kind, some of whose guesses are right."""
    if rng.random() < 0.2:
        options = {}                                                             # the paper's
    else:
        ids = range(model.config.vocab_size)
        some = torch.tensor(sorted(rng.sample(ids, len(ids) * 3 // 4)))
        options = {"kind": rng.choice(KINDS), "width": rng.choice([None, rng.randint(1, 40)]),
                   "recent": rng.randint(1, 4), "trunk": rng.choice([None, None, rng.randint(1, 40)]),
                   "token_map": rng.choice([None, None, some]), "tie_lm_head": not pairs and rng.random() < 0.5}
    heads = tiny_heads(model, rng.choice([1, 2, 4, 6, 20, 20]), rng.choice([0, 0.01, 0.05]), rng.randrange(99),
                       num_layers=rng.choice([1, 1, 2]), **options)
    for k in range(0, len(heads) if pairs else 0, 2):                            # the first of a pair again
        rows = swapped(model.lm_head.weight)
        heads[k][-1].weight.data = rows if options.get("token_map") is None else rows[options["token_map"]]
    if options.get("token_map") is not None:
        heads.freeze()
    return heads


def random_paths(rng: random.Random, heads) -> list:
    """Up to 63 paths: a bush, and often a chain that is longer than a block of the cache."""
    chain = [(0,) * depth for depth in range(1, 1 + rng.choice([0, len(heads), len(heads)]))]
    bush = {tuple(p) for p in random_tree(rng, len(heads), min(5, heads.draft_size), rng.choice([4, 20, 63, 200]))}
    return (chain + sorted(bush - set(chain), key=len) or [(0,)])[:63]


def random_case(seed: int, monkeypatch) -> SimpleNamespace:
    rng = random.Random(seed)
    # bytes of weights that stay in the processor's cache: with 0 they are read otherwise, and heads are kept in 8 bits
    monkeypatch.setattr("fast.native.CACHE", rng.choice([0, 10 ** 9]))
    pairs = rng.random() < 0.3
    model = random_model(rng, pairs)
    native, heads, config = packed(model, rng.choice(DTYPES)), random_heads(rng, model, pairs), model.config
    longest = min(70, config.max_position_embeddings - 1)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(rng.randint(1, longest))]
               for _ in range(rng.randint(1, 4))]
    return SimpleNamespace(
        native=native, heads=heads, tree=Tree.from_paths(random_paths(rng, heads)),
        sampling=rng.choice([GREEDY, GREEDY, *SAMPLINGS]), prompts=prompts, new_tokens=rng.randint(2, 40),
        seeds=[rng.randrange(2 ** 63) for _ in prompts],
        eos=rng.choice([(), (rng.randrange(config.vocab_size), 2)]), threads=2 if seed % 4 == 0 else 1,
        chunk=rng.choice([3, 16, 33, 256]))


def watched(decoder, prompts, new_tokens, seeds) -> tuple[list, list]:
    """The texts, and row by row the logits that their tokens were sampled from, but for the first one's."""
    watch = decoder.run = Watch(len(prompts))
    found = texts(decoder, prompts, new_tokens, seeds)
    decoder.run = call
    return found, watch.rows


def check(c: SimpleNamespace, monkeypatch) -> list:
    """Each row plainly and alone, against all rows at once with a tree, in other chunks and threads → its steps.
    Nothing is rounded away: only where a step is done in pieces is its noise torch's, which could part two texts at a
    near-tie."""
    plain, medusa = (NativeDecoder(c.native, *some, c.sampling, c.eos) for some in ((None, ALONE), (c.heads, c.tree)))
    expected, logits = [], []
    for prompt, seed in zip(c.prompts, c.seeds, strict=True):
        expected += texts(plain, [prompt], c.new_tokens, [seed])
        in_pieces, of_row = watched(plain, [prompt], c.new_tokens, [seed])
        assert in_pieces == expected[-1:]
        logits += of_row
    c.native.set_threads(c.threads)
    with monkeypatch.context() as patch:
        patch.setattr("tinymedusa.PREFILL_CHUNK", c.chunk)
        steps = written(medusa, c.prompts, c.new_tokens, c.seeds)
        assert [sum(row, []) for row in steps] == expected
        in_pieces, of_rows = watched(medusa, c.prompts, c.new_tokens, c.seeds)
    assert in_pieces == expected
    for ours, theirs in zip(of_rows, logits, strict=True):
        assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    return steps


def test_tokens_and_logits_are_plain_decodings_in_every_bit(monkeypatch):
    accepted, deep, seen = 0, 0, set()
    for seed in range(EXAMPLES):
        case = random_case(seed, monkeypatch)
        try:
            steps = check(case, monkeypatch)
        except AssertionError as error:
            raise AssertionError(f"case {seed}") from error
        accepted += any(len(ids) > 1 for row in steps for ids in row)
        deep += any(len(ids) > 10 for row in steps for ids in row)
        seen.add((type(case.heads).__name__, bool(case.sampling.temperature)))
    print(f"{EXAMPLES} cases, {accepted} with accepted drafts, {deep} with more than 9 in a step")
    assert accepted > 0.8 * EXAMPLES and deep > 0.04 * EXAMPLES and (len(seen) == 8 or EXAMPLES < 40)


def products_of_any_number_of_rows(dtype) -> None:
    """A row's product is the same in every bit beside any others, by any threads, from the cache or from memory."""
    for size in (5, 37, 512, 513, 1031):                                         # 512 inputs are multiplied at a time
        model = tiny_llama(0, torch.float32, vocab_size=77, hidden_size=size, head_dim=2, num_hidden_layers=1)
        x = torch.randn(25, size, generator=torch.Generator().manual_seed(size))
        for cache in (0, 10 ** 9):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fast.native.CACHE", cache)
                native = packed(model, dtype)
            alone = torch.cat([native.lm_head(row[None]) for row in x])
            for rows in range(2, 26):
                native.set_threads(1 + (rows % 8 == 0))
                assert torch.equal(native.lm_head(x[:rows]), alone[:rows]), (size, rows)
        assert (alone - x @ native.lm_head.weight.t()).abs().max() < 1e-3 * alone.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_any_number_of_rows(dtype):
    products_of_any_number_of_rows(dtype)


def prefilled(decoder, prompts, slots) -> torch.Tensor:
    """The hidden states of the prompts' last two tokens."""
    with torch.inference_mode():
        return decoder.prefill(prompts, decoder.model.new_cache(len(prompts), slots), 2)[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_batches_and_threads_change_no_bit(dtype, monkeypatch):
    native = packed(tiny_llama(dtype=torch.float32, vocab_size=99, hidden_size=37, intermediate_size=51, head_dim=10,
                               max_position_embeddings=400), dtype)
    prompts = [torch.randint(99, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 70, 257, 300)]
    whole = native(torch.tensor(prompts[3:]))[0]
    chunks, last = [], []
    for chunk in (1, 7, 16, 100, 256, 400):
        monkeypatch.setattr("tinymedusa.PREFILL_CHUNK", chunk)
        chunks.append(prefilled(NativeDecoder(native), prompts, 720))
        last += [prefilled(NativeDecoder(native), [prompt], 320)[0] for prompt in prompts if chunk == 16]
    for threads in (2, 3):
        native.set_threads(threads)
        assert torch.equal(native(torch.tensor(prompts[3:]))[0], whole)
        assert torch.equal(native.lm_head(whole)[7:9], native.lm_head(whole[7:9]))
    assert all(torch.equal(some, torch.stack(last)) for some in chunks) and torch.equal(last[3], whole[-2:])
    assert native.lm_head(whole).std() > 0.5


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_step_in_one_call_is_the_same_in_pieces(kind, threads):
    """The same cache, hidden states and numbers in every bit, behind each step; a row that ends stays as it is."""
    native = packed(tiny_llama(dtype=torch.float32, vocab_size=77, num_hidden_layers=3, std=0.3))
    heads, tree = (tiny_heads(native, noise=0.05, kind=kind, recent=3), TREE) if kind else (None, ALONE)
    prompts, states, some = [[1, 5, 9], [1, *range(50)], [1, *range(70)]], [], 0
    native.set_threads(threads)
    for run in (call, Watch(3)):
        decoder = NativeDecoder(native, heads, tree, eos=(30, 31))
        with torch.inference_mode():
            state, *_ = decoder.start(prompts, 40, [0, 1, 2], decoder.new_cache(prompts, 40))
            seen = []
            while state.remaining.any():
                state, out, count = decoder.step(state, 0, run)
                seen.append([t.clone() for t in (*state, out, count)])
        states.append(seen)
    for one, pieces in zip(*states, strict=True):
        *one, out, count = one
        *pieces, other_out, other_count = pieces
        assert torch.equal(count, other_count) and all(map(torch.equal, one, pieces))
        kept = torch.arange(out.shape[1]) < count[:, None]
        assert torch.equal(out[kept], other_out[kept])
        some += (count == 0).any().item() + (count > 1).any().item()
    assert len(states[0]) > 10 and (some > 10 or not kind)


def test_generations_do_not_disturb_each_other():
    """Of one decoder, of two on one model, one after the other and in turns."""
    native = packed(tiny_llama(dtype=torch.float32, vocab_size=50, std=0.3))
    medusa = NativeDecoder(native, tiny_heads(native, noise=0.05, recent=3, kind="root"), TREE, Sampling(0.9), eos=())
    plain = NativeDecoder(native, sampling=Sampling(0.9), eos=())
    prompts = [[1, 5, 9], [1, 7], [1, *range(40)]]
    expected = [texts(plain, [prompt], 30)[0] for prompt in prompts]
    assert [texts(medusa, [prompt], 30)[0] for prompt in prompts] == expected
    running = [(decoder.generate([prompt], 30), []) for prompt in prompts for decoder in (medusa, plain)]
    for _ in range(31):
        for steps, text in running:
            text += next(steps, [[]])[0]
    assert [text for _, text in running] == [text for text in expected for _ in range(2)]


# ---------------------------------------------------------------------------------------------------------- the drafts

SOME = torch.tensor([1, 2, 3, 5, 8, 13, 21, 34, 35, 36, 39, 40, 41, 42, 49])
HEADS = [{}, {"num_layers": 2}] + [
    {"kind": kind} | options for kind in KINDS for options in (
        {"recent": 3}, {"width": 9, "num_layers": 2}, {"trunk": 7, "width": 5, "recent": 2}, {"tie_lm_head": True},
        {"token_map": SOME}, {"tie_lm_head": True, "token_map": SOME, "trunk": 7, "num_layers": 2})]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(0.5, 3, 0.5)], ids=str)
@pytest.mark.parametrize("options", HEADS, ids=lambda options: ", ".join(f"{k} {v}" for k, v in options.items())[:40])
def test_heads_of_any_kind_draft_what_they_do_in_torch(options, sampling):
    """For rows in any state, each node of a tree."""
    torch.manual_seed(3)
    model = tiny_llama(dtype=torch.bfloat16, vocab_size=50, std=0.3).float()     # tied rows too are kept in 16 bits
    native, recent = packed(model), options.get("recent", 1)
    state = State(
        cache=native.new_cache(6, 32), length=torch.arange(6), token=torch.randint(50, (6,)),
        recent_hidden=torch.randn(6, recent, 32), emitted=torch.randint(99, (6,)), remaining=torch.ones(6).long(),
        seed=torch.randint(2 ** 62, (6,)))
    tree, found = Tree.from_paths([[0], [3], [4], [0, 0], [0, 1], [3, 2], [4, 0], [3, 2, 0], [3, 2, 1], [4, 0, 0]]), []
    for kind, m in ((Decoder, model), (NativeDecoder, native)):
        ids, noise = kind(m, rounded_heads(m, num_heads=3, **options), tree, sampling).draft(state)
        found.append(ids)
        assert torch.equal(ids[:, 0], state.token) and (noise is None) == (sampling is GREEDY)
    assert torch.equal(*found) and len(found[0].unique()) > 10


def test_heads_in_8_bits_draft_nearly_the_same(monkeypatch):
    """As those are kept that do not stay in the processor's cache."""
    native, prompts, accepted = packed(tiny_llama(dtype=torch.float32, vocab_size=50, std=0.3)), [[1], [5, 3]], []
    heads = tiny_heads(native, noise=0.02, kind="hydra", num_layers=2)
    for cache in (10 ** 9, 0):
        monkeypatch.setattr("fast.native.CACHE", cache)
        steps = written(NativeDecoder(native, heads, TREE, Sampling(0.7), eos=()), prompts, 60)
        accepted.append(sum(len(ids) > 1 for row in steps for ids in row))
        plain = NativeDecoder(native, sampling=Sampling(0.7), eos=())
        assert [sum(row, []) for row in steps] == texts(plain, prompts, 60)
    assert abs(accepted[0] - accepted[1]) <= 3 < accepted[1]


# ------------------------------------------------------------------------------------------------------ against torch

CONFIGS = {
    "gqa": {}, "mqa": {"num_key_value_heads": 1}, "one for one": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True},
    **{f"head_dim {n}": {"head_dim": n, "num_attention_heads": 2, "num_key_value_heads": 1}
       for n in (2, 4, 6, 10, 16, 64, 128, 256)},
    "odd widths": {"hidden_size": 37, "intermediate_size": 51, "head_dim": 6, "vocab_size": 77},
    "wide": {"hidden_size": 520, "intermediate_size": 1031, "num_hidden_layers": 1, "attention_bias": True},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}, "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {"head_dim": 32, "num_attention_heads": 2, "rope_scaling": {
        "rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 16, "attention_factor": 1.4}}}


def model_of(name, dtype=torch.float32) -> Llama:
    model = tiny_llama(dtype=dtype, max_position_embeddings=320, vocab_size=CONFIGS[name].get("vocab_size", 300),
                       **{k: v for k, v in CONFIGS[name].items() if k != "vocab_size"})
    for parameter, p in model.named_parameters():
        if "bias" in parameter:
            nn.init.normal_(p, std=0.3)
        elif p.dim() == 2:
            p.data.mul_(min(1, 3 / p.shape[1] ** 0.5))
    return model


def logits_of(model) -> torch.Tensor:
    """Of two texts of 300 random ids, which is more than the 256 that are read at once."""
    ids = torch.randint(model.config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.lm_head(model(ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_torchs(name):
    model = model_of(name)
    expected, found = logits_of(model), logits_of(packed(model))
    assert found.dtype == torch.float32 and expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["biases", "tied", "odd widths", "wide"])
def test_16_bit_weights_are_multiplied_in_float32(name, dtype):
    model = model_of(name, dtype)
    found = logits_of(packed(model))
    expected = logits_of(model.float())
    assert (found - expected).abs().max() < 1e-4 and expected.std() > 0.5
    assert (found - logits_of(model_of(name))).abs().max() > 1e-3                # rounding does something


@pytest.mark.parametrize("name", ["gqa", "biases", "tied", "odd widths", "wide"])
def test_8_bit_weights_are_those_of_int8(name):
    model = model_of(name)
    found, unrounded = logits_of(packed(model, torch.int8)), logits_of(model)
    quantize(model)
    expected = logits_of(model)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max() < 0.2 * (found - unrounded).abs().max()


@pytest.fixture(scope="module")
def embedded() -> SimpleNamespace:
    """The model in model/, in torch and packed, and the ids of twelve openings."""
    model = Llama.from_pretrained(MODEL)
    openings = (ROOT / "benchmarks" / "openings.txt").read_text().splitlines()[:12]
    return SimpleNamespace(model=model, native=NativeLlama.from_pretrained(MODEL),
                           prompts=[Tokenizer(MODEL, model.config).encode(opening) for opening in openings])


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(1.0, 40, 0.95)], ids=str)
def test_texts_of_the_embedded_model_are_torchs(embedded, sampling):
    """Sums in another order could part them at a near-tie; these texts have none."""
    expected = texts(PlainDecoder(embedded.model, sampling), embedded.prompts, 60)
    assert texts(NativeDecoder(embedded.native, sampling=sampling), embedded.prompts, 60) == expected
    heads = load_heads(MODEL / "medusa", embedded.native)
    steps = written(NativeDecoder(embedded.native, heads, Tree.from_pretrained(MODEL / "medusa", heads), sampling),
                    embedded.prompts, 60)
    assert [sum(row, []) for row in steps] == expected
    assert sum(map(len, expected)) > 1.3 * sum(len(ids) > 0 for row in steps for ids in row)     # in far fewer steps


# ------------------------------------------------------------------------------------------------------------ packing

@pytest.mark.parametrize("quantized", [False, True], ids=["as they are", "int8"])
@pytest.mark.parametrize("stored, kept", [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None),
                                          (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_weights_from_files_are_those_of_the_model(stored, kept, quantized, tmp_path):
    for name in ("odd widths", "tied", "biases"):
        model = model_of(name, stored)
        model.save(tmp_path / name)
        ours = NativeLlama.from_pretrained(tmp_path / name, kept, quantized=quantized)
        theirs, ids = native_llama(model, kept, quantized), torch.arange(model.config.vocab_size)
        assert torch.equal(logits_of(ours), logits_of(theirs))
        assert torch.equal(ours.norm.weight, model.norm.weight.float())
        embeddings = model.embed_tokens.weight.to(kept or stored).float()
        assert torch.equal(ours.embed_tokens(ids), embeddings) and torch.equal(theirs.embed_tokens(ids), embeddings)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_give_back_the_exact_weights(dtype, tied):
    model = tiny_llama(dtype=torch.float32, vocab_size=77, hidden_size=515, head_dim=6, tie_word_embeddings=tied)
    for weight in {p.data_ptr(): p.data for p in (model.embed_tokens.weight, model.lm_head.weight)}.values():
        weight.mul_(torch.logspace(-38, 4, 77)[:, None])                         # the tiniest numbers are there
        weight[:, 0], weight[0, 1] = 0, -0.0
    native, kept = packed(model, dtype), model.embed_tokens.weight.detach().to(dtype).float()
    for ids in (torch.tensor([[0, 76, 31], [32, 33, 1]]), torch.arange(77), torch.tensor(5)):
        assert torch.equal(native.embed_tokens(ids), kept[ids])
        assert torch.equal(native.embed_tokens(ids).signbit(), kept[ids].signbit())
    assert torch.equal(native.lm_head.weight, model.lm_head.weight.to(dtype).float())


@pytest.mark.parametrize("size", [1, 37, 64, 515])
def test_a_matrix_in_8_bits_is_that_of_int8(size):
    model = tiny_llama(dtype=torch.float32, vocab_size=77, hidden_size=size, intermediate_size=9, head_dim=2)
    model.lm_head.weight.data *= torch.logspace(-3, 3, 77)[:, None]
    model.lm_head.weight.data[5] = 0                                             # a row of zeros stays one
    native, rounded = packed(model, torch.int8), Int8Linear(model.lm_head).weight
    assert torch.equal(native.lm_head.weight, rounded)
    each = native.lm_head(torch.eye(size)).t()                                   # multiplied with 1 in 16 bits
    assert torch.allclose(each, rounded, rtol=2 ** -22, atol=0)
    assert not torch.equal(rounded, model.lm_head.weight) or size == 1


@pytest.mark.parametrize("token_map", [None, torch.tensor([3, 5, 7, 20])], ids=["all", "draft vocabulary"])
def test_heads_on_8_bits_draft_what_they_do_in_torch(token_map, tmp_path):
    model = tiny_llama(dtype=torch.float32, vocab_size=64)
    model.save(tmp_path)
    save_heads(tiny_heads(model, 3, noise=0.02, tie_lm_head=True, token_map=token_map), tmp_path / "heads", model)
    native = NativeLlama.from_pretrained(tmp_path, quantized=True)
    quantize(model)
    for sampling in (GREEDY, Sampling(0.8)):
        ours, theirs = (written(kind(m, load_heads(tmp_path / "heads", m), TREE, sampling, eos=()), [[1, 5, 9]], 30)
                        for kind, m in ((NativeDecoder, native), (Decoder, model)))
        assert ours == theirs


# ----------------------------------------------------------------------------------------------------------- the screen

@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("inputs", [3, 64, 515])
def test_the_error_of_the_screen_is_below_its_bound(inputs, dtype):
    """Of weights and inputs of all sorts, some of them far larger than the others; the bound is of use too."""
    generator = torch.Generator().manual_seed(inputs)
    normal = partial(torch.randn, generator=generator)
    weights = normal(300, inputs) * torch.logspace(-2, 2, 300)[:, None]
    weights[::7, ::3] *= 30
    weights[50] = 0
    x = normal(40, inputs) * torch.logspace(-2, 2, 40)[:, None]
    x[::5, ::4] *= 100
    native = packed(tiny_llama(dtype=torch.float32))
    exact, screen = (kind(native.lib, weights.shape, kept) for kind, kept in ((Packed, dtype), (Screen, dtype)))
    kept = [allocate(native.lib, [matrix]) for matrix in (exact, screen)]
    for matrix in (exact, screen):
        matrix.fill(slice(0, 100), weights[:100])
        matrix.fill(slice(100, 300), weights[100:])
    expected, found = (NativeLinear(native, matrix)(x) for matrix in (exact, screen))
    bound = x.norm(dim=1)[:, None] * screen.error[:300]
    assert ((found - expected).abs() <= bound).all() and kept
    assert ((found - expected).abs() > 0.05 * bound).any()
    assert (bound <= 0.05 * x.norm(dim=1)[:, None] * weights.norm(dim=1) + 1e-15).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_screened_token_has_the_largest_logit(dtype, threads, monkeypatch):
    """Of an lm_head whose rows are nearly the same, or the very same, far below what 8 bits can tell apart."""
    monkeypatch.setattr(engine(), "engine_screens", lambda: True)               # whatever processor this is
    model = tiny_llama(dtype=torch.float32, vocab_size=1003, hidden_size=40, max_position_embeddings=320)
    nearly_the_same = torch.randn(5, 1, 40) * (1 + torch.eye(4, 40) / 128)
    model.lm_head.weight.data = nearly_the_same.flatten(0, 1)[torch.randint(20, (1003,))]
    native = packed(model, dtype)
    native.set_threads(threads)
    heads = tiny_heads(native, noise=0.05)
    prompts = [[5, 1, 7], [9, 2, 30, 4, 1], [3]]
    for decoder in (NativeDecoder(native, eos=()), NativeDecoder(native, heads, TREE, eos=())):
        for prompt, text in zip(prompts, texts(decoder, prompts, 60), strict=True):
            logits = native.lm_head(native(torch.tensor([prompt + text[:-1]])))[0, len(prompt) - 1:]
            assert text == logits.numpy().argmax(-1).tolist()
            as_large = (logits == logits.amax(-1, keepdim=True)).sum(-1)
            assert (as_large > 1).any() and len(set(text)) > 5


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("change", ["a weight is NaN", "a weight is inf", "gain 1e-23", "gain 1e20, a row is 0"])
def test_where_nothing_is_bounded_nothing_is_screened(change, threads, monkeypatch):
    model = tiny_llama(dtype=torch.float32, vocab_size=1000, hidden_size=40, max_position_embeddings=320)
    nearly_the_same = torch.randn(5, 1, 40) * (1 + torch.eye(4, 40) / 128)
    model.lm_head.weight.data = nearly_the_same.flatten(0, 1)[torch.randint(20, (1000,))]
    if change.startswith("a weight"):
        model.lm_head.weight.data = torch.randn(1000, 40)
        model.lm_head.weight.data[16:32] *= 3
        model.lm_head.weight.data[16:32, 3] = float(change.split()[-1])
    else:
        model.norm.weight.data *= float(change.split(",")[0].split()[1])
        model.lm_head.weight.data[16] = 0
    found = []
    for screens in (False, True):
        monkeypatch.setattr(engine(), "engine_screens", lambda screens=screens: screens)
        native = packed(model)
        native.set_threads(threads)
        assert bool(native.screen) == screens
        found.append(texts(NativeDecoder(native, eos=()), [[5, 1, 7], [9, 2, 30]], 40))
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------------ the noise

@pytest.mark.parametrize("std", [0.02, 0.3, 3.0], ids=["flat", "middling", "sharp"])
def test_the_engine_samples_as_torch_does(std):
    """2000 tokens: each is `sample` of the logits there, with the noise of its seed and position."""
    model, drawn = tiny_llama(dtype=torch.float32, vocab_size=331, num_hidden_layers=1), set()
    nn.init.normal_(model.lm_head.weight, std=std)
    native, prompts = packed(model), [[i] for i in range(20)]
    seeds = [0, 1, 2 ** 63 - 1, *range(10 ** 12, 10 ** 12 + 17)]
    for sampling in (*SAMPLINGS, Sampling(0.1), Sampling(5.0), Sampling(1e-40), Sampling(2.0, 1, 0.3),
                     Sampling(2.0, 0, 1.0, 1.0)):
        found = texts(NativeDecoder(native, sampling=sampling, eos=()), prompts, 13, seeds)
        logits = native.lm_head(native(torch.tensor([p + text[:-1] for p, text in zip(prompts, found, strict=True)])))
        noise = None
        if sampling.temperature:
            noise = gumbel_noise(torch.tensor(seeds), torch.arange(13).expand(20, -1), 331)
        expected = sample(logits, noise, sampling)                               # [20, 13]
        for row, place in (torch.tensor(found) != expected).nonzero().tolist():
            assert margin(logits[row, place], None if noise is None else noise[row, place], sampling) < 1e-5, sampling
        drawn |= {token for text in found for token in text[1:]}                 # the first one is torch's own
    assert len(drawn) > (10 if std == 3 else 100)


# ----------------------------------------------------------------------------------------------------------- refusals

def test_what_the_engine_cannot_do_is_refused_before_it_is_called():
    model = tiny_llama(dtype=torch.float32, vocab_size=40)
    native = packed(model)
    for ids in ([1, 40], [-1], [1, 2 ** 40]):
        with pytest.raises(UserError, match="token ids must be from 0 to 39"):
            native(torch.tensor([ids]))
        with pytest.raises(UserError, match="token ids must be from 0 to 39"):
            list(NativeDecoder(native).generate([[3], ids], 5))
    heads, chain = tiny_heads(native, 64), [[0] * depth for depth in range(1, 65)]
    assert texts(NativeDecoder(native, heads, Tree.from_paths(chain[:63]), eos=()), [[1]], 9) == \
        texts(NativeDecoder(native, eos=()), [[1]], 9)
    with pytest.raises(UserError, match="a tree of 65 nodes: .* limit is 64, leave out --fast"):
        NativeDecoder(native, heads, Tree.from_paths(chain))
    with pytest.raises(Unavailable, match="head_dim is 258, .* limit is 256"):
        packed(tiny_llama(dtype=torch.float32, head_dim=258))


@pytest.mark.parametrize("quantized", [False, True], ids=["as they are", "int8"])
def test_float64_is_refused_in_one_line(quantized):
    with pytest.raises((UserError, Unavailable), match="float64"):
        native_llama(tiny_llama(), quantized=quantized)


BEYOND = """
import sys
sys.path[:0] = [{tests!r}]
from conftest import native_llama, tiny_llama
import torch
from fast.native import NativeDecoder
from loading.files import UserError
native = native_llama(tiny_llama(dtype=torch.float32))                 # its context: 96 tokens
for length in (98, 120, 161, 400):
    for read in (lambda: list(NativeDecoder(native).generate([[1] * length], 5)),
                 lambda: native(torch.ones(1, 64 + length, dtype=torch.long))):
        try:
            read()
            print("read", length)
        except (UserError, IndexError):
            print("refused", length)
"""


def test_a_text_beyond_the_context_never_reaches_other_memory():
    """The commands check it before; torch's decoder then fails with an IndexError. In a process that may crash."""
    script = BEYOND.format(tests=str(ROOT / "tests"))
    done = forked.run("-c", script)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-300:]
    assert done.stdout.split("\n") == [f"refused {n}" for n in (98, 120, 161, 400) for _ in range(2)] + [""]


# ------------------------------------------------------------------------------------------------- what is replaced

def another_draft(decoder):
    """Heads aside, the token and those behind it, in the order of ids."""
    drafts = torch.arange(1, len(decoder.tree.paths))
    decoder.draft = lambda state: (
        torch.cat((state.token[:, None], (state.token[:, None] + drafts) % 40), dim=1), decoder.noise(state))


def heads_that_draft_otherwise(decoder):
    heads = copy.copy(decoder.heads)
    heads.draft = lambda tree, state, noise, sampling: (state.token[:, None] + torch.arange(1, len(tree.paths))) % 40
    decoder.__init__(decoder.model, heads, decoder.tree, decoder.sampling, ())              # which looks at them


def another_noise(decoder):
    noise = type(decoder).noise
    decoder.noise = lambda state: noise(decoder, state._replace(seed=state.seed + 7))


def no_noise(decoder):
    decoder.noise = lambda state: None


def some_tokens_only(decoder):
    verify = decoder.verify
    def verify_and_ban(state, ids, window):
        hidden, logits = verify(state, ids, window)
        return hidden, logits.index_fill(-1, torch.arange(0, 40, 2), -torch.inf)
    decoder.verify = verify_and_ban


def other_ids(decoder):
    forward = decoder.forward
    decoder.forward = lambda ids, *others: forward((ids + 1) % 40, *others)


def one_token_a_step(decoder):
    commit = decoder.commit
    decoder.commit = lambda state, hidden, path, out, count: commit(state, hidden, path, out, count.clamp(max=1))


def other_logits(decoder):
    decoder.logits = lambda state, ids, tree, hidden: decoder.model.lm_head(hidden).roll(1, dims=-1)


def typical(decoder):
    decoder.accept = Typical()


REPLACEMENTS = (another_draft, heads_that_draft_otherwise, another_noise, no_noise, some_tokens_only, other_ids,
                one_token_a_step, other_logits, typical)


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda function: function.__name__)
def test_what_is_replaced_takes_effect(replace):
    """The tokens are those of torch's decoder with the same replaced, and are in as many steps; and what is replaced
    is seen."""
    model, prompts, found = tiny_llama(dtype=torch.float32, vocab_size=40, std=0.3), [[1, 5, 9], [1, 7]], []
    for kind, m in ((Decoder, model), (NativeDecoder, packed(model))):
        decoder = kind(m, rounded_heads(m, kind="root"), TREE, Sampling(0.8), ())
        before = written(decoder, prompts, 40)
        replace(decoder)
        found.append((before, written(decoder, prompts, 40)))
    (unreplaced, theirs), (before, ours) = found
    assert before == unreplaced and theirs != unreplaced
    assert ours == theirs


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda function: function.__name__)
def test_what_a_subclass_overrides_takes_effect(replace):
    """As if it were replaced on the decoder."""
    native, prompts = packed(tiny_llama(dtype=torch.float32, vocab_size=40, std=0.3)), [[1, 5, 9], [1, 7]]
    decoder = NativeDecoder(native, rounded_heads(native, kind="root"), TREE, Sampling(0.8), ())
    before = written(decoder, prompts, 40)
    replace(decoder)
    parts = {name: staticmethod(part) for name, part in decoder.__dict__.items() if name in NativeDecoder.PARTS}
    overriding = type("Overriding", (NativeDecoder,), parts)(native, decoder.heads, TREE, Sampling(0.8), ())
    assert written(overriding, prompts, 40) == written(decoder, prompts, 40) != before


def test_heads_of_another_class_draft_themselves():
    """Only what the engine knows is packed: a class of one's own keeps its draft."""
    class Own(HydraHeads):
        def draft(self, tree, state, noise, sampling):
            drafted.append(len(state.token))
            return super().draft(tree, state, noise, sampling)
    drafted, native = [], packed(tiny_llama(dtype=torch.float32, vocab_size=40, std=0.3))
    heads = tiny_heads(native, noise=0.05, kind="hydra")
    expected = written(NativeDecoder(native, heads, TREE, eos=()), [[1, 5], [1, 9]], 30)
    heads.__class__ = Own
    assert written(NativeDecoder(native, heads, TREE, eos=()), [[1, 5], [1, 9]], 30) == expected
    assert drafted == [2] * (max(map(len, expected)) - 1)


def test_a_run_sees_every_stage_and_what_it_returns():
    model = tiny_llama(dtype=torch.float32, vocab_size=40, std=0.3)
    native, seen = packed(model), []
    for kind, m in ((Decoder, model), (NativeDecoder, native)):
        watch = Watch(2)
        decoder = kind(m, rounded_heads(m), TREE, eos=(), run=watch)
        seen.append((written(decoder, [[1, 5], [1, 9]], 30), watch))
    (expected, torchs), (found, ours) = seen
    assert found == expected and ours.names == torchs.names and len(ours.names) > 40
    for mine, theirs in zip(ours.steps, torchs.steps, strict=True):
        assert (mine - theirs).abs().max() < 1e-4 and theirs.std() > 0.5


# ----------------------------------------------------------------------------------------- batches, lookup, kept prefix

@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9)], ids=str)
def test_prompts_that_wait_for_a_row(sampling):
    model = tiny_llama(dtype=torch.float32, vocab_size=50, std=0.3)
    native, rng = packed(model), random.Random(0)
    prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 60))] for _ in range(13)]
    plain = NativeDecoder(native, sampling=sampling, eos=(2, 7))
    expected = [texts(plain, [prompt], 30, [i])[0] for i, prompt in enumerate(prompts)]
    heads = tiny_heads(native, noise=0.05, recent=3, kind="hydra")
    chain = Tree.from_paths(Lookup.chain)
    for decoder in (plain, NativeDecoder(native, heads, TREE, sampling, (2, 7)),
                    NativeLookupDecoder(native, Lookup(native.config), chain, sampling, (2, 7))):
        for batch_size in (1, 3, 5, 13):
            assert in_a_batch(decoder, prompts, 30, batch_size) == expected
    assert len(set(map(len, expected))) > 3                                      # rows end at different times


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9), Sampling(1.2, 30, 0.95, 0.05)], ids=str)
def test_a_repetition_penalty(sampling):
    """The text is torch's, of plain decoding, of heads and by lookup, alone and of prompts that wait for a row."""
    model = tiny_llama(dtype=torch.float32, vocab_size=50, std=0.3)
    native, rng = packed(model), random.Random(0)
    prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 60))] for _ in range(7)]
    plain = PlainDecoder(model, sampling, (2, 7))
    unchanged = [texts(plain, [prompt], 25, [i])[0] for i, prompt in enumerate(prompts)]
    penalize(plain, 1.5)
    expected = [texts(plain, [prompt], 25, [i])[0] for i, prompt in enumerate(prompts)]
    heads, chain = tiny_heads(native, noise=0.05, recent=3, kind="hydra"), Tree.from_paths(Lookup.chain)
    for decoder in (NativeDecoder(native, sampling=sampling, eos=(2, 7)),
                    NativeDecoder(native, heads, TREE, sampling, (2, 7)),
                    NativeLookupDecoder(native, Lookup(native.config), chain, sampling, (2, 7))):
        penalize(decoder, 1.5)
        for batch_size in (1, 3):
            assert in_a_batch(decoder, prompts, 25, batch_size) == expected
    assert sum(a != b for a, b in zip(expected, unchanged, strict=True)) > 4


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7)], ids=str)
def test_lookup_takes_torchs_steps(sampling):
    model = tiny_llama(dtype=torch.float32, vocab_size=50, std=0.3, max_position_embeddings=200)
    native, chain = packed(model), Tree.from_paths([[0] * depth for depth in range(1, 8)])
    prompts = [[3, 8, 1] * 12, [*range(20), *range(9)], [4]]
    ours, theirs = (written(kind(m, Lookup(m.config), chain, sampling, ()), prompts, 50)
                    for kind, m in ((NativeLookupDecoder, native), (LookupDecoder, model)))
    assert ours == theirs and [len(row) for row in ours] == [len(row) for row in theirs]
    assert any(len(ids) > 2 for row in ours for ids in row)


@pytest.mark.parametrize("lookup", [False, True], ids=["heads", "lookup"])
def test_a_kept_prefix_changes_no_token(lookup):
    """A chat's cache: turns that go on, that part from the last one in the middle, that are shorter."""
    native, rng, kept = packed(tiny_llama(dtype=torch.float32, vocab_size=50, std=0.3)), random.Random(1), 0
    if lookup:
        make = partial(NativeLookupDecoder, native, Lookup(native.config), Tree.from_paths(Lookup.chain))
    else:
        make = partial(NativeDecoder, native, tiny_heads(native, noise=0.05, recent=3, kind="root"), TREE)
    chat, fresh = (make(Sampling(0.8), eos=()) for _ in range(2))
    keep_prefix(chat)
    prompt = [1, 5]
    for turn in range(12):
        text, = texts(chat, [prompt], 10, [turn])
        assert text == texts(fresh, [prompt], 10, [turn])[0]
        assert text == texts(NativeDecoder(native, sampling=Sampling(0.8), eos=()), [prompt], 10, [turn])[0]
        chat.cached = prompt + text[:-1]
        kept += len(chat.cached)
        prompt = (prompt + text)[:rng.choice([99, 99, 20, 3])][:70] + [rng.randrange(50) for _ in range(4)]
    assert kept > 200


# -------------------------------------------------------------------------------------------------- stages and builds

@pytest.mark.parametrize("medusa", [False, True], ids=["plain", "medusa"])
@pytest.mark.parametrize("penalty", [None, 1.3])
def test_stages_are_those_of_torchs_decoder(penalty, medusa):
    model = tiny_llama(dtype=torch.float32, vocab_size=40, std=0.3)
    native, calls, clocks = packed(model), [], [Stages("cpu"), Stages("cpu")]
    heads = tiny_heads(native, noise=0.05, kind="hydra")
    ours, theirs = [kind(m, heads, TREE, eos=()) for kind, m in ((NativeDecoder, native), (Decoder, model))] if medusa \
        else [kind(m, eos=()) for kind, m in ((NativeDecoder, native), (PlainDecoder, model))]
    for decoder, clock in zip((ours, theirs), clocks, strict=True):
        decoder.run = clock
        if penalty:
            penalize(decoder, penalty)
        steps = written(decoder, [[1, 5], [1, 9]], 30)
        calls.append({name: len(seconds) for name, seconds in clock.seconds.items()})
        assert len(clock.seconds["init"]) == 1 and all(t >= 0 for times in clock.seconds.values() for t in times)
    assert calls[0] == calls[1] and list(calls[0]) == list(calls[1])
    assert calls[0] == ({"init": 1, **dict.fromkeys(("medusa", "tree", "posterior", "update"), len(steps[0]) - 1)}
                        if medusa else {"init": 1, "base_inference": 29})
    assert all(sum(times) > 0 for times in clocks[0].seconds.values())


def builds() -> list[str]:
    """Other processors that this one can be: one with vectors of 8 floats, and any x86-64, with 4."""
    info = Path("/proc/cpuinfo")
    avx2 = not info.is_file() or all(f" {flag} " in info.read_text() for flag in ("avx2", "fma", "bmi2"))
    return ["-march=x86-64", "-march=haswell"] if avx2 else ["-march=x86-64"]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="builds for x86-64")
@pytest.mark.parametrize("option", builds())
def test_builds_for_other_processors(option, monkeypatch, embedded):
    """Their sums have another order, so they are compared with torch; and a tree's are a single token's there too."""
    monkeypatch.setattr("fast.native.library", lambda: build.library(option))
    native = NativeLlama.from_pretrained(MODEL)
    assert native.lib.engine_lanes() == {"-march=x86-64": 4, "-march=haswell": 8}[option]
    heads = load_heads(MODEL / "medusa", native)
    tree = Tree.from_paths(published_tree(len(heads), 40))
    for sampling in (GREEDY, Sampling(0.8)):
        expected = texts(PlainDecoder(embedded.model, sampling), embedded.prompts[:4], 40)
        assert texts(NativeDecoder(native, sampling=sampling), embedded.prompts[:4], 40) == expected
        assert texts(NativeDecoder(native, heads, tree, sampling), embedded.prompts[:4], 40) == expected
    for name in ("odd widths", "head_dim 2", "head_dim 256", "biases"):
        model = model_of(name)
        assert (logits_of(packed(model)) - logits_of(model)).abs().max() < 1e-4
    for dtype in DTYPES:
        products_of_any_number_of_rows(dtype)
    for seed in range(100, 100 + EXAMPLES // 5):
        check(random_case(seed, monkeypatch), monkeypatch)
