"""What one batch says of a model: the errors of its actions, and the state that the chunks leave behind.

Dimension key: B rows, L steps, A action.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from drl.data.sampling import Batch
from drl.guidance import Judge, guided
from drl.model import Model, ModelState


def batch_errors(model: Model, batch: Batch, past: ModelState, judge: Judge | None = None) -> tuple:
    """`action_errors` of one chunk that goes on from `past`, and the tensors of the state that it leaves behind; with a
    judge also what `guided` gives.

    A model whose weights are bfloat16 computes in bfloat16; states, errors and sums stay float32.
    """
    half = model.head.weight.dtype == torch.bfloat16
    # no cache: each weight is used once, and a cached cast would be a stale one in a captured graph
    with torch.autocast(batch.mask.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        predicted, state = model(
            batch.returns_to_go, batch.observations, batch.actions, batch.timesteps, batch.mask, past, batch.restart
        )
        # detached here: compiled, it would otherwise be given gradients of zeros
        state = [part.detach() for part in tensors_of(state)]
        errors, count = action_errors(predicted, batch.actions, batch.mask)
    if judge is None:
        return errors, count, state
    return errors, count, state, *guided(predicted.float(), errors, batch, judge)


def action_errors(predicted: Tensor, actions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of squared errors (mean over an action's channels) over real steps, and how many these are: float32, ().

    predicted, actions (B, L, A); mask (B, L) bool. Padding is neither in the sum nor in the count.
    """
    error_BL = (predicted - actions).square().mean(-1)
    return error_BL.where(mask, 0).sum(), mask.sum(dtype=torch.float32)


def tensors_of(state: Iterable[Sequence[Tensor] | None]) -> list[Tensor]:
    """The tensors of a state, or of several, one after the other."""
    return [part for layer in state if layer is not None for part in layer]


def state_of(state: ModelState, tensors: Iterable[Tensor]) -> ModelState:
    """A state of other tensors; the inverse of `tensors_of`."""
    rest = iter(tensors)
    return tuple(None if layer is None else type(layer)(next(rest), next(rest)) for layer in state)
