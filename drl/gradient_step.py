"""Sample, predict, descend, carry the state: of one seed, or of several whose numbers are rows of the same tensors.

A GPU that trains one small model waits for the next kernel most of the time. Several seeds are therefore one
computation: weights, batches and states have a first dimension S, and what is written for one seed is mapped over it
(torch.vmap), so that every kernel works for all of them.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from drl.attention import SoftmaxAttention
from drl.captured import joined, tensor_float32, views
from drl.data.sampling import Batch, StreamSampler, WindowSampler
from drl.descent import Descent
from drl.guidance import Guidance, Judge
from drl.losses import batch_errors, state_of, tensors_of
from drl.model import Model, ModelState


class GradientStep(ABC):
    """Everything that one update changes.

    Attributes:
        sampler: of the batches.
        descent: of the model.
        guidance: the critics; None where nothing guides.
        memory: the states of all groups of streams, N numbers each, (groups, N), of several seeds (groups, S, N).
        states: views of it, a ModelState for each group.
    """

    sampler: StreamSampler | WindowSampler
    descent: Descent
    guidance: Guidance | None
    memory: Tensor
    states: list[ModelState]

    @abstractmethod
    def draw(self, group: int) -> tuple[Batch, Judge | None]:
        """The next batch of a group, and with critics what judges it."""

    @abstractmethod
    def errors(self, batch: Batch, past: ModelState, judge: Judge | None) -> tuple:
        """What drl.losses.batch_errors gives for the model."""

    def remember(self, memory: Tensor, fresh: ModelState) -> None:
        """Keep the states there from now on; `fresh` is one of a single seed, for its shapes."""
        self.memory, self.states = memory, [state_of(fresh, views(part, tensors_of(fresh))) for part in memory]

    def descend(self, group: int) -> tuple[Tensor, Tensor]:
        """One update: device work only, without a look at any value. Returns what Descent.step does."""
        with tensor_float32(self.descent.leaves[0].dtype == torch.bfloat16):  # these come first
            return self._descend(group)

    def _descend(self, group: int) -> tuple[Tensor, Tensor]:
        leaves, guidance = self.descent.leaves, self.guidance
        batch, judge = self.draw(group)
        errors, count, after, *judged = self.errors(batch, self.states[group], judge)
        total = judged.pop(0) if guidance else errors
        judging = guidance.leaves if guidance else []
        gradients = torch.autograd.grad(total, [*leaves, *judging], torch.ones_like(total))
        result = self.descent.step(gradients[: len(leaves)], errors.detach(), count)
        if guidance:
            guidance.step(gradients[len(leaves):], *judged)
        if after:
            joined(after, out=self.memory[group], lead=errors.shape)
        return result


class SideBySide(GradientStep):
    """The next updates of several trainers (trainer.py) that differ in nothing but the seed.

    What they hold are rows of its tensors from here on, so that each can be saved, loaded and gone on with alone. Sums
    of products may be taken in another order than alone; dropout draws once for all.
    """

    def __init__(self, trainers: Sequence[GradientStep], wrap: Callable = lambda function: function):
        """`wrap` may compile a function."""
        first = trainers[0]
        self._samplers, self._guidances = [one.sampler for one in trainers], [one.guidance for one in trainers]
        self.descent = Descent.side_by_side([one.descent for one in trainers])
        self.guidance = first.guidance and Guidance.side_by_side([one.guidance for one in trainers])
        self.sampler = first.sampler.side_by_side([one.sampler for one in trainers])
        fresh, memory = first.fresh_state(), torch.stack([one.memory for one in trainers], dim=1)
        self.remember(memory, fresh)
        for one, own in zip(trainers, memory.unbind(1), strict=True):
            one.remember(own, fresh)
        self._model, self._errors = _Errors(copy.deepcopy(first.working)), wrap(self._of_all)
        for part in self._model.modules():
            if isinstance(part, SoftmaxAttention):
                part.fused = False
        names = [name for name, _ in self._model.named_parameters()]
        self._names = [names[index] for index in self.descent.order]

    def draw(self, group: int) -> tuple[Batch, Judge | None]:
        fresh = torch.stack([sampler.draw() for sampler in self._samplers])
        batch = self.sampler.advance(fresh, *self.sampler.streams(group))
        if not self.guidance:
            return batch, None
        pairs = zip(self._guidances, self._samplers, strict=True)
        return batch, self.guidance.judge(torch.stack([one.draw(sampler.generator) for one, sampler in pairs]))

    def errors(self, batch: Batch, past: ModelState, judge: Judge | None) -> tuple:
        return self._errors(dict(zip(self._names, self.descent.leaves, strict=True)), batch, past, judge)

    def _of_all(self, *parts) -> tuple:
        rows = tree_map(lambda part: 0 if isinstance(part, Tensor) else None, parts)
        return torch.vmap(self._of_one, rows, randomness="different")(*parts)

    def _of_one(self, weights: dict[str, Tensor], *rest) -> tuple:
        return torch.func.functional_call(self._model, weights, rest)


class _Errors(nn.Module):
    """`batch_errors` of a model, as a module whose weights can be others for a call."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, past: ModelState, judge: Judge | None) -> tuple:
        return batch_errors(self.model, batch, past, judge)
