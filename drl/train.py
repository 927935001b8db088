"""Training runs: update, log, look up, save, each in a folder that can be gone on from."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from drl import checkpoint as checkpoints
from drl import evaluate as evaluation
from drl.captured import is_cuda
from drl.checkpoint import Checkpoint
from drl.config import Config, TrainConfig, settled
from drl.data.sampling import Steps
from drl.data.store import EpisodeStore
from drl.descent import schedule
from drl.envs import check_fit
from drl.errors import UserError
from drl.parallel import Share
from drl.progress import progress
from drl.tracker import Tracker
from drl.trainer import Trainer, update

CONFIG_FILE = "config.yaml"
# At batch 64 on an H200 compiling takes 15 s and saves 0.33 ms of each update (docs/performance.md)
COMPILED_UPDATES = 45_000


def train(config: Config, store: EpisodeStore, run: Path, *, resume: bool = False) -> Path:
    """`train_together` of one seed: returns the folder of its last checkpoint."""
    return train_together([config], store, [run], resume=resume)[0]


def train_together(
    configs: Sequence[Config],
    store: EpisodeStore,
    folders: Sequence[Path],
    *,
    resume: bool = False,
    share: Share = Share(),
) -> list[Path]:
    """Train on `store`, each config into its folder as if it were alone. Returns the folders of the last checkpoints.

    Args:
        configs: as `resolve` returns them; they differ in nothing but the seed.
        resume: go on from the newest checkpoints; the numbers are those of runs never stopped. Runs that are behind
            the others go first.
        share: this process's part of each batch; only the first process writes and shows anything.

    Raises:
        UserError: a folder already holds a run (without resume), the config or the data changed (with it), a loss
            is not finite, several seeds or processes would share what they cannot.
    """
    device = configs[0].device
    if share.size > 1 and (len(configs) > 1 or configs[0].model.dropout):
        raise UserError("processes can share neither several seeds nor dropout; name one --seed, add --model.dropout 0")
    if len(configs) > 1 and configs[0].model.dropout and is_cuda(device):
        raise UserError("several seeds on one GPU cannot draw dropout as each alone would; add --model.dropout 0, or "
                        "train one --seed at a time")
    pasts = [checkpoints.load(folder) if resume and checkpoints.exists(folder) else None for folder in folders]
    for folder, config, past in zip(folders, configs, pasts, strict=True):
        _check_run(folder, config, store, past, resume)
    steps = Steps(store, device)
    with contextlib.ExitStack() as stack:
        runs = []
        for config, folder, past in zip(configs, folders, pasts, strict=True):
            trainer = Trainer(config, store, steps, share)
            if past is not None:
                trainer.load(past)
            tracker = None
            if share.first:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / CONFIG_FILE).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
                tracker = stack.enter_context(Tracker(folder, start=trainer.step))
            runs.append(_Run(trainer, folder, tracker))
        _loop(runs, configs[0].train, silent=not share.first)
    return [checkpoints.find(folder) for folder in folders]


@dataclass
class _Run:
    """A trainer and the folder that tells of it; without a tracker, another process tells."""

    trainer: Trainer
    folder: Path
    tracker: Tracker | None

    def look(self, loss: Tensor, grad_norm: Tensor) -> dict[str, float]:
        """Wait for the device and read: the loss, the norm, and the learning rate that made them.

        Raises:
            UserError: they are not finite, or were not in an update before.
        """
        self.trainer.require_finite()
        rate = schedule(self.trainer.step - 1, self.trainer.config.train)
        return {"train/loss": loss.item(), "train/grad_norm": grad_norm.item(), "train/learning_rate": rate}

    def log(self, values: dict[str, float]) -> None:
        if self.tracker:
            self.tracker.log(self.trainer.step, values)

    def evaluate(self) -> None:
        """Score the weights as they are; nothing that training reads is touched."""
        checkpoint, config, step = self.trainer.checkpoint(), self.trainer.config, self.trainer.step
        mode = evaluation.resolve_mode(config.evaluate.mode, config.model.attention)
        if self.tracker:
            with torch.random.fork_rng(devices=[]):
                policy = evaluation.MODES[mode](checkpoint, config.device)
                results = evaluation.evaluate(policy, mode=mode, step=step, label=f"evaluating update {step}")
            self.log(evaluation.tags(results))
            evaluation.store(results, self.folder)
        self.trainer.share.wait()

    def save(self) -> None:
        checkpoint = self.trainer.checkpoint()
        if self.tracker:
            self.tracker.flush()
            checkpoints.save(checkpoint, self.folder, checkpoint.config.train.keep_checkpoints)
        self.trainer.share.wait()


def _loop(runs: Sequence[_Run], settings: TrainConfig, silent: bool) -> None:
    since, cuda = min(run.trainer.step for run in runs), is_cuda(runs[0].trainer.config.device)
    mark = time.perf_counter()
    with progress(settings.updates, "update", "training", initial=since, silent=silent) as bar:
        if settings.compile == "on":
            bar.set_postfix_str("compiling, a minute or so")
        while (step := min(run.trainer.step for run in runs)) < settings.updates:
            behind = [run for run in runs if run.trainer.step == step]
            results = update([run.trainer for run in behind])
            step += 1
            bar.update()

            last = step == settings.updates
            log, save = step % settings.log_every == 0 or last, step % settings.checkpoint_every == 0 or last
            if log or save or not cuda:  # between these the host does not wait for a GPU
                values = [run.look(*result) for run, result in zip(behind, results, strict=True)]
            if log:
                speed = {"train/updates_per_second": (step - since) / (time.perf_counter() - mark)}
                for run, seen in zip(behind, values, strict=True):
                    run.log(seen | speed)
                bar.set_postfix(loss=f"{statistics.fmean(seen['train/loss'] for seen in values):.4f}", refresh=False)
                since, mark = step, time.perf_counter()
            pause = time.perf_counter()
            for run in behind:
                if settings.evaluate_every and (step % settings.evaluate_every == 0 or last):
                    run.evaluate()
                if save:
                    run.save()
            mark += time.perf_counter() - pause


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
    device = resolve_device(config.device)
    return dataclasses.replace(
        config,
        environment=environment,
        device=device,
        train=chosen(config.train, device),
        evaluate=dataclasses.replace(config.evaluate, target_returns=targets),
    )


def chosen(settings: TrainConfig, device: str) -> TrainConfig:
    """`settings` with what "auto" means on `device`."""
    precision, compile = settings.precision, settings.compile
    if precision == "auto":
        precision = "bfloat16" if is_cuda(device) or multiplies_bfloat16() else "float32"
    if compile == "auto":
        compile = "on" if is_cuda(device) and settings.updates >= COMPILED_UPDATES else "off"
    return dataclasses.replace(settings, precision=precision, compile=compile)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; where it has none, bfloat16 is slower than float32."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16"))


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
    before, now = _flat(settled(past.config).to_dict()), _flat(config.to_dict())
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(f"{run} was trained with another config ({', '.join(changed)}); repeat the options of the "
                        f"first command, or type: drl train --resume --run {run}")


def _flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    return {
        name: value
        for key, child in tree.items()
        for name, value in (
            _flat(child, f"{where}{key}.") if isinstance(child, dict) else {where + key: child}
        ).items()
    }
