"""What the commands print: a header with the facts, texts, and the next command to type.

Colour goes to terminals only, and not where NO_COLOR is set (https://no-color.org).
"""

import os
import shutil
import sys
import textwrap


def _style(code: str, text: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\033[{code}m{text}\033[0m"


def bold(text: str) -> str:
    """The text in bold type on a terminal."""
    return _style("1", text)


def dim(text: str) -> str:
    """The text in faint type on a terminal."""
    return _style("2", text)


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 110)


def heading(title: str) -> None:
    """A title with a rule across the screen."""
    print(f"\n{bold(title)} {dim('─' * max(3, _width() - len(title) - 1))}")


def show_facts(facts: dict[str, str]) -> None:
    """One `name  value` line each, names aligned, long values wrapped under themselves."""
    column = max(map(len, facts)) + 4
    for name, value in facts.items():
        lines = textwrap.wrap(value, max(30, _width() - column), break_long_words=False) or [""]
        print("  " + dim(name.ljust(column - 2)) + ("\n" + " " * column).join(lines))
    print(flush=True)


def show_note(note: str) -> None:
    """A line that must not be missed."""
    for line in textwrap.wrap(note, _width() - 2):
        print(f"  {_style('1;33', line)}")
    print(flush=True)


def show_text(prompt: str, continuation: str) -> None:
    """A prompt in faint type and its continuation in bold, line breaks shown as ⏎."""
    prompt, continuation = (text.replace("\n", " ⏎ ") for text in (prompt, continuation))
    print(f"  {dim(prompt)}{bold(continuation)}\n")


def next_commands(*commands: str) -> None:
    """Suggest the commands to run next."""
    print(dim("\nNext:"))
    for command in commands:
        print(f"  {command}")


def count(number: float, unit: str) -> str:
    """A large number with three digits and its unit: 1.64 M tokens."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix} {unit}"
    return f"{number:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time in a readable unit."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
