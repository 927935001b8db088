"""The second half of a transformer's layer, x + W_out gelu(W_in norm(x) + b_in) + b_out, one block of tokens at a time.

Every token is on its own, so a program takes a few of them from x to the result; what lies between, four times as wide
as x, is made and used up block by block and never leaves the chip. Dimension key: M tokens, D width, H a block of
hidden units.
"""

import triton
import triton.language as tl

from drl.kernels.triton.tiles import dot, load_tile, store_tile


@triton.jit
def forward(
    x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, out, tokens, eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = weight_in.dtype.element_ty
    first = tl.program_id(0) * BLOCK_M
    columns = tl.arange(0, D)
    x_MD = load_tile(x, D, first, tokens, columns, D, BLOCK_M, CACHE="evict_last").to(tl.float32)
    mean_M1, scale_M1 = statistics(x_MD, eps, D)
    read_MD = affine((x_MD - mean_M1) * scale_M1, norm_weight, norm_bias, columns).to(dtype)

    sum_MD = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        units = start + tl.arange(0, BLOCK_H)
        weight_in_HD = tl.load(weight_in + units[:, None] * D + columns[None, :])
        weight_out_DH = tl.load(weight_out + columns[:, None] * HIDDEN + units[None, :])
        before_MH = dot(read_MD, tl.trans(weight_in_HD), dtype) + tl.load(bias_in + units).to(tl.float32)[None, :]
        hidden_MH, _ = gelu(before_MH, dtype)
        sum_MD += dot(hidden_MH, tl.trans(weight_out_DH), dtype)

    sum_MD += tl.load(bias_out + columns).to(tl.float32)[None, :]
    # read again, from the cache: kept, x would fill half the registers meanwhile
    sum_MD += load_tile(x, D, first, tokens, columns, D, BLOCK_M, CACHE="evict_first").to(tl.float32)
    store_tile(out, D, first, tokens, columns, D, sum_MD, BLOCK_M)


@triton.jit
def backward(
    x, norm_weight, norm_bias, weight_in, bias_in, weight_out, d_out,
    d_x, read, d_out_rounded, hidden, d_hidden, d_vectors, tokens, eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """d_x, and the factors of the weights' gradients: what each of the two layers read, and the gradient after it.

    d_vectors (programs, HIDDEN + 3 D): this block's share in the gradients of bias_in, bias_out and of the norm's
    weight and bias. ROUND: d_out comes in another dtype than the products', which d_out_rounded then has.
    """
    dtype: tl.constexpr = weight_in.dtype.element_ty
    first = tl.program_id(0) * BLOCK_M
    columns = tl.arange(0, D)
    d_vectors += tl.program_id(0).to(tl.int64) * (HIDDEN + 3 * D)
    x_MD = load_tile(x, D, first, tokens, columns, D, BLOCK_M, CACHE="evict_last").to(tl.float32)
    mean_M1, scale_M1 = statistics(x_MD, eps, D)
    read_MD = affine((x_MD - mean_M1) * scale_M1, norm_weight, norm_bias, columns).to(dtype)
    store_tile(read, D, first, tokens, columns, D, read_MD, BLOCK_M)
    d_out_MD = load_tile(d_out, D, first, tokens, columns, D, BLOCK_M, CACHE="evict_last").to(tl.float32)
    tl.store(d_vectors + HIDDEN + columns, tl.sum(d_out_MD, axis=0))
    d_out_MD = d_out_MD.to(dtype)
    if ROUND:
        store_tile(d_out_rounded, D, first, tokens, columns, D, d_out_MD, BLOCK_M)

    d_read_MD = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        units = start + tl.arange(0, BLOCK_H)
        weight_in_HD = tl.load(weight_in + units[:, None] * D + columns[None, :])
        weight_out_DH = tl.load(weight_out + columns[:, None] * HIDDEN + units[None, :])
        before_MH = dot(read_MD, tl.trans(weight_in_HD), dtype) + tl.load(bias_in + units).to(tl.float32)[None, :]
        hidden_MH, slope_MH = gelu(before_MH, dtype)
        d_before_MH = dot(d_out_MD, weight_out_DH, dtype) * slope_MH  # zero beyond the last token, as d_out is
        store_tile(hidden, HIDDEN, first, tokens, units, HIDDEN, hidden_MH, BLOCK_M)
        store_tile(d_hidden, HIDDEN, first, tokens, units, HIDDEN, d_before_MH, BLOCK_M)
        tl.store(d_vectors + units, tl.sum(d_before_MH, axis=0))
        d_read_MD += dot(d_before_MH, weight_in_HD, dtype)

    # read again, as in forward
    x_MD = load_tile(x, D, first, tokens, columns, D, BLOCK_M, CACHE="evict_first").to(tl.float32)
    normal_MD = (x_MD - mean_M1) * scale_M1
    tl.store(d_vectors + HIDDEN + D + columns, tl.sum(d_read_MD * normal_MD, axis=0))
    tl.store(d_vectors + HIDDEN + 2 * D + columns, tl.sum(d_read_MD, axis=0))
    d_read_MD *= tl.load(norm_weight + columns).to(tl.float32)[None, :]
    d_x_MD = statistics_backward(d_read_MD, normal_MD, scale_M1, D)
    d_x_MD += load_tile(d_out, D, first, tokens, columns, D, BLOCK_M, CACHE="evict_first").to(tl.float32)
    store_tile(d_x, D, first, tokens, columns, D, d_x_MD, BLOCK_M)


@triton.jit
def statistics(x_MD, eps, D: tl.constexpr):
    """Each token's mean and the reciprocal of its standard deviation, (M, 1)."""
    mean_M1 = tl.sum(x_MD, axis=1)[:, None] / D
    centred_MD = x_MD - mean_M1
    return mean_M1, tl.rsqrt(tl.sum(centred_MD * centred_MD, axis=1)[:, None] / D + eps)


@triton.jit
def statistics_backward(d_normal_MD, normal_MD, scale_M1, D: tl.constexpr):
    """Gradient of x from that of normal = (x - mean) * scale: without its parts along 1 and along normal."""
    along_one_M1 = tl.sum(d_normal_MD, axis=1)[:, None] / D
    along_normal_M1 = tl.sum(d_normal_MD * normal_MD, axis=1)[:, None] / D
    return (d_normal_MD - along_one_M1 - normal_MD * along_normal_M1) * scale_M1


@triton.jit
def affine(normal_MD, weight, bias, columns):
    """The norm's own weight and bias."""
    weight_D, bias_D = tl.load(weight + columns).to(tl.float32), tl.load(bias + columns).to(tl.float32)
    return normal_MD * weight_D[None, :] + bias_D[None, :]


@triton.jit
def gelu(x, dtype: tl.constexpr):
    """x Phi(x), and its derivative Phi(x) + x phi(x), of float32; Phi is the normal distribution's.

    For products in fewer than 24 bits Phi(-|x|) is 2 to a polynomial, a third of the work of erf: within 3.5e-7 of Phi
    everywhere and 1.1e-6 of x Phi(x), a relative 6e-5 down to x = -3. Least maximum of |2^P - Phi|, P(0) = -1 held.
    """
    density = tl.exp2(x * x * -0.7213475204444817) * 0.3989422804014327
    if dtype == tl.float32:
        upper = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * upper, upper + x * density
    size = tl.abs(x)
    power = -0.00052044867 * size + 0.0073974645
    power = power * size - 0.052561168
    power = power * size - 0.45925471
    power = power * size - 1.1510913
    tail = tl.exp2(power * size - 1)
    return tl.maximum(x, 0.0) - size * tail, tl.where(x > 0, 1 - tail, tail) + x * density
