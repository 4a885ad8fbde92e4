"""tokenizer.model read by ourselves against the sentencepiece library: the same ids, the same text."""
import struct
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiny_llama

from llama import LlamaConfig
from loading import sentencepiece as ours
from loading.files import UserError
from loading.tokenizer import Tokenizer

sys.path.append(str(ROOT / "benchmarks"))
from tokenizer import HARD, differences, random_texts  # noqa: E402

library = pytest.importorskip("sentencepiece", reason="development requirement; test_hub.py reads the file without it")
SMALL = ROOT / "tests" / "small.model"      # trained on benchmarks/openings.txt by the library, as Llama's rules are
OPENINGS = (ROOT / "benchmarks" / "openings.txt").read_text(encoding="utf-8").splitlines()
WORDS = " ".join(OPENINGS).split()


def train(path, **options) -> Path:
    library.SentencePieceTrainer.Train(
        sentence_iterator=iter(OPENINGS), model_prefix=str(path.with_suffix("")), vocab_size=700, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, num_threads=1, minloglevel=2, **options)
    return path


# names of the library's rules of normalisation: Llama's, TinyLLama-v0's and the library's default, and others
KINDS = {
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "tinyllama": {"normalization_rule_name": "identity"},
    "default": {},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf"},
    "no prefix": {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "no prefix, tidy": {"add_dummy_prefix": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_library(kind, tmp_path):
    path = train(tmp_path / "kind.model", **KINDS[kind])
    assert differences(path, HARD + OPENINGS[:50] + random_texts(WORDS, 400)) == []


def test_the_committed_file():
    assert differences(SMALL, HARD + OPENINGS + random_texts(WORDS, 400, seed=1)) == []


def test_documents_begin_with_bos_and_pieces_stream(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(SMALL.read_bytes())
    tokenizer = Tokenizer(tmp_path, LlamaConfig(vocab_size=700, hidden_size=8, num_attention_heads=1))
    judge = library.SentencePieceProcessor(model_file=str(SMALL))
    for text in ("Once upon a time", "a<s>b", "  two"):
        assert tokenizer.encode(text) == [1, *judge.encode(text)]
        assert tokenizer.decode([1, *judge.encode(text), 2]) == judge.decode(judge.encode(text))
    for text in ("a naïve 你好 🦊🦊 dog", "  two  spaces"):
        ids, stream = judge.encode(text), tokenizer.stream(tokenizer.encode("Once"))
        pieces = [stream([i]) for i in ids]
        assert not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)
        assert "".join(pieces) + stream([], end=True) == " " + text


@pytest.mark.parametrize("damage, says", [
    (lambda data: b"", "not a SentencePiece model"),
    (lambda data: b"nonsense", "field|wire|not a SentencePiece|ends early"),
    (lambda data: data[:len(data) // 2], "ends early|not a SentencePiece"),
    (lambda data: data + b"\x08" + b"\xff" * 1000, "a number has more than ten bytes"),
    (lambda data: data + b"\x0a\xd3\x0f" + b"\x0a\xd0\x0f" + b"x" * 2000, "pieces of more than 1024 characters"),
])
def test_damaged_files(damage, says, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(damage(SMALL.read_bytes()))
    with pytest.raises(UserError, match=f"can't read the tokenizer .*({says})"):
        Tokenizer(tmp_path, tiny_llama(vocab_size=700).config)


def test_a_table_that_runs_in_circles():
    with pytest.raises(ValueError, match="runs in circles"):
        ours.charsmap(struct.pack("<3I", 8, 0, 1 | 1 << 10))        # behind byte 1 stands where byte 1 does


def test_other_kinds_are_refused(tmp_path):
    library.SentencePieceTrainer.Train(sentence_iterator=iter(OPENINGS), model_prefix=str(tmp_path / "tokenizer"),
                                       vocab_size=200, model_type="unigram", num_threads=1, minloglevel=2)
    with pytest.raises(UserError, match="its model is not BPE"):
        Tokenizer(tmp_path, tiny_llama(vocab_size=700).config)
    train(tmp_path / "tokenizer.model", user_defined_symbols=["<extra>"])
    with pytest.raises(UserError, match="user-defined pieces"):
        Tokenizer(tmp_path, tiny_llama(vocab_size=700).config)


def test_every_character_is_replaced_as_the_library_does(tmp_path):
    """All of Unicode a character at a time, and pairs with a mark behind, through the library's widest rule."""
    path = train(tmp_path / "kind.model", normalization_rule_name="nfkc_cf", remove_extra_whitespaces=False,
                 add_dummy_prefix=False)
    judge, (_, before) = library.SentencePieceProcessor(model_file=str(path)), ours.read(path)
    everything = [chr(c) for c in range(1, 0x110000) if not 0xd800 <= c < 0xe000]
    for text in ("".join(everything), "".join(c + "\u1dd2" for c in everything[:0x3000])):
        assert judge.normalize(text).replace("▁", " ") == before(text).replace("▁", " ")
