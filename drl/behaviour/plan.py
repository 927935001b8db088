"""What is played for a dataset: its tiers, who acts for how many steps, and how that is cut into shards.

    random           uniform actions
    medium, expert   one snapshot each, acting stochastically as D4RL's did
    medium-replay    what the agent saw on its way to medium: random steps, then each snapshot for its share
    medium-expert    half and half
"""

import math
from typing import NamedTuple

import numpy as np

from drl.behaviour import actor
from drl.behaviour.actor import RANDOM
from drl.behaviour.play import Shard, longest
from drl.names import parse

MILLION = 1_000_000
REPLAY_STEPS = {"hopper": 400_000, "halfcheetah": 200_000, "walker2d": 300_000}  # D4RL's, rounded
SHARD, LEAST = 50_000, 25_000  # steps of a shard, about, at most and at least: up to three seconds of work
PIECES = 10  # between the two, a shard is this part (a tenth) of all that is still to play


class Work(NamedTuple):
    """A shard, and how many steps the dataset holds once its episodes are in."""

    shard: Shard
    mark: int


def plan(environment: str, tier: str, steps: int) -> list[tuple[str, int]]:
    """Who acts for how many steps, in order: (snapshot or "random", steps); the steps add up to `steps`."""
    tiers = actor.card(environment)["tiers"]
    sources = [(RANDOM, 1)] if tier == "random" else [(entry["snapshot"], entry["share"]) for entry in tiers[tier]]
    shares = np.array([share for _, share in sources], float)
    marks = np.rint(np.cumsum(shares) / shares.sum() * steps).astype(int)
    return [(snapshot, int(share)) for (snapshot, _), share in zip(sources, np.diff(marks, prepend=0), strict=True)]


def size(name: str) -> int:
    """Environment steps of a dataset in D4RL."""
    environment, tier = parse(name)
    return {"medium-replay": REPLAY_STEPS[environment], "medium-expert": 2 * MILLION}.get(tier, MILLION)


def cut(environment: str, shares: list[tuple[str, int]], seed: int) -> list[Work]:
    """Every share cut into shards. They grow smaller towards the end, so that all cores end at about the same time."""
    works, mark, episode = [], 0, longest(environment)
    total = sum(share for _, share in shares)
    for snapshot, share in shares:
        end = mark + share
        while mark < end:
            count = max(1, round((end - mark) / min(SHARD, max(LEAST, (total - mark) // PIECES))))
            # whole episodes of full length: where none ends early, none is played beyond what is asked for
            steps = min(end - mark, math.ceil((end - mark) / count / episode) * episode)
            works.append(Work(Shard(environment, snapshot, len(works), steps, seed), mark + steps))
            mark += steps
    return works
