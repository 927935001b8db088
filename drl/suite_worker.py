"""A working process as its parent, the suite, sees it: started when there is something to do, and never left behind.

It dies with its parent, however that ends. What it writes to stdout and stderr comes here, line by line.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from drl.suite_plan import Run
from drl.suite_work import STOP, to_json

GRACE = 5.0  # seconds that one without work has to end
MODULE = "drl.suite_work"


class Worker:
    """A process that does one thing at a time.

    Attributes:
        name: of its place on the screen.
        kinds: what it can do: train, score; what stands first is done first.
        doing: what of it is under way, "" when it waits.
        runs: of what is under way.
        bar: the last text of its progress.
    """

    def __init__(self, name: str, device: str, kinds: Iterable[str], cores: Sequence[int] = ()):
        """`cores`: those that it may use; none: all."""
        self.name, self.kinds, self.doing, self.runs, self.bar = name, tuple(kinds), "", [], ""
        self._device, self._cores, self._child, self._said = device, cores, None, b""

    @property
    def lives(self) -> bool:
        return self._child is not None

    def give(self, doing: str, runs: list[Run]) -> None:
        """Have it train these runs side by side, or score one."""
        if not self.lives:
            self._start()
        self.doing, self.runs, self.bar = doing, runs, ""
        with contextlib.suppress(OSError):  # it has just died, which is seen where it is listened to
            self._pipe.send_bytes(json.dumps({"do": doing, "runs": [to_json(run) for run in runs]}).encode())

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it told since, without waiting; {"said": line} for what it wrote, {"died": how} at its end."""
        yield from self._lines()
        try:
            while self.lives and self._pipe.poll():
                message = json.loads(self._pipe.recv_bytes())
                if "bar" in message:
                    self.bar = message["bar"]
                    continue
                if "ready" in message:
                    self.doing, self.runs = "", []
                yield message
        except (EOFError, OSError):
            status = self._reap(GRACE)
            yield from self._lines()
            self._close()
            if self.doing:
                yield {"died": f"was ended by {signal.Signals(-status).name} (is the memory full?)" if status < 0 else
                       f"ended with status {status}"}
            self.doing, self.runs = "", []

    def stop(self) -> None:
        """Ask it to end; what it trains is saved first."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, STOP)

    def end(self) -> None:
        """End it, now if it does not without work."""
        if self.lives:
            self._pipe.close()
            self._reap(0 if self.doing else GRACE)
            self._close()

    def handles(self) -> list:
        return [self._pipe, self._output] if self.lives else []

    def _start(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        environment = os.environ | ({} if self._device.startswith("cuda") else {"CUDA_VISIBLE_DEVICES": ""})
        with theirs:  # -P: the current folder is not searched for modules
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), str(os.getpid()), self._device,
                 *map(str, self._cores)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
                pass_fds=[theirs.fileno()], process_group=0, env=environment)
        self._output = self._child.stdout
        os.set_blocking(self._output.fileno(), False)

    def _lines(self) -> Iterator[dict[str, Any]]:
        while self.lives and (said := self._output.read(1 << 16)):
            *lines, self._said = (self._said + said).split(b"\n")
            for line in lines:
                if text := "".join(filter(str.isprintable, line.decode(errors="replace"))).strip():
                    yield {"said": text}

    def _reap(self, patience: float) -> int:
        """Its status, at its end, which comes soon or by force."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(patience)
        if self._child.returncode is None:  # its group is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        return self._child.wait()

    def _close(self) -> None:
        self._pipe.close()
        self._output.close()
        self._child, self._said = None, b""


def wait(workers: Iterable[Worker], seconds: float) -> None:
    """Until one of them has something to tell, or the time is over."""
    connection.wait([handle for worker in workers for handle in worker.handles()], seconds)
