"""Seeded episodes of one policy, played on all cores.

Groups of episodes are shared among players, which are threads; each has environments of its own and takes the next
group when all episodes of its last one are over. Policy and physics both work without the interpreter's lock, each on
the player's share of the cores, so while one player decides another may move. Episode i resets with seed + i and is
played alike in any group: returns are bit-equal for 1, 4 and 100 environments and for any number of threads.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from drl.engine import ActionError
from drl.envs import Envs, check_spaces
from drl.envs_process import make_apart
from drl.faults import EvaluationFailed, Fault
from drl.players import Act, Policy, groups, players, side_by_side
from drl.progress import progress
from drl.watched import THREAD, Watch, dismiss, heard


class Rollouts(NamedTuple):
    """One entry per episode.

    Attributes:
        returns: undiscounted, in the environment's units, (N,) float64.
        lengths: steps, (N,).
        seeds: environment seeds, (N,).
    """

    returns: np.ndarray
    lengths: np.ndarray
    seeds: np.ndarray


class Ended(NamedTuple):
    """An episode that is over: its number, its return and its steps."""

    episode: int
    total: float
    length: int


def rollout(
    policy: Policy,
    environment: str,
    *,
    target_return: float,
    episodes: int,
    seed: int,
    environments: int = 100,
    patience: float = 60.0,
    threads: int | None = None,
    label: str = "evaluating",
) -> Rollouts:
    """Play `episodes` episodes, at most `environments` of them side by side.

    Args:
        patience: seconds that one call of the environments (reset or stepped side by side) or of the policy may take.
        threads: that may work at once; None: one for each core. Changes the speed only.

    Raises:
        UserError: the environment is unknown or does not fit the policy.
        EvaluationFailed: an episode could not be played to its end: there are no returns then, of others neither.
    """
    threads = threads or len(os.sched_getaffinity(0))
    playing = min(side_by_side(policy, threads), environments, episodes)
    shared = groups(policy, episodes, environments, playing)
    playing = min(playing, len(shared))
    threads_each = -(-threads // playing)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, int)
    finished = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread())
        try:
            each = make_apart(environment, max(map(len, shared)), playing, threads_each, patience)
            watches = [Watch(environment, envs, seed) for envs in each]
            stop = threading.Event()
            stack.callback(dismiss, watches)
            stack.callback(stop.set)
            check_spaces(each[0], environment, policy.spaces, "the checkpoint")

            def play_group(watch: Watch, group: np.ndarray) -> Iterator[Ended | None]:
                return play(players(policy, group, target_return, threads_each), watch.envs, group, seed, watch)

            bar = stack.enter_context(progress(episodes, "episode", label))
            for ended in _shared(play_group, watches, shared, patience, stop):
                returns[ended.episode], lengths[ended.episode] = ended.total, ended.length
                finished += 1
                bar.update()
        except Fault as fault:
            raise EvaluationFailed(fault, environment=environment, target_return=target_return, episodes=episodes,
                                   seed=seed, finished=finished) from fault
    return Rollouts(returns, lengths, seed + np.arange(episodes))


def play(act: Act, envs: Envs, episodes: np.ndarray, seed: int, watch: Watch | None = None) -> Iterator[Ended | None]:
    """The episodes of a group as they end, None after every other step. Row r of `envs` plays `episodes[r]`.

    Raises:
        Fault: the environments raise anything or answer what is not finite, or an action is not finite.
    """
    watch = watch or Watch("the environment", envs, seed)
    watch.begin(episodes)
    low, high = envs.action_space.low, envs.action_space.high
    rows = np.arange(len(episodes))
    observations, rewards = watch.answer(rows, envs.reset, list(seed + episodes)), np.zeros(len(rows))
    totals, steps = np.zeros(len(rows)), 0
    while len(rows):
        try:
            actions = watch.act(rows, act, observations, rewards, rows)
            if not (good := np.isfinite(actions).all(1)).all():
                raise ActionError(int(good.argmin()))
        except ActionError as error:
            raise Fault(f"the policy's action in episode {episodes[rows[error.row]]}, step {steps} is not finite",
                        "the weights or the observation are damaged; evaluate another checkpoint") from None
        except ValueError:
            _check_answer(watch, rows, observations, rewards)
            raise
        observations, rewards, terminated, truncated = watch.answer(
            rows, envs.step, np.minimum(np.maximum(actions, low), high)
        )
        totals[rows] += rewards
        steps += 1
        over = terminated | truncated
        if over.any():
            _check_answer(watch, rows[over], observations[over], totals[rows[over]])
            for row in rows[over]:
                yield Ended(int(episodes[row]), float(totals[row]), steps)
            rows, observations, rewards = rows[~over], observations[~over], rewards[~over]
        else:
            yield None


def _check_answer(watch: Watch, rows: np.ndarray, observations: np.ndarray, rewards: np.ndarray) -> None:
    """Raises Fault unless all is finite, in float32, which policies compute in."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.column_stack([observations, rewards]).astype(np.float32)).all(1)
    if not finite.all():
        raise watch.fault("answered with what is not finite", int(rows[~finite][0]))


def _shared(
    play_group: Callable[[Watch, np.ndarray], Iterator[Ended | None]],
    watches: list[Watch],
    shared: list[np.ndarray],
    patience: float,
    stop: threading.Event,
) -> Iterator[Ended]:
    """The episodes of all groups as they end; every one of `watches` gets a thread. What is raised in one is raised
    here. Threads end at their next step when `stop` is set."""
    waiting, said = queue.SimpleQueue(), queue.SimpleQueue()
    for group in shared:
        waiting.put(group)

    def work(watch: Watch) -> None:
        try:
            with contextlib.suppress(queue.Empty):
                while True:
                    for ended in play_group(watch, waiting.get_nowait()):
                        if stop.is_set():
                            return
                        if ended:
                            said.put(ended)
        except BaseException as error:  # told to the caller's thread, which raises it
            stop.set()
            said.put(error)

    for watch in watches:
        watch.thread = threading.Thread(target=work, args=(watch,), name=THREAD, daemon=True)
        watch.thread.start()
    for _, ended in zip(range(sum(map(len, shared))), heard(watches, said, patience)):
        if isinstance(ended, BaseException):
            raise ended
        yield ended


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices are faster on one thread, and the bits do not depend on the machine's cores. Holds for threads
    that begin inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
