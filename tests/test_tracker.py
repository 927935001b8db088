"""One call, two files, the same numbers; a run that goes on leaves each step standing once, whatever the disk does."""

import errno
import io
import json
import math
import os
import random
import re
import stat
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from drl.errors import UserError
from drl.tracker import TAGS, Tracker
from drl.train import train
from test_train import assert_same_run, make_config, make_store


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scalars(run):
    """{tag: [(step, value), ...]} of the event files, which are read in the order of their names."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0})  # 0: all of them
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def as_scalars(logged):
    found = {}
    for line in logged:
        for tag in line.keys() - {"step"}:
            found.setdefault(tag, []).append((line["step"], np.float32(line[tag])))  # TensorBoard keeps float32
    return found


def served(run):
    """{tag: [(step, value), ...]} as TensorBoard's own server is told of them."""
    runs = EventMultiplexer()
    runs.AddRun(str(run), "run")
    found = MultiplexerDataProvider(runs.Reload(), str(run)).read_scalars(
        context.RequestContext(), experiment_id="", plugin_name="scalars", downsample=1000
    )
    return {tag: [(point.step, point.value) for point in points] for tag, points in found["run"].items()}


def events_of(run):
    """The newest file of events."""
    return max(run.glob("events.out.tfevents.*"))


def log(run, steps, start=0, loss=0.1):
    with Tracker(run, start=start) as tracker:
        for step in steps:
            tracker.log(step, {"train/loss": loss * step, "train/grad_norm": 0.5})


def test_every_tag_of_the_list_is_written_and_nothing_else(tmp_path):
    assert TAGS == {
        "train/loss", "train/grad_norm", "train/learning_rate", "train/updates_per_second",
        "train/value", "train/value_loss", "eval/normalized_score", "eval/normalized_score_std",
        "eval/return_mean", "eval/return_std", "eval/episode_length", "eval/env_steps_per_second",
    }
    with Tracker(tmp_path / "runs" / "new") as tracker:
        tracker.log(1, dict.fromkeys(sorted(TAGS), 0.5))
        tracker.log(2, {f"{tag}/target-3600": 0.5 for tag in sorted(TAGS)})
    assert lines(tmp_path / "runs" / "new")[0].keys() == TAGS | {"step"}


@pytest.mark.parametrize(
    "tag", ["loss", "train/los", "train/loss/extra", "eval/return_mean/3600", "eval/target-3600", ""]
)
def test_an_unknown_tag_is_refused_before_anything_is_written(tag, tmp_path):
    with Tracker(tmp_path) as tracker:
        with pytest.raises(ValueError) as caught:
            tracker.log(1, {"train/loss": 0.5, tag: 0.5})
    assert str(caught.value) == (
        f"unknown tag {tag!r}; add it to drl.tracker.TAGS or use one of {sorted(TAGS)}"
    )
    assert lines(tmp_path) == [] and scalars(tmp_path) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_before_anything_is_written(value, tmp_path):
    with Tracker(tmp_path) as tracker:
        with pytest.raises(ValueError) as caught:
            tracker.log(7, {"train/loss": 0.5, "eval/return_mean": value})
    assert str(caught.value) == f"eval/return_mean is {value} at update 7; only finite values are recorded"
    assert lines(tmp_path) == [] and scalars(tmp_path) == {}


def test_tensorboard_holds_what_the_lines_hold(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log(100, {"train/loss": 0.1, "train/learning_rate": 3e-4})
        tracker.log(200, {"train/loss": 1 / 3, "train/learning_rate": 1e-5})
        tracker.log(200, {"eval/return_mean/target-3600": 3201.7, "eval/return_mean/target-1800": -2.5})

    assert lines(tmp_path) == [
        {"step": 100, "train/loss": 0.1, "train/learning_rate": 3e-4},
        {"step": 200, "train/loss": 1 / 3, "train/learning_rate": 1e-5},
        {"step": 200, "eval/return_mean/target-3600": 3201.7, "eval/return_mean/target-1800": -2.5},
    ]
    assert scalars(tmp_path) == as_scalars(lines(tmp_path))


def test_what_is_flushed_is_on_disk_before_the_tracker_closes(tmp_path):
    with Tracker(tmp_path) as tracker:
        for step in range(200):
            tracker.log(step, {"train/loss": 0.25})
        tracker.flush()
        assert lines(tmp_path) == [{"step": step, "train/loss": 0.25} for step in range(200)]
        assert scalars(tmp_path) == {"train/loss": [(step, 0.25) for step in range(200)]}


def test_going_on_from_an_update_drops_what_came_after_it(tmp_path):
    log(tmp_path, steps=[10, 20, 30, 40])
    log(tmp_path, steps=[30, 40, 50], start=20, loss=7)

    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        (10, 0.1 * 10), (20, 0.1 * 20), (30, 210), (40, 280), (50, 350)
    ]
    assert scalars(tmp_path) == as_scalars(lines(tmp_path))


def test_beginning_anew_drops_everything(tmp_path):
    # a run that was killed before its first checkpoint
    log(tmp_path, steps=[10, 20])
    log(tmp_path, steps=[10], start=0, loss=7)

    assert lines(tmp_path) == [{"step": 10, "train/loss": 70, "train/grad_norm": 0.5}]
    assert scalars(tmp_path) == as_scalars(lines(tmp_path))


def test_the_torn_line_of_a_killed_run_is_dropped(tmp_path):
    log(tmp_path, steps=[10, 20])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "train/lo')
    log(tmp_path, steps=[30], start=20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_no_start_adds_to_a_finished_run(tmp_path):
    log(tmp_path, steps=[10, 20])
    log(tmp_path, steps=[10], start=None, loss=7)

    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(10, 1.0), (20, 2.0), (10, 70)]
    assert sorted(scalars(tmp_path)["train/loss"]) == [(10, 1.0), (10, 70.0), (20, 2.0)]


# going on


def test_a_tracker_tells_what_the_lines_hold_at_its_start(tmp_path):
    with Tracker(tmp_path) as tracker:
        assert tracker.at_start == set()
        tracker.log(10, {"train/loss": 0.5})
        tracker.log(20, {"train/loss": 0.5, "train/grad_norm": 0.5})
        tracker.log(20, {"eval/return_mean": 3.0})
        tracker.log(30, {"eval/return_std": 3.0})

    for start, tags in (
        (None, set()), (25, set()), (20, {"train/loss", "train/grad_norm", "eval/return_mean"}), (10, {"train/loss"}),
        (0, set()),
    ):
        with Tracker(tmp_path, start=start) as tracker:
            assert tracker.at_start == tags


@pytest.mark.parametrize("clock", [[1e9] * 4, [4e9, 3e9, 1e9, 2e9]], ids=["stands", "goes back"])
def test_restarts_are_read_in_their_order_whatever_the_clock_says(clock, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for now, (start, steps, loss) in zip(
        clock, [(0, [1, 2, 3, 4], 1), (2, [3, 4, 5], 7), (1, [2], 3), (2, [3], 5)], strict=True
    ):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        log(run, steps=steps, start=start, loss=loss)

    assert [(line["step"], line["train/loss"]) for line in lines(run)] == [(1, 1), (2, 6), (3, 15)]
    assert scalars(run) == served(run) == as_scalars(lines(run))


def test_going_on_without_a_new_value_drops_what_came_later(tmp_path):
    log(tmp_path, steps=[10, 20, 30])
    log(tmp_path, steps=[], start=20)

    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    assert scalars(tmp_path) == as_scalars(lines(tmp_path))


def test_a_run_without_a_value_leaves_no_events(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_events_torn_anywhere_hide_nothing_that_comes_after_them(tmp_path):
    log(tmp_path / "first", steps=[20])
    log(tmp_path / "whole", steps=[20, 30])
    events = (events_of(tmp_path / "whole")).read_bytes()
    for size in range(events_of(tmp_path / "first").stat().st_size, len(events), 5):
        run = tmp_path / str(size)
        log(run, steps=[20, 30])
        os.truncate(events_of(run), size)

        log(run, steps=[30, 40], start=20, loss=7)

        assert scalars(run) == as_scalars(lines(run)), size


GOOD = b'{"step": 10, "train/loss": 1.0}\n'
GARBAGE = {
    "a torn line": b'{"step": 5, "train/lo',
    "not UTF-8": b'{"step": 5, "train/loss": "\xff\xfe"}\n',
    "zeros": bytes(4096) + b"\n",
    "a list": b"[5]\n",
    "a number": b"5\n",
    "no step": b'{"train/loss": 1.0}\n',
    "a step that is NaN": b'{"step": NaN, "train/loss": 1.0}\n',
    "a step that is a word": b'{"step": "5"}\n',
    "a step that is true": b'{"step": true}\n',
    "an endless number": b'{"step": ' + b"1" * 9999 + b"}\n",
    "deep nesting": b"[" * 200_000 + b"\n",
    "blank lines": b"\n\n",
}


@pytest.mark.parametrize("start", [20, None])
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_lines_that_are_none_of_ours_are_dropped(garbage, start, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(GOOD + garbage.rstrip(b"\n") + b"\n" + GOOD + garbage)
    log(tmp_path, steps=[30], start=start)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (
        GOOD * 2 + json.dumps({"step": 30, "train/loss": 0.1 * 30, "train/grad_norm": 0.5}).encode() + b"\n"
    )


def test_a_last_line_that_lacks_its_end_alone_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(GOOD + GOOD.rstrip())
    log(tmp_path, steps=[10], start=None)
    assert [line["step"] for line in lines(tmp_path)] == [10, 10, 10]


def test_a_huge_file_is_not_read_into_memory(tmp_path):
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.write(GOOD)
        file.truncate(1 << 24)  # zeros, without an end of a line
    tracemalloc.start()
    with Tracker(tmp_path, start=20):
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "metrics.jsonl").read_bytes() == GOOD
    assert peak < 1 << 23


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_in_one_line(make, tmp_path):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError) as caught:
        Tracker(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'metrics.jsonl'} is no file; move it away and type the same again"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_lines_that_cannot_be_rewritten_end_the_start_in_one_line_and_stay(call, tmp_path, monkeypatch):
    log(tmp_path, steps=[10, 20, 30])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("drl.tracker.os", Disk({call}, errno.EROFS))

    with pytest.raises(UserError) as caught:
        Tracker(tmp_path, start=20)
    assert re.fullmatch(
        rf"{tmp_path}/metrics.jsonl cannot be rewritten without its torn and later lines: Read-only file system "
        rf"\([0-9.]+ MB are free\); make room or make it writable, then type the same again",
        str(caught.value),
    )
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and not (tmp_path / "metrics.partial").exists()
    Tracker(tmp_path, start=30)  # nothing is to be dropped: nothing need be written


# a disk that refuses


class Disk:
    """The module os, but for the calls `refused`: a refused write leaves half of its bytes behind, the refused fsync of
    a file loses what was written since the last. A folder without permission would refuse as well, but not root."""

    def __init__(self, refused=(), reason=errno.ENOSPC):
        self.refused, self.reason, self.synced = refused, reason, {}

    def __getattr__(self, name):
        real = getattr(os, name)

        def call(*arguments):
            if name not in self.refused:
                return real(*arguments)
            if name == "pwrite":
                handle, record, offset = arguments
                os.pwrite(handle, record[:len(record) // 2], offset)
            raise OSError(self.reason, os.strerror(self.reason))

        return call if callable(real) else real

    def fsync(self, handle):
        """Only noted: the disk of the machine that runs the tests has other work."""
        found = os.fstat(handle)
        if "fsync" not in self.refused or stat.S_ISDIR(found.st_mode):
            self.synced[found.st_ino] = found.st_size
            return
        os.ftruncate(handle, self.synced.get(found.st_ino, 0))
        raise OSError(self.reason, os.strerror(self.reason))


CALLS = ("open", "pwrite", "ftruncate", "fsync")


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr("drl.appended.os", disk)
    monkeypatch.setattr("drl.disk.os", disk)
    return disk


def test_what_is_flushed_was_synced_to_the_last_byte(tmp_path, disk):
    with Tracker(tmp_path) as tracker:
        for step in (1, 2):
            tracker.log(step, {"train/loss": 0.5})
            tracker.flush()
            for path in (tmp_path / "metrics.jsonl", events_of(tmp_path)):
                assert disk.synced[path.stat().st_ino] == path.stat().st_size
        assert disk.synced[tmp_path.stat().st_ino]  # the names of the files


def test_whatever_the_disk_refuses_and_whenever_each_value_arrives_once(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)  # events bear the time
    log(tmp_path / "whole", steps=range(1, 21))
    for seed in range(40):
        draw, run = random.Random(seed), tmp_path / str(seed)
        with Tracker(run) as tracker:
            for step in range(1, 21):
                disk.refused = {call for call in CALLS if draw.random() < 0.25}
                tracker.log(step, {"train/loss": 0.1 * step, "train/grad_norm": 0.5})
                disk.refused = {call for call in CALLS if draw.random() < 0.25}
                if draw.random() < 0.3:
                    tracker.flush()
            disk.refused = ()
        for path in (tmp_path / "whole" / "metrics.jsonl", events_of(tmp_path / "whole")):
            assert (run / path.name).read_bytes() == path.read_bytes(), seed


@pytest.mark.parametrize(("call", "reason"), [
    ("pwrite", errno.ENOSPC), ("pwrite", errno.EFBIG), ("pwrite", errno.EIO), ("open", errno.EROFS),
    ("open", errno.EACCES), ("ftruncate", errno.EIO), ("fsync", errno.EDQUOT),
])
def test_a_disk_that_refuses_is_told_of_once_and_once_more_when_it_takes_all(call, reason, tmp_path, disk, capsys):
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"train/loss": 0.5})
        if call in ("open", "ftruncate"):  # these come again only after another failure
            disk.refused, disk.reason = {"pwrite"}, reason
            tracker.log(2, {"train/loss": 0.5})
        disk.refused, disk.reason = {call}, reason
        for step in (3, 4, 5):
            tracker.log(step, {"train/loss": 0.5})
            tracker.flush()
        refused = capsys.readouterr().err.splitlines()
        disk.refused = ()
        tracker.log(6, {"train/loss": 0.5})
        tracker.flush()
        told = capsys.readouterr().err.splitlines()
    paths = [tmp_path / "metrics.jsonl", events_of(tmp_path)]
    assert len(refused) == 2 and all(
        re.fullmatch(
            rf"drl: {path} cannot be written: {os.strerror(reason)} \([0-9.]+ MB are free\); the run goes on, "
            "what is not written is kept in memory and tried again at the next log", line
        ) for path, line in zip(paths, refused, strict=True)
    )
    assert told == [f"drl: {path} is written again, with all that was kept in memory" for path in paths]
    assert capsys.readouterr().err == ""


def test_a_disk_that_refuses_to_the_end_loses_values_and_says_how_many(tmp_path, disk, capsys):
    """A folder that is read-only from the beginning: no file can be made."""
    disk.refused, disk.reason = {"open"}, errno.EROFS
    log(tmp_path, steps=[1, 2, 3])
    assert list(tmp_path.iterdir()) == []
    told = capsys.readouterr().err.splitlines()
    assert ["cannot be written: Read-only file system" in line for line in told] == [True, True, False, False]
    assert told[2] == f"drl: 6 values could not be written to {tmp_path / 'metrics.jsonl'} and are lost"
    assert told[3].startswith(f"drl: 6 values could not be written to {tmp_path}/events.out.tfevents.")


def test_a_file_that_vanished_while_the_disk_refused_is_begun_anew_without_a_hole(tmp_path, disk):
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"train/loss": 0.5})
        tracker.flush()
        disk.refused = CALLS
        tracker.log(2, {"train/loss": 0.25})
        (tmp_path / "metrics.jsonl").unlink()
        disk.refused = ()
        tracker.log(3, {"train/loss": 0.125})
    assert lines(tmp_path) == [{"step": 2, "train/loss": 0.25}, {"step": 3, "train/loss": 0.125}]


def test_a_stderr_that_refuses_ends_nothing_either(tmp_path, disk, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    with Tracker(tmp_path) as tracker:
        disk.refused = CALLS
        tracker.log(1, {"train/loss": 0.5})
        disk.refused = ()
    assert lines(tmp_path) == [{"step": 1, "train/loss": 0.5}]


def test_training_goes_on_while_its_log_cannot_be_written(tmp_path, monkeypatch, capsys):
    """The trainer's own files are written: its numbers are those of a run whose log was never refused."""
    train(make_config(), make_store(), tmp_path / "whole")
    disk, real = Disk(), Tracker.log
    monkeypatch.setattr("drl.appended.os", disk)

    def refused(self, step, values):
        disk.refused = CALLS if 3 <= step < 9 else ()  # a checkpoint stands at 5
        real(self, step, values)

    monkeypatch.setattr(Tracker, "log", refused)
    train(make_config(), make_store(), tmp_path / "refused")

    assert_same_run(tmp_path / "refused", tmp_path / "whole")
    assert scalars(tmp_path / "refused") == as_scalars(lines(tmp_path / "refused"))
    assert capsys.readouterr().err.count("cannot be written") == 2


FULL = """
import resource, sys
from pathlib import Path

from drl.errors import UserError
from drl.tracker import Tracker


def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


for name, last in (("back", 31), ("gone", 99)):
    with Tracker(Path(sys.argv[1], name)) as tracker:
        for step in range(1, 41):
            allow(1000 if 10 < step < last else resource.RLIM_INFINITY)
            tracker.log(step, {"train/loss": 0.1 * step, "train/grad_norm": 0.5})
            if not step % 7:
                tracker.flush()
try:
    Tracker(Path(sys.argv[1], "back"), start=30)
except UserError as error:
    sys.exit(str(error))
"""


def test_files_that_may_not_grow_cost_no_value_that_finds_room_later(tmp_path):
    """The limit of a file's size is the one full disk that a test can have; a write up to it is torn."""
    log(tmp_path / "whole", steps=range(1, 41))
    result = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    gone = (tmp_path / "gone" / "metrics.jsonl").read_text().splitlines(keepends=True)

    assert (tmp_path / "back" / "metrics.jsonl").read_text() == "".join(whole)
    assert scalars(tmp_path / "back") == scalars(tmp_path / "whole")
    assert 10 < len(gone) < 40 and gone == whole[:len(gone)]
    found = scalars(tmp_path / "gone")["train/loss"]
    assert 0 < len(found) < 40 and found == scalars(tmp_path / "whole")["train/loss"][:len(found)]
    told = result.stderr.splitlines()
    assert result.returncode == 1 and len(told) == 9, told
    assert ["cannot be written: File too large" in line for line in told] == [1, 1, 0, 0, 1, 1, 0, 0, 0]
    assert ["is written again" in line for line in told] == [0, 0, 1, 1, 0, 0, 0, 0, 0]
    for count, line in zip((len(gone), len(found)), told[6:8], strict=True):
        assert line.startswith(f"drl: {2 * (40 - count)} values could not be written")
    assert told[8].startswith(f"{tmp_path}/back/metrics.jsonl cannot be rewritten") and "File too large" in told[8]
