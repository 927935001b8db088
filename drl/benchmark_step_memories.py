"""Other memories of an episode than ours: all keys and values of a softmax model, and fast-transformers' recurrence.

Both take the place of the blocks of a decision transformer, whose embedding and read-out they share.

Dimension key: T tokens, O observation, A action, D width, H heads, K features per head.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl.benchmark_model import TARGET_RETURN
from drl.model import DecisionTransformer
from drl.policy import RecurrentPolicy, WindowPolicy

Act = Callable[[np.ndarray, np.ndarray], np.ndarray]  # observation (1, O), reward (1,) -> action (1, A)


class KeyValueCache:
    """The blocks of a softmax model over the keys and values of every token of the episode so far: the new tokens
    (1, T, D) in, what the last block makes of them out.

    Args:
        model: of softmax attention.
        steps: environment steps that fit.
    """

    def __init__(self, model: DecisionTransformer, steps: int):
        config, capacity = model.config, model.config.tokens * steps
        self._model, self._length = model, 0
        shape = config.layers, 2, config.heads, capacity, config.width // config.heads
        self._kept = torch.empty(shape, dtype=model.head.weight.dtype).fill_(0)  # so that no step pays for new pages
        self._mask = self._kept.new_full((config.tokens, capacity), -torch.inf)  # last: the new tokens' columns
        self._mask.triu_(capacity - config.tokens + 1)

    def clear(self) -> None:
        """Forget the episode."""
        self._length = 0

    def __call__(self, x: Tensor) -> Tensor:
        tokens, begin, end = x.shape[1], self._length, self._length + x.shape[1]
        if end > self._mask.shape[1]:
            raise ValueError(f"the cache is full: {begin} tokens of {self._mask.shape[1]}")
        for block, (key_HTK, value_HTK) in zip(self._model.blocks, self._kept, strict=True):
            attention = block.attention
            qkv_TD = attention.qkv(block.norm_attention(x)[0])
            q_HTK, k_HTK, v_HTK = qkv_TD.view(tokens, 3, attention.heads, -1).permute(1, 2, 0, 3)
            key_HTK[:, begin:end], value_HTK[:, begin:end] = k_HTK, v_HTK
            out_HTK = F.scaled_dot_product_attention(
                q_HTK[None], key_HTK[None, :, :end], value_HTK[None, :, :end], attn_mask=self._mask[-tokens:, -end:]
            )[0]
            x = x + attention.out(out_HTK.transpose(0, 1).flatten(1))
            x = x + block.mlp(block.norm_mlp(x))
        self._length = end
        return x


class TokenByToken:
    """A recurrent encoder of fast-transformers, which takes one token at a time."""

    def __init__(self, encoder: nn.Module):
        self._encoder, self._state = encoder, None

    def clear(self) -> None:
        """Forget the episode."""
        self._state = None

    def __call__(self, x: Tensor) -> Tensor:
        for token_1D in x.unbind(1):
            last_1D, self._state = self._encoder(token_1D, self._state)
        return last_1D[:, None]


def remembered(policy: RecurrentPolicy | WindowPolicy, memory: KeyValueCache | TokenByToken) -> Callable[[], Act]:
    """Episodes of `policy`'s model with `memory` for its blocks. A step is the tokens (a_{t-1}, R_t, s_t); (R_t, s_t)
    where it is the first or the model reads no actions."""
    model = policy.model

    def begin() -> Act:
        memory.clear()
        timestep, return_to_go = 0, TARGET_RETURN
        action = policy._tensor(np.zeros((1, model.action_dim)))

        @torch.no_grad()
        def act(observation, reward):
            nonlocal timestep, return_to_go, action
            if timestep:
                return_to_go -= reward.item()
            normal = (policy._tensor(observation) - policy._mean) / policy._std
            heard = model._heard(normal.new_tensor([return_to_go]), torch.tensor([timestep]))
            x, times = model._embed(heard, normal, action), [timestep, timestep]
            if model.config.action_tokens:
                x, times = x.roll(1, dims=1), [max(timestep - 1, 0), *times]
            x = x + model._embed_timestep(torch.tensor([times]))
            x = model.norm_embedding(x if timestep else x[:, -2:])
            action = model._read_out(memory(x)[:, -1])
            timestep += 1
            return action.numpy()

        return act

    return begin
