"""An evaluation is one number per episode, the same whatever plays beside it."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

from drl import evaluate as evaluation
from drl.checkpoint import Checkpoint
from drl.config import Config, EvaluateConfig, ModelConfig, TrainConfig
from drl.data.store import Normaliser, Spaces
from drl.errors import UserError
from drl.evaluate import FILE, evaluate, read, resolve_mode, store, tags
from drl.model import DecisionTransformer
from drl.players import LANE
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.rollout import Rollouts, rollout
from drl.tracker import Tracker

EPISODES, SEED, TARGET = 19, 300, 700.0
POLICIES = [RecurrentPolicy, WindowPolicy]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo may leave MUJOCO_LOG.TXT


@pytest.fixture
def torch_threads():
    """Sets the threads of torch; what the machine had comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def checkpoint(environment="Hopper-v5", **settings):
    """A small model with large random weights: its actions depend on everything that it sees."""
    env = gym.make(environment)
    (observation_dim,), box = env.observation_space.shape, env.action_space
    env.close()
    config = Config(
        dataset="drl/toy/random-v0",
        environment=environment,
        model=ModelConfig(width=21, heads=3, layers=2),
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


def play(policy, environments=16, threads=1, episodes=EPISODES, environment="Hopper-v5"):
    return rollout(
        policy, environment, target_return=TARGET, episodes=episodes, seed=SEED, environments=environments,
        threads=threads,
    )


def by_hand(policy, batch, slot_of):
    """Returns and lengths from one gymnasium environment at a time, the policy padded to `batch` rows."""
    env = gym.make("Hopper-v5")
    returns, lengths = [], []
    for episode in range(EPISODES):
        slot, over = slot_of(episode), False
        observation, reward = np.zeros((batch, 11)), np.zeros(batch)
        state = policy.initial_state(batch, TARGET)
        observation[slot], _ = env.reset(seed=SEED + episode)
        total, steps = 0.0, 0
        while not over:
            action, state = policy.step(observation, reward, state)
            observation[slot], reward[slot], terminated, truncated, _ = env.step(action[slot])
            total, steps, over = total + reward[slot], steps + 1, terminated or truncated
        returns.append(total)
        lengths.append(steps)
    env.close()
    return returns, lengths


@pytest.fixture(scope="module")
def expected():
    """Per policy, what EPISODES episodes played one at a time give."""
    return {policy: play(policy(checkpoint()), environments=1) for policy in POLICIES}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("environments", "threads"), [(1, 2), (4, 1), (4, 2), (5, 1), (16, 1), (16, 2), (19, 1), (100, 2)]
)
def test_returns_do_not_depend_on_what_plays_beside(policy, environments, threads, expected, torch_threads):
    torch_threads(threads)
    played = play(policy(checkpoint()), environments, threads)
    assert torch.get_num_threads() == threads
    for actual, wanted in zip(played, expected[policy], strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_episodes_do_not_depend_on_how_many_follow(policy, expected):
    played = play(policy(checkpoint()), episodes=7)
    np.testing.assert_array_equal(played.returns, expected[policy].returns[:7])


@pytest.mark.parametrize("policy", POLICIES)
def test_one_gymnasium_environment_at_a_time_gives_the_same_returns(policy, expected, torch_threads):
    torch_threads(1)  # small matrices are faster so
    returns, lengths = by_hand(policy(checkpoint()), LANE, lambda episode: episode % LANE)
    np.testing.assert_array_equal(expected[policy].returns, returns)
    np.testing.assert_array_equal(expected[policy].lengths, lengths)
    np.testing.assert_array_equal(expected[policy].seeds, SEED + np.arange(EPISODES))
    assert len(set(returns)) == EPISODES


@pytest.mark.parametrize("policy", POLICIES)
def test_without_the_padding_the_returns_are_the_same_but_for_rounding(policy, expected, torch_threads):
    torch_threads(1)  # small matrices are faster so
    returns, lengths = by_hand(policy(checkpoint()), 1, lambda episode: 0)
    # a product of one row is summed in another order: float32 rounding, grown by some dozens of steps of physics
    np.testing.assert_allclose(expected[policy].returns, returns, rtol=1e-4, atol=0)
    np.testing.assert_array_equal(expected[policy].lengths, lengths)


def test_the_target_return_is_asked_for():
    policy = RecurrentPolicy(checkpoint())
    other = rollout(policy, "Hopper-v5", target_return=-5 * TARGET, episodes=3, seed=SEED)
    assert not np.array_equal(other.returns, play(policy, episodes=3).returns)


class Broken(RecurrentPolicy):
    """Has no answer in slot 5 from timestep 3 on."""

    def step(self, observation, reward, state, episode_start=None):
        begun = int(state.timestep[0])
        action, state = super().step(observation, reward, state, episode_start)
        if begun >= 3:
            action[5] = np.nan
        return action, state


def test_an_action_that_is_not_finite_names_its_episode():
    # of four environments the second four hold episode 5; where nobody plays slot 5, nobody minds
    with pytest.raises(UserError) as caught:
        play(Broken(checkpoint()), environments=4, episodes=8)
    assert str(caught.value) == (
        "the policy's action in episode 5, step 3 is not finite; the weights or the observation are damaged"
    )


def test_damaged_weights_are_not_played():
    damaged = checkpoint()
    damaged.weights["head.bias"][0] = torch.nan
    with pytest.raises(UserError, match="action in episode 0, step 0 is not finite"):
        play(RecurrentPolicy(damaged), episodes=2)


def test_an_environment_of_other_dimensions_is_refused():
    with pytest.raises(UserError) as caught:
        play(RecurrentPolicy(checkpoint()), environment="Walker2d-v5")
    assert str(caught.value) == (
        "the checkpoint has observations of dimension 11 and actions of dimension 3, but Walker2d-v5 has 17 and 6; "
        "use --environment Hopper-v5"
    )


def test_an_evaluation_is_the_rollout_that_the_config_asks_for():
    policy = RecurrentPolicy(checkpoint(episodes=5, seed=SEED, target_returns=[TARGET]))
    (result,) = evaluate(policy, mode="recurrent", step=7)

    played = play(policy, episodes=5)
    assert result["returns"] == played.returns.tolist()
    assert result["lengths"] == played.lengths.tolist()
    assert result["seeds"] == [SEED, SEED + 1, SEED + 2, SEED + 3, SEED + 4]
    assert (result["environment"], result["dataset"]) == ("Hopper-v5", "drl/toy/random-v0")
    assert (result["step"], result["mode"], result["target_return"], result["episodes"]) == (7, "recurrent", TARGET, 5)
    assert json.loads(json.dumps(result)) == result


@pytest.fixture
def three_returns(monkeypatch):
    """Every rollout gives D4RL's random and expert return for Hopper, and what lies between."""
    returns = np.array([-20.272305, 3234.3, (3234.3 - 20.272305) / 2])
    played = Rollouts(returns, np.array([10, 20, 60]), np.arange(3))
    monkeypatch.setattr(evaluation, "rollout", lambda *_, **__: played)
    return returns


def test_a_normalised_score_by_hand(three_returns):
    (result,) = evaluate(RecurrentPolicy(checkpoint()), mode="recurrent", step=7)
    # 0, 100 and 50; the tolerance is float64's rounding
    assert result["normalized_score"] == pytest.approx(50, rel=1e-12)
    assert result["normalized_score_std"] == pytest.approx((5000 / 3) ** 0.5, rel=1e-12)
    assert result["return_mean"] == three_returns.mean()
    assert result["return_std"] == three_returns.std()
    assert result["episode_length"] == 30
    assert result["env_steps_per_second"] > 0
    assert result["reference"] == {"random": -20.272305, "expert": 3234.3, "source": "D4RL infos.py"}
    assert {"mujoco", "gymnasium"} <= result["versions"].keys()


def test_an_environment_that_d4rl_has_no_reference_for_has_no_score():
    policy = RecurrentPolicy(checkpoint("InvertedPendulum-v5"))
    (result,) = evaluate(policy, mode="recurrent", step=7)
    assert (result["normalized_score"], result["normalized_score_std"], result["reference"]) == (None, None, None)
    assert result["return_mean"] > 0 and result["episodes"] == len(result["returns"]) == 3
    assert tags([result]).keys() == {
        "eval/return_mean", "eval/return_std", "eval/episode_length", "eval/env_steps_per_second"
    }


SIX = ["normalized_score", "normalized_score_std", "return_mean", "return_std", "episode_length",
       "env_steps_per_second"]


def test_one_target_has_plain_tags(three_returns, tmp_path):
    results = evaluate(RecurrentPolicy(checkpoint()), mode="recurrent", step=7)
    assert tags(results) == {f"eval/{name}": results[0][name] for name in SIX}
    with Tracker(tmp_path) as tracker:
        tracker.log(7, tags(results))


def test_several_targets_each_have_their_suffix(three_returns, tmp_path):
    results = evaluate(RecurrentPolicy(checkpoint(target_returns=[3600.0, 1800.5])), mode="recurrent", step=7)
    assert [result["target_return"] for result in results] == [3600.0, 1800.5]
    assert tags(results).keys() == {f"eval/{name}/target-{target}" for name in SIX for target in ("3600", "1800.5")}
    with Tracker(tmp_path) as tracker:
        tracker.log(7, tags(results))


def test_auto_is_recurrent_where_there_is_a_state_to_carry():
    assert resolve_mode("auto", "linear") == "recurrent"
    assert resolve_mode("auto", "softmax") == "window"
    assert resolve_mode("window", "linear") == "window"


def result(**changed):
    same = {"environment": "Hopper-v5", "step": 7, "mode": "recurrent", "target_return": TARGET, "episodes": 3}
    return same | {"seeds": [7, 8, 9], "return_mean": 1.0} | changed


def test_storing_keeps_other_results_and_replaces_the_same(tmp_path):
    others = [
        result(environment="Walker2d-v5"), result(step=8), result(mode="window"), result(target_return=1.0),
        result(episodes=4), result(seeds=[11, 12]),
    ]
    assert read(tmp_path) == []
    store([result(), *others], tmp_path)
    assert store([result(return_mean=2.0)], tmp_path) == tmp_path / FILE

    assert read(tmp_path) == [*others, result(return_mean=2.0)]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("content", ["", '{"format": 1, "results": [', "[]", '{"format": 1}', "null", "\0\xff"])
def test_a_damaged_file_is_one_line_that_names_it(content, tmp_path):
    (tmp_path / FILE).write_text(content, encoding="latin-1")
    for ask in (lambda: read(tmp_path), lambda: store([result()], tmp_path)):
        with pytest.raises(UserError) as caught:
            ask()
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / FILE} is not an evaluation (") and "\n" not in message
        assert message.endswith(f"); delete it and type: drl evaluate {tmp_path}")
    assert (tmp_path / FILE).read_text(encoding="latin-1") == content
