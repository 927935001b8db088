"""Linear attention as torch operators over the compiled library: a chunk at a time, all heads side by side.

Their fakes let torch.compile see through them, and the backward registered here autograd. A second derivative is not
there. Longer sequences are several calls, each from the state that the one before left behind.
"""

import ctypes

import torch
from torch import Tensor
from torch.library import custom_op

from drl.kernels import cpu

CHUNK = 64
INSTRUCTION_SET: bytes | None = None  # None: the best that the machine has; others are for tests
REASON = cpu.unavailable()  # asked for here, because torch.compile cannot see through the search for a file


def unavailable() -> str | None:
    """Why this cannot run here; None if it can."""
    return REASON


def refuses(values: Tensor) -> str | None:
    """Why this cannot take tensors like `values`, (..., V); None if it can."""
    if values.device.type != "cpu":
        return f"needs tensors on a CPU, got {values.device}; use 'chunked'"
    if values.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, got {values.dtype}; use 'chunked'"
    return None


class _Numbers(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("batch", "token", "head")]

    @classmethod
    def of(cls, values: Tensor) -> "_Numbers":
        return cls(values.data_ptr(), *values.stride()[:3])


class _Call(ctypes.Structure):
    """drl_attention of operator.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "features", "values")),
        *((name, ctypes.c_int32) for name in ("half", "feature_map")), ("eps", ctypes.c_float),
        ("instruction_set", ctypes.c_char_p),
        *((name, _Numbers) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("mask", "restart", "kv", "z", "kv_after", "z_after")),
        ("d_out", _Numbers),
        *((name, ctypes.c_void_p) for name in ("d_kv_after", "d_z_after")),
        *((name, _Numbers) for name in ("d_q", "d_k", "d_v")),
        *((name, ctypes.c_void_p) for name in ("d_kv", "d_z")),
    ]


def _run(name: str, values: dict[str, Tensor], options: dict[str, Tensor | None], feature_map: str, eps: float) -> None:
    """`values` are numbers (B, T, H, ...) whose last axis is dense, `options` dense tensors."""
    B, T, H, K = values["q"].shape
    half = values["q"].dtype == torch.bfloat16
    call = _Call(
        B, T, H, K, values["v"].shape[-1], half, cpu.FEATURE_MAPS[feature_map], eps, INSTRUCTION_SET,
        **{key: _Numbers.of(value) for key, value in values.items()},
        **{key: value.data_ptr() for key, value in options.items() if value is not None},
    )
    if cpu.function(name, ctypes.c_int, (ctypes.POINTER(_Call), ctypes.c_int))(call, torch.get_num_threads()):
        raise MemoryError(f"no memory for a chunk of {T} tokens")


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _buffers(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, K = q.shape
    V = v.shape[-1]
    return v.new_empty(B, T, H, V), *(q.new_empty(shape, dtype=torch.float32) for shape in ((B, H, K, V), (B, H, K)))


def _forward(q, k, v, kv, z, mask, restart, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    out, kv_after, z_after = _buffers(q, v)
    kv, z, mask, restart = _dense(kv, z, mask, restart)
    _run("drl_attention_forward", {"q": q, "k": k, "v": v, "out": out}, {
        "kv": kv, "z": z, "mask": mask, "restart": restart, "kv_after": kv_after, "z_after": z_after
    }, feature_map, eps)
    return out, kv_after, z_after


def _backward(gradients, q, k, v, kv, z, mask, restart, out, d_out, d_kv, d_z, feature_map, eps, wanted):
    kv, z, mask, restart, d_kv, d_z, d_out = _dense(kv, z, mask, restart, d_kv, d_z, d_out)
    states = _buffers(q, v)[1:] if wanted else (None, None)
    _run("drl_attention_backward", {
        "q": q, "k": k, "v": v, "out": out, "d_out": d_out, **dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True))
    }, {
        "kv": kv, "z": z, "mask": mask, "restart": restart, "d_kv_after": d_kv, "d_z_after": d_z,
        "d_kv": states[0], "d_z": states[1],
    }, feature_map, eps)
    return states if wanted else (q.new_empty(0), q.new_empty(0))


@custom_op("drl::cpu_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor | None, z: Tensor | None, mask: Tensor | None, restart: Tensor | None,
    feature_map: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(q, k, v, kv, z, mask, restart, feature_map, eps)


@custom_op("drl::cpu_attention_packed", mutates_args=())
def _attend_packed(
    qkv: Tensor, kv: Tensor | None, z: Tensor | None, mask: Tensor | None, restart: Tensor | None,
    feature_map: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(*qkv.unbind(2), kv, z, mask, restart, feature_map, eps)


@custom_op("drl::cpu_attention_backward", mutates_args=())
def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor | None, z: Tensor | None, mask: Tensor | None, restart: Tensor | None,
    out: Tensor, d_out: Tensor, d_kv: Tensor | None, d_z: Tensor | None, feature_map: str, eps: float, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    states = _backward(gradients, q, k, v, kv, z, mask, restart, out, d_out, d_kv, d_z, feature_map, eps, wanted)
    return *gradients, *states


@custom_op("drl::cpu_attention_packed_backward", mutates_args=())
def _attend_packed_backward(
    qkv: Tensor, kv: Tensor | None, z: Tensor | None, mask: Tensor | None, restart: Tensor | None,
    out: Tensor, d_out: Tensor, d_kv: Tensor | None, d_z: Tensor | None, feature_map: str, eps: float, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradient, qkv = qkv.new_empty(qkv.shape), qkv.unbind(2)
    states = _backward(
        gradient.unbind(2), *qkv, kv, z, mask, restart, out, d_out, d_kv, d_z, feature_map, eps, wanted
    )
    return gradient, *states


@_attend.register_fake
def _(q, k, v, kv, z, mask, restart, feature_map, eps):
    return _buffers(q, v)


@_attend_packed.register_fake
def _(qkv, kv, z, mask, restart, feature_map, eps):
    return _buffers(*qkv.unbind(2)[1:])


@_attend_backward.register_fake
def _(q, k, v, kv, z, mask, restart, out, d_out, d_kv, d_z, feature_map, eps, wanted):
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    return *gradients, *(_buffers(q, v)[1:] if wanted else (q.new_empty(0), q.new_empty(0)))


@_attend_packed_backward.register_fake
def _(qkv, kv, z, mask, restart, out, d_out, d_kv, d_z, feature_map, eps, wanted):
    states = _buffers(*qkv.unbind(2)[1:])[1:] if wanted else (qkv.new_empty(0), qkv.new_empty(0))
    return qkv.new_empty(qkv.shape), *states


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.feature_map, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[0])
    ctx.set_materialize_grads(False)  # a state that nothing reads has no gradient, and none is filled with zeros


def _differentiate(ctx, d_out, d_kv, d_z):
    *inputs, out = ctx.saved_tensors
    operator = _attend_packed_backward if len(inputs) == 5 else _attend_backward
    wanted = any(ctx.needs_input_grad[len(inputs) - 4 : len(inputs) - 2])
    d_out = torch.zeros_like(out) if d_out is None else d_out
    *gradients, d_kv, d_z = operator(*inputs, out, d_out, d_kv, d_z, ctx.feature_map, ctx.eps, wanted)
    return *gradients, *((d_kv, d_z) if wanted else (None, None)), None, None, None, None


for operator in (_attend, _attend_packed):
    operator.register_autograd(_differentiate, setup_context=_keep)


def attend(values: tuple[Tensor, ...], kv, z, mask, restart, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Output and outgoing kv, z; arguments as in linear_attention, None where there is no state. `values` are q, k and
    v, or one tensor (B, T, 3, H, K) of all three."""
    operator = _attend_packed if len(values) == 1 else _attend
    values = [x if x.stride(-1) == 1 else x.contiguous() for x in values]
    outs = []
    for start in range(0, values[0].shape[1], CHUNK):
        now = slice(start, start + CHUNK)
        part = None if mask is None else mask[:, now]
        out, kv, z = operator(*(x[:, now] for x in values), kv, z, part, restart, feature_map, eps)
        outs.append(out)
        restart = None
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1), kv, z
