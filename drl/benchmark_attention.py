"""Causal linear attention measured: our backends beside other implementations, right first, then fast."""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from drl import benchmark_peers as peers
from drl.benchmark_device import Call, copy_bandwidth, launches, machine, measure, one_line
from drl.benchmark_inputs import CHECKED, Inputs, Protocol, cast, error, fresh, make_inputs, right_answers, views
from drl.benchmark_peers import Operator
from drl.benchmark_table import TOLERANCE, Cell, Shape, markdown, notes
from drl.errors import UserError
from drl.progress import progress

SHAPES = {  # by device and whether steps are measured
    ("cuda", False): "64x60x4x32 64x60x1x128 256x60x4x32 4096x60x4x32 64x300x4x32 64x3000x4x32 64x3000x1x128",
    ("cpu", False): "8x60x4x32 2x300x4x32",
    ("cuda", True): "1x3x4x32 64x3x4x32 1024x3x4x32 4096x3x4x32",
    ("cpu", True): "1x3x4x32 64x3x4x32",
}


def attention(*, shapes: str, among: str, fast_transformers: str, json_file: str | None, **options) -> str:
    """The tables of `drl benchmark attention`, as Markdown.

    Args:
        shapes: of Shape's form, separated by spaces; empty for SHAPES.
        among, fast_transformers: as peers.operators'.
        json_file: where to keep what was measured, after every row.
        options: Protocol's.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options["dtype"] == "auto":
        options["dtype"] = "bfloat16" if device == "cuda" and not options["step"] else "float32"
    protocol = Protocol(**options)
    chosen = [Shape.parse(text) for text in (shapes or SHAPES[device, protocol.step]).split()]
    if json_file and not Path(json_file).absolute().parent.is_dir():
        raise UserError(f"no such folder: {Path(json_file).parent}; make it first")
    where = f"{machine()} {peers.versions()}".strip()
    operators, missing = peers.operators(among, feature_map=protocol.feature_map, step=protocol.step,
                                         fast_transformers=fast_transformers)
    bandwidth = copy_bandwidth()
    one = torch.zeros(1, device=device)
    smallest = measure(lambda: [lambda: one.add_(1)] * 64, seconds=0.1)

    def keep(cells: Sequence[Cell]) -> None:
        if json_file:
            Path(json_file).write_text(json.dumps({
                "machine": where, "missing": missing, "protocol": protocol._asdict(), "bandwidth": bandwidth,
                "smallest_kernel": dataclasses.asdict(smallest),
                "cells": [dataclasses.asdict(cell) | {"wrong": cell.wrong} for cell in cells]}, indent=1))

    cells, stopped = measure_all(operators, chosen, protocol, device, keep)
    sets = dict.fromkeys(f"{cell.sets} at {cell.shape}" for cell in cells)
    graph = f", {smallest.graph_us[1]:.1f} us in a graph" if smallest.graph_us else ""
    said = [
        *([stopped] if stopped else []),
        f"Inputs: {protocol.dtype}, feature map {protocol.feature_map}, "
        f"{'q, k, v on their own' if protocol.separate else 'views of one (B, T, 3, H, D) tensor'}. "
        f"Sets that took turns: {', '.join(sets)}.",
        f"Error: norm of the difference from float64 over norm, of {CHECKED} sequences. Above "
        f"{', '.join(f'{value:g} ({name})' for name, value in TOLERANCE.items())} it is WRONG and not ranked.",
        f"Floor: every input read and every result written once, at {bandwidth / 1e9:.0f} GB/s read plus written, "
        f"the rate of a large copy. The smallest kernel takes {smallest.eager_us[1]:.1f} us eager{graph}.",
        *(f"Not measured: {name}: {reason}" for name, reason in missing.items()),
        *notes(cells),
    ]
    tables = [markdown(cells, work, bandwidth) for work in protocol.works]
    return "\n\n".join([*tables, "\n".join(f"- {line}" for line in said), where])


def measure_all(
    operators: Sequence[Operator], shapes: Sequence[Shape], protocol: Protocol, device: str,
    keep: Callable[[Sequence[Cell]], None] = lambda cells: None,
) -> tuple[list[Cell], str]:
    """Every operator at every shape, and why not all of them, if so; `keep` is called with the cells after each."""
    cells: list[Cell] = []
    total = len(shapes) * len(operators) * len(protocol.works)
    end = time.monotonic() + (protocol.limit or float("inf"))
    stopped = ""
    try:
        with progress(total, "row", "attention") as bar:
            for shape in shapes:
                if "torch._dynamo" in sys.modules:
                    torch.compiler.reset()  # compiled code is counted, and too much of it is dropped without a word
                sets = make_inputs(shape, protocol, device)
                answers = right_answers(sets[0], protocol)
                counted = []
                for operator, work in ((operator, work) for operator in operators for work in protocol.works):
                    if time.monotonic() > end:
                        stopped = f"Stopped after {protocol.limit:g} s"
                        break
                    bar.set_postfix_str(f"{shape} {operator.name}")
                    cell = Cell(shape, work, operator.name, operator.group, protocol.dtype, len(sets))
                    cells.append(cell)
                    if make_calls := _measure(cell, operator, sets, answers, protocol):
                        counted.append((cell, make_calls))
                    keep(cells)
                    bar.update()
                for cell, make_calls in counted:  # after all times of the shape: a profiler may leave traces
                    _count(cell, make_calls)
                keep(cells)
                torch.cuda.empty_cache()  # graphs leave their memory reserved; without CUDA this does nothing
                if stopped:
                    break
    except KeyboardInterrupt:
        stopped = "Interrupted"
    except Exception as broken:  # inputs no longer fit or the device is gone; what was measured until then is told
        stopped = f"Stopped by {one_line(broken)}"
    cells = [cell for cell in cells if cell.timing or cell.failure]  # not one that was interrupted
    return cells, f"{stopped}: {len(cells)} of {total} rows." if stopped else ""


def call(operator: Operator, inputs: Inputs, work: str) -> tuple[Tensor, ...]:
    """The work on one set: (out,), or (out, gradients of the leaves ...), or (out, kv, z)."""
    with torch.set_grad_enabled(work == "forward and backward"):
        if work == "step":
            out, state = operator.call(*views(inputs), inputs.state)
            return out, *state
        if len(inputs.leaves) == 1 and operator.packed:
            out = operator.packed(*inputs.leaves)
        else:
            out = operator.call(*views(inputs))
    if work == "forward":
        return (out,)
    return out, *torch.autograd.grad(out, inputs.leaves, inputs.gradient)


def named(results: tuple[Tensor, ...], work: str) -> dict[str, Tensor]:
    """The results of `call` by name: out, dq, dk, dv, or out, kv, z."""
    if len(results) == 2:  # one gradient, of q, k, v in one tensor
        results = results[0], *results[1].unbind(2)
    return dict(zip(("out", "kv", "z") if work == "step" else ("out", "dq", "dk", "dv"), results))


def _measure(
    cell: Cell, operator: Operator, sets: Sequence[Inputs], answers: dict[str, Tensor], protocol: Protocol
) -> Callable[[], list[Call]] | None:
    """Check and time; fills in the cell and answers with what makes its calls, or None where it failed."""
    try:
        if operator.dtype:
            sets = [cast(inputs, operator.dtype) for inputs in sets]
            cell.dtype = str(operator.dtype).removeprefix("torch.")

        def make_calls() -> list[Call]:
            return [functools.partial(call, operator, fresh(inputs, cell.work), cell.work) for inputs in sets]

        start = time.perf_counter()
        results = named(make_calls()[0](), cell.work)
        cell.finite = all(bool(x.isfinite().all()) for x in results.values())
        first = time.perf_counter() - start
        if operator.linear:
            cell.errors = {name: error(x, answers[name]) for name, x in results.items()}
        del results
        cell.timing = measure(make_calls, seconds=protocol.seconds, capturable=operator.capturable)
        cell.timing.warmup_s += first
    except Exception as failure:  # a peer may fail in any way; the others are measured
        cell.failure = one_line(failure)
        return None
    return make_calls


def _count(cell: Cell, make_calls: Callable[[], list[Call]]) -> None:
    try:
        cell.timing.launches = launches(make_calls()[0])
        if cell.timing.launches is None and torch.cuda.is_available():
            cell.timing.notes.append("launches not counted: the profiler recorded none")
    except Exception as failure:
        cell.timing.notes.append(f"launches not counted: {one_line(failure)}")
