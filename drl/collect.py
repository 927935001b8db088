"""Collection: roll the behaviour policies out into a local Minari dataset, D4RL-style.

The plan is a list of shards, small enough to share among cores; a shard's data come from (seed, its number) alone, so
the same seed gives the same bytes on any number of cores. A shard that is played is kept as a piece in a hidden folder
beside the datasets until the dataset stands: the same command goes on where it was stopped or killed. Only whole
episodes are kept: as few as reach the steps asked for.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from drl import disk, envs, scores
from drl.behaviour import actor, pieces, rounding
from drl.behaviour.plan import Work, cut, plan, size
from drl.behaviour.play import Shard
from drl.data import minari_files, minari_writer
from drl.data.store import Recorded
from drl.errors import UserError
from drl.names import parse
from drl.progress import progress
from drl.versions import versions

ROOM = 1.05  # space asked for over space needed: episodes of this seed may be shorter or longer than the cards say


def collect(name: str, *, steps: int | None = None, seed: int = 0, overwrite: bool = False) -> Path:
    """Make the dataset drl/<name>-v0. Returns its folder.

    Args:
        name: "<env>/<tier>", e.g. "hopper/medium-replay".
        steps: at least so many environment steps; None: D4RL's size.
        seed: of everything random.
        overwrite: replace a dataset of this id.

    Raises:
        UserError: the name is unknown, the dataset exists and may not be replaced, another process is collecting it,
            or the disk is full.
    """
    environment, tier = parse(name)
    dataset_id = f"drl/{environment}/{tier}-v0"
    if dataset_id in minari_files.local_ids() and not overwrite:
        raise UserError(f"dataset {dataset_id} exists already; add --overwrite to collect it anew")
    steps = size(name) if steps is None else steps
    if steps < 1:
        raise UserError(f"--steps must be positive, got {steps}")
    card = actor.card(environment)
    shares = plan(environment, tier, steps)
    works = cut(environment, shares, seed)
    root = minari_files.root()  # which holds no pieces itself
    told = functools.partial(disk.refusal_told, root, f"dataset {dataset_id}")
    pieces_folder = _pieces_folder(root, dataset_id, _recipe(environment, works))
    with _interruption_told(), told(needed=_bytes(works, root)), pieces_folder as folder:
        needed = _bytes(works, folder)
        disk.require_space(root, needed, f"collecting {dataset_id}")
        played = _episodes(works, folder, f"collecting {name}", steps)
        with told(needed=needed), contextlib.closing(played) as episodes:
            target = minari_writer.write(
                dataset_id,
                episodes,
                environment=card["environment"],
                algorithm=card["algorithm"] if tier != "random" else "uniform actions",
                reference=scores.reference(card["environment"]),
                description=f"Regenerated, D4RL-style {environment} {tier} data: roll-outs of the behaviour policies "
                "that the package drl ships. Not D4RL's own files.",
                extra={
                    "reference_source": scores.REFERENCE_SOURCE,
                    "collection_seed": seed,
                    "behaviour": [{"snapshot": snapshot, "steps": share} for snapshot, share in shares],
                    "versions": versions(),
                },
                making=envs.quiet(card["environment"]),
            )
        shutil.rmtree(folder)
    return target


def _bytes(works: list[Work], folder: Path) -> int:
    """About what is still to be written: the pieces that are not in `folder`, then the dataset."""
    shards = [work.shard for work in works]
    steps, episodes = sum(shard.steps for shard in shards), sum(map(pieces.episode_count, shards))
    dataset = minari_writer.size(steps, episodes, *actor.dimensions(shards[0].environment))
    return int(ROOM * (sum(map(pieces.size, _missing(works, folder))) + dataset))


def _missing(works: list[Work], folder: Path) -> list[Shard]:
    """The shards that have no piece yet."""
    return [work.shard for work in works if not pieces.piece_path(folder, work.shard).exists()]


def _recipe(environment: str, works: list[Work]) -> dict[str, Any]:
    """Everything that the pieces depend on: pieces of another recipe are of no use."""
    asked = json.dumps([list(work.shard.__dict__.values()) for work in works])
    return {
        "shards": hashlib.sha256(asked.encode()).hexdigest(),
        "behaviour": actor.fingerprint(environment),
        "versions": versions(),
    }


@contextlib.contextmanager
def _pieces_folder(root: Path, dataset_id: str, recipe: dict[str, Any]) -> Iterator[Path]:
    """The folder of the pieces, ours alone while the context lasts; it stays where there is a piece to go on from."""
    # hidden, so that Minari does not take it for a namespace
    folder = root / f".collecting-{dataset_id.replace('/', '.')}"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(disk.locked(folder, wait=False))
        except (BlockingIOError, FileNotFoundError) as error:  # not found: the other process has just ended
            raise UserError(f"another process is collecting {dataset_id}; wait for it, or stop it") from error
        try:
            _keep_what_is_of_use(folder, json.dumps(recipe).encode())
            yield folder
        finally:
            if not any(folder.glob(f"*{pieces.SUFFIX}")):
                shutil.rmtree(folder, ignore_errors=True)


def _keep_what_is_of_use(folder: Path, recipe: bytes) -> None:
    """Leave whole pieces of this recipe: no others, and nothing that a killed process had begun to write."""
    file = folder / "recipe.json"
    same = file.exists() and file.read_bytes() == recipe
    for path in folder.iterdir():
        if not same or path.suffix not in (pieces.SUFFIX, file.suffix):
            path.unlink()
    if not same:
        file.write_bytes(recipe)


@contextlib.contextmanager
def _interruption_told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = ("what was played is kept; type the same again to go on",)
        raise


def _episodes(works: list[Work], folder: Path, label: str, steps: int) -> Iterator[Recorded]:
    """The episodes of the dataset, in order; of each share, whole ones until its mark is reached."""
    kept, began, physics = 0, time.perf_counter(), np.zeros(2)
    with progress(steps, "step", label) as bar:
        for work, episodes in _play_all(works, folder, physics):
            for episode in episodes:
                if kept >= work.mark:  # the shard before overshot by part of an episode
                    break
                kept += len(episode.actions)
                bar.update(len(episode.actions))
                yield episode
    seconds, played = physics
    if played >= kept:  # none was played by an earlier call
        cores = len(os.sched_getaffinity(0))
        print(f"{kept / (time.perf_counter() - began):.0f} steps/s; the physics alone, on {cores} cores: "
              f"{cores * played / seconds:.0f}", file=sys.stderr)


def _play_all(works: list[Work], folder: Path, physics: np.ndarray) -> Iterator[tuple[Work, list[Recorded]]]:
    """Every shard's episodes, in order: from its piece, or played on all cores; what that takes adds to `physics`."""
    missing = _missing(works, folder)
    if len(missing) < len(works):
        print(f"going on: {len(works) - len(missing)} of {len(works)} pieces were played before", file=sys.stderr)
    workers = max(1, min(len(os.sched_getaffinity(0)), len(missing)))
    if workers == 1 and rounding.settled():
        def start_here(shard):
            return functools.partial(pieces.make, shard, folder)

        yield from _in_order(works, folder, missing, start_here, physics)
        return
    # spawned, not forked: threads of torch and mujoco in this process would not survive a fork
    context = multiprocessing.get_context("spawn")
    watched, ours = context.Pipe(duplex=False)
    with watched, ProcessPoolExecutor(workers, context, _begin_worker, (watched,)) as pool, ours:
        def start(shard):
            with _signals_held(), rounding.for_children():
                return pool.submit(pieces.make, shard, folder).result

        try:
            yield from _in_order(works, folder, missing, start, physics)
        except BrokenProcessPool as error:
            raise UserError("a process that played episodes was killed (is the memory full?); what it had played is "
                            "kept; type the same again to go on") from error


def _in_order(
    works: list[Work],
    folder: Path,
    missing: list[Shard],
    start: Callable[[Shard], Callable[[], np.ndarray]],
    physics: np.ndarray,
) -> Iterator[tuple[Work, list[Recorded]]]:
    """`start` begins to play a shard and returns what waits for its end."""
    waits = {shard.number: start(shard) for shard in missing}
    for work in works:
        if wait := waits.get(work.shard.number):
            physics += wait()
        episodes = pieces.read(work.shard, folder)
        if episodes is None:  # damaged since it was played
            start(work.shard)()
            episodes = pieces.read(work.shard, folder)
        if episodes is None:
            raise UserError(f"{folder} does not give back what has just been written there; {disk.CURE}")
        yield work, episodes


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait; a process that is started meanwhile never hears them: they are its parent's to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(watched: Connection) -> None:
    """A worker ends at once when the other end of the pipe closes: when nothing is to play any more, whatever the
    reason, or when its parent is killed."""
    def watch():
        watched.poll(None)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
