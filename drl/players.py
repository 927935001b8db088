"""A policy that plays: its states lie in rows, one episode each, and are overwritten at every call.

    act = players(policy, episodes, target_return)
    actions = act(observations, rewards, rows)        # of all rows at first, then of those that are not over

What a row answers does not depend on the others. The compiled engine computes each row by itself, so that rows which
are over cost nothing. torch's matrix products round differently for different shapes: on a CPU it plays in a lane of
LANE rows, episode i always in slot i % LANE, and slots where nobody plays are computed for nothing.

Dimension key: n the rows named in a call, O observation, A action.
"""

from collections.abc import Callable

import numpy as np

from drl.captured import is_cuda
from drl.engine import ActionError
from drl.policy import RecurrentPolicy, WindowPolicy

LANE = 16
PLAYERS = 2  # of the compiled engine

Policy = RecurrentPolicy | WindowPolicy
Act = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Takes what rows observe (n, O) float64, what their last actions earned (n,) and which they are (n,), distinct; gives
actions (n, A) float32. The rewards of the first call are not read. Raises ValueError where it refuses a number, and
ActionError where it has none to give."""


def players(policy: Policy, episodes: np.ndarray, target_return: float, threads: int = 1) -> Act:
    """Rows of which row r is to play `episodes[r]`, a group as `groups` makes them; none has begun. `threads`: that a
    call of the compiled engine may use."""
    if _compiled(policy):
        return policy.in_place(len(episodes), target_return, threads)
    return _Lane(policy, episodes, target_return)


def side_by_side(policy: Policy, threads: int) -> int:
    """How many play at the same time where `threads` may work.

    A step of the compiled engine is short, and the more players, the more often each waits for the interpreter's lock,
    which takes tens of microseconds from core to core; one alone leaves cores idle while the slowest part of a step is
    waited for. On 2, 4, 8 and 16 cores no number was measurably faster than two with half of the threads each; 16 on 16
    cores were eight times slower. A step of torch is long and uses one core. A GPU takes all rows in one call.
    """
    if is_cuda(policy.device):
        return 1
    return min(threads, PLAYERS) if _compiled(policy) else threads


def groups(policy: Policy, episodes: int, environments: int, threads: int) -> list[np.ndarray]:
    """The numbers of all episodes in groups that play side by side: with one group in each of `threads` threads, no
    more than `environments` play at once."""
    most = max(1, environments // threads)
    if _compiled(policy):  # as many groups for each thread
        return np.array_split(np.arange(episodes), min(episodes, threads * -(-episodes // (threads * most))))
    size = most if is_cuda(policy.device) else min(most, LANE)
    return np.split(np.arange(episodes), range(size, episodes, size))


class _Lane:
    """The rows of one call of `policy.step`."""

    def __init__(self, policy: Policy, episodes: np.ndarray, target_return: float):
        on_gpu = is_cuda(policy.device)
        width = len(episodes) if on_gpu else LANE
        self._slot = np.arange(width) if on_gpu else episodes % LANE
        self._step, self._state = policy.step, policy.initial_state(width, target_return)
        self._observations = np.zeros((width, policy.spaces.observation_dim))
        self._rewards = np.zeros(width)

    def __call__(self, observations: np.ndarray, rewards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        slots = self._slot[rows]
        self._observations[slots], self._rewards[slots] = observations, rewards
        try:
            actions, self._state = self._step(self._observations, self._rewards, self._state)
        except ActionError as error:
            raise ActionError(int((slots == error.row).argmax())) from None  # whose row it is, not which slot
        return actions[slots]


def _compiled(policy: Policy) -> bool:
    return policy.engine != "torch"
