"""An evaluation is what was played, told in numbers; they go into a file and to TensorBoard."""

import json

import numpy as np
import pytest

from drl import evaluate as evaluation
from drl.errors import UserError
from drl.evaluate import FILE, evaluate, read, resolve_mode, store, tags
from drl.policy import RecurrentPolicy
from drl.rollout import Rollouts, rollout
from drl.tracker import Tracker
from toys import SEED, TARGET, checkpoint


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo may leave MUJOCO_LOG.TXT


def test_an_evaluation_is_the_rollout_that_the_config_asks_for():
    policy = RecurrentPolicy(checkpoint(episodes=5, seed=SEED, target_returns=[TARGET]))
    (result,) = evaluate(policy, mode="recurrent", step=7)

    played = rollout(policy, "Hopper-v5", target_return=TARGET, episodes=5, seed=SEED)
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
