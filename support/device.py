"""The device of a run, its precision and random state, and the processes that share the work."""

import os
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from support.errors import RunStopped, first_line, require


@dataclass(frozen=True)
class Device:
    """One device and how to compute on it."""

    device: torch.device
    reason: str
    dtype: torch.dtype = torch.float32  # of the matrix products under autocast

    def autocast(self) -> AbstractContextManager:
        """The context in which to compute losses; weights and losses stay float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_device(requested: str = "auto", training: bool = False, local_rank: int | None = None) -> Device:
    """The requested device; 'auto' is the first usable one of cuda, mps and cpu.

    Training uses the fast matrix products of a GPU, bfloat16 and TF32; everything else computes in float32. Of
    several processes, each has the GPU with its local_rank, or all share the CPU. Raises UserError for a device
    that this machine or PyTorch build does not have.
    """
    several = local_rank is not None
    names = "auto, cuda or cpu" if several else "auto, cuda, mps or cpu"
    known = re.fullmatch(r"auto|cpu|cuda" if several else r"auto|cpu|mps|cuda(:\d+)?", requested) is not None
    require(known, f"device = '{requested}'{' for several processes' * several}: use {names}")
    reason = "as requested"
    if requested.startswith(("auto", "cuda")):
        index = local_rank or int(requested[5:] or 0)
        reason = _cuda_problem(index)
        if reason is None:
            return _cuda(index, training)
        if several and torch.cuda.is_available():  # perhaps this process alone
            raise RunStopped(f"device = '{requested}', but {reason}; start fewer processes or use cpu")
        require(requested == "auto", f"device = '{requested}', but {reason}; use auto or cpu")
    if requested == "mps" or (requested == "auto" and not several):
        if torch.backends.mps.is_available():
            return Device(torch.device("mps"), "an Apple GPU")
        require(requested == "auto", "device = 'mps', but PyTorch finds no Apple GPU here; use auto or cpu")
    choose_float32_products()
    return Device(torch.device("cpu"), reason)


def _cuda_problem(index: int) -> str | None:
    """Why this PyTorch cannot use CUDA GPU number `index`; None if it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's paragraphs about old drivers and cards
        if not torch.cuda.is_available():
            return "no GPU found"
        if index >= torch.cuda.device_count():
            return f"PyTorch finds {torch.cuda.device_count()} CUDA GPUs here, numbered from 0"
        try:
            torch.ones(2, device=f"cuda:{index}").sum().item()
        except Exception as error:  # for example a card too old for this build
            return f"CUDA GPU {index} fails ({first_line(error)[:100]}); another PyTorch release may support it"
    return None


def _cuda(index: int, training: bool) -> Device:
    device = torch.device(f"cuda:{index}" if index else "cuda")
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision("high" if training else "highest")  # TF32 for what stays in float32
    has_bfloat16 = torch.cuda.get_device_capability(index) >= (8, 0)
    dtype = torch.bfloat16 if training and has_bfloat16 else torch.float32
    return Device(device, torch.cuda.get_device_name(index), dtype)


def choose_float32_products() -> None:
    """Let oneDNN multiply float32 matrices on CPUs with AVX-512, if its products are as exact as MKL's.

    MKL takes twice the time on AMD processors, but PyTorch uses oneDNN only if "medium" precision is allowed. That
    also allows bfloat16 inside, which processors with fast instructions for it (AMX) use: there MKL stays.
    """
    torch.set_float32_matmul_precision("highest")
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
        torch.set_float32_matmul_precision("medium")
        rounding = (a @ b - a.double() @ b.double()).abs().max()
        if rounding > 1e-2:  # a hundred times that of float32, a tenth of that of bfloat16
            torch.set_float32_matmul_precision("highest")


def batches_on(device: torch.device, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Move batches from the CPU to the device. Copies to a CUDA GPU do not wait until its earlier work is done."""
    for batch in batches:
        if device.type == "cuda":
            batch = batch.pin_memory()
        yield batch.to(device, non_blocking=device.type == "cuda")


def random_state(device: torch.device) -> dict:
    """The state of the generators that may draw batches or dropout, as plain values."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": (kind, keys.tolist(), *rest), "python": random.getstate()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Restore a random_state."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if device.type in state:  # the run may have begun on another device
        getattr(torch, device.type).set_rng_state(state[device.type])


class OneProcess:
    """A run without torchrun. The same methods of support.distribution.Processes say what they do for several."""

    rank, size, local_rank = 0, 1, None

    def first(self, action: Callable):
        return action()

    def distribute(self, loss_fn: torch.nn.Module, *_) -> Callable[[torch.Tensor], torch.Tensor]:
        return loss_fn

    def maximum(self, *values: int) -> tuple[int, ...]:
        return values

    def gather(self, value) -> list:
        return [value]

    def wait(self) -> None:
        pass

    def leave(self) -> None:
        pass


def join_processes() -> OneProcess:
    """All processes of the run: those that torchrun started, else this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return OneProcess()
    from support.distribution import Processes

    return Processes()
