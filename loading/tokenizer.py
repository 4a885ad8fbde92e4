"""Text to ids and back, streaming included, through the `tokenizers` library, from the files that HF reads."""
import hashlib
import re
from contextlib import contextmanager
from itertools import groupby
from os.path import commonprefix
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from loading import sentencepiece
from loading.files import UserError, locate, read_json

# the tokens that a configuration names, in the order in which new ones get ids; what a file says of a token
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LLAMA = {"legacy": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}     # defaults of HF's class
HALF = "\N{REPLACEMENT CHARACTER}"      # what bytes decode to that are no whole character

class Tokenizer:
    """`tokenizer.json`, else SentencePiece's `tokenizer.model`, and what HF reads beside it. bos: the ids in front of
    every text. settings: tokenizer_config.json. special: "bos_token", "eos_token", .. → the token's text."""
    def __init__(self, name_or_path, config, revision=None):
        def beside(name: str) -> dict:
            path = locate(name_or_path, name, revision, required=False)
            return read_json(path) if path else {}
        path = locate(name_or_path, "tokenizer.json", revision, required=False) \
            or locate(name_or_path, "tokenizer.model", revision, required=False) \
            or locate(name_or_path, "tokenizer.json", revision)
        model, settings = beside("config.json"), beside("tokenizer_config.json")
        old = {} if "added_tokens_decoder" in settings else beside("special_tokens_map.json")       # as HF reads it
        name = str(settings.get("tokenizer_class") or model.get("tokenizer_class") or "llama")
        self.before = lambda text: text     # what is done to a text before the library's part
        with self.reading(f"can't read the tokenizer {path}"):
            of_class = name.removesuffix("Fast") == "LlamaTokenizer" and model.get("model_type") != "mistral" \
                and b'"ByteLevel"' not in path.read_bytes()
            settings = (LLAMA if of_class else {"legacy": True}) | settings
            named = {key: token for key, token in (dict.fromkeys(NAMED) | settings | old).items()
                     if key.endswith("_token") and isinstance(token, str | dict) and token != {}}
            self.settings, self.special = settings, {key: text_of(token) for key, token in named.items()}
            if path.suffix == ".model":
                added = added_tokens(settings, old, named, beside, {}, {})
                self.backend, self.before = sentencepiece.read(path, added, settings["legacy"])
            else:
                backend = Backend.from_file(str(path))
                self.backend = as_llama(backend, settings) if of_class else backend
                in_file, kept = (b.get_added_tokens_decoder() for b in (backend, self.backend))
                self.backend.add_tokens(added_tokens(settings, old, named, beside, in_file, kept))
            if self.backend.decoder and b"ByteFallback" in self.backend.decoder.__getstate__():
                self.backend.decoder = decoders.Decoder.custom(ByteByByte(self.backend.decoder))
        self.backend.no_truncation()        # what a training run may have left in the file
        self.backend.no_padding()
        self.path, self.vocab_size, self.eos = path, config.vocab_size, list(config.eos_token_ids)
        self.size = min(self.backend.get_vocab_size(), config.vocab_size)
        with self.reading(f"{path} can't encode"):
            encoded = self.backend.encode("a")
        self.bos, self.unwritten = encoded.ids[:[*encoded.sequence_ids, 0].index(0)], []
        told, llama = settings.get("add_bos_token"), "llama" in name.lower()
        if path.suffix == ".json":
            told = bool(told and llama)     # as in HF, other classes leave it to the file
        if not self.bos and (llama if told is None else told):
            bos = self.backend.token_to_id(self.special.get("bos_token") or "<s>")
            if bos is None and config.bos_token_id in self.backend.get_added_tokens_decoder():
                bos = config.bos_token_id
            self.bos = self.unwritten = [] if bos is None else [bos]

    @staticmethod
    @contextmanager
    def reading(doing: str):
        """The library raises bare Exceptions, and a panic of its Rust is not even one."""
        try:
            yield
        except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            raise UserError(f"{doing}: {error}") from error

    def sha256(self) -> str:
        """Of its file: token files tell by it which tokenizer wrote them."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def encode_batch(self, texts: list[str], bos: bool = True) -> list[list[int]]:
        """Ids of each text, bos first."""
        with self.reading(f"{self.path} can't encode this text"):
            texts = list(map(self.before, texts))
            encoded = [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=bos)]
        encoded = [self.unwritten + ids for ids in encoded] if bos else encoded
        largest = max((max(ids, default=0) for ids in encoded), default=0)
        if largest >= self.vocab_size:
            raise UserError(f"{self.path} has the id {largest}, the model only {self.vocab_size} entries: "
                            "they don't belong together")
        return encoded

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids) -> str:
        with self.reading(f"{self.path} can't decode"):
            return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, prompt_ids):
        """A function (new ids, end) → the text they add to what it returned before, never half a character: that waits
        for the rest, or for the end. Text is decoded with what precedes it, so that a leading space is kept."""
        before, pending = self.tail(list(prompt_ids)), []
        def add(new_ids, end=False) -> str:
            nonlocal before, pending
            pending = pending + list(new_ids)
            text = self.decode(before + pending)
            if not pending or text.endswith(HALF) and not end:
                return ""
            known = commonprefix([text, self.decode(before)])       # less than `before`, if that ends with a half
            before, pending = self.tail(before + pending), []
            return text[len(known):]
        return add

    def tail(self, ids: list) -> list:
        """The last ids, from one on whose text is seen and begins with a whole character: ids behind them decode as
        behind all."""
        for start in range(len(ids) - 1, 0, -1):
            text = self.decode(ids[start:start + 1])
            if text and not text.startswith(HALF):
                return ids[start:]
        return ids

class ByteByByte:
    """A decoder for the library that replaces each byte that is of no character, as SentencePiece does. The library's
    own replaces all bytes beside it, too: characters that were whole before the next one was cut."""
    def __init__(self, decoder):
        self.decoder = decoder

    def decode_chain(self, tokens: list[str]) -> list[str]:
        found = []
        for is_byte, run in groupby(tokens, lambda token: bool(re.fullmatch("<0x[0-9A-Fa-f]{2}>", token))):
            if is_byte:
                text = bytes(int(token[3:5], 16) for token in run).decode("utf-8", "surrogateescape")
                run = [re.sub("[\udc80-\udcff]", HALF, text)]
            found += run
        return [self.decoder.decode(found)]

def as_llama(backend: Backend, settings: dict) -> Backend:
    """HF's class for Llama: of a tokenizer.json it takes the vocabulary, the merges and the post-processor alone."""
    model, prefix = backend.model, settings.get("add_prefix_space") is not False
    if not isinstance(model, models.BPE):
        return backend
    model.unk_token, model.fuse_unk, model.byte_fallback, model.ignore_merges = None, True, True, False
    plain = Backend(model)
    scheme = ("always" if settings["legacy"] else "first") if prefix else "never"
    plain.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", int(prefix), 0)])
    plain.post_processor = backend.post_processor
    return plain

def text_of(token) -> str:
    return token["content"] if isinstance(token, dict) else token

def as_token(token, **flags) -> AddedToken:
    """A special token as a file writes it: its text, or that and flags."""
    given = {flag: token[flag] for flag in FLAGS if flag in token} if isinstance(token, dict) else {}
    return AddedToken(text_of(token), **{"special": True} | given | flags)

def added_tokens(settings: dict, old: dict, named: dict, beside, in_file: dict, kept: dict) -> list[AddedToken]:
    """The tokens that HF adds to a vocabulary, in the order in which new ones get ids: those of tokenizer_config.json's
    added_tokens_decoder, or else of the older files; then those that have a name. old: special_tokens_map.json.
    in_file: tokenizer.json's own, by id; kept: those of them that stand already."""
    named = list(filter(None, named.values()))
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named, extra = (named + list(extra.values()), []) if isinstance(extra, dict) else (named, extra)
    names = {text_of(token) for token in named}
    if "added_tokens_decoder" not in settings:
        special = names.union(map(text_of, extra))
        tokens = {i: AddedToken(text, special=text in special) for text, i in beside("added_tokens.json").items()}
        tokens |= in_file
    else:
        tokens = {int(i): as_token({"special": False} | token) for i, token in settings["added_tokens_decoder"].items()}
    for token in tokens.values():
        token.special = token.special or token.content in names
    others = [as_token(token, special=True) for token in named]
    others += map(as_token, extra or old.get("additional_special_tokens") or [])
    known = {token.content for token in (*tokens.values(), *kept.values())}
    return [tokens[i] for i in sorted(tokens)] + [token for token in others if token.content not in known]
