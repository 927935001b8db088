"""Self-attention layers: the linear one that can go on from a state, and the softmax one that cannot.

Both read (B, T, D) and give (B, T, D) and the state after the last token; softmax has none and answers None.
Dimension key: B batch, T tokens, D width, H heads, K features per head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from drl.config import ModelConfig
from drl.kernels import NULL_KEY, LinearAttentionState, linear_attention, linear_attention_step


class LinearAttention(nn.Module):
    """Causal linear attention; `step` is the same layer for a few new tokens without gradient."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.feature_map, self.backend = config.heads, config.feature_map, config.backend
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(
        self, x: Tensor, mask: Tensor | None, state: LinearAttentionState | None
    ) -> tuple[Tensor, LinearAttentionState]:
        """x (B, T, D); mask (B, T), False where a token must leave no trace; state after this chunk comes back."""
        return self._run(linear_attention, x, mask, state)

    def step(
        self, x: Tensor, mask: Tensor | None, state: LinearAttentionState | None
    ) -> tuple[Tensor, LinearAttentionState]:
        return self._run(linear_attention_step, x, mask, state)

    def _run(self, operator, x_BTD, mask_BT, state):
        q_BTHK, k_BTHK, v_BTHK = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if mask_BT is not None:
            k_BTHK = k_BTHK.masked_fill(~mask_BT[..., None, None], NULL_KEY[self.feature_map])
        out_BTHK, state = operator(
            q_BTHK, k_BTHK, v_BTHK, state, feature_map=self.feature_map, backend=self.backend
        )
        return self.out(out_BTHK.flatten(2)), state


class SoftmaxAttention(nn.Module):
    """Causal softmax attention over the chunk alone: the baseline, re-run over a window at every step."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None, state: None) -> tuple[Tensor, None]:
        """As LinearAttention; padding is on the right, so the causal order alone hides it."""
        q_BHTK, k_BHTK, v_BHTK = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, dropout_p=dropout)
        return self.out(out_BHTK.transpose(1, 2).flatten(2)), None
