"""From the gradients of one batch to new weights, in few launches and without a word from the host.

Weights, gradients and AdamW's averages are one long vector each, of which a model's tensors are views: a step is a few
passes over them that all of a GPU shares, and between processes one message. What a step's number alone decides, as
the learning rate, comes from a table on the device. Of several models that step side by side the vectors are rows.

A step whose error or gradient is not finite is not made, nor is any after it: the host, which looks seldom, finds the
weights, the averages and the count of steps as they were before.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from drl.captured import joined, stack, views
from drl.config import TrainConfig

BETAS, EPSILON = (0.9, 0.999), 1e-8
ALIGNED = 8  # bfloat16 numbers that a matrix unit wants to begin at a multiple of


class Descent:
    """AdamW with clipping and a schedule; it lays the parameters' memory out anew.

    Dimension key: P the numbers of all parameters, plus less than ALIGNED that stay 0.

    Attributes:
        order: the parameters' numbers in the order of the vectors: those that work in bfloat16 first.
        leaves: the working parameters in this order. Gradients are taken for these.
    """

    VECTORS = "_weights", "_mean", "_square", "_gradient", "_half", "_spare", "_done", "_going", "_seen"

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        working: Sequence[nn.Parameter],
        settings: TrainConfig,
        wrap: Callable[[Callable], Callable],
        combine: Callable[[Tensor], None],
    ):
        """`working`: what the model computes with; each is its parameter or a bfloat16 copy, which is kept up to date.

        `wrap` may compile a function, as drl.captured.compiled does; `combine` may add up a tensor over processes.
        """
        self.order = sorted(range(len(parameters)), key=lambda index: (
            working[index].dtype != torch.bfloat16, parameters[index].numel() % ALIGNED > 0
        ))
        self.leaves, self._masters = ([part[index] for index in self.order] for part in (working, parameters))
        halves = [leaf for leaf in self.leaves if leaf.dtype == torch.bfloat16]
        size = sum(leaf.numel() for leaf in halves)
        self._spare = torch.zeros(-size % ALIGNED, dtype=torch.bfloat16, device=self._masters[0].device)
        self._halves, self._start = len(halves), size + len(self._spare)
        self._kept = [*self._masters[: self._halves], self._spare, *self._masters[self._halves:]]
        self._weights = joined(self._kept)
        self._mean, self._square = torch.zeros_like(self._weights), torch.zeros_like(self._weights)
        self._gradient = self._weights.new_zeros(len(self._weights) + 2)
        self._half = self._weights.bfloat16() if halves else None
        self._lay_out()
        self._rates = rates(settings).to(self._weights)
        self._done = torch.zeros(1, dtype=torch.long, device=self._weights.device)
        self._going, self._seen = torch.ones_like(self._done, dtype=torch.bool), self._weights.new_zeros(2)
        self._max_norm, self._combine, self._descend = settings.max_grad_norm, combine, wrap(descend)

    @classmethod
    def side_by_side(cls, descents: Sequence[Self]) -> Self:
        """One that does the steps of several like ones, S of them, at once: its leaves, and the arguments and results
        of `step`, have a first dimension S, and its vectors are matrices. Theirs are rows of these from here on."""
        whole = copy.copy(descents[0])
        stack(whole, descents, cls.VECTORS)
        for one in descents:
            one._lay_out()
        working = whole._parts(whole._weights)
        if whole._halves:
            working[: whole._halves] = whole._parts(whole._half)[: whole._halves]
        whole.leaves = [part.detach().requires_grad_() for part in working]
        return whole

    def _lay_out(self) -> None:
        """Make the parameters views of the vectors."""
        gradients = self._parts(self._gradient[:-2])
        for master, weight, gradient in zip(self._masters, self._parts(self._weights), gradients, strict=True):
            master.data, master.grad = weight, gradient
        if self._half is not None:
            for leaf, weight in zip(self.leaves[: self._halves], self._parts(self._half)):
                leaf.data = weight

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], errors: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Descend along the mean error's gradient, at most train.updates times; see `descend` for numbers that are not
        finite.

        Args:
            gradients: of the sum of errors, one for each of `leaves`.
            errors, count: the sum and of how many, float32, ().

        Returns:
            The mean error and the norm of its gradient before clipping, float32, (); if one of them was not finite in
            this step or before, those of the first step in which that was so.
        """
        halves, others, lead = gradients[: self._halves], gradients[self._halves:], errors.shape
        if halves:
            self._gradient[..., : self._start] = joined([*halves, self._spare], lead=lead)
        rest = self._gradient[..., self._start:]
        if lead:  # torch.cat fills what is not dense one by one
            rest.copy_(joined([*others, errors, count], lead=lead))
        else:
            joined([*others, errors, count], out=rest)
        self._combine(self._gradient)
        return self._descend(
            self._gradient, self._weights, self._half, self._mean, self._square, self._rates, self._done, self._going,
            self._seen, self._max_norm
        )

    @property
    def done(self) -> int:
        """Steps made; waits for the device."""
        return self._done.item()

    @property
    def seen(self) -> tuple[float, float]:
        """What the last call of `step` returned; waits for the device."""
        return tuple(self._seen.tolist())

    def not_finite(self) -> list[int]:
        """The numbers of the parameters whose gradient is not finite, that of the last call of `step`."""
        parts = zip(self.order, self._parts(self._gradient[:-2]), strict=True)
        return sorted(index for index, part in parts if not part.isfinite().all())

    def state_dict(self) -> dict[str, Tensor]:
        """AdamW's averages by the number of the parameter, as "3.exp_avg"."""
        return {
            f"{index}.{name}": part
            for name, flat in (("exp_avg", self._mean), ("exp_avg_sq", self._square))
            for index, part in zip(self.order, self._parts(flat), strict=True)
        }

    def load_state_dict(self, state: dict[str, Tensor], done: int) -> None:
        """Go on after `done` steps, with parameters that were written already."""
        self._done.fill_(done)
        self._going.fill_(True)
        for name, part in self.state_dict().items():
            part.copy_(state[name])
        if self._half is not None:
            self._half.copy_(self._weights)

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """The views of a vector (P,) that stand for the parameters, in the order of `leaves`."""
        parts = views(flat, self._kept)
        return parts[: self._halves] + parts[self._halves + 1:]


def descend(
    gradient: Tensor,
    weights: Tensor,
    half: Tensor | None,
    mean: Tensor,
    square: Tensor,
    rates: Tensor,
    done: Tensor,
    going: Tensor,
    seen: Tensor,
    max_norm: float,
) -> tuple[Tensor, Tensor]:
    """One clipped step of AdamW, in place; the mean error and the norm of its gradient before clipping, (...).

    From the first step on where one of the two is not finite, they stay as they were in it, and nothing else changes.
    Any leading dimensions (...): each row steps on its own.

    Args:
        gradient: of the sum of errors, then that sum, then how many there are, (..., P + 2).
        weights, mean, square: as `adamw` takes them, (..., P).
        half: `weights` in bfloat16, written anew, (..., P); or None.
        rates: of each step, as the function of that name returns them.
        done: steps made, counted up, (..., 1).
        going: whether all steps were made, (..., 1) bool.
        seen: what the step before returned, (..., 2).
        max_norm: as torch.nn.utils.clip_grad_norm_ takes it, for the gradient of the mean.
    """
    gradient, errors, count = gradient[..., :-2], gradient[..., -2:-1], gradient[..., -1:]
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    result = torch.where(going, torch.cat([errors, norm], -1) / count, seen)
    seen.copy_(result)
    torch.all(result < math.inf, -1, keepdim=True, out=going)  # neither is negative, and NaN is below nothing
    divisor = torch.maximum(count, (norm + 1e-6 * count) / max_norm) / going
    gradient = (gradient / divisor).nan_to_num_(0, 0, 0)  # 0 all over where the divisor is infinite or NaN
    adamw(weights, gradient, mean, square, *rates[done.where(going, -1)].unbind(-1))
    if half is not None:
        half.copy_(weights)
    done.add_(going)
    return result[..., 0], result[..., 1]


def adamw(
    weights: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    decay: Tensor,
    size: Tensor,
    floor: Tensor,
    newer: Tensor,
    older: Tensor,
) -> None:
    """A step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) in place, over vectors (..., P).

    `mean` and `square` are the running averages of the gradient and of its square. The others, (..., 1), are one row of
    `rates`: decay, size and floor, which has the corrections of the averages' bias, the share of the new gradient in
    `mean` and that of the old ones in `square`.
    """
    mean.lerp_(gradient, newer)
    square.mul_(older).addcmul_(gradient, gradient, value=1 - BETAS[1])
    weights.addcmul_(weights, decay, value=-1).addcdiv_(mean * size, square.sqrt().add_(floor), value=-1)


def rates(settings: TrainConfig) -> Tensor:
    """What `adamw` takes at each step, and in a last row what changes nothing where the gradient is 0: decay, size,
    floor, newer and older, (updates + 1, 5) float64.

    With m' = m / (1 - b1^t) and v' = v / (1 - b2^t), rate m' / (sqrt(v') + eps) = size m / (sqrt(v) + floor).
    """
    rate = torch.tensor([schedule(done, settings) for done in range(settings.updates)], dtype=torch.float64)
    step = torch.arange(1, settings.updates + 1, dtype=torch.float64)
    first, second = (1 - beta**step for beta in BETAS)
    root = second.sqrt()
    newer, older = torch.full_like(rate, 1 - BETAS[0]), torch.full_like(rate, BETAS[1])
    table = torch.stack([rate * settings.weight_decay, rate * root / first, EPSILON * root, newer, older], dim=1)
    return torch.cat([table, table.new_tensor([[0, 0, 1, 0, 1]])])


def schedule(step: int, settings: TrainConfig) -> float:
    """Learning rate of the update after `step` updates: a linear warm-up, then a constant or a cosine that would be 0
    one update after the last."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_updates))
    if settings.decay == "none":
        return settings.learning_rate * warmup
    done = max(0, step - settings.warmup_updates) / max(1, settings.updates - settings.warmup_updates)
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * done))


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
