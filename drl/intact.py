"""Files that tell whether they are as they were written."""

import hashlib
import json
from pathlib import Path
from typing import Any

from drl.errors import UserError


def write_sealed(path: Path, fields: dict[str, Any]) -> None:
    """A file for `read_sealed`."""
    path.write_bytes(_sealed(fields))


def read_sealed(path: Path, what: str) -> dict[str, Any]:
    """The fields that `write_sealed` wrote.

    Raises:
        UserError: the file cannot be read, or a byte of it changed.
    """
    try:
        content = path.read_bytes()
        fields = json.loads(content)
        fields.pop("sha256", None)
        sound = content == _sealed(fields)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{what} file {path} cannot be read: {error}") from error
    if not sound:
        raise UserError(f"{what} file {path} is damaged: it does not match its own checksum")
    return fields


def _sealed(fields: dict[str, Any]) -> bytes:
    """JSON, a line for each field, the last of which is the SHA-256 of the lines before it."""
    lines = (f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)},\n" for name, value in fields.items())
    text = "{\n" + "".join(lines)
    return f'{text} "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'.encode()
