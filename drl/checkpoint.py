"""The checkpoints of a run: each whole or not there, the newest that is sound wins.

    <run>/checkpoints/step-00020000/    checkpoint_files.py says what is in it
    <run>/checkpoints/latest            the name of the newest

A save may be killed, or refused by the disk, at any moment: what was there is as it was, and the next start finds it.
"""

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

from drl import disk, intact
from drl.checkpoint_files import Checkpoint, read, require_finite, size, write
from drl.errors import UserError
from drl.intact import MANIFEST, Damaged

LATEST = "latest"
STEP = re.compile(r"step-(\d{8,9})")


def save(checkpoint: Checkpoint, run: Path, keep: int) -> Path:
    """Write into `run`, point `latest` at the newest, then remove all but the newest `keep`. Returns the folder.

    Raises:
        UserError: a number is not finite, or the disk refuses; the earlier checkpoints are as they were.
    """
    require_finite(checkpoint)
    parent = run / "checkpoints"
    final = parent / f"step-{checkpoint.step:08d}"
    cure = f"make room, then type: drl train --resume --run {run}"
    with disk.refusal_told(parent, f"the checkpoint of update {checkpoint.step}", cure, size(checkpoint)):
        parent.mkdir(parents=True, exist_ok=True)
        with intact.whole(final) as partial:
            write(checkpoint, partial)
        _point_latest(parent)
        for old in _steps(run)[:-keep]:
            _remove(old)
    return final


def resume(run: Path, first: bool = True) -> Checkpoint | None:
    """`load` for whoever goes on with a run; None where it has no checkpoint. Newer ones that are damaged are put aside
    by the `first` process, as step-00020000.damaged, so that none comes after those that will be written.

    Raises:
        UserError: as `load`, or the disk refuses.
    """
    if not _steps(run):
        return None
    checkpoint = load(run)
    with _told(run):
        for step in _steps(run) if first else ():
            if _number(step) > checkpoint.step:
                aside = step.with_name(f"{step.name}.damaged")
                if aside.exists():
                    _remove(aside)
                step.rename(aside)
        if first:
            _point_latest(run / "checkpoints")
    return checkpoint


def tidy(run: Path) -> None:
    """Remove what a killed process left of a run's checkpoints; for the one who may write there.

    Raises:
        UserError: the disk refuses.
    """
    with _told(run):
        for leftover in (run / "checkpoints").glob("*.partial"):
            _remove(leftover)


def _told(run: Path) -> contextlib.AbstractContextManager:
    return disk.refusal_told(run, f"run {run}", "name another folder with --run")


def load(folder: Path | str) -> Checkpoint:
    """Read a checkpoint, or the newest sound one of a run folder; a newer one that is damaged is told on stderr.

    Raises:
        UserError: there is none, files are damaged, missing or added, or they were written by a newer version.
    """
    folder = Path(folder)
    if _is_one(folder):
        try:
            return read(folder)
        except Damaged as error:
            raise Damaged(f"{error}; use an older one") from error
    damaged: dict[Path, Damaged] = {}
    while steps := [step for step in _steps(folder) if step not in damaged]:
        try:
            checkpoint = read(steps[-1])
        except UserError as error:
            if not steps[-1].exists():  # whoever trains has removed it meanwhile
                continue
            if not isinstance(error, Damaged):
                raise
            damaged[steps[-1]] = error
            continue
        for error in damaged.values():
            print(f"drl: WARNING: {error}; going on with {steps[-1].name} instead", file=sys.stderr)
        return checkpoint
    if damaged:
        raise Damaged(f"{next(iter(damaged.values()))}; no sound one is left in {folder}, begin anew: name another "
                      "folder with --run")
    raise _none_in(folder)


def find(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest of the run that it is, sound or not.

    Raises:
        UserError: it is neither.
    """
    if _is_one(folder):
        return folder
    steps = _steps(folder)
    if not steps:
        raise _none_in(folder)
    return steps[-1]


def exists(run: Path) -> bool:
    """Whether a run folder holds a checkpoint."""
    return bool(_steps(run))


def _is_one(folder: Path) -> bool:
    """Whether a folder is meant to be a checkpoint, whatever became of it."""
    return os.path.isfile(folder / MANIFEST) or bool(STEP.fullmatch(folder.resolve().name))


def _none_in(folder: Path) -> UserError:
    return UserError(f"no checkpoint in {folder}; name a run such as runs/hopper/medium-replay/seed-0, or type: "
                     "drl train --config configs/hopper/medium-replay.yaml")


def _steps(run: Path) -> list[Path]:
    return sorted((path for path in (run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name)), key=_number)


def _number(folder: Path) -> int:
    return int(STEP.fullmatch(folder.name)[1])


def _point_latest(parent: Path) -> None:
    """Let the file `latest` name the newest checkpoint: for people and scripts, nothing here reads it."""
    if steps := _steps(parent.parent):
        disk.write_text(parent / LATEST, f"{steps[-1].name}\n")


def _remove(path: Path) -> None:
    """Take a name away in one step, so that half a folder is never taken for a damaged checkpoint."""
    if not path.name.endswith(".partial"):
        path = path.rename(path.with_name(f"{path.name}.partial"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
