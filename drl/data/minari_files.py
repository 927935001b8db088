"""Minari datasets on disk: the only file that imports minari."""

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage import get_dataset_path

from drl.data.store import EpisodeStore, Spaces
from drl.errors import UserError, did_you_mean

OURS = re.compile(r"drl/(?P<name>[\w-]+/[\w-]+)-v0")  # what `drl data collect` makes


def read(dataset_id: str) -> EpisodeStore:
    """Load a dataset, downloading it through Minari where it is not local and not one that we collect ourselves.

    Raises:
        UserError: there is no such dataset, it cannot be read, or it is not one for Box observations and actions.
    """
    if dataset_id not in local_ids():
        _download(dataset_id)
    try:
        dataset = minari.load_dataset(dataset_id)
        spaces = _spaces(dataset, dataset_id)
        return EpisodeStore.from_episodes(dataset.iterate_episodes(), spaces, dataset_id)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes minari and h5py raise
        raise UserError(f"dataset {dataset_id} cannot be read ({_line(error)}); delete {path(dataset_id)} and make "
                        "it anew") from error


def write(
    dataset_id: str,
    episodes: Sequence[EpisodeBuffer],
    *,
    environment: str,
    algorithm: str,
    reference: tuple[float, float] | None,
    description: str,
    extra: dict[str, Any],
) -> Path:
    """Create a local dataset whole or not at all: it is made in a temporary folder beside its place and renamed.

    `reference` is (random, expert) return; `extra` goes into the metadata. Returns the dataset's folder.
    """
    target = path(dataset_id)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root()) as partial:
        with _datasets_path(partial), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`(code_permalink|author_email)`")  # nothing to give there
            dataset = minari.create_dataset_from_buffers(
                dataset_id,
                list(episodes),
                env=environment,
                eval_env=environment,
                algorithm_name=algorithm,
                author="drl",
                ref_min_score=reference and reference[0],
                ref_max_score=reference and reference[1],
                description=description,
                data_format="hdf5",
            )
            dataset.storage.update_metadata(extra)
        namespace = dataset_id.rpartition("/")[0]
        if namespace and namespace not in list_local_namespaces():
            create_namespace(namespace)
        earlier = Path(partial) / "earlier"
        if target.exists():
            os.replace(target, earlier)
        try:
            os.replace(Path(partial) / dataset_id, target)
        except BaseException:
            if earlier.exists():
                os.replace(earlier, target)
            raise
    return target


def local_ids() -> list[str]:
    """Ids of the datasets on this machine."""
    return sorted(minari.list_local_datasets())


def root() -> Path:
    """Where Minari keeps datasets: $MINARI_DATASETS_PATH, else ~/.minari/datasets."""
    return get_dataset_path()


def path(dataset_id: str) -> Path:
    """The folder of a dataset, there or not."""
    return root() / dataset_id


def buffer(
    number: int, seed: int, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: bool
) -> EpisodeBuffer:
    """One episode for `write`: observations (T+1, O), the rest T long; it ends by termination or by truncation."""
    terminations = np.zeros(len(actions), bool)
    terminations[-1] = terminated
    truncations = np.zeros(len(actions), bool)
    truncations[-1] = not terminated
    return EpisodeBuffer(
        id=number,
        seed=seed,
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
    )


def _spaces(dataset: minari.MinariDataset, dataset_id: str) -> Spaces:
    observation, action = dataset.observation_space, dataset.action_space
    for name, space in (("observation", observation), ("action", action)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise UserError(f"dataset {dataset_id} has {name} space {space}; flat Box spaces are needed")
    if not np.isfinite([action.low, action.high]).all():
        raise UserError(f"dataset {dataset_id} has an unbounded action space {action}; finite bounds are needed")
    spec = dataset.env_spec
    return Spaces(
        spec.id if spec is not None else "",
        observation.shape[0],
        np.asarray(action.low, np.float32),
        np.asarray(action.high, np.float32),
    )


def _download(dataset_id: str) -> None:
    known = local_ids()
    if ours := OURS.fullmatch(dataset_id):
        raise UserError(f"dataset {dataset_id} is not on this machine; type: drl data collect {ours['name']}")
    if not re.fullmatch(r"([\w-]{2,}/)*[\w-]+-v\d+", dataset_id):
        raise UserError(f"{dataset_id!r} is not a Minari id such as drl/hopper/medium-v0; "
                        f"{did_you_mean(dataset_id, known)}")
    try:
        minari.download_dataset(dataset_id)
    except ImportError as error:
        raise UserError(f"downloading {dataset_id} needs an extra; type: pip install 'drl[download]'") from error
    except Exception as error:  # network, hub or id: minari raises whatever its remote raised
        raise UserError(
            f"dataset {dataset_id} is not on this machine and could not be downloaded "
            f"({_line(error)}); {did_you_mean(dataset_id, known)}"
        ) from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:160]


@contextlib.contextmanager
def _datasets_path(folder: str) -> Iterator[None]:
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
