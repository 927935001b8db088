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
    q_BHTK, k_BHTK, v_BHTV = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
    T = q_BHTK.shape[2]
    if T <= WHOLE:
        out_BHTV = _chunk(q_BHTK, k_BHTK, v_BHTV, kv_BHKV, z_BHK, eps)
        return out_BHTV.transpose(1, 2), kv_BHKV + k_BHTK.mT @ v_BHTV, z_BHK + k_BHTK.sum(2)

    q_BHNCK, k_BHNCK, v_BHNCV = (_split(x) for x in (q_BHTK, k_BHTK, v_BHTV))
    # A running sum shifted by one chunk: `cumsum - own` would let the rounding of a chunk's own keys into its past,
    # and a query would see its future in the last bits.
    kv_BHNKV = torch.cat([kv_BHKV[:, :, None], k_BHNCK.mT @ v_BHNCV], dim=2).cumsum(2)
    z_BHNK = torch.cat([z_BHK[:, :, None], k_BHNCK.sum(3)], dim=2).cumsum(2)
    out_BHNCV = _chunk(q_BHNCK, k_BHNCK, v_BHNCV, kv_BHNKV[:, :, :-1], z_BHNK[:, :, :-1], eps)
    # cloned: a view would keep the states of all chunks alive
    return out_BHNCV.flatten(2, 3)[:, :, :T].transpose(1, 2), kv_BHNKV[:, :, -1].clone(), z_BHNK[:, :, -1].clone()


def _chunk(q_CK: Tensor, k_CK: Tensor, v_CV: Tensor, kv_KV: Tensor, z_K: Tensor, eps: float) -> Tensor:
    """One chunk from the state before it; any leading dimensions.

    tril selects, it does not multiply: whatever the future holds is replaced by zero.
    """
    weights_CC = (q_CK @ k_CK.mT).tril()
    numerator_CV = weights_CC @ v_CV + q_CK @ kv_KV
    denominator_C1 = weights_CC.sum(-1, keepdim=True) + q_CK @ z_K[..., None] + eps
    return numerator_CV / denominator_C1


def _split(x_BHTD: Tensor) -> Tensor:
    """(B, H, T, D) to (B, H, N, C, D); the tail of the last chunk is zero and adds nothing to any sum."""
    return F.pad(x_BHTD, (0, 0, 0, -x_BHTD.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK))
