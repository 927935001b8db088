"""Few launches: CUDA graphs, fused kernels, writes in place. The host launches one graph and reads nothing."""

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

T = TypeVar("T")


class Captured:
    """Runs a function: as it is for a few calls, then as one CUDA graph for each key.

    What it changes it must change in place, and its inputs must stay where they are: a replay reads and writes the
    memory that the capture saw. Results are valid until the next call, because all graphs share one pool of memory
    for what does not outlive a call.
    """

    WARMUP = 3  # lets the libraries allocate and choose before the capture, which allows neither

    def __init__(self, device: torch.device | str):
        self._stream, self._done = torch.cuda.Stream(device), 0
        self._pool, self._graphs = torch.cuda.graph_pool_handle(), {}

    def __call__(self, key: Hashable, function: Callable[[], T], generators: Sequence[Generator]) -> T:
        """What `function` returns.

        Calls with an equal key do the same work on the same memory. They draw from `generators` and from torch's own.
        """
        if self._done < self.WARMUP:
            self._done += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = function()
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if key not in self._graphs:
            if not self._graphs:
                gc.collect()  # what Python frees during a capture, such as another's graph, would break it
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            # thread_local: what other threads ask the driver meanwhile, such as NCCL's watchdog, is not our capture's
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = function()
            self._graphs[key] = graph, result
        graph, result = self._graphs[key]
        graph.replay()
        return result


def compiled(function: Callable) -> Callable:
    """`function` as a few fused kernels of fixed shapes; the first call compiles, which takes a minute or so."""
    return torch.compile(function, fullgraph=True, dynamic=False)


@contextlib.contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Within, products in float32 need not be exact on a GPU: where the model's are bfloat16, the critics' are left."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
def write(kept: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write `values` over `kept` in place: on a CUDA device one launch for each dtype, not one for each tensor."""
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for old, new in zip(kept, values, strict=True):
        pairs.setdefault(new.dtype, []).append((old, new))
    for same in pairs.values():
        torch._foreach_copy_(*map(list, zip(*same, strict=True)))


@torch.no_grad()
def joined(tensors: Iterable[Tensor], out: Tensor | None = None, lead: tuple[int, ...] = ()) -> Tensor:
    """The numbers of `tensors` end to end, (*lead, N), written to `out` if given: on a CUDA device one launch that all
    of it shares, if they have one dtype. All begin with the dimensions `lead`."""
    # flat and dense, because tensors of unlike strides, if only along an axis of one, may be written one by one
    rows = [tensor.contiguous().view(*lead, tensor.shape[len(lead):].numel()) for tensor in tensors]
    return torch.cat(rows, -1, out=out)


def views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of `flat`, (..., N), that stand for `tensors`, which are N numbers together, in their shapes (...)."""
    parts = flat.split([tensor.numel() for tensor in tensors], -1)
    return [part.view(flat.shape[:-1] + tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def stack(whole: Any, several: Sequence[Any], names: Iterable[str]) -> None:
    """Make each named tensor of `whole` a stack of those of `several`, which are rows of it from here on; what is None
    stays so."""
    for name in names:
        if getattr(several[0], name) is None:
            continue
        setattr(whole, name, torch.stack([getattr(one, name) for one in several]))
        for one, row in zip(several, getattr(whole, name), strict=True):
            setattr(one, name, row)


def current(device: torch.device | str) -> contextlib.AbstractContextManager:
    """Within, kernels are launched on this device, if it is a CUDA device: which one that is, each thread says for
    itself, and what is not torch's own, such as a kernel in Triton, does not look where its tensors are."""
    return torch.cuda.device(device) if is_cuda(device) else contextlib.nullcontext()


def is_cuda(device: torch.device | str) -> bool:
    """Whether a device, or the string that names it, is a CUDA device."""
    return torch.device(device).type == "cuda"
