"""Stopped at a chosen update, a run goes on with the same bits, whatever it trains and computes in."""

import functools
import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torture import toy
from torture.processes import Hook, drl
from torture.trial import Trial

PROMISE = "a run stopped after any update goes on as if it had not been"
TRIALS, SECONDS = (80, 5), (120, 10)
UPDATES, SAVE = 40, 20
STOPS = {"after the first update": 1, "in the middle": 13, "at a save": SAVE, "before the last update": UPDATES - 1,
         "after the last update": UPDATES}
WAYS = list(itertools.product(("state_passing", "windows"), (0.0, 0.1), ("float32", "bfloat16")))
BY = {"kill": signal.SIGKILL, "SIGTERM": signal.SIGTERM}


def run(trials: int, folder: Path, rng: np.random.Generator, short: bool) -> Iterator[Trial]:
    """Every way of training, stopped by a signal that the process sends itself at each stop; the first `trials` of
    them in random order. A run that saves when it is asked to end may lose the update that it is in."""
    cases = [(way, stop, by) for way in WAYS for stop in STOPS for by in BY]
    undisturbed: dict[tuple, Path] = {}
    with toy.root(folder):
        toy.dataset()
        for number, index in enumerate(rng.permutation(len(cases))[:trials]):
            way, stop, by = cases[index]
            began = time.monotonic()
            if way not in undisturbed:
                undisturbed[way] = folder / f"undisturbed-{len(undisturbed)}"
                _train(undisturbed[way], folder, way)
            place = folder / f"run-{number}"
            status, _ = _train(place, folder, way, functools.partial(stop_after, STOPS[stop], BY[by]))
            kept = toy.newest(place)
            again, told = _train(place, folder, way)
            yield Trial("resume", stop, *_judge(stop, by, status, kept, again, told, place, undisturbed[way], way),
                        time.monotonic() - began, {"update": STOPS[stop], "lost": max(0, STOPS[stop] - kept)})


def stop_after(step: int, number: int) -> None:
    """Have this process send itself a signal after so many updates, before anything else is done about them."""
    from drl.trainer import Trainer

    real = Trainer.descend

    def descend(self, group: int):
        result = real(self, group)
        if self.step + 1 == step:
            os.kill(os.getpid(), number)
        return result

    Trainer.descend = descend


def _train(place: Path, folder: Path, way: tuple, hook: Hook | None = None) -> tuple[int | None, list[str]]:
    sampling, dropout, precision = way
    arguments = toy.train(place, train_updates=UPDATES, train_checkpoint_every=SAVE, train_sampling=sampling,
                          model_dropout=dropout, train_precision=precision)
    with drl(arguments, folder / "said", hook=hook) as process:
        return process.wait(), process.told


def _judge(stop, by, status, kept, again, told, place, undisturbed, way) -> tuple[bool, str]:
    what = f"{by}, {' '.join(map(str, way))}"
    if by == "kill":
        expected, statuses = (STOPS[stop] - 1) // SAVE * SAVE, (-signal.SIGKILL,)
    else:  # the last update is the end of the run: it may be told as one
        expected, statuses = STOPS[stop], (128 + BY[by], *[0] * (STOPS[stop] == UPDATES))
    if status not in statuses:
        return False, f"{what}: ended with status {status}"
    if kept != expected and not (by != "kill" and kept == expected - 1):  # asked to end within an update, it may go
        return False, f"{what}: kept update {kept}, not {expected}"
    found = toy.differences(place, undisturbed) if again == 0 else [f"status {again}: {' '.join(told)}"]
    return not found, f"{what}: {'; '.join(found)[:300] or 'no bit differs'}"
