"""Several processes train one model, each on its own batches: torchrun --nproc_per_node=4 train.py CONFIG

torchrun comes with PyTorch. It starts the processes and numbers them; the number is a process's rank. All read the
same input and the same folder; only rank 0 prints and writes.
"""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.config import TrainingConfig
from support.device import OneProcess

_ended: list[dist.ProcessGroup] = []


class Processes(OneProcess):
    """All processes of the run, as one of them sees them."""

    def __init__(self):
        # Rank 0 may tokenise a text, or evaluate, for hours. torchrun stops all when one of them dies.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        if self.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)

    def first(self, action: Callable):
        """action(), which rank 0 does first: the others find what it downloaded or wrote."""
        if self.rank:
            self.wait()
        result = action()
        if not self.rank:
            self.wait()
        return result

    def distribute(
        self, loss_fn: torch.nn.Module, c: TrainingConfig, autocast: AbstractContextManager
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The loss averaged over all processes; its backward averages the gradients once for each step.

        Afterwards each process draws its own random numbers, and so its own batches.
        """
        device = next(loss_fn.parameters()).device
        module = DistributedDataParallel(loss_fn, [device] if device.type == "cuda" else None)
        # The first backward pass decides how gradients are packed, and so the order in which they are summed.
        # Run here, it decides the same way in a resumed run.
        with autocast:
            loss = module(torch.zeros(c.batch_size, c.seq_len, dtype=torch.int64, device=device))
        loss.backward()
        loss_fn.zero_grad()
        torch.manual_seed(c.seed + 1_000_003 * self.rank)
        n_calls = 0

        def distributed_loss(input_ids: torch.Tensor) -> torch.Tensor:
            nonlocal n_calls
            n_calls += 1
            with nullcontext() if n_calls % c.grad_accumulation_steps == 0 else module.no_sync():
                loss = module(input_ids)
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            return mean / self.size + (loss - loss.detach())  # its value, with this process's gradient

        return distributed_loss

    def maximum(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all processes."""
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tuple(tensor.tolist())

    def wait(self) -> None:
        """Return when all processes have called it."""
        self.maximum(0)

    def gather(self, value) -> list:
        """The values of all processes, by rank."""
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Wait for the others at the end."""
        self.wait()  # the store lives in rank 0, which must not leave before the others
        # The group's destructor waits for gloo's threads while it holds Python's lock: a deadlock if one of them
        # has to drop its last tensor. A reference that lasts until the process ends prevents that.
        _ended.append(dist.group.WORLD)
        dist.destroy_process_group()
