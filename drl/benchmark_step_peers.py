"""Who acts beside us in `drl benchmark step`: the same step by other runtimes, and other ways to remember an episode.

Every peer turns an observation (1, O) and a reward (1,), numpy, into an action (1, A), numpy, one environment step at
a time. Peers are found, never required: what cannot be measured here says why in one line.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drl.benchmark_device import one_line
from drl.benchmark_model import TARGET_RETURN, checkpoint
from drl.benchmark_step_memories import Act, KeyValueCache, TokenByToken, remembered
from drl.config import ModelConfig
from drl.errors import UserError, did_you_mean
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.portable import INPUTS, StepModule, export_onnx, export_step
from drl.progress import progress

Begin = Callable[[], Act]  # an episode that has not begun; the one before is over


class Setting(NamedTuple):
    """What all peers share.

    Attributes:
        model: its size.
        steps: the longest episode.
        threads: of every runtime.
        checked: steps whose actions are compared with float64, at most `steps`.
    """

    model: ModelConfig
    steps: int
    threads: int
    checked: int


class Peer(NamedTuple):
    """One row of the table.

    Attributes:
        key: as typed, one of PEERS.
        name: as shown.
        begin: begins an episode.
        oracle: the same in float64, at any speed; None: a model with numbers of its own.
        tolerance: largest error of an action that counts as right; actions are in [-1, 1].
        slow: whether fewer steps must do.
        drawn: whether the figure has a line for it.
    """

    key: str
    name: str
    begin: Begin
    oracle: Begin | None
    tolerance: float = 1e-3
    slow: bool = False
    drawn: bool = True


def peers(wanted: str, setting: Setting) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be measured here, in the order of PEERS, and for each other one the reason.

    Args:
        wanted: keys of PEERS, separated by commas; empty for all.

    Raises:
        UserError: a name in `wanted` is not in PEERS.
    """
    names = {name.strip() for name in wanted.split(",") if name.strip()} or PEERS.keys()
    for name in sorted(names - PEERS.keys()):
        raise UserError(f"nothing that acts is called {name!r}; {did_you_mean(name, PEERS)}")
    found, missing = [], {}
    # exporters and compilers warn of what nobody can act on here
    with warnings.catch_warnings(action="ignore"), progress(len(names), "row", "building") as bar:
        for key in (key for key in PEERS if key in names):
            try:
                found.append(PEERS[key](key, setting))
            except UserError as reason:
                missing[key] = str(reason)
            except Exception as error:  # another's import or compiler may fail in any way; the others are measured
                missing[key] = one_line(error)
            bar.update()
    return found, missing


def stepped(policy: RecurrentPolicy | WindowPolicy) -> Begin:
    """Episodes of `policy.step`, which gets its state and gives the next."""
    def begin() -> Act:
        state = policy.initial_state(1, TARGET_RETURN)

        def act(observation, reward):
            nonlocal state
            action, state = policy.step(observation, reward, state)
            return action

        return act

    return begin


def _stepping(name: str, engine: str, tolerance: float = 1e-3, drawn: bool = False):
    def make(key: str, setting: Setting) -> Peer:
        policy = RecurrentPolicy(checkpoint("linear", setting.model), engine=engine)
        return Peer(key, name, stepped(policy), _exact(setting), tolerance, drawn=drawn)

    return make


def _acting(name: str, engine: str, tolerance: float = 1e-3):
    def make(key: str, setting: Setting) -> Peer:
        policy = RecurrentPolicy(checkpoint("linear", setting.model), engine=engine)

        def begin() -> Act:
            policy.reset(1, TARGET_RETURN)
            return policy.act

        return Peer(key, name, begin, _exact(setting), tolerance)

    return make


def _exact(setting: Setting) -> Begin:
    return stepped(RecurrentPolicy(checkpoint("linear", setting.model), engine="torch").double())


def _module(setting: Setting) -> StepModule:
    return StepModule(RecurrentPolicy(checkpoint("linear", setting.model), engine="torch"))


def _threaded(call: Callable[..., Iterable[Tensor]], module: StepModule) -> Begin:
    """Episodes of a function with the arguments and results of `StepModule.forward`."""
    def begin() -> Act:
        target, *state = module.initial(1, TARGET_RETURN)
        first = torch.zeros(1, dtype=torch.bool)  # timestep 0 begins without it

        def act(observation, reward):
            nonlocal state
            numbers = (torch.from_numpy(x.astype(np.float32)) for x in (observation, reward))
            with torch.no_grad():
                action, *state = call(*numbers, first, target, *state)
            return action.numpy()

        return act

    return begin


def _compiled(key: str, setting: Setting) -> Peer:
    module = _module(setting)
    begin = _threaded(torch.compile(module, fullgraph=True, dynamic=False), module)
    begin()(np.zeros((1, 11)), np.zeros(1))  # compiles, or fails, here
    return Peer(key, "torch.compile of the step", begin, _exact(setting))


def _aotinductor(key: str, setting: Setting) -> Peer:
    """A package for exactly one row, which is kinder to it than any number of rows."""
    module = _module(setting)
    arguments = torch.zeros(1, 11), torch.zeros(1), torch.zeros(1, dtype=torch.bool), *module.initial(1, 0.0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(module, arguments)
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/step.pt2")
        call = torch._inductor.aoti_load_package(package)
    return Peer(key, "AOTInductor package of the step", _threaded(call, module), _exact(setting))


def _onnx(key: str, setting: Setting) -> Peer:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("needs ONNX Runtime; type: pip install 'drl[onnx]'") from error
    module = _module(setting)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.onnx"
        export_onnx(export_step(RecurrentPolicy(checkpoint("linear", setting.model), engine="torch")), file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def begin() -> Act:
        target, *state = (x.numpy() for x in module.initial(1, TARGET_RETURN))
        first = np.zeros(1, bool)

        def act(observation, reward):
            nonlocal state
            numbers = (x.astype(np.float32) for x in (observation, reward))
            action, *state = session.run(None, dict(zip(INPUTS, (*numbers, first, target, *state), strict=True)))
            return action

        return act

    return Peer(key, "ONNX Runtime session of the step", begin, _exact(setting))


def _fast_transformers(key: str, setting: Setting) -> Peer:
    """Its recurrent encoder: blocks that normalise on the way out, with random weights of its own."""
    try:
        from fast_transformers.builders import RecurrentEncoderBuilder
    except ImportError as error:
        raise UserError("needs fast-transformers; type: pip install --no-build-isolation --no-deps "
                        "pytorch-fast-transformers==0.4.0") from error
    model = setting.model
    head = model.width // model.heads
    encoder = RecurrentEncoderBuilder.from_kwargs(
        n_layers=model.layers, n_heads=model.heads, query_dimensions=head, value_dimensions=head,
        feed_forward_dimensions=4 * model.width, attention_type="linear", activation="gelu"
    ).get().eval()
    policy = RecurrentPolicy(checkpoint("linear", model), engine="torch")
    return Peer(key, "fast-transformers' recurrent encoder", remembered(policy, TokenByToken(encoder)), None)


def _cache(key: str, setting: Setting) -> Peer:
    """A window that holds the whole of the episode is its oracle."""
    policy = WindowPolicy(checkpoint("softmax", setting.model))
    exact = WindowPolicy(checkpoint("softmax", setting.model, context=setting.checked)).double()
    begin = remembered(policy, KeyValueCache(policy.model, setting.steps))
    return Peer(key, "softmax, keys and values cached", begin, stepped(exact), slow=True)


def _window(key: str, setting: Setting) -> Peer:
    of = checkpoint("softmax", setting.model)
    return Peer(key, "softmax, window of 20 re-run", stepped(WindowPolicy(of)), stepped(WindowPolicy(of).double()),
                slow=True)


PEERS: dict[str, Callable[[str, Setting], Peer]] = {
    "cpu": _acting("ours, policy.act", "cpu"),
    "cpu-step": _stepping("ours, policy.step", "cpu"),
    "cpu-bfloat16": _acting("ours, bfloat16 weights, policy.act", "cpu-bfloat16", 2e-2),
    "cpu-bfloat16-step": _stepping("ours, bfloat16 weights, policy.step", "cpu-bfloat16", 2e-2),
    "torch": _stepping("torch, eager step", "torch", drawn=True),
    "compile": _compiled,
    "aotinductor": _aotinductor,
    "onnx": _onnx,
    "fast-transformers": _fast_transformers,
    "window": _window,
    "cache": _cache,
}
