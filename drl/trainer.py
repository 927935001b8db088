"""One update: sample, predict, descend, carry the state.

State passing: streams walk through episodes in chunks of K steps; the state that a chunk leaves behind is detached and
opens the next one, and starts anew with each episode. Gradients stay inside a chunk (truncated backpropagation through
time), the forward pass sees the whole past, as acting does. arXiv 2507.02782 shows why: a recurrent model fails from
states that its training never visited.
"""

import functools

import torch
from torch import Tensor

from drl.captured import Captured
from drl.checkpoint import Checkpoint
from drl.config import Config
from drl.data.sampling import Batch, Steps, make_sampler
from drl.data.store import EpisodeStore
from drl.model import DecisionTransformer, ModelState
from drl.versions import versions


class Trainer:
    """Model, optimizer, sampler and the states of the streams: everything that one update changes.

    Groups of streams take turns, and each keeps states of its own. On a CUDA device the update of a group is captured
    as a CUDA graph and replayed: everything that survives an update is therefore written in place.
    """

    def __init__(self, config: Config, store: EpisodeStore):
        self.config, self.store, self.step = config, store, 0
        device, settings = config.device, config.train
        spaces = store.spaces
        self.model = DecisionTransformer(config.model, spaces.observation_dim, spaces.action_dim).to(device)
        self.sampler = make_sampler(settings, Steps(store, device), config.seed)
        self.learning_rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
            capturable=is_cuda(device),
        )
        rows, groups = self.sampler.batch_size, self.sampler.groups
        self.states: list[ModelState] = [self.model.initial_state(rows) for _ in range(groups)]
        self._captured = Captured(device, [self.sampler.generator]) if is_cuda(device) else None

    def update(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """One gradient step. Returns the loss and the gradient's norm before clipping, still on the device; read them
        before the next update."""
        self.learning_rate.fill_(learning_rate)
        group = self.step % self.sampler.groups
        descend = functools.partial(self.descend, group)
        result = descend() if self._captured is None else self._captured(group, descend)
        self.step += 1
        return result

    def descend(self, group: int) -> tuple[Tensor, Tensor]:
        """Sample, predict, descend, carry the state: device work only, without a look at any value."""
        batch, past = self.sampler.next(group), self.states[group]
        loss, state = batch_loss(self.model, batch, past)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        self.optimizer.step()
        _keep(past, state)
        return loss.detach(), grad_norm

    def checkpoint(self) -> Checkpoint:
        """Everything, so that `load` goes on as if nothing had happened."""
        training = {f"sampler.{name}": value for name, value in self.sampler.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            training |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        for index, layers in enumerate(zip(*self.states, strict=True)):  # the groups of one layer, one after another
            if layers[0] is not None:
                kv, z = map(torch.cat, zip(*layers, strict=True))
                training |= {f"state.{index}.kv": kv, f"state.{index}.z": z}
        training["rng.cpu"] = torch.get_rng_state()
        if is_cuda(self.config.device):
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
        self.optimizer.param_groups[0]["lr"] = self.learning_rate  # loading put another tensor in its place
        states = _under("state.", saved)
        for index, layers in enumerate(zip(*self.states, strict=True)):
            if layers[0] is not None:
                kv, z = (states[f"{index}.{name}"].chunk(len(layers)) for name in ("kv", "z"))
                _keep(layers, zip(kv, z, strict=True))
        torch.set_rng_state(saved["rng.cpu"])
        if is_cuda(device) and "rng.cuda" in saved:
            torch.cuda.set_rng_state(saved["rng.cuda"], self.config.device)


def batch_loss(model: DecisionTransformer, batch: Batch, past: ModelState) -> tuple[Tensor, ModelState]:
    """The loss of one chunk that goes on from `past`, and the state that it leaves behind."""
    predicted, state = model(
        batch.returns_to_go, batch.observations, batch.actions, batch.timesteps, batch.mask, past, batch.restart
    )
    return action_loss(predicted, batch.actions, batch.mask), state


def action_loss(predicted: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over real steps only: padding is neither in the sum nor in the count.

    predicted, actions (B, L, A); mask (B, L) bool.
    """
    error_BL = (predicted - actions).square().mean(-1)
    return error_BL.where(mask, 0).sum() / mask.sum()


def is_cuda(device: str) -> bool:
    """Whether a device string names a CUDA device."""
    return torch.device(device).type == "cuda"


@torch.no_grad()
def _keep(kept: ModelState, state: ModelState) -> None:
    """Write `state` over `kept`, all of it in one launch on a CUDA device."""
    pairs = [pair for old, new in zip(kept, state, strict=True) if old is not None for pair in zip(old, new)]
    if pairs:
        torch._foreach_copy_(*zip(*pairs))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
