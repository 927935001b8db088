"""Asked to end, `drl` ends soon, says so by its status, and a run keeps the update that it had reached."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torture import toy, watch
from torture.processes import Drl, drl
from torture.trial import Trial

from drl import disk

PROMISE = "asked to end, drl ends within 10 s with status 128 + signal, and no update is lost"
TRIALS, SECONDS = (63, 7), (180, 15)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LIMIT, AT_ONCE = 10.0, 1.0  # seconds to end in, after one signal and after a second one
UPDATES = 100
PHASES = {"training": ("logging", 70), "evaluating": ("evaluating", 3), "saving": ("saving", 4)}
TRIES = 10  # to meet a process before it has done its work


def run(trials: int, folder: Path, rng: np.random.Generator, short: bool) -> Iterator[Trial]:
    """Every signal in every phase, in turn; the process is real where it is met while it loads (forked ones if
    `short`)."""
    storm = _Storm(folder, rng, real=not short)
    kinds: dict[str, Callable[[int], tuple[bool, str, dict]]] = {
        "drl train, loading": storm.loading,
        **{f"drl train, {phase}": lambda number, phase=phase: storm.train(phase, number) for phase in PHASES},
        "drl train, asked twice": storm.twice,
        "drl evaluate": storm.evaluate,
        "drl data collect": storm.collect,
    }
    with toy.root(folder):
        storm.prepare()
        for index in range(trials):
            kind = list(kinds)[index % len(kinds)]
            number = SIGNALS[index % len(SIGNALS)]
            began = time.monotonic()
            ok, detail, numbers = _met(kinds[kind], number)
            yield Trial("signals", kind, ok, f"{number.name}: {detail}", time.monotonic() - began, numbers)


class _Missed(Exception):
    """A process had done its work before it was asked to end: there was nothing to see."""


def _met(trial: Callable[[int], tuple[bool, str, dict]], number: int) -> tuple[bool, str, dict]:
    for _ in range(TRIES):
        try:
            return trial(number)
        except _Missed:
            continue
    return False, f"{TRIES} times the process was done before it was asked to end", {}


class _Storm:
    """Trials of each kind: each gives whether the promise was kept, what was seen, and numbers."""

    def __init__(self, folder: Path, rng: np.random.Generator, real: bool):
        self._folder, self._rng, self._real, self._runs = folder, rng, real, 0
        self._undisturbed = folder / "undisturbed"

    def prepare(self) -> None:
        toy.dataset()
        with self._drl(self._train(self._undisturbed)) as process:
            process.wait()

    def train(self, phase: str, number: int) -> tuple[bool, str, dict]:
        run = self._place()
        moments = watch.Moments(run)
        with self._drl(self._train(run)) as process:
            change, most = PHASES[phase]
            watch.until(process, moments.changes[change], int(self._rng.integers(1, most)))
            flaw, seconds = _ends(process, number, LIMIT)
        kept, reached = toy.newest(run), watch.logged(run)
        if not flaw and reached - kept > 1:
            flaw = f"update {reached} was reached, {kept} is kept"
        return self._finished(flaw, run, f"kept update {kept} of {reached}",
                              {"ended": seconds, "lost": max(0, reached - kept)})

    def loading(self, number: int) -> tuple[bool, str, dict]:
        """A signal before the first update, at a random moment; before any of `drl` is there, the system ends it."""
        run = self._place()
        with self._drl(self._train(run), real=self._real) as process:
            watch.wait(process, self._rng.uniform(0.05, 2.5 if self._real else 0.1))
            loading = watch.resumed(process) is None
            flaw, seconds = _ends(process, number, LIMIT, alone=loading)
        return self._finished(flaw, run, "nothing was begun" if loading else "had begun", {"ended": seconds})

    def twice(self, number: int) -> tuple[bool, str, dict]:
        """The second signal follows so soon that the first is still being answered."""
        run = self._place()
        with self._drl(self._train(run)) as process:
            if not watch.until(process, watch.Moments(run).changes["saving"], int(self._rng.integers(1, 4))):
                raise _Missed
            process.send(number)
            watch.wait(process, self._rng.uniform(0, 0.01))
            began = time.monotonic()
            process.send(number)
            flaw, seconds = _ended(process, number, began, AT_ONCE, alone=True)
        return self._finished(flaw, run, "ended at once", {"ended": seconds})

    def evaluate(self, number: int) -> tuple[bool, str, dict]:
        before = (self._undisturbed / "evaluation.json").read_bytes()
        with self._drl(["evaluate", str(self._undisturbed), "--episodes", "100000", "--device", "cpu"]) as process:
            while "evaluating" not in process.said and process.status is None:
                time.sleep(0.01)
            watch.wait(process, self._rng.uniform(0, 0.3))
            flaw, seconds = _ends(process, number, LIMIT)
        same = (self._undisturbed / "evaluation.json").read_bytes() == before
        return not flaw and same, flaw or ("no score is written" if same else "evaluation.json changed"), {
            "ended": seconds}

    def collect(self, number: int) -> tuple[bool, str, dict]:
        """Asked to end, then typed again: the dataset is the one that is collected undisturbed."""
        again = ["data", "collect", "hopper/random", "--steps", "8000", "--overwrite"]
        data = self._folder / "datasets" / "drl" / "hopper" / "random-v0" / "data" / "main_data.hdf5"
        if not data.exists():
            with self._drl(again) as process:
                process.wait()
        expected = disk.sha256(data)
        with self._drl(again) as process:
            while "collecting" not in process.said and process.status is None:
                time.sleep(0.01)
            watch.wait(process, self._rng.uniform(0, 0.3))
            flaw, seconds = _ends(process, number, LIMIT)
        if flaw:
            return False, flaw, {"ended": seconds}
        with self._drl(again) as process:
            status = process.wait()
        same = status == 0 and disk.sha256(data) == expected
        return same, "no byte differs" if same else f"gone on with: status {status}, other data", {"ended": seconds}

    def _finished(self, flaw: str, run: Path, seen: str, numbers: dict) -> tuple[bool, str, dict]:
        """Go on with a run to its end and hold it to the undisturbed one."""
        if flaw:
            return False, flaw, numbers
        with self._drl(self._train(run)) as process:
            status = process.wait()
        found = toy.differences(run, self._undisturbed) if status == 0 else [f"status {status}: {process.told}"]
        return not found, f"{seen}; {'; '.join(found)[:300] or 'no bit differs in the end'}", numbers

    def _place(self) -> Path:
        self._runs += 1
        return self._folder / f"run-{self._runs}"

    def _train(self, run: Path) -> list[str]:
        return toy.train(run, train_updates=UPDATES)

    def _drl(self, arguments: list[str], real: bool = False):
        return drl(arguments, self._folder / "said", real=real)


def _ends(process: Drl, number: int, limit: float, alone: bool = False) -> tuple[str, float]:
    """Send a signal; what is wrong with how the process ends, empty: nothing, and the seconds that it took.

    alone: whether the signal itself may have ended it, so that its status is minus its number.

    Raises _Missed where it had ended well before.
    """
    if process.status == 0:
        raise _Missed
    if process.status is not None:
        return f"ended before, with status {process.status}: {' '.join(process.told)[:200]}", 0.0
    began = time.monotonic()
    process.send(number)
    return _ended(process, number, began, limit, alone)


def _ended(process: Drl, number: int, began: float, limit: float, alone: bool) -> tuple[str, float]:
    status = process.wait(limit + 5)
    seconds = time.monotonic() - began
    if status is None or seconds > limit:
        return f"still there after {seconds:.1f} s", seconds
    if status not in (128 + number, *[-number] * alone):
        return f"status {status}: {' '.join(process.told)[-200:]}", seconds
    if any("Traceback" in line for line in process.told) and not alone:
        return "a traceback", seconds
    return "", seconds
