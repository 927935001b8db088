"""Where numbers go: TensorBoard for eyes, metrics.jsonl for programs; one call writes both.

The step is always the number of gradient updates. The vocabulary is closed, so that runs can be overlaid.
"""

import contextlib
import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from drl.appended import Appended
from drl.disk import space, sync
from drl.errors import UserError

TAGS = frozenset(
    {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/updates_per_second",
        "train/value",
        "train/value_loss",
        "eval/normalized_score",
        "eval/normalized_score_std",
        "eval/return_mean",
        "eval/return_std",
        "eval/episode_length",
        "eval/env_steps_per_second",
    }
)
SUFFIX = "/target-"  # several targets: eval/return_mean/target-3600
# TensorBoard reads the files of a folder in the order of their names
EVENTS = re.compile(r"events\.out\.tfevents\.(\d{10})")
LONGEST = 1 << 20  # bytes of a line of metrics.jsonl; more is none of ours


class Tracker:
    """Writes scalars into one run folder, whose only writer it must be; use as a context manager.

    `start` is the update that the run goes on from: later lines of an interrupted run are dropped, so that each
    step stands once. None adds to a finished run.

    A disk that refuses a value ends nothing: the value is kept in memory, and drl.appended says what becomes of it.

    Attributes:
        at_start: the tags that metrics.jsonl already holds at `start`.

    Raises:
        UserError: metrics.jsonl is no file, or holds what must be dropped and cannot be rewritten.
    """

    def __init__(self, run: Path, start: int | None = 0):
        run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl"
        self.at_start = _keep_until(path, start)
        self._lines = Appended(path)
        self._lines.write()

        seconds = [int(found[1]) for other in run.iterdir() if (found := EVENTS.match(other.name))]
        second = max([int(time.time()), *(earlier + 1 for earlier in seconds)])
        self._board = Appended(run / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}")
        self._opening = _record(file_version="brain.Event:2")
        if start is not None:
            self._opening += _record(step=start + 1, session_log=SessionLog(status=SessionLog.START))
            if seconds:  # TensorBoard is to forget the later steps of the earlier files, even if none comes again
                self._write_board(b"", 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` at `step`.

        Raises:
            ValueError: a tag is not in TAGS, a value is not finite; nothing is recorded.
        """
        if unknown := {tag for tag in values if tag.partition(SUFFIX)[0] not in TAGS}:
            raise ValueError(f"unknown tag {min(unknown)!r}; add it to drl.tracker.TAGS or use one of {sorted(TAGS)}")
        if bad := [tag for tag, value in values.items() if not math.isfinite(value)]:
            raise ValueError(f"{bad[0]} is {values[bad[0]]} at update {step}; only finite values are recorded")
        line = json.dumps({"step": step} | values) + "\n"
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = _record(step=step, summary=Summary(value=scalars))
        self._lines.append(line.encode(), len(values))
        self._write_board(event, len(values))

    def flush(self) -> None:
        """Everything logged so far is on disk when this returns: called before a checkpoint is published.

        Where the disk refuses, a line on stderr has said so.
        """
        self._lines.sync()
        self._board.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._board.close()

    def _write_board(self, record: bytes, values: int) -> None:
        opening, self._opening = self._opening, b""  # the file is made with its first record
        self._board.append(opening + record, values)


def _record(**fields: Any) -> bytes:
    """An event of now, framed as it stands in a file of TensorBoard's."""
    framed = io.BytesIO()
    RecordWriter(framed).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return framed.getvalue()


def _keep_until(path: Path, start: int | None) -> frozenset[str]:
    """Drop the lines later than `start` (None: none is) and what is no line of ours; returns the tags at `start`.

    Raises:
        UserError: there is no file in its place, or it cannot be read or rewritten.
    """
    partial = path.with_suffix(".partial")
    last = math.inf if start is None else start
    at_start, clean = set(), True
    try:
        if not path.exists():
            return frozenset()
        if not path.is_file():
            raise UserError(f"{path} is no file; move it away and type the same again")
        with path.open("rb") as file:
            for line, step, tags in _lines(file):
                clean &= step <= last and line.endswith(b"\n")
                if step == start:
                    at_start |= tags
            if not clean:
                file.seek(0)
                with partial.open("wb") as kept:
                    kept.writelines(line.rstrip(b"\n") + b"\n" for line, step, _ in _lines(file) if step <= last)
                    kept.flush()
                    os.fsync(kept.fileno())
                os.replace(partial, path)
                sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path} cannot be rewritten without its torn and later lines: {error.strerror} "
                        f"({space(path.parent)}); make room or make it writable, then type the same again"
                        ) from error
    return frozenset(at_start)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, float, set[str]]]:
    """Each line of metrics.jsonl with its step and its tags; the step is NaN where it is no line of ours."""
    while line := file.readline(LONGEST):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # torn by a kill, or never ours
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield line, record["step"], record.keys() - {"step"}
        else:
            yield line, math.nan, set()
