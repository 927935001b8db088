"""The kernels as torch operators: torch.compile and torch.export see through them by their fakes, autograd by the
backward registered here. A second derivative is not there.

An operator may not return views of one buffer, so there are two of each: for q, k, v apart and for one projection of
all three, whose gradient is then written packed as it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from drl.kernels.triton import launch


@custom_op("drl::linear_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor | None, z: Tensor | None, mask: Tensor | None, restart: Tensor | None,
    decay: Sequence[float] | None, feature_map: str, eps: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.forward(q, k, v, kv, z, mask, restart, decay, feature_map, eps, save)


@custom_op("drl::linear_attention_packed", mutates_args=())
def _attend_packed(
    qkv: Tensor, kv: Tensor | None, z: Tensor | None, mask: Tensor | None, restart: Tensor | None,
    decay: Sequence[float] | None, feature_map: str, eps: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.forward(*qkv.unbind(2), kv, z, mask, restart, decay, feature_map, eps, save)


@custom_op("drl::linear_attention_backward", mutates_args=())
def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor | None, z: Tensor | None, mask: Tensor | None, restart: Tensor | None,
    out: Tensor, denominators: Tensor, kv_chunks: Tensor, z_chunks: Tensor,
    d_out: Tensor, d_kv: Tensor | None, d_z: Tensor | None, decay: Sequence[float] | None,
    feature_map: str, state_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    states = launch.backward(
        gradients, q, k, v, kv, z, mask, restart, out, denominators, kv_chunks, z_chunks, d_out, d_kv, d_z,
        decay, feature_map, state_gradient,
    )  # fmt: skip
    return *gradients, *states


@custom_op("drl::linear_attention_packed_backward", mutates_args=())
def _attend_packed_backward(
    qkv: Tensor, kv: Tensor | None, z: Tensor | None, mask: Tensor | None, restart: Tensor | None,
    out: Tensor, denominators: Tensor, kv_chunks: Tensor, z_chunks: Tensor,
    d_out: Tensor, d_kv: Tensor | None, d_z: Tensor | None, decay: Sequence[float] | None,
    feature_map: str, state_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradient = qkv.new_empty(qkv.shape)
    states = launch.backward(
        gradient.unbind(2), *qkv.unbind(2), kv, z, mask, restart, out, denominators, kv_chunks, z_chunks,
        d_out, d_kv, d_z, decay, feature_map, state_gradient,
    )  # fmt: skip
    return gradient, *states


@custom_op("drl::linear_attention_step", mutates_args=())
def _step(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor | None, z: Tensor | None, mask: Tensor | None, restart: Tensor | None,
    decay: Sequence[float] | None, feature_map: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.step(q, k, v, kv, z, mask, restart, decay, feature_map, eps)


@_attend.register_fake
def _(q, k, v, kv, z, mask, restart, decay, feature_map, eps, save):
    return launch.forward_buffers(q, k, v, save)


@_attend_packed.register_fake
def _(qkv, kv, z, mask, restart, decay, feature_map, eps, save):
    return launch.forward_buffers(*qkv.unbind(2), save)


@_attend_backward.register_fake
def _(
    q, k, v, kv, z, mask, restart, out, denominators, kv_chunks, z_chunks, d_out, d_kv, d_z, decay, feature_map, wanted
):  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *launch.state_buffers(k, v, wanted)


@_attend_packed_backward.register_fake
def _(qkv, kv, z, mask, restart, out, denominators, kv_chunks, z_chunks, d_out, d_kv, d_z, decay, feature_map, wanted):
    return qkv.new_empty(qkv.shape), *launch.state_buffers(*qkv.unbind(2)[1:], wanted)


@_step.register_fake
def _(q, k, v, kv, z, mask, restart, decay, feature_map, eps):
    return launch.forward_buffers(q, k, v, save=False)[:3]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.decay, ctx.feature_map, _, _ = inputs
    out, kv_after, z_after, *kept = output
    ctx.save_for_backward(*tensors, out, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # a state that nothing reads has no gradient, and none is filled with zeros


def _backward(ctx, d_out, d_kv, d_z, *_):
    *inputs, out, denominators, kv_chunks, z_chunks = ctx.saved_tensors
    operator = _attend_packed_backward if len(inputs) == 5 else _attend_backward
    kv_at = len(inputs) - 4
    state_gradient = any(ctx.needs_input_grad[kv_at : kv_at + 2])
    d_out = torch.zeros_like(out) if d_out is None else d_out
    *gradients, d_kv, d_z = operator(
        *inputs, out, denominators, kv_chunks, z_chunks, d_out, d_kv, d_z,
        ctx.decay, ctx.feature_map, state_gradient
    )
    states = (d_kv, d_z) if state_gradient else (None, None)
    return *gradients, *states, *[None] * 6


def _fold(operator):
    """How torch.vmap maps a forward operator: what it maps over goes into the rows."""
    def mapped(info, dims, *inputs):
        *inputs, _ = (
            (part.expand(info.batch_size, *part.shape) if dim is None else part.movedim(dim, 0)).flatten(0, 1)
            if isinstance(part, Tensor) else part for part, dim in zip(inputs, dims, strict=True)
        )
        # asked here: what vmap hands to the doors below never says that it needs a gradient
        results = operator(*inputs, _needs_gradient(*(part for part in inputs if isinstance(part, Tensor))))
        rows = [part.unflatten(0, (info.batch_size, len(part) // info.batch_size)) for part in results]
        return tuple(rows), (0,) * len(rows)

    return mapped


for operator in (_attend, _attend_packed):
    operator.register_autograd(_backward, setup_context=_keep)
    operator.register_vmap(_fold(operator))


def attend(q, k, v, kv, z, mask, restart, decay, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    return _attend(q, k, v, kv, z, mask, restart, decay, feature_map, eps, _needs_gradient(q, k, v, kv, z))[:3]


def attend_packed(qkv, kv, z, mask, restart, decay, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    return _attend_packed(qkv, kv, z, mask, restart, decay, feature_map, eps, _needs_gradient(qkv, kv, z))[:3]


def step(q, k, v, kv, z, mask, restart, decay, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    return _step(q, k, v, kv, z, mask, restart, decay, feature_map, eps)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
