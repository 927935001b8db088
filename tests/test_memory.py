"""A memory that fades and steps of two tokens, all the way: trained, stopped, saved, exported, acted from."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from test_policy import BY_TORCH, COMPILED, REPLAY, K, make_checkpoint, make_policy, record
from test_policy import assert_near, assert_same, observe, parallel_episodes, replay
from test_portable import ONNX, run, session, step, through
from test_train import assert_same_run, killed_at, make_config, make_store
from toys import OWN

from drl import checkpoint as checkpoints
from drl import exported
from drl.config import ModelConfig
from drl.errors import UserError
from drl.export import export
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.portable import StepModule
from drl.train import train
from drl.trainer import Trainer

FADING = {"half_lives": [0.25, 16.0]}
LENGTHS = (211,), (31, 1, 2, 43, 134), (100, 111)
TWO = {"action_tokens": False}
BOTH = {"half_lives": [1.0, 64.0], "action_tokens": False}
CAPPED = {"return_quantile": 0.5}
TIMELESS = {"timestep_embedding": False}
MEMORY = pytest.mark.parametrize("memory", [FADING, TWO, BOTH, CAPPED, OWN, TIMELESS],
                                 ids=["fading", "two tokens", "both", "capped", "the default", "no timestep"])


def config(memory, **settings):
    tiny = make_config(**settings)
    return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **memory))


# Acting


@MEMORY
@pytest.mark.parametrize("kind, dtype", [(BY_TORCH, torch.float64), *((kind, torch.float32) for kind in COMPILED)])
def test_stepping_through_episodes_is_reading_each_at_once(kind, dtype, memory):
    policy, recording = make_policy(kind, dtype, **memory), record(LENGTHS)
    expected = parallel_episodes(policy, recording)

    actual = replay(policy, recording)

    assert expected.std(axis=0).min() > 0.05, "actions that hardly differ would prove nothing"
    assert_near(actual, expected, REPLAY[dtype])


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_a_window_of_two_tokens_a_step_is_the_model_over_its_steps(attention):
    policy, recording = make_policy(WindowPolicy, torch.float64, attention=attention, **TWO), record(((K,),))
    assert_near(replay(policy, recording), parallel_episodes(policy, recording), REPLAY[torch.float64])


@pytest.mark.parametrize("memory", [pytest.param(FADING, marks=pytest.mark.slow), BOTH | CAPPED],
                         ids=["fading", "all"])
def test_programs_of_the_step_do_what_the_policy_does(tmp_path, memory):
    formats = ["pt2", *["onnx"] * all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))]
    checkpoints.save(make_checkpoint(**memory), tmp_path / "run", keep=1)
    export(tmp_path / "run", tmp_path / "policy", formats=formats)
    loaded = RecurrentPolicy.load(tmp_path / "policy")  # held to its golden trace, by the compiled step where it is
    policy, inputs = make_policy(BY_TORCH, backend="chunked", **memory), through(3)
    expected = step(policy, *inputs)

    assert loaded.config.model == make_checkpoint(**memory).config.model
    assert_same(run(StepModule(policy), policy, *inputs), expected)
    assert_same(run(torch.export.load(tmp_path / "policy" / "step.pt2").module(), policy, *inputs), expected)
    if "onnx" in formats:
        made = run(session(tmp_path / "policy" / "step.onnx"), policy, *inputs)
        torch.testing.assert_close(made, expected, rtol=ONNX, atol=ONNX)


# Files


@MEMORY
def test_a_policy_loaded_from_a_run_acts_as_the_one_that_was_saved(tmp_path, memory):
    checkpoint = make_checkpoint(**memory)
    checkpoints.save(checkpoint, tmp_path, keep=1)
    expected, loaded = RecurrentPolicy(checkpoint), RecurrentPolicy.load(tmp_path)
    for observation in observe(count=3):
        np.testing.assert_array_equal(loaded.act(observation, 0.5), expected.act(observation, 0.5))


@pytest.mark.parametrize("kind", [BY_TORCH, *COMPILED, WindowPolicy])
@pytest.mark.parametrize(("was", "now", "message"), [
    (FADING, {}, "the weight 'blocks.0.attention.decay' is not one of its model"),
    ({}, FADING, "the weight 'blocks.0.attention.decay' is missing"),
    (FADING, {"half_lives": [0.25, 16.001]}, "the weight blocks.0.attention.decay is not that of model.half_lives"),
    (TWO, {}, "the weight 'embed_action.bias' is missing"),
    ({}, TWO, "the weight 'embed_action.bias' is not one of its model"),
    (CAPPED, {}, "the weight 'return_cap' is not one of its model"),
    ({}, CAPPED, "the weight 'return_cap' is missing"),
])
def test_weights_of_another_memory_are_refused(kind, was, now, message):
    other = dataclasses.replace(make_checkpoint(**was), config=make_checkpoint(**now).config)
    with pytest.raises(UserError) as caught:
        kind(other)
    assert str(caught.value) == f"the policy is not sound: {message}"


def test_an_exported_file_whose_decay_was_changed_is_not_acted_from(tmp_path):
    checkpoint = make_checkpoint(**FADING)
    checkpoint.weights["blocks.1.attention.decay"].mul_(0.99)
    exported.write(tmp_path, checkpoint, exported.Trace(*[torch.zeros(())] * 5), [])
    with pytest.raises(UserError):
        exported.load(tmp_path)


# The cap


def test_no_target_is_heard_beyond_the_cap_and_below_it_each_is():
    policy = make_policy(BY_TORCH, torch.float64, **CAPPED)
    policy.model.return_cap.fill_(5.0)
    first = observe(count=1)[0][:1]

    def heard(target):
        return policy.step(first, np.zeros(1), policy.initial_state(1, target))[0]

    np.testing.assert_array_equal(heard(5.0), heard(1e6))
    assert abs(heard(5.0) - heard(4.0)).max() > 0


def test_the_cap_of_a_timestep_is_the_quantile_of_what_the_episodes_that_reached_it_still_earned():
    store = make_store()
    trainer = Trainer(config({"return_quantile": 0.75, "max_timesteps": 40}), store)
    starts, lengths = store.episode_starts[:-1], store.episode_lengths
    longest = lengths.max()
    expected = [np.quantile([store.returns_to_go[s + t] for s, n in zip(starts, lengths) if n > t], 0.75)
                for t in range(longest)]
    np.testing.assert_allclose(trainer.model.return_cap[:longest], expected, rtol=1e-6)
    np.testing.assert_array_equal(trainer.model.return_cap[longest:], trainer.model.return_cap[longest - 1])


@pytest.mark.parametrize(("changes", "message"), [
    ({"return_quantile": 1.1}, "model.return_quantile must be in [0, 1], got 1.1"),
    ({"return_quantile": -0.1}, "model.return_quantile must be in [0, 1], got -0.1"),
])
def test_a_quantile_that_is_none_is_refused(changes, message):
    with pytest.raises(UserError) as caught:
        ModelConfig(**changes)
    assert str(caught.value) == message


# Training


@MEMORY
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stopping_and_going_on_equals_never_stopping(tmp_path, monkeypatch, precision, memory):
    one = config(memory, stream_groups=3, precision=precision)
    train(one, make_store(), tmp_path / "whole")

    with killed_at(monkeypatch, 8):
        train(one, make_store(), tmp_path / "stopped")
    train(one, make_store(), tmp_path / "stopped", resume=True)

    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@MEMORY
def test_bfloat16_stays_close_to_float32(memory):
    single, half = (Trainer(config(memory, precision=precision, updates=30), make_store())
                    for precision in ("float32", "bfloat16"))
    for _ in range(20):
        expected = single.update()
        torch.testing.assert_close(half.update(), expected, rtol=0.05, atol=0)


@MEMORY
def test_decay_cap_and_missing_timesteps_never_learn(memory):
    trainer = Trainer(config(memory, updates=30), make_store())
    before = {name: value.clone() for name, value in trainer.model.named_buffers()}
    for _ in range(5):
        trainer.update()
    assert_same(dict(trainer.model.named_buffers()), before)
    made = trainer.config.model
    assert len(before) == made.layers * bool(made.fading) + bool(made.return_quantile) + (not made.timestep_embedding)


def test_without_a_timestep_embedding_an_action_does_not_tell_how_old_the_episode_is():
    store = make_store()
    for memory, alike in (({}, False), (TIMELESS, True)):
        model = Trainer(config(memory), store).model.eval()
        steps = torch.randn(1, 4), torch.randn(1, 4, 3), torch.randn(1, 4, 1)
        early, late = (model(*steps, start + torch.arange(4)[None])[0] for start in (0, 20))
        assert torch.equal(early, late) == alike


@pytest.mark.parametrize(("attention", "ignored"), [
    ("softmax", FADING), ("none", FADING), ("none", TWO), ("none", CAPPED), ("none", TIMELESS),
    ("none", BOTH | CAPPED),
], ids=str)
def test_what_an_attention_does_not_read_changes_nothing_of_it(attention, ignored):
    """The same tensors by the same names, trained to the same bits."""
    given, plain = (Trainer(config(memory, attention=attention, sampling="windows"), make_store())
                    for memory in (ignored, {}))
    for _ in range(3):
        assert_same(given.update(), plain.update())
    assert_same(dict(given.model.state_dict()), dict(plain.model.state_dict()))
    assert not list(given.model.buffers())


def test_softmax_trains_on_two_tokens_a_step():
    trainer = Trainer(config(TWO, attention="softmax", sampling="windows", updates=30), make_store())
    first, *_, last = (trainer.update()[0].item() for _ in range(20))
    assert last < first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # an import within the compiler
@MEMORY
def test_a_compiled_update_is_the_update(memory):
    def losses(compile):
        trainer = Trainer(config(memory | {"dropout": 0.0}, stream_groups=3, updates=30, compile=compile), make_store())
        return [trainer.update() for _ in range(8)]

    torch.testing.assert_close(losses("on"), losses("off"), rtol=1e-5, atol=1e-6)
