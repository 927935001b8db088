"""Matrix products that round alike on unlike processors.

An episode magnifies the last bit of an action until all of it is another one. numpy multiplies by OpenBLAS, which picks
its kernels by the processor's name, and gives one that is newer than itself older kernels, which add in another order.
Data are therefore played in processes that are told which to take. They need AVX-512; without it data are as good, and
others.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from threadpoolctl import threadpool_info, threadpool_limits

VARIABLE, KERNELS = "OPENBLAS_CORETYPE", "SkylakeX"  # by which what docs/data tells of was made
NEEDED = {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}
PROCESSOR = Path("/proc/cpuinfo")


@functools.cache
def environment() -> dict[str, str]:
    """Variables of a process that is to play; OpenBLAS reads them when it is loaded."""
    try:
        flags = next(line for line in PROCESSOR.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):  # no Linux, or no x86
        return {}
    return {VARIABLE: KERNELS} if NEEDED <= set(flags.split()) else {}


@contextlib.contextmanager
def for_children() -> Iterator[None]:
    """Processes that are started within have `environment`."""
    before = os.environ.get(VARIABLE)
    os.environ.update(environment())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def settled() -> bool:
    """Whether this process multiplies as they would."""
    found = {library["architecture"] for library in threadpool_info() if library["internal_api"] == "openblas"}
    return not environment() or found <= {KERNELS}


def on_one_thread() -> contextlib.AbstractContextManager:
    """Within, products are not split among threads: these are slower here, and round otherwise."""
    return threadpool_limits(1)
