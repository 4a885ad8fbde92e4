"""On a GPU, where there is one: CUDA graphs, and the commands with --device cuda, give a CPU's tokens. What graphs.py
does beside recording is tested without one in test_engines.py."""
import json
import random

import pytest
import torch
from conftest import ROOT, random_prompt, random_tree, tiny_heads, tiny_llama

from extras.chat import keep_prefix
from fast.graphs import GraphDecoder, GraphLookupDecoder, GraphPlainDecoder
from tinymedusa import GREEDY, Decoder, PlainDecoder, Sampling, Stages, Tree, gumbel_noise
from variants import batches
from variants.lookup import Lookup
from variants.penalty import penalize
from variants.typical import Typical

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
SAMPLINGS = GREEDY, Sampling(0.8), Sampling(1.2, 9), Sampling(0.9, 0, 0.8), Sampling(1.0, 0, 1.0, 0.05)
KINDS = ({}, {"kind": "root", "trunk": 9}, {"kind": "hydra", "recent": 3, "width": 8},
         {"kind": "hydra", "trunk": 9, "tie_lm_head": True, "token_map": torch.arange(3, 30)})


def pair(**options):
    """The same model and heads on the CPU and on the GPU."""
    made = []
    for device in ("cpu", "cuda"):
        model = tiny_llama(vocab_size=40, std=0.3, max_position_embeddings=900)
        heads = tiny_heads(model, noise=0.05, **options).requires_grad_(False)
        model.to(device), heads.to(device)
        if options:
            heads.freeze()
        made.append((model, heads))
    return made


def texts(decoder, prompts, new_tokens=60) -> list:
    rows = [[] for _ in prompts]
    for step in decoder.generate(prompts, new_tokens):
        for row, ids in zip(rows, step, strict=True):
            row += ids
    return rows


def test_the_noise_of_both_devices():
    seed, position = torch.tensor([0, 7, 2 ** 40]), torch.arange(9).expand(3, 9)
    here = gumbel_noise(seed, position, 5000)
    there = gumbel_noise(seed.cuda(), position.cuda(), 5000).cpu()
    assert torch.allclose(here, there, rtol=1e-5, atol=1e-5) and torch.equal(here.argmax(-1), there.argmax(-1))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_graphs_write_the_cpus_tokens(sampling, options):
    (model, _), (on_gpu, heads) = pair(**options)
    rng, lookup, chain = random.Random(str(sampling)), Lookup(model.config), Tree.from_paths(Lookup.chain)
    for rows, new_tokens in ((1, 60), (3, 40), (1, 600), (1, 60)):
        tree = Tree.from_paths(random_tree(rng, nodes=12) + [[0]])
        prompts = [random_prompt(rng, vocab_size=40) for _ in range(rows)]
        expected = texts(PlainDecoder(model, sampling, ()), prompts, new_tokens)
        for decoder in (Decoder(on_gpu, heads, tree, sampling, ()), GraphDecoder(on_gpu, heads, tree, sampling, ()),
                        GraphPlainDecoder(on_gpu, sampling, ()),
                        GraphLookupDecoder(on_gpu, lookup, chain, sampling, ())):
            for _ in range(2):                                              # the second time in the same memory
                assert texts(decoder, prompts, new_tokens) == expected


def test_graphs_are_recorded_once_and_replayed(monkeypatch):
    made, record = [], GraphDecoder.record
    monkeypatch.setattr(GraphDecoder, "record", lambda self, window: made.append(window) or record(self, window))
    _, (model, heads) = pair()
    decoder = GraphDecoder(model, heads, Tree.from_paths([[0], [1], [0, 0]]), Sampling(0.8), ())
    for prompt in ([1, 5], [1, 9, 8], [1, 30]):
        texts(decoder, [prompt], 300)
    assert made == [256, 512]


def test_rules_and_penalties_by_graphs():
    for change in (lambda d: setattr(d, "accept", Typical(0.09, 0.3)), lambda d: penalize(d, 1.3)):
        found = []
        for (model, heads), kind in zip(pair(), (Decoder, GraphDecoder), strict=True):
            decoder = kind(model, heads, Tree.from_paths([[0], [1], [0, 0], [0, 1]]), Sampling(0.9), ())
            change(decoder)
            found.append(texts(decoder, [[1, 5, 9], [1, *range(3, 30)]], 80))
        assert found[0] == found[1]


def test_batches_and_chats_by_graphs():
    prompts = [[1, 3 + i, *[5] * (i * 7 % 40)] for i in range(9)]
    tree, found = Tree.from_paths([[0], [1], [0, 0], [0, 1]]), []
    for (model, heads), kind in zip(pair(kind="hydra"), (Decoder, GraphDecoder), strict=True):
        rows = [[] for _ in prompts]
        for step in batches.generate(kind(model, heads, tree, Sampling(0.9)), prompts, 40, batch_size=3):
            for i, ids in step.items():
                rows[i] += ids
        decoder, text = kind(model, heads, tree), [1, 5]
        keep_prefix(decoder)
        for said in ([9, 8], [7], [30, 31, 32]):
            text += said
            answer = texts(decoder, [text], 30)[0]
            decoder.cached = text + answer[:-1]
            text = text + answer
        found.append((rows, text))
    assert found[0] == found[1]


def test_stages_on_a_gpu():
    _, (model, heads) = pair()
    clock = Stages("cuda")
    decoder = GraphDecoder(model, heads, Tree.from_paths([[0], [0, 0]]), GREEDY, (), clock)
    texts(decoder, [[1, 5]], 30)
    assert clock.seconds.keys() == {"init", "medusa", "tree", "posterior", "update"}
    assert all(0 < s < 60 for times in clock.seconds.values() for s in times)


@pytest.mark.parametrize("given", [[], ["--fast"], ["--quantize", "int8", "--fast"], ["--heads", "lookup", "--fast"],
                                   ["--heads", "none", "--fast"], ["--temperature", "0.8", "--fast", "--samples", "3",
                                   "--batch-size", "3"], ["--fast", "--repetition-penalty", "1.2"]], ids=str)
def test_generate_on_a_gpu(cli, given):
    found = []
    for device in ("cpu", "cuda"):
        given = [g for g in given if device == "cuda" or g != "--fast"]
        status, out, err = cli("generate", "--prompt", "Once upon a time", "--max-new-tokens", 120, "--json", "--dtype",
                               "float32", "--device", device, *given)
        assert status == 0 and "error" not in err and "--fast:" not in err
        found.append([json.loads(line)["token_ids"] for line in out.splitlines()])
    assert found[0] == found[1] and len(found[0][0]) > 20


def test_data_heads_and_trees_on_a_gpu(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("extras.tune.ROUNDS", 1)
    data, out = tmp_path / "a.bin", tmp_path / "heads"
    assert cli("prepare_data", "--openings", ROOT / "benchmarks" / "openings.txt", "--max-new-tokens", 60, "--fast",
               "--device", "cuda", "--dtype", "float32", "--batch-size", 16, "--out", data)[0] == 0
    assert cli("train_heads", "--data", data, "--out", out, "--kind", "hydra", "--width", 64, "--tie-lm-head", "--bf16",
               "--device", "cuda", "--epochs", 20, "--batch-tokens", 512, "--lr", "4e-3", "--target", "distill")[0] == 0
    status, text, _ = cli("train_heads", "--data", data, "--out", out, "--eval", "--device", "cuda", "--json")
    assert status == 0 and json.loads(text)["acceptance"]["tokens_per_step"] > 1
    assert cli("generate", "--heads", out, "--device", "cuda", "--fast", "--tune", ROOT / "benchmarks" / "openings.txt",
               "--max-new-tokens", 40)[0] == 0
    assert "cuda fast" in json.loads((out / "tree.json").read_text())["modes"]
    status, text, _ = cli("generate", "--heads", out, "--device", "cuda", "--fast", "--compare", "--prompt", "One day",
                          "--dtype", "float32")
    assert status == 0 and "identical: yes" in text
