"""A hostile file is refused: status 2, one line, no code of it run, in bounded time and memory."""

import functools
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hostile_inputs import CANARY, inputs
from torture.processes import Drl, drl
from torture.trial import Trial

PROMISE = "a hostile file is refused with status 2 in one line, in bounded time and memory, and none of its code runs"
TRIALS, SECONDS = (1000, 40), (90, 10)  # at most: the table has fewer
BOUND = 30.0  # seconds
MEMORY = 4 << 30  # bytes of addresses beyond what a process that has imported everything has


def run(trials: int, folder: Path, rng: np.random.Generator, short: bool) -> Iterator[Trial]:
    """Rows of the table, as many as asked for, each in a process with little memory."""
    table = list(inputs())
    for number in rng.permutation(len(table))[:trials]:
        name, make = table[number]
        place = folder / f"input-{number}"
        place.mkdir()
        arguments = make(place)
        began = time.monotonic()
        with drl(arguments, folder / "said", hook=functools.partial(enter, place, MEMORY)) as process:
            process.wait(BOUND)
        yield Trial("hostile", name, *_judge(process, place), time.monotonic() - began)


def enter(place: Path, memory: int) -> None:
    """Work in the folder of the input, with so many bytes of addresses more and no more."""
    os.chdir(place)
    os.environ["MINARI_DATASETS_PATH"] = "datasets"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)


def _judge(process: Drl, place: Path) -> tuple[bool, str]:
    if any(place.rglob(f"{CANARY}*")):
        return False, "its code has run"
    return process.refused, process.told[-1][:150] if process.refused else process.outcome
