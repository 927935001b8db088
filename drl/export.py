"""`drl export`: a run becomes a folder that acts without it (exported.py), with the step as a program if asked for."""

import dataclasses
import io
from pathlib import Path

import torch

from drl import checkpoint as checkpoints
from drl import disk, evaluate, exported, intact
from drl.errors import UserError
from drl.policy import RecurrentPolicy
from drl.portable import export_onnx, export_step

PT2, ONNX = "step.pt2", "step.onnx"


def export(run: Path, folder: Path, *, formats: list[str] | tuple[str, ...] = (), overwrite: bool = False) -> None:
    """Write an exported policy, whole or not at all.

    Args:
        run: run or checkpoint folder.
        folder: to write.
        formats: "pt2", "onnx": the step as a program of that format too.
        overwrite: whether an exported policy that is there already is replaced.

    Raises:
        UserError: the run has no checkpoint or no recurrent step, `folder` is taken or cannot be written, a library
            is missing, or float32 does not reproduce the golden trace.
    """
    _require_place(folder, overwrite)
    if exported.is_exported(run):
        raise UserError(f"{run} is an exported policy already; name the run that it was made from")
    checkpoint = checkpoints.load(run)
    config = checkpoint.config
    if config.model.attention != "linear":
        raise UserError(f"model.attention {config.model.attention} has no recurrent step to export; act with the run "
                        f"itself: drl evaluate {run}")
    model = dataclasses.replace(config.model, backend="auto")  # of the machine that acts, not of the one that trained
    checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(config, model=model))
    policy = RecurrentPolicy(checkpoint, "cpu", "torch")
    trace = exported.Trace.record(RecurrentPolicy(checkpoint, "cpu", "torch").double(), checkpoint)
    exported.check(policy, trace, run)
    home = checkpoints.find(run).parent.parent
    evaluations = [result for result in evaluate.read(home) if result["step"] == checkpoint.step]
    needed = sum(tensor.nbytes for tensor in (*checkpoint.acting().values(), *trace))  # and a program as much again
    needed *= 1 + len({"pt2", "onnx"} & set(formats))
    told = disk.refusal_told(folder.parent, "the exported policy", "make room, or name another folder", needed)
    with told, intact.whole(folder) as new:
        exported.write(new, checkpoint, trace, evaluations)
        program = export_step(policy) if {"pt2", "onnx"} & set(formats) else None
        if "pt2" in formats:
            image = io.BytesIO()  # a full disk would break torch's own writing with another error
            torch.export.save(program, image)
            (new / PT2).write_bytes(image.getvalue())
        if "onnx" in formats:
            export_onnx(program, new / ONNX)


def _require_place(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not exported.is_exported(folder):
        raise UserError(f"{folder} is there already and is no exported policy; name another folder")
    if not overwrite:
        raise UserError(f"{folder} is an exported policy already; add --overwrite to replace it")
