"""Speed, measured where the user stands: a table with hardware, versions, median and spread. Ratios between rows of
one run travel between machines; the times themselves do not."""

import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from drl.benchmark_device import machine, summary
from drl.checkpoint import Checkpoint
from drl.config import Config, ModelConfig, TrainConfig
from drl.data.store import EpisodeStore, Normaliser, Spaces
from drl.model import DecisionTransformer
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.progress import progress
from drl.trainer import Trainer
from drl.versions import versions

SPACES = Spaces("Hopper-v5", 11, np.full(3, -1, np.float32), np.full(3, 1, np.float32))
WARMUP = 100  # calls before the first timed one


def step(*, steps: int, threads: int) -> str:
    """Microseconds per action of one environment, from numpy to numpy, as Markdown.

    Rows: the recurrent step early and late in an episode, and the recomputed window of 20 steps, linear and softmax.
    """
    torch.set_num_threads(threads)
    rows = []
    for label, kind, attention in (
        ("linear, recurrent step", RecurrentPolicy, "linear"),
        ("linear, window of 20 recomputed", WindowPolicy, "linear"),
        ("softmax, window of 20 recomputed", WindowPolicy, "softmax"),
    ):
        policy = kind(_checkpoint(attention))
        generator = np.random.default_rng(0)
        observations = generator.standard_normal((steps, 1, 11))
        state = policy.initial_state(1, 3600.0)
        reward, times = np.ones(1), []
        for _ in range(WARMUP):
            _, state = policy.step(observations[0], reward, state)
        with progress(steps, "step", label) as bar:
            for t in range(steps):
                start = time.perf_counter_ns()
                _, state = policy.step(observations[t], reward, state)
                times.append((time.perf_counter_ns() - start) / 1000)
                bar.update()
        tenth = max(1, steps // 10)
        rows.append((label, summary(times), statistics.median(times[:tenth]), statistics.median(times[-tenth:])))
    base = rows[0][1][1]
    lines = [
        "| acting, batch 1 | median us | 10% to 90% | first tenth | last tenth | against the recurrent step |",
        "|---|---|---|---|---|---|",
    ]
    for label, (low, median, high), first, last in rows:
        lines.append(
            f"| {label} | {median:.0f} | {low:.0f} to {high:.0f} | {first:.0f} | {last:.0f} | {median / base:.2f}x |"
        )
    return "\n".join([*lines, "", f"{steps} steps after {WARMUP} of warm-up. {_model()} {machine()}"])


def update(*, updates: int, threads: int) -> str:
    """Milliseconds per gradient update at the default config (batch 64, 20 steps), as Markdown."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = ["| training | median ms | 10% to 90% |", "|---|---|---|"]
    for label, attention, sampling in (
        ("linear, state passing", "linear", "state_passing"),
        ("linear, windows", "linear", "windows"),
        ("softmax, windows", "softmax", "windows"),
    ):
        config = Config(dataset="synthetic", device=device, model=ModelConfig(attention=attention),
                        train=TrainConfig(sampling=sampling))
        trainer = Trainer(config, _store())
        low, median, high = summary(_timed(lambda: trainer.update()[0].item(), updates, label))
        lines.append(f"| {label} | {median / 1000:.1f} | {low / 1000:.1f} to {high / 1000:.1f} |")
    return "\n".join([*lines, "", f"{updates} updates after 5 of warm-up, {device}, batch 64, context 20. {_model()} "
                      f"{machine()}"])


def _timed(call: Callable[[], object], count: int, label: str) -> list[float]:
    """Microseconds of each of `count` calls."""
    for _ in range(5):
        call()
    times = []
    with progress(count, "update", label) as bar:
        for _ in range(count):
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1000)
            bar.update()
    return times


def _model() -> str:
    config = ModelConfig()
    return f"Model: width {config.width}, {config.layers} layers, {config.heads} heads, float32."


def _checkpoint(attention: str) -> Checkpoint:
    config = Config(
        dataset="synthetic",
        model=ModelConfig(attention=attention),
        train=TrainConfig(sampling="state_passing" if attention == "linear" else "windows"),
    )
    weights = DecisionTransformer(config.model, 11, 3).state_dict()
    normaliser = Normaliser(np.zeros(11, np.float32), np.ones(11, np.float32))
    return Checkpoint(config, 0, weights, normaliser, SPACES, "", versions(), {})


def _store() -> EpisodeStore:
    """Synthetic episodes of Hopper's shapes: the speed does not depend on the numbers."""
    generator = np.random.default_rng(0)
    steps, length = 20_000, 200
    return EpisodeStore(
        observations=generator.standard_normal((steps, 11)).astype(np.float32),
        actions=generator.uniform(-1, 1, (steps, 3)).astype(np.float32),
        returns_to_go=generator.uniform(0, 3000, steps).astype(np.float32),
        episode_starts=np.arange(0, steps + 1, length),
        normaliser=Normaliser(np.zeros(11, np.float32), np.ones(11, np.float32)),
        spaces=SPACES,
        dataset="synthetic",
        fingerprint="",
    )
