"""A config is what was meant, or an error that says what to type instead."""

import dataclasses
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from toys import PLAIN

from drl import options as command_line
from drl import trees
from drl.config import Config, EvaluateConfig, ModelConfig, TrainConfig
from drl.config_files import differences, stored
from drl.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
EVERY_CONFIG = sorted(set(CONFIGS.rglob("*.y*ml")) - set(CONFIGS.glob("suites/*")))  # test_suite.py has those


def from_command_line(*options) -> Config:
    """The config that `drl train` with these options would resolve and train."""
    fields = command_line.build().parse_args(["train", *map(str, options)])["train"].as_dict()
    return Config.from_dict({key: fields[key] for key in fields.keys() - {"run", "resume", "seeds", "config"}})


def leaves(tree: dict, where: str = "") -> dict:
    """Dotted key to value."""
    flat = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat


def stated(path: Path) -> dict:
    """What a file says, by dotted key; a plain YAML reader takes 1e-4 for a word."""
    defaults = leaves(Config(dataset="").to_dict())
    said = leaves(yaml.safe_load(path.read_text()))
    return {key: float(value) if isinstance(defaults[key], float) else value for key, value in said.items()}


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_configs_are_shipped():
    assert EVERY_CONFIG


@pytest.mark.parametrize("path", EVERY_CONFIG, ids=name)
def test_every_shipped_config_means_what_it_says(path):
    config = leaves(from_command_line("--config", path).to_dict())
    for key, value in stated(path).items():
        assert config[key] == value and isinstance(config[key], type(value))


@pytest.mark.parametrize("path", EVERY_CONFIG, ids=name)
def test_every_shipped_config_names_the_dataset_of_its_place(path):
    dataset = from_command_line("--config", path).dataset
    if path.name.startswith("quickstart"):
        assert dataset.startswith(f"drl/{path.parent.name}/")
    else:
        assert dataset == f"drl/{path.relative_to(CONFIGS).with_suffix('')}-v0"


@pytest.mark.parametrize("path", EVERY_CONFIG, ids=name)
def test_every_shipped_config_states_only_what_differs(path):
    defaults = leaves(Config(dataset="").to_dict())
    repeated = {key for key, value in stated(path).items() if value == defaults[key]}
    assert not repeated, f"{path} repeats the defaults of {sorted(repeated)}"


def test_the_command_line_beats_the_file_and_the_file_the_defaults(file):
    path = file("dataset: a/b-v0\nseed: 1\ntrain:\n  updates: 11\n  batch_size: 12\n")

    config = from_command_line("--config", path, "--train.updates", 21, "--model.width", 24)

    train = TrainConfig(updates=21, batch_size=12)
    assert config == Config(dataset="a/b-v0", seed=1, model=ModelConfig(width=24), train=train)


def test_options_alone_make_a_config():
    assert from_command_line("--dataset", "a/b-v0") == Config(dataset="a/b-v0")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_a_number_with_an_exponent_is_a_number(file, text):
    path = file(f"dataset: a/b-v0\ntrain: {{learning_rate: {text}, weight_decay: 0}}\n")
    config = from_command_line("--config", path)
    assert config.train.learning_rate == 1e-4 and isinstance(config.train.learning_rate, float)
    assert isinstance(config.train.weight_decay, float)


def test_target_returns_are_a_list_of_floats(file):
    path = file("dataset: a/b-v0\nevaluate: {target_returns: [3600, 1.8e3]}\n")
    for config in (from_command_line("--config", path),
                   from_command_line("--dataset", "a/b-v0", "--evaluate.target_returns", "[3600, 1800]")):
        assert config.evaluate.target_returns == [3600.0, 1800.0]
        assert all(isinstance(target, float) for target in config.evaluate.target_returns)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.learnin_rate", "1", "unknown config key 'train.learnin_rate'; did you mean 'train.learning_rate'?"),
        ("train.updates", "many", "train.updates must be int, got 'many'"),
        ("train.updates", "1.5", "train.updates must be int, got 1.5"),
        ("train.updates", "true", "train.updates must be int, got True"),
        ("train.learning_rate", "fast", "train.learning_rate must be float, got 'fast'"),
        ("evaluate.target_returns", "3600", "evaluate.target_returns must be list, got 3600"),
        ("train.updates", "0", "train.updates must be positive, got 0"),
        ("train.learning_rate", ".nan", "train.learning_rate must be finite, got nan"),
        ("model.heads", "5", "model.heads must divide model.width, got heads=5, width=128"),
        ("model.dropout", "1", "model.dropout must be in [0, 1), got 1.0"),
        ("seed", "-1", "seed must not be negative, got -1"),
        ("model.attention", "softmax", "model.attention softmax has no state to pass; add --train.sampling windows, "
                                       "or use linear attention"),
        ("model.attention", "none", "model.attention none has no state to pass; add --train.sampling windows, or use "
                                    "linear attention"),
        ("model.half_lives", "[1, 2, 4]", "model.half_lives must be one number for each of model.heads=4, or two, got "
                                          "3"),
        ("model.half_lives", "[1, 2, 4, 0.001]", "model.half_lives must be at least 0.01 environment steps each, got "
                                                 "0.001"),
        ("model.half_lives", "[1, 2, 4, -1]", "model.half_lives must be at least 0.01 environment steps each, got "
                                              "-1.0"),
        ("model.half_lives", "[1, 2, 4, .inf]", "model.half_lives must be finite, got [1.0, 2.0, 4.0, inf]"),
        ("model.half_lives", "3", "model.half_lives must be list, got 3"),
        ("model.action_tokens", "3", "model.action_tokens must be bool, got 3"),
        ("train.best_episodes", "0", "train.best_episodes must be in (0, 1], got 0.0"),
        ("train.best_episodes", "1.5", "train.best_episodes must be in (0, 1], got 1.5"),
    ],
)
@pytest.mark.parametrize("place", ["options", "file"])
def test_a_mistake_is_answered_with_its_cure(file, tmp_path, place, key, value, message):
    if place == "options":
        arguments = ["--dataset", "a/b-v0", f"--{key}", value]
    else:
        group, _, leaf = key.rpartition(".")
        arguments = ["--config", file("dataset: a/b-v0\n" + (f"{group}: {{{leaf}: {value}}}" if group else f"{leaf}: "
                                                             f"{value}") + "\n")]

    with pytest.raises(UserError) as caught:
        from_command_line(*arguments)

    said = str(caught.value).removeprefix(f"{tmp_path}/config.yaml: ").replace("unknown option or", "unknown")
    assert said == message or said == re.sub(r"got ([\w.]+)$", r"got '\1'", message), "an option's value is a word"


@pytest.mark.parametrize(("half_lives", "heads", "expected"), [
    ([], 3, []),
    ([0.25, 16.0], 1, [2.0]),  # 1/4 times 8, and 16 by 8
    ([0.25, 16.0], 2, [0.25, 16.0]),
    ([0.25, 16.0], 3, [0.25, 2.0, 16.0]),
    ([0.25, 16.0], 4, [0.25, 1.0, 4.0, 16.0]),
    ([16.0, 0.25], 4, [16.0, 4.0, 1.0, 0.25]),
    ([3.0, 384.0], 8, [3.0, 6.0, 12.0, 24.0, 48.0, 96.0, 192.0, 384.0]),
    ([5.0, 0.5, 70.0], 3, [5.0, 0.5, 70.0]),
    ([7.0], 1, [7.0]),
])
def test_two_half_lives_are_those_of_the_first_and_the_last_head_in_equal_ratios(half_lives, heads, expected):
    fading = ModelConfig(width=48, heads=heads, half_lives=half_lives).fading
    assert fading == pytest.approx(expected, rel=1e-14)
    assert len(half_lives) != heads or fading == half_lives, "what is said of each head is taken as it is said"


@pytest.mark.parametrize("attention", ["softmax", "none"])
def test_only_linear_attention_has_a_memory_that_fades(attention):
    assert ModelConfig(attention=attention, half_lives=[1.0] * 4).fading == []


def test_the_default_fades_with_any_number_of_heads_that_divides_the_width():
    for heads in (1, 2, 4, 8):
        given = ModelConfig(heads=heads)
        assert len(given.fading) == (heads if given.half_lives else 0)


def test_without_the_actions_a_step_has_two_tokens_instead_of_three():
    assert [ModelConfig(action_tokens=given).tokens for given in (True, False)] == [3, 2]


@pytest.mark.parametrize(
    ("key", "wrong", "known"),
    [("model.attention", "sofmax", ["linear", "softmax", "none"]),
     ("train.sampling", "window", ["state_passing", "windows"]), ("train.decay", "cosin", ["cosine", "none"]),
     ("model.feature_map", "elu", ["elu1", "relu", "identity"])],
)
def test_an_unknown_choice_names_the_known_ones(key, wrong, known):
    with pytest.raises(UserError) as caught:
        from_command_line("--dataset", "a/b-v0", f"--{key}", wrong)
    message = str(caught.value)
    assert key in message and wrong in message and all(choice in message for choice in known)
    assert "\n" not in message


def test_an_unknown_key_of_a_file_is_named_with_its_near_miss(file):
    with pytest.raises(UserError, match=r"key 'datset'; did you mean 'dataset'\?"):
        from_command_line("--config", file("datset: a/b-v0\n"))


@pytest.mark.parametrize(
    "make",
    [
        lambda value: ModelConfig(width=value), lambda value: ModelConfig(layers=value),
        lambda value: ModelConfig(heads=value), lambda value: ModelConfig(max_timesteps=value),
        lambda value: ModelConfig(return_scale=value), lambda value: TrainConfig(updates=value),
        lambda value: TrainConfig(batch_size=value), lambda value: TrainConfig(context=value),
        lambda value: TrainConfig(learning_rate=value), lambda value: TrainConfig(max_grad_norm=value),
        lambda value: TrainConfig(log_every=value), lambda value: TrainConfig(checkpoint_every=value),
        lambda value: TrainConfig(keep_checkpoints=value), lambda value: EvaluateConfig(episodes=value),
        lambda value: EvaluateConfig(environments=value),
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_what_must_be_positive_is(make, value):
    with pytest.raises(UserError, match=rf"^\w+\.\w+ must be positive, got {value}$"):
        make(value)


@pytest.mark.parametrize(
    "make",
    [
        lambda value: TrainConfig(warmup_updates=value), lambda value: TrainConfig(weight_decay=value),
        lambda value: TrainConfig(evaluate_every=value), lambda value: EvaluateConfig(seed=value),
        lambda value: Config(dataset="-", seed=value),
    ],
)
def test_what_must_not_be_negative_is_not(make):
    make(0)
    with pytest.raises(UserError, match=r"^[\w.]+ must not be negative, got -1$"):
        make(-1)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_is_a_share(dropout):
    with pytest.raises(UserError, match=r"model.dropout must be in \[0, 1\)"):
        ModelConfig(dropout=dropout)


def changed(value, kind):
    """Another value of this type that a config may hold; floats become so small that YAML writes an exponent."""
    if dataclasses.is_dataclass(kind):
        return kind(**{f.name: changed(getattr(value, f.name), f.type) for f in dataclasses.fields(kind)
                       if f.name != "half_lives"})
    if choices := get_args(kind) if get_origin(kind) is Literal else ():
        return choices[-1] if value != choices[-1] else choices[0]
    by_type = {bool: lambda: not value, int: lambda: 2 * value or 3, float: lambda: value * 1e-4 or 1e-5,
               str: lambda: value + "b-v0", list[float]: lambda: [1.5, -2e-7]}
    return by_type[kind]()


def everything_changed() -> Config:
    config = changed(Config(dataset=""), Config)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, half_lives=[1.5, 2e20]))


def plain(config: Config) -> Config:
    """With none of what is not in the paper, and all else as it is."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **PLAIN),
                               train=dataclasses.replace(config.train, value_weight=0.0))


EVERYTHING = pytest.mark.parametrize("config", [everything_changed(), plain(everything_changed())],
                                     ids=["everything changed", "the plain model"])


@EVERYTHING
def test_a_config_survives_its_dict_and_its_yaml(config):
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict(), sort_keys=False))) == config


@EVERYTHING
def test_every_key_can_be_set_on_the_command_line(config):
    options = [part for key, value in leaves(config.to_dict()).items() for part in (f"--{key}", value)]
    assert from_command_line(*options) == config


def test_the_list_of_keys_is_every_leaf():
    other, default = (leaves(config.to_dict()) for config in (everything_changed(), Config(dataset="")))
    assert sorted(trees.keys(Config)) == sorted(other)
    assert not [key for key in trees.keys(Config) if other[key] == default[key]], "these tests must change every key"


def test_what_a_critic_alone_reads_is_no_difference_between_runs_without_one():
    def run(device="cpu", **settings):
        return Config(dataset="a/b-v0", device=device, train=TrainConfig(**settings))

    without = run(value_weight=0.0)
    alike = run(value_weight=0.0, value_measure="value", value_cap=True, discount=0.5, value_trace=0.5, value_tau=0.1)
    assert differences(without, alike) == []
    assert differences(without, run(value_weight=1.0, discount=0.5)) == [
        "train.value_weight 0.0 -> 1.0", f"train.discount {without.train.discount} -> 0.5"]
    assert differences(run(), run(discount=0.5)) == [f"train.discount {without.train.discount} -> 0.5"]
    elsewhere = run(device="cuda", value_weight=0.0, log_every=7, batch_size=5)
    assert differences(without, elsewhere, beside=False) == [f"train.batch_size {without.train.batch_size} -> 5"]
    assert len(differences(without, elsewhere)) == 3


def test_a_stored_config_is_what_it_states_and_else_what_it_was_before_there_was_such_an_option():
    assert stored(everything_changed().to_dict()) == everything_changed()
    assert stored({"dataset": "a/b-v0"}) == dataclasses.replace(
        plain(Config(dataset="a/b-v0")),
        train=TrainConfig(value_weight=0.0, value_measure="value", discount=0.99, best_episodes=1.0,
                          precision="float32", compile="off"))
    with pytest.raises(UserError, match="^unknown config key 'train.update'; did you mean 'train.updates'"):
        stored({"dataset": "a/b-v0", "train": {"update": 1}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"dataset": "-", "sed": 1}, r"^unknown config key 'sed'; did you mean 'seed'\?$"),
        ({"dataset": "-", "train": {"sampler": "windows"}}, r"^unknown config key 'train.sampler'; did you mean "
                                                            r"'train.sampling'\?$"),
        ({"dataset": "-", "quux": 1}, "^unknown config key 'quux'; known: dataset, device, environment, "),
    ],
)
def test_a_dict_with_an_unknown_key_is_refused(tree, message):
    with pytest.raises(UserError, match=message):
        Config.from_dict(tree)


def test_a_config_cannot_be_edited():
    with pytest.raises(AttributeError):
        Config(dataset="-").train.updates = 3
