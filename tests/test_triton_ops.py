"""The fused kernels as operators of torch: what torch.compile, torch.export and autograd have to know of them.

Without a GPU the interpreter runs the kernels, in float32.
"""

import pytest
import torch
from torch.library import opcheck

pytest.importorskip("triton")

from drl.kernels import LinearAttentionState, linear_attention_packed, linear_attention_step  # noqa: E402
from drl.kernels.triton import ops  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, K = 2, 5, 2, 16
DECAYS = pytest.mark.parametrize("decay", [None, (0.5, 0.9)])


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


def state(gradient=True) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, H, K, K, requires_grad=gradient), torch.rand(B, H, K, requires_grad=gradient)


def parts(gradient=True) -> list[torch.Tensor]:
    return [torch.randn(B, T, H, K, requires_grad=gradient) for _ in range(3)]


@pytest.mark.parametrize(("past", "decay"), [("empty", None), ("given", (0.5, 0.9))])
def test_the_operators_are_what_they_tell_torch(past, decay):
    mask, restart = torch.rand(B, T) < 0.6, torch.tensor([True, False])
    before = state() if past == "given" else (None, None)
    packed = torch.randn(B, T, 3, H, K, requires_grad=True)
    opcheck(ops._attend, (*parts(), *before, mask, restart, decay, "elu1", 1e-6, True))
    opcheck(ops._attend_packed, (packed, *before, mask, restart, decay, "elu1", 1e-6, True))


@DECAYS
def test_the_step_and_the_backwards_are_what_they_tell_torch(decay):
    q, k, v = parts(gradient=False)
    before, after = state(gradient=False), state(gradient=False)
    out, _, _, *kept = ops._attend(q, k, v, *before, None, None, decay, "elu1", 1e-6, True)
    packed = torch.stack([q, k, v], dim=2)
    d_out = torch.randn_like(out)
    checks = ("test_schema", "test_faketensor")  # neither has a gradient of its own
    opcheck(ops._step, (q[:, :3], k[:, :3], v[:, :3], *before, None, None, decay, "elu1", 1e-6), test_utils=checks)
    for wanted in (True, False):
        rest = (*before, None, None, out, *kept, d_out, *after, decay, "elu1", wanted)
        opcheck(ops._attend_backward, (q, k, v, *rest), test_utils=checks)
        opcheck(ops._attend_packed_backward, (packed, *rest), test_utils=checks)


@DECAYS
def test_an_exported_layer_computes_what_it_did_for_other_numbers_of_rows_too(decay):
    class Layer(torch.nn.Module):
        def forward(self, packed, kv, z):
            out, after = linear_attention_packed(packed, LinearAttentionState(kv, z), decay=decay, backend="triton")
            three = packed[:, :3].unbind(2)
            acted, last = linear_attention_step(*three, after, decay=decay, backend="triton")
            return out, acted, *last

    def arguments(rows):
        return torch.randn(rows, T, 3, H, K), torch.randn(rows, H, K, K), torch.rand(rows, H, K)

    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(Layer(), arguments(3), dynamic_shapes=({0: rows}, {0: rows}, {0: rows})).module()

    for count in (3, 4):
        given = arguments(count)
        for actual, expected in zip(exported(*given), Layer()(*given), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@DECAYS
def test_torch_compile_sees_one_graph_and_gives_the_same_gradients(decay):
    packed, (kv, z) = torch.randn(B, T, 3, H, K, requires_grad=True), state()

    def function(packed, kv, z):
        out, after = linear_attention_packed(packed, LinearAttentionState(kv, z), decay=decay, backend="triton")
        return (out * 2).square().sum() + after.kv.sum() + after.z.square().sum()

    expected = torch.autograd.grad(function(packed, kv, z), (packed, kv, z))
    actual = torch.autograd.grad(torch.compile(function, fullgraph=True)(packed, kv, z), (packed, kv, z))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@DECAYS
@pytest.mark.parametrize("past", ["empty", "given"])
def test_torch_vmap_maps_over_rows_and_gradients_come_back(past, decay):
    S, mask = 3, torch.rand(3, B, T) < 0.6
    packed = torch.randn(S, B, T, 3, H, K, requires_grad=True)
    before = [torch.stack(same).detach() for same in zip(*(state() for _ in range(S)))] if past == "given" else []

    def layer(packed, mask, *before):
        past = LinearAttentionState(*before) if before else None
        out, after = linear_attention_packed(packed, past, mask=mask, decay=decay, backend="triton")
        return out.square().sum() + after.kv.sum(), out

    total, out = torch.vmap(layer)(packed, mask, *before)
    gradient, = torch.autograd.grad(total.sum(), packed)

    for row in range(S):
        own = packed[row].detach().requires_grad_()
        expected, alone = layer(own, mask[row], *(part[row] for part in before))
        torch.testing.assert_close(out[row], alone, rtol=0, atol=0)
        torch.testing.assert_close(gradient[row], torch.autograd.grad(expected, own)[0], rtol=0, atol=0)
    with torch.no_grad():  # nothing is kept for a backward that will not come
        torch.testing.assert_close(torch.vmap(layer)(packed, mask, *before)[1], out, rtol=0, atol=0)
