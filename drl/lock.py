"""One writer per run folder: a lock that tells who holds it, and that goes with its process, however that ends."""

import contextlib
import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from drl import disk
from drl.errors import UserError

FILE = "run.lock"
PATIENCE = 2.0  # seconds in which whoever has just taken the lock writes who it is


class Held(UserError):
    """Another process writes into the run folder."""


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Be the only one who writes into a run folder, which is made where there is none.

    Raises:
        Held: another process is; says which.
        UserError: the folder cannot be written.
    """
    file = run / FILE
    with disk.refusal_told(run, f"run {run}", "name another folder with --run"):
        run.mkdir(parents=True, exist_ok=True)
        file.touch()
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(disk.locked(file, wait=False))
        except BlockingIOError:
            raise Held(f"{run} is being written by {_holder(file)}; wait for it, stop it, or name another folder with "
                       "--run") from None
        if not alone:
            print(f"{run}: this file system locks no files; take care that no other process trains in it",
                  file=sys.stderr)
        with disk.refusal_told(run, f"run {run}"):
            file.write_text(json.dumps(_self()) + "\n")
        yield


def _self() -> dict[str, str | int]:
    now = datetime.datetime.now(datetime.UTC)
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now.isoformat(timespec="seconds")}


def _holder(file: Path) -> str:
    """Who wrote itself into a lock that is held; what an earlier process left there is not taken for it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            who = json.loads(file.read_text())
            pid, host, since = who["pid"], who["host"], who["since"]
            if type(pid) is int and (host != socket.gethostname() or _lives(pid)):
                return f"process {pid} on {host!s:.80} since {since!s:.40}"
        time.sleep(0.02)
    return "another process"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
