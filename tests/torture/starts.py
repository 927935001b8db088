"""Of many that start on one run at the same moment one trains, and the others say who."""

import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torture import toy
from torture.processes import LIMIT, Drl, drl, fork
from torture.trial import Trial

PROMISE = "of all that start on one run at once one trains; the others end with status 2 and name its process"
TRIALS, SECONDS = (100, 20), (60, 10)
UPDATES = 60
HELD = 60.0  # seconds at most that whoever trains is held at its first update
TIME = re.compile(r"\b\d{1,2}:\d{2}\b")


def run(trials: int, folder: Path, rng: np.random.Generator, short: bool) -> Iterator[Trial]:
    """Half of the trials start on a run that nobody has begun, half where a dead process has left its lock file. The
    processes are forked from one that has imported everything, and let go when all of them stand at the line."""
    with toy.root(folder):
        toy.dataset()
        undisturbed = folder / "undisturbed"
        with drl(toy.train(undisturbed, train_updates=UPDATES), folder / "said") as process:
            process.wait()
        for kind in ("a fresh run", "a stale lock"):
            place = folder / kind.replace(" ", "-")
            place.mkdir()
            if kind == "a stale lock":
                _leave_lock(place)
            yield from _at_once(kind, trials // 2, place, folder, undisturbed)


def stand(line: str, go: str, end: str) -> None:
    """Stand at the line until all may go; then train no update before all others have come to their end: whoever is
    late must still find a run that is trained."""
    from drl.trainer import Trainer

    real = Trainer.descend

    def descend(self, group: int):
        _wait_for(Path(end))
        return real(self, group)

    Trainer.descend = descend
    Path(line, str(os.getpid())).touch()
    _wait_for(Path(go))


def _wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.001)


def _at_once(kind: str, count: int, place: Path, folder: Path, undisturbed: Path) -> Iterator[Trial]:
    line, go, end = (folder / f"{name}-{place.name}" for name in ("line", "go", "end"))
    line.mkdir()
    hook = functools.partial(stand, str(line), str(go), str(end))
    processes = [Drl(toy.train(place, train_updates=UPDATES), folder / "said", hook, real=False) for _ in range(count)]
    try:
        _until(lambda: len(list(line.iterdir())) == count, LIMIT)
        began = time.monotonic()
        go.touch()
        _until(lambda: sum(process.status is not None for process in processes) >= count - 1, HELD)
        end.touch()
        statuses = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    trained = [process for process in processes if process.status == 0]
    winner = trained[0] if len(trained) == 1 else None
    for process in processes:
        if process is not winner:
            yield Trial("starts", kind, *_refused(process, winner))
    found = [f"{len(trained)} of {count} trained, statuses {sorted(set(statuses), key=str)}"] if not winner else []
    if not found:
        found = toy.differences(place, undisturbed)
    yield Trial("starts", f"{kind}: the end", not found, "; ".join(found)[:300] or "one trained, and no bit differs",
                time.monotonic() - began, {"starts": count})


def _until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until it holds, or so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def _refused(process: Drl, winner: Drl | None) -> tuple[bool, str]:
    """Whether one that did not train was refused, in one line that names the process which does."""
    if not process.refused:
        return False, process.outcome
    line = process.told[-1]
    if not winner:
        return False, f"nobody else trained: {line[:200]}"
    named = {"pid": re.search(rf"\b{winner.pid}\b", line), "host": socket.gethostname() in line,
             "start": TIME.search(line)}
    missing = [name for name, found in named.items() if not found]
    return not missing, f"{' and '.join(missing)} not named: {line[:200]}" if missing else "named the holder"


def _leave_lock(place: Path) -> None:
    """The lock file of a process that is no more."""
    gone = fork(_nothing)
    gone.join()
    (place / "run.lock").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(),
                                                "start": "2020-01-01T00:00:00"}) + "\n")


def _nothing() -> None:
    pass
