"""What stops a training run from outside: signals and too little memory."""

import os
import signal
from contextlib import suppress

import torch

from support.config import ModelConfig, TrainingConfig
from support.errors import require

BYTES_PER_PARAMETER = 16  # float32 weight, gradient and AdamW's two moments


class StopSignals:
    """SIGINT and SIGTERM inside the block: the first one ends the step in hand, a second one stops at once.

    While `deferring`, the first signal only leaves its `number`; otherwise it raises SystemExit with the
    shell's status, 128 + number.
    """

    def __init__(self, announced: bool):
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
            signal.signal(number, handler)

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
    needed = BYTES_PER_PARAMETER * n_parameters
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    require(
        needed < there,
        f"model_config = {vars(config)} makes {n_parameters:.3g} parameters; training takes {needed / 1e9:.3g} GB "
        f"for them, but {device} has {there / 1e9:.3g} GB; make the model smaller",
    )


def memory_advice(c: TrainingConfig) -> str:
    """The numbers that make up the memory, and the smallest change that keeps the mathematics."""
    m = c.model_config
    numbers = f"batch_size {c.batch_size} × seq_len {c.seq_len} × n_embd {m.n_embd} × n_layer {m.n_layer}"
    if c.batch_size == 1:
        return f"{numbers} is more than fits; make one of the others smaller"
    factor = next(k for k in range(2, c.batch_size + 1) if c.batch_size % k == 0)
    return (
        f"{numbers} is more than fits; give --set batch_size={c.batch_size // factor} "
        f"grad_accumulation_steps={c.grad_accumulation_steps * factor}, which keeps the mathematics"
    )
