"""SentencePiece's `tokenizer.model`, a protobuf (sentencepiece_model.proto) → a tokenizer of the `tokenizers` library
that gives the same ids and text. The merges are our own: a list of merges can't say "of equal scores the leftmost"."""
import re
import struct
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from tokenizers import AddedToken, Regex, Token, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6     # the types of a piece
MOST_KEYS, LONGEST_KEY = 500_000, 256   # of a table of characters, with their beginnings: the library's has 264,182
LONGEST_PIECE = 1024        # characters. Trained with default settings: 16

def fields(data: bytes) -> dict[int, list]:
    """One protobuf message: field number → its values: int, bytes (text, messages) or 4 or 8 raw bytes (floats)."""
    found, at = defaultdict(list), 0
    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value
            if shift >= 70:
                raise ValueError("a number has more than ten bytes")
    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            found[number].append(varint())
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"field {number} has wire type {wire}")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise ValueError("the file ends early")
        found[number].append(data[at:at + size])
        at += size
    return found

class Pieces:
    """A pre-tokenizer for the library that leaves its model nothing to do: a text's pieces as SentencePiece finds them.
    whole: the user-defined pieces, which are never merged. prefix: whether a text, and whether each part of it behind
    an added token, begins with a space that is not written."""
    def __init__(self, ids: dict[str, int], scores: dict[str, float], whole: list[str], unknown: str, prefix: tuple):
        self.ids, self.scores, self.unknown, self.prefix = ids, scores, unknown, prefix
        self.whole = re.compile(f"({either(whole)})")
        self.neighbours = {a + b for piece in scores for a, b in pairwise(piece)}       # no others are ever merged
        self.merged = lru_cache(2 ** 15)(self.merged)

    def pre_tokenize(self, text) -> None:
        text.split(self.prefixed)
        text.tokenize(self.tokens)

    def prefixed(self, index: int, part) -> list:
        if self.prefix[index > 0]:
            part.prepend("▁")
        return [part]

    def tokens(self, text: str) -> list[Token]:
        """Ids and places (in bytes): what is no piece becomes its bytes, in a model without them one unknown piece."""
        found, end = [], 0
        for piece in self.pieces(text):
            start, end = end, end + len(piece.encode())
            if piece in self.ids:
                found.append(Token(self.ids[piece], piece, (start, end)))
            elif "<0x00>" in self.ids:
                names = map("<0x{:02X}>".format, piece.encode())
                found += [Token(self.ids[name], name, (start, end)) for name in names]
            else:
                if found and found[-1].value == self.unknown:
                    start = found.pop().offsets[0]
                found.append(Token(self.ids[self.unknown], self.unknown, (start, end)))
        return found

    def pieces(self, text: str):
        for i, part in enumerate(self.whole.split(text)):
            if i % 2:
                yield part
            else:
                for word in self.words(part):
                    yield from self.merged(word)

    def words(self, text: str):
        """Parts so small that no piece reaches over their ends, so that each is merged for itself."""
        start = 0
        for i, pair in enumerate(pairwise(text), 1):
            if "".join(pair) not in self.neighbours:
                yield text[start:i]
                start = i
        yield text[start:]

    def merged(self, word: str) -> list[str]:
        """Of all neighbours whose join is a piece those of the highest score are joined, of equal ones the leftmost."""
        parts, agenda = list(word), []
        before, after = list(range(-1, len(word) - 1)), list(range(1, len(word) + 1))
        def consider(left: int, right: int) -> None:
            joined = parts[left] + parts[right] if left >= 0 and right < len(parts) else ""
            if joined in self.scores:
                heappush(agenda, (-self.scores[joined], left, right, joined))
        for right in after[:-1]:
            consider(right - 1, right)
        while agenda:
            _, left, right, joined = heappop(agenda)
            if not parts[left] or not parts[right] or parts[left] + parts[right] != joined:
                continue                            # one of them has been joined with another since
            parts[left], parts[right], after[left] = joined, "", after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [part for part in parts if part]

def either(texts) -> str:
    """A pattern of the longest of some texts that is at a place; of none, one that is nowhere."""
    return "|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)"

def charsmap(data: bytes) -> dict[str, str]:
    """The characters, and sequences of them, that are replaced before all else: a Darts double array of their UTF-8,
    whose leaves point into a table of texts that end with a zero byte."""
    size, = struct.unpack_from("<I", data)
    units, texts = struct.unpack_from(f"<{size // 4}I", data, 4), data[4 + size:]
    offset = lambda unit: unit >> 10 << ((unit & 512) >> 6)
    children = defaultdict(list)        # a base → those of its 255 places that are its own
    for node, unit in enumerate(units):
        if 0 < (byte := unit & (1 << 31 | 255)) < 256:
            children[node ^ byte].append((byte, node))
    found, waiting, seen = {}, [(b"", offset(units[0]))], 0
    while waiting:
        key, base = waiting.pop()
        seen += 1
        if seen > MOST_KEYS or len(key) > LONGEST_KEY:
            raise ValueError("its table of characters is too large, or runs in circles")
        for byte, node in children[base]:
            below, longer = node ^ offset(units[node]), key + bytes([byte])
            if units[node] >> 8 & 1:
                at = units[below] & 0x7fffffff
                found[longer.decode()] = texts[at:texts.index(0, at)].decode()
            waiting.append((longer, below))
    return found

def replaced(table: dict[str, str], kept) -> Callable[[str], str]:
    """A function of a text: at each place the longest entry of the table is replaced by what it says, but not in a text
    that is `kept` as it is."""
    sizes, kept = defaultdict(set), re.compile(either(kept))
    for key in table:
        sizes[key[0]].add(len(key))
    sizes = {first: sorted(found, reverse=True) for first, found in sizes.items()}
    def replace(text: str) -> str:
        if sizes.keys().isdisjoint(text):
            return text
        pieces, at = [], 0
        while at < len(text):
            if whole := kept.match(text, at):
                pieces.append(whole[0])
                at = whole.end()
                continue
            size = next((n for n in sizes.get(text[at], ()) if text[at:at + n] in table), 0)
            pieces.append(table[text[at:at + size]] if size else text[at])
            at += size or 1
        return "".join(pieces)
    return replace

def read(path, added=(), spaced=True) -> tuple[Tokenizer, Callable[[str], str]]:
    """The tokenizer, and what is to be done to a text before it is encoded (the library's own way to do that,
    `Precompiled`, drops marks behind a replaced character), with tokens `added` to those of the file. spaced: a text
    behind one begins with an unwritten space, too. ValueError: not such a file, or one of another kind."""
    try:
        data = Path(path).read_bytes()
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
            raise ValueError("it is a tiktoken file, the original form of Llama 3's: give the tokenizer.json that is "
                             "beside it on the hub")
        model = fields(data)
        pieces = [fields(piece) for piece in model[1]]
        trainer, spec = fields(model[2][0]), fields(model[3][0]) if model[3] else {}
        names = [piece[1][0].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, [bytes(4)])[0])[0] for piece in pieces]
        types = [piece.get(3, [NORMAL])[0] for piece in pieces]
        table = charsmap(spec[2][0]) if spec.get(2, [b""])[0] else {}
    except (IndexError, UnicodeDecodeError, struct.error, AttributeError, TypeError) as error:
        raise ValueError(f"not a SentencePiece model: {error}") from error
    if trainer.get(3, [1])[0] != 2:         # of the kinds of model
        raise ValueError("its model is not BPE; only SentencePiece's BPE is supported")
    if UNUSED in types or trainer.get(24, [0])[0] or not spec.get(5, [1])[0]:
        raise ValueError("unused pieces, spaces as suffixes or unescaped are not supported")
    if max(map(len, names), default=0) > LONGEST_PIECE:
        raise ValueError(f"it has pieces of more than {LONGEST_PIECE} characters")
    if types.count(UNKNOWN) != 1:
        raise ValueError("it has no unknown piece, or several")
    if types.count(BYTE) not in (0, 256):
        raise ValueError("it has some byte pieces, but not all 256")
    ids = {name: i for i, name in enumerate(names)}
    named = {kind: [name for name, t in zip(names, types, strict=True) if t == kind] for kind in set(types)}
    scores = {name: score for name, score, kind in zip(names, scores, types, strict=True) if kind == NORMAL}
    prefix, tidy = (bool(spec.get(field, [1])[0]) for field in (3, 4))
    unknown, = named[UNKNOWN]
    backend = Tokenizer(models.BPE(ids, [], unk_token=unknown))
    # a ▁ in the text counts as a space at its end, but not at its beginning
    trim = [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" +"), " ")] if tidy else []
    backend.normalizer = normalizers.Sequence([*trim, normalizers.Replace(" ", "▁")])
    whole = named.get(USER_DEFINED, [])
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(
        Pieces(ids, scores, whole, unknown, (prefix, prefix and spaced)))
    leading = 10 ** 6 if tidy else int(prefix)      # spaces left out in front of a text
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", leading, 0)])
    control = [AddedToken(name, special=True) for name in (*named.get(CONTROL, []), unknown)]       # never shown
    tokens = {token.content: token for token in (*control, *added)}         # the control pieces have ids already
    backend.add_tokens([AddedToken(**token.__getstate__() | {"normalized": False}) for token in tokens.values()])
    backend.encode_special_tokens = not added       # as in SentencePiece, `<s>` in a text is characters; not so in HF
    return backend, replaced(table, [*whole, *(token.content for token in added)])
