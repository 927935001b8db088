"""Data parallel: the processes that torchrun starts share every batch, and its result is that of one process.

Rank r of R takes rows [r B/R, (r + 1) B/R) of each batch of B. All ranks draw alike for all rows, which costs little,
and compute their own. DistributedDataParallel would average the means of the ranks, which is another number where they
have unequally many real steps; here the sums are added, then divided by the count of all.
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from drl.errors import UserError

PATIENCE = datetime.timedelta(days=1)  # the others wait while the first evaluates; torchrun ends those who wait in vain


class Share(NamedTuple):
    """Which part of every batch is this process's."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a batch.

        Raises:
            UserError: they cannot be shared equally.
        """
        if batch_size % self.size:
            raise UserError(f"train.batch_size {batch_size} cannot be shared by {self.size} processes; use a multiple "
                            f"of {self.size}")
        own = batch_size // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def sum(self, tensor: Tensor) -> None:
        """Add up what all processes have here, in place."""
        if self.size > 1:
            with _company():
                dist.all_reduce(tensor)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """What all processes have here, joined along `dim`, for the first; the others get back their own."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.first else None
        with _company():
            dist.gather(tensor.contiguous(), parts)
        return torch.cat(parts, dim) if self.first else tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process, told to all of them."""
        if self.size == 1:
            return flag
        flags = torch.full((1,), float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        self.sum(flags)
        return flags.item() > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            with _company():
                dist.barrier()


@contextlib.contextmanager
def join(device: str) -> Iterator[Share]:
    """The share that torchrun's environment names, all of it where there is none. `device` as `resolve` returns it.

    Raises:
        UserError: torchrun started more processes than there are GPUs, or the device names one of them.
    """
    share = Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "LOCAL_RANK" in os.environ else Share()
    if share.size == 1:
        yield share
        return
    local, gpu = int(os.environ["LOCAL_RANK"]), None
    if torch.device(device).type == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if device != "cuda":
            raise UserError(f"torchrun gives each process a GPU of its own; use --device cuda, not {device}")
        if here > gpus:
            raise UserError(f"torchrun started {here} processes on {gpus} GPUs; use --nproc-per-node {gpus}")
        gpu = torch.device("cuda", local)
        torch.cuda.set_device(gpu)  # which is what "cuda" means from here on
    dist.init_process_group("gloo" if gpu is None else "nccl", timeout=PATIENCE, device_id=gpu)
    yield share
    share.wait()
    gc.collect()  # NCCL would wait for captured graphs that hold its calls
    dist.destroy_process_group()  # not after a failure, when the others might not come


@contextlib.contextmanager
def _company() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"the processes of this run lost each other ({reason}); see above whether one of them ended, "
                        "and go on with --resume") from error
