"""The model whose speed is measured: of the default size, for Hopper's shapes, with random weights."""

import dataclasses

import numpy as np
import torch

from drl.checkpoint import Checkpoint
from drl.config import Config, ModelConfig, TrainConfig
from drl.data.store import EpisodeStore, Normaliser, Spaces
from drl.model import make
from drl.versions import versions

SPACES = Spaces("Hopper-v5", 11, np.full(3, -1, np.float32), np.full(3, 1, np.float32))
TARGET_RETURN = 3600.0


def checkpoint(attention: str, model: ModelConfig | None = None, context: int = 20) -> Checkpoint:
    """A checkpoint as training might leave it, the same at every call.

    Args:
        attention: linear or softmax, whatever `model` says.
        model: its size; None: the default one.
        context: steps of a window.
    """
    config = Config(
        dataset="synthetic",
        model=dataclasses.replace(model or ModelConfig(), attention=attention),
        train=TrainConfig(context=context, sampling="state_passing" if attention == "linear" else "windows",
                          value_weight=0.0),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = make(config.model, SPACES.observation_dim, len(SPACES.action_low)).state_dict()
    for name, weight in weights.items():
        if name.startswith("blocks") and weight.ndim == 2:  # at its first values the past hardly moves an action
            weight *= 3
    generator = np.random.default_rng(0)
    normaliser = Normaliser(generator.standard_normal(11).astype(np.float32),
                            generator.uniform(0.5, 2, 11).astype(np.float32))
    return Checkpoint(config, 0, weights, normaliser, SPACES, "", versions(), {})


def described(model: ModelConfig) -> str:
    """Its size and what it remembers, in one sentence."""
    fades = "linear memory that fades" if model.fading else "linear memory that never fades"
    return (f"Model: width {model.width}, {model.layers} layers, {model.heads} heads, {model.tokens} tokens a step, "
            f"{fades}, float32 weights.")


def synthetic(spaces: Spaces = SPACES) -> EpisodeStore:
    """Synthetic episodes of these shapes: the speed of training does not depend on the numbers."""
    generator = np.random.default_rng(0)
    steps, length, dim = 20_000, 200, spaces.observation_dim
    return EpisodeStore(
        observations=generator.standard_normal((steps, dim)).astype(np.float32),
        actions=generator.uniform(-1, 1, (steps, spaces.action_dim)).astype(np.float32),
        returns_to_go=generator.uniform(0, 3000, steps).astype(np.float32),
        episode_starts=np.arange(0, steps + 1, length),
        terminated=np.ones(steps // length, bool),
        normaliser=Normaliser(np.zeros(dim, np.float32), np.ones(dim, np.float32)),
        spaces=spaces,
        dataset="synthetic",
        fingerprint="",
    )
