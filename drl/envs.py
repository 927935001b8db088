"""Environments in lockstep: the only file that imports gymnasium's environments and mujoco.

Many copies of one environment advance together; each row answers as one `gymnasium.make` environment would, so a
result does not depend on how many rows there are.

    MujocoEnvs       Hopper-v5, Walker2d-v5, HalfCheetah-v5 on mujoco.batch's threads, bit-identical to Gymnasium
    GymnasiumEnvs    any other id, one environment per row in this process

Dimension key: n the rows named in a call, O observation, A action.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import gymnasium as gym
import numpy as np

from drl.data.store import Spaces
from drl.errors import UserError, did_you_mean

ALL = slice(None)
BATCHED = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5")


class Transition(NamedTuple):
    """What a step gives: observations (n, O) and rewards (n,) float64, terminated and truncated (n,) bool."""

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class Envs(Protocol):
    """Rows of one environment. A row begins with `reset` and is stepped only while its episode lasts.

    The rows of a call are distinct and ascending.
    """

    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box

    def reset(self, rows: np.ndarray, seeds: list[int]) -> np.ndarray: ...

    def step(self, rows: np.ndarray, actions: np.ndarray) -> Transition: ...

    def close(self) -> None: ...


def make_envs(environment: str, count: int, threads: int | None = None) -> Envs:
    """`count` rows of a Gymnasium environment.

    Args:
        environment: Gymnasium id.
        count: rows.
        threads: for the physics where it is batched; None: all cores. Changes the speed only.

    Raises:
        UserError: the id is unknown, or its spaces are not flat Boxes.
    """
    check_environment(environment)
    if environment in BATCHED:
        return MujocoEnvs(environment, count, threads or len(os.sched_getaffinity(0)))
    return GymnasiumEnvs(environment, count)


def check_environment(environment: str) -> None:
    """Raises UserError unless Gymnasium knows the id."""
    if environment not in gym.registry:
        raise UserError(f"unknown environment {environment!r}; {did_you_mean(environment, gym.registry)}"[:400])


def check_fit(environment: str, spaces: Spaces, whose: str) -> None:
    """Raises UserError unless the environment is known and takes and gives what `spaces`, of `whose`, says."""
    with contextlib.closing(make_envs(environment, 1, 1)) as envs:
        found = (envs.observation_space.shape[0], envs.action_space.shape[0])
    if found != (spaces.observation_dim, spaces.action_dim):
        cure = f"use --environment {spaces.environment}" if spaces.environment else "name another --environment"
        raise UserError(
            f"{whose} has observations of dimension {spaces.observation_dim} and actions of dimension "
            f"{spaces.action_dim}, but {environment} has {found[0]} and {found[1]}; {cure}"
        )


def max_episode_steps(environment: str) -> int | None:
    """The registered time limit of an environment, in steps; None: it has none."""
    check_environment(environment)
    return gym.spec(environment).max_episode_steps


def _make(environment: str) -> gym.Env:
    try:
        with quiet(environment):
            env = gym.make(environment)
    except gym.error.DependencyNotInstalled as error:
        raise UserError(f"environment {environment} needs a package that is missing: {error}") from error
    for name in ("observation_space", "action_space"):
        space = getattr(env, name)
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise UserError(f"environment {environment} has {name} {space}; flat Box spaces are needed")
    return env


@functools.cache
def _template(environment: str) -> gym.Env:
    """One for all, to be asked for its model and constants and never stepped: making one takes as long as a hundred
    steps."""
    return _make(environment)


@contextlib.contextmanager
def quiet(environment: str) -> Iterator[None]:
    """Keep MuJoCo from warning, on stderr and in ./MUJOCO_LOG.TXT, of what stands in Gymnasium's own model files.

    For whoever has a Gymnasium environment made, while it is made: what MuJoCo says of the physics is to be seen.
    """
    if environment not in BATCHED:
        yield
        return
    import mujoco

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


class GymnasiumEnvs:
    """One Gymnasium environment per row; rows that are not named are not stepped."""

    def __init__(self, environment: str, count: int):
        self._envs = [_make(environment) for _ in range(count)]
        self.observation_space, self.action_space = self._envs[0].observation_space, self._envs[0].action_space

    def reset(self, rows: np.ndarray, seeds: list[int]) -> np.ndarray:
        return np.stack([self._envs[row].reset(seed=int(seed))[0] for row, seed in zip(rows, seeds, strict=True)])

    def step(self, rows: np.ndarray, actions: np.ndarray) -> Transition:
        results = [self._envs[row].step(action)[:4] for row, action in zip(rows, actions, strict=True)]
        return Transition(*(np.asarray(column) for column in zip(*results)))

    def close(self) -> None:
        for env in self._envs:
            env.close()


class MujocoEnvs:
    """The three locomotion environments of Gymnasium v5 on mujoco.batch.

    Constants come from the Gymnasium environment itself, and the order of every sum is the one that it uses: that
    is what makes the bits equal (tests/test_envs.py compares them).

    Attributes:
        physics_seconds: processor time of the calling thread in MuJoCo so far, stepping and restarting: where it is the
            only one, the floor of any roll-out.
        physics_steps: environment steps made there, all rows counted.
    """

    def __init__(self, environment: str, count: int, threads: int):
        from mujoco.batch import Batch

        env = _template(environment)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._env, self._kind = env.unwrapped, environment.partition("-")[0]
        self._limit, self._dt = env.spec.max_episode_steps, self._env.dt
        self._batch = Batch(self._env.model, nsim=count, nthread=min(threads, count))
        self._qpos, self._qvel, self._ctrl = (self._batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._steps = np.zeros(count, int)
        self._weights = self._env._forward_reward_weight, self._env._ctrl_cost_weight
        if self._kind != "HalfCheetah":
            self._low, self._high = _healthy_range(self._env, self._kind)
        self.physics_seconds, self.physics_steps = 0.0, 0

    def reset(self, rows: np.ndarray, seeds: list[int]) -> np.ndarray:
        env, scale = self._env, self._env._reset_noise_scale
        with self._timed():
            self._batch.reset(ids=rows)
        for row, seed in zip(rows, seeds, strict=True):
            generator, _ = gym.utils.seeding.np_random(int(seed))
            self._qpos[row] = env.init_qpos + generator.uniform(-scale, scale, env.model.nq)
            if self._kind == "HalfCheetah":
                noise = scale * generator.standard_normal(env.model.nv)
            else:
                noise = generator.uniform(-scale, scale, env.model.nv)
            self._qvel[row] = env.init_qvel + noise
        self._steps[rows] = 0
        with self._timed():
            self._batch.forward(ids=rows)
        state = self._state(rows)
        return state if self._kind == "HalfCheetah" else self._clipped(state)

    def step(self, rows: np.ndarray, actions: np.ndarray) -> Transition:
        which = self._which(rows)
        before = self._qpos[which, 0].copy()
        self._ctrl[which] = actions
        with self._timed():
            self._batch.step(ids=None if which is ALL else rows, nstep=self._env.frame_skip)
        self.physics_steps += len(rows)
        self._steps[which] += 1
        truncated = self._steps[which] >= self._limit
        state = self._state(which)
        forward_weight, cost_weight = self._weights
        forward = forward_weight * ((self._qpos[which, 0] - before) / self._dt)
        cost = cost_weight * np.square(actions).sum(axis=1)
        if self._kind == "HalfCheetah":
            return Transition(state, forward - cost, np.zeros(len(rows), bool), truncated)
        judged = state[:, : len(self._low)]
        healthy = ((self._low < judged) & (judged < self._high)).all(axis=1)
        reward = forward + healthy * self._env._healthy_reward - cost
        return Transition(self._clipped(state), reward, ~healthy, truncated)

    def close(self) -> None:
        """Nothing is held that others do not use."""

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.thread_time()
        yield
        self.physics_seconds += time.thread_time() - began

    def _which(self, rows: np.ndarray) -> np.ndarray | slice:
        """All rows without a copy, which is the usual case."""
        return ALL if len(rows) == len(self._steps) else rows

    def _state(self, which: np.ndarray | slice) -> np.ndarray:
        """Positions without the first, then velocities."""
        return np.concatenate([self._qpos[which, 1:], self._qvel[which]], axis=1)

    def _clipped(self, state: np.ndarray) -> np.ndarray:
        """The observation of Hopper and Walker2d, in place of the state."""
        velocity = state[:, self._qpos.shape[1] - 1 :]
        np.minimum(np.maximum(velocity, -10, out=velocity), 10, out=velocity)
        return state


def _healthy_range(env, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Bounds, exclusive, within which the first channels of a healthy state lie: all of Hopper's, two of Walker2d's."""
    ranges = [env._healthy_z_range, env._healthy_angle_range]
    if kind == "Hopper":
        low, high = env._healthy_state_range
        ranges = [ranges[0], (max(low, ranges[1][0]), min(high, ranges[1][1]))]
        ranges += [(low, high)] * (env.observation_space.shape[0] - 2)
    return tuple(np.array(ranges).T)
