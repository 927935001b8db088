"""Behaviour cloning hears the newest observation and nothing else, and shares all the rest with the transformer.

Dimension key: B batch, L environment steps, O observation, A action.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_policy import make_checkpoint
from test_train import assert_same_run, killed_at, make_config, make_store, training_lines
from torch import nn
from toys import PLAIN

from drl import checkpoint as checkpoints
from drl import cli
from drl import evaluate as evaluation
from drl.cloning import Cloning
from drl.config import Config, ModelConfig
from drl.data.sampling import Steps, WindowSampler
from drl.errors import UserError
from drl.model import DecisionTransformer, make
from drl.policy import WindowPolicy
from drl.resolve import resolve
from drl.train import train
from drl.trainer import Trainer

B, L, O, A = 3, 5, 11, 3  # noqa: E741


def config(**changes) -> ModelConfig:
    return ModelConfig(**{"attention": "none", "width": 24, "layers": 2} | changes)


def model(**changes) -> Cloning:
    torch.manual_seed(0)
    return make(config(**changes), O, A).eval()


def steps(seed: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of `forward`."""
    random = torch.Generator().manual_seed(seed)
    return {
        "returns_to_go": 1000 * torch.randn(B, L, generator=random),
        "observations": torch.randn(B, L, O, generator=random),
        "actions": 2 * torch.rand(B, L, A, generator=random) - 1,
        "timesteps": torch.randint(1000, (B, L), generator=random),
    }


def cloned(**settings) -> Config:
    """As test_train's, with windows of one step."""
    return make_config("none", **{"sampling": "windows", "context": 1} | settings)


# the model


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_it_is_the_mlp_written_out_by_hand(layers):
    cloning, given = model(layers=layers).double(), steps()
    x = given["observations"].double().numpy()
    expected = x
    for block in cloning.blocks:
        expected = np.maximum(expected @ block.weight.detach().numpy().T + block.bias.detach().numpy(), 0)
    expected = np.tanh(expected @ cloning.head.weight.detach().numpy().T + cloning.head.bias.detach().numpy())

    actions, state = cloning(**given | {"observations": torch.as_tensor(x)})

    assert state == cloning.initial_state(B) == () and len(cloning.blocks) == layers
    np.testing.assert_allclose(actions.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_at_two_layers_of_256_it_has_the_weights_of_published_behaviour_cloning():
    published = nn.Sequential(nn.Linear(O, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, A))
    torch.manual_seed(0)
    ours = make(config(width=256), O, A).state_dict()
    torch.manual_seed(0)
    for module in published:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    torch.testing.assert_close(list(ours.values()), list(published.state_dict().values()), rtol=0, atol=0)
    assert sum(weight.numel() for weight in ours.values()) == (11 + 1) * 256 + (256 + 1) * 256 + (256 + 1) * 3


def test_an_action_depends_on_its_own_observation_alone():
    cloning, given, other = model(), steps(), steps(1)
    expected, _ = cloning(**given)

    unheard = {name: other[name] for name in ("returns_to_go", "actions", "timesteps")}
    restart, mask = torch.ones(B, dtype=torch.bool), torch.rand(B, L) < 0.5
    torch.testing.assert_close(cloning(**given | unheard, mask=mask, restart=restart)[0], expected, rtol=0, atol=0)

    changed = given["observations"].clone()
    changed[:, 2] += 1
    actions, _ = cloning(**given | {"observations": changed})
    same = [0, 1, 3, 4]
    torch.testing.assert_close(actions[:, same], expected[:, same], rtol=0, atol=0)
    assert (actions[:, 2] != expected[:, 2]).any(-1).all()


def test_dropout_acts_in_training_alone():
    cloning, given = model(dropout=0.5), steps()
    torch.testing.assert_close(cloning(**given), model()(**given), rtol=0, atol=0)
    cloning.train()
    assert (cloning(**given)[0] != cloning(**given)[0]).any()


def test_only_width_layers_and_dropout_count():
    expected = model(width=25, **PLAIN).state_dict()  # which no number of heads but 1, 5 and 25 divides
    other = model(width=25, heads=7, feature_map="relu", backend="triton", max_timesteps=3, return_scale=7.0,
                  half_lives=[1.0, 2.0], action_tokens=False, return_quantile=0.3)
    torch.testing.assert_close(other.state_dict(), expected, rtol=0, atol=0)
    torch.testing.assert_close(other(**steps()), model(width=25)(**steps()), rtol=0, atol=0)


@pytest.mark.parametrize(("attention", "kind"), [
    ("linear", DecisionTransformer), ("softmax", DecisionTransformer), ("none", Cloning),
])
def test_the_attention_names_the_model(attention, kind):
    given = config(attention=attention)
    torch.manual_seed(0)
    made = make(given, O, A)
    torch.manual_seed(0)
    assert type(made) is kind
    torch.testing.assert_close(made.state_dict(), kind(given, O, A).state_dict(), rtol=0, atol=0)


# training


def test_training_is_the_usual_loop_of_torch():
    made = cloned(batch_size=7, warmup_updates=0, decay="none", weight_decay=1e-2, max_grad_norm=0.05)
    made = dataclasses.replace(made, model=dataclasses.replace(made.model, dropout=0.0))
    store, trainer = make_store(), Trainer(made, make_store())
    sampler = WindowSampler(Steps(store, "cpu"), 7, 1, made.seed)
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1), nn.Tanh())
    net.load_state_dict(dict(zip(net.state_dict(), trainer.model.state_dict().values(), strict=True)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=made.train.learning_rate, weight_decay=1e-2)

    for _ in range(12):
        batch = sampler.next()
        loss = nn.functional.mse_loss(net(batch.observations), batch.actions)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        optimizer.step()
        torch.testing.assert_close(trainer.update(), (loss.detach(), norm), rtol=1e-5, atol=1e-6)

    torch.testing.assert_close(list(trainer.model.state_dict().values()), list(net.state_dict().values()),
                               rtol=0, atol=1e-5)


@pytest.mark.parametrize("context", [1, 5])
def test_a_run_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch, context):
    train(cloned(context=context), make_store(), tmp_path / "whole")
    with killed_at(monkeypatch, 8):
        train(cloned(context=context), make_store(), tmp_path / "stopped")
    train(cloned(context=context), make_store(), tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_in_bfloat16_it_trains_as_in_float32(tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        train(cloned(precision=precision), make_store(), tmp_path / precision)
        losses[precision] = [line["train/loss"] for line in training_lines(tmp_path / precision)]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_the_mode_that_it_cannot_act_in_is_refused_before_training():
    for attention in ("none", "softmax"):
        given = make_config(attention, sampling="windows")
        given = dataclasses.replace(given, evaluate=dataclasses.replace(given.evaluate, mode="recurrent"))
        with pytest.raises(UserError) as caught:
            resolve(given, make_store())
        assert str(caught.value) == (
            f"model.attention {attention} has no recurrent step; add --evaluate.mode window"
        )


# acting


def test_the_length_of_the_window_does_not_change_an_action():
    saved = make_checkpoint("none")
    one = dataclasses.replace(saved, config=dataclasses.replace(
        saved.config, train=dataclasses.replace(saved.config.train, context=1)))
    policies = [WindowPolicy(made) for made in (saved, one)]
    rng = np.random.default_rng(0)
    for _ in range(saved.config.train.context + 3):
        observation = rng.normal(size=(B, saved.spaces.observation_dim))
        long, short = (policy.act(observation, 1.0) for policy in policies)
        np.testing.assert_allclose(long, short, rtol=0, atol=1e-5)


def test_weights_of_fewer_layers_than_the_config_says_are_refused():
    saved = make_checkpoint("none")
    less = {name: weight for name, weight in saved.weights.items() if not name.startswith("blocks.1")}
    with pytest.raises(UserError, match="the policy is not sound: there are weights of 1 layers, not of 2"):
        WindowPolicy(dataclasses.replace(saved, weights=less))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was scored at its end."""
    folder = tmp_path_factory.mktemp("made") / "run"
    train(cloned(evaluate_every=12), make_store(), folder)
    return folder


def test_training_scores_it_by_window(run):
    (result,) = evaluation.read(run)
    assert (result["mode"], result["engine"], result["step"]) == ("window", "torch", 12)


def evaluated(run, capsys, *options) -> dict:
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--json", "--device", "cpu", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_is_evaluated_by_window_and_deaf_to_its_target(run, capsys):
    low, high = (evaluated(run, capsys, "--target_return", target) for target in ("-1000", "0"))
    assert (low["mode"], low["target_return"], high["target_return"]) == ("window", -1000, 0)
    assert low["returns"] == high["returns"]


@pytest.mark.parametrize(("arguments", "told"), [
    (["evaluate", "--mode", "recurrent"],
     "model.attention none has no recurrent step; use --mode window (WindowPolicy)"),
    (["evaluate", "--engine", "cpu"],
     "engine 'cpu' steps recurrently; a window is recomputed by engine 'torch'"),
    (["export", "policy"],
     "model.attention none has no recurrent step to export; act with the run itself: drl evaluate RUN"),
], ids=["mode", "engine", "export"])
def test_what_needs_a_recurrent_step_is_refused_in_one_line(run, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    verb, *options = arguments
    assert cli.main([verb, str(run), *options]) == 2
    assert capsys.readouterr().err == f"drl: {told.replace('RUN', str(run))}\n"


def test_its_checkpoint_holds_no_state(run):
    names = checkpoints.load(run).training
    assert not [name for name in names if name.startswith("state.")]
    assert "optimizer.0.exp_avg" in names
