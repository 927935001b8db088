"""Matrix products instead of a loop: quadratic inside a chunk of C tokens, a running sum between chunks.

With S, z the state before a chunk and Q, K, V its rows (docs/mathematics.md derives this and its backward):

    A = tril(Q K^T)    O = (A V + Q S) / (A 1 + Q z + eps)    S <- S + K^T V    z <- z + K^T 1
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
WHOLE = 128  # up to this many tokens one chunk is cheaper than several (a window of 20 steps is 60 tokens)


def attend(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, kv_BHKV: Tensor, z_BHK: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers as reference.attend, and through autograd the same gradients."""
    T = q_BTHK.shape[1]
    chunk = T if T <= WHOLE else CHUNK
    q_BHNCK, k_BHNCK, v_BHNCV = (_split(x, chunk) for x in (q_BTHK, k_BTHK, v_BTHV))

    # Between chunks. A running sum shifted by one chunk: `cumsum - own` would let the rounding of a chunk's own
    # keys into its past, and a query would see its future in the last bits.
    kv_BHNKV = torch.cat([kv_BHKV[:, :, None], k_BHNCK.mT @ v_BHNCV], dim=2).cumsum(2)
    z_BHNK = torch.cat([z_BHK[:, :, None], k_BHNCK.sum(3)], dim=2).cumsum(2)
    past_BHNKV, past_BHNK1 = kv_BHNKV[:, :, :-1], z_BHNK[:, :, :-1, :, None]

    # Inside a chunk. tril selects, it does not multiply: whatever the future holds is replaced by zero.
    weights_BHNCC = (q_BHNCK @ k_BHNCK.mT).tril()
    numerator_BHNCV = weights_BHNCC @ v_BHNCV + q_BHNCK @ past_BHNKV
    denominator_BHNC1 = weights_BHNCC.sum(-1, keepdim=True) + q_BHNCK @ past_BHNK1 + eps

    out_BTHV = (numerator_BHNCV / denominator_BHNC1).flatten(2, 3)[:, :, :T].transpose(1, 2)
    return out_BTHV, kv_BHNKV[:, :, -1], z_BHNK[:, :, -1]


def _split(x_BTHD: Tensor, chunk: int) -> Tensor:
    """(B, T, H, D) to (B, H, N, C, D); the tail of the last chunk is zero and adds nothing to any sum."""
    pad = -x_BTHD.shape[1] % chunk
    return F.pad(x_BTHD, (0, 0, 0, 0, 0, pad)).transpose(1, 2).unflatten(2, (-1, chunk))
