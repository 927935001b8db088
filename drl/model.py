"""Decision Transformer (Chen et al. 2021, arXiv 2106.01345): an episode read as a sentence of returns,
observations and actions, with causal linear attention as its backbone.

    R_0 s_0 a_0  R_1 s_1 a_1  ...          three tokens per environment step, or two, without the actions
        |            |
       a_0          a_1                    an action is read out at each observation's token

`forward` reads a chunk of steps from a state, `step` reads one environment step, (a_{t-1}, R_t, s_t) together;
they share every weight and agree token for token (tests/test_policy.py).

Dimension key: B batch, L environment steps, N tokens of each (3 or 2), T tokens, D width, O observation, A action.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl.attention import LinearAttention, SoftmaxAttention
from drl.cloning import Cloning
from drl.config import ModelConfig
from drl.kernels import LinearAttentionState, residual_mlp

ModelState = tuple[LinearAttentionState | None, ...]  # one per layer; None where the attention keeps none


class Block(nn.Module):
    """Attention then MLP, each normalised on the way in and added on the way out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = (LinearAttention if config.attention == "linear" else SoftmaxAttention)(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        state: LinearAttentionState | None,
        restart: Tensor | None,
        read: slice = slice(None),
        step: bool = False,
    ):
        attend = self.attention.step if step else self.attention
        mixed_BTD, state = attend(self.norm_attention(x), mask, state, restart, read)
        x = x[:, read] + self.dropout(mixed_BTD)
        if self.training and self.dropout.p > 0:
            return x + self.dropout(self.mlp(self.norm_mlp(x))), state
        norm, inner, _, outer = self.norm_mlp, *self.mlp
        return residual_mlp(
            x, norm.weight, norm.bias, inner.weight, inner.bias, outer.weight, outer.bias, eps=norm.eps
        ), state


class DecisionTransformer(nn.Module):
    """Predicts actions in [-1, 1]^A from returns-to-go, normalised observations and earlier actions."""

    def __init__(self, config: ModelConfig, observation_dim: int, action_dim: int):
        super().__init__()
        self.config, self.observation_dim, self.action_dim = config, observation_dim, action_dim
        self.embed_return = nn.Linear(1, config.width)
        self.embed_observation = nn.Linear(observation_dim, config.width)
        if config.action_tokens:
            self.embed_action = nn.Linear(action_dim, config.width)
        self.embed_timestep = nn.Embedding(config.max_timesteps, config.width)
        if not config.timestep_embedding:  # among the weights, where the compiled step finds it, but nothing to learn
            del self.embed_timestep.weight
            self.embed_timestep.register_buffer("weight", torch.zeros(config.max_timesteps, config.width))
        if config.return_quantile:  # among the weights, where the compiled step finds it
            self.register_buffer("return_cap", torch.full((config.max_timesteps,), torch.finfo(torch.float32).max))
        self.norm_embedding = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, action_dim)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: matrices and embeddings N(0, 0.02), biases 0; LayerNorms stay at (1, 0)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and isinstance(module.weight, nn.Parameter):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def initial_state(self, batch: int) -> ModelState:
        """The empty past of `batch` rows, on the model's device."""
        config, weight = self.config, self.head.weight
        if config.attention == "softmax":
            return (None,) * config.layers
        dim = config.width // config.heads
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return tuple(
            LinearAttentionState.zeros(batch, config.heads, dim, dim, dtype=dtype, device=weight.device)
            for _ in range(config.layers)
        )

    def forward(
        self,
        returns_to_go: Tensor,
        observations: Tensor,
        actions: Tensor,
        timesteps: Tensor,
        mask: Tensor | None = None,
        state: ModelState | None = None,
        restart: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Predict every action of a chunk of L steps from what precedes it.

        Args:
            returns_to_go: in the environment's units, (B, L).
            observations: normalised, (B, L, O).
            actions: in [-1, 1], (B, L, A); not read without config.action_tokens.
            timesteps: steps since the episode began, integer, (B, L).
            mask: True where a step is real, (B, L); None: all are. Padding stands on the right.
            state: what came before the chunk; None: nothing.
            restart: True in rows whose past in `state` is forgotten before the chunk, (B,); None: in none.

        Returns:
            Predicted actions (B, L, A) and the state after the chunk. Steps with a False mask leave no trace in it.
        """
        N, time_BLD = self.config.tokens, self._embed_timestep(timesteps)
        x_BLND = time_BLD[:, :, None] + self._embed(self._heard(returns_to_go, timesteps), observations, actions)
        mask_BT = None if mask is None else mask.repeat_interleave(N, dim=1)
        x_BLD, state = self._trunk(x_BLND.flatten(1, 2), mask_BT, state, restart, slice(1, None, N))
        return self._read_out(x_BLD), state

    @torch.no_grad()
    def step(
        self,
        previous_action: Tensor,
        return_to_go: Tensor,
        observation: Tensor,
        timestep: Tensor,
        state: ModelState,
        first: Tensor,
    ) -> tuple[Tensor, ModelState]:
        """Predict one action per row: the tokens (a_{t-1}, R_t, s_t) enter together, the state goes on.

        Args:
            previous_action: in [-1, 1], (B, A); ignored in rows where `first`, and without config.action_tokens.
            return_to_go: in the environment's units, (B,).
            observation: normalised, (B, O).
            timestep: integer, (B,).
            state: from `initial_state` or the step before; it is not changed.
            first: True in rows that begin an episode, (B,); their past is emptied.

        Returns:
            Actions (B, A) and the new state.

        Raises:
            ValueError: softmax attention, which has no state to step from.
        """
        if self.config.attention == "softmax":
            raise ValueError("softmax attention has no recurrent step; act by window")
        heard_B, mask_BT, times = self._heard(return_to_go, timestep), None, [timestep, timestep]
        x_BTD = self._embed(heard_B, observation, previous_action)
        if self.config.action_tokens:
            x_BTD, times = x_BTD.roll(1, dims=1), [(timestep - 1).clamp(min=0), *times]
            mask_BT = torch.ones_like(x_BTD[..., 0], dtype=torch.bool)
            mask_BT[:, 0] = ~first
        x_BTD = self._embed_timestep(torch.stack(times, dim=1)) + x_BTD
        x_B1D, state = self._trunk(x_BTD, mask_BT, state, first, slice(-1, None), step=True)
        return self._read_out(x_B1D[:, 0]), state

    def _embed(self, return_to_go: Tensor, observation: Tensor, action: Tensor) -> Tensor:
        """Tokens (..., N, D) of (...), (..., O) and (..., A), as one product: its weight (N D, F) has a block for each,
        and zeros fill up 1 + O + A to F, a multiple of 8, which suits a GPU's matrix units."""
        layers, parts = [self.embed_return, self.embed_observation], [return_to_go[..., None], observation]
        parts[0] = parts[0] / self.config.return_scale
        if self.config.action_tokens:
            layers.append(self.embed_action), parts.append(action)
        spare = observation.new_zeros(*observation.shape[:-1], -sum(layer.in_features for layer in layers) % 8)
        weight = torch.block_diag(*(layer.weight for layer in layers), spare.new_zeros(0, spare.shape[-1]))
        bias = torch.cat([layer.bias for layer in layers])
        return F.linear(torch.cat([*parts, spare], dim=-1), weight, bias).unflatten(-1, (len(layers), -1))

    def _heard(self, return_to_go: Tensor, timestep: Tensor) -> Tensor:
        """What is read of a return-to-go: no more than `return_cap` has for the timestep."""
        if not self.config.return_quantile:
            return return_to_go
        return return_to_go.minimum(self.return_cap[timestep.clamp(max=self.config.max_timesteps - 1)])

    def _embed_timestep(self, timestep: Tensor) -> Tensor:
        return self.embed_timestep(timestep.clamp(max=self.config.max_timesteps - 1))

    def _trunk(
        self,
        x_BTD: Tensor,
        mask_BT: Tensor | None,
        state: ModelState | None,
        restart: Tensor | None,
        read: slice,
        step: bool = False,
    ) -> tuple[Tensor, ModelState]:
        """The tokens at `read` only: what the last layer would make of the others, nobody sees."""
        x_BTD = self.dropout(self.norm_embedding(x_BTD))
        future, last = [], len(self.blocks) - 1
        for index, past in enumerate(state or (None,) * len(self.blocks)):
            rows = read if index == last else slice(None)
            x_BTD, after = self.blocks[index](x_BTD, mask_BT, past, restart, rows, step)
            future.append(after)
        return x_BTD, tuple(future)

    def _read_out(self, x_BLD: Tensor) -> Tensor:
        return self.head(self.norm(x_BLD)).tanh()


Model = DecisionTransformer | Cloning


def make(config: ModelConfig, observation_dim: int, action_dim: int) -> Model:
    """The model that config.attention names, its weights drawn by torch's own generator."""
    return (Cloning if config.attention == "none" else DecisionTransformer)(config, observation_dim, action_dim)
