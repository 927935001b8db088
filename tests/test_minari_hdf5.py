"""An HDF5 file holds its own plain arrays, one group an episode, or it is not read."""

import h5py
import numpy as np
import pytest

from drl.data import minari_hdf5
from drl.errors import UserError

ID = "other/toy/spring-v0"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "main_data.hdf5"
    with h5py.File(path, "w") as content:
        for number in range(3):
            group = content.create_group(f"episode_{number}")
            for field in minari_hdf5.FIELDS:
                group.create_dataset(field, data=np.zeros(5), chunks=True, maxshape=(None,))  # as Minari does
    with h5py.File(tmp_path / "secret.hdf5", "w") as content:
        content["rewards"] = np.arange(5.0)
    return path


def refusal(file, episodes=3):
    with pytest.raises(UserError) as caught:
        minari_hdf5.check(file, episodes, ID)
    return str(caught.value)


def test_what_minari_writes_is_in_order(file):
    minari_hdf5.check(file, 3, ID)


@pytest.mark.parametrize("said", [0, 2, 4])
def test_the_number_of_episodes_is_the_one_that_the_metadata_say(said, file):
    assert refusal(file, said) == f"dataset {ID}: metadata.json says total_episodes {said}, 3 were found"


@pytest.mark.parametrize("compression", ["gzip", {"shuffle": True}, {"fletcher32": True}])
def test_the_filters_that_hdf5_itself_has_are_in_order(compression, file):
    options = compression if isinstance(compression, dict) else {"compression": compression}
    replace(file, lambda group: group.create_dataset("rewards", data=np.zeros(5), **options))
    minari_hdf5.check(file, 3, ID)


def replace(file, create):
    """Put another member in the place of the rewards of episode 1."""
    with h5py.File(file, "a") as content:
        del content["episode_1/rewards"]
        create(content["episode_1"])


def external_link(group):
    group["rewards"] = h5py.ExternalLink("secret.hdf5", "rewards")


def soft_link(group):
    group["rewards"] = h5py.SoftLink("/episode_0/rewards")


def virtual(group):
    layout = h5py.VirtualLayout((5,), np.float64)
    layout[:] = h5py.VirtualSource("secret.hdf5", "rewards", (5,))
    group.create_virtual_dataset("rewards", layout)


def external_storage(group):
    group.create_dataset("rewards", (5,), np.float64, external=[("secret.hdf5", 0, h5py.h5f.UNLIMITED)])


def foreign_filter(group):
    group.create_dataset("rewards", data=np.zeros(5), compression="lzf")


FOREIGN = {
    external_link: "is a link; the data must lie in the file itself",
    soft_link: "is a link; the data must lie in the file itself",
    virtual: "its data lie in other files",
    external_storage: "its data lie in other files",
    foreign_filter: "is stored with a filter that is not HDF5's own",
}


@pytest.mark.parametrize("create", FOREIGN, ids=lambda create: create.__name__)
def test_data_from_elsewhere_are_refused(create, file):
    replace(file, create)
    assert refusal(file) == f"dataset {ID}, episode 1, field rewards: {FOREIGN[create]}"


def test_an_episode_from_elsewhere_is_refused(file):
    with h5py.File(file, "a") as content:
        del content["episode_1"]
        content["episode_1"] = h5py.ExternalLink("secret.hdf5", "/")
    assert refusal(file) == f"dataset {ID}, episode 1: is a link; the data must lie in the file itself"


def test_a_group_in_the_place_of_an_array_is_not_taken_for_one(file):
    replace(file, lambda group: group.create_group("rewards"))
    with pytest.raises(Exception, match="(?i)dataset"):
        minari_hdf5.check(file, 3, ID)
