"""The files of a tokenizer as people have them, against transformers and sentencepiece: the same ids, the same text."""
import random
import shutil
import sys
from os.path import commonprefix

import pytest
from conftest import ROOT, TESTS, byte_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors

from llama import LlamaConfig
from loading import sentencepiece
from loading.files import UserError, write_json
from loading.tokenizer import Tokenizer

sys.path.append(str(ROOT / "benchmarks"))
from tokenizer import HARD, random_texts  # noqa: E402

SMALL, CONFIG = TESTS / "small.model", LlamaConfig(vocab_size=900)
WORDS = (ROOT / "benchmarks" / "openings.txt").read_text(encoding="utf-8").split()
BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def token(content: str, **flags) -> dict:
    return dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False) | flags | {
        "content": content}


def byte_level(folder):
    byte_tokenizer(folder / "tokenizer.json", 400)


def no_bos(folder):
    backend = byte_tokenizer(folder / "tokenizer.json", 400)
    backend.post_processor = processors.TemplateProcessing(single="$A")
    backend.save(str(folder / "tokenizer.json"))


def converted(folder):
    """small.model as a tokenizer.json with byte fallback, as Llama 2's is; its scores are all different."""
    model = sentencepiece.fields(SMALL.read_bytes())
    names = [sentencepiece.fields(piece)[1][0].decode() for piece in model[1]]
    ids = {name: i for i, name in enumerate(names)}
    merges = [(name[:i], name[i:]) for name in names[259:] for i in range(1, len(name))
              if name[:i] in ids and name[i:] in ids]
    backend = Backend(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.post_processor = BOS
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))


def as_model(folder):
    shutil.copy(SMALL, folder / "tokenizer.model")


LISTED = {
    "400": token("<|im_start|>", special=True), "401": token("<l>", lstrip=True), "404": token("<w>", single_word=True),
    "402": token("<n> x", normalized=True), "403": token("<r>", rstrip=True, special=True)}
FILES = {       # name of a file → what it holds
    "nothing else": {},
    "listed": {"tokenizer_config": {"added_tokens_decoder": LISTED, "bos_token": "<s>", "pad_token": "[PAD]"}},
    "listed, the older files are not read": {
        "tokenizer_config": {"added_tokens_decoder": LISTED, "extra_special_tokens": ["<plain>"], "eos_token": "<l>"},
        "special_tokens_map": {"pad_token": "[PAD]"}, "added_tokens": {"[PAD]": 405}},
    "the older files": {
        "added_tokens": {"<l>": 401, "<|im_start|>": 400, "<r>": 402}, "tokenizer_config": {"eos_token": "</s>"},
        "special_tokens_map": {
            "pad_token": token("[PAD]", rstrip=True), "eos_token": token("<|im_start|>", lstrip=True),
            "additional_special_tokens": ["<plain>", "<r>"]}},
    "names": {"tokenizer_config": {"additional_special_tokens": ["<plain>", "<w>"], "pad_token": "[PAD]",
                                   "image_token": "<r>", "add_bos_token": False, "legacy": True}},
    "names as objects": {"tokenizer_config": {
        "bos_token": {"__type": "AddedToken", **token("<s>")}, "extra_special_tokens": {"image_token": "<plain>"},
        "pad_token": {"__type": "AddedToken", **token("[PAD]", lstrip=True)}, "legacy": None}},
    "mistral": {"config": {"model_type": "mistral"}, "added_tokens": {"<|im_start|>": 400}},
    "no prefix": {"tokenizer_config": {"add_prefix_space": False, "legacy": False}}}
CLASSES = [None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "LLaMATokenizer"]
SPECIAL = ["<|im_start|>", "<l>", "<n> x", "<r>", "<w>", "<plain>", "[PAD]", "<s>", "</s>", "<unk>"]


def texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    plain = rng.sample(HARD, 12) + random_texts(WORDS, 8, seed)
    return plain + ["".join(rng.choice([rng.choice(plain), rng.choice(SPECIAL), " ", " hi"]) for _ in range(6))
                    for _ in range(30)]


def folder_of(tmp_path, build, files: dict, kind=None):
    build(tmp_path)
    for name, data in ({"config": {"model_type": "llama"}} | files).items():
        extra = {"tokenizer_class": kind} if kind and name == "tokenizer_config" else {}
        write_json(tmp_path / f"{name}.json", data | extra)
    if kind and "tokenizer_config" not in files:
        write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": kind})
    return tmp_path


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("build", [byte_level, converted])
def test_a_tokenizer_json_is_read_as_transformers_reads_it(build, files, tmp_path):
    transformers = pytest.importorskip("transformers")
    for i, kind in enumerate(CLASSES):
        folder = folder_of(tmp_path, build, FILES[files], kind)
        judge, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder, CONFIG)
        for text in texts(i):
            ids = judge(text).input_ids
            assert ours.encode(text) == ids, (kind, text)
            assert ours.decode(ids) == judge.decode(ids, skip_special_tokens=True), (kind, text)
        assert ours.bos == judge("").input_ids == [1]


LEGACY = [({}, True), ({"tokenizer_class": "LlamaTokenizer"}, False), ({"tokenizer_class": "LLaMATokenizer"}, True),
          ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, True)]


@pytest.mark.parametrize("settings, legacy", LEGACY)
@pytest.mark.parametrize("listed", [True, False])
def test_a_sentencepiece_model_with_added_tokens(listed, settings, legacy, tmp_path):
    """Each part between them as sentencepiece encodes it; "legacy": with a space in front that is not written."""
    library = pytest.importorskip("sentencepiece")
    no_prefix = b"\x1a\x02\x18\x00"       # a second NormalizerSpec, which counts: add_dummy_prefix false
    judge, bare = (library.SentencePieceProcessor(model_proto=SMALL.read_bytes() + more) for more in (b"", no_prefix))
    files = {"tokenizer_config": settings, "added_tokens": {"<x>": 701, "<|im_start|>": 700}}
    if listed:
        files = {"tokenizer_config": settings | {"added_tokens_decoder": {
            "701": token("<x>"), "700": token("<|im_start|>", special=True)}}}
    tokenizer = Tokenizer(folder_of(tmp_path, as_model, files), CONFIG)
    behind = judge if legacy else bare
    assert tokenizer.encode("a day<|im_start|>user\nhi 你<x> b</s>") == [
        1, *judge.encode("a day"), 700, *behind.encode("user\nhi 你"), 701, *behind.encode(" b"), 2]
    assert tokenizer.encode("<x>user") == [1, 701, *behind.encode("user")]
    shown = "user<x>" if listed else "<|im_start|> user<x>"
    assert tokenizer.decode([1, 700, *judge.encode("user"), 701, 2]) == shown


def of_class(name, **more):
    return {"tokenizer_config": {"tokenizer_class": name} | more}


@pytest.mark.parametrize("build, files, bos", [
    (byte_level, of_class("PreTrainedTokenizerFast"), [1]),             # as Llama 3
    (no_bos, of_class("PreTrainedTokenizerFast", bos_token="<s>"), []), # as SmolLM2
    (no_bos, of_class("LlamaTokenizerFast", bos_token="</s>", add_bos_token=True), [2]),
    (as_model, {}, [1]), (as_model, of_class("LLaMATokenizer"), [1]), (as_model, of_class(None, bos_token="</s>"), [2]),
    (as_model, of_class(None, bos_token=token("</s>")), [2]), (as_model, of_class("PreTrainedTokenizerFast"), []),
    (as_model, of_class("LlamaTokenizer", add_bos_token=False), []),
    (as_model, {"special_tokens_map": {"bos_token": token("</s>")}}, [2])])
def test_bos_is_the_tokenizers_own_and_comes_once(build, files, bos, tmp_path):
    """Llama 1's config.json says that bos is 0."""
    folder = folder_of(tmp_path, build, files | {"config": {"bos_token_id": 0, "eos_token_id": 1}})
    tokenizer = Tokenizer(folder, LlamaConfig(vocab_size=900, bos_token_id=0))
    assert tokenizer.bos == tokenizer.encode("") == bos
    assert tokenizer.encode("Once") == bos + tokenizer.backend.encode("Once", add_special_tokens=False).ids


PLACES = ["爿" * 9, "a naïve 你好 🦊🦊 dog", "  two  spaces \N{REPLACEMENT CHARACTER} and 爿 ", "🦊", "  爿  🦊\n"]


@pytest.mark.parametrize("build", [byte_level, converted, as_model])
def test_streamed_text_is_the_text_at_every_split(build, tmp_path):
    """Prompts and ids that begin or end inside a character, special tokens and stray bytes between them."""
    tokenizer = Tokenizer(folder_of(tmp_path, build, {"added_tokens": {"<x>": 700}}), CONFIG)
    rng, stray = random.Random(0), tokenizer.encode("爿")[-1]
    for text in PLACES * 3:
        ids = tokenizer.encode(text)
        for more in rng.choice([[], [[stray], [2] * 10, [1], [2], [stray]]]):
            at = rng.randint(0, len(ids))
            ids[at:at] = more
        for start in range(len(ids)):
            end = rng.randint(start, len(ids))
            stream, pieces, at = tokenizer.stream(ids[:start]), [], start
            while at < end:
                at, begin = min(end, at + rng.choice([1, 1, 2, 9])), at
                pieces.append(stream(ids[begin:at]))
            before, whole = tokenizer.decode(ids[:start]), tokenizer.decode(ids[:end])
            added = whole[len(commonprefix([before, whole])):]
            assert "".join(pieces) + stream([], end=True) == added, (text, start, end)
            assert not any(p.endswith("\N{REPLACEMENT CHARACTER}") for p in pieces)


@pytest.mark.parametrize("build", [converted, as_model])
def test_a_cut_character_leaves_the_whole_ones_before_it(build, tmp_path):
    library = pytest.importorskip("sentencepiece")
    judge = library.SentencePieceProcessor(model_file=str(SMALL))
    tokenizer = Tokenizer(folder_of(tmp_path, build, {}), CONFIG)
    prompt, ids = tokenizer.encode("爿" * 4), tokenizer.encode("爿" * 5)
    assert tokenizer.stream(prompt)(ids[len(prompt):], True) == "爿"
    assert tokenizer.stream(ids[:-1])(ids[-1:], True) == "爿"
    for text in ("爿" * 3, "🦊爿a"):
        ids = judge.encode(text)
        for end in range(len(ids)):
            assert tokenizer.decode(ids[:end]) == judge.decode(ids[:end])


@pytest.mark.parametrize("name, data, says", [
    ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken file.*give the tokenizer.json"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "can't read the tokenizer"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "can't read the tokenizer"),
    ("special_tokens_map.json", b'{"pad_token": {"id": 3}}', "can't read the tokenizer"),
    ("added_tokens.json", b'{"a": "b", "c": 1}', "can't read the tokenizer"),
    ("added_tokens.json", b"[]", "expected an object")])
def test_files_beside_that_are_damaged(name, data, says, tmp_path):
    as_model(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        Tokenizer(tmp_path, CONFIG)
    assert "\n" not in str(error.value)
