"""A small dataset, runs of it that do everything often, and whether two runs are the same."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import toys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drl.data import minari_writer
from drl.data.minari_remote import datasets_path

FILES = ("model.safetensors", "training.safetensors", "checkpoint.json")  # that a manifest must name
CLOCKS = {"train/updates_per_second", "eval/env_steps_per_second", "env_steps_per_second"}  # what a clock decides
LEFTOVERS = ("*.partial", ".partial-*", "*.tmp")
SETTINGS = {
    "model.width": 16, "model.layers": 1, "model.heads": 2, "model.dropout": 0.1, "device": "cpu",
    "train.updates": 300, "train.batch_size": 4, "train.context": 5, "train.warmup_updates": 10,
    "train.log_every": 1, "train.checkpoint_every": 20, "train.keep_checkpoints": 2, "train.evaluate_every": 40,
    "evaluate.episodes": 1,
}


def dataset(episodes: int = 30) -> None:
    """Write the toy dataset below the datasets root of the moment."""
    minari_writer.write(toys.ID, toys.recorded([40] * episodes), environment=toys.ENVIRONMENT, algorithm="noise",
                        reference=None, description="", extra={})


def root(folder: Path):
    """A context in which `folder` is the datasets root, here and in the processes started here."""
    return datasets_path(folder / "datasets")


def train(run: Path, **settings: Any) -> list[str]:
    """The arguments of `drl` that start a run or go on with it; a name's "_" after its group is a dot."""
    given = SETTINGS | {name.replace("_", ".", 1): value for name, value in settings.items()}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return ["train", "--dataset", toys.ID, "--run", str(run), "--resume", *options]


def differences(actual: Path, expected: Path) -> list[str]:
    """In what a finished run differs from another, but for what clocks decide; empty: in nothing."""
    found = [f"{path.name} is left over" for pattern in LEFTOVERS for path in actual.rglob(pattern)]
    for name in ("model.safetensors", "training.safetensors"):
        one, other = (_last(run) / name for run in (actual, expected))
        if not one.is_file() or one.read_bytes() != other.read_bytes():
            found.append(f"{name} of {_last(actual).name} differs")
    for what, read in {"metrics.jsonl": metrics, "evaluation.json": evaluations, "TensorBoard": curves}.items():
        if (one := read(actual)) != (other := read(expected)):
            found.append(f"{what} differs: {_first(one, other)}")
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock decides."""
    return [_timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The results in evaluation.json, without what a clock decides and without versions."""
    if not (run / "evaluation.json").exists():
        return []
    results = json.loads((run / "evaluation.json").read_text())["results"]
    return [_timeless(result) | {"versions": None} for result in results]


def curves(run: Path) -> list[tuple[str, int, float]]:
    """Every scalar that TensorBoard shows of a run: tag, step and value, in order."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each purge, which is as it should
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return sorted((tag, event.step, event.value) for tag in events.Tags()["scalars"] if tag not in CLOCKS
                  for event in events.Scalars(tag))


def intact(checkpoint: Path) -> bool:
    """Whether a checkpoint is what its manifest says, found out without `drl`."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        return set(FILES) <= manifest.keys() and all(
            hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == digest for name, digest in manifest.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def steps(run: Path) -> dict[int, Path]:
    """The checkpoints under their own names, whole or not, by update, ascending; the run may be at work on them."""
    try:
        names = os.listdir(run / "checkpoints")
    except FileNotFoundError:
        return {}
    found = {name.removeprefix("step-"): name for name in sorted(names) if name.startswith("step-")}
    return {int(step): run / "checkpoints" / name for step, name in found.items() if step.isdecimal()}


def newest(run: Path) -> int:
    """The update of the newest intact checkpoint; 0: there is none."""
    return max((step for step, path in steps(run).items() if intact(path)), default=0)


def _last(run: Path) -> Path:
    found = steps(run)
    return found[max(found)] if found else run / "checkpoints"


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in CLOCKS}


def _first(one: list, other: list) -> str:
    """Where two lists part, in few words."""
    place = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    entry = (one[place:] or ["nothing"])[0], (other[place:] or ["nothing"])[0]
    return f"{len(one)} for {len(other)} entries, at {place} {str(entry[0])[:80]} for {str(entry[1])[:80]}"
