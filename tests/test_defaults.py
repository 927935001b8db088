"""What the defaults make, whatever they are: it learns, goes on exactly, acts by every engine alike and is exported.

Only the size and the length of the run are made small.
"""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_policy import COMPILED
from test_train import PENDULUM, Recorded, assert_same_run, killed_at, lines, make_store

import drl
from drl import checkpoint as checkpoints
from drl import cli
from drl.checkpoint_files import MODEL, TRAINING
from drl.config import Config, EvaluateConfig, ModelConfig, TrainConfig
from drl.config_files import read_config
from drl.data.store import EpisodeStore
from drl.export import export
from drl.resolve import resolve
from drl.train import train

OBSERVED = np.random.default_rng(1).normal(size=(60, 3, 3))
ALIKE = 1e-4  # an action of two engines, of the half width of the action box, as a golden trace is held to


def small(heads: int = ModelConfig.heads, **settings) -> Config:
    settings = dict(updates=12, batch_size=4, checkpoint_every=5, log_every=1) | settings
    config = Config(dataset="synthetic/rule-v0", device="cpu", model=ModelConfig(width=8 * heads, heads=heads),
                    train=TrainConfig(**settings), evaluate=EvaluateConfig(target_returns=[-200.0]))
    return resolve(config, make_store())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the defaults, never disturbed."""
    folder = tmp_path_factory.mktemp("made") / "run"
    train(small(), make_store(), folder)
    return folder


def played(policy, observations: np.ndarray) -> np.ndarray:
    """Actions (steps, rows, A) on observations (steps, rows, O); a row begins anew midway."""
    steps, rows, _ = observations.shape
    state, actions = policy.initial_state(rows), []
    for step, (observation, reward) in enumerate(zip(observations, np.full((steps, rows), -0.2), strict=True)):
        action, state = policy.step(observation, reward, state, (np.arange(rows) == 1) & (step == 20))
        actions.append(action)
    return np.stack(actions)


def test_it_is_the_model_and_the_critic_of_the_config(run):
    config, weights = read_config(run / "config.yaml"), load_file(checkpoints.find(run) / MODEL)
    model = config.model
    assert (model.half_lives, model.action_tokens, model.return_quantile, config.train.value_weight) == (
        ModelConfig().half_lives, ModelConfig().action_tokens, ModelConfig().return_quantile,
        TrainConfig().value_weight)
    assert ("model.blocks.0.attention.decay" in weights) == bool(model.fading)
    assert ("model.embed_action.weight" in weights) == model.action_tokens
    assert ("model.return_cap" in weights) == bool(model.return_quantile)
    guided = any(name.startswith("guidance.") for name in load_file(checkpoints.find(run) / TRAINING))
    assert guided == bool(config.train.value_weight) == ("train/value" in lines(run)[-1])


@pytest.mark.parametrize("heads", [1, 4])
def test_stepped_through_episodes_it_follows_the_rule_that_it_learned(tmp_path, heads):
    """Of noisy actions those near the rule earn most, so that imitation and value want the same."""
    rng = np.random.default_rng(0)

    def episode(length):
        observations = rng.normal(size=(length + 1, 3))
        wanted = np.tanh(observations[:-1, :1])
        actions = np.clip(wanted + 0.2 * rng.normal(size=wanted.shape), -1, 1)
        end = np.arange(length) == length - 1
        return Recorded(observations, 2 * actions.astype(np.float32), -np.abs(actions - wanted)[:, 0], end, end & False)

    store = EpisodeStore.from_episodes([episode(40) for _ in range(50)], PENDULUM, "synthetic/rule-v0")
    train(small(heads, updates=70, batch_size=8, learning_rate=1e-2, warmup_updates=3, max_grad_norm=1.0), store,
          tmp_path / "run")
    policy, observations = drl.RecurrentPolicy.load(tmp_path / "run"), rng.normal(size=(60, 3, 3))
    actions = played(policy, observations)
    wanted = 2 * np.tanh(observations[..., :1])
    assert np.square(actions - wanted).mean() < 0.1 * wanted.var()


@pytest.mark.parametrize("stop", [3, 8])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(run, tmp_path, monkeypatch, stop):
    with killed_at(monkeypatch, stop):
        train(small(), make_store(), tmp_path / "run")
    train(small(), make_store(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", run)


@pytest.mark.parametrize("kind", COMPILED)
def test_it_acts_alike_by_the_compiled_engine_and_by_torch(run, kind):
    saved = lively(checkpoints.load(run))
    half = (saved.spaces.action_high - saved.spaces.action_low) / 2
    compiled, single = (
        played(policy, OBSERVED) for policy in (kind(saved), drl.RecurrentPolicy(saved, engine="torch")))
    exact = played(drl.RecurrentPolicy(saved, engine="torch").double(), OBSERVED)
    assert exact.std(axis=0).min() > 0.05 * half, "actions that hardly differ would prove nothing"
    for actions in (compiled, single):
        assert (np.abs(actions - exact) / half).max() < ALIKE


def lively(saved):
    """The checkpoint with larger weights, so that actions differ from step to step."""
    torch.manual_seed(0)
    weights = {name: weight if name.endswith(("decay", "return_cap")) else weight + 0.1 * torch.randn_like(weight)
               for name, weight in saved.weights.items()}
    return dataclasses.replace(saved, weights=weights)


def test_it_is_exported_and_acts_as_the_run_does_bit_for_bit(run, tmp_path):
    export(run, tmp_path / "policy")
    one, other = drl.RecurrentPolicy.load(run), drl.RecurrentPolicy.load(tmp_path / "policy")
    assert one.config == other.config
    np.testing.assert_array_equal(played(other, OBSERVED), played(one, OBSERVED))


def test_it_is_evaluated_by_its_recurrent_step(run, capsys):
    assert cli.main(["evaluate", str(run), "--episodes", "2", "--device", "cpu"]) == 0
    assert " recurrent " in capsys.readouterr().out
