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
from drl.envs import Envs, check_fit, make_envs
from drl.errors import UserError
from drl.players import Act, Policy, groups, players, side_by_side
from drl.progress import progress

THREAD = "drl-rollout"  # the name of each


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
    threads: int | None = None,
    label: str = "evaluating",
) -> Rollouts:
    """Play `episodes` episodes, at most `environments` of them side by side.

    Args:
        threads: that may work at once; None: one for each core. Changes the speed only.

    Raises:
        UserError: the environment does not fit the policy, or one of them answered what is not finite.
    """
    check_fit(environment, policy.spaces, "the checkpoint")
    threads = threads or len(os.sched_getaffinity(0))
    playing = min(side_by_side(policy, threads), environments, episodes)
    shared = groups(policy, episodes, environments, playing)
    playing = min(playing, len(shared))
    threads_each = -(-threads // playing)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, int)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_thread())
        each = [
            stack.enter_context(contextlib.closing(make_envs(environment, max(map(len, shared)), threads_each)))
            for _ in range(playing)
        ]

        def play_group(envs: Envs, group: np.ndarray) -> Iterator[Ended]:
            return play(players(policy, group, target_return, threads_each), envs, group, seed)

        bar = stack.enter_context(progress(episodes, "episode", label))
        for ended in _shared(play_group, each, shared):
            returns[ended.episode], lengths[ended.episode] = ended.total, ended.length
            bar.update()
    return Rollouts(returns, lengths, seed + np.arange(episodes))


def play(act: Act, envs: Envs, episodes: np.ndarray, seed: int) -> Iterator[Ended | None]:
    """The episodes of a group as they end, None after every other step. Row r of `envs` plays `episodes[r]`.

    Raises:
        UserError: an action, an observation or a reward is not finite.
    """
    low, high = envs.action_space.low, envs.action_space.high
    rows = np.arange(len(episodes))
    observations, rewards = envs.reset(rows, list(seed + episodes)), np.zeros(len(rows))
    totals, steps = np.zeros(len(rows)), 0
    while len(rows):
        try:
            actions = act(observations, rewards, rows)
            if not (good := np.isfinite(actions).all(1)).all():
                raise ActionError(int(good.argmin()))
        except ActionError as error:
            raise UserError(f"the policy's action in episode {episodes[rows[error.row]]}, step {steps} is not finite; "
                            "the weights or the observation are damaged") from None
        except ValueError:
            given = np.isfinite(observations).all(1) & np.isfinite(rewards)
            if given.all():
                raise
            raise UserError(f"the environment's answer in episode {episodes[rows[~given][0]]}, step {steps} is not "
                            "finite; its physics diverged") from None
        observations, rewards, terminated, truncated = envs.step(rows, np.minimum(np.maximum(actions, low), high))
        totals[rows] += rewards
        steps += 1
        over = terminated | truncated
        if over.any():
            for row in rows[over]:
                yield Ended(int(episodes[row]), float(totals[row]), steps)
            rows, observations, rewards = rows[~over], observations[~over], rewards[~over]
        else:
            yield None


def _shared(
    play_group: Callable[[Envs, np.ndarray], Iterator[Ended | None]], each: list[Envs], shared: list[np.ndarray]
) -> Iterator[Ended]:
    """The episodes of all groups as they end; every thread has one of `each`. What is raised in one is raised here,
    and by then all threads have ended, as they have when the caller goes away."""
    waiting, told, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    for group in shared:
        waiting.put(group)

    def work(envs: Envs) -> None:
        try:
            with contextlib.suppress(queue.Empty):
                while True:
                    for ended in play_group(envs, waiting.get_nowait()):
                        if stop.is_set():
                            return
                        if ended:
                            told.put(ended)
        except BaseException as error:  # told to the caller's thread, which raises it
            stop.set()
            told.put(error)

    workers = [threading.Thread(target=work, args=(envs,), name=THREAD) for envs in each]
    try:
        for worker in workers:
            worker.start()
        for _ in range(sum(map(len, shared))):
            ended = told.get()
            if isinstance(ended, BaseException):
                raise ended
            yield ended
    finally:
        stop.set()
        for worker in workers:
            if worker.ident:
                worker.join()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small matrices are faster on one thread, and the bits do not depend on the machine's cores. Holds for threads
    that begin inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
