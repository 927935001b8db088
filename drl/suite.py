"""A suite runs: a process on each device that trains, others that score on all cores meanwhile; on a CPU one does both.

Whatever ends it, and whenever, the same command goes on: what is done is read off the runs' folders alone. What fails
is told, counted, and the rest goes on.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drl import disk, signals, suite_times
from drl.captured import is_cuda
from drl.errors import UserError
from drl.signals import Stopped
from drl.suite_plan import Job, Run
from drl.suite_screen import Screen, duration
from drl.suite_work import scoring_cores
from drl.suite_worker import Worker, wait

LOOK = 0.2  # seconds between two looks at signals


class Ended(NamedTuple):
    """How many runs are scored now, were so before, failed, and are another process's."""

    done: int
    skipped: int
    failed: int
    left: int


def run(jobs: Sequence[Job], out: Path, devices: Sequence[str], screen: Screen) -> Ended:
    """Train and score what is not trained and scored.

    Args:
        devices: cpu, or CUDA devices, cuda:0 and so on.

    Raises:
        UserError: a run was trained with other settings, or the folder cannot be written.
        Stopped: a signal came; what trained is saved.
    """
    require_unchanged(jobs)
    with disk.refusal_told(out, f"suite {out}", "name another folder with --out"):
        out.mkdir(parents=True, exist_ok=True)
    return _Suite(jobs, out, devices, screen).run()


def require_unchanged(jobs: Sequence[Job]) -> None:
    """Raises UserError where a run was trained with other settings than the suite says now."""
    changed = {}
    for one in (one for job in jobs for one in job.runs):
        with contextlib.suppress(UserError):  # damaged: told when its turn comes
            if changes := one.changes():
                changed[one.folder] = changes
    if changed:
        folder, changes = next(iter(changed.items()))
        others = f" and {len(changed) - 1} more were" if len(changed) > 1 else " was"
        raise UserError(f"{folder}{others} trained with other settings than the suite says ({', '.join(changes)}); "
                        "name another folder with --out, or move what is there away")


class _Suite:
    """What is to do, by whom, and what became of each run."""

    def __init__(self, jobs: Sequence[Job], out: Path, devices: Sequence[str], screen: Screen):
        self.out, self.screen, self.cuda = out, screen, is_cuda(devices[0])
        self.runs = [one for job in jobs for one in job.runs]
        self.of = {str(one.folder): one for one in self.runs}
        self.became: dict[str, str] = {}  # folder: done, skipped, failed or left
        self.trained: dict[str, str] = {}  # folder: what is told of its training
        self.todo: dict[str, list[list[Run]]] = {"train": [], "score": []}
        for job in jobs:
            self._plan(job)
        if self.cuda:
            self.workers = [*(Worker(device, device, ["train"]) for device in devices),
                            *(Worker("scoring", devices[index % len(devices)], ["score"], cores)
                              for index, cores in enumerate(scoring_cores(len(devices))))]
        else:  # side by side was not faster on two cores, in two pairs of runs
            self.workers = [Worker("cpu", "cpu", ["score", "train"])]

    def run(self) -> Ended:
        with contextlib.ExitStack() as stack:
            note = stack.enter_context(signals.deferred("a suite runs, whose training is saved first"))
            for worker in self.workers:
                stack.callback(worker.end)
            stack.callback(self.screen.close)
            while note.signal is None and self._give():
                self._listen()
            if note.signal is not None:
                for worker in self.workers:
                    if worker.lives:
                        worker.stop()
                while any(worker.lives for worker in self.workers):
                    self._listen(stopping=True)
                raise Stopped(note.signal, "what trained is saved; to go on, type the same again")
        return Ended(*(sum(became == name for became in self.became.values()) for name in Ended._fields))

    def _plan(self, job: Job) -> None:
        """What of a job is to do; seeds train side by side on a GPU where they ask for the same."""
        untrained = []
        for one in job.runs:
            try:
                if not one.is_trained():
                    untrained.append((one, dataclasses.replace(one.adopted(), seed=0)))
                elif one.missing():
                    self.todo["score"].append([one])
                else:
                    self.became[str(one.folder)] = "skipped"
            except UserError as error:
                self._failed([str(one.folder)], str(error))
        if self.cuda:
            groups = [list(group) for _, group in itertools.groupby(untrained, key=lambda pair: pair[1])]
        else:
            groups = [[pair] for pair in untrained]
        self.todo["train"] += [[one for one, _ in group] for group in groups]

    def _give(self) -> bool:
        """Have everyone do something; False: there is no more to do."""
        for worker in self.workers:
            for kind in worker.kinds:
                if not worker.doing and self.todo[kind]:
                    worker.give(kind, self.todo[kind].pop(0))
        return any(worker.doing for worker in self.workers)

    def _listen(self, stopping: bool = False) -> None:
        wait(self.workers, LOOK)
        for worker in self.workers:
            doing, runs = worker.doing, worker.runs
            for message in worker.messages():
                if "died" in message and not stopping:
                    over = self.became.keys() | (self.trained.keys() if doing == "train" else set())
                    self._failed([folder for one in runs if (folder := str(one.folder)) not in over],
                                 f"the process that was to {doing} it {message['died']}")
                else:
                    self._hear(message)
        failed = sum(became == "failed" for became in self.became.values())
        self.screen.draw(self.workers, len(self.became), len(self.runs), failed)

    def _hear(self, message: dict[str, Any]) -> None:
        if "said" in message:
            self.screen.warn(message["said"].removeprefix("drl: "))
        elif "failed" in message:
            self._failed(message["failed"], message["line"])
        elif "held" in message:
            self.became |= dict.fromkeys(message["held"], "left")
            self.screen.tell(f"{message['line']}; it is left to it")
        elif "trained" in message:
            self._is_trained(message)
        elif "played" in message:
            self._add(message["played"], "scoring", message["mode"], message, message["episodes"])
        elif "scored" in message:
            (folder,) = message["scored"]
            self.became[folder] = "done"
            self.screen.ended(self.of[folder], f"{self.trained.get(folder, 'trained before')}  "
                              f"{scores_told(message['scores'])}")

    def _is_trained(self, message: dict[str, Any]) -> None:
        folders, together = message["trained"], len(message["trained"])
        for folder, updates in zip(folders, message["updates"], strict=True):
            more = " more" if updates < self.of[folder].config.train.updates else ""
            beside = f", {together} seeds together" if together > 1 else ""
            self.trained[folder] = f"{updates}{more} updates in {duration(message['seconds'])}{beside}"
            self.todo["score"].append([self.of[folder]])
        self._add(folders[0], "training", "", message, sum(message["updates"]))

    def _failed(self, folders: list[str], line: str) -> None:
        for folder in folders:
            self.became[folder] = "failed"
            self.screen.warn(f"{folder} failed: {line}")

    def _add(self, folder: str, work: str, mode: str, message: dict[str, Any], count: int) -> None:
        one = self.of[folder]
        try:
            suite_times.add(self.out, variant=one.variant, task=one.task, work=work, mode=mode,
                            seconds=message["seconds"], count=count, **message["machine"])
        except UserError as error:  # the runs are worth more than the time they took
            self.screen.warn(str(error))


def scores_told(scores: list[list[Any]]) -> str:
    """[normalised score or None, mean return, how it acted, target return] of each evaluation, on one line."""
    targets = len({target for *_, target in scores})
    several = targets > len({how for *_, how, _ in scores})
    return ", ".join(
        (f"return {earned:.1f}" if score is None else f"score {score:.1f}")
        + f" ({how}{f', target {target:g}' if several else ''})"
        for score, earned, how, target in scores
    )
