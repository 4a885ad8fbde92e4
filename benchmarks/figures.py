"""Draws the README's figures from saved results, as SVG in docs/figures/ (matplotlib, development only).

    python benchmarks/figures.py                        # all of them
    python benchmarks/figures.py --only peers
    python benchmarks/figures.py --measure-depth        # first decodes what depth.svg shows: docs/results/depth.json

Each figure names the command that made its numbers and the machine. The same results give the same bytes.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.command_line import command_line  # noqa: E402
from llama import Llama, attention_mask  # noqa: E402
from loading.documents import openings_of  # noqa: E402
from loading.files import read_json, write_json  # noqa: E402
from loading.tokenizer import Tokenizer  # noqa: E402
from loading.trees import draw, parse_tree, published_tree  # noqa: E402
from tinymedusa import Decoder, PlainDecoder, Tree  # noqa: E402
from variants import batches  # noqa: E402
from variants.heads import load_heads  # noqa: E402

RESULTS, FIGURES, TREE = ROOT / "docs" / "results", ROOT / "docs" / "figures", ROOT / "model" / "medusa" / "tree.json"
MACHINE = "2 cores of an AMD EPYC (Zen 4), Python 3.11.7, torch 2.13.0 CPU"   # of results that do not say it themselves
SHAPES = {"native-model": "embedded model", "native-v0": "padded v0", "native-110M": "padded 110M",
          "smollm2": "SmolLM2-135M-Instruct", "native-1B": "padded 1B"}
PARAMETERS = {"native-model": 1_049_664, "native-v0": 4_621_376, "native-110M": 134_105_856,
              "native-1B": 1_261_529_088, "gpu-7B": 6_738_415_616}
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#999999"     # Okabe and Ito
COMPARE = "python benchmarks/compare.py SHAPE (options: docs/speed.md)"


def saved(figure, name: str, command: str, machine: str = MACHINE) -> None:
    figure.text(0.01, 0.005, f"{command};\n{machine}", fontsize=7, color="#555555", va="bottom")
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    print(FIGURES / f"{name}.svg")


def tree_mask() -> None:
    """The embedded heads' tree, and beside it what each of its nodes may see, as the model gets it."""
    tree, prefix = Tree.from_paths(parse_tree(TREE, "cpu")[0]), 5
    nodes, names = len(tree.paths), ["root", *(" ".join(map(str, path)) for path in tree.paths[1:])]
    seen = attention_mask(torch.tensor([prefix]), tree.ancestors, prefix + nodes + 1)[0]            # [N, W]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), width_ratios=(1, 1.5))
    row = {node: i for i, (node, _) in enumerate(draw(tree.paths))}
    for node in range(nodes):
        x, y, parent = int(tree.depth[node]), -row[node], int(tree.parent[node])
        left.plot([x - 1, x - 1, x] if node else [x], [-row[parent], y, y] if node else [y], color=GREY, zorder=1)
        left.text(x, y, f"{node}: {names[node]}", ha="center", va="center", fontsize=9,
                  bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": BLUE})
    deepest = int(tree.depth.max())
    left.set(xlim=(-0.5, deepest + 0.5), xticks=range(deepest + 1), yticks=[], title="the tree: node: ranks on its way",
             xticklabels=["base", *(f"head {k}" for k in range(1, deepest + 1))])
    left.spines[:].set_visible(False)
    right.imshow(seen, cmap=matplotlib.colors.ListedColormap(["white", BLUE]), aspect="auto", alpha=0.8)
    right.set(xticks=range(seen.shape[1]), yticks=range(nodes), yticklabels=[f"{i}: {n}" for i, n in enumerate(names)],
              xticklabels=[f"slot {i}" for i in range(prefix)] + [f"node {i}" for i in range(nodes)] + ["later"],
              title="what it may see: all committed slots, its ancestors and itself")
    right.tick_params(axis="x", rotation=90, labelsize=8)
    right.set_xticks([i - 0.5 for i in range(seen.shape[1])], minor=True)
    right.set_yticks([i - 0.5 for i in range(nodes)], minor=True)
    right.grid(which="minor", color=GREY, linewidth=0.4)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    saved(figure, "tree-mask", "python benchmarks/figures.py --only tree-mask")


def contest(name: str) -> list:
    """The rows of a saved run of benchmarks/compare.py."""
    return read_json(RESULTS / f"{name}.json")["rows"]


def machines(names) -> str:
    """What some saved runs ran on."""
    found = [read_json(RESULTS / f"{name}.json")["machine"] for name in names]
    named = (m.get("gpu") or f"{m['cores']} cores of an {m['processor'].replace('(R)', '')}" for m in found)
    return ", ".join(dict.fromkeys(named))


def peers() -> None:
    """Tokens per second of everything that was compared, a panel a model."""
    figure, axes = plt.subplots(3, 2, figsize=(11, 12))
    axes[2, 1].set_visible(False)
    for axis, (name, title) in zip(axes.flat, SHAPES.items(), strict=False):
        rows = [r for r in contest(name) if r.get("tokens_per_second")][::-1]
        for y, row in enumerate(rows):
            speed, (low, high), lossy = row["tokens_per_second"], row["quartiles"], "lossy" in row["row"]
            axis.barh(y, speed, color=GREY if lossy else BLUE if row["row"].startswith("ours") else ORANGE,
                      hatch="///" if lossy else None, xerr=[[max(0, speed - low)], [max(0, high - speed)]],
                      error_kw={"elinewidth": 0.8})
            axis.text(high, y, f" {speed:,.0f}", va="center", fontsize=7)
        axis.set(yticks=range(len(rows)), yticklabels=[r["row"] for r in rows], title=f"{title}, tokens per second")
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("one prompt at a time, greedy, medians with quartiles: ours blue, peers orange, with loss hatched")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    saved(figure, "peers", COMPARE, machines(SHAPES))


def gains(name: str) -> dict:
    """Engine and weights → Medusa's tokens per second over those of plain decoding with the same."""
    found = {}
    for row in contest(name):
        if row["row"].startswith("ours, Medusa") and "published" not in row["row"] and row.get("to_own_plain"):
            engine = {"native": "C++", "graphs": "CUDA graphs"}.get(row["worker"].partition("_")[0], "PyTorch")
            found[f"{engine} {row['precision']}"] = row["to_own_plain"]
    return found


def pay() -> None:
    """Medusa over plain decoding: by the model's size, and of the real model one factor at a time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(1, 1.25))
    sizes, real = {name: gains(name) for name in PARAMETERS}, gains("smollm2") | gains("gpu-smollm2")
    modes = "PyTorch f32", "C++ f32", "C++ bf16", "C++ int8", "CUDA graphs bf16"
    for mode, colour in zip(modes, (GREY, BLUE, GREEN, ORANGE, RED), strict=True):
        points = [(PARAMETERS[name], found[mode]) for name, found in sizes.items() if mode in found]
        left.plot(*zip(*points, strict=True), marker="o", color=colour, label=mode)
        if mode in real:
            left.plot([134_515_008], [real[mode]], marker="*", markersize=13, color=colour, markeredgecolor="black")
    left.set(xscale="log", xticks=list(PARAMETERS.values()), xticklabels=["1M", "4.6M", "134M", "1.3B", "6.7B"],
             xlabel="parameters; circles: the story model padded to a size, stars: SmolLM2-135M-Instruct",
             ylabel="tokens per second, Medusa / plain decoding", title="by size, one text, greedy")
    left.minorticks_off()
    rows = read_json(RESULTS / "batch-smollm2.json")["rows"]
    speed = lambda size, some: max(r["tokens_per_second"] for r in rows if r["batch"] == size and some(r["nodes"]))
    at = [row for file in sorted(RESULTS.glob("smollm2-questions*.json")) for row in read_json(file)["rows"]]
    factors = {"engine and weights": {mode: real[mode] for mode in modes if mode in real},
               "texts at once (C++ bf16)": {str(size): speed(size, lambda n: n > 1) / speed(size, lambda n: n == 1)
                                            for size in sorted({r["batch"] for r in rows})},
               "temperature (C++ bf16)": {str(row["temperature"]): row["speed-up"]
                                          for row in sorted(at, key=lambda row: row["temperature"])}}
    x = 0
    for (title, bars), colour in zip(factors.items(), (BLUE, ORANGE, GREEN), strict=True):
        places = range(x, x + len(bars))
        right.bar(places, bars.values(), color=colour, label=title)
        for place, (name, value) in zip(places, bars.items(), strict=True):
            right.text(place, value, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
            right.text(place, 0.05, name, ha="center", va="bottom", fontsize=8, rotation=90, color="white")
        x += len(bars) + 1
    right.margins(y=0.35)
    right.set(xticks=[], title="SmolLM2-135M-Instruct, one factor at a time")
    for axis in (left, right):
        axis.axhline(1, color="black", linewidth=1)
        axis.legend(fontsize=8, loc="upper left" if axis is left else "upper right")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    saved(figure, "pay", f"{COMPARE}; benchmarks/batch.py; benchmarks/acceptance.py: docs/does-medusa-pay.md",
          machines([*PARAMETERS, "smollm2"]))


def depth() -> None:
    """Tokens per step of trees cut off at each depth."""
    data = read_json(RESULTS / "depth.json")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    for name, colour in zip(dict.fromkeys(r["tree"] for r in data["rows"]), (BLUE, GREEN, ORANGE), strict=True):
        rows = [r for r in data["rows"] if r["tree"] == name]
        left.plot([r["depth"] for r in rows], [r["tokens_per_step"] for r in rows], marker="o", color=colour,
                  label=name)
        for r in rows:
            left.annotate(f"{r['nodes']}", (r["depth"], r["tokens_per_step"]), textcoords="offset points",
                          xytext=(0, 5), fontsize=7, ha="center", color=colour)
        right.plot(range(len(rows[-1]["reach"])), rows[-1]["reach"], marker="o", color=colour, label=name)
    deepest = range(1 + max(r["depth"] for r in data["rows"]))
    left.set(xticks=deepest, xlabel="depth at which the tree is cut (0: plain decoding); its nodes at each point",
             ylabel="tokens per step")
    right.set(xticks=deepest, ylim=(0, 1.03), xlabel="drafts accepted, at least", ylabel="share of the steps")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    saved(figure, "depth", data["command"])


def measure_depth() -> None:
    """Decodes the held-out openings with trees cut off at each depth, the embedded heads and the paper's."""
    torch.set_num_threads(1)
    model, rows = Llama.from_pretrained(ROOT / "model"), []
    prompts = Tokenizer(ROOT / "model", model.config).encode_batch(openings_of(ROOT / "benchmarks" / "openings.txt"))
    for folder, title, paths in (("medusa", "Hydra heads, shipped tree", parse_tree(TREE, "cpu")[0]),
                                 ("medusa", "Hydra heads, published tree", published_tree(4, 63)),
                                 ("medusa-paper", "the paper's heads, published tree", published_tree(4, 63))):
        heads = load_heads(ROOT / "model" / folder, model)
        for deepest in range(1 + max(map(len, paths))):
            tree, counts, begun = Tree.from_paths([p for p in paths if len(p) <= deepest]), Counter(), set()
            decoder = Decoder(model, heads, tree) if deepest else PlainDecoder(model)
            for step in batches.generate(decoder, prompts, 200, batch_size=50):
                counts.update(len(ids) for i, ids in step.items() if i in begun)
                begun |= step.keys()
            steps, at_least = counts.total(), lambda n, counts=counts: sum(c for size, c in counts.items() if size > n)
            rows.append({"tree": title, "depth": deepest, "nodes": len(tree.paths), "steps": steps,
                         "tokens_per_step": round(sum(n * c for n, c in counts.items()) / steps, 4),
                         "reach": [round(at_least(n) / steps, 4) for n in range(deepest + 1)]})
            print(json.dumps(rows[-1]))
    write_json(RESULTS / "depth.json", {"command": "python benchmarks/figures.py --measure-depth", "rows": rows})


def batch() -> None:
    """Tokens per second by batch size: plain decoding, and Medusa with the best tree of each size."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    commands = []
    for axis, name in zip(axes, ("model", "110M"), strict=True):
        found = [RESULTS / f"batch-{name}{engine}.json" for engine in ("", "-fast")]
        results = [read_json(path) for path in found if path.exists()]
        commands += [result["command"] for result in results]
        measured = [row for result in results for row in result["rows"]]
        for mode in dict.fromkeys(r["mode"] for r in measured):
            sizes = sorted({r["batch"] for r in measured if r["mode"] == mode})
            rows = [[r for r in measured if (r["mode"], r["batch"]) == (mode, size)] for size in sizes]
            plain = [next(r for r in some if r["nodes"] == 1) for some in rows]
            best = [max((r for r in some if r["nodes"] > 1), key=lambda r: r["tokens_per_second"]) for some in rows]
            for some, colour, label in ((plain, ORANGE, "plain"), (best, BLUE, "Medusa, best tree (its nodes)")):
                if some:
                    axis.errorbar(sizes, [r["tokens_per_second"] for r in some], yerr=[
                        [max(0, r["tokens_per_second"] - r["quartiles"][0]) for r in some],
                        [max(0, r["quartiles"][1] - r["tokens_per_second"]) for r in some]],
                        color=colour, linestyle="-" if mode == "eager" else ":", marker="o",
                        label=f"{label}, {mode}", elinewidth=0.8)
            for r in best:
                axis.annotate(f"{r['nodes']}", (r["batch"], r["tokens_per_second"]), textcoords="offset points",
                              xytext=(0, 6), fontsize=8, ha="center", color=BLUE)
        sizes = sorted({r["batch"] for r in measured})
        ticks = [t for t in (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
                 if 0.8 * axis.get_ylim()[0] < t < 1.3 * axis.get_ylim()[1] and axis.get_ylim()[1] / t < 300]
        axis.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes, yticks=ticks, yticklabels=ticks,
                 xlabel="prompts at once", ylabel="tokens per second", title=SHAPES[name])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.15, 1, 1))
    saved(figure, "batch", ";\n".join(commands))


def main():
    drawn = {"tree-mask": tree_mask, "depth": depth, "peers": peers, "batch": batch,
             "pay": pay}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=list(drawn))
    parser.add_argument("--measure-depth", action="store_true")
    args = parser.parse_args()
    plt.rcParams.update({"svg.hashsalt": "tinymedusa", "svg.fonttype": "none", "font.size": 9})
    if args.measure_depth:
        measure_depth()
    for name, one in drawn.items():
        if args.only in (None, name):
            one()


if __name__ == "__main__":
    command_line(main)
