"""The update that ours is measured beside: a decision transformer built from torch's own modules as CORL's dt.py builds
its own (arXiv 2210.07105): softmax attention over windows, one operator at a time. Written anew, for its cost, and
without CORL's dropout of 0.1.

Dimension key: B batch, L environment steps, T tokens, D width.
"""

import torch
from torch import Tensor, nn

from drl.config import ModelConfig, TrainConfig
from drl.data.sampling import Batch


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, tokens: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.register_buffer("future", torch.ones(tokens, tokens, dtype=torch.bool).triu(1))

    def forward(self, x_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        read = self.norms[0](x_BTD)
        x_BTD = x_BTD + self.attention(
            read, read, read, attn_mask=self.future, key_padding_mask=padding_BT, need_weights=False
        )[0]
        return x_BTD + self.mlp(self.norms[1](x_BTD))


class CorlUpdate:
    """A model, torch's AdamW and clipping, and a learning rate that torch's scheduler raises."""

    def __init__(
        self, model: ModelConfig, settings: TrainConfig, observation_dim: int, action_dim: int, device: str
    ):
        width = model.width
        self.embeddings = nn.ModuleList(nn.Linear(size, width) for size in (1, observation_dim, action_dim))
        self.times, self.scale = nn.Embedding(model.max_timesteps, width), model.return_scale
        self.blocks = nn.ModuleList(_Block(width, model.heads, 3 * settings.context) for _ in range(model.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head, self.settings = nn.Sequential(nn.Linear(width, action_dim), nn.Tanh()), settings
        modules = nn.ModuleList([self.embeddings, self.times, self.blocks, self.norms, self.head])
        self.parameters = list(modules.to(device).parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / settings.warmup_updates, 1)
        )

    def __call__(self, batch: Batch, half: bool) -> Tensor:
        """One step along the mean error of `batch`, which comes back, (); `half`: under bfloat16 autocast."""
        with torch.autocast(batch.mask.device.type, torch.bfloat16, enabled=half):
            predicted = self._predict(batch)
        error_BL = (predicted.float() - batch.actions).square().mean(-1)
        loss = (error_BL * batch.mask).sum() / batch.mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _predict(self, batch: Batch) -> Tensor:
        time_BLD = self.times(batch.timesteps)
        values = (batch.returns_to_go[..., None] / self.scale, batch.observations, batch.actions)
        tokens = [embed(value) + time_BLD for embed, value in zip(self.embeddings, values, strict=True)]
        x_BTD = self.norms[0](torch.stack(tokens, dim=2).flatten(1, 2))
        padding_BT = ~batch.mask.repeat_interleave(3, dim=1)
        for block in self.blocks:
            x_BTD = block(x_BTD, padding_BT)
        return self.head(self.norms[1](x_BTD)[:, 1::3])
