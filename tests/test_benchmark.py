"""A benchmark is a command; here only that it measures what it names and says where. No time is judged."""

import re

import pytest
import torch

from drl import benchmark


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_steps_are_reported_with_their_spread_their_ratio_and_the_machine():
    table = benchmark.step(steps=20, threads=1)
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) to (\d+) \| (\d+) \| (\d+) \| ([\d.]+)x \|$", table, re.M)
    assert [row[0].split(",")[0] for row in rows] == ["linear", "linear", "softmax"]
    for _, median, low, high, *_ in rows:
        assert 0 < int(low) <= int(median) <= int(high)
    assert float(rows[0][-1]) == 1
    assert "1 torch threads" in table and f"torch {torch.__version__}" in table and "mujoco" in table


def test_updates_are_reported_for_both_ways_of_sampling_and_both_attentions():
    table = benchmark.update(updates=2, threads=1)
    assert re.findall(r"^\| (linear|softmax)(.+?) \| 64 \| 1 \| [\d.]+ \|", table, re.M) == [
        ("linear", ", state passing"), ("linear", ", windows"), ("softmax", ", windows")
    ]
    assert "2 updates after 5 of warm-up" in table
