"""prepare_data.py: texts and conversations become token files; self-distilled text is the model's own."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TESTS, byte_tokenizer, tiny_heads, tiny_llama

import prepare_data
from llama import LlamaConfig
from loading.documents import read_tokens, texts, write_tokens
from loading.templates import SYSTEM
from loading.tokenizer import Tokenizer
from loading.trees import published_tree
from prepare_data import answered_anew, continuations, opening, rendered, tokenised
from tinymedusa import Decoder, PlainDecoder, Sampling, Tree
from variants import batches

SAMPLE = TESTS / "sharegpt.json"        # of our own writing


@pytest.fixture
def tokenizer(tmp_path):
    byte_tokenizer(tmp_path / "tokenizer.json")
    return Tokenizer(tmp_path, LlamaConfig(vocab_size=300))


def test_text_to_tokens_and_back(tmp_path, tokenizer):
    stories = ["A dog.\nIt was happy.\n\nThe end.", "Once upon a time", "é ü 你好"]
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(["", *stories, "  \n "]), encoding="utf-8")
    found = texts(tmp_path / "s.txt", "<|endoftext|>")
    facts = write_tokens(tmp_path / "s.bin", tokenised(found, tokenizer), tokenizer, 300, {"text": "s"})
    documents = read_tokens(tmp_path / "s.bin", tokenizer)
    assert [tokenizer.decode(d.ids) for d in documents] == stories
    assert all(d.ids[0] == 1 and d.ids[-1] == 2 and 1 not in d.ids[1:] for d in documents)
    assert all(d.loss.tolist() == [False] + [True] * (len(d) - 1) for d in documents)
    assert facts == json.loads((tmp_path / "s.bin.json").read_text()) and facts["dtype"] == "uint16"
    assert facts["documents"] == 3 and facts["tokens"] == sum(map(len, documents)) and facts["source"] == {"text": "s"}


def test_texts_are_encoded_in_batches_of_like_size(monkeypatch):
    monkeypatch.setattr(prepare_data, "BATCH", 50)
    assert [len(b) for b in prepare_data.of_like_size([30, 30, 60, 1, 1], lambda n: n)] == [2, 1, 2]


def test_special_tokens_in_a_text_are_text(tmp_path, tokenizer, cli, tiny_folder):
    """HTML's <s> must not begin a document, nor </s> end one."""
    (tmp_path / "s.txt").write_text("a <s> b </s> c\n<|endoftext|>\nd")
    cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "s.txt", "--out", tmp_path / "s.bin")
    documents = read_tokens(tmp_path / "s.bin", Tokenizer(tiny_folder, LlamaConfig(vocab_size=300)))
    assert [tokenizer.decode(d.ids) for d in documents] == ["a <s> b </s> c", "d"]


# --------------------------------------------------------------------------------------------------- conversations

def test_the_template_and_its_loss(tokenizer):
    """vicuna_v1.1 to the letter, and loss on the answers with their leading space and eos, on nothing else."""
    document, = rendered(iter([[["What is 2 squared?", "Four."], ["And of four?", "Sixteen <s>."]]]), tokenizer)
    ids, loss = document.ids, document.loss
    system = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
              "detailed, and polite answers to the user's questions.")
    assert tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False) == (
        f"<s>{system} USER: What is 2 squared? ASSISTANT: Four.</s>USER: And of four? ASSISTANT: Sixteen <s>.</s>")
    parts = np.split(ids, np.flatnonzero(np.diff(loss.astype(int))) + 1)
    assert [tokenizer.backend.decode(p.tolist(), skip_special_tokens=False) for p in parts] == [
        f"<s>{system} USER: What is 2 squared? ASSISTANT:", " Four.</s>", "USER: And of four? ASSISTANT:",
        " Sixteen <s>.</s>"]
    assert not loss[0] and loss[-1] and ids[0] == 1 and ids[-1] == 2


def test_the_originals_own_set(tiny_folder, tmp_path, cli):
    """The first five words are the human turn, the whole story the answer, five words and all."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "TinyStoriesV2-GPT4-train.txt").write_text(
        "Once upon a time there was a dog.\n<|endoftext|>\nThe end\n<|endoftext|>\nNot this one")
    (tmp_path / "hub" / "TinyStoriesV2-GPT4-valid.txt").write_text("A held out one")
    run = lambda *more: cli("prepare_data", "--model", tiny_folder, "--tinystories", tmp_path / "hub", "--out",
                            tmp_path / "o.bin", *more)
    assert run("--limit", 2, "--first-words", 5)[0] == 0
    tokenizer = Tokenizer(tiny_folder, LlamaConfig(vocab_size=300))
    decoded = [tokenizer.decode(d.ids) for d in read_tokens(tmp_path / "o.bin", tokenizer)]
    assert [d.partition("USER: ")[2] for d in decoded] == [
        "Once upon a time there ASSISTANT: Once upon a time there was a dog.", "The end ASSISTANT: The end"]
    assert run("--split", "validation")[0] == 0
    assert [tokenizer.decode(d.ids) for d in read_tokens(tmp_path / "o.bin", tokenizer)] == ["A held out one"]


@pytest.mark.parametrize("name, text, says", [
    ("a.jsonl", '{"text": "fine"}\n{"txt": "x"}\n', 'line 2: expected an object with a "text"'),
    ("a.jsonl", '{"text": "fine"}\n{"text": \n', "line 2 is not valid JSON"),
    ("a.json", "[1]", "item 0: expected {"),
    ("a.json", '{"conversations": [{"from": "human"}]}', "as in ShareGPT"),
    ("a.json", "[", "is not valid JSON"),
    ("a.json", "[]", "holds no text"),
])
def test_bad_sources_are_named(name, text, says, tiny_folder, tmp_path, cli):
    (tmp_path / name).write_text(text)
    option = "--text" if name.endswith("l") else "--sharegpt"
    status, out, err = cli("prepare_data", "--model", tiny_folder, option, tmp_path / name, "--out", tmp_path / "a.bin")
    assert status == 2 and says in err and "Traceback" not in err and not out and not list(tmp_path.glob("*a.bin*"))


def test_splits_and_limits(tiny_folder, tmp_path, cli):
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps({"text": f"story {i}"}) for i in range(120)))
    tokenizer = Tokenizer(tiny_folder, LlamaConfig(vocab_size=300))

    def numbers(*more):
        assert cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "s.jsonl", "--out", tmp_path / "s.bin",
                   *more)[0] == 0
        return [int(tokenizer.decode(d.ids).split()[1]) for d in read_tokens(tmp_path / "s.bin", tokenizer)]
    assert numbers("--split", "validation") == [0, 50, 100] and numbers("--limit", 3) == [0, 1, 2]
    train = numbers("--split", "train")
    assert len(train) == 117 and not {0, 50, 100} & set(train)


# ------------------------------------------------------------------------------------------------ self-distillation

def writer(model, temperature, heads=None, limit=30):
    decoder = PlainDecoder(model, Sampling(temperature))
    if heads is not None:
        decoder = Decoder(model, heads, Tree.from_paths(published_tree(len(heads))), Sampling(temperature))
    return lambda prompts, seeds: batches.generate(decoder, prompts, limit, seeds)


def written_alone(model, ids, temperature, seed, limit=30):
    steps = PlainDecoder(model, Sampling(temperature)).generate([ids], limit, [seed])
    return [t for step in steps for t in step[0]]


def with_loss(document):
    return list(zip(document.ids.tolist(), document.loss.tolist(), strict=True))


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("medusa", [False, True])
def test_self_distilled_text_is_what_each_opening_gives_alone(temperature, medusa):
    model = tiny_llama()
    openings = {5: [1, 4], 6: [1, 7, 8, 3, 5], 7: [1, 9, 9], 8: [1, 3, 3, 3], 19: [1, 6]}
    write = writer(model, temperature, tiny_heads(model) if medusa else None)
    documents = list(continuations(openings, write, batch_size=2))
    alone = []
    for seed, o in openings.items():
        new = written_alone(model, o, temperature, seed)
        alone.append([(t, False) for t in o] + [(t, True) for t in new])         # what the model wrote carries loss
    assert sorted(map(with_loss, documents)) == sorted(alone)


def test_conversations_answered_anew(tokenizer):
    """Slow definition: one conversation at a time, each question behind the model's own earlier answers."""
    model = tiny_llama(8, vocab_size=300, max_position_embeddings=700)
    talks = {3: [["hi", "x"], ["and now?", "y"]], 4: [["a longer question", "z"]],
             9: [["q", "x"], ["r", "x"], ["s", "x"]]}
    documents = list(answered_anew(talks, tokenizer, writer(model, 1.0, limit=200), 2, 700))
    expected = []
    for seed, rounds in talks.items():
        ids, loss = [1], [False]
        for i, (ask, _) in enumerate(rounds):
            text = (SYSTEM + " " if i == 0 else "") + f"USER: {ask} ASSISTANT:"
            asked = tokenizer.backend.encode(text, add_special_tokens=False).ids
            if len(ids) + len(asked) >= 700:
                break
            new = written_alone(model, ids + asked, 1.0, seed, 200)
            ids, loss = ids + asked + new, loss + [False] * len(asked) + [True] * len(new)
            if new[-1] != 2:
                break
        expected.append(list(zip(ids, loss, strict=True)))
    assert list(map(with_loss, documents)) == expected and len(set(map(len, expected))) == 3
    assert sum(d.count((2, True)) for d in expected) >= 3                             # several answers ended with eos


def test_openings_are_first_sentences():
    assert opening('"Hi!" said Tom. He ran.', 1) == '"Hi!"' and opening("One. Two.", 1) == "One."
    assert opening("no end here\nsecond line.", 1) == "no end here" and opening("x" * 300, 1) == "x" * 200
    assert opening("It cost 3.50 in all. Yes.", 1) == "It cost 3.50 in all."
    assert opening("One. Two! Three.", 2) == "One. Two!" and opening("One.\n\nTwo.", 2) == "One."


def test_the_commands(tiny_folder, tmp_path, cli):
    (tmp_path / "openings.txt").write_text("the dog\n\nonce upon\nthe dog\na time\n")
    (tmp_path / "stories.txt").write_text("the dog was happy. yes\n<|endoftext|>\nthe end\n<|endoftext|>\nmore\n")
    tokenizer = Tokenizer(tiny_folder, LlamaConfig(vocab_size=300))

    def run(*more):
        status, out, err = cli("prepare_data", "--model", tiny_folder, "--out", tmp_path / "d" / "o.bin", *more)
        assert status == 0, err
        return out, err, [tokenizer.decode(d.ids) for d in read_tokens(tmp_path / "d" / "o.bin", tokenizer)]
    out, err, written = run("--openings", tmp_path / "openings.txt", "--max-new-tokens", 9, "--temperature", 1)
    assert "3 documents" in out and "100%" in err                                # the doubled opening counts once
    assert all(d.startswith(("the dog", "once upon", "a time")) for d in written)
    assert run("--text", tmp_path / "stories.txt", "--limit", 2)[2] == ["the dog was happy. yes", "the end"]
    written = run("--text", tmp_path / "stories.txt", "--distill", "--max-new-tokens", 5)[2]
    assert len(written) == 3 and sum(d.startswith("the dog was happy.") for d in written) == 1
    facts = json.loads((tmp_path / "d" / "o.bin.json").read_text())
    assert facts["source"]["text"] == "stories.txt" and facts["source"]["distill"] and str(tmp_path) not in str(facts)
    model = tiny_llama(vocab_size=300, max_position_embeddings=512, dtype=torch.float32)
    model.save(tiny_folder)
    written = run("--sharegpt", SAMPLE, "--distill", "--max-new-tokens", 9)[2]
    assert len(written) == 4 and all("USER: " in d for d in written)


def test_several_processes_share_the_openings(tiny_folder, tmp_path, cli, monkeypatch):
    """Each has the very documents that one process alone would have written for its openings."""
    (tmp_path / "o.txt").write_text("".join(f"the dog {i}\n" for i in range(7)))
    tokenizer = Tokenizer(tiny_folder, LlamaConfig(vocab_size=300))
    run = lambda out: cli("prepare_data", "--model", tiny_folder, "--openings", tmp_path / "o.txt", "--out",
                          tmp_path / out, "--max-new-tokens", 12, "--temperature", 1, "--batch-size", 1)
    read = lambda name: list(map(with_loss, read_tokens(tmp_path / name, tokenizer)))
    assert run("alone.bin")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run("o.bin")[0] == 0
    first, second = read("o-00000-of-00002.bin"), read("o-00001-of-00002.bin")
    assert len(first) == 4 and len(second) == 3 and sorted(first + second) == sorted(read("alone.bin"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         str(ROOT / "prepare_data.py"), "--model", tiny_folder, "--text", tmp_path / "o.txt", "--separator", "-",
         "--out", tmp_path / "t.bin"], capture_output=True, text=True)
    assert done.returncode != 0 and "holds no text" in done.stderr               # one text for two processes
