"""Every knob, once: name, type, default, meaning. A YAML file states only what differs.

Precedence: defaults here < configs/*.yaml < options on the command line. The command line itself is in drl/cli.py.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from drl import bounds, trees
from drl.bounds import bounded, not_negative, positive
from drl.errors import UserError

SHORTEST = 0.01  # half-life in environment steps; of the step before, 2^-100 is left


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    attention: Literal["linear", "softmax", "none"] = "linear"
    """linear: a recurrent state of constant size; softmax: the windowed baseline; none: an MLP over the newest
    observation alone, to which only width, layers and dropout matter: behaviour cloning if train.value_weight is 0"""

    width: int = 128
    """channels of the residual stream, or of each hidden layer where attention is none"""

    layers: int = 3
    """residual blocks of attention and MLP, or hidden layers where attention is none"""

    heads: int = 4
    """attention heads; must divide the width"""

    feature_map: Literal["elu1", "relu", "identity"] = "elu1"
    """phi of the linear attention; elu1 is elu(x) + 1"""

    half_lives: list[float] = field(default_factory=lambda: [0.25, 16.0])
    """environment steps after which what a head remembers counts half: one number for each head, or two for the first
    and the last head, with equal ratios between; []: it never fades, as in the paper; read by linear attention only"""

    action_tokens: bool = False
    """whether the earlier actions are read: three tokens for each environment step, as in the paper, instead of two"""

    backend: Literal["auto", "reference", "chunked", "triton", "cpu"] = "auto"
    """how the linear attention is computed; auto: triton on a GPU, cpu on a CPU where it was built, else chunked"""

    dropout: float = 0.0
    """share of activations dropped in training, 0 to 1"""

    timestep_embedding: bool = False
    """whether a token tells how many steps its episode is old"""

    max_timesteps: int = 1000
    """environment steps with an embedding and a cap on the return-to-go of their own; later ones share the last"""

    return_quantile: float = 0.99
    """a return-to-go is read as no more than this quantile, 0 to 1, of what the dataset's episodes still earned at the
    same timestep, so that no target is beyond what was seen; 0: as it is"""

    return_scale: float = 1000.0
    """returns-to-go are divided by this before they are embedded"""

    def __post_init__(self):
        bounded(self, "model")
        positive(self, "model", "width", "layers", "heads", "max_timesteps", "return_scale")
        if self.width % self.heads and self.attention != "none":
            raise UserError(f"model.heads must divide model.width, got heads={self.heads}, width={self.width}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must be in [0, 1), got {self.dropout}")
        if len(self.half_lives) not in (0, 2, self.heads):
            raise UserError(f"model.half_lives must be one number for each of model.heads={self.heads}, or two, got "
                            f"{len(self.half_lives)}")
        if any(half_life < SHORTEST for half_life in self.half_lives):
            raise UserError(f"model.half_lives must be at least {SHORTEST} environment steps each, got "
                            f"{min(self.half_lives)}")
        if not 0 <= self.return_quantile <= 1:
            raise UserError(f"model.return_quantile must be in [0, 1], got {self.return_quantile}")
        bounds.product(bounds.WEIGHTS, "weights", "model.width and model.max_timesteps", self.width, self.max_timesteps)
        bounds.product(bounds.WEIGHTS, "weights", "model.width and model.layers", self.width**2, self.layers, 12)

    @property
    def fading(self) -> list[float]:
        """The half-life of each head in environment steps; empty where nothing fades."""
        if self.attention != "linear":
            return []
        if len(self.half_lives) in (0, self.heads):
            return self.half_lives
        first, last = self.half_lives
        shares = [head / (self.heads - 1) for head in range(self.heads)] if self.heads > 1 else [0.5]
        return [first ** (1 - share) * last**share for share in shares]

    @property
    def tokens(self) -> int:
        """Tokens that attention reads of an environment step."""
        return 3 if self.action_tokens else 2


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training."""

    updates: int = 20_000
    """gradient updates"""

    batch_size: int = 64
    """streams (or windows) per update"""

    context: int = 20
    """environment steps per chunk, or window"""

    sampling: Literal["state_passing", "windows"] = "state_passing"
    """state_passing: chunks in episode order, the state carried and detached; windows: each from an empty state"""

    best_episodes: float = 1.0
    """share of the dataset's episodes, those with the highest return, that is trained on, above 0 to 1; at least one"""

    stream_groups: int = 8
    """groups of batch_size streams that take turns, so that successive updates see different episodes"""

    learning_rate: float = 3e-4
    """peak of the schedule"""

    warmup_updates: int = 1000
    """updates over which the learning rate rises linearly from 0"""

    decay: Literal["cosine", "none"] = "cosine"
    """learning rate after the warm-up: a cosine down to 0 at the last update, or constant"""

    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay"""

    max_grad_norm: float = 0.25
    """gradients are clipped to this global norm"""

    value_weight: float = 0.12
    """how hard a critic, which learns beside the model, pulls towards actions of higher value; 0: imitation alone"""

    value_measure: Literal["distance", "slope", "value"] = "distance"
    """unit of the weight: how far actions in [-1, 1] move, root mean square; a mean slope; a mean value (TD3+BC)"""

    value_cap: bool = False
    """whether the critic pulls at no state harder than at one of mean measure"""

    discount: float = 0.995
    """of the critic's value: what a reward counts one step later"""

    value_trace: float = 0.9
    """share of the recorded rewards, step by step, in what the critic learns; the rest is its own word"""

    value_tau: float = 0.005
    """share of the critic that its slow copy, by which it learns, takes over at each update, TD3's tau; above 0 to 1"""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """what the model computes in; weights, states, optimizer and loss are float32 in any case; auto: bfloat16 on
    cuda and on a cpu that multiplies bfloat16 numbers, else float32"""

    compile: Literal["auto", "on", "off"] = "auto"
    """fuse the update with torch.compile, which takes 15 s to a minute at the start; auto: on for 45,000 updates or
    more, of all seeds side by side, on cuda, off on cpu"""

    log_every: int = 100
    """updates between two lines of metrics"""

    checkpoint_every: int = 2500
    """updates between two checkpoints; the last update always writes one"""

    keep_checkpoints: int = 2
    """newest checkpoints kept"""

    evaluate_every: int = 0
    """updates between two evaluations during training; 0: none"""

    def __post_init__(self):
        bounded(self, "train")
        positive(self, "train", "updates", "batch_size", "context", "stream_groups", "learning_rate", "max_grad_norm",
                 "log_every", "checkpoint_every", "keep_checkpoints")
        not_negative(self, "train", "warmup_updates", "weight_decay", "evaluate_every", "value_weight", "discount",
                     "value_trace")
        if not 0 < self.value_tau <= 1:
            raise UserError(f"train.value_tau must be in (0, 1], got {self.value_tau:g}")
        if not (self.discount < 1 and self.value_trace <= 1):
            raise UserError(f"train.discount must be below 1 and train.value_trace at most 1, got {self.discount:g} "
                            f"and {self.value_trace:g}")
        if self.value_weight and self.context == 1:
            raise UserError("a critic learns from one step to the next, which a train.context of 1 does not hold; add "
                            "--train.value_weight 0, or a longer --train.context")
        if not 0 < self.best_episodes <= 1:
            raise UserError(f"train.best_episodes must be in (0, 1], got {self.best_episodes}")
        bounds.product(bounds.STEPS, "steps", "train.batch_size and train.context", self.batch_size, self.context)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation."""

    target_returns: list[float] = field(default_factory=list)
    """returns asked for, in the environment's units, one evaluation each; empty: the dataset's best episode"""

    episodes: int = 100
    """episodes per evaluation; episode i resets with seed + i"""

    seed: int = 10_000
    """environment seed of the first episode"""

    environments: int = 100
    """environments stepped side by side; changes the speed only"""

    patience: float = 60.0
    """seconds that one reset or step of the environments or of the policy may take before an evaluation is given up"""

    mode: Literal["auto", "recurrent", "window"] = "auto"
    """recurrent: the state goes on; window: the last train.context steps are recomputed; auto: recurrent if linear"""

    def __post_init__(self):
        bounded(self, "evaluate")
        positive(self, "evaluate", "episodes", "environments", "patience")
        not_negative(self, "evaluate", "seed")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The run."""

    dataset: str
    """Minari id, e.g. drl/hopper/medium-replay-v0"""

    environment: str = ""
    """Gymnasium id to evaluate in; empty: the one the dataset names"""

    seed: int = 0
    """seeds weights, sampling and dropout"""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self):
        bounded(self, "")
        not_negative(self, "", "seed")
        bounds.plain(self.dataset, "Minari id such as drl/hopper/medium-v0")
        bounds.plain(self.environment, "Gymnasium id such as Hopper-v5")
        model, train = self.model, self.train
        if train.sampling == "state_passing":
            if model.attention != "linear":
                raise UserError(f"model.attention {model.attention} has no state to pass; add --train.sampling "
                                "windows, or use linear attention")
            bounds.product(bounds.STATES, "numbers of state", "train.stream_groups, train.batch_size and the model",
                           train.stream_groups, train.batch_size, model.layers, model.width, model.width // model.heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for YAML and JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Self:
        """The inverse of to_dict. Raises UserError for a key this version does not know."""
        return trees.build(cls, trees.stated(cls, tree))
