"""The device and precision of a run, and the speed and memory of the machine."""

import os
import platform
import re
import resource
import statistics
import timeit
import warnings
from collections.abc import Iterable, Iterator
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
        n = torch.get_num_threads()
        return f"{processor}, {n} thread{'s' * (n > 1)}"

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_hardware(requested: str = "auto") -> Hardware:
    """The requested device; 'auto' is the first usable one of cuda, mps and cpu.

    Raises UserError if this machine or PyTorch build does not have it.
    """
    known = bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", requested))
    require(known, f"device = '{requested}' is unknown; use auto, cuda, mps or cpu")
    problem = cuda_problem(int(requested[5:] or 0)) if requested != "cpu" else None
    has_mps = torch.backends.mps.is_available()
    best = "cuda" if problem is None else "mps" if has_mps else "cpu"
    device = torch.device(best if requested == "auto" else requested)

    if device.type == "cuda":
        require(problem is None, f"device = '{requested}', but {problem}; use auto or cpu")
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        if major >= 8:  # bfloat16 and TF32 came together
            return Hardware(device, torch.bfloat16, True, f"{name}: bfloat16 products, TF32 for the others")
        return Hardware(device, torch.float32, True, f"{name}: it has neither bfloat16 nor TF32")
    if device.type == "mps":
        require(has_mps, f"device = '{requested}', but PyTorch finds no Apple GPU here; use auto or cpu")
        return Hardware(device, torch.float32, False, "an Apple GPU")
    choose_float32_products()
    return Hardware(device, torch.float32, True, problem or "as requested")


def cuda_problem(index: int = 0) -> str | None:
    """Why this PyTorch cannot use CUDA GPU number `index`, with the remedy if there is one; None if it can."""
    version = f"PyTorch {torch.__version__}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with the driver is said below, in one line
        usable = torch.cuda.is_available()
        n_gpus = torch.cuda.device_count()  # the driver's count, of GPUs that CUDA may be unable to start
    if not usable:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        if n_gpus == 0 and (hidden or not any(Path("/dev").glob("nvidia[0-9]*"))):
            return "no GPU found"
        if not torch.backends.cuda.is_built():
            return f"{version} is built without CUDA and cannot use the NVIDIA GPU here; install a CUDA build"
        return (
            f"{version} cannot start CUDA {torch.version.cuda} on the GPU here: its driver is probably too old; "
            "update the driver or install a PyTorch built for an older CUDA"
        )
    if index >= n_gpus:
        return f"PyTorch finds {n_gpus} CUDA GPU{'s' if n_gpus > 1 else ''} here, numbered from 0"
    capability, architectures = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if not _has_kernels(capability, architectures):
        name = f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}"
        return f"{name}, but {version} is built for {', '.join(architectures)}; install a release built for it"
    return None


def _has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code compiled for these architectures, such as sm_86 or compute_90, runs on a GPU.

    Machine code (sm) runs on GPUs of the same major version, from its minor version on. PTX (compute) is compiled
    for any newer GPU by the driver. Other names, such as those of AMD GPUs, are ignored.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in architectures]
    built = [(match[1], (int(match[2]), int(match[3]))) for match in found if match]
    return not built or any(
        version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in built
    )


def batches_on(device: torch.device, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Move batches from the CPU to the device. Copies to a CUDA GPU do not wait until its earlier work is done."""
    for batch in batches:
        if device.type == "cuda":
            batch = batch.pin_memory()
        yield batch.to(device, non_blocking=device.type == "cuda")


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


def matrix_product_rate(hardware: Hardware, size: int | None = None) -> float:
    """FLOPs per second of a square matrix product, median of 5: the best that this machine can do."""
    on_gpu = hardware.device.type == "cuda"
    size = size or (8192 if on_gpu else 2048)
    n_products = 4 if on_gpu else 1  # per wait, which would otherwise be a part of what is timed
    a = torch.randn(size, size, device=hardware.device, dtype=hardware.dtype)

    def multiply() -> None:
        for _ in range(n_products):
            product = a @ a
        product[0, 0].item()  # waits until the device is done

    seconds = timeit.repeat(multiply, number=1, repeat=6)
    return n_products * 2 * size**3 / statistics.median(seconds[1:])  # the first is a warm-up


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
