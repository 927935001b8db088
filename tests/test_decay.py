"""A past that fades: every backend gives what the recurrence gives, whose numbers here are also made by hand.

Tolerances are those of tests/test_kernels.py: what weighs keys and queries adds rounding, not drift.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from test_kernels import (
    BACKENDS,
    DEVICE,
    FINEST,
    HUGE,
    B,
    H,
    K,
    V,
    assert_close,
    assert_same,
    gradients,
    on_the_device,
    packed_gradients,
    random_inputs,
    random_state,
    relative_error,
)

from drl.kernels import (
    FEATURE_MAPS,
    LinearAttentionState,
    linear_attention,
    linear_attention_packed,
    linear_attention_step,
)
from drl.kernels import decay as fading

assert on_the_device  # a fixture that is used by being here

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter is numpy, which tells of inf

# half gone after three quarters of a token, after 12 and after 10^9, which float32 cannot tell from never
DECAY = tuple(2 ** (-1 / tokens) for tokens in (0.75, 12.0, 1e9))
OTHERS = [name for name in BACKENDS if name != "reference"]
LOW = {torch.bfloat16: ["chunked", "triton", "cpu"], torch.float16: ["chunked", "triton"]}
PASTS = pytest.mark.parametrize("past", ["empty", "given"])

# In units of `relative_error` against float64 of the same numbers; worst over 5 seeds: 1.9e-3, keys and queries being
# rounded to bfloat16 once more after phi and weight.
BFLOAT16 = 5e-3


def few(T: int, backend: str) -> int:
    """T tokens, or two chunks where Triton's interpreter runs them."""
    return min(T, 19) if backend == "triton" and DEVICE == "cpu" else T


def on_each(backends: list[str], *lengths: int):
    """Each of them with every length, but for the lengths that `few` makes alike."""
    pairs = {(few(T, backend), backend): None for backend in backends for T in lengths}
    return pytest.mark.parametrize(("T", "backend"), list(pairs))


EACH = pytest.mark.parametrize("backend", BACKENDS)


def options(T: int) -> dict:
    """A mask, the first row of which begins with tokens that do not count, rows that restart, and a decay."""
    mask = torch.rand(B, T) < 0.7
    mask[0, : min(2, T - 1)] = False
    mask[1, 0] = True  # a query that sees nothing divides by eps
    mask[0, min(2, T - 1)] = True
    return {"mask": mask, "restart": torch.tensor([False, True]), "decay": DECAY}


def operator(backend: str, **options):
    return lambda q, k, v, state: linear_attention(q, k, v, state, backend=backend, **options)


# The numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("eps", "expected"), [(0.0, [2.0, 10 / 3, 30 / 7]), (1.0, [1.0, 2.0, 10 / 3])])
def test_three_tokens_by_hand(backend, eps, expected):
    q, k, v = (torch.tensor(x).view(1, 3, 1, 1) for x in ([1.0, 1.0, 2.0], [1.0, 1.0, 1.0], [2.0, 4.0, 5.0]))

    out, state = linear_attention(q, k, v, feature_map="identity", eps=eps, decay=(0.5,), backend=backend)

    # 2 / 1, (2/2 + 4) / (1/2 + 1), then twice 2/4 + 4/2 + 5 over twice 1/4 + 1/2 + 1; eps beside the denominator
    assert_close(out.flatten(), torch.tensor(expected), torch.float32)
    assert (state.kv.item(), state.z.item()) == (7.5, 1.75)


@EACH
def test_the_output_is_a_mean_whose_weights_halve_with_each_half_life(backend):
    T = few(131, backend)
    q, k, v = random_inputs(T, FINEST[backend])
    phi, t = FEATURE_MAPS["elu1"], torch.arange(T, dtype=FINEST[backend])
    fades = torch.stack([torch.tensor(g, dtype=torch.float64) ** (t[:, None] - t).double() for g in DECAY])
    weights = torch.einsum("bthk,bshk->bhts", phi(q), phi(k)).tril() * fades.tril().to(q.dtype)
    expected = torch.einsum("bhts,bshv->bthv", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)

    out, _ = linear_attention(q, k, v, decay=DECAY, backend=backend)

    assert_close(out, expected, FINEST[backend])


@PASTS
@on_each(OTHERS, 1, 2, 60, 61, 62, 63, 131, 200)
def test_every_backend_matches_the_recurrence_forward_and_backward(T, backend, past):
    dtype = FINEST[backend]
    inputs, past, given = random_inputs(T, dtype), random_state(dtype) if past == "given" else None, options(T)

    assert_close(operator(backend, **given)(*inputs, past), operator("reference", **given)(*inputs, past), dtype)
    assert_close(gradients(operator(backend, **given), inputs, past),
                 gradients(operator("reference", **given), inputs, past), dtype)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton, which is for Linux on x86-64")
def test_the_split_backward_of_wide_heads_matches_the_recurrence():
    wide, T = 65, 17
    inputs = [torch.randn(1, T, 2, wide) for _ in range(3)]
    past = LinearAttentionState(torch.randn(1, 2, wide, wide), torch.rand(1, 2, wide))
    given = {"decay": DECAY[:2], "mask": options(T)["mask"][:1]}
    assert_close(gradients(operator("triton", **given), inputs, past),
                 gradients(operator("reference", **given), inputs, past), torch.float32)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("backend", OTHERS)
def test_every_feature_map_stays_before_the_weights(backend, feature_map):
    dtype = FINEST[backend]
    q, k, v = random_inputs(few(131, backend), dtype)
    q, k = (x + 3 for x in (q, k))  # keeps identity's denominator away from zero
    assert_close(*(linear_attention(q, k, v, decay=DECAY, feature_map=feature_map, backend=name)
                   for name in (backend, "reference")), dtype)


@pytest.mark.parametrize(("dtype", "backend"), [
    (dtype, backend) for dtype in LOW for backend in LOW[dtype] if backend in OTHERS
    and (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu")  # the interpreter cannot multiply these
])
def test_low_precision_rounds_keys_and_queries_once_more_at_most_and_no_state_drifts(backend, dtype):
    T = few(200, backend)
    inputs, past, given = random_inputs(T, dtype), random_state(), options(T)
    expected, expected_state = operator("reference", **given)(*(x.double() for x in inputs), past.to(torch.float64))

    out, state = operator(backend, **given)(*inputs, past)

    assert out.dtype == dtype and state.kv.dtype == state.z.dtype == torch.float32
    for actual, right in ((out, expected), (state.kv, expected_state.kv), (state.z, expected_state.z)):
        assert relative_error(actual, right) < BFLOAT16


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_rounds_no_sum_no_weight_and_no_state(backend):
    inputs, past, given = random_inputs(131, torch.bfloat16), random_state(), options(131)
    expected = operator(backend, **given)(*inputs, past)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(operator(backend, **given)(*inputs, past), expected)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("half_life", [1.0, 300.0])
def test_3000_tokens_do_not_drift(backend, half_life):
    T = few(3000, backend)
    inputs, decay = [x[:1, :, :1] for x in random_inputs(T)], (2 ** (-1 / half_life),)
    expected = linear_attention(*(x.double() for x in inputs), decay=decay, backend="reference")

    out, state = linear_attention(*inputs, decay=decay, backend=backend)

    for actual, right in ((out, expected[0]), (out[:, -1], expected[0][:, -1]), *zip(state, expected[1], strict=True)):
        assert relative_error(actual, right) < 1e-5


@EACH
def test_what_hardly_decays_at_all_is_not_forgotten_and_what_decays_at_once_is(backend):
    dtype = FINEST[backend]
    q, k, v = random_inputs(few(200, backend), dtype)
    least = float(torch.finfo(torch.float64).tiny)
    out, _ = linear_attention(q, k, v, decay=(least, 1.0, 1 - 2**-53), backend=backend)
    plain, _ = linear_attention(q, k, v, backend=backend)
    assert_close(out[:, :, 1:], plain[:, :, 1:], dtype)
    assert_close(out[:, :, 0], v[:, :, 0] / (1 + 1e-6 / alone(q, k)[:, :, 0]), dtype)


def alone(q, k):
    """phi(q) . phi(k) of each token with itself."""
    phi = FEATURE_MAPS["elu1"]
    return (phi(q) * phi(k)).sum(-1, keepdim=True)


@EACH
def test_where_nothing_decays_every_bit_is_that_of_the_plain_operator(backend):
    inputs, past = random_inputs(few(67, backend)), random_state()
    for decay in (None, (1.0, 1.0, 1.0)):
        assert_same(operator(backend, decay=decay)(*inputs, past), operator(backend)(*inputs, past))


@EACH
def test_a_packed_projection_gives_what_its_parts_give(backend):
    T = few(131, backend)
    packed, past = torch.randn(B, T, 3, H, K), LinearAttentionState(torch.randn(B, H, K, K), torch.rand(B, H, K))
    given = options(T) | {"backend": backend}

    def apart(x, state):
        return linear_attention(*x.unbind(2), state, **given)

    def together(x, state):
        return linear_attention_packed(x, state, **given)

    assert_close(together(packed, past), apart(packed, past), torch.float32)
    assert_close(packed_gradients(together, packed, past), packed_gradients(apart, packed, past), torch.float32)


# State, future, mask


@pytest.mark.parametrize(("backend", "cut"), [
    pytest.param(backend, cut, marks=pytest.mark.slow if few(131, backend) < 131 else ())
    for backend in OTHERS for cut in (17, 61, 129) if cut < few(131, backend)
])
def test_two_parts_are_the_whole_forward_state_and_gradients(backend, cut):
    dtype, T = FINEST[backend], few(131, backend)
    inputs, past, given = random_inputs(T, dtype), random_state(dtype), options(T)
    first, second = ({"decay": DECAY, "mask": given["mask"][:, part]} for part in (slice(cut), slice(cut, None)))

    def parts(q, k, v, state):
        one, state = operator(backend, **first, restart=given["restart"])(q[:, :cut], k[:, :cut], v[:, :cut], state)
        two, state = operator(backend, **second)(q[:, cut:], k[:, cut:], v[:, cut:], state)
        return torch.cat([one, two], dim=1), state

    assert_close(parts(*inputs, past), operator(backend, **given)(*inputs, past), dtype)
    assert_close(gradients(parts, inputs, past), gradients(operator(backend, **given), inputs, past), dtype)


@PASTS
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stepping_matches_attending(backend, tokens, past):
    dtype, T = FINEST[backend], 11
    inputs, past, mask = random_inputs(T, dtype), random_state(dtype) if past == "given" else None, options(T)["mask"]
    expected = operator("reference", decay=DECAY, mask=mask)(*inputs, past)

    outputs, state = [], past
    for q, k, v, now in zip(*(x.split(tokens, dim=1) for x in (*inputs, mask)), strict=True):
        out, state = linear_attention_step(q, k, v, state, mask=now, decay=DECAY, backend=backend)
        outputs.append(out)

    assert_close((torch.cat(outputs, dim=1), state), expected, dtype)


@pytest.mark.parametrize("feature_map", ["elu1", "identity"])
@on_each(BACKENDS, 35, 131)
def test_the_future_is_invisible_whatever_finite_values_it_holds(T, backend, feature_map):
    inputs, past = random_inputs(T), random_state()
    call = operator(backend, decay=DECAY, feature_map=feature_map)
    before, _ = call(*inputs, past)

    for t in {1, 17, 32, 61, 64, 128, T - 1} & set(range(1, T)):
        future = [x.clone() for x in inputs]
        for x in future:
            x[:, t:] = HUGE
        future[1][:, t::2] = -HUGE
        assert_same(call(*future, past)[0][:, :t], before[:, :t])


@pytest.mark.parametrize("feature_map", ["elu1", "identity"])
@on_each(BACKENDS, 67)
def test_whatever_a_masked_token_holds_reaches_no_other_output_and_no_state(T, backend, feature_map):
    q, k, v = random_inputs(T)
    given = options(T) | {"feature_map": feature_map}
    out, state = operator(backend, **given)(q, k, v, None)

    hidden = ~given["mask"]
    q[hidden], k[hidden], v[hidden] = HUGE, HUGE, -HUGE
    other_out, other_state = operator(backend, **given)(q, k, v, None)

    assert_same(other_out[given["mask"]], out[given["mask"]])
    assert_same(other_state, state)


@EACH
def test_masked_tokens_might_as_well_not_be_there(backend):
    dtype, T = FINEST[backend], few(131, backend)
    inputs, mask_T = random_inputs(T, dtype), torch.rand(T) < 0.6
    expected = linear_attention(*(x[:, mask_T] for x in inputs), decay=DECAY, backend="reference")

    out, state = linear_attention(*inputs, mask=mask_T.expand(B, T), decay=DECAY, backend=backend)

    assert_close((out[:, mask_T], state), expected, dtype)


@EACH
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_step_of_masked_tokens_gives_back_the_state_bit_for_bit(tokens, backend):
    past, mask = random_state(), torch.zeros(B, tokens, dtype=torch.bool)
    assert_same(linear_attention_step(*random_inputs(tokens), past, mask=mask, decay=DECAY, backend=backend)[1], past)


@EACH
def test_a_row_that_restarts_has_no_past_and_no_gradient_flows_into_it(backend):
    restart, T = torch.tensor([True, False]), few(131, backend)
    inputs, past = random_inputs(T), random_state()

    expected = operator(backend, decay=DECAY)(*inputs, past.restart(restart))
    assert_same(operator(backend, decay=DECAY, restart=restart)(*inputs, past), expected)

    *_, d_kv, d_z = gradients(operator(backend, decay=DECAY, restart=restart), inputs, past)
    assert (d_kv[0] == 0).all() and (d_z[0] == 0).all() and (d_kv[1] != 0).any() and (d_z[1] != 0).any()


# Programs


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton, which is for Linux on x86-64")
def test_the_fused_kernels_fade_by_themselves():
    packed = torch.randn(B, 5, 3, H, K, requires_grad=True)
    (kv, z), given = LinearAttentionState(torch.randn(B, H, K, K), torch.rand(B, H, K)), options(5)

    def operators(decay) -> list[str]:
        """What torch is asked to do, forward, backward and in a step."""
        seen = []

        class Listen(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **kwargs or {})

        with Listen():
            out, after = linear_attention_packed(
                packed, LinearAttentionState(kv, z), **given | {"decay": decay}, backend="triton"
            )
            torch.autograd.grad(out.sum() + after.kv.sum(), packed)
            three = packed.detach()[:, :3].unbind(2)
            linear_attention_step(*three, LinearAttentionState(kv, z), decay=decay, backend="triton")
        return seen

    assert operators(DECAY) == operators(None)


def test_torch_compile_sees_one_graph_with_its_segments_and_its_gradient():
    given = {"decay": DECAY}

    def loss(x, mask):
        out, state = linear_attention_packed(x[:, :3], mask=mask[:, :3], **given)
        return linear_attention_packed(x[:, 3:], state, **given)[0].square().sum() + out.square().sum()

    packed, mask = torch.randn(B, 67, 3, H, K, requires_grad=True), torch.rand(B, 67) < 0.7
    expected, = torch.autograd.grad(loss(packed, mask), packed)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(packed, mask), packed)[0], expected, torch.float32)


def test_torch_export_makes_a_program_for_any_number_of_rows():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, mask, kv, z):
            return linear_attention_step(q, k, v, LinearAttentionState(kv, z), mask=mask, decay=DECAY,
                                         backend="chunked")

    mask = torch.tensor([[False, True, True], [True, True, True]])
    arguments = (*random_inputs(3), mask, *random_state())
    rows = tuple({0: torch.export.Dim("batch")} for _ in arguments)
    program = torch.export.export(Module(), arguments, dynamic_shapes=rows).module()
    for some in (arguments, tuple(torch.cat([x, x, x]) for x in arguments)):
        assert_close(program(*some), Module()(*some), torch.float32)


# The contract


@pytest.mark.parametrize(("decay", "message"), [
    ((0.5, 0.5), "decay must be one number for each of 3 heads, got 2"),
    ((), "decay must be one number for each of 3 heads, got 0"),
    ((0.5, 0.0, 0.5), r"decay must be in \(0, 1\], got 0.0"),
    ((0.5, -0.5, 0.5), r"decay must be in \(0, 1\], got -0.5"),
    ((0.5, 0.5, 1.01), r"decay must be in \(0, 1\], got 1.01"),
    ((math.nan, 0.5, 0.5), r"decay must be in \(0, 1\], got nan"),
    ((math.inf, 0.5, 0.5), r"decay must be in \(0, 1\], got inf"),
])
@EACH
def test_a_decay_that_is_none_is_refused(backend, decay, message):
    q, k, v = random_inputs(3)
    for call in (linear_attention, linear_attention_step):
        with pytest.raises(ValueError, match=message):
            call(q, k, v, random_state(), decay=decay, backend=backend)
    with pytest.raises(ValueError, match=message):
        linear_attention_packed(torch.stack([q, k, k], 2), decay=decay, backend=backend)


def test_a_window_of_20_steps_is_one_segment_even_where_half_is_gone_after_a_quarter_of_a_step():
    calls = []

    def plain(q, k, v, kv, z, restart):
        calls.append(q.shape[1])
        return v, torch.zeros(B, H, K, V), torch.zeros(B, H, K)

    for T in (40, 60):  # tokens of 20 steps
        decay = tuple(torch.tensor(2 ** (-4 * 20 / T)).repeat(H).tolist())
        fading.attend(plain, *random_inputs(T), None, None, None, None, FEATURE_MAPS["elu1"], decay, torch.float32,
                      torch.float32)
    assert calls == [40, 60]
