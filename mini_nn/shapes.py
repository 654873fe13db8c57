"""Executed shape comments: ``@shapes("b n d, b m d -> b n m")``.

One group of names for each positional argument, separated by commas; ``-> …`` states the result.

=============  ======================================================================
``d``          a length: whatever it is, it is the same wherever the name stands
``3``          exactly this length
``...``        any number of axes, the same wherever it stands
``_``          any length
``()``         a 0-d array
``?``          not checked (an argument without a shape, or one of several forms)
=============  ======================================================================

An argument that is None is not checked.  Checking costs some microseconds a call, so it is done
only where the environment variable ``MINI_NN_CHECK_SHAPES`` is set, as it is in the tests, or
inside ``with checking():``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_checking: ContextVar[bool | None] = ContextVar("mini_nn_check_shapes", default=None)


def enabled() -> bool:
    """Whether shapes are being checked."""
    scoped = _checking.get()
    return bool(os.environ.get("MINI_NN_CHECK_SHAPES")) if scoped is None else scoped


@contextmanager
def checking(on: bool = True) -> Iterator[None]:
    """Check shapes (or not) inside the block."""
    token = _checking.set(on)
    try:
        yield
    finally:
        _checking.reset(token)


def shapes(statement: str) -> Callable[[F], F]:
    """State the shapes of a function's positional arguments and of its result.

    Raises, when the function is called with checking on:
        ValueError: the first shape that contradicts the statement, with all that was seen.
    """
    before, _, after = statement.partition("->")
    inputs = [group.split() for group in before.split(",")]
    results = [group.split() for group in after.split(",")] if after.strip() else []

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if not enabled():
                return function(*args, **kwargs)
            bound: dict[str, Any] = {}
            for position, (axes, arg) in enumerate(zip(inputs, args, strict=False)):
                _match(function.__name__, statement, f"argument {position}", axes, arg, bound)
            result = function(*args, **kwargs)
            given = result if isinstance(result, tuple) else (result,)
            for position, (axes, value) in enumerate(zip(results, given, strict=False)):
                _match(function.__name__, statement, f"result {position}", axes, value, bound)
            return result

        return checked  # type: ignore[return-value]

    return decorate


def _match(
    name: str, statement: str, which: str, axes: list[str], value: Any, bound: dict[str, Any]
) -> None:
    if value is None or axes == ["?"]:
        return
    shape = getattr(value, "shape", None)
    if shape is None:
        raise ValueError(f"{name}: {which} is no array, where {statement!r} wants one")
    if axes == ["()"]:
        axes = []
    expected = list(axes)
    if "..." in expected:
        at = expected.index("...")
        extra = len(shape) - len(expected) + 1
        if extra >= 0:
            lead = tuple(shape[at : at + extra])
            if bound.setdefault("...", lead) != lead:
                raise ValueError(_complaint(name, statement, which, shape, bound))
            expected[at : at + 1] = [str(n) for n in lead]
    if len(expected) != len(shape):
        raise ValueError(_complaint(name, statement, which, shape, bound))
    for axis, length in zip(expected, shape, strict=True):
        if axis == "_":
            continue
        if (int(axis) if axis.isdigit() else bound.setdefault(axis, length)) != length:
            raise ValueError(_complaint(name, statement, which, shape, bound))


def _complaint(name: str, statement: str, which: str, shape: Any, bound: dict[str, Any]) -> str:
    known = ", ".join(f"{axis} = {length}" for axis, length in bound.items()) or "nothing yet"
    return f"{name}: {which} has shape {tuple(shape)}, where {statement!r} holds with {known}"
