"""What generate.py prints for people: coloured text as it comes, figures, stage tables, accepted drafts."""
import os
import sys

COLOURS = (36, 32, 33, 35, 34, 31)      # of heads 1, 2, ..; what the base wrote itself has the terminal's own


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


def report(result: dict, heads, args) -> str:
    """The figures of one prompt as text, the stage tables and accepted drafts with --profile."""
    line = lambda name, r: (f"{name:<8}{r['new_tokens']:>5} tokens {r['steps']:>5} steps "
                            f"{r['tokens_per_step'] or 0:>6.2f} tokens/step {r['seconds']:>8.3f} s "
                            f"{r['tokens_per_second']:>9.1f} tokens/s")
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
    """How many of the steps accepted 0, 1, .. drafts, as lines."""
    most, total = max(result["accepted"], default=0), max(1, result["steps"])
    return ["", "accepted drafts in a step"] + [
        f"{n:>4} {steps:>6}{steps / total:>8.1%}  {'#' * round(40 * steps / most)}"
        for n, steps in enumerate(result["accepted"])]


def original_table(result: dict) -> str:
    """The stage table of the student project, 50 columns: seconds of each stage of one answer, and their shares."""
    row = lambda label, value: label + f"{value:.3f}".rjust(50 - len(label))
    seconds = {name: s["total_ms"] / 1000 for name, s in result["stages"].items()}
    total, shown = sum(seconds.values()), "medusa" in seconds
    names = {"init": "init", "medusa": "medusa", "tree": "Tree", "posterior": "Posterior", "update": "Update"}
    lines = [row(f"Wall time {label}: ", seconds[name]) for name, label in names.items()] if shown else \
        [row("Wall time base inference: ", total)]
    lines += ["-" * 50] + [row(f"Wall time portion {label}: ", seconds[name] / total)
                           for name, label in names.items() if name != "init"] if shown else []
    return "\n".join(["=" * 50, *lines, "-" * 50, row("Tokens/second: ", result["new_tokens"] / total), "=" * 50])
