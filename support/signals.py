"""SIGINT and SIGTERM during a training run."""

import math
import os
import signal
import time
from contextlib import suppress


class StopSignals:
    """SIGINT and SIGTERM in a with block: the first one waits for the end of the step, a second one stops now.

    While `deferring`, the first signal only sets `number`; otherwise it raises SystemExit with the status that
    shells use, 128 + number. Under torchrun, which passes on the Ctrl-C that a terminal sends to all processes,
    what comes within a second of the first signal is the same one.
    """

    def __init__(self, announced: bool, under_torchrun: bool = False):
        self.announced, self.under_torchrun = announced, under_torchrun
        self.number = 0
        self._received = -math.inf
        self.deferring = False

    def __enter__(self) -> "StopSignals":
        # An ignored signal stays ignored: shells ignore Ctrl-C for their background jobs.
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
        if self.under_torchrun and time.monotonic() < self._received + 1:
            return
        if not self.under_torchrun:
            self.__exit__()  # a second signal gets the usual handlers
        if self.number or not self.deferring:
            raise SystemExit(128 + number)
        self.number, self._received = number, time.monotonic()
        if self.announced:
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, b"\nStopping after this step (press Ctrl-C again to stop now).\n")
