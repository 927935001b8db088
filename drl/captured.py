"""Few launches: CUDA graphs, fused kernels, writes in place. The host launches one graph and reads nothing."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Generator, Tensor

T = TypeVar("T")


class Captured:
    """Runs functions side by side: as they are for a few calls, then as one CUDA graph for each key.

    What they change they must change in place, and their inputs must stay where they are: a replay reads and writes
    the memory that the capture saw. Results are valid until the next call, because all graphs share one pool of memory
    for what does not outlive a call.
    """

    WARMUP = 3  # lets the libraries allocate and choose before the capture, which allows neither

    def __init__(self, device: torch.device | str):
        self._device, self._streams, self._done = device, [torch.cuda.Stream(device)], 0
        self._pool, self._graphs = torch.cuda.graph_pool_handle(), {}

    def __call__(self, key: Hashable, branches: Sequence[Callable[[], T]], generators: Sequence[Generator]) -> list[T]:
        """What the `branches` return, none of which reads what another writes.

        Calls with an equal key do the same work on the same memory. They draw from `generators` and from torch's own.
        """
        if self._done < self.WARMUP:
            self._done += 1
            self._streams[0].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._streams[0]):
                results = self._side_by_side(branches)
            torch.cuda.current_stream().wait_stream(self._streams[0])
            return results
        if key not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            # thread_local: what other threads ask the driver meanwhile, such as NCCL's watchdog, is not our capture's
            with torch.cuda.graph(graph, self._pool, self._streams[0], capture_error_mode="thread_local"):
                results = self._side_by_side(branches)
            self._graphs[key] = graph, results
        graph, results = self._graphs[key]
        graph.replay()
        return results

    def _side_by_side(self, branches: Sequence[Callable[[], T]]) -> list[T]:
        """Each on a stream of its own, so that the small kernels of one fill the gaps of another."""
        while len(self._streams) < len(branches):
            self._streams.append(torch.cuda.Stream(self._device))
        main, *sides = self._streams[: len(branches)]
        for side in sides:
            side.wait_stream(main)
        results = []
        for stream, branch in zip((main, *sides), branches, strict=True):
            with torch.cuda.stream(stream):
                results.append(branch())
        for side in sides:
            main.wait_stream(side)
        return results


def compiled(function: Callable) -> Callable:
    """`function` as a few fused kernels of fixed shapes; the first call compiles, which takes a minute or so."""
    return torch.compile(function, fullgraph=True, dynamic=False)


@torch.no_grad()
def write(kept: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write `values` over `kept` in place: on a CUDA device one launch for each dtype, not one for each tensor."""
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for old, new in zip(kept, values, strict=True):
        pairs.setdefault(new.dtype, []).append((old, new))
    for same in pairs.values():
        torch._foreach_copy_(*map(list, zip(*same, strict=True)))


@torch.no_grad()
def joined(tensors: Iterable[Tensor], out: Tensor | None = None) -> Tensor:
    """The numbers of `tensors` end to end, (N,), written to `out` if given: on a CUDA device one launch that all of it
    shares, if they have one dtype."""
    # flat and dense, because tensors of unlike strides, if only along an axis of one, may be written one by one
    return torch.cat([tensor.contiguous().view(-1) for tensor in tensors], out=out)


def views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of `flat`, (N,), that stand for `tensors`, which are as many numbers together, in their shapes."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def is_cuda(device: torch.device | str) -> bool:
    """Whether a device, or the string that names it, is a CUDA device."""
    return torch.device(device).type == "cuda"
