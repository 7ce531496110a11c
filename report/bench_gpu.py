"""What a CUDA GPU makes of this package: `python report/bench.py --device cuda`.

It prints Markdown tables to paste into an issue:

- training steps as train.py takes them, with the plain and the chunked loss, compiled or not, against nanoGPT's
  recipe: GPT2LMHeadModel of transformers with SDPA, bfloat16 autocast and fused AdamW, compiled or not;
- the roofline of a step: the time that its kernels need at least, each for its bytes or its FLOPs, at the rates
  measured here. With it one sees what is to be gained from fewer passes over memory;
- greedy generation, one text and eight at a time.
"""

import gc
import time
from collections.abc import Callable
from statistics import median

import torch
from bench import (
    BATCH_SIZES,
    CONFIGS,
    CONTENDERS,
    DECODER,
    N_VOCAB,
    NEW_TOKENS,
    PROMPT_TOKENS,
    print_table,
    transformers_model,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from generate import generate
from model import DecoderLM
from support.chunked_loss import ChunkedLanguageModelingLoss, LanguageModelingLoss
from support.errors import exit_on_user_error
from support.hardware import Hardware, choose_hardware, matrix_product_rate, peak_memory_mib
from support.tokenizer import get_tokenizer
from train import training_flops

SHAPES = {name: (CONFIGS[name], BATCH_SIZES[name]) for name in ("GPT-tiny", "d256 L4")}  # model, rows of a batch
SHAPES["final-1e17"] = {**CONFIGS["d256 L4"], "n_layer": 8}, 64
LOSSES = {"plain": LanguageModelingLoss, "chunked": ChunkedLanguageModelingLoss}
STEPS = 10  # between two waits for the GPU


class Step:
    """One training step of a contender, without dropout, always on the same batch."""

    def __init__(self, contender: str, shape: str, hardware: Hardware):
        torch.manual_seed(0)
        config, rows = SHAPES[shape]
        kind, _, compiled = contender.partition(", ")
        self.hardware = hardware
        self.input_ids = torch.randint(N_VOCAB, (rows, config["n_positions"]), device=hardware.device)
        self.model = DecoderLM(N_VOCAB, **config, p_dropout=0.0)
        self.flops = training_flops(self.model, 1, 1, rows, config["n_positions"])
        if kind == "nanoGPT's recipe":
            dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            self.model = transformers_model(config, **dropout).to(hardware.device)
            forward = torch.compile(self.model) if compiled else self.model
            self.loss = lambda ids: forward(ids, labels=ids).loss
        else:
            self.loss = LOSSES[kind](self.model.to(hardware.device))
            if compiled:
                self.loss.compile()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with self.hardware.autocast():
            loss = self.loss(self.input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(function: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Median over the repetitions, each of STEPS calls, after three that warm up or compile."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repetitions):
        wait(device)
        started = time.perf_counter()
        for _ in range(STEPS):
            function()
        wait(device)
        times.append((time.perf_counter() - started) / STEPS)
    return median(times)


class Traffic(TorchDispatchMode):
    """Counts the kernels of a program, the bytes that they read and write, and the least time that both take."""

    def __init__(self, bytes_per_second: float, flops_per_second: float):
        super().__init__()
        self.rates = bytes_per_second, flops_per_second
        self.kernels, self.bytes, self.flops, self.seconds = 0, 0, 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        arguments = func._schema.arguments
        in_place = [
            leaf
            for argument, value in zip(arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value)
        ]
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = not in_place and all(tensor.untyped_storage()._cdata in storages for tensor in written)
        if is_view or "empty" in func.__name__:
            return result
        written = in_place or written
        n_bytes = sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in read + written)
        count_flops = flop_registry.get(func.overloadpacket)
        n_flops = count_flops(*args, **kwargs, out_val=result) if count_flops else 0
        self.kernels, self.bytes, self.flops = self.kernels + 1, self.bytes + n_bytes, self.flops + n_flops
        self.seconds += max(n_bytes / self.rates[0], n_flops / self.rates[1])
        return result


def memory_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB (on a CPU 64 MiB)."""
    source = torch.ones((2**28 if device.type == "cuda" else 2**24), device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / seconds_per_call(lambda: target.copy_(source), device, 3)


def bench_steps(shape: str, hardware: Hardware, rate: float, repetitions: int, compiled: bool) -> list[dict]:
    """A row of the table for each contender."""
    kinds = ["plain", "chunked"] + ["nanoGPT's recipe"] * ("transformers" in CONTENDERS)
    rows = []
    for contender in [kind + suffix for kind in kinds for suffix in ["", ", compiled"][: 1 + compiled]]:
        gc.collect()
        if hardware.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(hardware.device)
        step = Step(contender, shape, hardware)
        seconds = seconds_per_call(step, hardware.device, repetitions)
        rows.append(
            {
                "step": f"{shape}, {contender}",
                "ms": 1e3 * seconds,
                "tokens/s": step.input_ids.numel() / seconds,
                "TFLOPS": step.flops / seconds / 1e12,
                "% of products": 100 * step.flops / seconds / rate,
                "peak GiB": peak_memory_mib(hardware.device) / 2**10,
            }
        )
    return rows


def bench_roofline(shape: str, hardware: Hardware, rate: float, bandwidth: float) -> dict:
    """The least time of a step with the plain loss, kernel by kernel."""
    step = Step("plain", shape, hardware)
    step()  # the optimizer's state exists from now on
    with Traffic(bandwidth, rate) as traffic:
        step()
    return {
        "step": shape,
        "kernels": str(traffic.kernels),
        "GB moved": traffic.bytes / 1e9,
        "least ms": 1e3 * traffic.seconds,
        "% of products": 100 * step.flops / traffic.seconds / rate,
    }


def bench_generation(batch_size: int, hardware: Hardware, repetitions: int) -> dict:
    """Greedy, in float32 as generate.py computes."""
    torch.manual_seed(0)
    device, tokenizer = hardware.device, get_tokenizer()
    model = DecoderLM(N_VOCAB, **DECODER).to(device).eval()
    prefixes = [" the" * PROMPT_TOKENS] * batch_size
    times = []
    for _ in range(repetitions + 1):
        wait(device)
        started = time.perf_counter()
        generate(model, device, tokenizer, prefixes, batch_size, max_new_tokens=NEW_TOKENS)
        times.append(time.perf_counter() - started)  # the texts are on the CPU: it has waited
    ms_per_step = 1e3 * median(times[1:]) / NEW_TOKENS
    return {"batch": str(batch_size), "ms per step": ms_per_step, "ms per token": ms_per_step / batch_size}


def bench_gpu(device: str, quick: bool, results: dict) -> None:
    """Measure, print and keep the tables in `results`; a quick one compiles nothing."""
    with exit_on_user_error():
        hardware = choose_hardware(device)
    repetitions = 1 if quick else 5
    rate, bandwidth = matrix_product_rate(hardware), memory_rate(hardware.device)
    rates = f"products at {rate / 1e12:.3g} TFLOPS, memory at {bandwidth / 1e9:.4g} GB/s"
    print(f"{hardware}; {rates}; PyTorch {torch.__version__}", flush=True)
    results["hardware"] = f"{hardware}; {rates}"

    def report(title: str, rows: list[dict]) -> None:
        results[title] = rows
        print_table(title, rows)

    for shape in SHAPES:
        report(f"Training steps, {shape}", bench_steps(shape, hardware, rate, repetitions, not quick))
    report("Roofline, plain loss", [bench_roofline(shape, hardware, rate, bandwidth) for shape in SHAPES])
    title = f"Greedy generation, d256 L4, {PROMPT_TOKENS} + {NEW_TOKENS} tokens"
    report(title, [bench_generation(batch_size, hardware, repetitions) for batch_size in (1, 8)])
