"""A file that grows record by record: what the disk refuses is told in one line, kept in memory and tried again."""

import contextlib
import os
import sys
from pathlib import Path

from drl.disk import space, sync


class Appended:
    """Appends records to a file, each whole or not at all. No method raises OSError.

    There must be no other writer. What the file holds when it is first opened stays, and must end with a whole record.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None
        self._kept: list[tuple[bytes, int]] = []  # records that may not be on the disk yet, and the values in each
        self._written = 0  # how many of these stand in the file
        self._end = 0  # bytes of the file up to these: where the next record belongs
        self._synced: int | None = None  # bytes of the file that are on the disk; None: never opened
        self._failing = False

    def append(self, record: bytes, values: int) -> None:
        """Write a record, after those that were refused before it; `values`: how many a reader would miss with it."""
        self._kept.append((record, values))
        self.write()

    def write(self) -> None:
        """Create the file if it is missing, and write what was refused."""
        self._try(durably=False)

    def sync(self) -> None:
        """Everything appended is on the disk when this returns, or a line on stderr has said why it is not."""
        if self._kept:
            self._try(durably=True)

    def close(self) -> None:
        """`sync` for the last time, and say how many values are lost if the disk still refuses them."""
        self.sync()
        self._release()
        if lost := sum(values for _, values in self._kept):
            _tell(f"{lost} values could not be written to {self.path} and are lost")

    def _try(self, durably: bool) -> None:
        try:
            if self._handle is None:
                self._open()
            for record, _ in self._kept[self._written:]:
                self._put(record)
            if durably or self._failing:  # a full disk may take a write and refuse the sync (NFS)
                self._sync()
        except OSError as error:
            self._release()
            if not self._failing:
                _tell(f"{self.path} cannot be written: {error.strerror} ({space(self.path.parent)}); the run goes "
                      "on, what is not written is kept in memory and tried again at the next log")
            self._failing = True
        else:
            if self._failing:
                _tell(f"{self.path} is written again, with all that was kept in memory")
            self._failing = False

    def _open(self) -> None:
        """Go on where the disk holds everything; what came after it may be gone, and is written anew."""
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        sync(self.path.parent)
        size = os.fstat(self._handle).st_size
        self._synced = size if self._synced is None else min(size, self._synced)
        os.ftruncate(self._handle, self._synced)
        self._end, self._written = self._synced, 0

    def _put(self, record: bytes) -> None:
        done = 0
        try:
            while done < len(record):
                done += os.pwrite(self._handle, record[done:], self._end + done)
        except OSError:
            os.ftruncate(self._handle, self._end)
            self._sync()  # so that the records before this one need not be written anew
            raise
        self._end += done
        self._written += 1

    def _sync(self) -> None:
        os.fsync(self._handle)
        self._synced = self._end
        del self._kept[:self._written]
        self._written = 0

    def _release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):  # what it would tell of, `_sync` has told
                os.close(handle)


def _tell(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
        print(f"drl: {message}", file=sys.stderr, flush=True)
