"""Speed of training and of acting on a GPU, measured where the user stands: a table with hardware, versions, median and
spread. Ratios between rows of one run travel between machines; the times themselves do not."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from drl.benchmark_corl import CorlUpdate
from drl.benchmark_device import machine, summary
from drl.benchmark_model import TARGET_RETURN, checkpoint, described, synthetic
from drl.captured import is_cuda
from drl.config import Config, ModelConfig, TrainConfig
from drl.data.sampling import Steps, WindowSampler
from drl.policy import RecurrentPolicy
from drl.progress import progress
from drl.resolve import chosen, resolve_device
from drl.trainer import Trainer
from drl.trainer import update as run_update


def act(*, batch_sizes: Sequence[int], steps: int) -> str:
    """Microseconds of `RecurrentPolicy.act` for B environments on a GPU, as Markdown: of the graph alone, of a call
    with tensors that are on the GPU, and of one from numpy to numpy."""
    lines = ["| acting on a GPU | graph us | call us, tensors | call us, numpy | 10% to 90% | us per environment |",
             "|---|---|---|---|---|---|"]
    for batch in batch_sizes:
        policy = RecurrentPolicy(checkpoint("linear"), "cuda")
        policy.reset(batch, TARGET_RETURN)
        array = np.random.default_rng(0).standard_normal((batch, 11)).astype(np.float32)
        observation, reward = torch.as_tensor(array, device="cuda"), torch.ones(batch, device="cuda")

        def call(policy=policy, observation=observation, reward=reward):
            policy.act(observation, reward)
            torch.cuda.synchronize()

        tensors = _timed(call, steps, f"batch {batch}")
        arrays = _timed(lambda: policy.act(array, 1.0), steps, f"batch {batch}, numpy")  # noqa: B023
        alone = summary(_replayed(lambda: policy.act(observation, reward), steps))[1]  # noqa: B023
        (_, called, _), (low, median, high) = summary(tensors), summary(arrays)
        lines.append(f"| B = {batch} | {alone:.0f} | {called:.0f} | {median:.0f} | {low:.0f} to {high:.0f} | "
                     f"{alone / batch:.3f} |")
    return "\n".join([*lines, "", f"{steps} steps each. {described(ModelConfig())} {machine()}"])


def update(
    *,
    updates: int,
    threads: int,
    batch_sizes: Sequence[int] = (64,),
    seeds: Sequence[int] = (1,),
    precision: str = "auto",
    compile: str = "auto",
) -> str:
    """Milliseconds per gradient update of chunks of 20 steps, as Markdown: every batch size with every number of seeds
    side by side, on the GPU where there is one, first as the default has it, then imitation alone; and a plain PyTorch
    update of one seed as CORL writes it."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    device = resolve_device("auto")
    settings = chosen(TrainConfig(precision=precision, compile=compile), device)
    block = 10 if is_cuda(device) else 1  # updates between two looks at the device: training looks at log points only
    lines = ["| training | batch | seeds | median ms | 10% to 90% | ready after s |", "|---|---|---|---|---|---|"]
    ways = ("linear", "state_passing", settings.value_weight), *(
        (*how, 0.0) for how in (("linear", "state_passing"), ("linear", "windows"), ("softmax", "windows")))
    for attention, sampling, weight in dict.fromkeys(ways):
        label = f"{attention}, {sampling.replace('_', ' ')}" + ", with a critic" * bool(weight)
        for batch, count in itertools.product(batch_sizes, seeds):
            start = time.perf_counter()
            train = dataclasses.replace(settings, sampling=sampling, batch_size=batch, value_weight=weight)
            configs = [
                Config(dataset="synthetic", device=device, seed=seed, train=train,
                       model=ModelConfig(attention=attention))
                for seed in range(count)
            ]
            store = synthetic()
            steps = Steps(store, device)
            trainers = [Trainer(config, store, steps) for config in configs]
            for _ in range(3 + trainers[0].sampler.groups if is_cuda(device) else 1):  # till every graph is captured
                run_update(trainers)[0][0].item()
            ready = time.perf_counter() - start

            def several(trainers=trainers):
                for _ in range(block):
                    loss = run_update(trainers)[0][0]
                loss.item()

            times = [total / block for total in _timed(several, updates // block or 1, label)]
            low, median, high = (value / 1000 for value in summary(times))
            lines.append(f"| {label} | {batch} | {count} | {median:.3g} | {low:.3g} to {high:.3g} | {ready:.1f} |")
    for half, batch in itertools.product((False, True), batch_sizes):
        label = "as CORL's dt.py, " + ("bfloat16 autocast" if half else "float32")
        low, median, high = _corl(updates // block or 1, block, batch, half, device, label)
        lines.append(f"| {label} | {batch} | 1 | {median:.3g} | {low:.3g} to {high:.3g} | |")
    kind = f"{settings.precision}, {'compiled' if settings.compile == 'on' else 'not compiled'}"
    return "\n".join([*lines, "", f"{updates} updates after 5 of warm-up, {device}, context 20; ours {kind}, CORL's of "
                      f"three tokens a step. {described(ModelConfig())} {machine()}"])


def _corl(count: int, block: int, batch: int, half: bool, device: str, label: str) -> list[float]:
    """Milliseconds of CorlUpdate, an update, drawing included: a low, the median and a high value."""
    model, settings, store = ModelConfig(), TrainConfig(batch_size=batch), synthetic()
    peer = CorlUpdate(model, settings, store.spaces.observation_dim, store.spaces.action_dim, device)
    sampler = WindowSampler(Steps(store, device), batch, settings.context, seed=0)

    def several():
        for _ in range(block):
            loss = peer(sampler.next(), half)
        loss.item()

    return [value / 1000 / block for value in summary(_timed(several, count, label))]


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


def _replayed(call: Callable[[], object], count: int) -> list[float]:
    """Microseconds that the device takes for each of `count` calls when none waits for the host."""
    times = []
    for _ in range(count // 20 or 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # about a millisecond in which the host gets ahead
        begin.record()
        for _ in range(20):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / 20)
    return times
