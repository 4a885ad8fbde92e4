"""Texts, conversations and token files: what goes in comes out, other readers can read it, nothing half passes."""
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS, byte_tokenizer

from llama import LlamaConfig
from loading import documents, files
from loading.documents import (
    Document,
    Partial,
    beside,
    conversations,
    document,
    openings_of,
    prompts_of,
    read_tokens,
    texts,
    write_tokens,
)
from loading.files import UserError
from loading.tokenizer import Tokenizer

STORIES = ["A dog.\nIt was happy.\n\nThe end.", "Once upon a time", "é ü 你好"]


@pytest.fixture
def tokenizer(tmp_path):
    byte_tokenizer(tmp_path / "tokenizer.json")
    return Tokenizer(tmp_path, LlamaConfig(vocab_size=300))


def learned(*ids):
    return document((list(ids), True))


def ids_of(documents):
    return [d.ids.tolist() for d in documents]


# -------------------------------------------------------------------------------------------------------- documents

def test_documents_are_cut_and_joined():
    one, two = document(([1, 5], False), ([6, 7], True)), document(([1], False), ([8, 2], [False, True]))
    joined = Document.joined([one, two])
    assert joined.ids.tolist() == [1, 5, 6, 7, 1, 8, 2]
    assert joined.loss.tolist() == [False, False, True, True, False, False, True]
    assert joined.starts.nonzero()[0].tolist() == [0, 4] and len(joined) == 7
    part = joined[3:6]
    assert (part.ids.tolist(), part.loss.tolist(), part.starts.tolist()) == (
        [7, 1, 8], [True, False, False], [False, True, False])
    assert joined[1:3].starts.tolist() == [False, False] and Document([3, 4], True).loss.tolist() == [True, True]


# ------------------------------------------------------------------------------------------------------ token files

def test_documents_to_a_file_and_back(tmp_path, tokenizer):
    two = [learned(1, 299, 2), document(([1], False), ([4, 2], True))]
    facts = write_tokens(tmp_path / "a.bin", two, tokenizer, 300, {"text": "s"})
    assert facts == json.loads((tmp_path / "a.bin.json").read_text()) and facts["dtype"] == "uint16"
    assert facts["documents"] == 2 and facts["tokens"] == 6 and facts["loss_tokens"] == 5
    assert facts["source"] == {"text": "s"}
    assert facts["tokenizer_sha256"] == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    read = read_tokens(tmp_path / "a.bin", tokenizer)
    assert ids_of(read) == [[1, 299, 2], [1, 4, 2]]
    assert [d.loss.tolist() for d in read] == [[True] * 3, [False, True, True]]
    assert all(d.starts.tolist() == [True, False, False] for d in read)
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.json", "a.bin", "a.bin.loss", "a.bin.starts",
                                                    "a.bin.json"}


def test_a_token_file_is_what_nanogpts_readers_expect(tmp_path, tokenizer):
    """np.memmap(FILE, np.uint16) is the ids and nothing else; loss and starts are plain arrays, too."""
    encoded = [tokenizer.encode(story) + [2] for story in STORIES]
    write_tokens(tmp_path / "a.bin", [document((ids[:1], False), (ids[1:], True)) for ids in encoded], tokenizer,
                 300, {})
    ids = np.memmap(tmp_path / "a.bin", dtype=np.uint16, mode="r")
    assert ids.tolist() == sum(encoded, [])
    assert tokenizer.decode(ids.tolist()) == "".join(STORIES)
    loss, starts = np.fromfile(tmp_path / "a.bin.loss", np.uint8), np.fromfile(tmp_path / "a.bin.starts", np.uint64)
    assert loss.tolist() == [int(i > 0) for ids in encoded for i in range(len(ids))]
    assert starts.tolist() == [0, len(encoded[0]), len(encoded[0]) + len(encoded[1])]
    for begin, story in zip(starts.tolist(), STORIES, strict=True):
        end = begin + ids[begin:].tolist().index(2)
        assert ids[begin] == 1 and tokenizer.decode(ids[begin:end].tolist()) == story


@pytest.mark.parametrize("vocab_size, dtype", [(300, np.uint16), (65536, np.uint16), (65537, np.uint32),
                                               (128256, np.uint32)])
def test_ids_that_16_bits_do_not_hold_take_32(vocab_size, dtype, tmp_path, tokenizer):
    tokenizer.size = vocab_size
    ids = [[1, vocab_size - 1, 2], [0, vocab_size - 2]]
    facts = write_tokens(tmp_path / "a.bin", [learned(*i) for i in ids], tokenizer, vocab_size, {})
    assert facts["dtype"] == np.dtype(dtype).name
    assert np.memmap(tmp_path / "a.bin", dtype, "r").tolist() == sum(ids, [])
    assert (tmp_path / "a.bin").stat().st_size == 5 * np.dtype(dtype).itemsize
    assert ids_of(read_tokens(tmp_path / "a.bin", tokenizer)) == ids


def test_documents_need_no_bos(tmp_path):
    """A tokenizer without bos, texts cut without eos: FILE.starts says where a document begins."""
    byte_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path, LlamaConfig(vocab_size=300, bos_token_id=None))
    three = [[5, 6, 7], [8, 2, 9, 2], [4]]
    write_tokens(tmp_path / "a.bin", (learned(*ids) for ids in three), tokenizer, 300, {})
    assert ids_of(read_tokens(tmp_path / "a.bin", tokenizer)) == three


def test_an_interrupted_run_leaves_nothing_that_passes_for_whole(tmp_path, tokenizer, monkeypatch):
    def interrupted():
        yield learned(1, 5, 2)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "a.bin", interrupted(), tokenizer, 300, {})
    assert not list(tmp_path.glob("*a.bin*"))
    write_tokens(tmp_path / "a.bin", [learned(1, 5, 2)], tokenizer, 300, {})
    with pytest.raises(KeyboardInterrupt):                                       # the old file is still whole
        write_tokens(tmp_path / "a.bin", interrupted(), tokenizer, 300, {})
    assert len(read_tokens(tmp_path / "a.bin", tokenizer)) == 1
    monkeypatch.setattr(documents, "write_json", lambda *a: list(interrupted()))
    with pytest.raises(KeyboardInterrupt):                                       # just before the JSON is written
        write_tokens(tmp_path / "a.bin", [learned(1, 7, 2)], tokenizer, 300, {})
    with pytest.raises(UserError, match="was the preparation of"):
        read_tokens(tmp_path / "a.bin", tokenizer)


@pytest.mark.parametrize("old", [True, False], ids=["over an old file", "anew"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("renames", range(4))
def test_ctrl_c_between_the_renames(renames, moment, old, tmp_path, tokenizer, monkeypatch):
    """Four files, four renames: whichever of them Ctrl-C comes before or after, only all four pass for whole."""
    if old:                                                                      # of the very same sizes
        write_tokens(tmp_path / "a.bin", [learned(1, 5), learned(6, 7, 2)], tokenizer, 300, {})
    replace, done = os.replace, []

    def interrupted(source, target):
        if moment == "before" and len(done) == renames:
            raise KeyboardInterrupt
        replace(source, target)
        done.append(Path(target).name)
        if moment == "after" and len(done) == renames + 1:
            raise KeyboardInterrupt
    new = [learned(1, 8, 9), document(([3], False), ([2], True))]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "replace", interrupted)
        write_tokens(tmp_path / "a.bin", new, tokenizer, 300, {})
    assert done == ["a.bin", "a.bin.loss", "a.bin.starts", "a.bin.json"][:renames + (moment == "after")]
    assert not list(tmp_path.glob(".tmp*"))
    if len(done) == 4:
        assert ids_of(read_tokens(tmp_path / "a.bin", tokenizer)) == [[1, 8, 9], [3, 2]]
    else:
        with pytest.raises(UserError, match="no token file|was the preparation of"):
            read_tokens(tmp_path / "a.bin", tokenizer)
        write_tokens(tmp_path / "a.bin", new, tokenizer, 300, {})                # and what is left harms nobody
        assert ids_of(read_tokens(tmp_path / "a.bin", tokenizer)) == [[1, 8, 9], [3, 2]]


@pytest.mark.parametrize("suffix", ["", ".loss", ".starts"])
def test_files_of_two_runs_are_not_one(suffix, tmp_path, tokenizer):
    """Two runs that write the same file at once may mix; sizes and counts alike, the digest tells."""
    write_tokens(tmp_path / "a.bin", [learned(1, 5), document(([6], False), ([7, 2], True))], tokenizer, 300, {})
    write_tokens(tmp_path / "b.bin", [document(([1], False), ([8, 9], True)), learned(3, 2)], tokenizer, 300, {})
    a, b = (beside(tmp_path / name)[("", ".loss", ".starts").index(suffix)] for name in ("a.bin", "b.bin"))
    assert a.stat().st_size == b.stat().st_size and a.read_bytes() != b.read_bytes()
    a.write_bytes(b.read_bytes())
    with pytest.raises(UserError, match="a.bin is not what a.bin.json says: prepare it again"):
        read_tokens(tmp_path / "a.bin", tokenizer)


def test_an_old_packed_file_is_refused_in_one_line(tmp_path, tokenizer):
    """What earlier versions wrote: FILE of entries 4 * id + 2 * start + loss, and FILE.json, nothing else."""
    packed = np.array([4 * 1 + 2, 4 * 5 + 1, 4 * 2 + 1], np.uint16).tobytes()
    (tmp_path / "a.bin").write_bytes(packed)
    (tmp_path / "a.bin.json").write_text(json.dumps({
        "dtype": "uint16", "documents": 1, "tokens": 3, "loss_tokens": 2, "sha256": hashlib.sha256(packed).hexdigest(),
        "tokenizer_sha256": tokenizer.sha256(), "source": {}}))
    with pytest.raises(UserError) as error:
        read_tokens(tmp_path / "a.bin", tokenizer)
    assert str(error.value) == f"{tmp_path / 'a.bin.json'}: not a token file of this version: prepare it again"
    write_tokens(tmp_path / "a.bin", [learned(1, 5, 2)], tokenizer, 300, {})     # written over, it is a new one
    assert ids_of(read_tokens(tmp_path / "a.bin", tokenizer)) == [[1, 5, 2]]


def edit(path, **change):
    facts = path.with_name("a.bin.json")
    facts.write_text(json.dumps(json.loads(facts.read_text()) | change))


def starts(path, *values):
    np.array(values, np.uint64).tofile(f"{path}.starts")


@pytest.mark.parametrize("damage, says", [
    (lambda f: f.unlink(), "no token file"),
    (lambda f: f.with_name("a.bin.json").unlink(), "was the preparation of"),
    (lambda f: f.write_bytes(f.read_bytes()[:-2]), "has 8 bytes, a.bin.json says 10"),
    (lambda f: f.with_name("a.bin.loss").write_bytes(b"\1"), "a.bin.loss has 1 bytes, a.bin.json says 5"),
    (lambda f: starts(f, 0), "a.bin.starts has 8 bytes, a.bin.json says 16"),
    (lambda f: f.with_name("a.bin.loss").unlink(), "not a token file of this version"),
    (lambda f: f.with_name("a.bin.starts").unlink(), "not a token file of this version"),
    (lambda f: f.with_name("a.bin.json").write_text('{"dtype": "uint16"}'), "not a token file of this version"),
    (lambda f: edit(f, tokens=None), "not a token file of this version"),
    (lambda f: edit(f, documents=None), "not a token file of this version"),
    (lambda f: f.write_bytes(b"\1\0\0\5\2\0\1\0\2\0"), "holds the id 1280, the tokenizer only 300"),
    (lambda f: f.write_bytes(b"\1\0\0\1\2\0\1\0\2\0"), "a.bin is not what a.bin.json says: prepare it again"),
    (lambda f: f.with_name("a.bin.loss").write_bytes(b"\1\0\1\1\1"), "a.bin is not what a.bin.json says"),
    (lambda f: starts(f, 0, 2), "a.bin is not what a.bin.json says"),
    (lambda f: starts(f, 1, 3), "a.bin is not what a.bin.json says"),
    (lambda f: starts(f, 3, 0), "a.bin is not what a.bin.json says"),
    (lambda f: starts(f, 0, 2 ** 64 - 1), "a.bin is not what a.bin.json says"),
    (lambda f: byte_tokenizer(f.with_name("tokenizer.json"), 280), "written with another tokenizer"),
])
def test_damaged_files_are_refused(tmp_path, tokenizer, damage, says):
    write_tokens(tmp_path / "a.bin", [learned(1, 5, 2), learned(1, 2)], tokenizer, 300, {})
    damage(tmp_path / "a.bin")
    with pytest.raises(UserError) as error:
        read_tokens(tmp_path / "a.bin", tokenizer)
    assert says in str(error.value)


def test_nothing_to_write(tmp_path, tokenizer):
    for nothing in ([], [document(([1, 5], False))]):
        with pytest.raises(UserError, match="holds no text"):
            write_tokens(tmp_path / "a.bin", nothing, tokenizer, 300, {})
        assert not list(tmp_path.glob("*a.bin*"))


# ---------------------------------------------------------------------------------------------------------- sources

def test_texts(tmp_path):
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(["", *STORIES, "  \n "]), encoding="utf-8")
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps({"text": s, "id": 3}) for s in [*STORIES, " "]) + "\n\n")
    assert list(texts(tmp_path / "s.txt", "<|endoftext|>")) == STORIES
    assert list(texts(tmp_path / "s.jsonl", "-")) == STORIES


def test_a_text_without_separators_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BATCH", 50)
    (tmp_path / "novel.txt").write_text("one line of it\n" * 20 + "x" * 170)
    pieces = list(texts(tmp_path / "novel.txt", "<|endoftext|>"))
    assert max(map(len, pieces)) <= 64 and "".join(pieces).replace("\n", "") == "one line of it" * 20 + "x" * 170


def test_conversations():
    """In the sample: a leading gpt turn, an unanswered question at the end, turns out of order, one without a round."""
    dropped = Counter()
    talks = list(conversations(TESTS / "sharegpt.json", dropped))
    user, assistant = ([[m["content"] for m in talk if m["role"] == role] for talk in talks]
                       for role in ("user", "assistant"))
    rounds = [list(map(list, zip(*pair, strict=True))) for pair in zip(user, assistant, strict=True)]
    assert [len(r) for r in rounds] == [1, 2, 1, 1] and rounds[0] == [["Who are you?", "A small model."]]
    assert rounds[1][1] == ["And of four?", "Sixteen."] and rounds[2][0][0] == "Is a cat a dog?"
    assert [talk[0]["content"] for talk in talks if talk[0]["role"] == "system"] == ["Be brief."]
    assert dropped == {"out of turn or empty": 1 + 1 + 3 + 2}


def test_the_words_of_conversations(tmp_path):
    """ShareGPT's and OpenAI's, whatever the case; parts of text; what is left out is counted by its reason."""
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = lambda *roles: [{"from": role, "value": text} for role, text in zip(roles, "Sab", strict=True)]
    parts = [{"type": "text", "text": " a"}, {"type": "text", "text": "c "}]
    found = [{"conversations": turns("system", user, assistant)} for user, assistant in (
        ("human", "gpt"), ("user", "assistant"), ("Human", "GPT"), ("prompter", "chatgpt"), ("human", "bard"))]
    found += [{"messages": talk}, talk, {"messages": [{"role": "developer", "content": "S"}, *talk[1:]]},
              {"messages": [talk[1] | {"content": parts}, talk[2], *talk[1:]]}]
    other = [{"messages": [*talk, {"role": "user", "content": "x"}, {"role": "tool", "content": "y"}, *talk]},
             {"messages": [*talk, {"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}]
    (tmp_path / "a.JSON").write_text(json.dumps(found + other, indent=2))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(item) for item in found + other if item is not talk))
    for name, expected in (("a.JSON", [talk] * 8), ("a.jsonl", [talk] * 7)):
        dropped = Counter()
        *same, parted, tool, empty = conversations(tmp_path / name, dropped)
        assert same == expected and tool == empty == talk
        assert [m["content"] for m in parted] == ["a\nc", "b", "a", "b"]
        assert dropped == {"of the role 'tool'": 1, "out of turn or empty": 1 + 3 + 2}
    for content in (5, [{"type": "image_url", "image_url": "x"}]):
        (tmp_path / "b.json").write_text(json.dumps([{"messages": [{"role": "user", "content": content}]}]))
        with pytest.raises(UserError, match="item 0: the content .* is neither text nor a list of text parts"):
            list(conversations(tmp_path / "b.json", Counter()))


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.JSON", "p.JSONL", "p.Json", "p.ndjson"])
@pytest.mark.parametrize("layout", ["lines", "a list", "a list over lines"])
def test_prompts_of_a_json_file(name, layout, tmp_path):
    """Lines or a list, whatever the suffix says and in whatever case."""
    messages = [{"role": "user", "content": "q", "name": "n"}]
    values = ["once ", {"prompt": " the dog"}, {"messages": messages}, {"prompt": messages}, "é 你", "once"]
    text = {"lines": "\n".join(map(json.dumps, values)) + "\n\n", "a list": json.dumps(values),
            "a list over lines": "\ufeff" + json.dumps(values, indent=2, ensure_ascii=False)}[layout]
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert prompts_of(tmp_path / name) == ["once ", " the dog", messages, messages, "é 你", "once"]
    assert openings_of(tmp_path / name) == ["once", "the dog", messages, "é 你"]


@pytest.mark.parametrize("text, says", [
    ('"a"\n{"x": 1}', 'line 2: expected a string or an object with a "prompt"'), ("[1]", "item 0: expected a string"),
    ('{"messages": []}', "line 1: expected"), ('{"messages": ["x"]}', "line 1: expected"),
    ('{"messages": [{"content": "x"}]}', "line 1: expected"), ("[]", "holds no prompt"), ("", "is not valid JSON"),
    ('{"messages": [{"role": "user", "content": [5]}]}', "line 1: the content"), ('"a"\n{', "line 2 is not valid"),
    ("{", "is not valid JSON"), ("[" * 10 ** 5, "is not valid JSON")])
def test_bad_prompts_are_named(text, says, tmp_path):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=says):
        prompts_of(tmp_path / "p.jsonl")


def test_half_characters_and_odd_separators(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}')
    assert list(texts(tmp_path / "a.jsonl", "-")) == ["a \N{REPLACEMENT CHARACTER} b"]
    (tmp_path / "a.json").write_text(
        '[{"conversations": [{"from": "human", "value": "\\udc00"}, {"from": "gpt", "value": "b"}]}]')
    talk, = conversations(tmp_path / "a.json", Counter())
    assert [m["content"] for m in talk] == ["\N{REPLACEMENT CHARACTER}", "b"]
    (tmp_path / "a.txt").write_text("one\n --- \ntwo")
    assert list(texts(tmp_path / "a.txt", " --- ")) == ["one", "two"]


# ------------------------------------------------------------------------------------------------------ partial files

def kept(path, source, contents):
    return {key: ids.tolist() for key, ids in Partial(path, source, contents).texts.items()}


def test_what_a_stopped_run_keeps(tmp_path):
    """Whole lines only, whatever the end of the file looks like; what is added behind a torn line is whole again."""
    path, run = tmp_path / "a.bin", ({"limit": 9}, [[1, 2], "x"])
    assert kept(path, *run) == {} and not Partial(path, *run).path.exists()
    for key, ids in ((7, [4, 5]), (3, [6])):
        Partial(path, *run).add(0, key, ids)
    whole, lines = {(0, 7): [4, 5], (0, 3): [6]}, Partial(path, *run).path.read_bytes()
    assert kept(path, *run) == whole and lines.count(b"\n") == 2
    for torn in (b"\n", b"\n[", b"\n[1, 2", b"\n[1, 2, [3", b"\n[1, 2, [3]", b"\n" + bytes(9), b"\n5", b"\n[[], 1, []]",
                 b"\n\xff", b'\n[1, 2, ["x"]]', b"\n[1, 2, [%d]]" % 2 ** 70, b'\n{"a": 1}'):
        Partial(path, *run).path.write_bytes(lines + torn)
        assert kept(path, *run) == whole, torn
        Partial(path, *run).add(1, 3, [8, 9])
        assert kept(path, *run) == whole | {(1, 3): [8, 9]}, torn
    for other in (({"limit": 8}, run[1]), (run[0], [[1, 2], "y"])):
        with pytest.raises(UserError, match="a.bin.partial is left from a stopped run with other options"):
            Partial(path, *other)
    for end in range(len(lines)):                                                # no whole text, no partial file
        Partial(path, *run).path.write_bytes(lines[:end])
        assert kept(path, *run).items() <= whole.items()
        if not kept(path, *run):
            assert not Partial(path, {"limit": 8}, []).path.exists()
            Partial(path, *run).add(0, 7, [4, 5])
            assert kept(path, *run) == {(0, 7): [4, 5]}
