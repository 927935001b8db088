"""The token-wise kernels as torch operators; a second derivative is not there."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from drl.kernels.triton import token_wise_launch as launch


@custom_op("drl::residual_mlp", mutates_args=())
def residual_mlp(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor,
    bias_out: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    return launch.residual_mlp(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps)


@custom_op("drl::residual_mlp_backward", mutates_args=())
def _residual_mlp_backward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor,
    d_out: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.residual_mlp_backward(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, d_out, eps)


@residual_mlp.register_fake
def _(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps):
    return x.new_empty(x.shape)


@_residual_mlp_backward.register_fake
def _(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, d_out, eps):
    d_vectors = x.new_empty(weight_in.shape[0] + 3 * x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), weight_in.new_empty(weight_in.shape), weight_out.new_empty(weight_out.shape), d_vectors


def _keep(ctx, inputs, output) -> None:
    *tensors, bias_out, ctx.eps = inputs
    ctx.bias_out_dtype = bias_out.dtype
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out):
    x, norm_weight, norm_bias, weight_in, bias_in, weight_out = ctx.saved_tensors
    d_x, d_weight_in, d_weight_out, d_vectors = _residual_mlp_backward(*ctx.saved_tensors, d_out, ctx.eps)
    d_bias_in, *d_vectors = d_vectors.split([weight_in.shape[0]] + [x.shape[-1]] * 3)
    d_bias_out, d_norm_weight, d_norm_bias = d_vectors
    return (
        d_x, d_norm_weight.to(norm_weight.dtype), d_norm_bias.to(norm_bias.dtype), d_weight_in,
        d_bias_in.to(bias_in.dtype), d_weight_out, d_bias_out.to(ctx.bias_out_dtype), None,
    )  # fmt: skip


residual_mlp.register_autograd(_backward, setup_context=_keep)


@residual_mlp.register_vmap
def _(info, dims, *inputs):
    """Several models side by side, each with weights of its own: products of stacks of matrices, by torch's operators,
    in the dtypes of the kernels."""
    *tensors, eps = inputs
    x, *parameters = (
        part.expand(info.batch_size, *part.shape) if dim is None else part.movedim(dim, 0)
        for part, dim in zip(tensors, dims)
    )
    weight_in, weight_out = parameters[2], parameters[4]
    norm_weight, norm_bias, bias_in, bias_out = (parameters[index][:, None] for index in (0, 1, 3, 5))
    rows = x.flatten(1, -2)
    with torch.autocast(x.device.type, enabled=False):
        read = F.layer_norm(rows.float(), rows.shape[-1:], eps=eps) * norm_weight + norm_bias
        hidden = F.gelu(torch.baddbmm(bias_in.to(weight_in.dtype), read.to(weight_in.dtype), weight_in.mT))
        out = rows + torch.baddbmm(bias_out.to(weight_out.dtype), hidden, weight_out.mT)
    return out.to(x.dtype).view_as(x), 0
