"""What is trained on: texts, JSON lines, conversations, and the token files made of them.

A token file FILE is what nanoGPT's readers expect, the ids of all documents one behind the other as uint16 or uint32.
Beside it: FILE.loss, a byte per token, 1 where heads learn the token, 0 where it is a prompt or bos; FILE.starts, a
uint64 per document, where it begins; FILE.json, hashes, counts and source, written last: without it nothing is whole.
FILE.partial is what the model has written for FILE before a stop.
"""
import hashlib
import io
import json
import math
from collections import Counter
from contextlib import suppress
from itertools import chain, cycle, takewhile
from pathlib import Path
import numpy as np
from loading.files import LARGEST, UserError, opened, parsed, read_json, replacing, writable, write_json

BATCH = 2 ** 20         # characters tokenised at once, and the length at which a document is cut
ROLES = {name: role for role, names in {        # what a turn's role is called → what templates call it
    "system": "system developer", "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bard bing claude model bot"}.items() for name in names.split()}
HELD_OUT = 50           # every 50th document of a source without splits of its own is its validation split

class Document:
    """The ids of a document, or of several; which tokens carry loss; which begin a document. All of one length. hidden:
    the base model's hidden states [length, H], where they are kept. temperature: that the base model wrote it at."""
    def __init__(self, ids, loss, starts=None, hidden=None, temperature: float | None = None):
        self.ids, self.loss = np.asarray(ids), np.broadcast_to(np.asarray(loss, bool), len(ids))
        self.starts = np.arange(len(ids)) == 0 if starts is None else starts
        self.hidden, self.temperature = hidden, temperature

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Document":
        hidden = None if self.hidden is None else self.hidden[part]
        return Document(self.ids[part], self.loss[part], self.starts[part], hidden, self.temperature)

    @classmethod
    def joined(cls, documents: list) -> "Document":
        return cls(*(np.concatenate([getattr(d, name) for d in documents]) for name in ("ids", "loss", "starts")))

def document(*parts) -> Document:
    """One document of parts (ids, loss): loss is one value for all of them or one for each."""
    loss = [np.broadcast_to(np.asarray(loss, bool), len(ids)) for ids, loss in parts]
    return Document(np.concatenate([np.asarray(ids, np.int64) for ids, _ in parts]), np.concatenate(loss))

def beside(path) -> tuple[Path, Path, Path, Path]:
    return tuple(Path(f"{path}{suffix}") for suffix in ("", ".loss", ".starts", ".json"))

def write_tokens(path, documents, tokenizer, vocab_size: int, source: dict) -> dict:
    """Stream documents to `path` and the files beside it, under temporary names until whole → the facts."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: --out names a file")
    dtype = np.uint16 if vocab_size <= 2 ** 16 else np.uint32
    counts, digest = {"documents": 0, "tokens": 0, "loss_tokens": 0}, hashlib.sha256()
    *files, facts = beside(path)
    old_facts = writable(facts)
    with replacing(*files) as temporary:
        with open(temporary[0], "wb") as ids, open(temporary[1], "wb") as loss, open(temporary[2], "wb") as starts:
            for document in filter(len, documents):         # an empty one would begin where the next one does
                written = document.ids.astype(dtype).tobytes(), document.loss.astype(np.uint8).tobytes()
                ids.write(written[0])
                loss.write(written[1])
                starts.write(np.uint64(counts["tokens"]).tobytes())
                digest.update(b"".join(written))
                counts["documents"] += 1
                counts["tokens"] += len(document)
                counts["loss_tokens"] += int(document.loss.sum())
        if not counts["loss_tokens"]:
            raise UserError(f"{path}: nothing to write, the source holds no text")
        old_facts.unlink(missing_ok=True)      # from here to write_json there is no whole token file
    data = {"dtype": np.dtype(dtype).name, **counts, "sha256": digest.hexdigest(),
            "tokenizer_sha256": tokenizer.sha256(), "source": source}
    write_json(facts, data)
    return data

class Partial:
    """FILE.partial: a line about the run, then one for each text that the model has finished, appended at once. The run
    of the same source and contents goes on after a stop; a line cut short counts as none, its text is written again."""
    def __init__(self, path, source: dict, contents):
        digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        self.path, self.header, self.texts = Path(f"{path}.partial"), json.dumps(source | {"contents": digest}), {}
        file = writable(self.path)
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
        for line in lines[1:]:
            with suppress(ValueError, TypeError, OverflowError):
                turn, key, ids = json.loads(line)
                self.texts[turn, key] = np.array(ids, np.int32)
        if lines and lines[0] != self.header and (self.texts or not self.header.startswith(lines[0])):
            raise UserError(f"{self.path} is left from a stopped run with other options, files or another model: "
                            "run that command again, or delete it")
        if not self.texts:                          # stopped while the first line was written
            file.unlink(missing_ok=True)

    def add(self, turn: int, key: int, ids: list) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(("" if file.tell() else self.header) + f"\n{json.dumps([turn, key, ids])}")
        self.texts[turn, key] = np.array(ids, np.int32)

def read_tokens(path, tokenizer) -> list[Document]:
    """The documents of a token file, as views of the mapped files. Raises UserError: no such file, not whole, damaged,
    of an older version, or written with another tokenizer."""
    path, loss_file, starts_file, facts = beside(path)
    if not path.is_file():
        raise UserError(f"no token file {path}: make one with prepare_data.py")
    if not facts.is_file():
        raise UserError(f"{facts} is missing: was the preparation of {path} interrupted? Run prepare_data.py again")
    data = read_json(facts)
    tokens, documents = (data.get(key) if type(data.get(key)) is int else 0 for key in ("tokens", "documents"))
    if data.get("dtype") not in ("uint16", "uint32") or not data.get("sha256") or not tokens or not documents \
            or not loss_file.is_file() or not starts_file.is_file() or not isinstance(data.get("source", {}), dict):
        raise UserError(f"{facts}: not a token file of this version: prepare it again")
    if data.get("tokenizer_sha256") != tokenizer.sha256():
        raise UserError(f"{path} was written with another tokenizer than {tokenizer.path}: prepare it for this model")
    for file, number, dtype in ((path, tokens, data["dtype"]), (loss_file, tokens, "uint8"),
                                (starts_file, documents, "uint64")):
        expected, size = number * np.dtype(dtype).itemsize, file.stat().st_size
        if size != expected:
            raise UserError(f"{file} has {size} bytes, {facts.name} says {expected}: prepare it again")
    ids, loss = np.memmap(path, data["dtype"], "r"), np.memmap(loss_file, "uint8", "r")
    if ids.max() >= tokenizer.size:
        raise UserError(f"{path} holds the id {ids.max()}, the tokenizer only {tokenizer.size}: prepare it again")
    starts = np.fromfile(starts_file, np.uint64).tolist()
    spans, digest = list(zip(starts, [*starts[1:], tokens], strict=True)), hashlib.sha256()
    if starts[0] == 0 and all(begin < end for begin, end in spans):
        for begin, end in spans:
            digest.update(ids[begin:end].tobytes() + loss[begin:end].tobytes())
    if digest.hexdigest() != data["sha256"]:        # two runs that wrote it at once, for one
        raise UserError(f"{path} is not what {facts.name} says: prepare it again")
    source = data.get("source", {})
    temperature = source.get("temperature", 0.0) if source.get("distill") or source.get("openings") else None
    if temperature is not None and not (type(temperature) in (int, float) and 0 <= temperature < 1e30):
        raise UserError(f"{facts}: the temperature {temperature!r} is not a number from 0 on: prepare it again")
    return [Document(ids[begin:end], loss[begin:end], temperature=temperature) for begin, end in spans]

def read_lines(path, most: float = LARGEST, longest: int = LARGEST):
    """The lines of a UTF-8 text file of at most `most` characters, streamed; one longer than `longest` in pieces."""
    read = 0
    try:
        with io.TextIOWrapper(opened(path), encoding="utf-8-sig") as file:
            while line := file.readline(longest):
                read += len(line)
                if read > most:
                    raise UserError(f"{path} holds more than {most / 1e6:.0f} million characters: give a part of it")
                yield line
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error

def is_json(path) -> bool:
    return Path(path).suffix.lower() in (".json", ".jsonl", ".ndjson")

def json_lines(path):
    """(place, value) of each line of JSON lines, or each item of one value that is a list, whatever the suffix says."""
    numbered = enumerate(read_lines(path, math.inf), 1)
    lines = ((f"{path}, line {i}", line) for i, line in numbered if line.strip())
    first = next(lines, (str(path), ""))
    try:
        read = parsed(*first)
    except UserError:                               # one value over several lines, or a broken line
        text = first[1]
        for _, line in lines:
            text += line
            if len(text) > 4 * LARGEST:
                raise
        first, lines, read = (str(path), text), (), parsed(str(path), text)
    others = ((place, parsed(place, line)) for place, line in lines)
    for place, value in chain([(first[0], read)], others):
        if isinstance(value, list):
            yield from ((f"{path}, item {i}", item) for i, item in enumerate(value))
        else:
            yield place, value

def mended(text: str) -> str:
    """Without half a character, which JSON may hold where a text was cut: it is replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def texts(path, separator: str):
    """The texts of a file, streamed, stripped, empty ones skipped; one longer than BATCH characters comes in pieces. A
    JSON file has a "text" in each item; in any other the texts are between lines that hold only the separator."""
    found = text_fields(path) if is_json(path) else texts_between(path, separator.strip())
    for text in found:
        if text := mended(text).strip():
            yield from (text[i:i + BATCH] for i in range(0, len(text), BATCH))

def texts_between(path, separator: str):
    lines, size = [], 0
    for line in chain(read_lines(path, math.inf, BATCH), [separator]):
        if line.strip() != separator:
            lines.append(line)
            size += len(line)
        if line.strip() == separator or size > BATCH:
            yield "".join(lines)
            lines, size = [], 0

def text_fields(path):
    for place, value in json_lines(path):
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise UserError(f'{place}: expected an object with a "text" (conversations go to --sharegpt)')
        yield value["text"]

def text_of(content, place: str) -> str:
    """A message's content, which may be a list of parts, as text."""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise UserError(f"{place}: the content {str(content)[:80]!r} is neither text nor a list of text parts")
    return mended(content or "")

def conversations(path, dropped: Counter):
    """ShareGPT's conversations or OpenAI's messages → lists of messages, stripped: a system message where there is one,
    then user and assistant in turn; without an answer there is none. What else precedes the first user is left out, as
    is all from the first turn on that is out of turn, empty or of another role. dropped: these turns by reason."""
    for place, item in json_lines(path):
        turns = item.get("conversations", item.get("messages")) if isinstance(item, dict) else item
        well_formed = isinstance(turns, list) and all(
            isinstance(t, dict) and isinstance(t.get("from", t.get("role")), str) and ("value" in t or "from" not in t)
            for t in turns)
        if not well_formed:
            raise UserError(f'{place}: expected {{"conversations": [{{"from": .., "value": ..}}, ..]}} as in ShareGPT, '
                            'or {"messages": [{"role": .., "content": ..}, ..]}')
        roles = [t.get("from", t.get("role")) for t in turns]
        contents = [text_of(t.get("value", t.get("content")), place).strip() for t in turns]
        found = [{"role": ROLES.get(role.lower(), role), "content": content}
                 for role, content in zip(roles, contents, strict=True)]
        talk = in_turn(found)
        kept = {id(m) for m in talk}
        dropped.update("out of turn or empty" if m["role"] in ROLES.values() else f"of the role {m['role']!r}"
                       for m in found if id(m) not in kept)
        if talk:
            yield talk

def in_turn(messages: list) -> list:
    start = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
    system = [m for m in messages[:start] if m["role"] == "system" and m["content"]][:1]
    pairs = zip(messages[start:], cycle(("user", "assistant")))
    talk = [m for m, _ in takewhile(lambda pair: pair[0]["role"] == pair[1] and pair[0]["content"], pairs)]
    return system + talk[:len(talk) // 2 * 2] if len(talk) > 1 else []

def prompts_in(path):
    """The prompts of a file: its lines that are not empty; of a JSON file texts, or objects with a "prompt" or with
    "messages", which are lists of objects with a "role"."""
    if not is_json(path):
        yield from (line.rstrip("\r\n") for line in read_lines(path) if line.strip())
        return
    for place, value in json_lines(path):
        prompt = value.get("messages", value.get("prompt")) if isinstance(value, dict) else value
        if isinstance(prompt, list) and prompt and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt):
            yield [m | ({"content": text_of(m["content"], place)} if m.get("content") else {}) for m in prompt]
        elif isinstance(prompt, str):
            yield mended(prompt)
        else:
            raise UserError(f'{place}: expected a string or an object with a "prompt", or with "messages": '
                            '[{"role": .., "content": ..}, ..]')

def openings_of(path) -> list[str | list]:
    """The prompts of a file, texts stripped, each once."""
    found = (prompt.strip() if isinstance(prompt, str) else prompt for prompt in prompts_in(path))
    return list({json.dumps(prompt): prompt for prompt in found if prompt}.values())

def prompts_of(path) -> list[str | list]:
    """The prompts of a file, which may be messages. UserError: it has none."""
    if found := list(prompts_in(path)):
        return found
    raise UserError(f"{path} holds no prompt: write one a line")
