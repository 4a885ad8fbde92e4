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
import hashlib
import re
import sys
from collections import Counter
from itertools import count, islice
from os.path import commonprefix
from pathlib import Path
import numpy as np
from tqdm import tqdm
from extras.command_line import ArgumentParser, command_line, row_seed, set_threads, shard
from extras.options import prepare_options
from fast import engines
from llama import LlamaConfig
from loading.checkpoint import TORCH_DTYPES, weight_files
from loading.config import check_prompts
from loading.documents import (BATCH, HELD_OUT, Partial, beside, conversations, document, openings_of, texts,
                               write_tokens)
from loading.files import UserError, keep_sources, locate, model_name
from loading.templates import IDS, Plain, Vicuna, load_template
from loading.tokenizer import Tokenizer
from tinymedusa import Decoder, Sampling, Tree
from variants import batches
from variants.heads import load_heads

TINYSTORIES = {"train": "TinyStoriesV2-GPT4-train.txt", "validation": "TinyStoriesV2-GPT4-valid.txt"}

def opening(text: str, sentences: int) -> str:
    """The first sentences of a text (of its first line, up to 200 characters each), to be continued."""
    return re.match(rf"(.+?[.!?][\"']?(?=\s|$) *){{1,{sentences}}}|.*", text)[0].strip()[:200 * sentences]

def of_like_size(texts):
    """Lists of consecutive texts, each of about BATCH characters."""
    batch, total = [], 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch

def tokenised(texts, tokenizer: Tokenizer):
    """bos text eos, encoded in batches by the library's own threads; every token but bos carries loss."""
    for batch in of_like_size(texts):
        for ids in tokenizer.encode_batch(batch):
            start = len(tokenizer.bos)
            yield document((ids[:start], False), (ids[start:] + tokenizer.eos[:1], True))

def add_turn(talk: list, prompt: list, answer: list, eos: list) -> None:
    """Adds to the documents [ids, loss] of a conversation what is new of a prompt, without loss, and the answer up to
    its last eos, with loss. Where the template has rewritten earlier turns the whole prompt begins a document."""
    if not talk or prompt[:len(talk[-1][0])] != talk[-1][0]:
        talk.append([[], []])
    ids, loss = talk[-1]
    end = max((i + 1 for i, token in enumerate(answer) if token in eos), default=len(answer))
    loss += [False] * (len(prompt) - len(ids)) + [True] * end
    ids += prompt[len(ids):] + answer[:end]

def rendered(conversations, template: Plain):
    """Each (conversation, its ids or None) as it is put to the model; what differs from an answer's prompt is that."""
    for messages, whole in conversations:
        talk = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                known, prompt = whole and message is messages[-1], template.ids(messages[:i])
                ids = whole if known else template.ids(messages[:i + 1], answer=False)
                same = len(commonprefix([prompt, ids]))
                add_turn(talk, ids[:same], ids[same:], template.tokenizer.eos)
        yield from (document(part) for part in talk)

def continued(prompts: dict, write):
    """(key, new ids) of each prompt (key → ids), as soon as it is finished; the key seeds the row. `write(prompts,
    seeds)` is `batches.generate` with all else given."""
    keys = list(prompts)
    steps = write(list(prompts.values()), keys) if keys else []
    for i, new, _ in batches.finished(steps):
        yield keys[i], sum(new, [])

def remembered(turn: int, prompts: dict, write, partial: Partial):
    """`continued`, but what a stopped run has written comes first, and what is new is kept for the next run."""
    kept = {key: partial.texts[turn, key] for key in prompts if (turn, key) in partial.texts}
    yield from ((key, new.tolist()) for key, new in kept.items())
    for key, new in continued({key: ids for key, ids in prompts.items() if key not in kept}, write):
        partial.add(turn, key, new)
        yield key, new

def continuations(openings: dict, answers, bar: tqdm):
    """Each opening (key → ids) with what the model writes behind it, which carries loss. `answers(turn, prompts)`:
    (key, new ids) of each prompt, in any order; turn: which round of a conversation they answer."""
    done = {}
    for key, new in answers(0, openings):
        done[key] = document((openings[key], False), (new, True))
        bar.update()
    yield from (done[key] for key in openings)

def answered_anew(talks: dict, template: Plain, answers, context: int, bar: tqdm):
    """Conversations (key → messages) whose every answer is the model's own: all first questions are answered, then all
    second ones, and so on. One ends early with an answer that had to be cut, or when the next question has no room."""
    tokenizer, done, talks = template.tokenizer, {key: [] for key in talks}, dict(talks)
    waiting = {key: [i for i, m in enumerate(talk) if m["role"] == "assistant"] for key, talk in talks.items()}
    for turn in count():
        if not waiting:
            break
        prompts = {key: template.ids(talks[key][:places[0]]) for key, places in waiting.items()}
        prompts = {key: ids for key, ids in prompts.items() if len(ids) < context}
        bar.update(len(waiting) - len(prompts))
        places, waiting = waiting, {}
        for key, new in answers(turn, prompts):
            add_turn(done[key], prompts[key], new, tokenizer.eos)
            at, *later = places[key]
            own = {"role": "assistant", "content": tokenizer.decode(new).strip(), IDS: new}
            talks[key] = [*talks[key][:at], own, *talks[key][at + 1:]]
            if new[-1] in tokenizer.eos and later:
                waiting[key] = later
            bar.update(key not in waiting)
    yield from (document(part) for talk in done.values() for part in talk)

def repeats_itself(ids: list) -> bool:
    """Whether some 12 tokens in a row come three times or more: the text goes round in circles."""
    runs = Counter(zip(*(ids[i:] for i in range(12)), strict=False))
    return max(runs.values(), default=0) >= 3

def warn_of_loops(texts, temperature: float) -> None:
    count = sum(repeats_itself(ids.tolist()) for ids in texts)
    if count > 0.05 * len(texts):
        print(f"{count} of {len(texts)} texts repeat the same 12 tokens three times or more, which heads would learn: "
              f"try --temperature {max(0.8, temperature + 0.2):.1f}", file=sys.stderr)

def warn_of_dropped(dropped: Counter) -> None:
    if reasons := [f"{turns} {reason}" for reason, turns in dropped.most_common(9)]:
        print(f"{dropped.total()} turns are left out: {', '.join(reasons)}", file=sys.stderr)

def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="Examples: at the top of prepare_data.py.")
    prepare_options(parser)
    return parser.parse_args(argv)

def usable(talks, template: Plain, dropped: Counter):
    """The conversations that the template can hold, with their ids."""
    for talk in talks:
        try:
            yield talk, template.ids(talk, answer=False)
        except UserError as error:
            dropped[f"in conversations where {error}"] += len(talk)

def template_of(args, tokenizer: Tokenizer, openings: list) -> Plain:
    """The model's template; for conversations else vicuna_v1.1; for openings that are text none."""
    talks = args.sharegpt or args.first_words
    wanted = talks or not all(isinstance(opening, str) for opening in openings)
    template = load_template(args.model, tokenizer) if wanted else None
    return template or (Vicuna if talks else Plain)(tokenizer)

def source_items(args, template: Plain, openings: list, dropped: Counter):
    """What the source holds: texts, prompts or conversations (messages and their ids or None), split and limited."""
    if args.first_words and (args.sharegpt or args.openings):
        raise UserError("--first-words makes conversations of texts: give --text or --tinystories")
    if (args.heads or args.dtype or args.fast) and not (args.distill or args.openings):
        raise UserError("--heads, --dtype and --fast are for text that the model writes: add --distill")
    if args.sharegpt:
        items = usable(conversations(args.sharegpt, dropped), template, dropped)
    elif args.openings:
        items = openings
    else:
        stories = args.tinystories and locate(args.tinystories, TINYSTORIES[args.split or "train"], repo_type="dataset")
        items = texts(stories or args.text, args.separator)
    if args.split and not args.tinystories:
        items = (item for i, item in enumerate(items) if (i % HELD_OUT == 0) == (args.split == "validation"))
    items = islice(items, args.limit)
    if args.first_words:
        items = (([{"role": "user", "content": " ".join(text.split(" ")[:args.first_words])},
                   {"role": "assistant", "content": text}], None) for text in items)
    return items

def own_items(args, items) -> dict:
    """What the model of this process continues or answers: seed → opening or messages."""
    if args.sharegpt or args.first_words:
        items = (messages for messages, _ in items)
    elif not args.openings:
        items = dict.fromkeys(opening(text, args.sentences) for text in items)
    rank, world = shard()
    items = {row_seed(args.seed, i): item for i, item in enumerate(items) if i % world == rank}
    if not items:
        source = args.openings or args.sharegpt or args.text or args.tinystories
        raise UserError(f"{source} holds nothing to continue: add an opening or question{' a process' * (world > 1)}")
    return items

def decoder_of(args, eos: list) -> Decoder:
    model = engines.load(args.model, TORCH_DTYPES.get(args.dtype), args.device, fast=args.fast)
    set_threads(model, args.threads, args.batch_size)
    sampling = Sampling(args.temperature)
    if not args.heads:
        return engines.decoder(model, sampling=sampling, eos=eos)
    heads = load_heads(args.heads, model)
    return engines.decoder(model, heads, Tree.from_pretrained(args.heads, heads, args.temperature), sampling, eos)

def distilled(args, items: dict, template: Plain, out: Path, source: dict) -> dict:
    """Writes the token file of the model's own text for the items → its facts. A stop leaves a `Partial` beside it."""
    tokenizer = template.tokenizer
    decoder, talks = decoder_of(args, tokenizer.eos), bool(args.sharegpt or args.first_words)
    config, weights = decoder.model.config, [hashlib.sha256(np.memmap(file, np.uint8, "r")).hexdigest()
                                             for file in weight_files(args.model)]
    if not talks:
        items = {key: template.prompt(item) for key, item in items.items()}
        check_prompts(list(items.values()), config)
    partial = Partial(out, source, [items, str(config), weights, tokenizer.sha256()])
    write = lambda prompts, seeds: batches.generate(decoder, prompts, args.max_new_tokens, seeds, args.batch_size)
    answers = lambda turn, prompts: remembered(turn, prompts, write, partial)
    try:
        with tqdm(desc="preparing", unit=" documents", total=len(items), miniters=1, disable=shard()[0] > 0) as bar:
            documents = continuations(items, answers, bar)
            if talks:
                documents = answered_anew(items, template, answers, config.max_position_embeddings, bar)
            facts = write_tokens(out, documents, tokenizer, config.vocab_size, source)
    except BaseException:
        if partial.texts:
            print(f"{partial.path} keeps {len(partial.texts)} texts: the same command goes on after them",
                  file=sys.stderr)
        raise
    partial.path.unlink(missing_ok=True)
    warn_of_loops(partial.texts.values(), args.temperature)
    return facts

def prepare(args) -> tuple[str, dict]:
    """Writes the token file → its name and its facts."""
    config, (rank, world) = LlamaConfig.from_pretrained(args.model), shard()
    tokenizer = Tokenizer(args.model, config)
    tokenizer.backend.encode_special_tokens = True      # "<s>" in a text is text, and does not begin a document
    openings, dropped = openings_of(args.openings) if args.openings else [], Counter()
    template = template_of(args, tokenizer, openings)
    items, out = source_items(args, template, openings, dropped), Path(args.out)
    if world > 1:
        out = out.with_name(f"{out.stem}-{rank:05d}-of-{world:05d}{out.suffix}")
    stories = args.tinystories and Path(args.tinystories, TINYSTORIES[args.split or "train"])
    keep_sources([*beside(out), f"{out}.partial"],
                 [args.text, args.sharegpt, args.openings, stories, args.heads, tokenizer.path.parent])
    free = ("model", "out", "device", "threads", "heads", "batch_size", "fast")
    source = {"model": model_name(args.model)} | {
        k: Path(v).name if k in ("text", "sharegpt", "openings") else v
        for k, v in vars(args).items() if v and k not in free}
    if args.distill or args.openings:
        items = own_items(args, items)
        warn_of_dropped(dropped)
        return out, distilled(args, items, template, out, source)
    items = islice(items, rank, None, world)
    talks = args.sharegpt or args.first_words
    documents = rendered(items, template) if talks else tokenised(items, tokenizer)
    try:
        with tqdm(documents, desc="preparing", unit=" documents", disable=rank > 0) as progress:
            return out, write_tokens(out, progress, tokenizer, config.vocab_size, source)
    finally:
        warn_of_dropped(dropped)

def main():
    out, facts = prepare(arguments())
    print(f"{out}: {facts['documents']} documents, {facts['tokens']} tokens, {facts['loss_tokens']} of them to learn")

if __name__ == "__main__":
    command_line(main)
