"""The storms of scripts/torture count what is broken as broken, and little storms of them pass."""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torture import flips, kills, resume, signals, toy, trial, watch
from torture import __main__ as tool
from torture.processes import drl
from torture.trial import Trial

from drl import checkpoint as checkpoints
from drl.errors import UserError

KEPT, BROKEN = Trial("kills", "training", True, "fine", 1.0, {"update": 40, "lost": 3}), Trial("kills", "saving", False)
MISSED = Trial("disk", "a full disk", None, "nothing can be mounted here")


def purge_first() -> None:
    """A hook for a process that removes what stands before it writes, at its second checkpoint, and takes its time."""
    save = checkpoints.save

    def broken(checkpoint, run, *settings):
        if checkpoint.step == 20:
            return save(checkpoint, run, *settings)
        shutil.rmtree(run / "checkpoints")
        time.sleep(60)

    checkpoints.save = broken


@pytest.fixture
def storm(tmp_path, monkeypatch):
    """Run a storm of some size to its end; its failures come first."""
    monkeypatch.setattr(kills, "UPDATES", (60, 60))
    monkeypatch.setattr(signals, "UPDATES", 60)
    monkeypatch.setattr(signals, "PHASES", {"training": ("logging", 20), "evaluating": ("evaluating", 2),
                                            "saving": ("saving", 3)})

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


@pytest.mark.slow  # scripts/torture --short, a part of .ci/run, does it too
def test_a_run_is_the_same_after_three_kills(storm, monkeypatch):
    moments(monkeypatch, "logging", "saving", "resuming")
    trials = storm(kills, 3)
    assert not trial.failures(trials), trial.failures(trials)[0].detail
    assert len(trials) == 3 + len(["two undisturbed runs", "the end"])
    assert all(done.numbers["lost"] <= 20 for done in trials if done.numbers)


def test_checkpoints_that_are_removed_too_early_fail_the_kills(storm, monkeypatch):
    """The process that is killed removes them; the undisturbed runs and the start after it do not."""
    hooks = iter([None, None, purge_first])
    monkeypatch.setattr(kills, "drl", lambda *arguments, real: drl(*arguments, hook=next(hooks, None)))

    def draw(self, *_):
        return "purged", functools.partial(watch.until, times=1, change=lambda: (
            watch.logged(self._run) == 40 and not toy.steps(self._run)))

    monkeypatch.setattr(watch.Moments, "draw", draw)

    failed = trial.failures(storm(kills, 1))

    assert [done.numbers["lost"] for done in failed] == [40]
    assert failed[0].detail == "purged: update 40, goes on from 0; more than 20"


def test_a_start_that_forgets_where_it_was_fails_the_kills():
    run = kills._Run(Path("run"), Path("said"), 60, 1, False, [KEPT, KEPT], unproven=1)
    run._prove(SimpleNamespace(status=0, said="training:   0%|   | 0/60 [", told=[]), 40)
    assert [done.ok for done in run.kills] == [True, False]
    assert run.kills[1].detail == "fine; the next start goes on from 0"


def test_files_that_nobody_checks_fail_the_flips(storm, monkeypatch):
    load, places, loaded = checkpoints.load, flips._places, []

    def careless(folder):
        try:
            loaded.append(load(folder))
            return loaded[-1]
        except UserError:
            return dataclasses.replace(loaded[-1], dataset_return=0.0)

    monkeypatch.setattr(checkpoints, "load", careless)
    monkeypatch.setattr(flips, "_places", lambda folder: itertools.islice(places(folder), 1))

    trials = storm(flips, 1)

    assert {done.kind for done in trial.failures(trials)} >= {f"checkpoint: {name}" for name in (
        "model.safetensors", "training.safetensors", "checkpoint.json", "manifest.json")}
    assert {done.detail for done in trial.failures(trials)} >= {"a flipped bit: silent", "missing: silent"}
    assert {done.detail for done in trials if done.ok} <= {"without effect"}  # e.g. the end of the manifest's last line


@pytest.mark.slow
@pytest.mark.parametrize("module", [signals, resume, flips], ids=["signals", "resume", "flips"])
def test_a_little_storm_passes(storm, module):
    trials = storm(module, 7)
    assert not trial.failures(trials), trial.failures(trials)[0].detail


@pytest.mark.slow  # likewise
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


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_short_storms_rage_two_at_a_time_and_are_told_in_order(tmp_path, monkeypatch, capsys):
    over = multiprocessing.get_context("fork").Event()

    def first(*_):
        yield dataclasses.replace(KEPT if over.wait(30) else BROKEN, numbers={"parent": os.getppid()})

    def second(*_):
        yield dataclasses.replace(BROKEN, storm="flips")
        over.set()

    monkeypatch.setattr(kills, "run", first)
    monkeypatch.setattr(flips, "run", second)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(tool.tempfile, "tempdir", str(tmp_path))

    assert tool.main(["kills", "flips", "--short", "--json", str(tmp_path)]) == 1

    told = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in told.splitlines()[2:4]] == ["| kills", "| flips"]
    assert "failed: flips, saving" in told and "failed: kills" not in told
    (*_, numbers), = json.loads((tmp_path / "kills.json").read_text())["rows"]
    assert numbers["parent"] == os.getpid()


def test_an_unknown_storm_is_answered_with_those_that_are(capsys):
    assert tool.main(["hail"]) == 2
    assert capsys.readouterr().err == f"unknown storm 'hail'; known: {', '.join(tool.STORMS)}\n"


def test_the_counts_in_the_docs_are_those_of_the_trials_that_lie_there(capsys):
    docs = Path(__file__).parents[1] / "docs"
    tool.main(["--read", str(docs / "reliability")])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(tool.STORMS)
    assert "\n".join(table) in (docs / "reliability.md").read_text()
