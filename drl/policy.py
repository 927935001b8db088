"""Acting: one environment step in, one action out.

    RecurrentPolicy    the state goes on; a step costs the same at timestep 10 and at timestep 100,000
    WindowPolicy       the last K steps are recomputed at every step, as published; the only way without a state

Both are batched, keep their state outside, and have the same doors. Chunks of training begin from the very states
that acting visits (state passing), which is why a recurrent state may remember a whole episode; a model trained on
windows meets states it never saw when it is stepped beyond them. Past `model.max_timesteps` the timestep embedding
stays at the last one.

Dimension key: B rows, K window steps, O observation, A action.
"""

import threading
from typing import Self

import numpy as np
import torch
from torch import Tensor

from drl.checkpoint import Checkpoint
from drl.engine import ENGINES as COMPILED
from drl.engine import Engine, InPlace, unavailable
from drl.errors import UserError
from drl.policy_doors import Doors
from drl.policy_state import PackedState, PolicyState, WindowState


class RecurrentPolicy(Doors):
    """A decision transformer stepped as a recurrent network.

        policy = RecurrentPolicy.load("runs/hopper/medium-replay/seed-0")
        state = policy.initial_state(batch=8, target_return=3600.0)
        action, state = policy.step(observation, reward, state)
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", engine: str = "auto"):
        if (attention := checkpoint.config.model.attention) != "linear":
            raise UserError(f"model.attention {attention} has no recurrent step; use --mode window (WindowPolicy)")
        super().__init__(checkpoint, device, engine)
        self._engine = self._caller = None
        if self.engine in COMPILED:
            self._engine = Engine(checkpoint.config.model, checkpoint.spaces, checkpoint.acting(), self.engine)

    @staticmethod
    def resolve(engine: str, device: str) -> str:
        if engine == "auto":
            return "torch" if torch.device(device).type != "cpu" or unavailable() else "cpu"
        if engine not in COMPILED:
            return Doors.resolve(engine, device)
        if torch.device(device).type != "cpu":
            raise UserError(f"engine {engine!r} runs on a CPU, not on {device}; use engine 'torch' there")
        return engine

    def double(self) -> Self:
        self.engine, self._engine, self._caller = "torch", None, None
        return super().double()

    def initial_state(self, batch: int, target_return=None) -> PolicyState | PackedState:
        """State of `batch` rows that have not begun.

        Args:
            batch: B.
            target_return: return asked for, in the environment's units: a number or (B,). None: the config's first.
        """
        target_B, return_B, timestep_B = self._start(batch, target_return)
        if self._engine is not None:
            return self._engine.start(target_B.numpy())
        action_BA = self._tensor(np.zeros((batch, self.spaces.action_dim)))
        return PolicyState(self.model.initial_state(batch), target_B, return_B, timestep_B, action_BA)

    def reset(self, batch: int = 1, target_return: float | None = None) -> None:
        if self._engine is None:
            super().reset(batch, target_return)
        else:
            self._remembered = self.in_place(batch, target_return)
            self._caller = self._remembered.caller
            self._acting = self._caller or threading.Lock()

    def act(self, observation, reward=0.0):
        if self._caller is not None:
            action = self._caller(observation, reward)
            if action is not None:
                return action
        return super().act(observation, reward)

    def _act(self, observation, reward):
        if self._engine is None:
            return super()._act(observation, reward)
        return _as(observation, self._remembered(observation, reward))

    def step(self, observation, reward, state, episode_start=None):
        if self._engine is None:
            return super().step(observation, reward, state, episode_start)
        action, state = self._engine.step(observation, reward, state, episode_start)
        return _as(observation, action), state

    def in_place(self, batch: int, target_return=None, threads: int | None = None) -> InPlace:
        """Rows that are kept here and overwritten, for the compiled engines: finished ones cost nothing.

        Returns an object to be called as `act(observations (n, O), rewards (n,), rows (n,) or None for all)`; it gives
        actions (n, A), and raises as `act` does. `threads`: that share a call, at most; None: as many as torch has.
        """
        if self._engine is None:
            raise ValueError(f"engine {self.engine!r} has no step in place; it has `act`")
        return self._engine.in_place(self.initial_state(batch, target_return), threads)

    def _decide(self, observation_BO, return_B, timestep_B, first_B, state: PolicyState):
        action_BA, attention = self.model.step(
            state.previous_action, return_B, observation_BO, timestep_B, state.attention, first_B
        )
        return action_BA, PolicyState(attention, state.target_return, return_B, timestep_B + 1, action_BA)


def _as(observation, action: np.ndarray):
    """`action` of the kind of `observation`."""
    if type(observation) is np.ndarray:  # asking whether it is a tensor takes longer
        return action
    return torch.from_numpy(action) if isinstance(observation, Tensor) else action


class WindowPolicy(Doors):
    """A decision transformer that reads its last `train.context` steps anew at every step."""

    def initial_state(self, batch: int, target_return=None) -> WindowState:
        """As RecurrentPolicy.initial_state."""
        K, O, A = self.config.train.context, self.spaces.observation_dim, self.spaces.action_dim  # noqa: E741
        history = (self._tensor(np.zeros(shape)) for shape in ((batch, K), (batch, K, O), (batch, K, A)))
        return WindowState(*self._start(batch, target_return), *history)

    def _decide(self, observation_BO, return_B, timestep_B, first_B, state: WindowState):
        K = self.config.train.context
        slot_B = timestep_B.clamp(max=K - 1)
        row_B = torch.arange(len(slot_B), device=self.device)

        def append(history, value):
            full = (timestep_B >= K).view(-1, *[1] * (history.ndim - 1))
            history = torch.where(full, history.roll(-1, dims=1), history)
            history[row_B, slot_B] = value
            return history

        returns_BK = append(state.returns_to_go, return_B)
        observations_BKO = append(state.observations, observation_BO)
        # the action of this step is not known yet: whatever stands in its slot is the future of what is read out
        actions_BKA = append(state.actions, torch.zeros_like(state.actions[:, 0]))
        timesteps_BK = (timestep_B - slot_B)[:, None] + torch.arange(K, device=self.device)
        predicted_BKA, _ = self.model(returns_BK, observations_BKO, actions_BKA, timesteps_BK)
        action_BA = predicted_BKA[row_B, slot_B]
        actions_BKA[row_B, slot_B] = action_BA
        state = WindowState(
            state.target_return, return_B, timestep_B + 1, returns_BK, observations_BKO, actions_BKA
        )
        return action_BA, state
