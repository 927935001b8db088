"""The figure of `drl benchmark step`: microseconds per action against the step of the episode."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from drl import figures

OURS = ("cpu", "cpu-bfloat16")
COLOURS = {  # Okabe and Ito's, which the colour-blind tell apart
    "cpu": "#0072B2", "cpu-bfloat16": "#56B4E9", "fast-transformers": "#009E73", "window": "#E69F00",
    "cache": "#D55E00", "torch": "#000000", "compile": "#CC79A7",
}
GREY = "#777777"
APART = 0.055  # of the axis' height, between two labels


def draw(curves: Mapping[str, tuple[str, Sequence[tuple[float, float]]]], file: Path) -> None:
    """Write a PNG of (step, microseconds), each line with its name beside it.

    Args:
        curves: name as shown to key, one of benchmark_step_peers.PEERS, and points.

    Raises:
        UserError: matplotlib is missing.
    """
    canvas, axes = figures.pyplot("--figure").subplots(figsize=(10, 5.6), layout="constrained")
    ends = []
    for name, (key, points) in curves.items():
        steps, times = np.array(points).T
        colour, bold = COLOURS.get(key, GREY), key in OURS
        axes.plot(steps, times, color=colour, linewidth=3 if bold else 1.6, linestyle="-" if key in COLOURS else "--")
        ends.append((name, steps[-1], times[-1], colour, "bold" if bold else "normal"))
    times = [time for _, points in curves.values() for _, time in points]
    axes.set(xscale="log", yscale="log", ylim=(min(times) / 1.5, max(times) * 1.5),
             xlabel="step of the episode", ylabel="microseconds per action",
             title="One environment, one thread, from a numpy observation to a numpy action")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for (name, step, time, colour, weight), height in zip(
        ends, spread([_height(axes, end[2]) for end in ends]), strict=True
    ):
        axes.annotate(
            name, (step, time), (1.02, height), textcoords="axes fraction", va="center", color=colour, weight=weight,
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "linestyle": ":"},
        )
    figures.save(canvas, file)


def spread(heights: Sequence[float], apart: float = APART) -> list[float]:
    """The same heights, in the same order, at least `apart` from each other and moved as little as that takes."""
    order = np.argsort(heights, kind="stable")
    groups: list[list[float]] = []  # wanted heights, less what stands below in the group
    for height in np.asarray(heights)[order]:
        groups.append([height])
        while len(groups) > 1 and _low(groups[-2], apart) + len(groups[-2]) * apart > _low(groups[-1], apart):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [_low(group, apart) + i * apart for group in groups for i in range(len(group))]
    result = np.empty(len(placed))
    result[order] = placed
    return result.tolist()


def _low(group: Sequence[float], apart: float) -> float:
    """Where the lowest of a group of neighbours stands when the group is centred on what they want."""
    return float(np.mean([height - i * apart for i, height in enumerate(group)]))


def _height(axes, time: float) -> float:
    """Share of the axis' height at which `time` stands."""
    return float(axes.transAxes.inverted().transform(axes.transData.transform((1, time)))[1])
