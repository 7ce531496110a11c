"""Calls that may hang, such as those to a server, in a thread of their own."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_background(action: Callable) -> Future:
    """Start `action()` in a daemon thread, which never delays the end of the program.

    `future.result(seconds)` waits at most that long, then raises TimeoutError; it also raises what the action
    raised.
    """
    outcome = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome
