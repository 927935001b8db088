"""The door of the operator: check the contract, choose a backend, keep the state explicit."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from drl.kernels import chunked, reference, triton
from drl.kernels import decay as fading
from drl.kernels.cpu import attention as cpu
from drl.kernels.feature_map import FEATURE_MAPS

TORCH = {"reference": reference.attend, "chunked": chunked.attend}
FUSED = {"triton": triton, "cpu": cpu}
STEP_TOKENS = 4


class LinearAttentionState(NamedTuple):
    """Everything attention remembers, of the same size after one token and after a million.

    Attributes:
        kv: sum of phi(k) v^T, shape (B, H, K, V); float32, or float64 for float64 inputs.
        z: sum of phi(k), shape (B, H, K), of the same dtype.
    """

    kv: Tensor
    z: Tensor

    @classmethod
    def zeros(cls, batch: int, heads: int, key_dim: int, value_dim: int, **options) -> Self:
        """The empty past; `options` are torch.zeros' own (dtype, device)."""
        return cls(
            torch.zeros(batch, heads, key_dim, value_dim, **options), torch.zeros(batch, heads, key_dim, **options)
        )

    def restart(self, rows: Tensor) -> Self:
        """The same state with an empty past in the rows where `rows`, bool (B,), is True."""
        return type(self)(
            self.kv.masked_fill(rows[:, None, None, None], 0), self.z.masked_fill(rows[:, None, None], 0)
        )

    def detach(self) -> Self:
        """The same numbers, cut off from the graph that made them."""
        return type(self)(self.kv.detach(), self.z.detach())

    def to(self, *args, **kwargs) -> Self:
        """Tensor.to for both parts."""
        return type(self)(self.kv.to(*args, **kwargs), self.z.to(*args, **kwargs))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState | None = None,
    *,
    mask: Tensor | None = None,
    restart: Tensor | None = None,
    decay: Sequence[float] | None = None,
    feature_map: str = "elu1",
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, LinearAttentionState]:
    """Causal linear attention over T tokens that continue the past in `state` (arXiv 2006.16236, section 3.3).

    Args:
        q, k: queries and keys before the feature map, shape (B, T, H, K), any float dtype.
        v: values, shape (B, T, H, V), of the same dtype and device.
        state: what came before; None is an empty past. It is read, never written.
        mask: False where a token must leave no trace in later outputs and in the state (its own output is still
            defined), bool (B, T). None: every token counts.
        restart: True in rows whose past is forgotten before the first token, bool (B,). None: in none.
        decay: what a head's state is multiplied by before each token that counts, H numbers in (0, 1] (as in arXiv
            2307.08621, section 2.1, and the normaliser alike). None: nothing is forgotten.
        feature_map: "elu1" (elu(x) + 1, the paper's), "relu" or "identity".
        eps: added to the denominator.
        backend: "auto" or a key of `available_backends()`. An explicit choice never falls back to another; "auto" is
            "triton" for float32, bfloat16 and float16 on a CUDA device, "cpu" for float32 and bfloat16 on a CPU where
            it was built, else "chunked".

    Returns:
        Output (B, T, H, V) in the dtype of `v`, and the state after token T. Sums and denominators are float32
        (float64 for float64 inputs), under autocast too. Differentiable in q, k, v and the incoming state, through
        output and outgoing state.

    Raises:
        ValueError: a shape, dtype, device, decay, feature map or backend is outside this contract.
    """
    return _run(triton.attend, (q, k, v), q, k, v, state, mask, restart, decay, feature_map, eps, backend)


def linear_attention_packed(
    qkv: Tensor,
    state: LinearAttentionState | None = None,
    *,
    mask: Tensor | None = None,
    restart: Tensor | None = None,
    decay: Sequence[float] | None = None,
    feature_map: str = "elu1",
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, LinearAttentionState]:
    """`linear_attention` on what one projection gives: qkv (B, T, 3, H, K), with q, k and v at [:, :, 0], 1 and 2.

    The same numbers; the gradient comes back packed too, so that nothing is copied to put it together.

    Raises:
        ValueError: as `linear_attention`, or qkv is not (B, T, 3, H, K).
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, T, 3, H, K), got {tuple(qkv.shape)}")
    return _run(
        triton.attend_packed, (qkv,), *qkv.unbind(2), state, mask, restart, decay, feature_map, eps, backend
    )


@torch.no_grad()
def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState | None,
    *,
    mask: Tensor | None = None,
    restart: Tensor | None = None,
    decay: Sequence[float] | None = None,
    feature_map: str = "elu1",
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, LinearAttentionState]:
    """`linear_attention` for T = 1 to 4 new tokens, without gradient: acting. The old state stays as it was.

    Raises:
        ValueError: as `linear_attention`, or T is not 1 to 4.
    """
    if q.ndim == 4 and not 1 <= q.shape[1] <= STEP_TOKENS:
        raise ValueError(f"a step takes 1 to {STEP_TOKENS} tokens, got {q.shape[1]}; use linear_attention")
    return _run(triton.attend_step, (q, k, v), q, k, v, state, mask, restart, decay, feature_map, eps, backend)


def available_backends() -> dict[str, str | None]:
    """Every backend name: None where it can run on this machine, else the reason why not."""
    return dict.fromkeys(TORCH) | {name: kind.unavailable() for name, kind in FUSED.items()}


def choose(backend: str, values: Tensor) -> str:
    """The backend that runs on tensors like `values`, (..., V), when `backend` is asked for.

    Raises:
        ValueError: the backend is unknown, or cannot run here or on such tensors.
    """
    if backend == "auto":
        best = "triton" if values.is_cuda else "cpu"
        return best if not FUSED[best].unavailable() and not FUSED[best].refuses(values) else "chunked"
    reasons = available_backends()
    if backend not in reasons:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(['auto', *reasons])}")
    reason = reasons[backend] or (FUSED[backend].refuses(values) if backend in FUSED else None)
    if reason:
        raise ValueError(f"backend {backend!r} is unavailable: {reason}")
    return backend


def _run(
    fused, tensors, q, k, v, state, mask, restart, decay, feature_map, eps, backend
) -> tuple[Tensor, LinearAttentionState]:
    """Check, choose, compute: `fused` is the Triton operator of a door, `tensors` what it takes for q, k and v."""
    _check(q, k, v, state, mask, restart, feature_map)
    if decay is not None:
        fading.check(decay, k.shape[2])
    backend, past = choose(backend, v), state or (None, None)
    if decay is not None and min(decay) == 1:
        decay = None
    if backend == "triton":
        out, *after = fused(*tensors, *past, mask, restart, decay, feature_map, eps)
    elif decay is None:
        out, *after = _plain(backend, tensors, *past, mask, restart, feature_map, eps)
    elif backend == "reference":
        out, *after = _torch(backend, q, k, v, *past, mask, restart, feature_map, eps, decay)
    else:
        out, *after = fading.attend(
            lambda q, k, v, kv, z, restart: _plain(backend, (q, k, v), kv, z, None, restart, "identity", eps),
            q, k, v, *past, mask, restart, FEATURE_MAPS[feature_map], decay, _exact(v),
            v.dtype if backend == "cpu" else _exact(v)
        )
        out = out.to(v.dtype)
    return out, LinearAttentionState(*after)


def _plain(backend, tensors, kv, z, mask, restart, feature_map, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Attention that forgets nothing, by any backend but Triton's."""
    if backend == "cpu":
        return cpu.attend(tensors, kv, z, mask, restart, feature_map, eps)
    q, k, v = tensors[0].unbind(2) if len(tensors) == 1 else tensors
    return _torch(backend, q, k, v, kv, z, mask, restart, feature_map, eps)


def _torch(backend, q, k, v, kv, z, mask, restart, feature_map, eps, decay=None) -> tuple[Tensor, Tensor, Tensor]:
    """A backend made of torch operators: it takes phi(q) and phi(k), and a token that does not count has a zero key."""
    B, _, H, K = k.shape
    phi, exact = FEATURE_MAPS[feature_map], _exact(v)
    if kv is None:
        kv, z = LinearAttentionState.zeros(B, H, K, v.shape[-1], dtype=exact, device=v.device)
    elif restart is not None:
        kv, z = LinearAttentionState(kv, z).restart(restart)
    with torch.autocast(v.device.type, enabled=False):
        keys = phi(k.to(exact))
        if mask is not None:
            keys = keys.masked_fill(~mask[..., None, None], 0)
        faded = () if decay is None else (fading.factors(decay, mask, keys),)
        out, kv, z = TORCH[backend](phi(q.to(exact)), keys, v.to(exact), kv, z, eps, *faded)
    return out.to(v.dtype), kv, z


def _exact(values: Tensor) -> torch.dtype:
    """What sums and states are kept in."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _check(q: Tensor, k: Tensor, v: Tensor, state, mask, restart, feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"unknown feature_map {feature_map!r}; expected one of {', '.join(FEATURE_MAPS)}")
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"q and k must share a shape (B, T, H, K), got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be (B, T, H, V) with (B, T, H) = {tuple(k.shape[:3])}, got {tuple(v.shape)}")
    if q.shape[1] == 0:
        raise ValueError("T must be at least 1, got an empty sequence")
    if not v.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    B, T, H, K = k.shape
    _check_part("mask", mask, (B, T), torch.bool, v)
    _check_part("restart", restart, (B,), torch.bool, v)
    if state is not None:
        _check_part("state.kv", state.kv, (B, H, K, v.shape[-1]), _exact(v), v)
        _check_part("state.z", state.z, (B, H, K), _exact(v), v)


def _check_part(name: str, part: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, v: Tensor) -> None:
    if part is None:
        return
    if tuple(part.shape) != shape:
        belongs = "; a state belongs to the batch that produced it" if name.startswith("state") else ""
        raise ValueError(f"{name} must have shape {shape}, got {tuple(part.shape)}{belongs}")
    if part.dtype != dtype or part.device != v.device:
        raise ValueError(f"{name} must be {dtype} on {v.device}, got {part.dtype} on {part.device}")
