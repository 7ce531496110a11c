"""What the commands print: facts, notes and texts, on streams that never stop a command."""

import io
import os
import sys

from tqdm import tqdm


def bold(text: str) -> str:
    """The text in bold type on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\033[1m{text}\033[0m"


def heading(title: str) -> None:
    """A title above what follows."""
    print(f"\n{bold(title)}")


def show_facts(facts: dict[str, str]) -> None:
    """One `name  value` line each, values aligned."""
    column = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"  {name:<{column}}{value}")
    print(flush=True)


def show_note(note: str) -> None:
    """A line that must not be missed, such as a warning; it does not break a progress bar."""
    tqdm.write(f"  {bold(note)}\n")


def show_text(prompt: str, continuation: str) -> None:
    """A prompt and its continuation in bold, indented."""
    prompt, continuation = (text.replace("\n", "\n  ") for text in (prompt, continuation))
    print(f"  {prompt}{bold(continuation)}\n")


def count(number: float, unit: str) -> str:
    """A large number with three digits and its unit: 1.64 M tokens."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:  # three digits would round up to it
            return f"{number / factor:.3g} {prefix} {unit}"
    return f"{number:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time in a readable unit."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def make_output_fail_safe() -> None:
    """Let stdout and stderr drop what they cannot write: a pipe's reader is gone, the disk is full.

    Streams that something else has replaced already, such as pytest or a notebook, are left alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, as with `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            file = io.BufferedWriter(_DroppingFile(stream.fileno(), "w", closefd=False))
            text = io.TextIOWrapper(file, encoding=stream.encoding, errors="replace", line_buffering=True)
            setattr(sys, name, text)


class _DroppingFile(io.FileIO):
    """A file that ignores errors while writing."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)
