"""Dataclasses from nested dicts of plain values: every key is known, every value of its field's type."""

import dataclasses
from typing import Any, Literal, get_args, get_origin

from drl.errors import UserError, did_you_mean, shown
from drl.foreign import LARGEST


def stated(cls: type, tree: Any, where: str = "") -> dict[str, Any]:
    """What a tree says of the fields of a dataclass, by dotted key.

    Raises:
        UserError: a key is unknown or a value of another type.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{where.strip('.') or 'a config'} must be a mapping of keys to values, got {shown(tree)}")
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        name = f"{where}{key}"
        if key not in kinds:
            raise UserError(f"unknown config key {shown(name)}; {did_you_mean(name, (where + kind for kind in kinds))}")
        nested = dataclasses.is_dataclass(kinds[key])
        values |= stated(kinds[key], value, name + ".") if nested else {name: _typed(kinds[key], value, name)}
    return values


def keys(cls: type, where: str = "") -> list[str]:
    """Every dotted key that a tree may state of a dataclass."""
    names = []
    for f in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(f.type)
        names += keys(f.type, f"{where}{f.name}.") if nested else [where + f.name]
    return names


def build(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """An instance of a dataclass from what is `stated`.

    Raises:
        UserError: a field without a default is missing.
    """
    given = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            given[f.name] = build(f.type, values, f"{where}{f.name}.")
        elif where + f.name in values:
            given[f.name] = values[where + f.name]
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"config key {where + f.name!r} is missing")
    return cls(**given)


def _typed(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{name} must be one of {', '.join(get_args(kind))}, got {shown(value)}")
        return value
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{name} must be list, got {shown(value)}")
        return [_typed(get_args(kind)[0], item, name) for item in value]
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{name} must be {kind.__name__}, got {shown(value)}")
    return value


def overlaid(stored: Any, given: Any) -> Any:
    """`stored` with what `given` sets otherwise than the defaults, so that no option is ignored without a word."""
    changes = {}
    for f in dataclasses.fields(given):
        value = getattr(given, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if dataclasses.is_dataclass(value):
            changes[f.name] = overlaid(getattr(stored, f.name), value)
        elif value != ("" if default is dataclasses.MISSING else default):
            changes[f.name] = value
    return dataclasses.replace(stored, **changes)


def differences(before: Any, now: Any) -> list[str]:
    """The fields in which two instances of a dataclass differ, as "train.updates 10 -> 20"."""
    old, new = flat(dataclasses.asdict(before)), flat(dataclasses.asdict(now))
    return [f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]


def flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key."""
    return {
        name: value
        for key, child in tree.items()
        for name, value in (
            flat(child, f"{where}{key}.") if isinstance(child, dict) else {where + key: child}
        ).items()
    }
