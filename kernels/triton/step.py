"""A few new tokens of a state: one program per head of a row and block of values; the state is read once and written
once, whatever the number of tokens."""

import triton
import triton.language as tl

from drl.kernels.triton.tiles import of_head, phi, within


@triton.jit
def step(
    q, k, v, mask, restart, kv_before, z_before, out, kv_after, z_after,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    H, eps, decay,
    K: tl.constexpr, V: tl.constexpr, T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, MAP: tl.constexpr,
    MASK: tl.constexpr, RESTART: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """`decay`: what each head's state is multiplied by before a token that counts; None where nothing fades."""
    DECAY: tl.constexpr = decay is not None
    row_head = tl.program_id(0)
    row, head = (row_head // H).to(tl.int64), row_head % H
    row_head = row_head.to(tl.int64)
    features, values = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    square = features[:, None] * V + values[None, :]
    in_square = within(features, K)[:, None] & within(values, V)[None, :]

    kv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    z = tl.zeros((BLOCK_K,), tl.float32)
    if STATE:
        goes_on = True
        if RESTART:
            goes_on = tl.load(restart + row) == 0
        kv = tl.load(kv_before + row_head * K * V + square, mask=in_square & goes_on, other=0.0)
        z = tl.load(z_before + row_head * K + features, mask=within(features, K) & goes_on, other=0.0)
    if DECAY:
        g = of_head(decay, head)
        left = g
    for t in tl.static_range(T):
        q_K = tl.load(q + row * q_row + t * q_token + head * q_head + features, mask=within(features, K), other=0.0)
        k_K = tl.load(k + row * k_row + t * k_token + head * k_head + features, mask=within(features, K), other=0.0)
        v_V = tl.load(v + row * v_row + t * v_token + head * v_head + values, mask=within(values, V), other=0.0)
        q_K, k_K = phi(q_K.to(tl.float32), MAP), phi(k_K.to(tl.float32), MAP)
        counts = within(features, K)
        if MASK:
            shown = tl.load(mask + row * T + t) != 0
            counts = counts & shown
            if DECAY:
                left = tl.where(shown, g, 1.0)
        if DECAY:
            kv, z = kv * left, z * left
        k_K = tl.where(counts, k_K, 0.0)
        kv += k_K[:, None] * v_V.to(tl.float32)[None, :]
        z += k_K
        numerator_V = tl.sum(q_K[:, None] * kv, axis=0)
        denominator = tl.sum(q_K * z, axis=0) + eps
        result_V = (numerator_V / denominator).to(out.dtype.element_ty)
        tl.store(out + ((row * T + t) * H + head) * V + values, result_V, mask=within(values, V))
    tl.store(kv_after + row_head * K * V + square, kv, mask=in_square)
    if tl.program_id(1) == 0:
        tl.store(z_after + row_head * K + features, z, mask=within(features, K))
