"""The arrays of an EpisodeStore as .npy files: written episode by episode, mapped back if they are what was written.

    observations.npy (S, O)   actions.npy (S, A)   returns_to_go.npy (S,)   float32
    episode_starts.npy (E+1,)   int64        terminated.npy (E,)   bool

Dimension key: S steps of all episodes, E episodes, O observation, A action.
"""

import contextlib
import io
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from drl.data.store import Episode, Spaces, flatten, starts_of

ARRAYS = ("observations", "actions", "returns_to_go", "episode_starts", "terminated")
FILES = tuple(f"{name}.npy" for name in ARRAYS)


class Changed(Exception):
    """The name of a file that is not as it was written."""


class Extent(NamedTuple):
    """How large the arrays of a dataset are."""

    steps: int
    episodes: int
    spaces: Spaces

    @property
    def layout(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and dtype of each array, in the order of EpisodeStore's."""
        S, O, A = self.steps, self.spaces.observation_dim, self.spaces.action_dim
        E = self.episodes
        return ((S, O), "<f4"), ((S, A), "<f4"), ((S,), "<f4"), ((E + 1,), "<i8"), ((E,), "|b1")

    @property
    def size(self) -> int:
        """Bytes of the arrays."""
        return sum(_bytes(*array) for array in self.layout)


def write(episodes: Iterable[Episode], spaces: Spaces, dataset: str, folder: Path) -> tuple[int, int]:
    """Validate and write the arrays, holding one episode in memory at a time. Returns the counts of episodes and steps.

    Raises:
        UserError: as `flatten`.
        OSError: the folder cannot be written.
    """
    lengths, ends = [], []
    with contextlib.ExitStack() as stack:
        layout = Extent(0, 0, spaces).layout
        *columns, starts, terminated = (
            stack.enter_context(_Column(folder / file, shape[1:], dtype))
            for file, (shape, dtype) in zip(FILES, layout, strict=True)
        )
        for *arrays, end in flatten(episodes, spaces, dataset):
            for column, array in zip(columns, arrays, strict=True):
                column.append(array)
            lengths.append(len(arrays[0]))
            ends.append(end)
        starts.append(starts_of(lengths))
        terminated.append(np.array(ends, bool))
    return len(lengths), sum(lengths)


def mapped(folder: Path, extent: Extent) -> list[np.ndarray]:
    """The arrays, mapped read-only: a private writable map would be refused where a file is larger than the memory.

    No header is parsed: the one that would have been written is known.

    Raises:
        Changed: the size of a file, or a byte of its header, is not what would have been written.
        OSError: a file cannot be read.
    """
    return [_mapped(folder / file, *array) for file, array in zip(FILES, extent.layout, strict=True)]


def _mapped(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    header = _header(shape, dtype)
    with open(path, "rb") as file:
        if file.read(len(header)) != header or os.fstat(file.fileno()).st_size != len(header) + _bytes(shape, dtype):
            raise Changed(path.name)
        return np.asarray(np.memmap(file, dtype, "r", len(header), shape))


class _Column:
    """An .npy file that grows; its header is right once it is closed."""

    def __init__(self, path: Path, row: tuple[int, ...], dtype: str):
        self._file, self._row, self._dtype, self._rows = open(path, "wb"), row, dtype, 0
        self._write_header()

    def append(self, array: np.ndarray) -> None:
        self._file.write(memoryview(np.ascontiguousarray(array, self._dtype)).cast("B"))
        self._rows += len(array)

    def _write_header(self) -> None:
        self._file.seek(0)
        self._file.write(_header((self._rows, *self._row), self._dtype))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._file:
            self._write_header()


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    """What an .npy file begins with; of one length however many rows there are, for which numpy leaves room."""
    header = io.BytesIO()
    fields = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize
