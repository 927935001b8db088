"""Microseconds per action on a CPU: one environment stepped by us and by everyone else who is here.

Right first: the actions of the first steps are compared with float64, and who is wrong is not ranked. Then all rows
take turns, a block of steps each, so that a change of the machine's clock hits all alike; each goes on with its own
episode, on the same observations.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from drl import figures
from drl.benchmark_batches import batches
from drl.benchmark_device import machine, summary
from drl.benchmark_figure import draw
from drl.benchmark_model import SPACES, TARGET_RETURN, checkpoint, described
from drl.benchmark_step_peers import Act, Peer, Setting, peers
from drl.config import ModelConfig
from drl.policy import RecurrentPolicy
from drl.progress import progress

CHECKED = 100  # steps whose actions are compared with float64
WARMUP = 100  # steps of another episode before the first timed one
BLOCKS = 20
SLOW = 3000  # steps at most of a slow row
LONG = 100_000


@dataclasses.dataclass
class Row:
    """What was measured of one peer.

    Attributes:
        peer: who.
        error: largest difference of an action from float64; None: a model with numbers of its own.
        times: microseconds of each step of one episode.
    """

    peer: Peer
    error: float | None
    times: np.ndarray

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= self.peer.tolerance

    @property
    def early(self) -> float:
        """Median of the hundred steps around step 100."""
        return float(np.median(self.times[50:150] if len(self.times) > 150 else self.times))

    @property
    def late(self) -> float:
        """Median of the last hundred steps."""
        return float(np.median(self.times[-100:]))


def step(
    *,
    steps: int,
    threads: int = 1,
    among: str = "",
    batch_sizes: Sequence[int] = (),
    long: bool = False,
    figure: str | None = None,
    json_file: str | None = None,
    model: ModelConfig | None = None,
) -> str:
    """The table of all rows, and what else is asked for, as Markdown.

    Args:
        steps: timed steps of each row.
        threads: of torch and every other runtime.
        among: rows to measure, separated by commas; empty: all that are here.
        batch_sizes: of a second table, of many environments at once.
        long: whether to step ours 100,000 times as well.
        figure: PNG file for microseconds against the step of the episode.
        json_file: for all that was measured.
        model: its size; None: the default one.

    Raises:
        UserError: an unknown row; matplotlib is missing for the figure.
    """
    if figure:
        figures.pyplot("--figure")  # says what is missing before minutes have passed
    torch.set_num_threads(threads)
    setting = Setting(model or ModelConfig(), steps, threads, min(CHECKED, steps))
    found, missing = peers(among, setting)
    rows = measure(found, setting)
    curves = {row.peer.key: curve(row.times) for row in rows}
    parts = [table(rows), *(f"not measured: {key}: {reason}" for key, reason in missing.items()),
             f"{WARMUP} steps of warm-up. {described(setting.model)} {machine()}"]
    facts = {
        "machine": machine(), "model": dataclasses.asdict(setting.model), "missing": missing,
        "rows": [_facts(row, curves[row.peer.key]) for row in rows],
    }
    if long:
        facts["long"] = lasting(setting)
        curves[facts["long"]["engine"]] = facts["long"].pop("curve")
        parts.append(_sentence(facts["long"]))
    if batch_sizes:
        text, facts["batches"] = batches(setting.model, batch_sizes)
        parts.append(text)
    if figure:
        draw({row.peer.name: (row.peer.key, curves[row.peer.key]) for row in rows if row.peer.drawn}, Path(figure))
    if json_file:
        Path(json_file).write_text(json.dumps(facts, indent=1) + "\n")
    return "\n\n".join(parts)


def measure(found: Sequence[Peer], setting: Setting) -> list[Row]:
    """Check and time the `found`, interleaved."""
    observations, reward = _observations(), np.ones(1)
    errors = [_error(peer, observations[: setting.checked], reward) for peer in found]
    rows = [
        Row(peer, error, np.zeros(min(setting.steps, SLOW) if peer.slow else setting.steps))
        for peer, error in zip(found, errors, strict=True)
    ]
    episodes = {}
    with progress(sum(len(row.times) for row in rows), "step", "acting") as bar:
        for block in range(BLOCKS):
            for row in rows:
                begin, end = (len(row.times) * edge // BLOCKS for edge in (block, block + 1))
                if not block:  # only now, so that the first steps too find warm caches
                    _timed(row.peer.begin(), observations, reward, np.zeros(min(WARMUP, setting.steps)))
                    episodes[row.peer.key] = row.peer.begin()
                _timed(episodes[row.peer.key], observations, reward, row.times[begin:end], begin)
                bar.update(end - begin)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown; times are against the first row that is right."""
    base = next((row for row in rows if row.error is not None and not row.wrong), None)
    lines = [
        "| acting, batch 1 | largest error | steps | median us | 10% to 90% | around step 100 | last 100 steps "
        "| against the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, median, high = summary(row.times)
        error = "another model" if row.error is None else f"{'WRONG: ' if row.wrong else ''}{row.error:.1e}"
        ratio = "-" if base is None or row.wrong else f"{median / summary(base.times)[1]:.2f}x"
        lines.append(f"| {row.peer.name} | {error} | {len(row.times)} | {_us(median)} | {_us(low)} to {_us(high)} "
                     f"| {_us(row.early)} | {_us(row.late)} | {ratio} |")
    return "\n".join(lines)


def curve(times: np.ndarray) -> list[tuple[float, float]]:
    """(step, median microseconds) of spans of at least 5 steps that grow with the step."""
    edges = [0]
    for edge in np.geomspace(5, max(5, len(times)), 40).astype(int).tolist():
        if edge - edges[-1] >= 5 and len(times) - edge >= 5:
            edges.append(edge)
    edges.append(len(times))
    return [((a + b + 1) / 2, float(np.median(times[a:b]))) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def lasting(setting: Setting, steps: int = LONG) -> dict:
    """Ours over one long episode. Its last hundredth takes turns with as many steps of a young one, from step 100 on,
    because the machine's clock may change while so long an episode lasts. Resident memory, in 10^6 bytes, is that
    before the steps between and at the end; None where the system does not tell."""
    old, young = (RecurrentPolicy(checkpoint("linear", setting.model)) for _ in range(2))
    observations, reward, part = _observations(), np.ones(1), steps // 100
    times, early = np.full(steps, np.nan), np.full(part, np.nan)  # written now, so that they do not grow meanwhile

    def act(policy: RecurrentPolicy, into: np.ndarray, begin: int) -> None:
        _timed(policy.act, observations, reward, into, begin)

    for policy in (old, young, old):  # the first time to warm up
        policy.reset(1, TARGET_RETURN)
        act(policy, times[:100], 0)
    act(old, times[100:100 + part], 100)
    resident = [_resident_mb()]
    with progress(steps, "step", "one long episode", initial=100 + part) as bar:
        for begin in range(100 + part, steps - part, 1000):
            block = times[begin:min(begin + 1000, steps - part)]
            act(old, block, begin)
            bar.update(len(block))
    for turn in range(0, part, 100):
        act(young, early[turn:turn + 100], 100 + turn)
        act(old, times[steps - part:][turn:turn + 100], steps - part + turn)
    resident.append(_resident_mb())
    return {"engine": old.engine, "steps": steps, "resident_mb": resident, "early_us": float(np.median(early)),
            "late_us": float(np.median(times[-part:])), "curve": curve(times)}


def _sentence(lasted: dict) -> str:
    steps, early, late, (before, after) = (lasted[name] for name in ("steps", "early_us", "late_us", "resident_mb"))
    part = steps // 100
    memory = "" if after is None else f"; resident memory {before:.1f} MB early, {after:.1f} MB at the end"
    return (f"One episode of {steps:,} steps: {_us(late)} us a step from {steps - part:,} on, in turns with steps 100 "
            f"to {100 + part:,} of another, {_us(early)} us (medians), ratio {late / early:.3f}{memory}.")


def _observations() -> np.ndarray:
    """(1000, 1, O), which go round."""
    return np.random.default_rng(1).standard_normal((1000, 1, SPACES.observation_dim))


def _error(peer: Peer, observations: np.ndarray, reward: np.ndarray) -> float | None:
    if peer.oracle is None:
        return None
    mine, exact = (
        np.array([act(observation, reward) for observation in observations]) for act in (peer.begin(), peer.oracle())
    )
    return float(np.abs(mine - exact).max())  # nan, which is wrong, where one is not finite


def _timed(act: Act, observations: np.ndarray, reward: np.ndarray, times: np.ndarray, begin: int = 0) -> None:
    """Write the microseconds of as many steps as `times` is long, the first of which is step `begin`."""
    clock = time.perf_counter_ns
    for t in range(len(times)):
        observation = observations[(begin + t) % len(observations)]
        start = clock()
        act(observation, reward)
        times[t] = (clock() - start) / 1000


def _resident_mb() -> float | None:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if statm.exists() else None


def _facts(row: Row, points: list[tuple[float, float]]) -> dict:
    low, median, high = summary(row.times)
    return {"key": row.peer.key, "name": row.peer.name, "error": row.error, "wrong": row.wrong,
            "steps": len(row.times), "median_us": median, "low_us": low, "high_us": high, "early_us": row.early,
            "late_us": row.late, "curve": points}


def _us(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"
