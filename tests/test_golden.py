"""What an earlier version wrote is read by this one: runs, checkpoints, exported policies (tests/golden/make.py)."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import make_config, make_store

import drl
from drl import checkpoint as checkpoints
from drl import checkpoint_files, exported
from drl import evaluate as evaluation
from drl.config_files import read_config
from drl.train import train

GOLDEN = Path(__file__).parent / "golden"
FORMATS = sorted(GOLDEN.glob("format-*"))
EVERY = pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)


def test_the_formats_of_this_version_have_golden_files():
    assert exported.FORMAT == checkpoint_files.FORMAT
    assert GOLDEN / f"format-{checkpoint_files.FORMAT}" in FORMATS


@EVERY
def test_a_run_of_an_earlier_version_is_read(folder):
    run = folder / "run"
    checkpoint = checkpoints.load(run)
    assert checkpoint.step == 6
    made = make_config(updates=6, checkpoint_every=3, keep_checkpoints=2, evaluate_every=6, log_every=3,
                       value_measure="value", discount=0.99)
    policy, _ = exported.load(folder / "policy")
    assert read_config(run / "config.yaml") == checkpoint.config == policy.config == made, "whatever the defaults are"
    (result,) = evaluation.read(run)
    assert (result["step"], result["mode"], len(result["returns"])) == (6, "recurrent", 1)


@EVERY
def test_a_run_of_an_earlier_version_goes_on_to_the_same_weights(folder, tmp_path):
    """Bits may differ on another processor, numbers hardly."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    expected = checkpoints.load(run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")

    train(expected.config, make_store(), run, resume=True)

    actual = checkpoints.load(run)
    torch.testing.assert_close(actual.weights, expected.weights, rtol=0, atol=1e-5)
    for name, value in expected.training.items():
        torch.testing.assert_close(actual.training[name], value, rtol=0, atol=1e-4, msg=name)


@EVERY
def test_a_policy_of_an_earlier_version_does_what_its_golden_trace_says(folder):
    policy = drl.RecurrentPolicy.load(folder / "policy")
    _, trace = exported.load(folder / "policy")
    np.testing.assert_allclose(trace.play(policy), trace.actions, rtol=0, atol=1e-4)
