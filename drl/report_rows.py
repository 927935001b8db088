"""Rows of a report: what one variant, acted in one mode, scored on each task with each seed.

A cell holds each seed's mean score of the run's final checkpoint at the target return of its config, of as many
episodes as it was scored with at most. An evaluation that failed is in no cell, and an earlier checkpoint takes no
final one's place.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from drl import scores, trees
from drl.config import Config
from drl.config_files import stored, unread
from drl.errors import UserError, shown
from drl.report_pack import Result, Run

BOOTSTRAP_SEED = 0
D4RL = [f"{environment}/{tier}" for environment, tier in itertools.product(
    ("halfcheetah", "hopper", "walker2d"), ("medium", "medium-replay", "medium-expert"))]
SAID = ("attention", "sampling", "updates", "compile", "log_every", "checkpoint_every", "keep_checkpoints",
        "evaluate_every")
UNREAD = {"linear": (), "softmax": ("half_lives",), "none": ("half_lives", "action_tokens", "return_quantile")}
MODES = ("recurrent", "window")


@dataclass
class Row:
    """One variant, acted in one mode, after one number of updates, asked for one of its config's returns.

    Attributes:
        cells: score by task and seed.
        runs: those that it is made of.
        name: what tells it from the other rows.
    """

    variant: str
    mode: str
    step: int
    target: int
    cells: dict[str, dict[int, float]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    name: str = ""

    def values(self, tasks: Iterable[str]) -> list[np.ndarray]:
        """Scores of the seeds, (seeds,), of each of some tasks."""
        return [np.array([score for _, score in sorted(self.cells[task].items())]) for task in tasks]

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% interval of the mean by task."""
        return {task: interval(self.values([task])) for task in self.cells}

    @property
    def episodes(self) -> set[int]:
        return {result.episodes for result in self.results}


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """One row held against another on the tasks that both have.

    Attributes:
        improvement: probability that a run of the first scores above one of the other.
        difference: of their averages.
        below: tasks on which the whole interval of the first lies below that of the other.
    """

    row: Row
    other: Row
    tasks: list[str]
    improvement: Estimate
    difference: Estimate
    below: list[str]


def interval(*sides: scores.Tasks, statistic: Callable = scores.average) -> tuple[float, float]:
    """`scores.stratified_interval`, the same at every call."""
    return scores.stratified_interval(
        *sides, generator=np.random.default_rng(BOOTSTRAP_SEED), statistic=statistic)


def estimate(*sides: scores.Tasks, statistic: Callable = scores.average) -> Estimate:
    return Estimate(float(statistic(*sides)), *interval(*sides, statistic=statistic))


def tasks_of(runs: Iterable[Run]) -> dict[str, str]:
    """Name of each dataset's task in D4RL's order, others after: "hopper/medium" for drl/hopper/medium-v0, but the
    whole id where two would share a name."""
    datasets = sorted({run.config.dataset for run in runs})
    short = {dataset: short_name(dataset) for dataset in datasets}
    names = list(short.values())
    named = {dataset: name if names.count(name) == 1 else dataset for dataset, name in short.items()}

    def order(item: tuple[str, str]) -> tuple:
        task = short[item[0]]
        return D4RL.index(task) if task in D4RL else len(D4RL), item

    return dict(sorted(named.items(), key=order))


def short_name(dataset: str) -> str:
    """hopper/medium for drl/hopper/medium-v0; other ids keep their namespace."""
    return re.sub(r"-v[0-9]+$", "", dataset).removeprefix("drl/")


def variants(runs: list[Run]) -> dict[str, str]:
    """Variant of each run, by its name: the folder below the root where all runs in it are of one kind, else the
    description of how it was trained."""
    kinds: dict[str, set] = {}
    for run in runs:
        kinds.setdefault(run.name.partition("/")[0], set()).add((described(run.config), run.config.train.updates))

    def name(run: Run) -> str:
        folder, below, _ = run.name.partition("/")
        plain = not below or folder == short_name(run.config.dataset).partition("/")[0]
        return described(run.config) if plain or len(kinds[folder]) > 1 else folder

    return {run.name: name(run) for run in runs}


def described(config: Config) -> str:
    """How it was trained: attention, sampling, and every option of model and training in which it is not the plain
    model, trained by imitation alone in float32, as far as it is read."""
    how = {"state_passing": "state passing", "windows": f"windows of {config.train.context}"}
    parts = [config.model.attention, how[config.train.sampling]]
    plain, unsaid = trees.flat(stored({"dataset": ""}).to_dict()), SAID + UNREAD[config.model.attention]
    for key, value in trees.flat({"model": asdict(config.model), "train": asdict(config.train)}).items():
        if key.partition(".")[2] not in unsaid and key not in unread(config) and value != plain[key]:
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def final(run: Run) -> int:
    """The last update after which a run was scored, or was to be."""
    return max([*(result.step for result in run.results), *(step for step, _ in run.failures)], default=0)


def longest(results: Iterable[Result]) -> dict[float, Result]:
    """Of the results of a run, after one step in one mode, those of the most episodes, by target return; of two such
    the one of the earlier environment seeds."""
    chosen: dict[float, Result] = {}
    for result in sorted(results, key=lambda result: (result.episodes, -result.first_seed)):
        chosen[result.target_return] = result
    return chosen


def targets(run: Run) -> list[float]:
    """The returns that a run's config asks for; of one that asks for none, those that it was scored at."""
    return run.config.evaluate.target_returns or sorted({result.target_return for result in run.results})


def rows_of(runs: list[Run]) -> list[Row]:
    """All rows, those with the most tasks first, then by their average.

    Raises:
        UserError: two runs of a row have the same task and seed.
    """
    names, tasks = variants(runs), tasks_of(runs)
    found: dict[tuple, Row] = {}
    owners: dict[tuple, Run] = {}
    for run in runs:
        step = final(run)
        for mode in sorted({result.mode for result in run.results}):
            chosen = longest(result for result in run.results if (result.step, result.mode) == (step, mode))
            for number, target in enumerate(targets(run)):
                if target not in chosen:
                    continue
                key, task = (names[run.name], mode, step, number), tasks[run.config.dataset]
                other = owners.setdefault((key, task, run.config.seed), run)
                if other is not run:
                    raise UserError(f"{other.name} and {run.name} are runs of the same kind, task and seed; name a "
                                    "folder with one of them")
                row = found.setdefault(key, Row(*key))
                row.cells.setdefault(task, {})[run.config.seed] = chosen[target].score
                row.runs.append(run)
                row.results.append(chosen[target])
    rows = sorted(found.values(), key=lambda row: (-len(row.cells), -scores.average(row.values(row.cells)), row.mode))
    _name(rows)
    return rows


def _name(rows: list[Row]) -> None:
    """A name for each row: its variant, and as much more as tells it from the others."""
    for row in rows:
        same = [other for other in rows if other.variant == row.variant]
        extra = [f"{row.step} updates"] * (len({other.step for other in same}) > 1)
        extra += [f"target {row.target + 1}"] * (len({other.target for other in same}) > 1)
        extra += [row.mode] * (len({other.mode for other in same}) > 1)
        row.name = ", ".join([row.variant, *extra])


def chosen_row(rows: list[Row], name: str) -> Row:
    """The row of a name, or the first where there is none.

    Raises:
        UserError: no row, or more than one, is called so.
    """
    meant = [row for row in rows if row.name == name] or [row for row in rows if row.variant == name]
    if name and len(meant) != 1:
        raise UserError(f"--against: {'several rows are' if meant else 'no row is'} called {shown(name)}; type one of: "
                        + "; ".join(row.name for row in meant or rows))
    return meant[0] if name else rows[0]


def compared(row: Row, others: Iterable[Row]) -> list[Comparison]:
    """`row` held against each of `others` that shares a task with it."""
    found = []
    for other in others:
        tasks = [task for task in row.cells if task in other.cells]
        if other is row or not tasks:
            continue
        sides = row.values(tasks), other.values(tasks)
        below = [task for task in tasks if row.intervals[task][1] < other.intervals[task][0]
                 and min(len(row.cells[task]), len(other.cells[task])) > 1]
        found.append(Comparison(row, other, tasks, estimate(*sides, statistic=scores.improvement),
                                estimate(*sides, statistic=scores.difference), below))
    return found
