"""SentencePiece's `tokenizer.model`, a protobuf (sentencepiece_model.proto) → a `tokenizers` BPE that gives the same
ids and text: its BPE joins neighbours, the join of the highest score first, as the library does by a list of merges."""
import struct
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6     # the types of a piece
MOST_KEYS, LONGEST_KEY = 500_000, 256   # of a table of characters, with their beginnings: the library's has 264,182
LONGEST_PIECE = 1024        # characters; `merges` tries each place to split one. Trained with default settings: 16

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

def merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces whose join is a piece, the join with the highest score first."""
    pairs = [(scores[piece], piece[:i], piece[i:]) for piece in scores for i in range(1, len(piece))
             if piece[:i] in scores and piece[i:] in scores]
    return [pair[1:] for pair in sorted(pairs, key=lambda p: (-p[0], ids[p[1]], ids[p[2]]))]

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

def replaced(table: dict[str, str]) -> Callable[[str], str]:
    """A function of a text: at each place the longest entry of the table is replaced by what it says."""
    sizes = defaultdict(set)
    for key in table:
        sizes[key[0]].add(len(key))
    sizes = {first: sorted(found, reverse=True) for first, found in sizes.items()}
    def replace(text: str) -> str:
        if sizes.keys().isdisjoint(text):
            return text
        pieces, at = [], 0
        while at < len(text):
            size = next((n for n in sizes.get(text[at], ()) if text[at:at + n] in table), 0)
            pieces.append(table[text[at:at + size]] if size else text[at])
            at += size or 1
        return "".join(pieces)
    return replace

def read(path) -> tuple[Tokenizer, Callable[[str], str]]:
    """The tokenizer, and what is to be done to a text before it is encoded (the library's own way to do that,
    `Precompiled`, drops marks behind a replaced character). ValueError: not such a file, or one of another kind."""
    try:
        model = fields(Path(path).read_bytes())
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
    if {UNUSED, USER_DEFINED} & set(types) or trainer.get(24, [0])[0] or not spec.get(5, [1])[0]:
        raise ValueError("unused or user-defined pieces, spaces as suffixes or unescaped are not supported")
    if max(map(len, names), default=0) > LONGEST_PIECE:
        raise ValueError(f"it has pieces of more than {LONGEST_PIECE} characters")
    if types.count(UNKNOWN) != 1:
        raise ValueError("it has no unknown piece, or several")
    if types.count(BYTE) not in (0, 256):
        raise ValueError("it has some byte pieces, but not all 256")
    ids = {name: i for i, name in enumerate(names)}
    normal = {name: score for name, score, kind in zip(names, scores, types, strict=True) if kind == NORMAL}
    prefix, tidy = (bool(spec.get(field, [1])[0]) for field in (3, 4))
    backend = Tokenizer(models.BPE(ids, merges(normal, ids), unk_token=names[types.index(UNKNOWN)], fuse_unk=True,
                                   byte_fallback=BYTE in types))
    # a ▁ in the text counts as a space at its end, but not at its beginning
    trim = [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" +"), " ")] if tidy else []
    backend.normalizer = normalizers.Sequence([*trim, *([normalizers.Prepend("▁")] if prefix else []),
                                               normalizers.Replace(" ", "▁")])
    leading = 10 ** 6 if tidy else int(prefix)      # spaces left out in front of a text
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", leading, 0)])
    special = [AddedToken(n, special=True, normalized=False) for n, t in zip(names, types, strict=True) if t == CONTROL]
    backend.add_special_tokens(special)         # left out when decoding; `<s>` in a text is not one, but characters
    backend.encode_special_tokens = True
    return backend, replaced(table)
