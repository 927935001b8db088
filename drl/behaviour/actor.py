"""The shipped SAC actors, read from package data and run in numpy.

    <env>.safetensors   every snapshot's weights, float32, "<snapshot>/<layer>.<weight|bias>"
    <env>.json          the card: how they were trained, each snapshot's return, which tiers use which

Made by scripts/train_behaviour.py. Acting is numpy alone: a = tanh(mean(s) + std(s) * noise), scaled to the action
box (Haarnoja et al. 2018, arXiv 1812.05905, appendix C).
"""

import functools
import hashlib
import json
from importlib import resources
from typing import Any

import numpy as np
from safetensors.numpy import load

from drl.errors import UserError, did_you_mean

RANDOM = "random"  # the snapshot that acts uniformly
LOG_STD_RANGE = (-20.0, 2.0)  # SBX's clip, part of the policy that was trained


class Actor:
    """One snapshot: a tanh-Gaussian policy with two hidden ReLU layers.

    Args:
        weights: "hidden_0", "hidden_1", "mean" and "log_std", each with ".weight" (in, out) and ".bias" (out,).
    """

    def __init__(self, weights: dict[str, np.ndarray]):
        self._weights = weights

    def act(self, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1], (n, A) float32, for observations (n, O) and standard normal noise (n, A)."""
        hidden = observations.astype(np.float32)
        for layer in ("hidden_0", "hidden_1"):
            hidden = np.maximum(self._affine(layer, hidden), 0)
        log_std = np.clip(self._affine("log_std", hidden), *LOG_STD_RANGE)
        return np.tanh(self._affine("mean", hidden) + np.exp(log_std) * noise.astype(np.float32))

    def _affine(self, layer: str, x: np.ndarray) -> np.ndarray:
        return x @ self._weights[f"{layer}.weight"] + self._weights[f"{layer}.bias"]


def environments() -> list[str]:
    """Short names of the environments whose behaviour policies are shipped, e.g. "hopper"."""
    return sorted(path.name.removesuffix(".json") for path in _files().iterdir() if path.name.endswith(".json"))


@functools.cache
def card(environment: str) -> dict[str, Any]:
    """What is known of an environment's snapshots.

    Raises:
        UserError: none are shipped for it.
    """
    if environment not in environments():
        raise UserError(f"no behaviour policies for {environment!r}; {did_you_mean(environment, environments())}")
    return json.loads((_files() / f"{environment}.json").read_text())


@functools.cache
def actor(environment: str, snapshot: str) -> Actor:
    """A shipped snapshot, e.g. actor("hopper", "step-00250000")."""
    prefix = snapshot + "/"
    weights = load((_files() / f"{environment}.safetensors").read_bytes())
    return Actor({name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)})


def length_mean(environment: str, snapshot: str) -> float:
    """Steps of an episode that a snapshot plays, about."""
    return 20.0 if snapshot == RANDOM else card(environment)["snapshots"][snapshot]["length_mean"]


def dimensions(environment: str) -> tuple[int, int]:
    """Of observations and of actions, as the shipped actors take and give them."""
    weights = load((_files() / f"{environment}.safetensors").read_bytes())
    return tuple(
        len(next(value for name, value in weights.items() if name.endswith(layer)))
        for layer in ("hidden_0.weight", "mean.bias")
    )


def fingerprint(environment: str) -> str:
    """SHA-256 of the shipped weights and their card, hexadecimal."""
    digest = hashlib.sha256()
    for suffix in ("safetensors", "json"):
        digest.update((_files() / f"{environment}.{suffix}").read_bytes())
    return digest.hexdigest()


def _files():
    return resources.files("drl.behaviour")
