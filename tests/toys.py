"""A toy dataset that more than one test file writes: its id, its environment, its episodes."""

import numpy as np

from drl.data.store import Recorded

ID = "drl/toy/spring-v0"
ENVIRONMENT = "MountainCarContinuous-v0"  # O = 2, A = 1, box [-1, 1]


def recorded(lengths: list[int], seed: int = 0) -> list[Recorded]:
    """Random episodes of these lengths, in steps; every other one terminates, the others are truncated."""
    rng = np.random.default_rng(seed)
    return [
        Recorded(
            1000 + number,
            rng.normal(size=(length + 1, 2)),
            rng.uniform(-1, 1, (length, 1)).astype(np.float32),
            rng.normal(size=length),
            number % 2 == 0,
        )
        for number, length in enumerate(lengths)
    ]
