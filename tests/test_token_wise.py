"""What is done to every token on its own, in one kernel: the same numbers and gradients as the torch operators'."""

import pytest
import torch
import torch.nn.functional as F

from drl.kernels import available_backends, residual_mlp

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter is numpy, which tells of inf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # everything here runs on a GPU where there is one
FUSED = available_backends()["triton"] is None
needs_kernels = pytest.mark.skipif(not FUSED, reason="needs the package triton")
NAMES = ["out", "x", "norm_weight", "norm_bias", "weight_in", "bias_in", "weight_out", "bias_out"]

# Relative L2 error against float64 with products in a dtype, of the output and of each gradient. Worst measured over
# the cases below: 3.0e-7 in float32 and 5.1e-4 in float16, in Triton's interpreter; torch's own operators are 5e-7 away
# in float32.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
PRODUCTS = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])  # bfloat16: not interpreted


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


def random_tensors(*shape: int, D=32, H=128, x_dtype=torch.float32, dtype=torch.float32) -> list[torch.Tensor]:
    """x (*shape, D) away from zero mean and unit variance, and parameters that make all of GELU's range matter."""
    return [
        (torch.randn(*shape, D) * 2 + 0.5).to(x_dtype), 1 + 0.5 * torch.randn(D), torch.randn(D),
        (torch.randn(H, D) * D**-0.5).to(dtype), torch.randn(H),
        (torch.randn(D, H) * H**-0.5).to(dtype), torch.randn(D),
    ]  # fmt: skip


def with_gradients(tensors, **options) -> list[torch.Tensor]:
    """The output, and d loss / d each tensor for a loss that weighs every number of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = residual_mlp(*leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def errors(actual, expected) -> dict[str, float]:
    return {
        name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(NAMES, actual, expected, strict=True)
    }


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# The numbers


def test_torch_does_what_the_layers_do():
    x, *parameters = random_tensors(2, 3, dtype=torch.float32)
    norm, (inner, outer) = torch.nn.LayerNorm(32), (torch.nn.Linear(32, 128), torch.nn.Linear(128, 32))
    with torch.no_grad():
        for old, new in zip([*norm.parameters(), *inner.parameters(), *outer.parameters()], parameters, strict=True):
            old.copy_(new)

    assert_same(residual_mlp(x, *parameters, backend="torch"), x + outer(F.gelu(inner(norm(x)))))


@needs_kernels
@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (33,), (2, 3, 11), (100,)])  # below, at and above a block
def test_output_and_gradients_are_those_of_float64(shape, dtype):
    tensors = random_tensors(*shape, dtype=dtype)

    actual = with_gradients(tensors, backend="triton")

    assert [x.dtype for x in actual[1:]] == [x.dtype for x in tensors]
    worst = errors(actual, with_gradients([x.double() for x in tensors]))
    assert max(worst.values()) <= TOLERANCE[dtype], worst


@needs_kernels
@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize(("D", "H"), [(16, 64), (64, 192), (128, 512), (256, 64)])
def test_every_width_and_any_multiple_of_64_units(D, H, dtype):
    tensors = random_tensors(21, D=D, H=H, dtype=dtype)

    worst = errors(with_gradients(tensors, backend="triton"), with_gradients([x.double() for x in tensors]))

    assert max(worst.values()) <= TOLERANCE[dtype], worst


@needs_kernels
def test_more_tokens_than_one_small_block_each(monkeypatch):
    """What is chosen for many tokens, at few."""
    monkeypatch.setattr("drl.kernels.triton.token_wise_launch.FEW", 0)
    tensors = random_tensors(70, dtype=torch.float16)
    worst = errors(with_gradients(tensors, backend="triton"), with_gradients([x.double() for x in tensors]))
    assert max(worst.values()) <= TOLERANCE[torch.float16], worst


@needs_kernels
@pytest.mark.parametrize("dtype", PRODUCTS[1:])
def test_a_stream_in_half_precision_stays_in_it(dtype):
    tensors = random_tensors(40, x_dtype=dtype, dtype=dtype)

    actual = with_gradients(tensors, backend="triton")

    assert [x.dtype for x in actual] == [dtype] + [x.dtype for x in tensors]
    worst = errors(actual, with_gradients([x.double() for x in tensors]))
    assert max(worst.values()) <= TOLERANCE[dtype], worst


@needs_kernels
def test_every_parameter_may_be_in_half_precision():
    dtype = PRODUCTS[-1]
    tensors = [x.to(dtype) for x in random_tensors(40)]

    actual = with_gradients(tensors, backend="triton")

    assert {x.dtype for x in actual} == {dtype}
    worst = errors(actual, with_gradients([x.double() for x in tensors]))
    assert max(worst.values()) <= TOLERANCE[dtype], worst


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gelu_and_its_slope_everywhere(dtype):
    """A norm of zeros leaves the first layer's bias alone, and identities let it through.

    The bounds are those of the float16 kernels' polynomial; there the result, but not the slope, is rounded too.
    """
    argument = torch.cat([torch.linspace(-8, 8, 62), torch.tensor([-60.0, 60.0])])

    def value_and_slope(kind, product, backend):
        x, zero, one = torch.zeros(1, 64, dtype=kind), torch.zeros(64, dtype=kind), torch.eye(64, dtype=product)
        bias = argument.to(kind).requires_grad_()
        value = residual_mlp(x, zero, zero, one, bias, one, zero, backend=backend)[0]
        return value.double(), torch.autograd.grad(value.sum(), bias)[0].double()

    value, slope = value_and_slope(torch.float32, dtype, "triton")
    expected_value, expected_slope = value_and_slope(torch.float64, torch.float64, "torch")

    torch.testing.assert_close(value, expected_value, rtol=2**-11 if dtype == torch.float16 else 1e-6, atol=1.2e-6)
    torch.testing.assert_close(slope, expected_slope, rtol=0, atol=1e-6)


# What surrounds the numbers


@needs_kernels
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_the_same_bits_every_time(dtype):
    tensors = random_tensors(70, dtype=dtype)
    first = with_gradients(tensors, backend="triton")
    for _ in range(3):
        assert_same(with_gradients(tensors, backend="triton"), first)


@needs_kernels
def test_no_token_sees_another():
    """In its place, since numpy, by which Triton's interpreter multiplies, may add up the rows of a block unlike."""
    tensors = random_tensors(40)
    before = residual_mlp(*tensors, backend="triton")[7:8]
    tensors[0][:7], tensors[0][8:] = torch.nan, 3e38
    assert_same(residual_mlp(*tensors, backend="triton")[7:8], before)


@needs_kernels
def test_tensors_need_not_be_contiguous():
    tensors = random_tensors(40)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in tensors]
    assert not any(x.is_contiguous() for x in strided)
    assert_same(with_gradients(strided, backend="triton"), with_gradients(tensors, backend="triton"))


@needs_kernels
def test_no_token_is_no_mistake():
    tensors = random_tensors(0)
    out, d_x, *others = with_gradients(tensors, backend="triton")
    assert out.shape == d_x.shape == (0, 32) and all((x == 0).all() for x in others)


@needs_kernels
def test_it_is_an_operator_that_torch_knows():
    tensors = [x.requires_grad_() for x in random_tensors(20)]
    torch.library.opcheck(torch.ops.drl.residual_mlp.default, (*tensors, 1e-5))


@needs_kernels
def test_torch_compile_sees_through():
    tensors = [x.requires_grad_() for x in random_tensors(20)]
    compiled = torch.compile(lambda *x: residual_mlp(*x, backend="triton") * 2, fullgraph=True, backend="aot_eager")

    out, expected = compiled(*tensors), residual_mlp(*tensors, backend="triton") * 2

    assert_same(out, expected)
    assert_same(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors))


@needs_kernels
def test_under_autocast_products_are_in_its_dtype_and_the_stream_is_not():
    """In float16, which the interpreter multiplies rightly."""
    tensors = random_tensors(20)
    rounded = [x.half() if i in (3, 5) else x for i, x in enumerate(tensors)]
    with torch.autocast(DEVICE, torch.float16):
        actual = with_gradients(tensors, backend="triton")

    expected = with_gradients(rounded, backend="triton")
    assert {x.dtype for x in actual} == {torch.float32}
    assert_same(actual, [x.float() for x in expected])


# The contract


def changed(**changes) -> dict:
    tensors = dict(zip(NAMES[1:], random_tensors(4), strict=True))
    return tensors | changes


MISTAKES = {
    "x of another width": ({"x": torch.zeros(4, 16)}, r"norm_weight must have shape \(16,\), got \(32,\)"),
    "a norm of another width": ({"norm_bias": torch.zeros(31)}, r"norm_bias must have shape \(32,\), got \(31,\)"),
    "weight_out transposed": (
        {"weight_out": torch.zeros(128, 32)}, r"weight_out must have shape \(32, 128\), got \(128, 32\)"
    ),
    "a bias for another layer": ({"bias_in": torch.zeros(32)}, r"bias_in must have shape \(128,\), got \(32,\)"),
    "weight_in of one dimension": (
        {"weight_in": torch.zeros(32)}, r"x must be \(..., D\) and weight_in \(H, D\), got \(4, 32\) and \(32,\)"
    ),
    "two devices": (
        {"bias_out": torch.zeros(32, device="meta")}, f"bias_out must be on {DEVICE}.*, as x is, got meta"
    ),
    "unknown backend": ({"backend": "fused"}, "unknown backend 'fused'; expected one of auto, torch, triton"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_what_was_expected_and_what_came(mistake):
    changes, message = MISTAKES[mistake]
    changes = {  # made where no device was chosen yet
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for name, x in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        residual_mlp(**changed(**changes))


@needs_kernels
@pytest.mark.parametrize(
    ("D", "H", "dtype", "message"),
    [
        (24, 64, torch.float32, "takes a width of 16, 32, 64, 128, 256 and multiples of 64 hidden units, got 24 and 6"),
        (32, 80, torch.float32, "takes a width of .*, got 32 and 80; use 'torch'"),
        (32, 64, torch.float64, "takes float32, bfloat16 and float16, got torch.float64; use 'torch'"),
    ],
)
def test_what_the_kernels_do_not_take_torch_does(D, H, dtype, message):
    tensors = [x.to(dtype) for x in random_tensors(4, D=D, H=H)]
    with pytest.raises(ValueError, match=message):
        residual_mlp(*tensors, backend="triton")
    assert_same(residual_mlp(*tensors), residual_mlp(*tensors, backend="torch"))


@needs_kernels
def test_left_to_itself_it_fuses_in_half_precision_on_a_gpu_alone(monkeypatch):
    fused = []
    launch = "drl.kernels.triton.token_wise_launch.residual_mlp"
    monkeypatch.setattr(launch, lambda x, *_: fused.append(x.dtype) or x.clone())
    tensors = random_tensors(4)

    residual_mlp(*tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        residual_mlp(*tensors)

    assert fused == ([torch.float32] if DEVICE == "cuda" else [])


def test_models_side_by_side_have_what_each_has_alone():
    several = [random_tensors(2, 3) for _ in range(3)]
    wide = [torch.stack(parts).repeat(1, 2, *[1] * (parts[0].ndim - 1)) for parts in zip(*several, strict=True)]
    # rows that are not dense, as those of models that train together are
    leaves = [part[:, : part.shape[1] // 2].detach().requires_grad_() for part in wide]
    weights = torch.randn(2, 3, 32, generator=torch.Generator(DEVICE).manual_seed(1))  # as with_gradients has them

    together = torch.vmap(lambda *tensors: residual_mlp(*tensors, backend="triton"))(*leaves)

    actual = [together, *torch.autograd.grad(together, leaves, weights.expand(3, -1, -1, -1))]
    for row, tensors in enumerate(several):
        expected = with_gradients(tensors, backend="triton")
        torch.testing.assert_close([part[row].detach() for part in actual], expected, rtol=1e-4, atol=1e-4)
