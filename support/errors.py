"""Errors that a person can mend: one sentence on the screen and exit status 2, never a traceback."""

import sys
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and the remedy."""


@contextmanager
def exit_on_user_error():
    """Print a UserError to stderr as `error: …` and leave with exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def did_you_mean(name, known) -> str:
    """The nearest known name as a hint for an error message, or the whole list when none is near."""
    near = get_close_matches(str(name), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known are: {', '.join(known)}"


def check(condition: bool, sentence: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)
