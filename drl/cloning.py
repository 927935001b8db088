"""An MLP from the newest observation to the action, which every other model is to be better than: behaviour cloning, if
no critic guides it.

It hears neither the return that is asked for nor what came before, and so has no state: it acts by window.

Dimension key: B batch, L environment steps, D width, O observation, A action.
"""

import itertools

from torch import Tensor, nn

from drl.config import ModelConfig


class Cloning(nn.Module):
    """Predicts actions in [-1, 1]^A from normalised observations, each step by itself.

    Its weights begin as torch draws those of linear layers, which is what published behaviour cloning does.
    """

    def __init__(self, config: ModelConfig, observation_dim: int, action_dim: int):
        super().__init__()
        self.config, self.observation_dim, self.action_dim = config, observation_dim, action_dim
        sizes = [observation_dim, *[config.width] * config.layers]
        self.blocks = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, action_dim)

    def initial_state(self, batch: int) -> tuple[()]:
        """No layer keeps anything."""
        return ()

    def forward(
        self,
        returns_to_go: Tensor,
        observations: Tensor,
        actions: Tensor,
        timesteps: Tensor,
        mask: Tensor | None = None,
        state: tuple[()] | None = None,
        restart: Tensor | None = None,
    ) -> tuple[Tensor, tuple[()]]:
        """Actions (B, L, A) of normalised observations (B, L, O), and no state; nothing else is read.

        The arguments are those of DecisionTransformer.forward.
        """
        x_BLD = observations
        for block in self.blocks:
            x_BLD = self.dropout(block(x_BLD).relu())
        return self.head(x_BLD).tanh(), ()
