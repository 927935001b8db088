"""From the gradients of one batch to new weights, in few launches and without a word from the host.

Weights, gradients and AdamW's averages are one long vector each, of which a model's tensors are views: a step is a few
passes over them that all of a GPU shares, and between processes one message. What a step's number alone decides, as
the learning rate, comes from a table on the device.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from drl.captured import joined, views
from drl.config import TrainConfig

BETAS, EPSILON = (0.9, 0.999), 1e-8
ALIGNED = 8  # bfloat16 numbers that a matrix unit wants to begin at a multiple of


class Descent:
    """AdamW with clipping and a schedule; it lays the parameters' memory out anew.

    Dimension key: P the numbers of all parameters, plus less than ALIGNED that stay 0.

    Attributes:
        leaves: the working parameters in the order of the vectors: bfloat16 first. Gradients are taken for these.
    """

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
        self._order = sorted(range(len(parameters)), key=lambda index: (
            working[index].dtype != torch.bfloat16, parameters[index].numel() % ALIGNED > 0
        ))
        self.leaves, masters = ([part[index] for index in self._order] for part in (working, parameters))
        halves = [leaf for leaf in self.leaves if leaf.dtype == torch.bfloat16]
        size = sum(leaf.numel() for leaf in halves)
        self._spare = torch.zeros(-size % ALIGNED, dtype=torch.bfloat16, device=masters[0].device)
        self._halves, self._start = len(halves), size + len(self._spare)
        self._kept = [*masters[: self._halves], self._spare, *masters[self._halves:]]
        self._weights = joined(self._kept)
        self._mean, self._square = torch.zeros_like(self._weights), torch.zeros_like(self._weights)
        self._gradient = self._weights.new_zeros(len(self._weights) + 2)
        self._half = self._weights.bfloat16() if halves else None
        for master, weight, gradient in zip(masters, self._parts(self._weights), self._parts(self._gradient[:-2])):
            master.data, master.grad = weight, gradient
        for leaf, weight in zip(halves, self._parts(self._half) if halves else ()):
            leaf.data = weight
        self._rates = rates(settings).to(self._weights)
        self._done = torch.zeros(1, dtype=torch.long, device=self._weights.device)
        self._max_norm, self._combine, self._descend = settings.max_grad_norm, combine, wrap(descend)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], errors: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Descend along the mean error's gradient, at most train.updates times.

        Args:
            gradients: of the sum of errors, one for each of `leaves`.
            errors, count: the sum and of how many, float32, ().

        Returns:
            The mean error and the norm of its gradient before clipping, float32, ().
        """
        halves, others = gradients[: self._halves], gradients[self._halves:]
        if halves:
            self._gradient[: self._start] = joined([*halves, self._spare])
        joined([*others, errors, count], out=self._gradient[self._start:])
        self._combine(self._gradient)
        return self._descend(
            self._gradient, self._weights, self._half, self._mean, self._square, self._rates, self._done, self._max_norm
        )

    def state_dict(self) -> dict[str, Tensor]:
        """AdamW's averages by the number of the parameter, as "3.exp_avg"."""
        return {
            f"{index}.{name}": part
            for name, flat in (("exp_avg", self._mean), ("exp_avg_sq", self._square))
            for index, part in zip(self._order, self._parts(flat), strict=True)
        }

    def load_state_dict(self, state: dict[str, Tensor], done: int) -> None:
        """Go on after `done` steps, with parameters that were written already."""
        self._done.fill_(done)
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
    max_norm: float,
) -> tuple[Tensor, Tensor]:
    """One clipped step of AdamW, in place; the mean error and the norm of its gradient before clipping, ().

    Args:
        gradient: of the sum of errors, then that sum, then how many there are, (P + 2,).
        weights, mean, square: as `adamw` takes them, (P,).
        half: `weights` in bfloat16, written anew, (P,); or None.
        rates: of each step, as the function of that name returns them.
        done: steps made, counted up, (1,).
        max_norm: as torch.nn.utils.clip_grad_norm_ takes it, for the gradient of the mean.
    """
    gradient, errors, count = gradient[:-2], gradient[-2], gradient[-1]
    norm = torch.linalg.vector_norm(gradient)
    divisor = torch.maximum(count, (norm + 1e-6 * count) / max_norm)
    adamw(weights, gradient / divisor, mean, square, *rates[done].unbind(1))
    if half is not None:
        half.copy_(weights)
    done.add_(1)
    return errors / count, norm / count


def adamw(
    weights: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, decay: Tensor, size: Tensor, floor: Tensor
) -> None:
    """A step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) in place, over vectors (P,).

    `mean` and `square` are the running averages of the gradient and of its square; decay, size and floor, (1,), are one
    row of `rates`, which has the corrections of their bias.
    """
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    weights.addcmul_(weights, decay, value=-1).addcdiv_(mean * size, square.sqrt().add_(floor), value=-1)


def rates(settings: TrainConfig) -> Tensor:
    """What `adamw` takes at each step: decay, size and floor, (updates, 3) float64.

    With m' = m / (1 - b1^t) and v' = v / (1 - b2^t), rate m' / (sqrt(v') + eps) = size m / (sqrt(v) + floor).
    """
    rate = torch.tensor([schedule(done, settings) for done in range(settings.updates)], dtype=torch.float64)
    step = torch.arange(1, settings.updates + 1, dtype=torch.float64)
    first, second = (1 - beta**step for beta in BETAS)
    root = second.sqrt()
    return torch.stack([rate * settings.weight_decay, rate * root / first, EPSILON * root], dim=1)


def schedule(step: int, settings: TrainConfig) -> float:
    """Learning rate of the update after `step` updates: a linear warm-up, then a constant or a cosine that would be 0
    one update after the last."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_updates))
    if settings.decay == "none":
        return settings.learning_rate * warmup
    done = max(0, step - settings.warmup_updates) / max(1, settings.updates - settings.warmup_updates)
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * done))
