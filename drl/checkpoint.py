"""Checkpoints: safetensors and JSON in one folder, written whole or not at all, nothing unpickled.

    <run>/checkpoints/step-00020000/
        model.safetensors      weights, normaliser, action box: all that acting needs
        training.safetensors   optimizer, sampler, random generators, stream states: all that exact resume needs
        checkpoint.json        format, step, config, spaces, dataset, versions
        manifest.json          SHA-256 of the three
    <run>/checkpoints/latest   the name of the newest

A save is killed, or refused by the disk, at any moment: what was there is as it was, and the next start finds it.
"""

import contextlib
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor, as_tensor

from drl import disk, intact
from drl.config import Config
from drl.data.store import Normaliser, Spaces
from drl.errors import UserError
from drl.intact import MANIFEST, Damaged

FORMAT = 1
MODEL, TRAINING, CARD = "model.safetensors", "training.safetensors", "checkpoint.json"
WHAT, LATEST = "checkpoint", "latest"
STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A model that can act, and what it needs to go on training.

    Attributes:
        config: resolved; target_returns are filled in.
        step: gradient updates done.
        weights: the model's state dict.
        normaliser, spaces: as in the EpisodeStore it was trained on.
        dataset_fingerprint: of that store.
        versions: of the packages that wrote it.
        training: flat dict of tensors for the trainer; empty where only acting is wanted.
        dataset_return: mean return of that store's episodes, to hold a score against.
    """

    config: Config
    step: int
    weights: dict[str, Tensor]
    normaliser: Normaliser
    spaces: Spaces
    dataset_fingerprint: str
    versions: dict[str, str]
    training: dict[str, Tensor]
    dataset_return: float | None = None

    def acting(self) -> dict[str, Tensor]:
        """All that acting needs, by the names it has on disk."""
        spaces, normaliser = self.spaces, self.normaliser
        return {f"model.{name}": tensor for name, tensor in self.weights.items()} | {
            "normaliser.mean": as_tensor(normaliser.mean),
            "normaliser.std": as_tensor(normaliser.std),
            "action.low": as_tensor(spaces.action_low),
            "action.high": as_tensor(spaces.action_high),
        }


def save(checkpoint: Checkpoint, run: Path, keep: int) -> Path:
    """Write into `run`, point `latest` at the newest, then remove all but the newest `keep`. Returns the folder.

    Raises:
        UserError: a number is not finite, or the disk refuses; the earlier checkpoints are as they were.
    """
    _require_finite(checkpoint)
    parent = run / "checkpoints"
    final = parent / _name(checkpoint.step)
    files = {MODEL: checkpoint.acting(), TRAINING: checkpoint.training}
    spaces = checkpoint.spaces
    card = {
        "format": FORMAT,
        "step": checkpoint.step,
        "environment": spaces.environment,
        "observation_dim": spaces.observation_dim,
        "action_dim": spaces.action_dim,
        "dataset_fingerprint": checkpoint.dataset_fingerprint,
        "dataset_return": checkpoint.dataset_return,
        "versions": checkpoint.versions,
        "config": checkpoint.config.to_dict(),
    }
    needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    cure = f"make room, then type: drl train --resume --run {run}"
    with disk.refusal_told(parent, f"the checkpoint of update {checkpoint.step}", cure, needed):
        parent.mkdir(parents=True, exist_ok=True)
        with intact.whole(final) as partial:
            for name, tensors in files.items():
                write_tensors(partial / name, tensors)
            intact.write_json(partial / CARD, card)
        _point_latest(parent)
        for old in _steps(run)[:-keep]:
            _remove(old)
    return final


def resume(run: Path, first: bool = True) -> Checkpoint | None:
    """`load` for whoever goes on with a run; None where it has no checkpoint. Newer ones that are damaged are put aside
    by the `first` process, as step-00020000.damaged, so that none comes after those that will be written.

    Raises:
        UserError: as `load`, or the disk refuses.
    """
    if not _steps(run):
        return None
    checkpoint = load(run)
    with _told(run):
        for step in _steps(run) if first else ():
            if step.name > _name(checkpoint.step):
                aside = step.with_name(f"{step.name}.damaged")
                if aside.exists():
                    _remove(aside)
                step.rename(aside)
        if first:
            _point_latest(run / "checkpoints")
    return checkpoint


def tidy(run: Path) -> None:
    """Remove what a killed process left of a run's checkpoints; for the one who may write there.

    Raises:
        UserError: the disk refuses.
    """
    with _told(run):
        for leftover in (run / "checkpoints").glob("*.partial"):
            _remove(leftover)


def _told(run: Path) -> contextlib.AbstractContextManager:
    return disk.refusal_told(run, f"run {run}", "name another folder with --run")


def load(folder: Path | str) -> Checkpoint:
    """Read a checkpoint, or the newest sound one of a run folder; a newer one that is damaged is told on stderr.

    Raises:
        UserError: there is none, files are damaged, missing or added, or they were written by a newer version.
    """
    folder = Path(folder)
    if _is_one(folder):
        try:
            return _read(folder)
        except Damaged as error:
            raise Damaged(f"{error}; use an older one") from error
    damaged: dict[Path, Damaged] = {}
    while steps := [step for step in _steps(folder) if step not in damaged]:
        try:
            checkpoint = _read(steps[-1])
        except Damaged as error:
            if steps[-1].exists():  # else whoever trains has removed it meanwhile
                damaged[steps[-1]] = error
            continue
        for error in damaged.values():
            print(f"drl: WARNING: {error}; going on with {steps[-1].name} instead", file=sys.stderr)
        return checkpoint
    if damaged:
        raise Damaged(f"{next(iter(damaged.values()))}; no sound one is left in {folder}, begin anew: name another "
                      "folder with --run")
    raise _none_in(folder)


def _read(folder: Path) -> Checkpoint:
    """Raises Damaged where it is not as it was written, UserError where it is of no use otherwise."""
    intact.require_intact(folder, [CARD], WHAT)
    card = intact.read_json(folder / CARD, WHAT)
    if card.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder} has format {card.get('format')}, this version reads {FORMAT}; "
                        "install the version that wrote it: " + json.dumps(card.get("versions")))
    intact.require_whole(folder, [MODEL, TRAINING, CARD], WHAT)
    try:
        (weights, normaliser, low, high), training = read_acting(folder / MODEL), load_file(folder / TRAINING)
    except FileNotFoundError as error:
        raise Damaged(f"checkpoint {folder} was removed while it was read") from error
    return Checkpoint(
        config=Config.from_dict(card["config"]),
        step=card["step"],
        weights=weights,
        normaliser=normaliser,
        spaces=Spaces(card["environment"], card["observation_dim"], low, high),
        dataset_fingerprint=card["dataset_fingerprint"],
        versions=card["versions"],
        training=training,
        dataset_return=card.get("dataset_return"),
    )


def find(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest of the run that it is, sound or not.

    Raises:
        UserError: it is neither.
    """
    if _is_one(folder):
        return folder
    steps = _steps(folder)
    if not steps:
        raise _none_in(folder)
    return steps[-1]


def exists(run: Path) -> bool:
    """Whether a run folder holds a checkpoint."""
    return bool(_steps(run))


def _is_one(folder: Path) -> bool:
    """Whether a folder is meant to be a checkpoint, whatever became of it."""
    return (folder / MANIFEST).is_file() or bool(STEP.fullmatch(folder.resolve().name))


def _none_in(folder: Path) -> UserError:
    return UserError(f"no checkpoint in {folder}; name a run such as runs/hopper/medium-replay/seed-0, or type: "
                     "drl train --config configs/hopper/medium-replay.yaml")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _steps(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name))


def _point_latest(parent: Path) -> None:
    """Let the file `latest` name the newest checkpoint: for people and scripts, nothing here reads it."""
    if steps := _steps(parent.parent):
        disk.write_text(parent / LATEST, f"{steps[-1].name}\n")


def _remove(path: Path) -> None:
    """Take a name away in one step, so that half a folder is never taken for a damaged checkpoint."""
    if not path.name.endswith(".partial"):
        path = path.rename(path.with_name(f"{path.name}.partial"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _require_finite(checkpoint: Checkpoint) -> None:
    for kind, tensors in (("weight", checkpoint.weights), ("training state", checkpoint.training)):
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"at update {checkpoint.step} the {kind} {name} is not finite and nothing is saved; "
                                f"lower --train.learning_rate (now {checkpoint.config.train.learning_rate:g})")


def read_acting(path: Path) -> tuple[dict[str, Tensor], Normaliser, np.ndarray, np.ndarray]:
    """The weights, the normaliser, and the low and high end of the action box, from a file of `Checkpoint.acting`."""
    tensors = load_file(path)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    normaliser = Normaliser(tensors["normaliser.mean"].numpy(), tensors["normaliser.std"].numpy())
    return weights, normaliser, tensors["action.low"].numpy(), tensors["action.high"].numpy()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of copies, which may share memory or lie on a GPU here. Raises OSError as any plain file."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.write_bytes(serialized(copies, metadata))
