"""The whole environment step of a recurrent policy as one function of tensors, for programs that have no drl.

Normaliser, return-to-go, clock, embeddings, blocks and action box are inside, so that whoever calls it passes what the
environment gave and keeps what came back. It is made on the CPU, of torch's own operators, and runs where torch or the
ONNX runtime does.

Dimension key: B rows, L layers, H heads, K features per head, V values per head, O observation, A action.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from drl.data.sampling import to_box
from drl.errors import UserError
from drl.kernels import LinearAttentionState
from drl.policy import RecurrentPolicy

INPUTS = ("observation", "reward", "episode_start", "target_return", "return_to_go", "timestep", "previous_action",
          "kv", "z")
OUTPUTS = ("action", "next_return_to_go", "next_timestep", "next_previous_action", "next_kv", "next_z")
VARYING = tuple({0: torch.export.Dim("batch")} for _ in INPUTS)  # the first dimension of each input: rows


class StepModule(nn.Module):
    """`RecurrentPolicy.step` without its records: tensors in, tensors out, of the policy's dtype and device.

    An episode begins with `initial(batch, target_return)`; what a step returns after the action takes the place of
    the five tensors of the same names.
    """

    def __init__(self, policy: RecurrentPolicy):
        super().__init__()
        self.model = copy.deepcopy(policy.model)
        for block in self.model.blocks:
            block.attention.backend = "chunked"  # no operator of ours
        for name in ("mean", "std", "low", "high"):
            self.register_buffer(name, getattr(policy, f"_{name}"))

    def initial(self, batch: int, target_return: float | Tensor) -> tuple[Tensor, ...]:
        """(target_return, return_to_go, timestep, previous_action, kv, z) of `batch` rows that have not begun.

        Args:
            target_return: return asked for, in the environment's units: a number or (B,).
        """
        target_B = torch.as_tensor(target_return).to(self.mean).expand(batch).clone()
        kv, z = (torch.stack(parts, dim=1) for parts in zip(*self.model.initial_state(batch), strict=True))
        timestep_B = torch.zeros_like(target_B, dtype=torch.long)
        return target_B, target_B.clone(), timestep_B, self.low.new_zeros(batch, len(self.low)), kv, z

    def forward(
        self,
        observation: Tensor,
        reward: Tensor,
        episode_start: Tensor,
        target_return: Tensor,
        return_to_go: Tensor,
        timestep: Tensor,
        previous_action: Tensor,
        kv: Tensor,
        z: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Act once in every row.

        Args:
            observation: raw, (B, O).
            reward: what the previous action earned, in the environment's units, (B,); not read in rows that begin.
            episode_start: True in rows that begin an episode now, bool (B,); rows at timestep 0 begin without it.
            target_return: return asked for at the start of the episode, (B,).
            return_to_go, timestep, previous_action, kv, z: what the last step returned or `initial` gave, (B,),
                int64 (B,), (B, A) in [-1, 1], (B, L, H, K, V), (B, L, H, K).

        Returns:
            Actions (B, A) in the environment's box, and the new return_to_go, timestep, previous_action, kv and z.
        """
        first_B = (timestep == 0) | episode_start
        return_B = torch.where(first_B, target_return, return_to_go - reward)
        timestep_B = timestep.masked_fill(first_B, 0)
        past = tuple(map(LinearAttentionState, kv.unbind(1), z.unbind(1)))
        action_BA, state = self.model.step(
            previous_action, return_B, (observation - self.mean) / self.std, timestep_B, past, first_B
        )
        kv, z = (torch.stack(parts, dim=1) for parts in zip(*state, strict=True))
        return to_box(action_BA, self.low, self.high), return_B, timestep_B + 1, action_BA, kv, z


def export_step(policy: RecurrentPolicy) -> torch.export.ExportedProgram:
    """The step as a torch.export program for any number of rows: torch.export.save writes it, torch.export.load(file)
    .module() is called with the arguments of `StepModule.forward`."""
    module = StepModule(policy).eval()
    rows = 2
    observation, zeros = module.mean.expand(rows, -1).clone(), module.mean.new_zeros(rows)
    arguments = (observation, zeros, torch.zeros(rows, dtype=torch.bool), *module.initial(rows, 0.0))
    program = torch.export.export(module, arguments, dynamic_shapes=VARYING)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names folders of the machine that exports
    return program


def export_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    """Write what `export_step` made as one ONNX file, for any number of rows; tensors are named as INPUTS and OUTPUTS.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"the format onnx needs {error.name}; type: pip install 'drl[onnx]'") from error
    with _quiet():
        torch.onnx.export(
            program, (), file, dynamo=True, dynamic_shapes=VARYING, input_names=INPUTS,
            output_names=OUTPUTS, external_data=False, verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns about torch's own code, and of torchvision, which no step of ours uses."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)
