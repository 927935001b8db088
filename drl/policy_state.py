"""What a policy remembers between two steps: plain records, an argument and a result, never edited in place.

Dimension key: B rows, K window steps, O observation, A action.
"""

import ctypes
import math
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from drl.kernels import LinearAttentionState
from drl.model import ModelState


class PolicyState(NamedTuple):
    """A recurrent policy mid-episode. Rows at timestep 0 have not begun.

    Attributes:
        attention: one LinearAttentionState per layer.
        target_return: what the row asked for at the start of its episode, (B,).
        return_to_go: what is left to earn, (B,).
        timestep: steps taken, (B,) int64.
        previous_action: in [-1, 1], (B, A).
    """

    attention: ModelState
    target_return: Tensor
    return_to_go: Tensor
    timestep: Tensor
    previous_action: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same state on another device."""
        return type(self)(tuple(layer.to(device) for layer in self.attention), *(x.to(device) for x in self[1:]))

    def tensors(self) -> dict[str, Tensor]:
        """Flat and named, for safetensors."""
        layers = {
            f"attention.{i}.{name}": part for i, layer in enumerate(self.attention) for name, part in
            layer._asdict().items()
        }
        return layers | {name: getattr(self, name) for name in self._fields[1:]}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        count = sum(name.endswith(".kv") for name in tensors)
        attention = tuple(
            LinearAttentionState(tensors[f"attention.{i}.kv"], tensors[f"attention.{i}.z"]) for i in range(count)
        )
        return cls(attention, *(tensors[name] for name in cls._fields[1:]))


class WindowState(NamedTuple):
    """A windowed policy mid-episode: the last K steps, the oldest first, filled from the left.

    Attributes:
        target_return, return_to_go, timestep: as in PolicyState.
        returns_to_go: (B, K); observations, normalised: (B, K, O); actions, in [-1, 1]: (B, K, A).
    """

    target_return: Tensor
    return_to_go: Tensor
    timestep: Tensor
    returns_to_go: Tensor
    observations: Tensor
    actions: Tensor


def address_of(array: np.ndarray) -> int:
    """Where the numbers of a writable array begin; much quicker than array.ctypes."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array)) if array.size else 0


class Layout(NamedTuple):
    """Where the parts of a packed row stand: as drl_policy.h says, `padded` numbers for each head's values.

    Attributes:
        mark: of the weights, so that the state of another model is known.
        head, size: numbers before the layers, and of all.
    """

    mark: int
    layers: int
    heads: int
    features: int
    action_dim: int
    head: int
    padded: int
    size: int


class PackedState:
    """A PolicyState as the compiled step keeps it: S numbers in one row of memory for each environment.

    It has the fields of PolicyState, made when asked for; they are copies.
    """

    __slots__ = ("_block", "_rows", "layout", "address")

    def __init__(self, block: np.ndarray, rows: int, layout: Layout, address: int | None = None):
        """`block`: float32, the rows and whatever behind them; `address`: of its first number, if that is known."""
        self._block, self._rows, self.layout = block, rows, layout
        self.address = address_of(block) if address is None else address

    def __len__(self) -> int:
        return self._rows

    @property
    def array(self) -> np.ndarray:
        """The rows, (B, S), which nobody but their maker may change."""
        size = self.layout.size
        return self._block[: self._rows * size].reshape(self._rows, size)

    @classmethod
    def zeros(cls, rows: int, layout: Layout) -> Self:
        """Rows of zeros."""
        return cls(np.zeros(rows * layout.size, np.float32), rows, layout)

    @classmethod
    def packed(cls, state: PolicyState, layout: Layout) -> Self:
        """The same numbers as `state`.

        Raises:
            ValueError: the state is that of a model of another shape.
        """
        B, dim = len(state.timestep), layout.features
        expected = {"kv": (B, layout.heads, dim, dim), "z": (B, layout.heads, dim)}
        shapes = [{name: tuple(part.shape) for name, part in layer._asdict().items()} for layer in state.attention]
        if shapes != [expected] * layout.layers or state.previous_action.shape != (B, layout.action_dim):
            raise ValueError(f"the state belongs to another model, of {len(shapes)} layers {shapes[0]} and "
                             f"{state.previous_action.shape[1]} action channels; this one has {layout.layers} layers "
                             f"{expected} and {layout.action_dim} action channels")
        result = cls.zeros(B, layout)
        array = result.array
        array[:, 0], array[:, 1] = state.target_return.cpu(), state.return_to_go.cpu()
        array[:, 2] = state.timestep.cpu().numpy().astype(np.int32).view(np.float32)
        array[:, 3: 3 + layout.action_dim] = state.previous_action.cpu()
        for layer, (kv, z) in zip(state.attention, result._layers(), strict=True):
            kv[..., :dim], z[..., :dim] = layer.kv.cpu(), layer.z.cpu()
        return result

    def unpacked(self) -> PolicyState:
        """The same state as tensors of its own."""
        return PolicyState(*(getattr(self, name) for name in PolicyState._fields))

    def _replace(self, **fields) -> PolicyState:
        """As a NamedTuple's."""
        return self.unpacked()._replace(**fields)

    def to(self, device: torch.device | str) -> PolicyState:
        """The same state as tensors on a device."""
        return self.unpacked().to(device)

    def tensors(self) -> dict[str, Tensor]:
        """Flat and named, for safetensors; PolicyState.from_tensors reads them."""
        return self.unpacked().tensors()

    @property
    def attention(self) -> ModelState:
        dim = self.layout.features
        return tuple(
            LinearAttentionState(torch.tensor(kv[..., :dim]), torch.tensor(z[..., :dim])) for kv, z in self._layers()
        )

    @property
    def target_return(self) -> Tensor:
        return torch.tensor(self.array[:, 0])

    @property
    def return_to_go(self) -> Tensor:
        return torch.tensor(self.array[:, 1])

    @property
    def timestep(self) -> Tensor:
        return torch.tensor(np.ascontiguousarray(self.array[:, 2]).view(np.int32).astype(np.int64))

    @property
    def previous_action(self) -> Tensor:
        return torch.tensor(self.array[:, 3: 3 + self.layout.action_dim])

    def _layers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Views (B, heads, features, padded) and (B, heads, padded) of each layer's kv and z."""
        layout = self.layout
        shapes = (layout.heads, layout.features, layout.padded), (layout.heads, layout.padded)
        array, at = self.array, layout.head
        for _ in range(layout.layers):
            parts = []
            for shape in shapes:
                end = at + math.prod(shape)
                parts.append(array[:, at:end].reshape(-1, *shape))
                at = end
            yield parts[0], parts[1]
