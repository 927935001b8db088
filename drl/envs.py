"""Environments in lockstep: the only file that has gymnasium make one.

Many copies of one environment advance together; each row answers as one `gymnasium.make` environment would, so a
result does not depend on how many rows there are.

    MujocoEnvs       Hopper-v5, Walker2d-v5, HalfCheetah-v5 on mujoco.batch's threads, bit-identical to Gymnasium
    GymnasiumEnvs    any other id, one environment per row in this process
    ProcessEnvs      the same in a process of its own, which may hang or die (envs_process.py)

Dimension key: n the rows named in a call, O observation, A action.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Protocol

import gymnasium as gym
import numpy as np

from drl.data.store import Spaces
from drl.envs_mujoco import BATCHED, MujocoEnvs, Transition
from drl.errors import UserError, did_you_mean
from drl.faults import Fault


class Envs(Protocol):
    """Rows of one environment. A row begins with `reset` and is stepped only while its episode lasts.

    The rows of a call are distinct and ascending.
    """

    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box
    row: int | None  # the one that is being answered for; None: all at once
    apart: bool  # whether `close` ends a call that is under way, in another thread

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
        return MujocoEnvs(_template(environment), count, threads or len(os.sched_getaffinity(0)))
    return GymnasiumEnvs(environment, count)


def check_environment(environment: str) -> None:
    """Raises UserError unless Gymnasium knows the id."""
    if environment not in gym.registry:
        raise UserError(f"unknown environment {environment!r}; {did_you_mean(environment, gym.registry)}"[:400])


def check_fit(environment: str, spaces: Spaces, whose: str) -> None:
    """Raises UserError unless the environment is known and takes and gives what `spaces`, of `whose`, says."""
    with contextlib.closing(make_envs(environment, 1, 1)) as envs:
        check_spaces(envs, environment, spaces, whose)


def check_spaces(envs: Envs, environment: str, spaces: Spaces, whose: str) -> None:
    """`check_fit` of environments that are made."""
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


def described(environment: str) -> str | None:
    """How an environment is registered, for `register` of another process; None where JSON does not say all of it."""
    spec = gym.registry[environment]
    with contextlib.suppress(TypeError, ValueError):  # what is no text: an entry point, an argument
        text = spec.to_json()
        return text if gym.envs.registration.EnvSpec.from_json(text) == spec else None


def register(description: str) -> str:
    """Register an environment as it is `described`; returns its id. Raises ImportError where its code is not here."""
    spec = gym.envs.registration.EnvSpec.from_json(description)
    try:
        gym.envs.registration.load_env_creator(spec.entry_point)
    except AttributeError as error:
        raise ImportError(str(error)) from error
    gym.registry[spec.id] = spec
    return spec.id


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
    """One Gymnasium environment per row; rows that are not named are not stepped.

    Attributes:
        at: what `row` is, (1,) int: an array, so that another process may look at it.

    Raises:
        Fault: by `reset` and `step`: an observation or a reward is not finite, or not of its shape.
    """

    apart = False

    def __init__(self, environment: str, count: int):
        self._envs = [_make(environment) for _ in range(count)]
        self.observation_space, self.action_space = self._envs[0].observation_space, self._envs[0].action_space
        self.at = np.zeros(1, int)

    @property
    def row(self) -> int:
        return int(self.at[0])

    def reset(self, rows: np.ndarray, seeds: list[int]) -> np.ndarray:
        observations = self._room(rows)
        for place, row, seed in zip(observations, rows, seeds, strict=True):
            self.at[0] = row
            observation, _ = self._envs[row].reset(seed=int(seed))
            place[:] = _shaped("an observation", observation, place.shape)
        self._check_finite("an observation", rows, observations)
        return observations

    def step(self, rows: np.ndarray, actions: np.ndarray) -> Transition:
        answer = Transition(self._room(rows), np.empty(len(rows)), *np.empty((2, len(rows)), bool))
        for i, (row, action) in enumerate(zip(rows, actions, strict=True)):
            self.at[0] = row
            observation, reward, answer.terminated[i], answer.truncated[i], _ = self._envs[row].step(action)
            answer.observations[i] = _shaped("an observation", observation, self.observation_space.shape)
            answer.rewards[i] = _shaped("a reward", reward, ())
        self._check_finite("an observation", rows, answer.observations)
        self._check_finite("a reward", rows, answer.rewards[:, None])
        return answer

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _room(self, rows: np.ndarray) -> np.ndarray:
        return np.empty((len(rows), *self.observation_space.shape))

    def _check_finite(self, name: str, rows: np.ndarray, given: np.ndarray) -> None:
        finite = np.isfinite(given)
        if not finite.all():
            bad = np.flatnonzero(~finite.all(1))[0]
            self.at[0] = rows[bad]
            raise Fault(f"answered with {name} that is not finite, {given[bad][~finite[bad]][0]},")


def _shaped(name: str, given, shape: tuple[int, ...]):
    if np.shape(given) != shape:
        raise Fault(f"answered with {name} of shape {np.shape(given)} instead of {shape}")
    return given
