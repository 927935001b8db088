"""The benchmark of evaluation measures the very episodes that are played. No time is judged."""

import re

import numpy as np
import pytest
import torch

from drl import benchmark_evaluate as benchmark
from drl import envs
from drl.errors import UserError
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.rollout import rollout
from toys import SEED, TARGET, checkpoint

HOPPER = {"environment": "Hopper-v5", "run": "", "episodes": 5, "environments": 5, "engine": "torch",
          "window_steps": 3, "repeats": 2}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo may leave MUJOCO_LOG.TXT


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_recorded_actions_are_those_of_the_roll_out_and_their_physics_its_episodes(monkeypatch):
    policy = RecurrentPolicy(checkpoint(), engine="torch")
    asked = {"target_return": TARGET, "seed": SEED}
    played = rollout(policy, "Hopper-v5", episodes=18, **asked)
    actions = benchmark.recorded(policy, "Hopper-v5", 18, **asked)
    assert [len(each) for each in actions] == played.lengths.tolist()

    returns, ended = np.zeros(18), np.zeros(18, bool)
    step = envs.MujocoEnvs.step

    def watched(self, rows, chosen):
        assert not ended[rows].any()
        result = step(self, rows, chosen)
        returns[rows] += result.rewards
        ended[rows] = result.terminated | result.truncated
        return result

    monkeypatch.setattr(envs.MujocoEnvs, "step", watched)
    assert benchmark.physics_alone("Hopper-v5", actions, SEED)() == played.lengths.sum()
    assert ended.all()
    np.testing.assert_array_equal(returns, played.returns)


def test_the_window_loop_is_one_environment_after_the_other(monkeypatch):
    policy, steps = WindowPolicy(checkpoint()), []
    expected = rollout(policy, "Hopper-v5", target_return=TARGET, episodes=2, seed=SEED).lengths
    step = envs.GymnasiumEnvs.step

    def watched(self, rows, actions):
        result = step(self, rows, actions)
        steps.append(bool(result.terminated[0]))
        return result

    monkeypatch.setattr(envs.GymnasiumEnvs, "step", watched)
    loop = benchmark.window_loop(policy, "Hopper-v5", target_return=TARGET, seed=SEED)
    for _ in range(expected.sum() + 1):
        next(loop)
    assert list(np.flatnonzero(steps) + 1) == list(np.cumsum(expected))


def test_rates_are_reported_with_their_spread_their_ratios_and_the_machine():
    table = benchmark.evaluate(**HOPPER)
    number = r"([\d.]+)"
    line = rf"^\| (.+?) \| {number} \| {number} to {number} \| {number} \| {number} to {number} \|$"
    rows = re.findall(line, table, re.M)
    assert [row[0].split(",")[0] for row in rows] == ["physics alone", "policy and physics", "one environment"]
    for _, *numbers in rows:
        median, low, high, ratio, ratio_low, ratio_high = map(float, numbers)
        assert 0 < low <= median <= high and 0 < ratio_low <= ratio <= ratio_high
    assert rows[1][4:] == ("1.00", "1.00", "1.00")
    for told in ("engine torch", "2 repeats of 5 episodes", "random weights", "3 steps of the window", "mujoco"):
        assert told in table


def test_an_environment_outside_the_three_is_measured_too():
    table = benchmark.evaluate(**HOPPER | {"environment": "InvertedDoublePendulum-v5"})
    assert table.startswith("| InvertedDoublePendulum-v5 |")


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError):
        benchmark.evaluate(**HOPPER | {"run": str(tmp_path / "nothing")})
