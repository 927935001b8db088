"""The examples of docs/examples run as they stand, and score what `drl evaluate` scores."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_policy import make_checkpoint

from drl import checkpoint as checkpoints
from drl.data.store import Normaliser, Spaces
from drl.evaluate import rollout
from drl.export import export
from drl.model import DecisionTransformer
from drl.policy import RecurrentPolicy

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
ENVIRONMENT, O, A = "Hopper-v5", 11, 3  # noqa: E741
EPISODES, SEED = 4, 10_000


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """An untrained policy for Hopper, exported, whose weights are so large that it listens to the rewards."""
    home = tmp_path_factory.mktemp("made")
    checkpoint = make_checkpoint(return_scale=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = DecisionTransformer(checkpoint.config.model, O, A).state_dict()
        for weight in weights.values():
            weight.add_(0.1 * torch.randn(weight.shape))
    one = np.ones(A, np.float32)
    checkpoint = dataclasses.replace(
        checkpoint,
        weights=weights,
        normaliser=Normaliser(np.zeros(O, np.float32), np.ones(O, np.float32)),
        spaces=Spaces(ENVIRONMENT, O, -one, one),
    )
    checkpoints.save(checkpoint, home / "run", keep=1)
    export(home / "run", home / "policy")
    return home / "policy"


def output(example: str, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    return capsys.readouterr().out


def number(text: str, name: str) -> float:
    return float(re.search(rf"{name} (-?[\d.]+)", text)[1])


def test_a_plain_gymnasium_loop_plays_the_episodes_that_drl_evaluate_plays(policy, monkeypatch, capsys):
    acting = RecurrentPolicy.load(policy)
    target = acting.config.evaluate.target_returns[0]
    played = rollout(acting, ENVIRONMENT, target_return=target, episodes=EPISODES, seed=SEED)
    heard, act = [], RecurrentPolicy.act
    monkeypatch.setattr(RecurrentPolicy, "act", lambda self, observation, reward: (
        heard.append(reward), act(self, observation, reward)
    )[1])
    text = output("gymnasium_loop.py", monkeypatch, capsys, str(policy), "--episodes", str(EPISODES))
    assert [int(steps) for steps in re.findall(r"(\d+) steps", text)] == played.lengths.tolist()
    assert np.count_nonzero(heard) == played.lengths.sum() - EPISODES, "Hopper pays for every step it survives"
    assert number(text, "mean return") == pytest.approx(played.returns.mean(), abs=0.1)
    assert number(text, "normalised score") == pytest.approx(100 * (played.returns.mean() + 20.27) / 3254.57, abs=0.1)


def test_stable_baselines3_scores_the_policy_with_the_rewards_it_earned(policy, monkeypatch, capsys):
    pytest.importorskip("stable_baselines3")
    heard, step = [], RecurrentPolicy.step

    def listening(self, observation, reward, state, episode_start=None):
        action, after = step(self, observation, reward, state, episode_start)
        if len(observation) == EPISODES:  # else it is led along its trace
            heard.append((reward, np.copy(episode_start), after.return_to_go.numpy()))
        return action, after

    acting = RecurrentPolicy.load(policy)
    target = acting.config.evaluate.target_returns[0]
    expected = rollout(acting, ENVIRONMENT, target_return=target, episodes=50, seed=SEED).returns
    monkeypatch.setattr(RecurrentPolicy, "step", listening)
    text = output("stable_baselines3_evaluate.py", monkeypatch, capsys, str(policy), "--episodes", "50",
                  "--environments", str(EPISODES), "--seed", str(SEED))

    assert text.startswith("50 episodes: ")
    error = np.hypot(expected.std(), number(text, r"\+-")) / np.sqrt(50)
    assert number(text, "mean return") == pytest.approx(expected.mean(), abs=4 * error + 0.05)  # printed with one digit
    assert heard[0][1].all() and sum(start.sum() for _, start, _ in heard) >= 50
    for reward, start, left in heard[1:]:
        assert (reward[~start] > 0).all() and (left[~start] < target).all()
