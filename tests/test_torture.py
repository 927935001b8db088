"""The storms of scripts/torture count what is broken as broken, and little storms of them pass."""

import contextlib
import dataclasses
import functools
import json
import os
import time

import numpy as np
import pytest
from torture import flips, kills, resume, signals, toy, trial, watch
from torture import __main__ as tool
from torture.processes import drl
from torture.trial import Trial

from drl import disk

KEPT, BROKEN = Trial("kills", "training", True, "fine", 1.0, {"update": 40, "lost": 3}), Trial("kills", "saving", False)
MISSED = Trial("disk", "a full disk", None, "nothing can be mounted here")


@contextlib.contextmanager
def in_place(target):
    """A disk.whole that fills the folder where it stands, and takes its time."""
    target.mkdir(parents=True)
    yield target
    time.sleep(30)
    disk.write_json(target / disk.MANIFEST, {path.name: disk.sha256(path) for path in sorted(target.iterdir())})


def write_in_place() -> None:
    """A hook for processes whose checkpoints are not whole when they are seen."""
    disk.whole = in_place


@pytest.fixture
def storm(tmp_path, monkeypatch):
    """Run a storm of some size to its end; its failures come first."""
    monkeypatch.setattr(kills, "UPDATES", (60, 60))
    monkeypatch.setattr(signals, "UPDATES", 60)

    def run(module, count: int) -> list[Trial]:
        trials = list(module.run(count, tmp_path, np.random.default_rng(0), True))
        return sorted(trials, key=lambda done: done.ok)

    return run


def moments(monkeypatch, *names: str) -> None:
    """Let kills come at these moments, in turn."""
    turns = iter(names)

    def draw(self, *_):
        name = next(turns)
        return name, functools.partial(watch.until, change=self.changes[name], times=1)

    monkeypatch.setattr(watch.Moments, "draw", draw)


def test_a_run_is_the_same_after_three_kills(storm, monkeypatch):
    moments(monkeypatch, "logging", "saving", "resuming")
    trials = storm(kills, 3)
    assert not trial.failures(trials), trial.failures(trials)[0].detail
    assert len(trials) == 3 + len(["two undisturbed runs", "the end"])
    assert all(done.numbers["lost"] <= 20 for done in trials if done.numbers)


def test_checkpoints_written_in_place_fail_the_kills(storm, monkeypatch, tmp_path):
    """The processes that are to be killed write in place; the undisturbed run does not."""
    def start(arguments, folder, real):
        broken = str(tmp_path / "run-") in " ".join(arguments)
        return drl(arguments, folder, hook=write_in_place if broken else None)

    monkeypatch.setattr(kills, "drl", start)
    moments(monkeypatch, "saved")

    failed = {done.kind: done.detail for done in trial.failures(storm(kills, 1))}

    assert "the end" in failed and len(failed) == 2
    assert any("the next start goes on not at all: drl: " in detail for detail in failed.values()), failed


def test_files_that_nobody_checks_fail_the_flips(storm, monkeypatch):
    monkeypatch.setattr(disk, "require_intact", lambda *_: None)
    trials = storm(flips, 1)
    assert len(trial.failures(trials)) > 5
    assert {"checkpoint: training.safetensors", "exported policy: trace.safetensors"} <= {
        done.kind for done in trial.failures(trials)}


def test_a_little_storm_of_flips_is_noticed(storm):
    trials = storm(flips, 1)
    assert not trial.failures(trials), trial.failures(trials)[0].detail
    assert len(trials) > 100


@pytest.mark.slow
@pytest.mark.parametrize("module", [signals, resume])
def test_a_little_storm_passes(storm, module):
    trials = storm(module, 7)
    assert not trial.failures(trials), trial.failures(trials)[0].detail


def test_each_signal_ends_a_run_that_goes_on_with_its_bits(tmp_path, storm):
    little = signals._Storm(tmp_path, np.random.default_rng(0), real=False)
    with toy.root(tmp_path):
        little.prepare()
        for number, phase in zip(signals.SIGNALS, signals.PHASES, strict=True):
            ok, detail, _ = little.train(phase, number)
            assert ok, f"{number.name} while {phase}: {detail}"


def test_two_runs_that_differ_in_a_byte_are_told_apart(tmp_path):
    for name in ("one", "other"):
        folder = tmp_path / name / "checkpoints" / "step-00000020"
        folder.mkdir(parents=True)
        for file in ("model.safetensors", "training.safetensors"):
            (folder / file).write_bytes(b"weights")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    assert toy.differences(tmp_path / "one", tmp_path / "other") == []

    (folder / "training.safetensors").write_bytes(b"weight5")
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n')
    (tmp_path / "one" / "checkpoints" / "step-00000040.partial").mkdir()

    found = toy.differences(tmp_path / "one", tmp_path / "other")
    assert found[:2] == ["step-00000040.partial is left over", "training.safetensors of step-00000020 differs"]
    assert found[2].startswith("metrics.jsonl differs: 1 for 1 entries, at 0 ")


def test_the_table_counts_what_failed_and_what_could_not_be_tried():
    header, _, kills_row, disk_row = trial.table(
        {"kills": ("nothing is lost", [KEPT, KEPT, BROKEN]), "disk": ("nothing changes", [MISSED])}).splitlines()
    assert kills_row == ("| kills | nothing is lost | 3 | 1 | training 2, saving 1 | 1 and 1 s, 3 and 3 updates lost |")
    assert disk_row == "| disk | nothing changes | 0, 1 not run | 0 |  | - |"


@pytest.mark.parametrize("trials", [[KEPT], [KEPT, BROKEN], [MISSED]], ids=["kept", "broken", "not run"])
def test_the_tool_fails_if_a_promise_was_broken(trials, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kills, "run", lambda *_: iter(trials))
    monkeypatch.setattr(tool.tempfile, "tempdir", str(tmp_path))

    status = tool.main(["kills", "--json", str(tmp_path), "--figure", str(tmp_path / "figure.png")])

    assert status == (BROKEN in trials)
    assert ("failed: kills, saving" in capsys.readouterr().out) == (BROKEN in trials)
    stored = json.loads((tmp_path / "kills.json").read_text())
    assert [Trial.of_row("kills", row) for row in stored["rows"]] == [
        dataclasses.replace(done, storm="kills") for done in trials]
    assert (stored["trials"], stored["failures"]) == (len(trials), int(BROKEN in trials))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert bool([name for name in os.listdir(tmp_path) if name.startswith("torture-")]) == (BROKEN in trials)


def test_an_unknown_storm_is_answered_with_those_that_are(capsys):
    assert tool.main(["hail"]) == 2
    assert capsys.readouterr().err == f"unknown storm 'hail'; known: {', '.join(tool.STORMS)}\n"
