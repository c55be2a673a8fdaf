"""Plots of benchmark results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("agg")

SIZE_INCHES = (7, 4)
DPI = 110


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Write the plots of a benchmark report into a folder."""
    about = f"{report['cpu']}, {report['cores']} cores, {report['date'][:10]}"
    for name, plot in (("streams", _streams), ("throughput", _throughput), ("cpu", _cpu)):
        figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
        plot(axes, report)
        axes.set_title(f"{axes.get_title()}\n{about}", fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(folder / f"bench-{name}.png", dpi=DPI)
        plt.close(figure)


def draw_windows(report: Mapping[str, Any], path: Path) -> None:
    """Write the plot of ``perf.windows``: word error rate against streams, coloured by latency."""
    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    points = report["points"]
    latency = [point["chunk_secs"] + point["right_secs"] for point in points]
    dots = axes.scatter([point["streams"] for point in points], [point["wer"] for point in points], c=latency, cmap="viridis")
    figure.colorbar(dots, label="latency (chunk + right context), s")
    for point in points:
        parts = " + ".join(f"{point[part]:.1f}" for part in ("left_secs", "chunk_secs", "right_secs"))
        place = (point["streams"], point["wer"])
        axes.annotate(
            f"{point['latencies']} {parts}".strip(), place, fontsize=6, rotation=20, xytext=(4, 4), textcoords="offset points"
        )
    axes.set(xlabel="streams that two one-thread encoders could carry", ylabel="word error rate, %")
    axes.set_xlim(0, 1.2 * max(point["streams"] for point in points))
    axes.margins(y=0.15)
    axes.set_title(
        f"Windows of left context + chunk + right context, s\n{report['cpu']}, {report['cores']} cores, {report['date'][:10]}",
        fontsize=9,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_held(points: Mapping[tuple[str, str], tuple[float, float]], report: Mapping[str, Any], path: Path) -> None:
    """Write the picture of ``perf.held``: word error rate against streams held.

    Args:
        points: number of streams and error rate in percent, by repository and latency.
        report: with the machine and the date.
        path: of the picture.
    """
    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    for name in dict.fromkeys(name for name, _ in points):
        own = sorted((streams, wer, latency) for (of, latency), (streams, wer) in points.items() if of == name)
        axes.plot([streams for streams, _, _ in own], [wer for _, wer, _ in own], "o-", label=name)
        for streams, wer, latency in own:
            axes.annotate(latency, (streams, wer), fontsize=8, xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel="streams held in real time", ylabel="word error rate, %")
    axes.set_xlim(0, 1.2 * max(streams for streams, _ in points.values()))
    axes.margins(y=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"Live streams\n{report['cpu']}, {report['cores']} cores, {report['date'][:10]}", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_memory(traces: Mapping[str, Mapping[str, Any]], report: Mapping[str, Any], path: Path) -> None:
    """Write the picture of ``perf.long_recordings``: resident memory by process while each file is decoded.

    Args:
        traces: by name of the file, ``secs`` and, by process, ``rss_mb``.
        report: with the machine and the date.
        path: of the picture.
    """
    figure, columns = plt.subplots(1, len(traces), sharey=True, figsize=SIZE_INCHES, layout="constrained", squeeze=False)
    names = sorted({name for trace in traces.values() for name in trace["rss_mb"]})
    for axes, (kind, trace) in zip(columns[0], traces.items(), strict=True):
        for number, name in enumerate(names):
            axes.plot(trace["secs"], trace["rss_mb"].get(name, [0.0] * len(trace["secs"])), color=f"C{number}", label=name)
        axes.set(title=kind, xlabel="s")
    largest = max(max(values) for trace in traces.values() for values in trace["rss_mb"].values())
    columns[0][0].set(ylabel="resident memory, MB", ylim=(0, 1.1 * largest))
    figure.legend(*columns[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7)
    figure.suptitle(f"Recordings by REST, one at a time\n{report['cpu']}, {report['date'][:10]}", fontsize=9)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _streams(axes: Any, report: Mapping[str, Any]) -> None:
    """Plot the latency of partials against the number of paced streams."""
    trials = sorted(report["trials"], key=lambda trial: trial["streams"])
    streams = [trial["streams"] for trial in trials]
    axes.plot(streams, [trial["p95_ms"] / 1000 for trial in trials], "o-", label="p95")
    axes.plot(streams, [trial["p50_ms"] / 1000 for trial in trials], "o:", label="p50")
    limit = report["latency_limit_ms"] / 1000
    axes.axhline(limit, color="tab:red", label=f"limit {limit:.2f} s: chunk + right context + 0.3 s")
    axes.axvline(report["floor_streams"], color="gray", ls="--", label=f"floor: {report['floor_streams']:.0f} streams")
    axes.set(xlabel="streams at once", ylabel="latency of partials, s", ylim=(0, 3 * limit), title="Live streams in real time")
    axes.legend(fontsize=8)


def _throughput(axes: Any, report: Mapping[str, Any]) -> None:
    """Plot throughput against concurrency, for whole recordings and streams."""
    lines: dict[str, dict[int, float]] = {}
    for figure in report["figures"]:
        if figure["load"] in ("whole", "stream"):
            name = f"{figure['contender']}, {figure['load']}"
            lines.setdefault(name, {})[figure["concurrency"]] = figure["audio_secs_per_sec"]
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="at once", ylabel="audio seconds per second", title="Throughput")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncols=2)


def _cpu(axes: Any, report: Mapping[str, Any]) -> None:
    """Plot CPU seconds per audio second, stacked by process."""
    bars = [figure for figure in report["figures"] if figure["load"] != "windows"]
    labels = [f"{figure['contender']}, {figure['load']}, {figure['concurrency']}" for figure in bars]
    processes = sorted({process for figure in bars for process in figure["cpu_secs_per_audio_sec"]})
    axes.figure.set_size_inches(SIZE_INCHES[0], 1.5 + 0.25 * len(bars))
    left = [0.0] * len(bars)
    for process in processes:
        values = [figure["cpu_secs_per_audio_sec"].get(process, 0.0) for figure in bars]
        axes.barh(labels, values, left=left, label=process)
        left = [done + value for done, value in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="CPU seconds per audio second", title="CPU time by process")
    axes.legend(fontsize=7)
