"""Minari datasets on disk: their names and places, and reading them.

A dataset is read as data, never as code (minari_metadata.py), and one that this package did not write itself is parsed
in a child process with limits of memory and time.
"""

import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import minari
from minari.dataset.minari_storage import MinariStorage
from minari.storage import get_dataset_path

from drl import disk
from drl.data import columns, guard, minari_hdf5, minari_metadata, minari_remote, packed
from drl.data.columns import Extent
from drl.data.minari_metadata import MAIN, line
from drl.data.store import EpisodeStore
from drl.errors import UserError, did_you_mean
from drl.names import names
from drl.progress import progress

ID = re.compile(r"([\w-]{2,}/)*[\w-]+-v\d+")
COLLECTED = re.compile(r"drl/(?P<name>[\w-]+/[\w-]+)-v0")  # what `drl data collect` makes
OURS = ("drl/", "d4rl/")  # namespaces of what this package writes; nothing of them is downloaded


def read(dataset_id: str) -> EpisodeStore:
    """The episodes of a dataset, mapped from its packed copy (packed.py); downloaded first where it is not local.

    Raises:
        UserError: there is no such dataset, it cannot be read, or it is not one for Box observations and actions.
    """
    folder = path(dataset_id)
    download(dataset_id)
    return packed.read(dataset_id, folder, lambda: _measure(dataset_id), lambda target: _build(dataset_id, target))


def download(dataset_id: str, overwrite: bool = False) -> bool:
    """Have Minari fetch a dataset unless it is here: whole or not at all, in the place of a partial one.

    Args:
        dataset_id: Minari id.
        overwrite: fetch it even if it is here.

    Returns:
        Whether it was fetched.

    Raises:
        UserError: it could not be fetched; what was there is as it was.
    """
    folder = path(dataset_id)
    flaw = minari_metadata.flaw(folder)
    if not flaw and not overwrite:
        return False
    if dataset_id.startswith(OURS):
        raise UserError(f"dataset {dataset_id} {flaw or 'is made here, not downloaded'}; {_cure(dataset_id)}")
    queue = root() / ".downloads"
    queue.mkdir(exist_ok=True)
    waiting = f"waiting for another process that downloads into {root()}"
    with disk.alone(queue, waiting), disk.scratch(root()) as scratch:
        if not overwrite and not minari_metadata.flaw(folder):
            return False  # the other process fetched the same
        failure = f"dataset {dataset_id} {f'{flaw} and ' if flaw else ''}could not be downloaded"
        near = difflib.get_close_matches(dataset_id, set(local_ids()) - {dataset_id}, n=1)
        minari_remote.fetch(dataset_id, scratch, failure, hint=f"; did you mean {near[0]!r}?" if near else "")
        if flaw := minari_metadata.flaw(scratch / dataset_id):
            raise UserError(f"dataset {dataset_id}, as it was downloaded, {flaw}; type the same again")
        for file in (scratch / dataset_id).rglob("*"):
            disk.sync(file)
        folder.parent.mkdir(parents=True, exist_ok=True)
        disk.replace(scratch / dataset_id, folder)
    return True


def pack(dataset_id: str, target: str) -> None:
    """Read a dataset through Minari, validate it and write its arrays into the folder `target`, as columns.py does.

    Raises:
        UserError: the dataset cannot be read, or is malformed.
    """
    folder = path(dataset_id)
    metadata = minari_metadata.read(folder)
    if (version := str(metadata.get("minari_version"))) not in minari.supported_dataset_versions:
        raise UserError(f"dataset {dataset_id} is of Minari {version!r:.20}, which is not one that Minari "
                        f"{minari.__version__} reads; type: pip install --upgrade minari")
    if "sha256" in metadata and disk.sha256(folder / "data" / MAIN) != metadata["sha256"]:
        raise UserError(f"dataset {dataset_id}: {MAIN} is not as it was written (its SHA-256 is not the one in "
                        f"metadata.json); {_cure(dataset_id)}; if you changed it on purpose, take \"sha256\" out of "
                        f"{folder / 'data' / 'metadata.json'}")
    with progress(metadata["total_steps"], "step", f"packing {dataset_id}") as bar:
        episodes = _episodes(dataset_id, metadata, bar.update)
        counts = columns.write(episodes, minari_metadata.spaces(metadata, dataset_id), dataset_id, Path(target))
    for name, count in zip(minari_metadata.COUNTS, counts, strict=True):
        if metadata[name] != count:
            raise UserError(f"dataset {dataset_id}: metadata.json says {name} {metadata[name]}, {count} were found; "
                            f"{_cure(dataset_id)}")


def local_ids() -> list[str]:
    """Ids of the datasets on this machine; those whose metadata are damaged are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari's, one for each of those
        return sorted(minari.list_local_datasets())


def root() -> Path:
    """Where Minari keeps datasets: $MINARI_DATASETS_PATH, else ~/.minari/datasets."""
    return get_dataset_path()


def path(dataset_id: str) -> Path:
    """The folder of a dataset, there or not.

    Raises:
        UserError: the id is malformed, or its folder is not in `root()`.
    """
    if not ID.fullmatch(dataset_id):
        raise UserError(f"{dataset_id!r} is not a Minari id such as drl/hopper/medium-v0; "
                        f"{did_you_mean(dataset_id, local_ids())}")
    folder = root() / dataset_id
    for name in (MAIN, "metadata.json"):
        if not (place := (folder / "data" / name).resolve()).is_relative_to(root().resolve()):
            raise UserError(f"dataset {dataset_id} leads to {place}, which is not in {root()}; move it there, or name "
                            "its own root: export MINARI_DATASETS_PATH=FOLDER")
    return folder


def _measure(dataset_id: str) -> Extent:
    """What a dataset says of its size, which `pack` holds it to."""
    metadata = minari_metadata.read(path(dataset_id))
    spaces = minari_metadata.spaces(metadata, dataset_id)
    return Extent(metadata["total_steps"], metadata["total_episodes"], spaces)


def _build(dataset_id: str, target: Path) -> None:
    """`pack`, in a child process unless the dataset is ours."""
    folder = path(dataset_id)
    metadata = minari_metadata.read(folder)
    if dataset_id.startswith(OURS):
        pack(dataset_id, str(target))
    else:
        size = sum(file.stat().st_size for file in (folder / "data").rglob("*"))
        memory = max(4 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
        try:
            guard.call("drl.data.minari_files:pack", dataset_id, str(target), memory=memory, seconds=600 + size / 1e6)
        except guard.Failure as failure:
            raise UserError(f"dataset {dataset_id} cannot be read (the reader {failure}); {_cure(dataset_id)}"
                            ) from None
    named = minari_metadata.named_environment(metadata)
    if named and not minari_metadata.spaces(metadata, dataset_id).environment:
        print(f"dataset {dataset_id} names the environment {named!r}; only plain ids are taken from a dataset, name it "
              "yourself: --environment ID", file=sys.stderr)


def _episodes(
    dataset_id: str, metadata: dict[str, Any], done: Callable[[int], Any]
) -> Iterator[minari.EpisodeData]:
    data, count = path(dataset_id) / "data", metadata["total_episodes"]
    try:
        if metadata["data_format"] == "hdf5" and "sha256" not in metadata:
            minari_hdf5.check(data / MAIN, count, dataset_id)
        storage = MinariStorage.read(data)  # both spaces are there: no environment is built
        for episode in storage.get_episodes(range(count)):
            yield minari.EpisodeData(**episode)
            done(len(episode["rewards"]))
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"dataset {dataset_id} needs a package that is missing ({line(error)})") from error
    except Exception as error:  # whatever a damaged file makes minari and h5py raise
        raise UserError(f"dataset {dataset_id} cannot be read ({line(error)}); {_cure(dataset_id)}") from error


def _cure(dataset_id: str) -> str:
    """What to type to have a dataset anew, or to have the one that was meant."""
    anew = " --overwrite" if (root() / dataset_id).exists() else ""
    collectable = {f"drl/{name}-v0": name for name in names()}
    if dataset_id.startswith("drl/") and not anew and dataset_id not in collectable:
        if not (near := difflib.get_close_matches(dataset_id, {*collectable, *local_ids()}, n=1)):
            return "to see which there are, type: drl data list"
        known = f"did you mean {near[0]!r}?"
        return known if near[0] in local_ids() else f"{known} type: drl data collect {collectable[near[0]]}"
    if made := COLLECTED.fullmatch(dataset_id):
        return f"type: drl data collect {made['name']}{anew}"
    if dataset_id.startswith(OURS):
        return f"type: drl data import-d4rl FILE{anew}"
    return f"make it anew, or type: drl data download {dataset_id}{anew}"
