"""Command lines: a parser with one-line errors, and argument types for its `type=`."""

import argparse
import math
import re
import sys


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake on the command line in one line, without the usage; takes --dry-run for --dry_run."""

    def parse_args(self, args: list[str] | None = None, namespace=None) -> argparse.Namespace:
        """As argparse does; hyphens in a flag's name are read as underscores."""
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--\w[\w-]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in args]
        return super().parse_args(args, namespace)

    def error(self, message: str) -> None:
        """Exit with status 2."""
        self.exit(2, f"error: {message} (--help lists the options)\n")


# For text that is not a number, argparse turns the ValueError into "invalid positive_int value: 'x'".


def positive_int(text: str) -> int:
    """A whole number of 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 to 2^63 - 1."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text}: give 0 to 2^63 - 1")
    return int(text)


def temperature(text: str) -> float:
    """A finite number of 0 or more."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give 0 (greedy) or more")
    return float(text)


def probability_mass(text: str) -> float:
    """A number in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give more than 0, at most 1")
    return float(text)
