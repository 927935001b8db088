"""Collection: roll the behaviour policies out into a local Minari dataset, D4RL-style.

    random           uniform actions
    medium, expert   one snapshot each, acting stochastically as D4RL's did
    medium-replay    what the agent saw on its way to medium: random steps, then each snapshot for its share
    medium-expert    half and half

The plan is a list of shards, small enough to share among cores. Everything that is random in episode e of shard s
comes from (seed, s, e), and a shard is always played in the same rows: the same seed gives the same data on any
number of cores. Only whole episodes are kept: as few as reach the steps asked for.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from drl import scores
from drl.behaviour import actor
from drl.behaviour.play import RANDOM, Recorded, Shard, play
from drl.data import minari_files
from drl.errors import UserError, did_you_mean
from drl.progress import progress
from drl.versions import versions

TIERS = {  # steps, as D4RL's for Hopper
    "random": 1_000_000,
    "medium": 1_000_000,
    "medium-replay": 400_000,
    "medium-expert": 2_000_000,
    "expert": 1_000_000,
}
SHARD = 25_000  # steps: about two seconds of work


def collect(name: str, *, steps: int | None = None, seed: int = 0, overwrite: bool = False) -> Path:
    """Make the dataset drl/<name>-v0. Returns its folder.

    Args:
        name: "<env>/<tier>", e.g. "hopper/medium-replay".
        steps: at least so many environment steps; None: D4RL's size.
        seed: of everything random.
        overwrite: replace a dataset of this id.

    Raises:
        UserError: the name is unknown, or the dataset exists and may not be replaced.
    """
    environment, tier = _parse(name)
    dataset_id = f"drl/{environment}/{tier}-v0"
    if dataset_id in minari_files.local_ids() and not overwrite:
        raise UserError(f"dataset {dataset_id} exists already; add --overwrite to collect it anew")
    steps = TIERS[tier] if steps is None else steps
    if steps < 1:
        raise UserError(f"--steps must be positive, got {steps}")
    shares = plan(environment, tier, steps)
    card = actor.card(environment)
    env_id = card["environment"]
    episodes = _gather(shares, environment, steps, seed)
    buffers = [minari_files.buffer(number, *episode) for number, episode in enumerate(episodes)]
    return minari_files.write(
        dataset_id,
        buffers,
        environment=env_id,
        algorithm=card["algorithm"] if tier != "random" else "uniform actions",
        reference=scores.reference(env_id),
        description=f"Regenerated, D4RL-style {environment} {tier} data: roll-outs of the behaviour policies that the "
        "package drl ships. Not D4RL's own files.",
        extra={
            "reference_source": scores.REFERENCE_SOURCE,
            "collection_seed": seed,
            "behaviour": [{"snapshot": snapshot, "steps": share} for snapshot, share in shares],
            "versions": versions(),
        },
    )


def plan(environment: str, tier: str, steps: int) -> list[tuple[str, int]]:
    """Who acts for how many steps, in order: (snapshot or "random", steps); the steps add up to `steps`."""
    tiers = actor.card(environment)["tiers"]
    sources = [(RANDOM, 1)] if tier == "random" else [(entry["snapshot"], entry["share"]) for entry in tiers[tier]]
    shares = np.array([share for _, share in sources], float)
    marks = np.rint(np.cumsum(shares) / shares.sum() * steps).astype(int)
    return [(snapshot, int(share)) for (snapshot, _), share in zip(sources, np.diff(marks, prepend=0), strict=True)]


def names() -> list[str]:
    """Every "<env>/<tier>" that can be collected."""
    return [f"{environment}/{tier}" for environment in actor.environments() for tier in TIERS]


def _parse(name: str) -> tuple[str, str]:
    environment, _, tier = name.partition("/")
    if name not in names():
        raise UserError(f"unknown dataset {name!r}; {did_you_mean(name, names())}")
    return environment, tier


def _gather(shares: list[tuple[str, int]], environment: str, steps: int, seed: int) -> list[Recorded]:
    """Play every share on all cores; of each take whole episodes, in order, until its mark is reached."""
    shards, marks, total = [], [], 0
    for snapshot, share in shares:
        pieces = max(1, round(share / SHARD))
        for mark in np.rint(np.linspace(0, share, pieces + 1)).astype(int)[1:]:
            previous = marks[-1] if marks else 0
            marks.append(total + int(mark))
            shards.append(Shard(environment, snapshot, len(shards), marks[-1] - previous, seed))
        total += share
    episodes, kept = [], 0
    with progress(steps, "step", f"collecting {environment}") as bar:
        for mark, shard_episodes in zip(marks, _play_all(shards), strict=True):
            for episode in shard_episodes:
                if kept >= mark:  # the shard before overshot by part of an episode
                    break
                episodes.append(episode)
                kept += len(episode.actions)
                bar.update(len(episode.actions))
    return episodes


def _play_all(shards: list[Shard]) -> Iterator[list[Recorded]]:
    workers = min(len(os.sched_getaffinity(0)), len(shards))
    if workers == 1:
        yield from map(play, shards)
        return
    # spawned, not forked: threads of torch and mujoco in this process would not survive a fork
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(play, shards)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
