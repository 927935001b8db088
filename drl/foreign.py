"""Text from strangers, read as data: YAML and JSON, with a limit on all that they could make grow.

What cannot be trusted is looked at before anything is built from it: a regular file of a bounded size, then nesting,
tags and names. Whatever is refused is refused in one line that names the file. Nothing here imports or calls what a
file names. Tensors are read in foreign_tensors.py.
"""

import json
import math
import os
import re
import stat
import types
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin

import yaml

from drl.errors import UserError, shown

YAML, JSON = 1_000_000, 16_000_000  # bytes of a file, at most
DEPTH = 20  # of lists and mappings inside one another
LARGEST = 2**53  # beyond it a float, and many a reader of JSON, skips integers
TEXT = 1000  # characters of a string in `checked`
ARGUMENT = 10_000  # characters of an argument
CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def check_arguments(arguments: list[str]) -> None:
    """Raises UserError where an argument of a command is no line, or a long one."""
    for argument in arguments:
        if len(argument) > ARGUMENT or CONTROL.search(argument):
            raise UserError(f"an option must be one line of at most {ARGUMENT} characters, got {shown(argument)}")


def open_regular(path: Path, what: str, most: int, *, follow: bool = False) -> BinaryIO:
    """A regular file to read, opened without waiting for whoever may write into a pipe.

    Args:
        what: it is, for the message.
        most: bytes of it.
        follow: whether it may be a symbolic link.

    Raises:
        UserError: it cannot be opened, is something else (a folder, a pipe, a device), or is larger.
    """
    if not follow and os.path.islink(path):
        raise UserError(f"{what} {_named(path)} is a symbolic link, which is not followed; copy the folder with "
                        "cp -rL")
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)), "rb")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what} {_named(path)} cannot be read: {reason}") from error
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        file.close()
        flaw = f"it is larger than {most} bytes" if stat.S_ISREG(found.st_mode) else "it is not a regular file"
        raise UserError(f"{what} {_named(path)} cannot be read: {flaw}")
    return file


def read_bytes(path: Path, what: str, most: int, *, follow: bool = False) -> bytes:
    """All of a regular file, as `open_regular` opens it; of one that grows meanwhile, what was there before."""
    with open_regular(path, what, most, follow=follow) as file:
        return file.read(min(most, os.fstat(file.fileno()).st_size))  # memory for as much is taken at once


def _named(path: Path) -> str:
    """The path as it is, if it is printable."""
    return str(path) if str(path).isprintable() else shown(str(path))


def read_yaml(path: Path, content: bytes) -> Any:
    """What stands in `content`, the bytes of the YAML file `path`: null, booleans, numbers, strings, lists, mappings.

    Raises:
        UserError: it is not UTF-8 or no YAML, or it has tags, anchors, aliases, a key twice, several documents, or more
            than DEPTH levels. The message names the line.
    """
    try:
        return parse_yaml(content.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{_named(path)} is not UTF-8: byte {error.start}") from error
    except UserError as error:
        raise UserError(f"{_named(path)}, {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{_named(path)} is not YAML: {where}{reason}") from error


def parse_yaml(text: str) -> Any:
    """`read_yaml` of a string.

    Raises:
        UserError: what could run code or grow without bound is in it; the message begins with the line.
        yaml.YAMLError: it is no YAML.
    """
    depth = documents = 0
    for event in yaml.parse(text, Loader=_Loader):  # flat: building the tree of a deep one would overflow the stack
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        flaw = (
            f"nested deeper than {DEPTH} levels" if depth > DEPTH
            else "a second document" if documents > 1
            else f"tag {shown(event.tag)}" if getattr(event, "tag", None) is not None
            else f"anchor or alias {shown(event.anchor)}" if getattr(event, "anchor", None) is not None
            else ""
        )
        if flaw:
            raise UserError(f"line {event.start_mark.line + 1}: {flaw}, which is not taken here; write plain values")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML 1.2's plain values, where 1e-4 is a number, on is a word and 1:1 no base 60, and each key once."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shown(key.value)} stands there twice", key.start_mark
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]{0,999})", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
              r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), list(_first))


def read_json(path: Path, what: str, most: int = JSON) -> dict[str, Any]:
    """The object in a JSON file of a `what`.

    Raises:
        UserError: the file is missing, a symbolic link, larger than `most` bytes, no JSON in UTF-8, holds something
            else than an object, a key twice, a number that is not finite, or nests too deep to be read.
    """
    try:
        content = parse_json(read_bytes(path, f"{what} file", most))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what} file {_named(path)} is damaged: {shown(str(error))[1:-1]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} file {_named(path)} is damaged: it holds no JSON object")
    return content


def parse_json(content: bytes) -> Any:
    """What stands in JSON bytes. Raises ValueError: they are none, nest too deep, have a key twice, a number that is
    not finite."""
    try:
        return json.loads(content.decode(), object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{shown(text)} is no finite number")
    return value


def checked(content: Any, what: str, kinds: dict[str, Any]) -> dict[str, Any]:
    """What stands under the keys of `kinds` in an object of a JSON file.

    Args:
        what: the object is, for the message.
        kinds: type by key, as `fits` takes it.

    Raises:
        UserError: the content is no object, a key is missing, or its value is of another type.
    """
    if not isinstance(content, dict):
        raise UserError(f"{what} is damaged: {shown(content)} stands where an object is expected")
    for key, kind in kinds.items():
        if key not in content:
            raise UserError(f"{what} is damaged: {key!r} is missing")
        if not fits(content[key], kind):
            name = getattr(kind, "__name__", kind) if not get_args(kind) else kind
            raise UserError(f"{what} is damaged: {key!r} is {shown(content[key])}, not a plain {name}")
    return {key: content[key] for key in kinds}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is of a type: str (printable, TEXT characters at most), int (0 to LARGEST), float
    (finite), list[...], dict[str, ...], dict or a union of those."""
    inner = get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in inner)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(fits(key, str) and fits(item, inner[1]) for key, item in value.items())
    if kind is str:
        return isinstance(value, str) and len(value) <= TEXT and value.isprintable()
    if kind is int:
        return type(value) is int and 0 <= value <= LARGEST
    if kind is float:
        return type(value) is float and math.isfinite(value) or type(value) is int and abs(value) <= LARGEST
    return value is None if kind is types.NoneType else type(value) is kind
