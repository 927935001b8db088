"""What is written is an ordinary Minari dataset, whole or not at all; what cannot be read says what to type."""

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from minari.dataset._storages.hdf5_storage import HDF5Storage
from minari.dataset.minari_storage import MinariStorage

from drl.data import minari_files
from drl.errors import UserError

ID = "drl/toy/spring-v0"
ENVIRONMENT = "MountainCarContinuous-v0"  # O = 2, A = 1, box [-1, 1]
EXTRA = {"collection_seed": 11, "behaviour": [{"snapshot": "spring", "steps": 5}], "versions": {"drl": "0"}}


def recorded(lengths, seed=0):
    """(seed, observations, actions, rewards, terminated) of episodes of these lengths."""
    rng = np.random.default_rng(seed)
    return [
        (
            1000 + number,
            rng.normal(size=(length + 1, 2)),
            rng.uniform(-1, 1, (length, 1)).astype(np.float32),
            rng.normal(size=length),
            number % 2 == 0,
        )
        for number, length in enumerate(lengths)
    ]


def write(episodes, dataset_id=ID, reference=(-20.5, 3234.25)):
    return minari_files.write(
        dataset_id,
        [minari_files.buffer(number, *episode) for number, episode in enumerate(episodes)],
        environment=ENVIRONMENT,
        algorithm="by hand",
        reference=reference,
        description="two springs",
        extra=EXTRA,
    )


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_minari_itself_loads_the_same_arrays_and_seeds():
    episodes = recorded(lengths=[2, 5, 3, 1, 7, 1, 1, 2, 1, 1, 3])  # eleven: "10" sorts before "2" as text
    write(episodes)

    dataset = minari.load_dataset(ID)

    assert dataset.total_episodes == 11 and dataset.total_steps == 27
    seeds = [metadata["seed"] for metadata in dataset.storage.get_episode_metadata(range(11))]
    for found, seed, (wanted, observations, actions, rewards, terminated) in zip(
        dataset.iterate_episodes(), seeds, episodes, strict=True
    ):
        for actual, expected in zip(
            (found.observations, found.actions, found.rewards), (observations, actions, rewards), strict=True
        ):
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)
        last = np.arange(len(actions)) == len(actions) - 1
        np.testing.assert_array_equal(found.terminations, last & terminated)
        np.testing.assert_array_equal(found.truncations, last & (not terminated))
        assert seed == wanted


def test_minari_itself_shows_the_metadata():
    folder = write(recorded([2, 3]))

    dataset = minari.load_dataset(ID)
    metadata = dataset.storage.metadata

    assert folder == minari_files.path(ID) == minari_files.root() / "drl/toy/spring-v0"
    assert dataset.env_spec.id == ENVIRONMENT
    assert dataset.recover_environment(eval_env=True).spec.id == ENVIRONMENT
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.5, 3234.25)
    np.testing.assert_array_equal(minari.get_normalized_score(dataset, np.array([-20.5, 3234.25])), [0, 1])
    assert (metadata["algorithm_name"], metadata["description"]) == ("by hand", "two springs")
    assert {name: metadata[name] for name in EXTRA} == EXTRA


def test_reference_scores_are_left_out_where_there_are_none():
    write(recorded([2]), reference=None)
    assert not {"ref_min_score", "ref_max_score"} & minari.load_dataset(ID).storage.metadata.keys()


def test_reading_gives_the_store_of_what_was_written():
    episodes = recorded([2, 5, 3])
    write(episodes)

    store = minari_files.read(ID)

    assert (store.dataset, store.spaces.environment) == (ID, ENVIRONMENT)
    np.testing.assert_array_equal(store.episode_starts, [0, 2, 7, 10])
    np.testing.assert_array_equal(store.actions, np.concatenate([actions for _, _, actions, _, _ in episodes]))


def test_a_second_dataset_replaces_the_first():
    write(recorded([2, 5]))
    write(recorded([3], seed=1))
    np.testing.assert_array_equal(minari_files.read(ID).actions, recorded([3], seed=1)[0][2])


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")], ids=["Ctrl-C", "full disk"])
def test_an_interrupted_write_leaves_nothing_behind(interruption, monkeypatch):
    interrupt_after_the_first_episode(monkeypatch, interruption)
    with pytest.raises((KeyboardInterrupt, OSError)):
        write(recorded([2, 3]))
    assert minari_files.local_ids() == []
    assert list(minari_files.root().iterdir()) == []


def test_an_interrupted_write_leaves_the_earlier_dataset_as_it_was(monkeypatch):
    folder = write(recorded([2, 5]))
    before = files(minari_files.root())

    interrupt_after_the_first_episode(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        write(recorded([3, 3], seed=1))

    assert files(minari_files.root()) == before and folder.is_dir()
    np.testing.assert_array_equal(minari_files.read(ID).episode_lengths, [2, 5])


def test_a_write_that_fails_in_its_last_moment_leaves_the_earlier_dataset_as_it_was(monkeypatch):
    write(recorded([2, 5]))

    def fail(*_):
        raise OSError("no such luck")

    with monkeypatch.context() as patched:
        patched.setattr(minari_files.os, "replace", fail)
        with pytest.raises(OSError, match="no such luck"):
            write(recorded([3, 3], seed=1))

    assert minari_files.local_ids() == [ID]
    np.testing.assert_array_equal(minari_files.read(ID).episode_lengths, [2, 5])


def interrupt_after_the_first_episode(monkeypatch, interruption):
    update = HDF5Storage.update_episodes

    def interrupted(self, episodes):
        update(self, list(episodes)[:1])
        raise interruption

    monkeypatch.setattr(HDF5Storage, "update_episodes", interrupted)


def test_the_datasets_root_is_given_back(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    write(recorded([2]))
    assert minari_files.root() == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere" / ID).is_dir()


def test_local_ids_are_sorted_and_hold_nothing_else(tmp_path):
    assert minari_files.local_ids() == []
    write(recorded([2]), "drl/toy/summer-v0")
    write(recorded([2]), "alone-v3")
    write(recorded([2]), ID)
    assert minari_files.local_ids() == ["alone-v3", "drl/toy/spring-v0", "drl/toy/summer-v0"]


def refusal(dataset_id):
    with pytest.raises(UserError) as caught:
        minari_files.read(dataset_id)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_dataset_of_ours_that_is_not_here_names_the_command_that_makes_it(monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", None)  # nothing is asked of the network
    assert refusal("drl/hopper/medium-replay-v0") == (
        "dataset drl/hopper/medium-replay-v0 is not on this machine; type: drl data collect hopper/medium-replay"
    )


@pytest.mark.parametrize("malformed", ["hopper medium", "drl/toy/spring", "drl//spring-v0", "../spring-v0", ""])
def test_a_malformed_id_shows_a_well_formed_one(malformed, monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", None)
    assert refusal(malformed) == f"{malformed!r} is not a Minari id such as drl/hopper/medium-v0; known: none"


def test_a_near_miss_names_the_dataset_that_is_here(monkeypatch):
    write(recorded([2]))
    monkeypatch.setattr(minari, "download_dataset", None)
    assert refusal("drl/toy/sprin v0").endswith("; did you mean 'drl/toy/spring-v0'?")


def failing_download(monkeypatch, error):
    def download(_):
        raise error

    monkeypatch.setattr(minari, "download_dataset", download)


def test_a_download_without_its_extra_names_the_extra(monkeypatch):
    failing_download(monkeypatch, ImportError("no module named huggingface_hub"))
    message = "downloading mujoco/hopper/medium-v0 needs an extra; type: pip install 'drl[download]'"
    assert refusal("mujoco/hopper/medium-v0") == message


def test_a_failed_download_is_one_line(monkeypatch):
    write(recorded([2]))
    failing_download(monkeypatch, ConnectionError("no route to host\n  while resolving\n" + "x" * 5000))
    assert refusal("drl/toy/spring-v1") == (
        "dataset drl/toy/spring-v1 is not on this machine and could not be downloaded "
        "(ConnectionError: no route to host); did you mean 'drl/toy/spring-v0'?"
    )


def test_a_download_is_read_like_any_other_dataset(monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", lambda dataset_id: write(recorded([2, 3]), dataset_id))
    np.testing.assert_array_equal(minari_files.read("mujoco/toy/medium-v0").episode_lengths, [2, 3])


@pytest.mark.parametrize("left", [0, 0.5, 0.95], ids=lambda left: f"{left:.0%} left")
def test_a_truncated_file_is_one_line_that_names_the_dataset(left):
    folder = write(recorded([200, 300]))
    main = folder / "data" / "main_data.hdf5"
    content = main.read_bytes()
    main.write_bytes(content[: int(left * len(content))])

    message = refusal(ID)

    assert message.startswith(f"dataset {ID} cannot be read (")
    assert message.endswith(f"); delete {folder} and make it anew")


def test_a_file_with_an_episode_missing_is_one_line_that_names_the_dataset():
    folder = write(recorded([2, 3]))
    MinariStorage.read(folder / "data").update_metadata({"total_episodes": 3})
    assert refusal(ID).startswith(f"dataset {ID} cannot be read (KeyError")


def test_a_malformed_episode_on_disk_keeps_its_own_message():
    episodes = recorded([2, 3])
    episodes[1][1][3, 0] = np.nan
    write(episodes)
    assert refusal(ID) == f"dataset {ID}, episode 1, step 3, field observations: not finite"


BOX = gym.spaces.Box(-1, 1, (2,), np.float32)
minari_asks = pytest.mark.filterwarnings(  # for what a dataset of no environment cannot give
    "ignore:`(code_permalink|eval_env)` is set:UserWarning", "ignore:env_spec is None:UserWarning"
)


def create_for_no_environment(observation_space, action_space):
    flags = np.array([False, True])
    observations, actions = (
        np.array([space.sample() for _ in range(count)]) for space, count in ((observation_space, 3), (action_space, 2))
    )
    buffer = EpisodeBuffer(
        id=0, observations=observations, actions=actions, rewards=np.zeros(2), terminations=flags, truncations=flags
    )
    minari.create_dataset_from_buffers(
        ID, [buffer], observation_space=observation_space, action_space=action_space, algorithm_name="by hand",
        author="nobody", author_email="nobody", description="for no environment", data_format="hdf5",
    )


@minari_asks
def test_a_dataset_that_names_no_environment_can_be_read():
    create_for_no_environment(BOX, BOX)
    assert minari_files.read(ID).spaces.environment == ""


@minari_asks
@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (gym.spaces.Discrete(3), BOX, "has observation space Discrete(3); flat Box spaces are needed"),
        (BOX, gym.spaces.Discrete(3), "has action space Discrete(3); flat Box spaces are needed"),
        (gym.spaces.Box(0, 1, (2, 3)), BOX,
         "has observation space Box(0.0, 1.0, (2, 3), float32); flat Box spaces are needed"),
        (BOX, gym.spaces.Box(-np.inf, np.inf, (2,)),
         "has an unbounded action space Box(-inf, inf, (2,), float32); finite bounds are needed"),
        (BOX, gym.spaces.Box(0, np.inf, (2,)),
         "has an unbounded action space Box(0.0, inf, (2,), float32); finite bounds are needed"),
    ],
    ids=["discrete observations", "discrete actions", "matrices", "unbounded", "half bounded"],
)
def test_spaces_that_a_decision_transformer_cannot_use_are_refused(observation_space, action_space, message):
    create_for_no_environment(observation_space, action_space)
    assert refusal(ID) == f"dataset {ID} {message}"
