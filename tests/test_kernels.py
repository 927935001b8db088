"""One operator, several executions: they must not be told apart by their numbers, and the future must not be seen.

Every dimension is a different prime, so that no two axes can be swapped unnoticed.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from drl.kernels import (
    FEATURE_MAPS,
    LinearAttentionState,
    available_backends,
    chunked,
    cpu,
    linear_attention,
    linear_attention_packed,
    linear_attention_step,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter is numpy, which tells of inf

B, H, K, V = 2, 3, 5, 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # everything here runs on a GPU where there is one
BACKENDS = [
    name for name, reason in available_backends().items() if reason is None and (name != "cpu" or DEVICE == "cpu")
]
TORCH_BACKENDS = [name for name in BACKENDS if name in ("reference", "chunked")]

# at and beside the edges of a chunk of 64 and of the 128 tokens that still go as one chunk; 60 is a window of 20 steps
LENGTHS = [1, 2, 60, 63, 64, 65, 127, 128, 129, 131, 200]

# Per dtype, on |difference| / (1 + |expected|). Worst of all lengths, outputs, states and gradients over 20 seeds:
# 9.8e-6 in float32 and 2.1e-14 in float64, both in the gradient of q, where nearly equal numbers are subtracted.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}

# Relative L2 error of float32 against float64 after 3000 tokens: measured 1.2e-6 with a running sum over single
# tokens (reference) and 1.7e-7 with one over chunks.
DRIFT = 1e-5

# The dtype in which a backend is compared with another at a tolerance of rounding
FINEST = {"triton": torch.float32, "cpu": torch.float32, "reference": torch.float64, "chunked": torch.float64}

HUGE = 3e38  # finite in float32, its products are not: zero times them would be NaN


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


def random_state(dtype=torch.float32) -> LinearAttentionState:
    return LinearAttentionState(torch.randn(B, H, K, V, dtype=dtype), torch.rand(B, H, K, dtype=dtype))


def few(T: int, backend: str) -> int:
    """T tokens, or three chunks where Triton's interpreter runs them, which takes a second for each."""
    return min(T, 35) if backend == "triton" and DEVICE == "cpu" else T


def on_each_backend(*lengths: int):
    """Every backend with every length, but for the lengths that `few` makes alike."""
    pairs = {(few(T, backend), backend): None for backend in BACKENDS for T in lengths}
    return pytest.mark.parametrize(("T", "backend"), list(pairs))


def random_inputs(T: int, dtype=torch.float32):
    q, k = (torch.randn(B, T, H, K, dtype=dtype) for _ in range(2))
    return q, k, torch.randn(B, T, H, V, dtype=dtype)


def gradients(operator, inputs, past):
    """d loss / d (q, k, v and the parts of the past), for a loss that weighs every number of output and state."""
    leaves = [x.clone().requires_grad_() for x in (*inputs, *(past or ()))]
    out, state = operator(*leaves[:3], LinearAttentionState(*leaves[3:]) if past else None)
    generator = torch.Generator(DEVICE).manual_seed(1)
    loss = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in (out, *state))
    return torch.autograd.grad(loss, leaves)


def assert_close(actual, expected, dtype) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def relative_error(actual, expected) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


# The numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("eps", "expected"), [(0.0, [2.0, 3.0, 4.0]), (1.0, [1.0, 2.0, 3.2])])
def test_three_tokens_by_hand(backend, eps, expected):
    q, k, v = (torch.tensor(x).view(1, 3, 1, 1) for x in ([1.0, 1.0, 1.0], [1.0, 1.0, 2.0], [2.0, 4.0, 5.0]))

    out, state = linear_attention(q, k, v, feature_map="identity", eps=eps, backend=backend)

    assert_same(out.flatten(), torch.tensor(expected))  # (2) / 1, (2 + 4) / 2, (2 + 4 + 10) / 4
    assert state.kv.item() == 16 and state.z.item() == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", ["elu1", "relu"])
def test_the_output_is_a_mean_of_the_values_weighed_by_phi_q_phi_k(backend, feature_map):
    q, k, v = random_inputs(few(131, backend), FINEST[backend])
    phi = FEATURE_MAPS[feature_map]
    weights = torch.einsum("bthk,bshk->bhts", phi(q), phi(k)).tril()
    expected = torch.einsum("bhts,bshv->bthv", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)

    out, _ = linear_attention(q, k, v, feature_map=feature_map, backend=backend)

    assert_close(out, expected, FINEST[backend])


def test_elu1_is_elu_plus_one():
    x = torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(FEATURE_MAPS["elu1"](x), torch.tensor([0.1353353, 1.0, 4.0]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("past", ["empty", "given"])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_matches_reference(T, past, dtype):
    inputs, past = random_inputs(T, dtype), random_state(dtype) if past == "given" else None

    expected = linear_attention(*inputs, past, backend="reference")
    actual = linear_attention(*inputs, past, backend="chunked")

    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("past", ["empty", "given"])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_gradients_match_reference(T, past, dtype):
    inputs, past = random_inputs(T, dtype), random_state(dtype) if past == "given" else None

    expected = gradients(lambda *x: linear_attention(*x, backend="reference"), inputs, past)
    actual = gradients(lambda *x: linear_attention(*x, backend="chunked"), inputs, past)

    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_auto_matches_reference_for_every_feature_map(feature_map):
    q, k, v = random_inputs(T=131, dtype=torch.float64)
    q, k = (x + 3 for x in (q, k))  # keeps identity's denominator away from zero

    expected = linear_attention(q, k, v, feature_map=feature_map, backend="reference")
    actual = linear_attention(q, k, v, feature_map=feature_map)

    assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize("past", ["empty", "given"])
@pytest.mark.parametrize("backend", TORCH_BACKENDS)
def test_gradients_match_finite_differences(backend, past, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 2)  # five tokens are then three chunks, the last of them half padding
    monkeypatch.setattr(chunked, "WHOLE", 3)
    shapes = [(1, 5, 2, 3), (1, 5, 2, 3), (1, 5, 2, 7), (1, 2, 3, 7), (1, 2, 3)]
    leaves = [torch.rand(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    leaves = leaves if past == "given" else leaves[:3]

    def function(q, k, v, *state):
        out, after = linear_attention(q - 0.5, k - 0.5, v, LinearAttentionState(*state) if state else None,
                                      backend=backend)
        return out, *after

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_drifts_little_in_3000_tokens(backend):
    inputs = [x[:1, :, :1] for x in random_inputs(T=3000)]
    expected, expected_state = linear_attention(*(x.double() for x in inputs), backend="reference")

    out, state = linear_attention(*inputs, backend=backend)

    assert relative_error(out, expected) < DRIFT
    assert relative_error(out[:, -1], expected[:, -1]) < DRIFT
    assert relative_error(state.kv, expected_state.kv) < DRIFT
    assert relative_error(state.z, expected_state.z) < DRIFT


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_projection_gives_what_copies_of_its_parts_give(backend):
    T = few(131, backend)
    packed, past = torch.randn(B, T, 3, H, K), LinearAttentionState(torch.randn(B, H, K, K), torch.rand(B, H, K))
    options = {"mask": torch.rand(B, T) < 0.7, "restart": torch.tensor([True, False]), "backend": backend}

    def apart(x, state):
        return linear_attention(*(part.contiguous() for part in x.unbind(2)), state, **options)

    def views(x, state):
        return linear_attention(*x.unbind(2), state, **options)

    def together(x, state):
        return linear_attention_packed(x, state, **options)

    for operator in (views, together):
        assert_close(operator(packed, past), apart(packed, past), torch.float32)
        assert_close(packed_gradients(operator, packed, past), packed_gradients(apart, packed, past), torch.float32)


def packed_gradients(operator, packed, past):
    leaves = [x.clone().requires_grad_() for x in (packed, *past)]
    out, state = operator(leaves[0], LinearAttentionState(*leaves[1:]))
    return torch.autograd.grad(out.square().sum() + state.kv.sum() + state.z.square().sum(), leaves)


# The future


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@on_each_backend(5, 67, 128, 131)  # one chunk and several, for each form
def test_the_future_is_invisible_whatever_finite_values_it_holds(T, backend, feature_map):
    inputs, past = random_inputs(T), random_state()
    before, _ = linear_attention(*inputs, past, feature_map=feature_map, backend=backend)

    for t in {1, 17, 32, 64, 65, 128, T - 1} & set(range(1, T)):
        future = [x.clone() for x in inputs]
        for x in future:
            x[:, t:] = HUGE
        future[1][:, t::2] = -HUGE
        after, _ = linear_attention(*future, past, feature_map=feature_map, backend=backend)
        assert_same(after[:, :t], before[:, :t])


@on_each_backend(67, 200)
def test_no_gradient_flows_into_the_future(T, backend):
    inputs = [x.requires_grad_() for x in random_inputs(T)]
    out, _ = linear_attention(*inputs, backend=backend)

    for t in {2, 16, 33, 64, 66} & set(range(len(out[0]))):
        for gradient in torch.autograd.grad(out[:, :t].square().sum(), inputs, retain_graph=True):
            assert (gradient[:, t:] == 0).all() and (gradient[:, :t] != 0).any()


# The state


@pytest.mark.parametrize(
    ("backend", "cut"), [(backend, cut) for backend in BACKENDS for cut in (1, 16, 64, 129) if cut < few(131, backend)]
)
def test_two_parts_are_the_whole_forward_state_and_gradients(backend, cut):
    dtype, T = FINEST[backend], few(131, backend)
    inputs, past = random_inputs(T, dtype), random_state(dtype)

    def whole(q, k, v, state):
        return linear_attention(q, k, v, state, backend=backend)

    def parts(q, k, v, state):
        first, state = whole(q[:, :cut], k[:, :cut], v[:, :cut], state)
        second, state = whole(q[:, cut:], k[:, cut:], v[:, cut:], state)
        return torch.cat([first, second], dim=1), state

    assert_close(parts(*inputs, past), whole(*inputs, past), dtype)
    assert_close(gradients(parts, inputs, past), gradients(whole, inputs, past), dtype)


@pytest.mark.parametrize("past", ["empty", "given"])
@pytest.mark.parametrize("tokens", [1, 3, 4])  # of the last two neither 41 nor 11 is a multiple
@pytest.mark.parametrize("backend", BACKENDS)
def test_stepping_matches_attending(backend, tokens, past):
    dtype = FINEST[backend]
    T = 11 if few(41, backend) < 41 else 41
    inputs, past = random_inputs(T, dtype), random_state(dtype) if past == "given" else None
    expected = linear_attention(*inputs, past, backend="reference")

    outputs, state = [], past
    for q, k, v in zip(*(x.split(tokens, dim=1) for x in inputs), strict=True):
        out, state = linear_attention_step(q, k, v, state, backend=backend)
        outputs.append(out)

    assert_close((torch.cat(outputs, dim=1), state), expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operator", "T"), [(linear_attention_step, 3), (linear_attention, 200)])
def test_the_old_state_stays_as_it_was(operator, T, backend):
    past = random_state()
    kept = LinearAttentionState(past.kv.clone(), past.z.clone())

    _, after = operator(*random_inputs(T), past, backend=backend)
    after.kv.add_(1)  # a result that shared memory with the argument would show here
    after.z.add_(1)

    assert_same(past, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_state_is_the_empty_state(backend):
    inputs = random_inputs(T=67)
    empty = LinearAttentionState.zeros(B, H, K, V)
    assert_same(linear_attention(*inputs, backend=backend), linear_attention(*inputs, empty, backend=backend))


def test_a_step_has_no_gradient():
    inputs = [x.requires_grad_() for x in random_inputs(T=3)]
    out, state = linear_attention_step(*inputs, random_state())
    assert not (out.requires_grad or state.kv.requires_grad or state.z.requires_grad)


def test_restart_empties_the_named_rows_and_no_others():
    past = random_state()
    kept = LinearAttentionState(past.kv.clone(), past.z.clone())

    after = past.restart(torch.tensor([True, False]))

    assert (after.kv[0] == 0).all() and (after.z[0] == 0).all()
    assert_same((after.kv[1], after.z[1]), (kept.kv[1], kept.z[1]))
    assert_same(past, kept)


def test_detach_cuts_the_graph_and_keeps_the_numbers():
    inputs = [x.requires_grad_() for x in random_inputs(T=5)]
    _, state = linear_attention(*inputs)

    detached = state.detach()

    assert state.kv.requires_grad and state.z.requires_grad
    assert not detached.kv.requires_grad and not detached.z.requires_grad
    assert_same(detached, LinearAttentionState(state.kv.data, state.z.data))


def test_to_moves_both_parts():
    assert [part.device.type for part in random_state().to("meta")] == ["meta", "meta"]
    assert [part.dtype for part in random_state().to(torch.float64)] == [torch.float64, torch.float64]


# Rows that begin, tokens that do not count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("operator", "T"), [(linear_attention_step, 3), (linear_attention, 67), (linear_attention, 131)]
)
def test_a_row_that_restarts_has_no_past_and_the_others_keep_theirs(operator, T, backend):
    inputs, past = random_inputs(few(T, backend)), random_state()
    expected = operator(*inputs, past.restart(torch.tensor([True, False])), backend=backend)

    actual = operator(*inputs, past, restart=torch.tensor([True, False]), backend=backend)

    assert_same(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows_into_a_past_that_was_forgotten(backend):
    restart = torch.tensor([True, False])

    def operator(q, k, v, state):
        return linear_attention(q, k, v, state, restart=restart, backend=backend)

    *_, d_kv, d_z = gradients(operator, random_inputs(few(67, backend)), random_state())

    assert (d_kv[0] == 0).all() and (d_z[0] == 0).all()
    assert (d_kv[1] != 0).all() and (d_z[1] != 0).all()


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@on_each_backend(67, 131)
def test_whatever_a_masked_token_holds_reaches_no_other_output_and_no_state(T, backend, feature_map):
    q, k, v = random_inputs(T)
    mask = torch.rand(B, T) < 0.6
    out, state = linear_attention(q, k, v, mask=mask, feature_map=feature_map, backend=backend)

    q[~mask], k[~mask], v[~mask] = HUGE, HUGE, -HUGE
    other_out, other_state = linear_attention(q, k, v, mask=mask, feature_map=feature_map, backend=backend)

    assert_same(other_out[mask], out[mask])
    assert_same(other_state, state)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_might_as_well_not_be_there(backend, feature_map):
    dtype, T = FINEST[backend], few(131, backend)
    q, k, v = random_inputs(T, dtype)
    q, k = (x + 3 for x in (q, k))  # keeps identity's denominator away from zero
    mask_T = torch.rand(T) < 0.6
    expected_out, expected_state = linear_attention(
        q[:, mask_T], k[:, mask_T], v[:, mask_T], feature_map=feature_map, backend="reference"
    )

    out, state = linear_attention(q, k, v, mask=mask_T.expand(B, T), feature_map=feature_map, backend=backend)

    exact = backend == "reference"  # the other forms sum in another order once the tokens stand elsewhere
    compare = assert_same if exact else lambda *x: assert_close(*x, dtype)
    compare((out[:, mask_T], state), (expected_out, expected_state))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_step_of_masked_tokens_gives_back_the_state_bit_for_bit(tokens, backend, feature_map):
    past = random_state()
    _, after = linear_attention_step(
        *random_inputs(tokens), past, mask=torch.zeros(B, tokens, dtype=torch.bool), feature_map=feature_map,
        backend=backend
    )
    assert_same(after, past)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_have_no_gradient(backend):
    mask = torch.tensor([False, True, True, False, True]).expand(B, 5)

    def operator(q, k, v, state):
        return linear_attention(q, k, v, state, mask=mask, backend=backend)

    dq, dk, dv = gradients(operator, random_inputs(T=5), None)

    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert (dk[~mask] == 0).all() and (dv[~mask] == 0).all() and (dv[mask] != 0).all()


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", TORCH_BACKENDS)
@pytest.mark.parametrize(("operator", "T"), [(linear_attention_step, 3), (linear_attention, 131)])
def test_low_precision_only_rounds_what_goes_in_and_out(operator, T, backend, dtype):
    inputs, past = random_inputs(T, dtype), random_state()
    expected_out, expected_state = operator(*(x.float() for x in inputs), past, backend=backend)

    out, state = operator(*inputs, past, backend=backend)

    assert out.dtype == dtype and state.kv.dtype == state.z.dtype == torch.float32
    assert_same(out, expected_out.to(dtype))
    assert_same(state, expected_state)


@pytest.mark.parametrize("backend", TORCH_BACKENDS)
def test_autocast_rounds_no_sum_and_no_state(backend):
    inputs, past = random_inputs(T=131, dtype=torch.bfloat16), random_state()
    expected = linear_attention(*inputs, past, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(linear_attention(*inputs, past, backend=backend), expected)


@pytest.mark.parametrize("backend", TORCH_BACKENDS)
def test_float64_stays_float64(backend):
    out, state = linear_attention(*random_inputs(T=5, dtype=torch.float64), backend=backend)
    assert out.dtype == state.kv.dtype == state.z.dtype == torch.float64


# The contract


def empty(*shape, device="cpu", **options):
    return torch.zeros(shape, device=device, **options)


Q, VALUE = (B, 5, H, K), (B, 5, H, V)
MISTAKES = {
    "unknown backend": (
        {"backend": "flash"}, "unknown backend 'flash'; expected one of auto, reference, chunked, triton, cpu"
    ),
    "unknown feature map": (
        {"feature_map": "exp"}, "unknown feature_map 'exp'; expected one of elu1, relu, identity"
    ),
    "q of three dimensions": (
        {"q": empty(B, 5, K)}, r"q and k must share a shape \(B, T, H, K\), got \(2, 5, 5\) and \(2, 5, 3, 5\)"
    ),
    "q of other features": (
        {"q": empty(B, 5, H, K + 1)}, r"q and k must share a shape .*, got \(2, 5, 3, 6\) and \(2, 5, 3, 5\)"
    ),
    "v of another length": (
        {"v": empty(B, 4, H, V)}, r"v must be \(B, T, H, V\) with \(B, T, H\) = \(2, 5, 3\), got \(2, 4, 3, 7\)"
    ),
    "v of three dimensions": (
        {"v": empty(B, 5, V)}, r"v must be \(B, T, H, V\) with \(B, T, H\) = \(2, 5, 3\), got \(2, 5, 7\)"
    ),
    "no tokens": (
        {"q": empty(B, 0, H, K), "k": empty(B, 0, H, K), "v": empty(B, 0, H, V)},
        "T must be at least 1, got an empty sequence",
    ),
    "two dtypes": (
        {"v": empty(*VALUE, dtype=torch.float64)},
        "q, k, v must share one float dtype, got torch.float32, torch.float32, torch.float64",
    ),
    "integers": (
        {"q": empty(*Q, dtype=torch.int64), "k": empty(*Q, dtype=torch.int64), "v": empty(*VALUE, dtype=torch.int64)},
        "q, k, v must share one float dtype, got torch.int64, torch.int64, torch.int64",
    ),
    "two devices": ({"v": empty(*VALUE, device="meta")}, "q, k, v must be on one device, got cpu, cpu, meta"),
    "state of another batch": (
        {"state": LinearAttentionState.zeros(B + 1, H, K, V, device="cpu")},
        r"state.kv must have shape \(2, 3, 5, 7\), got \(3, 3, 5, 7\); a state belongs to the batch that produced it",
    ),
    "state with another z": (
        {"state": LinearAttentionState(empty(B, H, K, V), empty(B, H, V))},
        r"state.z must have shape \(2, 3, 5\), got \(2, 3, 7\); a state belongs to the batch that produced it",
    ),
    "state of another dtype": (
        {"state": LinearAttentionState.zeros(B, H, K, V, dtype=torch.bfloat16, device="cpu")},
        "state.kv must be torch.float32 on cpu, got torch.bfloat16 on cpu",
    ),
    "float32 state for float64": (
        {"q": empty(*Q, dtype=torch.float64), "k": empty(*Q, dtype=torch.float64),
         "v": empty(*VALUE, dtype=torch.float64), "state": LinearAttentionState.zeros(B, H, K, V, device="cpu")},
        "state.kv must be torch.float64 on cpu, got torch.float32 on cpu",
    ),
    "mask of another length": (
        {"mask": empty(B, 4, dtype=torch.bool)}, r"mask must have shape \(2, 5\), got \(2, 4\)"
    ),
    "mask of numbers": ({"mask": empty(B, 5)}, "mask must be torch.bool on cpu, got torch.float32 on cpu"),
    "restart per token": (
        {"restart": empty(B, 5, dtype=torch.bool)}, r"restart must have shape \(2,\), got \(2, 5\)"
    ),
    "state on another device": (
        {"state": LinearAttentionState.zeros(B, H, K, V, device="meta")},
        "state.kv must be torch.float32 on cpu, got torch.float32 on meta",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_what_was_expected_and_what_came(mistake):
    changed, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        linear_attention(**({"q": empty(*Q), "k": empty(*Q), "v": empty(*VALUE)} | changed))


def test_a_packed_projection_has_three_parts():
    with pytest.raises(ValueError, match=r"qkv must be \(B, T, 3, H, K\), got \(2, 5, 2, 3, 5\)"):
        linear_attention_packed(empty(B, 5, 2, H, K))


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_step_takes_one_to_four_tokens(tokens):
    with pytest.raises(ValueError, match=f"a step takes 1 to 4 tokens, got {tokens}; use linear_attention"):
        linear_attention_step(*random_inputs(tokens), random_state())


def test_a_step_checks_its_state_too():
    other = LinearAttentionState.zeros(B + 1, H, K, V)
    with pytest.raises(ValueError, match="a state belongs to the batch that produced it"):
        linear_attention_step(*random_inputs(T=1), other)


def test_every_backend_is_listed_with_the_reason_why_it_cannot_run():
    backends = available_backends()
    assert list(backends) == ["reference", "chunked", "triton", "cpu"]
    assert backends["reference"] is None and backends["chunked"] is None
    assert backends["cpu"] == cpu.unavailable()


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler to have built it")
def test_where_there_is_a_compiler_the_compiled_backend_was_built():
    assert available_backends()["cpu"] is None
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        assert importlib.util.find_spec("drl.kernels.cpu._act"), "Python's headers are here, the short way is not"


def test_importing_the_kernels_brings_in_torch_and_nothing_else_of_weight():
    code = (
        "import sys, torch; before = set(sys.modules); import drl.kernels; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}), '|', "
        "*sorted(name for name in sys.modules if name.startswith('drl')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    new, _, ours = shown.partition(" | ")
    assert not {"triton", "gymnasium", "minari", "mujoco", "tensorboard", "matplotlib"} & set(new.split())
    assert all(name == "drl" or name.startswith("drl.kernels") for name in ours.split())
