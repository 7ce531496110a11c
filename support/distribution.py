"""Several processes train one model, each on its own batches: torchrun --nproc_per_node=4 train.py CONFIG

torchrun comes with PyTorch. It starts the processes and numbers them; the number is a process's rank. Only
rank 0 prints, writes and locks the folder. Without torchrun there is one process, and this module does nothing.
"""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.config import TrainingConfig
from support.errors import RunStopped, UserError, require
from support.hardware import cuda_problem

PATIENCE = timedelta(minutes=30)  # how long to wait for another process, such as rank 0 while it tokenises a text
EVALUATION_PATIENCE = timedelta(days=7)  # for rank 0, which evaluates alone
_ENDED: list[dist.ProcessGroup] = []
LOST = "another process of this run exited or stopped responding; see its message or torchrun's"


@dataclass(frozen=True)
class World:
    """All processes of the run, as one of them sees them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # its number on this machine

    def device_of_rank(self, requested: str) -> str:
        """The device of this rank: each has its own GPU, or all share the CPU."""
        if self.size == 1:
            return requested
        known = requested in ("auto", "cuda", "cpu")
        require(known, f"{self.size} processes cannot share device = '{requested}'; use auto, cuda or cpu")
        if requested == "cpu" or cuda_problem():  # choose_hardware reports a problem
            return requested.replace("auto", "cpu") if torch.backends.mps.is_available() else requested
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        require(here <= gpus, f"{here} processes, but {gpus} GPUs here; start torchrun --nproc_per_node={gpus}")
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, the process that prints and writes."""
        return self.rank == 0

    def distribute(
        self, loss_fn: torch.nn.Module, c: TrainingConfig, autocast: AbstractContextManager
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The loss averaged over all processes, with averaged gradients; alone, loss_fn itself.

        Afterwards each process draws its own random numbers, and so its own batches.
        """
        if self.size == 1:
            return loss_fn
        loss_fn = DistributedLoss(loss_fn, c.grad_accumulation_steps, (c.batch_size, c.seq_len), autocast)
        torch.manual_seed(int(np.random.SeedSequence((c.seed, self.rank)).generate_state(1)[0]))
        return loss_fn

    def maximum(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all processes. It returns when all have called it."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tuple(tensor.tolist())

    def barrier(self) -> None:
        """Wait until all processes have called it."""
        self.maximum(0)

    def gather(self, value) -> list:
        """The values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def main_process_first(self):
        """The other processes enter the block when rank 0 has left it, and find what it downloaded or wrote."""
        if not self.is_main_process:
            self.barrier()
        yield
        if self.is_main_process:
            self.barrier()


class DistributedLoss:
    """input_ids (B, S) of this process -> the loss averaged over all processes.

    Backward averages the gradients too, once for every grad_accumulation_steps calls. The loss itself costs one
    small reduction per call.
    """

    def __init__(
        self,
        loss_fn: torch.nn.Module,
        grad_accumulation_steps: int,
        batch_shape: tuple[int, int],
        autocast: AbstractContextManager,
    ):
        device = next(loss_fn.parameters()).device
        device_ids = [device] if device.type == "cuda" else None
        self.module = DistributedDataParallel(loss_fn, device_ids)
        # The first backward pass decides how gradients are packed, and so the order in which they are summed.
        # Run here, it decides the same way in a resumed run.
        with autocast:
            loss = self.module(torch.zeros(batch_shape, dtype=torch.int64, device=device))
        loss.backward()
        loss_fn.zero_grad()
        self.grad_accumulation_steps, self.n_calls = grad_accumulation_steps, 0

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.n_calls += 1
        is_last = self.n_calls % self.grad_accumulation_steps == 0
        with nullcontext() if is_last else self.module.no_sync():
            loss = self.module(input_ids)
        mean = loss.detach().clone()
        dist.all_reduce(mean, dist.ReduceOp.SUM)
        mean /= dist.get_world_size()
        return mean + (loss - loss.detach())  # the mean's value with this process's gradient


@contextmanager
def join_world():
    """Connect with the processes that torchrun started and yield the World; without torchrun, one of size 1."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield World()
        return
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    dist.init_process_group("gloo" if cuda_problem() else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    at_the_end = dist.new_group(backend="gloo", timeout=EVALUATION_PATIENCE)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if world.rank else sys.stdout):
        try:
            yield world
        except Exception as error:
            reported = RunStopped(f"{LOST}.", on_all_processes=True) if lost_process(error) else error
            if world.rank and isinstance(reported, UserError):
                # Errors common to all ranks (bad input, divergence, a lost process) are reported by rank 0 only.
                is_common = reported.on_all_processes or (reported.status == 2 and world.local_rank)
                own_message = f"rank {world.rank}: {reported}"
                reported = SystemExit(reported.status) if is_common else type(reported)(own_message)
            if reported is error:
                raise
            raise reported from error
    # The store lives in rank 0, which must not leave before the others; they wait here while it evaluates.
    dist.barrier(group=at_the_end)
    # The group's destructor waits for gloo's threads while it holds Python's lock; a thread that needs the lock to
    # drop its last tensor would deadlock. A reference that lasts until the process ends prevents that.
    _ENDED.extend([dist.group.WORLD, at_the_end])
    dist.destroy_process_group()  # not after an error: it would wait for the others


def lost_process(error: Exception) -> bool:
    """Whether another process no longer answers; gloo raises a plain RuntimeError then."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
