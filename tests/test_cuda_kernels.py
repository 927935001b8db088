"""The fused kernels on a GPU, in every dtype, against float64; fresh random numbers each time.

Memory that a kernel gets is full of NaN beforehand: the allocator hands out again what `poison` filled and freed.
"""

import pytest
import torch

from drl.kernels import LinearAttentionState, linear_attention, linear_attention_packed, linear_attention_step

pytestmark = pytest.mark.cuda

# Relative error in the L2 norm of each output and gradient. Worst seen in bfloat16: 9.3e-3, in the gradient of q of
# heads of 16 values and 16 tokens, where rounding of the output meets a difference of nearly equal numbers.
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
NARROW = 1.5  # times that for heads of fewer than 32 values
# Times that where memory fades: an output then is nearly the latest value, and the gradient of q, a sum of differences
# between the two, has fewer digits. Worst with operands rounded as on a GPU, 32 inputs of each of six shapes: 1.2e-2 in
# bfloat16.
FADING = 3
DECAY = {heads: {"decay": tuple(2 ** (-1 / tokens) for tokens in half_lives)} for heads, half_lives in {
    2: (0.5, 32), 3: (0.5, 4, 32), 4: (0.5, 2, 8, 32)  # the last as in training, two tokens a step
}.items()}
WIDTHS = [(16, 16), (24, 24), (32, 32), (64, 64), (128, 128), (32, 128), (128, 32), (64, 16)]


def poison():
    sizes = (2**10, 2**14, 2**18, 2**22)
    filled = [torch.full((size,), float("nan"), device="cuda") for size in sizes for _ in range(4)]
    del filled


def answers(backend, dtype, inputs, past, options):
    """Output, states and all gradients of a loss that weighs each of their numbers."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(dtype).requires_grad_() for x in inputs] + [x.to(exact).requires_grad_() for x in past]
    state = LinearAttentionState(*leaves[len(inputs):]) if past else None
    operator = linear_attention_packed if len(inputs) == 1 else linear_attention
    out, after = operator(*leaves[: len(inputs)], state, backend=backend, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, dtype=torch.float64, device="cuda", generator=generator)).sum() * weight
        for x, weight in zip((out, *after), (1, 0.1, 0.1), strict=True)
    )
    return [out, *after, *torch.autograd.grad(loss, leaves)]


def errors(dtype, inputs, past, options) -> list[float]:
    inputs = [x.to(dtype) for x in inputs]
    expected = answers("chunked", torch.float64, inputs, past, options)
    poison()
    actual = answers("triton", dtype, inputs, past, options)
    return [((a.double() - e).norm() / e.norm().clamp(min=1e-30)).item() for a, e in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("T", [60, 200])
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_every_width_agrees_with_float64(K, V, T, dtype):
    torch.seed()
    inputs = [torch.randn(3, T, 2, width, device="cuda") for width in (K, K, V)]
    past = [torch.randn(3, 2, K, V, device="cuda"), torch.rand(3, 2, K, device="cuda")]
    flags = {"mask": torch.rand(3, T, device="cuda") < 0.7, "restart": torch.rand(3, device="cuda") < 0.5}
    for options in ({}, flags, DECAY[2], flags | DECAY[2]):
        bound = BOUND[dtype] * (NARROW if V < 32 else 1) * (FADING if "decay" in options else 1)
        assert max(errors(dtype, inputs, past, options)) < bound
        assert max(errors(dtype, inputs, [], options)) < bound


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("T", [16, 30, 40, 60])
def test_the_windows_of_training_agree_with_float64(T, dtype):
    torch.seed()
    past = [torch.randn(64, 4, 32, 32, device="cuda"), torch.rand(64, 4, 32, device="cuda")]
    flags = {"mask": torch.rand(64, T, device="cuda") < 0.9, "restart": torch.rand(64, device="cuda") < 0.5}
    packed = [torch.randn(64, T, 3, 4, 32, device="cuda")]
    for options in (flags, flags | DECAY[4]):
        assert max(errors(dtype, packed, past, options)) < BOUND[dtype]


@pytest.mark.parametrize("options", [{}, DECAY[4]], ids=["plain", "fading"])
@pytest.mark.parametrize("dtype", BOUND)
def test_three_thousand_tokens_agree_with_float64(dtype, options):
    torch.seed()
    assert max(errors(dtype, [torch.randn(2, 3000, 3, 4, 32, device="cuda")], [], options)) < BOUND[dtype]


@pytest.mark.parametrize("decay", [{}, DECAY[3]], ids=["plain", "fading"])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("T", [1, 3, 4])
def test_a_step_agrees_with_float64(T, dtype, decay):
    torch.seed()
    inputs = [torch.randn(5, T, 3, 32, device="cuda").to(dtype) for _ in range(3)]
    state = LinearAttentionState(torch.randn(5, 3, 32, 32, device="cuda"), torch.rand(5, 3, 32, device="cuda"))
    flags = {"mask": torch.rand(5, T, device="cuda") < 0.7, "restart": torch.rand(5, device="cuda") < 0.5}
    options = flags | decay
    expected = linear_attention_step(*(x.double() for x in inputs), state.to(torch.float64), **options)
    poison()
    out, after = linear_attention_step(*inputs, state, backend="triton", **options)
    for a, e in zip((out, *after), (expected[0], *expected[1]), strict=True):
        assert (a.double() - e).norm() < BOUND[dtype] * e.norm()


@pytest.mark.parametrize("options", [{}, DECAY[4]], ids=["plain", "fading"])
@pytest.mark.parametrize("T", [60, 200])
def test_twenty_runs_give_the_same_bits(T, options):
    packed = torch.randn(64, T, 3, 4, 32, device="cuda", dtype=torch.bfloat16)
    first = None
    for _ in range(20):
        poison()
        leaf = packed.clone().requires_grad_()
        out, state = linear_attention_packed(leaf, backend="triton", **options)
        results = [out, *state, *torch.autograd.grad(out.float().square().sum() + state.kv.sum(), leaf)]
        first = first or results
        assert all(torch.equal(*pair) for pair in zip(results, first, strict=True))


@pytest.mark.parametrize("options", [{}, DECAY[4]], ids=["plain", "fading"])
def test_a_captured_graph_follows_its_inputs(options):
    packed = torch.randn(4, 60, 3, 4, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def work():
        out, state = linear_attention_packed(packed, backend="triton", **options)
        return out.detach(), *torch.autograd.grad(out.float().square().sum() + state.kv.sum(), packed)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = work()
    with torch.no_grad():
        packed.copy_(torch.randn_like(packed))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(replayed, work(), strict=True))


@pytest.mark.parametrize("T", [40, 200])
def test_a_call_with_decay_launches_what_one_without_does(T):
    packed = torch.randn(64, T, 3, 4, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    state = LinearAttentionState.zeros(64, 4, 32, 32, device="cuda")
    flags = {"mask": torch.rand(64, T, device="cuda") < 0.7, "restart": torch.rand(64, device="cuda") < 0.5}

    def launched(options) -> list[str]:
        def work():
            out, _ = linear_attention_packed(packed, state, backend="triton", **flags, **options)
            torch.autograd.grad(out, packed, torch.ones_like(out))
            linear_attention_step(*packed.detach()[:, :3].unbind(2), state, backend="triton", **options)

        work()  # compiles
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            work()
            torch.cuda.synchronize()
        return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]

    seen = launched(DECAY[4])
    assert seen == launched({})
    assert [seen.count(name) for name in ("forward", "states", "backward", "step")] == [1, T > 64, 1, 1], seen


def test_auto_takes_the_fused_kernels_on_a_gpu_and_the_torch_ones_for_float64():
    packed = torch.randn(2, 60, 3, 4, 32, device="cuda")
    assert torch.equal(linear_attention_packed(packed)[0], linear_attention_packed(packed, backend="triton")[0])
    double = packed.double()
    assert torch.equal(linear_attention_packed(double)[0], linear_attention_packed(double, backend="chunked")[0])
