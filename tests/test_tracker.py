"""One call, two files, the same numbers; a run that goes on leaves each step standing once."""

import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drl.tracker import TAGS, Tracker


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scalars(run):
    """{tag: [(step, value), ...]} of the event files, as TensorBoard shows them."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0})  # 0: all of them
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def as_scalars(logged):
    found = {}
    for line in logged:
        for tag in line.keys() - {"step"}:
            found.setdefault(tag, []).append((line["step"], np.float32(line[tag])))  # TensorBoard keeps float32
    return found


def log(run, steps, start=0, loss=0.1):
    with Tracker(run, start=start) as tracker:
        for step in steps:
            tracker.log(step, {"train/loss": loss * step, "train/grad_norm": 0.5})


def age(run):
    """Event files sort by the second they were made in: let those that are here be older."""
    for path in run.glob("events.out.tfevents.*"):
        path.rename(run / f"events.out.tfevents.{len(list(run.glob('*.aged'))):010d}.aged")


def test_every_tag_of_the_list_is_written_and_nothing_else(tmp_path):
    assert TAGS == {
        "train/loss", "train/grad_norm", "train/learning_rate", "train/updates_per_second",
        "eval/normalized_score", "eval/normalized_score_std", "eval/return_mean", "eval/return_std",
        "eval/episode_length", "eval/env_steps_per_second",
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
        for step in range(200):  # events wait in a queue for their writer
            tracker.log(step, {"train/loss": 0.25})
        tracker.flush()
        assert lines(tmp_path) == [{"step": step, "train/loss": 0.25} for step in range(200)]
        assert scalars(tmp_path) == {"train/loss": [(step, 0.25) for step in range(200)]}


def test_going_on_from_an_update_drops_what_came_after_it(tmp_path):
    log(tmp_path, steps=[10, 20, 30, 40])
    age(tmp_path)
    log(tmp_path, steps=[30, 40, 50], start=20, loss=7)

    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        (10, 0.1 * 10), (20, 0.1 * 20), (30, 210), (40, 280), (50, 350)
    ]
    assert scalars(tmp_path) == as_scalars(lines(tmp_path))


def test_beginning_anew_drops_everything(tmp_path):
    # a run that was killed before its first checkpoint
    log(tmp_path, steps=[10, 20])
    age(tmp_path)
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
    age(tmp_path)
    log(tmp_path, steps=[10], start=None, loss=7)

    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(10, 1.0), (20, 2.0), (10, 70)]
    assert sorted(scalars(tmp_path)["train/loss"]) == [(10, 1.0), (10, 70.0), (20, 2.0)]
