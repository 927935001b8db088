"""What a suite shows: a line on stdout for each run that ends; on a terminal, below, what is under way.

    recurrent  hopper/medium-replay  seed 3   20000 updates in 34 s  score 87.3 (recurrent)
    cuda:0     recurrent hopper/medium seeds 0 1 2 3 4   training:  45%|####   | 9000/20000 ...
    scoring    softmax hopper/medium-replay seed 2   scoring window:  12%|#    | 12/100 ...
    12 of 45 runs, 1 failed, 0:12:33

In a log file nothing moves.
"""

import shutil
import sys
import time
from collections.abc import Iterable, Sequence

from drl.suite_plan import Job, Run
from drl.suite_worker import Worker

OFTEN = 0.2  # seconds between two pictures


class Screen:
    """One per suite, to be closed at its end."""

    def __init__(self, jobs: Sequence[Job]):
        self._moves = sys.stderr.isatty()
        self._variant = max((len(job.variant) for job in jobs), default=0)
        self._task = max((len(job.task) for job in jobs), default=0)
        self._drawn, self._last, self._begun = 0, 0.0, time.monotonic()

    def tell(self, line: str) -> None:
        """A line that stays, on stdout."""
        self._clear()
        print(line, flush=True)

    def warn(self, line: str) -> None:
        """A line that stays, on stderr."""
        self._clear()
        print("drl:", line, file=sys.stderr, flush=True)

    def ended(self, run: Run, what: str) -> None:
        """A run is as far as it comes."""
        self.tell(f"{run.variant:<{self._variant}}  {run.task:<{self._task}}  seed {run.config.seed:<2} {what}")

    def draw(self, workers: Iterable[Worker], ended: int, of: int, failed: int) -> None:
        """What is under way."""
        if not self._moves or time.monotonic() < self._last + OFTEN:
            return
        self._last = time.monotonic()
        columns = shutil.get_terminal_size().columns
        busy = [worker for worker in workers if worker.doing]
        lines = [f"{worker.name:<8} {named(worker.runs)}   {worker.bar or 'begins'}" for worker in busy]
        lines.append(f"{ended} of {of} runs{f', {failed} failed' if failed else ''}, {clock(self.seconds)}")
        self._clear()
        sys.stderr.write("\n".join(line[: columns - 1] for line in lines))
        sys.stderr.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        self._clear()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def _clear(self) -> None:
        if self._drawn:
            up = f"\033[{self._drawn - 1}A" if self._drawn > 1 else ""
            sys.stderr.write(f"\r{up}\033[J")
            sys.stderr.flush()
            self._drawn = 0


def named(runs: Sequence[Run]) -> str:
    """Runs of one variant and task, in short."""
    seeds = " ".join(str(run.config.seed) for run in runs)
    return f"{runs[0].variant} {runs[0].task} seed{'s' if len(runs) > 1 else ''} {seeds}"


def clock(seconds: float) -> str:
    """H:MM:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def duration(seconds: float) -> str:
    """For people: 34 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
