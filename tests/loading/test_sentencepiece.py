"""tokenizer.model read by ourselves against the sentencepiece library: the same ids, the same text."""
import random
import struct
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiny_llama
from tokenizers import AddedToken

from llama import LlamaConfig
from loading import sentencepiece as ours
from loading.files import UserError
from loading.tokenizer import Tokenizer

sys.path.append(str(ROOT / "benchmarks"))
from tokenizer import HARD, differences, random_texts  # noqa: E402

library = pytest.importorskip("sentencepiece", reason="development requirement; test_hub.py reads the file without it")
NORMAL, USER_DEFINED = ours.NORMAL, ours.USER_DEFINED
SMALL = ROOT / "tests" / "small.model"      # trained on benchmarks/openings.txt by the library, as Llama's rules are
OPENINGS = (ROOT / "benchmarks" / "openings.txt").read_text(encoding="utf-8").splitlines()
WORDS = " ".join(OPENINGS).split()


def train(path, **options) -> Path:
    library.SentencePieceTrainer.Train(
        sentence_iterator=iter(OPENINGS), model_prefix=str(path.with_suffix("")), vocab_size=700, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, num_threads=1, minloglevel=2, **options)
    return path


def field(number: int, value) -> bytes:
    """A field of a protobuf message: a whole number, a float, or a text or message."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    key, size = number << 3 | 2 * isinstance(value, bytes), value if isinstance(value, int) else len(value)
    varints = b"".join(bytes([v & 127 | 128] * (v > 127) + [v >> 7 or v][:1 + (v > 127)]) for v in (key, size))
    return varints + (value if isinstance(value, bytes) else b"")


def written(path, pieces: dict, prefix=1, tidy=0) -> Path:
    """A BPE without a table of characters: pieces (name → score, type) behind the unknown one, bos and eos."""
    pieces = {"<unk>": (0, ours.UNKNOWN), "<s>": (0, ours.CONTROL), "</s>": (0, ours.CONTROL)} | pieces
    rows = [field(1, field(1, name) + field(2, float(score)) + field(3, kind))
            for name, (score, kind) in pieces.items()]
    path.write_bytes(b"".join(rows) + field(2, field(3, 2)) + field(3, field(3, prefix) + field(4, tidy)))
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


def test_equal_scores_are_joined_from_the_left(tmp_path):
    path = written(tmp_path / "ties.model", dict.fromkeys([*"zqx▁", "zqx", "qx", "zq", "xz"], (0, NORMAL)))
    backend, _ = ours.read(path)
    assert backend.encode("zqxz", add_special_tokens=False).tokens == ["▁", "zqx", "z"]
    assert differences(path, ["zqxz", "xzqxzqx"]) == []


@pytest.mark.parametrize("seed", range(12))
def test_random_pieces_scores_and_user_defined_ones(seed, tmp_path):
    """Few letters, pieces of any score, many equal: every text meets ties, and pieces that overlap."""
    rng = random.Random(seed)
    some = lambda n, most: {"".join(rng.choices("ab▁c", k=rng.randint(2, most))) for _ in range(n)}
    pieces = {letter: (-9, NORMAL) for letter in "ab▁"} | {p: (rng.randint(-3, 0), NORMAL) for p in some(25, 5)}
    pieces |= {p: (rng.randint(-3, 0), USER_DEFINED) for p in some(seed % 3 * 2, 3)}
    path = written(tmp_path / "random.model", pieces, prefix=seed % 2, tidy=seed // 2 % 2)
    judge, (backend, before) = library.SentencePieceProcessor(model_file=str(path)), ours.read(path)
    for text in ("".join(rng.choices("aab bcdé▁", k=rng.randint(1, 30))) for _ in range(150)):
        assert backend.encode(before(text), add_special_tokens=False).ids == judge.encode(text), text


@pytest.mark.parametrize("options", [{}, {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}])
def test_user_defined_pieces(options, tmp_path):
    """Whole wherever they stand in the text, and what a rule would replace in them stays."""
    symbols = ["<extra>", "<extra>s", "ﬁx", "㍿", "\n\n", "_x_"]
    path = train(tmp_path / "tokenizer.model", user_defined_symbols=symbols, **options)
    texts = ["a<extra>sb <extra> ﬁx ﬁ ㍿㍿", "\n\n\n_x_ _x_x_", *symbols]
    assert differences(path, texts + [a + b for a in HARD[:14] for b in symbols]) == []
    assert ours.read(path, [AddedToken("Ａ")])[1]("Ａ ﬁ").startswith("Ａ ")         # nor in an added token
    assert 6 in Tokenizer(tmp_path, LlamaConfig()).encode("a㍿")


def test_spaces_beside_added_tokens_are_at_the_ends_of_texts(tmp_path):
    path = written(tmp_path / "tidy.model", dict.fromkeys([*"▁ab", "▁a", "▁b"], (0, NORMAL)), tidy=1)
    judge, (backend, _) = library.SentencePieceProcessor(model_file=str(path)), ours.read(path, [AddedToken("<x>")])
    for part in ("  a  b  ", " b", "a "):
        ids = judge.encode(part)
        assert backend.encode(f"{part}<x>{part}").ids == [*ids, 8, *ids]


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
    written(tmp_path / "tokenizer.model", {"a": (0, NORMAL), "b": (0, ours.UNUSED)})
    with pytest.raises(UserError, match="unused pieces"):
        Tokenizer(tmp_path, tiny_llama(vocab_size=700).config)


def test_every_character_is_replaced_as_the_library_does(tmp_path):
    """All of Unicode a character at a time, and pairs with a mark behind, through the library's widest rule."""
    path = train(tmp_path / "kind.model", normalization_rule_name="nfkc_cf", remove_extra_whitespaces=False,
                 add_dummy_prefix=False)
    judge, (_, before) = library.SentencePieceProcessor(model_file=str(path)), ours.read(path)
    everything = [chr(c) for c in range(1, 0x110000) if not 0xd800 <= c < 0xe000]
    for text in ("".join(everything), "".join(c + "\u1dd2" for c in everything[:0x3000])):
        assert judge.normalize(text).replace("▁", " ") == before(text).replace("▁", " ")
