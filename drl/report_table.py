"""Tables of a report, in Markdown: a cell is the mean over seeds and the half width of its 95% interval."""

from collections.abc import Iterable

import numpy as np

from drl import scores
from drl.report_pack import Pack
from drl.report_rows import Comparison, Estimate, Row, estimate

NONE = "none"
DASH = "–"
EPISODES = "the episodes of the dataset"


def lines_of(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
            for cells in (header, ["---"] * len(header), *rows)]


def told(value: Estimate, seeds: int = 2) -> str:
    """71.3 ± 4.2; without an interval where there is one seed alone."""
    return f"{value.value:.1f} ± {value.half:.1f}" if seeds > 1 else f"{value.value:.1f}"


def overall(row: Row, tasks: list[str]) -> dict[str, Estimate] | None:
    """Average over tasks and interquartile mean over tasks and seeds; None where a task is missing."""
    if row.cells.keys() < set(tasks):
        return None
    values = row.values(tasks)
    return {"average": estimate(values), "interquartile mean": estimate(values, statistic=scores.interquartile_mean)}


def most_seeds(rows: list[Row]) -> int:
    return max(len(seeds) for row in rows for seeds in row.cells.values())


def table(rows: list[Row], tasks: list[str], known: dict[str, float], short: bool = False) -> list[str]:
    """Rows by tasks, then the average and the interquartile mean.

    Args:
        known: mean score of a dataset's episodes by task.
        short: where there are more than three tasks, leave them out, and rows that would then be empty.
    """
    named = [] if short and len(tasks) > 3 else tasks
    rows = [row for row in rows if named or overall(row, tasks)] or rows
    columns = [task.replace("/", "<br>") for task in named] + ["average"] * (len(tasks) > 1) + ["interquartile mean"]
    values: dict[str, list[Estimate | None]] = {}
    for row in rows:
        whole = overall(row, tasks)
        cells = [_cell(row, task) for task in named]
        values[row.name] = [*cells, *([None] * (1 + (len(tasks) > 1)) if whole is None else
                                      [whole["average"]] * (len(tasks) > 1) + [whole["interquartile mean"]])]
    best = [max((cell.value for cell in column if cell), default=None) for column in zip(*values.values(), strict=True)]
    most = most_seeds(rows)
    body = []
    if known:
        complete = known.keys() >= set(tasks)
        body.append([EPISODES, "", *(f"{known[task]:.1f}" if task in known else DASH for task in named),
                     *([f"{np.mean(list(known.values())):.1f}" if complete else DASH] * (len(tasks) > 1)), DASH])
    for row in rows:
        one = max(map(len, row.cells.values())) == 1
        cells = []
        for place, (value, top) in enumerate(zip(values[row.name], best, strict=True)):
            seeds = len(row.cells.get(named[place], ())) if place < len(named) else 1 if one else 2
            text = (NONE if place < len(named) else DASH) if value is None else told(value, seeds)
            if value is not None and value.value == top and len(rows) > 1:
                text = f"**{text}**"
            if value is not None and place < len(named) and seeds < most:
                text += f" ({seeds} seed{'s' * (seeds > 1)})"
            cells.append(text)
        body.append([_variant(row), row.mode, *cells])
    return lines_of(["variant", "acted", *columns], body)


def _variant(row: Row) -> str:
    """The name of a row but for how it acts, which has a column of its own."""
    return row.name.removesuffix(f", {row.mode}")


def _cell(row: Row, task: str) -> Estimate | None:
    if task not in row.cells:
        return None
    return Estimate(float(np.mean(row.values([task])[0])), *row.intervals[task])


def seeds_table(rows: list[Row], tasks: list[str]) -> list[str]:
    """What each seed scored."""
    seeds = {tuple(sorted(cell)) for row in rows for cell in row.cells.values()}
    same = len(seeds) == 1

    def cell(row: Row, task: str) -> str:
        scored = sorted(row.cells.get(task, {}).items())
        return ", ".join(f"{score:.1f}" if same else f"{seed}: {score:.1f}" for seed, score in scored) or NONE

    body = [[_variant(row), row.mode, *(cell(row, task) for task in tasks)] for row in rows]
    which = f"seeds {', '.join(map(str, *seeds))}, in this order" if same else "seed: score"
    return [f"<details><summary>Each seed's score ({which})</summary>", "",
            *lines_of(["variant", "acted", *(task.replace("/", "<br>") for task in tasks)], body), "", "</details>"]


def comparison(comparisons: list[Comparison], tasks: list[str]) -> list[str]:
    """How one row stands against each other."""
    body = []
    for one in comparisons:
        better, apart = one.improvement, one.difference
        single = max(map(len, [*one.row.cells.values(), *one.other.cells.values()])) == 1
        body.append([
            one.other.name, f"{len(one.tasks)} of {len(tasks)}",
            f"{better.value:.2f}" + (f" ({better.low:.2f} to {better.high:.2f})" * (not single)),
            f"{apart.value:+.1f}" + (f" ({apart.low:+.1f} to {apart.high:+.1f})" * (not single)),
            ", ".join(one.below) or "no task",
        ])
    return lines_of(["against", "tasks", "P(better)", "difference of averages", "below on"], body)


def dataset_scores(pack: Pack, tasks: dict[str, str]) -> dict[str, float]:
    """Mean normalised score of the episodes of each task's dataset, where it is known."""
    environments = {run.config.dataset: run.config.environment for run in pack.runs}
    found = {}
    for dataset, task in tasks.items():
        reference = scores.reference(environments[dataset])
        if dataset in pack.datasets and reference:
            found[task] = float(scores.normalized_score(np.array(pack.datasets[dataset]), reference))
    return found
