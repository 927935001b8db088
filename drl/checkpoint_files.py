"""A checkpoint and its folder: safetensors and JSON, nothing unpickled, nothing of it trusted.

    model.safetensors      weights, normaliser, action box: all that acting needs
    training.safetensors   optimizer, sampler, random generators, stream states: all that exact resume needs
    checkpoint.json        format, step, config, spaces, dataset, versions
    manifest.json          SHA-256 of the three
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import save as serialized
from torch import Tensor, as_tensor

from drl import foreign, intact
from drl.config import Config
from drl.config_files import stored
from drl.data.store import Normaliser, Spaces
from drl.errors import UserError, shown
from drl.foreign_tensors import require_sound, read_tensors

FORMAT = 1
MODEL, TRAINING, CARD = "model.safetensors", "training.safetensors", "checkpoint.json"
WHAT = "checkpoint"
KINDS = {"step": int, "environment": str, "observation_dim": int, "action_dim": int, "dataset_fingerprint": str,
         "dataset_return": float | None, "versions": dict[str, str], "config": dict}


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


def size(checkpoint: Checkpoint) -> int:
    """Bytes of its tensors, which are nearly all of it."""
    return sum(tensor.nbytes for tensors in (checkpoint.acting(), checkpoint.training) for tensor in tensors.values())


def require_finite(checkpoint: Checkpoint) -> None:
    """Raises UserError unless every number of it is finite."""
    for kind, tensors in (("weight", checkpoint.weights), ("training state", checkpoint.training)):
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"at update {checkpoint.step} the {kind} {name} is not finite and nothing is saved; "
                                f"lower --train.learning_rate (now {checkpoint.config.train.learning_rate:g})")


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Put the files into `folder`, all but the manifest. Raises OSError where the disk refuses."""
    spaces = checkpoint.spaces
    write_tensors(folder / MODEL, checkpoint.acting())
    write_tensors(folder / TRAINING, checkpoint.training)
    intact.write_json(folder / CARD, {
        "format": FORMAT,
        "step": checkpoint.step,
        "environment": spaces.environment,
        "observation_dim": spaces.observation_dim,
        "action_dim": spaces.action_dim,
        "dataset_fingerprint": checkpoint.dataset_fingerprint,
        "dataset_return": checkpoint.dataset_return,
        "versions": checkpoint.versions,
        "config": checkpoint.config.to_dict(),
    })


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        Damaged: a file is not as it was written.
        UserError: it is of another format, or was made by someone else and does not fit itself.
    """
    what = f"{WHAT} {folder}"
    intact.require_intact(folder, [CARD], WHAT)
    card = intact.read_json(folder / CARD, WHAT)
    if card.get("format") != FORMAT:
        raise UserError(f"{what} has format {shown(card.get('format'))}, this version reads {FORMAT}; install the "
                        f"version that wrote it: {json.dumps(card.get('versions'))[:400]}")
    intact.require_whole(folder, [MODEL, TRAINING, CARD], WHAT)
    card = foreign.checked({"dataset_return": None} | card, what, KINDS)
    weights, normaliser, low, high = read_acting(folder / MODEL)
    try:
        config = stored(card["config"])
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    spaces = Spaces(card["environment"], card["observation_dim"], low, high)
    require_sound(config, weights, spaces, normaliser, what)
    return Checkpoint(
        config=config,
        step=card["step"],
        weights=weights,
        normaliser=normaliser,
        spaces=spaces,
        dataset_fingerprint=card["dataset_fingerprint"],
        versions=card["versions"],
        training=read_tensors(folder / TRAINING, WHAT),
        dataset_return=card["dataset_return"],
    )


def read_acting(path: Path) -> tuple[dict[str, Tensor], Normaliser, np.ndarray, np.ndarray]:
    """The weights, the normaliser, and the low and high end of the action box, from a file of `Checkpoint.acting`."""
    tensors = read_tensors(path, WHAT)
    if missing := {"normaliser.mean", "normaliser.std", "action.low", "action.high"} - tensors.keys():
        raise UserError(f"{WHAT} file {path} has no {min(missing)}")
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    normaliser = Normaliser(tensors["normaliser.mean"].numpy(), tensors["normaliser.std"].numpy())
    return weights, normaliser, tensors["action.low"].numpy(), tensors["action.high"].numpy()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of copies, which may share memory or lie on a GPU here. Raises OSError as any plain file."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.write_bytes(serialized(copies, metadata))
