"""The compiled operator against float64, beyond what tests/test_kernels.py asks of every backend: gradients, dtypes,
threads, and what torch has to know of it. No dimension is a multiple of a vector's, but in WHOLE."""

import pytest
import torch
from torch.library import opcheck

from drl.kernels import (
    FEATURE_MAPS,
    LinearAttentionState,
    available_backends,
    linear_attention,
    linear_attention_packed,
)
from drl.kernels.cpu import attention, instruction_sets

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason=str(available_backends()["cpu"]))

ODD, WHOLE, WIDE = (2, 3, 5, 7), (2, 2, 32, 32), (1, 1, 37, 130)  # B, H, K, V
LENGTHS = [1, 15, 16, 60, 64, 65, 131]
# On `error` of outputs, states and gradients against float64 on the same numbers. Worst of all cases below: 1.9e-7, and
# 1.6e-3 in bfloat16, which rounds by up to 2^-9.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def inputs(T, sizes, past, generator=None):
    B, H, K, V = sizes
    values = [torch.randn(B, T, H, size, generator=generator) for size in (K, K, V)]
    return values + ([torch.randn(B, H, K, V), torch.rand(B, H, K) * K] if past else [])


def answers(tensors, backend, **options):
    """Output, state and gradients of all that goes in, for a loss that weighs every number of output and state."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    state = LinearAttentionState(*leaves[3:]) if len(leaves) > 3 else None
    out, after = linear_attention(*leaves[:3], state, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in (out, *after))
    return [x.detach() for x in (out, *after, *torch.autograd.grad(loss, leaves))]


def error(actual, expected) -> float:
    """By norms, as if every expected number were larger by 1: the gradient of q is 0 where one token is seen."""
    return ((actual.double() - expected).norm() / (expected.norm() + expected.numel() ** 0.5)).item()


@pytest.mark.parametrize("instruction_set", [] if available_backends()["cpu"] else instruction_sets()[1:])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("T", "sizes"), [(67, ODD), (60, WHOLE)])
def test_every_instruction_set_gives_these_numbers(T, sizes, dtype, instruction_set, monkeypatch):
    monkeypatch.setattr(attention, "INSTRUCTION_SET", instruction_set.encode())
    test_numbers_and_gradients_are_those_of_float64(T, sizes, dtype, True)


@pytest.mark.parametrize("past", [False, True], ids=["from nothing", "from a state"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("T", "sizes"), [*((T, ODD) for T in LENGTHS), (60, WHOLE), (67, WIDE)])
def test_numbers_and_gradients_are_those_of_float64(T, sizes, dtype, past):
    given = inputs(T, sizes, past)
    given[:3] = (x.to(dtype) for x in given[:3])
    options = {"mask": torch.rand(sizes[0], T) < 0.7, "restart": torch.arange(sizes[0]) == 1}
    options["mask"][:, 0] = True  # a token that sees nothing divides by eps

    expected = answers([x.double() for x in given], "reference", **options)

    for actual, right in zip(answers(given, "cpu", **options), expected, strict=True):
        assert error(actual, right) < TOLERANCE[dtype]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_pass_every_feature_map(feature_map):
    given = inputs(19, ODD, past=True)
    given[0] = given[0].abs() + 1  # keeps identity's denominator away from zero
    given[1] = given[1].abs() + 1
    expected = answers([x.double() for x in given], "reference", feature_map=feature_map)
    for actual, right in zip(answers(given, "cpu", feature_map=feature_map), expected, strict=True):
        assert error(actual, right) < TOLERANCE[torch.float32]


def test_auto_takes_it_for_what_it_can_compute():
    for dtype, backend in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "chunked")):
        given = [x.to(dtype) for x in inputs(60, ODD, past=False)]
        for actual, right in zip(answers(given, "auto"), answers(given, backend), strict=True):
            assert torch.equal(actual, right)


def test_a_dtype_that_it_lacks_is_refused():
    given = [x.double() for x in inputs(3, ODD, past=False)]
    with pytest.raises(ValueError, match="backend 'cpu' is unavailable: takes float32 and bfloat16, got torch.float64"):
        linear_attention(*given, backend="cpu")


def test_numbers_do_not_depend_on_threads_nor_on_the_other_rows():
    B, H, K, V = 7, 3, 32, 32
    given, threads = inputs(60, (B, H, K, V), past=True), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(answers(given, "cpu"))
    finally:
        torch.set_num_threads(threads)
    out, after = linear_attention(*(x[3:4] for x in given[:3]), LinearAttentionState(*(x[3:4] for x in given[3:])))

    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    for alone, among in zip((out, *after), results[0], strict=False):
        assert torch.equal(alone, among[3:4])


def test_numbers_that_lie_anywhere_are_read_where_they_lie():
    given = inputs(20, ODD, past=False)
    expected = answers(given, "cpu")
    strided = [x.transpose(0, 3).contiguous().transpose(0, 3) for x in given]  # the last axis is not dense
    assert all(torch.equal(*pair) for pair in zip(answers(strided, "cpu"), expected, strict=True))


def test_the_operators_are_what_they_tell_torch():
    B, T, H, K = 2, 5, 2, 3
    packed, parts = torch.randn(B, T, 3, H, K), [torch.randn(B, T, H, K) for _ in range(3)]
    state, mask = (torch.randn(B, H, K, K), torch.rand(B, H, K)), torch.rand(B, T) < 0.6
    restart = torch.tensor([True, False])
    for past in (state, (None, None)):
        leaves = [x.clone().requires_grad_() for x in (*parts, packed)]
        opcheck(attention._attend, (*leaves[:3], *past, mask, restart, "elu1", 1e-6))
        opcheck(attention._attend_packed, (leaves[3], *past, mask, restart, "elu1", 1e-6))
    out, *after = attention._attend(*parts, *state, None, None, "elu1", 1e-6)
    checks = ("test_schema", "test_faketensor")  # neither has a gradient of its own
    for wanted in (True, False):
        rest = (*state, None, None, out, torch.randn_like(out), *after, "elu1", 1e-6, wanted)
        opcheck(attention._attend_backward, (*parts, *rest), test_utils=checks)
        opcheck(attention._attend_packed_backward, (packed, *rest), test_utils=checks)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_torch_compile_sees_one_graph(backend):
    packed = torch.randn(2, 5, 3, 2, 4)
    operator = torch.compile(lambda x: linear_attention_packed(x, backend=backend)[0] * 2, fullgraph=True,
                             backend="aot_eager")
    assert torch.equal(operator(packed), linear_attention_packed(packed, backend=backend)[0] * 2)


def test_only_the_output_of_a_packed_projection_has_to_be_used():
    packed = torch.randn(2, 9, 3, 2, 5)
    results = []
    for backend in ("cpu", "chunked"):
        leaf = packed.clone().requires_grad_()
        out, _ = linear_attention_packed(leaf, backend=backend)
        results.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
