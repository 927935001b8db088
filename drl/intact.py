"""Files that tell whether they are as they were written.

A folder has a manifest, the SHA-256 of each of its files, and nothing else. A single file carries its own, and is
compared with what would be written now: a digit beyond a number's precision may not change either.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any

from drl import disk, foreign
from drl.errors import UserError

MANIFEST = "manifest.json"


class Damaged(UserError):
    """Files are not as they were written."""


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
        digests = {path.name: disk.sha256(path) for path in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps(digests, indent=1))  # no line end: it would not be missed
        for path in (*new.iterdir(), new):
            disk.sync(path)
        disk.replace(new, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_intact(folder: Path, names: Iterable[str], what: str) -> None:
    """Raises Damaged unless the files `names` of a folder that `whole` made are those of its manifest."""
    manifest = read_json(folder / MANIFEST, what)
    for name in names:
        path = folder / name
        if Path(name).name != name or not S_ISREG(_mode(path)) or disk.sha256(path) != manifest.get(name):
            raise Damaged(f"{what} {folder} is damaged: {name!s:.80} does not match {MANIFEST}")


def require_whole(folder: Path, names: Iterable[str], what: str) -> None:
    """Raises Damaged unless all files of a folder, `names` among them, are as `whole` made them; UserError where
    something was added.

    Names that begin with a dot are not looked at: file systems and file managers leave them.
    """
    manifest = read_json(folder / MANIFEST, what)
    require_intact(folder, {*names, *manifest}, what)
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if extra := there - {MANIFEST, *manifest}:
        raise UserError(f"{what} {folder} holds {min(extra)!s:.80}, which is not of it; move that away")


def write_sealed(path: Path, fields: dict[str, Any]) -> None:
    """A file for `read_sealed`, written whole or not at all. Raises ValueError where a number is not finite."""
    disk.write_text(path, sealed(fields))


def read_sealed(path: Path, what: str, unsealed: bool = False, most: int = foreign.JSON) -> dict[str, Any]:
    """The fields that `write_sealed` wrote.

    Args:
        unsealed: a file of one line, from before there were seals, passes too.
        most: bytes of it.

    Raises:
        Damaged: the file cannot be read, or a byte of it changed.
    """
    fields = read_json(path, what, most)
    content = path.read_bytes()
    if unsealed and content.count(b"\n") < 2:
        return fields
    fields.pop("sha256", None)
    if content != sealed(fields).encode():
        raise Damaged(f"{what} file {path} is damaged: it does not match its own checksum")
    return fields


def sealed(fields: dict[str, Any]) -> str:
    """What `write_sealed` writes: JSON, a line for each field, the last of which is the SHA-256 of those before."""
    lines = (f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)},\n" for name, value in fields.items())
    text = "{\n" + "".join(lines)
    return f'{text} "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file for `read_json`."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path, what: str, most: int = foreign.JSON) -> dict[str, Any]:
    """`foreign.read_json`; what it refuses is Damaged."""
    try:
        return foreign.read_json(path, what, most)
    except UserError as error:
        raise Damaged(str(error)) from error


def _mode(path: Path) -> int:
    """What kind of file a path itself is, without following a link; 0 where there is none."""
    try:
        return path.lstat().st_mode
    except OSError:
        return 0
