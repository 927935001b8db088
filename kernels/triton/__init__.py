"""The operator as fused Triton kernels: one launch forward, one backward, one for a step.

    launch.py     tensors to kernels: tiles, strides, what is allocated
    forward.py    the chunked form with S and z in registers, phi and the denominator inside
    backward.py   one sweep from the last chunk to the first
    step.py       a few new tokens
    ops.py        torch.library registration and autograd

This file imports neither triton nor anything that does: the package works without it.
"""

import importlib.util
import os

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128  # numbers per head


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


def attend(q, k, v, kv, z, mask, restart, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Output and outgoing kv, z; arguments as in linear_attention, None where there is no state."""
    from drl.kernels.triton import ops

    return ops.attend(q, k, v, kv, z, mask, restart, feature_map, eps)


def attend_packed(qkv, kv, z, mask, restart, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` on qkv (B, T, 3, H, K)."""
    from drl.kernels.triton import ops

    return ops.attend_packed(qkv, kv, z, mask, restart, feature_map, eps)


def attend_step(q, k, v, kv, z, mask, restart, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` for a few tokens, without gradient."""
    from drl.kernels.triton import ops

    return ops.step(q, k, v, kv, z, mask, restart, feature_map, eps)
