"""Acting: one environment step in, one action out.

    RecurrentPolicy    the state goes on; a step costs the same at timestep 10 and at timestep 100,000
    WindowPolicy       the last K steps are recomputed at every step: the published protocol, and softmax's only one

Both are batched, keep their state outside, and have the same doors. Chunks of training begin from the very states
that acting visits (state passing), which is why a recurrent state may remember a whole episode; a model trained on
windows meets states it never saw when it is stepped beyond them. Past `model.max_timesteps` the timestep embedding
stays at the last one.

Dimension key: B rows, K window steps, O observation, A action.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from drl import checkpoint as checkpoints
from drl.acting import InPlace
from drl.captured import is_cuda
from drl.checkpoint import Checkpoint
from drl.data.sampling import to_box
from drl.errors import UserError
from drl.model import DecisionTransformer
from drl.policy_state import PolicyState, WindowState

ENGINES = ("auto", "torch")


class _Policy:
    """The doors that both policies share: load, step, reset / act, predict."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", engine: str = "auto"):
        if engine not in ENGINES:
            raise UserError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
        spaces, normaliser = checkpoint.spaces, checkpoint.normaliser
        self.config, self.spaces, self.device = checkpoint.config, spaces, device
        self.engine = "torch"
        model = DecisionTransformer(checkpoint.config.model, spaces.observation_dim, spaces.action_dim)
        try:
            model.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            raise UserError(f"the checkpoint's weights do not fit its config: {str(error).splitlines()[-1].strip()}"
                            ) from error
        self.model = model.eval().to(device)
        arrays = (normaliser.mean, normaliser.std, spaces.action_low, spaces.action_high)
        self._mean, self._std, self._low, self._high = (torch.as_tensor(array, device=device) for array in arrays)
        self._remembered: Any = None

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu", engine: str = "auto") -> Self:
        """From a run or checkpoint folder.

        Raises:
            UserError: there is no checkpoint, it is damaged, or the engine is unknown.
        """
        return cls(checkpoints.load(folder), device, engine)

    def double(self) -> Self:
        """The same policy in float64, in place: for checking numbers, not for speed."""
        self.model.double()
        self._mean, self._std, self._low, self._high = (
            x.double() for x in (self._mean, self._std, self._low, self._high)
        )
        return self

    @torch.no_grad()
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
            ValueError: a shape does not fit the state and the environment.
        """
        observation_BO = self._observation(observation, len(state.timestep))
        first_B = state.timestep == 0
        if episode_start is not None:
            first_B = first_B | self._per_row("episode_start", episode_start, len(first_B)).bool()
        reward_B = self._per_row("reward", reward, len(first_B))
        return_B = torch.where(first_B, state.target_return, state.return_to_go - reward_B)
        timestep_B = state.timestep.masked_fill(first_B, 0)
        normal_BO = (observation_BO - self._mean) / self._std
        action_BA, state = self._decide(normal_BO, return_B, timestep_B, first_B, state)
        action_BA = to_box(action_BA, self._low, self._high)
        return (action_BA if isinstance(observation, Tensor) else action_BA.cpu().numpy()), state

    def reset(self, batch: int = 1, target_return: float | None = None) -> None:
        """Begin episodes whose state this object remembers; see `act`. Default target: the config's first."""
        state = self.initial_state(batch, target_return)
        in_place = isinstance(state, PolicyState) and is_cuda(self.device)
        self._remembered = InPlace(self.step, state, self.spaces.observation_dim) if in_place else state

    def act(self, observation, reward=0.0):
        """`step` with the state remembered here. `reward`: a number or (B,).

        A recurrent policy on a GPU replays one CUDA graph for it.

        Raises:
            ValueError: as `step`.
        """
        if self._remembered is None:
            self.reset(len(observation))
        if isinstance(self._remembered, InPlace):
            batch = len(self._remembered)
            action = self._remembered(self._observation(observation, batch), self._per_row("reward", reward, batch))
            return action.clone() if isinstance(observation, Tensor) else action.cpu().numpy()
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

    def _start(self, batch: int, target_return) -> tuple[Tensor, Tensor, Tensor]:
        """(target_return, return_to_go, timestep) of `batch` rows that have not begun."""
        if target_return is None:
            if not self.config.evaluate.target_returns:
                raise UserError("the config names no target return; pass target_return, e.g. 3600.0")
            target_return = self.config.evaluate.target_returns[0]
        target_B = self._per_row("target_return", target_return, batch).clone()
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


class RecurrentPolicy(_Policy):
    """A decision transformer stepped as a recurrent network.

        policy = RecurrentPolicy.load("runs/hopper/medium-replay/seed-0")
        state = policy.initial_state(batch=8, target_return=3600.0)
        action, state = policy.step(observation, reward, state)
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", engine: str = "auto"):
        if checkpoint.config.model.attention == "softmax":
            raise UserError("softmax attention has no recurrent step; use --mode window (WindowPolicy)")
        super().__init__(checkpoint, device, engine)

    def initial_state(self, batch: int, target_return=None) -> PolicyState:
        """State of `batch` rows that have not begun.

        Args:
            batch: B.
            target_return: return asked for, in the environment's units: a number or (B,). None: the config's first.
        """
        target_B, return_B, timestep_B = self._start(batch, target_return)
        action_BA = self._tensor(np.zeros((batch, self.spaces.action_dim)))
        return PolicyState(self.model.initial_state(batch), target_B, return_B, timestep_B, action_BA)

    def _decide(self, observation_BO, return_B, timestep_B, first_B, state: PolicyState):
        action_BA, attention = self.model.step(
            state.previous_action, return_B, observation_BO, timestep_B, state.attention, first_B
        )
        return action_BA, PolicyState(attention, state.target_return, return_B, timestep_B + 1, action_BA)


class WindowPolicy(_Policy):
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
