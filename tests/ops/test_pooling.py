"""Windows, means and maxima: random geometries against loops, and the conventions at the edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, grad, ops
from mini_nn.check import check_grads
from tests.support import assert_close, host


def numbers(xp: Any, *shape: int, seed: int = 0, dtype: str = "float64") -> Any:
    return xp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype=dtype)


@st.composite
def pools(draw: Any, dilated: bool) -> tuple[Any, dict[str, Any]]:
    """A size over one axis or two, and options of a pooling that fit."""
    axes = draw(st.sampled_from([1, 2]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    kernel, stride = each(1, 4), draw(st.one_of(st.none(), st.just(each(1, 3))))
    dilation = each(1, 2) if dilated else (1,) * axes
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, n // 2)) for n in reach)
    size = tuple(n + draw(st.integers(0, 4)) for n in reach)
    options = {"kernel_size": kernel, "stride": stride, "padding": padding}
    options["ceil_mode"] = draw(st.booleans())
    return size, options | ({"dilation": dilation} if dilated else {})


def windows(
    size: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, dilation: Any
) -> Iterator[tuple[Any, list[Any], int]]:
    """For each window in turn its place, its pixels, and its area with the padding."""
    starts = []
    for n, k, s, p, d in zip(
        size, kernel_size, stride or kernel_size, padding, dilation, strict=True
    ):
        last = n + p - d * (k - 1) - 1  # the last start at which the window does not hang over
        firsts = range(-p, last + 1, s)
        if ceil_mode and (not firsts or firsts[-1] < last) and -p + len(firsts) * s < n:
            firsts = range(-p, -p + len(firsts) * s + 1, s)
        starts.append(list(enumerate(firsts)))
    for cell in itertools.product(*starts):
        place, first = tuple(i for i, _ in cell), [start for _, start in cell]
        taps = [
            range(f, f + d * (k - 1) + 1, d)
            for f, k, d in zip(first, kernel_size, dilation, strict=True)
        ]
        pixels = [at for at in itertools.product(*taps) if _inside(at, size)]
        area = math.prod(
            min(f + k, n + p) - f
            for f, k, n, p in zip(first, kernel_size, size, padding, strict=True)
        )
        yield place, pixels, area


def _inside(at: Any, size: Any) -> bool:
    return all(0 <= i < n for i, n in zip(at, size, strict=True))


@given(pools(dilated=False), st.booleans())
def test_means_of_any_geometry(xp: Any, drawn: Any, include: bool) -> None:
    size, options = drawn
    x = numbers(xp, 2, 3, *size)
    pool = ops.avg_pool1d if len(size) == 1 else ops.avg_pool2d
    y = pool(x, **options, count_include_pad=include)
    rows = list(windows(size, **options, dilation=(1,) * len(size)))
    assert y.shape == (2, 3, *(1 + i for i in rows[-1][0]))
    assert math.prod(y.shape[2:]) == len(rows)
    transpose = np.zeros((2, 3, *size))
    leaf, z = Tensor(x, requires_grad=True), numbers(xp, *y.shape, seed=1)
    for place, pixels, area in rows:
        divisor = area if include else len(pixels)
        mean = sum(host(x)[(..., *at)] for at in pixels) / divisor
        assert_close(host(y)[(..., *place)], mean, atol=1e-12)
        for at in pixels:
            transpose[(..., *at)] += host(z)[(..., *place)] / divisor
    (gx,) = grad(pool(leaf, **options, count_include_pad=include), leaf, z)
    assert_close(gx, transpose, atol=1e-12)


@given(pools(dilated=True), st.integers(1, 100))
def test_maxima_of_any_geometry(xp: Any, drawn: Any, seed: int) -> None:
    """Few different numbers, so that there are ties: the first of them gets the gradient."""
    size, options = drawn
    x = np.random.default_rng(seed).integers(-2, 3, (2, *size)).astype("float64")
    pool = ops.max_pool1d if len(size) == 1 else ops.max_pool2d
    leaf = Tensor(xp.asarray(x), requires_grad=True)
    y = pool(leaf, **options)
    z = numbers(xp, *y.shape, seed=1)
    (gx,) = grad(y, leaf, z)
    expected, transpose = np.full(y.shape, np.nan), np.zeros(x.shape)
    for (place, pixels, _), c in itertools.product(windows(size, **options), range(2)):
        best = max(pixels, key=lambda at: x[(c, *at)], default=None)
        expected[(c, *place)] = -np.inf if best is None else x[(c, *best)]
        if best is not None:
            transpose[(c, *best)] += host(z)[(c, *place)]
    assert_close(y, expected)
    assert_close(gx, transpose, atol=1e-12)


def test_sharing_a_tie_is_not_the_convention(xp: Any) -> None:
    x = Tensor(xp.zeros((1, 1, 2, 2)), requires_grad=True)
    (gx,) = grad(ops.max_pool2d(x, 2), x, xp.ones((1, 1, 1, 1)))
    assert_close(gx, np.array([[[[1.0, 0.0], [0.0, 0.0]]]]))
    (shared,) = grad(ops.max(x), x)
    assert_close(shared, np.full((1, 1, 2, 2), 0.25))


def test_nan_and_infinities(xp: Any) -> None:
    nan, inf = float("nan"), float("inf")
    x = Tensor(xp.asarray([[[1.0, nan, 3.0, -inf, -inf, inf]]]), requires_grad=True)
    y = ops.max_pool1d(x, 2, stride=1)
    assert_close(y, np.array([[[nan, nan, 3.0, -inf, inf]]]))
    (gx,) = grad(y, x, xp.asarray([[[1.0, 2.0, 4.0, 8.0, 16.0]]]))
    assert_close(gx, np.array([[[0.0, 3.0, 4.0, 8.0, 0.0, 16.0]]]))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: ops.max_pool2d(x, (2, 3), (1, 2), 1),
        lambda x: ops.max_pool2d(x, 2, 2, 0, 2, True),
        lambda x: ops.avg_pool2d(x, (2, 3), (1, 2), 1, True, False),
        lambda x: ops.avg_pool2d(x, 3, divisor_override=5),
        lambda x: ops.unfold(x, (2, 3), (1, 2), 1, 2),
    ],
)
def test_derivatives_to_order_two(xp: Any, pool: Any) -> None:
    values = np.random.default_rng(0).permutation(210) * 0.1  # no ties within a step
    check_grads(pool, xp.asarray(values.reshape(2, 3, 5, 7)))


def test_fold_to_order_two(xp: Any) -> None:
    check_grads(lambda x: ops.fold(x, (4, 5), (2, 3), 1, 1, (1, 2)), numbers(xp, 2, 12, 15))


# What they equal


def test_a_window_over_everything(xp: Any) -> None:
    x = numbers(xp, 2, 3, 4, 5)
    assert_close(ops.max_pool2d(x, (4, 5))[..., 0, 0], host(x).max(axis=(2, 3)))
    assert_close(ops.avg_pool2d(x, (4, 5))[..., 0, 0], host(x).mean(axis=(2, 3)), atol=1e-12)
    assert_close(ops.max_pool2d(x, 1), x)
    assert_close(ops.avg_pool2d(x, 1), x)


def test_a_mean_is_a_convolution_with_one_number(xp: Any) -> None:
    x = numbers(xp, 2, 3, 6, 5)
    kernel = xp.full((3, 1, 3, 2), 1 / 6)
    assert_close(
        ops.avg_pool2d(x, (3, 2), (2, 1), 1),
        ops.conv2d(x, kernel, None, (2, 1), 1, 1, 3),
        atol=1e-12,
    )
    total = ops.avg_pool2d(x, (3, 2), (2, 1), 1, divisor_override=1)
    assert_close(total, ops.conv2d(x, kernel * 6, None, (2, 1), 1, 1, 3), atol=1e-12)


def test_a_maximum_goes_through_an_increasing_function(xp: Any) -> None:
    """max f(x) = f(max x); the mean of a convex function is above the function of the mean."""
    x = numbers(xp, 1, 2, 6, 6)
    assert_close(ops.max_pool2d(xp.exp(x), 3, 2, 1), xp.exp(ops.max_pool2d(x, 3, 2, 1)))
    assert (ops.avg_pool2d(xp.exp(x), 3, 2) >= xp.exp(ops.avg_pool2d(x, 3, 2))).all()


def test_where_a_column_of_unfold_comes_from(xp: Any) -> None:
    """Channel by channel, the window row by row; the windows row by row: torch's order."""
    x = xp.arange(24.0).reshape(1, 2, 3, 4)
    columns = host(ops.unfold(x, 2))[0]
    assert columns.shape == (8, 6)
    assert columns[:, 0].tolist() == [0, 1, 4, 5, 12, 13, 16, 17]
    assert columns[0].tolist() == [0, 1, 2, 4, 5, 6]
    assert_close(ops.unfold(x[0], 2), columns)


def test_fold_adds_up_what_unfold_took(xp: Any) -> None:
    """fold(unfold(x)) = x times the number of windows that each pixel is in."""
    x, options = numbers(xp, 2, 3, 5, 6), {"kernel_size": (3, 2), "padding": 1, "stride": (2, 1)}
    counts = np.zeros((5, 6))
    for i, j in itertools.product(range(-1, 4, 2), range(-1, 6)):
        counts[max(i, 0) : i + 3, max(j, 0) : j + 2] += 1
    folded = ops.fold(ops.unfold(x, **options), (5, 6), **options)
    assert_close(folded, host(x) * counts, atol=1e-12)
    assert_close(ops.fold(ops.unfold(x[0], **options), (5, 6), **options), folded[0])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes_and_no_images(xp: Any, dtype: str) -> None:
    for n, pool in itertools.product(
        (0, 2),
        (
            lambda x: ops.max_pool2d(x, 2),
            lambda x: ops.avg_pool2d(x, 2, padding=1, count_include_pad=False),
            lambda x: ops.unfold(x, 2),
            lambda x: ops.fold(ops.unfold(x, 2), (4, 4), 2),
        ),
    ):
        x = Tensor(numbers(xp, n, 3, 4, 4, dtype=dtype), requires_grad=True)
        y = pool(x)
        (gx,) = grad(y, x, y.data)
        assert y.shape[0] == n and gx.shape == x.shape
        assert str(y.dtype) == str(gx.dtype) == dtype


# What they refuse


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.max_pool2d(x, 5), r"^max_pool2d: a window 5 .*image \(4, 4\).*smaller"),
        (lambda x: ops.max_pool2d(x, 2, padding=2), r"^max_pool2d takes a padding of at most half"),
        (lambda x: ops.avg_pool2d(x, 1, padding=1), r"^avg_pool2d takes a padding of at most half"),
        (lambda x: ops.avg_pool2d(x, (2, 2, 2)), r"^avg_pool2d takes kernel_size .* 2 of them"),
        (lambda x: ops.avg_pool2d(x, 2, 0), r"^avg_pool2d takes stride .*at least 1.*got 0"),
        (lambda x: ops.avg_pool2d(x, 2, divisor_override=0), r"divisor_override"),
        (lambda x: ops.avg_pool2d(x[0, 0], 2), r"\(N, C, H, W\) or \(C, H, W\), got \(4, 4\)"),
        (lambda x: ops.avg_pool1d(x, 2), r"^avg_pool1d takes an input \(N, C, L\) or \(C, L\)"),
        (lambda x: ops.max_pool1d(x[0], 5), r"^max_pool1d: a window 5 .*image \(4,\)"),
        (lambda x: ops.unfold(x[0, 0], 2), r"^unfold takes an input \(N, C, H, W\)"),
        (lambda x: ops.unfold(x, 3, dilation=2), r"^unfold: a window 3 with dilation 2"),
        (lambda x: ops.fold(x[0], (4, 4), 2), r"^fold to \(4, 4\) takes \(N, C·4, 9\)"),
    ],
)
def test_they_say_what_does_not_fit(xp: Any, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(numbers(xp, 2, 3, 4, 4))


def test_the_largest_of_integers(xp: Any) -> None:
    with pytest.raises(TypeError, match="max_pool2d takes floating-point numbers, got int64"):
        ops.max_pool2d(xp.zeros((1, 1, 2, 2), dtype="int64"), 2)
