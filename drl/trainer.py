"""One update: sample, predict, descend, carry the state.

State passing: streams walk through episodes in chunks of K steps; the state that a chunk leaves behind is detached and
opens the next one, and starts anew with each episode. Gradients stay inside a chunk (truncated backpropagation through
time), the forward pass sees the whole past, as acting does. arXiv 2507.02782 shows why: a recurrent model fails from
states that its training never visited.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from drl.captured import Captured, compiled, is_cuda, write
from drl.checkpoint import Checkpoint
from drl.config import Config
from drl.data.sampling import Batch, Steps, make_sampler
from drl.data.store import EpisodeStore
from drl.descent import Descent, under
from drl.errors import UserError
from drl.guidance import Guidance, Judge
from drl.gradient_step import GradientStep, SideBySide
from drl.losses import batch_errors, tensors_of
from drl.model import Model, ModelState, make
from drl.parallel import Share
from drl.versions import versions


class Trainer(GradientStep):
    """Model, optimizer, sampler and the states of the streams: everything that one update of a seed changes.

    Groups of streams take turns, and each keeps states of its own. On a CUDA device the update of a group is captured
    as a CUDA graph and replayed: everything that survives an update is therefore written in place.
    """

    def __init__(self, config: Config, store: EpisodeStore, steps: Steps | None = None, share: Share = Share()):
        """`config` as drl.train.resolve returns it; `steps`: those of `store`, if they are on the device already."""
        self.config, self.store, self.share, self.step = config, store, share, 0
        device, settings, spaces = config.device, config.train, store.spaces
        self._devices = [device] if is_cuda(device) else []
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(config.seed)
            self.model = make(config.model, spaces.observation_dim, spaces.action_dim).to(device)
            if (quantile := config.model.return_quantile) and config.model.attention != "none":
                caps = store.return_caps(quantile, config.model.max_timesteps)
                self.model.return_cap.copy_(torch.from_numpy(caps))
            wrap = self._wrap = compiled if settings.compile == "on" else lambda function: function
            self.guidance = Guidance(settings, store, device, wrap, share) if settings.value_weight else None
            self._random = self._generators()
        self.working = bfloat16_twin(self.model) if settings.precision == "bfloat16" else self.model
        self.rows = share.rows(settings.batch_size)
        steps = steps or Steps(store, device, settings.best_episodes)
        self.sampler = make_sampler(settings, steps, config.seed, self.rows)
        self.sampler.terminals = self.guidance is not None
        self.sampler.advance, self._errors = wrap(self.sampler.advance), wrap(batch_errors)
        masters, working = (list(model.parameters()) for model in (self.model, self.working))
        self.descent = Descent(masters, working, settings, wrap, share.sum)
        numbers = sum(part.numel() for part in tensors_of(self.fresh_state()))
        self.remember(torch.zeros(self.sampler.groups, numbers, device=device), self.fresh_state())
        self.captured, self.beside = Captured(device) if is_cuda(device) else None, None

    def update(self) -> tuple[Tensor, Tensor]:
        """`update` of this trainer alone."""
        return update([self])[0]

    def draw(self, group: int) -> tuple[Batch, Judge | None]:
        batch = self.sampler.next(group)
        return batch, self.guidance and self.guidance.judge(self.guidance.draw(self.sampler.generator))

    def errors(self, batch: Batch, past: ModelState, judge: Judge | None) -> tuple:
        return self._errors(self.working, batch, past, judge)

    def fresh_state(self) -> ModelState:
        """The past of all rows before the first step."""
        return self.model.initial_state(self.rows.stop - self.rows.start)

    def checkpoint(self) -> Checkpoint:
        """Everything, so that `load` goes on as if nothing had happened, by any number of processes.

        Where there are several, all must call this, and only the first gets the states of all rows.

        Raises:
            UserError: as `require_finite`.
        """
        self.require_finite()
        return Checkpoint(
            config=self.config,
            step=self.step,
            weights=self.model.state_dict(),
            normaliser=self.store.normaliser,
            spaces=self.store.spaces._replace(environment=self.config.environment),
            dataset_fingerprint=self.store.fingerprint,
            versions=versions(),
            training=self._training(self.share.gather),
            dataset_return=float(self.store.episode_returns.mean()),
        )

    def load(self, past: Checkpoint) -> None:
        """Go on from a checkpoint of the same config and data.

        Raises:
            UserError: a tensor is missing, unknown or not one that such a trainer would have saved.
        """
        saved, shares = past.training, self.share.size
        own = self._training(lambda part, dim: torch.cat([part.to("meta")] * shares, dim))  # of all processes
        try:
            _require_alike(past.weights, self.model.state_dict())
            _require_alike(saved, own)
            for name in self._random:
                torch.Generator(name.removeprefix("rng.")).set_state(saved[name])
            self.sampler.load_state_dict(under("sampler.", saved))
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the checkpoint of update {past.step} does not fit this run: {reason}; remove it to go on "
                            "from an older one, or name another folder with --run") from error
        self.step = past.step
        self.model.load_state_dict(past.weights)
        self.descent.load_state_dict(under("optimizer.", saved), past.step)
        if self.guidance:
            self.guidance.load_state_dict(under("guidance.", saved), past.step)
        states = under("state.", saved)
        for index, layers in enumerate(zip(*self.states, strict=True)):
            if layers[0] is not None:
                kv, z = (states[f"{index}.{name}"].chunk(len(layers)) for name in ("kv", "z"))
                write(tensors_of(layers), [part[self.rows] for part in tensors_of(zip(kv, z, strict=True))])
        self._random = {name: saved[name] for name in self._random}

    def require_finite(self) -> None:
        """Wait for the device, and look whether every update was made; after the first that was not, none is.

        Raises:
            UserError: one was not; names it, what was not finite first, and the cure.
        """
        seed, rate = self.config.seed, self.config.train.learning_rate
        descents = [self.descent, *([self.guidance.descent] if self.guidance else [])]
        done = min(descent.done for descent in descents)
        if done == self.step:
            return
        if where := self.sampler.steps.first_not_finite():
            raise UserError(f"at update {done + 1} with seed {seed} the data are not finite: dataset "
                            f"{self.store.dataset}, {where}; they changed since training began; --resume checks them "
                            "and goes on from the last checkpoint")
        loss, norm = self.descent.seen
        judged = descents[-1].seen[0]
        if math.isfinite(loss) and not math.isfinite(judged):
            raise UserError(f"at update {done + 1} the critic's loss is {judged} with seed {seed}; lower "
                            f"--train.discount (now {self.config.train.discount:g}) in another --run; the checkpoints "
                            "of this one are intact")
        of_now = math.isfinite(loss) and done + 1 == self.step  # the gradient of an earlier update is gone
        names = [name for name, _ in self.model.named_parameters()]
        first = [f" (first in {names[index]})" for index in self.descent.not_finite() if of_now][:1]
        raise UserError(f"at update {done + 1} the loss is {loss} and the gradient norm {norm}{''.join(first)} with "
                        f"seed {seed}; lower --train.learning_rate (now {rate:g}) in another --run; the checkpoints of "
                        "this one are intact")

    @contextlib.contextmanager
    def randomness(self) -> Iterator[None]:
        """Dropout draws from torch's own generators: within, they go on from where this trainer left them, and after it
        they are the caller's again."""
        if not self.config.model.dropout:
            yield
            return
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._random["rng.cpu"])
            for device in self._devices:
                torch.cuda.set_rng_state(self._random["rng.cuda"], device)
            yield
            self._random = self._generators()

    def _training(self, whole: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
        """What `load` needs beside the weights; `whole` joins what all processes have along a dimension."""
        training = self._random | {f"sampler.{name}": value for name, value in self.sampler.state_dict().items()}
        training |= {f"optimizer.{name}": value for name, value in self.descent.state_dict().items()}
        if self.guidance:
            training |= {f"guidance.{name}": value for name, value in self.guidance.state_dict().items()}
        for index, layers in enumerate(zip(*self.states, strict=True)):  # the groups of one layer, one after another
            if layers[0] is not None:
                kv, z = (whole(torch.stack(part), 1) for part in zip(*layers, strict=True))
                training |= {f"state.{index}.kv": kv.flatten(0, 1), f"state.{index}.z": z.flatten(0, 1)}
        return training

    def _generators(self) -> dict[str, Tensor]:
        cuda = {"rng.cuda": torch.cuda.get_rng_state(device) for device in self._devices}
        return {"rng.cpu": torch.get_rng_state()} | cuda


def update(trainers: Sequence[Trainer]) -> list[tuple[Tensor, Tensor]]:
    """One gradient step of each of `trainers`, which have done equally many and differ in nothing but the seed.

    Returns the loss and the gradient's norm before clipping of each, still on the device; read them before the next
    update. On a CUDA device several are one computation.
    """
    first = trainers[0]
    group = first.step % first.sampler.groups
    if first.captured is None:
        results = []
        for trainer in trainers:
            with trainer.randomness():
                results.append(trainer.descend(group))
    else:
        step = first if len(trainers) == 1 else _beside(trainers)
        generators, key = [trainer.sampler.generator for trainer in trainers], (group, len(trainers))
        with first.randomness():
            result = first.captured(key, lambda: step.descend(group), generators)
        results = [result] if step is first else list(zip(*result, strict=True))
        if first.config.model.dropout:
            for trainer in trainers:
                trainer._random = first._random
    for trainer in trainers:
        trainer.step += 1
    return results


def _beside(trainers: Sequence[Trainer]) -> SideBySide:
    """The one computation of these trainers, made anew where they are not yet, or no longer, rows of the same tensors.
    What graphs were captured of them before wrote to memory that they have left."""
    first, place = trainers[0], list(enumerate(trainers))
    if any(one.beside is None or one.beside != (first.beside[0], row, len(trainers)) for row, one in place):
        whole = SideBySide(trainers, first._wrap)
        for row, one in place:
            one.beside, one.captured = (whole, row, len(trainers)), Captured(one.config.device)
    return first.beside[0]


def bfloat16_twin(model: Model) -> Model:
    """The same module whose linear layers have bfloat16 weights of their own; all other weights are shared.

    So Descent can write them all at once, where autocast would cast one by one.
    """
    twin = copy.deepcopy(model)
    for module, own in zip(twin.modules(), model.modules(), strict=True):
        for name, weight in own.named_parameters(recurse=False):
            linear = isinstance(own, nn.Linear)
            setattr(module, name, nn.Parameter(weight.detach().bfloat16()) if linear else weight)
    return twin


def _require_alike(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless both have the same names, dtypes and shapes, and what is given is finite."""
    for name in sorted(given.keys() | expected.keys()):
        if name not in given or name not in expected:
            raise ValueError(f"{name} is {'missing' if name in expected else 'unknown'}")
        forms = [f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in (given[name], expected[name])]
        if forms[0] != forms[1]:
            raise ValueError("{} is {}, expected {}".format(name, *forms))
        if not given[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
