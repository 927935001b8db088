"""Played shards on disk, so that a collection that is stopped goes on where it stopped.

A piece is an .npz file, whole or absent: its name is given to it last, and the checksums of the zip format find what
was damaged since.
"""

import math
import os
import zipfile
from pathlib import Path

import numpy as np

from drl.behaviour import actor
from drl.behaviour.play import Shard, physics, play
from drl.data.store import Recorded


def piece_path(folder: Path, shard: Shard) -> Path:
    return folder / f"piece-{shard.number:06d}.npz"


def episode_count(shard: Shard) -> int:
    """How many episodes a shard has, about."""
    return math.ceil(shard.steps / actor.length_mean(shard.environment, shard.snapshot))


def size(shard: Shard) -> int:
    """About the bytes of a piece; its last episode goes on for some steps more."""
    observation_dim, action_dim = actor.dimensions(shard.environment)
    step = 8 * observation_dim + 4 * action_dim + 8
    return shard.steps * step + episode_count(shard) * (8 * observation_dim + 8 + 8 + 1)


def make(shard: Shard, folder: Path) -> np.ndarray:
    """Play a shard and keep its episodes in `folder`. Returns what it took of `physics`, (2,)."""
    before = physics(shard.environment)
    episodes = play(shard)
    path = piece_path(folder, shard)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        np.savez(
            file,
            seeds=[episode.seed for episode in episodes],
            lengths=[len(episode.actions) for episode in episodes],
            terminated=[episode.terminated for episode in episodes],
            observations=np.concatenate([episode.observations for episode in episodes]),
            actions=np.concatenate([episode.actions for episode in episodes]),
            rewards=np.concatenate([episode.rewards for episode in episodes]),
        )
    os.replace(partial, path)
    return physics(shard.environment) - before


def read(shard: Shard, folder: Path) -> list[Recorded] | None:
    """The episodes of a shard; None where its piece is missing or damaged."""
    try:
        with piece_path(folder, shard).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            piece = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    ends = np.cumsum(piece["lengths"])
    actions, rewards = (np.split(piece[name], ends[:-1]) for name in ("actions", "rewards"))
    observations = np.split(piece["observations"], (ends + np.arange(1, len(ends) + 1))[:-1])
    return [
        Recorded(int(seed), *arrays, bool(terminated))
        for seed, terminated, *arrays in zip(
            piece["seeds"], piece["terminated"], observations, actions, rewards, strict=True
        )
    ]
