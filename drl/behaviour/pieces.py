"""Played shards on disk, so that a collection that is stopped goes on where it stopped.

A piece is an .npz file behind the SHA-256 of its bytes, whole or absent: its name is given to it last. One that was
damaged since is as good as none, and nothing of it is parsed: zip's own checksums would let some flipped bits through.
"""

import hashlib
import io
import math
import os
from pathlib import Path

import numpy as np

from drl.behaviour import actor
from drl.behaviour.play import Shard, physics, play
from drl.data.store import Recorded

SUFFIX = ".piece"
DIGEST = hashlib.sha256().digest_size  # bytes


def piece_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.number:06d}{SUFFIX}"


def episode_count(shard: Shard) -> int:
    """How many episodes a shard has, about."""
    return math.ceil(shard.steps / actor.length_mean(shard.environment, shard.snapshot))


def size(shard: Shard) -> int:
    """About the bytes of a piece; its last episode goes on for some steps more."""
    observation_dim, action_dim = actor.dimensions(shard.environment)
    step = 8 * observation_dim + 4 * action_dim + 8
    return shard.steps * step + episode_count(shard) * (8 * observation_dim + 8 + 8 + 1)


def make(shard: Shard, folder: Path) -> np.ndarray:
    """Play a shard and keep its episodes in `folder`. Returns what it took of `physics`, (2,).

    Raises:
        OSError: the folder cannot be written; nothing is left there.
    """
    before = physics(shard.environment)
    episodes = play(shard)
    file = io.BytesIO()  # in memory: what is written to a full disk is plain bytes, which fail plainly
    np.savez(
        file,
        seeds=[episode.seed for episode in episodes],
        lengths=[len(episode.actions) for episode in episodes],
        terminated=[episode.terminated for episode in episodes],
        observations=np.concatenate([episode.observations for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate([episode.rewards for episode in episodes]),
    )
    content = file.getvalue()
    path = piece_path(folder, shard)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(hashlib.sha256(content).digest() + content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return physics(shard.environment) - before


def read(shard: Shard, folder: Path) -> list[Recorded] | None:
    """The episodes of a shard; None where its piece is missing or damaged."""
    try:
        content = piece_path(folder, shard).read_bytes()
    except OSError:
        return None
    digest, content = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        piece = {name: arrays[name] for name in arrays.files}
    ends = np.cumsum(piece["lengths"])
    actions, rewards = (np.split(piece[name], ends[:-1]) for name in ("actions", "rewards"))
    observations = np.split(piece["observations"], (ends + np.arange(1, len(ends) + 1))[:-1])
    return [
        Recorded(int(seed), *arrays, bool(terminated))
        for seed, terminated, *arrays in zip(
            piece["seeds"], piece["terminated"], observations, actions, rewards, strict=True
        )
    ]
