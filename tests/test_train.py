"""Training: labels, losses and ranks against slow definitions, exact resume, several processes, the command."""
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_heads, tiny_llama
from safetensors.torch import load_file
from tqdm import tqdm

import train_heads
from extras.forecast import simulate
from extras.training import report
from llama import Llama, LlamaConfig
from loading.documents import Document, document, read_tokens
from loading.files import UserError, write_json
from loading.heads import KINDS
from loading.tokenizer import Tokenizer
from prepare_data import continuations, continued
from tinymedusa import Decoder, MedusaHeads, PlainDecoder, Tree
from train_heads import (
    IGNORE,
    evaluate,
    head_results,
    learning_rate,
    length_batches,
    make_batch,
    rank_of,
    teacher_of,
    train,
)
from variants import batches
from variants.heads import build_heads

x = IGNORE


def options(tmp_path, *more):
    write_json(tmp_path / "d.json", {"sha256": "the same"})
    return train_heads.arguments(["--data", str(tmp_path / "d"), "--out", str(tmp_path), "--warmup", "1",
                                  *map(str, more)])


def text(ids):
    return document(([1], False), (ids, True))


def texts(number=4, length=20):
    return [text(np.random.default_rng(i).integers(3, 12, length)) for i in range(number)]


# ----------------------------------------------------------------------------------------------------------- labels

def test_head_k_learns_the_token_k_plus_1_places_on():
    """The family's commonest bug is to be off by one: head 1 at position t is taught ids[t + 2]."""
    batch = make_batch([text([10, 11, 12, 13]), text([20, 21])], 3)
    assert batch.ids.tolist() == [[1, 10, 11, 12, 13], [1, 20, 21, 0, 0]]
    assert batch.index.tolist() == [0, 1, 2, 5] and batch.row.tolist() == [0, 0, 0, 1]
    assert batch.labels.tolist() == [[11, 12, 13, 21], [12, 13, x, x], [13, x, x, x]]
    assert batch.tokens[:, 0].tolist() == [10, 11, 12, 20] and batch.tokens[0].tolist() == [10, 11, 12]
    assert batch.next.tolist() == [10, 11, 12, 13, x, 20, 21, x, x, x] and batch.own.all()


def test_prompts_carry_no_loss_and_no_step_begins_in_them():
    """Question, answer, question, answer: [1 5 6] 7 8 9 2 [10 11] 12 2."""
    ids, loss = [1, 5, 6, 7, 8, 9, 2, 10, 11, 12, 2], np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1])
    batch = make_batch([Document(ids, loss)], 2)
    labels = {i: batch.labels[:, j].tolist() for j, i in enumerate(batch.index.tolist())}
    assert labels == {0: [x, 7], 1: [7, 8], 2: [8, 9], 3: [9, 2], 4: [2, x], 6: [x, 12], 7: [12, 2], 8: [2, x]}
    own = dict(zip(batch.index.tolist(), batch.own.tolist(), strict=True))
    assert [i for i, mine in own.items() if mine] == [2, 3, 4, 8]      # 2: the prompt's end, where the prefill chose 7
    assert batch.next.tolist() == [x, x, 7, 8, 9, 2, x, x, 12, 2, x]


def test_packed_rows_ask_nothing_across_a_boundary():
    stream = Document.joined([text([5, 6, 2]), text([7, 8, 9, 2])])
    batch = make_batch(train_heads.cut([stream], 8), 2)
    labels = {i: batch.labels[:, j].tolist() for j, i in enumerate(batch.index.tolist())}
    assert labels == {0: [6, 2], 1: [2, x], 4: [8, 9], 5: [9, x]}      # the last 2 stands alone in the second row
    assert batch.next[:8].tolist() == [5, 6, 2, x, 7, 8, 9, x]


# ------------------------------------------------------------------------------------------------------ loss and ranks

@pytest.mark.parametrize("temperature", [None, 0.0, 0.7])
@pytest.mark.parametrize("distill", [False, True], ids=["tokens", "distill"])
@pytest.mark.parametrize("kind, token_map", [("medusa", None), ("root", None), ("hydra", torch.arange(2, 9))], ids=str)
def test_losses_and_ranks_against_their_definition(kind, token_map, distill, temperature):
    model = tiny_llama().requires_grad_(False)
    heads, documents = tiny_heads(model, 2, kind=kind, token_map=token_map, recent=3), texts(3, 9)
    for d in documents:
        d.temperature = temperature
    batch = make_batch(documents, 2)
    with torch.no_grad():
        hidden = model(batch.ids)
        teacher = teacher_of(model, heads) if distill else None
        results = list(head_results(heads, batch, hidden, teacher, room=5 * 2 * 12))      # a few places at a time
        ids = list(range(12)) if token_map is None else token_map.tolist()
        losses, ranks = torch.zeros(2, dtype=torch.float64), [[], []]
        for row, t in itertools.product(range(3), range(10)):
            text = batch.ids[row].tolist()
            for k in range(2):
                label = text[t + 2 + k] if t + 2 + k < len(text) else None
                if t + 2 >= len(text):
                    continue
                recent = torch.cat((torch.zeros(2, 32), hidden[row]))[None, t:t + 3]             # hidden of t - 2 .. t
                logits = heads(recent, torch.tensor([(text + [0, 0])[t + 1:t + 3]]))[0, k]
                known = label in ids
                ranks[k].append(int((logits > logits[ids.index(label)]).sum()) if known else train_heads.MISS)
                if known:
                    logits = logits / (temperature or 1)
                    right = model.lm_head(hidden[row, t + 1 + k])[ids] / (temperature or 1)  # the base guesses label
                    losses[k] -= (right.softmax(-1) * logits.log_softmax(-1)).sum() if distill and temperature != 0 \
                        else logits.log_softmax(-1)[ids.index(label)]
    assert len(results) > 1 and torch.allclose(sum(sums for sums, *_ in results), losses, atol=1e-10)
    assert torch.cat([rank_of(logits, labels) for _, logits, labels, _ in results], 1).tolist() == ranks


def trained(tmp_path, documents, *more, **kind):
    model = tiny_llama()
    heads = tiny_heads(model, 2, **kind)
    train(model, heads, documents, options(tmp_path, "--batch-tokens", 50, "--lr", 1e-2, *more))
    return model, heads


def close(a: MedusaHeads, b: MedusaHeads, atol):
    return all(torch.allclose(p, q, rtol=0, atol=atol) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_chunks_and_accumulated_batches_give_the_gradient_of_the_whole(monkeypatch, tmp_path):
    runs = []
    for logits, more in ((10 ** 6, ()), (7 * 2 * 12, ()), (10 ** 6, ("--batch-tokens", 21, "--accumulate", 2))):
        monkeypatch.setattr(train_heads.head_results, "__defaults__", (None, logits))
        monkeypatch.setattr(train_heads, "length_batches", lambda d, tokens, seed:      # the same order for all three
                            [d[:2], d[2:]] if tokens == 50 else [[d[0]], [d[1]], [d[2]], [d[3]]])
        documents = [text(np.random.default_rng(i).integers(3, 12, 9 + 5 * i)) for i in range(4)]
        runs.append(trained(tmp_path, documents, "--epochs", 3, *more)[1])
    assert close(runs[0], runs[1], 1e-9) and close(runs[0], runs[2], 1e-9)


@pytest.mark.parametrize("token_map", [None, torch.arange(2, 9)], ids=["all", "map"])
def test_a_batch_without_labels_adds_nothing(token_map, tmp_path):
    """A document of two tokens, or the last of a longer one, alone in its batch."""
    more = ("--epochs", 1, "--batch-tokens", 1, "--accumulate")
    _, without = trained(tmp_path, texts(2), *more, 2, token_map=token_map)
    _, heads = trained(tmp_path, [text([5]), *texts(2), text([])], *more, 4, token_map=token_map)
    assert close(heads, without, 1e-9) and not close(heads, tiny_heads(tiny_llama(), 2, token_map=token_map), 1e-4)


def test_loss_weights_and_clipping(tmp_path):
    """One step of AdamW with a huge eps is a step of plain gradient descent: the slow definition of the gradient."""
    model, documents = tiny_llama(), texts(2)
    heads, before = tiny_heads(model, 2), tiny_heads(model, 2)
    batch = make_batch(documents, 2)
    logits = before(model(batch.ids).flatten(0, 1)[batch.index, None].detach(), batch.tokens)
    loss = sum(0.3 * 0.5 ** (k + 1) * F.cross_entropy(logits[:, k], batch.labels[k], ignore_index=IGNORE)
               for k in range(2))
    gradient = torch.autograd.grad(loss, list(before.parameters()))
    seen = []
    real = torch.optim.AdamW.step
    for clip in (0, 1e-3):
        torch.optim.AdamW.step = lambda self: seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        try:
            train(model, heads, documents, options(tmp_path, "--epochs", 1, "--decay", 0.5, "--coefficient", 0.3,
                                                   "--clip", clip))
        finally:
            torch.optim.AdamW.step = real
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(seen[0], gradient, strict=True))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert norm > 1e-2
    assert all(torch.allclose(a, b * 1e-3 / norm, atol=1e-8) for a, b in zip(seen[1], gradient, strict=True))


def test_the_base_stays_as_it_is(tmp_path):
    start = tiny_heads(tiny_llama(), 2, tie_lm_head=True)
    model, heads = trained(tmp_path, texts(), tie_lm_head=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny_llama().parameters(), strict=True))
    assert not any(torch.equal(t, start.state_dict()[n]) for n, t in heads.state_dict().items())


def by_heart(tmp_path, kind, rows, **over):
    model = tiny_llama(vocab_size=40, dtype=torch.float32, std=0.6, **over)
    openings = {i: [1, 3 + i] for i in range(rows)}
    write = lambda prompts, seeds: batches.generate(PlainDecoder(model), prompts, 60, seeds)
    answers = lambda turn, prompts: continued(prompts, write)
    return model, openings, list(continuations(openings, answers, tqdm(disable=True))), build_heads(model, 3, **kind)


@pytest.mark.parametrize("kind, rows", [
    ({}, 3), ({"tie_lm_head": True, "width": 128}, 12), ({"kind": "root", "tie_lm_head": True, "width": 64}, 12),
    ({"kind": "hydra", "tie_lm_head": True, "width": 64, "recent": 3}, 12)], ids=str)
def test_a_tiny_corpus_learned_by_heart(kind, rows, tmp_path):
    """On the base's own greedy text the heads end up guessing nearly all: at least 0.9 (K + 1) tokens a step.

    The simulation from the ranks must tell exactly the steps that decoding takes.
    """
    model, openings, documents, heads = by_heart(tmp_path, kind, rows)
    assert len({tuple(d.ids[-20:]) for d in documents}) > rows / 2                  # not one cycle for all
    args = options(tmp_path, "--epochs", 300, "--lr", 1e-2, "--warmup", 20, "--batch-tokens", 1000)
    train(model, heads, documents, args)
    figures, ranks, own = evaluate(model, heads, documents, args.batch_tokens)
    assert min(top[0] for top in figures["top"]) > 0.95
    for paths in ([[0], [0, 0], [0, 0, 0]], [[0], [1], [1, 0]]):
        tree = Tree.from_paths(paths)
        steps = list(Decoder(model, heads, tree).generate(list(openings.values()), 60))
        for row in range(rows):
            assert [t for s in steps for t in s[row]] == documents[row].ids.tolist()[2:]
        counts = [len(ids) for s in steps[1:] for ids in s if ids]
        found = simulate(tree, ranks, own)
        assert found["steps"] == len(counts) and abs(found["tokens_per_step"] - sum(counts) / len(counts)) < 6e-5
        if len(paths[-1]) == 3:
            print(f"{kind}: {sum(counts) / len(counts):.2f} tokens per step of at most 4")
            assert sum(counts) / len(counts) >= 0.9 * 4


# -------------------------------------------------------------------------------------------- schedule, batches, resume

def test_schedule_and_batches():
    rates = [learning_rate(s, 100, 10, "cosine") for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == pytest.approx(1) and rates[99] < 1e-3
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert [learning_rate(s, 100, 2, "constant") for s in (0, 1, 2, 99)] == [0.5, 1, 1, 1]
    documents = [np.arange(n) for n in range(3, 60)]
    batches = length_batches(documents, 100, seed=3)
    assert sorted(len(d) for b in batches for d in b) == list(range(3, 60))      # each document once an epoch
    assert [len(b) for b in batches] == [len(b) for b in length_batches(documents, 100, seed=3)]
    assert max(max(map(len, b)) * len(b) for b in batches) < 100 + 60


@pytest.mark.parametrize("more", [(), ("--medusa-2", "--base-lr", 1e-3)], ids=["heads", "medusa-2"])
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, more, monkeypatch):
    """Ctrl-C in step 3 of 12 (in the joint half with Medusa-2: step 9): saved behind it, then resumed."""
    at = 9 if more else 3
    monkeypatch.setattr(train_heads.head_results, "__defaults__", (None, 7 * 2 * 12))        # several chunks a batch
    more = (*more, "--epochs", 3, "--log-every", 2, "--batch-tokens", 21)
    model, whole = trained(tmp_path / "whole", texts(), *more)
    real, calls = train_heads.head_backward, []

    def head_backward(*args):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_heads, "head_backward", head_backward)
        trained(tmp_path / "cut", texts(), *more)
    with pytest.raises(UserError, match="add --resume"):
        trained(tmp_path / "cut", texts(), *more)
    with pytest.raises(UserError, match="decay 0.8, not 0.5"):
        trained(tmp_path / "cut", texts(), *more, "--resume", "--decay", 0.5)
    again, resumed = trained(tmp_path / "cut", texts(), *more, "--resume")
    assert all(torch.equal(t, resumed.state_dict()[n]) for n, t in whole.state_dict().items())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    read = lambda name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    untimed = lambda name: [{**m, "tokens_per_second": 0} for m in read(name)]
    assert untimed("cut") == untimed("whole")
    assert [m["step"] for m in read("cut")] == [2, 4, 6, 8, 10, 12]
    assert set(read("cut")[0]) == {"step", "loss", "head_loss", "top1", "top5", "lr", "tokens_per_second"}


def test_no_checkpoint_to_resume(tmp_path):
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        trained(tmp_path, texts(), "--resume")
    (tmp_path / "checkpoint.pt").write_bytes(b"garbage")
    with pytest.raises(UserError, match="can't read .*checkpoint.pt"):
        trained(tmp_path, texts(), "--resume")


def test_two_processes_make_the_steps_of_one(tiny_folder, tmp_path, cli):
    """Rows of very different lengths, so the halves of a batch hold different numbers of labels; and an empty half."""
    stories = ["a dog was here " * n for n in (1, 9, 2, 7, 1, 8, 3, 3, 1)]
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(stories))
    cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "s.txt", "--out", tmp_path / "s.bin")
    arguments = ["--model", tiny_folder, "--data", tmp_path / "s.bin", "--epochs", 2, "--lr", 0.002, "--warmup", 1,
                 "--width", 8, "--num-heads", 2, "--batch-tokens", 60]
    assert cli("train_heads", *arguments, "--out", tmp_path / "one")[0] == 0
    with socket.create_server(("127.0.0.1", 0)) as free, open(tmp_path / "said", "w+") as said:
        torchrun = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        both = [forked.Process(ROOT / "train_heads.py", *arguments, "--out", tmp_path / "two",
                               streams=[said.fileno()] * 3,
                               env=os.environ | torchrun | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
        assert [process.wait() for process in both] == [0, 0], (tmp_path / "said").read_text()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(tiny_folder / "medusa" / "model.safetensors")
    assert all(torch.allclose(one[n], two[n], rtol=0, atol=1e-6) for n in one) and one.keys() == two.keys()
    assert start.keys() != one.keys() and float(one["0.0.down.weight"].abs().max()) > 1e-3      # they did learn
    metrics = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("one", "two")]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], abs=1e-5)


# -------------------------------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("kind", KINDS)
def test_the_command(kind, tiny_folder, tmp_path, cli):
    stories = [f"the dog {'was happy ' * (5 + i % 3)}" for i in range(60)]
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(stories))
    assert cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "s.txt", "--out",
               tmp_path / "s.bin")[0] == 0
    run = lambda *more: cli("train_heads", "--model", tiny_folder, "--data", tmp_path / "s.bin", "--out",
                            tmp_path / "h", *more)
    status, out, err = run("--num-heads", 2, "--tie-lm-head", "--width", 16, "--epochs", 40, "--lr", 0.02, "--kind",
                           kind, "--draft-vocab", 100, "--json")
    assert status == 0 and "training heads: 100%" in err
    result = json.loads(out)
    columns = {"medusa": 32 + 32, "root": 64 + 64, "hydra": 64 + 96}[kind]
    assert result["documents"] == 2 and result["parameters"] == 16 * columns + 2 * (16 + 32 * 16)
    assert result["top"][0][0] > 0.5 and result["top"][1][4] >= result["top"][1][0] and result["kind"] == kind
    assert not (tmp_path / "h" / "checkpoint.pt").exists()
    status, out, _ = cli("generate", "--model", tiny_folder, "--heads", tmp_path / "h", "--prompt", "the dog", "--json",
                         "--max-new-tokens", 20, "--compare")
    assert status == 0 and json.loads(out)["identical"]
    paths = json.loads((tmp_path / "h" / "tree.json").read_text())["paths"]
    assert [0] in paths and len(paths) <= 15
    again = json.loads(run("--eval", "--json")[1])
    assert again["documents"] == 60 and len(again["acceptance"]["node_reach"]) == len(paths) + 1
    status, out, _ = run("--eval")
    assert status == 0 and "tokens per step" in out and "top-10" in out and "  = new tokens behind the first" in out


def test_every_way_of_training_learns_and_is_a_way_of_its_own(tmp_path):
    """The held-by-heart corpus, shortly: the loss falls to less than half of where it began, and no two runs agree."""
    ends = []
    for i, more in enumerate([(), ("--target", "distill"), ("--bf16",), ("--schedule", "constant")]):
        model, _, documents, heads = by_heart(tmp_path, {"tie_lm_head": True, "width": 64}, 6)
        torch.manual_seed(0)
        for head in heads:
            torch.nn.init.normal_(head[0].up.weight)
        args = options(tmp_path / str(i), "--epochs", 60, "--lr", 1e-2, "--batch-tokens", 200, "--log-every", 1, *more)
        train(model, heads, documents, args)
        losses = [json.loads(line)["loss"] for line in (tmp_path / str(i) / "metrics.jsonl").read_text().splitlines()]
        assert losses[-1] < losses[0] / 2
        ends.append(losses[-1])
    assert len(set(ends)) == 4


@pytest.fixture
def stories(tiny_folder, tmp_path, cli):
    """train_heads.py on a token file: stories(*more) → (status, out, err); its heads go to tmp_path / "h"."""
    lines = [f"a {'happy ' * (3 + i % 4)}dog {i}" for i in range(30)]
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(lines))
    write = lambda *more: cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "s.txt", "--out",
                              tmp_path / "s.bin", *more)
    write()
    run = lambda *more: cli("train_heads", "--model", tiny_folder, "--data", tmp_path / "s.bin", "--num-heads", 2,
                            "--out", tmp_path / "h", "--width", 8, "--batch-tokens", 100, "--warmup", 1, *more)
    return run, write


def test_the_command_resumes_bit_for_bit_and_only_with_the_same_data(stories, tmp_path, monkeypatch):
    run, write = stories
    more = ("--draft-vocab", 50, "--kind", "hydra", "--pack", 20)
    assert run(*more)[0] == 0
    whole = load_file(tmp_path / "h" / "model.safetensors")
    real, calls = train_heads.backward, []

    def backward(*args):
        calls.append(args[2].ids.shape[1])
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train_heads, "backward", backward)
        assert run(*more)[0] == 130 and max(calls) == 20                         # rows are packed
    write("--limit", 29)
    assert "was trained with data" in run(*more, "--resume")[2]
    write()
    status, _, err = run(*more, "--resume")
    resumed = load_file(tmp_path / "h" / "model.safetensors")
    assert status == 0 and all(torch.equal(whole[n], resumed[n]) for n in whole), err


def test_hidden_states_are_computed_once_and_kept(stories, tmp_path, monkeypatch):
    """Further epochs and trainings don't run the base model; the weights are those without, 16 bits' rounding aside."""
    run, _ = stories
    monkeypatch.setenv("OMP_NUM_THREADS", "1")                                   # obeyed: nothing is timed
    seen = []
    real = Llama.forward

    def forward(self, ids, *rest):
        seen.append(ids.numel())
        return real(self, ids, *rest)
    monkeypatch.setattr(Llama, "forward", forward)
    more = ("--epochs", 3, "--tie-lm-head", "--lr", 1e-2)
    status, _, err = run(*more)
    (kept,), tokens = tmp_path.glob("s.bin.hidden-*"), np.fromfile(tmp_path / "s.bin", "uint16").size
    size = 2 * tokens * 32
    assert status == 0 and kept.stat().st_size == size, err
    assert f"{kept}: the hidden states of {tokens} tokens take {size / 1e6:.1f} MB" in err
    assert tokens <= sum(seen) < 1.6 * tokens                                    # padding, and the held-out text
    with_kept, states = load_file(tmp_path / "h" / "model.safetensors"), kept.read_bytes()
    seen.clear()
    assert run(*more)[0] == 0 and sum(seen) < 0.2 * tokens                       # the held-out text alone
    assert kept.read_bytes() == states
    monkeypatch.setattr(train_heads, "keep_hidden", lambda *a: None)
    seen.clear()
    assert run(*more)[0] == 0 and sum(seen) > 2.5 * tokens
    without = load_file(tmp_path / "h" / "model.safetensors")
    for name, weight in without.items():
        assert torch.allclose(weight, with_kept[name], rtol=0, atol=2e-3 * float(weight.abs().max())), name
    start = [w for n, w in build_heads(tiny_llama(), 2, width=8, tie_lm_head=True).state_dict().items() if "down" in n]
    assert not start[0].any() and float(without["0.0.down.weight"].abs().max()) > 1e-2           # they did learn


def test_kept_hidden_states_are_of_this_text_and_model(stories, tiny_folder, tmp_path, monkeypatch):
    run, write = stories
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    real, calls = Llama.forward, []

    def stopped(self, ids, *rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, ids, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(Llama, "forward", stopped)
        assert run()[0] == 130
    (kept,) = tmp_path.glob("s.bin.hidden-*")
    ids = np.fromfile(tmp_path / "s.bin", "uint16")
    starts = np.fromfile(tmp_path / "s.bin.starts", "uint64").tolist()
    known = lambda: np.fromfile(kept, np.float16).reshape(len(ids), 32).any(1)
    assert 0 < known().sum() < len(ids)
    assert run()[0] == 0 and known().all()
    model, states = Llama.from_pretrained(tiny_folder), np.fromfile(kept, np.float16).reshape(len(ids), 32)
    for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        with torch.no_grad():
            hidden = model(torch.from_numpy(ids[begin:end].astype(np.int64))[None])[0]
        assert np.abs(hidden.numpy() - states[begin:end]).max() < 4e-3
    assert run("--bf16")[0] == 0                                                 # the pass over the text, too
    (rounded,) = {*tmp_path.glob("s.bin.hidden-*")} - {kept}
    off = np.abs(np.fromfile(rounded, np.float16).astype(float) - states.flatten())
    assert 1e-3 < off.mean() < 0.03 * np.abs(states.astype(float)).mean()
    rounded.unlink()
    write("--limit", 29)
    assert run()[0] == 0 and len(list(tmp_path.glob("s.bin.hidden-*"))) == 2
    with torch.no_grad():
        model.norm.weight[3] += 0.1
    model.save(tiny_folder)
    assert run()[0] == 0 and len(list(tmp_path.glob("s.bin.hidden-*"))) == 3
    monkeypatch.setattr("extras.training.reserve", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    status, _, err = run()
    assert status == 2 and "can't write" in err and "MB: No space left" in err.splitlines()[-1]


def test_texts_of_several_temperatures_make_one_training_and_a_tree_for_each(stories, tiny_folder, tmp_path, cli):
    run, _ = stories
    (tmp_path / "o.txt").write_text("\n".join(f"the dog {i}" for i in range(60)))
    files = []
    for temperature in (0.9, 0, 0.4):
        files.append(tmp_path / f"t{temperature}.bin")
        assert cli("prepare_data", "--model", tiny_folder, "--openings", tmp_path / "o.txt", "--max-new-tokens", 20,
                   "--temperature", temperature, "--out", files[-1])[0] == 0
    assert [{d.temperature for d in read_tokens(f, Tokenizer(tiny_folder, LlamaConfig.from_pretrained(tiny_folder)))}
            for f in files] == [{0.9}, {0.0}, {0.4}]
    status, out, err = run("--data", *files, "--target", "distill", "--json")
    assert status == 0, err
    result, written = json.loads(out), json.loads((tmp_path / "h" / "tree.json").read_text())
    assert [r["temperature"] for r in (result, *result["sampled"])] == [0.0, 0.4, 0.9]
    assert list(written["temperatures"]) == ["0.4", "0.9"] and written["paths"]
    assert [r["documents"] for r in (result, *result["sampled"])] == [1, 1, 2]
    status, out, _ = run("--data", *files, "--eval")
    assert status == 0 and [line for line in out.splitlines() if line.startswith("temperature")] == [
        f"temperature {t}: 60 documents" for t in (0.0, 0.4, 0.9)]


def test_a_warm_up_that_suits_the_run(stories):
    run, _ = stories
    assert "--warmup 500 exceeds the run of" in run("--warmup", 500)[2]
    assert "exceeds" not in run("--warmup", 2)[2]


def test_the_plot(tmp_path):
    line = {"step": 20, "loss": 1.0, "top1": [0.5] * 12, "tokens_per_second": 9.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line | {"step": s}) + "\n" for s in (20, 40)))
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "plot_training.py", tmp_path / "metrics.jsonl",
                           "--out", tmp_path / "plot.png"], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG"), done.stderr


def test_a_training_that_diverges_is_an_error_and_nan_is_no_hit(stories, tmp_path, monkeypatch):
    run, _ = stories
    assert run()[0] == 0
    before = (tmp_path / "h" / "model.safetensors").read_bytes()
    real = train_heads.head_results
    monkeypatch.setattr(train_heads, "head_results",
                        lambda *a, **k: ((loss * math.nan, *rest) for loss, *rest in real(*a, **k)))
    status, out, err = run()
    assert status == 2 and "no longer finite at step" in err
    assert (tmp_path / "h" / "model.safetensors").read_bytes() == before
    model = tiny_llama(dtype=torch.float32)
    heads = tiny_heads(model, 2)
    for head in heads:
        head[0].linear.weight.data[:] = math.nan
    figures, _, _ = evaluate(model, heads, texts(), 100)
    assert figures["top"] == [[0] * 10] * 2


def test_equal_logits_rank_by_their_ids(monkeypatch):
    model = tiny_llama()
    heads, batch = tiny_heads(model, 2), make_batch(texts(1), 2)
    monkeypatch.setattr(type(heads), "forward", lambda self, recent, tokens: torch.zeros(len(tokens), 2, 12))
    (_, logits, labels, _), = head_results(heads, batch, torch.zeros(1, 21, 32).double())
    rank = rank_of(logits, labels)
    assert torch.equal(rank[labels != IGNORE], labels[labels != IGNORE])


def test_the_models_own_folder_is_never_written_over(stories, tiny_folder, tmp_path):
    run, _ = stories
    status, _, err = run("--out", tiny_folder)
    assert status == 2 and "is the model's own folder" in err
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "checkpoint.pt").write_bytes(b"x")
    torch.save({"step": 3}, tmp_path / "h" / "checkpoint.pt")
    status, _, err = run("--resume")
    assert status == 2 and "can't read" in err and err.count("Traceback") == 0


# ------------------------------------------------------------------------------- what a stopped training left, damaged

@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A training stopped in step 5 of 12, and resumed(): its heads."""
    more = ("--epochs", 3, "--log-every", 2, "--batch-tokens", 21)
    real, calls = train_heads.head_backward, []

    def head_backward(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_heads, "head_backward", head_backward)
        trained(tmp_path, texts(), *more)
    return lambda: trained(tmp_path, texts(), *more, "--resume")[1]


def change(**changes):
    return lambda state: state.update(changes)


def optimizer(**changes):
    return lambda state: state["optimizer"]["state"][0].update(changes)


def group(**changes):
    return lambda state: state["optimizer"]["param_groups"][0].update(changes)


@pytest.mark.parametrize("damage", [
    *(change(step=step) for step in ("5", 5.0, None, 10 ** 9, -1, 0, 12, True)),
    *(change(threads=threads) for threads in (10 ** 6, 0, "all")), change(heads={}), change(settings={}),
    change(optimizer=1), optimizer(exp_avg=torch.zeros(3)), optimizer(exp_avg_sq=torch.tensor(math.nan)),
    optimizer(step="5"),
    group(betas=(5, -1)), group(betas="x"), group(eps=None), lambda state: state.pop("threads"),
    lambda state: state["heads"]["0.0.linear.weight"].fill_(math.nan)])
def test_a_checkpoint_that_was_changed_is_not_resumed(damage, stopped, tmp_path):
    path, threads = tmp_path / "checkpoint.pt", torch.get_num_threads()
    state = torch.load(path, weights_only=True)
    damage(state)
    torch.save(state, path)
    with pytest.raises(UserError, match="can't read .*checkpoint.pt: .*damaged, or of another version: delete it"):
        stopped()
    assert torch.get_num_threads() == threads


def test_nor_one_with_a_wrong_byte(stopped, tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for part in (b"", whole[:1], whole[:-1], whole[:-32], whole + b"x", whole[:5000] + b"x" + whole[5001:]):
        path.write_bytes(part)
        with pytest.raises(UserError, match="can't read .*checkpoint.pt"):
            stopped()
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        stopped()
    path.rmdir()
    path.write_bytes(whole)
    assert stopped()


@pytest.mark.parametrize("damage", [
    lambda lines: b"garbage", lambda lines: b"", lambda lines: None, lambda lines: lines[:-9],
    lambda lines: b"{}\nnull\n3\n",
    lambda lines: b"\xff\xfe" + lines, lambda lines: lines + b"\n \n[]", lambda lines: b"[" * 10 ** 5 + b"\n" + lines,
    lambda lines: b'{"step": "2"}\n{"step": null}\n{"step": 1e3}\n{"step": true}\n' + lines])
def test_metrics_are_a_log_and_no_obstacle(damage, stopped, tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    damaged = damage(before)
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    heads = stopped()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    kept = [2, 4, 6] if damaged and before in damaged else []
    if damaged and (damaged in before or damaged.startswith(b"\xff")):           # one line is cut
        kept = [2, 4] if damaged in before else [4, 6]
    assert steps == [*kept, 8, 10, 12]
    whole = trained(tmp_path / "whole", texts(), "--epochs", 3, "--log-every", 2, "--batch-tokens", 21)[1]
    assert all(torch.equal(t, heads.state_dict()[n]) for n, t in whole.state_dict().items())


@pytest.mark.parametrize("token_map", [None, torch.arange(2, 9)], ids=["all", "map"])
def test_a_head_without_a_label_is_named_and_has_no_figures(token_map, tmp_path, capfd):
    """Documents of bos and three tokens: the third head would guess a fifth. Or that one can't be drafted."""
    documents = [text([3, 4, 5]), text([6, 7, 8])] if token_map is None else [text([3, 4, 5, 9]), text([6, 7, 8, 10])]
    model = tiny_llama()
    heads = tiny_heads(model, 3, token_map=token_map)
    before = [p.clone() for p in heads[2].parameters()]
    train(model, heads, documents, options(tmp_path, "--epochs", 2, "--log-every", 1))
    assert "no label for head 3 in steps 1 to 2, so it learned nothing: give longer texts" in capfd.readouterr().err
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert line["head_loss"][2] is None and line["loss"] > 0 and min(line["head_loss"][:2]) > 0
        if token_map is None:
            assert line["top1"][2] is line["top5"][2] is None and line["top1"][0] is not None
    assert all(torch.equal(a, b) for a, b in zip(heads[2].parameters(), before, strict=True))
    figures = evaluate(model, heads, documents, 100)[0]
    assert figures["head_loss"][2] is None and min(figures["head_loss"][:2]) > 0
    assert [top is None for top in figures["top"]] == [False, False, token_map is None]
    result = {"out": "h", "kind": "medusa", "parameters": 1, "sampled": [], "temperature": 0.0, "acceptance": {
        "nodes": 1, "tokens_per_step": 1, "depth_reach": [], "node_reach": {}}}
    assert ("   3      -  \n" in report(result | figures)) == (token_map is None)
    train(model, heads, [*documents, text([3, 4, 5, 6, 7])], options(tmp_path, "--epochs", 1))
    assert "no label" not in capfd.readouterr().err
