"""Token files for train_heads.py: from a text or conversations, or written by the model itself (self-distillation).

    python prepare_data.py --text stories.txt --out data/stories.bin              # or a .jsonl with "text" in a line
    python prepare_data.py --openings model/openings.txt --out data/greedy.bin        # the model continues each line
    python prepare_data.py --sharegpt chats.json --model DIR_OR_HUB_ID --out data/chats.bin     # --distill: re-answered
    torchrun --nproc-per-node 2 prepare_data.py --openings FILE --out data/greedy.bin    # a file a process, see `shard`

Heads learn to guess what the base model will write, so text that it wrote itself trains them best, and needs nobody's
data: it continues openings in batches, by the very step that generate.py decodes with. A token file is what nanoGPT's
readers expect, the ids as uint16 or uint32; what lies beside it is told in loading/documents.py.
"""
if __name__ == "__main__":      # Ctrl-C while torch is imported: an end without a traceback, as `command_line`'s later
    import signal
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN or signal.signal(signal.SIGINT, signal.SIG_DFL)
import re
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from extras.command_line import ArgumentParser, command_line, set_threads, shard
from extras.options import prepare_options
from llama import Llama, LlamaConfig
from loading.config import check_prompts
from loading.documents import BATCH, HELD_OUT, conversations, document, openings_of, texts, write_tokens
from loading.files import UserError, locate, model_name
from loading.templates import question
from loading.tokenizer import Tokenizer
from tinymedusa import Decoder, PlainDecoder, Sampling, Tree
from variants import batches
from variants.heads import load_heads

TINYSTORIES = {"train": "TinyStoriesV2-GPT4-train.txt", "validation": "TinyStoriesV2-GPT4-valid.txt"}

def opening(text: str, sentences: int) -> str:
    """The first sentences of a text (of its first line, up to 200 characters each), to be continued."""
    return re.match(rf"(.+?[.!?][\"']?(?=\s|$) *){{1,{sentences}}}|.*", text)[0].strip()[:200 * sentences]

def of_like_size(items, size):
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
    for batch in of_like_size(texts, len):
        for ids in tokenizer.encode_batch(batch):
            start = len(tokenizer.bos)
            yield document((ids[:start], False), (ids[start:] + tokenizer.eos[:1], True))

def rendered(conversations, tokenizer: Tokenizer):
    """bos, then question, answer and eos of each round; answers and eos carry loss. Question and answer are encoded as
    one string, as they are read at generation; a token belongs to the answer if it begins behind the colon."""
    for batch in of_like_size(conversations, lambda rounds: sum(len(q) + len(a) for q, a in rounds)):
        prompts = [tokenizer.before(question(i, q)) for rounds in batch for i, (q, _) in enumerate(rounds)]
        answers = [tokenizer.before(answer) for rounds in batch for _, answer in rounds]
        encoded = iter(zip(prompts, tokenizer.backend.encode_batch(
            [f"{p} {a}" for p, a in zip(prompts, answers, strict=True)], add_special_tokens=False), strict=True))
        for rounds in batch:
            parts = [(tokenizer.bos, False)]
            for prompt, e in islice(encoded, len(rounds)):
                in_answer = [start >= len(prompt) for start, _ in e.offsets]
                parts += [(e.ids, in_answer), (tokenizer.eos[:1], True)]
            yield document(*parts)

def continued(prompts: dict, write, batch_size: int):
    """(key, new ids) for each prompt (key → ids), in batches of like length; the key seeds the row. `write(prompts,
    seeds)` is `batches.generate` with all else given."""
    order = sorted(prompts, key=lambda key: len(prompts[key]))
    for start in range(0, len(order), batch_size):
        keys = order[start:start + batch_size]
        steps = write([prompts[key] for key in keys], keys)
        new = {i: sum(ids, []) for i, ids, _ in batches.finished(steps)}
        yield from ((key, new[i]) for i, key in enumerate(keys))

def continuations(openings: dict, write, batch_size: int):
    """Each opening (key → ids) with what the model writes behind it, which carries loss."""
    for key, new in continued(openings, write, batch_size):
        yield document((openings[key], False), (new, True))

def answered_anew(talks: dict, tokenizer: Tokenizer, write, batch_size: int, context: int):
    """Conversations (key → rounds) whose every answer is the model's own: all first questions are answered, then all
    second ones, and so on. One ends early with an answer that had to be cut, or when the next question has no room."""
    done = {key: [(tokenizer.bos, False)] for key in talks}
    open_talks = dict(talks)
    for i in range(max(map(len, talks.values()), default=0)):
        open_talks = {key: rounds for key, rounds in open_talks.items() if i < len(rounds)}
        encoded = tokenizer.backend.encode_batch([question(i, rounds[i][0]) for rounds in open_talks.values()],
                                                 add_special_tokens=False)
        questions = {key: e.ids for key, e in zip(open_talks, encoded, strict=True)}
        prompts = {key: sum((ids for ids, _ in done[key]), []) + questions[key] for key in questions}
        prompts = {key: ids for key, ids in prompts.items() if len(ids) < context}
        answers = dict(continued(prompts, write, batch_size))
        for key, new in answers.items():
            done[key] += [(questions[key], False), (new, True)]
        open_talks = {key: talks[key] for key, new in answers.items() if new[-1] in tokenizer.eos}
    yield from (document(*parts) for parts in done.values() if len(parts) > 1)

def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="Examples: at the top of prepare_data.py.")
    prepare_options(parser)
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
    decoder = PlainDecoder(model, Sampling(args.temperature))
    if args.heads:
        heads = load_heads(args.heads, model)
        decoder = Decoder(model, heads, Tree.from_pretrained(args.heads, heads), Sampling(args.temperature))
    set_threads(model, rows=args.batch_size)
    write = lambda prompts, seeds: batches.generate(decoder, prompts, args.max_new_tokens, seeds)
    if talks:
        return answered_anew(items, tokenizer, write, args.batch_size, config.max_position_embeddings), len(items)
    encoded = dict(zip(items, tokenizer.encode_batch(list(items.values())), strict=True))
    check_prompts(list(encoded.values()), config)
    return continuations(encoded, write, args.batch_size), len(items)

def prepare(args) -> tuple[str, dict]:
    """Writes the token file → its name and its facts."""
    config, (rank, world) = LlamaConfig.from_pretrained(args.model), shard()
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
