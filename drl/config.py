"""Every knob, once: name, type, default, meaning. A YAML file states only what differs.

Precedence: defaults here < configs/*.yaml < options on the command line. The command line itself is in drl/cli.py.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import yaml

from drl.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    attention: Literal["linear", "softmax"] = "linear"
    """linear: a recurrent state of constant size; softmax: the windowed baseline"""

    width: int = 128
    """channels of the residual stream"""

    layers: int = 3
    """residual blocks"""

    heads: int = 4
    """attention heads; must divide the width"""

    feature_map: Literal["elu1", "relu", "identity"] = "elu1"
    """phi of the linear attention; elu1 is elu(x) + 1"""

    backend: Literal["auto", "reference", "chunked", "triton", "cpu"] = "auto"
    """how the linear attention is computed; auto: triton on a GPU, cpu on a CPU where it was built, else chunked"""

    dropout: float = 0.0
    """share of activations dropped in training, 0 to 1"""

    max_timesteps: int = 1000
    """environment steps with an embedding of their own; later ones share the last"""

    return_scale: float = 1000.0
    """returns-to-go are divided by this before they are embedded"""

    def __post_init__(self):
        _positive(self, "model", "width", "layers", "heads", "max_timesteps", "return_scale")
        if self.width % self.heads:
            raise UserError(f"model.heads must divide model.width, got heads={self.heads}, width={self.width}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training."""

    updates: int = 20_000
    """gradient updates"""

    batch_size: int = 64
    """streams (or windows) per update"""

    context: int = 20
    """environment steps per chunk (or window); three tokens each"""

    sampling: Literal["state_passing", "windows"] = "state_passing"
    """state_passing: chunks in episode order, the state carried and detached; windows: each from an empty state"""

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

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """what the model computes in; weights, states, optimizer and loss are float32 in any case; auto: bfloat16 on
    cuda and on a cpu that multiplies bfloat16 numbers, else float32"""

    compile: Literal["auto", "on", "off"] = "auto"
    """fuse the update with torch.compile, which takes 15 s to a minute at the start; auto: on for 45,000 updates or
    more on cuda, off on cpu"""

    log_every: int = 100
    """updates between two lines of metrics"""

    checkpoint_every: int = 2500
    """updates between two checkpoints; the last update always writes one"""

    keep_checkpoints: int = 2
    """newest checkpoints kept"""

    evaluate_every: int = 0
    """updates between two evaluations during training; 0: none"""

    def __post_init__(self):
        positive = ("updates", "batch_size", "context", "stream_groups", "learning_rate", "max_grad_norm", "log_every")
        _positive(self, "train", *positive, "checkpoint_every", "keep_checkpoints")
        _not_negative(self, "train", "warmup_updates", "weight_decay", "evaluate_every")


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
    """recurrent: the state goes on; window: the last train.context steps are recomputed at each step; auto: recurrent
    where the attention allows"""

    def __post_init__(self):
        _positive(self, "evaluate", "episodes", "environments", "patience")
        _not_negative(self, "evaluate", "seed")


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
        _not_negative(self, "", "seed")
        if self.model.attention == "softmax" and self.train.sampling == "state_passing":
            raise UserError(
                "model.attention softmax has no state to pass; add --train.sampling windows, or use linear attention"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for YAML and JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Self:
        """The inverse of to_dict. Raises UserError for a key this version does not know."""
        return _build(cls, tree, where="")


def config_keys(cls: type = Config, where: str = "") -> list[str]:
    """Every dotted key a config file or the command line may set."""
    keys = []
    for f in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(f.type)
        keys += config_keys(f.type, f"{where}{f.name}.") if nested else [where + f.name]
    return keys


def settled(stored: Config) -> Config:
    """A config of a run that was stored before precision and compile were: it ran in float32, not compiled."""
    before = {"precision": "float32", "compile": "off"}
    unsaid = {name: value for name, value in before.items() if getattr(stored.train, name) == "auto"}
    return dataclasses.replace(stored, train=dataclasses.replace(stored.train, **unsaid))


def read_config(path: Path) -> Config:
    """The resolved config of a run folder.

    Raises:
        UserError: the file is missing or is not what `drl train` wrote.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return settled(Config.from_dict(tree))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _build(cls: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{where.strip('.') or 'a config'} must be a mapping of keys to values, got {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree.keys() - fields.keys():
        name = f"{where}{key}"
        raise UserError(f"unknown config key {name!r}; {did_you_mean(name, (where + known for known in fields))}")
    values = {}
    for key, f in fields.items():
        if key in tree:
            values[key] = _value(f.type, tree[key], where + key)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"config key {where + key!r} is missing")
    return cls(**values)


def _value(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name + ".")
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        return value
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{name} must be list, got {value!r}")
        return [_value(get_args(kind)[0], item, name) for item in value]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def _positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{where}.{name} must be positive, got {getattr(config, name)}")


def _not_negative(config: Any, where: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise UserError(f"{where}.{name}".strip(".") + f" must not be negative, got {getattr(config, name)}")
