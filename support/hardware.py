"""The device and precision of a run, and the speed and memory of the machine."""

import platform
import re
import resource
import statistics
import timeit
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from support.errors import UserError, first_line, require


@dataclass(frozen=True)
class Hardware:
    """One device and how to compute on it."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products in training
    fused: bool  # AdamW in one kernel
    reason: str

    def autocast(self) -> AbstractContextManager:
        """The context in which to compute losses; weights and losses stay float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def name(self) -> str:
        """The GPU's or processor's name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        cpuinfo = Path("/proc/cpuinfo")  # of Linux
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
        processor = found.group(1) if found else platform.processor()
        return f"{processor}, {torch.get_num_threads()} threads"

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_hardware(requested: str = "auto") -> Hardware:
    """The requested device; 'auto' is the first available of cuda, mps and cpu.

    Raises UserError if this machine or PyTorch build does not have it.
    """
    known = bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", requested))
    require(known, f"device = '{requested}' is unknown; use auto, cuda, mps or cpu")
    n_gpus, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    best = "cuda" if n_gpus else "mps" if has_mps else "cpu"
    device = torch.device(best if requested == "auto" else requested)

    if device.type == "cuda":
        there = (device.index or 0) < n_gpus
        require(there, f"device = '{requested}', but PyTorch finds {n_gpus} CUDA GPUs here; use auto or cpu")
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Hardware(device, torch.bfloat16, True, "a CUDA GPU with bfloat16 products")
        return Hardware(device, torch.float32, True, "a CUDA GPU without bfloat16 products")
    if device.type == "mps":
        require(has_mps, f"device = '{requested}', but PyTorch finds no Apple GPU here; use auto or cpu")
        return Hardware(device, torch.float32, False, "an Apple GPU")
    choose_float32_products()
    return Hardware(device, torch.float32, True, "as requested" if requested == "cpu" else "no GPU found")


def choose_float32_products() -> None:
    """Let oneDNN multiply float32 matrices on CPUs with AVX-512, if its products are as exact as MKL's.

    MKL takes twice the time on AMD processors, but PyTorch uses oneDNN only if "medium" precision is allowed. That
    also allows bfloat16 inside, which processors with fast instructions for it (AMX) use: there MKL stays.
    """
    torch.set_float32_matmul_precision("highest")
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("medium")
    rounding = (a @ b - a.double() @ b.double()).abs().max()
    if rounding > 1e-2:  # a hundred times that of float32, a tenth of that of bfloat16
        torch.set_float32_matmul_precision("highest")


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: of the tensors on a GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10  # bytes there, KiB on Linux


def matrix_product_rate(hardware: Hardware, size: int = 2048) -> float:
    """FLOPs per second of a square matrix product, median of 5: the best that this machine can do."""
    a = torch.randn(size, size, device=hardware.device, dtype=hardware.dtype)
    # Reading one number of the product waits until the device is done.
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=6)
    return 2 * size**3 / statistics.median(seconds[1:])  # the first is a warm-up


def compile_forward(module: torch.nn.Module, device: torch.device) -> None:
    """Compile the module in place; its state_dict keeps its keys.

    Raises UserError if nothing can be compiled, for example on a CPU without a C++ compiler.
    """
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # depends on what the device's compiler lacks
        remedy = "install a C++ compiler such as g++, or give compile: false"
        raise UserError(f"compile = true, but nothing compiles here ({first_line(error)}); {remedy}") from None
    module.compile()
