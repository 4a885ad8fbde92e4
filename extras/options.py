"""The options of the three commands: tables, and which of them make no sense together."""
import argparse
from pathlib import Path
from extras.command_line import SEED, ArgumentParser, device, number, threads
from loading.config import DTYPES, LONGEST, MOST
from loading.documents import HELD_OUT
from loading.export import LAYOUTS
from loading.files import UserError, keep_sources, writable
from loading.heads import KINDS
from loading.trees import LARGEST

MODEL = str(Path(__file__).parent.parent / "model")
HEADS_FIRST = 0.5       # --medusa-2: the share of the steps that trains the heads alone
APART = {       # options of generate.py → those that make no sense beside them
    "--interactive": "--json --compare --prompt",
    "--batch-size": "--interactive --compare --trace --max-steps --show-accepted --explain",
    "--prompts-file": "--prompt --interactive --compare --trace --max-steps --show-accepted",
    "--tune": "--prompt --interactive --prompts-file --compare --profile --trace --max-steps --show-accepted "
              "--stop --ignore-eos --repetition-penalty",
    "--explain": "--json --interactive --prompts-file --compare --tune --profile --trace --max-steps",
    "--html": "--interactive --prompts-file --tune --explain",
    "--fast": "--explain --html --trace"}   # which show torch's own step

def text_argument(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text

def generate_options(parser: ArgumentParser) -> None:
    add, flag = parser.add_argument, lambda name, help: parser.add_argument(name, action="store_true", help=help)
    add("--model", default=MODEL, help="folder or hub id")
    add("--heads", help="folder, hub id, 'none', or 'lookup': what followed the longest earlier match in the text "
        "(default: medusa/ in the model's folder)")
    add("--revision", help="of the model on the hub")
    add("--prompt", action="append", type=text_argument, metavar="TEXT", help="may be repeated")
    add("--prompts-file", type=Path, metavar="FILE", help="one prompt a line; of JSON lines, or a list: a string, "
        '{"prompt": ..} or {"messages": [{"role": .., "content": ..}, ..]}')
    add("--context", type=number(int, 1, LONGEST), help="tokens of a prompt and its text together (default: what the "
        "model's config says)")
    add("--batch-size", type=number(int, 1, 4096), default=1, help="rows at once: prompts of a file, --samples")
    add("--max-new-tokens", type=number(int, 1), default=256, help="of a text (default: 256)")
    add("--stop", action="append", type=text_argument, metavar="TEXT", help="ends a text; may be repeated")
    flag("--ignore-eos", "a text goes on behind an end of text")
    add("--max-steps", type=number(int, 1), help="end after this number of decoding steps, plain or Medusa")
    add("--temperature", type=number(float, 0), default=0.0, help="0: always the most likely token")
    add("--acceptance", choices=["match", "typical"], default="match", help="typical: the paper's lossy rule")
    add("--epsilon", type=number(float, 1e-9, 1), default=0.09, help="of typical acceptance")
    add("--delta", type=number(float, 1e-9, 1e9), default=0.3, help="of typical acceptance")
    add("--top-k", type=number(int, 0), default=0, help="0: no limit")
    add("--top-p", type=number(float, 1e-9, 1), default=1.0)
    add("--min-p", type=number(float, 0, 1), default=0.0, help="least probability, as a share of the largest")
    add("--repetition-penalty", type=number(float, 1e-9, 1e9), metavar="X", help="as in HF, 1: none")
    add("--seed", type=SEED, default=0, help="text i draws from seed + i")
    add("--samples", type=number(int, 1, 4096), default=1, help="texts for each prompt")
    add("--tune", type=Path, metavar="FILE", help="openings, as in --prompts-file: write the tree that decodes such "
        "texts fastest here to --tree (default: tree.json beside the heads) and stop")
    add("--tree", metavar="JSON|FILE", help="list of paths of ranks, or an object with 'paths' (default: tree.json in "
        "the heads' folder, else 15 nodes of the published mc_sim_7b_63)")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's; float32 by PyTorch on a CPU")
    add("--quantize", choices=["int8"], help="weights in 8 bits, a scale for each output")
    add("--device", type=device, default="cpu")
    add("--threads", type=threads, default="auto", help="a number, or auto: measured at start")
    flag("--fast", "on a CPU the whole step in C++ (built on first use), on a GPU CUDA graphs")
    flag("--compile", argparse.SUPPRESS)
    flag("--compare", "decode plainly too: same tokens? what speed-up?")
    flag("--profile", "time each stage")
    add("--explain", type=number(int, 1), metavar="N", help="tell the first N steps: tree, samples, path, cache")
    add("--html", type=Path, metavar="FILE", help="write a page about the text: each step's tree, mask, cache and time")
    add("--trace", type=Path, metavar="FILE", help="write a trace of the (last) generation, for ui.perfetto.dev")
    flag("--show-accepted", "on a terminal: the colour of a token tells which head guessed it (none: the model itself)")
    flag("--interactive", "a conversation; !!help lists its commands")
    flag("--multiline", "with --interactive: a message ends with Ctrl-D")
    flag("--chat", "each prompt is a message to a chat model, put to it by its template")
    add("--template", choices=["auto", "model", "vicuna", "plain"], default="auto", help="how messages are put "
        "to the model; plain: it goes on with the text (auto: its own chat template, else vicuna_v1.1 for one named "
        "so, else plain)")
    add("--system", type=text_argument, help="the system message of a chat")
    flag("--json", "one JSON object a prompt, nothing else on stdout")

def check_generate_options(args) -> None:
    if args.compile:
        raise UserError("--compile is gone: give --fast")
    given = {f"--{name.replace('_', '-')}" for name, value in vars(args).items() if value not in (None, False)}
    if args.batch_size == 1:
        given.discard("--batch-size")
    for option, others in APART.items():
        if option in given and (wrong := given.intersection(others.split())):
            raise UserError(f"{option} does not go with {', '.join(sorted(wrong))}: leave out one or the other")
    for path in filter(None, (args.trace, args.html)):
        writable(path)                              # or an error, before the work
    keep_sources([args.trace, args.html], [args.model, Path(args.model, "medusa"), args.heads, args.tree])
    if args.batch_size > 1 and not (args.prompts_file or args.tune or args.samples > 1):
        raise UserError("--batch-size needs --prompts-file (or --tune), or --samples")
    if "" in (args.stop or ()):
        raise UserError("--stop: the text is empty, so it appears everywhere")
    if args.samples > 1 and (args.interactive or args.tune or args.temperature == 0):
        raise UserError("--samples are texts for --prompt or --prompts-file that differ: add --temperature")
    if args.html and (args.samples > 1 or len(args.prompt or ()) > 1):
        raise UserError("--html shows one text: give one --prompt, and no --samples")

def prepare_options(parser: ArgumentParser) -> None:
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    add("--model", default=MODEL, help="folder or hub id")
    source("--text", metavar="FILE", help='UTF-8 text, or .jsonl with a "text" in each line')
    source("--tinystories", nargs="?", const="roneneldan/TinyStories", metavar="DIR_OR_HUB_ID",
           help="its V2-GPT4 file of --split, by default from the hub")
    source("--sharegpt", metavar="FILE", help="conversations or messages, JSON or .jsonl (the model's template, or "
           "vicuna_v1.1)")
    source("--openings", metavar="FILE", help='one opening a line, or JSON with {"prompt": ..} or {"messages": ..}; '
           "the model continues each")
    add("--out", required=True, metavar="FILE", help="the token file; .loss, .starts and .json are added beside it")
    add("--separator", default="<|endoftext|>", help="the line between two texts")
    add("--split", choices=("train", "validation"), help=f"validation: every {HELD_OUT}th document (default: all)")
    add("--limit", type=number(int, 1), help="only the first documents, openings or conversations")
    add("--first-words", type=number(int, 1), help="texts become conversations: the first N words ask, all answers")
    add("--distill", action="store_true", help="the model continues first sentences, or answers questions")
    add("--sentences", type=number(int, 1), default=1, help="with --distill: first sentences of a text that it gets")
    add("--heads", help="Medusa heads to write with (default: plain, faster for a batch on a CPU)")
    add("--max-new-tokens", type=number(int, 1), default=400, help="of a continuation or an answer")
    add("--temperature", type=number(float, 0), default=0.0)
    add("--seed", type=SEED, default=0, help="item i of the source draws from seed + i")
    add("--batch-size", type=number(int, 1, 4096), default=128, help="rows written at once")
    add("--dtype", choices=DTYPES, help="of the model that writes (default: as in generate.py)")
    add("--device", type=device, default="cpu")
    add("--fast", action="store_true", help="write with the engine of generate.py --fast")
    add("--threads", type=threads, default="auto", help="of that model: a number, or auto: measured at start")

def train_options(parser: ArgumentParser) -> None:
    add, flag = parser.add_argument, lambda name, help: parser.add_argument(name, action="store_true", help=help)
    add("--model", default=MODEL, help="the base model: folder or hub id")
    add("--data", nargs="+", metavar="FILE", help="token files of prepare_data.py")
    add("--out", required=True, metavar="FOLDER", help="the heads' folder; with --medusa-2 the new model's")
    flag("--eval", "train nothing: what the heads in --out are worth on all of --data")
    add("--export", nargs=2, default=argparse.SUPPRESS, metavar=("LAYOUT", "FOLDER"), help="train nothing: write the "
        f"heads in a folder to --out for another program; LAYOUT: {', '.join(LAYOUTS)}")
    flag("--json", "print the result as one JSON object")
    add("--kind", choices=KINDS, default="medusa", help="heads also see: nothing, the root, all drafts before")
    add("--num-heads", type=number(int, 1, 64), default=4)
    add("--num-layers", type=number(int, 1, 64), default=1, help="residual blocks per head")
    add("--width", type=number(int, 1, MOST), help="inner width of the blocks (default: square, the paper's)")
    add("--trunk", type=number(int, 1, MOST), help="inner width of a first block that all heads share")
    flag("--tie-lm-head", "use the base model's lm_head, not a matrix per head")
    add("--recent", type=number(int, 1, 64), default=1, help="hidden states that a head sees, of the last positions")
    add("--draft-vocab", type=number(int, 1), metavar="N", help="only the N most frequent tokens can be drafted")
    add("--target", choices=("tokens", "distill"), default="tokens", help="distill: the base model's distribution")
    flag("--medusa-2", f"after {HEADS_FIRST:.0%}% of the steps train the base model too; writes a whole model")
    add("--epochs", type=number(int, 1, 10 ** 5), default=2)
    add("--lr", type=number(float, 0, 10), default=1e-3, help="of the heads")
    add("--base-lr", type=number(float, 0, 10), default=1e-4, help="of the base model (--medusa-2)")
    add("--schedule", choices=("cosine", "constant"), default="cosine")
    add("--warmup", type=number(int, 0), help="steps (default: 40, at most a tenth of the run)")
    add("--decay", type=number(float, 0), default=0.8, help="head k's loss counts coefficient * decay**k")
    add("--coefficient", type=number(float, 0), default=0.2)
    add("--clip", type=number(float, 0), default=1.0, help="largest norm of the gradient, 0: no limit")
    add("--batch-tokens", type=number(int, 1), default=4096, help="a few hundred batches make heads, more good ones")
    add("--accumulate", type=number(int, 1), default=1, help="batches per step")
    add("--pack", type=number(int, 8), metavar="LENGTH", help="rows of this length, cut from the stream of documents")
    flag("--bf16", "bfloat16 autocast, for the base model too")
    add("--tree-nodes", type=number(int, 1, LARGEST), default=15, help="of tree.json, the root not counted")
    flag("--resume", "go on from the checkpoint in --out")
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    add("--log-every", type=number(int, 1), default=20, help="steps between lines of metrics.jsonl")
    add("--seed", type=SEED, default=0)
    add("--device", type=device, default="cpu")

def check_train_options(parser: ArgumentParser, args) -> None:
    if "export" not in args:
        return args.data or parser.error("the following arguments are required: --data")
    wrong = [f"--{name.replace('_', '-')}" for name, value in vars(args).items()
             if name not in ("export", "model", "out") and value != parser.get_default(name)]
    if wrong:
        raise UserError(f"--export does not go with {', '.join(wrong)}: leave out one or the other")
    if args.export[0] not in LAYOUTS:
        raise UserError(f"--export: the layout {args.export[0]!r} is none of {', '.join(LAYOUTS)}")
