"""Command lines: a parser with one-line errors, and argument types for its `type=`."""

import argparse
import math


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake on the command line in one line, without the usage."""

    def error(self, message: str) -> None:
        """Exit with status 2."""
        self.exit(2, f"error: {message} (--help lists the options)\n")


def positive_int(text: str) -> int:
    """A whole number of 1 or more."""
    value = _number(int, text, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return value


def temperature(text: str) -> float:
    """A finite number of 0 or more."""
    value = _number(float, text, "a number")
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give 0 (greedy) or more")
    return value


def probability_mass(text: str) -> float:
    """A number in (0, 1]."""
    value = _number(float, text, "a number")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give more than 0, at most 1")
    return value


def _number(kind: type, text: str, what: str):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give {what}") from None
