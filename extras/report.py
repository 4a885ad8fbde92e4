"""What generate.py reports: figures, coloured text as it comes, stage tables, accepted drafts, traces."""
import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
import torch
from tqdm import tqdm
from loading.files import UserError, replacing
from tinymedusa import Decoder, Stages

ENDED = {"stop": "ended by --stop", "length": "cut at --max-new-tokens", "context": "cut: the context is full",
         "steps": "cut at --max-steps"}
COLOURS = (36, 32, 33, 35, 34, 31)      # of heads 1, 2, ..; what the base model wrote itself has the terminal's own

def figures(tokens: int, texts: int, accepted: Counter, seconds: float, stages: Stages) -> dict:
    """What is reported of the new tokens of `texts` texts; accepted: a text's steps by the drafts they accepted."""
    steps = accepted.total()
    totals = {name: {"calls": len(t), "total_ms": round(1000 * sum(t), 3)} for name, t in stages.seconds.items()}
    return {"new_tokens": tokens, "steps": steps,
            "tokens_per_step": round((tokens - texts) / steps, 4) if steps else None,
            "accepted": [accepted[n] for n in range(max(accepted, default=-1) + 1)],
            "seconds": round(seconds, 6), "tokens_per_second": round(tokens / seconds, 2), "stages": totals}

def ended(result: dict, form: str) -> str:
    """`form` with a word on a text that no end-of-text token ended, or on a prompt that was skipped."""
    why = result.get("error") or ENDED.get(result.get("finish_reason"))
    return form.format(why) if why else ""

@contextmanager
def traced(decoder: Decoder, path: Path | None):
    """Write a trace of what the decoder does meanwhile, its stages named; path None: nothing."""
    if path is None:
        yield
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler's own lines are on stderr
    run = decoder.run
    def named(name, *do):
        with torch.profiler.record_function(name):
            return run(name, *do)
    decoder.run = named
    with torch.profiler.profile() as profiler:
        yield
    with replacing(path) as (temporary,):
        temporary.touch()                           # where that fails, it is our error
        profiler.export_chrome_trace(str(temporary))
        if not temporary.stat().st_size:            # after a failure torch raises nothing and leaves a file
            temporary.with_name(f"{temporary.name}.tmp").unlink(missing_ok=True)
            raise UserError("can't write the trace: is the disk full?")

def shown(prompt: str | list, args) -> str:
    """What stands in front of a text: the prompt that it goes on with, or the line that it answers."""
    text = prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""
    return text if text is prompt and not args.chat else text + "\n"

def printer(args, before: str):
    """Prints text as it comes, `before` in front of the first; nothing with --json."""
    coloured = args.show_accepted and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    def emit(text, head):
        nonlocal before
        if not args.json:
            shown = f"\033[{COLOURS[(head - 1) % len(COLOURS)]}m{text}\033[0m" if coloured and head and text else text
            print(before + shown, end="", flush=True)
        before = ""
    return emit

def print_batch(results, texts: int, about: dict, heads, args) -> None:
    """Prints the results of many prompts as they come; the figures of all go to stderr with --json."""
    with tqdm(total=texts, desc="writing texts", unit=" texts") as progress:
        for result in results:
            if "prompt" in result:
                line = f"{shown(result['prompt'], args)}{result.get('text', '')}\n" + ended(result, "[{}]\n")
                line = json.dumps(result | about) if args.json else line
                progress.write(line + "\n", end="")           # whole lines, wherever it is stopped
                progress.update()
    print(report(result | about, heads, args), end="", file=sys.stderr if args.json else sys.stdout, flush=True)

def report(result: dict, heads, args) -> str:
    """The figures of one prompt as text, the stage tables and accepted drafts with --profile."""
    line = lambda name, r: (f"{name:<8}{r['new_tokens']:>5} tokens {r['steps']:>5} steps "
                            f"{r['tokens_per_step'] or 0:>6.2f} tokens/step {r['seconds']:>8.3f} s "
                            f"{r['tokens_per_second']:>9.1f} tokens/s{ended(r, '   {}')}")
    name, baseline = "medusa" if heads else "plain", result.get("baseline")
    lines = [line("plain", baseline)] if baseline else []
    lines.append(line(name, result))
    if "tree" in result:
        lines.append(f"tree: {result['tree']}")
    if baseline:
        where = result["first_difference"]
        parts = f"NO, they part at {where}" if where else "no, as acceptance is typical"
        same = "yes" if result["identical"] else parts
        lines.append(f"identical: {same}   speed-up: {result['speedup']:.2f}x")
    for title, r in (("plain", baseline), (name, result)):
        if r and r["stages"]:
            total = sum(s["total_ms"] for s in r["stages"].values())
            lines += ["", f"{title + ' stage':<16}{'calls':>7}{'mean ms':>10}{'share':>8}"]
            lines += [f"{stage:<16}{s['calls']:>7}{s['total_ms'] / s['calls']:>10.3f}{s['total_ms'] / total:>8.1%}"
                      for stage, s in r["stages"].items()]
    return "\n".join(lines + (histogram(result) if heads and args.profile else [])) + "\n"

def histogram(result: dict) -> list[str]:
    most, total = max(result["accepted"], default=0), max(1, result["steps"])
    return ["", "accepted drafts in a step"] + [
        f"{n:>4} {steps:>6}{steps / total:>8.1%}  {'#' * round(40 * steps / most)}"
        for n, steps in enumerate(result["accepted"])]

def original_table(result: dict) -> str:
    """The student project's table, 50 columns: seconds of each stage of one answer, and their shares."""
    row = lambda label, value: label + f"{value:.3f}".rjust(50 - len(label))
    seconds = {name: s["total_ms"] / 1000 for name, s in result["stages"].items()}
    names = {"init": "init", "medusa": "medusa", "tree": "Tree", "posterior": "Posterior", "update": "Update"}
    total, lines = sum(seconds.values()), [row("Wall time base inference: ", sum(seconds.values()))]
    if "medusa" in seconds:
        lines = [row(f"Wall time {label}: ", seconds[name]) for name, label in names.items()] + ["-" * 50]
        lines += [row(f"Wall time portion {names[name]}: ", seconds[name] / total) for name in list(names)[1:]]
    return "\n".join(["=" * 50, *lines, "-" * 50, row("Tokens/second: ", result["new_tokens"] / total), "=" * 50])
