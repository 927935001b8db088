"""The arrays of an HDF5 file in D4RL's layout, copied into plain .npy files; meant for a child process (guard.py).

HDF5 from elsewhere may be anything: its parser follows links into other files, fills holes, decompresses a kilobyte
into a gigabyte, and calls plugins. So nothing is read before the whole structure is known to be plain: arrays that lie
in the file itself, of plain numbers, of the right shapes, filtered by nothing but gzip, and no larger than what is
stored can hold. What the numbers mean is judged by the caller, without HDF5.
"""

import math
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d

from drl import disk
from drl.errors import UserError
from drl.progress import progress

ORIGIN = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
NUMBERS = ("observations", "next_observations", "actions", "rewards")
FLAGS = ("terminals", "timeouts")
NOT_IN_V0 = {"next_observations", "timeouts"}

LARGEST = 4 << 30  # bytes of all fields together; the largest originals have 0.3 GB
LARGEST_CHUNK = 256 << 20  # bytes: HDF5 holds a whole chunk in memory
SLICE = 16 << 20  # bytes copied at a time
FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32"}  # by their registered numbers; others may call plugins
DEFLATE = 1032  # to 1 is as far as deflate can compress (zlib's technical details)


def wrong(file: str, what: str, *, step: int | None = None, field: str | None = None) -> UserError:
    """The error that names file, step and field, and where there is a better file."""
    place = file + ("" if step is None else f", step {step}") + ("" if field is None else f", field {field}")
    return UserError(f"{place}: {what}; D4RL's own files are at {ORIGIN}")


def extract(file: str, folder: str, observation_dim: str, action_dim: str) -> None:
    """Copy each field of a file into <folder>/<field>.npy, slice by slice, in the byte order of this machine.

        observations, next_observations (N, O)   actions (N, A)   rewards, terminals, timeouts (N,)

    Raises:
        UserError: the file is not as promised above; names the field.
        Exception: whatever a damaged file makes h5py raise.
    """
    O, A = int(observation_dim), int(action_dim)
    widths = {"observations": (O,), "next_observations": (O,), "actions": (A,), "rewards": ()}
    widths |= dict.fromkeys(FLAGS, ())
    with h5py.File(file, "r", locking="best-effort") as content:  # some network disks have no locks
        if missing := [field for field in widths if content.get(field, getlink=True) is None]:
            old = " (D4RL's v0 files are like that: take v2)" if NOT_IN_V0.issuperset(missing) else ""
            raise wrong(file, f"has no {' and no '.join(missing)}{old}")
        datasets = {field: _checked(content, field, width, file) for field, width in widths.items()}
        if len({len(dataset) for dataset in datasets.values()}) > 1:
            lengths = ", ".join(f"{field} {len(dataset)}" for field, dataset in datasets.items())
            raise wrong(file, f"the fields differ in length: {lengths}")
        if not len(datasets["rewards"]):
            raise wrong(file, "holds no steps")
        if (total := sum(map(_bytes, datasets.values()))) > LARGEST:
            raise wrong(file, f"declares {total} bytes; at most {LARGEST} are read")
        disk.require_space(Path(folder), total, f"the copy of {file}")  # zeros unpack to a thousand times the file
        with progress(total, "B", f"reading {Path(file).name}") as bar:
            for field, dataset in datasets.items():
                _copy(dataset, (len(dataset), *widths[field]), Path(folder) / f"{field}.npy", bar)


def _checked(content: h5py.File, field: str, width: tuple[int, ...], file: str) -> h5py.Dataset:
    """A field, once its place, type, shape and size are known to be right."""
    if not isinstance(content.get(field, getlink=True), h5py.HardLink):
        raise wrong(file, "is a link; the data must lie in the file itself", field=field)
    dataset = content[field]
    if not isinstance(dataset, h5py.Dataset):
        raise wrong(file, f"is a {type(dataset).__name__.lower()}, not an array", field=field)
    layout = dataset.id.get_create_plist()
    if layout.get_layout() == h5d.VIRTUAL or layout.get_external_count():
        raise wrong(file, "its data lie in other files", field=field)
    filters = [layout.get_filter(number) for number in range(layout.get_nfilters())]
    if foreign := [f"{number} {name!r:.40}" for number, _, _, name in filters if number not in FILTERS]:
        raise wrong(file, f"is stored with filter {foreign[0]}; known are {', '.join(FILTERS.values())}", field=field)
    dtype = dataset.dtype
    # D4RL's replay files of v1 have flags that are floats
    if not (dtype.kind == "f" and dtype.itemsize in (4, 8) or field in FLAGS and dtype.kind in "biu"):
        kinds = "float32 or float64" if field in NUMBERS else "bool, or numbers that are 0 or 1"
        raise wrong(file, f"dtype must be {kinds}, got {str(dtype):.80}", field=field)
    # D4RL's own reader takes a column for a vector, too
    if not dataset.shape or dataset.shape[1:] not in (width, width or (1,)):
        raise wrong(file, f"shape must be (N,{f' {width[0]}' if width else ''}), got {dataset.shape}", field=field)
    _check_size(dataset, bool(filters), field, file)
    return dataset


def _check_size(dataset: h5py.Dataset, filtered: bool, field: str, file: str) -> None:
    """Raises UserError where more is declared than is there: HDF5 would fill the rest with zeros, of any length."""
    declared, stored = _bytes(dataset), dataset.id.get_storage_size()
    if stored > Path(file).stat().st_size or declared > stored * (DEFLATE if filtered else 1):
        raise wrong(file, f"declares {declared} bytes, of which {stored} are in the file", field=field)
    if dataset.chunks is None:
        return
    if (size := math.prod(dataset.chunks) * dataset.dtype.itemsize) > LARGEST_CHUNK:
        raise wrong(file, f"has chunks of {size} bytes; at most {LARGEST_CHUNK} are read", field=field)
    chunks = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    if (found := dataset.id.get_num_chunks()) != chunks:
        raise wrong(file, f"has {chunks} chunks, of which {found} are in the file", field=field)


def _bytes(dataset: h5py.Dataset) -> int:
    return math.prod(dataset.shape) * dataset.dtype.itemsize  # in Python's integers: a declared size may be any number


def _copy(dataset: h5py.Dataset, shape: tuple[int, ...], target: Path, bar) -> None:
    dtype = np.dtype(dataset.dtype.str).newbyteorder("=")
    rows = max(1, SLICE // (math.prod(shape[1:]) * dtype.itemsize))
    if dataset.chunks is not None and dataset.chunks[0] <= rows:
        rows -= rows % dataset.chunks[0]  # a chunk on the border would be decompressed twice
    # written, not mapped: a mapped file on a full disk ends the process without a word
    with open(target, "wb") as out:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, len(dataset), rows):
            bar.update(out.write(dataset[start : start + rows].astype(dtype).tobytes()))
