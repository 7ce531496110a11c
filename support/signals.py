"""SIGINT and SIGTERM during a training run."""

import os
import signal
from contextlib import suppress


class StopSignals:
    """SIGINT and SIGTERM in a with block: the first one waits for the end of the step, a second one stops now.

    While `deferring`, the first signal only sets `number`; otherwise it raises SystemExit with the status that
    shells use, 128 + number.
    """

    def __init__(self, announced: bool):
        self.announced = announced
        self.number = 0
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
        self.__exit__()  # a second signal gets the usual handlers
        if not self.deferring:
            raise SystemExit(128 + number)
        self.number = number
        if self.announced:
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, b"\nStopping after this step (press Ctrl-C again to stop now).\n")
