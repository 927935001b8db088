"""Shared ground rules: a fixed seed, a datasets root of its own, and uninitialised memory that is NaN.

`torch.use_deterministic_algorithms` also fills `torch.empty`, so that memory nobody wrote cannot pass for data.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def ground_rules(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
