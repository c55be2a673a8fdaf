"""Draws a training's log: the losses, and the word error rates on what was held out."""

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
    picture: Annotated[Path, typer.Argument(help="The PNG to write")],
) -> None:
    """Draw a training's log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    hours = [line["at"]["total_hours"] for line in lines]
    figure, (losses, errors) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in ("transducer", "ctc"):
        values = [line["losses"].get(name, float("nan")) for line in lines]
        losses.plot(hours, values, marker=".", label=name)
    losses.set(xlabel="hours of audio passed", ylabel="loss a token (CTC weighted)", yscale="log")
    for name in sorted(lines[-1]["errors"]):
        errors.plot(hours, [line["errors"][name]["all"] for line in lines], marker=".", label=name)
    errors.set(xlabel="hours of audio passed", ylabel="word error rate % on held-out recordings", ylim=(0, 100))
    for axes in (losses, errors):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    run(main)
