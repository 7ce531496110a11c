"""Several processes train one model, each on batches of its own: torchrun --nproc_per_node=4 train.py CONFIG

torchrun comes with PyTorch. It starts the processes and numbers them; the number is a process's rank. Rank 0
alone prints, writes and holds the folder. Without torchrun nothing here does anything.
"""

import os
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.errors import RunStopped, UserError, require

PATIENCE = timedelta(minutes=30)  # with a silent process; the longest wait is for rank 0 to tokenise a text
_ENDED: list[dist.ProcessGroup] = []
LOST = "another process of this run has ended or is silent; its own message, or torchrun's, says why"


@dataclass(frozen=True)
class World:
    """All processes of the run, as one of them sees them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # its number on this machine

    def device(self, requested: str) -> str:
        """The device of this rank: each has a GPU of its own, or all share the CPU."""
        if self.size == 1:
            return requested
        known = requested in ("auto", "cuda", "cpu")
        require(known, f"device = '{requested}' is but one for {self.size} processes; give auto, cuda or cpu")
        if requested == "cpu" or not torch.cuda.is_available():
            return requested.replace("auto", "cpu")
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        require(here <= gpus, f"{here} processes, but {gpus} GPUs here; start torchrun --nproc_per_node={gpus}")
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def distribute(self, module: torch.nn.Module, seed: int) -> torch.nn.Module:
        """The module with gradients averaged over the ranks, each of which draws other numbers from now on."""
        if self.size == 1:
            return module
        device = next(module.parameters()).device
        module = Distributed(module, [device] if device.type == "cuda" else None, forward_sync_buffers=False)
        # The first backward pass settles how gradients are packed, and thereby in which order they are
        # summed. Made here, it settles the same in a run that is continued.
        module(torch.zeros(1, 2, dtype=torch.int64, device=device)).mean().backward()
        module.zero_grad()
        torch.manual_seed(int(np.random.SeedSequence((seed, self.rank)).generate_state(1)[0]))
        return module

    def share(self, tokens: np.ndarray, seq_len: int) -> np.ndarray:
        """This rank's part of the rows of seq_len tokens: consecutive rows, of equal number up to one."""
        rows = len(tokens) // seq_len
        first, end = (rows * rank // self.size for rank in (self.rank, self.rank + 1))
        return tokens[first * seq_len : end * seq_len]

    def maximum(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all ranks. It returns when all have called it."""
        return values if self.size == 1 else tuple(map(int, _all_reduce(values, dist.ReduceOp.MAX)))

    def gather(self, value) -> list:
        """The values of all ranks, in their order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def rank_0_first(self):
        """The other ranks enter the block when rank 0 has left it, and find what it downloaded or wrote."""
        if self.rank != 0:
            self.maximum(0)
        yield
        if self.rank == 0:
            self.maximum(0)


class Distributed(DistributedDataParallel):
    """A module, the loss of a model, whose backward pass averages the gradients over all ranks."""

    def sum_over_ranks(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over all ranks."""
        return _all_reduce(values, dist.ReduceOp.SUM)


def _all_reduce(values: tuple[float, ...], operation) -> tuple[float, ...]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tuple(tensor.tolist())


@contextmanager
def join_world():
    """Connect with the other processes that torchrun started, and yield the World; without it, be alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield World()
        return
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if world.rank else sys.stdout):
        try:
            yield world
        except Exception as error:
            message = RunStopped(f"{LOST}.") if lost_process(error) else error
            if world.rank and isinstance(message, UserError):
                # What all ranks meet (bad input, divergence, a lost process) rank 0 tells alone.
                common = (message.status == 2 and world.local_rank) or str(message).startswith((LOST, "diverged"))
                message = SystemExit(message.status) if common else type(message)(f"rank {world.rank}: {message}")
            if message is error:
                raise
            raise message from error
    dist.barrier()  # the store lives in rank 0, which must not leave before the others
    # The group's destructor holds Python's lock and waits for gloo's threads, one of which may wait for that very
    # lock to drop the last tensor. So a reference stays until the process ends.
    _ENDED.append(dist.group.WORLD)
    dist.destroy_process_group()  # not after an error: it would wait for the others


def lost_process(error: Exception) -> bool:
    """Whether another process no longer answers; gloo raises a plain RuntimeError then."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
