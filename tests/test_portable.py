"""The step as a function of tensors is the policy's own step, and so is every program that is made of it.

One program of each format serves all numbers of rows. Rows begin anew at different times and earn NaN where they do.
"""

import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from test_policy import BY_TORCH, TARGETS, A, O, make_checkpoint, make_policy

import drl
from drl import checkpoint as checkpoints
from drl import exported
from drl.errors import UserError
from drl.export import export
from drl.portable import INPUTS, OUTPUTS, StepModule, export_onnx, export_step

TICKS = 40
ONNX = 1e-5  # on |difference| / (1 + |expected|); worst over 4 models 4.1e-7
BATCHES = pytest.mark.parametrize("batch", [1, 3, 7])


def through(batch: int, dtype=torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Raw observations, rewards and starts of TICKS steps of `batch` rows, and each row's target."""
    rng = np.random.default_rng(seed)
    starts = rng.random((TICKS, batch)) < 0.1
    starts[TICKS // 2, batch // 2] = True
    rewards = np.where(starts, np.nan, rng.normal(size=(TICKS, batch)))
    rewards[0] = np.nan
    observations, targets = rng.normal(0.5, 2, (TICKS, batch, O)), np.resize(TARGETS, batch)
    return *(torch.as_tensor(x).to(dtype) for x in (observations, rewards)), torch.as_tensor(starts), targets


def step(policy, observations, rewards, starts, targets) -> torch.Tensor:
    """The actions of RecurrentPolicy.step, (TICKS, B, A)."""
    state, actions = policy.initial_state(len(targets), targets), []
    for observation, reward, start in zip(observations, rewards, starts, strict=True):
        action, state = policy.step(observation, reward, state, start)
        actions.append(action)
    return torch.stack(actions)


def run(program, policy, observations, rewards, starts, targets) -> torch.Tensor:
    """The same of a function of tensors."""
    target, *state = StepModule(policy).initial(len(targets), torch.as_tensor(targets))
    actions = []
    with torch.no_grad():
        for observation, reward, start in zip(observations, rewards, starts, strict=True):
            action, *state = program(observation, reward, start, target, *state)
            actions.append(action)
    return torch.stack(actions)


def session(file):
    """An ONNX file as a function of tensors."""
    import onnxruntime

    running = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def program(*tensors):
        arrays = {name: tensor.numpy() for name, tensor in zip(INPUTS, tensors, strict=True)}
        return tuple(map(torch.from_numpy, running.run(list(OUTPUTS), arrays)))

    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """make_policy(BY_TORCH) as an exported policy with programs of the step, as many as can be made here."""
    home = tmp_path_factory.mktemp("exported")
    checkpoints.save(make_checkpoint(), home / "run", keep=1)
    onnx = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
    export(home / "run", home / "policy", formats=["pt2", *["onnx"] * onnx])
    return home / "policy"


@pytest.fixture(scope="module")
def program(folder):
    """The step as torch.export wrote and read it."""
    return torch.export.load(folder / "step.pt2")


@pytest.fixture(scope="module")
def pt2(program):
    """The same as a function of tensors."""
    return program.module()


@pytest.fixture(scope="module")
def onnx(folder):
    """The same through ONNX."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    return session(folder / "step.onnx")


@BATCHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_module_gives_the_bits_of_the_policys_step(batch, dtype):
    policy, inputs = make_policy(BY_TORCH, dtype=dtype, backend="chunked"), through(batch, dtype)
    expected = step(policy, *inputs)
    assert expected.std(0).min() > 0.05, "actions that hardly differ would prove nothing"
    torch.testing.assert_close(run(StepModule(policy), policy, *inputs), expected, rtol=0, atol=0)


@BATCHES
def test_one_exported_program_gives_the_bits_of_the_policys_step_for_any_number_of_rows(pt2, batch):
    policy, inputs = make_policy(BY_TORCH, backend="chunked"), through(batch)
    torch.testing.assert_close(run(pt2, policy, *inputs), step(policy, *inputs), rtol=0, atol=0)


@BATCHES
def test_one_onnx_file_does_what_the_policy_does_for_any_number_of_rows(onnx, batch):
    policy, inputs = make_policy(BY_TORCH, backend="chunked"), through(batch)
    torch.testing.assert_close(run(onnx, policy, *inputs), step(policy, *inputs), rtol=ONNX, atol=ONNX)


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_programs_do_what_the_golden_trace_says(folder, form, request):
    _, trace = exported.load(folder)
    one_row, policy = (part[:, None] for part in trace[:3]), make_policy(BY_TORCH, backend="chunked")
    led = run(request.getfixturevalue(form), policy, *one_row, [float(trace.target_return)])
    torch.testing.assert_close(led[:, 0], trace.actions, rtol=ONNX, atol=ONNX)


def test_a_step_returns_what_the_next_one_takes():
    policy = make_policy(BY_TORCH, backend="chunked")
    module = StepModule(policy)
    before = module.initial(3, 5.0)
    action, *after = module(torch.zeros(3, O), torch.zeros(3), torch.zeros(3, dtype=torch.bool), *before)
    assert action.shape == (3, A) and before[0].tolist() == [5.0] * 3
    assert [(x.shape, x.dtype) for x in after] == [(x.shape, x.dtype) for x in before[1:]]
    assert after[1].tolist() == [1] * 3 and not any(x.any() for x in before[2:]), "what came in is as it was"


@pytest.mark.parametrize("broken", ["observation", "kv"])
def test_a_program_refuses_rows_that_do_not_belong_together(pt2, broken):
    policy = make_policy(BY_TORCH, backend="chunked")
    observations, rewards, starts, targets = through(3)
    inputs = dict(zip(INPUTS, (observations[0], rewards[0], starts[0],
                               *StepModule(policy).initial(3, torch.as_tensor(targets))), strict=True))
    inputs[broken] = inputs[broken][:2]
    with pytest.raises((AssertionError, RuntimeError)):
        pt2(*inputs.values())


def test_programs_do_not_tell_where_they_were_made(folder):
    home = str(Path(drl.__file__).parents[1]).encode()
    files = [path for path in folder.iterdir() if path.suffix != ".pt2"]
    contents = [path.read_bytes() for path in files]
    with zipfile.ZipFile(folder / "step.pt2") as parts:
        contents += [parts.read(name) for name in parts.namelist()]
    assert not any(home in content for content in contents)


@pytest.mark.parametrize("library", ["onnx", "onnxscript"])
def test_onnx_without_its_libraries_names_the_extra(program, tmp_path, monkeypatch, library):
    for other in ("onnx", "onnxscript"):  # whichever of them is here
        monkeypatch.setitem(sys.modules, other, None if other == library else ModuleType(other))
    with pytest.raises(UserError, match=rf"^the format onnx needs {library}; type: pip install 'drl\[onnx\]'$"):
        export_onnx(program, tmp_path / "step.onnx")
    assert not list(tmp_path.iterdir())


def test_a_program_holds_no_operator_of_ours_whatever_the_policy_was_trained_with():
    program = export_step(make_policy(BY_TORCH, backend="auto"))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and not [name for name in called if "drl" in name]
