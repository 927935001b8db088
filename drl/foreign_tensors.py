"""Tensor files from strangers: what a safetensors file claims is looked at before anything is mapped, and whether its
tensors are those of the model that it says they are, before anything is allocated.

The library checks offsets, overlaps and the size of the file; it takes any number of tensors and dimensions, a name
twice, names of any characters, truth values that are neither, and a dimension of 2^62 beside one of 0.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from drl.attention import decay
from drl.config import Config
from drl.data.store import Normaliser, Spaces
from drl.errors import UserError, shown
from drl.foreign import checked, fits, open_regular, parse_json
from drl.model import make

TENSORS, HEADER = 64 << 30, 8_000_000  # bytes of a file and of its header, at most
COUNT, RANK, NAME = 10_000, 8, 200  # tensors of a file, dimensions of a tensor, characters of a name, at most
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}  # bytes of a number, by safetensors' dtypes


def read_tensors(path: Path, what: str, *, most: int = TENSORS) -> dict[str, Tensor]:
    """The tensors of a safetensors file of a `what`.

    Raises:
        UserError: the file is missing, a symbolic link, larger than `most` bytes, or is not what `safetensors` writes
            of tensors that are ours.
    """
    try:
        with open_regular(path, f"{what} file", most) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > HEADER:
                raise ValueError(f"a header of {length} bytes")
            _check(parse_json(file.read(length)))
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bool and (tensor.view(torch.uint8) > 1).any():
                raise ValueError(f"{name} has a truth value that is neither 0 nor 1")
        return tensors
    except UserError:
        raise
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(f"{what} file {path} is no safetensors file of ours: {' '.join(str(error).split())[:200]}"
                        ) from error


def _check(header: Any) -> None:
    """Raises ValueError unless the header of a file names tensors that may be ours."""
    if not isinstance(header, dict) or len(header) > COUNT:
        raise ValueError(f"its header names no tensors, or more than {COUNT}")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not (name.isascii() and name.isprintable() and 0 < len(name) <= NAME):
            raise ValueError(f"a tensor by the name {shown(name)}")
        dtype, shape, offsets = checked(entry, name, {"dtype": str, "shape": list, "data_offsets": list}).values()
        if dtype not in WIDTHS or len(shape) > RANK or not fits(shape, list[int]):
            raise ValueError(f"{name} is of dtype {dtype} and shape {shown(shape)}")
        if not (len(offsets) == 2 and fits(offsets, list[int])):
            raise ValueError(f"{name} lies at {shown(offsets)}")
        if (size := offsets[1] - offsets[0]) != math.prod(shape) * WIDTHS[dtype]:
            raise ValueError(f"{name} of shape {shown(shape)} has {size} bytes")


def require_sound(
    config: Config, weights: dict[str, Tensor], spaces: Spaces, normaliser: Normaliser, what: str
) -> None:
    """Raises UserError unless the weights are those of the model of this config in these spaces, and they, the action
    box and the normaliser are float32 numbers that can be computed with. No memory is allocated for a model.

    Args:
        what: the weights are of, for the message.
    """
    if flaw := _flaw_of_spaces(spaces, normaliser) or _flaw_of_weights(config, weights, spaces):
        raise UserError(f"{what} is not sound: {flaw}")


def _flaw_of_spaces(spaces: Spaces, normaliser: Normaliser) -> str:
    low, high = spaces.action_low, spaces.action_high
    for name, array, size in (
        ("normaliser.mean", normaliser.mean, spaces.observation_dim),
        ("normaliser.std", normaliser.std, spaces.observation_dim),
        ("action.low", low, spaces.action_dim if low.ndim else 0),
        ("action.high", high, spaces.action_dim if low.ndim else 0),
    ):
        if array.shape != (size,) or not size or array.dtype != np.float32:
            return f"{name} is {array.dtype} of shape {shown(array.shape)}, expected is float32 of shape ({size},)"
        if not np.isfinite(array).all():
            return f"{name} is not finite"
    if not (normaliser.std > 0).all():
        return "normaliser.std is not positive"
    return "" if (low < high).all() else "action.low is not below action.high"


def _flaw_of_weights(config: Config, weights: dict[str, Tensor], spaces: Spaces) -> str:
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(layers) != config.model.layers:  # before a model of very many is built, which takes seconds
        return f"there are weights of {len(layers)} layers, not of {config.model.layers}"
    with torch.device("meta"):
        model = make(config.model, spaces.observation_dim, spaces.action_dim)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if other := sorted(expected.keys() ^ weights.keys()):
        return f"the weight {shown(other[0])} is {'missing' if other[0] in expected else 'not one of its model'}"
    for name, weight in weights.items():
        if tuple(weight.shape) != expected[name] or weight.dtype != torch.float32:
            return f"the weight {name} is {weight.dtype} of {tuple(weight.shape)}, not float32 of {expected[name]}"
        if not weight.isfinite().all():
            return f"the weight {name} is not finite"
        if name.endswith("attention.decay") and tuple(weight.tolist()) != decay(config.model):
            return f"the weight {name} is not that of model.half_lives"
    return ""
