"""What a node looks at: known networks, the √depth law, and the smallest region."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, nn, ops
from mini_nn.check import check_grads
from mini_nn.ops.elementwise import of
from mini_nn.vision.deform_conv import deform_conv2d
from mini_nn.vision.receptive_field import (
    effective_dilation,
    effective_receptive_field,
    effective_sampling_locations,
    gaussian_width,
    measured_width,
    saliency_region,
)
from tests.support import assert_close, host

SIDE = 33


def tower(depth: int, weights: Any) -> Any:
    """``depth`` convolutions of one channel, their kernels ``weights(layer)`` (k, k)."""

    def f(x: Any) -> Any:
        for layer in range(depth):
            w = weights(layer)
            x = ops.conv2d(x, w[None, None], padding=w.shape[0] // 2)
        return x

    return f


# Pixels


def test_of_one_convolution_it_is_the_kernel(xp: Any) -> None:
    x, w = Rng(0).normal((1, 3, 5, 5)), Rng(1).normal((2, 3, 3, 3))
    found = effective_receptive_field(lambda x: ops.conv2d(x, w), x, (0, 1, 0, 2))
    want = np.zeros((1, 5, 5))
    want[0, 0:3, 2:5] = np.sqrt((host(w)[1] ** 2).sum(0))
    assert_close(found, want)
    both = effective_receptive_field(lambda x: ops.conv2d(x, w), x, (0, slice(None), 0, 2))
    want[0, 0:3, 2:5] = np.sqrt((host(w).sum(0) ** 2).sum(0))  # their sum is the node
    assert_close(both, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("depth", [1, 2, 4, 7])
def test_equal_weights_have_the_width_of_a_random_walk(xp: Any, depth: int, kernel: int) -> None:
    """√(n (k² − 1) / 12), exactly, where the image is large enough."""
    weights = xp.ones((kernel, kernel))
    x = xp.zeros((1, 1, SIDE, SIDE))
    node = (0, 0, SIDE // 2, SIDE // 2)
    found = effective_receptive_field(tower(depth, lambda _: weights), x, node)
    assert_close(measured_width(found)[0], [gaussian_width(depth, kernel)] * 2, rtol=1e-9)
    # all of it could count: n (k − 1) + 1 pixels, but its width is that of a uniform one only once
    line = host(found)[0].sum(0)
    extent = depth * (kernel - 1) + 1
    assert (line > 0).sum() == extent
    uniform = math.sqrt((extent**2 - 1) / 12)
    assert (depth == 1) == math.isclose(gaussian_width(depth, kernel), uniform)


def test_deep_stacks_grow_as_the_root_of_their_depth(xp: Any) -> None:
    """Random weights: the slope of ln width in ln depth is ½; that of the extent would be near 1.

    The expected squares of the gradients are the walk's distribution, and over 16 channels they are
    near it: the widths stay within 10 % of the law.
    """
    depths = [1, 2, 4, 8, 16]
    widths = []
    for depth in depths:
        layers = Rng(depth).normal((depth, 16, 16, 3, 3), std=1 / 12, dtype="float64")

        def f(x: Any, layers: Any = layers) -> Any:
            for w in layers:
                x = ops.conv2d(x, w, padding=1)
            return x

        x = xp.zeros((1, 16, SIDE + 2, SIDE + 2))
        found = effective_receptive_field(f, x, (0, slice(None), 17, 17))
        widths.append(float(host(measured_width(found * found)).mean()))
    assert_close(widths, [gaussian_width(depth, 3) for depth in depths], rtol=0.1)
    slope = np.polyfit(np.log(depths), np.log(widths), 1)[0]
    assert abs(slope - 0.5) < 0.05
    extents = [2 * depth + 1 for depth in depths]
    assert np.polyfit(np.log(depths), np.log(extents), 1)[0] > 0.8


def test_a_deep_profile_is_gaussian(xp: Any) -> None:
    depth = 12
    x = xp.zeros((1, 1, SIDE, SIDE))
    f = tower(depth, lambda _: xp.ones((3, 3)) / 9.0)
    line = host(effective_receptive_field(f, x, (0, 0, 16, 16)))[0].sum(0)
    sigma = gaussian_width(depth, 3)
    bell = (
        np.exp(-((np.arange(SIDE) - 16.0) ** 2) / (2 * sigma**2)) / sigma / math.sqrt(2 * math.pi)
    )
    assert np.abs(line - bell).max() < 0.02 * bell.max()


def test_measured_width(xp: Any) -> None:
    maps = np.zeros((3, 5, 6))
    maps[0, 1, 2] = 3.0  # a point
    maps[1, 0, 1] = maps[1, 4, 1] = 1.0  # two, four pixels apart in y
    with np.errstate(all="raise"):
        found = host(measured_width(xp.asarray(maps)))
    assert_close(found, [[0.0, 0.0], [2.0, 0.0], [math.nan, math.nan]])
    with pytest.raises(ValueError, match="maps"):
        measured_width(xp.zeros(3))


def test_gaussian_width_at_its_edges() -> None:
    assert gaussian_width(0, 3) == 0.0 and gaussian_width(9, 1) == 0.0
    with pytest.raises(ValueError, match="depth"):
        gaussian_width(-1, 3)


def test_errors(xp: Any) -> None:
    with pytest.raises(ValueError, match=r"\(n, c, h, w\)"):
        effective_receptive_field(lambda x: x, xp.zeros((3, 3)), 0)
    with pytest.raises(RuntimeError):
        effective_receptive_field(lambda x: Tensor(xp.ones(3)), xp.zeros((1, 1, 2, 2)), 0)


# Places


def test_where_samples_are_read_matters_as_much_as_the_image_is_steep(xp: Any) -> None:
    """On x = 3 i + 4 j a place moved by (δy, δx) changes its sample by 3 δy + 4 δx: |w| · 5."""
    i = xp.arange(8.0)
    x = (3.0 * i[:, None] + 4.0 * i)[None, None]
    w = Rng(0).normal((1, 1, 3, 3), dtype="float64")
    offset = Rng(1).uniform((1, 9, 2, 6, 6), 0.1, 0.4, "float64")

    def f(places: Any) -> Any:
        return deform_conv2d(x, places.reshape(1, 18, 6, 6), w)

    found = effective_sampling_locations(f, offset, (0, 0, 2, 3), axis=2)
    want = np.zeros((1, 9, 6, 6))
    want[0, :, 2, 3] = 5.0 * np.abs(host(w)).reshape(9)
    assert_close(found, want)
    last = effective_sampling_locations(lambda p: f(p.transpose(0, 1, 4, 2, 3)),
                                        offset.transpose(0, 1, 3, 4, 2), (0, 0, 2, 3))  # fmt: skip
    assert_close(last, want)


# Regions


def test_of_a_linear_node_the_region_is_what_exceeds_the_bound(xp: Any) -> None:
    """Positive contributions: the smallest are removed as long as their sum is within ε."""
    w = host(Rng(0).permutation(16)).reshape(4, 4) + 1.0  # 1 … 16
    image = xp.ones((1, 4, 4))
    weights = xp.asarray(w)

    def f(images: Any) -> Any:
        return (images * weights).sum(axis=(1, 2, 3)).reshape(-1, 1)

    for epsilon, removed in ((0.5, 0), (1.0, 1), (2.9, 1), (3.0, 2), (15.0, 5), (136.0, 16)):
        region = host(saliency_region(f, image, 0, epsilon, batch=3))
        assert_close(region, w > removed)


def test_what_does_not_matter_goes(xp: Any) -> None:
    """A node with a receptive field of 3 × 3 pixels, and nothing else, is left; cells of 2 × 3."""
    layer = nn.Conv2d(2, 3, 3, padding=1, rng=Rng(0))
    image = Rng(1).normal((2, 6, 7))
    region = host(saliency_region(layer, image, (1, 2, 3), 1e-6))
    want = np.zeros((6, 7), bool)
    want[1:4, 2:5] = True
    assert_close(region, want)
    coarse = host(saliency_region(layer, image, (1, 2, 3), 1e-6, cell=(2, 3)))
    want = np.zeros((6, 7), bool)
    want[0:4, 0:6] = True  # every cell that touches it; the last column is a cell by itself
    assert_close(coarse, want)


@given(st.integers(0, 2**32), st.floats(0.0, 1.5))
def test_the_region_is_within_the_bound_and_minimal(xp: Any, seed: int, epsilon: float) -> None:
    """Of a network that is not linear, with another filling; by trying every cell that is left."""
    rng = Rng(seed)
    w, v = rng.normal((4, 9), dtype="float64"), rng.normal((4,), dtype="float64")
    image = rng.normal((1, 3, 3), dtype="float64")

    def f(images: Any) -> Any:
        rows = images.reshape(images.shape[0], 9)
        return ops.tanh(rows @ w.T) @ v[:, None]

    region = host(saliency_region(f, image, 0, epsilon, fill=0.5))

    def change(mask: Any) -> float:
        shown = xp.where(xp.asarray(mask), image, 0.5)
        return abs(float(host(f(shown[None]) - f(image[None]))[0, 0]))

    assert change(region) <= epsilon + 1e-12
    for y, x in itertools.product(range(3), range(3)):
        if region[y, x]:
            fewer = region.copy()
            fewer[y, x] = False
            assert change(fewer) > epsilon - 1e-12


def test_errors_of_regions(xp: Any) -> None:
    image = xp.ones((1, 2, 2))
    with pytest.raises(ValueError, match=r"\(c, h, w\)"):
        saliency_region(lambda x: x, image[0], 0, 0.1)
    with pytest.raises(ValueError, match="epsilon"):
        saliency_region(lambda x: x, image, 0, -0.1)
    with pytest.raises(ValueError, match="cell"):
        saliency_region(lambda x: x, image, 0, 0.1, cell=0)


# Dilation


def moved_by_loops(offset: Any, kernel: Any, dilation: Any) -> Any:
    """Pair by pair."""
    (kh, kw), (n, channels, h, w) = kernel, offset.shape
    groups = channels // (2 * kh * kw)
    out = np.zeros((n, groups, h, w))
    for b, g, y, x in itertools.product(range(n), range(groups), range(h), range(w)):
        at = {}
        for i, j in itertools.product(range(kh), range(kw)):
            channel = 2 * (g * kh * kw + i * kw + j)
            dy, dx = offset[b, channel : channel + 2, y, x]
            at[i, j] = np.array([i * dilation[0] + dy, j * dilation[1] + dx])
        pairs = [((i, j), (i + a, j + 1 - a)) for i, j in at for a in (0, 1)]
        distances = [np.linalg.norm(at[p] - at[q]) for p, q in pairs if q in at]
        out[b, g, y, x] = np.mean(distances)
    return out


@given(st.integers(0, 2**32), st.sampled_from([(3, 3), (2, 4), (1, 3)]), st.integers(1, 2))
def test_effective_dilation_is_the_mean_over_adjacent_pairs(
    xp: Any, seed: int, kernel: Any, groups: int
) -> None:
    offset = Rng(seed).normal((2, 2 * groups * kernel[0] * kernel[1], 2, 3), dtype="float64")
    found = effective_dilation(offset, kernel, (1, 2))
    assert_close(found, moved_by_loops(host(offset), kernel, (1, 2)))


@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_of_a_regular_grid_it_is_the_dilation(xp: Any, dilation: int) -> None:
    assert_close(effective_dilation(xp.zeros((1, 18, 2, 2)), 3, dilation), float(dilation))
    # the same grid made by offsets (d − 1) p_k from the centre
    k = np.arange(3) - 1.0
    grid = np.stack(np.meshgrid(k, k, indexing="ij"), -1).reshape(1, 18, 1, 1) * (dilation - 1)
    assert_close(effective_dilation(xp.asarray(grid), 3), float(dilation))


@given(st.integers(0, 2**32), st.floats(0.1, 5.0), st.floats(0.0, 6.0))
def test_it_is_of_the_shape_of_the_grid(xp: Any, seed: int, scale: float, angle: float) -> None:
    """Moving all points changes nothing, nor does turning them; scaling them scales it."""
    rng = Rng(seed)
    points = rng.normal((1, 9, 2, 1, 1), dtype="float64")
    k = xp.arange(3.0)
    grid = of(points).stack([k[:, None] + 0.0 * k, 0.0 * k[:, None] + k], axis=-1)
    grid = grid.reshape(1, 9, 2, 1, 1)

    def measure(points: Any) -> Any:
        return effective_dilation((points - grid).reshape(1, 18, 1, 1), 3)

    plain = measure(points)
    assert_close(measure(points + rng.normal((2, 1, 1), dtype="float64")), plain)
    assert_close(measure(scale * points), scale * host(plain))
    c, s = math.cos(angle), math.sin(angle)
    y, x = points[:, :, 0:1], points[:, :, 1:2]
    turned = of(points).concatenate((c * y - s * x, s * y + c * x), axis=2)
    assert_close(measure(turned), plain)


def test_planes_of_y_and_x_would_be_another_order(xp: Any) -> None:
    """The classic slip: all y first and then all x, where the channels are pairs."""
    k = np.arange(3) - 1.0
    grid = np.stack(np.meshgrid(k, k, indexing="ij")).reshape(1, 18, 1, 1)
    with pytest.raises(AssertionError):
        assert_close(effective_dilation(xp.asarray(grid), 3), 2.0, rtol=0.01)


def test_effective_dilation_has_gradients(xp: Any) -> None:
    check_grads(lambda o: effective_dilation(o, 2), Rng(0).normal((1, 8, 1, 2), dtype="float64"))
    collapsed = Tensor(xp.zeros((1, 8, 1, 1)), requires_grad=True)
    effective_dilation(collapsed, 2, (1, 1)).sum().backward()
    assert np.isfinite(host(collapsed.grad)).all()
    meeting = np.zeros((1, 4, 1, 1))
    meeting[0, 3] = -1.0  # the second place moved onto the first
    leaf = Tensor(xp.asarray(meeting), requires_grad=True)
    effective_dilation(leaf, (1, 2)).sum().backward()
    assert_close(leaf.grad, 0.0)


def test_errors_of_dilation(xp: Any) -> None:
    with pytest.raises(ValueError, match="two places"):
        effective_dilation(xp.zeros((1, 2, 2, 2)), 1)
    with pytest.raises(ValueError, match="2 G 9"):
        effective_dilation(xp.zeros((1, 9, 2, 2)), 3)
