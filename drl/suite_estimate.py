"""How far each job of a suite is, and what the rest will take; nothing is written.

The rates are those of suite.json where this machine has some; else they are measured: updates on random data of the
right shapes, steps of an untrained policy, a second each.
"""

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from drl import checkpoint_files, disk, suite_times
from drl import evaluate as evaluation
from drl.behaviour import actor
from drl.benchmark_model import synthetic
from drl.captured import is_cuda
from drl.checkpoint import Checkpoint
from drl.config import Config
from drl.data import minari_files, minari_metadata
from drl.data.store import Spaces
from drl.envs import make_envs
from drl.errors import UserError
from drl.names import names
from drl.players import groups, players, side_by_side
from drl.progress import progress
from drl.resolve import chosen
from drl.rollout import one_thread, play
from drl.suite_plan import Ask, Job, Run
from drl.suite_work import machine, scoring_cores
from drl.trainer import Trainer, update

SECONDS = 1.0  # of each measurement
MANY = 100_000  # updates, more than are made in that time


class Left(NamedTuple):
    """What of a job is to do: updates of runs that are not trained, and episodes by how they are played."""

    updates: int
    episodes: dict[Ask, int]


def told(jobs: Sequence[Job], out: Path, devices: Sequence[str]) -> str:
    """How far each job is, and an estimate of time and disk space.

    Raises:
        UserError: suite.json is damaged.
    """
    width, task = (max(len(getattr(job, name)) for job in jobs) for name in ("variant", "task"))
    lines = [f"{job.variant:<{width}}  {job.task:<{task}}  {_states(job)}" for job in jobs]
    rows, spaces = suite_times.read(out), {job.task: _spaces(job.runs[0].config) for job in jobs}
    if is_cuda(devices[0]):
        torch.cuda.set_device(devices[0])
    scoring_on = {"cores": len(scoring_cores(len(devices))[0])} if is_cuda(devices[0]) else {}
    trainer, player = _Rates(rows, machine(devices[0])), _Rates(rows, machine("cpu") | scoring_on)
    training = scoring = space = 0.0
    updates = episodes = 0
    known = [job for job in jobs if spaces[job.task]]
    with progress(len(known), "job", "measuring") as bar:
        for job in known:
            config, left, seeds = job.runs[0].config, _left(job), len(job.runs)
            together = seeds if is_cuda(devices[0]) else 1
            measured = _Measured(config, spaces[job.task], together)
            updates += left.updates
            episodes += sum(left.episodes.values())
            if left.updates:
                training += left.updates * trainer.of(job, "training", "", measured.shape, measured.update)
                per_run = min(config.train.keep_checkpoints, -(-config.train.updates // config.train.checkpoint_every))
                space += per_run * measured.bytes() * sum(not one.is_trained() for one in job.runs)
            for ask, count in left.episodes.items():
                shape = (config.model, config.train.context, spaces[job.task].environment, ask.mode)
                scoring += count * player.of(job, "scoring", ask.mode, shape, lambda: measured.episode(ask))
            bar.update()
    steps = max((job.runs[0].config.model.max_timesteps for job in jobs), default=0)
    scored_by = player.told(f"measured now, as if an untrained policy's episodes took {steps} steps: at most")
    hours = max(training / len(set(devices)), scoring) if is_cuda(devices[0]) else training + scoring
    lines += ["", f"training    {updates} updates, {_about(training)}; {trainer.told('measured now, not compiled')}",
              f"scoring     {episodes} episodes, {_about(scoring)}; {scored_by}",
              f"together    {_about(hours)} on {' '.join(devices)}",
              f"disk        {space / 1e6:.0f} MB of checkpoints; {disk.space(out)}"]
    lines += [f"not counted {job.variant} {job.task}: its environment is not known here"
              for job in jobs if not spaces[job.task]]
    return "\n".join(lines)


class _Rates:
    """Seconds of an update or of an episode, and where they come from."""

    def __init__(self, rows: Iterable[dict[str, Any]], here: dict[str, Any]):
        alike = [row for row in rows if row["count"] and all(row[name] == here[name] for name in ("device", "cores"))]
        self._rows, self._measured, self._from = alike, {}, set()

    def of(self, job: Job, work: str, mode: str, shape: tuple, measure: Callable[[], float]) -> float:
        """From rows of this job, else of this variant; else `measure`, once for each shape."""
        rows = [row for row in self._rows if (row["variant"], row["work"], row["mode"]) == (job.variant, work, mode)]
        rows = [row for row in rows if row["task"] == job.task] or rows
        if rows:
            self._from.add("rates of suite.json")
            return sum(row["seconds"] for row in rows) / sum(row["count"] for row in rows)
        self._from.add("measured")
        key = repr(shape)  # lists are in it
        if key not in self._measured:
            self._measured[key] = measure()
        return self._measured[key]

    def told(self, measured: str) -> str:
        return " and ".join(sorted(self._from)).replace("measured", measured) or "nothing to do"


class _Measured:
    """A config on random data, as it would be trained here and played when it is not."""

    def __init__(self, config: Config, spaces: Spaces, seeds: int):
        updates = max(MANY, config.train.updates)
        train = dataclasses.replace(chosen(config.train, config.device), compile="off", updates=updates)
        targets = config.evaluate.target_returns[:1] or [0.0]
        self._config = dataclasses.replace(
            config, environment=config.environment or spaces.environment, train=train,
            evaluate=dataclasses.replace(config.evaluate, target_returns=targets))
        self._spaces, self._seeds = spaces, seeds
        self.shape = config.model, config.train, seeds

    def _trainers(self) -> list[Trainer]:
        store = synthetic(self._spaces)
        return [Trainer(dataclasses.replace(self._config, seed=seed), store) for seed in range(self._seeds)]

    def bytes(self) -> int:
        """Of a checkpoint."""
        return checkpoint_files.size(self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        return Trainer(self._config, synthetic(self._spaces)).checkpoint()

    def update(self) -> float:
        """Seconds of an update of one seed."""
        trainers = self._trainers()
        for _ in range(3 + trainers[0].sampler.groups if is_cuda(self._config.device) else 1):  # graphs are captured
            update(trainers)[0][0].item()
        begun, count = time.perf_counter(), 0
        while time.perf_counter() < begun + SECONDS:
            update(trainers)[0][0].item()
            count += 1
        return (time.perf_counter() - begun) / count / self._seeds

    def episode(self, ask: Ask) -> float:
        """Seconds of an episode as long as the model has timesteps: some steps of one player, times the players."""
        policy = evaluation.MODES[ask.mode](self._checkpoint(), "cpu")
        cores, environment = len(os.sched_getaffinity(0)), self._config.environment
        playing, target = side_by_side(policy, cores), self._config.evaluate.target_returns[0]
        group = groups(policy, ask.episodes, self._config.evaluate.environments, playing)[0]
        threads = -(-cores // playing)
        envs = make_envs(environment, len(group), threads)
        with contextlib.closing(envs), one_thread():
            steps, begun = 0, time.perf_counter()
            while time.perf_counter() < begun + SECONDS:
                rows, at = len(group), -1
                for ended in play(players(policy, group, target, threads), envs, group, ask.seed):
                    if ended is None or ended.length != at:  # several may end in one step
                        steps += rows
                    if ended:
                        rows, at = rows - 1, ended.length
                    if time.perf_counter() > begun + SECONDS:
                        break
            return (time.perf_counter() - begun) / steps / playing * self._config.model.max_timesteps


def _left(job: Job) -> Left:
    updates, episodes = 0, collections.Counter()
    for one in job.runs:
        updates += max(0, one.config.train.updates - one.step())
        with contextlib.suppress(UserError):
            for ask in one.missing() if one.is_trained() else one.asks:
                episodes[ask] += ask.episodes * max(1, len(one.config.evaluate.target_returns))
    return Left(updates, dict(episodes))


def _states(job: Job) -> str:
    states = collections.Counter(map(_state, job.runs))
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _state(one: Run) -> str:
    try:
        changes = one.changes()
        return f"trained with other settings ({', '.join(changes)})" if changes else one.state()
    except UserError as error:
        return f"damaged ({error})"


def _spaces(config: Config) -> Spaces | None:
    """Of its dataset, here or to be collected."""
    folder = minari_files.path(config.dataset)
    if not minari_metadata.flaw(folder):
        return minari_metadata.spaces(minari_metadata.read(folder), config.dataset)
    for name in names():
        if config.dataset == f"drl/{name}-v0":
            environment = name.partition("/")[0]
            observations, actions = actor.dimensions(environment)
            one = np.ones(actions, np.float32)
            return Spaces(actor.card(environment)["environment"], observations, -one, one)
    return None


def _about(seconds: float) -> str:
    minutes = seconds / 60
    return (f"about {seconds:.0f} s" if seconds < 100 else f"about {minutes:.0f} min" if minutes < 100 else
            f"about {minutes / 60:.1f} h")
