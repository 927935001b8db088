"""Forward: the chunked form (docs/mathematics.md) with the state in registers.

One program walks through all chunks of one head of one row, for one block of values. What enters and leaves memory is
q, k, v, the output and, once, the state; phi and the denominator cost nothing extra.
"""

import triton
import triton.language as tl

from drl.kernels.triton.tiles import counted, dot, faded, load_tile, of_head, phi, store_tile, within


@triton.jit
def forward(
    q, k, v, mask, restart, kv_before, z_before,
    out, kv_after, z_after, denominators, kv_chunks, z_chunks,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    T, H, eps, rates,
    N, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    MAP: tl.constexpr, MASK: tl.constexpr, RESTART: tl.constexpr, STATE: tl.constexpr, SAVE: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """`rates`: the bits that each head forgets at a token that counts, a tuple; None where nothing fades."""
    row_head = tl.program_id(0)
    row, head = (row_head // H).to(tl.int64), row_head % H
    row_head = row_head.to(tl.int64)
    features, values = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    first_block = tl.program_id(1) == 0  # writes what does not depend on the values
    dtype: tl.constexpr = v.dtype.element_ty
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    out += (row * T * H + head) * V
    square = features[:, None] * V + values[None, :]
    in_square = within(features, K)[:, None] & within(values, V)[None, :]

    kv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    z = tl.zeros((BLOCK_K,), tl.float32)
    if STATE:
        kv = tl.load(kv_before + row_head * K * V + square, mask=in_square, other=0.0)
        z = tl.load(z_before + row_head * K + features, mask=within(features, K), other=0.0)
        if RESTART:  # selects: what is forgotten may be anything
            forgets = tl.load(restart + row) != 0
            kv, z = tl.where(forgets, 0.0, kv), tl.where(forgets, 0.0, z)

    rate = None if rates is None else of_head(rates, head)
    i = tl.arange(0, C)
    for n in range(N):
        first = n * C
        # all loads before the first use of any: their latencies then overlap
        q_CK = load_tile(q, q_token, first, T, features, K, C)
        k_CK = load_tile(k, k_token, first, T, features, K, C)
        v_CV = load_tile(v, v_token, first, T, values, V, C)
        counts = first + i < T
        if MASK:
            counts = counts & (tl.load(mask + row * T + first + i, mask=counts, other=0) != 0)
        if SAVE and not ONE_CHUNK:
            chunk = row_head * N + n
            tl.store(kv_chunks + chunk * K * V + square, kv, mask=in_square)
            if first_block:
                tl.store(z_chunks + chunk * K + features, z, mask=within(features, K))
        q_CK = phi(q_CK.to(tl.float32), MAP).to(dtype)
        # phi of the zeros that fill a tile up is not zero
        k_CK = phi(k_CK.to(tl.float32), MAP)
        k_CK = tl.where(counts[:, None] & within(features, K)[None, :], k_CK, 0.0)
        p_C, p = counted(counts, rate)
        late_k_CK = faded(k_CK, rate, (p - p_C)[:, None]).to(dtype)  # as the state after the chunk holds them
        k_CK = k_CK.to(dtype)

        weights_CC = faded(dot(q_CK, tl.trans(k_CK), dtype), rate, p_C[:, None] - p_C[None, :])
        # selects, does not multiply: whatever the future holds is replaced by zero
        weights_CC = tl.where(i[:, None] >= i[None, :], weights_CC, 0.0)
        denominator_C = tl.sum(weights_CC, axis=1) + eps
        numerator_CV = dot(weights_CC, v_CV, dtype)
        if STATE or not ONE_CHUNK:
            denominator_C += faded(tl.sum(q_CK.to(tl.float32) * z[None, :], axis=1), rate, p_C)
            numerator_CV += faded(dot(q_CK, kv, dtype), rate, p_C[:, None])
        store_tile(out, H * V, first, T, values, V, numerator_CV * (1 / denominator_C)[:, None], C)
        if SAVE and first_block:
            tl.store(denominators + row_head * T + first + i, denominator_C, mask=first + i < T)
        kv = faded(kv, rate, p) + dot(tl.trans(late_k_CK), v_CV, dtype)
        z = faded(z, rate, p) + tl.sum(late_k_CK.to(tl.float32), axis=0)

    tl.store(kv_after + row_head * K * V + square, kv, mask=in_square)
    if first_block:
        tl.store(z_after + row_head * K + features, z, mask=within(features, K))
