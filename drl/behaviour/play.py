"""Play a shard: whole episodes by one behaviour policy, in numpy and physics alone, on one thread.

Everything random in shard s comes from (seed, s): the seeds of the resets, in the order of the episodes, and the noise
of the actions, of every row at every tick. Which row plays which episode depends on the physics alone, so a shard's
data do not depend on which core plays it, nor on how many others there are.
"""

import dataclasses
import functools
import math

import numpy as np

from drl.behaviour import rounding
from drl.behaviour.actor import RANDOM, actor, card, length_mean
from drl.data.store import Recorded
from drl.envs import Envs, make_envs, max_episode_steps

ROWS = 50  # environments stepped side by side: a shard of 50,000 steps is one long episode in each


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of work: at least `steps` steps of whole episodes by one behaviour policy."""

    environment: str
    snapshot: str
    number: int
    steps: int
    seed: int


def play(shard: Shard) -> list[Recorded]:
    """Episodes 0, 1, 2, ... of a shard, as few as have `shard.steps` steps together."""
    with rounding.on_one_thread():
        return _Player(shard).play()


def physics(environment: str) -> np.ndarray:
    """Processor time, in seconds, and environment steps that this process has spent in MuJoCo, (2,)."""
    envs = _envs(environment)
    return np.array([envs.physics_seconds, envs.physics_steps])


def longest(environment: str) -> int:
    """Steps of an episode at most: every environment that has behaviour policies has a time limit."""
    return max_episode_steps(card(environment)["environment"])


class _Player:
    """Rows of one environment, each playing an episode; what they see and do is kept tick by tick."""

    def __init__(self, shard: Shard):
        self.shard = shard
        self.envs = _envs(shard.environment)
        self.longest = longest(shard.environment)
        self.seeds, self.noise = (np.random.default_rng([shard.seed, shard.number, part]) for part in range(2))
        self.low, self.high = self.envs.action_space.low, self.envs.action_space.high
        self.half = (self.high - self.low) / 2
        observation_dim, action_dim = self.envs.observation_space.shape[0], self.envs.action_space.shape[0]
        self.observations = np.zeros((1024, ROWS, observation_dim))
        self.actions = np.zeros((1024, ROWS, action_dim), np.float32)
        self.rewards = np.zeros((1024, ROWS))
        self.tick = 0
        self.number = np.full(ROWS, -1)  # of the episode that a row plays; -1: none
        self.reset_seed = np.zeros(ROWS, np.int64)
        self.since = np.zeros(ROWS, int)  # the tick at which it began
        self.begun = 0
        self.ended_steps = 0
        self.done: dict[int, Recorded] = {}

    def play(self) -> list[Recorded]:
        whole: list[Recorded] = []  # episodes 0, 1, 2, ... as far as all of them have ended
        steps = 0
        while steps < self.shard.steps:
            self._begin()
            self._step()
            while steps < self.shard.steps and len(whole) in self.done:
                whole.append(self.done.pop(len(whole)))
                steps += len(whole[-1].actions)
        return whole

    def _begin(self) -> None:
        """Give idle rows the next episodes, as many as are likely to be needed: the physics of an episode that is
        not kept is lost."""
        idle = np.flatnonzero(self.number < 0)
        if not len(idle):
            return
        # the rest of an episode is taken to be as long as a whole one: those that fall early tell little of the others
        mean = length_mean(self.shard.environment, self.shard.snapshot)
        age = self.tick - self.since[self.number >= 0]
        under_way = np.minimum(age + mean, np.maximum(age, self.longest)).sum()
        missing = self.shard.steps - self.ended_steps - under_way
        idle = idle[: max(0, math.ceil(missing / mean))]
        if not len(idle):
            return
        self.number[idle] = self.begun + np.arange(len(idle))
        self.since[idle] = self.tick
        self.begun += len(idle)
        self.reset_seed[idle] = self.seeds.integers(2**31, size=len(idle))
        self.observations[self.tick, idle] = self.envs.reset(idle, self.reset_seed[idle])

    def _step(self) -> None:
        """One tick of every row that plays."""
        t = self.tick
        if t + 1 == len(self.observations):
            self.observations, self.actions, self.rewards = (
                np.concatenate([array, np.zeros_like(array)])
                for array in (self.observations, self.actions, self.rewards)
            )
        # all rows, playing or not: a matrix product of one shape gives the same bits whoever plays
        self._act(self.observations[t], self.actions[t])
        active = np.flatnonzero(self.number >= 0)
        result = self.envs.step(active, self.actions[t, active])
        self.observations[t + 1, active] = result.observations
        self.rewards[t, active] = result.rewards
        self.tick = t + 1
        ended = np.flatnonzero(result.terminated | result.truncated)
        for row, terminated in zip(active[ended], result.terminated[ended]):
            span = slice(self.since[row], t + 1)
            self.done[int(self.number[row])] = Recorded(
                int(self.reset_seed[row]),
                self.observations[self.since[row] : t + 2, row].copy(),
                self.actions[span, row].copy(),
                self.rewards[span, row].copy(),
                bool(terminated),
            )
            self.number[row] = -1
        self.ended_steps += int((t + 1 - self.since[active[ended]]).sum())

    def _act(self, observations: np.ndarray, actions: np.ndarray) -> None:
        """Fill in `actions`, in the units of the environment."""
        if self.shard.snapshot == RANDOM:
            unit = 2 * self.noise.random(actions.shape, np.float32)
            unit -= 1
        else:
            policy = actor(self.shard.environment, self.shard.snapshot)
            unit = policy.act(observations, self.noise.standard_normal(actions.shape, np.float32))
        unit += 1
        unit *= self.half
        unit += self.low
        np.minimum(np.maximum(unit, self.low, out=actions), self.high, out=actions)


@functools.cache
def _envs(environment: str) -> Envs:
    """Made once in a process: a model takes longer to load than a thousand steps."""
    return make_envs(card(environment)["environment"], ROWS, threads=1)
