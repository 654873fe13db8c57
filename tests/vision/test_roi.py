"""RoI operators: torchvision's numbers, their definitions in loops, and what changes nothing."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.check import check_grads
from mini_nn.ops.elementwise import of
from mini_nn.vision import roi
from mini_nn.vision.roi import ps_roi_align, ps_roi_pool, roi_align, roi_pool
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "vision_roi.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in [*_file.keys()]}
    CALLS = json.loads(_file.metadata()["calls"])
for _array in GOLDEN.values():
    _array.flags.writeable = False

POOLED = [i for i, (name, _) in enumerate(CALLS) if name == "roi_pool"]


def wave(shape: tuple[int, ...]) -> Any:
    """The cotangent of make_vision_roi.py."""
    return np.cos(0.7 * np.arange(math.prod(shape)) + 0.3).reshape(shape)


def answer(i: int, xp: Any) -> tuple[Any, Any]:
    """Our output and gradient for a row of the goldens."""
    name, options = CALLS[i]
    x = Tensor(xp.asarray(GOLDEN["input"]), requires_grad=True)
    y = getattr(roi, name)(x, xp.asarray(GOLDEN["boxes"]), **options)
    y.backward(xp.asarray(wave(y.shape)))
    return y, x.grad


@pytest.mark.parametrize(
    "i", [pytest.param(i, id=f"{i}-{name}") for i, (name, _) in enumerate(CALLS)]
)
def test_torchvision(i: int, xp: Any) -> None:
    y, slope = answer(i, xp)
    name, options = CALLS[i]
    want = GOLDEN[f"{i}.out"]
    assert_close(slope, GOLDEN[f"{i}.grad"], rtol=1e-10, atol=1e-12)
    if name == "ps_roi_align":  # 0 / 0 where a box has no samples
        empty = np.isnan(want)
        assert empty.any() == (options["sampling_ratio"] < 0)
        want = np.where(empty, 0.0, want)
    if name == "ps_roi_pool":  # its forward pass leaves the last row and column out
        image = xp.asarray(GOLDEN["input"][:, :, :-1, :-1])
        y = ps_roi_pool(image, xp.asarray(GOLDEN["boxes"]), **options)
    assert_close(y, want, rtol=1e-10, atol=1e-12)


def test_the_last_row_is_read_although_torchvision_does_not(xp: Any) -> None:
    i = next(i for i, (name, _) in enumerate(CALLS) if name == "ps_roi_pool")
    with pytest.raises(AssertionError):
        assert_close(answer(i, xp)[0], GOLDEN[f"{i}.out"], atol=0.1)
    x = xp.arange(16.0).reshape(1, 1, 4, 4)
    boxes = xp.asarray([[0.0, 0.0, 0.0, 4.0, 4.0]])
    assert_close(ps_roi_pool(x, boxes, 1), 7.5)  # the mean of all


def test_halves_are_rounded_away_from_zero(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    below = float(np.nextafter(0.5, 0.0))
    x = xp.asarray([-2.5, -1.5, -0.5, -below, 0.0, below, 0.5, 1.5, 2.5, 1e15])
    assert_close(roi.half_away(x), [-3.0, -2.0, -1.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 1e15], rtol=0)
    monkeypatch.setattr(roi, "half_away", lambda x: of(x).rint(x))
    for i in POOLED:
        with pytest.raises(AssertionError):
            assert_close(answer(i, xp)[0], GOLDEN[f"{i}.out"], atol=1e-3)


# Definitions in loops


def hat(image: Any, y: float, x: float) -> Any:
    """Bilinear in an image (c, h, w), held at its outermost pixels."""
    _, h, w = image.shape
    y, x = min(max(y, 0.0), h - 1.0), min(max(x, 0.0), w - 1.0)
    near = [np.maximum(0.0, 1.0 - np.abs(z - np.arange(n))) for z, n in ((y, h), (x, w))]
    return np.einsum("chw,h,w->c", image, *near)


def rounded(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def pixels_of(low: float, high: float, i: int, bins: int, last: int) -> range:
    """The pixels of a bin of an axis, exactly."""
    start = rounded(low)
    length = max(rounded(high) + last - start, 1)
    return range(start + i * length // bins, start - (-(i + 1) * length // bins))


def pooled_by_loops(input: Any, boxes: Any, size: Any, scale: float, sensitive: bool) -> Any:
    (n, c, h, w), (kh, kw) = input.shape, size
    maps = input.reshape(n, c // (kh * kw), kh, kw, h, w) if sensitive else None
    out = np.zeros((len(boxes), c // (kh * kw) if sensitive else c, kh, kw))
    for k, i, j in itertools.product(range(len(boxes)), range(kh), range(kw)):
        b, x1, y1, x2, y2 = boxes[k]
        rows = pixels_of(y1 * scale, y2 * scale, i, kh, not sensitive)
        columns = pixels_of(x1 * scale, x2 * scale, j, kw, not sensitive)
        rows = [y for y in rows if 0 <= y < h]
        columns = [x for x in columns if 0 <= x < w]
        if not rows or not columns:
            continue
        image = input[int(b)] if maps is None else maps[int(b), :, i, j]
        inside = image[:, rows][:, :, columns]
        out[k, :, i, j] = inside.mean(axis=(1, 2)) if sensitive else inside.max(axis=(1, 2))
    return out


def aligned_by_loops(input: Any, boxes: Any, size: Any, scale: float, ratio: int, how: str) -> Any:
    (n, c, h, w), (kh, kw) = input.shape, size
    sensitive = how == "sensitive"
    maps = input.reshape(n, c // (kh * kw), kh, kw, h, w) if sensitive else None
    out = np.zeros((len(boxes), c // (kh * kw) if sensitive else c, kh, kw))
    for k, i, j in itertools.product(range(len(boxes)), range(kh), range(kw)):
        b, *corners = boxes[k]
        x1, y1, x2, y2 = (z * scale - (how != "corner") * 0.5 for z in corners)
        height, width = y2 - y1, x2 - x1
        if how == "corner":
            height, width = max(height, 1.0), max(width, 1.0)
        image = input[int(b)] if maps is None else maps[int(b), :, i, j]
        down = ratio if ratio > 0 else math.ceil(height / kh)
        right = ratio if ratio > 0 else math.ceil(width / kw)
        for a, e in itertools.product(range(down), range(right)):
            y = y1 + (i + (a + 0.5) / down) * height / kh
            x = x1 + (j + (e + 0.5) / right) * width / kw
            if -1 <= y <= h and -1 <= x <= w:
                out[k, :, i, j] += hat(image, y, x) / (down * right)
    return out


def case(seed: int, c: int = 12, h: int = 5, w: int = 6, k: int = 4) -> tuple[Any, Any]:
    """Images and boxes, which also lie outside and also end before they begin."""
    rng = Rng(seed)
    x = rng.normal((2, c, h, w), dtype="float64")
    low = rng.uniform((k, 2), -3.0, 6.0, "float64")
    high = low + rng.uniform((k, 2), -1.0, 7.0, "float64")
    image = rng.integers(0, 2, (k, 1)).astype("float64")
    return x, of(x).concatenate((image, low, high), axis=1)


SIZES = st.sampled_from([(2, 3), (3, 2), (1, 4), (3, 4)])


@given(st.integers(0, 2**32), SIZES, st.sampled_from([1.0, 0.5]))
def test_pools_are_their_definitions(xp: Any, seed: int, size: Any, scale: float) -> None:
    x, boxes = case(seed)
    seen = host(x), host(boxes)
    assert_close(roi_pool(x, boxes, size, scale), pooled_by_loops(*seen, size, scale, False))
    assert_close(ps_roi_pool(x, boxes, size, scale), pooled_by_loops(*seen, size, scale, True))


@given(st.integers(0, 2**32), SIZES, st.sampled_from([1.0, 0.5]), st.sampled_from([-1, 1, 2]))
def test_aligns_are_their_definitions(
    xp: Any, seed: int, size: Any, scale: float, ratio: int
) -> None:
    x, boxes = case(seed)
    for how in ("corner", "edge", "sensitive"):
        want = aligned_by_loops(host(x), host(boxes), size, scale, ratio, how)
        if how == "sensitive":
            assert_close(ps_roi_align(x, boxes, size, scale, ratio), want)
        else:
            assert_close(roi_align(x, boxes, size, scale, ratio, how == "edge"), want)


# Properties


def test_each_bin_reads_its_own_map(xp: Any) -> None:
    """Map m is full of m: bin (i, j) of channel c shows (c k + i) k + j."""
    x = xp.broadcast_to(xp.arange(18.0)[None, :, None, None], (1, 18, 6, 6))
    boxes = xp.asarray([[0.0, 0.5, 0.5, 5.0, 5.0]])
    want = np.arange(18.0).reshape(1, 2, 3, 3)
    for y in (ps_roi_pool(x, boxes, 3), ps_roi_align(x, boxes, 3)):
        assert_close(y, want, rtol=1e-12)
        with pytest.raises(AssertionError):  # the classic slip: the channel is the fastest
            assert_close(y, want.reshape(1, 3, 3, 2).transpose(0, 3, 1, 2), rtol=1e-12)


@given(st.integers(0, 2**32), st.sampled_from([-1, 2, 3]))
def test_a_box_moved_by_one_bin_has_its_bins_moved_by_one(xp: Any, seed: int, ratio: int) -> None:
    rng = Rng(seed)
    x = rng.normal((1, 2, 9, 9), dtype="float64")
    low = host(rng.uniform((2,), 0.0, 3.0, "float64"))
    step = host(rng.uniform((2,), 0.6, 1.2, "float64"))  # a bin in x and in y
    boxes = np.zeros((2, 5))
    boxes[0, 1:3] = low
    boxes[0, 3:] = low + 3 * step
    boxes[1, 1:] = boxes[0, 1:] + np.tile(step * [1, 0], 2)
    y = host(roi_align(x, xp.asarray(boxes), 3, 1.0, ratio, True))
    assert_close(y[1, :, :, :2], y[0, :, :, 1:], rtol=1e-7, atol=1e-9)


@given(st.integers(0, 2**32), st.sampled_from([2, 3]))
def test_a_finer_map_of_the_same_scene_pools_to_the_same(xp: Any, seed: int, factor: int) -> None:
    """A linear scene at 1 and at ``factor`` pixels for one: only ``spatial_scale`` differs.

    Without ``aligned`` the boxes are half a pixel off, of whichever map.
    """
    a, b, c = (float(z) for z in host(Rng(seed).normal((3,), dtype="float64")))

    def scene(scale: int) -> Any:
        at = (np.arange(8 * scale) + 0.5) / scale
        return xp.asarray((a * at[:, None] + b * at + c)[None, None])

    boxes = xp.asarray([[0.0, 1.3, 2.1, 5.9, 6.2]])
    coarse, fine = (roi_align(scene(s), boxes, 3, float(s), 2, True) for s in (1, factor))
    assert_close(fine, coarse, rtol=1e-9, atol=1e-9)
    # bin (i, j) of a linear scene is its value at the bin's centre
    y, x = 2.1 + (np.arange(3)[:, None] + 0.5) * 4.1 / 3, 1.3 + (np.arange(3) + 0.5) * 4.6 / 3
    assert_close(coarse, (a * y + b * x + c)[None, None], rtol=1e-9, atol=1e-9)
    if abs(a + b) > 0.1:
        with pytest.raises(AssertionError):
            assert_close(roi_align(scene(1), boxes, 3, 1.0, 2), coarse, rtol=1e-3, atol=1e-3)


def test_pools_agree_on_one_pixel(xp: Any) -> None:
    """A bin of one pixel has one number, whatever is done with it."""
    x = Rng(0).normal((1, 1, 4, 4), dtype="float64")
    inclusive, exclusive = (xp.asarray([[0.0, 1.0, 2.0, z, z + 1.0]]) for z in (1.0, 2.0))
    want = host(x)[:, :, 2:3, 1:2]
    assert_close(roi_pool(x, inclusive, 1), want)
    assert_close(ps_roi_pool(x, exclusive, 1), want)
    assert_close(roi_align(x, exclusive, 1, aligned=True), want)
    assert_close(ps_roi_align(x, exclusive, 1), want)


@pytest.mark.parametrize("function", [roi_pool, ps_roi_pool, roi_align, ps_roi_align])
def test_a_list_of_boxes_numbers_its_images(xp: Any, function: Any) -> None:
    x, boxes = case(1, k=5)
    boxes[:, 0] = xp.asarray([0.0, 0.0, 1.0, 1.0, 1.0])
    assert_close(function(x, [boxes[:2, 1:], boxes[2:, 1:]], 2), function(x, boxes, 2))
    none = xp.zeros((0, 4))
    assert_close(function(x, [none, boxes[2:, 1:]], 2), function(x, boxes[2:], 2))
    assert function(x, [none, none], 2).shape == (
        0,
        12 if "ps" not in function.__name__ else 3,
        2,
        2,
    )


@pytest.mark.parametrize("function", [roi_pool, ps_roi_pool, roi_align, ps_roi_align])
def test_what_is_outside_is_zero_and_gets_no_gradient(xp: Any, function: Any) -> None:
    x, _ = case(2)
    leaf = Tensor(x, requires_grad=True)
    boxes = xp.asarray([[0.0, 50.0, 50.0, 60.0, 55.0], [1.0, -30.0, 0.0, -10.0, 4.0]])
    y = function(leaf, boxes, 2)
    assert_close(y, 0.0)
    assert_close(grad(y.sum(), leaf)[0], 0.0)


@pytest.mark.parametrize("function", [roi_pool, ps_roi_pool, roi_align, ps_roi_align])
def test_chunks_change_nothing(xp: Any, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, boxes = case(3)
    whole = function(x, boxes, 2)
    monkeypatch.setattr(roi, "SAMPLED", 7)
    assert_close(function(x, boxes, 2), whole, rtol=1e-12, atol=1e-14)


def test_the_first_of_several_largest_gets_the_gradient(xp: Any) -> None:
    leaf = Tensor(xp.ones((1, 1, 3, 3)), requires_grad=True)
    boxes = xp.asarray([[0.0, 1.0, 0.0, 2.0, 2.0]])
    (slope,) = grad(roi_pool(leaf, boxes, 1).sum(), leaf)
    want = np.zeros((1, 1, 3, 3))
    want[..., 0, 1] = 1.0
    assert_close(slope, want)


def test_pools_take_infinities_and_the_largest_is_nan(xp: Any) -> None:
    x = xp.full((1, 1, 2, 2), -math.inf)
    boxes = xp.asarray([[0.0, 0.0, 0.0, 1.0, 1.0]])
    assert_close(roi_pool(x, boxes, 1), -math.inf)
    x[0, 0, 1, 0] = math.nan
    assert_close(roi_pool(x, boxes, 1), math.nan)


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients(xp: Any, seed: int) -> None:
    """Of images and, where nothing is rounded, of boxes; to the second order."""
    x, boxes = case(seed, c=4, h=4, w=4, k=2)
    image, corners = boxes[:, :1], boxes[:, 1:]

    def with_corners(function: Any, *options: Any) -> Any:
        def pooled(x: Any, corners: Any) -> Any:
            numbers = image.astype(corners.dtype)
            return function(x, ops.concatenate((numbers, corners), axis=1), 2, 1.0, *options)

        return pooled

    for function, options in (
        (roi_align, (2, True)),
        (roi_align, (-1, False)),
        (ps_roi_align, (2,)),
    ):
        check_grads(with_corners(function, *options), x, corners, rtol=1e-4)
    for function in (roi_pool, ps_roi_pool):
        check_grads(lambda x, f=function: f(x, boxes.astype(x.dtype), 2), x)


def test_float32_stays(xp: Any) -> None:
    x, boxes = case(4)
    for function in (roi_pool, ps_roi_pool, roi_align, ps_roi_align):
        leaves = [Tensor(z.astype("float32"), requires_grad=True) for z in (x, boxes)]
        y = function(*leaves, 2)
        assert y.dtype == "float32"
        found = grad(y.sum(), leaves, materialize_grads=True)
        assert [str(g.dtype) for g in found] == ["float32", "float32"]
        assert_close(y, function(x, boxes, 2), rtol=1e-4, atol=1e-4)


def test_errors(xp: Any, backend_name: str) -> None:
    x, boxes = case(5)
    with pytest.raises(ValueError, match=r"boxes \(k, 5\)"):
        roi_align(x, boxes[:, 1:], 2)
    with pytest.raises(ValueError, match="each of 2 images"):
        roi_align(x, [boxes[:, 1:]], 2)
    with pytest.raises(ValueError, match=r"\(n, c, h, w\)"):
        roi_pool(x[0], boxes, 2)
    with pytest.raises(TypeError, match="one dtype"):
        roi_pool(x, boxes.astype("float32"), 2)
    with pytest.raises(ValueError, match="multiple of 25"):
        ps_roi_pool(x, boxes, 5)
    with pytest.raises(ValueError, match="output_size"):
        ps_roi_align(x, boxes, 0)
    if backend_name == "numpy":
        for number in (2.0, -1.0):
            boxes[0, 0] = number
            with pytest.raises(IndexError):
                roi_align(x, boxes, 2)
