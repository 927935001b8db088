"""A past that fades, by backends that know nothing of it.

A head's state is multiplied by its g, 0 < g <= 1, before each token that counts. Let p_t be how many counted up to t:

    S_t = g S_{t-1} + phi(k_t) v_t^T    is    S_t = g^p_t S'_t,    S'_t = S'_{t-1} + g^-p_t phi(k_t) v_t^T

and z alike. So keys times g^-p and queries times g^p go through attention that forgets nothing, eps being what it was,
and the state after it is multiplied by g^p. g^-p grows, so long sequences go in segments that each count from 1.
Weights are float64 until they are rounded once: an exponent of 80 in float32 would be a weight off by 3e-6.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# A segment's last token weighs at most 2^BITS: float32 has 45 bits left for keys times values. A window of 20 steps
# whose quickest head forgets half in a quarter of a step is still one segment.
BITS = 82


def check(decay: Sequence[float], heads: int) -> None:
    """Raises ValueError unless there is a number in (0, 1] for each head."""
    if len(decay) != heads:
        raise ValueError(f"decay must be one number for each of {heads} heads, got {len(decay)}")
    for g in decay:
        if not 0 < g <= 1:
            raise ValueError(f"decay must be in (0, 1], got {g}")


def factors(decay: Sequence[float], mask: Tensor | None, like: Tensor) -> Tensor:
    """What multiplies the state before each token, (B, T, H), of the dtype and device of `like`, (B, T, ...)."""
    shape = like.shape[:2]  # filled, not copied from the host: that no CUDA graph could hold
    factors_BTH = torch.stack([like.new_full(shape, g) for g in decay], dim=-1)
    return factors_BTH if mask is None else factors_BTH.masked_fill(~mask[..., None], 1)


def attend(
    plain: Callable[..., tuple[Tensor, Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    phi: Callable[[Tensor], Tensor],
    decay: Sequence[float],
    exact: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, T, H, V) in `dtype`, and kv, z after the last token.

    Args:
        plain: plain(q, k, v, kv, z, restart) is attention that forgets nothing, of queries and keys after phi.
        q, k, v, kv, z, mask, restart: as in linear_attention, kv and z None where there is no state.
        exact: what phi and weights are multiplied in.
        dtype: of what `plain` is given.
    """
    rates = [min(-math.log2(g), BITS) for g in decay]  # bits that a head forgets at each token
    size = max(1, int(BITS / max(rates)))
    outs = []
    with torch.autocast(v.device.type, enabled=False):
        for start in range(0, k.shape[1], size):
            q_BTHK, k_BTHK, v_BTHV = (x[:, start : start + size] for x in (q, k, v))
            mask_BT = None if mask is None else mask[:, start : start + size]
            bits_BTH = _forgotten(k_BTHK, mask_BT, rates)
            fades_BTH, weights_BTH = ((sign * bits_BTH).exp2().to(exact) for sign in (-1, 1))
            if mask_BT is not None:
                weights_BTH = weights_BTH.masked_fill(~mask_BT[..., None], 0)
            queries_BTHK = phi(q_BTHK.to(exact)) * fades_BTH[..., None]
            keys_BTHK = phi(k_BTHK.to(exact)) * weights_BTH[..., None]
            out_BTHV, kv, z = plain(*(x.to(dtype) for x in (queries_BTHK, keys_BTHK, v_BTHV)), kv, z, restart)
            fade_BH = fades_BTH[:, -1]
            kv, z, restart = kv * fade_BH[..., None, None], z * fade_BH[..., None], None
            outs.append(out_BTHV)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), kv, z


def _forgotten(like: Tensor, mask_BT: Tensor | None, rates: Sequence[float]) -> Tensor:
    """Bits forgotten since the segment began, of each head up to each token: (B or 1, T, H) float64."""
    if mask_BT is None:
        count_BT = torch.arange(1, like.shape[1] + 1, dtype=torch.float64, device=like.device)[None]
    else:
        count_BT = mask_BT.cumsum(1, dtype=torch.float64)
    return torch.stack([count_BT * rate for rate in rates], dim=-1)  # no constants from the host, as above
