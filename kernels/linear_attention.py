"""The door of the operator: check the contract, choose a backend, keep the state explicit."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from drl.kernels import chunked, reference
from drl.kernels.feature_map import FEATURE_MAPS

BACKENDS = {"reference": reference.attend, "chunked": chunked.attend}
PLANNED = {"triton": "not part of this version; use 'chunked'", "cpu": "not part of this version; use 'chunked'"}
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

    def select(self, rows: Tensor) -> Self:
        """The states of `rows`, int64 (R,), as a new state of R rows."""
        return type(self)(self.kv.index_select(0, rows), self.z.index_select(0, rows))

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
    feature_map: str = "elu1",
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, LinearAttentionState]:
    """Causal linear attention over T tokens that continue the past in `state` (arXiv 2006.16236, section 3.3).

    Args:
        q, k: queries and keys before the feature map, shape (B, T, H, K), any float dtype.
        v: values, shape (B, T, H, V), of the same dtype and device.
        state: what came before; None is an empty past. It is read, never written.
        feature_map: "elu1" (elu(x) + 1, the paper's), "relu" or "identity".
        eps: added to the denominator.
        backend: "auto" or a key of `available_backends()`. An explicit choice never falls back to another.

    Returns:
        Output (B, T, H, V) in the dtype of `v`, and the state after token T. Sums and denominators are float32
        (float64 for float64 inputs). Differentiable in q, k, v and the incoming state, through output and
        outgoing state.

    Raises:
        ValueError: a shape, dtype, device, feature map or backend is outside this contract.
    """
    attend = _backend(backend)
    _check(q, k, v, state, feature_map)
    exact = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        B, _, H, K = k.shape
        state = LinearAttentionState.zeros(B, H, K, v.shape[-1], dtype=exact, device=v.device)
    phi = FEATURE_MAPS[feature_map]
    out, kv, z = attend(phi(q.to(exact)), phi(k.to(exact)), v.to(exact), *state, eps)
    return out.to(v.dtype), LinearAttentionState(kv, z)


@torch.no_grad()
def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState | None,
    *,
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
    return linear_attention(q, k, v, state, feature_map=feature_map, eps=eps, backend=backend)


def available_backends() -> dict[str, str | None]:
    """Every backend name: None where it can run on this machine, else the reason why not."""
    return dict.fromkeys(BACKENDS) | PLANNED


def _backend(name: str):
    if name == "auto":
        name = "chunked"
    if name in BACKENDS:
        return BACKENDS[name]
    if name in PLANNED:
        raise ValueError(f"backend {name!r} is unavailable: {PLANNED[name]}")
    raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(['auto', *available_backends()])}")


def _check(q: Tensor, k: Tensor, v: Tensor, state: LinearAttentionState | None, feature_map: str) -> None:
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
    if state is None:
        return
    B, _, H, K = k.shape
    exact = torch.float64 if v.dtype == torch.float64 else torch.float32
    for name, part, shape in (("kv", state.kv, (B, H, K, v.shape[-1])), ("z", state.z, (B, H, K))):
        if tuple(part.shape) != shape:
            raise ValueError(
                f"state.{name} must have shape {shape}, got {tuple(part.shape)}; "
                "a state belongs to the batch that produced it"
            )
        if part.dtype != exact or part.device != v.device:
            raise ValueError(f"state.{name} must be {exact} on {v.device}, got {part.dtype} on {part.device}")
