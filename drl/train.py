"""A training run: update, log, look up, save, in one folder that can be gone on from."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from drl import checkpoint as checkpoints
from drl import evaluate as evaluation
from drl.checkpoint import Checkpoint
from drl.config import Config
from drl.data.store import EpisodeStore
from drl.descent import schedule
from drl.envs import check_fit
from drl.errors import UserError
from drl.progress import progress
from drl.tracker import Tracker
from drl.trainer import Trainer, is_cuda

CONFIG_FILE = "config.yaml"
COMPILED_UPDATES = 20_000  # fewer take about as long as compiling does


def train(config: Config, store: EpisodeStore, run: Path, *, resume: bool = False) -> Path:
    """Train on `store` into the folder `run`. Returns the folder of the last checkpoint.

    Args:
        config: as `resolve` returns it.
        resume: go on from the newest checkpoint in `run`; the numbers are those of a run never stopped.

    Raises:
        UserError: `run` already holds a run (without resume), the config or the data changed (with it), or the
            loss is not finite.
    """
    past = checkpoints.load(run) if resume and checkpoints.exists(run) else None
    _check_run(run, config, store, past, resume)
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG_FILE).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    with _own_generators(config.device):
        torch.manual_seed(config.seed)
        trainer = Trainer(config, store)
        if past is not None:
            trainer.load(past)
        with Tracker(run, start=trainer.step) as tracker:
            return _loop(trainer, tracker, run)


def _loop(trainer: Trainer, tracker: Tracker, run: Path) -> Path:
    settings = trainer.config.train
    folder = None
    since, mark = trainer.step, time.perf_counter()
    with progress(settings.updates, "update", "training", initial=trainer.step) as bar:
        if settings.compile == "on":
            bar.set_postfix_str("compiling, a minute or so")
        while trainer.step < settings.updates:
            loss, grad_norm = trainer.update()
            step = trainer.step
            bar.update()

            last = step == settings.updates
            log, save = step % settings.log_every == 0 or last, step % settings.checkpoint_every == 0 or last
            if log or save:  # between these the host does not wait for the device
                values = {"train/loss": loss.item(), "train/grad_norm": grad_norm.item()}
                if not all(map(math.isfinite, values.values())):
                    raise UserError(f"at update {step} the loss is {values['train/loss']} and the gradient norm "
                                    f"{values['train/grad_norm']}; lower --train.learning_rate "
                                    f"(now {settings.learning_rate:g})")
            if log:
                speed = (step - since) / (time.perf_counter() - mark)
                tracker.log(step, values | {"train/learning_rate": schedule(step - 1, settings),
                                            "train/updates_per_second": speed})
                bar.set_postfix(loss=f"{values['train/loss']:.4f}", refresh=False)
                since, mark = step, time.perf_counter()
            if settings.evaluate_every and (step % settings.evaluate_every == 0 or last):
                results = _evaluate(trainer)
                tracker.log(step, evaluation.tags(results))
                evaluation.store(results, run)
                mark = time.perf_counter()
            if save:
                tracker.flush()
                folder = checkpoints.save(trainer.checkpoint(), run, settings.keep_checkpoints)
                mark = time.perf_counter()
    return folder or checkpoints.find(run)


def _evaluate(trainer: Trainer) -> list[dict[str, Any]]:
    """Score the weights as they are; nothing that training reads is touched."""
    config = trainer.config
    mode = evaluation.resolve_mode(config.evaluate.mode, config.model.attention)
    with torch.random.fork_rng(devices=[]):
        policy = evaluation.MODES[mode](trainer.checkpoint(), config.device)
        return evaluation.evaluate(policy, mode=mode, step=trainer.step, label=f"evaluating update {trainer.step}")


def resolve(config: Config, store: EpisodeStore) -> Config:
    """Fill in what the config leaves to the machine and the dataset: device, precision, whether to compile,
    environment, target returns.

    Raises:
        UserError: no environment is named anywhere, it is unknown or does not fit the data, or the device is not there.
    """
    environment = config.environment or store.spaces.environment
    if not environment:
        raise UserError(f"dataset {config.dataset} names no environment; add --environment, e.g. Hopper-v5")
    check_fit(environment, store.spaces, f"dataset {config.dataset}")
    targets = config.evaluate.target_returns or [float(store.episode_returns.max())]
    device, settings = resolve_device(config.device), config.train
    precision, compile = settings.precision, settings.compile
    if precision == "auto":
        precision = "bfloat16" if is_cuda(device) else "float32"
    if compile == "auto":
        compile = "on" if is_cuda(device) and settings.updates >= COMPILED_UPDATES else "off"
    return dataclasses.replace(
        config,
        environment=environment,
        device=device,
        train=dataclasses.replace(settings, precision=precision, compile=compile),
        evaluate=dataclasses.replace(config.evaluate, target_returns=targets),
    )


def resolve_device(device: str) -> str:
    """What "auto" means here.

    Raises:
        UserError: the device is unknown or not on this machine.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise UserError(f"device {device!r} is not available (only cpu and cuda are); use --device cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} is not available ({str(error).splitlines()[0][:120]}); use --device cpu"
                        ) from error
    return device


def _check_run(run: Path, config: Config, store: EpisodeStore, past: Checkpoint | None, resume: bool) -> None:
    if not resume and (run / "checkpoints").exists():
        raise UserError(f"{run} already holds a run; add --resume to go on with it, or name another folder with --run")
    if past is None:
        return
    if past.dataset_fingerprint != store.fingerprint:
        raise UserError(f"the data of {config.dataset} changed since {run} was trained; name another folder with --run")
    before, now = _flat(past.config.to_dict()), _flat(config.to_dict())
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(f"{run} was trained with another config ({', '.join(changed)}); repeat the options of the "
                        f"first command, or type: drl train --resume --run {run}")


def _own_generators(device: str):
    """Weights and dropout draw from torch's own generators: seed and use them without touching the caller's."""
    return torch.random.fork_rng(devices=[device] if is_cuda(device) else [])


def _flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    return {
        name: value
        for key, child in tree.items()
        for name, value in (
            _flat(child, f"{where}{key}.") if isinstance(child, dict) else {where + key: child}
        ).items()
    }
