"""What the numbers and words of a config may be: generous, so that no experiment meets a bound, and bounded, so that no
file makes memory or time explode."""

import dataclasses
import math
import re
from typing import Any

from drl.errors import UserError, shown
from drl.foreign import LARGEST, TEXT

MOST = {  # of an integer; of those that are not here, LARGEST
    "model.width": 16_384,
    "model.layers": 256,
    "model.max_timesteps": 10_000_000,
    "train.updates": 100_000_000,  # a table of three float64 each (descent.py)
    "train.batch_size": 1_048_576,
    "train.context": 1_048_576,
    "train.stream_groups": 65_536,
    "evaluate.episodes": 1_000_000,
    "evaluate.environments": 65_536,
}
TARGETS = 1000  # returns asked for
WEIGHTS, STATES = 2**32, 2**33  # numbers of a model, and in the states of all streams
STEPS = 2**26  # of a batch
PATH = re.compile(r"/|.*(:|\.\.)")  # what begins an id that leads elsewhere; of "a:b" Gymnasium would import a


def bounded(config: Any, where: str) -> None:
    """Raises UserError for a number that is too large or not finite, a word that is too long, too many numbers."""
    for f in dataclasses.fields(config):
        name, value = f"{where}.{f.name}".strip("."), getattr(config, f.name)
        if f.type is int and value > MOST.get(name, LARGEST):
            raise UserError(f"{name} must be at most {MOST.get(name, LARGEST)}, got {shown(value)}")
        if f.type is str and (len(value) > TEXT or not value.isprintable()):
            raise UserError(f"{name} must be one line of at most {TEXT} characters, got {shown(value)}")
        if f.type == list[float] and len(value) > TARGETS:
            raise UserError(f"{name} must be at most {TARGETS} numbers, got {len(value)}")
        numbers = value if f.type == list[float] else [value] if f.type is float else []
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"{name} must be finite, got {shown(value)}")


def positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{where}.{name} must be positive, got {shown(getattr(config, name))}")


def not_negative(config: Any, where: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise UserError(f"{where}.{name}".strip(".") + f" must not be negative, got {shown(getattr(config, name))}")


def plain(value: str, kind: str) -> None:
    """Raises UserError for an id that leads out of the folder of datasets, or to a module."""
    if PATH.match(value):
        raise UserError(f"{shown(value)} is not a {kind}")


def product(most: int, unit: str, names: str, *factors: int) -> None:
    """Raises UserError for numbers that are well one by one and too much together."""
    if (made := math.prod(factors)) > most:
        raise UserError(f"{names} make {made:.2g} {unit}; {most:.2g} are the most")
