"""Errors that the user can fix, reported in one sentence, and command lines that do the same."""

import argparse
import errno
import inspect
import io
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """Bad input. The message says in one sentence what is wrong, where, and how to fix it."""

    status = 2


class RunStopped(UserError):
    """A run that cannot continue. The message says why, what was saved, and what to do."""

    status = 1


def require(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def exit_on_user_error():
    """Run a command: print a UserError as `error: …` on stderr and exit with its status; Ctrl-C exits with 130.

    The command ends quietly if nobody reads its output any more (a closed pipe or terminal).
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed before the start, as for a daemon
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console may lack a character of a generated text
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO) and error.filename is None:
            raise SystemExit(1) from None
        error = as_user_error(error)
        rank = os.environ.get("RANK", "0")  # of torchrun
        if rank == "0" or error.status == 1:  # all processes read the same input
            print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # Python would try again when it exits, and report the failure
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def as_user_error(error: Exception) -> UserError:
    """The error as a message for the user; a bug, which needs its traceback, is raised again."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, NotImplementedError) and "not written yet" in str(error):  # the student's edition
        return UserError(f"{error}")
    if is_out_of_memory(error):
        remedy = "use a smaller batch_size (in training with more grad_accumulation_steps) or model"
        return RunStopped(f"out of memory ({first_line(error)}); {remedy}")
    if isinstance(error, FloatingPointError):
        remedies = "a lower max_lr, more num_warmup_steps, or grad_clip=1.0"
        return RunStopped(f"diverged: {error}. Likely remedies, with --fresh: {remedies}")
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some disk space" if full else "check the path and its permissions"
        problem = f"{error.filename or 'a file'}: {error.strerror or first_line(error)}"
        return RunStopped(f"{problem}; {remedy}, then retry")
    raise error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of a GPU is exhausted."""
    # PyTorch raises a plain RuntimeError where the CPU's memory is exhausted: only its text says so.
    words = "out of memory|can't allocate memory|Storage size calculation overflowed"
    in_pytorch = isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
    return in_pytorch or isinstance(error, MemoryError)


def accepted(function: Callable, **options) -> dict:
    """Those of the options that the function takes: a student's own function may have none of ours."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in options.items() if takes_all or name in names}


def first_line(error: BaseException) -> str:
    """The first 200 characters of the error's text, on one line."""
    return " ".join(str(error)[:1000].split())[:200] or type(error).__name__


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake in one line, with the flag that may be meant; takes --dry-run and --dry_run alike."""

    def parse_args(self, args: list[str] | None = None, namespace=None) -> argparse.Namespace:
        """As argparse does, but the name of a known flag may have hyphens or underscores."""
        flags = {flag.replace("-", "_"): flag for flag in self._option_string_actions}
        spelled = []
        for argument in sys.argv[1:] if args is None else args:
            name, equals, value = argument.partition("=")
            if name.startswith("--"):  # values stay as they are
                name = flags.get(name.replace("-", "_"), name)
            spelled.append(name + equals + value)
        namespace, unknown = self.parse_known_args(spelled, namespace)
        if unknown:
            near = get_close_matches(unknown[0].partition("=")[0].replace("-", "_"), flags, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {flags[near[0]]}?" if near else ""))
        for name, value in vars(namespace).items():  # with an unset variable, --evaluate "$FILE" would train
            if value == "":
                self.error(f"argument {name}: empty; give a value or leave it out")
        return namespace

    def error(self, message: str) -> None:
        """Exit with status 2."""
        self.exit(2, f"error: {message} (--help lists the options)\n")


def _number(kind: type, least: float, most: float, wanted: str):
    """A type for argparse: a number of this kind within these bounds."""

    def convert(text: str):
        try:
            if least <= kind(text) <= most:
                return kind(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text}: expected {wanted}")

    return convert


positive_int = _number(int, 1, math.inf, "a whole number of 1 or more")
seed = _number(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1")
temperature = _number(float, 0, sys.float_info.max, "0 (greedy) or more")
probability_mass = _number(float, 1.2e-38, 1, "more than 0 in float32, at most 1")
