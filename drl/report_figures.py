"""Figures of a report: what each row scores, task by task and overall."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from drl import figures
from drl.report_pack import Pack
from drl.report_rows import Row
from drl.report_table import dataset_scores, overall

# Okabe and Ito's colours, told apart by colour-blind readers; more rows than colours differ in their lines too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555")
LINES = ("-", "--", ":", "-.")
WIDTH = 10.0  # inches of every figure: what a README shows at its full width
COLUMNS = 3  # of panels
LABEL, SUMMARY = 26, 34  # characters of a line of a row's name
FONT = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def line(place: int) -> str:
    return LINES[place // len(COLOURS) % len(LINES)]


def label(name: str, width: int = LABEL) -> str:
    """A row's name on lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(name, width))


def panels(pyplot, count: int, height: float, below: float = 0.5, **settings):
    """A figure of WIDTH with `count` panels, `height` inches each, and `below` inches for what stands under them; those
    that the grid has beyond are hidden."""
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    canvas, axes = pyplot.subplots(rows, columns, figsize=(WIDTH, below + height * rows), layout="constrained",
                                   squeeze=False, **settings)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return canvas, list(axes.flat[:count])


def height_of(rows: Sequence[Row], width: int, least: float) -> float:
    """Inches in which the names of rows at equal distances do not touch."""
    return len(rows) * max(least, 0.06 + 0.15 * max(label(row.name, width).count("\n") + 1 for row in rows))


def draw_scores(pack: Pack, rows: list[Row], tasks: dict[str, str], file: Path, option: str = "--write") -> bool:
    """Panels of tasks: a bar for the mean, whiskers for its interval, a dot for each seed; a line for the mean score
    of the dataset's episodes where it is known."""
    pyplot = figures.pyplot(option)
    known = dataset_scores(pack, tasks)
    with pyplot.rc_context(FONT):
        height = 0.75 + height_of(rows, LABEL, 0.24)
        canvas, axes = panels(pyplot, len(tasks), height, sharey=True)
        for axis, task in zip(axes, tasks.values(), strict=True):
            for place, row in enumerate(rows):
                if task not in row.cells:
                    axis.text(0, place, " none", va="center", color="#777777")
                    continue
                (values,) = row.values([task])
                mean, (low, high) = values.mean(), row.intervals[task]
                axis.barh(place, mean, height=0.62, color=colour(place), alpha=0.55)
                axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color="black", capsize=3, linewidth=1)
                axis.plot(values, np.full(len(values), place), "o", color=colour(place), markeredgecolor="black",
                          markeredgewidth=0.6, markersize=3.5)
            if task in known:
                axis.axvline(known[task], color="#555555", linewidth=1, linestyle=":")
            axis.set_title(task)
        axes[0].set_yticks(range(len(rows)), [label(row.name) for row in rows])
        axes[0].invert_yaxis()
        dotted = "; dotted: the dataset's episodes" if known else ""
        canvas.supxlabel(f"normalised score: 0 random, 100 expert; dots are seeds, whiskers 95% intervals{dotted}",
                         fontsize=9)
        figures.save(canvas, file)
    return True


def draw_summary(pack: Pack, rows: list[Row], tasks: dict[str, str], file: Path, option: str = "--write") -> bool:
    """Average and interquartile mean of the rows that have every task, with intervals."""
    pyplot = figures.pyplot(option)
    whole = [(place, row, found) for place, row in enumerate(rows) if (found := overall(row, list(tasks.values())))]
    if not whole:
        return False
    with pyplot.rc_context(FONT):
        height = 0.8 + height_of([row for _, row, _ in whole], SUMMARY, 0.34)
        canvas, axes = panels(pyplot, 2, height, sharey=True)
        for axis, kind in zip(axes, ("average", "interquartile mean"), strict=True):
            for y, (place, _, found) in enumerate(whole):
                one = found[kind]
                axis.plot([one.low, one.high], [y, y], color=colour(place), linewidth=7, alpha=0.4,
                          solid_capstyle="butt")
                axis.plot(one.value, y, "o", color=colour(place), markeredgecolor="black", markersize=6)
                axis.annotate(f"{one.value:.1f}", (one.value, y), (0, 7), textcoords="offset points", ha="center",
                              fontsize=8)
            several = f"average of {len(tasks)} tasks" if len(tasks) > 1 else "mean"
            axis.set(title=several if kind == "average" else kind, xlabel="normalised score, 95% interval")
            axis.margins(x=0.12)
            axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes[0].set_yticks(range(len(whole)), [label(row.name, SUMMARY) for _, row, _ in whole])
        axes[0].set_ylim(len(whole) - 0.5, -0.65)
        figures.save(canvas, file)
    return True
