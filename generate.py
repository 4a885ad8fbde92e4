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
import time
from collections import Counter
from itertools import islice
from pathlib import Path


from extras.chat import Chat, interactive
from extras.command_line import ArgumentParser, command_line, row_seed, set_threads
from extras.compare import compared
from extras.explain import explaining
from extras.options import check_generate_options, generate_options
from extras.page import page_of, recording
from extras.report import figures, print_batch, printer, report, traced
from extras.tune import tune
from fast import engines
from llama import Llama
from loading.checkpoint import TORCH_DTYPES
from loading.config import check_prompts
from loading.documents import prompts_of
from loading.files import UserError, locate, write_text
from loading.heads import base_of, heads_inside
from loading.templates import SYSTEM, question, template_of
from loading.tokenizer import Tokenizer
from loading.trees import read_tree
from tinymedusa import ROOT, Decoder, MedusaHeads, Sampling, Stages, Tree, call
from train_heads import evaluate
from variants import batches
from variants.heads import load_heads
from variants.lookup import Lookup
from variants.typical import Typical

OPENING = "Once upon a time, there was a little girl named Lily who loved to play in the garden."

def heads_folder(args) -> str | None:
    """The heads of --heads, by default those in `medusa/` in the model's folder, or among its own tensors."""
    if args.heads is not None:
        return None if args.heads == "none" else args.heads
    without_config = Path(args.model, "medusa/model.safetensors").is_file()
    if config := locate(args.model, "medusa/config.json", args.revision, required=without_config):
        for name in ("medusa/model.safetensors", "medusa/tree.json"):      # from a hub: fetched beside the config
            locate(args.model, name, args.revision, required=False)
        return str(config.parent)
    return args.model if heads_inside(args.model, args.revision) else None

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
    if folder is None:
        if args.tree is not None:
            raise UserError("--tree needs heads: give --heads FOLDER")
        return None, None, None
    heads = load_heads(folder, model, args.revision if folder == args.model else None)
    if args.tune:
        if not args.tree and not Path(args.heads or args.model).is_dir():
            raise UserError(f"{args.heads or args.model} is on the hub: say with --tree FILE where to write the tree")
        return heads, None, args.tree or str(Path(folder) / "tree.json")
    paths, source = read_tree(folder, len(heads), heads.draft_size, args.tree, engines.mode(model), args.batch_size,
                              args.temperature)
    return heads if paths else None, Tree.from_paths(paths), source

def decoder_of(args, model: Llama, heads: MedusaHeads | None, tree: Tree | None) -> Decoder:
    decoder = engines.decoder(model, heads, tree or ROOT, args.sampling)
    if args.acceptance == "typical":
        decoder.accept = Typical(args.epsilon, args.delta)
    return decoder

def sample_number(index: int, args) -> dict:
    """Which sample of its prompt a text is. Each text has a seed of its own: the first seed and its index."""
    return {"sample": index % args.samples} if args.samples > 1 else {}

def run(decoder: Decoder, tokenizer: Tokenizer, ids: list, args, seed: int, emit) -> dict:
    """One prompt → tokens, steps, times. `emit(text, head)` gets the new text as it comes and the head that guessed it,
    0: the base model itself."""
    stages, decode = Stages(args.device), tokenizer.stream(ids)
    decoder.run = stages if args.profile else call
    if args.explain:
        decoder.run, emit = explaining(tokenizer, ids), lambda text, head: None
    if args.html:
        recorded, emit = recording(decoder, emit)
    most = args.explain or args.max_steps
    steps = islice(decoder.generate([ids], args.max_new_tokens, [seed]), most and most + 1)     # the prefill first
    new, seconds, text, accepted = [], 0.0, "", Counter()
    with traced(decoder, args.trace):
        while True:
            begin = time.perf_counter()
            (tokens,) = next(steps, (None,))
            seconds += time.perf_counter() - begin
            for head, token in enumerate(tokens or (None,), 1):
                piece = decode([] if token is None else [token], end=token is None)
                text += piece
                emit(piece, head if tokens and head < len(tokens) else 0)
            if tokens is None:
                break
            accepted[len(tokens) - 1] += len(new) > 0
            new += tokens
    return {"text": text, "token_ids": new, **figures(len(new), 1, accepted, seconds, stages),
            **({"recorded": recorded} if args.html else {})}

def many(decoder: Decoder, tokenizer: Tokenizer, prompts: list, encoded: list, args):
    """--batch-size prompts at once. Yields what `one_prompt` gives, in the prompts' order, each as soon as it and all
    before it are done; at last the figures of all together. A text's seconds are those of a row shared with others."""
    stages, begin = Stages(args.device), time.perf_counter()
    decoder.run = stages if args.profile else call
    seeds = [row_seed(args.seed, i) for i in range(len(prompts))]
    steps = batches.generate(decoder, encoded, args.max_new_tokens, seeds, args.batch_size)
    done, everything, tokens, following = {}, Counter(), 0, 0
    for i, new, seconds in batches.finished(steps):
        ids, accepted = sum(new, []), Counter(len(step) - 1 for step in new[1:])
        text = tokenizer.stream(encoded[i])(ids, end=True)
        done[i] = {"prompt": prompts[i], **sample_number(i, args), "prompt_tokens": len(encoded[i]), "text": text,
                   "token_ids": ids, **figures(len(ids), 1, accepted, seconds, Stages("cpu"))}
        everything, tokens = everything + accepted, tokens + len(ids)
        while following in done:
            yield done.pop(following)
            following += 1
    yield figures(tokens, len(prompts), everything, time.perf_counter() - begin, stages)

def one_prompt(decoder: Decoder, tokenizer: Tokenizer, prompt: str, ids: list, seed: int, args) -> dict:
    """Everything about one prompt, as `--json` prints it; without --json the text streams to the terminal meanwhile."""
    if not args.compare:
        result = run(decoder, tokenizer, ids, args, seed, printer(args, prompt))
        return {"prompt": prompt, "prompt_tokens": len(ids), **result}
    plain = engines.decoder(decoder.model, sampling=args.sampling)
    decode = lambda decoder, emit: run(decoder, tokenizer, ids, args, seed, emit)
    return {"prompt": prompt, "prompt_tokens": len(ids), **compared(plain, decoder, decode, ids, seed, prompt, args)}

def arguments(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0], epilog="Examples: at the top of generate.py.")
    generate_options(parser)
    args = parser.parse_args(argv)
    args.sampling = Sampling(args.temperature, args.top_k, args.top_p)
    return args

def main():
    args = arguments()
    check_generate_options(args)
    prompts = [] if args.interactive else args.prompt or [OPENING]
    if args.prompts_file:
        prompts = prompts_of(args.prompts_file)
        args.batch_size = min(args.batch_size, len(prompts) * args.samples)
    prompts = [prompt for prompt in prompts for _ in range(args.samples)]
    if base := base_of(args.model, args.revision):
        args.model, args.heads = base, args.heads or args.model     # the name of published heads alone
    model = engines.load(args.model, TORCH_DTYPES.get(args.dtype), args.device, args.revision, args.quantize, args.fast)
    tokenizer = Tokenizer(args.model, model.config, args.revision)
    heads, tree, tree_source = heads_and_tree(args, model)
    if args.tune:
        return tune(model, tokenizer, heads, tree_source, evaluate, args)
    if args.explain and heads is None:
        raise UserError("--explain shows trees, and this is plain decoding: give --heads FOLDER, or a larger --tree")
    chat = template_of(args) == "vicuna"
    args.system = SYSTEM if args.system is None else args.system
    set_threads(model, args.threads, args.batch_size)
    encoded = [tokenizer.encode(question(0, prompt, args.system) if chat else prompt) for prompt in prompts]
    check_prompts(encoded, model.config)
    decoder = decoder_of(args, model, heads, tree)
    if args.interactive:
        return interactive(Chat(decoder, tokenizer, chat, args, lambda ids, seed, emit: run(
            decoder, tokenizer, ids, args, seed, emit)))
    about = {"tree": f"{len(tree.paths)} nodes, {tree_source}"} if tree else {}
    if args.prompts_file:
        return print_batch(many(decoder, tokenizer, prompts, encoded, args), len(prompts), about, heads, args)
    for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        result = one_prompt(decoder, tokenizer, prompt, ids, row_seed(args.seed, index), args)
        result |= about | sample_number(index, args)
        page = page_of(result, decoder.tree, tokenizer, ids, args) if args.html else None
        shown = f"\ntree: {result['tree']}" if args.explain else "\n\n" + report(result, heads, args)
        print(json.dumps(result) if args.json else shown, flush=True)
        if page:
            write_text(args.html, page)

if __name__ == "__main__":
    command_line(main)
