"""What stops a training run: signals, divergence, lack of memory; and what the person is told then."""

import os
import signal
from contextlib import suppress

import torch

from support.config import ModelConfig, TrainingConfig
from support.distribution import LOST, lost_process
from support.errors import RunStopped, check, first_line, is_out_of_memory

BYTES_PER_PARAMETER = 16  # float32 weight, gradient and AdamW's two moments


class StopSignals:
    """SIGINT and SIGTERM inside the block: the first one ends the step in hand, a second one stops at once.

    While `deferring`, the first signal only leaves its `number`; otherwise it raises SystemExit with the
    shell's status, 128 + number.
    """

    def __init__(self, announced: bool = True):
        self.announced = announced
        self.number = 0
        self.deferring = False

    def __enter__(self) -> "StopSignals":
        # An ignored signal stays ignored: that is how a shell protects what it runs in the background.
        self._former = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, _frame) -> None:
        self.__exit__()  # a second signal finds the usual handlers
        if not self.deferring:
            raise SystemExit(128 + number)
        self.number = number
        if self.announced:
            with suppress(OSError):  # not print: the signal may have come in the middle of another print
                os.write(2, b"\nStopping after this step; once more stops at once.\n")


def check_memory(config: ModelConfig, n_vocab: int, device: torch.device) -> None:
    """Raise UserError when the device cannot hold what training this model needs, however small the batch."""
    n_parameters = config.n_parameters(n_vocab)
    needed, there = BYTES_PER_PARAMETER * n_parameters, _memory_bytes(device)
    check(
        there is None or needed < there,
        f"model_config: n_embd = {config.n_embd}, n_layer = {config.n_layer} and n_positions = "
        f"{config.n_positions} make {n_parameters:.3g} parameters; training takes {needed / 1e9:.3g} GB for "
        f"them, but {device} has {(there or 0) / 1e9:.3g} GB; make the model smaller",
    )


def _memory_bytes(device: torch.device) -> int | None:
    """All memory of the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def explained(error: Exception, config: TrainingConfig, step: int, kept: str) -> RunStopped | None:
    """What happened in `step` and what helps, or None for an error that is no fault of these kinds.

    `kept` says from where the same command would go on.
    """
    if isinstance(error, FloatingPointError):
        again = f"{kept}, and diverges again unless a key is changed (with --fresh)" if kept else ""
        return RunStopped(
            f"diverged: {error}; the weights were not changed by it. Likely remedies: a lower max_lr (now "
            f"{config.max_lr:g}), more num_warmup_steps (now {config.num_warmup_steps}), or grad_clip "
            f"(now {config.grad_clip or 'off'}; 1.0 is usual). {again}"
        )
    if is_out_of_memory(error):
        return RunStopped(f"out of memory at step {step}: {_memory_advice(config)}. {kept} ({first_line(error)})")
    if lost_process(error):
        return RunStopped(f"{LOST}. {kept}")
    if isinstance(error, OSError):
        where, reason = error.filename or config.output_dir, error.strerror or first_line(error)
        return RunStopped(f"{where} could not be written ({reason}); make room or mend it. {kept}")
    return None


def _memory_advice(config: TrainingConfig) -> str:
    """The numbers that make up the memory, and the smallest change that keeps the mathematics."""
    c, m = config, config.model_config
    numbers = (
        f"batch_size {c.batch_size} × seq_len {c.seq_len} × n_embd {m.n_embd} × n_layer {m.n_layer} "
        "is more than fits"
    )
    if c.batch_size == 1:
        return f"{numbers}; batch_size is 1 already, so make seq_len, n_embd or n_layer smaller"
    factor = next(k for k in range(2, c.batch_size + 1) if c.batch_size % k == 0)
    return (
        f"{numbers}; give --set batch_size={c.batch_size // factor} "
        f"grad_accumulation_steps={c.grad_accumulation_steps * factor}, which keeps the mathematics"
    )
