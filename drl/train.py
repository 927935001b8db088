"""Training runs: update, log, look up, save, each in a folder that can be gone on from."""

import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from drl import checkpoint as checkpoints
from drl import disk, lock, signals
from drl import evaluate as evaluation
from drl.captured import is_cuda
from drl.checkpoint import Checkpoint
from drl.config import Config, TrainConfig
from drl.config_files import differences, write_config
from drl.data.sampling import Steps
from drl.data.store import EpisodeStore
from drl.descent import schedule
from drl.errors import UserError
from drl.faults import EvaluationFailed
from drl.parallel import Share
from drl.progress import progress
from drl.signals import Note, Stopped
from drl.tracker import Tracker
from drl.trainer import Trainer, update

CONFIG_FILE = "config.yaml"


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
    """Train on `store`, each config into its folder as if it were alone, on a GPU but for the order
    of sums and for dropout, which is drawn for all at once. Returns the folders of the last checkpoints.

    Args:
        configs: as `resolve` returns them; they differ in nothing but the seed.
        resume: go on from the newest checkpoints; the numbers are those of runs never stopped. Runs that are behind
            the others go first.
        share: this process's part of each batch; only the first process writes and shows anything.

    Raises:
        UserError: a folder already holds a run (without resume), the config or the data changed (with it), another
            process trains in a folder, a loss is not finite, several seeds or processes would share what they cannot,
            the disk refuses a checkpoint.
        Stopped: a signal came; the update that it met is done and saved.
    """
    if share.size > 1 and (len(configs) > 1 or configs[0].model.dropout):
        raise UserError("processes can share neither several seeds nor dropout; name one --seed, add --model.dropout 0")
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.raised())
        if share.first:
            for folder in sorted(folders):
                stack.enter_context(lock.held(folder))
                checkpoints.tidy(folder)
        pasts = [checkpoints.resume(folder, share.first) if resume else None for folder in folders]
        for folder, config, past in zip(folders, configs, pasts, strict=True):
            _check_run(folder, config, store, past, resume)
        steps, runs = Steps(store, configs[0].device, configs[0].train.best_episodes), []
        for config, folder, past in zip(configs, folders, pasts, strict=True):
            trainer = Trainer(config, store, steps, share)
            if past is not None:
                trainer.load(past)
            tracker = None
            if share.first:
                with disk.refusal_told(folder, f"run {folder}", "make room, or name another folder with --run"):
                    write_config(folder / CONFIG_FILE, config)
                tracker = stack.enter_context(Tracker(folder, start=trainer.step))
            runs.append(_Run(trainer, folder, tracker))
        _loop(runs, configs[0].train, share)
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
        guidance = self.trainer.guidance.look() if self.trainer.guidance else {}
        return {"train/loss": loss.item(), "train/grad_norm": grad_norm.item(), "train/learning_rate": rate} | guidance

    def log(self, values: dict[str, float]) -> None:
        if self.tracker:
            self.tracker.log(self.trainer.step, values)

    def owes_evaluation(self) -> bool:
        """Whether it was stopped after an update that is to be evaluated, and before the scores were kept."""
        due = self.trainer.step and _evaluates(self.trainer.step, self.trainer.config.train)
        return self.trainer.share.any(bool(due and self.tracker and not self._is_evaluated()))

    def _is_evaluated(self) -> bool:
        config, step = self.trainer.config, self.trainer.step
        logged = any(tag.startswith("eval/") for tag in self.tracker.at_start)
        return logged and evaluation.is_stored(self.folder, config, step)

    def evaluate(self, note: Note) -> None:
        """Score the weights as they are, unless a signal comes; nothing that training reads is touched."""
        checkpoint, config, step = self.trainer.checkpoint(), self.trainer.config, self.trainer.step
        mode = evaluation.resolve_mode(config.evaluate.mode, config.model.attention)
        if self.tracker and note.signal is None:
            try:
                with signals.raised(), torch.random.fork_rng(devices=[]):
                    policy = evaluation.MODES[mode](checkpoint, config.device)
                    results = evaluation.evaluate(policy, mode=mode, step=step, label=f"evaluating update {step}")
            except Stopped as stopped:  # the run owes it from here on
                note.signal = stopped.signal
            except EvaluationFailed as failure:
                _training_goes_on(step, failure)
                with _kept_or_told(step):
                    evaluation.store_failure(failure, self.folder, step, mode)
            else:
                with _kept_or_told(step):
                    evaluation.store(results, self.folder)  # before the tags, which say that it is done
                    self.log(evaluation.tags(results))
        self.trainer.share.wait()

    def save(self) -> None:
        checkpoint = self.trainer.checkpoint()
        if self.tracker:
            self.tracker.flush()
            checkpoints.save(checkpoint, self.folder, checkpoint.config.train.keep_checkpoints)
        self.trainer.share.wait()


@contextlib.contextmanager
def _kept_or_told(step: int) -> Iterator[None]:
    try:
        yield
    except UserError as refused:
        _training_goes_on(step, refused)


def _training_goes_on(step: int, error: UserError) -> None:
    print(f"drl: evaluation after update {step}: {error}; training goes on", file=sys.stderr)


def _evaluates(step: int, settings: TrainConfig) -> bool:
    """Whether the weights are scored after `step` updates."""
    return settings.evaluate_every > 0 and (step % settings.evaluate_every == 0 or step == settings.updates)


def _loop(runs: Sequence[_Run], settings: TrainConfig, share: Share) -> None:
    since, cuda = min(run.trainer.step for run in runs), is_cuda(runs[0].trainer.config.device)
    mark = time.perf_counter()
    with contextlib.ExitStack() as stack:
        note = Note()
        for run in runs:
            if run.owes_evaluation():
                run.evaluate(note)
                _stop_if(share.any(note.signal is not None), note, runs[0])
        bar = stack.enter_context(progress(settings.updates, "update", "training", since, silent=not share.first))
        if settings.compile == "on":
            bar.set_postfix_str("compiling, a minute or so")
        begun = False
        while (step := min(run.trainer.step for run in runs)) < settings.updates:
            behind = [run for run in runs if run.trainer.step == step]
            results = update([run.trainer for run in behind])
            step += 1
            bar.update()
            if not begun:  # the first update may compile for a minute; until it is done there is nothing to save
                note, begun = stack.enter_context(signals.deferred("training, which is saved first")), True

            last = step == settings.updates
            log, save = step % settings.log_every == 0 or last, step % settings.checkpoint_every == 0 or last
            # the host does not wait for a GPU between log points; processes on several GPUs agree to stop only there
            stop = note.signal is not None
            if share.size > 1:
                stop = (log or not cuda) and share.any(stop)
            if log or save or stop or not cuda:
                values = [run.look(*result) for run, result in zip(behind, results, strict=True)]
            if log:
                speed = {"train/updates_per_second": (step - since) / (time.perf_counter() - mark)}
                for run, seen in zip(behind, values, strict=True):
                    run.log(seen | speed)
                bar.set_postfix(loss=f"{statistics.fmean(seen['train/loss'] for seen in values):.4f}", refresh=False)
                since, mark = step, time.perf_counter()
            pause = time.perf_counter()
            if _evaluates(step, settings) and not stop:
                for run in behind:
                    run.evaluate(note)
                stop = share.any(note.signal is not None)
            if save or stop:
                for run in behind:
                    run.save()
            _stop_if(stop or last and share.any(note.signal is not None), note, behind[0])
            mark += time.perf_counter() - pause


def _stop_if(stop: bool, note: Note, run: _Run) -> None:
    if stop:
        raise Stopped(note.signal or signal.SIGTERM, f"{run.folder} is saved at update {run.trainer.step}; to go on, "
                      "add --resume to the same command")


def _check_run(run: Path, config: Config, store: EpisodeStore, past: Checkpoint | None, resume: bool) -> None:
    if not resume and (run / "checkpoints").exists():
        raise UserError(f"{run} already holds a run; add --resume to go on with it, or name another folder with --run")
    if past is None:
        return
    if past.dataset_fingerprint != store.fingerprint:
        raise UserError(f"the data of {config.dataset} changed since {run} was trained; name another folder with --run")
    if changed := differences(past.config, config):
        raise UserError(f"{run} was trained with another config ({', '.join(changed)}); repeat the options of the "
                        f"first command, or type: drl train --resume --run {run}")
