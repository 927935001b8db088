"""What the kernels share: addresses of tiles, phi and its derivative, fading, products with a stated precision.

Dimension key of the kernels: C tokens of a chunk, K features, V values; a tile may be a block of the last two.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    base, stride, first, last, columns, WIDTH: tl.constexpr, C: tl.constexpr, CACHE: tl.constexpr = tl.constexpr("")
):
    """Rows first .. first + C of a matrix at `base`, zeros beyond row `last` and column WIDTH.

    CACHE is tl.load's eviction_policy. Two loads of a tile that differ in it stay two: the compiler merges equal ones,
    and what they loaded then fills registers in between.
    """
    base += tl.cast(first, tl.int64) * stride
    rows = tl.arange(0, C)
    inside = (first + rows < last)[:, None] & within(columns, WIDTH)[None, :]
    at = base + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy=CACHE)


@triton.jit
def store_tile(base, stride, first, last, columns, WIDTH: tl.constexpr, values, C: tl.constexpr):
    """The inverse of load_tile: nothing is written outside."""
    base += tl.cast(first, tl.int64) * stride
    rows = tl.arange(0, C)
    inside = (first + rows < last)[:, None] & within(columns, WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def within(columns, WIDTH: tl.constexpr):
    """Which columns of a block are there. Blocks (powers of two) that divide the width are full: no mask is left."""
    if ((columns.shape[0] - 1) & WIDTH) == 0:
        return tl.full(columns.shape, True, tl.int1)
    else:
        return columns < WIDTH


@triton.jit
def phi(x, MAP: tl.constexpr):
    """The feature map, of float32."""
    if MAP == "elu1":
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def phi_backward(gradient, x, MAP: tl.constexpr):
    """Gradient before the feature map from the gradient after it; x as it was before."""
    if MAP == "elu1":
        gradient = tl.where(x > 0, gradient, gradient * tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "relu":
        gradient = tl.where(x > 0, gradient, 0.0)
    return gradient


@triton.jit
def of_head(numbers, head):
    """A head's own of a tuple of numbers, one for each head. They are arguments of a kernel: no memory is read, and
    other numbers need no other kernel."""
    number = numbers[0]
    for other in tl.static_range(1, len(numbers)):
        number = tl.where(head == other, numbers[other], number)
    return number


@triton.jit
def counted(counts_C, rate):
    """How many tokens of a chunk count, up to each and in all: float32, whose product with a rate is rounded once.
    Nothing that is used where nothing fades (rate None)."""
    p_C = counts_C.to(tl.int32)
    if rate is not None:
        p_C = tl.cumsum(p_C, axis=0)
    return p_C.to(tl.float32), tl.max(p_C, axis=0).to(tl.float32)


@triton.jit
def faded(x, rate, tokens):
    """What is left of x after so many tokens, at each of which `rate` bits are forgotten; None: all. After fewer than
    none all is left: nothing may overflow where zeros will replace the future."""
    if rate is not None:
        x = x * tl.exp2(-rate * tl.maximum(tokens, 0.0))
    return x


@triton.jit
def dot(a, b, dtype: tl.constexpr):
    """a @ b in float32, of operands rounded to `dtype`; float32 operands are multiplied exactly, never as TF32."""
    return tl.dot(a.to(dtype), b.to(dtype), input_precision="ieee")


@triton.jit
def finite(x, dtype: tl.constexpr):
    """float32 rounded to `dtype`; what float16 cannot hold becomes its largest number, since infinity times the zero of
    a token that does not count would be NaN."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)
