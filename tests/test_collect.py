"""Collected data: the same seed gives the same bits on any number of cores, and Gymnasium would have said the same."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import minari
import mujoco
import numpy as np
import pytest

from drl import collect as collection
from drl import disk, scores
from drl.behaviour import actor, pieces, rounding
from drl.behaviour import plan as plans
from drl.behaviour.actor import Actor
from drl.behaviour.play import Shard, play
from drl.behaviour.plan import cut, plan, size
from drl.collect import collect
from drl.data import minari_files, minari_writer
from drl.data.store import EpisodeStore
from drl.envs import max_episode_steps
from drl.errors import UserError
from drl.names import TIERS, names
from drl.versions import versions

DOCS = Path(__file__).parents[1] / "docs"
STEPS = 3000
CARD = actor.card("hopper")
EXPERT_SCORES = {"hopper": 90, "halfcheetah": 70, "walker2d": 85}  # at least, normalised
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


@pytest.mark.skipif(not rounding.environment(), reason="the kernels that data are made with need AVX-512")
@pytest.mark.parametrize("cores", [1, 2])
def test_a_process_that_was_given_other_kernels_collects_the_same_bits(cores, collected):
    code = (f"import os; os.sched_getaffinity = lambda _: set(range({cores})); from drl.behaviour import rounding; "
            f"import numpy; assert not rounding.settled(); from drl.collect import collect; "
            f"collect('hopper/medium-replay', steps={STEPS}); assert os.environ[rounding.VARIABLE] == 'Haswell'")
    subprocess.run([sys.executable, "-c", "if __name__ == '__main__':\n    " + code], check=True,
                   env=os.environ | {rounding.VARIABLE: "Haswell"})
    assert_same(load("drl/hopper/medium-replay-v0"), collected["medium-replay"])


@pytest.mark.parametrize("text", ["flags\t\t: fpu avx2 avx512f\n", "Features\t: fp asimd\n", None])
def test_a_processor_without_the_kernels_is_left_alone(text, tmp_path, monkeypatch):
    monkeypatch.setattr(rounding, "environment", rounding.environment.__wrapped__)  # what it remembers stays as it is
    monkeypatch.setattr(rounding, "PROCESSOR", tmp_path / "cpuinfo")
    if text:
        rounding.PROCESSOR.write_text(text)
    assert rounding.environment() == {} and rounding.settled()


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


@pytest.mark.parametrize("name", names())
def test_shards_are_whole_episodes_of_full_length_but_for_the_last_of_a_share(name):
    environment, tier = name.split("/")
    shares = plan(environment, tier, size(name))
    works = cut(environment, shares, seed=0)
    marks, limit = np.cumsum([share for _, share in shares]), max_episode_steps(actor.card(environment)["environment"])

    steps = np.diff([work.mark for work in works], prepend=0)
    assert steps.tolist() == [work.shard.steps for work in works]
    assert set(marks) <= {work.mark for work in works}
    assert {work.shard.steps % limit for work in works if work.mark not in marks} <= {0}


@pytest.mark.parametrize("environment", sorted(EXPERT_SCORES))
def test_medium_replay_is_what_the_agent_saw_on_its_way_to_medium(environment):
    card = actor.card(environment)
    shares = plan(environment, "medium-replay", 400_000)
    snapshots = [snapshot for snapshot, _ in shares]

    assert snapshots[0] == "random" and snapshots[-1] == card["tiers"]["medium"][0]["snapshot"]
    assert len(snapshots) - 1 >= 15
    steps = [card["snapshots"][snapshot]["step"] for snapshot in snapshots[1:]]
    assert steps == sorted(set(steps))
    # each acts for the steps since the one before: medium's own step count in all
    for (_, share), since, step in zip(shares, [0, card["random_steps"], *steps], [card["random_steps"], *steps]):
        assert share == pytest.approx(400_000 * (step - since) / steps[-1], abs=1)  # both ends are rounded


def test_the_other_plans_name_one_actor_or_two():
    assert plan("hopper", "random", 10) == [("random", 10)]
    assert plan("hopper", "medium", 10) == [(MEDIUM, 10)]
    assert plan("hopper", "expert", 10) == [(EXPERT, 10)]
    assert plan("hopper", "medium-expert", 10) == [(MEDIUM, 5), (EXPERT, 5)]


@pytest.mark.parametrize(("environment", "least"), sorted(EXPERT_SCORES.items()))
def test_a_card_says_how_good_its_tiers_are(environment, least):
    card = actor.card(environment)
    scored = {snapshot: entry["normalized_score"] for snapshot, entry in card["snapshots"].items()}
    assert scored[card["tiers"]["expert"][0]["snapshot"]] >= least
    assert 35 <= scored[card["tiers"]["medium"][0]["snapshot"]] <= 55
    reference = scores.reference(card["environment"])
    for entry in card["snapshots"].values():
        # both are rounded to two places
        assert entry["normalized_score"] == pytest.approx(
            scores.normalized_score(entry["return_mean"], reference), abs=0.011
        )


@pytest.mark.parametrize("environment", sorted(EXPERT_SCORES))
def test_the_medium_that_is_shipped_plays_as_its_card_says(environment):
    card = actor.card(environment)
    snapshot = card["tiers"]["medium"][0]["snapshot"]
    episodes = play(Shard(environment, snapshot, 0, 8 * 1000 if environment == "halfcheetah" else 4000, 0))
    returns = np.array([episode.rewards.sum() for episode in episodes])
    promised = card["snapshots"][snapshot]
    # five standard errors of the mean of these few episodes
    assert abs(returns.mean() - promised["return_mean"]) < 5 * promised["return_std"] / len(returns) ** 0.5


@pytest.mark.parametrize("environment", sorted(EXPERT_SCORES))
def test_every_snapshot_of_a_tier_is_shipped_and_described(environment):
    card, (observation_dim, action_dim) = actor.card(environment), actor.dimensions(environment)
    for tier, entries in card["tiers"].items():
        assert tier in TIERS
        for snapshot in {entry["snapshot"] for entry in entries} - {"random"}:
            assert snapshot in card["snapshots"]
            policy = actor.actor(environment, snapshot)
            assert policy.act(np.zeros((5, observation_dim)), np.zeros((5, action_dim))).shape == (5, action_dim)


@pytest.mark.parametrize("environment", sorted(EXPERT_SCORES))
def test_a_card_keeps_what_the_replay_buffer_of_the_run_held(environment):
    card = actor.card(environment)
    buffer, (observation_dim, _) = card["replay_buffer"], actor.dimensions(environment)
    last = card["snapshots"][card["tiers"]["medium"][0]["snapshot"]]["step"]
    assert abs(buffer["steps"] - last) <= card["environments"]
    assert len(buffer["state_mean"]) == len(buffer["state_std"]) == observation_dim
    for kind in ("return", "length"):
        histogram = buffer[f"{kind}_histogram"]
        assert sum(histogram["counts"]) == buffer["episodes"] and len(histogram["edges"]) == 21


def test_the_shipped_policies_are_small():
    sizes = [path.stat().st_size for path in resources.files("drl.behaviour").iterdir() if path.is_file()]
    assert sum(sizes) < 8_000_000


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


def test_the_sizes_are_d4rls():
    replays = {"hopper": 400_000, "halfcheetah": 200_000, "walker2d": 300_000}
    for name in names():
        environment, tier = name.split("/")
        expected = {"medium-expert": 2_000_000, "medium-replay": replays[environment]}.get(tier, 1_000_000)
        assert size(name) == expected


def in_pieces(monkeypatch):
    """Have collections be made in pieces of a thousand steps on one core; what is played is listed."""
    monkeypatch.setattr(plans, "SHARD", 1000)
    on_cores(1, monkeypatch)
    played = []
    monkeypatch.setattr(pieces, "play", lambda shard: played.append(shard.number) or play(shard))
    return played


@pytest.fixture
def three_pieces(monkeypatch):
    """Collecting hopper/medium-expert in pieces of a thousand steps on one core; what was played is listed."""
    return in_pieces(monkeypatch)


def collect_pieces(**settings):
    return collect("hopper/medium-expert", steps=3000, **settings)


def main_file(folder):
    return (folder / "data" / "main_data.hdf5").read_bytes()


def stop(*_, **__):
    raise KeyboardInterrupt


def pieces_folder():
    [folder] = minari_files.root().glob(".collecting-*")
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A datasets root with a collection that was stopped when it had played its pieces; the bytes that it would have
    written."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        played = in_pieces(monkeypatch)
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("whole")))
        whole = main_file(collect_pieces())
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("stopped")))
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as caught:
            patched.setattr(minari_writer, "_image", lambda first, rest: stop(list(rest)))
            collect_pieces()
        assert str(caught.value) == "what was played is kept; type the same again to go on"
        assert minari_files.local_ids() == [] and len(played) > 4
        return minari_files.root(), whole


@pytest.fixture
def interrupted(three_pieces, stopped):
    """A collection that is stopped when it has played its pieces; the bytes that it would have written."""
    root, whole = stopped
    shutil.copytree(root, minari_files.root(), dirs_exist_ok=True)
    return whole


def test_a_collection_that_was_stopped_goes_on_and_ends_with_the_same_bytes(interrupted, three_pieces, capfd):
    (pieces_folder() / "000001.piece").unlink()
    assert main_file(collect_pieces()) == interrupted
    assert three_pieces == [1]
    assert "going on: 3 of 4 pieces were played before" in capfd.readouterr().err
    assert not list(minari_files.root().glob(".*"))


@pytest.mark.parametrize("harm", ["truncated", "a bit flipped", "emptied"])
def test_a_damaged_piece_is_played_again(harm, interrupted, three_pieces):
    piece = pieces_folder() / "000002.piece"
    content = bytearray(piece.read_bytes())
    if harm == "a bit flipped":
        content[len(content) // 2] ^= 1
    piece.write_bytes(content[: {"truncated": -1, "emptied": 0}.get(harm)])
    assert main_file(collect_pieces()) == interrupted
    assert three_pieces == [2]


def test_of_what_a_killed_process_had_begun_to_write_nothing_stays(interrupted, three_pieces, monkeypatch):
    (pieces_folder() / "000001.4711").write_bytes(b"the beginning of a piece")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(minari_writer, "write", stop)
        collect_pieces()
    assert sorted(path.name for path in pieces_folder().iterdir()) == [
        *(f"00000{number}.piece" for number in range(4)), "recipe.json"
    ]
    assert three_pieces == []


def test_a_piece_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def fill_up(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(OSError, match="No space left"):
        pieces.make(Shard("hopper", "random", 0, 1, 0), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_does_not_give_back_what_was_played_is_told(three_pieces, monkeypatch):
    monkeypatch.setattr(pieces, "read", lambda *_: None)
    with pytest.raises(UserError, match="does not give back what has just been written there; make room, or name"):
        collect("hopper/random", steps=10)


def test_the_signal_that_stops_a_collection_keeps_its_name(three_pieces, monkeypatch):
    class Stopped(KeyboardInterrupt):
        """By a signal."""

    stopped = Stopped()

    def stop_here(*_, **__):
        raise stopped

    monkeypatch.setattr(minari_writer, "write", stop_here)
    with pytest.raises(Stopped) as caught:
        collect("hopper/random", steps=10)
    assert caught.value is stopped and str(stopped) == "what was played is kept; type the same again to go on"
    assert os.listdir(minari_files.root()) == []  # nothing was


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 3001}])
def test_pieces_of_another_recipe_are_not_used(change, interrupted, three_pieces):
    collect("hopper/medium-expert", **{"steps": 3000} | change)
    assert three_pieces == [0, 1, 2, 3]


def test_a_collection_that_is_under_way_is_not_joined(interrupted):
    with disk.locked(pieces_folder()), pytest.raises(UserError) as caught:
        collect_pieces()
    assert str(caught.value) == "another process is collecting drl/hopper/medium-expert-v0; wait for it, or stop it"


def test_the_rate_is_told_beside_that_of_the_physics_alone(three_pieces, capfd):
    collect_pieces()
    told = re.search(r"^(\d+) steps/s; the physics alone, on 1 cores: (\d+)$", capfd.readouterr().err, re.M)
    assert 0 < int(told[1]) < int(told[2])


def test_mujoco_is_heard_of_the_physics_but_not_of_gymnasiums_own_model_files(three_pieces, monkeypatch):
    said, listening = [], []
    monkeypatch.setattr(pieces, "play", lambda shard: listening.append(mujoco.get_mju_user_warning()) or play(shard))
    mujoco.set_mju_user_warning(said.append)
    try:
        collect("halfcheetah/random", steps=10)
    finally:
        mujoco.set_mju_user_warning(None)
    assert listening == [said.append] and said == []


def test_a_worker_that_is_killed_is_told_and_the_next_call_goes_on(monkeypatch):
    monkeypatch.setattr(plans, "SHARD", 1000)
    on_cores(2, monkeypatch)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="was killed .* type the same again to go on"):
        patched.setattr(pieces, "make", die)
        collect_pieces()
    assert collect_pieces().is_dir()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_full_disk_is_told_before_anything_is_played(three_pieces, monkeypatch):
    usage = disk.shutil.disk_usage("/")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=100_000_000))
    with pytest.raises(UserError, match=r"collecting drl/hopper/medium-v0 needs \d+ MB in .*, 100 MB are free"):
        collect("hopper/medium")
    assert three_pieces == []


@pytest.mark.parametrize("name", names())
def test_the_room_that_is_asked_for_is_what_a_dataset_of_full_size_takes(name, tmp_path, monkeypatch):
    """Its file, as docs/data/ has it, and its pieces: the same numbers without flags and tables."""
    measured = json.loads((DOCS / "data" / f"{name.replace('/', '-')}.json").read_text())
    environment, tier = name.split("/")
    observation_dim, action_dim = actor.dimensions(environment)
    steps, episodes = measured["steps"], measured["episodes"]
    in_pieces = steps * (8 * observation_dim + 4 * action_dim + 8) + episodes * 8 * observation_dim
    taken = measured["megabytes"] * 1e6 + in_pieces

    asked = collection._bytes(cut(environment, plan(environment, tier, size(name)), seed=0), tmp_path)
    assert taken < asked < 1.15 * taken


@pytest.mark.parametrize("snapshot", ["random", MEDIUM])
def test_the_size_of_a_piece_is_known_before_it_is_played(snapshot, tmp_path):
    shard = Shard("hopper", snapshot, 0, 8000, 0)
    pieces.make(shard, tmp_path)
    beyond = sum(len(episode.actions) for episode in pieces.read(shard, tmp_path)) - shard.steps  # of the last episode
    observation_dim, action_dim = actor.dimensions("hopper")
    expected = pieces.size(shard) + beyond * (8 * observation_dim + 4 * action_dim + 8)
    # the episodes are a few more or fewer than the card says: a hundred bytes each
    assert pieces.piece_path(tmp_path, shard).stat().st_size == pytest.approx(expected, rel=0.01)


def test_pieces_that_are_there_need_no_room(interrupted, monkeypatch):
    (pieces_folder() / "000001.piece").unlink()
    works = cut("hopper", plan("hopper", "medium-expert", 3000), seed=0)
    asked = []
    monkeypatch.setattr(disk, "require_space", lambda folder, needed, what: asked.append(needed))
    collect_pieces()
    fresh = collection._bytes(works, folder=minari_files.root() / "none")
    there = sum(pieces.size(work.shard) for work in works if work.shard.number != 1)
    assert asked[0] == pytest.approx(fresh - collection.ROOM * there, abs=2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 50), (signal.SIGTERM, 10), (signal.SIGINT, 10)],
                         ids=["SIGKILL", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["the process alone", "its workers too"])
def test_signals_at_random_moments_break_nothing(kill, number, times, tmp_path, monkeypatch):
    """`drl data collect --overwrite`, over a dataset that stands, is told to stop: it does so in time, with all its
    processes; the earlier dataset stands on, or the new one does, whole; and the call that is let through ends with the
    bytes of an undisturbed one."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "undisturbed"))
    command = [sys.executable, "-m", "drl.cli", "data", "collect", "hopper/medium-replay", "--steps", "40000"]
    began = time.monotonic()
    subprocess.run([*command, "--seed", "1"], check=True, capture_output=True)
    seconds = time.monotonic() - began
    wanted = main_file(minari_files.path("drl/hopper/medium-replay-v0"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "disturbed"))
    earlier = main_file(collect("hopper/medium-replay", steps=2000))
    rng = np.random.default_rng(0)
    outcomes, slowest = [], 0.0
    for _ in range(times):
        process = subprocess.Popen([*command, "--seed", "1", "--overwrite"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, seconds))
        told = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            kill(process.pid, number)
        _, said = process.communicate(timeout=10)
        while alive := processes_of(session=process.pid):
            assert time.monotonic() < told + 10, alive
        slowest = max(slowest, time.monotonic() - told)
        assert process.returncode in (0, 128 + number, -number)  # the last: before it could answer
        assert "Traceback" not in said or process.returncode == -number, said
        store = minari_files.read("drl/hopper/medium-replay-v0")
        found = main_file(minari_files.path(store.dataset))
        assert found in (earlier, wanted)
        outcomes.append(found == wanted)
        if outcomes[-1]:  # begin again
            collect("hopper/medium-replay", steps=2000, overwrite=True)
    print(f"{outcomes.count(True)} of {times} came to the end before; the others ended within {slowest:.1f} s; "
          f"{seconds:.1f} s undisturbed")
    subprocess.run([*command, "--seed", "1", "--overwrite"], check=True, capture_output=True)
    assert main_file(minari_files.path("drl/hopper/medium-replay-v0")) == wanted
    assert sorted(os.listdir(minari_files.root())) == ["drl"]


def processes_of(session):
    """The processes of a session that have not ended, as /proc has them: pid (name) state parent group session."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = file.read_text().rpartition(")")
            state, _, _, of, *_ = rest.split()
            if int(of) == session and state not in "ZX":
                found.append(name)
    return found


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
