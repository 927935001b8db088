"""Where numbers go: TensorBoard for eyes, metrics.jsonl for programs; one call writes both.

The step is always the number of gradient updates. The vocabulary is closed, so that runs can be overlaid.
"""

import json
import math
import os
from pathlib import Path
from typing import Self

from torch.utils.tensorboard import SummaryWriter

TAGS = frozenset(
    {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/updates_per_second",
        "eval/normalized_score",
        "eval/normalized_score_std",
        "eval/return_mean",
        "eval/return_std",
        "eval/episode_length",
        "eval/env_steps_per_second",
    }
)
SUFFIX = "/target-"  # several targets: eval/return_mean/target-3600


class Tracker:
    """Writes scalars into one run folder; use as a context manager.

    `start` is the update that the run goes on from: later lines of an interrupted run are dropped, so that each
    step stands once. None adds to a finished run.
    """

    def __init__(self, run: Path, start: int | None = 0):
        run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl"
        if start is not None and path.exists():
            _keep_until(path, start)
        self._lines = path.open("a")
        self._board = SummaryWriter(str(run), purge_step=None if start is None else start + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` at `step`.

        Raises:
            ValueError: a tag is not in TAGS, a value is not finite; nothing is recorded.
        """
        if unknown := {tag for tag in values if tag.partition(SUFFIX)[0] not in TAGS}:
            raise ValueError(f"unknown tag {min(unknown)!r}; add it to drl.tracker.TAGS or use one of {sorted(TAGS)}")
        if bad := [tag for tag, value in values.items() if not math.isfinite(value)]:
            raise ValueError(f"{bad[0]} is {values[bad[0]]} at update {step}; only finite values are recorded")
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        print(json.dumps({"step": step} | values), file=self._lines, flush=True)

    def flush(self) -> None:
        """Everything logged so far is on disk when this returns: called before a checkpoint is published."""
        self._board.flush()
        os.fsync(self._lines.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._board.close()
        self._lines.close()


def _keep_until(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the torn last line of a killed run
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
