"""The packed form of a dataset: the arrays of its EpisodeStore as files beside it, mapped by every process that trains.

    <dataset>/data/      Minari's files: what was recorded
    <dataset>/packed/    the arrays (columns.py), and
                         card.json: spaces, normaliser, and the checksums of all this and of what it was made from

Made episode by episode on first use, so that a dataset may be larger than memory; made once when several processes
start together. Every start makes sure that the copy is, byte for byte, what would be written here: the names in the
folder, sizes and headers of the files, the card by its seal, the arrays by their checksum. A copy that is damaged or
older than the data is made anew.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG

import numpy as np

from drl import disk, intact
from drl.data import columns
from drl.data.columns import Extent
from drl.data.store import EpisodeStore, Normaliser, Spaces, fingerprint
from drl.errors import UserError

FORMAT = 3  # of the card and the arrays; a copy of another format is made anew
NAME, CARD = "packed", "card.json"
FILES = {CARD, *columns.FILES}
CURE = "make room, or name a folder for temporary files: export TMPDIR=FOLDER"


class Unusable(Exception):
    """Why there is no use in a packed copy; empty: there is none."""


def read(dataset: str, folder: Path, measure: Callable[[], Extent], build: Callable[[Path], None]) -> EpisodeStore:
    """The store of the dataset in `folder`, mapped from its packed copy; packed first where there is no sound one.

    A dataset that is replaced meanwhile is read again: the store is that of the old one or of the new one, whole.

    Args:
        dataset: Minari id.
        folder: holds data/, and packed/ afterwards where it can be written; else the copy is temporary.
        measure: what the dataset says of its size.
        build: called with an empty folder when the dataset must be packed: `columns.write`s it there.

    Raises:
        UserError: as `measure` and `build`, or the copy can be written nowhere.
    """
    while True:
        source = source_of(folder)
        with contextlib.suppress(Unusable):  # why, is told later, once no other process can be at work on it
            return load(folder / NAME, dataset, source)
        try:
            return _read_or_pack(dataset, folder, source, measure(), build)
        except (UserError, OSError):
            if source_of(folder) == source:
                raise
        print(f"dataset {dataset} was replaced while it was read; reading it again", file=sys.stderr)


def _read_or_pack(
    dataset: str, folder: Path, source: str, extent: Extent, build: Callable[[Path], None]
) -> EpisodeStore:
    waiting = f"waiting for another process that packs dataset {dataset}"
    try:
        with disk.alone(folder / "data", waiting), disk.scratch(folder) as partial:
            try:
                return load(folder / NAME, dataset, source)  # another process made it while this one waited
            except Unusable as reason:
                if str(reason):
                    print(f"{reason}; packing it anew", file=sys.stderr)
            store = _pack(dataset, folder, source, extent, build, partial / NAME)
            disk.replace(partial / NAME, folder / NAME)
            return store
    except OSError as error:
        if source_of(folder) != source:  # what was to be written went with the dataset that was replaced
            raise
        refusal = f"{folder} cannot be written ({error.strerror or error})"
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # Python has tried all the folders that it knows
        raise UserError(f"{refusal}, nor can any folder for temporary files: dataset {dataset} cannot be packed; "
                        f"{CURE}") from error
    with disk.refusal_told(place, f"{refusal}; a copy of dataset {dataset} for this run", CURE, extent.size):
        with tempfile.TemporaryDirectory(prefix="drl-packed-", dir=place) as temporary:
            store = _pack(dataset, folder, source, extent, build, Path(temporary) / NAME)
    print(f"{refusal}: dataset {dataset} is packed for this run only", file=sys.stderr)
    return store  # what is mapped outlives its name


def _pack(
    dataset: str, folder: Path, source: str, extent: Extent, build: Callable[[Path], None], target: Path
) -> EpisodeStore:
    """Make the folder `target`, and read it back.

    Raises:
        UserError: as `build`.
        OSError: the disk refuses, or does not give back what was written.
    """
    target.mkdir()
    if shutil.disk_usage(target).free < extent.size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    build(target)
    try:
        arrays = columns.mapped(target, extent)
        _write_card(EpisodeStore.from_arrays(*arrays, extent.spaces, dataset), source, target / CARD)
        for file in target.iterdir():
            disk.sync(file)
        return load(target, dataset, source)
    except (columns.Changed, Unusable) as reason:
        raise OSError(errno.EIO, f"it does not give back what was written: {reason}") from reason


def _write_card(store: EpisodeStore, source: str, file: Path) -> None:
    """Write what `load` needs beside the arrays."""
    intact.write_sealed(file, {
        "format": FORMAT,
        "dataset": store.dataset,
        "source": source,
        "fingerprint": store.fingerprint,
        "terminated": fingerprint([store.terminated]),
        "steps": len(store.actions),
        "episodes": len(store.episode_lengths),
        "environment": store.spaces.environment,
        "action_low": store.spaces.action_low.tolist(),
        "action_high": store.spaces.action_high.tolist(),
        "mean": store.normaliser.mean.tolist(),
        "std": store.normaliser.std.tolist(),
    })


def load(folder: Path, dataset: str, source: str) -> EpisodeStore:
    """Map a packed copy into memory and recompute its checksums.

    Raises:
        Unusable: it is not there, damaged, of another format, or made from other data than `source`.
    """
    if not os.path.lexists(folder):
        raise Unusable()
    try:
        return _load(folder, dataset, source)
    except Unusable:
        raise
    except columns.Changed as file:
        raise _damaged(dataset, str(file)) from file
    except Exception as error:  # whatever a damaged card makes of what follows
        raise _damaged(dataset, CARD) from error


def _load(folder: Path, dataset: str, source: str) -> EpisodeStore:
    _require_own_files(folder)
    card = intact.read_sealed(folder / CARD, "packed")
    if card["format"] != FORMAT:
        raise Unusable(f"dataset {dataset} was packed in format {card['format']}, this is format {FORMAT}")
    if (card["dataset"], card["source"]) != (dataset, source):
        raise Unusable(f"dataset {dataset} changed since it was packed")
    mean, std, low, high = (np.float32(card[name]) for name in ("mean", "std", "action_low", "action_high"))
    spaces = Spaces(card["environment"], len(mean), low, high)
    arrays = columns.mapped(folder, Extent(card["steps"], card["episodes"], spaces))
    *identity, terminated = arrays
    if fingerprint(identity) != card["fingerprint"] or fingerprint([terminated]) != card["terminated"]:
        raise _damaged(dataset, "a checksum differs")
    starts = identity[-1]
    if starts[0] != 0 or starts[-1] != card["steps"] or (np.diff(starts) < 1).any():  # a seal is no signature
        raise columns.Changed("episode_starts.npy")
    return EpisodeStore(*arrays, Normaliser(mean, std), spaces, dataset, card["fingerprint"])


def _require_own_files(folder: Path) -> None:
    """The files of a copy and no others, plain ones: a link might lead elsewhere, and a pipe would be waited for. Names
    that begin with a dot are not looked at: file systems and file managers leave them.

    Raises:
        columns.Changed: names what is not so.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise columns.Changed(f"{NAME} is no folder")
    found = {file.name: file.lstat() for file in folder.iterdir() if not file.name.startswith(".")}
    for name in sorted(FILES | found.keys()):
        if name not in FILES:
            raise columns.Changed(f"{name!r} does not belong there")
        if name not in found or not S_ISREG(found[name].st_mode):
            raise columns.Changed(name)


def source_of(folder: Path) -> str:
    """A digest that changes with the files of a dataset: their names, sizes and times, and the text of its metadata."""
    data = folder / "data"
    files = [(str(file.relative_to(data)), file.stat()) for file in sorted(data.rglob("*"))]
    listed = [(name, status.st_size, status.st_mtime_ns) for name, status in files if S_ISREG(status.st_mode)]
    metadata = hashlib.sha256((data / "metadata.json").read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([listed, metadata], sort_keys=True).encode()).hexdigest()


def _damaged(dataset: str, what: str) -> Unusable:
    return Unusable(f"the packed copy of dataset {dataset} is damaged ({what})")
