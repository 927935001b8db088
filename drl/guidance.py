"""A critic that guides the policy: what an action is worth, learned from the chunks that the policy learns from.

Imitation asked for a high return can only repeat what some episode did. A value that is carried backwards from step to
step also sees that the beginning of one episode and the end of another fit together, and the policy is pulled towards
the actions that it prefers, as far as they stay near the data (Fujimoto and Gu 2021, arXiv 2106.06860; for
a transformer Hu et al. 2024, arXiv 2405.17098). The critic is for training alone: the policy acts as it did, and costs
what it did.

Dimension key: B rows, L steps, O observation, A action, N the two critics, D their width.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl.captured import stack
from drl.config import TrainConfig
from drl.data.sampling import Batch
from drl.data.store import EpisodeStore
from drl.descent import Descent, under
from drl.parallel import Share

WIDTH, LEARNING_RATE = 256, 1e-3
NOISE, MOST = 0.2, 0.5  # of the actions that the slow copies judge, and where it is cut off (arXiv 1802.09477, 5.3)
RANGE = 100.0  # returns are scaled so that the best and the worst episode are so far apart


class Critic(nn.Module):
    """Two value functions that do not know of each other (Fujimoto et al. 2018, arXiv 1802.09477, section 4.2)."""

    def __init__(self, observation_dim: int, action_dim: int):
        super().__init__()
        sizes = observation_dim + action_dim, WIDTH, WIDTH, 1
        for index, (inner, outer) in enumerate(zip(sizes, sizes[1:])):
            weight = torch.empty(2, inner, outer).uniform_(-1 / math.sqrt(inner), 1 / math.sqrt(inner))
            self.register_parameter(f"weight{index}", nn.Parameter(weight))
            self.register_parameter(f"bias{index}", nn.Parameter(torch.zeros(2, 1, outer)))


def values(critic: Sequence[Tensor], observations: Tensor, actions: Tensor) -> Tensor:
    """What the two critics of these parameters think of actions (B, L, A) in [-1, 1] after normalised observations
    (B, L, O), in units of the scaled return, (2, B, L)."""
    x_NSD = torch.cat([observations, actions], -1).flatten(0, 1).expand(2, -1, -1)
    *layers, (weight, bias) = zip(critic[::2], critic[1::2], strict=True)
    for inner, shift in layers:
        x_NSD = torch.baddbmm(shift, x_NSD, inner)
        x_NSD = F.relu(F.layer_norm(x_NSD, x_NSD.shape[-1:]))
    return torch.baddbmm(bias, x_NSD, weight).view(2, *observations.shape[:2])


def goals(
    rewards: Tensor, values: Tensor, mask: Tensor, terminal: Tensor, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """What the critics should have said of the steps of a chunk: lambda-returns without correction for who acts (Peng's
    Q(lambda), Kozuno et al. 2021, arXiv 2103.00107).

        y_t = r_t + discount ((1 - trace) v_{t+1} + trace y_{t+1}),  y_t = r_t where the episode terminates

    Args:
        rewards: scaled, (B, L); not read at a chunk's last real step unless it is terminal.
        values: v, what the policy's own action is worth at each step, (B, L).
        mask: True where a step is real, (B, L) bool.
        terminal: True where the episode terminates after the step, (B, L) bool.
        discount: in [0, 1).
        trace: in [0, 1].

    Returns:
        y (B, L), and where it is known, (B, L) bool: not at the last step of a chunk or of an episode that was cut off,
        of which nobody saw what came next; before it v stands for y.
    """
    L = rewards.shape[1]
    next_BL = F.pad(mask[:, 1:], (0, 1))  # whether what comes next is in the chunk
    ahead_BL = F.pad(values[:, 1:], (0, 1))
    own_BL = torch.where(next_BL, rewards + discount * (1 - trace) * ahead_BL, torch.where(terminal, rewards, values))
    apart_LL = torch.arange(L, device=rewards.device)
    apart_LL = apart_LL[:, None] - apart_LL  # the sum over later steps j of (discount trace)^(j - t)
    fade_LL = ((discount * trace) ** apart_LL.clamp(min=0).to(rewards)).masked_fill(apart_LL < 0, 0)
    return own_BL.where(mask, 0) @ fade_LL, mask & (next_BL | terminal)


class Judge(NamedTuple):
    """What `guided` needs of the critics.

    Attributes:
        noise: standard normal, (B, L, A).
        critic, slow: parameters of the critics and of their slow copies, as `values` takes them.
        size: what the pull is measured against (squared for a distance), its mean over the states of the update before,
            (); 0: unknown.
        scale: of returns, ().
        weight: of the policy's pull.
        measure: TrainConfig.value_measure.
        cap: whether no state is pulled harder than one of mean size.
        discount, trace: as `goals` takes them.
    """

    noise: Tensor
    critic: Sequence[Tensor]
    slow: Sequence[Tensor]
    size: Tensor
    scale: Tensor
    weight: float
    measure: str
    cap: bool
    discount: float
    trace: float


class Guidance:
    """The critics of one run: everything of them that an update changes.

    Attributes:
        leaves: their parameters, for which gradients are taken.
        critic, slow: these and those of the slow copies, as `values` takes them.
        size: as of a Judge, of the last update, ().
        value: what the policy's actions are worth, the mean of absolute values at the last update, scaled, ().
    """

    def __init__(self, settings: TrainConfig, store: EpisodeStore, device: torch.device | str, wrap: Callable,
                 share: Share = Share()):
        """`wrap` may compile a function. The critics draw their weights from torch's own generator."""
        self.settings, self.share, spaces = settings, share, store.spaces
        self._noise = settings.batch_size, settings.context, spaces.action_dim
        returns = store.episode_returns
        scale = RANGE / (float(returns.max() - returns.min()) or float(abs(returns).max()) or 1.0)
        self.scale = torch.tensor(scale, device=device)  # as a number it would be compiled anew for each dataset
        self._critic = Critic(spaces.observation_dim, spaces.action_dim).to(device)
        self._slow = copy.deepcopy(self._critic).requires_grad_(False)
        parameters = list(self._critic.parameters())
        how = dataclasses.replace(settings, learning_rate=LEARNING_RATE, warmup_updates=0, decay="none", weight_decay=0,
                                  max_grad_norm=1e9)
        self.descent = Descent(parameters, parameters, how, wrap, share.sum)
        self.leaves = self.descent.leaves
        self.size, self.value = (torch.zeros((), device=device) for _ in range(2))
        self.critic, self.slow = parameters, list(self._slow.parameters())

    @classmethod
    def side_by_side(cls, several: Sequence[Self]) -> Self:
        """One that judges for several like ones at once, as Descent.side_by_side; their numbers are rows of its."""
        whole = copy.copy(several[0])
        whole.descent = Descent.side_by_side([one.descent for one in several])
        whole.leaves = whole.descent.leaves
        whole.critic = [leaf for _, leaf in sorted(zip(whole.descent.order, whole.leaves, strict=True))]
        whole.slow = [torch.stack(parts) for parts in zip(*(one.slow for one in several), strict=True)]
        for row, one in enumerate(several):
            for part, rows in zip(one.slow, whole.slow, strict=True):
                part.data = rows[row]
        stack(whole, several, ["size", "value", "scale"])
        return whole

    def draw(self, generator: torch.Generator) -> Tensor:
        """The noise of `judge`, for this process's rows; drawn for all rows, so that all processes draw alike."""
        noise = torch.randn(self._noise, generator=generator, device=self.size.device)
        return noise[self.share.rows(len(noise))]

    def judge(self, noise: Tensor) -> Judge:
        """For the actions of one batch, with noise as `draw` gives it."""
        settings = self.settings
        return Judge(noise, self.critic, self.slow, self.size, self.scale, settings.value_weight,
                     settings.value_measure, settings.value_cap, settings.discount, settings.value_trace)

    def step(self, gradients: Sequence[Tensor], errors: Tensor, count: Tensor, sizes: Tensor) -> None:
        """Descend, and let the slow copies follow; what `guided` gives."""
        self.descent.step(gradients, errors, count)
        with torch.no_grad():
            self.share.sum(sizes)
            size, value, steps = sizes.unbind(-1)
            torch.div(size, steps, out=self.size)
            torch.div(value, steps, out=self.value)
            torch._foreach_lerp_(self.slow, self.critic, self.settings.value_tau)

    def look(self) -> dict[str, float]:
        """For the log: the critics' squared error and what they think of the policy, in the environment's units."""
        scale = self.scale.item()
        return {"train/value_loss": self.descent.seen[0] / scale**2, "train/value": self.value.item() / scale}

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next update depends on."""
        parts = ("critic", self._critic.state_dict()), ("slow", self._slow.state_dict()), (
            "optimizer", self.descent.state_dict())
        return {"size": self.size} | {f"{part}.{name}": value for part, tensors in parts
                                      for name, value in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor], done: int) -> None:
        """Go on after `done` updates, from tensors of the names and shapes of `state_dict`."""
        self.size.copy_(state["size"])
        self._critic.load_state_dict(under("critic.", state))
        self._slow.load_state_dict(under("slow.", state))
        self.descent.load_state_dict(under("optimizer.", state), done)


def guided(
    predicted: Tensor, errors: Tensor, batch: Batch, judge: Judge
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The policy's errors less what its actions are worth, and the critics' own errors.

    Actions are pulled along dQ/da, Q the critics' mean, times 2 weight / (A rms dQ/da): where errors are means over A
    channels, what is best with that pull lies weight dQ/da / rms dQ/da from what imitates best, in root mean square the
    weight away. Or times weight / mean |dQ/da|, or weight / mean |Q|, as TD3+BC does (arXiv 2106.06860, section 4).

    Args:
        predicted: actions, float32, (B, L, A).
        errors: the sum of their squared distances from the data, ().
        batch: with `terminal`.

    Returns:
        A number with the gradient to descend along, the critics' sum of squared errors, of how many, all (); and the
        sum of what the pull is measured against, that of |Q|, and of how many steps, (3,).
    """
    mask, observations = batch.mask, batch.observations
    critic = [part.detach() for part in judge.critic]

    def worth(actions: Tensor) -> tuple[Tensor, Tensor]:
        worth_BL = values(critic, observations, actions).mean(0).where(mask, 0)
        return worth_BL.sum(), worth_BL.abs()

    slope_BLA, value_BL = torch.func.grad(worth, has_aux=True)(predicted.detach())
    if judge.measure == "value":
        size_BL = value_BL
    else:
        size_BL = (slope_BLA.square() if judge.measure == "distance" else slope_BLA.abs()).mean(-1)
    sizes = torch.stack([size_BL.sum(), value_BL.sum(), mask.sum(dtype=torch.float32)])
    # of the update before: of this one, no process knows more than its own rows
    against_BL = size_BL.maximum(judge.size) if judge.cap else judge.size.expand_as(size_BL)
    if judge.measure == "distance":
        against_BL = against_BL.sqrt() * (slope_BLA.shape[-1] / 2)
    pull_BL = torch.where(judge.size > 0, judge.weight / against_BL, 0)
    pulled = errors - (pull_BL[..., None] * slope_BLA * predicted).sum()
    with torch.no_grad():
        tried_BLA = (predicted + (NOISE * judge.noise).clamp(-MOST, MOST)).clamp(-1, 1)
        next_BL = values(judge.slow, observations, tried_BLA).amin(0)
        later_BL = F.pad(batch.returns_to_go[:, 1:], (0, 1)).where(~batch.terminal, 0)
        rewards_BL = judge.scale * (batch.returns_to_go - later_BL)
        goal_BL, known_BL = goals(rewards_BL, next_BL, mask, batch.terminal, judge.discount, judge.trace)
    wrong_NBL = (values(judge.critic, observations, batch.actions) - goal_BL).square()
    judged = wrong_NBL.where(known_BL, 0).sum()
    count = 2 * known_BL.sum(dtype=torch.float32).clamp(min=1e-6)  # a mean of none is 0, not NaN
    return pulled + judged, judged.detach(), count, sizes
