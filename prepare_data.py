"""Token files for train_heads.py: from a text or conversations, or written by the model itself (self-distillation).

    python prepare_data.py --text stories.txt --out data/stories.bin              # or a .jsonl with "text" in a line
    python prepare_data.py --openings model/openings.txt --out data/greedy.bin        # the model continues each line
    python prepare_data.py --text stories.txt --distill --temperature 0.7 --out data/sampled.bin
    python prepare_data.py --sharegpt chats.json --model DIR_OR_HUB_ID --out data/chats.bin     # --distill: re-answered
    python prepare_data.py --tinystories --split train --limit 1000 --first-words 5 --out data/original.bin
    torchrun --nproc-per-node 2 prepare_data.py --openings FILE --out data/greedy.bin    # a file a process, see `shard`

Heads learn to guess what the *base* will write, so text by the base itself trains them best, and needs nobody's data:
it continues openings in batches, by the very step that generate.py decodes with.
A token file is a stream of uint16 or uint32 as in nanoGPT, but an entry is 4 * id + 2 * start + loss: start 1 where a
document begins, loss 1 where heads should learn the token (the text, or what the assistant or the model wrote) and 0
where it is a prompt or bos. Documents stand one after the other, with eos between. The JSON beside it holds the
tokenizer's hash, the counts and the source; it is written last, so a file without it is not whole.
"""
if __name__ == "__main__":      # Ctrl-C while torch is imported: an end without a traceback, as `command_line`'s later
    import signal
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
import hashlib
import json
import os
import re
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from extras.cli import SEED, ArgumentParser, command_line, device, number
from llama import Llama, Tokenizer, UserError, load_config, locate, model_name, read_json, write_atomic, write_json
from tinymedusa import MedusaHeads, Sampling, check_prompts, generate, load_tree, set_threads

TINYSTORIES = {"train": "TinyStoriesV2-GPT4-train.txt", "validation": "TinyStoriesV2-GPT4-valid.txt"}
HELD_OUT = 50           # every 50th document of a source without splits of its own is its validation split
BATCH = 2 ** 20         # characters tokenised at once, and the length at which a document is cut
# vicuna_v1.1 of FastChat: "{SYSTEM} USER: .. ASSISTANT: ..</s>USER: .. ASSISTANT: ..</s>"
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")

# ------------------------------------------------------------------------------------------------------ token files

def tokenizer_hash(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def entries(ids, loss) -> np.ndarray:
    """Token ids → entries of a token file, 4 * id + loss; `write_tokens` marks where a document starts."""
    return np.asarray(ids, np.uint32) * 4 + loss


def write_tokens(path, documents, tokenizer: Tokenizer, vocab_size: int, source: dict) -> dict:
    """Streams documents (arrays of entries) to `path` and the facts to `path`.json; a temporary name until whole."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: --out names a file")
    dtype = np.uint16 if vocab_size <= 2 ** 14 else np.uint32
    counts, digest = {"documents": 0, "tokens": 0, "loss_tokens": 0}, hashlib.sha256()
    facts = Path(f"{path}.json")

    def write(temporary):
        with open(temporary, "wb") as file:
            for document in documents:
                document[0] |= 2
                written = document.astype(dtype).tobytes()
                file.write(written)
                digest.update(written)
                counts["documents"] += 1
                counts["tokens"] += len(document)
                counts["loss_tokens"] += int((document & 1).sum())
        if not counts["loss_tokens"]:
            raise UserError(f"{path}: nothing to write, the source holds no text")
        facts.unlink(missing_ok=True)          # from here to write_json there is no whole token file
    write_atomic(path, write)
    data = {"dtype": np.dtype(dtype).name, **counts, "sha256": digest.hexdigest(),
            "tokenizer_sha256": tokenizer_hash(tokenizer), "source": source}
    write_json(facts, data)
    return data


def read_tokens(path, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The documents of a token file, arrays of entries, as views of the mapped file.

    Raises UserError: no such file, not whole, damaged, or written with another tokenizer.
    """
    path, facts = Path(path), Path(f"{path}.json")
    if not path.is_file():
        raise UserError(f"no token file {path}: make one with prepare_data.py")
    if not facts.is_file():
        raise UserError(f"{facts} is missing: was the preparation of {path} interrupted? Run prepare_data.py again")
    data = read_json(facts)
    if data.get("dtype") not in ("uint16", "uint32") or not data.get("sha256") or type(data.get("tokens")) is not int:
        raise UserError(f"{facts}: not a token file of this version: prepare it again")
    if data.get("tokenizer_sha256") != tokenizer_hash(tokenizer):
        raise UserError(f"{path} was written with another tokenizer than {tokenizer.path}: prepare it for this model")
    expected = data["tokens"] * np.dtype(data["dtype"]).itemsize
    if path.stat().st_size != expected:
        raise UserError(f"{path} has {path.stat().st_size} bytes, {facts.name} says {expected}: prepare it again")
    stream = np.memmap(path, data["dtype"], "r")
    if stream.max() // 4 >= tokenizer.size:
        raise UserError(f"{path} holds the id {stream.max() // 4}, the tokenizer only {tokenizer.size}: "
                        "prepare it again")
    if hashlib.sha256(stream).hexdigest() != data["sha256"]:        # two runs that wrote it at once, for one
        raise UserError(f"{path} is not what {facts.name} says: prepare it again")
    return np.split(stream, np.flatnonzero(stream & 2)[1:])


# ---------------------------------------------------------------------------------------------------------- sources

def read_lines(path):
    """The lines of a UTF-8 text file, streamed."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from file
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def json_lines(path):
    """(place, value) for each line of a JSONL file, or each item of a JSON file that is one list."""
    if Path(path).suffix == ".jsonl":
        lines = ((f"{path}, line {i}", line) for i, line in enumerate(read_lines(path), 1) if line.strip())
    else:
        lines = [(str(path), "".join(read_lines(path)))]
    for place, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not valid JSON: {error}") from error
        if isinstance(value, list):
            yield from ((f"{path}, item {i}", item) for i, item in enumerate(value))
        else:
            yield place, value


def mended(text: str) -> str:
    """Without half a character, which JSON may hold where a text was cut: it is replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def texts(path, separator: str):
    """The texts of a file, streamed, stripped, empty ones skipped; one longer than BATCH characters comes in pieces.

    A .jsonl file has a "text" in each line; in any other the texts stand between lines that hold only the separator.
    """
    separator = separator.strip()
    if Path(path).suffix == ".json":
        raise UserError(f"{path}: texts are read from a plain file or a .jsonl; give conversations to --sharegpt")

    def between():
        lines, size = [], 0
        for line in chain(read_lines(path), [separator]):
            if line.strip() != separator:
                lines.append(line)
                size += len(line)
            if line.strip() == separator or size > BATCH:
                yield "".join(lines)
                lines, size = [], 0

    def fields():
        for place, value in json_lines(path):
            if not isinstance(value, dict) or not isinstance(value.get("text"), str):
                raise UserError(f'{place}: expected an object with a "text"')
            yield value["text"]
    for text in fields() if Path(path).suffix == ".jsonl" else between():
        if text := mended(text).strip():
            yield from (text[i:i + BATCH] for i in range(0, len(text), BATCH))


def conversations(path):
    """ShareGPT → conversations as lists of rounds [human, answer], stripped; those without a whole round are skipped.

    What stands before the first human turn is dropped, as in the original's training, and so is everything from the
    first turn on that is out of turn or empty (an unanswered question at the end, for one).
    """
    for place, item in json_lines(path):
        turns = item.get("conversations") if isinstance(item, dict) else None
        if not isinstance(turns, list) or not all(
                isinstance(t, dict) and isinstance(t.get("from"), str) and isinstance(t.get("value"), str)
                for t in turns):
            raise UserError(f'{place}: expected {{"conversations": [{{"from": .., "value": ..}}, ..]}} as in ShareGPT')
        turns = [(t["from"], mended(t["value"]).strip()) for t in turns]
        while turns and turns[0][0] != "human":
            turns.pop(0)
        rounds = []
        for (role, asked), (other, answer) in zip(turns[::2], turns[1::2], strict=False):
            if (role, other) != ("human", "gpt") or not asked or not answer:
                break
            rounds.append([asked, answer])
        if rounds:
            yield rounds


def openings_of(path) -> list[str]:
    """The lines of a file, stripped, each once."""
    return list(dict.fromkeys(line.strip() for line in read_lines(path) if line.strip()))


def opening(text: str, sentences: int) -> str:
    """The first sentences of a text (of its first line, up to 200 characters each), to be continued."""
    return re.match(rf"(.+?[.!?][\"']?(?=\s|$) *){{1,{sentences}}}|.*", text)[0].strip()[:200 * sentences]


def shard() -> tuple[int, int]:
    """(rank, processes) as torchrun says it; alone (0, 1). Process r takes every item whose index is r modulo them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ------------------------------------------------------------------------------------------------------- tokenising

def batches(items, size):
    """Lists of consecutive items, each of about BATCH characters; `size`: an item's characters."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def tokenised(texts, tokenizer: Tokenizer):
    """bos text eos, encoded in batches by the library's own threads; every token but bos carries loss."""
    for batch in batches(texts, len):
        for ids in tokenizer.encode_batch(batch):
            document = entries(ids + tokenizer.eos[:1], True)
            document[:len(tokenizer.bos)] -= 1
            yield document


def question(index: int, text: str, system: str = SYSTEM) -> str:
    """A human turn in the vicuna_v1.1 template, up to where the answer begins (with a space)."""
    return f"{'' if index or not system else system + ' '}USER: {text} ASSISTANT:"


def rendered(conversations, tokenizer: Tokenizer):
    """bos, then question, answer and eos of each round; answers and eos carry loss.

    Question and answer are encoded as one string, as they are read at generation; a token belongs to the answer if it
    begins behind the colon.
    """
    for batch in batches(conversations, lambda rounds: sum(len(q) + len(a) for q, a in rounds)):
        prompts = [tokenizer.before(question(i, q)) for rounds in batch for i, (q, _) in enumerate(rounds)]
        answers = [tokenizer.before(answer) for rounds in batch for _, answer in rounds]
        encoded = iter(zip(prompts, tokenizer.backend.encode_batch(
            [f"{p} {a}" for p, a in zip(prompts, answers, strict=True)], add_special_tokens=False), strict=True))
        for rounds in batch:
            pieces = [entries(tokenizer.bos, False)]
            for prompt, e in islice(encoded, len(rounds)):
                loss = [start >= len(prompt) for start, _ in e.offsets]
                pieces += [entries(e.ids, np.array(loss)), entries(tokenizer.eos[:1], True)]
            yield np.concatenate(pieces)


# ------------------------------------------------------------------------------------------------ self-distillation

def continued(prompts: dict, write, batch_size: int):
    """(key, new ids) for each prompt (key → ids), in batches of like length; the key seeds the row.

    `write(prompts, seeds)` is `generate` with all else given.
    """
    order = sorted(prompts, key=lambda key: len(prompts[key]))
    for start in range(0, len(order), batch_size):
        keys = order[start:start + batch_size]
        new = [[] for _ in keys]
        for step in write([prompts[key] for key in keys], keys):
            for row, ids in step.items():
                new[row] += ids
        yield from zip(keys, new, strict=True)


def continuations(openings: dict, write, batch_size: int):
    """Each opening (key → ids) with what the model writes behind it, which carries loss."""
    for key, new in continued(openings, write, batch_size):
        yield np.concatenate((entries(openings[key], False), entries(new, True)))


def answered_anew(talks: dict, tokenizer: Tokenizer, write, batch_size: int, context: int):
    """Conversations (key → rounds) whose every answer is the model's own, as entries.

    All first questions are answered, then all second ones behind their own first answer, and so on. A conversation
    ends early with an answer that had to be cut, or when the next question leaves no room.
    """
    done = {key: [entries(tokenizer.bos, False)] for key in talks}
    open_talks = dict(talks)
    for i in range(max(map(len, talks.values()), default=0)):
        open_talks = {key: rounds for key, rounds in open_talks.items() if i < len(rounds)}
        encoded = tokenizer.backend.encode_batch([question(i, rounds[i][0]) for rounds in open_talks.values()],
                                                 add_special_tokens=False)
        asked = {key: entries(e.ids, False) for key, e in zip(open_talks, encoded, strict=True)}
        prompts = {key: (np.concatenate(done[key] + [asked[key]]) // 4).tolist() for key in asked}
        prompts = {key: ids for key, ids in prompts.items() if len(ids) < context}
        answers = dict(continued(prompts, write, batch_size))
        for key, new in answers.items():
            done[key] += [asked[key], entries(new, True)]
        open_talks = {key: talks[key] for key, new in answers.items() if new[-1] in tokenizer.eos}
    yield from (np.concatenate(pieces) for pieces in done.values() if len(pieces) > 1)


# ------------------------------------------------------------------------------------------------------------- main

def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="See the top of prepare_data.py for examples.")
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"), help="folder or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help='UTF-8 text, or .jsonl with a "text" in each line')
    source.add_argument("--tinystories", nargs="?", const="roneneldan/TinyStories", metavar="DIR_OR_HUB_ID",
                        help="its V2-GPT4 file of --split, by default from the hub")
    source.add_argument("--sharegpt", metavar="FILE", help="conversations, JSON or .jsonl (vicuna_v1.1 template)")
    source.add_argument("--openings", metavar="FILE", help="one opening a line; the model continues each")
    parser.add_argument("--out", required=True, metavar="FILE", help="the token file; FILE.json is written beside it")
    parser.add_argument("--separator", default="<|endoftext|>", help="the line between two texts")
    parser.add_argument("--split", choices=("train", "validation"), help=f"validation: every {HELD_OUT}th document, "
                        "train: the others; default all (--tinystories: train)")
    parser.add_argument("--limit", type=number(int, 1), help="only the first documents, openings or conversations")
    parser.add_argument("--first-words", type=number(int, 1), help="a text becomes a conversation as in the original's "
                        "set: its first words are the human turn, the whole text the answer")
    parser.add_argument("--distill", action="store_true", help="the model itself continues the texts' first sentences, "
                        "or answers the conversations' questions")
    parser.add_argument("--sentences", type=number(int, 1), default=1, help="with --distill: how many first sentences "
                        "of a text the model gets")
    parser.add_argument("--heads", help="Medusa heads to write with (default: plain, faster for a batch on a CPU)")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=400, help="of a continuation or an answer")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0)
    parser.add_argument("--seed", type=SEED, default=0, help="item i of the source draws from seed + i")
    parser.add_argument("--batch-size", type=number(int, 1), default=128, help="rows written at once")
    parser.add_argument("--device", type=device, default="cpu")
    return parser.parse_args(argv)


def source_items(args):
    """What the source holds: texts, or conversations (lists of rounds), split, limited, without doubles to continue."""
    if args.first_words and (args.sharegpt or args.openings):
        raise UserError("--first-words makes conversations of texts: give --text or --tinystories")
    if args.heads and not (args.distill or args.openings):
        raise UserError("--heads are for text that the model writes: add --distill")
    if Path(args.out).resolve() in [Path(p).resolve() for p in (args.text, args.sharegpt, args.openings) if p]:
        raise UserError(f"{args.out} is the source itself: give --out another name")
    if args.sharegpt:
        items = conversations(args.sharegpt)
    elif args.openings:
        items = openings_of(args.openings)
    elif args.tinystories:
        items = texts(locate(args.tinystories, TINYSTORIES[args.split or "train"], repo_type="dataset"), args.separator)
    else:
        items = texts(args.text, args.separator)
    if args.split and not args.tinystories:
        items = (item for i, item in enumerate(items) if (i % HELD_OUT == 0) == (args.split == "validation"))
    items = islice(items, args.limit)
    if args.first_words:
        items = ([[" ".join(text.split(" ")[:args.first_words]), text]] for text in items)
    return items


def distilled(args, items, config, tokenizer: Tokenizer):
    """The model's own text for the items of this process, and how many they are."""
    talks = bool(args.sharegpt or args.first_words)
    items = list(items) if talks or args.openings else list(dict.fromkeys(opening(t, args.sentences) for t in items))
    rank, world = shard()
    items = {args.seed + i: item for i, item in enumerate(items) if i % world == rank}
    if not items:
        raise UserError("the source holds nothing to continue: write at least one opening or question a process")
    model = Llama.from_pretrained(args.model, device=args.device)
    heads = args.heads and MedusaHeads.from_pretrained(args.heads, model)
    tree = heads and load_tree(args.heads, heads)[0]
    if model.norm.device.type == "cpu":
        model.pack()
    if world == 1:          # torchrun has set the threads of its processes
        set_threads(model, rows=args.batch_size)

    def write(prompts, seeds):
        return generate(model, prompts, args.max_new_tokens, heads=heads, tree=tree, seeds=seeds,
                        sampling=Sampling(args.temperature))
    if talks:
        return answered_anew(items, tokenizer, write, args.batch_size, config.max_position_embeddings), len(items)
    encoded = dict(zip(items, tokenizer.encode_batch(list(items.values())), strict=True))
    check_prompts(list(encoded.values()), config)
    return continuations(encoded, write, args.batch_size), len(items)


def prepare(args) -> tuple[str, dict]:
    """Writes the token file → its name and its facts."""
    config, (rank, world) = load_config(args.model), shard()
    tokenizer, total = Tokenizer(args.model, config), None
    tokenizer.backend.encode_special_tokens = True      # "<s>" in a text is text, and does not begin a document
    items, talks = source_items(args), bool(args.sharegpt or args.first_words)
    if args.distill or args.openings:
        documents, total = distilled(args, items, config, tokenizer)
    else:
        items = islice(items, rank, None, world)
        documents = rendered(items, tokenizer) if talks else tokenised(items, tokenizer)
    options = {k: v for k, v in vars(args).items() if k not in ("model", "out", "device", "heads", "batch_size")}
    source = {"model": model_name(args.model)} | {
        k: Path(v).name if k in ("text", "sharegpt", "openings") else v for k, v in options.items() if v}
    out = Path(args.out)
    if world > 1:
        out = out.with_name(f"{out.stem}-{rank:05d}-of-{world:05d}{out.suffix}")
    with tqdm(documents, desc="preparing", unit=" documents", total=total, disable=rank > 0) as progress:
        return out, write_tokens(out, progress, tokenizer, config.vocab_size, source)


def main():
    out, facts = prepare(arguments())
    print(f"{out}: {facts['documents']} documents, {facts['tokens']} tokens, {facts['loss_tokens']} of them to learn")


if __name__ == "__main__":
    command_line(main)
