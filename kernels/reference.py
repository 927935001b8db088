"""The oracle: the three lines of mathematics of kernels/__init__.py, one token at a time."""

import torch
from torch import Tensor


def attend(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    kv_BHKV: Tensor,
    z_BHK: Tensor,
    eps: float,
    decay_BTH: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence in a Python loop: slow, obvious, differentiable. q and k come after the feature map; the state
    is multiplied by `decay_BTH` before each token."""
    outputs = []
    fades = [None] * q_BTHK.shape[1] if decay_BTH is None else decay_BTH.unbind(1)
    for q_BHK, k_BHK, v_BHV, fade_BH in zip(q_BTHK.unbind(1), k_BTHK.unbind(1), v_BTHV.unbind(1), fades, strict=True):
        if fade_BH is not None:
            kv_BHKV, z_BHK = kv_BHKV * fade_BH[..., None, None], z_BHK * fade_BH[..., None]
        kv_BHKV = kv_BHKV + torch.einsum("bhk,bhv->bhkv", k_BHK, v_BHV)
        z_BHK = z_BHK + k_BHK
        numerator_BHV = torch.einsum("bhk,bhkv->bhv", q_BHK, kv_BHKV)
        denominator_BH1 = torch.einsum("bhk,bhk->bh", q_BHK, z_BHK)[..., None] + eps
        outputs.append(numerator_BHV / denominator_BH1)
    return torch.stack(outputs, dim=1), kv_BHKV, z_BHK
