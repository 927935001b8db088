"""Scores: pure functions from returns to numbers one may print.

Normalised score = 100 (return - random) / (expert - random) (Fu et al. 2020, arXiv 2004.07219, section 5), with the
references of D4RL's infos.py, which are the same for v0 to v2 of a task.
"""

from typing import NamedTuple

import numpy as np


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


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half of all entries (Agarwal et al. 2021, arXiv 2108.13264, section 4)."""
    ordered = np.sort(scores, axis=None)
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def stratified_interval(
    scores: np.ndarray, generator: np.random.Generator, *, statistic=np.mean, draws: int = 10_000
) -> tuple[float, float]:
    """95% percentile-bootstrap interval of `statistic`; runs are resampled within each task (arXiv 2108.13264,
    section 4). `scores` is (runs, tasks); one run gives an interval of no width."""
    runs, tasks = scores.shape
    rows = generator.integers(runs, size=(draws, runs, tasks))
    low, high = np.percentile([statistic(sample) for sample in scores[rows, np.arange(tasks)]], [2.5, 97.5])
    return float(low), float(high)
