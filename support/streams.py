"""Standard output that never stops a command, whether it is a closed pipe, a full disk or an ASCII terminal."""

import io
import os
import sys
from typing import TextIO


def make_output_fail_safe() -> None:
    """Replace sys.stdout and sys.stderr by streams that drop what they cannot write.

    Streams that something else has replaced already, such as pytest or a notebook, are left alone.
    """
    sys.stdout = _fail_safe(sys.stdout, sys.__stdout__)
    sys.stderr = _fail_safe(sys.stderr, sys.__stderr__)


def _fail_safe(stream: TextIO | None, original: TextIO | None) -> TextIO:
    if stream is None:  # closed by the shell, as with `>&-`
        return open(os.devnull, "w", encoding="utf-8")
    if stream is not original:
        return stream
    file = io.BufferedWriter(_DroppingFile(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, encoding=stream.encoding, errors="replace", line_buffering=True)


class _DroppingFile(io.FileIO):
    """A file that ignores errors while writing, such as those of a closed pipe (`| head -1`) or a full disk."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)
