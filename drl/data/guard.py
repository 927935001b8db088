"""Run a function in a child process that may not take more memory and time than it is given.

For parsers of foreign files: HDF5's is large, written in C, and has crashed or filled the memory on malformed files
again and again. Here that costs one line of message. It is no sandbox: the child may do what the user may do.
"""

import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys

from drl import disk
from drl.errors import UserError

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}  # each takes address space


class Failure(UserError):
    """The function did not come to its end; the message says how ("crashed (SIGSEGV)"), the caller says on what."""


def call(target: str, *arguments: str, memory: int, seconds: float) -> None:
    """Call `target` in a child process and wait for it. The environment is inherited, stderr passed through.

    Args:
        target: "package.module:function"; it takes strings and returns nothing.
        arguments: what it is called with.
        memory: address space of the child, in bytes, interpreter and libraries included.
        seconds: of wall clock, and of CPU time.

    Raises:
        UserError: the one that the function raised.
        OSError: the one that it raised because the disk refuses (`disk.REFUSALS`).
        Failure: it crashed, took more than it was given, or raised anything else.
    """
    # -P: the current folder is not searched for modules, since foreign files may lie in it
    command = [sys.executable, "-P", "-m", "drl.data.guard", target, str(memory), str(seconds), *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=os.environ | ONE_THREAD
    ) as child:
        try:
            report, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Failure(_too_long(seconds)) from None
        finally:
            child.kill()  # also on Ctrl-C; one that has ended is left alone
    _raise_what(report, child.returncode, seconds)


def _raise_what(report: bytes, status: int, seconds: float) -> None:
    try:
        kind, message = json.loads(report)
    except ValueError:  # it ended before it could say anything
        if -status in (signal.SIGXCPU, signal.SIGALRM):
            raise Failure(_too_long(seconds)) from None
        raise Failure(f"crashed ({_name(status)})") from None
    if kind == "refused":
        raise UserError(message)
    if kind == "failed":
        raise Failure(message)
    if kind == "disk":
        raise OSError(int(message), os.strerror(int(message)))
    if status:
        raise Failure(f"crashed ({_name(status)})")


def _name(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"exit status {status}"


def _too_long(seconds: float) -> str:
    return f"took longer than {seconds:g} s"


def _limit(kind: int, amount: int) -> None:
    """Lower a limit of this process; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (amount, hard))


def _child(target: str, memory: str, seconds: str, *arguments: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which kills this process
    with os.fdopen(os.dup(1), "w") as report:
        os.dup2(2, 1)  # what the function prints must not mix with the report
        _limit(resource.RLIMIT_AS, int(memory))
        _limit(resource.RLIMIT_CPU, math.ceil(float(seconds)))
        _limit(resource.RLIMIT_CORE, 0)
        signal.alarm(math.ceil(float(seconds)) + 1)  # the parent watches the clock, unless it is killed
        json.dump(_outcome(target, arguments, int(memory)), report)


def _outcome(target: str, arguments: tuple[str, ...], memory: int) -> tuple[str, str]:
    """What became of the call: ("done", ""), ("refused", message), ("disk", errno) or ("failed", message)."""
    try:
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(*arguments)
        return "done", ""
    except UserError as error:
        return "refused", str(error)
    except MemoryError:
        return "failed", f"needed more than {memory / 2**30:.1f} GiB of memory"
    except Exception as error:
        if isinstance(error, OSError) and error.errno in disk.REFUSALS:
            return "disk", str(error.errno)
        return "failed", " ".join(f"{type(error).__name__}: {error}".split())[:200]


if __name__ == "__main__":
    _child(*sys.argv[1:])
