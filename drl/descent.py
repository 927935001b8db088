"""From the gradients of one batch to new weights, in few launches and without a word from the host.

The gradients lie in one buffer, so that their norm is one reduction and, between processes, their sum one message.
AdamW divides by the clipping as it reads them; the learning rate comes from a table on the device.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from drl.captured import write
from drl.config import TrainConfig


class Descent:
    """AdamW with clipping and a schedule.

    `wrap` may compile a function, as drl.captured.compiled does; `combine` may add up a tensor over processes.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        settings: TrainConfig,
        wrap: Callable[[Callable], Callable],
        combine: Callable[[Tensor], None],
    ):
        device = parameters[0].device
        self._flat = torch.zeros(sum(p.numel() for p in parameters) + 2, device=device)
        self._pieces = self._flat.split([*(p.numel() for p in parameters), 1, 1])
        for parameter, piece in zip(parameters, self._pieces):
            parameter.grad = piece.view_as(parameter)
        self._rates = torch.tensor([schedule(done, settings) for done in range(settings.updates)], device=device)
        self._done = torch.zeros(1, dtype=torch.long, device=device)
        self._max_norm, self._combine, self._measure = settings.max_grad_norm, combine, wrap(measure)
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=torch.zeros(1, device=device),
            weight_decay=settings.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], errors: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Descend along the mean error's gradient, at most train.updates times.

        Args:
            gradients: of the sum of errors, one for each parameter.
            errors, count: the sum and of how many, float32, ().

        Returns:
            The mean error and the norm of its gradient before clipping, float32, ().
        """
        # flat, because tensors of unlike strides, if only along an axis of one, would be written one by one
        write(self._pieces, [part.reshape(-1) for part in (*gradients, errors, count)])
        self._combine(self._flat)
        loss, norm, divisor, rate = self._measure(self._flat, self._rates, self._done, self._max_norm)
        self.optimizer.grad_scale, self.optimizer.param_groups[0]["lr"] = divisor, rate
        self.optimizer.step()
        return loss, norm

    def state_dict(self) -> dict[str, Tensor]:
        """AdamW's tensors by the number of the parameter, as "3.exp_avg"."""
        return {
            f"{index}.{name}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }

    def load_state_dict(self, state: dict[str, Tensor], done: int) -> None:
        """Go on after `done` steps."""
        self._done.fill_(done)
        optimizer = self.optimizer.state_dict()
        for key, value in state.items():
            index, _, name = key.partition(".")
            optimizer["state"].setdefault(int(index), {})[name] = value.to(self._flat.device)
        self.optimizer.load_state_dict(optimizer)


def measure(flat: Tensor, rates: Tensor, done: Tensor, max_norm: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean error, the norm of its gradient, what AdamW divides by, and its learning rate (1,); counts up `done` (1,).

    Args:
        flat: the gradient of the sum of errors, then that sum, then how many there are.
        rates: the learning rate of each step.
        max_norm: as torch.nn.utils.clip_grad_norm_ takes it, for the gradient of the mean.
    """
    errors, count = flat[-2], flat[-1]
    norm = torch.linalg.vector_norm(flat[:-2])
    divisor = torch.maximum(count, (norm + 1e-6 * count) / max_norm)
    rate = rates[done]
    done.add_(1)
    return errors / count, norm / count, divisor, rate


def schedule(step: int, settings: TrainConfig) -> float:
    """Learning rate of the update after `step` updates: a linear warm-up, then a constant or a cosine that would be 0
    one update after the last."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_updates))
    if settings.decay == "none":
        return settings.learning_rate * warmup
    done = max(0, step - settings.warmup_updates) / max(1, settings.updates - settings.warmup_updates)
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * done))
