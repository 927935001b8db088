"""The doors of a policy: load, step, reset / act, predict, for one row or many, numpy or tensors.

Both policies of policy.py have them; how an action is decided is theirs.

Dimension key: B rows, O observation, A action.
"""

import threading
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from drl import exported
from drl.acting import InPlace
from drl.captured import current, is_cuda
from drl.checkpoint import Checkpoint
from drl.data.sampling import to_box
from drl.engine import ENGINES as COMPILED
from drl.engine import ActionError
from drl.errors import UserError
from drl.foreign_tensors import require_sound
from drl.model import make
from drl.policy_state import PolicyState

ENGINES = ("auto", "torch", *COMPILED)


class Doors:
    """A policy whose engine is torch.

    Attributes:
        engine: what runs it: "torch", "cpu" or "cpu-bfloat16".
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", engine: str = "auto"):
        """Raises UserError where the weights do not fit the config or a number is not finite."""
        self.engine = self.resolve(engine, device)
        spaces, normaliser = checkpoint.spaces, checkpoint.normaliser
        require_sound(checkpoint.config, checkpoint.weights, spaces, normaliser, "the policy")
        self.config, self.spaces = checkpoint.config, spaces
        model = make(checkpoint.config.model, spaces.observation_dim, spaces.action_dim)
        model.load_state_dict(checkpoint.weights)
        self.model = model.eval().to(device)
        arrays = (normaliser.mean, normaliser.std, spaces.action_low, spaces.action_high)
        self._mean, self._std, self._low, self._high = (torch.as_tensor(array, device=device) for array in arrays)
        self.device = str(self._mean.device)  # with its number: "cuda" may be another one in another thread
        self._remembered: Any = None
        self._acting = threading.Lock()

    @staticmethod
    def resolve(engine: str, device: str) -> str:
        """The engine that `engine` means on this device, for a policy that only torch can run."""
        if engine not in ENGINES:
            raise UserError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
        if engine in COMPILED:
            raise UserError(f"engine {engine!r} steps recurrently; a window is recomputed by engine 'torch'")
        return "torch"

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu", engine: str = "auto") -> Self:
        """From a run, a checkpoint or an exported policy, which must do what its golden trace says.

        Raises:
            UserError: the folder is none of them, it is damaged, a number of it is not finite, the engine is unknown.
        """
        checkpoint, trace = exported.load(folder)
        policy = cls(checkpoint, device, engine)
        exported.check(policy, trace, folder)
        return policy

    def double(self) -> Self:
        """The same policy in float64, in place: for checking numbers, not for speed."""
        self.model.double()
        self._mean, self._std, self._low, self._high = (
            x.double() for x in (self._mean, self._std, self._low, self._high)
        )
        return self

    def step(self, observation, reward, state, episode_start=None):
        """Act once in every row.

        Args:
            observation: raw, (B, O), numpy or tensor.
            reward: what the previous action earned, in the environment's units, (B,) or one number for all rows;
                not read in rows that begin an episode.
            state: from `initial_state` or the step before; it is not changed.
            episode_start: True in rows that begin an episode now, (B,); None: only rows at timestep 0 do.

        Returns:
            Actions (B, A) in the environment's box, of the kind of `observation`, and the new state.

        Raises:
            ValueError: a shape does not fit the state and the environment, an observation or a reward is not finite.
            ActionError, a ValueError: an action is not finite although they are.
            On a GPU nobody looks whether tensors are finite, which would wait for the device: neither what is given nor
            the actions, unless these are returned as numpy.
        """
        with current(self.device), torch.no_grad():
            return self._step(observation, reward, state, episode_start)

    def _step(self, observation, reward, state, episode_start):
        observation_BO = self._observation(observation, len(state.timestep))
        first_B = state.timestep == 0
        if episode_start is not None:
            first_B = first_B | self._per_row("episode_start", episode_start, len(first_B)).bool()
        reward_B = self._per_row("reward", reward, len(first_B))
        if not is_cuda(self.device):
            _check_finite("observation", observation_BO)
            _check_finite("reward", reward_B.masked_fill(first_B, 0)[:, None])
        return_B = torch.where(first_B, state.target_return, state.return_to_go - reward_B)
        timestep_B = state.timestep.masked_fill(first_B, 0)
        normal_BO = (observation_BO - self._mean) / self._std
        action_BA, state = self._decide(normal_BO, return_B, timestep_B, first_B, state)
        action_BA = to_box(action_BA, self._low, self._high)
        return self._given(action_BA, observation), state

    def reset(self, batch: int = 1, target_return: float | None = None) -> None:
        """Begin episodes whose state this object remembers; see `act`. Default target: the config's first."""
        state = self.initial_state(batch, target_return)
        if isinstance(state, PolicyState) and is_cuda(self.device):
            self._remembered = InPlace(self.step, state, self.spaces.observation_dim)
        else:
            self._remembered = state

    def act(self, observation, reward=0.0):
        """`step` with the state remembered here. `reward`: a number or (B,).

        A recurrent policy on a GPU replays one CUDA graph for it.

        Raises:
            ValueError: as `step`; the remembered state is still that of the step before.
            ActionError: as `step`; the compiled engines and a GPU have overwritten the state, which is of no use any
                more: `reset`.
            RuntimeError: another thread is in `act` of the same policy.
        """
        acting = self._acting  # reset brings another
        if not acting.acquire(False):
            raise RuntimeError("two threads act on one remembered state; let each call policy.step with a state of its "
                               "own")
        try:
            if self._remembered is None:
                self.reset(len(observation))
            with current(self.device):
                return self._act(observation, reward)
        finally:
            acting.release()

    def _act(self, observation, reward):
        if isinstance(self._remembered, InPlace):
            batch = len(self._remembered)
            action = self._remembered(self._observation(observation, batch), self._per_row("reward", reward, batch))
            return self._given(action.clone() if isinstance(observation, Tensor) else action, observation)
        action, self._remembered = self.step(observation, reward, self._remembered)
        return action

    def predict(self, observation, state=None, episode_start=None, deterministic: bool = True, *, reward=None):
        """stable-baselines3's convention for recurrent policies.

        Args:
            observation: (B, O), or (O,) for one environment.
            state: what the last call returned; None: all rows begin.
            episode_start: True where a row begins an episode, (B,).
            deterministic: for the convention's sake; the policy always is.
            reward: what the previous actions earned, (B,); None: the return-to-go stays at its target.

        Returns:
            Actions of the observation's batch shape, and the state.
        """
        single = np.ndim(observation) == 1
        batch = observation[None] if single else observation
        state = self.initial_state(len(batch)) if state is None else state
        action, state = self.step(batch, np.zeros(len(batch)) if reward is None else reward, state, episode_start)
        return (action[0] if single else action), state

    def _given(self, action_BA: Tensor, observation) -> Tensor | np.ndarray:
        """Actions of the kind of `observation`, looked at where that does not wait for the device."""
        if not isinstance(observation, Tensor):
            action_BA = action_BA.cpu()
        if not is_cuda(action_BA.device) and not (good := action_BA.isfinite()).all():
            raise ActionError(int((~good.all(1)).nonzero()[0]))
        return action_BA if isinstance(observation, Tensor) else action_BA.numpy()

    def _start(self, batch: int, target_return) -> tuple[Tensor, Tensor, Tensor]:
        """(target_return, return_to_go, timestep) of `batch` rows that have not begun."""
        if target_return is None:
            if not self.config.evaluate.target_returns:
                raise UserError("the config names no target return; pass target_return, e.g. 3600.0")
            target_return = self.config.evaluate.target_returns[0]
        target_B = self._per_row("target_return", target_return, batch).clone()
        if not is_cuda(self.device):
            _check_finite("target_return", target_B[:, None])
        return target_B, target_B.clone(), torch.zeros(batch, dtype=torch.long, device=self.device)

    def _observation(self, x, batch: int) -> Tensor:
        x = self._tensor(x)
        if x.shape != (batch, self.spaces.observation_dim):
            raise ValueError(f"observation must be (B, O) = {(batch, self.spaces.observation_dim)}, "
                             f"got {tuple(x.shape)}")
        return x

    def _tensor(self, x) -> Tensor:
        if not isinstance(x, Tensor):  # numpy converts faster than torch, and copies what is read-only
            x = torch.from_numpy(np.array(x, np.float64 if self._mean.dtype == torch.float64 else np.float32))
        return x.to(self.device, self._mean.dtype)

    def _per_row(self, name: str, x, batch: int) -> Tensor:
        x = self._tensor(x)
        if x.shape not in ((), (batch,)):
            raise ValueError(f"{name} must be one number or (B,) = ({batch},), got {tuple(x.shape)}")
        return x.expand(batch)


def _check_finite(name: str, values: Tensor) -> None:
    if not (good := values.isfinite()).all():
        row, channel = (~good).nonzero()[0].tolist()
        where = f": channel {channel} is" if name == "observation" else ":"
        raise ValueError(f"{name} of row {row} is not finite{where} {values[row, channel].item()}")
