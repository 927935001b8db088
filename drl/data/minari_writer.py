"""Writing a Minari dataset: whole or not at all, and at the speed of the disk.

The metadata are Minari's own, made by its own function from the first episode. The episodes are laid out here as
Minari lays them out, one HDF5 group each, because Minari spends a millisecond and 16 KB of tables on an episode, and
random data hold fifty thousand of them. The file is made in memory and written as plain bytes: HDF5 that meets a full
disk takes the process with it (SIGSEGV), a plain write says what is wrong.
"""

import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
from gymnasium.spaces import Box
from h5py import h5a, h5d, h5g, h5p, h5s, h5t
from minari.data_collector import EpisodeBuffer
from minari.namespace import NAMESPACE_METADATA_FILENAME

from drl import disk
from drl.data.minari_files import path, root
from drl.data.minari_metadata import MAIN
from drl.data.minari_remote import datasets_path
from drl.data.store import Recorded, Spaces

FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")
TABLES, BLOCK = 2_700, 1 << 20  # bytes of HDF5's own: for an episode, and how many it takes at a time


def write(
    dataset_id: str,
    episodes: Iterable[Recorded],
    *,
    environment: str,
    algorithm: str,
    reference: tuple[float, float] | None,
    description: str,
    extra: dict[str, Any],
    spaces: Spaces | None = None,
    making: AbstractContextManager = nullcontext(),
) -> Path:
    """Create a local dataset, or replace one, whole or not at all. Returns its folder.

    Args:
        dataset_id: Minari id.
        episodes: at least one; taken one by one, so that they can still be in the making.
        environment: Gymnasium id, of the environment that recorded the data unless `spaces` is given.
        algorithm: who acted.
        reference: (random, expert) return, or None.
        description: for people.
        extra: further metadata.
        spaces: given where the data were not recorded in `environment`, which is then named for evaluation alone.
        making: entered while Minari makes the environment, which it does to find out its spaces.

    Raises:
        UserError: the disk has no room for it; names the bytes needed and free.
    """
    target = path(dataset_id)
    episodes = iter(episodes)
    first = next(episodes)
    image, summary = _image(first, episodes)
    disk.require_space(root(), len(image), f"dataset {dataset_id}")
    with disk.refusal_told(root(), f"dataset {dataset_id}", needed=len(image)), disk.scratch(root()) as partial:
        with making:
            storage = _frame(partial, dataset_id, first, environment, algorithm, reference, description, spaces)
        main = partial / dataset_id / "data" / MAIN
        main.write_bytes(image)
        storage.update_metadata(
            extra | summary | {"dataset_size": storage.get_size(), "sha256": hashlib.sha256(image).hexdigest()}
        )
        for file in (main, main.with_name("metadata.json")):
            disk.sync(file)
        for namespace in reversed(Path(dataset_id).parents[:-1]):
            place = root() / namespace / NAMESPACE_METADATA_FILENAME
            if not place.exists():
                place.parent.mkdir(exist_ok=True)
                os.replace(partial / namespace / place.name, place)  # Minari's own, already on the disk
        disk.replace(partial / dataset_id, target)
    return target


def size(steps: int, episodes: int, observation_dim: int, action_dim: int) -> int:
    """About the bytes of a dataset of so many steps and episodes, observations and rewards being float64."""
    step = 8 * observation_dim + 4 * action_dim + 8 + 2
    return steps * step + episodes * (8 * observation_dim + TABLES) + BLOCK


def _frame(
    partial: Path,
    dataset_id: str,
    first: Recorded,
    environment: str,
    algorithm: str,
    reference: tuple[float, float] | None,
    description: str,
    spaces: Spaces | None,
):
    """Minari's own dataset of the first episode: its metadata are right for all of them but for the counts."""
    with datasets_path(partial), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`(code_permalink|author_email)`")  # nothing to give there
        warnings.filterwarnings("ignore", message="env_spec is None")  # so it is meant to be
        return minari.create_dataset_from_buffers(
            dataset_id,
            [EpisodeBuffer(id=0, seed=first.seed, **_fields(first))],
            env=environment if spaces is None else None,
            eval_env=environment,
            observation_space=spaces and Box(-np.inf, np.inf, (spaces.observation_dim,), first.observations.dtype),
            action_space=spaces and Box(spaces.action_low, spaces.action_high, dtype=np.float32),
            algorithm_name=algorithm,
            author="drl",
            ref_min_score=reference and reference[0],
            ref_max_score=reference and reference[1],
            description=description,
            data_format="hdf5",
        ).storage


def _fields(episode: Recorded) -> dict[str, np.ndarray]:
    last = np.zeros(len(episode.actions), bool)
    last[-1] = True
    flags = (last & episode.terminated, last & (not episode.terminated))
    return dict(zip(FIELDS, (episode.observations, episode.actions, episode.rewards, *flags), strict=True))


def _image(first: Recorded, rest: Iterator[Recorded]) -> tuple[bytes, dict[str, Any]]:
    """The HDF5 file as bytes, and what the metadata say of it: Minari's counts, and returns and lengths in short.

    The same episodes give the same bytes: nothing in the file is dated.
    """
    plain = h5p.create(h5p.DATASET_CREATE)
    plain.set_obj_track_times(False)
    scalar = h5s.create(h5s.SCALAR)
    returns, lengths = [], []
    # h5py's lower level: its upper one takes three times as long for an episode of twenty steps
    memory = {"driver": "core", "backing_store": False, "block_size": 16 << 20, "meta_block_size": BLOCK}
    with h5py.File(MAIN, "w", **memory) as file:
        for number, episode in enumerate(itertools.chain([first], rest)):
            group = h5g.create(file.id, f"episode_{number}".encode())
            for name, value in {"id": number, "seed": episode.seed, "total_steps": len(episode.actions)}.items():
                if value is not None:
                    h5a.create(group, name.encode(), h5t.NATIVE_INT64, scalar).write(np.array(value, np.int64))
            for name, array in _fields(episode).items():
                kind = _kind(array.dtype)
                dataset = h5d.create(group, name.encode(), kind, _extent(array.shape), plain)
                dataset.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(array), kind)
            returns.append(np.sum(episode.rewards, dtype=np.float64))
            lengths.append(len(episode.actions))
        file.flush()
        image = file.id.get_file_image()
    return image, {
        "total_episodes": len(lengths),
        "total_steps": sum(lengths),
        "returns": _short(returns),
        "lengths": _short(lengths),
    }


@functools.cache
def _extent(shape: tuple[int, ...]) -> h5s.SpaceID:
    return h5s.create_simple(shape)


@functools.cache
def _kind(dtype: np.dtype) -> h5t.TypeID:
    return h5t.py_create(dtype, logical=True)


def _short(values: list[float]) -> dict[str, float]:
    return {name: round(float(getattr(np, name)(values)), 3) for name in ("mean", "std", "min", "max")}
