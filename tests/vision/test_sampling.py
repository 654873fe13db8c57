"""Sampling between pixels: torch's numbers, the kernel G itself, the conventions at its kinks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, backend, grad, ops
from mini_nn.check import check_grads
from mini_nn.vision import affine_grid, bilinear_sample, grid_sample, sample_points
from mini_nn.vision.sampling import _definition
from tests.support import assert_close, host
from tests.vision.goldens import ARRAYS, answers_alike

BORDERS = ["zero_pad", "clamp_v1"]


def kernel_sum(image: Any, y: float, x: float) -> Any:
    """Σ_q G(q, p) x(q) over all pixels of (c, h, w), as it is written in the paper."""
    total = np.zeros(len(image))
    for i, j in np.ndindex(*image.shape[1:]):
        total += max(0.0, 1 - abs(i - y)) * max(0.0, 1 - abs(j - x)) * image[:, i, j]
    return total


def at(xp: Any, input: Any, y: float, x: float, border: str = "zero_pad") -> tuple[Any, Any]:
    """The sample of one image of one channel at one point, and its derivative by (y, x)."""
    points = Tensor(xp.asarray([[y, x]], dtype=input.dtype), requires_grad=True)
    out = sample_points(input, points, xp.asarray([0]), border)
    (slope,) = grad(ops.sum(out), points)
    return float(host(out)[0, 0]), host(slope)[0]


points_in = st.tuples(st.floats(-3, 7), st.floats(-3, 6))


@given(st.lists(points_in, min_size=1, max_size=5), st.integers(0, 2**32))
def test_it_is_the_kernel_of_the_paper(xp: Any, places: list[Any], seed: int) -> None:
    input = Rng(seed).normal((2, 3, 5, 4), dtype="float64")
    image = xp.arange(len(places)) % 2
    found = host(sample_points(input, xp.asarray(places, dtype="float64"), image))
    for row, (y, x), i in zip(found, places, host(image), strict=True):
        assert_close(row, kernel_sum(host(input)[i], y, x), rtol=1e-12, atol=1e-12)


@given(st.floats(0, 3.999), st.floats(0, 2.999), st.integers(0, 2**32))
def test_inside_it_is_a_convex_combination(xp: Any, y: float, x: float, seed: int) -> None:
    input = Rng(seed).normal((1, 1, 5, 4), dtype="float64")
    low, left = math.floor(y), math.floor(x)
    cell = host(input)[0, 0, low : low + 2, left : left + 2]
    for border in BORDERS:
        value, _ = at(xp, input, y, x, border)
        assert cell.min() - 1e-12 <= value <= cell.max() + 1e-12


@given(st.floats(0, 3.9), st.floats(0, 2.9), st.floats(-3, 3), st.floats(-3, 3))
def test_a_plane_is_read_exactly(xp: Any, y: float, x: float, a: float, b: float) -> None:
    i, j = np.mgrid[:5, :4]
    input = xp.asarray((a * i + b * j + 0.5)[None, None].astype("float64"))
    value, slope = at(xp, input, y, x)
    assert_close(value, a * y + b * x + 0.5, rtol=1e-12, atol=1e-12)
    assert_close(slope, np.array([a, b]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("border", BORDERS)
def test_gradients_between_pixels(xp: Any, border: str) -> None:
    rng = Rng(3)
    input = rng.normal((2, 2, 4, 3), dtype="float64")
    places = [[0.3, 1.4], [2.6, 0.5], [-0.4, 1.2], [3.3, 2.4], [1.5, 1.5], [5.2, 0.1]]
    points, image = xp.asarray(places, dtype="float64"), xp.asarray([0, 1, 0, 1, 1, 0])
    check_grads(lambda x, p: sample_points(x, p, image, border), input, points, order=2)


@pytest.mark.parametrize("border", BORDERS)
@given(st.integers(0, 2**32))
def test_the_fast_form_is_the_definition(xp: Any, border: str, seed: int) -> None:
    rng = Rng(seed)
    input, points = rng.normal((2, 3, 4, 5), dtype="float64"), rng.normal((9, 2), dtype="float64")
    points = xp.where(rng.bernoulli(0.3, (9, 2)), xp.rint(3 * points), 3 * points)
    image, g = rng.integers(0, 2, (9,)), rng.normal((9, 3), dtype="float64")
    leaves = [Tensor(input, requires_grad=True), Tensor(points, requires_grad=True)]
    fast = sample_points(*leaves, image, border)
    slow = _definition(*leaves, image, border)
    assert_close(fast, slow, rtol=1e-12, atol=1e-13)
    for a, b in zip(grad(fast, leaves, g), grad(slow, leaves, g), strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_at_a_pixel_the_derivative_is_the_one_to_the_right(xp: Any) -> None:
    input = Rng(0).normal((1, 1, 4, 4), dtype="float64")
    x = host(input)[0, 0]
    for i, j in itertools.product(range(3), range(3)):
        value, (dy, dx) = at(xp, input, float(i), float(j))
        assert value == x[i, j]
        assert_close(dy, x[i + 1, j] - x[i, j], rtol=1e-12)
        assert_close(dx, x[i, j + 1] - x[i, j], rtol=1e-12)
        if i:  # the one to the left is another number
            assert abs(dy - (x[i, j] - x[i - 1, j])) > 1e-3


def test_the_border_of_zeros(xp: Any) -> None:
    x = np.array([5.0, 1.0, 2.0, 7.0])
    input = xp.asarray(x[None, None, :, None].astype("float64"))
    for y, want, slope in (
        (-2.0, 0.0, 0.0),
        (-1.5, 0.0, 0.0),
        (-1.0, 0.0, 5.0),  # the one to the right: half a pixel further it is no longer 0
        (-0.75, 0.25 * 5, 5.0),
        (3.5, 0.5 * 7, -7.0),
        (3.999, 0.001 * 7, -7.0),
        (4.0, 0.0, 0.0),
        (1e30, 0.0, 0.0),
        (-1e30, 0.0, 0.0),
        (math.inf, 0.0, 0.0),
    ):
        value, (dy, _) = at(xp, input, y, 0.0)
        assert_close([value, dy], np.array([want, slope]), rtol=1e-9, atol=1e-12)


def test_the_border_of_the_first_release(xp: Any) -> None:
    x = np.array([5.0, 1.0, 2.0, 7.0])
    input = xp.asarray(x[None, None, :, None].astype("float64"))
    for y, want, slope in (
        (-0.75, 0.0, 0.0),
        (0.0, 5.0, -4.0),
        (2.5, 4.5, 5.0),
        (3.0, 7.0, 0.0),
        (3.999, 7.0, 0.0),
        (4.0, 0.0, 0.0),
        (-math.inf, 0.0, 0.0),
    ):
        value, (dy, _) = at(xp, input, y, 0.0, "clamp_v1")
        assert_close([value, dy], np.array([want, slope]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("border", BORDERS)
def test_nan_is_not_hidden(xp: Any, border: str) -> None:
    input = xp.ones((1, 1, 3, 3), "float64")
    points = xp.asarray([[math.nan, 1.0], [1.0, 1.0]], dtype="float64")
    found = host(sample_points(input, points, xp.asarray([0, 0]), border))
    assert math.isnan(found[0, 0])
    assert found[1, 0] == 1.0


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_outside_is_zero_whatever_the_edge_holds(xp: Any, border: str, bad: float) -> None:
    """Nothing is read there, so not even 0 · inf; and back no gradient comes, not even 0 · inf."""
    rng = Rng(0)
    pixels = host(rng.normal((2, 1, 3, 4), dtype="float64")).copy()
    pixels[:, :, [0, 0, 2, 2], [0, 3, 0, 3]] = bad
    places = [[-5.0, 1.0], [1.0, -1e30], [9.0, 9.0], [-2.5, 9.0], [1.5, math.inf], [1.0, 1.0]]
    points, image = xp.asarray(places, dtype="float64"), xp.asarray([0, 1, 0, 1, 0, 1])
    input, want = xp.asarray(pixels), np.array([[0.0]] * 5 + [[pixels[1, 0, 1, 1]]])
    assert_close(_definition(input, points, image, border), want, rtol=0)
    leaf = Tensor(input, requires_grad=True)
    out = sample_points(leaf, points, image, border)
    assert_close(out, want, rtol=0)
    (x_bar,) = grad(out, leaf, xp.asarray([[bad]] * 5 + [[1.0]]))
    want = np.zeros_like(pixels)
    want[1, 0, 1, 1] = 1.0
    assert_close(x_bar, want, rtol=0)


def test_a_pixel_without_number_shows_only_in_its_neighbourhood(xp: Any) -> None:
    pixels = host(Rng(0).normal((1, 1, 5, 5), dtype="float64")).copy()
    pixels[0, 0, 2, 2] = math.nan
    found = [
        [at(xp, xp.asarray(pixels), i + 0.25, j + 0.75)[0] for j in range(5)] for i in range(5)
    ]
    want = np.zeros((5, 5), "bool")
    want[1:3, 1:3] = True
    assert (np.isnan(np.array(found)) == want).all()


def test_each_image_has_its_own_points(xp: Any) -> None:
    rng = Rng(1)
    input, points = rng.normal((3, 2, 4, 5)), rng.uniform((3, 7, 2), -1.0, 5.0)
    found = bilinear_sample(input, points)
    for n in range(3):
        alone = sample_points(input[n : n + 1], points[n], xp.zeros(7, "int64"))
        assert_close(found[n], host(alone).T)


def test_image_numbers(xp: Any, backend_name: str) -> None:
    """Any integers; on the host one out of range is noticed, even if its point is outside."""
    input, points = (
        xp.ones((2, 1, 3, 3), "float32"),
        xp.asarray([[0.0, 1.0], [-7.0, 1.0]], "float32"),
    )
    for dtype in ("uint8", "int32"):
        found = sample_points(input, points, xp.asarray([1, 1], dtype))
        assert_close(found, np.array([[1.0], [0.0]], "float32"))
    with pytest.raises(TypeError, match="integers, got float32"):
        sample_points(input, points, points[:, 0])
    if backend_name == "numpy":
        for wrong in ([0, 2], [-1, 0], [2, 0]):
            with pytest.raises(IndexError, match="from 0 to"):
                sample_points(input, points, xp.asarray(wrong))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32))
def test_the_sparse_product_and_its_transpose(
    xp: Any, dtype: str, count: int, entries: int, size: int, seed: int
) -> None:
    """As a dense matrix W of sums over repeated numbers: W x and Wᵀ y."""
    rng = Rng(seed)
    index = rng.integers(0, size, (count, entries))
    weights = rng.normal((count, entries), dtype=dtype)
    x, y = rng.normal((size, 3), dtype=dtype), rng.normal((count, 3), dtype=dtype)
    dense = np.zeros((count, size))
    for r, e in np.ndindex(count, entries):
        dense[r, int(host(index)[r, e])] += host(weights)[r, e]
    tolerance = {"float16": 2e-2, "float32": 1e-5, "float64": 1e-12}[dtype]
    forth = backend.weighted_rows(weights, index, x)
    back = backend.spread_rows(weights, index, y, size)
    assert forth.dtype == back.dtype == dtype
    assert_close(forth, dense @ host(x).astype("float64"), rtol=tolerance, atol=tolerance)
    assert_close(back, dense.T @ host(y).astype("float64"), rtol=tolerance, atol=tolerance)


def test_the_blocks_of_a_product_change_nothing(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, results = Rng(0), []
    index, weights = rng.integers(0, 5, (7, 4)), rng.normal((7, 4), dtype="float16")
    x, y = rng.normal((5, 3), dtype="float16"), rng.normal((7, 3), dtype="float16")
    for size in (1, 10**6):
        monkeypatch.setattr(backend, "GATHERED", size)
        results.append(
            (backend.weighted_rows(weights, index, x), backend.spread_rows(weights, index, y, 5))
        )
    for one, all_at_once in zip(*results, strict=True):
        assert_close(one, all_at_once, rtol=1e-2, atol=1e-2)


def test_no_points_and_no_images(xp: Any) -> None:
    input = xp.ones((2, 3, 4, 5), "float32")
    out = sample_points(input, xp.zeros((0, 2), "float32"), xp.zeros(0, "int64"))
    assert out.shape == (0, 3)
    assert bilinear_sample(input[:0], xp.zeros((0, 4, 2), "float32")).shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_dtype_stays(xp: Any, dtype: str) -> None:
    leaves = [
        Tensor(Rng(0).normal((1, 2, 4, 4), dtype=dtype), requires_grad=True),
        Tensor(Rng(1).uniform((1, 5, 2), 0, 3, dtype=dtype), requires_grad=True),
    ]
    out = bilinear_sample(*leaves)
    assert out.dtype == dtype
    assert all(g.dtype == dtype for g in grad(ops.sum(out), leaves))


def test_what_does_not_fit_is_refused(xp: Any) -> None:
    input, points = xp.ones((2, 3, 4, 4), "float32"), xp.zeros((5, 2), "float32")
    image = xp.zeros(5, "int64")
    with pytest.raises(ValueError, match=r"points \(p, 2\)"):
        sample_points(input, points[:, :1], image)
    with pytest.raises(ValueError, match="one per point"):
        sample_points(input, points, image[:2])
    with pytest.raises(ValueError, match="zero_pad, clamp_v1"):
        sample_points(input, points, image, "mirror")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="astype"):
        sample_points(input, points.astype("float64"), image)
    with pytest.raises(ValueError, match=r"\(n, p, 2\)"):
        bilinear_sample(input, points)


# grids


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_torchs_grid_sample(xp: Any, mode: str, padding: str, corners: bool) -> None:
    inputs = {"input": ARRAYS["grid.input"], "grid": ARRAYS["grid.grid"]}

    def f(input: Any, grid: Any) -> Any:
        return grid_sample(input, grid, mode, padding, corners)

    answers_alike(f, inputs, f"grid.{mode}.{padding}.{corners}.", xp, 1e-10)


@pytest.mark.parametrize("corners", [False, True])
def test_torchs_affine_grid(xp: Any, corners: bool) -> None:
    theta = xp.asarray(ARRAYS["affine.theta"])
    assert_close(affine_grid(theta, (2, 1, 3, 4), corners), ARRAYS[f"affine.{corners}"], rtol=1e-12)


@pytest.mark.parametrize("corners", [False, True])
def test_the_identity_reads_every_pixel(xp: Any, corners: bool) -> None:
    input = Rng(0).normal((2, 3, 4, 5), dtype="float64")
    theta = xp.asarray([[[1.0, 0, 0], [0, 1.0, 0]]] * 2)
    grid = affine_grid(theta, input.shape, corners)
    assert_close(grid_sample(input, grid, align_corners=corners), input, rtol=1e-12, atol=1e-13)
    # mixing the two conventions shifts what is read
    mixed = grid_sample(input, grid, align_corners=not corners)
    assert abs(host(mixed) - host(input)).max() > 1e-2


@pytest.mark.parametrize("corners", [False, True])
def test_the_nearest_pixel_is_read_alone(xp: Any, corners: bool) -> None:
    """Its neighbours, whatever they are, have no part in it."""
    pixels = host(Rng(0).normal((1, 2, 4, 5), dtype="float64")).copy()
    pixels[0, :, ::2, ::2] = math.inf
    theta = xp.asarray([[[1.0, 0, 0], [0, 1.0, 0]]])
    grid = affine_grid(theta, pixels.shape, corners)
    found = grid_sample(xp.asarray(pixels), grid, "nearest", align_corners=corners)
    assert_close(found, pixels, rtol=0)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_a_grid_at_nan(xp: Any, mode: str, padding: str) -> None:
    grid = xp.asarray([[[[math.nan, 0.0], [0.0, 0.0]]]], "float32")
    found = host(grid_sample(xp.ones((1, 2, 3, 3), "float32"), grid, mode, padding))
    assert found.dtype == "float32" and np.isnan(found[..., 0]).all()
    assert_close(found[..., 1], np.ones((1, 2, 1), "float32"))


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_a_grid_without_points_or_images(xp: Any, mode: str) -> None:
    input, grid = xp.ones((2, 3, 4, 4), "float32"), xp.zeros((2, 5, 6, 2), "float32")
    assert grid_sample(input[:0], grid[:0], mode).shape == (0, 3, 5, 6)
    assert grid_sample(input, grid[:, :0], mode).shape == (2, 3, 0, 6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_gradients_of_grids_to_the_second_order(xp: Any, mode: str, padding: str) -> None:
    rng = Rng(4)
    input = rng.normal((1, 2, 3, 4), dtype="float64")
    places = [[[-0.9, 0.37], [0.21, -0.55]], [[0.83, 0.62], [-1.21, 1.33]]]
    grid = xp.asarray([places], dtype="float64")
    check_grads(lambda x, g: grid_sample(x, g, mode, padding), input, grid, order=2)


def test_a_reference_point_at_half_a_pixel_hits_the_pixel(xp: Any) -> None:
    """(i + ½) / n with align_corners=False is pixel i."""
    input = Rng(0).normal((1, 1, 1, 6), dtype="float64")
    place = (np.arange(6) + 0.5) / 6
    grid = np.stack([2 * place - 1, np.zeros(6)], axis=-1)[None, None]
    assert_close(grid_sample(input, xp.asarray(grid)), input, rtol=1e-12)


def test_grids_that_do_not_fit_are_refused(xp: Any) -> None:
    input, grid = xp.ones((2, 3, 4, 4), "float32"), xp.zeros((2, 5, 5, 2), "float32")
    with pytest.raises(ValueError, match=r"grid \(n, h', w', 2\)"):
        grid_sample(input, grid[:1])
    with pytest.raises(ValueError, match="bilinear, nearest, bicubic"):
        grid_sample(input, grid, mode="cubic")
    with pytest.raises(ValueError, match="zeros, border, reflection"):
        grid_sample(input, grid, padding_mode="mirror")
    with pytest.raises(ValueError, match=r"theta \(n, 2, 3\)"):
        affine_grid(xp.zeros((1, 2, 3), "float32"), (2, 3, 4, 4))
