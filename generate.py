"""Writes text with Medusa, profiled.

    python generate.py                                        # the embedded story model, a fixed opening
    python generate.py --compare --profile                    # and by plain decoding: same tokens? where is the time?
    python generate.py --prompt "The little dog" --temperature 0.8 --seed 3
    python generate.py --interactive --show-accepted          # a conversation; colours tell which head guessed a token
    python generate.py --prompts-file prompts.txt --batch-size 8 --json > texts.jsonl
    python generate.py --tune openings.txt                    # fit the tree to these heads and this machine

steps counts decoding steps. The prefill emits the first token, so tokens_per_step = (new_tokens - 1) / steps, which is
exactly 1 for plain decoding. seconds is prefill and decoding together, without loading and without printing.
"""
if __name__ == "__main__":      # Ctrl-C while torch is imported: an end without a traceback, as `command_line`'s later
    import signal
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN or signal.signal(signal.SIGINT, signal.SIG_DFL)
import json
import sys
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from extras.chat import Chat, interactive
from extras.command_line import ArgumentParser, command_line, row_seed, set_threads
from extras.compare import compared
from extras.ends import Text
from extras.explain import explaining
from extras.options import check_generate_options, generate_options
from extras.page import page_of, recording
from extras.report import figures, print_batch, printer, report, shown, traced
from extras.tune import tune
from fast import engines
from llama import Llama
from loading.checkpoint import TORCH_DTYPES
from loading.config import check_prompts
from loading.documents import openings_of, prompts_of
from loading.files import UserError, locate, write_text
from loading.heads import base_of
from loading.templates import Plain, template_of
from loading.tokenizer import Tokenizer
from loading.trees import read_tree
from tinymedusa import ROOT, Decoder, MedusaHeads, Sampling, Stages, Tree, call
from train_heads import evaluate
from variants import batches
from variants.heads import load_heads
from variants.lookup import Lookup
from variants.penalty import penalize
from variants.typical import Typical

OPENING = "Once upon a time, there was a little girl named Lily who loved to play in the garden."

def heads_folder(args) -> str | None:
    """Where heads are: --heads, by default `medusa/` in the model's folder, or its own files. None: none are wanted."""
    if args.heads is not None:
        return None if args.heads == "none" else args.heads
    without_config = Path(args.model, "medusa/model.safetensors").is_file()
    if config := locate(args.model, "medusa/config.json", args.revision, required=without_config):
        for name in ("medusa/model.safetensors", "medusa/tree.json"):      # from a hub: fetched beside the config
            locate(args.model, name, args.revision, required=False)
        return str(config.parent)
    return args.model

def heads_and_tree(args, model: Llama) -> tuple[MedusaHeads | None, Tree | None, str | None]:
    """The heads, their tree and where that is from; with --tune no tree yet, and where to write it. Heads whose tree is
    the root alone, since plain decoding is faster, are None."""
    if args.heads == "lookup":
        if args.tune:
            raise UserError("--tune fits a tree to trained heads; prompt lookup drafts a chain: give --tree")
        heads = Lookup(model.config)
        chain = heads.chain if args.tree is None else read_tree("", len(heads), heads.draft_size, args.tree)[0]
        return heads if chain else None, Tree.from_paths(chain), "prompt lookup"
    folder = heads_folder(args)
    own = folder == args.model
    heads = folder and load_heads(folder, model, args.revision if own else None, required=args.heads or not own)
    if heads is None:
        if args.tree is not None or args.compare and args.heads is None:
            raise UserError(f"{'--tree' if args.tree is not None else '--compare'} needs heads: give --heads FOLDER")
        if args.heads is None:
            print(f"no heads in {args.model}: plain decoding; --heads FOLDER names some", file=sys.stderr)
        return None, None, None
    if args.tune:
        if not args.tree and not Path(args.heads or args.model).is_dir():
            raise UserError(f"{args.heads or args.model} is on the hub: say with --tree FILE where to write the tree")
        return heads, None, args.tree or str(Path(folder) / "tree.json")
    paths, source = read_tree(folder, len(heads), heads.draft_size, args.tree, engines.mode(model), args.batch_size,
                              args.temperature)
    return heads if paths else None, Tree.from_paths(paths), source

def decoder_of(args, model: Llama, heads: MedusaHeads | None = None, tree: Tree | None = None, eos=None) -> Decoder:
    """Without heads plain decoding, with them what writes the same text."""
    decoder = engines.decoder(model, heads, tree or ROOT, args.sampling, () if args.ignore_eos else eos)
    if args.repetition_penalty:
        penalize(decoder, args.repetition_penalty)
    return decoder

def described(index: int, prompts: list, encoded: list, args) -> dict:
    """Which text it is. Each has a seed of its own: the first seed and its index."""
    sample = {"sample": index % args.samples} if args.samples > 1 else {}
    return {"prompt": prompts[index], **sample, "prompt_tokens": len(encoded[index])}

def run(decoder: Decoder, tokenizer: Tokenizer, ids: list, args, seed: int, emit) -> dict:
    """One prompt → tokens, steps, times. `emit(text, head)` gets the new text as it comes and the head that guessed it,
    0: the base model itself."""
    stages, text = Stages(args.device), Text(tokenizer, ids, decoder, args)
    decoder.run = stages if args.profile else call
    if args.explain:
        emit = explaining(decoder, tokenizer, ids)
    if args.html:
        recorded, emit = recording(decoder, emit)
    most = args.explain or args.max_steps
    steps = islice(decoder.generate([ids], args.max_new_tokens, [seed]), most and most + 1)     # the prefill first
    seconds, accepted = 0.0, Counter()
    with traced(decoder, args.trace):
        while not text.stopped:
            begin = time.perf_counter()
            (tokens,) = next(steps, (None,))
            seconds += time.perf_counter() - begin
            if tokens is None:
                break
            text.add_step(tokens, emit)
            accepted[len(tokens) - 1] += len(text.ids) > 1          # not by the prefill
        emit(text.add([], end=True), 0)
    recorded = {"recorded": recorded} if args.html else {}
    return text.result() | figures(len(text.ids), 1, accepted, seconds, stages) | recorded

def many(decoder: Decoder, tokenizer: Tokenizer, prompts: list, encoded: list, wrong: dict, args):
    """--batch-size prompts at once. Yields what is reported of each, or what is wrong with it, in their order, as soon
    as it and all before it are done; at last the figures of all. A text's seconds are those of a shared row."""
    stages, begin = Stages(args.device), time.perf_counter()
    decoder.run = stages if args.profile else call
    done = {i: {"error": str(error)} for i, error in wrong.items()}
    good = [i for i in range(len(encoded)) if i not in done]
    prompt_ids, seeds = [encoded[i] for i in good], [row_seed(args.seed, i) for i in good]
    texts = {index: Text(tokenizer, ids, decoder, args) for index, ids in enumerate(prompt_ids)}
    watch = {"is_over": lambda index, new: texts[index].add_step(new)} if args.stop else {}
    steps = batches.generate(decoder, prompt_ids, args.max_new_tokens, seeds, args.batch_size, **watch)
    everything, tokens, following = Counter(), 0, 0
    for index, new, seconds in batches.finished(steps):
        text, accepted = texts.pop(index), Counter(len(step) - 1 for step in new[1:])
        text.add([] if watch else sum(new, []), end=True)
        done[good[index]] = text.result() | figures(len(text.ids), 1, accepted, seconds, Stages("cpu"))
        everything, tokens = everything + accepted, tokens + len(text.ids)
        while following in done:
            yield described(following, prompts, encoded, args) | done.pop(following)
            following += 1
    yield figures(tokens, len(good), everything, time.perf_counter() - begin, stages)

def one_by_one(decoder: Decoder, tokenizer: Tokenizer, prompts: list, encoded: list, about: dict, heads, args) -> None:
    """Reports each prompt's text; without --json it streams to the terminal meanwhile."""
    plain = decoder_of(args, decoder.model, eos=decoder.eos.tolist()) if args.compare else None
    for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        seed = row_seed(args.seed, index)
        decode = partial(run, tokenizer=tokenizer, ids=ids, args=args, seed=seed)
        if plain:
            result = compared(plain, decoder, decode, ids, seed, prompt, args)
        else:
            result = decode(decoder, emit=printer(args, shown(prompt, args)))
        result = described(index, prompts, encoded, args) | result | about
        page = page_of(result, decoder.tree, tokenizer, ids, args) if args.html else None
        lines = f"\ntree: {result['tree']}" if args.explain else "\n\n" + report(result, heads, args)
        print(json.dumps(result) if args.json else lines, flush=True)
        if page:
            write_text(args.html, page)

def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="Examples: at the top of generate.py.")
    generate_options(parser)
    args = parser.parse_args(argv)
    args.sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    return args

def given_prompts(args) -> list:
    """The texts or messages to go on with, each --samples times."""
    if args.tune or args.interactive:
        return openings_of(args.tune) if args.tune else []
    given = prompts_of(args.prompts_file) if args.prompts_file else args.prompt or [OPENING]
    return [prompt for prompt in given for _ in range(args.samples)]

def encode(template: Plain, prompts: list, config, skip: bool) -> tuple[list, dict]:
    """The ids of each prompt, and what is wrong with those that can't be continued, index → UserError. It is raised
    unless they are to be skipped, or if there are no others."""
    if not skip:
        encoded = [template.prompt(prompt) for prompt in prompts]
        check_prompts(encoded, config)
        return encoded, {}
    encoded, wrong = [[] for _ in prompts], {}
    for i, prompt in enumerate(prompts):
        try:
            encoded[i] = template.prompt(prompt)
            check_prompts([encoded[i]], config)
        except UserError as error:
            if isinstance(prompt, list) and template.name == "plain":
                raise                                           # there is no template: not this prompt's fault
            wrong[i] = error
    if len(wrong) == len(prompts):
        raise wrong[i]
    return encoded, wrong

def main():
    args = arguments()
    check_generate_options(args)
    prompts = given_prompts(args)
    together = args.prompts_file or args.samples > 1 and args.batch_size > 1
    if together:
        args.batch_size = min(args.batch_size, len(prompts))
    if base := base_of(args.model, args.revision):
        args.model, args.heads = base, args.heads or args.model     # the name of published heads alone
    model = engines.load(args.model, TORCH_DTYPES.get(args.dtype), args.device, args.revision, args.quantize, args.fast,
                         args.context)
    tokenizer = Tokenizer(args.model, model.config, args.revision)
    template = template_of(args, tokenizer, prompts)
    args.chat = template.chat
    heads, tree, tree_source = heads_and_tree(args, model)
    if args.tune:
        return tune(model, template, prompts, heads, tree_source, evaluate, args)
    if args.explain and heads is None:
        raise UserError("--explain shows trees, and this is plain decoding: give --heads FOLDER, or a larger --tree")
    set_threads(model, args.threads, args.batch_size)
    encoded, wrong = encode(template, prompts, model.config, bool(together))
    decoder = decoder_of(args, model, heads, tree, tokenizer.eos)
    if args.acceptance == "typical":
        decoder.accept = Typical(args.epsilon, args.delta)
    if args.interactive:
        return interactive(Chat(decoder, tokenizer, template, args, lambda ids, seed, emit: run(
            decoder, tokenizer, ids, args, seed, emit)))
    about = {"tree": f"{len(tree.paths)} node{'s' * (len(tree.paths) > 1)}, {tree_source}"} if tree else {}
    if together:
        results = many(decoder, tokenizer, prompts, encoded, wrong, args)
        return print_batch(results, len(prompts), about, heads, args)
    one_by_one(decoder, tokenizer, prompts, encoded, about, heads, args)

if __name__ == "__main__":
    command_line(main)
