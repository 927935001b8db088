"""Backward, one chunk at a time (docs/mathematics.md):

    G = dO / n        d = -rowsum(G * O)        W = tril(G V^T + d 1^T)        A = tril(Q K^T)
    dQ = W K + G S^T + d z^T    dK = W^T Q + V dS'^T + 1 dz'^T    dV = A^T G + K dS'

S, z before each chunk are those that the forward kept. Sequences of one chunk have the gradients dS', dz' of the state
after it as an argument, and take one launch. In longer ones `states` first walks from the last chunk to the first,

    dS <- dS + Q^T G        dz <- dz + Q^T d

and leaves them behind, so that `backward` then does all chunks at once.

Where memory fades, D, f and l of docs/mathematics.md stand in all of them.

A wide head of a chunk is split between programs (SPLIT): some take a block of features and give that of dQ and dK,
others a block of values and give that of dV. Nothing is summed between programs, so the result is the same bit for bit
each time. W^T and A^T are computed as such: a product that is transposed and multiplied again is compiled wrongly for
Hopper by Triton 3.4 to 3.7 (fla-org/flash-linear-attention, issue 640).
"""

import triton
import triton.language as tl

from drl.kernels.triton.tiles import (
    counted, dot, faded, finite, load_tile, of_head, phi, phi_backward, store_tile, within,
)  # fmt: skip


@triton.jit
def states(
    q, mask, restart, out, denominators, d_out, d_kv_after, d_z_after, d_kv_chunks, d_z_chunks,
    d_kv_before, d_z_before,
    q_row, q_token, q_head, T, H, rates,
    N, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE_V: tl.constexpr, MAP: tl.constexpr, MASK: tl.constexpr, RESTART: tl.constexpr, AFTER: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after each chunk, and of the one before the first (BEFORE). The mask only tells at which
    tokens something fades."""
    row_head = tl.program_id(0)
    row, head = (row_head // H).to(tl.int64), row_head % H
    row_head = row_head.to(tl.int64)
    features, values = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    all_values = tl.arange(0, WHOLE_V)
    first_block = tl.program_id(1) == 0
    dtype: tl.constexpr = q.dtype.element_ty
    q += row * q_row + head * q_head
    out += (row * T * H + head) * V
    d_out += (row * T * H + head) * V
    denominators += row_head * T
    square = features[:, None] * V + values[None, :]
    in_square = within(features, K)[:, None] & within(values, V)[None, :]

    d_kv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    d_z = tl.zeros((BLOCK_K,), tl.float32)
    if AFTER:
        d_kv = tl.load(d_kv_after + row_head * K * V + square, mask=in_square, other=0.0)
        d_z = tl.load(d_z_after + row_head * K + features, mask=within(features, K), other=0.0)
    rate = None if rates is None else of_head(rates, head)
    i = tl.arange(0, C)
    for step in range(N):
        n = N - 1 - step
        first = n * C
        chunk = row_head * N + n
        q_CK = load_tile(q, q_token, first, T, features, K, C)
        g_CV = load_tile(d_out, H * V, first, T, values, V, C)
        denominator_C = tl.load(denominators + first + i, mask=first + i < T, other=1.0)
        tl.store(d_kv_chunks + chunk * K * V + square, d_kv, mask=in_square)
        counts = first + i < T
        if MASK and rate is not None:
            counts = counts & (tl.load(mask + row * T + first + i, mask=counts, other=0) != 0)
        p_C, p = counted(counts, rate)
        q_CK = faded(phi(q_CK.to(tl.float32), MAP), rate, p_C[:, None]).to(dtype)
        g_CV = finite(g_CV.to(tl.float32) * (1 / denominator_C)[:, None], dtype)
        d_kv = faded(d_kv, rate, p) + dot(tl.trans(q_CK), g_CV, dtype)
        if first_block:
            tl.store(d_z_chunks + chunk * K + features, d_z, mask=within(features, K))
            whole_g_CV = load_tile(d_out, H * V, first, T, all_values, V, C).to(tl.float32)
            whole_g_CV *= (1 / denominator_C)[:, None]
            out_CV = load_tile(out, H * V, first, T, all_values, V, C).to(tl.float32)
            d_C = -tl.sum(finite(whole_g_CV, dtype).to(tl.float32) * out_CV, axis=1)
            d_z = faded(d_z, rate, p) + tl.sum(q_CK.to(tl.float32) * d_C[:, None], axis=0)
    if BEFORE:
        if RESTART:
            forgets = tl.load(restart + row) != 0
            d_kv, d_z = tl.where(forgets, 0.0, d_kv), tl.where(forgets, 0.0, d_z)
        tl.store(d_kv_before + row_head * K * V + square, d_kv, mask=in_square)
        if first_block:
            tl.store(d_z_before + row_head * K + features, d_z, mask=within(features, K))


@triton.jit
def backward(
    q, k, v, mask, restart, kv_past, z_past, out, denominators, d_out, d_kv_future, d_z_future,
    dq, dk, dv, d_kv_before, d_z_before,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    dq_row, dq_token, dq_head, dk_row, dk_token, dk_head, dv_row, dv_token, dv_head,
    T, H, rates,
    N, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_V: tl.constexpr,
    SPLIT: tl.constexpr, SPLIT_K: tl.constexpr, SPLIT_V: tl.constexpr, MAP: tl.constexpr, MASK: tl.constexpr,
    RESTART: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV of each chunk from the state before it (PAST) and the gradient of that after it (FUTURE).

    RESTART and BEFORE (write the gradient of the state before) are for sequences of one chunk.
    """
    PARTS_K: tl.constexpr = (K + SPLIT_K - 1) // SPLIT_K
    PARTS: tl.constexpr = PARTS_K + (V + SPLIT_V - 1) // SPLIT_V if SPLIT else 1
    # neighbours in time read the same tiles
    part, row_head, n = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS, tl.program_id(1)
    row, head = (row_head // H).to(tl.int64), row_head % H
    row_head = row_head.to(tl.int64)
    chunk = row_head * N + n
    tensors = (
        q + row * q_row + head * q_head,
        k + row * k_row + head * k_head,
        v + row * v_row + head * v_head,
        mask + row * T,
        restart + row,
        kv_past + chunk * K * V,
        z_past + chunk * K,
        out + (row * T * H + head) * V,
        denominators + row_head * T,
        d_out + (row * T * H + head) * V,
        d_kv_future + chunk * K * V,
        d_z_future + chunk * K,
        dq + row * dq_row + head * dq_head,
        dk + row * dk_row + head * dk_head,
        dv + row * dv_row + head * dv_head,
        d_kv_before + row_head * K * V,
        d_z_before + row_head * K,
    )
    strides = (q_token, k_token, v_token, dq_token, dk_token, dv_token)
    rate = None if rates is None else of_head(rates, head)
    if not SPLIT:
        _chunk(tensors, strides, rate, n * C, T, H, 0, 0, K, V, C, WHOLE_K, WHOLE_V, True, True,
               MAP, MASK, RESTART, PAST, FUTURE, BEFORE)
    elif part < PARTS_K:
        _chunk(tensors, strides, rate, n * C, T, H, part * SPLIT_K, 0, K, V, C, SPLIT_K, WHOLE_V, True, False,
               MAP, MASK, RESTART, PAST, FUTURE, BEFORE)
    else:
        _chunk(tensors, strides, rate, n * C, T, H, 0, (part - PARTS_K) * SPLIT_V, K, V, C, WHOLE_K, SPLIT_V, False,
               True, MAP, MASK, RESTART, PAST, FUTURE, BEFORE)


@triton.jit
def _chunk(
    tensors, strides, rate, first, T, H, first_feature, first_value, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, OF_QK: tl.constexpr, OF_V: tl.constexpr, MAP: tl.constexpr,
    MASK: tl.constexpr, RESTART: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """dQ and dK of a block of features (OF_QK, over all values), or dV of a block of values (OF_V, all features)."""
    (
        q, k, v, mask, restart, kv_past, z_past, out, denominators, d_out, d_kv_future, d_z_future,
        dq, dk, dv, d_kv_before, d_z_before,
    ) = tensors  # fmt: skip
    q_token, k_token, v_token, dq_token, dk_token, dv_token = strides
    dtype: tl.constexpr = v.dtype.element_ty
    features, values = first_feature + tl.arange(0, BLOCK_K), first_value + tl.arange(0, BLOCK_V)
    square = features[:, None] * V + values[None, :]
    in_square = within(features, K)[:, None] & within(values, V)[None, :]
    i = tl.arange(0, C)
    live = first + i < T

    # all loads before the first use of any: their latencies then overlap
    q_in = load_tile(q, q_token, first, T, features, K, C)
    k_in = load_tile(k, k_token, first, T, features, K, C)
    g_CV = load_tile(d_out, H * V, first, T, values, V, C)
    denominator_C = tl.load(denominators + first + i, mask=live, other=1.0)
    if OF_QK:
        v_CV = load_tile(v, v_token, first, T, values, V, C)
        out_CV = load_tile(out, H * V, first, T, values, V, C)
        if PAST:
            kv = tl.load(kv_past + square, mask=in_square, other=0.0)
            z = tl.load(z_past + features, mask=within(features, K), other=0.0)
        if FUTURE:
            d_z = tl.load(d_z_future + features, mask=within(features, K), other=0.0)
    if FUTURE:
        d_kv = tl.load(d_kv_future + square, mask=in_square, other=0.0)
    counts = live
    if MASK:
        counts = live & (tl.load(mask + first + i, mask=live, other=0) != 0)
    if RESTART:
        forgets = tl.load(restart) != 0
        if OF_QK and PAST:  # selects: what is forgotten may be anything
            kv, z = tl.where(forgets, 0.0, kv), tl.where(forgets, 0.0, z)

    # rows beyond T have G = 0 and d = 0, so that it does not matter that phi of their zeros is not zero
    SELECT_K: tl.constexpr = MASK or ((BLOCK_K - 1) & K) != 0
    counts_CK = counts[:, None] & within(features, K)[None, :]
    q_in, k_in = q_in.to(tl.float32), k_in.to(tl.float32)
    p_C, p = counted(counts, rate)
    q_CK = phi(q_in, MAP)
    early_q_CK = faded(q_CK, rate, p_C[:, None]).to(dtype)  # as the state before the chunk meets them
    q_CK = q_CK.to(dtype)
    k_CK = phi(k_in, MAP)
    if SELECT_K:
        k_CK = tl.where(counts_CK, k_CK, 0.0)
    k_CK = k_CK.to(dtype)
    g_CV = finite(g_CV.to(tl.float32) * (1 / denominator_C)[:, None], dtype)
    if OF_QK:
        # from the rounded G, as W is: W is a difference of nearly equal numbers
        d_C = -tl.sum(g_CV.to(tl.float32) * out_CV.to(tl.float32), axis=1)
        w_CC = dot(g_CV, tl.trans(v_CV), dtype) + d_C[:, None]
        w_CC = tl.where(i[:, None] >= i[None, :], faded(w_CC, rate, p_C[:, None] - p_C[None, :]), 0.0)
        w_CC_T = dot(v_CV, tl.trans(g_CV), dtype) + d_C[None, :]
        w_CC_T = tl.where(i[:, None] <= i[None, :], faded(w_CC_T, rate, p_C[None, :] - p_C[:, None]), 0.0)
        if MASK and dtype == tl.float16:  # may be infinite where nothing was seen yet, and infinity times zero is NaN
            w_CC = tl.where(counts[None, :], w_CC, 0.0)
            w_CC_T = tl.where(counts[:, None], w_CC_T, 0.0)
        dq_CK = dot(w_CC, k_CK, dtype)
        dk_CK = dot(w_CC_T, q_CK, dtype)
        if PAST:
            d_past_CK = dot(g_CV, tl.trans(kv.to(dtype)), dtype) + d_C[:, None] * z[None, :]
            dq_CK += faded(d_past_CK, rate, p_C[:, None])
        if FUTURE:
            d_future_CK = dot(v_CV, tl.trans(d_kv.to(dtype)), dtype) + d_z[None, :]
            dk_CK += faded(d_future_CK, rate, (p - p_C)[:, None])
        store_tile(dq, dq_token, first, T, features, K, phi_backward(dq_CK, q_in, MAP), C)
        dk_CK = phi_backward(dk_CK, k_in, MAP)
        if MASK:
            dk_CK = tl.where(counts_CK, dk_CK, 0.0)
        store_tile(dk, dk_token, first, T, features, K, dk_CK, C)
        if BEFORE:
            d_z_in = tl.sum(early_q_CK.to(tl.float32) * d_C[:, None], axis=0)
            if FUTURE:
                d_z_in += faded(d_z, rate, p)
            if RESTART:
                d_z_in = tl.where(forgets, 0.0, d_z_in)
            tl.store(d_z_before + features, d_z_in, mask=within(features, K))
    if OF_V:
        between_CC_T = p_C[None, :] - p_C[:, None]
        a_CC_T = tl.where(i[:, None] <= i[None, :], faded(dot(k_CK, tl.trans(q_CK), dtype), rate, between_CC_T), 0.0)
        dv_CV = dot(a_CC_T, g_CV, dtype)
        if FUTURE:
            dv_CV += faded(dot(k_CK, d_kv, dtype), rate, (p - p_C)[:, None])
        store_tile(dv, dv_token, first, T, values, V, dv_CV, C)
        if BEFORE:
            d_kv_in = dot(tl.trans(early_q_CK), g_CV, dtype)
            if FUTURE:
                d_kv_in += faded(d_kv, rate, p)
            if RESTART:
                d_kv_in = tl.where(forgets, 0.0, d_kv_in)
            tl.store(d_kv_before + square, d_kv_in, mask=in_square)
