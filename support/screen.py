"""What the commands print: headings, facts, notes, texts, and commands to type next."""

import os
import shlex
import shutil
import sys
import textwrap

from tqdm import tqdm

from support.files import ROOT


def bold(text: str) -> str:
    """The text in bold type on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\033[1m{text}\033[0m"


def heading(title: str) -> None:
    """A title above what follows."""
    print(f"\n{bold(title)}", flush=True)


def show_facts(facts: dict[str, str]) -> None:
    """One `name  value` line each, values aligned and, on a terminal, wrapped at spaces."""
    column = max(map(len, facts)) + 4
    for name, value in facts.items():
        print(f"  {name}".ljust(column) + wrapped(value, column))
    print(flush=True)


def wrapped(text: str, indent: int) -> str:
    """The text, on a terminal wrapped at spaces, with further lines indented."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    lines = textwrap.wrap(text, max(width - indent - 1, 20), break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * indent).join(lines)


def show_note(note: str) -> None:
    """A line that must not be missed, such as a warning; it does not break a progress bar."""
    tqdm.write(f"  {bold(wrapped(note, 2))}\n")


def show_text(prompt: str, continuation: str) -> None:
    """A prompt and its continuation in bold, indented."""
    prompt, continuation = (text.replace("\n", "\n  ") for text in (prompt, continuation))
    print(f"  {prompt}{bold(continuation)}\n")


def command(script: str, *arguments: str | os.PathLike) -> str:
    """The command line that runs one of the package's scripts from the current folder."""
    path = script if os.path.samefile(os.curdir, ROOT) else str(ROOT / script)
    return shlex.join(["python", path, *map(str, arguments)])


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
