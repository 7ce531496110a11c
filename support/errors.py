"""Errors that a person can mend: one sentence and an exit status, never a traceback."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager, suppress


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and the remedy."""

    status = 2


class RunStopped(UserError):
    """A run that cannot go on. The message says why, what is kept, and the remedy."""

    status = 1


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextmanager
def exit_on_user_error():
    """Print an error as `error: …` to stderr and leave with its exit status; Ctrl-C leaves with 130."""
    with _unbreakable_output():
        try:
            yield
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except Exception as error:
            message = as_user_error(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(message.status) from None


def as_user_error(error: Exception, memory_advice: str = ": take a smaller batch_size") -> UserError | None:
    """The error as a sentence for the person, or None for one that only a traceback explains."""
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        return RunStopped(f"out of memory{memory_advice} ({first_line(error)})")
    if isinstance(error, OSError):
        reason = error.strerror or first_line(error)
        return RunStopped(f"{error.filename or 'a file'}: {reason}; make room or mend it, then try again")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a device; PyTorch says so in several ways."""
    words = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(str(error)[:1000].split())[:120] or type(error).__name__


def in_background(action: Callable) -> Future:
    """What `action()` will return or raise; `result(seconds)` waits for it so long at most, it may then go on."""
    outcome = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


class _Unbreakable:
    """A text stream that nobody has to read: what it cannot take (`| head -1`, a full disk) is dropped."""

    def __init__(self, stream):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (None: closed from the start)
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")  # a character that the terminal lacks is no reason to stop

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:  # what stands in its buffer goes nowhere then, also when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextmanager
def _unbreakable_output():
    """In this block no print fails."""
    former = sys.stdout, sys.stderr
    streams = [_Unbreakable(stream) for stream in former]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = former
        for stream in streams:
            stream.flush()
