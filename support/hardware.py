"""Where a run computes: device, precision and the reason for the choice; speed and memory of the machine."""

import math
import os
import platform
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from support.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """One device and how to compute on it."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products in training
    fused: bool  # AdamW in one kernel
    reason: str

    def autocast(self) -> AbstractContextManager:
        """The context in which losses are computed; weights and loss stay float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def name(self) -> str:
        """The processor's or GPU's name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{processor_name()}, {torch.get_num_threads()} threads"

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_hardware(requested: str = "auto") -> Hardware:
    """The device asked for, or with 'auto' the first there is of cuda, mps and cpu.

    Raises UserError for a device that this machine or PyTorch build does not have.
    """
    kind, colon, index = requested.partition(":")
    if kind not in ("auto", "cuda", "mps", "cpu") or (colon and (kind != "cuda" or not index.isdigit())):
        raise UserError(f"device = '{requested}' is not known; give auto, cuda, mps or cpu")
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if kind == "cuda" and not has_cuda:
        raise UserError(f"device = '{requested}', but PyTorch finds no CUDA GPU here; give auto or cpu")
    if colon and int(index) >= torch.cuda.device_count():
        raise UserError(f"device = '{requested}', but there are only {torch.cuda.device_count()} GPUs here")
    if kind == "mps" and not has_mps:
        raise UserError(f"device = '{requested}', but PyTorch finds no Apple GPU here; give auto or cpu")

    if kind == "cuda" or (kind == "auto" and has_cuda):
        device = torch.device(requested if colon else "cuda")
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Hardware(device, torch.bfloat16, True, "a CUDA GPU with bfloat16 products")
        return Hardware(device, torch.float32, True, "a CUDA GPU without bfloat16 products")
    if kind == "mps" or (kind == "auto" and has_mps):
        return Hardware(torch.device("mps"), torch.float32, False, "an Apple GPU")
    reason = "asked for" if kind == "cpu" else "no GPU found"
    return Hardware(torch.device("cpu"), torch.float32, True, reason)


def processor_name() -> str:
    """The processor as its maker names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def allocator_name() -> str:
    """The C library's allocator, or the one preloaded in its place; it decides much of the speed on a CPU."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    names = [name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in preloaded]
    return names[0] if names else "system default"


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far, in MiB: of the GPU's tensors, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if os.name == "nt":
        return math.nan  # Windows has no getrusage
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10  # bytes there, KiB elsewhere


def matrix_product_rate(hardware: Hardware, size: int = 2048) -> float:
    """FLOPs per second of a square matrix product, median of 5: what this machine could do at best."""
    a = torch.randn(size, size, device=hardware.device, dtype=hardware.dtype)
    seconds = []
    for _ in range(6):  # the first one warms up
        started = time.perf_counter()
        a @ a
        synchronize(hardware.device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
