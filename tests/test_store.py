"""Recorded episodes become flat arrays that a hand can check, or one line that says where they are wrong."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest

from drl.data import columns, minari_files, minari_writer
from drl.data import store as stores
from drl.data.minari_writer import Recorded
from drl.data.store import EpisodeStore, Spaces, returns_to_go
from drl.errors import UserError

ID = "drl/toy/by-hand-v0"
SPACES = Spaces("", 2, np.float32([-2]), np.float32([2]))


@pytest.fixture
def three_episodes():
    """Lengths 3, 1 and 2, written as a Minari dataset and read back; the last observations count down from 99."""
    recorded = [
        ([[1, 10], [2, 20], [3, 30], [99, 990]], [[1], [0], [-1]], [1, 2, 4], True),
        ([[4, 40], [98, 980]], [[0.5]], [-3], False),
        ([[5, 50], [6, 60], [97, 970]], [[-0.5], [0.25]], [8, 16], False),
    ]
    episodes = [
        Recorded(0, np.float64(observations), np.float32(actions), np.float64(rewards), terminated)
        for observations, actions, rewards, terminated in recorded
    ]
    minari_writer.write(
        ID, episodes, environment="MountainCarContinuous-v0", algorithm="by hand", reference=(0, 1), description="",
        extra={},
    )
    return minari_files.read(ID)


def assert_exactly(actual, expected, dtype):
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, np.array(expected, dtype))


def test_each_observation_stands_beside_its_own_action(three_episodes):
    # without the T+1-th observations: had they been kept, episode k would be shifted by k steps
    assert_exactly(
        three_episodes.observations, [[1, 10], [2, 20], [3, 30], [4, 40], [5, 50], [6, 60]], np.float32
    )
    assert_exactly(three_episodes.actions, [[1], [0], [-1], [0.5], [-0.5], [0.25]], np.float32)


def test_returns_to_go_stop_at_the_end_of_an_episode(three_episodes):
    assert_exactly(three_episodes.returns_to_go, [7, 6, 4, -3, 24, 16], np.float32)


def test_an_episode_is_the_steps_between_two_starts(three_episodes):
    assert_exactly(three_episodes.episode_starts, [0, 3, 4, 6], np.int64)
    assert_exactly(three_episodes.terminated, [True, False, False], bool)
    assert_exactly(three_episodes.episode_lengths, [3, 1, 2], np.int64)
    assert_exactly(three_episodes.episode_returns, [7, -3, 24], np.float32)


def test_the_normaliser_knows_nothing_of_the_observations_that_are_dropped(three_episodes):
    # of 1 ... 6 the mean is 7/2 and the variance 35/12
    assert_exactly(three_episodes.normaliser.mean, [3.5, 35], np.float32)
    assert_exactly(three_episodes.normaliser.std, [math.sqrt(35 / 12), 10 * math.sqrt(35 / 12)], np.float32)


def test_a_store_knows_where_it_came_from(three_episodes):
    assert three_episodes.dataset == ID
    assert three_episodes.spaces.environment == "MountainCarContinuous-v0"
    assert (three_episodes.spaces.observation_dim, three_episodes.spaces.action_dim) == (2, 1)
    assert_exactly(three_episodes.spaces.action_low, [-1], np.float32)
    assert_exactly(three_episodes.spaces.action_high, [1], np.float32)


def test_a_channel_that_never_changes_can_still_be_divided_by():
    store = pack(episode(observations=np.float32([[7, 1], [7, 2], [7, 3], [7, 4]])))
    assert_exactly(store.normaliser.std, [1e-6, math.sqrt(2 / 3)], np.float32)


def test_the_normaliser_is_computed_in_float64():
    # in float32 the variance of a channel this far from 0 drowns: steps of 1/64 on 100,000
    observations = np.float32([[100_000, 0], [100_000 + 1 / 64, 0], [100_000 + 2 / 64, 0], [0, 0]])
    store = pack(episode(observations=observations))
    assert_exactly(store.normaliser.std[:1], [math.sqrt(2 / 3) / 64], np.float32)


def test_the_normaliser_does_not_depend_on_how_many_steps_are_summed_at_a_time(monkeypatch):
    observations = np.random.default_rng(0).normal([5, -300], [0.1, 40], (1001, 2))
    steps = np.arange(1000)
    long = episode(
        observations=observations, actions=np.zeros((1000, 1), np.float32), rewards=np.zeros(1000),
        terminations=steps == 999, truncations=steps < 0,
    )
    kept = observations[:-1].astype(np.float32).astype(np.float64)
    for chunk in (1, 7, 500, 1000, 2000):
        monkeypatch.setattr(stores, "CHUNK", chunk)
        normaliser = pack(long).normaliser
        # the sums are exact to 1e-13, the result is rounded to float32: half a unit in the last place, 6e-8
        np.testing.assert_allclose(normaliser.mean, kept.mean(0), rtol=6e-8)
        np.testing.assert_allclose(normaliser.std, kept.std(0), rtol=6e-8)


def test_returns_to_go_by_hand():
    assert_exactly(returns_to_go(np.array([1.0, 2.0, 4.0])), [7, 6, 4], np.float64)


def test_returns_to_go_are_summed_in_float64():
    # in float32, 1e8 + 1 is 1e8
    assert_exactly(returns_to_go(np.float32([1, 1, 1e8])), [100_000_002, 100_000_001, 100_000_000], np.float64)
    rewards = np.full(1000, 0.1, np.float32)
    long = episode(
        observations=np.zeros((1001, 2), np.float32), actions=np.zeros((1000, 1), np.float32), rewards=rewards,
        terminations=np.zeros(1000, bool), truncations=np.arange(1000) == 999,
    )
    assert pack(long).episode_returns[0] == np.float32(math.fsum(rewards))


def episode(**changed):
    """A sound episode of three steps, but for what is `changed`."""
    sound = {
        "observations": np.float32([[1, 10], [2, 20], [3, 30], [4, 40]]),
        "actions": np.float32([[0], [1], [2]]),
        "rewards": np.float64([1, 2, 4]),
        "terminations": np.array([False, False, True]),
        "truncations": np.array([False, False, False]),
    }
    return SimpleNamespace(**sound | changed)


def pack(*episodes, dataset=ID):
    return EpisodeStore.from_episodes(episodes, SPACES, dataset)


def spoiled(field, step, value):
    array = getattr(episode(), field).copy()
    array[step] = value
    return {field: array}


def ends(*steps, of="terminations"):
    return {"terminations": np.zeros(3, bool)} | {of: np.isin(np.arange(3), steps)}


MALFORMED = {
    "nan observation": (spoiled("observations", (2, 1), np.nan), ", step 2, field observations: not finite"),
    "infinite last observation": (spoiled("observations", 3, np.inf), ", step 3, field observations: not finite"),
    "nan action": (spoiled("actions", 1, np.nan), ", step 1, field actions: not finite"),
    "infinite action": (spoiled("actions", 0, -np.inf), ", step 0, field actions: not finite"),
    "nan reward": (spoiled("rewards", 2, np.nan), ", step 2, field rewards: not finite"),
    "infinite reward": (spoiled("rewards", 0, np.inf), ", step 0, field rewards: not finite"),
    "observation dimension": (
        {"observations": np.zeros((4, 3), np.float32)},
        ", field observations: shape must be (4, 2), got (4, 3)",
    ),
    "observations without the last": (
        {"observations": np.zeros((3, 2), np.float32)},
        ", field observations: shape must be (4, 2), got (3, 2)",
    ),
    "observation beyond float32": (
        {"observations": np.where(np.arange(8).reshape(4, 2) == 5, 1e39, 0)},
        ", step 2, field observations: beyond float32",
    ),
    "reward beyond float32": ({"rewards": np.float64([0, -1e39, 0])}, ", step 1, field rewards: beyond float32"),
    "return beyond float32": ({"rewards": np.full(3, 3e38)}, ", field rewards: their sum is beyond float32"),
    "ragged": (
        {"observations": np.array([np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(3)], object)},
        ", field observations: shape must be (4, 2), got (4,)",
    ),
    "scalar action": ({"actions": np.float32(0)}, ", field observations: shape must be (2, 2), got (4, 2)"),
    "action dimension": (
        {"actions": np.zeros((3, 2), np.float32)},
        ", field actions: shape must be (3, 1), got (3, 2)",
    ),
    "flat actions": ({"actions": np.zeros(3, np.float32)}, ", field actions: shape must be (3, 1), got (3,)"),
    "rewards too long": ({"rewards": np.zeros(4)}, ", field rewards: shape must be (3,), got (4,)"),
    "terminations too short": ({"terminations": np.zeros(2, bool)},
                               ", field terminations: shape must be (3,), got (2,)"),
    "truncations too long": ({"truncations": np.zeros(4, bool)}, ", field truncations: shape must be (3,), got (4,)"),
    "float16": (
        {"observations": np.zeros((4, 2), np.float16)},
        ", field observations: dtype must be float32 or float64, got float16",
    ),
    "objects": (
        {"actions": np.zeros((3, 1), object)},
        ", field actions: dtype must be float32 or float64, got object",
    ),
    "integers": ({"rewards": np.zeros(3, int)}, ", field rewards: dtype must be float32 or float64, got int64"),
    "flags as integers": (
        {"terminations": np.array([0, 0, 1])},
        ", field terminations: dtype must be bool, got int64",
    ),
    "no end": (ends(), ", field terminations/truncations: one end, at step 2, expected; no end"),
    "two ends": (ends(0, 2), ", field terminations/truncations: one end, at step 2, expected; ends at step 0"),
    "end in the middle": (ends(1), ", field terminations/truncations: one end, at step 2, expected; ends at step 1"),
    "truncated in the middle": (
        ends(1, of="truncations"),
        ", field terminations/truncations: one end, at step 2, expected; ends at step 1",
    ),
    "action above the box": (
        spoiled("actions", 1, 2.5), ", step 1, field actions: 2.5 in channel 0 is outside [-2.0, 2.0]"
    ),
    "action below the box": (
        spoiled("actions", 2, -3), ", step 2, field actions: -3.0 in channel 0 is outside [-2.0, 2.0]"
    ),
    "no steps": (
        {name: getattr(episode(), name)[:0] for name in ("actions", "rewards", "terminations", "truncations")}
        | {"observations": episode().observations[:1]},
        ": no steps",
    ),
}


@pytest.fixture(params=["in memory", "in files"])
def packing(request, tmp_path):
    if request.param == "in memory":
        return pack
    return lambda *episodes: columns.write(episodes, SPACES, ID, tmp_path)


@pytest.mark.parametrize(("changed", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_episode_is_named_with_its_step_and_field(changed, message, packing):
    with pytest.raises(UserError) as caught:
        packing(episode(), episode(**changed), episode())
    assert str(caught.value) == f"dataset {ID}, episode 1{message}"


def test_a_dataset_without_episodes_is_refused(packing):
    with pytest.raises(UserError) as caught:
        packing()
    assert str(caught.value) == f"dataset {ID} holds no episodes"


def test_an_action_may_leave_the_box_by_its_rounding():
    # the tolerance is 1e-4 of the box's width, which is 4
    store = pack(episode(**spoiled("actions", 0, 2.0003)))
    assert_exactly(store.actions[0], [2.0003], np.float32)
    with pytest.raises(UserError, match="is outside"):
        pack(episode(**spoiled("actions", 0, 2.0005)))


def test_an_episode_may_terminate_and_be_truncated_in_one_step():
    assert len(pack(episode(truncations=np.array([False, False, True]))).actions) == 3


@pytest.mark.parametrize(
    "changed",
    [
        spoiled("observations", (0, 1), 11),
        spoiled("actions", 2, -2),
        spoiled("rewards", 2, 5),
    ],
    ids=["observations", "actions", "rewards"],
)
def test_the_fingerprint_changes_with_any_array(changed):
    assert pack(episode(), episode(**changed)).fingerprint != pack(episode(), episode()).fingerprint


def test_the_fingerprint_is_the_sha256_of_the_arrays_bytes():
    store = pack(episode(), episode())
    arrays = store.observations, store.actions, store.returns_to_go, store.episode_starts
    assert store.fingerprint == hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_the_fingerprint_changes_with_the_place_where_an_episode_ends():
    def zeros(steps):
        flags = np.arange(steps) == steps - 1
        return SimpleNamespace(
            observations=np.zeros((steps + 1, 2)), actions=np.zeros((steps, 1)), rewards=np.zeros(steps),
            terminations=flags, truncations=flags,
        )

    assert pack(zeros(1), zeros(2)).fingerprint != pack(zeros(2), zeros(1)).fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {},
        spoiled("observations", 3, -5),
        ends(2, of="truncations"),
        {"observations": np.float64(episode().observations), "rewards": np.float32(episode().rewards)},
    ],
    ids=["nothing", "the observation that is dropped", "how it ended", "dtypes on disk"],
)
def test_the_fingerprint_does_not_change_otherwise(changed):
    expected = pack(episode(), episode()).fingerprint
    assert pack(episode(), episode(**changed), dataset="another/name-v1").fingerprint == expected
    assert len(expected) == 64 and int(expected, 16)
