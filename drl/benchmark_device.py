"""What calls cost on this machine's device: time, launches, memory, and the rates that these are held against.

On CUDA a call is timed twice: as Python issues it (eager), and inside a captured graph, where Python and the driver
take no part. On the CPU there is only the first.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from drl.versions import versions

Call = Callable[[], object]
PASSES = 5  # eager passes over all input sets, at least
REPLAYS = 20  # of a graph, at least
SETTLE = 0.05  # seconds of calls before the first timed one: clocks rise, allocators fill
PROFILED = 4  # calls under the profiler


@dataclasses.dataclass
class Timing:
    """What one call costs.

    Attributes:
        warmup_s: seconds of the first two calls; compiling and tuning are in here and nowhere else.
        eager_us: microseconds of wall time per call, Python included: 10%, 50% and 90% over passes.
        graph_us: microseconds per call in a replayed graph: 10%, 50% and 90% over replays; None without a graph.
        memory_mb: peak memory of the device beyond what stood before the call, results included, in 10^6 bytes.
        launches: kernels, copies and fills per call; None where they were not counted.
        notes: why something is None.
    """

    warmup_s: float
    eager_us: tuple[float, float, float]
    graph_us: tuple[float, float, float] | None = None
    memory_mb: float | None = None
    launches: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def best_us(self) -> float:
        """The median in the graph, or else the eager one."""
        return (self.graph_us or self.eager_us)[1]


def measure(make_calls: Callable[[], Sequence[Call]], *, seconds: float, capturable: bool = True) -> Timing:
    """Time calls that take turns, one for each set of inputs.

    Args:
        make_calls: makes the calls; asked once for eager time and once inside the stream that a graph is captured on.
        seconds: of eager passes, and again of replays.
        capturable: False for calls that cannot be in a graph, e.g. because they know the default stream alone.
    """
    calls = make_calls()
    start = time.perf_counter()
    for call in calls[:2]:
        call()
    synchronize()
    timing = Timing(time.perf_counter() - start, summary(_eager(calls, seconds)))
    if not torch.cuda.is_available():
        timing.notes.append("no graph, launches and memory: these are CUDA's")
        return timing
    timing.memory_mb = _memory(calls[0])
    if not capturable:
        timing.notes.append("no graph: it launches on the default stream, which none can hold")
        return timing
    try:
        timing.graph_us = summary(_replay(make_calls, seconds))
    except Exception as error:  # a peer's capture may fail in any way; its eager time stands
        timing.notes.append(f"no graph: {one_line(error)}")
    return timing


def launches(call: Call) -> int | None:
    """Kernels, copies and fills of one call, from CUPTI's activity records; None on the CPU and without records."""
    if not torch.cuda.is_available():
        return None
    call()
    for _ in range(2):  # the first records of a process may be lost
        count = _recorded(call)
        if count and count % PROFILED == 0:
            break
    return round(count / PROFILED) or None


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy larger than any cache: the ceiling of a memory-bound kernel."""
    device, size = ("cuda", 2**30) if torch.cuda.is_available() else ("cpu", 2**26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = _eager([lambda: target.copy_(source)] * 10, seconds=0.1)
    return 2 * size / (summary(copies)[1] * 1e-6)


def cache_bytes() -> int:
    """The device's last cache, which inputs must exceed to come from memory; 0 where torch does not know."""
    if not torch.cuda.is_available():
        return 0
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 60 * 10**6)


def machine() -> str:
    """Processor, cores, threads and versions, in one sentence."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    installed = ", ".join(f"{package} {version}" for package, version in versions().items() if package != "minari")
    return (f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} torch threads{gpu}; "
            f"Python {platform.python_version()}, {installed}.")


def summary(times: Sequence[float]) -> tuple[float, float, float]:
    """10%, 50% and 90%."""
    low, median, high = np.percentile(times, [10, 50, 90])
    return float(low), float(median), float(high)


def synchronize() -> None:
    """Wait for the device, if it is another than the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def one_line(error: BaseException) -> str:
    """The error's kind and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _eager(calls: Sequence[Call], seconds: float) -> list[float]:
    """Microseconds per call of each pass over all the calls."""
    end = time.perf_counter() + SETTLE
    while time.perf_counter() < end:
        calls[0]()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < PASSES or time.perf_counter() < end:
        synchronize()
        start = time.perf_counter_ns()
        for call in calls:
            call()
        synchronize()
        times.append((time.perf_counter_ns() - start) / 1000 / len(calls))
    return times


def _replay(make_calls: Callable[[], Sequence[Call]], seconds: float) -> list[float]:
    """Microseconds per call of each replay of one graph that holds all the calls."""
    # Autograd remembers the stream on which a leaf was first used: leaves, warm-up and capture share one stream.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = make_calls()
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    replays, end = 0, time.perf_counter() + SETTLE
    start = time.perf_counter()
    while replays < 3 or time.perf_counter() < end:
        graph.replay()
        torch.cuda.synchronize()
        replays += 1
    each = (time.perf_counter() - start) / replays
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(max(REPLAYS, min(2000, int(seconds / each))) + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [1000 * before.elapsed_time(after) / len(calls) for before, after in zip(marks, marks[1:])]


def _recorded(call: Call) -> int:
    """Activities on the device during PROFILED calls."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def _memory(call: Call) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 1e6
