"""The operators as fused Triton kernels: linear attention in one launch forward, one backward, one for a step, and
what a layer does to every token on its own.

    launch.py               tensors to kernels: tiles, strides, what is allocated
    forward.py              the chunked form with S and z in registers, phi and the denominator inside
    backward.py             all chunks at once; longer sequences first walk back for the gradients of their states
    step.py                 a few new tokens
    ops.py                  torch.library registration and autograd
    mlp.py                  the MLP of a layer, from its norm to its sum, and backward
    token_wise_launch.py    as launch.py, for mlp.py
    token_wise_ops.py       as ops.py

This file imports neither triton nor anything that does: the package works without it.
"""

import importlib.util
import os

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128  # numbers per head
WIDTHS = (16, 32, 64, 128, 256)  # of a token, for the kernels that hold whole tokens
UNITS = 64  # of which the hidden units of an MLP come in blocks


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why these kernels cannot run here; None if they can."""
    if not INSTALLED:
        return "needs the package triton, which comes with torch for CUDA"
    if not torch.cuda.is_available() and not interpreted():
        return "needs a CUDA device; use 'chunked'"
    return None


def refuses(values: Tensor) -> str | None:
    """Why these kernels cannot take tensors like `values`, (..., V); None if they can."""
    if not values.is_cuda and not interpreted():
        return f"needs tensors on a CUDA device, got {values.device}; use 'chunked'"
    if values.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {values.dtype}; use 'chunked'"
    if values.shape[-1] > WIDEST:
        return f"takes heads of at most {WIDEST} numbers, got {values.shape[-1]}; use 'chunked'"
    return None


def refuses_mlp(x: Tensor, weight_in: Tensor, dtype: torch.dtype) -> str | None:
    """Why the MLP's kernels cannot take x (..., D) and weight_in (H, D) with products in `dtype`; None if they can."""
    if not x.is_cuda and not interpreted():
        return f"needs tensors on a CUDA device, got {x.device}; use 'torch'"
    for kind in (x.dtype, dtype):
        if kind not in DTYPES:
            return f"takes float32, bfloat16 and float16, got {kind}; use 'torch'"
    H, D = weight_in.shape
    if D not in WIDTHS or H % UNITS:
        widths = ", ".join(map(str, WIDTHS))
        return f"takes a width of {widths} and multiples of {UNITS} hidden units, got {D} and {H}; use 'torch'"
    return None


def attend(q, k, v, kv, z, mask, restart, decay, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Output and outgoing kv, z; arguments as in linear_attention, None where there is no state."""
    from drl.kernels.triton import ops

    return ops.attend(q, k, v, kv, z, mask, restart, decay, feature_map, eps)


def attend_packed(qkv, kv, z, mask, restart, decay, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` on qkv (B, T, 3, H, K)."""
    from drl.kernels.triton import ops

    return ops.attend_packed(qkv, kv, z, mask, restart, decay, feature_map, eps)


def attend_step(q, k, v, kv, z, mask, restart, decay, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` for a few tokens, without gradient."""
    from drl.kernels.triton import ops

    return ops.step(q, k, v, kv, z, mask, restart, decay, feature_map, eps)


def residual_mlp(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps) -> Tensor:
    """As drl.kernels.residual_mlp, both weights in the dtype of the products."""
    from drl.kernels.triton import token_wise_ops

    return token_wise_ops.residual_mlp(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps)
