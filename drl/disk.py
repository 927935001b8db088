"""Folders on disk: whole or not at all, one writer at a time, and a full disk told in one line."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from drl.errors import UserError

ROOM = 16 << 20  # bytes that must stay free
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
            errno.ENOTDIR)
MANIFEST = "manifest.json"
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
    """A disk that is full, or not ours to write on, becomes a UserError; `needed` bytes, where it is known how many."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        room = ""
        if needed:
            room = f"; it needs {needed / 1e6:.1f} MB, {shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
        raise UserError(f"{what} cannot be written: {error.strerror} in {folder}{room}; what stood there before is as "
                        f"it was; {cure}") from error


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder; it goes with the process that holds it, however that ends.

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


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `target` at the end, with a manifest of its files' SHA-256; where
    filling it fails, what stood there before is as it was."""
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    new = partial / target.name
    new.mkdir(parents=True)
    try:
        yield new
        write_json(new / MANIFEST, {path.name: sha256(path) for path in sorted(new.iterdir())})
        for path in (*new.iterdir(), new):
            sync(path)
        replace(new, target)
    finally:
        shutil.rmtree(partial)


def require_intact(folder: Path, names: Iterable[str], what: str, cure: str) -> None:
    """Raises UserError unless the files `names` of a folder that `whole` made are those of its manifest."""
    manifest = read_json(folder / MANIFEST, what)
    for name in names:
        if not (folder / name).is_file() or sha256(folder / name) != manifest.get(name):
            raise UserError(f"{what} {folder} is damaged: {name} does not match {MANIFEST}; {cure}")


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file for `read_json`."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file of a `what`.

    Raises:
        UserError: the file is missing, no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{what} file {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} file {path} is damaged: it holds no JSON object")
    return content


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places at once; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
