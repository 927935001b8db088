"""What a training run is doing, seen from its folder and its progress bar alone."""

import json
import re
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
from torture import toy
from torture.processes import LIMIT, Drl

BAR = re.compile(r"training: .*?\| *(\d+)/(\d+)")


def logged(run: Path) -> int:
    """The last update in metrics.jsonl; 0: there is none."""
    step, _ = _last_line(run)
    return step


def resumed(process: Drl) -> int | None:
    """The update from which a `drl train` goes on, as its bar begins; None: it has not come that far."""
    found = BAR.search(process.said)
    return int(found[1]) if found else None


def phase(run: Path, process: Drl, since: float) -> str:
    """What a dead process was doing in `run`, which it entered after `since`, a time of the file system's clock."""
    begun = resumed(process)
    if begun is None:
        config = run / "config.yaml"
        return "resuming" if config.exists() and config.stat().st_mtime >= since and toy.steps(run) else "starting"
    step, evaluated = _last_line(run)
    if step <= begun:
        return "training"
    steps, checkpoints = toy.steps(run), run / "checkpoints"
    partial, latest = checkpoints / f"step-{step:08d}.partial", checkpoints / "latest"
    if step in steps:
        if partial.exists() or latest.is_symlink() and latest.resolve() != steps[step].resolve():
            return "saving: renamed"
        kept = toy.SETTINGS["train.keep_checkpoints"]
        return "training" if len(steps) <= kept and all(map(toy.intact, steps.values())) else "saving: purging"
    if partial.exists():
        return "saving: syncing" if any(partial.rglob("manifest.json")) else "saving: writing"
    if step % toy.SETTINGS["train.evaluate_every"] == 0 and not evaluated:
        return "evaluating"
    return "training" if step % toy.SETTINGS["train.checkpoint_every"] else "saving: writing"


def until(process: Drl, change: Callable[[], Hashable], times: int) -> bool:
    """Wait until `change` has given something new that is not empty so many times, looking thousands of times a second;
    False: the process ended before."""
    before, end = change(), time.monotonic() + LIMIT
    while times:
        now = change()
        if now != before:
            times -= bool(now)
            before = now
        elif process.status is not None or time.monotonic() > end:
            return False
        time.sleep(1e-4)
    return True


def wait(process: Drl, seconds: float) -> bool:
    """Wait as precisely as a busy loop can; False: the process ended before."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if process.status is not None:
            return False
        if end - time.perf_counter() > 0.01:
            time.sleep(0.005)
    return process.status is None


class Moments:
    """The moments of a run that can be waited for: each a name and what changes on disk when it comes."""

    def __init__(self, run: Path):
        self._run, self._checkpoints = run, run / "checkpoints"
        self._seen: tuple[int, int] = (0, 0)
        self.changes: dict[str, Callable[[], Hashable]] = {
            "resuming": lambda: _stamp(run / "config.yaml"),
            "logging": lambda: _stamp(run / "metrics.jsonl"),
            "evaluating": self._evaluating,
            "evaluated": lambda: _stamp(run / "evaluation.json"),
            "saving": lambda: self._names(".partial"),
            "saved": lambda: self._names(""),
        }

    def draw(self, rng: np.random.Generator, within: float, pace: float) -> tuple[str, Callable[[Drl], bool]]:
        """A moment to wait for: any within so many seconds, or a random one of the above and up to 5 ms (20 ms where
        what begins takes longer), on average after about `pace` updates."""
        name = str(rng.choice(["any", "any", *self.changes]))
        if name == "any":
            seconds = rng.uniform(0, within)
            return name, lambda process: wait(process, seconds)
        apart = {"logging": "log", "evaluating": "evaluate", "evaluated": "evaluate"}.get(name, "checkpoint")
        most = 1 if name == "resuming" else max(1, int(2 * pace / toy.SETTINGS[f"train.{apart}_every"]))
        times = int(rng.integers(1, most + 1))
        later = rng.uniform(0, 0.02 if name in ("resuming", "evaluating") else 0.005)
        change = self.changes[name]
        return name, lambda process: until(process, change, times) and wait(process, later)

    def _names(self, end: str) -> Hashable:
        try:
            names = [path.name for path in self._checkpoints.iterdir()]
        except OSError:
            return ()
        return tuple(sorted(name for name in names if name.startswith("step-") and name.endswith(end)
                            and (end or ".partial" not in name)))

    def _evaluating(self) -> int:
        """The update that is evaluated now; 0: none."""
        stamp = _stamp(self._run / "metrics.jsonl")
        if stamp != self._seen[0]:
            step, evaluated = _last_line(self._run)
            due = step % toy.SETTINGS["train.evaluate_every"] == 0 and not evaluated
            self._seen = stamp, step if due else 0
        return self._seen[1]


def _stamp(path: Path) -> Hashable:
    try:
        status = path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino
    except OSError:
        return ()


def _last_line(run: Path) -> tuple[int, bool]:
    """The update of the last whole line in metrics.jsonl, and whether the line is an evaluation's."""
    try:
        lines = (run / "metrics.jsonl").read_bytes()[-2000:].splitlines()
    except OSError:
        return 0, False
    for line in reversed(lines):
        try:
            values = json.loads(line)
            return values["step"], any(name.startswith("eval/") for name in values)
        except (ValueError, TypeError, KeyError):
            continue
    return 0, False
