"""A run that a signal stops, at any update and in any phase, ends soon, and goes on as if it had never stopped."""

import contextlib
import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import test_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import assert_same_run, lines

from drl import checkpoint as checkpoints
from drl import checkpoint_files
from drl import evaluate as evaluation
from drl import rollout
from drl.config import Config
from drl.data.store import EpisodeStore, Spaces
from drl.errors import UserError
from drl.signals import Stopped
from drl.tracker import Tracker
from drl.train import train, train_together
from drl.trainer import Trainer

SETTINGS = dict(checkpoint_every=5, evaluate_every=4, log_every=2)  # saved at 5, 10, 12; scored at 4, 8, 12
CLOCKED = {"train/updates_per_second", "eval/env_steps_per_second", "env_steps_per_second"}
PHASES = {  # where the signal meets the run: what it calls there
    "updating": (Trainer, "descend"),
    "logging": (Tracker, "log"),
    "evaluating": (rollout, "play"),
    "storing a score": (evaluation, "store"),
    "saving": (checkpoints, "save"),
    "writing a checkpoint": (checkpoint_files, "write_tensors"),
    "removing an old checkpoint": (checkpoints, "_remove"),
}
QUICK, APART = "Hopper-v5", "Pendulum-v1"  # to score a run in: in this process, and in one that is started for it
HOPPER = Spaces(QUICK, 11, -np.ones(3, np.float32), np.ones(3, np.float32))


def make_config(environment: str = QUICK, **settings) -> Config:
    return dataclasses.replace(test_train.make_config(**settings), environment=environment)


def make_store(environment: str = QUICK) -> EpisodeStore:
    return test_train.make_store(spaces=HOPPER if environment == QUICK else test_train.PENDULUM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never stopped, by their settings; each is made once."""
    runs = {}

    def make(environment=QUICK, **settings):
        key = json.dumps([environment, settings])
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("whole") / "run"
            train(make_config(environment, **SETTINGS | settings), make_store(environment), runs[key])
        return runs[key]

    return make


@contextlib.contextmanager
def signalled(monkeypatch, place, call: int, number: int = signal.SIGTERM):
    """The process sends itself a signal in the `call`-th call, from 1, of a function, before that does anything."""
    owner, name = place
    real, calls = getattr(owner, name), []

    def send(*arguments, **options):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, send)
        yield


def without_clocks(values: dict) -> dict:
    return {name: value for name, value in values.items() if name not in CLOCKED}


def scalars(run) -> dict:
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def assert_never_stopped(run, whole) -> None:
    """Weights, optimizer, metrics, scores and TensorBoard's points of two runs are the same, and nothing is left."""
    assert_same_run(run, whole)
    assert list(map(without_clocks, lines(run))) == list(map(without_clocks, lines(whole)))
    for one, other in zip(evaluation.read(run), evaluation.read(whole), strict=True):
        assert without_clocks(one) == without_clocks(other)
    drawn, expected = scalars(run), scalars(whole)
    assert drawn.keys() == expected.keys()
    for tag in expected.keys() - CLOCKED:
        assert drawn[tag] == expected[tag], tag
    assert not [path for path in run.rglob("*") if ".partial" in path.name or path.suffix == ".tmp"]


@pytest.mark.parametrize("sampling", ["state_passing", "windows"])
@pytest.mark.parametrize("step", [2, 5, 7, 11, 12], ids="update {}".format)
def test_a_run_stopped_at_any_update_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, whole, step, sampling):
    config = make_config(**SETTINGS, sampling=sampling)

    with signalled(monkeypatch, PHASES["updating"], step), pytest.raises(Stopped) as caught:
        train(config, make_store(), tmp_path / "run")

    assert caught.value.signal == signal.SIGTERM
    assert f"is saved at update {step}; to go on, add --resume to the same command" in str(caught.value)
    assert checkpoints.load(tmp_path / "run").step == step
    train(config, make_store(), tmp_path / "run", resume=True)
    assert_never_stopped(tmp_path / "run", whole(sampling=sampling))


@pytest.mark.parametrize(("phase", "call", "number"), [
    *((phase, call, signal.SIGTERM) for phase in PHASES for call in (1, 2)),
    *(("evaluating", 1, number) for number in (signal.SIGINT, signal.SIGUSR1)),
])
def test_a_run_stopped_in_any_phase_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, whole, phase, call, number):
    environment = APART if phase == "evaluating" else QUICK
    config, store = make_config(environment, **SETTINGS, keep_checkpoints=1), make_store(environment)

    with signalled(monkeypatch, PHASES[phase], call, number), pytest.raises(Stopped) as caught:
        train(config, store, tmp_path / "run")

    assert caught.value.signal == number
    train(config, store, tmp_path / "run", resume=True)
    assert_never_stopped(tmp_path / "run", whole(environment, keep_checkpoints=1))


def test_a_signal_before_the_first_update_is_done_saves_nothing_and_the_run_begins_anew(tmp_path, monkeypatch, whole):
    with signalled(monkeypatch, PHASES["updating"], 1), pytest.raises(Stopped):
        train(make_config(**SETTINGS), make_store(), tmp_path / "run")
    assert not checkpoints.exists(tmp_path / "run")
    train(make_config(**SETTINGS), make_store(), tmp_path / "run", resume=True)
    assert_never_stopped(tmp_path / "run", whole())


def test_a_run_may_be_stopped_at_every_update(tmp_path, monkeypatch, whole):
    for step in range(1, 12):
        with signalled(monkeypatch, PHASES["updating"], 2), pytest.raises(Stopped):
            train(make_config(**SETTINGS), make_store(), tmp_path / "run", resume=True)
        assert checkpoints.load(tmp_path / "run").step == min(2 * step, 12)
        if 2 * step == 12:
            break
    train(make_config(**SETTINGS), make_store(), tmp_path / "run", resume=True)
    assert_never_stopped(tmp_path / "run", whole())


def test_an_evaluation_that_is_owed_is_made_once(tmp_path, monkeypatch, whole):
    config, expected, evaluated, real = make_config(**SETTINGS), whole(), [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **o: (evaluated.append(o["step"]), real(*a, **o))[1])
    for _ in range(3):  # also while what is owed is being made up for
        with signalled(monkeypatch, PHASES["evaluating"], 1), pytest.raises(Stopped):
            train(config, make_store(), tmp_path / "run", resume=True)
        assert checkpoints.load(tmp_path / "run").step == 4
    train(config, make_store(), tmp_path / "run", resume=True)
    assert evaluated == [4, 4, 4, 4, 8, 12]
    assert_never_stopped(tmp_path / "run", expected)
    train(config, make_store(), tmp_path / "run", resume=True)
    assert len(evaluated) == 6


def test_scores_that_cannot_be_kept_stop_no_training_and_the_last_are_made_up_for(tmp_path, monkeypatch, capsys, whole):
    def full(results, run):
        raise UserError("the evaluation cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "store", full)
        train(make_config(**SETTINGS), make_store(), tmp_path / "run")
    assert capsys.readouterr().err.count("No space left on device; training goes on") == 3
    assert checkpoints.load(tmp_path / "run").step == 12

    train(make_config(**SETTINGS), make_store(), tmp_path / "run", resume=True)

    (result,), expected = evaluation.read(tmp_path / "run"), evaluation.read(whole())[-1]
    assert without_clocks(result) == without_clocks(expected)


def test_seeds_that_are_stopped_together_go_on_together(tmp_path, monkeypatch):
    configs = [make_config(**SETTINGS, seed=seed) for seed in (0, 1)]
    for name in ("whole", "stopped"):
        folders = [tmp_path / name / f"seed-{config.seed}" for config in configs]
        if name == "stopped":
            with signalled(monkeypatch, PHASES["evaluating"], 2), pytest.raises(Stopped):
                train_together(configs, make_store(), folders)
        train_together(configs, make_store(), folders, resume=True)
    for seed in ("seed-0", "seed-1"):
        assert_never_stopped(tmp_path / "stopped" / seed, tmp_path / "whole" / seed)


def test_a_run_goes_on_from_the_newest_sound_checkpoint_as_if_it_had_not_been_stopped(tmp_path, capsys, whole):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, test_train.killed_at(patch, 11):
        train(make_config(**SETTINGS), make_store(), run)
    (run / "checkpoints" / "step-00000010" / "training.safetensors").write_bytes(b"\0" * 1000)
    train(make_config(**SETTINGS), make_store(), run, resume=True)
    assert "step-00000010 is damaged" in capsys.readouterr().err
    assert_never_stopped(run, whole())
