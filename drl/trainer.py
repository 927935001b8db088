"""One update: sample, predict, descend, carry the state.

State passing: streams walk through episodes in chunks of K steps; the state that a chunk leaves behind is detached and
opens the next one, and starts anew with each episode. Gradients stay inside a chunk (truncated backpropagation through
time), the forward pass sees the whole past, as acting does. arXiv 2507.02782 shows why: a recurrent model fails from
states that its training never visited.
"""

import torch
from torch import Tensor

from drl.checkpoint import Checkpoint
from drl.config import Config
from drl.data.sampling import make_sampler
from drl.data.store import EpisodeStore
from drl.model import DecisionTransformer, ModelState
from drl.versions import versions


class Trainer:
    """Model, optimizer, sampler and the states of the streams: everything that one update changes.

    On a CUDA device the update is captured once as a CUDA graph and replayed: the host reads nothing and launches
    one graph instead of some four hundred kernels. Everything that survives an update is therefore written in place.
    """

    def __init__(self, config: Config, store: EpisodeStore):
        self.config, self.store, self.step = config, store, 0
        device, settings = config.device, config.train
        spaces = store.spaces
        self.model = DecisionTransformer(config.model, spaces.observation_dim, spaces.action_dim).to(device)
        self.sampler = make_sampler(settings, store, config.seed, device)
        self.learning_rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
            capturable=is_cuda(device),
        )
        self.state: ModelState = self.model.initial_state(self.sampler.streams)
        self._captured = _Captured(self) if is_cuda(device) else None

    def update(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """One gradient step. Returns the loss and the gradient's norm before clipping, still on the device."""
        self.learning_rate.fill_(learning_rate)
        self.step += 1
        return self.descend() if self._captured is None else self._captured.replay()

    def descend(self) -> tuple[Tensor, Tensor]:
        """Sample, predict, descend, carry the state: device work only, without a look at any value."""
        batch = self.sampler.next()
        past = tuple(layer and layer.select(batch.streams).restart(batch.restart) for layer in self.state)
        predicted, state = self.model(
            batch.returns_to_go, batch.observations, batch.actions, batch.timesteps, batch.mask, past
        )
        loss = action_loss(predicted, batch.actions, batch.mask)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        self.optimizer.step()
        self._carry(state, batch.streams)
        return loss.detach(), grad_norm

    @torch.no_grad()
    def _carry(self, state: ModelState, streams: Tensor) -> None:
        for kept, layer in zip(self.state, state, strict=True):
            if kept is not None:
                kept.kv.index_copy_(0, streams, layer.kv)
                kept.z.index_copy_(0, streams, layer.z)

    def checkpoint(self) -> Checkpoint:
        """Everything, so that `load` goes on as if nothing had happened."""
        training = {f"sampler.{name}": value for name, value in self.sampler.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            training |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        for index, layer in enumerate(self.state):
            if layer is not None:
                training |= {f"state.{index}.kv": layer.kv, f"state.{index}.z": layer.z}
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
        for i, layer in enumerate(self.state):
            if layer is not None:
                layer.kv.copy_(states[f"{i}.kv"])
                layer.z.copy_(states[f"{i}.z"])
        torch.set_rng_state(saved["rng.cpu"])
        if is_cuda(device) and "rng.cuda" in saved:
            torch.cuda.set_rng_state(saved["rng.cuda"], self.config.device)


class _Captured:
    """Trainer.descend as a CUDA graph: a few updates run as they are, then the graph is captured and replayed."""

    WARMUP = 3  # lets the libraries allocate and choose before the capture, which allows neither

    def __init__(self, trainer: Trainer):
        self._trainer, self._done, self._graph = trainer, 0, None
        self._stream = torch.cuda.Stream(trainer.config.device)

    def replay(self) -> tuple[Tensor, Tensor]:
        if self._done < self.WARMUP:
            self._done += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._trainer.descend()
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            self._graph.register_generator_state(self._trainer.sampler.generator)
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._result = self._trainer.descend()
        self._graph.replay()
        return self._result


def action_loss(predicted: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over real steps only: padding is neither in the sum nor in the count.

    predicted, actions (B, L, A); mask (B, L) bool.
    """
    error_BL = (predicted - actions).square().mean(-1)
    return error_BL.where(mask, 0).sum() / mask.sum()


def is_cuda(device: str) -> bool:
    """Whether a device string names a CUDA device."""
    return torch.device(device).type == "cuda"


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
