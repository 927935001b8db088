"""A row answers as one gymnasium.make environment would, bit for bit, whatever the other rows do."""

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from drl import envs as environments
from drl.data.store import Spaces
from drl.envs import (
    BATCHED,
    GymnasiumEnvs,
    MujocoEnvs,
    check_environment,
    check_fit,
    make_envs,
    max_episode_steps,
)
from drl.errors import UserError

ROWS, STEPS = 3, 10_000


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo may leave MUJOCO_LOG.TXT


def assert_same(actual, expected):
    """A Transition against what as many gymnasium environments answered: every bit."""
    for batched, alone in zip(actual, zip(*expected)):
        np.testing.assert_array_equal(batched, np.array(alone))


@pytest.mark.parametrize("environment", BATCHED)
def test_batched_physics_are_gymnasiums_bit_for_bit(environment):
    rng = np.random.default_rng(0)
    envs = make_envs(environment, ROWS, threads=2)
    alone = [gym.make(environment) for _ in range(ROWS)]
    assert isinstance(envs, MujocoEnvs)
    assert (envs.observation_space, envs.action_space) == (alone[0].observation_space, alone[0].action_space)
    low, high = envs.action_space.low, envs.action_space.high
    waiting, seed, ends = np.array([0, 2, 4]), 100, []  # steps until each row begins: they differ
    compared = 0

    while compared < STEPS:
        beginning = np.flatnonzero(waiting == 0)
        if len(beginning):
            seeds = [seed + int(row) for row in beginning]
            expected = [alone[row].reset(seed=s)[0] for row, s in zip(beginning, seeds)]
            np.testing.assert_array_equal(envs.reset(beginning, seeds), np.array(expected))
            seed += ROWS
        waiting -= 1
        rows = np.flatnonzero(waiting < 0)
        if not len(rows):
            continue
        actions = rng.uniform(low, high, (len(rows), len(low))).astype(np.float32)

        result = envs.step(rows, actions)
        assert_same(result, [alone[row].step(action)[:4] for row, action in zip(rows, actions)])
        compared += len(rows)

        over = result.terminated | result.truncated
        ends += list(zip(result.terminated[over], result.truncated[over]))
        waiting[rows[over]] = rng.integers(1, 5, over.sum())  # drop out for a while, then begin again

    expected = {(False, True)} if environment == "HalfCheetah-v5" else {(True, False)}
    assert set(ends) == expected and len(ends) >= ROWS
    envs.close()


def test_a_time_limit_truncates_an_episode_that_is_still_healthy():
    # the shipped expert hops for all of the 1000 steps
    from drl.behaviour import actor

    expert = actor.actor("hopper", actor.card("hopper")["tiers"]["expert"][0]["snapshot"])
    envs, alone = make_envs("Hopper-v5", 1), gym.make("Hopper-v5")
    row = np.array([0])
    observation = envs.reset(row, [7])
    np.testing.assert_array_equal(observation[0], alone.reset(seed=7)[0])
    for step in range(1, 1001):
        action = expert.act(observation, np.zeros((1, 3)))
        result = envs.step(row, action)
        assert_same(result, [alone.step(action[0])[:4]])
        assert (bool(result.terminated[0]), bool(result.truncated[0])) == (False, step == 1000)
        observation = result.observations


OUT_OF_REACH = {  # (qpos or qvel, channel, value) that random actions do not come to, and what is then the case
    "healthy": ("Walker2d-v5", "qpos", 1, 1.9, False),
    "too high": ("Walker2d-v5", "qpos", 1, 2.4, True),
    "bent forwards": ("Walker2d-v5", "qpos", 2, 1.1, True),
    "bent backwards": ("Walker2d-v5", "qpos", 2, -1.1, True),
    "high is healthy": ("Hopper-v5", "qpos", 1, 9.0, False),
    "leaning": ("Hopper-v5", "qpos", 2, -0.5, True),
    "leaning the other way": ("Hopper-v5", "qpos", 2, 0.5, True),
    "a joint far away": ("Hopper-v5", "qpos", 3, -180.0, True),
    "a joint far away the other way": ("Hopper-v5", "qpos", 3, 180.0, True),
    "faster than is shown": ("Hopper-v5", "qvel", 0, 30.0, False),
    "much too fast": ("Hopper-v5", "qvel", 1, 200.0, True),
    "upside down": ("HalfCheetah-v5", "qpos", 2, 3.0, False),
}


@pytest.mark.parametrize(("environment", "part", "channel", "value", "ends"), OUT_OF_REACH.values(),
                         ids=OUT_OF_REACH.keys())
def test_states_out_of_reach_are_judged_as_gymnasium_does(environment, part, channel, value, ends):
    envs, alone = make_envs(environment, 2), gym.make(environment)
    row = np.array([1])
    envs.reset(np.array([0, 1]), [3, 5])
    alone.reset(seed=5)
    state = {"qpos": alone.unwrapped.data.qpos.copy(), "qvel": alone.unwrapped.data.qvel.copy()}
    state[part][channel] = value
    alone.unwrapped.set_state(state["qpos"], state["qvel"])
    envs._qpos[row], envs._qvel[row] = state["qpos"], state["qvel"]  # there is no door for a state of one's own
    envs._batch.forward(ids=row)

    action = np.zeros(envs.action_space.shape, np.float32)
    result = envs.step(row, action[None])

    assert_same(result, [alone.step(action)[:4]])
    assert result.terminated[0] == ends


@pytest.mark.parametrize("environment", ["Hopper-v5", "HalfCheetah-v5", "Pendulum-v1"])
def test_rows_that_are_not_named_are_not_stepped(environment):
    envs, alone = make_envs(environment, 2), gym.make(environment)
    low, high = envs.action_space.low, envs.action_space.high
    rng = np.random.default_rng(0)
    first = envs.reset(np.array([0, 1]), [3, 5])
    np.testing.assert_array_equal(first[1], alone.reset(seed=5)[0])

    for _ in range(5):  # row 0 plays on its own, and begins again
        envs.step(np.array([0]), rng.uniform(low, high, (1, len(low))).astype(np.float32))
    envs.reset(np.array([0]), [4])

    for _ in range(5):
        action = rng.uniform(low, high).astype(np.float32)
        assert_same(envs.step(np.array([1]), action[None]), [alone.step(action)[:4]])


def test_rows_answer_in_the_order_in_which_they_are_named():
    forth, back = make_envs("Pendulum-v1", 2), make_envs("Pendulum-v1", 2)
    actions = np.float32([[-2], [2]])
    np.testing.assert_array_equal(forth.reset(np.array([0, 1]), [3, 5]), back.reset(np.array([1, 0]), [5, 3])[::-1])
    one, other = forth.step(np.array([0, 1]), actions), back.step(np.array([1, 0]), actions[::-1])
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b[::-1])


@pytest.mark.parametrize("environment", BATCHED)
def test_the_number_of_threads_does_not_matter(environment):
    def played(threads):
        rng = np.random.default_rng(0)
        envs = make_envs(environment, 7, threads)
        rows = np.arange(7)
        seen = [envs.reset(rows, list(range(7)))]
        low, high = envs.action_space.low, envs.action_space.high
        for _ in range(50):
            result = envs.step(rows, rng.uniform(low, high, (7, len(low))).astype(np.float32))
            seen += list(result)
        return seen

    expected = played(1)
    for threads in (2, 5, 16, None):
        for one, other in zip(played(threads), expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_other_environments_are_gymnasiums_own():
    envs, alone = make_envs("Pendulum-v1", ROWS), [gym.make("Pendulum-v1") for _ in range(ROWS)]
    rng, rows = np.random.default_rng(0), np.arange(ROWS)
    assert isinstance(envs, GymnasiumEnvs)
    expected = [env.reset(seed=seed)[0] for env, seed in zip(alone, (5, 6, 7))]
    np.testing.assert_array_equal(envs.reset(rows, [5, 6, 7]), np.array(expected))
    for step in range(1, 201):
        actions = rng.uniform(-2, 2, (ROWS, 1)).astype(np.float32)
        result = envs.step(rows, actions)
        assert_same(result, [env.step(action)[:4] for env, action in zip(alone, actions)])
        assert (result.truncated == (step == 200)).all() and not result.terminated.any()
    np.testing.assert_array_equal(envs.reset(rows[1:2], [9])[0], alone[1].reset(seed=9)[0])
    envs.close()


def test_the_time_limit_is_the_registered_one():
    assert [max_episode_steps(environment) for environment in ("Hopper-v5", "Pendulum-v1")] == [1000, 200]
    assert max_episode_steps("GymV26Environment-v0") is None


@pytest.mark.parametrize("ask", [check_environment, max_episode_steps, lambda name: make_envs(name, 1)])
def test_an_unknown_environment_names_the_near_miss(ask):
    with pytest.raises(UserError) as caught:
        ask("Hoper-v5")
    assert str(caught.value) == "unknown environment 'Hoper-v5'; did you mean 'Hopper-v5'?"


def test_an_unknown_environment_without_a_near_miss_names_some_that_are_known():
    with pytest.raises(UserError) as caught:
        make_envs("zzz", 1)
    message = str(caught.value)
    assert message.startswith("unknown environment 'zzz'; known: ")
    assert "\n" not in message and len(message) <= 400


@pytest.mark.parametrize(
    ("environment", "space"),
    [("CartPole-v1", "action_space Discrete(2)"), ("Taxi-v4", "observation_space Discrete(500)")],
)
def test_spaces_that_are_not_flat_boxes_are_refused(environment, space):
    for ask in (lambda: make_envs(environment, 1), lambda: check_fit(environment, HOPPER, "the checkpoint")):
        with pytest.raises(UserError) as caught:
            ask()
        assert str(caught.value) == f"environment {environment} has {space}; flat Box spaces are needed"


HOPPER = Spaces("Hopper-v5", 11, np.full(3, -1, np.float32), np.full(3, 1, np.float32))


def test_an_environment_that_fits_is_accepted():
    check_fit("Hopper-v5", HOPPER, "the checkpoint")


@pytest.mark.parametrize(("named", "cure"), [("Hopper-v5", "use --environment Hopper-v5"),
                                             ("", "name another --environment")])
def test_an_environment_that_does_not_fit_says_what_both_have(named, cure):
    with pytest.raises(UserError) as caught:
        check_fit("Pendulum-v1", HOPPER._replace(environment=named), "dataset drl/hopper/medium-v0")
    assert str(caught.value) == (
        "dataset drl/hopper/medium-v0 has observations of dimension 11 and actions of dimension 3, "
        f"but Pendulum-v1 has 3 and 1; {cure}"
    )


def test_making_an_environment_says_nothing_of_gymnasiums_own_model_files(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # where MuJoCo would leave MUJOCO_LOG.TXT
    environments._template.cache_clear()  # one of an earlier test would do
    handler = print
    mujoco.set_mju_user_warning(handler)
    try:
        make_envs("HalfCheetah-v5", 2, threads=1).close()
        assert mujoco.get_mju_user_warning() is handler  # warnings of the physics itself are shown as before
    finally:
        mujoco.set_mju_user_warning(None)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
