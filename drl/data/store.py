"""EpisodeStore: every step of every episode in flat arrays, validated once.

    recorded episode     observations (T+1, O)  actions (T, A)  rewards, terminations, truncations (T,)
      -> the last observation has no action: it is dropped
      -> R_t = r_t + r_{t+1} + ... + r_{T-1}, summed in float64
      -> all episodes end to end, float32

The arrays lie in memory, or in files that are mapped into it (packed.py); nothing here needs to know which.

Dimension key: O observation, A action, T steps of one episode, E episodes, S steps of all episodes.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np

from drl.errors import UserError

BOUND_TOLERANCE = 1e-4  # of the width of the action box: recorded actions are rounded to float32
CHUNK = 1 << 16  # steps whose sums are taken at a time: a mapped file may be larger than memory


class Episode(Protocol):
    """What is read of a minari.EpisodeData."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray


class Recorded(NamedTuple):
    """One episode: the seed of its reset or None, observations (T+1, O), actions (T, A), rewards (T,), and whether
    it ended by termination (else by truncation)."""

    seed: int | None
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


class Normaliser(NamedTuple):
    """Shift and scale of each observation channel; lives in the checkpoint, so acting sees what training saw.

    Attributes:
        mean: (O,) float32.
        std: (O,) float32, at least 1e-6.
    """

    mean: np.ndarray
    std: np.ndarray


class Spaces(NamedTuple):
    """What an environment takes and gives.

    Attributes:
        environment: Gymnasium id.
        observation_dim: O.
        action_low, action_high: the action box, (A,) float32.
    """

    environment: str
    observation_dim: int
    action_low: np.ndarray
    action_high: np.ndarray

    @property
    def action_dim(self) -> int:
        return len(self.action_low)


@dataclass(frozen=True)
class EpisodeStore:
    """All episodes of a dataset.

    Attributes:
        observations: raw, (S, O) float32.
        actions: in the environment's units, (S, A) float32.
        returns_to_go: (S,) float32.
        episode_starts: (E+1,) int64; episode e is steps episode_starts[e] to episode_starts[e+1].
        terminated: whether an episode ended in a state from which nothing more can be earned, (E,) bool; else it was
            cut off, as at a time limit.
        normaliser: mean and standard deviation of the observations.
        spaces: of the environment that the dataset names.
        dataset: Minari id.
        fingerprint: SHA-256 over the arrays but `terminated`, hexadecimal.
    """

    observations: np.ndarray
    actions: np.ndarray
    returns_to_go: np.ndarray
    episode_starts: np.ndarray
    terminated: np.ndarray
    normaliser: Normaliser
    spaces: Spaces
    dataset: str
    fingerprint: str

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of each episode, (E,)."""
        return self.returns_to_go[self.episode_starts[:-1]]

    @property
    def episode_lengths(self) -> np.ndarray:
        """Steps of each episode, (E,)."""
        return np.diff(self.episode_starts)

    def best(self, share: float) -> np.ndarray:
        """The numbers of the episodes with the highest return, ascending, (n,) int64; of equal ones the earlier.

        Args:
            share: of all episodes, in (0, 1]; their number is rounded down, to no less than one.
        """
        count = max(1, int(round(share * len(self.episode_lengths), 6)))  # 0.29 * 100 is a little below 29
        return np.sort(np.argsort(-self.episode_returns, kind="stable")[:count])

    def return_caps(self, quantile: float, timesteps: int) -> np.ndarray:
        """The quantile, 0 to 1, of the returns-to-go at each timestep, over the episodes that reached it; beyond the
        longest its last one, (timesteps,) float32."""
        starts, lengths = self.episode_starts[:-1], self.episode_lengths
        caps = np.empty(timesteps, np.float32)
        for t in range(timesteps):
            there = starts[lengths > t]
            caps[t] = np.quantile(self.returns_to_go[there + t], quantile) if len(there) else caps[t - 1]
        return caps

    @classmethod
    def from_episodes(cls, episodes: Iterable[Episode], spaces: Spaces, dataset: str) -> Self:
        """Validate and pack.

        Raises:
            UserError: there is no episode, or one is malformed; names dataset, episode, step and field.
        """
        *columns, terminated = zip(*flatten(episodes, spaces, dataset))
        starts = starts_of(map(len, columns[0]))
        return cls.from_arrays(*map(np.concatenate, columns), starts, np.array(terminated), spaces, dataset)

    @classmethod
    def from_arrays(
        cls,
        observations: np.ndarray,
        actions: np.ndarray,
        returns_to_go: np.ndarray,
        episode_starts: np.ndarray,
        terminated: np.ndarray,
        spaces: Spaces,
        dataset: str,
    ) -> Self:
        """The store of arrays as `flatten` and `starts_of` make them."""
        arrays = observations, actions, returns_to_go, episode_starts
        return cls(*arrays, terminated, normaliser_of(observations), spaces, dataset, fingerprint(arrays))


def flatten(
    episodes: Iterable[Episode], spaces: Spaces, dataset: str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, bool]]:
    """Of each episode, validated: observations (T, O), actions (T, A) and returns-to-go (T,), all float32, and whether
    it terminated.

    Raises:
        UserError: there is no episode, or one is malformed; names dataset, episode, step and field.
    """
    number = -1
    for number, episode in enumerate(episodes):
        where = f"dataset {dataset}, episode {number}"
        _validate(episode, spaces, where)
        with np.errstate(over="ignore"):  # a sum beyond float32 is refused below
            returns = returns_to_go(episode.rewards).astype(np.float32)
        if not np.isfinite(returns).all():
            raise UserError(f"{where}, field rewards: their sum is beyond float32")
        terminated = bool(episode.terminations[-1])
        yield (np.asarray(episode.observations[:-1], np.float32), np.asarray(episode.actions, np.float32), returns,
               terminated)
    if number < 0:
        raise UserError(f"dataset {dataset} holds no episodes")


def starts_of(lengths: Iterable[int]) -> np.ndarray:
    """Where each episode begins, and the end of the last one, (E+1,) int64."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def normaliser_of(observations: np.ndarray) -> Normaliser:
    """Mean and standard deviation of each channel of (S, O), summed in float64, chunk by chunk."""
    chunks = [observations[start : start + CHUNK] for start in range(0, len(observations), CHUNK)]
    mean = sum(chunk.sum(0, dtype=np.float64) for chunk in chunks) / len(observations)
    variance = sum(np.square(chunk - mean).sum(0) for chunk in chunks) / len(observations)
    return Normaliser(mean.astype(np.float32), np.maximum(np.sqrt(variance), 1e-6).astype(np.float32))


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 over the bytes of C-contiguous arrays, one after the other, hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(memoryview(array).cast("B"))
    return digest.hexdigest()


def returns_to_go(rewards: np.ndarray) -> np.ndarray:
    """R_t = r_t + ... + r_{T-1} without discount (arXiv 2106.01345, section 3), (T,) float64."""
    return np.cumsum(np.asarray(rewards, np.float64)[::-1])[::-1].copy()


def _validate(episode: Episode, spaces: Spaces, where: str) -> None:
    T = len(np.atleast_1d(episode.actions))
    if T == 0:
        raise UserError(f"{where}: no steps")
    shapes = {
        "observations": (T + 1, spaces.observation_dim),
        "actions": (T, spaces.action_dim),
        "rewards": (T,),
        "terminations": (T,),
        "truncations": (T,),
    }
    for field, shape in shapes.items():
        array = np.asarray(getattr(episode, field))
        if array.shape != shape:
            raise UserError(f"{where}, field {field}: shape must be {shape}, got {array.shape}")
        flag = field in ("terminations", "truncations")
        if array.dtype not in ((bool,) if flag else (np.float32, np.float64)):
            raise UserError(f"{where}, field {field}: dtype must be {'bool' if flag else 'float32 or float64'}, "
                            f"got {array.dtype}")
        if not flag and not (finite := _finite(array)).all():
            step = int(np.argwhere(~finite)[0, 0])
            what = "beyond float32" if np.isfinite(array[step]).all() else "not finite"
            raise UserError(f"{where}, step {step}, field {field}: {what}")
    slack = BOUND_TOLERANCE * (spaces.action_high - spaces.action_low)
    outside = (episode.actions < spaces.action_low - slack) | (episode.actions > spaces.action_high + slack)
    if outside.any():
        step, channel = np.argwhere(outside)[0]
        raise UserError(
            f"{where}, step {step}, field actions: {episode.actions[step, channel]} in channel {channel} is outside "
            f"[{spaces.action_low[channel]}, {spaces.action_high[channel]}]"
        )
    ends = np.flatnonzero(np.asarray(episode.terminations) | np.asarray(episode.truncations))
    if len(ends) != 1 or ends[0] != T - 1:
        found = "no end" if not len(ends) else f"ends at step {ends[0]}"
        raise UserError(f"{where}, field terminations/truncations: one end, at step {T - 1}, expected; {found}")


def _finite(array: np.ndarray) -> np.ndarray:
    """Where numbers are finite in float32, in which they are kept."""
    with np.errstate(over="ignore"):
        return np.isfinite(array.astype(np.float32))
