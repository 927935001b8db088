"""Scores: pure functions from returns to numbers one may print.

Normalised score = 100 (return - random) / (expert - random) (Fu et al. 2020, arXiv 2004.07219, section 5), with the
references of D4RL's infos.py, which are the same for v0 to v2 of a task.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Tasks = Sequence[np.ndarray]


class Reference(NamedTuple):
    """Returns that normalise to 0 and to 100."""

    random: float
    expert: float


REFERENCES = {
    "Hopper": Reference(-20.272305, 3234.3),
    "HalfCheetah": Reference(-280.178953, 12135.0),
    "Walker2d": Reference(1.629008, 4592.3),
    "Ant": Reference(-325.6, 3879.7),
}
REFERENCE_SOURCE = "D4RL infos.py"


def reference(environment: str) -> Reference | None:
    """D4RL's reference returns for a Gymnasium id such as "Hopper-v5", whatever its version; None: it has none."""
    return REFERENCES.get(environment.partition("-")[0])


def normalized_score(returns: np.ndarray, reference: Reference) -> np.ndarray:
    """Map returns, any shape, to the scale on which random is 0 and expert 100."""
    return 100 * (np.asarray(returns, np.float64) - reference.random) / (reference.expert - reference.random)


# Below, the scores of some runs are a list of tasks, each an array (..., runs); tasks may differ in their runs. What
# stands before is draws: a statistic of (10000, runs) is 10,000 of that statistic.


def average(tasks: Tasks) -> np.ndarray:
    """Mean over tasks of the mean over runs, (...)."""
    return np.mean([task.mean(-1) for task in tasks], axis=0)


def interquartile_mean(tasks: Tasks) -> np.ndarray:
    """Mean of the middle half of all runs of all tasks, (...) (Agarwal et al. 2021, arXiv 2108.13264, section 4)."""
    ordered = np.sort(np.concatenate(tasks, axis=-1), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def improvement(ours: Tasks, theirs: Tasks) -> np.ndarray:
    """P(X > Y) that a run of ours scores above one of theirs on the same task, averaged over tasks, (...): of all pairs
    the share that it wins, where a tie is half a win (Mann-Whitney's U; arXiv 2108.13264, section 4.3)."""
    return np.mean([(np.sign(x[..., :, None] - y[..., None, :]).mean((-1, -2)) + 1) / 2
                    for x, y in zip(ours, theirs, strict=True)], axis=0)


def difference(ours: Tasks, theirs: Tasks) -> np.ndarray:
    """How far our average lies above theirs, (...)."""
    return average(ours) - average(theirs)


def stratified_interval(
    *sides: Tasks, generator: np.random.Generator, statistic: Callable[..., np.ndarray] = average, draws: int = 10_000
) -> tuple[float, float]:
    """95% percentile-bootstrap interval of `statistic` of one or two sides, each a list of tasks (runs,); runs are
    resampled within each task and side (arXiv 2108.13264, section 4). One run gives an interval of no width."""
    drawn = [[task[generator.integers(len(task), size=(draws, len(task)))] for task in tasks] for tasks in sides]
    low, high = np.percentile(statistic(*drawn), [2.5, 97.5])
    return float(low), float(high)
