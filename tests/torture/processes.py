"""`drl` in processes of its own, with output in files, so that whoever is killed leaves what it said.

A real process imports everything anew (three seconds); a forked one is a child of a process that has imported
everything and computed nothing, so that it starts at once. Both are killed, limited and reaped alike.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

LIMIT = 120.0  # seconds: whoever takes longer hangs
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FINDABLE = {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))}
Hook = Callable[[], None]


class Drl:
    """A running `drl`; `status` is its exit status, or minus the number of the signal that ended it."""

    def __init__(self, arguments: list[str], folder: Path, hook: Hook | None, real: bool):
        """
        Args:
            arguments: of `drl`.
            folder: for what it says; named after its number.
            hook: called in the process before anything of `drl`, pickled by name; not for a real one.
            real: a process anew, else forked.
        """
        folder.mkdir(parents=True, exist_ok=True)
        number = sum(path.suffix == ".out" for path in folder.iterdir())
        self._out, self._err = (folder / f"{number:04d}.{end}" for end in ("out", "err"))
        for file in (self._out, self._err):
            file.touch()
        self.began = time.monotonic()
        if real:
            with self._out.open("wb") as out, self._err.open("wb") as err:
                self._real = subprocess.Popen([sys.executable, "-m", "drl", *arguments], stdout=out, stderr=err,
                                              stdin=subprocess.DEVNULL, env=os.environ | THREADS)
            self.pid = self._real.pid
        else:
            self._real, variables = None, {name: value for name, value in os.environ.items() if name not in THREADS}
            self._forked = _context().Process(target=_forked, args=(arguments, str(self._out), str(self._err),
                                                                    os.getcwd(), variables, hook))
            self._forked.start()
            self.pid = self._forked.pid

    @property
    def status(self) -> int | None:
        return self._real.poll() if self._real else self._forked.exitcode

    @property
    def said(self) -> str:
        """What stands in its stderr so far."""
        return self._err.read_text(errors="replace")

    @property
    def out(self) -> str:
        """What stands in its stdout so far."""
        return self._out.read_text(errors="replace")

    @property
    def told(self) -> list[str]:
        """The lines of its stderr that are no progress bars."""
        lines = (line.rpartition("\r")[2].strip() for line in self.said.replace("\x1b[A", "\n").splitlines())
        return [line for line in lines if line and "%|" not in line]

    @property
    def refused(self) -> bool:
        """Whether it ended as a mistake or a fault must: with status 2, and one line of its own at the end."""
        own = [line.startswith("drl: ") for line in self.told]
        return self.status == 2 and sum(own) == 1 and own[-1] and not any("Traceback" in line for line in self.told)

    @property
    def outcome(self) -> str:
        """Its status and the end of what it told, in few words."""
        return f"status {self.status}: {' '.join(self.told)[-250:]}"

    def send(self, number: int) -> None:
        """A signal, if it is still there."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float = LIMIT) -> int | None:
        """Its status; None after so many seconds without an end, and it is killed."""
        if self._real:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._real.wait(seconds)
        else:
            self._forked.join(seconds)
            if self._forked.exitcode is not None:
                return self._forked.exitcode
        self.kill()
        return None

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        (self._real.wait if self._real else self._forked.join)()


@contextlib.contextmanager
def drl(arguments: list[str], folder: Path, *, hook: Hook | None = None, real: bool = False) -> Iterator[Drl]:
    """A `drl` that does not outlive the context."""
    process = Drl(arguments, folder, hook, real)
    try:
        yield process
    finally:
        process.kill()


def fork(function: Hook) -> multiprocessing.Process:
    """A child of the process that has imported everything, started."""
    process = _context().Process(target=function)
    process.start()
    return process


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torture.imports"])
    before = dict(os.environ)
    # torch asks for its threads when it is imported, which the server does once; it must find this package; what the
    # killed ones had is cleared up without a word
    os.environ.update(THREADS | FINDABLE | {"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _forked(arguments: list[str], out: str, err: str, folder: str, variables: dict[str, str], hook: Hook | None):
    os.environ.update(variables)
    os.chdir(folder)
    for number, file in ((1, out), (2, err)):
        handle = os.open(file, os.O_WRONLY)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hook:
        hook()
    from drl.cli import main

    sys.exit(main(arguments))
