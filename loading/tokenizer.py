"""Text to ids and back, streaming included, through the `tokenizers` library."""
import hashlib
from contextlib import contextmanager
from loading import sentencepiece
from loading.files import UserError, locate, read_json

class Tokenizer:
    """`tokenizer.json`, else SentencePiece's `tokenizer.model`; Llama's texts start with bos."""
    def __init__(self, name_or_path, config, revision=None):
        from tokenizers import Tokenizer as Backend
        path = locate(name_or_path, "tokenizer.json", revision, required=False) \
            or locate(name_or_path, "tokenizer.model", revision, required=False) \
            or locate(name_or_path, "tokenizer.json", revision)
        self.before = lambda text: text     # what is done to a text before the library's part
        with self.reading(f"can't read the tokenizer {path}"):
            if path.suffix == ".model":
                self.backend, self.before = sentencepiece.read(path)
            else:
                self.backend = Backend.from_file(str(path))
        self.backend.no_truncation()        # what a training run may have left in the file
        self.backend.no_padding()
        settings = locate(name_or_path, "tokenizer_config.json", revision, required=False)
        settings = read_json(settings) if settings else {}
        add_bos = settings.get("add_bos_token")
        if add_bos is None:                 # as in HF: Llama's own classes add it, others leave it to the file
            add_bos = str(settings.get("tokenizer_class", "Llama")).startswith("Llama")
        self.bos = [config.bos_token_id] if add_bos and config.bos_token_id is not None else []
        self.eos = list(config.eos_token_ids)
        self.path, self.size, self.vocab_size = path, self.backend.get_vocab_size(), config.vocab_size
        if self.size > config.vocab_size:
            raise UserError(f"{path} has {self.size} entries, the model only {config.vocab_size}: "
                            "they don't belong together")

    @staticmethod
    @contextmanager
    def reading(doing: str):
        """The library raises bare Exceptions, and a panic of its Rust is not even one."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            raise UserError(f"{doing}: {error}") from error

    def sha256(self) -> str:
        """Of its file: token files tell by it which tokenizer wrote them."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, bos first (whether or not the file's own post-processor writes it)."""
        with self.reading(f"{self.path} can't encode this text"):
            encoded = [e.ids for e in self.backend.encode_batch_fast([self.before(text) for text in texts])]
        largest = max((max(ids, default=0) for ids in encoded), default=0)
        if largest >= self.vocab_size:
            raise UserError(f"{self.path} has the id {largest}, the model only {self.vocab_size} entries: "
                            "they don't belong together")
        return [ids if ids[:1] == self.bos else self.bos + ids for ids in encoded]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids) -> str:
        with self.reading(f"{self.path} can't decode"):
            return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, prompt_ids):
        """A function (new ids, end) → the text they add to what it returned before, never half a character: that waits
        for the rest, or for the end. Text is decoded with what precedes it, so that a leading space is kept."""
        before, pending = list(prompt_ids[-8:]), []
        def add(new_ids, end=False) -> str:
            nonlocal before, pending
            pending = pending + list(new_ids)
            text = self.decode(before + pending)
            if not pending or text.endswith("\N{REPLACEMENT CHARACTER}") and not end:
                return ""
            added, before, pending = text[len(self.decode(before)):], pending, []
            return added
        return add
