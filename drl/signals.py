"""Signals that ask a process to end: Ctrl-C (SIGINT), a scheduler's SIGTERM, SLURM's SIGUSR1 ahead of a time limit.

    raised()      the main thread gets `Stopped`, an exception, wherever it is
    deferred()    nothing happens but a note, which whoever works looks at when its work is whole

The first signal is answered so; a second one ends the process at once. One that was ignored when the process began, as
SIGINT is in the background of a script, stays ignored. The status of a process that was asked to end is 128 + signal.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_answered_here = SIGNALS  # in a child that leaves them to its parent: the parent's channel
_depth = 0  # of contexts that answer
_heard: int | None = None  # the signal that the outermost of them, or one within, has answered


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; the message says what was kept. Attribute `signal`: which."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(*[message] if message else [])
        self.signal = number


@dataclass
class Note:
    """What came in so far: the number of the signal, or None."""

    signal: int | None = None


def leave_to_parent(channel: int) -> None:
    """For a child process, from here on: SIGNALS, which a terminal or a scheduler may send to parent and child alike,
    are ignored. The parent asks it to end by the signal `channel`, which is answered in their stead."""
    global _answered_here
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _answered_here = (channel,)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within, the first signal raises `Stopped` in the main thread."""

    def answer(number: int) -> None:
        raise Stopped(number)

    with _answered(answer):
        yield


@contextlib.contextmanager
def deferred(doing: str) -> Iterator[Note]:
    """Within, the first signal is noted, and stderr told that it was heard while `doing`."""
    note = Note(_heard if _depth else None)  # one that some library's `except` swallowed before is not forgotten

    def answer(number: int) -> None:
        note.signal = number
        if number not in SIGNALS:  # the parent has told what it does
            return
        with contextlib.suppress(OSError):  # not print: it may have been interrupted in the middle of a print
            os.write(2, f"\ndrl: {name(number)} while {doing}; a second one ends it at once\n".encode())

    with _answered(answer):
        yield note


def status(work: Callable[[], int]) -> int:
    """What `work` returns, as the status of a process; where a signal stops it, 128 + signal, told in one line."""
    try:
        with raised():
            done = work()
        if not _heard or done == 128 + _heard:  # told by a status within
            return done
        raise Stopped(_heard)  # it came so late, or was swallowed, that all is done
    except BaseException as stopped:
        if not (_heard or isinstance(stopped, KeyboardInterrupt)):
            raise
        number = stopped.signal if isinstance(stopped, Stopped) else _heard or signal.SIGINT
        told = str(stopped) if isinstance(stopped, KeyboardInterrupt) else ""  # else it broke off an import, say
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun ends together, one speaks
            print(f"drl: stopped by {name(number)}{f'; {told}' if told else ''}", file=sys.stderr)
        return 128 + number


def name(number: int) -> str:
    """SIGTERM for 15, as people call it."""
    return signal.Signals(number).name


@contextlib.contextmanager
def _answered(answer: Callable[[int], None]) -> Iterator[None]:
    """Within, the first signal calls `answer`, in the main thread, which is the only one that may say so."""
    global _depth, _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _answered_here}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    if not _depth:
        _heard = None

    def first(number: int, _) -> None:
        global _heard
        _heard = number
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        answer(number)

    for number in before:
        signal.signal(number, first)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not (_heard and _depth):  # the second one ends the process until the outermost context is left
            for number, handler in before.items():
                signal.signal(number, handler)
