"""The compiled step behind a policy's doors: numpy in, numpy out, states in one block of memory.

A call costs about two microseconds around the step itself: one allocation, one address, one call that holds no lock of
Python's, so threads run side by side.

Dimension key: B rows of the state, n rows of a call, O observation, A action, S numbers of a row's state.
"""

import functools
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from drl.config import ModelConfig
from drl.data.store import Spaces
from drl.errors import UserError
from drl.kernels import CompiledPolicy, available_backends
from drl.policy_state import Layout, PackedState, PolicyState, address_of

ENGINES = {"cpu": "float32", "cpu-bfloat16": "bfloat16"}  # and what the weights are kept in
SIZES = ("width", "layers", "heads", "max_timesteps", "feature_map", "return_scale")
EACH = 4  # rows for each thread of a call, at least: fewer are not worth waking it
FLOAT = 4  # bytes


class ActionError(UserError):
    """An action that no environment may see: it is not finite although all that was given for it is.

    Attributes:
        row: of the call.
    """

    def __init__(self, row: int):
        super().__init__(f"action of row {row} is not finite although its observation and reward are: a number "
                         "overflowed; begin the episode anew")
        self.row = row


def unavailable() -> str | None:
    """Why there is no compiled step here; None if there is."""
    return available_backends()["cpu"]


class Engine:
    """A recurrent policy packed for this processor.

    Its rows do not depend, to the last bit, on how many there are in a call nor on threads.

    Attributes:
        instruction_set: what it was packed for: avx512-bf16, avx512, avx2 or baseline.
    """

    def __init__(
        self,
        config: ModelConfig,
        spaces: Spaces,
        tensors: Mapping[str, Tensor],
        engine: str,
        instruction_set: str | None = None,
    ):
        """`tensors`: as Checkpoint.acting returns them. `instruction_set`: None for the best that the machine has.

        Raises:
            UserError: the library is not there, or the tensors do not fit.
        """
        if reason := unavailable():
            raise UserError(f"engine {engine!r} {reason}")
        self._O, self._A = spaces.observation_dim, spaces.action_dim
        tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
        try:
            self._policy = CompiledPolicy(
                tensors, ENGINES[engine], instruction_set, observation_dim=self._O, action_dim=self._A,
                **{name: getattr(config, name) for name in SIZES}
            )
        except ValueError as error:
            raise UserError(f"engine {engine!r}: {error}") from error
        self.instruction_set = self._policy.instruction_set
        mark = 0
        for name in sorted(tensors):
            mark = zlib.crc32(tensors[name].numpy().data.cast("B"), mark)
        self._layout = Layout(mark, config.layers, config.heads, config.width // config.heads, self._A,
                              self._policy.state_head, self._policy.state_padded, self._policy.state_size)
        self._S = self._policy.state_size

    def start(self, target_return: np.ndarray) -> PackedState:
        """Rows that have not begun; target_return (B,)."""
        state = PackedState.zeros(len(target_return), self._layout)
        state.array[:, 0] = state.array[:, 1] = target_return
        return state

    def pack(self, state: PackedState | PolicyState) -> PackedState:
        """The same state as this engine keeps it.

        Raises:
            ValueError: it is the state of another model.
        """
        if isinstance(state, PackedState):
            if state.layout == self._layout:
                return state
            if state.layout.mark != self._layout.mark:
                raise ValueError("the state belongs to another model; begin with this policy's initial_state")
            state = state.unpacked()
        return PackedState.packed(state, self._layout)

    def step(self, observation, reward, state: PackedState | PolicyState, episode_start=None):
        """As RecurrentPolicy.step, in numpy: actions (B, A) float32 and the new state."""
        if type(state) is not PackedState or state.layout is not self._layout:
            state = self.pack(state)
        n = len(state)
        S, O = n * self._S, n * self._O  # noqa: E741
        block = np.empty(S + O + n + n * self._A, np.float32)  # the new state, and what is read and written
        rows = _rows("observation", observation, (n, self._O))
        block[S:S + O] = rows if n == 1 else rows.reshape(-1)
        block[S + O:S + O + n] = _per_row("reward", reward, n)
        begins = None
        if episode_start is not None:
            begins = np.empty(n, np.uint8)
            begins[:] = _per_row("episode_start", episode_start, n)
        address = address_of(block)
        bad = self._policy.step(
            n, None, address + FLOAT * S, address + FLOAT * (S + O), None if begins is None else address_of(begins),
            state.address, address, address + FLOAT * (S + O + n), _threads(n)
        )
        if bad:
            _refuse(block[S:S + O].reshape(n, -1), block[S + O:S + O + n], bad)
        actions = block[S + O + n:].reshape(n, self._A).copy()
        return actions, PackedState(block, n, self._layout, address)

    def in_place(self, state: PackedState, threads: int | None = None) -> "InPlace":
        """Act over `state`, which every call overwrites. `threads`: at most; None: as many as torch has."""
        return InPlace(self._policy, state, self._O, self._A, threads)


class InPlace:
    """Rows of a policy whose states stay here: a call touches no other memory. For one thread at a time.

    Called as `act(observations (n, O), rewards (n,) or a number, rows (n,) or None for all)`, it returns actions (n, A)
    float32.

    Attributes:
        caller: the same for all rows, quicker, called as `caller(observations, rewards)`; it takes numpy arrays, or a
            float for all rewards, and answers None to anything else. None where it was not built. Its `acquire` and
            `release` are those of a lock.

    Raises:
        ValueError: a shape does not fit, a row is named that is not there, an observation or a reward is not finite; no
            state has moved.
        ActionError: an action is not finite; the states of the call have moved, and that row's is of no use any more.
    """

    def __init__(
        self, policy: CompiledPolicy, state: PackedState, observation_dim: int, action_dim: int, threads: int | None
    ):
        self._state, self._threads, B = state, threads, len(state)
        self._observations = np.zeros((B, observation_dim), np.float32)
        self._rewards, self._actions = np.zeros(B, np.float32), np.zeros((B, action_dim), np.float32)
        observation, reward, action = map(address_of, (self._observations, self._rewards, self._actions))
        self._step = lambda n, rows, threads: policy.step(
            n, rows, observation, reward, None, state.address, state.address, action, threads
        )
        self.caller = policy.caller(observation, reward, state.address, action, rows=B, channels=observation_dim,
                                    threads=_threads(B, threads), result=self._actions.copy,
                                    refuse=functools.partial(_refuse, self._observations, self._rewards),
                                    owner=(state, self._observations, self._rewards, self._actions))

    def __len__(self) -> int:
        return len(self._rewards)

    def __call__(self, observations, rewards=0.0, rows: np.ndarray | None = None) -> np.ndarray:
        if rows is None:
            self._observations[...] = _rows("observation", observations, self._observations.shape)
            self._rewards[...] = _per_row("reward", rewards, len(self._rewards))
            if bad := self._step(len(self._rewards), None, _threads(len(self._rewards), self._threads)):
                _refuse(self._observations, self._rewards, bad)
            return self._actions.copy()
        rows = self._checked(rows)
        if not (n := len(rows)):
            return self._actions[:0].copy()
        self._observations[:n] = _rows("observation", observations, (n, self._observations.shape[1]))
        self._rewards[:n] = _per_row("reward", rewards, n)
        if bad := self._step(n, address_of(rows), _threads(n, self._threads)):
            _refuse(self._observations[:n], self._rewards[:n], bad)
        return self._actions[:n].copy()

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.array(rows, np.int64)
        if rows.ndim != 1 or len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise ValueError(f"rows must be of 0 to {len(self) - 1}, got {rows}")
        if len(rows) > 1 and len(np.unique(rows)) < len(rows):
            raise ValueError(f"rows must be distinct, got {rows}")
        return rows


def _rows(name: str, values, shape: tuple[int, int]) -> np.ndarray:
    if type(values) is not np.ndarray:
        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if values.shape != shape:
        raise ValueError(f"{name} must be (B, {name[0].upper()}) = {shape}, got {values.shape}")
    return values


def _per_row(name: str, values, count: int):
    if type(values) is float:
        return values
    if type(values) is not np.ndarray:
        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if values.shape not in ((), (count,)):
        raise ValueError(f"{name} must be one number or (B,) = ({count},), got {values.shape}")
    return values


def _threads(rows: int, most: int | None = None) -> int:
    return 1 if rows < 2 * EACH else min(most or torch.get_num_threads(), rows // EACH)


def _refuse(observations: np.ndarray, rewards: np.ndarray, bad: int) -> None:
    """Raise what drl_policy_step meant by `bad`; of the rows that it was given."""
    n, row = len(rewards), abs(bad) - 1
    if bad > n:
        raise ActionError(row - n)
    if bad < 0:
        raise ValueError(f"reward of row {row} is not finite: {rewards[row]}")
    channel = int(np.flatnonzero(~np.isfinite(observations[row]))[0])
    raise ValueError(f"observation of row {row} is not finite: channel {channel} is {observations[row, channel]}")
