"""Batches by index arithmetic over flat arrays on the training device: no workers, no host in the loop. On a CPU the
arrays are the store's own, not copies: those of a mapped file stay on the disk until their steps are drawn.

    WindowSampler   each row is a window that begins at a step drawn uniformly; every row starts anew
    StreamSampler   each row walks through an episode in chunks, then through another; the state goes on between
                    chunks and starts anew with each episode (state passing, see trainer.py)

Rows are padded on the right. Padding repeats the last real step, so that it is finite and in range; the mask
keeps it out of the loss and out of every state. Dimension key: B rows, L steps, O observation, A action; where samplers
go side by side, S of them stand before B.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from drl.captured import stack
from drl.config import TrainConfig
from drl.data.store import CHUNK, EpisodeStore, starts_of
from drl.errors import UserError


class Batch(NamedTuple):
    """What one update reads.

    Attributes:
        returns_to_go: in the environment's units, (B, L) float32.
        observations: normalised, (B, L, O) float32.
        actions: scaled to [-1, 1], (B, L, A) float32.
        timesteps: steps since the episode began, (B, L) int64.
        mask: True where the step is real, (B, L) bool.
        restart: True where the state must start anew before this chunk, (B,) bool.
        terminal: True where the episode terminates after the step, (B, L) bool; None: nobody asked.
    """

    returns_to_go: Tensor
    observations: Tensor
    actions: Tensor
    timesteps: Tensor
    mask: Tensor
    restart: Tensor
    terminal: Tensor | None = None


class Steps:
    """The store's arrays on a device, shared by every sampler that draws from them, and which episodes are drawn.

    Those that are drawn, and their steps, have numbers of their own: as if no others stood between them.

    Attributes:
        starts: the number of each one's first step, and of the end of the last one, (E+1,) int64.
        first: where each begins in the store, (E,) int64.
        terminated: whether it did, else it was cut off, (E,) bool.
        count: steps of all that are drawn.
    """

    def __init__(self, store: EpisodeStore, device: torch.device | str, share: float = 1.0):
        """`share`: of the episodes that is drawn, as EpisodeStore.best takes it."""
        low, high = store.spaces.action_low, store.spaces.action_high
        episodes, self._starts = store.best(share), store.episode_starts
        starts = starts_of(store.episode_lengths[episodes])
        self.count = int(starts[-1])
        try:
            self.observations, self.actions, self.returns_to_go, self.starts, self.first, self.terminated = (
                _tensor(array, device)
                for array in (store.observations, store.actions, store.returns_to_go, starts, self._starts[episodes],
                              store.terminated[episodes])
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"dataset {store.dataset} does not fit into the memory of {device}; use --device cpu, "
                            "which trains from the disk") from error
        self.mean, self.std, self.centre, self.half = (
            torch.as_tensor(array, device=device) for array in (*store.normaliser, (high + low) / 2, (high - low) / 2)
        )
        self.device = device

    def locate(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """The episode and the timestep of each step that may be drawn, by their numbers."""
        episode = torch.searchsorted(self.starts, step, right=True) - 1
        return episode, step - self.starts[episode]

    def first_not_finite(self) -> str | None:
        """Where a number is not finite, as "episode 3, step 5, field actions"; None: nowhere, as when the store was
        made. Files that are mapped may have changed since. Reads all, CHUNK steps at a time.
        """
        for start in range(0, len(self.actions), CHUNK):
            for field in ("observations", "actions", "returns_to_go"):
                rows = getattr(self, field)[start: start + CHUNK]
                bad = (~rows.isfinite()).reshape(len(rows), -1).any(1).nonzero()
                if len(bad):
                    step = start + bad[0].item()
                    episode = np.searchsorted(self._starts, step, side="right") - 1
                    return f"episode {episode}, step {step - self._starts[episode]}, field {field}"
        return None

    def take(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns-to-go, observations and actions of the steps at `index` in the store, ready for the model."""
        return (
            self.returns_to_go[index],
            (self.observations[index] - self.mean) / self.std,
            (self.actions[index] - self.centre) / self.half,
        )


class _Sampler:
    """A generator of its own, and what is drawn made ready for the model. The groups of rows take turns.

    `rows` of every batch are given out, by default all; what is drawn and remembered is the same whatever they are.

    Attributes:
        terminals: whether batches say where an episode terminates.
    """

    def __init__(
        self, steps: Steps, batch_size: int, context: int, seed: int, groups: int = 1, rows: slice = slice(None)
    ):
        self.steps, self.batch_size, self.groups, self.rows = steps, batch_size, groups, rows
        self.offset_L, self.terminals = torch.arange(context, device=steps.device), False
        self.generator = torch.Generator(device=steps.device).manual_seed(seed)

    STREAMS = ()  # names of what is remembered of the rows

    def next(self, turn: int = 0) -> Batch:
        """The batch of the group whose turn it is; turns count from 0, one for each update."""
        return self.advance(self.draw(), *self.streams(turn))

    def streams(self, turn: int) -> list[Tensor]:
        """What is remembered of the rows whose turn it is, (..., B) each, which `advance` writes anew."""
        return [getattr(self, name)[..., turn % self.groups, :] for name in self.STREAMS]

    def side_by_side(self, several: Sequence[Self]) -> Self:
        """One whose rows are those of several like this, (S, ..., B); theirs are parts of it from here on. It draws
        nothing itself."""
        whole = copy.copy(self)
        stack(whole, several, self.STREAMS)
        return whole

    def _draw(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.steps.device)

    def _draw_steps(self, count: int) -> tuple[Tensor, Tensor]:
        """Steps drawn uniformly from all, as (episode, timestep)."""
        return self.steps.locate(self._draw(self.steps.count, count))

    def _gather(self, *drawn: Tensor) -> Batch:
        """The batch of what all rows drew: episode, position and restart, (..., B) each."""
        episode_B, position_B, restart_B = (part[..., self.rows] for part in drawn)
        starts = self.steps.starts
        length_B1 = (starts[episode_B + 1] - starts[episode_B])[..., None]
        timestep_BL = position_B[..., None] + self.offset_L
        mask_BL = timestep_BL < length_B1
        last_BL = timestep_BL == length_B1 - 1
        timestep_BL = timestep_BL.minimum(length_B1 - 1)
        index_BL = self.steps.first[episode_B][..., None] + timestep_BL
        terminal_BL = last_BL & self.steps.terminated[episode_B][..., None] if self.terminals else None
        return Batch(*self.steps.take(index_BL), timestep_BL, mask_BL, restart_B.clone(), terminal_BL)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next batch depends on but its turn, as tensors."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from tensors in the dtypes and shapes of `state_dict`.

        Raises:
            ValueError, RuntimeError: they stand where there is no step, or are no state of a generator.
        """
        self.generator.set_state(state["generator"].cpu())


class WindowSampler(_Sampler):
    """Windows whose first step is uniform over every step of every episode; they know no turns."""

    def draw(self) -> Tensor:
        """All that is random of a batch, (B,)."""
        return self._draw(self.steps.count, self.batch_size)

    def advance(self, step_B: Tensor) -> Batch:
        """All of a batch but what is random, as a function of tensors that can be compiled."""
        return self._gather(*self.steps.locate(step_B), torch.ones_like(step_B, dtype=torch.bool))


class StreamSampler(_Sampler):
    """Streams through episodes drawn uniformly: in the long run every step is seen equally often.

    There are groups x B streams, and the groups take turns.
    """

    STREAMS = ("episode", "position", "restart")

    def __init__(
        self, steps: Steps, batch_size: int, context: int, seed: int, groups: int = 1, rows: slice = slice(None)
    ):
        super().__init__(steps, batch_size, context, seed, groups, rows)
        # enter the first episodes midway: from the beginning, streams of equal lengths would stay in step for ever
        episode, timestep = self._draw_steps(groups * batch_size)
        self.episode = episode.view(groups, batch_size)
        self.position = (timestep // context * context).view(groups, batch_size)
        self.restart = torch.ones_like(self.episode, dtype=torch.bool)

    def draw(self) -> Tensor:
        """All that is random of a batch, (B,)."""
        return self._draw(len(self.steps.starts) - 1, self.batch_size)

    def advance(self, fresh_B: Tensor, episode_B: Tensor, position_B: Tensor, restart_B: Tensor) -> Batch:
        """All of a batch but what is random, as a function of tensors that can be compiled: the chunk of these streams,
        which then go on. They are written in place, where a captured CUDA graph reads them at the next replay."""
        batch = self._gather(episode_B, position_B, restart_B)
        next_B = position_B + len(self.offset_L)
        over_B = next_B >= self.steps.starts[episode_B + 1] - self.steps.starts[episode_B]
        episode_B.copy_(torch.where(over_B, fresh_B, episode_B))
        position_B.copy_(next_B.masked_fill(over_B, 0))
        restart_B.copy_(over_B)
        return batch

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {name: getattr(self, name).flatten().clone() for name in self.STREAMS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        episode, position = (state[name].to(self.steps.device) for name in ("episode", "position"))
        starts, episodes = self.steps.starts, len(self.steps.starts) - 1
        if ((episode < 0) | (episode >= episodes)).any():
            raise ValueError(f"sampler.episode is not of the {episodes} episodes")
        if ((position < 0) | (position >= starts[episode + 1] - starts[episode])).any():
            raise ValueError("sampler.position is beyond its episode")
        super().load_state_dict(state)
        for name in self.STREAMS:
            streams = getattr(self, name)
            streams.copy_(state[name].view_as(streams))


def _tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    with warnings.catch_warnings():  # a mapped file is read-only; nothing here writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(array, device=device)


def make_sampler(
    config: TrainConfig, steps: Steps, seed: int, rows: slice = slice(None)
) -> WindowSampler | StreamSampler:
    """The sampler that config.sampling names; it gives out `rows` of each batch."""
    kind, groups = (WindowSampler, 1) if config.sampling == "windows" else (StreamSampler, config.stream_groups)
    return kind(steps, config.batch_size, config.context, seed, groups, rows)


def to_box(action: np.ndarray | Tensor, low, high):
    """From the model's [-1, 1] to the environment's box, the inverse of what the samplers do."""
    return action * ((high - low) / 2) + (high + low) / 2
