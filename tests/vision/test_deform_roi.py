"""Deformable RoI pooling: definitions in loops, what it becomes without offsets, what counts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.check import check_grads
from mini_nn.ops.elementwise import of
from mini_nn.optim import SGD
from mini_nn.vision import deform_roi, roi
from mini_nn.vision.deform_roi import (
    DeformPSRoIPool,
    DeformRoIPool,
    ModulatedDeformRoIPool,
    deform_ps_roi_pool,
    deform_roi_pool,
    feature_mimic_loss,
    modulated_deform_roi_pool,
)
from mini_nn.vision.roi import roi_align
from tests.support import assert_close, host
from tests.vision.test_roi import case, hat, rounded


def offsets(seed: int, *shape: int, size: float = 2.0) -> Any:
    return Rng(seed).uniform(shape, -size, size, "float64")


# Definitions in loops


def mean_of_counted(image: Any, points: Any) -> Any:
    """The mean over the points that are in the image, edges and all; 0 if there are none."""
    c, h, w = image.shape
    seen = [hat(image, y, x) for y, x in points if -0.5 <= y <= h - 0.5 and -0.5 <= x <= w - 0.5]
    return np.sum(seen, axis=0) / len(seen) if seen else np.zeros(c)


def pool_by_loops(input: Any, boxes: Any, offset: Any, size: Any, scale: float, gamma: Any) -> Any:
    """Eqs. 5 and 6 with the pixels of Fast R-CNN's bins."""
    kh, kw = size
    out = np.zeros((len(boxes), input.shape[1], kh, kw))
    for k, i, j in itertools.product(range(len(boxes)), range(kh), range(kw)):
        b, *corners = boxes[k]
        x1, y1, x2, y2 = (rounded(z * scale) for z in corners)
        width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
        dx, dy = (0.0, 0.0) if offset is None else offset[k, :, i, j] * gamma * (width, height)
        rows = range(i * height // kh, -(-(i + 1) * height // kh))
        columns = range(j * width // kw, -(-(j + 1) * width // kw))
        points = [(y1 + p + dy, x1 + q + dx) for p in rows for q in columns]
        out[k, :, i, j] = mean_of_counted(input[int(b)], points)
    return out


def kernel_by_loops(
    input: Any,
    boxes: Any,
    offset: Any,
    size: Any,
    scale: float,
    many: int,
    group: Any,
    gamma: float,
) -> Any:
    """The released kernel, one output after the other."""
    (kh, kw), (gh, gw) = size, group
    channels = input.shape[1] // (gh * gw)
    classes = offset.shape[1] // 2
    out = np.zeros((len(boxes), channels, kh, kw))
    for k, c, i, j in itertools.product(range(len(boxes)), range(channels), range(kh), range(kw)):
        b, *corners = boxes[k]
        x1, y1 = (rounded(z) * scale - 0.5 for z in corners[:2])
        x2, y2 = ((rounded(z) + 1) * scale - 0.5 for z in corners[2:])
        width, height = max(x2 - x1, 0.1), max(y2 - y1, 0.1)
        part = i * offset.shape[2] // kh, j * offset.shape[3] // kw
        kind = c // (channels // classes)
        dx, dy = offset[k, 2 * kind, *part] * gamma, offset[k, 2 * kind + 1, *part] * gamma
        top, left = y1 + i * height / kh + dy * height, x1 + j * width / kw + dx * width
        points = [
            (top + p * height / kh / many, left + q * width / kw / many)
            for p in range(many)
            for q in range(many)
        ]
        read = (c * gh + i * gh // kh) * gw + j * gw // kw
        out[k, c, i, j] = mean_of_counted(input[int(b), read : read + 1], points)[0]
    return out


@given(st.integers(0, 2**32), st.sampled_from([(2, 3), (3, 2)]), st.sampled_from([1.0, 0.5]))
def test_the_pool_is_its_definition(xp: Any, seed: int, size: Any, scale: float) -> None:
    x, boxes = case(seed, c=3)
    move = offsets(seed, 4, 2, *size)
    seen = host(x), host(boxes)
    assert_close(
        deform_roi_pool(x, boxes, move, size, scale),
        pool_by_loops(*seen, host(move), size, scale, 0.1),
    )
    assert_close(
        deform_roi_pool(x, boxes, None, size, scale),
        pool_by_loops(*seen, None, size, scale, 0.1),
    )


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 2]),
    st.sampled_from([(2, 3), (4, 2)]),
    st.sampled_from([(2, 3), (1, 1)]),
    st.sampled_from([1.0, 0.5]),
)
def test_the_position_sensitive_pool_is_the_kernel(
    xp: Any, seed: int, classes: int, parts: Any, group: Any, scale: float
) -> None:
    x, boxes = case(seed, c=12)
    move = offsets(seed, 4, 2 * classes, *parts)
    args = ((2, 3), scale, 3, group, 0.1)
    want = kernel_by_loops(host(x), host(boxes), host(move), *args)
    assert_close(deform_ps_roi_pool(x, boxes, move, *args), want)
    with pytest.raises(AssertionError):  # convolution's order, y first
        pairs = host(move).reshape(4, classes, 2, *parts)
        swapped = xp.asarray(pairs[:, :, ::-1].reshape(move.shape).copy())
        inside = x * 0.0 + xp.arange(5.0)[:, None] + 9.0 * xp.arange(6.0)  # every shift shows
        box = xp.asarray([[0.0, 1.0, 0.0, 3.0, 3.0]])
        y = [deform_ps_roi_pool(inside, box, m[:1], *args) for m in (move, swapped)]
        assert_close(y[0], y[1], rtol=1e-6, atol=1e-6)


def test_boxes_are_rounded_away_from_zero(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = case(0, c=2)
    boxes = xp.asarray([[0.0, 0.5, -0.5, 2.5, 2.5], [1.0, 1.5, 0.5, 4.5, 3.5]])
    move = offsets(0, 2, 2, 2, 2, size=0.5)
    args = ((2, 2), 1.0, 4, (1, 1), 0.1)
    want = kernel_by_loops(host(x), host(boxes), host(move), *args)
    assert_close(deform_ps_roi_pool(x, boxes, move, *args), want)
    monkeypatch.setattr(deform_roi, "half_away", lambda x: of(x).rint(x))
    with pytest.raises(AssertionError):
        assert_close(deform_ps_roi_pool(x, boxes, move, *args), want, rtol=1e-3, atol=1e-3)


# Without offsets, and with offsets that mean something


@given(st.integers(0, 2**32), st.sampled_from([-1, 2]))
def test_without_offsets_each_is_its_plain_form(xp: Any, seed: int, ratio: int) -> None:
    x, boxes = case(seed)
    none = xp.zeros((4, 2, 2, 3))
    pairs = [
        (
            modulated_deform_roi_pool(x, boxes, none, (2, 3), 0.5, ratio),
            roi_align(x, boxes, (2, 3), 0.5, ratio, True),
        ),
        (deform_roi_pool(x, boxes, none, (2, 3)), deform_roi_pool(x, boxes, None, (2, 3))),
        (deform_ps_roi_pool(x, boxes, none, (2, 3)), deform_ps_roi_pool(x, boxes, None, (2, 3))),
    ]
    for moved, plain in pairs:
        assert_close(moved, plain, rtol=1e-12, atol=1e-13)


@given(st.integers(0, 2**32))
def test_an_offset_of_one_bin_moves_the_bins_by_one(xp: Any, seed: int) -> None:
    """1 / k of the region's size: 1 / (k γ) before γ.  In y, and in x, channel 0."""
    x, _ = case(seed, c=12, h=9, w=9)
    box = xp.asarray([[0.0, 1.0, 1.0, 6.0, 6.0], [1.0, 2.0, 1.0, 7.0, 3.0]])
    for channel in (0, 1):
        move = np.zeros((2, 2, 3, 3))
        move[:, channel] = 1.0 / (3 * 0.1)
        calls: list[Any] = [
            lambda m: modulated_deform_roi_pool(x, box, m, 3),
            lambda m: deform_ps_roi_pool(x, box, m, 3, group_size=1),
            lambda m: deform_roi_pool(x, box[:1], m[:1], 3),  # whose bins are of 2 pixels
        ]
        for call in calls:
            plain, moved = (host(call(xp.asarray(m))) for m in (0.0 * move, move))
            behind, before = plain[..., 1:], moved[..., :-1]
            if channel == 1:
                behind, before = plain[..., 1:, :], moved[..., :-1, :]
            assert_close(before, behind, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32), st.sampled_from([2, 4]))
def test_offsets_are_in_parts_of_the_region(xp: Any, seed: int, factor: int) -> None:
    """A linear scene at another resolution, and the same offsets, give the same."""
    a, b, c = (float(z) for z in host(Rng(seed).normal((3,), dtype="float64")))

    def scene(scale: int) -> Any:
        at = (np.arange(12 * scale) + 0.5) / scale
        return xp.asarray((a * at[:, None] + b * at + c)[None, None])

    boxes = xp.asarray([[0.0, 4.3, 4.1, 7.9, 6.2]])
    move = offsets(seed, 1, 2, 3, 3)
    y = [modulated_deform_roi_pool(scene(s), boxes, move, 3, float(s)) for s in (1, factor)]
    assert_close(y[0], y[1], rtol=1e-9, atol=1e-9)
    dx, dy = host(move)[0]
    height, width, k = 2.1, 3.6, np.arange(3)
    at_y = 4.1 + (k[:, None] + 0.5) * height / 3 + 0.1 * dy * height
    at_x = 4.3 + (k + 0.5) * width / 3 + 0.1 * dx * width
    assert_close(y[0], (a * at_y + b * at_x + c)[None, None], rtol=1e-9, atol=1e-9)


# What counts


def test_only_samples_in_the_image_count(xp: Any) -> None:
    """Ones pool to 1 where a sample is inside, to 0 where none is, without a gradient there."""
    leaf = Tensor(xp.ones((1, 4, 4, 4)), requires_grad=True)
    boxes = xp.asarray([[0.0, -2.0, 0.0, 3.0, 3.0], [0.0, 9.0, 0.0, 12.0, 3.0]])
    move = Tensor(xp.zeros((2, 2, 2, 2)), requires_grad=True)
    for function in (deform_roi_pool, deform_ps_roi_pool):
        y = function(leaf, boxes, move, 2)
        assert_close(y[:1], 1.0)
        assert_close(y[1:], 0.0)
        (g, gm) = grad(y[1:].sum(), [leaf, move])
        assert_close(g, 0.0)
        assert_close(gm, 0.0)
        far = xp.full((2, 2, 2, 2), 1e3)
        assert_close(function(leaf, boxes, far, 2), 0.0)
    # a sampler that counts everything, like RoIAlign's, gives less
    y = modulated_deform_roi_pool(leaf, boxes, move, 2, 1.0, 4)
    assert_close(y[1:], 0.0)
    with pytest.raises(AssertionError):
        assert_close(y[:1], 1.0, atol=0.1)


def test_what_is_half_a_pixel_outside_still_counts(xp: Any) -> None:
    x = xp.arange(4.0).reshape(1, 1, 1, 4)
    box = xp.asarray([[0.0, 3.0, 0.0, 3.0, 0.0]])  # 2.5 … 3.5 in x: samples 2.5, 3
    for shift, want in ((0.0, 2.75), (0.25, 2.875), (0.5, 3.0), (0.51, 3.0), (1.01, 0.0)):
        move = xp.zeros((1, 2, 1, 1))
        move[0, 0] = shift
        got = deform_ps_roi_pool(x, box, move, 1, 1.0, 2, gamma=1.0)
        assert_close(got, want, rtol=1e-9)


def test_chunks_change_nothing(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, boxes = case(3)
    move = offsets(3, 4, 2, 2, 2)
    functions = (deform_roi_pool, deform_ps_roi_pool, modulated_deform_roi_pool)
    whole = [function(x, boxes, move, 2) for function in functions]
    monkeypatch.setattr(roi, "SAMPLED", 7)
    for function, want in zip(functions, whole, strict=True):
        assert_close(function(x, boxes, move, 2), want, rtol=1e-12, atol=1e-14)
    for function in functions:
        assert function(x, boxes[:0], move[:0], 2).shape[0] == 0


def test_gradients(xp: Any) -> None:
    """Of images, offsets, masks, and of boxes where nothing is rounded; to the second order."""
    x, boxes = case(7, c=4, h=4, w=4, k=2)
    boxes[:, 1:] = xp.asarray([[0.3, 0.2, 2.9, 3.1], [-1.2, 1.3, 2.4, 6.7]])
    move, mask = offsets(7, 2, 2, 2, 2), offsets(8, 2, 2, 2)
    image, corners = boxes[:, :1], boxes[:, 1:]

    def modulated(x: Any, corners: Any, move: Any, mask: Any) -> Any:
        rows = ops.concatenate((image.astype(x.dtype), corners), axis=1)
        return modulated_deform_roi_pool(x, rows, move, 2, mask=mask)

    check_grads(modulated, x, corners, move, mask, rtol=1e-4)
    for function in (deform_roi_pool, deform_ps_roi_pool):
        check_grads(lambda x, m, f=function: f(x, boxes.astype(x.dtype), m, 2), x, move, rtol=1e-4)


def test_float32_stays(xp: Any) -> None:
    x, boxes = (z.astype("float32") for z in case(4))
    move = offsets(4, 4, 2, 2, 2).astype("float32")
    for function in (deform_roi_pool, deform_ps_roi_pool, modulated_deform_roi_pool):
        leaves = [Tensor(z, requires_grad=True) for z in (x, move)]
        y = function(leaves[0], boxes, leaves[1], 2)
        assert y.dtype == "float32"
        assert [str(g.dtype) for g in grad(y.sum(), leaves)] == ["float32", "float32"]


def test_errors(xp: Any) -> None:
    x, boxes = case(5)
    with pytest.raises(ValueError, match=r"offset is \(4, 2, 2, 2\)"):
        deform_roi_pool(x, boxes, xp.zeros((4, 2, 3, 3)), 2)
    with pytest.raises(ValueError, match=r"offset is \(4, 2, 2, 2\)"):
        modulated_deform_roi_pool(x, boxes, xp.zeros((3, 2, 2, 2)), 2)
    with pytest.raises(ValueError, match=r"mask is \(4, 2, 2\)"):
        modulated_deform_roi_pool(x, boxes, xp.zeros((4, 2, 2, 2)), 2, mask=xp.zeros((4, 1, 2, 2)))
    with pytest.raises(TypeError, match="dtype"):
        deform_roi_pool(x, boxes, xp.zeros((4, 2, 2, 2), "float32"), 2)
    with pytest.raises(ValueError, match="multiple of 20 channels"):
        deform_ps_roi_pool(x, boxes, xp.zeros((4, 10, 2, 2)), 2)


# Layers


def test_layers_begin_as_their_plain_forms(xp: Any) -> None:
    x, boxes = (z.astype("float32") for z in case(6))
    assert_close(DeformRoIPool(12, 2)(x, boxes), deform_roi_pool(x, boxes, None, 2))
    layer = ModulatedDeformRoIPool(12, 2, hidden=8, rng=Rng(0))
    assert_close(layer(x, boxes), 0.5 * roi_align(x, boxes, 2, 1.0, 2, True), rtol=1e-5, atol=1e-6)
    sensitive = DeformPSRoIPool(5, 2, num_classes=3)
    features = Rng(1).normal((2, 5, 5, 6))
    assert_close(sensitive(x, features, boxes), deform_ps_roi_pool(x, boxes, None, 2))
    shapes = {k: a.shape for k, a in sensitive.state_dict().items()}
    assert shapes == {"offset_conv.weight": (24, 5, 1, 1), "offset_conv.bias": (24,)}
    assert layer.offset_fc3.weight.shape == (12, 8)
    assert not host(layer.offset_fc3.weight).any() and not host(layer.offset_fc2.bias).any()


def test_the_branch_of_v2_is_drawn_with_deviation_a_hundredth(xp: Any) -> None:
    layer = ModulatedDeformRoIPool(3, 3, hidden=128, rng=Rng(0))
    for weight in (layer.offset_fc1.weight, layer.offset_fc2.weight):
        drawn = host(weight).astype("float64")
        # the variance of n numbers deviates by √(2 / n): five of it is one in 1.7 million
        assert abs(drawn.var() / 1e-4 - 1.0) < 5.0 * math.sqrt(2.0 / drawn.size)
        assert abs(drawn.mean()) < 5.0 * 0.01 / math.sqrt(drawn.size)


def test_layers_learn_where_to_look(xp: Any) -> None:
    """A step along the gradient of their offsets makes a bright spot beside the box count more."""
    at = np.arange(12.0)
    spot = np.exp(-((at[:, None] - 4) ** 2 + (at - 8) ** 2) / 8)
    x = xp.asarray(np.broadcast_to(spot, (1, 4, 12, 12)).astype("float32"))
    boxes = xp.asarray(np.array([[0, 3, 3, 6, 6]], "float32"))
    v1, v2, sensitive = (
        DeformRoIPool(4, 2),
        ModulatedDeformRoIPool(4, 2, hidden=8, rng=Rng(0)),
        DeformPSRoIPool(4, 2),
    )
    calls: list[Any] = [
        (v1, lambda: v1(x, boxes)),
        (v2, lambda: v2(x, boxes)),
        (sensitive, lambda: sensitive(x, x, boxes)),
    ]
    for layer, call in calls:
        optimizer = SGD(layer.parameters(), lr=1.0)
        before = call().sum()
        (-before).backward()
        optimizer.step()
        assert host(call().sum()) > host(before) + 1e-3
    move = host(v1.offset_fc.bias).reshape(2, 4)
    assert (move[0] > 0).all()  # to the right, where the spot is


# Feature mimicking


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_mimicking_is_a_sum_of_angles(xp: Any, seed: int, s: float, t: float) -> None:
    rng = Rng(seed)
    a, b = (rng.normal((5, 3), dtype="float64") for _ in range(2))
    positive = rng.bernoulli(0.5, (5,))
    seen, other, inside = host(a), host(b), host(positive)
    cosines = (seen * other).sum(1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(other, axis=1)
    loss = feature_mimic_loss(a, b, positive)
    assert_close(loss, (1 - cosines)[inside].sum(), rtol=1e-9, atol=1e-12)
    assert_close(feature_mimic_loss(a, b), (1 - cosines).sum(), rtol=1e-9, atol=1e-12)
    assert 0.0 <= host(loss) <= 2.0 * inside.sum()
    assert_close(feature_mimic_loss(s * a, t * b, positive), loss, rtol=1e-9, atol=1e-12)
    assert_close(feature_mimic_loss(a, t * a), 0.0, atol=1e-12)
    assert_close(feature_mimic_loss(a, -t * a, positive), 2.0 * inside.sum(), rtol=1e-9)


def test_mimicking_nothing_costs_nothing(xp: Any) -> None:
    a, b = (Tensor(Rng(k).normal((3, 4)), requires_grad=True) for k in range(2))
    none = xp.zeros(3, "bool")
    loss = feature_mimic_loss(a, b, none)
    assert loss.shape == () and host(loss) == 0.0
    for g in grad(loss, [a, b]):
        assert_close(g, 0.0)
    assert_close(feature_mimic_loss(a[:0], b[:0]), 0.0)


def test_mimicking_at_the_edges(xp: Any) -> None:
    """A row of zeros has no direction; a row outside Ω may hold anything."""
    rows = Rng(0).normal((3, 4), dtype="float64")
    rows[0] = 0.0
    a = Tensor(rows, requires_grad=True)
    b = Rng(1).normal((3, 4), dtype="float64")
    loss = feature_mimic_loss(a, b)
    assert_close(loss, 1.0 + host(feature_mimic_loss(a[1:], b[1:])), rtol=1e-9)
    (g,) = grad(loss, a)
    assert_close(g[0], 0.0)
    rows = rows + 0.0
    rows[2] = math.nan
    a = Tensor(rows, requires_grad=True)
    loss = feature_mimic_loss(a, b, xp.asarray([True, True, False]))
    assert np.isfinite(host(loss)) and np.isfinite(host(grad(loss, a)[0])).all()


def test_gradients_of_mimicking(xp: Any) -> None:
    a, b = (Rng(k).normal((3, 4), dtype="float64") for k in range(2))
    check_grads(lambda a, b: feature_mimic_loss(a, b, xp.asarray([True, False, True])), a, b)


def test_errors_of_mimicking(xp: Any) -> None:
    with pytest.raises(ValueError, match=r"two \(k, d\)"):
        feature_mimic_loss(xp.zeros((2, 3)), xp.zeros((3, 3)))
    with pytest.raises(ValueError, match="booleans"):
        feature_mimic_loss(xp.zeros((2, 3)), xp.zeros((2, 3)), xp.zeros(2))
