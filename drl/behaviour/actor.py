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
from drl.names import environments

RANDOM = "random"  # the snapshot that acts uniformly
LAYERS = ("hidden_0", "hidden_1", "mean", "log_std")
LOG_STD_RANGE = (-20.0, 2.0)  # SBX's clip, part of the policy that was trained


class Actor:
    """One snapshot: a tanh-Gaussian policy with two hidden ReLU layers.

    Args:
        weights: "hidden_0", "hidden_1", "mean" and "log_std", each with ".weight" (in, out) and ".bias" (out,).
    """

    def __init__(self, weights: dict[str, np.ndarray]):
        self._layers = [(weights[f"{layer}.weight"], weights[f"{layer}.bias"]) for layer in LAYERS]

    def act(self, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1], (n, A) float32, for observations (n, O) and standard normal noise (n, A)."""
        *hidden, mean, log_std = self._layers
        x = observations.astype(np.float32)
        for layer in hidden:
            x = _affine(x, layer)
            np.maximum(x, 0, out=x)
        std = _affine(x, log_std)
        low, high = LOG_STD_RANGE
        np.exp(np.minimum(np.maximum(std, low, out=std), high, out=std), out=std)
        action = _affine(x, mean)
        action += std * noise.astype(np.float32, copy=False)
        return np.tanh(action, out=action)


def _affine(x: np.ndarray, layer: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    weight, bias = layer
    result = x @ weight
    result += bias
    return result


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
    return card(environment)["snapshots"][snapshot]["length_mean"]


@functools.cache
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
