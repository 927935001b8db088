"""Acting over a state that stays where it is: on a GPU a step is then one CUDA graph, whatever the number of rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from drl.captured import Captured, write
from drl.policy_state import PolicyState


class InPlace:
    """`step` of a recurrent policy over one remembered state, which every call overwrites.

    Dimension key: B rows, O observation, A action.
    """

    def __init__(self, step: Callable, state: PolicyState, observation_dim: int):
        device, batch = state.timestep.device, len(state.timestep)
        self._step, self._state, self._captured = step, state, Captured(device)
        dtype = state.return_to_go.dtype
        self._observation = torch.zeros(batch, observation_dim, device=device, dtype=dtype)
        self._reward = torch.zeros(batch, device=device, dtype=dtype)

    def __len__(self) -> int:
        return len(self._reward)

    def __call__(self, observation: Tensor, reward: Tensor) -> Tensor:
        """Actions (B, A), overwritten by the next call; observation (B, O) and reward (B,) are copied to the device."""
        self._observation.copy_(observation, non_blocking=True)
        self._reward.copy_(reward, non_blocking=True)
        return self._captured("step", self._advance, [])

    def _advance(self) -> Tensor:
        action, after = self._step(self._observation, self._reward, self._state)
        write(self._state.tensors().values(), after.tensors().values())
        return action
