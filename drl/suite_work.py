"""The process of a suite that works: its parent sends what is to be trained or scored, and is told how it goes.

    parent: {"do": "train", "runs": [...]} or {"do": "score", "runs": [...]}
    here:   {"bar": text}* {"trained" | "scored" | "held" | "failed": folders, ...}* {"ready": true}

All seeds of what is to be trained go into one CUDA graph. A run that another process holds is told and left. Signals
are the parent's to answer: it asks by one that nobody else sends, and what trains is saved.
"""

import ctypes
import dataclasses
import functools
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from drl import checkpoint as checkpoints
from drl import evaluate as evaluation
from drl import lock, progress, signals
from drl.config import Config
from drl.data import minari_files
from drl.errors import UserError
from drl.faults import EvaluationFailed, told
from drl.intact import Damaged
from drl.resolve import resolve
from drl.suite_plan import Ask, Run
from drl.train import train_together
from drl.versions import versions

STOP = signal.SIGUSR2  # from the parent
PARENT_ENDS = 1  # PR_SET_PDEATHSIG
CORES = 5  # for each process that scores: in lockstep, more would mostly wait for one another

Tell = Callable[..., None]
read = functools.cache(minari_files.read)  # mapped: what is not drawn from takes no memory


def to_json(run: Run) -> dict[str, Any]:
    """A run, to be sent."""
    return {"variant": run.variant, "folder": str(run.folder), "config": run.config.to_dict(),
            "asks": [dataclasses.asdict(ask) for ask in run.asks]}


def from_json(sent: dict[str, Any]) -> Run:
    """The inverse of `to_json`."""
    asks = tuple(Ask(**ask) for ask in sent["asks"])
    return Run(sent["variant"], Path(sent["folder"]), Config.from_dict(sent["config"]), asks)


def train(runs: list[Run], tell: Tell) -> None:
    """Train what is not trained yet, side by side."""
    free = []
    for run in runs:
        try:
            with lock.held(run.folder):
                free.append(run)
        except lock.Held as error:
            tell(held=[str(run.folder)], line=str(error).partition(";")[0])
    if not free:
        return
    store = read(free[0].config.dataset)
    configs = [resolve(run.adopted(), store, len(free)) for run in free]
    if configs[0].train.compile == "on":
        torch.compiler.reset()  # compiled code is counted, and too much of it is refused
    start, begun = time.perf_counter(), [run.step() for run in free]
    train_together(configs, store, [run.folder for run in free], resume=True)
    seconds = time.perf_counter() - start
    tell(trained=[str(run.folder) for run in free], seconds=seconds, machine=machine(configs[0].device),
         updates=[run.config.train.updates - step for run, step in zip(free, begun, strict=True)])


def score(run: Run, tell: Tell) -> None:
    """Make the evaluations that are missing: by window on a GPU where there is one, which a recurrent step would not
    fill, else on the CPU."""
    try:
        with lock.held(run.folder):
            checkpoints.tidy(run.folder)
            config = run.adopted()
            for ask in run.asks:
                if not evaluation.is_stored(run.folder, ask.of(config), ask.step):
                    _score(run, config, ask, tell)
            results = [(ask, result) for ask in run.asks if ask.step == config.train.updates
                       for result in _results(run, ask.of(config), ask)]
    except lock.Held as error:
        tell(held=[str(run.folder)], line=str(error).partition(";")[0])
        return
    tell(scored=[str(run.folder)], scores=[
        [result["normalized_score"], result["return_mean"], str(ask), result["target_return"]]
        for ask, result in results])


def _score(run: Run, config: Config, ask: Ask, tell: Tell) -> None:
    try:
        checkpoint = _checkpoint(run.folder, ask.step)
    except Damaged as error:
        checkpoints.resume(run.folder)  # puts it aside
        raise UserError(f"{error}; it is put aside, type the same again to go on from an older one") from error
    device = "cuda" if ask.mode == "window" and torch.cuda.is_available() else "cpu"
    policy = evaluation.MODES[ask.mode](dataclasses.replace(checkpoint, config=ask.of(config)), device)
    start = time.perf_counter()
    try:
        results = evaluation.evaluate(policy, mode=ask.mode, step=ask.step, label=f"scoring {ask}")
    except EvaluationFailed as failure:
        evaluation.store_failure(failure, run.folder, ask.step, ask.mode)
        raise
    evaluation.store(results, run.folder)
    tell(played=str(run.folder), mode=ask.mode, episodes=sum(result["episodes"] for result in results),
         seconds=time.perf_counter() - start, machine=machine(device))


def _results(run: Run, asked: Config, ask: Ask) -> list[dict[str, Any]]:
    wanted = asked.evaluate
    return [result for result in evaluation.read(run.folder)
            if (result["step"], result["mode"], result["episodes"]) == (ask.step, ask.mode, ask.episodes)
            and result["seeds"][:1] == [ask.seed] and result["target_return"] in wanted.target_returns]


def _checkpoint(folder: Path, step: int) -> checkpoints.Checkpoint:
    return checkpoints.load(folder / "checkpoints" / f"step-{step:08d}")


def scoring_cores(training: int) -> list[list[int]]:
    """The cores of each process that scores beside so many that train, each of which keeps one to feed its GPU."""
    cores = sorted(os.sched_getaffinity(0))
    several = max(1, len(cores) // CORES)
    cores = cores[min(training, len(cores) // 2):]
    return [cores[index * len(cores) // several: (index + 1) * len(cores) // several] for index in range(several)]


def machine(device: str) -> dict[str, Any]:
    """What the time that something takes depends on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {"device": name, "cores": len(os.sched_getaffinity(0)), "versions": versions()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _serve(pipe: Connection) -> None:
    sending = threading.Lock()  # a bar may move in a thread of its own

    def tell(**message: Any) -> None:
        with sending:
            pipe.send_bytes(json.dumps(message).encode())

    progress.elsewhere(lambda text: tell(bar=text))
    while True:
        try:
            asked = json.loads(pipe.recv_bytes())
        except EOFError:  # there is no more to do
            return
        runs = [from_json(sent) for sent in asked["runs"]]
        try:
            if asked["do"] == "train":
                train(runs, tell)
            else:
                score(runs[0], tell)
        except UserError as error:
            tell(failed=[str(run.folder) for run in runs], line=str(error))
        except Exception as error:  # a GPU, say, answers nothing after some errors: the parent starts another process
            frame = traceback.extract_tb(error.__traceback__)[-1]
            line = f"{asked['do']} {told(error)} ({Path(frame.filename).name}, line {frame.lineno})"
            tell(failed=[str(run.folder) for run in runs], line=line)
            return
        tell(ready=True)


def _child(handle: str, parent: str, device: str, *cores: str) -> None:
    ctypes.CDLL(None).prctl(PARENT_ENDS, signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    os.set_inheritable(int(handle), False)
    if cores:
        os.sched_setaffinity(0, map(int, cores))
        torch.set_num_threads(len(cores))  # not as many as the machine has, which would wait for one another
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # which is what "cuda" means from here on
    try:
        with signals.raised(), Connection(int(handle)) as pipe:
            _serve(pipe)
    except KeyboardInterrupt:  # the parent asked for it, and knows
        pass


if __name__ == "__main__":
    signals.leave_to_parent(STOP)
    _child(*sys.argv[1:])
