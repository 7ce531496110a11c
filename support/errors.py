"""Errors that the user can fix: one sentence and an exit status instead of a traceback."""

import errno
import re
import sys
from contextlib import contextmanager

from support.screen import make_output_fail_safe


class UserError(Exception):
    """Bad input. The message says in one sentence what is wrong, where, and how to fix it."""

    status = 2
    on_all_processes = False  # True: one process reports it for all


class RunStopped(UserError):
    """A run that cannot continue. The message says why, what was saved, and what to do."""

    status = 1

    def __init__(self, message: str, on_all_processes: bool = False):
        super().__init__(message)
        self.on_all_processes = on_all_processes


def require(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def exit_on_user_error():
    """Run a command: print a UserError as `error: …` on stderr and exit with its status; Ctrl-C exits with 130."""
    make_output_fail_safe()
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


def as_user_error(
    error: Exception, memory_remedy: str = ": use a smaller model or batch_size"
) -> UserError | None:
    """The error as a message for the user, or None if it is a bug, which needs its traceback."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, NotImplementedError) and "not written yet" in str(error):  # the student's edition
        return UserError(f"{error}")
    if is_out_of_memory(error):
        return RunStopped(f"out of memory{memory_remedy} ({first_line(error)})")
    if isinstance(error, OSError):
        remedy = "free some disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix that"
        problem = f"{error.filename or 'a file'}: {error.strerror or first_line(error)}"
        return RunStopped(f"{problem}; {remedy}, then retry")
    return None


@contextmanager
def out_of_memory_means(advice: str):
    """Let memory that runs out in the block end the command in one sentence with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise as_user_error(error, f": {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of a GPU is exhausted."""
    # PyTorch raises a plain RuntimeError where the CPU's memory is exhausted: only its text says so.
    words = "out of memory|can't allocate memory|Storage size calculation overflowed"
    in_pytorch = isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
    return in_pytorch or isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """The first 200 characters of the error's text, on one line."""
    return " ".join(str(error)[:1000].split())[:200] or type(error).__name__
