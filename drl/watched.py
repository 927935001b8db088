"""Threads that play side by side, and the one that waits for them: not for ever.

Python cannot end a thread. One that hangs is given up: it is left behind as a daemon, which does not keep the process
from ending, and its environments are left alone, unless they are in a process of their own, which is killed.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from drl.envs import Envs
from drl.faults import Fault, told

THREAD = "drl-rollout"  # the name of each
LOOKS = 10  # in the time that a call may take; one look is too few: the process may have been stopped in between
GRACE = 2.0  # seconds that threads, and then environments, have to end
SLOW = "where it is slow, not stuck, give it longer: drl evaluate --patience SECONDS (drl train: --evaluate.patience)"


class Watch:
    """One player as the others see it: in which call it is, of which step of which episodes.

    Attributes:
        thread: the one that plays; None before it begins.
        hung: it is given up.
    """

    def __init__(self, environment: str, envs: Envs, seed: int):
        self.envs, self.thread, self.hung = envs, None, False
        self._environment, self._seed = environment, seed
        self._episodes = self._rows = np.zeros(0, int)
        self._step, self._acting, self._calls, self._seen, self._looks = 0, False, 0, -1, 0

    def begin(self, episodes: np.ndarray) -> None:
        """The next group is played; row r is episode `episodes[r]`."""
        self._episodes, self._step = episodes, -1

    def act(self, rows: np.ndarray, call: Callable, *arguments):
        """Call the policy for these rows."""
        self._rows, self._acting = rows, True
        self._calls += 1
        return call(*arguments)

    def answer(self, rows: np.ndarray, call: Callable, *arguments):
        """Call the environments, reset or step, for these rows. Raises Fault, whatever they raise."""
        self._rows, self._acting = rows, False
        self._calls += 1
        self._step += 1
        try:
            return call(rows, *arguments)
        except (Exception, SystemExit) as error:
            raise self.fault(told(error)) from error

    def fault(self, what: str, row: int | None = None) -> Fault:
        """`what` the environments did in their last call, in one `row` where that is known."""
        row = self.envs.row if row is None else row
        one, *others = self._episodes[self._rows if row is None else [row]]
        step = f"step {self._step}" if self._step else "the reset"
        whose = f"one of {1 + len(others)} episodes from {one}" if others else f"episode {one}"
        return Fault(f"{self._environment} {what} in {step} of {whose} (seed {self._seed + one})")

    def look(self, patience: float) -> None:
        """To be called LOOKS times in `patience` seconds. Raises Fault when a call was under way all the while."""
        self._looks = self._looks + 1 if self._calls == self._seen and self.thread.is_alive() else 0
        self._seen = self._calls
        if self._looks >= LOOKS:
            self.hung = True
            late = f"did not answer within {patience:g} s"
            reason = f"the policy {late} after step {self._step}" if self._acting else self.fault(late).reason
            raise Fault(reason, SLOW)

    def close(self) -> None:
        """Close the environments; where that fails, stderr is told: what they played stays played."""
        try:
            self.envs.close()
        except Exception as error:
            print(f"drl: {self._environment} {told(error)} when it was closed", file=sys.stderr)


def heard(watches: list[Watch], said: queue.SimpleQueue, patience: float) -> Iterator:
    """What the players put into the queue. Raises Fault when a player hangs."""
    pause = patience / LOOKS
    look = time.monotonic() + pause
    while True:
        try:
            yield said.get(timeout=max(0, look - time.monotonic()))
        except queue.Empty:
            pass
        if time.monotonic() >= look:
            for watch in watches:
                watch.look(patience)
            look = time.monotonic() + pause


def dismiss(watches: list[Watch]) -> None:
    """Wait for players that were told to stop, and close their environments. What does not end is left behind."""
    _join([watch.thread for watch in watches if watch.thread and not watch.hung])
    free = [watch for watch in watches if watch.envs.apart or not (watch.thread and watch.thread.is_alive())]
    closing = [threading.Thread(target=watch.close, name=THREAD, daemon=True) for watch in free]
    for thread in closing:
        thread.start()
    _join([*closing, *(watch.thread for watch in free if watch.thread)])


def _join(threads: list[threading.Thread]) -> None:
    end = time.monotonic() + GRACE
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
