"""Inputs that can't break it: a short run of benchmarks/fuzz.py, whether that can fail at all, and random values."""
import faulthandler
import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict

import forked
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, LlamaConfig, attention_mask
from loading.config import DTYPES, ROPE_NUMBERS, to_json
from loading.documents import beside, document, read_tokens, write_tokens
from loading.files import UserError
from loading.tokenizer import Tokenizer
from loading.trees import check_paths
from tinymedusa import Tree
from variants.heads import levels_of

sys.path.append(str(ROOT / "benchmarks"))
import fuzz  # noqa: E402

if not sys.platform.startswith("linux"):
    pytest.skip("benchmarks/fuzz.py forks and reads /proc", allow_module_level=True)
same_each_time = settings(deadline=None, derandomize=True, database=None, max_examples=200)


# ---------------------------------------------------------------------------------------------- mutated files

def test_mutated_files_end_in_a_line_or_a_right_answer():
    done = forked.run(ROOT / "benchmarks" / "fuzz.py", "--mutations", 144, "--seed", 5000000)
    assert done.returncode == 0, done.stdout + done.stderr
    total = [int(cell) for cell in done.stdout.splitlines()[-1].split("|")[2:9]]
    assert total[0] == 144 == sum(total[1:]) and total[1] > 30 and total[3] > 10      # errors and answers, both


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    fuzz.build(folder)
    return folder


@pytest.fixture(scope="module")
def reference(healthy):
    return dict(fuzz.run(["plain"], healthy, 1, 60))["plain"]


def nothing(*args, **options):
    raise KeyError("weight")


def memory(*args, **options):
    torch.ones(2 ** 28).sum()                   # 1 GiB
    raise UserError("nothing wrong")


def too_much(*args, **options):
    return torch.ones(2 ** 36)


def forever(*args, **options):
    time.sleep(60)


def crash(*args, **options):
    faulthandler.disable()                      # pytest's
    os.kill(os.getpid(), signal.SIGSEGV)


def two_lines(*args, **options):
    print("something else", file=sys.stderr)
    raise UserError("and a line")


@pytest.mark.parametrize("loader, says", [
    (nothing, "KeyError: 'weight'"), (memory, "times the healthy run's memory"), (forever, "no end after 1 s"),
    (too_much, "can't allocate memory"), (crash, "killed by SIGSEGV"), (two_lines, "not one short line on stderr")])
def test_the_harness_sees(loader, says, healthy, reference, monkeypatch):
    monkeypatch.setattr(Llama, "from_pretrained", loader)
    job = fuzz.job(1, healthy)
    (_, result), = fuzz.run([job], healthy, 1, timeout=1 if loader is forever else 20)
    verdict, why = fuzz.judge(job, result, reference)
    assert verdict == "failure" and says in why


def test_the_harness_sees_a_wrong_answer(healthy, reference):
    """Text that changed though only the heads were touched, and Medusa's tokens that are not plain decoding's."""
    answer = json.loads(reference.out)
    judged = lambda file, change, same=False: fuzz.judge(
        fuzz.Job(0, "plain", file, b"", same), reference._replace(out=json.dumps(answer | change)), reference)[0]
    other, parts = {"baseline": {"text": "x"}}, lambda margin: {"identical": False, "first_difference": margin}
    assert judged("config.json", {}) == judged("config.json", other) == "answer"
    assert judged("medusa/tree.json", other) == judged("config.json", other, same=True) == "failure"
    assert judged("config.json", parts({"margin": 0.1})) == judged("config.json", parts(None)) == "failure"
    assert judged("config.json", parts({"margin": 1e-6})) == "near tie"
    refused = reference._replace(status=2, err="generate.py: no\n")
    assert fuzz.judge(fuzz.Job(0, "plain", "config.json", b"", True), refused, reference)[0] == "failure"


def test_mutated_token_files_are_an_error_or_the_same_documents(healthy, tmp_path):
    """One of the four files of a token file at a time; read in this process, as train_heads.py reads it."""
    tokenizer = Tokenizer(healthy / "plain", LlamaConfig.from_pretrained(healthy / "plain"))
    documents = [document(([1], False), (list(range(3 + n, 3 + 2 * n)), [n % 2] * n)) for n in range(1, 30)]
    write_tokens(tmp_path / "a.bin", documents, tokenizer, 300, {"text": "a.txt", "limit": 29})
    as_lists = lambda documents: [(d.ids.tolist(), d.loss.tolist(), d.starts.tolist()) for d in documents]
    refused = 0
    assert as_lists(read_tokens(tmp_path / "a.bin", tokenizer)) == as_lists(documents)
    for seed in range(400):
        rng, file = random.Random(seed), beside(tmp_path / "a.bin")[seed % 4]
        whole = file.read_bytes()
        as_json = file.suffix == ".json" and rng.random() < 0.8
        file.write_bytes(fuzz.mutate_json(whole.decode(), rng).encode() if as_json else fuzz.mutate_bytes(whole, rng))
        try:
            assert as_lists(read_tokens(tmp_path / "a.bin", tokenizer)) == as_lists(documents), seed
        except UserError:
            refused += 1
        file.write_bytes(whole)
    assert 300 < refused < 400


def test_a_seed_is_a_mutation(healthy):
    for seed in range(len(fuzz.TARGETS)):
        assert fuzz.job(seed, healthy) == fuzz.job(seed, healthy)


# ----------------------------------------------------------------------------------------------- random values

junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=5)
some_path = st.lists(st.integers(-1, 5), max_size=5) | st.lists(st.integers(0, 4), min_size=1, max_size=2) | junk
closed = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=8).map(
    lambda paths: [list(p) for p in {tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}])


def is_tree(paths) -> bool:
    """The definition, for 4 heads that draft 5 tokens."""
    return isinstance(paths, list) and all(
        isinstance(p, list) and 1 <= len(p) <= 4 and all(type(r) is int and 0 <= r < 5 for r in p) and
        paths.count(p) == 1 and (len(p) == 1 or p[:-1] in paths) for p in paths)


@same_each_time
@given(paths=closed | st.lists(some_path, max_size=5) | junk)
def test_paths_are_a_tree_or_an_error(paths):
    try:
        tree = Tree.from_paths(check_paths(paths, 4, 5))
    except UserError:
        assert not is_tree(paths)
        return
    assert is_tree(paths) and tree.paths[0] == () and sorted(tree.paths[1:]) == sorted(map(tuple, paths))
    nodes, drafted = len(tree.paths), []
    for first in (0, 1):                # with a trunk, heads see what is behind the root: nodes are counted from there
        levels, behind = levels_of(tuple(tree.paths), first, tree.rank.device), []
        for depth, (parents, way, pick, ranks) in enumerate(levels, 1):
            ways = [[0][:first] + [first + j for j in row] for row in way.view(parents, depth - first).tolist()]
            behind += [(depth, ways[n // ranks], n % ranks) for n in pick.tolist()]
        assert first == 0 or behind == drafted
        drafted = behind
    mask = attention_mask(torch.tensor([2]), tree.ancestors, 2 + nodes + 1)[0]      # behind two committed tokens
    assert mask.shape == (nodes, nodes + 3) and mask[:, :2].all() and not mask[:, -1].any()
    for i, p in enumerate(tree.paths):
        assert tree.depth[i] == len(p) and tree.paths[tree.parent[i]] == p[:-1] and tree.parent[i] <= i
        assert tree.rank[i] == (p[-1] if p else 0)
        assert [tree.paths[j] for j in tree.retrieve[i, :len(p) + 1]] == [p[:n] for n in range(len(p) + 1)]
        assert all(j >= column for column, j in enumerate(tree.retrieve[i].tolist()))
        for j, q in enumerate(tree.paths):
            assert tree.ancestors[i, j] == (p[:len(q)] == q) == mask[i, 2 + j]
        if i:       # Hydra: node i is guessed by the head of its depth, read at its parent, in the order of the nodes
            depth, way, rank = drafted[i - 1]
            assert depth == len(p) and rank == p[-1] and [tree.paths[j] for j in way] == [p[:n] for n in range(len(p))]
    assert len(drafted) == nodes - 1


small = st.integers(1, 12)
fields = {name: small | junk for name in LlamaConfig.__dataclass_fields__} | {
    "dtype": st.sampled_from(DTYPES) | junk, "rms_norm_eps": st.floats(0, 1) | junk,
    "rope_theta": st.floats(1, 1e7) | junk, "model_type": st.sampled_from(["llama", "mistral"]) | junk,
    "attention_bias": st.booleans(), "mlp_bias": st.booleans(), "tie_word_embeddings": st.booleans() | junk,
    "rope_scaling": junk | st.fixed_dictionaries(
        {"rope_type": st.sampled_from(list(ROPE_NUMBERS)) | junk},
        optional={number: st.floats(0.5, 8) | junk for number in (
            *ROPE_NUMBERS["llama3"], "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
            "truncate")}),
    "rope_parameters": junk, "hidden_act": st.just("silu") | junk, "torch_dtype": junk,
    "eos_token_id": st.lists(small) | small | junk}
SMALL = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 16}


@same_each_time
@given(changes=st.lists(st.sampled_from(list(fields)), max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: fields[name] for name in names})))
def test_a_config_is_a_model_or_an_error(changes):
    try:
        config = LlamaConfig.from_dict(SMALL | changes)
    except UserError:
        return
    if all(getattr(config, name) <= 64 for name in (*SMALL, "head_dim")):
        assert Llama(config)(torch.tensor([[0]])).shape == (1, 1, config.hidden_size)
        assert LlamaConfig.from_dict(json.loads(json.dumps(to_json(asdict(config))))) == config
