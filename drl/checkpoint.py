"""Checkpoints: safetensors and JSON in one folder, written whole or not at all, nothing unpickled.

    <run>/checkpoints/step-00020000/
        model.safetensors      weights, normaliser, action box: all that acting needs
        training.safetensors   optimizer, sampler, random generators, stream states: all that exact resume needs
        checkpoint.json        format, step, config, spaces, dataset, versions
        manifest.json          SHA-256 of the three
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, as_tensor

from drl import disk
from drl.config import Config
from drl.data.store import Normaliser, Spaces
from drl.disk import MANIFEST
from drl.errors import UserError

FORMAT = 1
MODEL, TRAINING, CARD = "model.safetensors", "training.safetensors", "checkpoint.json"
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
    """Write into `run`, then remove all but the newest `keep` checkpoints. Returns the folder.

    Raises:
        UserError: a weight is not finite; nothing is written.
    """
    if bad := [name for name, weight in checkpoint.weights.items() if not weight.isfinite().all()]:
        raise UserError(f"at update {checkpoint.step} the weight {bad[0]} is not finite; lower --train.learning_rate "
                        f"(now {checkpoint.config.train.learning_rate:g})")
    parent = run / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob("*.partial"):
        shutil.rmtree(leftover)
    final = parent / f"step-{checkpoint.step:08d}"
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
    with disk.whole(final) as partial:
        write_tensors(partial / MODEL, checkpoint.acting())
        write_tensors(partial / TRAINING, checkpoint.training)
        disk.write_json(partial / CARD, card)
    for old in _steps(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load(folder: Path | str) -> Checkpoint:
    """Read a checkpoint, or the newest one of a run folder.

    Raises:
        UserError: there is none, a file is damaged or missing, or it was written by a newer version.
    """
    folder = find(Path(folder))
    disk.require_intact(folder, (MODEL, TRAINING, CARD), "checkpoint", "use an older one")
    card = disk.read_json(folder / CARD, "checkpoint")
    if card.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder} has format {card.get('format')}, this version reads {FORMAT}; "
                        "install the version that wrote it: " + json.dumps(card.get("versions")))
    weights, normaliser, low, high = read_acting(folder / MODEL)
    return Checkpoint(
        config=Config.from_dict(card["config"]),
        step=card["step"],
        weights=weights,
        normaliser=normaliser,
        spaces=Spaces(card["environment"], card["observation_dim"], low, high),
        dataset_fingerprint=card["dataset_fingerprint"],
        versions=card["versions"],
        training=load_file(folder / TRAINING),
        dataset_return=card.get("dataset_return"),
    )


def find(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest of the run that it is.

    Raises:
        UserError: it is neither.
    """
    if (folder / MANIFEST).is_file():
        return folder
    steps = _steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}; name a run such as runs/hopper/medium-replay/seed-0, or type: "
                        "drl train --config configs/hopper/medium-replay.yaml")
    return steps[-1]


def exists(run: Path) -> bool:
    """Whether a run folder holds a checkpoint."""
    return bool(_steps(run))


def _steps(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name))


def read_acting(path: Path) -> tuple[dict[str, Tensor], Normaliser, np.ndarray, np.ndarray]:
    """The weights, the normaliser, and the low and high end of the action box, from a file of `Checkpoint.acting`."""
    tensors = load_file(path)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    normaliser = Normaliser(tensors["normaliser.mean"].numpy(), tensors["normaliser.std"].numpy())
    return weights, normaliser, tensors["action.low"].numpy(), tensors["action.high"].numpy()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of copies, which may share memory or lie on a GPU here."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
