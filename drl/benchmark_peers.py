"""Who is measured beside whom: our backends, and the implementations of others where they are installed.

Every operator reads queries, keys and values before the feature map and answers with the output, so that all of them
do the same work. Peers are found, never required: what is missing is named with its reason.
"""

import functools
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drl.benchmark_device import one_line
from drl.errors import UserError, did_you_mean
from drl.kernels import (
    FEATURE_MAPS,
    LinearAttentionState,
    available_backends,
    linear_attention,
    linear_attention_step,
)

try:
    from drl.kernels import linear_attention_packed
except ImportError:
    linear_attention_packed = None

ROWS = {  # group: its operators
    "ours": ("triton", "chunked", "chunked-compiled"),
    "fla": ("fla-chunk", "fla-fused-chunk", "fla-fused-recurrent"),
    "fast-transformers": ("fast-transformers",),
    "softmax": ("softmax",),
}
EPS = 1e-6


class Operator(NamedTuple):
    """One row of the table.

    Attributes:
        name: as shown, one of ROWS' values.
        group: one of ROWS.
        call: q, k, v, each (B, T, H, D), to the output (B, T, H, D); for a step q, k, v and the state to the output
            and the new state.
        packed: the same from q, k, v in one tensor (B, T, 3, H, D); None: `call` reads views of it.
        dtype: of its inputs, where it takes no other.
        capturable: whether a CUDA graph can hold it.
        linear: False where it computes something else, whose numbers are not compared.
    """

    name: str
    group: str
    call: Callable[..., Any]
    packed: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype | None = None
    capturable: bool = True
    linear: bool = True


def operators(
    wanted: str, *, feature_map: str, step: bool, fast_transformers: str
) -> tuple[list[Operator], dict[str, str]]:
    """The operators that are there, ours first, and the reason for each that is not.

    Args:
        wanted: groups and operators of ROWS, separated by commas; empty for all.
        feature_map: a key of FEATURE_MAPS.
        step: whether a few tokens continue a state, or whole sequences begin without one.
        fast_transformers: the file causal_product_cuda.cu of pytorch-fast-transformers, or empty.

    Raises:
        UserError: a name in `wanted` is not in ROWS.
    """
    names = {name.strip() for name in wanted.split(",") if name.strip()} or ROWS.keys()
    known = ROWS.keys() | {row for rows in ROWS.values() for row in rows}
    for name in sorted(names - known):
        raise UserError(f"nothing to measure is called {name!r}; {did_you_mean(name, known)}")
    makers: dict[str, Callable[[], list[Operator]]] = {
        "ours": functools.partial(_ours_step if step else _ours, feature_map),
        "fla": functools.partial(_fla_step if step else _fla, feature_map),
    }
    if not step:
        makers["fast-transformers"] = functools.partial(_fast_transformers, feature_map, fast_transformers)
        makers["softmax"] = _softmax
    chosen, missing = [], {}
    for group, make in makers.items():
        if not names & {group, *ROWS[group]}:
            continue
        try:
            chosen += [operator for operator in make() if names & {group, operator.name}]
        except _Missing as reason:
            missing[group] = str(reason)
        except Exception as error:  # a peer's import or build may fail in any way; the others are measured
            missing[group] = one_line(error)
    if names & {"ours", "triton"} and (reason := available_backends().get("triton", "not part of this version")):
        missing["triton"] = reason
    return chosen, missing


def versions() -> str:
    """Versions of what peers are made of, where they are installed."""
    packages = [name for name in ("triton", "fla-core", "einops") if _installed(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


class _Missing(Exception):
    """A peer is not here, for a reason that needs no more words."""


def _ours(feature_map: str) -> list[Operator]:
    def call(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, feature_map=feature_map, eps=EPS, backend=backend)[0]

    def packed(backend: str, qkv: Tensor) -> Tensor:
        if linear_attention_packed is None:
            return call(backend, *qkv.unbind(2))
        return linear_attention_packed(qkv, feature_map=feature_map, eps=EPS, backend=backend)[0]

    return _with_backends(call, packed)


def _ours_step(feature_map: str) -> list[Operator]:
    def call(backend: str, q: Tensor, k: Tensor, v: Tensor, state: LinearAttentionState):
        return linear_attention_step(q, k, v, state, feature_map=feature_map, eps=EPS, backend=backend)

    return _with_backends(call, None)


def _with_backends(call: Callable[..., Any], packed: Callable[..., Any] | None) -> list[Operator]:
    """Our backends as a user calls them, and the one in plain torch also under torch.compile, shape by shape."""
    def of(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors: function(backend, *tensors)

    def compiled(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def made() -> Callable[..., Any]:  # at the first call: the compiler's import takes seconds
            return torch.compile(of(backend, function), dynamic=False)

        return lambda *tensors: made()(*tensors)

    rows = [("chunked", "chunked", of), ("chunked-compiled", "chunked", compiled)]
    if available_backends().get("triton", "not part of this version") is None:
        rows.insert(0, ("triton", "triton", of))
    return [Operator(name, "ours", make(backend, call), packed and make(backend, packed))
            for name, backend, make in rows]


def _fla(feature_map: str) -> list[Operator]:
    """fla-core's three forms, normalised; the final state is not asked for, which is the kindest to them."""
    phi, forms = FEATURE_MAPS[feature_map], _import_fla()

    def make(form: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, v: form(phi(q), phi(k), v, scale=1.0, normalize=True)[0]

    return [
        Operator("fla-chunk", "fla", make(forms.chunk_linear_attn)),
        Operator("fla-fused-chunk", "fla", make(forms.fused_chunk_linear_attn)),
        Operator("fla-fused-recurrent", "fla", make(forms.fused_recurrent_linear_attn)),
    ]


def _fla_step(feature_map: str) -> list[Operator]:
    phi, forms = FEATURE_MAPS[feature_map], _import_fla()

    def call(q: Tensor, k: Tensor, v: Tensor, state: LinearAttentionState):
        out, (kv, z) = forms.fused_recurrent_linear_attn(
            phi(q), phi(k), v, scale=1.0, normalize=True, initial_state=(state.kv, state.z[:, None]),
            output_final_state=True)
        return out, LinearAttentionState(kv, z[:, 0])

    return [Operator("fla-fused-recurrent", "fla", call)]


def _import_fla():
    _need_cuda()
    if not _installed("fla-core"):
        raise _Missing("not installed; type: pip install --no-deps fla-core einops")
    os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")  # its Triton kernels and no others, read on import
    import fla.ops.linear_attn as linear_attn

    return linear_attn


def _fast_transformers(feature_map: str, source: str) -> list[Operator]:
    """pytorch-fast-transformers' CUDA kernel, built from its own file, normalised as its attention module does."""
    _need_cuda()
    if not source:
        raise _Missing("add --fast_transformers causal_product_cuda.cu, from the source of pytorch-fast-transformers")
    if not os.path.isfile(source):
        raise _Missing(f"no such file: {source}")
    from torch.utils import cpp_extension

    try:
        extension = cpp_extension.load("causal_product_cuda", [source])
    except RuntimeError as error:  # the compiler's output follows its command lines
        reasons = [line.strip() for line in str(error).splitlines() if "error" in line and "Error building" not in line]
        raise _Missing(f"{source} does not build: {reasons[0][:300] if reasons else one_line(error)}") from error
    phi = FEATURE_MAPS[feature_map]

    class CausalProduct(torch.autograd.Function):
        """q, k, v and the result are (B, H, T, D), float32."""

        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            product = torch.zeros_like(v)
            extension.causal_dot_product(q, k, v, product)
            return product

        @staticmethod
        def backward(ctx, gradient):
            inputs = ctx.saved_tensors
            gradients = tuple(torch.zeros_like(x) for x in inputs)
            extension.causal_dot_backward(*inputs, gradient, *gradients)
            return gradients

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = phi(q), phi(k)
        product = CausalProduct.apply(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
        denominator = torch.einsum("bthd,bthd->bth", q, k.cumsum(1)) + EPS
        return product.transpose(1, 2).contiguous() / denominator[..., None]

    return [Operator("fast-transformers", "fast-transformers", call, dtype=torch.float32, capturable=False)]


def _softmax() -> list[Operator]:
    """torch's scaled_dot_product_attention: another operator, without a state."""
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

    return [Operator("softmax", "softmax", call, linear=False)]


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        raise _Missing("needs CUDA")


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
