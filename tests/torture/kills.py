"""Killed at any moment, a run goes on: the updates since its last checkpoint are lost, and no bit differs."""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torture import toy, watch
from torture.processes import drl
from torture.trial import Trial

PROMISE = "a killed run loses at most one save interval and ends with the bits of an undisturbed one"
TRIALS, SECONDS = (100, 5), (800, 15)
UPDATES = (6000, 160)
WITHIN = (5.0, 2.0)  # seconds in which kills at no particular moment come
WHOLE = 900.0  # seconds: a whole run that takes longer hangs


def run(trials: int, folder: Path, rng: np.random.Generator, short: bool) -> Iterator[Trial]:
    """Kill real processes (forked ones if `short`) until there were so many kills; each run then finishes by itself
    and must be the undisturbed one. That two undisturbed runs agree is tried first."""
    updates = UPDATES[short]
    undisturbed = [folder / name for name in ("undisturbed", "again")]
    with toy.root(folder):
        toy.dataset()
        for place in undisturbed:
            began = time.monotonic()
            with drl(toy.train(place, train_updates=updates), folder / "said", real=not short) as process:
                process.wait(WHOLE)
        yield _ended("two undisturbed runs", process, undisturbed, began)
        left, number, pace = trials, 0, updates / trials
        while left:
            number += 1
            run = _Run(folder / f"run-{number}", folder / "said", updates, number, not short)
            began = time.monotonic()
            while left and run.go_on(rng, WITHIN[short], pace):
                left -= 1
            if not left:
                run.finish()
            yield from run.kills
            yield _ended("the end", run, [run.folder, undisturbed[0]], began)


@dataclass
class _Run:
    """A run that is killed and gone on with.

    Attributes:
        kills: the trials so far.
        unproven: how many of the last ones await a start that shows where it goes on.
        status, told: of the process that finished.
    """

    folder: Path
    output: Path
    updates: int
    number: int
    real: bool
    kills: list[Trial] = field(default_factory=list)
    unproven: int = 0
    status: int | None = None
    told: list[str] = field(default_factory=list)

    def go_on(self, rng: np.random.Generator, within: float, pace: float) -> bool:
        """Start, kill at a moment drawn as Moments.draw does; False: the run ended before that."""
        began, since = time.monotonic(), time.time()
        name, come = watch.Moments(self.folder).draw(rng, within, pace)
        before = toy.newest(self.folder)
        with self._start() as process:
            if not come(process):
                self._ends(process, before)
                return False
            process.kill()
            if process.status != -signal.SIGKILL:
                self._ends(process, before)
                return False
            self._prove(process, before)
            reached, after = watch.logged(self.folder), toy.newest(self.folder)
            lost = max(0, reached - after)
            phase = watch.phase(self.folder, process, since)
        interval = toy.SETTINGS["train.checkpoint_every"]
        self.kills.append(Trial(
            "kills", phase, lost <= interval,
            f"{name}: update {reached}, goes on from {after}" + (f"; more than {interval}" * (lost > interval)),
            time.monotonic() - began, {"update": reached, "lost": lost, "run": self.number},
        ))
        self.unproven += 1
        return True

    def finish(self) -> None:
        """Go on, undisturbed."""
        before = toy.newest(self.folder)
        with self._start() as process:
            process.wait(WHOLE)
            self._ends(process, before)

    def _start(self):
        return drl(toy.train(self.folder, train_updates=self.updates), self.output, real=self.real)

    def _ends(self, process, before: int) -> None:
        self.status, self.told = process.wait(), process.told
        self._prove(process, before)

    def _prove(self, process, expected: int) -> None:
        """Hold the kills whose consequence a start shows to where it goes on from."""
        found = watch.resumed(process)
        if found is None and process.status in (-signal.SIGKILL, None):
            return
        for index in range(len(self.kills) - self.unproven, len(self.kills)):
            if found != expected:
                seen = f"from {found}" if found is not None else f"not at all: {' '.join(process.told)[:200]}"
                trial = self.kills[index]
                self.kills[index] = replace(trial, ok=False, detail=f"{trial.detail}; the next start goes on {seen}")
        self.unproven = 0


def _ended(kind: str, process, runs: list[Path], began: float) -> Trial:
    """The trial that a run has finished, and as another one."""
    found = toy.differences(*runs) if process.status == 0 else [f"status {process.status}: {' '.join(process.told)}"]
    return Trial("kills", kind, not found, "; ".join(found)[:400] or "no bit differs", time.monotonic() - began)
