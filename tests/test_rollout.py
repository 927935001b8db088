"""A roll-out gives one return per episode, the same whatever plays beside it and on however many threads."""

import os
import re
import signal
import threading

import gymnasium as gym
import numpy as np
import pytest
import torch
from mujoco.batch import SimulationError

from drl import engine, envs, envs_process
from drl import rollout as rolling
from drl.errors import UserError
from drl.faults import EvaluationFailed
from drl.players import LANE
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.rollout import rollout
from toys import SEED, TARGET, checkpoint

EPISODES = 19
COMPILED = pytest.param(
    "compiled", marks=pytest.mark.skipif(engine.unavailable() is not None, reason="no compiled engine here")
)
TORCH = ["recurrent", "window"]
BEST = "torch" if engine.unavailable() else "cpu"


def made(kind, environment="Hopper-v5"):
    if kind == "window":
        return WindowPolicy(checkpoint(environment))
    return RecurrentPolicy(checkpoint(environment), engine="cpu" if kind == "compiled" else "torch")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo may leave MUJOCO_LOG.TXT


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == rolling.THREAD]


def play(policy, environments=16, threads=1, episodes=EPISODES, environment="Hopper-v5"):
    return rollout(
        policy, environment, target_return=TARGET, episodes=episodes, seed=SEED, environments=environments,
        threads=threads,
    )


def by_hand(policy, batch, slot_of, episodes=EPISODES, environment="Hopper-v5"):
    """Returns and lengths from one gymnasium environment at a time, the policy padded to `batch` rows."""
    env = gym.make(environment)
    returns, lengths = [], []
    for episode in range(episodes):
        slot, over = slot_of(episode), False
        observation, reward = np.zeros((batch, *env.observation_space.shape)), np.zeros(batch)
        state = policy.initial_state(batch, TARGET)
        observation[slot], _ = env.reset(seed=SEED + episode)
        total, steps = 0.0, 0
        while not over:
            action, state = policy.step(observation, reward, state)
            observation[slot], reward[slot], terminated, truncated, _ = env.step(action[slot])
            total, steps, over = total + reward[slot], steps + 1, terminated or truncated
        returns.append(total)
        lengths.append(steps)
    env.close()
    return returns, lengths


@pytest.fixture(scope="module")
def expected():
    """What EPISODES episodes played one at a time give, of each kind."""
    found = {}

    def of(kind):
        if kind not in found:
            found[kind] = play(made(kind), environments=1)
        return found[kind]

    return of


@pytest.mark.parametrize("kind", [*TORCH, COMPILED])
@pytest.mark.parametrize(("environments", "threads"), [(4, 1), (4, 2), (5, 3), (16, 1), (16, 3), (100, 2)])
def test_returns_do_not_depend_on_what_plays_beside(kind, environments, threads, expected, torch_threads):
    torch_threads(threads)
    played = play(made(kind), environments, threads)
    assert torch.get_num_threads() == threads
    for actual, wanted in zip(played, expected(kind), strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("kind", [*TORCH, COMPILED])
def test_the_first_episodes_do_not_depend_on_how_many_follow(kind, expected):
    played = play(made(kind), episodes=7)
    np.testing.assert_array_equal(played.returns, expected(kind).returns[:7])


@pytest.mark.parametrize("kind", [*TORCH, COMPILED])
def test_one_gymnasium_environment_at_a_time_gives_the_same_returns(kind, expected, torch_threads):
    torch_threads(1)  # small matrices are faster so
    width = 1 if kind == "compiled" else LANE
    returns, lengths = by_hand(made(kind), width, lambda episode: episode % width)
    np.testing.assert_array_equal(expected(kind).returns, returns)
    np.testing.assert_array_equal(expected(kind).lengths, lengths)
    np.testing.assert_array_equal(expected(kind).seeds, SEED + np.arange(EPISODES))
    assert len(set(returns)) == EPISODES


@pytest.mark.parametrize("kind", TORCH)
def test_without_the_padding_the_returns_are_the_same_but_for_rounding(kind, expected, torch_threads):
    torch_threads(1)  # small matrices are faster so
    returns, lengths = by_hand(made(kind), 1, lambda episode: 0)
    # a product of one row is summed in another order: float32 rounding, grown by some dozens of steps of physics
    np.testing.assert_allclose(expected(kind).returns, returns, rtol=1e-4, atol=0)
    np.testing.assert_array_equal(expected(kind).lengths, lengths)


@pytest.mark.parametrize("kind", ["recurrent", COMPILED])
def test_an_environment_outside_the_three_is_played_alike(kind, torch_threads):
    policy = made(kind, "InvertedDoublePendulum-v5")
    torch_threads(1)  # small matrices are faster so
    width = 1 if kind == "compiled" else LANE
    returns, lengths = by_hand(policy, width, lambda episode: episode % width, 4, "InvertedDoublePendulum-v5")
    assert len(set(returns)) == 4
    for environments, threads in ((1, 1), (4, 1), (4, 3)):
        played = play(policy, environments, threads, 4, "InvertedDoublePendulum-v5")
        np.testing.assert_array_equal(played.returns, returns)
        np.testing.assert_array_equal(played.lengths, lengths)


def test_the_target_return_is_asked_for():
    policy = made("recurrent")
    other = rollout(policy, "Hopper-v5", target_return=-5 * TARGET, episodes=3, seed=SEED)
    assert not np.array_equal(other.returns, play(policy, episodes=3).returns)


class Watched:
    """Environments that keep count of their steps and call `on_step`, if any, before each."""

    row, apart = None, False

    def __init__(self, inner, on_step=None):
        self.inner, self.on_step, self.steps, self.ended = inner, on_step, 0, set()
        self.action_space, self.observation_space = inner.action_space, inner.observation_space

    def reset(self, rows, seeds):
        self.ended -= set(rows)
        return self.inner.reset(rows, seeds)

    def step(self, rows, actions):
        assert not self.ended & set(rows), "a row that is over was stepped"
        if self.on_step:
            self.on_step(self)
        self.steps += len(rows)
        result = self.inner.step(rows, actions)
        self.ended |= set(rows[result.terminated | result.truncated])
        return result

    def close(self):
        self.inner.close()


@pytest.fixture
def watched(monkeypatch):
    """Watches the environments of a roll-out; they stand in the list that it returns."""
    def watch(on_step=None):
        each = []

        def make(environment, count, players, threads, patience):
            each.extend(Watched(envs.make_envs(environment, count, threads), on_step) for _ in range(players))
            return each

        monkeypatch.setattr(rolling, "make_apart", make)
        return each

    return watch


@pytest.mark.parametrize("kind", ["recurrent", COMPILED])
def test_an_episode_that_is_over_costs_no_step(kind, watched, monkeypatch):
    each, asked = watched(), []

    def counted(*arguments):
        act = players(*arguments)

        def count(observations, rewards, rows):
            asked.append(len(rows))
            return act(observations, rewards, rows)

        return count

    players = rolling.players
    monkeypatch.setattr(rolling, "players", counted)
    played = play(made(kind), threads=2)
    assert len(set(played.lengths)) > 3  # episodes end at different times
    assert len(each) == 2 and all(some.steps for some in each)
    assert sum(some.steps for some in each) == sum(asked) == played.lengths.sum()


def test_threads_play_at_the_same_time(watched):
    barrier = threading.Barrier(2)
    watched(lambda some: barrier.wait(timeout=60) if not some.steps else None)
    play(made("recurrent"), threads=2)  # alone, a thread would wait in vain for the other
    assert not barrier.broken


@pytest.mark.parametrize(("kind", "threads", "each"), [
    pytest.param("compiled", 1, [1], marks=COMPILED.marks), pytest.param("compiled", 2, [1, 1], marks=COMPILED.marks),
    pytest.param("compiled", 8, [4, 4], marks=COMPILED.marks), ("recurrent", 2, [1, 1]),
])
def test_the_threads_asked_for_are_shared_among_players_for_engine_and_physics_alike(kind, threads, each, monkeypatch):
    physics, policy = [], set()

    def make(environment, count, threads):
        physics.append(threads)
        return envs.make_envs(environment, count, threads)

    def made_players(*arguments):
        policy.add(arguments[-1])
        return players(*arguments)

    players = rolling.players
    monkeypatch.setattr(envs_process, "make_envs", make)
    monkeypatch.setattr(rolling, "players", made_players)
    play(made(kind), environments=32, threads=threads, episodes=32)
    assert (physics, policy) == (each, set(each))


@pytest.mark.parametrize(("error", "kind", "message"), [
    (SimulationError(np.array([3]), "overflow"), EvaluationFailed,
     r"Hopper-v5 raised SimulationError: MuJoCo raised in 1 simulations \(3\); simulation 3: overflow in step 1 of "
     r"one of 16 episodes from \d+ \(seed \d+\); 0 of 200 episodes had been finished, .*"),
    (KeyboardInterrupt("what was played is kept"), KeyboardInterrupt, "what was played is kept"),
])
def test_what_a_thread_raises_ends_all_with_its_message(error, kind, message, watched):
    both, failing = threading.Barrier(2), []

    def fail(some):
        if some is each[1]:
            failing.append(threading.current_thread())
            both.wait(timeout=60)
            raise error
        if not some.steps:
            both.wait(timeout=60)
            failing[0].join()

    each = watched(fail)
    with pytest.raises(kind) as caught:
        play(made("recurrent"), environments=200, threads=2, episodes=200)
    assert re.fullmatch(message, str(caught.value))
    assert (each[0].steps, each[1].steps) == (LANE, 0)  # the step under way, and no other


def test_an_interruption_from_the_keyboard_ends_all_threads(watched):
    def interrupt(some):
        if some is each[0] and not some.steps:
            os.kill(os.getpid(), signal.SIGINT)

    each = watched(interrupt)
    with pytest.raises(KeyboardInterrupt):
        play(made("recurrent"), environments=200, threads=2, episodes=200)


class Broken(RecurrentPolicy):
    """Has no answer in slot 5 from timestep 3 on."""

    def step(self, observation, reward, state, episode_start=None):
        begun = int(state.timestep[0])
        action, state = super().step(observation, reward, state, episode_start)
        if begun >= 3:
            action[5] = np.nan
        return action, state


def test_an_action_that_is_not_finite_names_its_episode():
    # of four environments the second four hold episode 5; where nobody plays slot 5, nobody minds
    with pytest.raises(EvaluationFailed) as caught:
        play(Broken(checkpoint(), engine="torch"), environments=4, episodes=8)
    assert str(caught.value) == (
        "the policy's action in episode 5, step 3 is not finite; 4 of 8 episodes had been finished, and no score is "
        "made of fewer than all; the weights or the observation are damaged; evaluate another checkpoint"
    )


@pytest.mark.parametrize("engine", ["torch", BEST])
def test_damaged_weights_are_not_played(engine):
    damaged = checkpoint()
    damaged.normaliser.std[:] = 1e-40  # what is divided by it overflows
    with pytest.raises(EvaluationFailed, match="action in episode 0, step 0 is not finite"):
        play(RecurrentPolicy(damaged, engine=engine), episodes=2)


@pytest.mark.parametrize("engine", ["torch", BEST])
def test_an_observation_that_overflows_within_the_policy_names_its_episode(engine, monkeypatch):
    step = envs.MujocoEnvs.step

    def overflowing(self, rows, actions):
        result = step(self, rows, actions)
        if self._steps[1] == 4:
            result.observations[1, 2] = 3e38
        return result

    monkeypatch.setattr(envs.MujocoEnvs, "step", overflowing)
    with pytest.raises(UserError) as caught:
        play(RecurrentPolicy(checkpoint(), engine=engine), environments=4, episodes=8, threads=1)
    assert str(caught.value).startswith("the policy's action in episode 1, step 4 is not finite; ")


@pytest.mark.parametrize("kind", [COMPILED])
def test_physics_that_are_not_finite_name_their_episode(kind, monkeypatch):
    step = envs.MujocoEnvs.step

    def diverged(self, rows, actions):
        result = step(self, rows, actions)
        if self._steps[1] == 4:
            result.observations[1, 2] = np.inf
        return result

    monkeypatch.setattr(envs.MujocoEnvs, "step", diverged)
    with pytest.raises(EvaluationFailed) as caught:
        play(made(kind), episodes=3)
    assert caught.value.reason == "Hopper-v5 answered with what is not finite in step 4 of episode 1 (seed 301)"


def test_a_last_reward_of_the_physics_that_is_not_finite_makes_no_score(monkeypatch):
    step = envs.MujocoEnvs.step

    def diverged(self, rows, actions):
        result = step(self, rows, actions)
        result.rewards[result.terminated & (rows == 1)] = np.nan
        return result

    monkeypatch.setattr(envs.MujocoEnvs, "step", diverged)
    with pytest.raises(EvaluationFailed, match=r"^Hopper-v5 answered with what is not finite in step \d+ of episode 1"):
        play(made("recurrent"), episodes=3)


def test_an_environment_of_other_dimensions_is_refused():
    with pytest.raises(UserError) as caught:
        play(made("recurrent"), environment="Walker2d-v5")
    assert str(caught.value) == (
        "the checkpoint has observations of dimension 11 and actions of dimension 3, but Walker2d-v5 has 17 and 6; "
        "use --environment Hopper-v5"
    )
