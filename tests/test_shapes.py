"""Shape comments are executed: what contradicts them raises, with everything that was seen."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, shapes
from mini_nn.shapes import checking, enabled


@shapes("b n d, b m d -> b n m")
def scores(q: Any, k: Any, wrong: bool = False) -> Any:
    """The docstring."""
    y = q @ k.swapaxes(-1, -2)
    return y[:, :, :1] if wrong else y


def arr(*shape: int) -> Any:
    return np.zeros(shape)


@given(st.lists(st.integers(2, 4), min_size=4, max_size=4))
def test_what_fits_passes(lengths: list[int]) -> None:
    b, n, m, d = lengths
    with checking():
        assert scores(arr(b, n, d), arr(b, m, d)).shape == (b, n, m)
        tensor = scores(Tensor(arr(b, n, d)), k=arr(b, m, d))
        assert tensor.shape == (b, n, m)


@pytest.mark.parametrize(
    ("q", "k", "what"),
    [
        ((2, 3, 4), (5, 3, 4), r"argument 1 has shape \(5, 3, 4\).*b = 2, n = 3, d = 4"),
        ((2, 3, 4), (2, 3, 5), r"argument 1 has shape \(2, 3, 5\)"),
        ((3, 4), (2, 3, 4), r"argument 0 has shape \(3, 4\).*with nothing yet"),
        ((2, 3, 4, 1), (2, 3, 4), r"argument 0"),
    ],
)
def test_what_does_not_fit_is_named(q: Any, k: Any, what: str) -> None:
    with checking(), pytest.raises(ValueError, match=rf"scores: {what}") as caught:
        scores(arr(*q), arr(*k))
    assert "'b n d, b m d -> b n m'" in str(caught.value)


def test_results_are_checked_too() -> None:
    with checking(), pytest.raises(ValueError, match=r"result 0 has shape \(2, 3, 1\).*m = 4"):
        scores(arr(2, 3, 5), arr(2, 4, 5), wrong=True)


def call(statement: str, *args: Any, result: Any = None) -> None:
    with checking():
        shapes(statement)(lambda *args: result)(*args)


def fails(statement: str, *args: Any, result: Any = None) -> None:
    with pytest.raises(ValueError, match="shape"):
        call(statement, *args, result=result)


def test_fixed_lengths_and_any_length() -> None:
    call("n 3", arr(7, 3))
    fails("n 3", arr(7, 4))
    call("_ _, _", arr(2, 3), arr(4))
    fails("_ _", arr(2))


def test_ellipsis_stands_for_the_same_axes_everywhere() -> None:
    call("... d, ... e -> ...", arr(2, 3, 4), arr(2, 3, 5), result=arr(2, 3))
    call("... d", arr(4))
    call("b ... d", arr(2, 3, 4, 5))
    fails("... d, ... e", arr(2, 3, 4), arr(3, 3, 5))
    fails("... d -> ...", arr(2, 3), result=arr(3))
    fails("b ... d", arr(3))
    fails("... d d", arr(2, 3, 4))


def test_0_d_arrays() -> None:
    call("n -> ()", arr(3), result=arr())
    fails("n -> ()", arr(3), result=arr(1))
    fails("()", arr(1))


def test_what_is_not_checked() -> None:
    call("?, n", "anything", arr(3))
    call("n, n, n", arr(3), None, arr(3))
    call("n", arr(3), "more arguments than groups")
    call("n -> n, ?", arr(3), result=(arr(3), "state"))
    fails("n -> n, n", arr(3), result=(arr(3), arr(4)))


def test_an_argument_without_a_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"argument 0 is .*array"):
        call("n", [1.0, 2.0])


def test_checking_is_on_in_the_tests_and_off_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = arr(2, 3, 4), arr(5, 3, 4)
    assert os.environ["MINI_NN_CHECK_SHAPES"] and enabled()
    with pytest.raises(ValueError, match="argument 1"):
        scores(*bad)
    with checking(False):
        assert not enabled()
        with pytest.raises(ValueError, match="broadcast"):  # NumPy's own
            scores(*bad)
        with checking():
            assert enabled()
        assert not enabled()
    monkeypatch.delenv("MINI_NN_CHECK_SHAPES")
    assert not enabled()
    with checking():
        assert enabled()


def test_the_function_keeps_its_name_and_docstring() -> None:
    assert scores.__name__ == "scores" and scores.__doc__ == "The docstring."
