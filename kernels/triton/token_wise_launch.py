"""From tensors to the token-wise kernels; as launch.py, nothing here looks at a value or waits for the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from drl.kernels.triton import mlp

FEW = 8192  # tokens, up to which blocks of 32 do not yet fill a large GPU twice


class Tiles(NamedTuple):
    """What a kernel is compiled for: blocks of tokens and of hidden units, warps, stages of the software pipeline."""

    M: int
    H: int
    warps: int
    stages: int


def forward_tiles(tokens: int, D: int, HIDDEN: int, dtype: torch.dtype) -> Tiles:
    """From timings at D = 128 on an H200 and an offline compilation for sm_90. Where tokens are few, small blocks give
    each processor of a GPU a program; otherwise large ones, because each program reads all weights."""
    if dtype == torch.float32:  # exact products run on the ordinary units, with their operands in registers
        return Tiles(16, 32, 8, 1)
    if tokens <= FEW:
        return Tiles(32, 128, 8, 3) if D == 128 and HIDDEN % 128 == 0 else Tiles(32, 64, 8, 2)
    return Tiles(64, 64, 8 if D > 128 else 4, 2)


def backward_tiles(tokens: int, D: int, dtype: torch.dtype) -> Tiles:
    """As forward_tiles, with one more product and sum in registers."""
    if dtype == torch.float32:
        return Tiles(16, 32, 8, 1)
    if tokens <= FEW:
        return Tiles(32, 64, 8, 2) if D > 128 else Tiles(32, 64, 4, 3)
    return Tiles(64, 32, 8, 2) if D > 128 else Tiles(64, 64, 4, 2)


def residual_mlp(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps: float) -> Tensor:
    """x (..., D) after the layer, in its dtype."""
    D, HIDDEN = x.shape[-1], weight_in.shape[0]
    tokens = x.numel() // D
    tiles, out = forward_tiles(tokens, D, HIDDEN, weight_in.dtype), x.new_empty(x.shape)
    if tokens:
        mlp.forward[(-(-tokens // tiles.M),)](
            x.contiguous(), *_dense(norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out), out, tokens, eps,
            D=D, HIDDEN=HIDDEN, BLOCK_M=tiles.M, BLOCK_H=tiles.H, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def residual_mlp_backward(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, d_out, eps: float):
    """Gradients of x, weight_in and weight_out in their dtypes, and one float32 vector of those of bias_in, bias_out
    and of the norm's weight and bias."""
    d_x, read, d_out, hidden, d_hidden, d_vectors = backward_kernel(
        x, norm_weight, norm_bias, weight_in, bias_in, weight_out, d_out, eps
    )
    return d_x, d_hidden.T @ read, d_out.T @ hidden, d_vectors.sum(0)


def backward_kernel(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, d_out, eps: float):
    """What mlp.backward writes, one row per token, d_out in the products' dtype among it."""
    D, HIDDEN, dtype = x.shape[-1], weight_in.shape[0], weight_in.dtype
    tokens = x.numel() // D
    tiles, d_out = backward_tiles(tokens, D, dtype), d_out.contiguous()
    programs, rounds = -(-tokens // tiles.M), d_out.dtype != dtype
    d_x, read = x.new_empty(x.shape), weight_in.new_empty(tokens, D)
    d_out_rounded = weight_in.new_empty(tokens, D) if rounds else d_out.view(tokens, D)
    hidden, d_hidden = weight_in.new_empty(2, tokens, HIDDEN)
    d_vectors = x.new_empty(programs, HIDDEN + 3 * D, dtype=torch.float32)
    if tokens:
        mlp.backward[(programs,)](
            x.contiguous(), *_dense(norm_weight, norm_bias, weight_in, bias_in, weight_out), d_out,
            d_x, read, d_out_rounded, hidden, d_hidden, d_vectors, tokens, eps,
            D=D, HIDDEN=HIDDEN, BLOCK_M=tiles.M, BLOCK_H=tiles.H, ROUND=rounds,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return d_x, read, d_out_rounded, hidden, d_hidden, d_vectors


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)
