"""Causal linear attention: one operator, its past a state of constant size.

Softmax attention weighs the past by exp(q . k). With phi(q) . phi(k) instead, phi >= 0, the sum over the past
no longer depends on the query and becomes a state (Katharopoulos et al. 2020, arXiv 2006.16236, eqs. 16 to 20):

    S_t = S_{t-1} + phi(k_t) v_t^T                  (K, V)   what was seen           state.kv
    z_t = z_{t-1} + phi(k_t)                        (K,)     how much was seen       state.z
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps)   (V,)     what it means for this query

    reference.py     the recurrence in a Python loop, any float dtype          the oracle
    chunked.py       quadratic inside a chunk, a running sum between chunks    training and acting, any device
    triton/          fused kernels                                              training and acting, on a GPU
    cpu/             compiled: a policy's whole step, and the operator          training and acting, on a CPU
    feature_map.py   phi
    decay.py         a past that fades, S_t = g S_{t-1} + ..., where a backend does not do it itself

Beside it stands what a layer does to every token on its own, token_wise.py, in plain torch or as one kernel.

This package imports torch alone, and triton/ Triton. Of reinforcement learning it knows nothing, but for the step in
cpu/, whose one call is a policy's. Dimension key, used as suffixes throughout (k_BTHK is a tensor of four dimensions):

    B batch    T tokens    H heads    K features per head    V values per head    C chunk    N chunks
"""

from drl.kernels.cpu import CompiledPolicy, instruction_sets
from drl.kernels.feature_map import FEATURE_MAPS
from drl.kernels.linear_attention import (
    LinearAttentionState,
    available_backends,
    linear_attention,
    linear_attention_packed,
    linear_attention_step,
)
from drl.kernels.token_wise import residual_mlp

__all__ = [
    "CompiledPolicy",
    "FEATURE_MAPS",
    "LinearAttentionState",
    "available_backends",
    "instruction_sets",
    "linear_attention",
    "linear_attention_packed",
    "linear_attention_step",
    "residual_mlp",
]
