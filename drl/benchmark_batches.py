"""Many environments stepped at once on a CPU, beside the machine's own rate for the same matrix products."""

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from drl.benchmark_device import summary
from drl.benchmark_model import SPACES, TARGET_RETURN, checkpoint
from drl.config import ModelConfig
from drl.policy import RecurrentPolicy
from drl.progress import progress

TURN = 0.1  # seconds: after a call the threads of one library go on waiting busily, in the way of the other's


def products(model: ModelConfig, batch: int) -> list[tuple[int, int, int]]:
    """The products (M, K) x (K, N) with weights that a step of `batch` rows cannot do without, as (M, K, N).

    In the last layer only the observation's token, at which the action is read out, needs more than its keys and
    values. The attention's own sums are not among them.
    """
    B, D, O, A = batch, model.width, SPACES.observation_dim, len(SPACES.action_low)  # noqa: E741
    embeddings, T = [(B, 1, D), (B, O, D), *[(B, A, D)] * model.action_tokens], B * model.tokens
    layer = [(T, D, 3 * D), (T, D, D), (T, D, 4 * D), (T, 4 * D, D)]
    last = [(T, D, 2 * D), (B, D, D), (B, D, D), (B, D, 4 * D), (B, 4 * D, D)]
    return [*embeddings, *layer * (model.layers - 1), *last, (B, D, A)]


def batches(model: ModelConfig, batch_sizes: Sequence[int], seconds: float = 2.0) -> tuple[str, list[dict]]:
    """Microseconds per environment step and the rate of its products, on one thread and on all cores, as Markdown and
    as records. Steps and products take turns for the `seconds` of a row."""
    before = torch.get_num_threads()
    lines = [
        "| acting, B environments | threads | engine | us per call | us per environment | GFLOP/s "
        "| GFLOP/s of torch.mm | x of the products' time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    records = []
    try:
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(threads)
            for batch in batch_sizes:
                engine, ours, alone = _measured(model, batch, seconds)
                gflop = 2e-9 * sum(m * k * n for m, k, n in products(model, batch))
                rates = gflop / ours * 1e6, gflop / alone * 1e6
                lines.append(f"| {batch} | {threads} | {engine} | {ours:.0f} | {ours / batch:.2f} | {rates[0]:.1f} "
                             f"| {rates[1]:.1f} | {ours / alone:.2f}x |")
                records.append({"batch": batch, "threads": threads, "engine": engine, "call_us": ours,
                                "products_us": alone, "gflop": gflop})
    finally:
        torch.set_num_threads(before)
    return "\n".join(lines), records


def _measured(model: ModelConfig, batch: int, seconds: float) -> tuple[str, float, float]:
    """(engine, median microseconds of a step of `batch` environments, and of its products alone)."""
    policy = RecurrentPolicy(checkpoint("linear", model))
    policy.reset(batch, TARGET_RETURN)
    observation, reward = np.random.default_rng(0).standard_normal((batch, SPACES.observation_dim)), np.ones(batch)
    matrices = [(torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in products(model, batch)]

    def multiply():
        for left, right, out in matrices:
            torch.mm(left, right, out=out)

    taken: dict = {lambda: policy.act(observation, reward): [], multiply: []}
    end = time.perf_counter() + seconds
    with progress(round(seconds / TURN / 2), "turn", f"{batch} environments") as bar:
        while not all(taken.values()) or time.perf_counter() < end:
            for call, times in taken.items():
                _turn(call, times, min(TURN, seconds))
            bar.update()
    ours, alone = (summary(times)[1] for times in taken.values())
    return policy.engine, ours, alone


def _turn(call: Callable[[], object], times: list[float], seconds: float) -> None:
    """Append the microseconds of as many calls as begin in `seconds`, after one that is not timed."""
    call()
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1000)
