"""A damaged file is noticed, whichever bit it is: it is refused in one line, or made anew, or an older one is taken."""

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toys
from torture import toy
from torture.trial import Trial

from drl import checkpoint as checkpoints
from drl import exported
from drl.cli import main
from drl.config_files import read_config
from drl.data import minari_files, packed
from drl.errors import UserError
from drl.export import export

PROMISE = "a damaged file is refused in one line, made anew, or an older one is taken and said so"
TRIALS, SECONDS = (200, 4), (120, 5)
CUTS = {"0 bytes left": 0, "1 byte left": 1, "10 bytes left": 10, "half left": 0.5, "the last byte missing": -1}


def run(trials: int, folder: Path, rng: np.random.Generator, short: bool) -> Iterator[Trial]:
    """Flip so many single bits of every file, one at a time, and cut, blank, remove and add files. In this process;
    what passes unnoticed counts as kept only where all that was loaded is bit for bit what it was before."""
    with toy.root(folder):
        toy.dataset(episodes=6)  # to be packed anew hundreds of times
        for place, pattern, load, kind in _places(folder):
            expected = load()
            for file in sorted(place.glob(pattern)):
                content = file.read_bytes()
                for name, damaged, numbers in _damages(content, trials, rng):
                    yield _try(f"{kind}: {file.name}", name, file, content, damaged, load, expected, numbers)
            extra = place / "extra"
            yield _try(f"{kind}: an extra file", "an extra file", extra, None, b"extra", load, expected, {})


def _places(folder: Path) -> Iterator[tuple[Path, str, Callable[[], Any], str]]:
    """Folders, which of their files are damaged, what loads them, and what they are called."""
    run = folder / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        main(toy.train(run, train_updates=3, train_checkpoint_every=2, train_evaluate_every=0))
    newest = toy.steps(run)[3]
    yield newest, "*", lambda: checkpoints.load(newest), "checkpoint"
    yield newest, "*", lambda: checkpoints.load(run), "a run's newest checkpoint"
    policy = folder / "policy"
    export(newest, policy)
    yield policy, "*", lambda: exported.load(policy), "exported policy"
    yield minari_files.path(toys.ID) / packed.NAME, "*", lambda: minari_files.read(toys.ID), "packed copy"
    yield run, "config.yaml", lambda: _resumed(run), "a run"


def _resumed(run: Path) -> tuple[Any, ...]:
    """What `drl train --resume --run` goes by: the stored config, and the checkpoint that it must fit."""
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        if main(["train", "--resume", "--run", str(run)]):
            raise UserError("\n".join(_told(heard)))
    return read_config(run / "config.yaml"), checkpoints.load(run)


def _damages(content: bytes, flips: int, rng: np.random.Generator) -> Iterator[tuple[str, bytes | None, dict]]:
    """Name, what the file then holds (None: it is missing), and numbers."""
    for _ in range(flips):
        byte, bit = int(rng.integers(len(content))), int(rng.integers(8))
        flipped = bytearray(content)
        flipped[byte] ^= 1 << bit
        yield "a flipped bit", bytes(flipped), {"byte": byte, "bit": bit}
    for name, left in CUTS.items():
        yield name, content[: len(content) // 2 if left == 0.5 else left], {}
    for share in (2, 16):
        blank = max(1, len(content) // share)
        yield "a tail of zeros", content[:-blank] + bytes(blank), {"bytes": blank}
    yield "missing", None, {}


def _try(kind, name, file: Path, content: bytes | None, damaged: bytes | None, load, expected, numbers) -> Trial:
    began, heard = time.monotonic(), io.StringIO()
    siblings = {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file() and path != file}
    _put(file, damaged)
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(io.StringIO()):
            loaded = load()
        told = _told(heard)
        same = equal(loaded, expected)
        if same:
            ok, detail = True, "made anew, with a line" if told else "without effect"
        else:
            ok, detail = bool(told) and _older(loaded, expected), "an older one, with a line" if told else "silent"
    except UserError as error:
        ok, detail = "\n" not in str(error), "refused"
    except Exception as error:  # whatever was not caught is the failure that is counted
        ok, detail = False, f"{type(error).__name__}: {str(error)[:120]}"
    finally:
        for path, bytes_before in siblings.items():
            _put(path, bytes_before)
        _put(file, content)
    if not ok:
        detail = f"{name}: {detail}"
    return Trial("flips", kind, ok, detail, time.monotonic() - began, numbers)


def _told(heard: io.StringIO) -> list[str]:
    """The lines that are no progress bars."""
    return [line for line in heard.getvalue().splitlines() if line and "%|" not in line]


def _older(loaded: Any, expected: Any) -> bool:
    """Whether a checkpoint of an earlier update came instead."""
    return isinstance(loaded, checkpoints.Checkpoint) and loaded.step < expected.step


def _put(file: Path, content: bytes | None) -> None:
    file.unlink(missing_ok=True)  # what is mapped of it stays as it was
    if content is not None:
        file.write_bytes(content)


def equal(one: Any, other: Any) -> bool:
    """Whether two things that were loaded are the same, every array bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (torch.Tensor, np.ndarray)):
        one, other = map(np.asarray, (one, other))
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if dataclasses.is_dataclass(one):
        return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other
