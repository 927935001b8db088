"""Configs on disk: the YAML that a user writes, and that of a run, which has a checksum; and how two of them differ."""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from drl import disk, foreign, trees
from drl.config import Config
from drl.errors import UserError

CHECKSUM = b"# sha256: "  # then that of all lines above: the last line of a run's config
BEFORE = {
    "model.half_lives": [],
    "model.action_tokens": True,
    "model.timestep_embedding": True,
    "model.return_quantile": 0.0,
    "train.best_episodes": 1.0,
    "train.value_weight": 0.0,
    "train.value_measure": "value",
    "train.value_cap": False,
    "train.discount": 0.99,
    "train.value_tau": 0.005,
    "train.precision": "float32",
    "train.compile": "off",
}  # how a run was made whose config was stored before there was such an option
CRITIC = tuple(f"train.{name}" for name in  # read where there is one
               ("value_measure", "value_cap", "discount", "value_trace", "value_tau"))
BESIDE = "device ", "evaluate.", "train.checkpoint_every ", "train.keep_checkpoints ", "train.log_every "  # no weight's


def stored(tree: dict[str, Any]) -> Config:
    """The config that this version or an earlier one stored as a tree, which states all options that there were.

    Raises:
        UserError: a key is unknown, a value of another type or out of range.
    """
    return trees.build(Config, BEFORE | trees.stated(Config, tree))


def unread(config: Config) -> tuple[str, ...]:
    """The options that say nothing of this run: a critic's, where there is none."""
    return () if config.train.value_weight else CRITIC


def differences(before: Config, now: Config, beside: bool = True) -> list[str]:
    """As trees.differences, less what neither reads; without `beside` only what can change the weights."""
    unsaid = {*unread(before)} & {*unread(now)}
    return [change for change in trees.differences(before, now)
            if change.partition(" ")[0] not in unsaid and (beside or not change.startswith(BESIDE))]


def write_config(path: Path, config: Config) -> None:
    """The config of a run, for `read_config`: whole or not at all, in the place of what stood there, and with a
    checksum."""
    body = yaml.safe_dump(config.to_dict(), sort_keys=False)
    disk.write_text(path, body + _checksum(body.encode()).decode())


def read_config(path: Path) -> Config:
    """The resolved config of a run folder.

    Raises:
        UserError: the file is missing, is not what `drl train` wrote, or was changed since and still has its checksum.
    """
    content = foreign.read_bytes(path, "config", foreign.YAML, follow=True)
    body, mark, _ = content.rpartition(CHECKSUM)
    marked = mark or content.rstrip().rpartition(b"\n")[2].startswith(b"#")  # the mark itself may be damaged
    if marked and content != body + _checksum(body):
        raise UserError(f"{path} is damaged: its last line is not the checksum of the lines above; if you changed them "
                        "on purpose, take the last line out")
    tree = foreign.read_yaml(path, content)
    try:
        return stored(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _checksum(body: bytes) -> bytes:
    return CHECKSUM + hashlib.sha256(body).hexdigest().encode() + b"\n"


def read_options(path: Path) -> dict[str, Any]:
    """What a config file states, by dotted key.

    Raises:
        UserError: the file cannot be read, or a key or the type of a value is not one of a config.
    """
    tree = foreign.read_yaml(path, foreign.read_bytes(path, "config", foreign.YAML, follow=True))
    try:
        return trees.stated(Config, tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
