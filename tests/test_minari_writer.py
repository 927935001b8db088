"""What is written is an ordinary Minari dataset, whole or not at all, whatever interrupts it."""

import errno
import gc
import hashlib
import os
import re
import shutil
from pathlib import Path

import minari
import numpy as np
import pytest

from drl import disk
from drl.data import minari_writer
from drl.data.minari_files import root
from drl.data.store import Spaces
from drl.errors import UserError
from toys import ENVIRONMENT, ID, recorded

EXTRA = {"collection_seed": 11, "behaviour": [{"snapshot": "spring", "steps": 5}], "versions": {"drl": "0"}}


def write(episodes, dataset_id=ID, reference=(-20.5, 3234.25), **more):
    settings = {"environment": ENVIRONMENT, "algorithm": "by hand", "reference": reference}
    return minari_writer.write(dataset_id, episodes, description="two springs", extra=EXTRA, **settings | more)


def files(folder: Path):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lengths(dataset_id=ID):
    return [len(episode.actions) for episode in minari.load_dataset(dataset_id).iterate_episodes()]


def test_minari_itself_loads_the_same_arrays_and_seeds():
    episodes = recorded(lengths=[2, 5, 3, 1, 7, 1, 1, 2, 1, 1, 3])  # eleven: "10" sorts before "2" as text
    write(episodes)

    dataset = minari.load_dataset(ID)

    assert dataset.total_episodes == 11 and dataset.total_steps == 27
    seeds = [metadata["seed"] for metadata in dataset.storage.get_episode_metadata(range(11))]
    for found, seed, wanted in zip(dataset.iterate_episodes(), seeds, episodes, strict=True):
        for actual, expected in zip(
            (found.observations, found.actions, found.rewards), wanted[1:4], strict=True
        ):
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)
        last = np.arange(len(wanted.actions)) == len(wanted.actions) - 1
        np.testing.assert_array_equal(found.terminations, last & wanted.terminated)
        np.testing.assert_array_equal(found.truncations, last & (not wanted.terminated))
        assert seed == wanted.seed


def test_minari_itself_could_have_written_it(monkeypatch, tmp_path):
    episodes = recorded([2, 5, 3])
    ours = files(write(episodes) / "data").keys()
    content = load_all(ID)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "theirs"))
    buffers = [
        minari_writer.EpisodeBuffer(id=number, seed=episode.seed, **minari_writer._fields(episode))
        for number, episode in enumerate(episodes)
    ]
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(ID, buffers, env=ENVIRONMENT, eval_env=ENVIRONMENT)

    assert files(tmp_path / "theirs" / ID / "data").keys() == ours
    for actual, expected in zip(content, load_all(ID), strict=True):
        assert actual.keys() == expected.keys()
        for name in actual.keys() - {"id", "infos"}:
            assert actual[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(actual[name], expected[name])
    ours, theirs = (set(folder.storage.metadata) for folder in (SEEN[0], minari.load_dataset(ID)))
    assert theirs - ours <= {"code_permalink", "author_email"}


SEEN = []


def load_all(dataset_id):
    SEEN.append(minari.load_dataset(dataset_id))
    return list(SEEN[-1].storage.get_episodes(range(SEEN[-1].total_episodes)))


def test_minari_itself_shows_the_metadata():
    folder = write(recorded([2, 3]))

    dataset = minari.load_dataset(ID)
    metadata = dataset.storage.metadata

    assert folder == root() / "drl/toy/spring-v0"
    assert dataset.env_spec.id == ENVIRONMENT
    assert dataset.recover_environment(eval_env=True).spec.id == ENVIRONMENT
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.5, 3234.25)
    np.testing.assert_array_equal(minari.get_normalized_score(dataset, np.array([-20.5, 3234.25])), [0, 1])
    assert (metadata["algorithm_name"], metadata["description"]) == ("by hand", "two springs")
    assert {name: metadata[name] for name in EXTRA} == EXTRA
    returns = [episode.rewards.sum() for episode in recorded([2, 3])]
    assert metadata["returns"] == pytest.approx(
        {"mean": np.mean(returns), "std": np.std(returns), "min": min(returns), "max": max(returns)}, abs=1e-3
    )
    assert metadata["lengths"] == {"mean": 2.5, "std": 0.5, "min": 2, "max": 3}
    assert metadata["sha256"] == hashlib.sha256((folder / "data" / "main_data.hdf5").read_bytes()).hexdigest()


def test_reference_scores_are_left_out_where_there_are_none():
    write(recorded([2]), reference=None)
    assert not {"ref_min_score", "ref_max_score"} & minari.load_dataset(ID).storage.metadata.keys()


def test_data_recorded_elsewhere_name_the_environment_for_evaluation_alone():
    spaces = Spaces(ENVIRONMENT, 2, np.float32([-2]), np.float32([2]))
    write([episode._replace(seed=None) for episode in recorded([2, 3])], spaces=spaces)

    dataset = minari.load_dataset(ID)

    assert dataset.env_spec is None and dataset.recover_environment(eval_env=True).spec.id == ENVIRONMENT
    assert dataset.observation_space.shape == (2,)
    np.testing.assert_array_equal([dataset.action_space.low, dataset.action_space.high], [[-2], [2]])
    assert "seed" not in next(iter(dataset.storage.get_episode_metadata([0])))


def test_the_same_episodes_give_the_same_bytes_of_data():
    first = (write(recorded([2, 5])) / "data" / "main_data.hdf5").read_bytes()
    assert (write(iter(recorded([2, 5]))) / "data" / "main_data.hdf5").read_bytes() == first


def test_a_second_dataset_replaces_the_first():
    write(recorded([2, 5]))
    write(recorded([3], seed=1))
    assert lengths() == [3]
    assert [path.name for path in root().iterdir()] == ["drl"]


@pytest.fixture(params=["among the episodes", "at the last moment"])
def interrupted_write(request, monkeypatch):
    """write, interrupted."""
    def episodes(wanted, interruption):
        yield from wanted
        if request.param == "among the episodes":
            raise interruption

    def interrupt(wanted, interruption):
        def fail(*_):
            raise interruption

        with monkeypatch.context() as patched, pytest.raises(interruption):
            if request.param == "at the last moment":
                patched.setattr(disk, "replace", fail)
            write(episodes(wanted, interruption))

    return interrupt


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing_behind(interruption, interrupted_write):
    interrupted_write(recorded([3, 3]), interruption)
    assert not [path for path in root().rglob("*") if not path.is_dir() and path.name != "namespace_metadata.json"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_the_earlier_dataset_as_it_was(interruption, interrupted_write):
    write(recorded([2, 5]))
    before = files(root())
    interrupted_write(recorded([3, 3], seed=1), interruption)
    assert files(root()) == before
    assert lengths() == [2, 5]


def test_a_disk_without_room_is_told_before_anything_is_written(monkeypatch):
    write(recorded([2, 5]))
    before = files(root())
    usage = shutil.disk_usage(root())._replace(free=16_777_216 + 1000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"dataset drl/toy/spring-v0 needs \d+ MB in .*, 17 MB are free; make room"):
        write(recorded([3], seed=1))
    assert files(root()) == before


@pytest.mark.parametrize(("count", "length"), [(1, 1), (40, 1000), (3000, 1), (3000, 20)])
def test_the_size_of_a_file_is_known_before_it_is_written(count, length):
    written = (write(recorded([length]) * count) / "data" / "main_data.hdf5").stat().st_size
    size = minari_writer.size(steps=count * length, episodes=count, observation_dim=2, action_dim=1)
    assert abs(size - written) <= minari_writer.BLOCK


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_all_the_same_is_one_line_and_loses_nothing(number, monkeypatch):
    write(recorded([2, 5]))
    before = files(root())

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError) as caught:
        write(recorded([3], seed=1))
    assert f"cannot be written: {os.strerror(number)}" in str(caught.value) and "\n" not in str(caught.value)
    assert re.search(r"it needs 1\.\d MB, \d+\.\d MB are free", str(caught.value))  # HDF5's tables alone take 1 MB
    gc.collect()
    assert files(root()) == before


def test_the_datasets_root_is_given_back(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    write(recorded([2]))
    assert root() == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere" / ID).is_dir()
