"""Assertions for the student's tests: the first line of a failure names the likely mistake.

`mistakes` maps the name of a common mistake to the value that it would have given. Each test states the right
value; the catalogues of mistakes are in tests/mistakes/.
"""

from contextlib import contextmanager

import torch


@contextmanager
def explained(what: str, hint: str, *errors: type[Exception]):
    """Turn one of these errors of the student's code into a failure that says what was expected, and a hint."""
    __tracebackhide__ = True
    try:
        yield
    except errors as error:
        if "is not written yet" in str(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise AssertionError(f"{what}, got {type(error).__name__} ({reason}); {hint}") from error


def check_close(
    actual,
    expected,
    what: str,
    mistakes: dict | None = None,
    hint: str = "",
    atol: float = 1e-5,
    rtol: float = 1e-5,
):
    """Assert that two tensors (or what torch.as_tensor takes) have one shape and agree up to atol and rtol.

    Args:
        what: the value under test, as the subject of the message.
        mistakes: the one that equals `actual` is named.
        hint: what to look at when `actual` equals none of the mistakes.
    """
    __tracebackhide__ = True
    expected = _as_float64(expected)
    description = f"a tensor of shape {tuple(expected.shape)}" if expected.dim() else f"{expected.item():.6g}"
    if actual is None:
        raise AssertionError(f"{what}: expected {description}, got None: is the return missing?")
    try:
        actual = _as_float64(actual)
    except (TypeError, ValueError, RuntimeError):  # torch.as_tensor raises these for what is not a number
        raise AssertionError(f"{what}: expected {description}, got a {type(actual).__name__}") from None
    wrong = {name: _as_float64(value) for name, value in (mistakes or {}).items()}
    same = [name for name, value in wrong.items() if _is_close(value, expected, atol, rtol)]
    if _is_close(actual, expected, atol, rtol):
        if same:  # the inputs tell right from wrong, so something that they depend on has no effect
            raise AssertionError(
                f"{what}: right, but no different from '{same[0]}': is a part of the model skipped?"
            )
        return
    n_nan = int((actual.isnan() & ~expected.isnan()).sum()) if actual.shape == expected.shape else 0
    numbers = torch.where(actual.isnan(), 0.0, actual)  # the catalogues have 0 where a softmax of -inf gives NaN
    matching = [name for name in wrong if name not in same and _is_close(numbers, wrong[name], atol, rtol)]
    if n_nan:
        hint = f"{n_nan} of {actual.numel()} are NaN: softmax of a row of -inf, or 0/0?"
    if actual.shape != expected.shape:
        guess = _guess(matching, "")
        raise AssertionError(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}{guess}")
    difference = (actual - expected).abs()
    difference[actual == expected] = 0.0  # equal infinities
    difference[difference.isnan()] = torch.inf
    place = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    at = f" at {place}" if place else ""
    right, got = expected[tuple(place)].item(), actual[tuple(place)].item()
    raise AssertionError(f"{what}: expected {right:.6g}{at}, got {got:.6g}{_guess(matching, hint)}")


def check_equal(actual, expected, what: str, mistakes: dict | None = None, hint: str = ""):
    """Assert that two numbers, strings, lists or shapes are equal; the arguments are those of check_close."""
    __tracebackhide__ = True
    if actual != expected:
        matching = [name for name, wrong in (mistakes or {}).items() if wrong == actual]
        shown = f"{actual}" if len(f"{actual}") <= 200 else f"{actual}"[:200] + " …"
        raise AssertionError(f"{what}: expected {expected}, got {shown}{_guess(matching, hint)}")


def check_shape(actual, expected: tuple, what: str, mistakes: dict | None = None, hint: str = ""):
    """Assert that `actual` is a tensor of this shape; the arguments are those of check_close."""
    __tracebackhide__ = True
    if not isinstance(actual, torch.Tensor):
        missing = ": is the return missing?" if actual is None else ""
        raise AssertionError(f"{what}: expected shape {expected}, got {type(actual).__name__}{missing}")
    check_equal(tuple(actual.shape), expected, f"shape of {what}", mistakes, hint)


def distinct_values(tensor: torch.Tensor) -> list[float]:
    """The distinct values of a tensor in ascending order, at most five of them."""
    return tensor.detach().unique().tolist()[:5]


def _guess(matching: list[str], hint: str) -> str:
    if matching:
        return f"; looks like: {' or '.join(matching)}"
    return f"; {hint}" if hint else ""


def _as_float64(value) -> torch.Tensor:
    return torch.as_tensor(value).detach().cpu().to(torch.float64)


def _is_close(a: torch.Tensor, b: torch.Tensor, atol: float, rtol: float) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=atol)
