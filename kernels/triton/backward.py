"""Backward: from the last chunk to the first, with the gradient of the state in registers (docs/mathematics.md).

    G = dO / n        d = -rowsum(G * O)        W = tril(G V^T + d 1^T)        A = tril(Q K^T)
    dQ = W K + G S^T + d z^T    dK = W^T Q + V dS^T + 1 dz^T    dV = A^T G + K dS    dS += Q^T G    dz += Q^T d

S and z before a chunk are those that the forward kept. Heads of up to 64 features and values take one program each.
Wider ones are split: some programs take a block of features and give that of dQ and dK, others a block of values and
give that of dV. Nothing is summed between programs, so the result is the same bit for bit each time.

W^T, A^T and dS^T are computed as such, never by transposing a product: Triton 3.4 to 3.7 compiles that wrongly on
Hopper (fla-org/flash-linear-attention, issue 640).
"""

import triton
import triton.language as tl

from drl.kernels.triton.tiles import dot, load_tile, phi, phi_backward, store_tile, within


@triton.jit
def backward(
    q, k, v, mask, restart, kv_before, z_before, out, denominators, kv_chunks, z_chunks,
    d_out, d_kv_after, d_z_after,
    dq, dk, dv, d_kv_before, d_z_before,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    dq_row, dq_token, dq_head, dk_row, dk_token, dk_head, dv_row, dv_token, dv_head,
    T, H,
    N, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_V: tl.constexpr, SPLIT_K: tl.constexpr, SPLIT_V: tl.constexpr,
    MAP: tl.constexpr, MASK: tl.constexpr, RESTART: tl.constexpr, STATE: tl.constexpr, STATE_AFTER: tl.constexpr,
    STATE_GRADIENT: tl.constexpr, ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    row_head = tl.program_id(0)
    row, head = (row_head // H).to(tl.int64), row_head % H
    row_head = row_head.to(tl.int64)
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    dq += row * dq_row + head * dq_head
    dk += row * dk_row + head * dk_head
    dv += row * dv_row + head * dv_head
    out += (row * T * H + head) * V
    d_out += (row * T * H + head) * V
    mask += row * T
    denominators += row_head * T
    goes_on = True
    if RESTART:
        goes_on = tl.load(restart + row) == 0
    tensors = (
        q, k, v, mask, kv_before, z_before, out, denominators, kv_chunks, z_chunks, d_out, d_kv_after, d_z_after,
        dq, dk, dv, d_kv_before, d_z_before,
    )  # fmt: skip
    strides = (q_token, k_token, v_token, dq_token, dk_token, dv_token)
    sizes = (T, H, N)
    part, PARTS_K = tl.program_id(1), WHOLE_K // SPLIT_K
    if SPLIT_K == WHOLE_K and SPLIT_V == WHOLE_V:
        _sweep(tensors, strides, sizes, row_head, goes_on, 0, 0, K, V, C, WHOLE_K, WHOLE_V, True, True,
               MAP, MASK, STATE, STATE_AFTER, STATE_GRADIENT, ONE_CHUNK)
    elif part < PARTS_K:
        _sweep(tensors, strides, sizes, row_head, goes_on, part * SPLIT_K, 0, K, V, C, SPLIT_K, WHOLE_V, True, False,
               MAP, MASK, STATE, STATE_AFTER, STATE_GRADIENT, ONE_CHUNK)
    else:
        _sweep(tensors, strides, sizes, row_head, goes_on, 0, (part - PARTS_K) * SPLIT_V, K, V, C, WHOLE_K, SPLIT_V, False,
               True, MAP, MASK, STATE, STATE_AFTER, STATE_GRADIENT, ONE_CHUNK)


@triton.jit
def _sweep(
    tensors, strides, sizes, row_head, goes_on, first_feature, first_value, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, OF_QK: tl.constexpr, OF_V: tl.constexpr, MAP: tl.constexpr, MASK: tl.constexpr,
    STATE: tl.constexpr, STATE_AFTER: tl.constexpr, STATE_GRADIENT: tl.constexpr, ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """dQ and dK of a block of features (OF_QK, over all values), or dV of a block of values (OF_V, all features)."""
    (
        q, k, v, mask, kv_before, z_before, out, denominators, kv_chunks, z_chunks, d_out, d_kv_after, d_z_after,
        dq, dk, dv, d_kv_before, d_z_before,
    ) = tensors  # fmt: skip
    q_token, k_token, v_token, dq_token, dk_token, dv_token = strides
    T, H, N = sizes
    dtype: tl.constexpr = v.dtype.element_ty
    features, values = first_feature + tl.arange(0, BLOCK_K), first_value + tl.arange(0, BLOCK_V)
    square = features[:, None] * V + values[None, :]
    square_T = values[:, None] + features[None, :] * V
    in_square = within(features, K)[:, None] & within(values, V)[None, :]
    in_square_T = within(values, V)[:, None] & within(features, K)[None, :]
    CARRIES: tl.constexpr = STATE_AFTER or not ONE_CHUNK

    d_kv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    d_kv_T = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    d_z = tl.zeros((BLOCK_K,), tl.float32)
    if STATE_AFTER:
        d_kv = tl.load(d_kv_after + row_head * K * V + square, mask=in_square, other=0.0)
        d_kv_T = tl.load(d_kv_after + row_head * K * V + square_T, mask=in_square_T, other=0.0)
        d_z = tl.load(d_z_after + row_head * K + features, mask=within(features, K), other=0.0)

    i = tl.arange(0, C)
    for step in range(N):
        n = N - 1 - step
        first = n * C
        live = first + i < T
        counts = live
        if MASK:
            counts = counts & (tl.load(mask + first + i, mask=live, other=0) != 0)
        counts_CK = counts[:, None] & within(features, K)[None, :]
        q_in = load_tile(q, q_token, first, T, features, K, tl.float32, C)
        k_in = load_tile(k, k_token, first, T, features, K, tl.float32, C)
        q_CK = tl.where(live[:, None] & within(features, K)[None, :], phi(q_in, MAP), 0.0).to(dtype)
        k_CK = tl.where(counts_CK, phi(k_in, MAP), 0.0).to(dtype)
        denominator_C = tl.load(denominators + first + i, mask=live, other=1.0)
        d_out_CV = load_tile(d_out, H * V, first, T, values, V, tl.float32, C) / denominator_C[:, None]
        g_CV = d_out_CV.to(dtype)

        if OF_QK:
            v_CV = load_tile(v, v_token, first, T, values, V, dtype, C)
            d_C = -tl.sum(d_out_CV * load_tile(out, H * V, first, T, values, V, tl.float32, C), axis=1)
            w_CC = tl.where(i[:, None] >= i[None, :], dot(g_CV, tl.trans(v_CV), dtype) + d_C[:, None], 0.0)
            w_CC_T = tl.where(i[:, None] <= i[None, :], dot(v_CV, tl.trans(g_CV), dtype) + d_C[None, :], 0.0)
            dq_CK = dot(w_CC, k_CK, dtype)
            dk_CK = dot(w_CC_T, q_CK, dtype)
            if not ONE_CHUNK:
                chunk = row_head * N + n
                kv_T = tl.load(kv_chunks + chunk * K * V + square_T, mask=in_square_T, other=0.0)
                z = tl.load(z_chunks + chunk * K + features, mask=within(features, K), other=0.0)
                dq_CK += dot(g_CV, kv_T, dtype) + d_C[:, None] * z[None, :]
            elif STATE:
                kv_T = tl.load(kv_before + row_head * K * V + square_T, mask=in_square_T & goes_on, other=0.0)
                z = tl.load(z_before + row_head * K + features, mask=within(features, K) & goes_on, other=0.0)
                dq_CK += dot(g_CV, kv_T, dtype) + d_C[:, None] * z[None, :]
            if CARRIES:
                dk_CK += dot(v_CV, d_kv_T, dtype) + d_z[None, :]
            store_tile(dq, dq_token, first, T, features, K, phi_backward(dq_CK, q_in, MAP), C)
            # selects: a masked key may be anything
            dk_CK = tl.where(counts_CK, phi_backward(dk_CK, k_in, MAP), 0.0)
            store_tile(dk, dk_token, first, T, features, K, dk_CK, C)
            d_z += tl.sum(q_CK.to(tl.float32) * d_C[:, None], axis=0)
            if not ONE_CHUNK:
                d_kv_T += dot(tl.trans(g_CV), q_CK, dtype)
        if OF_V:
            a_CC_T = tl.where(i[:, None] <= i[None, :], dot(k_CK, tl.trans(q_CK), dtype), 0.0)
            dv_CV = dot(a_CC_T, g_CV, dtype)
            if CARRIES:
                dv_CV += dot(k_CK, d_kv, dtype)
            store_tile(dv, dv_token, first, T, values, V, dv_CV, C)
            if STATE_GRADIENT or not ONE_CHUNK:
                d_kv += dot(tl.trans(q_CK), g_CV, dtype)

    if STATE_GRADIENT:
        if OF_V:
            d_kv = tl.where(goes_on, d_kv, 0.0)
            tl.store(d_kv_before + row_head * K * V + square, d_kv, mask=in_square)
        if OF_QK:
            d_z = tl.where(goes_on, d_z, 0.0)
            tl.store(d_z_before + row_head * K + features, d_z, mask=within(features, K))
