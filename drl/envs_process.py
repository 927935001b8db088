"""Environments in processes of their own: one that hangs there, or dies, takes nothing with it but the evaluation.

A child is a fresh interpreter, which knows nothing of the script or notebook that asks. It steps an environment that is
registered by the name of an installed class and arguments that JSON can say; every other is stepped in this process.
Arrays lie in memory that both see; the pipe says whose turn it is.
"""

import contextlib
import ctypes
import json
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import connection

import gymnasium as gym
import numpy as np

from drl.envs import BATCHED, Envs, GymnasiumEnvs, Transition, check_environment, described, make_envs, register
from drl.errors import UserError
from drl.faults import Fault, told

BEGIN = 60.0  # seconds that a child may take at least to import and make its environments
GRACE = 1.0  # seconds that a child has to close its environments
RESET, STEP, CLOSE = b"r", b"s", b"c"
PARENT_ENDS = 1  # PR_SET_PDEATHSIG


def make_apart(environment: str, count: int, players: int, threads: int, patience: float) -> list[Envs]:
    """`make_envs` for each of `players`, in processes where that is the same.

    Args:
        patience: seconds that a child may take to make its environments, where that is more than BEGIN.

    Raises:
        UserError: as make_envs.
        Fault: making one failed.
    """
    check_environment(environment)
    description = None if environment in BATCHED else described(environment)
    with contextlib.ExitStack() as stack:
        if description:
            made = [stack.enter_context(contextlib.closing(ProcessEnvs(environment, description, count)))
                    for _ in range(players)]  # they all begin at the same time
            if all([envs.begun(max(patience, BEGIN)) for envs in made]):
                stack.pop_all()
                return made
    try:
        return [make_envs(environment, count, threads) for _ in range(players)]
    except UserError:
        raise
    except Exception as error:
        raise Fault(f"{environment} {told(error)} when it was made") from error


class ProcessEnvs:
    """GymnasiumEnvs in a child process, which is there until `close`."""

    apart = True

    def __init__(self, environment: str, description: str, count: int):
        self._environment, self._count, self._memory = environment, count, os.memfd_create("drl-environments")
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            fds = theirs.fileno(), self._memory
            # -P: the current folder is not searched for modules
            command = [sys.executable, "-P", "-m", __name__, *map(str, fds), str(os.getpid())]
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds, process_group=0)
        self._ended = os.pidfd_open(self._child.pid)
        self._pipe.send_bytes(json.dumps([description, count]).encode())

    def begun(self, seconds: float) -> bool:
        """Wait until the child has made its environments; False where their code is not there.

        Raises:
            UserError: the child did.
            Fault: it did not come so far.
        """
        try:
            if not self._pipe.poll(seconds):
                raise Fault(f"did not answer within {seconds:g} s")
            kind, content = json.loads(self._received())
            if kind == "failed":
                raise Fault(content)
        except Fault as fault:
            raise Fault(f"{self._environment} {fault.reason} when it was made") from None
        if kind == "refused":
            raise UserError(content)
        if kind == "made":
            self.observation_space, self.action_space = (
                gym.spaces.Box(*(np.array(bound, dtype) for bound in bounds), dtype=np.dtype(dtype).type)
                for dtype, *bounds in content
            )
            self._shared = _Shared(self._memory, self._count, self.observation_space, self.action_space)
        return kind == "made"

    @property
    def row(self) -> int:
        return int(self._shared.at[0])

    def reset(self, rows: np.ndarray, seeds: list[int]) -> np.ndarray:
        self._shared.seeds[: len(rows)] = seeds
        return self._ask(RESET, rows).observations

    def step(self, rows: np.ndarray, actions: np.ndarray) -> Transition:
        self._shared.actions[: len(rows)] = actions
        return self._ask(STEP, rows)

    def close(self) -> None:
        """Have the child close its environments and end; kill it, and what it started, where it does not."""
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(CLOSE)
        self._end()
        self._pipe.close()
        for handle in (self._memory, self._ended):
            os.close(handle)

    def _ask(self, what: bytes, rows: np.ndarray) -> Transition:
        n, shared = len(rows), self._shared
        shared.rows[:n] = rows
        try:
            self._pipe.send_bytes(what + str(n).encode())
        except OSError:
            raise Fault(self._end()) from None
        if answer := self._received():
            raise Fault(answer.decode())
        return Transition(*(array[:n].copy() for array in shared.answer))

    def _received(self) -> bytes:
        try:
            return self._pipe.recv_bytes()
        except (EOFError, OSError):
            raise Fault(self._end()) from None

    def _end(self) -> str:
        """Wait a little for the child's end, kill what is left of it; tells how it ended."""
        connection.wait([self._ended], GRACE)
        if self._child.returncode is None:  # its group is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        status = self._child.wait()
        return f"lost its process ({signal.strsignal(-status) if status < 0 else f'exit status {status}'})"


class _Shared:
    """The arrays of a call, in memory that two processes see. What is kept of them must be copied."""

    def __init__(self, memory: int, count: int, observations: gym.spaces.Box, actions: gym.spaces.Box):
        O, A = observations.shape[0], actions.shape[0]  # noqa: E741
        fields = {"at": (1, int), "rows": (count, int), "seeds": (count, int),
                  "actions": ((count, A), np.result_type(np.float32, actions.dtype)),
                  "observations": ((count, O), float), "rewards": (count, float),
                  "terminated": (count, bool), "truncated": (count, bool)}
        layout = np.dtype([(name, dtype, shape) for name, (shape, dtype) in fields.items()], align=True)
        os.ftruncate(memory, layout.itemsize)
        block = np.frombuffer(mmap.mmap(memory, layout.itemsize), layout)[0]
        self.at, self.rows, self.seeds, self.actions, *self.answer = (block[name] for name in fields)


def _serve(pipe: connection.Connection, memory: int) -> None:
    """The child: make environments, answer until there is no one to answer to."""
    description, count = json.loads(pipe.recv_bytes())
    envs = None
    try:
        envs = GymnasiumEnvs(register(description), count)
        spaces = envs.observation_space, envs.action_space
        shared = _Shared(memory, count, *spaces)
        envs.at = shared.at
        hello = "made", [(space.dtype.str, space.low.tolist(), space.high.tolist()) for space in spaces]
    except ImportError:
        hello = "unknown", ""
    except UserError as error:
        hello = "refused", str(error)
    except (Exception, SystemExit) as error:
        hello = "failed", told(error)
    pipe.send_bytes(json.dumps(hello).encode())
    while envs and (asked := pipe.recv_bytes()) != CLOSE:
        n = int(asked[1:])
        rows = shared.rows[:n].copy()
        try:
            if asked[:1] == RESET:
                answer = [envs.reset(rows, shared.seeds[:n].tolist())]
            else:
                answer = envs.step(rows, shared.actions[:n].copy())  # an environment may keep its action
            for array, given in zip(shared.answer, answer):
                array[:n] = given
            told_back = b""
        except (Exception, SystemExit) as error:
            told_back = told(error).encode()
        pipe.send_bytes(told_back)
    if envs:
        envs.close()


def _child(handle: str, memory: str, parent: str) -> None:
    ctypes.CDLL(None).prctl(PARENT_ENDS, signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    asked_to_end = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    for number in asked_to_end:  # which of them end the evaluation is for the parent to say; then this process ends
        signal.signal(number, lambda *_: None)
    os.register_at_fork(after_in_child=lambda: [signal.signal(number, signal.SIG_DFL) for number in asked_to_end])
    for inherited in (int(handle), int(memory)):
        os.set_inheritable(inherited, False)
    with contextlib.suppress(EOFError, BrokenPipeError), connection.Connection(int(handle)) as pipe:
        _serve(pipe, int(memory))


if __name__ == "__main__":
    _child(*sys.argv[1:])
