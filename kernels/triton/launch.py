"""From tensors to kernels: tile sizes, strides, and what is allocated. Nothing here looks at a value, waits for the
device or tunes at run time, so every call can stand in a CUDA graph. `decay`, a number for each head or None, goes to
the kernels as arguments: nothing is copied for it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drl.kernels.triton import backward as backward_kernels
from drl.kernels.triton import forward as forward_kernels
from drl.kernels.triton import step as step_kernels


QUEUE = 2048  # programs that fill an H200 several times over


class Tiles(NamedTuple):
    """What a kernel is compiled for: a block of features and of values, warps, stages of the software pipeline, the
    registers of a thread at most, whether programs share the work of a head (backward)."""

    K: int
    V: int
    warps: int
    stages: int = 1
    registers: int | None = None
    split: bool = False


def chunk(T: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk, the same forward and backward: the states kept between the two are those of its chunks."""
    if dtype == torch.float32:  # exact products run on the ordinary units, with their operands in registers
        return 16
    return 16 if T <= 16 else 32 if T <= 32 else 64


def forward_tiles(K: int, V: int, dtype: torch.dtype) -> Tiles:
    """From an offline compilation for sm_90 (registers, spills) and timings on an H200: docs/performance.md."""
    block_k, block_v = blocks(K, V)
    if dtype == torch.float32:
        return Tiles(block_k, min(block_v, 32), warps=4)
    if block_k > 64:
        return Tiles(block_k, 64, warps=8, stages=2)
    return Tiles(block_k, min(block_v, 64), warps=4, stages=3)


def backward_tiles(K: int, V: int, dtype: torch.dtype, programs: int) -> Tiles:
    """As forward_tiles. Where there are `programs` enough to queue, fewer registers let more of them run at once."""
    block_k, block_v = blocks(K, V)
    widest = max(block_k, block_v)
    if widest > 64:
        part = 32 if dtype == torch.float32 else 64
        return Tiles(min(block_k, part), min(block_v, part), warps=4, split=True)
    if widest > 32 or dtype == torch.float32:
        return Tiles(block_k, block_v, warps=8 if widest > 32 else 4)
    return Tiles(block_k, block_v, warps=4, registers=128 if programs >= QUEUE else None)


def forward_buffers(q: Tensor, k: Tensor, v: Tensor, save: bool) -> tuple[Tensor, ...]:
    """What `forward` returns, not yet filled."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = -(-T // chunk(T, v.dtype))
    kept = N if save and N > 1 else 0
    return (
        v.new_empty(B, T, H, V), *state_buffers(k, v, True), _floats(v, B, H, T if save else 0),
        _floats(v, B, H, kept, K, V), _floats(v, B, H, kept, K),
    )  # fmt: skip


def state_buffers(k: Tensor, v: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """kv (B, H, K, V) and z (B, H, K), not yet filled; without rows unless `wanted`."""
    B, _, H, K = k.shape
    rows = B if wanted else 0
    return _floats(v, rows, H, K, v.shape[-1]), _floats(v, rows, H, K)


def forward(
    q, k, v, kv, z, mask, restart, decay: Sequence[float] | None, feature_map: str, eps: float, save: bool
) -> tuple[Tensor, ...]:
    """Output, outgoing kv and z, and what the backward needs (empty unless `save`): denominators (B, H, T), kv and z
    before each chunk (B, H, N, ...)."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    q, k, v = (_rows(x) for x in (q, k, v))
    tiles, C = forward_tiles(K, V, v.dtype), chunk(T, v.dtype)
    N = -(-T // C)
    buffers = forward_buffers(q, k, v, save)
    forward_kernels.forward[(B * H, -(-V // tiles.V))](
        q, k, v, _bytes(mask, q), _bytes(restart, q), _or(kv, q), _or(z, q),
        *buffers, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        T, H, eps, _rates(decay), N, K=K, V=V, C=C, BLOCK_K=tiles.K, BLOCK_V=tiles.V, MAP=feature_map,
        MASK=mask is not None, RESTART=restart is not None, STATE=kv is not None, SAVE=save, ONE_CHUNK=N == 1,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    return buffers


def backward(
    gradients: tuple[Tensor, Tensor, Tensor], q, k, v, kv, z, mask, restart, out, denominators, kv_chunks, z_chunks,
    d_out, d_kv, d_z, decay: Sequence[float] | None, feature_map: str, state_gradient: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradients of q, k, v into `gradients` (any strides but a dense last dimension); return those of the
    incoming kv and z (empty unless `state_gradient`)."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    q, k, v = (_rows(x) for x in (q, k, v))
    dq, dk, dv = gradients
    C = chunk(T, v.dtype)
    N = -(-T // C)
    tiles = backward_tiles(K, V, v.dtype, B * H * N)
    whole_k, whole_v = blocks(K, V)
    d_out, restart = d_out.contiguous(), None if kv is None else restart
    d_kv_before, d_z_before = before = state_buffers(k, v, state_gradient)
    after = d_kv is not None or d_z is not None
    if after:
        d_kv = _floats(v, B, H, K, V).zero_() if d_kv is None else d_kv.contiguous()
        d_z = _floats(v, B, H, K).zero_() if d_z is None else d_z.contiguous()
    past, future = (_or(kv, out), _or(z, out)), (_or(d_kv, out), _or(d_z, out))
    if N > 1:
        chunks = _floats(v, B, H, N, K, V), _floats(v, B, H, N, K)
        block_v = min(whole_v, 64)
        backward_kernels.states[(B * H, whole_v // block_v)](
            q, _bytes(mask, q), _bytes(restart, q), out, denominators, d_out, *future, *chunks, *before,
            *q.stride()[:3], T, H, _rates(decay), N, K=K, V=V, C=C, BLOCK_K=whole_k, BLOCK_V=block_v, WHOLE_V=whole_v,
            MAP=feature_map, MASK=mask is not None, RESTART=restart is not None, AFTER=after, BEFORE=state_gradient,
            num_warps=8 if whole_k > 64 else 4, num_stages=2,
        )  # fmt: skip
        past, future = (kv_chunks, z_chunks), chunks
    parts = -(-K // tiles.K) - (-V // tiles.V) if tiles.split else 1
    backward_kernels.backward[(B * H * parts, N)](
        q, k, v, _bytes(mask, q), _bytes(restart, q), *past, out, denominators, d_out, *future,
        dq, dk, dv, d_kv_before, d_z_before,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], T, H,
        _rates(decay), N, K=K, V=V, C=C, WHOLE_K=whole_k, WHOLE_V=whole_v, SPLIT=tiles.split, SPLIT_K=tiles.K,
        SPLIT_V=tiles.V, MAP=feature_map, MASK=mask is not None, RESTART=restart is not None and N == 1,
        PAST=kv is not None or N > 1, FUTURE=after or N > 1, BEFORE=state_gradient and N == 1, num_warps=tiles.warps,
        num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    return d_kv_before, d_z_before


def step(
    q, k, v, kv, z, mask, restart, decay: Sequence[float] | None, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and outgoing kv, z of a few tokens."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    q, k, v = (_rows(x) for x in (q, k, v))
    block_k, block_v = block(K), min(block(V), 32)
    out, kv_after, z_after = v.new_empty(B, T, H, V), *state_buffers(k, v, True)
    step_kernels.step[(B * H, -(-V // block_v))](
        q, k, v, _bytes(mask, q), _bytes(restart, q), _or(kv, out), _or(z, out), out, kv_after, z_after,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], H, eps, None if decay is None else tuple(decay),
        K=K, V=V, T=T, BLOCK_K=block_k, BLOCK_V=block_v, MAP=feature_map, MASK=mask is not None,
        RESTART=restart is not None, STATE=kv is not None, num_warps=max(1, block_k * block_v // 1024),
    )  # fmt: skip
    return out, kv_after, z_after


def block(size: int) -> int:
    """The power of two that holds `size`, and at least the 16 that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def blocks(K: int, V: int) -> tuple[int, int]:
    """Blocks that hold K features and V values. Beside one of 64 or more the other has 64 too: products of (64, 64)
    with (64, 16) and of (64, 128) with (128, 32) came out wrong on an H200 with Triton 3.6."""
    block_k, block_v = block(K), block(V)
    least = 64 if max(block_k, block_v) >= 64 else 16
    return max(block_k, least), max(block_v, least)


def _rates(decay: Sequence[float] | None) -> tuple[float, ...] | None:
    """Bits that each head forgets at a token."""
    return None if decay is None else tuple(-math.log2(g) for g in decay)


def _rows(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is dense, as in a view of a packed projection; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel takes some address even for what it never reads."""
    return other if x is None else x.contiguous()


def _bytes(flags: Tensor | None, other: Tensor) -> Tensor:
    return other if flags is None else flags.contiguous().view(torch.uint8)
