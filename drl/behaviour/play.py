"""Play a shard: whole episodes by one behaviour policy, in numpy and physics alone, on one thread.

Everything that is random in episode e of shard s comes from (seed, s, e), and a shard is always played in the same
rows, so its data do not depend on which core plays it.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from drl.behaviour.actor import actor, card
from drl.envs import Envs, make_envs, max_episode_steps

RANDOM = "random"  # the snapshot that acts uniformly
ROWS = 8  # environments stepped side by side


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of work: at least `steps` steps of whole episodes by one behaviour policy."""

    environment: str
    snapshot: str
    number: int
    steps: int
    seed: int


class Recorded(NamedTuple):
    """One episode: observations (T+1, O), actions (T, A), rewards (T,), and how it ended."""

    seed: int
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def play(shard: Shard) -> list[Recorded]:
    """Episodes 0, 1, 2, ... of a shard, as few as have `shard.steps` steps together."""
    env_id = card(shard.environment)["environment"]
    envs = make_envs(env_id, ROWS, threads=1)
    horizon = max_episode_steps(env_id)
    rows: list[_Row | None] = [_begin(envs, shard, row, row, horizon) for row in range(ROWS)]
    done: dict[int, Recorded] = {}
    begun = ROWS
    while not _reach(shard.steps, {number: len(episode.actions) for number, episode in done.items()}):
        ended = False
        while not ended:
            active = np.array([i for i, row in enumerate(rows) if row is not None])
            observations = np.zeros((ROWS, *envs.observation_space.shape))
            noise = np.zeros((ROWS, *envs.action_space.shape), np.float32)
            for i in active:
                observations[i], noise[i] = rows[i].observations[-1], rows[i].noise[len(rows[i].actions)]
            # all rows, playing or not: a matrix product of one shape gives the same bits whoever plays
            actions = _act(shard, envs, observations, noise)
            result = envs.step(active, actions[active])
            for j, i in enumerate(active):
                rows[i].observations.append(result.observations[j])
                rows[i].actions.append(actions[i])
                rows[i].rewards.append(result.rewards[j])
                if result.terminated[j] or result.truncated[j]:
                    done[rows[i].number] = rows[i].record(bool(result.terminated[j]))
                    rows[i], ended = None, True
        for i in (i for i, row in enumerate(rows) if row is None):
            lengths = {number: len(episode.actions) for number, episode in done.items()}
            lengths |= {row.number: len(row.actions) for row in rows if row is not None}
            if not _reach(shard.steps, lengths):  # what is begun already cannot be enough yet
                rows[i] = _begin(envs, shard, i, begun, horizon)
                begun += 1
    envs.close()
    return [done[number] for number in range(_reach(shard.steps, {n: len(e.actions) for n, e in done.items()}))]


def _reach(steps: int, lengths: dict[int, int]) -> int:
    """How many of episodes 0, 1, 2, ... have `steps` steps together; 0 if those known do not."""
    total = 0
    for number in range(len(lengths)):
        if number not in lengths:
            return 0
        total += lengths[number]
        if total >= steps:
            return number + 1
    return 0


@dataclasses.dataclass
class _Row:
    """An episode being played."""

    number: int
    seed: int
    noise: np.ndarray
    observations: list[np.ndarray]
    actions: list[np.ndarray] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)

    def record(self, terminated: bool) -> Recorded:
        arrays = (np.asarray(part) for part in (self.observations, self.actions, self.rewards))
        return Recorded(self.seed, *arrays, terminated)


def _begin(envs: Envs, shard: Shard, row: int, number: int, horizon: int) -> _Row:
    generator = np.random.default_rng([shard.seed, shard.number, number])
    seed = int(generator.integers(2**31))
    shape = (horizon, *envs.action_space.shape)
    noise = generator.uniform(-1, 1, shape) if shard.snapshot == RANDOM else generator.standard_normal(shape)
    return _Row(number, seed, noise.astype(np.float32), [envs.reset(np.array([row]), [seed])[0]])


def _act(shard: Shard, envs: Envs, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
    low, high = envs.action_space.low, envs.action_space.high
    unit = noise
    if shard.snapshot != RANDOM:
        unit = actor(shard.environment, shard.snapshot).act(observations, noise)
    return np.clip(low + (unit + 1) * ((high - low) / 2), low, high)
