"""What a Minari dataset says of itself, read as data: metadata.json, and whether the files beside it are whole.

Nothing that it names is imported, built or called. That is why Minari is not asked: where a space is missing, it
builds the environment that the dataset names, from whatever module the dataset names.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from drl import foreign
from drl.data.store import Spaces
from drl.errors import UserError, shown

MAIN = "main_data.hdf5"
COUNTS = ("total_episodes", "total_steps")
SAID = {"author": str | list[str], "algorithm_name": str, "dataset_size": float, "collection_seed": int, "source": dict,
        "versions": dict[str, str], "returns": dict[str, float], "description": str}  # of itself, for people
ENVIRONMENT = re.compile(r"\w+-v\d+", re.ASCII)  # no "module:Name-v0", for which Gymnasium would import the module


def read(folder: Path) -> dict[str, Any]:
    """The metadata of the dataset in `folder`, without what is SAID in another form. Raises whatever a damaged file
    gives."""
    file = folder / "data" / "metadata.json"
    metadata = foreign.parse_json(foreign.read_bytes(file, "metadata", foreign.JSON, follow=True))
    for name in COUNTS:
        if not foreign.fits(metadata[name], int):
            raise ValueError(f"{name} is {shown(metadata[name])}")
    if isinstance(text := metadata.get("description"), str):
        metadata["description"] = "".join(filter(str.isprintable, " ".join(text.split())))[: foreign.TEXT]
    return {name: value for name, value in metadata.items() if name not in SAID or foreign.fits(value, SAID[name])}


def flaw(folder: Path) -> str:
    """What keeps a folder from holding a whole dataset, as the end of a sentence; empty: nothing.

    It is quick, and no parser of foreign data is run: a file damaged in its middle is found when it is read.
    """
    if not (folder / "data").is_dir():
        return "is not on this machine"
    try:
        metadata = read(folder)
    except UserError as error:
        return f"is broken ({error})"
    except Exception as error:
        return f"is broken (metadata.json: {line(error)})"
    if metadata.get("data_format", "hdf5") == "hdf5":
        return _hdf5_flaw(folder / "data" / MAIN)
    missing = next((e for e in range(metadata["total_episodes"]) if not (folder / "data" / str(e)).is_dir()), None)
    return "" if missing is None else f"is broken (episode {missing} is missing)"


def _hdf5_flaw(file: Path) -> str:
    """An HDF5 file begins with its own length, which shows where an interrupted transfer ended."""
    if not file.is_file():
        return f"is broken ({file.name} is missing)"
    with open(file, "rb") as opened:
        head = opened.read(64)
    if len(head) < 64 or not head.startswith(b"\x89HDF\r\n\x1a\n"):
        return f"is broken ({file.name} is no HDF5 file)"
    place = {0: 40, 1: 44, 2: 28, 3: 28}.get(head[8])  # of the end of the file, by version of the superblock
    if place and file.stat().st_size < int.from_bytes(head[place : place + 8], "little"):
        return f"is broken ({file.name} is truncated)"
    return ""


def spaces(metadata: dict[str, Any], dataset_id: str) -> Spaces:
    """Dimensions and action box; the environment is named if its id is a plain one (`named_environment`).

    Raises:
        UserError: they are not there, or not flat Boxes.
    """
    observation_low, _ = _box(metadata, "observation", dataset_id)
    low, high = _box(metadata, "action", dataset_id)
    if not np.isfinite([low, high]).all() or not (low < high).all():
        raise UserError(f"dataset {dataset_id} has an action space from {low} to {high}; finite bounds, "
                        "the lower below the upper, are needed")
    named = named_environment(metadata)
    return Spaces(named if ENVIRONMENT.fullmatch(named) else "", len(observation_low), low, high)


def named_environment(metadata: dict[str, Any]) -> str:
    """The id in the specification of the environment, of which nothing else is read; empty: there is none."""
    for name in ("env_spec", "eval_env_spec"):
        with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
            return str(json.loads(metadata[name])["id"])[:100]
    return ""


def _box(metadata: dict[str, Any], name: str, dataset_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of a flat Box, float32."""
    if f"{name}_space" not in metadata:
        raise UserError(f"dataset {dataset_id} does not say its {name} space, and the environment that it names is not "
                        "built to find out; make the dataset anew with a newer Minari")
    try:
        space = json.loads(metadata[f"{name}_space"])
        if space["type"] != "Box" or len(space["shape"]) != 1:
            found = f"{space['type']!r:.40}" + (f" of shape {space['shape']!r:.40}" if space["type"] == "Box" else "")
            raise UserError(f"dataset {dataset_id} has an {name} space {found}; flat Box spaces are needed")
        low, high = (np.float32(space[end]) for end in ("low", "high"))
        if not 0 < len(low) == len(high) == space["shape"][0]:
            raise ValueError(f"shape {space['shape']}, {len(low)} and {len(high)} bounds")
    except UserError:
        raise
    except Exception as error:  # whatever malformed JSON gives
        raise UserError(f"dataset {dataset_id} has a malformed {name} space ({line(error)})") from error
    return low, high


def line(error: Exception) -> str:
    """An exception on one line, without the control characters that a foreign file may have put there."""
    return "".join(filter(str.isprintable, f"{type(error).__name__}: {' '.join(str(error).split())}"))[:160]
