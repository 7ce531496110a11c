"""Assertions for the student's tests: the first line of a failure names the likely mistake.

Each test states the correct value. `mistakes` maps the name of a common mistake to the value that it would have
given; tests/mistakes/ has them. stand_ins.py has correct parts in place of a solution's own, conftest.py the
tokenizer and the random weights, and points.py prints the table.
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
        if isinstance(error, NotImplementedError):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise AssertionError(f"{what}, got {type(error).__name__} ({reason}); {hint}") from error


def check_close(actual, expected, what, mistakes: dict | None = None, hint="", atol=1e-5, rtol=1e-5):
    """Assert that two tensors (or what torch.as_tensor takes) have one shape and agree up to atol and rtol.

    Args:
        what: the value under test, as the subject of the message.
        mistakes: the one that equals `actual` is named.
        hint: what to look at when `actual` equals none of the mistakes.
    """
    __tracebackhide__ = True
    expected = _as_float64(expected)
    description = f"a tensor of shape {tuple(expected.shape)}" if expected.dim() else f"{expected.item():.6g}"
    try:
        values = None if actual is None or _has_tensors(actual) else _as_float64(actual)
    except (TypeError, ValueError, RuntimeError):  # torch.as_tensor raises these for what is not a number
        values = None
    if values is None:
        raise AssertionError(f"{what}: expected {description}, got {_described(actual)}")
    actual = values
    wrong = {name: _as_float64(value) for name, value in (mistakes or {}).items()}
    same = [name for name, value in wrong.items() if _is_close(value, expected, atol, rtol)]
    if _is_close(actual, expected, atol, rtol):
        if same:  # the inputs tell them apart, so something that they depend on has no effect
            raise AssertionError(
                f"{what}: as expected, but '{same[0]}' gives the same: is a part of the model skipped?"
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
        raise AssertionError(f"{what}: expected a tensor of shape {expected}, got {_described(actual)}")
    check_equal(tuple(actual.shape), expected, f"shape of {what}", mistakes, hint)


def check_rows(model, call, batch_size, n_rows):
    """Assert that the model embeds at most batch_size rows at once while `call` runs."""
    __tracebackhide__ = True
    seen = []
    model.token_embeddings.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    call()
    wrong = {"batch_size is ignored: all rows go through the model at once": n_rows}
    most = max(seen, default=0)
    check_equal(max(most, batch_size), batch_size, f"rows at once with batch_size = {batch_size}", wrong)


def nearest(actual, candidates: list[torch.Tensor]) -> torch.Tensor:
    """The one of several correct values that is closest to `actual`, to compare it with."""
    if not isinstance(actual, torch.Tensor) or actual.shape != candidates[0].shape:
        return candidates[0]
    return min(candidates, key=lambda candidate: (actual - candidate).abs().nan_to_num(torch.inf).max().item())


def distinct_values(tensor: torch.Tensor) -> list[float]:
    """The distinct values of a tensor in ascending order, at most five of them."""
    return tensor.detach().unique().tolist()[:5]


def _described(value) -> str:
    """What a value that is no tensor is, with a guess where it comes from."""
    if value is None:
        return "None: is the return missing?"
    if value is ...:
        return "'...': this part is not written yet"
    if _has_tensors(value):
        return f"a {type(value).__name__} of {len(value)}: return the tensor alone"
    return f"a {type(value).__name__}"


def _has_tensors(value) -> bool:
    return isinstance(value, (tuple, list)) and any(getattr(part, "ndim", 0) > 0 for part in value)


def _guess(matching: list[str], hint: str) -> str:
    if matching:
        return f"; looks like: {' or '.join(matching)}"
    return f"; {hint}" if hint else ""


def _as_float64(value) -> torch.Tensor:
    return torch.as_tensor(value).detach().cpu().to(torch.float64)


def _is_close(a: torch.Tensor, b: torch.Tensor, atol: float, rtol: float) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=atol)
