"""Standard output and error that never stop a run: nobody has to read them."""

import os
import sys
from contextlib import contextmanager, suppress


class _Unbreakable:
    """A text stream whose reader may go away (`| head -1`) or whose disk may fill: the rest is dropped."""

    def __init__(self, stream):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal lacks is no reason to stop

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Let this stream, and what stands in its buffer, go nowhere from now on."""
        with suppress(OSError):  # a stream without a descriptor, as in a test, just stays broken
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextmanager
def unbreakable_output():
    """In this block no print fails, also where standard output or error was closed from the start."""
    former = sys.stdout, sys.stderr
    nowhere = [open(os.devnull, "w") for stream in former if stream is None]  # noqa: SIM115
    sys.stdout, sys.stderr = (_Unbreakable(stream or nowhere.pop()) for stream in former)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = former
