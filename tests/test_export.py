"""An exported policy acts as its run does, and whatever happened to it since is noticed."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import Trap
from test_policy import CONFIG_TARGET, A, O, make_checkpoint, observe

from drl import checkpoint as checkpoints
from drl import disk, evaluate, exported
from drl.errors import UserError
from drl.export import export
from drl.policy import RecurrentPolicy, WindowPolicy

FILES = ["config.json", "manifest.json", "model.safetensors", "trace.safetensors"]
SIGNED = [name for name in FILES if name != "manifest.json"]
POLICIES = pytest.mark.parametrize("kind", [RecurrentPolicy, WindowPolicy])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with run/ and policy/, into which nobody writes."""
    home = tmp_path_factory.mktemp("made")
    checkpoints.save(dataclasses.replace(make_checkpoint(), step=3), home / "run", keep=1)
    export(home / "run", home / "policy")
    return home


@pytest.fixture
def run(made) -> Path:
    return made / "run"


@pytest.fixture
def policy(made, tmp_path) -> Path:
    """An exported policy to spoil."""
    return Path(shutil.copytree(made / "policy", tmp_path / "policy"))


def sign(folder: Path) -> None:
    """Make the manifest fit the files again, as someone would who edits them on purpose."""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SIGNED}
    (folder / "manifest.json").write_text(json.dumps(digests))


def edit(folder: Path, file: str, change) -> None:
    """Replace the tensors of a file by change(tensors), with a manifest that fits."""
    tensors = load_file(folder / file)
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, folder / file)
    sign(folder)


def refusal(folder: Path, kind=RecurrentPolicy, **options) -> str:
    """The message with which `load` refuses, which must be one line that names folder and cure."""
    with pytest.raises(UserError) as caught:
        kind.load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_the_exported_policy_acts_as_the_run_does_bit_for_bit(made):
    one, other = RecurrentPolicy.load(made / "run"), RecurrentPolicy.load(str(made / "policy"))  # by their best engine
    assert other.config == one.config
    for observation in observe(count=5):
        np.testing.assert_array_equal(other.act(observation, 0.5), one.act(observation, 0.5))


def test_the_folder_holds_what_acting_needs_and_nothing_of_training(made):
    assert sorted(path.name for path in (made / "policy").iterdir()) == FILES
    one = load_file(checkpoints.find(made / "run") / "model.safetensors")
    other = load_file(made / "policy" / "model.safetensors")
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    assert {tensor.dtype for tensor in other.values()} == {torch.float32}


def test_the_weights_alone_tell_all_that_a_step_needs(made):
    with safe_open(made / "policy" / "model.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "1", "environment": "-", "observation_dim": str(O), "action_dim": str(A), "width": "22",
            "layers": "2", "heads": "2", "feature_map": "elu1", "max_timesteps": "1000", "return_scale": "10.0",
            "target_return": str(CONFIG_TARGET),
        }


@pytest.mark.parametrize(("memory", "format"), [
    ({}, "1"), ({"half_lives": [1.0, 4.0]}, "2"), ({"action_tokens": False}, "2"), ({"return_quantile": 0.5}, "2"),
], ids=str)
def test_a_compiled_step_from_before_is_told_what_it_would_overlook(tmp_path, memory, format):
    checkpoint = make_checkpoint(**memory)
    policy = RecurrentPolicy(checkpoint, engine="torch").double()
    exported.write(tmp_path, checkpoint, exported.Trace.record(policy, checkpoint), [])
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == format


def test_the_config_tells_where_the_policy_comes_from(made):
    card = json.loads((made / "policy" / "config.json").read_text())
    checkpoint = checkpoints.load(made / "run")
    assert (card["format"], card["step"], card["environment"]) == (1, 3, "-")
    assert card["dataset"] == {"id": "-", "fingerprint": "-", "mean_return": None}
    assert card["config"] == checkpoint.config.to_dict()
    assert card["versions"]["exported"]["torch"] == torch.__version__


def test_scores_of_these_weights_travel_with_them_without_single_episodes(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    scores = {"environment": "-", "mode": "recurrent", "target_return": 40.0, "episodes": 2, "return_mean": 1.5,
              "returns": [1.0, 2.0], "lengths": [3, 4], "seeds": [11, 12]}
    evaluate.store([scores | {"step": 2}, scores | {"step": 3}], tmp_path / "run")
    export(tmp_path / "run", tmp_path / "policy")
    card = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert card["scores"]["evaluations"] == [
        {"environment": "-", "mode": "recurrent", "target_return": 40.0, "episodes": 2, "return_mean": 1.5, "step": 3,
         "environment_seed": 11}
    ]


def test_the_golden_trace_is_what_the_float64_policy_does_from_the_first_step_and_again_from_the_middle(made):
    trace = load_file(made / "policy" / "trace.safetensors")
    policy = RecurrentPolicy(checkpoints.load(made / "run"), engine="torch").double()
    state, actions = policy.initial_state(1, trace["target_return"].item()), []
    for observation, reward, start in zip(trace["observations"], trace["rewards"], trace["episode_start"], strict=True):
        action, state = policy.step(observation[None], reward[None], state, start[None])
        actions.append(action[0])
    assert len(actions) == 100 and trace["target_return"] == CONFIG_TARGET
    assert trace["episode_start"].nonzero()[:, 0].tolist() == [0, 50]
    torch.testing.assert_close(trace["actions"], torch.stack(actions).float(), rtol=0, atol=0)
    assert trace["actions"].std(0).min() > 0.05 and trace["rewards"].std() > 0


@POLICIES
@pytest.mark.parametrize(
    "name", ["normaliser.mean", "normaliser.std", "action.low", "action.high", "model.embed_return.weight",
             "model.embed_timestep.weight", "model.blocks.1.attention.qkv.weight", "model.head.bias"],
)
def test_a_policy_that_does_not_reproduce_its_trace_is_refused(policy, kind, name):
    edit(policy, "model.safetensors", lambda tensors: tensors | {name: tensors[name] * 1.02})
    assert "does not do what its golden trace says: an action is off by 0.0" in refusal(policy, kind)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_policy_whose_numbers_are_not_finite_is_refused(policy, value):
    edit(policy, "model.safetensors", lambda tensors: tensors | {"normaliser.mean": torch.full((O,), value)})
    assert "normaliser.mean is not finite" in refusal(policy)


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_a_policy_whose_actions_are_not_finite_is_refused(policy, engine):
    edit(policy, "model.safetensors", lambda tensors: tensors | {"normaliser.std": torch.full((O,), 1e-40)})
    assert "an action is off by inf" in refusal(policy, engine=engine)


@POLICIES
def test_every_step_that_a_policy_can_know_is_held_to_the_trace(policy, kind):
    """A window of 13 knows the first 13 steps of both episodes; the other steps are of the recurrent policy alone."""
    actions = load_file(policy / "trace.safetensors")["actions"]
    for step in (0, 12, 13, 50, 63):
        wrong = actions.clone()
        wrong[step, -1] += 1e-2
        edit(policy, "trace.safetensors", lambda tensors, wrong=wrong: tensors | {"actions": wrong})
        if kind is RecurrentPolicy or step % 50 < 13:
            refusal(policy, kind)
        else:
            kind.load(policy)


@pytest.mark.parametrize(("engine", "off", "refused"), [
    ("torch", 0.9e-4, False), ("torch", 1.1e-4, True), ("cpu", 1.1e-4, True), ("cpu-bfloat16", 0.04, False),
    ("cpu-bfloat16", 0.06, True),
])
def test_the_tolerance_is_of_the_boxs_half_width_and_of_the_engine(made, engine, off, refused):
    checkpoint, trace = exported.load(made / "policy")
    acting, spaces = RecurrentPolicy(checkpoint, engine="torch"), checkpoint.spaces
    policy = SimpleNamespace(initial_state=acting.initial_state, step=acting.step, spaces=spaces,
                             config=acting.config, engine=engine)
    half = torch.as_tensor(spaces.action_high - spaces.action_low) / 2
    shifted = trace._replace(actions=trace.actions + off * half)
    if refused:
        with pytest.raises(UserError, match="does not do what its golden trace says"):
            exported.check(policy, shifted, "policy")
    else:
        exported.check(policy, shifted, "policy")


def test_a_policy_trained_with_kernels_of_a_gpu_acts_without_them(tmp_path):
    checkpoints.save(make_checkpoint(backend="triton"), tmp_path / "run", keep=1)
    export(tmp_path / "run", tmp_path / "policy")
    RecurrentPolicy.load(tmp_path / "policy", "cpu", "torch")


# refusals of the export


@pytest.mark.parametrize("attention", ["softmax", "none"])
def test_what_has_no_step_is_not_exported(tmp_path, attention):
    checkpoints.save(make_checkpoint(attention=attention), tmp_path / "run", keep=1)
    told = rf"^model.attention {attention} has no recurrent step to export; .* drl evaluate \S+run$"
    with pytest.raises(UserError, match=told):
        export(tmp_path / "run", tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_an_exported_policy_is_no_run_to_export(policy, tmp_path):
    with pytest.raises(UserError, match="is an exported policy already; name the run that it was made from"):
        export(policy, tmp_path / "another")


def test_an_exported_policy_is_replaced_only_when_told_to(run, policy):
    (policy / "step.onnx").touch()
    with pytest.raises(UserError, match="is an exported policy already; add --overwrite to replace it"):
        export(run, policy)
    assert (policy / "step.onnx").exists()
    export(run, policy, overwrite=True)
    assert sorted(path.name for path in policy.iterdir()) == FILES


def test_a_folder_of_something_else_is_never_replaced(run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "file").touch()
    for place in (tmp_path / "thesis", tmp_path / "file", run):
        with pytest.raises(UserError, match="is there already and is no exported policy; name another folder"):
            export(run, place, overwrite=True)


def test_a_place_that_cannot_be_written_is_told_in_one_line(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the exported policy cannot be written: Not a directory in .*file; "):
        export(run, tmp_path / "file" / "policy")


def test_an_export_that_dies_midway_leaves_the_earlier_policy_and_no_trace(run, policy, monkeypatch):
    before = {path: path.read_bytes() for path in policy.parent.rglob("*") if path.is_file()}

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        export(run, policy, overwrite=True)
    assert {path: path.read_bytes() for path in policy.parent.rglob("*") if path.is_file()} == before


# damage


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_or_a_file_cut_short_is_noticed(policy, name):
    whole = (policy / name).read_bytes()
    for position in np.linspace(0, len(whole) - 4, 7, dtype=int).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        for content in (damaged, whole[:position]):
            (policy / name).write_bytes(content)
            message = refusal(policy)
            assert "is damaged" in message or "cannot be read" in message
    (policy / name).write_bytes(whole)
    RecurrentPolicy.load(policy)


@POLICIES
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(policy, kind, name):
    (policy / name).unlink()
    assert name in refusal(policy, kind)


def test_a_format_of_the_future_is_refused_with_the_versions_that_wrote_it(policy):
    card = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(card | {"format": 2}))
    sign(policy)
    message = refusal(policy)
    assert "has format 2, this version reads 1; install the version that wrote it" in message
    assert f'"torch": "{torch.__version__}"' in message


@pytest.mark.parametrize("key", ["config", "step", "environment", "observation_dim", "dataset", "versions"])
def test_a_config_that_lacks_something_is_refused(policy, key):
    card = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps({name: card[name] for name in card if name != key}))
    sign(policy)
    message = f"is not what drl export writes: config.json is damaged: '{key}' is missing; export it again: drl export"
    assert message in refusal(policy)


@pytest.mark.parametrize("change", [
    lambda tensors: {name: tensors[name] for name in tensors if name != "rewards"},
    lambda tensors: tensors | {"more": torch.zeros(1)},
    lambda tensors: {name: tensor[:0] if tensor.ndim else tensor for name, tensor in tensors.items()},
    lambda tensors: tensors | {"observations": torch.zeros(100, O + 1)},
    lambda tensors: tensors | {"actions": tensors["actions"].double()},
    lambda tensors: tensors | {"rewards": torch.full((100,), np.nan)},
], ids=["a tensor less", "a tensor more", "no steps", "other spaces", "another dtype", "not finite"])
def test_a_trace_of_another_shape_is_refused(policy, change):
    edit(policy, "trace.safetensors", change)
    assert "is not what drl export writes: " in refusal(policy)


@pytest.mark.parametrize("name", ["model.safetensors", "trace.safetensors"])
def test_a_pickle_in_the_place_of_tensors_is_not_opened(policy, tmp_path, name):
    torch.save(Trap(tmp_path / "sprung"), policy / name)
    sign(policy)
    assert "is not what drl export writes" in refusal(policy)
    assert not (tmp_path / "sprung").exists()
