"""The loop: sample, predict, descend; log, look up, save.

State passing (arXiv 2507.02782): B streams walk through episodes in chunks of K steps; the state that a chunk
leaves behind is detached and opens the next one, and starts anew with each episode. Gradients stay inside a chunk
(truncated backpropagation through time), the forward pass sees the whole past, as acting does.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from drl import checkpoint as checkpoints
from drl import evaluate as evaluation
from drl.checkpoint import Checkpoint
from drl.config import Config, TrainConfig
from drl.data.sampling import make_sampler
from drl.data.store import EpisodeStore
from drl.envs import check_fit
from drl.errors import UserError
from drl.kernels import LinearAttentionState
from drl.model import DecisionTransformer, ModelState
from drl.progress import progress
from drl.tracker import Tracker
from drl.versions import versions

CONFIG_FILE = "config.yaml"


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


def _loop(trainer: "Trainer", tracker: Tracker, run: Path) -> Path:
    settings = trainer.config.train
    folder = None
    since, mark = trainer.step, time.perf_counter()
    with progress(settings.updates, "update", "training", initial=trainer.step) as bar:
        while trainer.step < settings.updates:
            learning_rate = schedule(trainer.step, settings)
            loss, grad_norm = trainer.update(learning_rate)
            step = trainer.step
            bar.update()

            last = step == settings.updates
            if step % settings.log_every == 0 or last:
                values = {"train/loss": loss.item(), "train/grad_norm": grad_norm.item()}
                if not all(map(math.isfinite, values.values())):
                    raise UserError(f"at update {step} the loss is {values['train/loss']} and the gradient norm "
                                    f"{values['train/grad_norm']}; lower --train.learning_rate "
                                    f"(now {settings.learning_rate:g})")
                speed = (step - since) / (time.perf_counter() - mark)
                tracker.log(step, values | {"train/learning_rate": learning_rate, "train/updates_per_second": speed})
                bar.set_postfix(loss=f"{values['train/loss']:.4f}", refresh=False)
                since, mark = step, time.perf_counter()
            if settings.evaluate_every and (step % settings.evaluate_every == 0 or last):
                results = trainer.evaluate()
                tracker.log(step, evaluation.tags(results))
                evaluation.store(results, run)
                mark = time.perf_counter()
            if step % settings.checkpoint_every == 0 or last:
                tracker.flush()
                folder = checkpoints.save(trainer.checkpoint(), run, settings.keep_checkpoints)
                mark = time.perf_counter()
    return folder or checkpoints.find(run)


class Trainer:
    """Model, optimizer, sampler and the states of the streams: everything that one update changes."""

    def __init__(self, config: Config, store: EpisodeStore):
        self.config, self.store, self.step = config, store, 0
        device, settings = config.device, config.train
        spaces = store.spaces
        self.model = DecisionTransformer(config.model, spaces.observation_dim, spaces.action_dim).to(device)
        self.sampler = make_sampler(
            settings.sampling, store, settings.batch_size, settings.context, config.seed, device
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.state: ModelState = self.model.initial_state(settings.batch_size)

    def update(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """One gradient step. Returns the loss and the gradient's norm before clipping, still on the device."""
        batch = self.sampler.next()
        past = tuple(layer and layer.restart(batch.restart) for layer in self.state)
        predicted, state = self.model(
            batch.returns_to_go, batch.observations, batch.actions, batch.timesteps, batch.mask, past
        )
        loss = action_loss(predicted, batch.actions, batch.mask)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.state = tuple(layer and layer.detach() for layer in state)
        self.step += 1
        return loss.detach(), grad_norm

    def evaluate(self) -> list[dict[str, Any]]:
        """Evaluate the weights as they are; nothing that training reads is touched."""
        mode = evaluation.resolve_mode(self.config.evaluate.mode, self.config.model.attention)
        with _own_generators(self.config.device):
            policy = evaluation.MODES[mode](self.checkpoint(), self.config.device)
            return evaluation.evaluate(policy, mode=mode, step=self.step, label=f"evaluating update {self.step}")

    def checkpoint(self) -> Checkpoint:
        """Everything, so that `load` goes on as if nothing had happened."""
        training = {f"sampler.{name}": value for name, value in self.sampler.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            training |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        for index, layer in enumerate(self.state):
            if layer is not None:
                training |= {f"state.{index}.kv": layer.kv, f"state.{index}.z": layer.z}
        training["rng.cpu"] = torch.get_rng_state()
        if _is_cuda(self.config.device):
            training["rng.cuda"] = torch.cuda.get_rng_state(self.config.device)
        return Checkpoint(
            config=self.config,
            step=self.step,
            weights=self.model.state_dict(),
            normaliser=self.store.normaliser,
            spaces=self.store.spaces._replace(environment=self.config.environment),
            dataset_fingerprint=self.store.fingerprint,
            versions=versions(),
            training=training,
            dataset_return=float(self.store.episode_returns.mean()),
        )

    def load(self, past: Checkpoint) -> None:
        """Go on from a checkpoint of the same config and data."""
        device, saved = self.config.device, past.training
        self.step = past.step
        self.model.load_state_dict(past.weights)
        self.sampler.load_state_dict(_under("sampler.", saved))
        optimizer = self.optimizer.state_dict()
        for name, value in _under("optimizer.", saved).items():
            index, _, part = name.partition(".")
            optimizer["state"].setdefault(int(index), {})[part] = value.to(device)
        self.optimizer.load_state_dict(optimizer)
        states = _under("state.", saved)
        self.state = tuple(
            LinearAttentionState(states[f"{i}.kv"].to(device), states[f"{i}.z"].to(device)) if states else None
            for i in range(self.config.model.layers)
        )
        torch.set_rng_state(saved["rng.cpu"])
        if _is_cuda(device) and "rng.cuda" in saved:
            torch.cuda.set_rng_state(saved["rng.cuda"], self.config.device)


def action_loss(predicted: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over real steps only: padding is neither in the sum nor in the count.

    predicted, actions (B, L, A); mask (B, L) bool.
    """
    error_BL = (predicted - actions).square().mean(-1)
    return error_BL.where(mask, 0).sum() / mask.sum()


def schedule(step: int, settings: TrainConfig) -> float:
    """Learning rate of the update after `step` updates: a linear warm-up, then a cosine to 0 or a constant."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_updates))
    if settings.decay == "none":
        return settings.learning_rate * warmup
    done = max(0, step - settings.warmup_updates) / max(1, settings.updates - settings.warmup_updates)
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * done))


def resolve(config: Config, store: EpisodeStore) -> Config:
    """Fill in what the config leaves to the machine and the dataset: device, environment, target returns.

    Raises:
        UserError: no environment is named anywhere, it is unknown or does not fit the data, or the device is not there.
    """
    environment = config.environment or store.spaces.environment
    if not environment:
        raise UserError(f"dataset {config.dataset} names no environment; add --environment, e.g. Hopper-v5")
    check_fit(environment, store.spaces, f"dataset {config.dataset}")
    targets = config.evaluate.target_returns or [float(store.episode_returns.max())]
    return dataclasses.replace(
        config,
        environment=environment,
        device=resolve_device(config.device),
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
    return torch.random.fork_rng(devices=[device] if _is_cuda(device) else [])


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    return {
        name: value
        for key, child in tree.items()
        for name, value in (
            _flat(child, f"{where}{key}.") if isinstance(child, dict) else {where + key: child}
        ).items()
    }


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
