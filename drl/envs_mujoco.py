"""The three locomotion environments of Gymnasium v5, all rows at once on mujoco.batch.

Dimension key: n the rows named in a call, O observation, A action.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import gymnasium as gym
import numpy as np

ALL = slice(None)
BATCHED = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5")


class Transition(NamedTuple):
    """What a step gives: observations (n, O) and rewards (n,) float64, terminated and truncated (n,) bool."""

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class MujocoEnvs:
    """`count` rows of what `env` is one of.

    Constants come from the Gymnasium environment itself, and the order of every sum is the one that it uses: that
    is what makes the bits equal (tests/test_envs.py compares them).

    Attributes:
        physics_seconds: processor time of the calling thread in MuJoCo so far, stepping and restarting: where it is the
            only one, the floor of any roll-out.
        physics_steps: environment steps made there, all rows counted.
    """

    row, apart = None, False

    def __init__(self, env: gym.Env, count: int, threads: int):
        """`env`: Gymnasium's own, one of BATCHED, asked for its model and constants and never stepped."""
        from mujoco.batch import Batch

        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._env, self._kind = env.unwrapped, env.spec.id.partition("-")[0]
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
