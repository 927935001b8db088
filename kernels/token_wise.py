"""What a transformer does to every token on its own, in one piece: normalise, project, add.

In plain torch each line below is a kernel that reads and writes memory; on a GPU in half precision they are one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from drl.kernels import triton


def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """x + W_out gelu(W_in norm(x) + b_in) + b_out: the second half of a transformer's layer, normalised on the way in.

    Args:
        x: the residual stream, shape (..., D), any float dtype.
        norm_weight, norm_bias: LayerNorm's, shape (D,).
        weight_in, bias_in: nn.Linear's, shapes (H, D) and (H,), H hidden units.
        weight_out, bias_out: nn.Linear's, shapes (D, H) and (D,).
        eps: LayerNorm's, added to the variance.
        backend: "torch", "triton" or "auto": "triton" for products of bfloat16 or float16 on a CUDA device, of the
            sizes that it takes, else "torch". An explicit choice never falls back to another.

    Returns:
        The new residual stream, shape (..., D). With "torch", what the torch operators give. "triton" multiplies in the
        weights' dtype (under autocast in autocast's) and does the rest in float32: rounded are the operands of products
        and the result, to the dtype of x. Differentiable once in every tensor.

    Raises:
        ValueError: a shape or device is outside this contract, or `backend` is unknown or cannot run on this input.
    """
    parameters = (norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out)
    _check(x, *parameters)
    if choose(backend, x, weight_in) == "torch":
        read = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        return x + F.linear(F.gelu(F.linear(read, weight_in, bias_in)), weight_out, bias_out)
    dtype = product_dtype(x, weight_in)
    return triton.residual_mlp(
        x, norm_weight, norm_bias, weight_in.to(dtype), bias_in, weight_out.to(dtype), bias_out, eps
    )


def choose(backend: str, x: Tensor, weight_in: Tensor) -> str:
    """"torch" or "triton": what runs on x (..., D) and weight_in (H, D) when `backend` is asked for.

    Raises:
        ValueError: the backend is unknown, or cannot run here or on such tensors.
    """
    dtype = product_dtype(x, weight_in)
    if backend == "auto":
        fits = x.is_cuda and dtype != torch.float32 and not triton.unavailable()
        return "triton" if fits and not triton.refuses_mlp(x, weight_in, dtype) else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f"unknown backend {backend!r}; expected one of auto, torch, triton")
    reason = triton.unavailable() or triton.refuses_mlp(x, weight_in, dtype) if backend == "triton" else None
    if reason:
        raise ValueError(f"backend {backend!r} is unavailable: {reason}")
    return backend


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which x meets `weight`: autocast's, which an operator of ours has to ask for, or the weight's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _check(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out) -> None:
    if x.ndim == 0 or weight_in.ndim != 2:
        raise ValueError(f"x must be (..., D) and weight_in (H, D), got {tuple(x.shape)} and {tuple(weight_in.shape)}")
    D, H = x.shape[-1], weight_in.shape[0]
    expected = {
        "norm_weight": (norm_weight, (D,)), "norm_bias": (norm_bias, (D,)), "weight_in": (weight_in, (H, D)),
        "bias_in": (bias_in, (H,)), "weight_out": (weight_out, (D, H)), "bias_out": (bias_out, (D,)),
    }  # fmt: skip
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, as x is, got {tensor.device}")
