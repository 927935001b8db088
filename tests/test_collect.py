"""Collected data: the same seed gives the same bits on any number of cores, and Gymnasium would have said the same."""

import os
from importlib import resources
from typing import NamedTuple

import gymnasium as gym
import minari
import numpy as np
import pytest

from drl import scores
from drl.behaviour import actor
from drl.behaviour.actor import Actor
from drl.behaviour.play import Shard, play
from drl.collect import TIERS, collect, names, plan
from drl.data import minari_files
from drl.data.store import EpisodeStore
from drl.errors import UserError
from drl.versions import versions

STEPS = 3000
CARD = actor.card("hopper")
MEDIUM, EXPERT = (CARD["tiers"][tier][0]["snapshot"] for tier in ("medium", "expert"))


class Collected(NamedTuple):
    """A dataset in memory: the store, what minari has on disk, and who was to act."""

    store: EpisodeStore
    episodes: list
    seeds: list[int]
    metadata: dict


def load(dataset_id: str) -> Collected:
    dataset = minari.load_dataset(dataset_id)
    seeds = [metadata["seed"] for metadata in dataset.storage.get_episode_metadata(dataset.episode_indices)]
    return Collected(
        minari_files.read(dataset_id), list(dataset.iterate_episodes()), seeds, dataset.storage.metadata
    )


def on_cores(count, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """The tiers that differ most, of seed 0, each collected on one core."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("collected")))
        on_cores(1, monkeypatch)
        for tier in ("random", "medium-replay", "medium-expert"):
            collect(f"hopper/{tier}", steps=STEPS)
        yield {tier: load(f"drl/hopper/{tier}-v0") for tier in ("random", "medium-replay", "medium-expert")}


def assert_same(actual: Collected, expected: Collected):
    assert actual.seeds == expected.seeds
    for one, other in zip(actual.episodes, expected.episodes, strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_two_cores_collect_the_same_bits_as_one(collected, monkeypatch):
    on_cores(2, monkeypatch)
    collect("hopper/medium-replay", steps=STEPS)
    assert_same(load("drl/hopper/medium-replay-v0"), collected["medium-replay"])


def test_the_same_seed_collects_the_same_bits_and_another_seed_others(collected, monkeypatch):
    on_cores(1, monkeypatch)
    collect("hopper/random", steps=STEPS, seed=0)
    assert_same(load("drl/hopper/random-v0"), collected["random"])

    collect("hopper/random", steps=STEPS, seed=1, overwrite=True)
    other = load("drl/hopper/random-v0")
    assert not set(other.seeds) & set(collected["random"].seeds)
    assert other.store.fingerprint != collected["random"].store.fingerprint


def test_no_two_episodes_are_the_same(collected):
    for dataset in collected.values():
        assert len({episode.actions.tobytes() for episode in dataset.episodes}) == len(dataset.episodes)
        assert len(set(dataset.seeds)) == len(dataset.episodes)


@pytest.mark.parametrize("tier", ["random", "medium-replay", "medium-expert"])
def test_only_whole_episodes_are_kept_and_as_few_as_reach_the_steps(tier, collected):
    lengths = collected[tier].store.episode_lengths  # reading has checked that each ends, once, at its last step
    assert lengths.sum() >= STEPS > lengths[:-1].sum()


@pytest.mark.parametrize("tier", ["random", "medium-replay", "medium-expert"])
def test_gymnasium_replays_a_recorded_episode_exactly(tier, collected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo may leave MUJOCO_LOG.TXT
    env = gym.make("Hopper-v5")
    for seed, episode in zip(collected[tier].seeds, collected[tier].episodes, strict=True):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], episode.observations[0])
        for step, action in enumerate(episode.actions):
            observation, reward, terminated, truncated, _ = env.step(action)
            np.testing.assert_array_equal(observation, episode.observations[step + 1])
            assert (reward, terminated, truncated) == (
                episode.rewards[step], episode.terminations[step], episode.truncations[step]
            )
    env.close()


def test_the_random_tier_is_uniform_in_the_box(collected):
    actions = collected["random"].store.actions
    assert actions.min() >= -1 and actions.max() <= 1
    for channel in actions.T:
        n = len(channel)
        uniform = (np.sort(channel) + 1) / 2
        # Kolmogorov's distance exceeds 1.95 / sqrt(n) once in a thousand seeds
        assert np.abs(uniform - (np.arange(n) + 0.5) / n).max() < 1.95 / n**0.5
    # neither channels nor neighbours in time know of each other: five standard deviations of a correlation
    together = np.corrcoef(np.concatenate([actions[:-1], actions[1:]], axis=1).T)
    assert np.abs(together[~np.eye(6, dtype=bool)]).max() < 5 / len(actions) ** 0.5


def test_medium_expert_is_half_and_half_by_steps(collected):
    store = collected["medium-expert"].store
    low, high = (
        np.abs(store.actions - actor.actor("hopper", snapshot).act(store.observations, np.zeros_like(store.actions)))
        .mean(1) for snapshot in (MEDIUM, EXPERT)
    )
    by_medium = np.add.reduceat(low, store.episode_starts[:-1]) < np.add.reduceat(high, store.episode_starts[:-1])

    assert (np.diff(by_medium.astype(int)) <= 0).all() and set(by_medium) == {False, True}
    medium_lengths = store.episode_lengths[by_medium]
    assert medium_lengths.sum() >= STEPS / 2 > medium_lengths[:-1].sum()
    # what the card promises is what the weights do
    returns = scores.normalized_score(store.episode_returns, scores.reference("Hopper-v5"))
    assert (returns[~by_medium] > 90).all() and (returns[by_medium] < 90).all()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("steps", [1, 7, STEPS, 400_000])
def test_a_plan_adds_up_to_the_steps(tier, steps):
    shares = [share for _, share in plan("hopper", tier, steps)]
    assert sum(shares) == steps and min(shares) >= 0


def test_medium_replay_is_what_the_agent_saw_on_its_way_to_medium():
    shares = plan("hopper", "medium-replay", 400_000)
    snapshots = [snapshot for snapshot, _ in shares]

    assert snapshots[0] == "random" and snapshots[-1] == MEDIUM
    assert len(snapshots) - 1 >= 15
    steps = [CARD["snapshots"][snapshot]["step"] for snapshot in snapshots[1:]]
    assert steps == sorted(set(steps))
    # each acts for the steps since the one before: medium's own step count in all
    for (_, share), since, step in zip(shares, [0, CARD["random_steps"], *steps], [CARD["random_steps"], *steps]):
        assert share == pytest.approx(400_000 * (step - since) / steps[-1], abs=1)  # both ends are rounded


def test_the_other_plans_name_one_actor_or_two():
    assert plan("hopper", "random", 10) == [("random", 10)]
    assert plan("hopper", "medium", 10) == [(MEDIUM, 10)]
    assert plan("hopper", "expert", 10) == [(EXPERT, 10)]
    assert plan("hopper", "medium-expert", 10) == [(MEDIUM, 5), (EXPERT, 5)]


def test_a_card_says_how_good_its_tiers_are():
    scored = {snapshot: entry["normalized_score"] for snapshot, entry in CARD["snapshots"].items()}
    assert scored[EXPERT] >= 90
    assert 35 <= scored[MEDIUM] <= 55
    reference = scores.reference(CARD["environment"])
    for entry in CARD["snapshots"].values():
        # both are rounded to two places
        assert entry["normalized_score"] == pytest.approx(
            scores.normalized_score(entry["return_mean"], reference), abs=0.011
        )


def test_every_snapshot_of_a_tier_is_shipped_and_described():
    for tier, entries in CARD["tiers"].items():
        assert tier in TIERS
        for snapshot in {entry["snapshot"] for entry in entries} - {"random"}:
            assert snapshot in CARD["snapshots"]
            assert actor.actor("hopper", snapshot).act(np.zeros((5, 11)), np.zeros((5, 3))).shape == (5, 3)


def test_the_shipped_policies_are_small():
    sizes = [path.stat().st_size for path in resources.files("drl.behaviour").iterdir() if path.is_file()]
    assert sum(sizes) < 3_000_000


def test_an_actor_is_a_squashed_gaussian():
    names = ("hidden_0", "hidden_1", "mean", "log_std")
    weights = {f"{name}.weight": np.eye(2, dtype=np.float32) for name in names}
    weights |= {f"{name}.bias": np.zeros(2, np.float32) for name in names}
    # hidden: relu of (0.5, -1) is (0.5, 0); mean (0.5, 0); standard deviation (exp 0.5, 1)
    actions = Actor(weights).act(np.array([[0.5, -1.0]]), np.array([[2.0, -3.0]]))
    # float32 against float64: a few units in the last place of a number below 1
    np.testing.assert_allclose(actions, np.tanh([[0.5 + 2 * np.exp(0.5), -3]]), rtol=0, atol=1e-6)
    assert actions.dtype == np.float32


def test_a_shard_asked_for_more_begins_with_the_same_episodes():
    few, many = (play(Shard("hopper", MEDIUM, 3, steps, 0)) for steps in (1, 2000))
    assert len(few) == 1 < len(many)
    assert few[0].seed == many[0].seed
    np.testing.assert_array_equal(few[0].observations, many[0].observations)
    assert play(Shard("hopper", MEDIUM, 4, 1, 0))[0].seed != few[0].seed


def test_the_metadata_say_where_the_data_come_from(collected):
    metadata = collected["medium-replay"].metadata
    reference = scores.reference("Hopper-v5")
    assert metadata["collection_seed"] == 0
    assert metadata["versions"] == versions()
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == reference == (-20.272305, 3234.3)
    assert metadata["reference_source"] == "D4RL infos.py"
    assert [tuple(entry.values()) for entry in metadata["behaviour"]] == plan("hopper", "medium-replay", STEPS)
    assert metadata["algorithm_name"] == CARD["algorithm"]
    assert collected["random"].metadata["algorithm_name"] == "uniform actions"
    assert "Not D4RL's own files" in metadata["description"]


def test_the_store_holds_what_was_collected(collected):
    dataset = collected["medium-replay"]
    store = dataset.store
    assert (store.dataset, store.spaces.environment) == ("drl/hopper/medium-replay-v0", "Hopper-v5")
    np.testing.assert_array_equal(store.actions, np.concatenate([episode.actions for episode in dataset.episodes]))
    returns = np.float32([np.cumsum(episode.rewards[::-1])[-1] for episode in dataset.episodes])
    np.testing.assert_array_equal(store.episode_returns, returns)


def test_a_dataset_is_replaced_only_when_asked():
    collect("hopper/random", steps=100)
    before = minari_files.read("drl/hopper/random-v0").fingerprint
    with pytest.raises(UserError) as caught:
        collect("hopper/random", steps=100, seed=1)
    assert str(caught.value) == "dataset drl/hopper/random-v0 exists already; add --overwrite to collect it anew"
    assert minari_files.read("drl/hopper/random-v0").fingerprint == before

    collect("hopper/random", steps=100, seed=1, overwrite=True)
    assert minari_files.read("drl/hopper/random-v0").fingerprint != before


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("hopper/medum", "did you mean 'hopper/medium'?"),
        ("hoper/medium-replay", "did you mean 'hopper/medium-replay'?"),
        ("zzz", f"known: {', '.join(sorted(names()))}"),
    ],
)
def test_an_unknown_name_is_answered_with_its_cure(name, cure):
    with pytest.raises(UserError) as caught:
        collect(name, steps=10)
    assert str(caught.value) == f"unknown dataset {name!r}; {cure}"


@pytest.mark.parametrize("steps", [0, -5])
def test_the_steps_must_be_positive(steps):
    with pytest.raises(UserError, match=f"--steps must be positive, got {steps}"):
        collect("hopper/random", steps=steps)


def test_an_environment_without_behaviour_policies_is_named():
    with pytest.raises(UserError) as caught:
        actor.card("hoper")
    assert str(caught.value) == "no behaviour policies for 'hoper'; did you mean 'hopper'?"
