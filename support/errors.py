"""Errors that a person can mend: a sentence on the screen and an exit status, never a traceback."""

import sys
from contextlib import contextmanager
from difflib import get_close_matches

from support.streams import unbreakable_output


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and the remedy."""

    status = 2


class RunStopped(UserError):
    """A run that cannot go on. The message says why, what is kept, and the remedy."""

    status = 1


@contextmanager
def exit_on_user_error():
    """Print an error as `error: …` to stderr and leave with its exit status; Ctrl-C leaves with 130."""
    with unbreakable_output():
        try:
            yield
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except Exception as error:
            if is_out_of_memory(error):
                error = RunStopped(f"out of memory ({first_line(error)}); take a smaller batch_size")
            elif isinstance(error, OSError):
                where = error.filename or "a file"
                error = RunStopped(f"{where}: {error.strerror or first_line(error)}; mend that and try again")
            elif not isinstance(error, UserError):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.status) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a device; PyTorch says so in several ways."""
    words = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(str(error)[:1000].split())[:120] or type(error).__name__


def did_you_mean(name, known) -> str:
    """The nearest known name as a hint for an error message, or the whole list when none is near."""
    near = get_close_matches(str(name), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known are: {', '.join(known)}"


def check(condition: bool, sentence: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)
