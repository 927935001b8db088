"""Self-attention layers: the linear one that can go on from a state, and the softmax one that cannot.

Both read (B, T, D) and give (B, T, D) and the state after the last token; softmax has none and answers None.
Dimension key: B batch, T tokens, D width, H heads, K features per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl.config import ModelConfig
from drl.kernels import LinearAttentionState, linear_attention_packed, linear_attention_step


def decay(config: ModelConfig) -> tuple[float, ...] | None:
    """What is left of each head's memory after a token, as numbers of float32, which all engines have; None where
    nothing fades."""
    left = [2 ** (-1 / (config.tokens * half_life)) for half_life in config.fading]
    return tuple(torch.tensor(left, device="cpu").tolist()) or None


class LinearAttention(nn.Module):
    """Causal linear attention; `step` is the same layer for a few new tokens without gradient."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.feature_map, self.backend = config.heads, config.feature_map, config.backend
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.fades = decay(config)
        if self.fades:  # among the weights, where the compiled step finds it
            self.register_buffer("decay", torch.tensor(self.fades))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        state: LinearAttentionState | None,
        restart: Tensor | None,
        read: slice = slice(None),
    ) -> tuple[Tensor, LinearAttentionState]:
        """x (B, T, D); mask (B, T), False where a token must leave no trace; restart (B,), True where the past in
        `state` is forgotten; read: the tokens whose output comes back, beside the state after this chunk."""
        out_BTHK, state = linear_attention_packed(
            self._qkv(x), state, mask=mask, restart=restart, decay=self.fades, feature_map=self.feature_map,
            backend=self.backend
        )
        return self.out(out_BTHK[:, read].flatten(2)), state

    def step(
        self,
        x: Tensor,
        mask: Tensor | None,
        state: LinearAttentionState | None,
        restart: Tensor | None,
        read: slice = slice(None),
    ) -> tuple[Tensor, LinearAttentionState]:
        """`forward` for the few tokens of one environment step, without gradient."""
        out_BTHK, state = linear_attention_step(
            *self._qkv(x).unbind(2), state,
            mask=mask, restart=restart, decay=self.fades, feature_map=self.feature_map, backend=self.backend
        )
        return self.out(out_BTHK[:, read].flatten(2)), state

    def _qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1))


class SoftmaxAttention(nn.Module):
    """Causal softmax attention over the chunk alone: the baseline, re-run over a window at every step.

    Attributes:
        fused: whether torch's fused operator does it; several models at once (torch.vmap, compiled) it cannot do.
    """

    fused = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(
        self, x: Tensor, mask: Tensor | None, state: None, restart: Tensor | None, read: slice = slice(None)
    ) -> tuple[Tensor, None]:
        """As LinearAttention; padding is on the right, so the causal order alone hides it."""
        q_BHTK, k_BHTK, v_BHTK = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if self.fused:
            out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, dropout_p=dropout)
        else:
            out_BHTK = self._attend(q_BHTK, k_BHTK, v_BHTK, dropout)
        return self.out(out_BHTK.transpose(1, 2)[:, read].flatten(2)), None

    def _attend(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, dropout: float) -> Tensor:
        exact = torch.promote_types(v_BHTK.dtype, torch.float32)  # scores of bfloat16 would be coarse
        with torch.autocast(v_BHTK.device.type, enabled=False):
            scores_BHTT = q_BHTK.to(exact) @ k_BHTK.to(exact).mT * q_BHTK.shape[-1] ** -0.5
        future_TT = torch.ones_like(scores_BHTT[0, 0], dtype=torch.bool).triu(1)
        weights_BHTT = scores_BHTT.masked_fill(future_TT, -torch.inf).softmax(-1).to(v_BHTK.dtype)
        return F.dropout(weights_BHTT, dropout) @ v_BHTK
