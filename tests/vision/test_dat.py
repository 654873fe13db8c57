"""Deformable attention with shared keys (DAT): loops, limits to ordinary attention, ranges."""

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
from mini_nn.vision.dat import (
    ChannelNorm,
    DeformableAttention,
    reference_grid,
    relative_position_bias,
)
from tests.support import assert_close, host


def randomised(seed: int, *args: Any, **options: Any) -> DeformableAttention:
    """A layer in float64 whose offsets and biases matter."""
    layer = DeformableAttention(*args, **options).astype("float64")
    for p in layer.parameters():
        p.data[...] = Rng(seed).normal(p.shape, std=0.5, dtype="float64")
        seed += 1
    return layer


def still(layer: DeformableAttention) -> DeformableAttention:
    """Without offsets."""
    layer.conv_offset[3].weight.data[...] = 0.0
    return layer


def sample(image: Any, y: float, x: float) -> Any:
    """φ in loops: (c, h, w) → (c,)."""
    out = np.zeros(image.shape[0])
    for i, j in itertools.product(range(image.shape[1]), range(image.shape[2])):
        out += max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j)) * image[:, i, j]
    return out


def by_loops(layer: DeformableAttention, x: Any) -> Any:
    """The formulas with the layer's own offsets, one query, key and head after the other."""
    n, dim, height, width = x.shape
    heads, groups, table = layer.n_heads, layer.n_groups, host(layer.rpe_table)
    places = host(layer.positions(layer.proj_q(x))).reshape(n, groups, -1, 2)
    x = host(x)

    def project(conv: Any, columns: Any) -> Any:
        return host(conv.weight)[:, :, 0, 0] @ columns + host(conv.bias)[:, None]

    out = np.zeros(x.shape)
    d, c = dim // heads, dim // groups
    for b in range(n):
        keys = []
        for g in range(groups):
            maps = x[b, g * c : (g + 1) * c]
            pixels = (places[b, g] + 1) / 2 * [height - 1, width - 1]
            keys.append(np.stack([sample(maps, *at) for at in pixels], axis=1))
        k, v = (project(conv, np.concatenate(keys)) for conv in (layer.proj_k, layer.proj_v))
        q = project(layer.proj_q, x[b].reshape(dim, -1))
        y = np.zeros(q.shape)
        for h, p in itertools.product(range(heads), range(height * width)):
            rows = slice(h * d, (h + 1) * d)
            scores = q[rows, p] @ k[rows] / math.sqrt(d)
            for j, (ky, kx) in enumerate(places[b, h * groups // heads]):
                dy = p // width - (ky + 1) / 2 * (height - 1)
                dx = p % width - (kx + 1) / 2 * (width - 1)
                scores[j] += sample(table[h : h + 1], dy + height - 1, dx + width - 1)[0]
            e = np.exp(scores - scores.max())
            y[rows, p] = v[rows] @ (e / e.sum())
        out[b] = project(layer.proj_out, y).reshape(dim, height, width)
    return out


@pytest.mark.parametrize(("groups", "stride", "kernel"), [(1, 1, 3), (2, 2, 5), (4, 2, 3)])
def test_loops(xp: Any, groups: int, stride: int, kernel: int) -> None:
    layer = randomised(0, 8, 4, (4, 5), groups, stride, kernel, 3.0)
    x = Rng(20).normal((2, 8, 4, 5), dtype="float64")
    assert_close(layer(x), by_loops(layer, x), rtol=1e-9, atol=1e-10)


def swin_bias(table: Any, height: int, width: int) -> Any:
    """(heads, H W, H W): the table's entry for each difference of whole pixels."""
    y, x = np.divmod(np.arange(height * width), width)
    return table[:, y[:, None] - y + height - 1, x[:, None] - x + width - 1]


@pytest.mark.parametrize("groups", [1, 2])
def test_without_offsets_it_is_ordinary_attention(xp: Any, groups: int) -> None:
    """Stride 1 and Δp = 0: all pixels are keys, with Swin's relative position bias."""
    layer = still(randomised(1, 8, 4, (3, 4), groups))
    x = Rng(20).normal((2, 8, 3, 4), dtype="float64")
    bias = swin_bias(host(layer.rpe_table), 3, 4)
    q, k, v = (
        p(x).reshape(2, 4, 2, 12).swapaxes(-1, -2)
        for p in (layer.proj_q, layer.proj_k, layer.proj_v)
    )
    y = ops.scaled_dot_product_attention(q, k, v, attn_mask=xp.asarray(bias))
    want = layer.proj_out(y.swapaxes(-1, -2).reshape(2, 8, 3, 4))
    assert_close(layer(x), host(want), rtol=1e-9, atol=1e-11)


def test_the_half_cell_of_mixed_conventions(xp: Any) -> None:
    """Centres (i + ½) on a grid whose −1 and 1 are pixels: every key half a pixel off."""
    layer = still(randomised(1, 8, 4, (3, 4)))
    x = Rng(20).normal((2, 8, 3, 4), dtype="float64")
    want, proper = host(layer(x)), layer.positions
    half = xp.asarray([0.5 * 2 / 2, 0.5 * 2 / 3])
    layer.positions = lambda queries: proper(queries) + half  # type: ignore[method-assign]
    assert abs(host(layer(x)) - want).max() > 0.05


@given(st.integers(1, 6), st.integers(1, 6))
def test_the_grid_of_references(xp: Any, height: int, width: int) -> None:
    """From −1 to 1 in equal steps, symmetric; a single place is the middle."""
    grid = host(reference_grid(height, width, "float64"))
    assert grid.shape == (height, width, 2)
    for axis, length in enumerate((height, width)):
        line = np.moveaxis(grid[..., axis], axis, 0)
        assert_close(line, -line[::-1], atol=1e-15)
        if length > 1:
            assert_close(line[0], -1.0) and assert_close(line[-1], 1.0)
            assert_close(np.diff(line, axis=0), 2 / (length - 1), rtol=1e-12)
    assert reference_grid(2, 2).dtype == "float32"


@given(st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 2.0, 5.0]), st.integers(1, 2))
def test_the_range_of_offsets(xp: Any, seed: int, s: float, stride: int) -> None:
    """|Δp| ≤ s / (n − 1), however large the network's answer: for s = 2 up to the neighbour."""
    layer = randomised(seed, 4, 2, (5, 7), 2, stride, 3, s)
    layer.conv_offset[3].weight.data[...] *= 1e3
    queries = Rng(seed).normal((1, 4, 5, 7), dtype="float64")
    places = layer.positions(queries)
    rows, columns = -(-5 // stride), -(-7 // stride)
    assert places.shape == (1, 2, rows, columns, 2)
    offsets = abs(host(places) - host(reference_grid(rows, columns, "float64")))
    reach = np.array([s / (rows - 1), s / (columns - 1)])
    assert (offsets <= reach + 1e-12).all()
    assert s == 0 or (offsets > 0.9 * reach).mean() > 0.5


def test_groups_have_places_of_their_own_by_shared_weights(xp: Any) -> None:
    """Equal channels in two groups are sampled at equal places, other channels at others."""
    layer = randomised(0, 8, 2, (4, 4), 2)
    half = Rng(1).normal((1, 4, 4, 4), dtype="float64")
    places = host(layer.positions(ops.concatenate((half, half), axis=1)))
    assert_close(places[:, 0], places[:, 1])
    places = host(layer.positions(ops.concatenate((half, -half), axis=1)))
    assert abs(places[:, 0] - places[:, 1]).max() > 0.01


def test_the_bias_between_entries(xp: Any) -> None:
    """On a table that is affine in the displacement, the bias is exactly affine as well."""
    height, width = 3, 4
    dy, dx = np.meshgrid(np.arange(-2.0, 3), np.arange(-3.0, 4), indexing="ij")
    table = xp.asarray(np.stack([0.5 * dy - 2 * dx + 1, dy + dx]))
    places = reference_grid(height, width, "float64").reshape(-1, 2)
    keys = Rng(0).uniform((1, 2, 5, 2), -1.0, 1.0, "float64")
    bias = host(relative_position_bias(table, places, keys))
    steps = (host(places)[:, None] - host(keys)[:, :, None]) / 2 * [height - 1, width - 1]
    dy, dx = steps[..., 0], steps[..., 1]
    assert_close(bias[0, 0], (0.5 * dy - 2 * dx + 1)[0, 0], rtol=1e-10, atol=1e-12)
    assert_close(bias[0, 1], (dy + dx)[0, 1], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="3 heads do not divide into 2"):
        relative_position_bias(xp.ones((3, 5, 7)), places, keys)


def test_derivatives(xp: Any) -> None:
    """Of the input and of every parameter, through positions, samples and biases."""
    layer = randomised(3, 4, 2, (3, 3), 2, 1, 3)
    table, last = layer.rpe_table.data + 0.0, layer.conv_offset[3].weight.data + 0.0

    def attend(x: Any, table: Any, weight: Any) -> Any:
        layer.rpe_table, layer.conv_offset[3].weight = table, weight
        return layer(x)

    x = Rng(1).normal((1, 4, 3, 3), dtype="float64")
    check_grads(attend, x, table, last, order=1, dtypes=("float64",))
    layer = randomised(3, 4, 2, (3, 3), 2, 1, 3)
    named = dict(layer.named_parameters())
    gradients = grad((layer(Tensor(x)) ** 2).sum(), [*named.values()])
    sizes = {k: abs(host(g)).max() for k, g in zip(named, gradients, strict=True)}
    assert sizes.pop("proj_k.bias") < 1e-12  # it adds the same number to all scores of a query
    assert min(sizes.values()) > 1e-6


def test_the_norm_is_over_channels(xp: Any) -> None:
    x = Rng(0).normal((2, 5, 3, 4), dtype="float64") * 3.0 + 1.0
    y = host(ChannelNorm(5).astype("float64")(x))
    assert_close(y.mean(axis=1), np.zeros((2, 3, 4)), atol=1e-12)
    assert_close(y.var(axis=1), np.ones((2, 3, 4)), rtol=1e-4)


def test_names_and_start(xp: Any) -> None:
    """The released code's state; 2 numbers for a place and no bias on them."""
    layer = DeformableAttention(8, 4, (3, 4), 2, rng=Rng(0))
    assert {k: a.shape for k, a in layer.state_dict().items()} == {
        "rpe_table": (4, 5, 7),
        "conv_offset.0.weight": (4, 1, 5, 5),
        "conv_offset.0.bias": (4,),
        "conv_offset.1.norm.weight": (4,),
        "conv_offset.1.norm.bias": (4,),
        "conv_offset.3.weight": (2, 4, 1, 1),
    } | {f"proj_{p}.weight": (8, 8, 1, 1) for p in ("q", "k", "v", "out")} | {
        f"proj_{p}.bias": (8,) for p in ("q", "k", "v", "out")
    }  # fmt: skip
    y = layer(Rng(1).normal((1, 8, 3, 4)))
    assert y.shape == (1, 8, 3, 4) and y.dtype == "float32"
    assert abs(host(layer.rpe_table).std() - 0.01) < 0.003


def test_maps_of_one_row(xp: Any) -> None:
    """A single reference along an axis is in the middle; nothing is divided by 0."""
    layer = randomised(0, 4, 2, (1, 4), 1, 1, 3)
    x = Rng(1).normal((2, 4, 1, 4), dtype="float64")
    assert_close(still(layer)(x), by_loops(layer, x), rtol=1e-9, atol=1e-11)
    assert layer(x[:0]).shape == (0, 4, 1, 4)


def test_refusals(xp: Any) -> None:
    for wrong in [(6, 4, (2, 2)), (8, 4, (2, 2), 3), (8, 4, (2, 2), 1, 1, 4)]:
        with pytest.raises(ValueError, match="centres an odd kernel"):
            DeformableAttention(*wrong)
    with pytest.raises(ValueError, match=r"maps of \(3, 4\), got \(1, 8, 4, 4\)"):
        DeformableAttention(8, 4, (3, 4))(xp.zeros((1, 8, 4, 4), "float32"))
