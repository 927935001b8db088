"""A number that is not finite stops training before it reaches a weight, and is named: where, when, and what to do.

The oracle is a run that was never disturbed and stopped in time.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
from test_train import (
    LENGTHS, PENDULUM, SAMPLING, assert_same_run, episode, killed_at, make_config, make_store,
)

from drl import checkpoint as checkpoints
from drl.data import columns, packed
from drl.data.columns import Extent
from drl.data.store import EpisodeStore
from drl.errors import UserError
from drl.train import train, train_together
from drl.trainer import Trainer

NAME = "blocks.1.mlp.0.weight"
GOOD = 4  # updates before the bad one
LOWER = "lower --train.learning_rate (now 0.003) in another --run; the checkpoints of this one are intact"


def spoil(trainer: Trainer, what: str, after: int = GOOD) -> Trainer:
    """The update after `after` updates has a loss that is not finite, or a finite one with such a gradient; in the next
    one nothing is finite."""
    count, real = 0, trainer._errors

    def errors(model, *arguments):
        nonlocal count
        count += 1
        total, number, state = real(model, *arguments)
        if count == after + 1 and what == "gradient":
            total = total + (0 * model.get_parameter(NAME)).sum().sqrt()  # 0, whose gradient is 0 times infinity
        elif count in (after + 1, after + 2):
            total = total * torch.nan
        return total, number, state

    trainer._errors = errors
    return trainer


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What an update changes, but for the draws."""
    working = {f"working.{name}": weight for name, weight in trainer.working.state_dict().items()}
    tensors = trainer.model.state_dict() | working | trainer.descent.state_dict()
    return {name: x.clone() for name, x in tensors.items()}


def made(config, steps: int) -> Trainer:
    trainer = Trainer(config, make_store())
    for _ in range(steps):
        trainer.update()
    return trainer


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        train(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spoil_runs(monkeypatch, what: str, seed: int = 0) -> None:
    """Every trainer of this seed is spoilt from here on."""
    make = Trainer.__init__

    def init(self, config, *others):
        make(self, config, *others)
        if config.seed == seed:
            spoil(self, what)

    monkeypatch.setattr(Trainer, "__init__", init)


# the update


@pytest.mark.parametrize(("sampling", "precision"), [("state_passing", "float32"), ("windows", "bfloat16")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_update_and_all_after_it_leave_everything_as_it_was(sampling, precision, what):
    config = make_config(sampling=sampling, precision=precision, stream_groups=2)
    expected = everything(made(config, GOOD))
    trainer = spoil(Trainer(config, make_store()), what)
    good = [trainer.update() for _ in range(GOOD)]
    trainer.require_finite()

    bad = [trainer.update() for _ in range(4)]

    torch.testing.assert_close(everything(trainer), expected, rtol=0, atol=0)
    assert trainer.descent.done == GOOD
    assert torch.tensor(good).isfinite().all() and not torch.tensor(bad)[:, 1].isfinite().any()
    torch.testing.assert_close(bad, bad[:1] * 4, rtol=0, atol=0, equal_nan=True, msg="the first of them is told")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # an import within the compiler
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_a_bad_update_and_all_after_it_leave_everything_as_it_was(precision):
    config = make_config(precision=precision, compile="on")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    trainer = spoil(Trainer(config, make_store()), "loss")
    for _ in range(GOOD):
        trainer.update()
    expected = everything(trainer)
    for _ in range(3):
        trainer.update()
    torch.testing.assert_close(everything(trainer), expected, rtol=0, atol=0)
    assert trainer.descent.done == GOOD


def test_nothing_is_saved_of_a_trainer_whose_update_was_not_made():
    trainer = spoil(Trainer(make_config(), make_store()), "gradient")
    for _ in range(GOOD + 2):
        trainer.update()
    with pytest.raises(UserError, match=f"^at update {GOOD + 1} the loss is "):
        trainer.checkpoint()


# the run


@pytest.mark.parametrize(("what", "looks"), [
    ("loss", "at every update"), ("gradient", "at every update"), ("gradient", "at saves"),
])
def test_a_run_stops_with_the_update_that_was_bad_and_the_last_checkpoint_is_that_of_an_undisturbed_run(
    tmp_path, monkeypatch, what, looks
):
    config = make_config(log_every=100, checkpoint_every=3)
    with killed_at(monkeypatch, 3):
        train(config, make_store(), tmp_path / "short")
    spoil_runs(monkeypatch, what)
    if looks == "at saves":  # as on a GPU
        monkeypatch.setattr("drl.train.is_cuda", lambda device: True)

    message = refusal(config, make_store(), tmp_path / "run")

    seen = (r"nan and the gradient norm nan" if what == "loss" else
            rf"\d\.\d+ and the gradient norm nan{rf' .first in {NAME}.' if looks == 'at every update' else ''}")
    assert re.fullmatch(rf"at update {GOOD + 1} the loss is {seen} with seed 0; {re.escape(LOWER)}", message), message
    saved = [checkpoints.load(tmp_path / name) for name in ("run", "short")]
    assert [past.step for past in saved] == [3, 3]
    for tensors in ("weights", "training"):
        torch.testing.assert_close(*(getattr(past, tensors) for past in saved), rtol=0, atol=0)


def test_of_several_seeds_the_one_that_is_bad_is_named(tmp_path, monkeypatch):
    spoil_runs(monkeypatch, "loss", seed=7)
    configs = [make_config(seed=seed, log_every=100) for seed in (3, 7, 5)]
    with pytest.raises(UserError, match=f"^at update {GOOD + 1} the loss is nan .* with seed 7; lower"):
        train_together(configs, make_store(), [tmp_path / str(config.seed) for config in configs])


# the data


def mapped(folder) -> EpisodeStore:
    """The store of make_store, mapped from its packed copy, which is made anew where it is damaged."""
    if not folder.exists():
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "metadata.json").write_text("{}")

    def build(target):
        rng = np.random.default_rng(0)
        columns.write([episode(rng, length) for length in LENGTHS], PENDULUM, "synthetic/rule-v0", target)

    extent = Extent(sum(LENGTHS), len(LENGTHS), PENDULUM)
    return packed.read("synthetic/rule-v0", folder, lambda: extent, build)


def spoil_file(folder, field: str, first: int, value=np.nan) -> None:
    np.load(folder / "packed" / f"{field}.npy", mmap_mode="r+")[first:] = value


@pytest.mark.parametrize("field", ["observations", "actions", "returns_to_go"])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_data_that_change_while_they_are_read_are_named(tmp_path, field, sampling):
    trainer = Trainer(make_config(sampling=sampling), mapped(tmp_path / "data"))
    trainer.update()
    spoil_file(tmp_path / "data", field, first=LENGTHS[0] + 4, value=np.inf)

    while trainer.descent.done == trainer.step < 12:
        trainer.update()

    with pytest.raises(UserError) as caught:
        trainer.require_finite()
    assert str(caught.value) == (
        f"at update {trainer.step} with seed 0 the data are not finite: dataset synthetic/rule-v0, episode 1, step 4, "
        f"field {field}; they changed since training began; --resume checks them and goes on from the last checkpoint"
    )


def test_a_run_whose_data_changed_goes_on_from_its_last_checkpoint_as_if_they_had_not(tmp_path, monkeypatch, capfd):
    config = make_config(log_every=100, checkpoint_every=3)
    train(config, make_store(), tmp_path / "whole")

    def descend(self, group, real=Trainer.descend):
        if self.step == 7:
            spoil_file(tmp_path / "data", "observations", 0)
        return real(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "descend", descend)
        message = refusal(config, mapped(tmp_path / "data"), tmp_path / "run")
    assert message.startswith("at update 8 with seed 0 the data are not finite: dataset synthetic/rule-v0, episode 0, ")

    train(config, mapped(tmp_path / "data"), tmp_path / "run", resume=True)

    assert "is damaged (a checksum differs); packing it anew" in capfd.readouterr().err
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# what a checkpoint holds


def narrowed(tensors, name):
    return tensors | {name: tensors[name].flatten()[:1].clone()}


def changed(tensors, name, value):
    tensors[name].view(-1)[-1] = value
    return tensors


MISFITS = {  # what is changed, how, and what is said of it
    "a tensor is missing": (
        "training", lambda t: {name: x for name, x in t.items() if name != "optimizer.3.exp_avg"},
        "optimizer.3.exp_avg is missing"),
    "one too many": (
        "training", lambda t: t | {"optimizer.99.exp_avg": torch.zeros(1)}, "optimizer.99.exp_avg is unknown"),
    "an average of one number": (
        "training", lambda t: narrowed(t, "optimizer.0.exp_avg"),
        "optimizer.0.exp_avg is float32 (1,), expected float32 (16, 1)"),
    "an average in float64": (
        "training", lambda t: t | {"optimizer.1.exp_avg": t["optimizer.1.exp_avg"].double()},
        "optimizer.1.exp_avg is float64 (16,), expected float32 (16,)"),
    "an average that is not finite": (
        "training", lambda t: changed(t, "optimizer.1.exp_avg_sq", torch.inf), "optimizer.1.exp_avg_sq is not finite"),
    "a state of one row": (
        "training", lambda t: t | {"state.1.kv": t["state.1.kv"][:1].clone()},
        "state.1.kv is float32 (1, 2, 8, 8), expected float32 (8, 2, 8, 8)"),
    "a state that is not finite": (
        "training", lambda t: changed(t, "state.0.z", torch.nan), "state.0.z is not finite"),
    "one stream": (
        "training", lambda t: narrowed(t, "sampler.position"),
        "sampler.position is int64 (1,), expected int64 (8,)"),
    "an episode beyond the last": (
        "training", lambda t: changed(t, "sampler.episode", 6), "sampler.episode is not of the 6 episodes"),
    "an episode before the first": (
        "training", lambda t: changed(t, "sampler.episode", -1), "sampler.episode is not of the 6 episodes"),
    "a step beyond the last": (
        "training", lambda t: changed(t, "sampler.position", 31), "sampler.position is beyond its episode"),
    "a step before the first": (
        "training", lambda t: changed(t, "sampler.position", -5), "sampler.position is beyond its episode"),
    "a generator that is too short": (
        "training", lambda t: t | {"sampler.generator": t["sampler.generator"][:-1]},
        "sampler.generator is uint8 (5055,), expected uint8 (5056,)"),
    "no state of a generator": (
        "training", lambda t: t | {"sampler.generator": torch.zeros_like(t["sampler.generator"])},
        "Invalid mt19937 state"),
    "none of dropout's": (
        "training", lambda t: t | {"rng.cpu": torch.zeros_like(t["rng.cpu"])}, "Invalid mt19937 state"),
    "a weight is missing": (
        "weights", lambda t: {name: x for name, x in t.items() if name != "head.bias"}, "head.bias is missing"),
    "a weight of one number": (
        "weights", lambda t: narrowed(t, NAME), f"{NAME} is float32 (1,), expected float32 (64, 16)"),
    "a weight that is not finite": (
        "weights", lambda t: changed(t, NAME, torch.nan), f"{NAME} is not finite"),
}


@pytest.fixture(scope="module")
def past():
    return made(make_config(stream_groups=2), 3).checkpoint()


@pytest.mark.parametrize(("which", "change", "reason"), MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused(past, which, change, reason):
    tensors = change({name: x.clone() for name, x in getattr(past, which).items()})
    with pytest.raises(UserError) as caught:
        Trainer(make_config(stream_groups=2), make_store()).load(dataclasses.replace(past, **{which: tensors}))
    assert str(caught.value) == (f"the checkpoint of update 3 does not fit this run: {reason}; remove it to go on from "
                                 "an older one, or name another folder with --run")


def test_a_trainer_that_loads_goes_on_although_it_had_stopped(past):
    trainer = spoil(Trainer(make_config(stream_groups=2), make_store()), "loss", after=0)
    for _ in range(2):
        trainer.update()
    trainer.load(past)
    trainer.update()
    torch.testing.assert_close(everything(trainer), everything(made(make_config(stream_groups=2), 4)), rtol=0, atol=0)
