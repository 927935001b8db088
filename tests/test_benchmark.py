"""A benchmark is a command; here only that it measures what it names and says where. No time is judged."""

import re

import pytest
import torch

from drl import benchmark
from drl.config import ModelConfig, TrainConfig


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_updates_are_reported_for_both_ways_of_sampling_and_both_attentions():
    table = benchmark.update(updates=2, threads=1, batch_sizes=[4])
    rows = re.findall(r"^\| (linear|softmax|as CORL's)(.+?) \| 4 \| 1 \| [\d.e+]+ \|", table, re.M)
    assert rows == [("linear", ", state passing, with a critic")] * bool(TrainConfig().value_weight) + [
        ("linear", ", state passing"), ("linear", ", windows"), ("softmax", ", windows"),
        ("as CORL's", " dt.py, float32"), ("as CORL's", " dt.py, bfloat16 autocast"),
    ]
    assert f"{ModelConfig().tokens} tokens a step" in table
    assert "2 updates after 5 of warm-up" in table
