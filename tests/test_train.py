"""Training is a function of config, data and seed: whatever interrupts it or watches it leaves its numbers alone."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import PLAIN

from drl import checkpoint as checkpoints
from drl.checkpoint_files import MODEL, TRAINING
from drl.config import Config, EvaluateConfig, ModelConfig, TrainConfig
from drl.config_files import BEFORE, read_config
from drl.data.sampling import Steps
from drl.data.store import EpisodeStore, Spaces
from drl.errors import UserError
from drl.descent import adamw, schedule
from drl.resolve import resolve, resolve_device
from drl.train import train, train_together
from drl.losses import action_errors
from drl.trainer import Trainer

PENDULUM = Spaces("Pendulum-v1", 3, np.array([-2], np.float32), np.array([2], np.float32))
LENGTHS = (3, 23, 7, 31, 11, 2)  # some shorter than a chunk of 5, some much longer; none a multiple of it
SAMPLING = ["state_passing", "windows"]
WAYS = [("linear", "state_passing"), ("linear", "windows"), ("softmax", "windows"), ("none", "windows")]


class Recorded(NamedTuple):
    """A synthetic episode, as minari.EpisodeData has its fields."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray


def episode(rng: np.random.Generator, length: int, spaces: Spaces = PENDULUM) -> Recorded:
    """The rule to learn: the actions are tanh of the observation's first channels, of the size of the box."""
    observations = rng.normal(size=(length + 1, spaces.observation_dim))
    actions = spaces.action_high * np.tanh(observations[:-1, : len(spaces.action_high)]).astype(np.float32)
    end = np.arange(length) == length - 1
    return Recorded(observations, actions, rng.normal(size=length), end, np.zeros(length, bool))


def make_store(seed: int = 0, spaces: Spaces = PENDULUM) -> EpisodeStore:
    rng = np.random.default_rng(seed)
    return EpisodeStore.from_episodes([episode(rng, length, spaces) for length in LENGTHS], spaces, "synthetic/rule-v0")


def make_config(attention: str = "linear", seed: int = 0, **settings) -> Config:
    """Tiny, resolved, with dropout, of the plain model without a critic; `settings` are TrainConfig's."""
    defaults = dict(updates=12, batch_size=4, context=5, learning_rate=3e-3, warmup_updates=3, log_every=1,
                    checkpoint_every=5, keep_checkpoints=9, stream_groups=1, precision="float32", compile="off",
                    value_weight=0.0)
    return Config(
        dataset="synthetic/rule-v0",
        environment="Pendulum-v1",
        seed=seed,
        device="cpu",
        model=ModelConfig(**PLAIN, attention=attention, width=16, layers=2, heads=2, dropout=0.1, max_timesteps=29,
                          return_scale=10.0),
        train=TrainConfig(**defaults | settings),
        evaluate=EvaluateConfig(target_returns=[-200.0], episodes=1, seed=3),
    )


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training_lines(run) -> list[dict]:
    """The train/* values by step, without the one that a clock decides."""
    kept = [line for line in lines(run) if "train/loss" in line]
    return [{key: value for key, value in line.items() if key != "train/updates_per_second"} for line in kept]


def assert_same_run(actual, expected) -> None:
    """Bit for bit: metrics, weights, optimizer, sampler, stream states and generators of the last checkpoint."""
    assert training_lines(actual) == training_lines(expected)
    one, other = checkpoints.find(actual), checkpoints.find(expected)
    assert one.name == other.name
    for file in (MODEL, TRAINING):
        torch.testing.assert_close(load_file(one / file), load_file(other / file), rtol=0, atol=0)


class Killed(BaseException):
    """What nothing in the package catches."""


@contextlib.contextmanager
def killed_at(monkeypatch, step: int):
    """The run within this context dies at the beginning of the update after `step` updates."""
    real = Trainer.descend

    def descend(self, group):
        if self.step == step:
            raise Killed
        return real(self, group)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "descend", descend)
        yield


# the loss


def test_the_loss_is_blind_to_padding():
    predicted = torch.zeros(2, 3, 2)
    actions = torch.tensor([[[1.0, 3.0], [0.0, 2.0], [9.0, 9.0]], [[2.0, 0.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # (1 + 9) / 2, (0 + 4) / 2 and (4 + 0) / 2 over three real steps
    assert action_errors(predicted, actions, mask) == (5 + 2 + 2, 3)


@pytest.mark.parametrize(("attention", "sampling"), WAYS)
def test_what_stands_in_the_padding_cannot_change_an_update(attention, sampling):
    clean, spoiled = (Trainer(make_config(attention, sampling=sampling), make_store()) for _ in range(2))
    padded = 0

    def spoil(turn, draw=spoiled.sampler.next):
        nonlocal padded
        batch = draw(turn)
        padded += (~batch.mask).sum().item()
        timesteps = torch.where(batch.mask, batch.timesteps, 3)
        spoilt = [torch.where(batch.mask.view(*batch.mask.shape, *[1] * (x.ndim - 2)), x, 7.0) for x in batch[:3]]
        return batch._replace(returns_to_go=spoilt[0], observations=spoilt[1], actions=spoilt[2], timesteps=timesteps)

    spoiled.sampler.next = spoil
    for _ in range(5):
        torch.testing.assert_close(spoiled.update(), clean.update(), rtol=0, atol=0)

    assert padded
    torch.testing.assert_close(spoiled.checkpoint().training, clean.checkpoint().training, rtol=0, atol=0)
    torch.testing.assert_close(spoiled.model.state_dict(), clean.model.state_dict(), rtol=0, atol=0)


# the loop


@pytest.mark.parametrize(("attention", "sampling"), WAYS)
def test_training_learns_a_rule(tmp_path, attention, sampling):
    config = make_config(attention, sampling=sampling, updates=150, batch_size=16, learning_rate=1e-2,
                         max_grad_norm=1.0, checkpoint_every=1000)
    train(config, make_store(), tmp_path / "run")
    losses = [line["train/loss"] for line in lines(tmp_path / "run")]
    assert len(losses) == 150
    assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:10])


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path, sampling):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(make_config(sampling=sampling, seed=seed), make_store(), tmp_path / name)
        torch.rand(7)  # whatever the caller draws in between
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert training_lines(tmp_path / "one") != training_lines(tmp_path / "other")


@pytest.mark.parametrize(("sampling", "groups"), [("state_passing", 1), ("state_passing", 3), ("windows", 1)])
@pytest.mark.parametrize("stop", [3, 5, 8, 11])
def test_stopping_and_going_on_equals_never_stopping(tmp_path, monkeypatch, sampling, groups, stop):
    """Checkpoints stand at 5, 10 and 12: a run stopped at 3 has none, one stopped at 8 repeats 6 to 8."""
    config = make_config(sampling=sampling, stream_groups=groups)
    train(config, make_store(), tmp_path / "whole")

    with killed_at(monkeypatch, stop):
        train(config, make_store(), tmp_path / "stopped")
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 9, "train/lo')  # killed while it wrote
    train(config, make_store(), tmp_path / "stopped", resume=True)

    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "stopped")] == list(range(1, 13))


def test_a_run_may_be_stopped_at_every_checkpoint(tmp_path, monkeypatch):
    config = make_config(checkpoint_every=2, keep_checkpoints=1)
    train(config, make_store(), tmp_path / "whole")
    for stop in (2, 5, 6, 9):
        with killed_at(monkeypatch, stop):
            train(config, make_store(), tmp_path / "stopped", resume=True)
    train(config, make_store(), tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_going_on_with_a_finished_run_changes_nothing(tmp_path):
    folder = train(make_config(), make_store(), tmp_path / "run")
    before = training_lines(tmp_path / "run"), (folder / "manifest.json").read_bytes()
    assert train(make_config(), make_store(), tmp_path / "run", resume=True) == folder
    assert (training_lines(tmp_path / "run"), (folder / "manifest.json").read_bytes()) == before


def test_a_checkpoint_of_the_streams_holds_what_the_next_update_reads():
    """Every tensor that the trainer keeps between updates, seen before and after a detour through a checkpoint."""
    original = Trainer(make_config(), make_store())
    for _ in range(4):
        original.update()
    past = original.checkpoint()
    past = dataclasses.replace(past, training={name: x.clone() for name, x in past.training.items()},
                               weights={name: x.clone() for name, x in past.weights.items()})
    copy = Trainer(make_config(seed=9), make_store())
    copy.load(past)

    assert copy.step == 4
    torch.testing.assert_close(copy.states, original.states, rtol=0, atol=0)
    torch.testing.assert_close(copy.sampler.state_dict(), original.sampler.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(copy.sampler.next(4), original.sampler.next(4), rtol=0, atol=0)


def test_training_leaves_the_callers_generator_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = make_config(updates=2, evaluate_every=2)
    train(config, make_store(), tmp_path / "run")
    train(config, make_store(), tmp_path / "run", resume=True)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("attention", "sampling"), [("linear", "state_passing"), ("softmax", "windows")])
def test_evaluating_on_the_way_changes_no_number_of_the_training(tmp_path, attention, sampling):
    settings = dict(updates=6, checkpoint_every=3, sampling=sampling)
    train(make_config(attention, **settings), make_store(), tmp_path / "blind")
    train(make_config(attention, **settings, evaluate_every=4), make_store(), tmp_path / "watched")
    assert_same_run(tmp_path / "watched", tmp_path / "blind")


def test_evaluations_on_the_way_are_logged_and_stored(tmp_path):
    config = make_config(updates=5, evaluate_every=2)
    train(config, make_store(), tmp_path / "run")
    evaluations = [line for line in lines(tmp_path / "run") if "eval/return_mean" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 5], "the last update is always evaluated"
    for line in evaluations:  # Pendulum has no reference returns, so no score
        assert line.keys() == {"step", "eval/return_mean", "eval/return_std", "eval/episode_length",
                               "eval/env_steps_per_second"}
        assert line["eval/episode_length"] == 200
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]
    assert [(result["step"], result["mode"], result["seeds"]) for result in results] == [
        (step, "recurrent", [3]) for step in (2, 4, 5)
    ]
    assert [result["return_mean"] for result in results] == [line["eval/return_mean"] for line in evaluations]


def test_a_run_folder_holds_all_that_a_reader_needs(tmp_path):
    run, config = tmp_path / "runs" / "a", make_config(updates=7, log_every=3, checkpoint_every=3, keep_checkpoints=2)

    folder = train(config, make_store(), run)

    assert folder == run / "checkpoints" / "step-00000007"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step-00000006", "step-00000007"]
    assert yaml.safe_load((run / "config.yaml").read_text()) == config.to_dict()
    assert Config.from_dict(yaml.safe_load((run / "config.yaml").read_text())) == config
    assert [line["step"] for line in lines(run)] == [3, 6, 7]
    tags = {"train/loss", "train/grad_norm", "train/learning_rate", "train/updates_per_second"}
    assert all(line.keys() == tags | {"step"} for line in lines(run))
    board = EventAccumulator(str(run)).Reload()
    assert set(board.Tags()["scalars"]) == tags
    for tag in tags:
        seen = [(event.step, event.value) for event in board.Scalars(tag)]
        assert seen == [(line["step"], np.float32(line[tag])) for line in lines(run)]


def test_a_checkpoint_of_training_knows_its_config_and_its_data(tmp_path):
    store, config = make_store(spaces=PENDULUM._replace(environment="")), make_config(updates=2)
    saved = checkpoints.load(train(config, store, tmp_path / "run"))
    assert (saved.config, saved.step, saved.dataset_fingerprint) == (config, 2, store.fingerprint)
    assert saved.spaces.environment == "Pendulum-v1"
    np.testing.assert_array_equal(saved.normaliser.mean, store.normaliser.mean)
    np.testing.assert_array_equal(saved.normaliser.std, store.normaliser.std)


# the learning rate


@pytest.mark.parametrize("stop", [None, 7], ids=["in one go", "stopped and resumed"])
def test_the_learning_rate_logged_is_the_one_used(tmp_path, monkeypatch, stop):
    used, config = [], make_config()
    if stop is not None:
        with killed_at(monkeypatch, stop):
            train(config, make_store(), tmp_path / "run")

    def spy(weights, gradient, mean, square, decay, *others):
        used.append(decay.item() / config.train.weight_decay)
        adamw(weights, gradient, mean, square, decay, *others)

    monkeypatch.setattr("drl.descent.adamw", spy)
    train(config, make_store(), tmp_path / "run", resume=stop is not None)

    expected = [schedule(step, config.train) for step in range(12)]
    assert [line["train/learning_rate"] for line in lines(tmp_path / "run")] == expected
    # from the checkpoint at 5 on; the table on the device is float32
    assert used == pytest.approx(expected[0 if stop is None else 5:], rel=1e-7)


# precision and compilation


def test_bfloat16_stays_close_to_float32_and_keeps_what_it_sums_up_in_float32():
    single, half = (Trainer(make_config(precision=precision, updates=30), make_store())
                    for precision in ("float32", "bfloat16"))
    different = 0
    for _ in range(20):
        expected = single.update()
        loss, norm = half.update()
        torch.testing.assert_close((loss, norm), expected, rtol=0.05, atol=0)
        assert loss.dtype == norm.dtype == torch.float32
        different += (loss != expected[0]).item()
    assert different, "bfloat16 must be seen to be used"
    saved = half.checkpoint()
    floats = [x for x in (saved.weights | saved.training).values() if x.is_floating_point()]
    assert {x.dtype for x in floats} == {torch.float32}


@pytest.mark.parametrize("loaded", [False, True])
def test_in_bfloat16_the_linear_layers_read_the_weights_of_the_last_update(loaded):
    trainer = Trainer(make_config(precision="bfloat16"), make_store())
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    for _ in range(3):
        trainer.update()
    if loaded:
        past, trainer = trainer.checkpoint(), Trainer(make_config(precision="bfloat16", seed=1), make_store())
        trainer.load(past)
    linear = {name for name, module in trainer.model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, weight in trainer.working.named_parameters():
        if name.rpartition(".")[0] in linear:
            torch.testing.assert_close(weight, trainer.model.get_parameter(name).bfloat16(), rtol=0, atol=0)
        else:
            assert weight is trainer.model.get_parameter(name)
    assert linear and any(before[name].ne(weight).any() for name, weight in trainer.model.named_parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # an import within the compiler
@pytest.mark.parametrize(("attention", "sampling"), WAYS)
def test_a_compiled_update_is_the_update(attention, sampling):
    def losses(compile):
        config = make_config(attention, sampling=sampling, stream_groups=3, updates=30, compile=compile)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
        trainer = Trainer(config, make_store())
        return [trainer.update() for _ in range(8)]

    torch.testing.assert_close(losses("on"), losses("off"), rtol=1e-5, atol=1e-6)


# state passing


def test_an_update_reads_the_state_that_the_last_one_left():
    carried, forgetful = (Trainer(make_config(), make_store()) for _ in range(2))

    def losses():
        forgetful.states = [forgetful.model.initial_state(4)]
        for trainer in (carried, forgetful):
            yield trainer.update()[0].item()

    first, first_without = losses()
    assert first == first_without, "the first chunk has no past"
    assert not carried.sampler.restart.all(), "some stream must be mid-episode for this to be a test"
    second, second_without = losses()
    assert second != second_without


def test_an_update_keeps_the_state_of_every_layer_and_stream():
    trainer, twin = (Trainer(make_config(), make_store()) for _ in range(2))
    past = twin.model.initial_state(4)
    for _ in range(3):
        batch = twin.sampler.next(0)
        twin.model.load_state_dict(trainer.model.state_dict())
        with twin.randomness():
            _, past = twin.model(*batch[:5], tuple(layer.detach().restart(batch.restart) for layer in past))
        trainer.update()
        torch.testing.assert_close(trainer.states, [tuple(layer.detach() for layer in past)], rtol=0, atol=0)


def test_an_update_changes_the_states_of_the_group_whose_turn_it_is_and_no_other():
    trainer = Trainer(make_config(stream_groups=3), make_store())
    for turn in (0, 1, 2, 0):
        before = [[layer.kv.clone() for layer in state] for state in trainer.states]
        trainer.update()
        for group, state in enumerate(trainer.states):
            for layer, kv in zip(state, before[group], strict=True):
                changed = (layer.kv != kv).flatten(1).any(1)
                assert changed.tolist() == [group == turn] * 4


def test_a_chunk_with_its_state_says_what_the_whole_episode_says():
    """The states that training carries are those of one long forward pass: no step lost, none read twice."""
    trainer = Trainer(make_config(), make_store())
    model, sampler = trainer.model.eval().double(), trainer.sampler
    for name in ("returns_to_go", "observations", "actions"):
        setattr(sampler.steps, name, getattr(sampler.steps, name).double())
    state = model.initial_state(4)
    followed, compared = torch.zeros(4, dtype=torch.bool), 0  # rows enter their first episode midway
    for _ in range(25):
        episode_B, position_B = sampler.episode[0].clone(), sampler.position[0].clone()
        followed |= position_B == 0
        batch = sampler.next(0)
        with torch.no_grad():
            predicted, state = model(*batch[:5], tuple(layer.restart(batch.restart) for layer in state))
        for row in followed.nonzero().flatten().tolist():
            steps = torch.arange(*sampler.steps.starts[episode_B[row] + torch.arange(2)].tolist())
            with torch.no_grad():
                whole, _ = model(*sampler.steps.take(steps[None]), torch.arange(len(steps))[None])
            chunk = whole[0, position_B[row]:][:5]
            torch.testing.assert_close(predicted[row, batch.mask[row]], chunk, rtol=1e-9, atol=1e-9)
            compared += position_B[row].item() > 0
    assert compared > 10


def test_gradients_stop_at_the_edge_of_a_chunk():
    """The gradient of the second update is the one for a first state that is a mere number."""
    trainer = Trainer(make_config(), make_store())
    trainer.update()
    assert all(not part.requires_grad and part.grad_fn is None for layer in trainer.states[0] for part in layer)
    twin = Trainer(make_config(), make_store())
    twin.load(trainer.checkpoint())
    batch = twin.sampler.next(1)
    past = tuple(layer.restart(batch.restart) for layer in twin.states[0])
    assert any(layer.kv.abs().sum() > 0 for layer in past)

    with twin.randomness():
        predicted, _ = twin.model(*batch[:5], past)
    errors, _ = action_errors(predicted, batch.actions, batch.mask)
    gradients = torch.autograd.grad(errors, list(twin.model.parameters()))
    trainer.update()
    for parameter, gradient in zip(trainer.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


# mistakes


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        train(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_is_not_overwritten(tmp_path):
    run = tmp_path / "run"
    folder = train(make_config(updates=1), make_store(), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    message = refusal(make_config(updates=2), make_store(), run)
    assert message == (f"{run} already holds a run; add --resume to go on with it, or name another folder with --run")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"} == before
    assert folder.exists()


def test_a_run_goes_on_only_with_its_own_config(tmp_path):
    run = tmp_path / "run"
    train(make_config(updates=1), make_store(), run)
    before = (run / "config.yaml").read_text()
    message = refusal(make_config(updates=2, learning_rate=1e-3), make_store(), run, resume=True)
    assert message == (
        f"{run} was trained with another config (train.updates 1 -> 2, train.learning_rate 0.003 -> 0.001); repeat the "
        f"options of the first command, or type: drl train --resume --run {run}"
    )
    assert (run / "config.yaml").read_text() == before


def test_a_run_goes_on_only_with_its_own_data(tmp_path):
    run = tmp_path / "run"
    train(make_config(updates=1), make_store(), run)
    message = refusal(make_config(updates=1), make_store(seed=1), run, resume=True)
    assert message == (f"the data of synthetic/rule-v0 changed since {run} was trained; name another folder with --run")


def test_a_damaged_checkpoint_is_not_resumed(tmp_path):
    folder = train(make_config(updates=1), make_store(), tmp_path / "run")
    (folder / "training.safetensors").write_bytes(b"")
    assert "is damaged" in refusal(make_config(updates=1), make_store(), tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tmp_path):
    config = make_config(learning_rate=1e36, warmup_updates=0, checkpoint_every=1)
    with pytest.raises(UserError, match=r"^at update 2 the loss is (nan|inf) and the gradient norm (nan|inf) "
                                        r"with seed 0; lower --train.learning_rate \(now 1e\+36\) in another --run; "
                                        r"the checkpoints of this one are intact$"):
        train(config, make_store(), tmp_path / "run")
    assert checkpoints.load(tmp_path / "run").step == 1
    assert [line["step"] for line in lines(tmp_path / "run")] == [1]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Also between two lines of the log, where nobody looks at the loss."""
    config = make_config(learning_rate=1e38, warmup_updates=0, updates=8, log_every=4, checkpoint_every=1,
                         keep_checkpoints=2)
    refusal(config, make_store(), tmp_path / "run")
    if checkpoints.exists(tmp_path / "run"):
        weights = checkpoints.load(tmp_path / "run").weights
        assert all(torch.isfinite(value).all() for value in weights.values())


# what a config leaves open


def test_resolving_fills_in_what_the_config_leaves_open():
    store = make_store()
    config = resolve(Config(dataset="synthetic/rule-v0"), store)
    assert config.environment == "Pendulum-v1"
    assert config.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert config.train.precision in ("bfloat16", "float32") and config.train.compile in ("on", "off")
    assert config.evaluate.target_returns == [store.episode_returns.max()]
    assert resolve(config, store) == config, "what is resolved stays"


@pytest.mark.parametrize(("precision", "compile"), [("float32", "off"), ("bfloat16", "on")])
def test_resolving_keeps_what_the_config_says(precision, compile):
    config = make_config(precision=precision, compile=compile)
    assert resolve(config, make_store()) == config


@pytest.mark.parametrize(
    ("device", "instructions", "updates", "meant"),
    [
        ("cpu", {}, 100_000, ("float32", "off")),
        ("cpu", {"avx512_f": True, "avx512_bf16": False}, 100_000, ("float32", "off")),
        ("cpu", {"avx512_bf16": True}, 1, ("bfloat16", "off")),
        ("cpu", {"amx_bf16": True}, 100_000, ("bfloat16", "off")),
        ("cuda", {}, 44_999, ("bfloat16", "off")),
        ("cuda", {}, 45_000, ("bfloat16", "on")),
    ],
)
def test_resolving_chooses_what_suits_the_device_and_the_length_of_the_run(
    monkeypatch, device, instructions, updates, meant
):
    monkeypatch.setattr("drl.resolve.resolve_device", lambda named: named)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    config = dataclasses.replace(make_config(updates=updates, precision="auto", compile="auto"), device=device)
    settings = resolve(config, make_store()).train
    assert (settings.precision, settings.compile) == meant


def test_resolving_needs_an_environment():
    nameless = make_store(spaces=PENDULUM._replace(environment=""))
    config = Config(dataset="synthetic/rule-v0")
    with pytest.raises(UserError) as caught:
        resolve(config, nameless)
    assert str(caught.value) == "dataset synthetic/rule-v0 names no environment; add --environment, e.g. Hopper-v5"
    assert resolve(dataclasses.replace(config, environment="Pendulum-v1"), nameless).environment == "Pendulum-v1"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("Pendulumm-v1", "unknown environment 'Pendulumm-v1'; did you mean 'Pendulum-v1'?"),
        ("Hopper-v5", "dataset synthetic/rule-v0 has observations of dimension 3 and actions of dimension 1, but "
                      "Hopper-v5 has 11 and 3; use --environment Pendulum-v1"),
        ("CartPole-v1", "environment CartPole-v1 has action_space Discrete(2); flat Box spaces are needed"),
    ],
)
def test_resolving_refuses_an_environment_that_does_not_fit(environment, message):
    with pytest.raises(UserError) as caught:
        resolve(Config(dataset="synthetic/rule-v0", environment=environment), make_store())
    assert str(caught.value) == message


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(UserError, match=rf"^device '{device}' is not available \(.+\); use --device cpu$"):
        resolve_device(device)


def test_a_device_without_numbers_is_refused():
    """A meta tensor can be made, but holds nothing."""
    with pytest.raises(UserError, match="^device 'meta' is not available .*; use --device cpu$"):
        resolve_device("meta")


def test_devices_are_resolved_once():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device(resolve_device("auto")) == resolve_device("auto")


# several seeds


SEEDS = [0, 7, 2]


def together(folder, seeds=SEEDS, resume=False, **settings) -> None:
    configs = [make_config(seed=seed, **settings) for seed in seeds]
    train_together(configs, make_store(), [folder / f"seed-{seed}" for seed in seeds], resume=resume)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a run of each seed, each trained by itself."""
    torch.use_deterministic_algorithms(True)
    folder = tmp_path_factory.mktemp("alone")
    for seed in SEEDS:
        train(make_config(seed=seed, stream_groups=3), make_store(), folder / f"seed-{seed}")
    return folder


def test_seeds_trained_together_have_the_numbers_of_each_alone(tmp_path, alone):
    """Dropout included: each draws from generators of its own."""
    together(tmp_path, stream_groups=3)
    for seed in SEEDS:
        assert_same_run(tmp_path / f"seed-{seed}", alone / f"seed-{seed}")
        assert read_config(tmp_path / f"seed-{seed}" / "config.yaml") == make_config(seed=seed, stream_groups=3)
    assert training_lines(alone / "seed-0") != training_lines(alone / "seed-2")


@pytest.mark.parametrize("lost", [None, "seed-7", "seed-2"])
def test_seeds_stopped_together_go_on_together_even_if_one_is_behind(tmp_path, monkeypatch, alone, lost):
    with killed_at(monkeypatch, 11):
        together(tmp_path, stream_groups=3)
    if lost:  # killed after the others had written their checkpoints of update 10
        shutil.rmtree(tmp_path / lost / "checkpoints" / "step-00000010")
    together(tmp_path, resume=True, stream_groups=3)
    for seed in SEEDS:
        assert_same_run(tmp_path / f"seed-{seed}", alone / f"seed-{seed}")


def test_a_seed_trained_with_others_goes_on_alone(tmp_path, monkeypatch, alone):
    with killed_at(monkeypatch, 8):
        together(tmp_path, stream_groups=3)
    train(make_config(seed=7, stream_groups=3), make_store(), tmp_path / "seed-7", resume=True)
    assert_same_run(tmp_path / "seed-7", alone / "seed-7")


def test_dropout_goes_on_from_update_to_update_with_generators_of_the_trainers_own():
    one, twin, other = (Trainer(make_config(seed=seed), make_store()) for seed in (0, 0, 1))

    def drawn(trainer) -> list[float]:
        with trainer.randomness():
            return torch.rand(3).tolist()

    before = torch.get_rng_state()
    first, second = drawn(one), drawn(one)
    assert first != second
    assert drawn(other) not in (first, second)
    assert [drawn(twin), drawn(twin)] == [first, second]
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_seeds_share_the_arrays_of_the_dataset(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("drl.train.Steps", lambda *arguments: made.append(arguments) or Steps(*arguments))
    together(tmp_path, updates=1)
    assert len(made) == 1


def test_a_seed_whose_loss_is_not_finite_is_named(tmp_path):
    configs = [make_config(seed=seed, learning_rate=1e36, warmup_updates=0) for seed in (3, 4)]
    with pytest.raises(UserError, match="with seed 3; lower"):
        train_together(configs, make_store(), [tmp_path / "a", tmp_path / "b"])


# runs of before


OLD = make_config(updates=1, value_measure="value", discount=0.99)


@pytest.fixture
def old(tmp_path):
    """A run of one update, stored as if none of the options in BEFORE had been one."""
    folder = train(OLD, make_store(), tmp_path / "run")
    card = json.loads((folder / "checkpoint.json").read_text())
    for key in BEFORE:
        section, _, name = key.partition(".")
        del card["config"][section][name]
    (folder / "checkpoint.json").write_text(json.dumps(card))
    manifest = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()
                if file.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(card["config"]))
    return tmp_path / "run"


def test_a_run_of_before_an_option_was_one_is_read_as_it_was_made_and_goes_on(old):
    assert checkpoints.load(old).config == read_config(old / "config.yaml") == OLD
    assert checkpoints.load(train(OLD, make_store(), old, resume=True)).step == 1


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"value_weight": 0.5}, {"best_episodes": 0.5}], ids=str)
def test_a_run_of_before_an_option_was_one_does_not_go_on_with_another_value_of_it(old, changes):
    (name, value), = changes.items()
    said = refusal(make_config(updates=1, **changes), make_store(), old, resume=True)
    assert f"train.{name} {getattr(make_config().train, name)} -> {value}" in said
