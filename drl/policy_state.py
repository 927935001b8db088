"""What a policy remembers between two steps: plain records, an argument and a result, never edited in place.

Dimension key: B rows, K window steps, O observation, A action.
"""

from typing import NamedTuple, Self

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
