"""Files and folders on disk: whole or not at all, one writer at a time, and a full disk told in one line."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from drl.errors import UserError

ROOM = 16 << 20  # bytes that must stay free
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
CURE = "make room, or name another folder for datasets: export MINARI_DATASETS_PATH=FOLDER"


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises UserError unless the disk of `folder` has room for `needed` bytes and a little more."""
    with refusal_told(folder, what):
        folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed + ROOM > free:
        needed, free = (f"{amount / 1e6:.0f} MB" for amount in (needed + ROOM, free))
        raise UserError(f"{what} needs {needed} in {folder}, {free} are free; {CURE}")


@contextlib.contextmanager
def refusal_told(folder: Path, what: str, cure: str = CURE, needed: int = 0) -> Iterator[None]:
    """A disk that is full, or not ours to write on, becomes a UserError; `needed`: bytes, where they are known."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise UserError(f"{what} cannot be written: {error.strerror} in {folder}; {space(folder, needed)}; what stood "
                        f"there before is as it was; {cure}") from error


def space(folder: Path, needed: int = 0) -> str:
    """The bytes free on the disk of a folder, there or not, and those needed where they are known, for a message."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = f"{shutil.disk_usage(there).free / 1e6:.1f} MB are free"
    except OSError:
        free = "how much is free is not known"
    return f"it needs {needed / 1e6:.1f} MB, {free}" if needed else free


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, or of a file; it goes with the process that holds it, however that ends.

    Gives whether it is held: some file systems, NFS among them, lock no folders, and each process is on its own there.

    Raises:
        BlockingIOError: another holds it, and `wait` is false.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            raise
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


@contextlib.contextmanager
def alone(folder: Path, waiting: str) -> Iterator[None]:
    """Hold the lock of a folder; while another process has it, wait and say so on stderr."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            print(waiting, file=sys.stderr, flush=True)
            held.enter_context(locked(folder))
        yield


@contextlib.contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """A hidden folder in `beside`, removed at the end; what a killed process left there is removed first."""
    beside.mkdir(parents=True, exist_ok=True)
    with locked(beside), contextlib.ExitStack() as held:
        for leftover in beside.glob(".partial-*"):
            with contextlib.suppress(BlockingIOError, FileNotFoundError), locked(leftover, wait=False) as unused:
                if unused:
                    shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=beside))
        held.enter_context(locked(partial))
        held = held.pop_all()
    with held:
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace(new: Path, target: Path) -> None:
    """Put the folder `new` in the place of `target`, which may be missing, in one step: at every moment one of them
    stands there. What stood there is found in the place of `new`, or beside it."""
    if not os.path.lexists(target):
        os.replace(new, target)
    elif not _exchange(new, target):
        earlier = new.with_name(new.name + ".earlier")
        os.replace(target, earlier)
        try:
            os.replace(new, target)
        except BaseException:
            os.replace(earlier, target)
            raise
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: at every moment the earlier one or the new one stands there, not a link."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link to another file
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places at once; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
