"""What was measured of operators on shapes, judged and told: right or WRONG, against the byte floor, against ours."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, Self

from drl.benchmark_device import Timing
from drl.errors import UserError

TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-3}  # relative, by the dtype of the inputs
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
PASSES = ("forward", "forward and backward", "step")


class Shape(NamedTuple):
    """Sequences, tokens of each, heads, and features per head of keys and values alike."""

    batch: int
    tokens: int
    heads: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "64x60x4x32"."""
        sizes = text.split("x")
        if len(sizes) != 4 or not all(size.isdigit() and int(size) for size in sizes):
            raise UserError(f"{text!r} is no shape; type BxTxHxD with sizes of at least 1, e.g. 64x60x4x32")
        return cls(*map(int, sizes))

    def __str__(self) -> str:
        return "x".join(map(str, self))


def floor_bytes(shape: Shape, work: str, dtype: str) -> int:
    """Bytes that any implementation of this work must move: each input read once, each result written once.

    Forward reads q, k, v and writes the output; backward reads q, k, v, the output and its gradient and writes three
    gradients. The final state, float32, is written once; a step also reads the one before.
    """
    tensor = shape.batch * shape.tokens * shape.heads * shape.dim * BYTES[dtype]
    state = 4 * shape.batch * shape.heads * (shape.dim**2 + shape.dim)
    return {"forward": 4 * tensor + state, "forward and backward": 12 * tensor + state,
            "step": 4 * tensor + 2 * state}[work]


@dataclasses.dataclass
class Cell:
    """One operator at one shape.

    Attributes:
        work: one of PASSES.
        sets: input sets that took turns.
        errors: relative error of each result; empty where another operator is computed.
        finite: whether every number of every result is.
        failure: why it did not run, in one line.
    """

    shape: Shape
    work: str
    operator: str
    group: str
    dtype: str
    sets: int = 0
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    finite: bool = True
    failure: str = ""
    timing: Timing | None = None

    @property
    def wrong(self) -> str:
        """The results that miss the tolerance of their dtype, or empty."""
        if not self.finite:
            return "not finite"
        tolerance = TOLERANCE[self.dtype]
        return ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items() if not error <= tolerance)

    @property
    def ranked(self) -> bool:
        return self.timing is not None and not self.failure and not self.wrong

    def floor_percent(self, bandwidth: float) -> float:
        """Time that the byte floor takes at `bandwidth` (bytes per second), in percent of the time measured."""
        floor_us = floor_bytes(self.shape, self.work, self.dtype) / bandwidth * 1e6
        return 100 * floor_us / self.timing.best_us


def ratio(cell: Cell, base: Cell | None) -> tuple[float, str]:
    """Time against that of `base`, graph against graph where both have one, and how it was taken; nan: not ranked."""
    if base is None or not cell.ranked:
        return math.nan, ""
    if cell.timing.graph_us and base.timing.graph_us:
        return cell.timing.graph_us[1] / base.timing.graph_us[1], ""
    return cell.timing.eager_us[1] / base.timing.eager_us[1], " (eager)" if base.timing.graph_us else ""


def markdown(cells: Sequence[Cell], work: str, bandwidth: float) -> str:
    """The table of one kind of work; ratios are against the first of ours that is right at the same shape."""
    lines = [
        f"| {work}, BxTxHxD | operator | largest error | eager us | graph us | 10% to 90% | launches | MB | % of floor "
        "| time against ours | warm-up s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in (cell for cell in cells if cell.work == work):
        base = next((other for other in cells if other.group == "ours" and other.ranked
                     and (other.shape, other.work) == (cell.shape, work)), None)
        lines.append(_row(cell, base, bandwidth))
    return "\n".join(lines)


def notes(cells: Sequence[Cell]) -> list[str]:
    """What failed and what could not be measured, each reason once, with the operators it holds for."""
    told: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        for reason in [f"failed: {cell.failure}"] if cell.failure else cell.timing.notes if cell.timing else []:
            told.setdefault(reason, {}).setdefault(cell.operator, []).append(f"{cell.shape} {cell.work}")
    return [
        f"{reason} ({'; '.join(f'{name}, {len(rows)} rows, first {rows[0]}' for name, rows in where.items())})"
        for reason, where in told.items()
    ]


def _row(cell: Cell, base: Cell | None, bandwidth: float) -> str:
    name = cell.operator + (f" ({cell.dtype})" if base is not None and base.dtype != cell.dtype else "")
    if cell.failure or cell.timing is None:
        return f"| {cell.shape} | {name} | failed | | | | | | | | |"
    timing = cell.timing
    if cell.wrong:
        error = f"WRONG: {cell.wrong}"
    elif cell.errors:
        worst = max(cell.errors, key=cell.errors.__getitem__)
        error = f"{cell.errors[worst]:.1e} ({worst})"
    else:
        error = "another operator"
    graph, spread = "n/a", f"{_us(timing.eager_us[0])} to {_us(timing.eager_us[2])} (eager)"
    if timing.graph_us:
        low, median, high = timing.graph_us
        graph, spread = _us(median), f"{_us(low)} to {_us(high)}"
    times, how = ratio(cell, base)
    return (f"| {cell.shape} | {name} | {error} | {_us(timing.eager_us[1])} | {graph} | {spread} "
            f"| {'n/a' if timing.launches is None else timing.launches} "
            f"| {'n/a' if timing.memory_mb is None else format(timing.memory_mb, '.1f')} "
            f"| {cell.floor_percent(bandwidth):.0f}% | {'-' if math.isnan(times) else f'{times:.2f}x{how}'} "
            f"| {timing.warmup_s:.1f} |")


def _us(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 1000 else f"{microseconds:.0f}"
