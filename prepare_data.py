"""Token files for train_heads.py: from a text, or written by the model itself (self-distillation).

    python prepare_data.py --text stories.txt --out data/stories.bin
    python prepare_data.py --openings model/openings.txt --out data/distilled.bin
    python prepare_data.py --model DIR_OR_HUB_ID --openings openings.txt --temperature 0.7 --out data/sampled.bin

Heads learn to guess what the *base* will write, so text by the base itself trains them best, and needs nobody's data:
it continues short openings (one a line), batched, by the very step that generate.py decodes with.
A token file is as in nanoGPT: ids as uint16 or uint32, documents one after the other, `bos .. eos`. The JSON beside it
holds the tokenizer's hash, the counts and the source; it is written last, so a file without it is not whole.
"""
import hashlib
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llama import (
    SEED,
    ArgumentParser,
    Llama,
    Tokenizer,
    UserError,
    command_line,
    device,
    load_config,
    model_name,
    number,
    read_json,
    write_atomic,
    write_json,
)
from tinymedusa import MedusaHeads, Sampling, check_prompts, generate, load_tree, set_threads

# ------------------------------------------------------------------------------------------------------ token files

def tokenizer_hash(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def write_tokens(path, documents, tokenizer: Tokenizer, vocab_size: int, source: dict) -> dict:
    """Streams documents (lists of ids) to `path` and the facts to `path`.json; a temporary name until it is whole."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: --out names a file")
    dtype = np.uint16 if vocab_size <= 2 ** 16 else np.uint32
    counts = {"documents": 0, "tokens": 0}
    facts = Path(f"{path}.json")

    def write(temporary):
        with open(temporary, "wb") as file:
            for ids in documents:
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                counts["documents"] += 1
                counts["tokens"] += len(ids)
        if not counts["tokens"]:
            raise UserError(f"{path}: nothing to write, the source holds no text")
        facts.unlink(missing_ok=True)          # from here to write_json there is no whole token file
    write_atomic(path, write)
    data = {"dtype": np.dtype(dtype).name, **counts, "tokenizer_sha256": tokenizer_hash(tokenizer), "source": source}
    write_json(facts, data)
    return data


def read_tokens(path, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The documents of a token file, as views of the mapped file.

    A document starts at each bos (a tokenizer without one: after each eos). Raises UserError: no such file, not whole,
    or written with another tokenizer.
    """
    path, facts = Path(path), Path(f"{path}.json")
    if not path.is_file():
        raise UserError(f"no token file {path}: make one with prepare_data.py")
    if not facts.is_file():
        raise UserError(f"{facts} is missing: was the preparation of {path} interrupted? Run prepare_data.py again")
    data = read_json(facts)
    if data.get("dtype") not in ("uint16", "uint32"):
        raise UserError(f"{facts}: dtype {data.get('dtype')!r} is neither uint16 nor uint32")
    if data.get("tokenizer_sha256") != tokenizer_hash(tokenizer):
        raise UserError(f"{path} was written with another tokenizer than {tokenizer.path}: prepare it for this model")
    if type(data.get("tokens")) is not int or data["tokens"] < 1:
        raise UserError(f"{facts}: tokens is {data.get('tokens')!r}: prepare it again")
    expected = data["tokens"] * np.dtype(data["dtype"]).itemsize
    if path.stat().st_size != expected:
        raise UserError(f"{path} has {path.stat().st_size} bytes, {facts.name} says {expected}: prepare it again")
    ids = np.memmap(path, data["dtype"], "r")
    if ids.max() >= tokenizer.size:
        raise UserError(f"{path} holds the id {ids.max()}, the tokenizer only {tokenizer.size}: prepare it again")
    starts = np.flatnonzero(ids == tokenizer.bos[0]) if tokenizer.bos else \
        np.flatnonzero(np.isin(ids, tokenizer.eos)) + 1
    return [d for d in np.split(ids, starts) if len(d)]


# ---------------------------------------------------------------------------------------------------------- sources

def read_lines(path):
    """The lines of a UTF-8 text file, streamed."""
    try:
        with open(path, encoding="utf-8") as file:
            yield from file
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def texts_between(path, separator: str):
    """The texts of a file between lines that hold only the separator, streamed, stripped; empty ones are skipped."""
    lines = []
    for line in chain(read_lines(path), [separator]):
        if line.strip() != separator:
            lines.append(line)
            continue
        if text := "".join(lines).strip():
            yield text
        lines = []


def tokenised(texts, tokenizer: Tokenizer, batch_size: int = 1000):
    """bos text eos, encoded in batches by the library's own threads."""
    while batch := list(islice(texts, batch_size)):
        yield from (ids + tokenizer.eos[:1] for ids in tokenizer.encode_batch(batch))


def self_distilled(model: Llama, heads, tree, openings: list, max_new_tokens: int, sampling: Sampling, seed: int,
                   batch_size: int):
    """The model's own continuations of the openings (lists of ids), each with its opening before it.

    Openings of like length share a batch. Row i draws from seed + i, i its place in the list, whatever its batch.
    """
    order = sorted(range(len(openings)), key=lambda i: len(openings[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        documents = [list(openings[i]) for i in rows]
        for new in generate(model, [openings[i] for i in rows], max_new_tokens, heads=heads, tree=tree,
                            sampling=sampling, seeds=[seed + i for i in rows]):
            for document, ids in zip(documents, new, strict=True):
                document += ids
        yield from documents


# ------------------------------------------------------------------------------------------------------------- main

def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="See the top of prepare_data.py for examples.")
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"), help="folder or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help="UTF-8 text, documents separated by lines of --separator")
    source.add_argument("--openings", metavar="FILE", help="one opening a line; the model continues each")
    parser.add_argument("--out", required=True, metavar="FILE", help="the token file; FILE.json is written beside it")
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--limit", type=number(int, 1), help="only the first documents or openings")
    parser.add_argument("--heads", help="Medusa heads to write with (default: plain decoding)")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=400)
    parser.add_argument("--temperature", type=number(float, 0), default=0.0)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--batch-size", type=number(int, 1), default=64)
    parser.add_argument("--device", type=device, default="cpu")
    return parser.parse_args(argv)


def prepare(args) -> dict:
    config = load_config(args.model)
    tokenizer = Tokenizer(args.model, config)
    if args.text:
        source = {"text": Path(args.text).name, "limit": args.limit}
        documents = tokenised(islice(texts_between(args.text, args.separator), args.limit), tokenizer)
        bar = {"desc": "tokenising", "unit": " documents"}
    else:
        lines = list(dict.fromkeys(line.strip() for line in read_lines(args.openings) if line.strip()))[:args.limit]
        if not lines:
            raise UserError(f"{args.openings} holds no opening: write one a line")
        model = Llama.from_pretrained(args.model, device=args.device)
        set_threads(model, rows=args.batch_size)
        heads = args.heads and MedusaHeads.from_pretrained(args.heads, model)
        tree = heads and load_tree(args.heads, heads)
        encoded = tokenizer.encode_batch(lines)
        check_prompts(encoded, config.max_position_embeddings)
        source = {"model": model_name(args.model), "openings": Path(args.openings).name, "limit": args.limit,
                  "seed": args.seed, "temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
        documents = self_distilled(model, heads, tree, encoded, args.max_new_tokens, Sampling(args.temperature),
                                   args.seed, args.batch_size)
        bar = {"desc": "continuing", "unit": " openings", "total": len(lines)}
    with tqdm(documents, **bar) as progress:
        return write_tokens(args.out, progress, tokenizer, config.vocab_size, source)


def main():
    args = arguments()
    facts = prepare(args)
    print(f"{args.out}: {facts['documents']} documents, {facts['tokens']} tokens")


if __name__ == "__main__":
    command_line(main)
