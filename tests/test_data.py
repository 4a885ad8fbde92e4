"""Token files: what goes in comes out, nothing half-written passes; self-distilled text is the model's own."""
import json

import pytest
from conftest import byte_tokenizer, tiny_heads, tiny_llama

import prepare_data
from llama import LlamaConfig, Tokenizer, UserError
from prepare_data import read_tokens, self_distilled, texts_between, tokenised, write_tokens
from tinymedusa import Sampling, Tree, generate, published_tree


@pytest.fixture
def tokenizer(tmp_path):
    byte_tokenizer(tmp_path / "tokenizer.json")
    return Tokenizer(tmp_path, LlamaConfig(vocab_size=300))


def test_text_to_tokens_and_back(tmp_path, tokenizer):
    stories = ["A dog.\nIt was happy.\n\nThe end.", "Once upon a time", "é ü 你好"]
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(["", *stories, "  \n "]), encoding="utf-8")
    assert list(texts_between(tmp_path / "s.txt", "<|endoftext|>")) == stories
    documents = tokenised(iter(stories), tokenizer, batch_size=2)
    facts = write_tokens(tmp_path / "s.bin", documents, tokenizer, 300, {"text": "s"})
    documents = read_tokens(tmp_path / "s.bin", tokenizer)
    assert [tokenizer.decode(d) for d in documents] == stories
    assert all(d[0] == 1 and d[-1] == 2 and 1 not in d[1:] for d in documents)
    assert facts == json.loads((tmp_path / "s.bin.json").read_text()) and facts["dtype"] == "uint16"
    assert facts["documents"] == 3 and facts["tokens"] == sum(map(len, documents)) and facts["source"] == {"text": "s"}
    facts = write_tokens(tmp_path / "wide.bin", [[1, 299, 2], [1, 4, 2]], tokenizer, 80000, {})
    assert facts["dtype"] == "uint32" and (tmp_path / "wide.bin").stat().st_size == 4 * 6
    assert [d.tolist() for d in read_tokens(tmp_path / "wide.bin", tokenizer)] == [[1, 299, 2], [1, 4, 2]]


def test_an_interrupted_run_leaves_nothing_that_passes_for_whole(tmp_path, tokenizer, monkeypatch):
    def documents():
        yield [1, 5, 2]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "a.bin", documents(), tokenizer, 300, {})
    assert not list(tmp_path.glob("*a.bin*"))
    write_tokens(tmp_path / "a.bin", [[1, 5, 2]], tokenizer, 300, {})
    with pytest.raises(KeyboardInterrupt):                                       # the old file is still whole
        write_tokens(tmp_path / "a.bin", documents(), tokenizer, 300, {})
    assert len(read_tokens(tmp_path / "a.bin", tokenizer)) == 1
    monkeypatch.setattr(prepare_data, "write_json", lambda *a: list(documents()))
    with pytest.raises(KeyboardInterrupt):                                       # just before the JSON is written
        write_tokens(tmp_path / "a.bin", [[1, 7, 2]], tokenizer, 300, {})
    with pytest.raises(UserError, match="was the preparation of"):
        read_tokens(tmp_path / "a.bin", tokenizer)


def edit(path, **change):
    facts = path.with_name("a.bin.json")
    facts.write_text(json.dumps(json.loads(facts.read_text()) | change))


@pytest.mark.parametrize("damage, says", [
    (lambda f: f.unlink(), "no token file"),
    (lambda f: f.with_name("a.bin.json").unlink(), "was the preparation of"),
    (lambda f: f.write_bytes(f.read_bytes()[:-2]), "has 4 bytes, a.bin.json says 6"),
    (lambda f: f.with_name("a.bin.json").write_text('{"dtype": "float32"}'), "neither uint16 nor uint32"),
    (lambda f: edit(f, tokens=None), "tokens is None"),
    (lambda f: f.write_bytes(b"\1\0\0\5\2\0"), "holds the id 1280, the tokenizer only 300"),
    (lambda f: byte_tokenizer(f.with_name("tokenizer.json"), 280), "written with another tokenizer"),
])
def test_damaged_files_are_refused(tmp_path, tokenizer, damage, says):
    write_tokens(tmp_path / "a.bin", [[1, 5, 2]], tokenizer, 300, {})
    damage(tmp_path / "a.bin")
    with pytest.raises(UserError) as error:
        read_tokens(tmp_path / "a.bin", tokenizer)
    assert says in str(error.value)


def test_nothing_to_write(tmp_path, tokenizer):
    with pytest.raises(UserError, match="holds no text"):
        write_tokens(tmp_path / "a.bin", [], tokenizer, 300, {})
    assert not list(tmp_path.glob("*a.bin*"))


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("medusa", [False, True])
def test_self_distilled_text_is_what_each_opening_gives_alone(temperature, medusa):
    model = tiny_llama()
    heads = tiny_heads(model) if medusa else None
    tree = Tree.from_paths(published_tree(4), 4, 12) if medusa else None
    openings = [[1, 4], [1, 7, 8, 3, 5], [1, 9, 9], [1, 3, 3, 3], [1, 6]]
    documents = list(self_distilled(model, heads, tree, openings, 30, Sampling(temperature), 5, batch_size=2))
    alone = [o + [t for s in generate(model, [o], 30, sampling=Sampling(temperature), seeds=[5 + i]) for t in s[0]]
             for i, o in enumerate(openings)]
    assert sorted(documents) == sorted(alone)


def test_the_two_commands(tiny_folder, tmp_path, cli):
    (tmp_path / "openings.txt").write_text("the dog\n\nonce upon\nthe dog\na time\n")
    (tmp_path / "stories.txt").write_text("the dog was happy\n<|endoftext|>\nthe end\n<|endoftext|>\nmore\n")
    status, out, err = cli("prepare_data", "--model", tiny_folder, "--openings", tmp_path / "openings.txt", "--out",
                           tmp_path / "d" / "o.bin", "--max-new-tokens", 9, "--temperature", 1)
    assert status == 0 and "3 documents" in out and "100%" in err                # the doubled opening counts once
    status, out, _ = cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "stories.txt", "--limit", 2,
                         "--out", tmp_path / "t.bin")
    tokenizer = Tokenizer(tiny_folder, LlamaConfig(vocab_size=300))
    assert [tokenizer.decode(d) for d in read_tokens(tmp_path / "t.bin", tokenizer)] == ["the dog was happy", "the end"]
    assert status == 0 and all(tokenizer.decode(d).startswith(("the dog", "once upon", "a time"))
                               for d in read_tokens(tmp_path / "d" / "o.bin", tokenizer))
