"""Figures of a report: scores and losses on the way, scores by what was asked for and by how was acted."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from drl import figures
from drl.report_figures import FONT, colour, label, line, panels
from drl.report_pack import Pack, Run
from drl.report_rows import MODES, Row, interval, longest, targets

PANEL = 1.9  # inches of a panel with curves
UNLIKE = 4  # times as many updates in the longest row as in the shortest, where they are drawn by magnitude
LEGEND = 120  # characters of a line of the legend
Curves = dict[tuple[str, int], dict[float, list[float]]]  # by task and place of the row, by x: a value of each seed


def draw_curves(pack: Pack, rows: list[Row], tasks: dict[str, str], file: Path, option: str = "--write") -> bool:
    """Score, where checkpoints on the way were scored, and training loss against updates, task by task."""
    pyplot = figures.pyplot(option)
    scored = {key: points for key, points in _by_update(rows, tasks).items() if len(points) > 1}
    lost = _losses(rows, tasks)
    kinds = [kind for kind in (("normalised score", scored, "linear"), ("training loss", lost, "log")) if kind[1]]
    if not kinds:
        return False
    drawn = [(task, kind) for kind in kinds for task in tasks.values() if any(key[0] == task for key in kind[1])]
    places = sorted({place for _, curves, _ in kinds for _, place in curves})
    ends = [max(points) for _, curves, _ in kinds for points in curves.values()]
    across = "log" if max(ends) > UNLIKE * min(ends) else "linear"
    with pyplot.rc_context(FONT):
        canvas, axes = panels(pyplot, len(drawn), PANEL, _below([rows[place].name for place in places]))
        for axis, (task, (name, curves, scale)) in zip(axes, drawn, strict=True):
            for (other, place), points in curves.items():
                if other == task:
                    _band(axis, place, points)
            axis.set(title=task, xscale=across, yscale=scale, ylabel=name, xlabel="updates")
            for part, subs in ((axis.xaxis, (1,)), (axis.yaxis, (1, 2, 5))):
                if part.get_scale() == "log":
                    part.set_major_locator(pyplot.LogLocator(subs=subs))
                    part.set_major_formatter("{x:,g}")
                    part.set_minor_formatter(pyplot.NullFormatter())
        _legend(pyplot, canvas, rows, places)
        figures.save(canvas, file)
    return True


def draw_targets(pack: Pack, rows: list[Row], tasks: dict[str, str], file: Path, option: str = "--write") -> bool:
    """Score of the final checkpoint against the return asked for, where several were."""
    pyplot = figures.pyplot(option)
    curves: Curves = {}
    for place, row in enumerate(rows):
        for run in _once(row):
            for target, result in longest(result for result in run.results
                                          if (result.step, result.mode) == (row.step, row.mode)).items():
                curves.setdefault((tasks[run.config.dataset], place), {}).setdefault(target, []).append(result.score)
    curves = {key: points for key, points in curves.items() if len(points) > 1}
    if not curves:
        return False
    drawn = [task for task in tasks.values() if any(key[0] == task for key in curves)]
    places = sorted({place for _, place in curves})
    with pyplot.rc_context(FONT):
        canvas, axes = panels(pyplot, len(drawn), PANEL, _below([rows[place].name for place in places]))
        for axis, task in zip(axes, drawn, strict=True):
            for (other, place), points in curves.items():
                if other == task:
                    _band(axis, place, points, marker="o", markersize=3.5)
            axis.set(title=task, ylabel="normalised score", xlabel="target return")
        _legend(pyplot, canvas, rows, places)
        figures.save(canvas, file)
    return True


def draw_modes(pack: Pack, rows: list[Row], tasks: dict[str, str], file: Path, option: str = "--write") -> bool:
    """A panel for each variant whose same checkpoints were acted recurrently and by window."""
    pyplot = figures.pyplot(option)
    pairs = [(row, other) for row in rows for other in rows if (row.mode, other.mode) == MODES
             and (row.variant, row.step, row.target) == (other.variant, other.step, other.target)]
    pairs = [pair for pair in pairs if any(_common(*pair, task) for task in tasks.values())]
    if not pairs:
        return False
    named = list(tasks.values())
    with pyplot.rc_context(FONT):
        canvas, axes = panels(pyplot, len(pairs), 0.9 + 0.42 * len(named), sharey=True)
        for axis, pair in zip(axes, pairs, strict=True):
            for y, task in enumerate(named):
                for shift, row, shade in zip((-0.17, 0.17), pair, (0, 1), strict=True):
                    seeds = _common(*pair, task)
                    values = np.array([row.cells[task][seed] for seed in seeds])
                    if seeds:
                        axis.plot(interval([values]), [y + shift] * 2, color=colour(shade), linewidth=6, alpha=0.35,
                                  solid_capstyle="butt")
                        axis.plot(values, [y + shift] * len(seeds), ".", color=colour(shade), markersize=3)
                        axis.plot(values.mean(), y + shift, "os"[shade], color=colour(shade), markeredgecolor="black",
                                  markersize=5, label=row.mode if y == 0 else None)
            axis.set_title(label(pair[0].variant, 40))
            axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes[0].set_yticks(range(len(named)), named)
        axes[0].set_ylim(len(named) - 0.5, -0.5)
        handles = [pyplot.Line2D([], [], color=colour(shade), marker="os"[shade], linewidth=6, alpha=0.7, label=mode)
                   for shade, mode in enumerate(MODES)]
        canvas.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False,
                      title="normalised score of the same checkpoints; bars 95% intervals, dots seeds")
        figures.save(canvas, file)
    return True


def _common(row: Row, other: Row, task: str) -> list[int]:
    """Seeds of a task that both rows have."""
    return sorted(row.cells.get(task, {}).keys() & other.cells.get(task, {}).keys())


def _once(row: Row) -> Iterable[Run]:
    return {run.name: run for run in row.runs}.values()


def _by_update(rows: list[Row], tasks: dict[str, str]) -> Curves:
    """Scores of the seeds by update, of each task and row."""
    curves: Curves = {}
    for place, row in enumerate(rows):
        for run in _once(row):
            target = targets(run)[row.target]
            for step in sorted({result.step for result in run.results}):
                chosen = longest(r for r in run.results if (r.step, r.mode) == (step, row.mode))
                if target in chosen:
                    points = curves.setdefault((tasks[run.config.dataset], place), {})
                    points.setdefault(step, []).append(chosen[target].score)
    return curves


def _losses(rows: list[Row], tasks: dict[str, str]) -> Curves:
    """Loss of the seeds by update, of each task and variant, which stands at the place of its first row."""
    curves: Curves = {}
    seen = set()
    for place, row in enumerate(rows):
        for run in _once(row):
            if run.name not in seen:
                points = curves.setdefault((tasks[run.config.dataset], place), {})
                for step, loss in zip(run.steps, run.losses, strict=True):
                    points.setdefault(step, []).append(loss)
                seen.add(run.name)
    return {key: points for key, points in curves.items() if points}


def _band(axis, place: int, points: dict[float, list[float]], **settings) -> None:
    """Mean of the seeds as a line, their range as a band."""
    steps = sorted(points)
    axis.fill_between(steps, [min(points[step]) for step in steps], [max(points[step]) for step in steps],
                      color=colour(place), alpha=0.15, linewidth=0)
    axis.plot(steps, [np.mean(points[step]) for step in steps], line(place), color=colour(place), linewidth=1.3,
              **settings)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.locator_params(axis="x", nbins=4)


def _columns(names: list[str]) -> int:
    return max(1, min(5, LEGEND // (max(map(len, names)) + 8)))


def _below(names: list[str]) -> float:
    """Inches of the legend."""
    lines = max(label(name, LEGEND).count("\n") + 1 for name in names)
    return 0.4 + 0.21 * lines * -(-len(names) // _columns(names))


def _legend(pyplot, canvas, rows: list[Row], places: list[int]) -> None:
    """The rows that are drawn, under the panels."""
    names = [rows[place].name for place in places]
    handles = [pyplot.Line2D([], [], color=colour(place), linestyle=line(place), label=label(name, LEGEND))
               for place, name in zip(places, names, strict=True)]
    canvas.legend(handles=handles, loc="outside lower center", ncols=_columns(names), frameon=False,
                  title="line: mean of seeds; band: their range")
