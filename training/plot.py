"""Plot the log of a training: losses, and word error rates on held-out recordings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer

from training.command import run

mpl.use("Agg")
from matplotlib import pyplot as plt


def main(
    log: Annotated[Path, typer.Argument(help="log.jsonl of a training")],
    picture: Annotated[Path, typer.Argument(help="PNG file to write")],
) -> None:
    """Plot the log of a training."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, (losses, errors) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    learnt = [line for line in lines if "losses" in line]
    for name in ("transducer", "ctc"):
        losses.plot([x["at"]["step"] for x in learnt], [x["losses"][name] for x in learnt], label=name)
    losses.set(xlabel="steps", ylabel="loss per token (CTC weighted)", yscale="log")
    checked = [line for line in lines if "errors" in line]
    for name in sorted(checked[-1]["errors"]) if checked else ():
        steps = [x["at"]["step"] for x in checked]
        errors.plot(steps, [x["errors"][name]["all"] for x in checked], marker=".", label=name)
    errors.set(xlabel="steps", ylabel="word error rate % on held-out recordings", ylim=(0, 100))
    for axes in (losses, errors):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    run(main)
