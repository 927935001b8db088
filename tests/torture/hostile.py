"""A hostile file is refused: status 2, one line, no code of it run, in bounded time and memory."""

import functools
import importlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torture import toy
from torture.processes import Drl, drl
from torture.trial import Trial

PROMISE = "a hostile file is refused with status 2 in one line, in bounded time and memory, and none of its code runs"
TRIALS, SECONDS = (1000, 1000), (90, 30)  # at most: the table has fewer
TABLE = "hostile_inputs"  # its `hostile_inputs()` yields (name, make): make(folder) gives the arguments of `drl`
CANARY = "canary"  # the name of the file that code of a hostile file would write
BOUND = 30.0  # seconds
MEMORY = 4 << 30  # bytes of addresses beyond what a process that has imported everything has


def run(trials: int, folder: Path, rng: np.random.Generator, short: bool) -> Iterator[Trial]:
    """Every row of the table, in a process with little memory."""
    try:
        table = importlib.import_module(TABLE)
    except ModuleNotFoundError:
        yield Trial("hostile", "the table", None, f"there is no {TABLE}")
        return
    with toy.root(folder):
        toy.dataset()
        for number, (name, make) in enumerate(table.hostile_inputs()):
            if number == trials:
                break
            place = folder / f"input-{number}"
            place.mkdir()
            arguments = make(place)
            began = time.monotonic()
            with drl(arguments, folder / "said", hook=functools.partial(limit, MEMORY)) as process:
                process.wait(BOUND)
            yield Trial("hostile", name, *_judge(process, folder), time.monotonic() - began)


def limit(memory: int) -> None:
    """Let this process take so many bytes of addresses more, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)


def _judge(process: Drl, folder: Path) -> tuple[bool, str]:
    if any(folder.rglob(CANARY)):
        return False, "its code has run"
    return process.refused, process.told[-1][:150] if process.refused else process.outcome
