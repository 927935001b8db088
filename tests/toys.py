"""What more than one test file plays with: a toy dataset (its id, its environment, its episodes) and a toy policy."""

import gymnasium as gym
import numpy as np
import torch

from drl.checkpoint import Checkpoint
from drl.config import Config, EvaluateConfig, ModelConfig, TrainConfig
from drl.data.store import Normaliser, Recorded, Spaces
from drl.model import DecisionTransformer

ID = "drl/toy/spring-v0"
ENVIRONMENT = "MountainCarContinuous-v0"  # O = 2, A = 1, box [-1, 1]
SEED, TARGET = 300, 700.0  # of the toy policy's evaluation

# Options of the model that have a default of our own: as the paper has it, and the default, whatever it is
PLAIN = {"half_lives": [], "action_tokens": True, "timestep_embedding": True, "return_quantile": 0.0}
OWN = {name: getattr(ModelConfig(), name) for name in PLAIN}


def recorded(lengths: list[int], seed: int = 0) -> list[Recorded]:
    """Random episodes of these lengths, in steps; every other one terminates, the others are truncated."""
    rng = np.random.default_rng(seed)
    return [
        Recorded(
            1000 + number,
            rng.normal(size=(length + 1, 2)),
            rng.uniform(-1, 1, (length, 1)).astype(np.float32),
            rng.normal(size=length),
            number % 2 == 0,
        )
        for number, length in enumerate(lengths)
    ]


def checkpoint(environment: str = "Hopper-v5", **settings) -> Checkpoint:
    """A small model with large random weights: its actions depend on everything that it sees."""
    env = gym.make(environment)
    (observation_dim,), box = env.observation_space.shape, env.action_space
    env.close()
    config = Config(
        dataset="drl/toy/random-v0",
        environment=environment,
        model=ModelConfig(**PLAIN, width=21, heads=3, layers=2),
        train=TrainConfig(context=5),
        evaluate=EvaluateConfig(**{"target_returns": [TARGET], "episodes": 3, "seed": SEED} | settings),
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value if "norm" in name else 0.5 * torch.randn(value.shape, generator=generator)
        for name, value in DecisionTransformer(config.model, observation_dim, box.shape[0]).state_dict().items()
    }
    normaliser = Normaliser(np.full(observation_dim, 0.1, np.float32), np.full(observation_dim, 0.7, np.float32))
    return Checkpoint(
        config, 7, weights, normaliser, Spaces(environment, observation_dim, box.low, box.high), "-", {}, {}
    )
