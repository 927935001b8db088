"""Inputs of an attention benchmark, and the right answers to them.

Queries, keys and values are views of one projection's output, as in the model; fresh random sets of them take turns
until together they exceed the cache, so that every call reads memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drl.benchmark_device import cache_bytes
from drl.benchmark_peers import EPS
from drl.benchmark_table import Shape, floor_bytes
from drl.kernels import FEATURE_MAPS, LinearAttentionState, linear_attention, linear_attention_step

SETS = (4, 64)  # input sets: at least, at most
CHECKED = 4  # sequences of a batch whose numbers are compared
LOOPED = 300  # tokens up to which the recurrence itself is the reference; beyond, it takes too long
PAST = 20  # tokens that a step's state has seen


class Protocol(NamedTuple):
    """How to measure; the options of `drl benchmark attention` say what each means."""

    dtype: str = "float32"
    feature_map: str = "elu1"
    separate: bool = False
    step: bool = False
    seconds: float = 0.3
    limit: float = 0

    @property
    def works(self) -> tuple[str, ...]:
        return ("step",) if self.step else ("forward", "forward and backward")


class Inputs(NamedTuple):
    """One call's inputs.

    Attributes:
        leaves: (qkv,) of shape (B, T, 3, H, D), or q, k and v, each (B, T, H, D), on their own.
        gradient: of the output, (B, T, H, D).
        state: of `work` "step", else None.
    """

    leaves: tuple[Tensor, ...]
    gradient: Tensor
    state: LinearAttentionState | None = None


def make_inputs(shape: Shape, protocol: Protocol, device: str) -> list[Inputs]:
    """As many random sets as exceed twice the cache, within SETS."""
    generator = torch.Generator(device)
    generator.seed()
    kind = {"device": device, "dtype": getattr(torch, protocol.dtype)}
    B, T, H, D = shape
    least, most = SETS
    size = floor_bytes(shape, protocol.works[0], protocol.dtype)
    sets = []
    for _ in range(max(least, min(most, -(-2 * cache_bytes() // size)))):
        past, qkv = (torch.randn(B, t, 3, H, D, device=device, generator=generator) for t in (PAST, T))
        if protocol.feature_map == "identity":  # signed maps have no mean to speak of: what comes in is mapped already
            for x in (past, qkv):
                x[:, :, :2] = FEATURE_MAPS["elu1"](x[:, :, :2])
        state = linear_attention(*past.unbind(2), feature_map=protocol.feature_map)[1] if protocol.step else None
        gradient = torch.randn(B, T, H, D, device=device, generator=generator).to(**kind)
        qkv = qkv.to(**kind)
        leaves = tuple(x.contiguous() for x in qkv.unbind(2)) if protocol.separate else (qkv,)
        sets.append(Inputs(leaves, gradient, state))
    return sets


def right_answers(inputs: Inputs, protocol: Protocol) -> dict[str, Tensor]:
    """Results in float64 on the same numbers, for the sequences that are compared: all that any work names."""
    rows = rows_checked(len(inputs.gradient))
    q, k, v, gradient = (x.detach()[rows].double() for x in (*views(inputs), inputs.gradient))
    options = {"feature_map": protocol.feature_map, "eps": EPS,
               "backend": "reference" if q.shape[1] <= LOOPED else "chunked"}
    if protocol.step:
        state = LinearAttentionState(*(part[rows].double() for part in inputs.state))
        out, state = linear_attention_step(q, k, v, state, **options)
        return {"out": out, "kv": state.kv, "z": state.z}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = linear_attention(*leaves, **options)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, leaves, gradient))))


def error(x: Tensor, right: Tensor) -> float:
    """Norm of the difference over norm, of the sequences in `right_answers`."""
    x = x.detach()[rows_checked(len(x))].double()
    return float((x - right).norm() / right.norm())


def rows_checked(batch: int) -> list[int]:
    """The first, the last and some in between: a grid that is cut short shows at its end."""
    return sorted({round(i * (batch - 1) / (CHECKED - 1)) for i in range(CHECKED)})


def views(inputs: Inputs) -> Sequence[Tensor]:
    """q, k, v, each (B, T, H, D)."""
    return inputs.leaves if len(inputs.leaves) == 3 else inputs.leaves[0].unbind(2)


def fresh(inputs: Inputs, work: str) -> Inputs:
    """The same numbers as new leaves, which no earlier graph has touched."""
    needed = work == "forward and backward"
    return inputs._replace(leaves=tuple(x.detach().requires_grad_(needed) for x in inputs.leaves))


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers in another dtype; a state keeps its own."""
    return Inputs(tuple(x.to(dtype) for x in inputs.leaves), inputs.gradient.to(dtype), inputs.state)
