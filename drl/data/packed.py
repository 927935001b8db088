"""The packed form of a dataset: the arrays of its EpisodeStore as files beside it, mapped by every process that trains.

    <dataset>/data/      Minari's files: what was recorded
    <dataset>/packed/    observations.npy (S, O)  actions.npy (S, A)  returns_to_go.npy (S,)  episode_starts.npy (E+1,)
                         card.json: spaces, normaliser, and the checksums of all this and of what it was made from

Made episode by episode on first use, so that a dataset may be larger than memory; made once when several processes
start together. Every start recomputes the checksums. A copy that is damaged or older than the data is made anew.
"""

import contextlib
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from drl import disk
from drl.data.store import Episode, EpisodeStore, Normaliser, Spaces, fingerprint, flatten, starts_of
from drl.errors import UserError

FORMAT = 1  # of the card and the arrays; a copy of another format is made anew
NAME, CARD = "packed", "card.json"
ARRAYS = ("observations", "actions", "returns_to_go", "episode_starts")


class Unusable(Exception):
    """Why there is no use in a packed copy; empty: there is none."""


def read(dataset: str, folder: Path, build: Callable[[Path], Spaces]) -> EpisodeStore:
    """The store of the dataset in `folder`, mapped from its packed copy; packed first where there is no sound one.

    Args:
        dataset: Minari id.
        folder: holds data/, and packed/ afterwards where it can be written; else the copy is temporary.
        build: called with an empty folder when the dataset must be packed: `write`s it there, returns the spaces.
    """
    with contextlib.suppress(Unusable):  # why, is told below, once no other process can be at work on it
        return load(folder / NAME, dataset, source_of(folder))
    try:
        waiting = f"waiting for another process that packs dataset {dataset}"
        with disk.alone(folder / "data", waiting), disk.scratch(folder) as partial:
            return _read_or_pack(dataset, folder, build, partial)
    except OSError as error:
        print(f"{folder} cannot be written ({error.strerror or error}): dataset {dataset} is packed for this run only",
              file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="drl-packed-") as temporary:  # what is mapped outlives its name
            return _pack(dataset, folder, build, Path(temporary))
    except OSError as error:
        raise UserError(f"dataset {dataset} cannot be packed in {tempfile.gettempdir()} either "
                        f"({error.strerror or error}); make room, or name a folder: export TMPDIR=FOLDER") from error


def _read_or_pack(dataset: str, folder: Path, build: Callable[[Path], Spaces], partial: Path) -> EpisodeStore:
    try:
        return load(folder / NAME, dataset, source_of(folder))  # another process made it while this one waited
    except Unusable as reason:
        if str(reason):
            print(f"{reason}; packing it anew", file=sys.stderr)
    new = partial / NAME
    new.mkdir()
    store = _pack(dataset, folder, build, new)
    for file in new.iterdir():
        disk.sync(file)
    disk.replace(new, folder / NAME)
    return store


def _pack(dataset: str, folder: Path, build: Callable[[Path], Spaces], target: Path) -> EpisodeStore:
    source = source_of(folder)  # before the data are read: if they change meanwhile, the copy is older than they are
    spaces = build(target)
    store = EpisodeStore.from_arrays(*(_map(target, name) for name in ARRAYS), spaces, dataset)
    _write_card(store, source, target / CARD)
    return load(target, dataset, source)


def write(episodes: Iterable[Episode], spaces: Spaces, dataset: str, folder: Path) -> tuple[int, int]:
    """Validate and write the arrays, holding one episode in memory at a time. Returns the counts of episodes and steps.

    Raises:
        UserError: as `flatten`.
        OSError: the folder cannot be written.
    """
    lengths = []
    with contextlib.ExitStack() as stack:
        *columns, starts = (stack.enter_context(_Column(folder, *expected)) for expected in _layout(0, -1, spaces))
        for arrays in flatten(episodes, spaces, dataset):
            for column, array in zip(columns, arrays, strict=True):
                column.append(array)
            lengths.append(len(arrays[0]))
        starts.append(starts_of(lengths))
    return len(lengths), sum(lengths)


class _Column:
    """An .npy file that grows; its header is right once it is closed."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], dtype: str):
        self._file, self._row, self._dtype, self._rows = open(folder / f"{name}.npy", "wb"), shape[1:], dtype, 0
        self._write_header()

    def append(self, array: np.ndarray) -> None:
        self._file.write(memoryview(np.ascontiguousarray(array, self._dtype)).cast("B"))
        self._rows += len(array)

    def _write_header(self) -> None:
        self._file.seek(0)
        fields = {"descr": self._dtype, "fortran_order": False, "shape": (self._rows, *self._row)}
        np.lib.format.write_array_header_1_0(self._file, fields)  # of one length: numpy leaves room for the rows

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._file:
            self._write_header()


def _write_card(store: EpisodeStore, source: str, file: Path) -> None:
    """Write what `load` needs beside the arrays."""
    card = {
        "format": FORMAT,
        "dataset": store.dataset,
        "source": source,
        "fingerprint": store.fingerprint,
        "steps": len(store.actions),
        "episodes": len(store.episode_lengths),
        "environment": store.spaces.environment,
        "action_low": store.spaces.action_low.tolist(),
        "action_high": store.spaces.action_high.tolist(),
        "mean": store.normaliser.mean.tolist(),
        "std": store.normaliser.std.tolist(),
    }
    file.write_text(json.dumps(card | {"sha256": _digest(card)}, indent=1) + "\n")


def load(folder: Path, dataset: str, source: str) -> EpisodeStore:
    """Map a packed copy into memory and recompute its checksums.

    Raises:
        Unusable: it is not there, damaged, of another format, or made from other data than `source`.
    """
    if not folder.exists():
        raise Unusable()
    try:
        card = json.loads((folder / CARD).read_text())
        sound = card.pop("sha256") == _digest(card)
    except Exception as error:  # whatever a damaged file raises
        raise _damaged(dataset, CARD) from error
    if not sound:
        raise _damaged(dataset, CARD)
    if card["format"] != FORMAT:
        raise Unusable(f"dataset {dataset} was packed in format {card['format']}, this is format {FORMAT}")
    if (card["dataset"], card["source"]) != (dataset, source):
        raise Unusable(f"dataset {dataset} changed since it was packed")
    mean, std, low, high = (np.float32(card[name]) for name in ("mean", "std", "action_low", "action_high"))
    spaces = Spaces(card["environment"], len(mean), low, high)
    arrays = tuple(_sound(folder, dataset, *expected) for expected in _layout(card["steps"], card["episodes"], spaces))
    if fingerprint(arrays) != card["fingerprint"]:
        raise _damaged(dataset, "a checksum differs")
    return EpisodeStore(*arrays, Normaliser(mean, std), spaces, dataset, card["fingerprint"])


def source_of(folder: Path) -> str:
    """A digest that changes with the files of a dataset: their names, sizes and times, and the text of its metadata."""
    data = folder / "data"
    files = [(str(file.relative_to(data)), file.stat()) for file in sorted(data.rglob("*"))]
    listed = [(name, status.st_size, status.st_mtime_ns) for name, status in files if S_ISREG(status.st_mode)]
    return _digest([listed, hashlib.sha256((data / "metadata.json").read_bytes()).hexdigest()])


def size(steps: int, episodes: int, spaces: Spaces) -> int:
    """Bytes of the arrays."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in _layout(steps, episodes, spaces))


def _layout(steps: int, episodes: int, spaces: Spaces) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each array, in the order of EpisodeStore's."""
    shapes = (steps, spaces.observation_dim), (steps, spaces.action_dim), (steps,), (episodes + 1,)
    return zip(ARRAYS, shapes, ("<f4", "<f4", "<f4", "<i8"), strict=True)


def _sound(folder: Path, dataset: str, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    try:
        array = _map(folder, name)
    except Exception as error:  # whatever a damaged header raises
        raise _damaged(dataset, f"{name}.npy") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise _damaged(dataset, f"{name}.npy")
    return array


def _map(folder: Path, name: str) -> np.ndarray:
    """Mapped read-only: a private writable map would be refused where the file is larger than the memory."""
    return np.asarray(np.lib.format.open_memmap(folder / f"{name}.npy", mode="r"))


def _damaged(dataset: str, what: str) -> Unusable:
    return Unusable(f"the packed copy of dataset {dataset} is damaged ({what})")


def _digest(fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
