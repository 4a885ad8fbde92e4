"""Draws the metrics.jsonl of trainings: loss, each head's top-1, tokens per second (matplotlib, development only).

    python benchmarks/plot_training.py heads/metrics.jsonl other/metrics.jsonl --out training.png
"""
import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("metrics", nargs="+", metavar="FILE")
    parser.add_argument("--out", default="training.png")
    args = parser.parse_args()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for path in args.metrics:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        steps, name = [line["step"] for line in lines], Path(path).parent.name
        axes[0].plot(steps, [line["loss"] for line in lines], label=name)
        for k in range(len(lines[0]["top1"])):
            axes[1].plot(steps, [line["top1"][k] for line in lines], label=f"{name}, head {k + 1}", alpha=0.85 ** k)
        axes[2].plot(steps, [line["tokens_per_second"] for line in lines], label=name)
    for axis, title in zip(axes, ("loss, weighted", "top-1 accuracy", "tokens per second"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
