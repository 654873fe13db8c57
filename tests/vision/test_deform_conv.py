"""Deformable convolution: torchvision's numbers, its limits, and the classic mistakes."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.check import check_grads
from mini_nn.nn import functional as F
from mini_nn.vision import (
    affine_grid,
    bilinear_sample,
    deform_conv2d,
    deform_conv2d_by_warps,
    grid_sample,
    sampling,
)
from mini_nn.vision import deform_conv as module
from tests.support import assert_close, host
from tests.vision.goldens import ARRAYS, OPTIONS, answers_alike, part

FORMS = pytest.mark.parametrize("f", [deform_conv2d, deform_conv2d_by_warps])


def kernel(p: float, q: float) -> float:
    return max(0.0, 1 - abs(p - q))


def in_loops(
    input: Any, offset: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    mask: Any,
) -> Any:  # fmt: skip
    """Equation 1 of the second paper, number by number."""
    n, c, h, w = input.shape
    out, width, kh, kw = weight.shape
    groups, parts = c // width, offset.shape[1] // (2 * kh * kw)
    y = np.zeros((n, out, *offset.shape[2:]))
    for b, o, i, j in np.ndindex(*y.shape):
        for v, r, s in np.ndindex(width, kh, kw):
            channel = o // (out // groups) * width + v
            place = channel // (c // parts) * kh * kw + r * kw + s
            at_y = i * stride[0] - padding[0] + r * dilation[0] + offset[b, 2 * place, i, j]
            at_x = j * stride[1] - padding[1] + s * dilation[1] + offset[b, 2 * place + 1, i, j]
            value = sum(
                kernel(at_y, row) * kernel(at_x, column) * input[b, channel, row, column]
                for row in range(max(math.floor(at_y), 0), min(math.floor(at_y) + 2, h))
                for column in range(max(math.floor(at_x), 0), min(math.floor(at_x) + 2, w))
            )
            m = 1.0 if mask is None else mask[b, place, i, j]
            y[b, o, i, j] += weight[o, v, r, s] * m * value
    return y + (0.0 if bias is None else bias[:, None, None])


class Case:
    """Arguments that fit together, in float64."""

    def __init__(
        self, seed: int, image: Any = (5, 6), kernel: Any = (3, 3), c: int = 4, out: int = 6,
        groups: int = 1, parts: int = 1, stride: Any = (1, 1), padding: Any = (1, 1),
        dilation: Any = (1, 1), n: int = 2,
    ) -> None:  # fmt: skip
        rng, places = Rng(seed), parts * kernel[0] * kernel[1]
        axes = zip(image, kernel, stride, padding, dilation, strict=True)
        self.size = tuple((a + 2 * p - d * (k - 1) - 1) // s + 1 for a, k, s, p, d in axes)
        self.options = {"stride": stride, "padding": padding, "dilation": dilation}
        self.input = rng.normal((n, c, *image), dtype="float64")
        self.weight = rng.normal((out, c // groups, *kernel), dtype="float64")
        self.bias = rng.normal((out,), dtype="float64")
        self.offset = 1.5 * rng.normal((n, 2 * places, *self.size), dtype="float64")
        self.mask = rng.uniform((n, places, *self.size), dtype="float64")

    def __call__(self, f: Any = deform_conv2d, **changes: Any) -> Any:
        a = {**vars(self), **changes}
        return f(a["input"], a["offset"], a["weight"], a["bias"], mask=a["mask"], **self.options)


SHAPES: list[dict[str, Any]] = [
    {},
    {"stride": (2, 1), "padding": (0, 2), "kernel": (2, 3)},
    {"dilation": (2, 1), "padding": (2, 0), "kernel": (3, 2), "groups": 2, "parts": 4},
    {"kernel": (1, 1), "padding": (0, 0), "groups": 2, "parts": 2},
    {"kernel": (4, 4), "padding": (2, 2)},
]


@FORMS
@pytest.mark.parametrize("k", range(len(OPTIONS)))
def test_torchvision(xp: Any, f: Any, k: int) -> None:
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in OPTIONS[k].items()}
    answers_alike(
        lambda **leaves: f(**leaves, **options), part(f"deform.{k}.in."), f"deform.{k}.", xp, 1e-10
    )


@FORMS
@pytest.mark.parametrize("shape", SHAPES)
def test_the_equation_in_loops(xp: Any, f: Any, shape: Any) -> None:
    case = Case(1, **{**shape, "n": 1})
    arrays = [host(getattr(case, name)) for name in ("input", "offset", "weight", "bias")]
    want = in_loops(*arrays, *case.options.values(), host(case.mask))
    assert_close(case(f), want, rtol=1e-10, atol=1e-12)
    want = in_loops(*arrays[:3], None, *case.options.values(), None)
    assert_close(case(f, bias=None, mask=None), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("border", ["zero_pad", "clamp_v1"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_forms_and_their_gradients(xp: Any, shape: Any, border: Any) -> None:
    case = Case(2, **shape)
    names = ("input", "offset", "weight", "mask")
    results = []
    for f in (deform_conv2d, deform_conv2d_by_warps):
        leaves = {name: Tensor(getattr(case, name), requires_grad=True) for name in names}
        out = case(lambda *args, f=f, **options: f(*args, **options, border=border), **leaves)
        cotangent = Rng(9).normal(out.shape, dtype="float64")
        results.append([out, *grad(out, [*leaves.values()], cotangent)])
    for fast, slow in zip(*results, strict=True):
        assert_close(fast, slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradients_to_the_second_order(xp: Any, shape: Any) -> None:
    case = Case(3, **{**shape, "n": 1, "image": (3, 4), "c": 4, "out": 4})
    # 0.05 or more from the kinks at integers
    offset = xp.floor(case.offset) + 0.1 + 0.8 * (case.offset - xp.floor(case.offset))

    def f(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
        return deform_conv2d(input, offset, weight, bias, mask=mask, **case.options)

    check_grads(f, case.input, offset, case.weight, case.bias, case.mask, order=2)


@FORMS
@pytest.mark.parametrize("shape", SHAPES)
def test_without_offsets_it_is_a_convolution(xp: Any, f: Any, shape: Any) -> None:
    case = Case(4, **shape)
    still, groups = case.offset * 0.0, 4 // case.weight.shape[1]
    plain = F.conv2d(case.input, case.weight, case.bias, groups=groups, **case.options)
    assert_close(case(f, offset=still, mask=None), plain, rtol=1e-11, atol=1e-12)
    # v2 as it starts: every mask is σ(0)
    half = F.conv2d(case.input, case.weight, None, groups=groups, **case.options) * 0.5
    found = case(f, offset=still, mask=0.0 * case.mask + 0.5, bias=None)
    assert_close(found, half, rtol=1e-11, atol=1e-12)


def slopes_at_pixels(xp: Any) -> None:
    case = Case(20)
    offset = Tensor(case.offset * 0.0, requires_grad=True)
    g = Rng(21).normal((2, 6, *case.size), dtype="float64")
    (found,) = grad(case(offset=offset), offset, g)
    wide = np.pad(host(case.input), ((0, 0), (0, 0), (1, 2), (1, 2)))
    weight, mask = host(case.weight), host(case.mask)
    want = np.zeros(offset.shape)
    for k, (row, column) in enumerate(np.ndindex(3, 3)):
        z = np.einsum("noij,oc->ncij", host(g), weight[:, :, row, column])
        x, down, right = (
            wide[:, :, row + i : row + i + 5, column + j : column + j + 6]
            for i, j in ((0, 0), (1, 0), (0, 1))
        )
        want[:, 2 * k] = mask[:, k] * (z * (down - x)).sum(axis=1)
        want[:, 2 * k + 1] = mask[:, k] * (z * (right - x)).sum(axis=1)
    assert_close(found, want, rtol=1e-10, atol=1e-11)


def test_where_training_starts_every_offset_gradient_is_a_difference_to_the_right(
    xp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets of 0 read pixels, margins and corners included, where x has a kink."""
    slopes_at_pixels(xp)
    slopes_to_the_left(monkeypatch)
    test_torchvision(xp, deform_conv2d, 0)
    with pytest.raises(AssertionError):
        slopes_at_pixels(xp)


def test_the_differences_to_both_sides_are_limits(xp: Any) -> None:
    """x(p + h) and x(p − h): the derivative at a pixel is the one to the right, not the left."""
    case = Case(22, c=1, out=1, n=1)
    slopes = []
    for shift in (-1e-6, 0.0, 1e-6):
        offset = Tensor(case.offset * 0.0 + shift, requires_grad=True)
        slopes.append(host(grad(ops.sum(case(offset=offset, mask=None)), offset)[0]))
    left, here, right = slopes
    assert_close(here, right, rtol=1e-4, atol=1e-4)
    assert abs(here - left).max() > 0.1


@FORMS
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_of_ones_is_no_mask(xp: Any, f: Any, shape: Any) -> None:
    case = Case(23, **shape)
    assert_close(case(f, mask=0.0 * case.mask + 1.0), case(f, mask=None), rtol=1e-13, atol=1e-13)


@given(st.integers(0, 2**32))
def test_affine_offsets_are_a_spatial_transformer(xp: Any, seed: int) -> None:
    """One place, unit weights, and Δp = θ(p) − p: torch's sampling with aligned corners."""
    rng = Rng(seed)
    input = rng.normal((2, 4, 5, 6), dtype="float64")
    theta = rng.normal((2, 2, 3), dtype="float64")
    grid = affine_grid(theta, input.shape, align_corners=True)
    points = (host(grid)[..., ::-1] + 1.0) / 2.0 * [4, 5]
    offset = points - np.stack(np.mgrid[:5, :6], axis=-1)
    unit = xp.eye(4, dtype="float64").reshape(4, 4, 1, 1)
    found = deform_conv2d(input, xp.asarray(offset.transpose(0, 3, 1, 2).copy()), unit)
    assert_close(found, grid_sample(input, grid, align_corners=True), rtol=1e-9, atol=1e-10)


@given(st.integers(-7, 7), st.integers(-7, 7))
def test_a_constant_offset_shifts_the_image(xp: Any, a: int, b: int) -> None:
    case = Case(5)
    offset = case.offset * 0.0
    offset[:, 0::2], offset[:, 1::2] = float(a), float(b)
    wide = np.pad(host(case.input), ((0, 0), (0, 0), (8, 8), (8, 8)))
    moved = wide[:, :, 8 + a - 1 : 8 + a + 6, 8 + b - 1 : 8 + b + 7]  # with the padding of 1
    want = F.conv2d(xp.asarray(moved.copy()), case.weight, case.bias)
    assert_close(case(offset=offset, mask=None), want, rtol=1e-10, atol=1e-11)


def dilating(xp: Any, case: Case, d: int, first: int = 0) -> Any:
    """Offsets (d − 1) pₙ, with Δy in channel ``first`` of each pair."""
    offset = host(case.offset) * 0.0
    for k, (row, column) in enumerate(np.ndindex(3, 3)):
        offset[:, 2 * k + first] = (d - 1) * (row - 1)
        offset[:, 2 * k + 1 - first] = (d - 1) * (column - 1)
    return xp.asarray(offset)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_offsets_that_dilate(xp: Any, d: int) -> None:
    case = Case(6)
    want = F.conv2d(case.input, case.weight, case.bias, padding=d, dilation=d)
    found = case(offset=dilating(xp, case, d), mask=None)
    assert_close(found, want, rtol=1e-10, atol=1e-11)


def test_swapped_axes_kernel_order_and_pairs_would_be_noticed(xp: Any) -> None:
    case = Case(6)
    want = host(F.conv2d(case.input, case.weight, case.bias, padding=2, dilation=2))
    good = dilating(xp, case, 2)
    swapped = dilating(xp, case, 2, first=1)
    column_first = good.reshape(2, 3, 3, 2, *case.size).swapaxes(1, 2).reshape(good.shape)
    all_y_then_all_x = xp.concatenate([good[:, 0::2], good[:, 1::2]], axis=1)
    for wrong in (swapped, column_first, all_y_then_all_x):
        assert abs(host(case(offset=wrong, mask=None)) - want).max() > 0.5


# Classic mistakes, planted: torchvision's numbers are no longer met


def axes_swapped(patch: pytest.MonkeyPatch) -> None:
    right = module.corners
    patch.setattr(module, "corners", lambda points, *rest: right(points[:, ::-1], *rest))


def kernel_read_by_columns(patch: pytest.MonkeyPatch) -> None:
    right = module.Geometry.grid

    def grid(self: Any, xp: Any, dtype: Any) -> Any:
        places = right(self, xp, dtype).reshape(-1, *self.kernel, 2)
        return places.swapaxes(1, 2).reshape(len(places), -1, 2)

    patch.setattr(module.Geometry, "grid", grid)


def truncated(patch: pytest.MonkeyPatch) -> None:
    class Truncating:
        def __init__(self, xp: Any) -> None:
            self.xp = xp

        def __getattr__(self, name: str) -> Any:
            return getattr(self.xp, "trunc" if name == "floor" else name)

    right = sampling.of
    patch.setattr(sampling, "of", lambda x: Truncating(right(x)))


def clamped(patch: pytest.MonkeyPatch) -> None:
    def placed(points: Any, size: Any, border: str) -> Any:
        xp = sampling.of(points)
        edge = xp.asarray([s - 1.0 for s in size], dtype=points.dtype)
        return xp.minimum(xp.maximum(points, 0.0), edge), None

    patch.setattr(sampling, "_placed", placed)


def in_padded_coordinates(patch: pytest.MonkeyPatch) -> None:
    right = module.Geometry.grid

    def grid(self: Any, xp: Any, dtype: Any) -> Any:
        return right(self, xp, dtype) + xp.asarray(self.padding, dtype=dtype)

    patch.setattr(module.Geometry, "grid", grid)


def slopes_to_the_left(patch: pytest.MonkeyPatch) -> None:
    """Right between pixels, so that only the test at pixels can notice."""
    right = module.corners

    def corners(points: Any, *rest: Any) -> Any:
        return (*right(points, *rest)[:2], *right(points - 1e-13, *rest)[2:])

    patch.setattr(module, "corners", corners)


MISTAKES = (axes_swapped, kernel_read_by_columns, truncated, clamped, in_padded_coordinates)


@pytest.mark.parametrize("plant", MISTAKES)
def test_mistakes_are_noticed(xp: Any, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    test_torchvision(xp, deform_conv2d, 0)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_torchvision(xp, deform_conv2d, 0)


def padded_first(case: Case, padding: Any) -> Any:
    """What many ports do: pad, then clamp the points to the padded image."""
    wide = np.pad(host(case.input), ((0, 0), (0, 0), *((p, p) for p in padding)))
    h, w = wide.shape[2:]
    grid = np.stack(np.mgrid[: case.size[0], : case.size[1]], axis=-1)
    taps = np.stack(np.mgrid[:3, :3], axis=-1).reshape(9, 1, 1, 2)
    moved = host(case.offset).reshape(2, 9, 2, *case.size).transpose(0, 1, 3, 4, 2)
    points = np.clip(grid + taps + moved, 0, [h - 1, w - 1])
    y = np.zeros((2, 6, *case.size))
    for b, k, i, j in np.ndindex(points.shape[:4]):
        at_y, at_x = points[b, k, i, j]
        value = sum(
            kernel(at_y, row) * kernel(at_x, column) * wide[b, :, row, column]
            for row in range(int(at_y), min(int(at_y) + 2, h))
            for column in range(int(at_x), min(int(at_x) + 2, w))
        )
        y[b, :, i, j] += host(case.weight).reshape(6, 4, 9)[:, :, k] @ value
    return y


def test_padding_first_would_be_noticed(xp: Any) -> None:
    """Clamped to a margin of zeros it does no harm; without one the edge is read again outside."""
    with_margin, without = Case(7), Case(7, padding=(0, 0))
    right = with_margin(bias=None, mask=None)
    assert_close(padded_first(with_margin, (1, 1)), right, rtol=1e-10, atol=1e-11)
    right = host(without(bias=None, mask=None))
    assert abs(padded_first(without, (0, 0)) - right).max() > 0.5


@given(st.integers(0, 2**32), st.floats(-2, 2))
def test_it_is_linear_in_image_weight_and_mask(xp: Any, seed: int, a: float) -> None:
    case, other = Case(seed, n=1), Case(seed + 1, n=1)
    for name in ("input", "weight", "mask"):
        one, two = getattr(case, name), getattr(other, name)
        together = case(**{name: one + a * two}, bias=None)
        apart = case(bias=None) + a * case(**{name: two}, bias=None)
        assert_close(together, apart, rtol=1e-9, atol=1e-10)


def test_on_a_plane_it_is_affine_in_the_offsets(xp: Any) -> None:
    case = Case(8, image=(9, 9), padding=(0, 0), c=1, out=1, n=1)
    i, j = np.mgrid[:9, :9]
    plane = xp.asarray((0.7 * i - 1.3 * j + 2.0)[None, None])
    offset = xp.clip(case.offset, -0.9, 0.9)  # nothing leaves the image, but for its edge
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    moved = host(case(input=plane, offset=offset, mask=None))
    still = host(case(input=plane, offset=0.0 * offset, mask=None))
    w, d = host(case.weight).reshape(9), host(offset)[0].reshape(9, 2, *case.size)
    slope = np.einsum("k,kij->ij", w, 0.7 * d[:, 0] - 1.3 * d[:, 1])[None, None]
    assert_close((moved - still)[inner], slope[inner], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("parts", [2, 4])
def test_offset_groups_are_sums_over_blocks_of_channels(xp: Any, parts: int) -> None:
    case = Case(9, parts=parts)
    width = 4 // parts
    total: Any = 0.0
    for g in range(parts):
        channels = slice(g * width, (g + 1) * width)
        total = total + case(
            input=case.input[:, channels],
            weight=case.weight[:, channels],
            offset=case.offset[:, 18 * g : 18 * (g + 1)],
            mask=case.mask[:, 9 * g : 9 * (g + 1)],
            bias=None,
        )
    assert_close(case(bias=None), total, rtol=1e-10, atol=1e-11)


@given(st.permutations(range(9)))
def test_the_places_of_the_kernel_have_no_order(xp: Any, order: list[int]) -> None:
    """… if weight, offset and mask are permuted together, and the fixed grid with them."""
    case, places = Case(10), xp.asarray(order)
    weight = case.weight.reshape(6, 4, 9)[:, :, places].reshape(6, 4, 3, 3)
    grid = xp.asarray([[k // 3, k % 3] for k in range(9)], dtype="float64")
    moved = (case.offset.reshape(2, 9, 2, *case.size) + grid[:, :, None, None])[:, places]
    offset = (moved - grid[:, :, None, None]).reshape(case.offset.shape)
    found = case(weight=weight, offset=offset, mask=case.mask[:, places])
    assert_close(found, case(), rtol=1e-10, atol=1e-11)


def test_a_kernel_of_one_place_is_a_warp(xp: Any) -> None:
    case = Case(11, kernel=(1, 1), padding=(0, 0))
    unit = xp.eye(4, dtype="float64").reshape(4, 4, 1, 1)
    place = np.stack(np.mgrid[:5, :6], axis=-1).astype("float64")
    points = xp.asarray(place) + case.offset.transpose(0, 2, 3, 1)
    warped = bilinear_sample(case.input, points.reshape(2, 30, 2)).reshape(2, 4, 5, 6)
    assert_close(case(weight=unit, mask=None, bias=None), warped, rtol=1e-11, atol=1e-12)


def test_an_offset_far_outside_leaves_the_bias_and_gets_no_gradient(xp: Any) -> None:
    case = Case(12)
    leaves = [Tensor(x, requires_grad=True) for x in (case.input, case.offset * 0.0 + 1e9)]
    out = case(input=leaves[0], offset=leaves[1])
    assert_close(out, host(case.bias)[None, :, None, None] + np.zeros(out.shape), rtol=1e-12)
    assert all((host(g) == 0).all() for g in grad(ops.sum(out), leaves))


def test_chunks_change_nothing(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case, results = Case(13, n=5, parts=2, groups=2), []
    for size in (1, 10**9):
        monkeypatch.setattr(module, "BUDGET", size)
        leaves = [Tensor(x, requires_grad=True) for x in (case.input, case.offset, case.weight)]
        out = case(input=leaves[0], offset=leaves[1], weight=leaves[2])
        results.append([out, *grad(ops.sum(ops.sin(out)), leaves)])
    for one, all_at_once in zip(*results, strict=True):
        assert_close(one, all_at_once, rtol=1e-11, atol=1e-12)


BOUNDED: list[dict[str, Any]] = [
    {"c": 16},
    {"c": 1},
    {"c": 8, "parts": 8},
    {"c": 2, "out": 64},
    {"c": 32, "kernel": (1, 1), "padding": (0, 0), "stride": (4, 4)},
]


@pytest.mark.parametrize("border", ["zero_pad", "clamp_v1"])
@pytest.mark.parametrize("budget", [1, 1 << 19])
@pytest.mark.parametrize("shape", BOUNDED)
def test_memory_stays_within_the_stated_bound(
    backend_name: str, shape: Any, budget: int, border: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend_name != "numpy":
        pytest.skip("traces the host's memory")
    case = Case(14, image=(16, 16), n=8, **shape)
    case(n=1)  # what is imported at the first use does not count
    (_, c, h, w), (height, width), out = case.input.shape, case.size, len(case.bias)
    places = case.mask.shape[1] * height * width
    columns = c * case.weight[0, 0].size * height * width
    one = 72 * places + 6 * columns + 4 * (c * h * w + out * height * width)
    small = 1 << 14  # what does not depend on sizes, in bytes
    bound = 8 * max(budget, one) + small
    monkeypatch.setattr(module, "BUDGET", budget)
    leaves = {k: Tensor(getattr(case, k), requires_grad=True) for k in ("input", "offset", "mask")}
    leaves["weight"] = Tensor(case.weight, requires_grad=True)

    def f(*args: Any, **options: Any) -> Any:
        return deform_conv2d(*args, **options, border=border)

    tracemalloc.start()
    try:
        y = case(f, bias=None, **leaves)
        forward = tracemalloc.get_traced_memory()[1] - y.data.nbytes
        g = np.ones(y.shape)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        found = grad(y, [*leaves.values()], g)
        own = sum(x.data.nbytes for x in found)
        backward = tracemalloc.get_traced_memory()[1] - before - own
    finally:
        tracemalloc.stop()
    assert forward < bound and backward < bound
    if budget == 1:  # the bound says something: all eight images at once break it
        monkeypatch.setattr(module, "BUDGET", 10**12)
        tracemalloc.start()
        case(f, bias=None, **leaves)
        assert tracemalloc.get_traced_memory()[1] > bound
        tracemalloc.stop()


def test_input_smaller_than_the_kernel(xp: Any) -> None:
    """With enough padding it is a convolution as any other; without, there is no output."""
    case = Case(18, image=(2, 1), n=1)
    names = ("input", "offset", "weight", "bias")
    want = in_loops(
        *(host(getattr(case, k)) for k in names), *case.options.values(), host(case.mask)
    )
    assert_close(case(), want, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"\(3, 3\).*larger than images \(2, 1\)"):
        deform_conv2d(case.input, case.offset, case.weight, case.bias)


@FORMS
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_pixel_that_is_not_finite(xp: Any, f: Any, bad: float) -> None:
    """It spoils what reads it, as in the loops, but nothing that reads outside of the image."""
    case = Case(19, n=1, c=1, out=1)
    input = host(case.input).copy()
    input[0, 0, 0, 0] = bad
    arrays = [input, host(case.offset), host(case.weight), None]
    with np.errstate(invalid="ignore"):
        want = in_loops(*arrays, *case.options.values(), None)
        found = case(f, input=xp.asarray(input), bias=None, mask=None)
    assert 0 < np.isfinite(want).sum() < want.size
    assert_close(found, want, rtol=1e-10, atol=1e-12)


def test_no_images(xp: Any) -> None:
    case = Case(15)
    leaves = [Tensor(x, requires_grad=True) for x in (case.input[:0], case.weight)]
    out = case(input=leaves[0], weight=leaves[1], offset=case.offset[:0], mask=case.mask[:0])
    assert out.shape == (0, 6, 5, 6)
    assert (host(grad(ops.sum(out), leaves)[1]) == 0).all()


@FORMS
def test_float32_stays(xp: Any, f: Any) -> None:
    case = Case(16)
    names = ("input", "offset", "weight", "bias", "mask")
    leaves = {
        name: Tensor(getattr(case, name).astype("float32"), requires_grad=True) for name in names
    }
    out = case(f, **leaves)
    assert out.dtype == "float32"
    assert_close(out, case(f), rtol=1e-4, atol=1e-4)
    for name, g in zip(names, grad(ops.sum(out), [*leaves.values()]), strict=True):
        assert g.dtype == "float32", name


def test_what_does_not_fit_is_refused(xp: Any) -> None:
    case = Case(17)
    for changes, message in (
        ({"input": case.input[0]}, r"input \(n, c, h, w\)"),
        ({"input": case.input.astype("float32")}, "astype"),
        ({"weight": case.weight[:, :3]}, "does not fit 4 input channels"),
        ({"offset": case.offset[:, :10]}, "has 2 G 9 channels"),
        ({"offset": case.offset[:, :, 1:]}, r"the output's size \(5, 6\)"),
        ({"mask": case.mask[:, :8]}, r"a mask for this offset is \(2, 9, 5, 6\)"),
        ({"bias": case.bias[:2]}, r"bias is \(6,\)"),
        ({"input": case.input[:, :, :1, :0]}, "pad more"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            case(**changes)
    with pytest.raises(ValueError, match="border is one of"):
        case(lambda *args, **options: deform_conv2d(*args, **options, border="x"))
    with pytest.raises(ValueError, match="stride"):
        deform_conv2d(case.input, case.offset, case.weight, stride=0)


def test_the_goldens_have_every_option() -> None:
    """A case for strides, dilations, groups, offset groups, with and without masks."""
    assert {name for options in OPTIONS for name in options} == {"stride", "padding", "dilation"}
    masked = [f"deform.{k}.in.mask" in ARRAYS for k in range(len(OPTIONS))]
    assert {*masked} == {True, False}
