"""Deformable attention: the reference's numbers, its definition in loops, and what it becomes."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, backend, grad, ops
from mini_nn.check import check_grads
from mini_nn.optim import SGD
from mini_nn.vision import boxes
from mini_nn.vision import deformable_attention as module
from mini_nn.vision.deform_conv import deform_conv2d
from mini_nn.vision.deformable_attention import (
    MSDeformAttn,
    compass_offsets,
    locations_from_offsets,
    ms_deform_attn,
    sampled_values,
)
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "vision_attention.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in [*_file.keys()]}
    SHAPES = [tuple(shape) for shape in json.loads(_file.metadata()["shapes"])]
for _array in GOLDEN.values():
    _array.flags.writeable = False


def part(prefix: str) -> dict[str, Any]:
    """The arrays whose names start so, by the rest of their names."""
    return {k.removeprefix(prefix): a for k, a in GOLDEN.items() if k.startswith(prefix)}


def wave(shape: tuple[int, ...]) -> Any:
    """The cotangent of make_vision_attention.py."""
    return np.cos(0.7 * np.arange(math.prod(shape)) + 0.3).reshape(shape)


def golden_padding() -> Any:
    masks = [np.zeros((2, *shape), bool) for shape in SHAPES]
    masks[0][1, 3:], masks[0][1, :, 4:], masks[1][1, :, 2:] = True, True, True
    return masks


def flat(masks: Any) -> Any:
    return np.concatenate([mask.reshape(len(mask), -1) for mask in masks], axis=1)


def case(
    seed: int,
    shapes: Any = ((3, 4), (2, 2)),
    n: int = 2,
    queries: int = 3,
    heads: int = 2,
    points: int = 2,
    channels: int = 2,
    low: float = -0.2,
    high: float = 1.2,
) -> tuple[Any, Any, Any]:
    """Values, locations that also lie outside, and weights; in float64."""
    rng, pixels = Rng(seed), sum(h * w for h, w in shapes)
    grid = (n, queries, heads, len(shapes), points)
    value = rng.normal((n, pixels, heads, channels), dtype="float64")
    return value, rng.uniform((*grid, 2), low, high, "float64"), rng.uniform(grid, dtype="float64")


def by_loops(value: Any, shapes: Any, at: Any, weights: Any) -> Any:
    """Eq. 3's inner sums, one number after the other."""
    value, at, weights = host(value), host(at), host(weights)
    out = np.zeros((*at.shape[:3], value.shape[3]))
    starts = np.cumsum([0, *[h * w for h, w in shapes]])
    for n, q, m, level, k in itertools.product(*[range(length) for length in at.shape[:5]]):
        height, width = shapes[level]
        x, y = at[n, q, m, level, k] * (width, height) - 0.5
        for i, j in itertools.product(range(height), range(width)):
            near = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
            pixel = value[n, starts[level] + i * width + j, m]
            out[n, q, m] += weights[n, q, m, level, k] * near * pixel
    return out.reshape(*out.shape[:2], -1)


# The reference's numbers


def test_the_function_is_the_references(xp: Any) -> None:
    given = part("core.in.")
    leaves = {name: Tensor(xp.asarray(a), requires_grad=True) for name, a in given.items()}
    y = ms_deform_attn(leaves["value"], SHAPES, leaves["at"], leaves["weights"])
    assert_close(y, GOLDEN["core.out"], rtol=1e-10, atol=1e-12)
    y.backward(xp.asarray(wave(y.shape)))
    for name, leaf in leaves.items():
        assert_close(leaf.grad, GOLDEN[f"core.grad.{name}"], rtol=1e-10, atol=1e-11)


def golden_module(name: str) -> MSDeformAttn:
    layer = MSDeformAttn(8, len(SHAPES), 2, 3).astype("float64")
    layer.load_state_dict(part(f"{name}.state."))
    return layer


@pytest.mark.parametrize("name", ["points", "boxes"])
def test_the_module_is_the_references(xp: Any, name: str) -> None:
    """Under the same keys, with padding and with both kinds of references."""
    layer = golden_module(name)
    x = {k: Tensor(xp.asarray(a), requires_grad=True) for k, a in part(f"{name}.in.").items()}
    padding = xp.asarray(flat(golden_padding()))
    y = layer(x["query"] + x["pos"], x["reference"], x["memory"], SHAPES, padding)
    assert_close(y, GOLDEN[f"{name}.out"], rtol=1e-10, atol=1e-11)
    y.backward(xp.asarray(wave(y.shape)))
    for k, leaf in x.items():
        assert_close(leaf.grad, GOLDEN[f"{name}.grad.{k}"], rtol=1e-10, atol=1e-10)
    for k, p in layer.named_parameters():
        assert_close(p.grad, GOLDEN[f"{name}.grad.state.{k}"], rtol=1e-10, atol=1e-10)


def test_the_rule_of_boxes_halves_and_divides(xp: Any) -> None:
    """Without the ½ of ½ K⁻¹ (w, h) the reference's numbers are missed."""
    layer, x = golden_module("boxes"), part("boxes.in.")
    wider = x["reference"] * np.array([1.0, 1.0, 2.0, 2.0])
    padding = xp.asarray(flat(golden_padding()))
    query, memory = (xp.asarray(a) for a in (x["query"] + x["pos"], x["memory"]))
    y = layer(query, xp.asarray(wider), memory, SHAPES, padding)
    assert abs(host(y) - GOLDEN["boxes.out"]).max() > 0.01


# The definition


@given(st.integers(0, 2**32))
def test_loops(xp: Any, seed: int) -> None:
    shapes = ((3, 4), (2, 2), (1, 3))
    value, at, weights = case(seed, shapes)
    y = ms_deform_attn(value, shapes, at, weights)
    assert_close(y, by_loops(value, shapes, at, weights))
    swapped = xp.stack((at[..., 1], at[..., 0]), axis=-1)  # the classic slip
    with pytest.raises(AssertionError):
        assert_close(ms_deform_attn(value, shapes, swapped, weights), host(y))


def test_derivatives(xp: Any) -> None:
    """To order 2, away from the lines between pixels, also on points outside of the map."""
    shapes = ((3, 2), (1, 2))
    value, at, weights = case(3, shapes, n=1, queries=2)
    for axis, sizes in enumerate(zip(*[(w, h) for h, w in shapes], strict=True)):
        size = xp.asarray(sizes, dtype="float64")[:, None]
        cell = xp.floor(at[..., axis] * size - 0.5)
        at[..., axis] = (cell + 0.2 + 0.6 * weights + 0.5) / size
    check_grads(lambda v, p, w: ms_deform_attn(v, shapes, p, w), value, at, weights)


@given(st.integers(0, 2**32))
def test_the_fused_form_is_its_twin(xp: Any, seed: int) -> None:
    """Value and gradients of the sparse product are those of sampling level by level."""
    shapes = [(3, 4), (2, 2)]
    leaves = [Tensor(x, requires_grad=True) for x in case(seed, shapes)]
    answers = []
    for attend in (module._attend, module._attend.composite):
        y = attend(*leaves, shapes)
        cotangent = Rng(seed).normal(y.shape, dtype="float64")
        answers.append((y, *grad(y, leaves, cotangent)))
    for fused, plain in zip(*answers, strict=True):
        assert_close(fused, plain.data)


def test_levels_and_points_add_up(xp: Any) -> None:
    """Eq. 3 is the sum of eq. 2 over the levels, and so is its split by points."""
    shapes = ((3, 4), (2, 2))
    value, at, weights = case(0, shapes)
    whole = ms_deform_attn(value, shapes, at, weights)
    first = ms_deform_attn(value[:, :12], shapes[:1], at[:, :, :, :1], weights[:, :, :, :1])
    second = ms_deform_attn(value[:, 12:], shapes[1:], at[:, :, :, 1:], weights[:, :, :, 1:])
    assert_close(first + second, host(whole))
    by_points = [
        ms_deform_attn(value, shapes, at[..., k : k + 1, :], weights[..., k : k + 1])
        for k in range(2)
    ]
    assert_close(by_points[0] + by_points[1], host(whole))


def test_many_blocks_are_one(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    value, at, weights = case(1)
    leaves = [Tensor(x, requires_grad=True) for x in (value, at, weights)]
    answers = []
    for size in (1 << 19, 1, 70):
        monkeypatch.setattr(backend, "GATHERED", size)
        y = ms_deform_attn(leaves[0], ((3, 4), (2, 2)), leaves[1], leaves[2])
        answers.append([host(a) for a in (y, *grad(y.sum(), leaves))])
    for answer in answers[1:]:
        for one, other in zip(answers[0], answer, strict=True):
            assert_close(one, other)


# What it becomes


def centres(xp: Any, height: int, width: int) -> Any:
    """(H W, 2), (x, y)."""
    return xp.asarray([[(j + 0.5) / width, (i + 0.5) / height]
                       for i in range(height) for j in range(width)])  # fmt: skip


def test_centres_read_their_pixel(xp: Any) -> None:
    """(i + ½) / n is pixel i exactly; corners aligned, i / (n − 1), it is not."""
    shapes = ((5, 7),)
    value, _, _ = case(0, shapes)
    at = xp.broadcast_to(centres(xp, 5, 7)[None, :, None, None, None], (2, 35, 2, 1, 1, 2))
    ones = xp.ones((2, 35, 2, 1, 1))
    assert_close(ms_deform_attn(value, shapes, at, ones), host(value).reshape(2, 35, 4), rtol=1e-13)
    mixed = (at * xp.asarray([7.0, 5.0]) - 0.5) / xp.asarray([6.0, 4.0])
    y = ms_deform_attn(value, shapes, mixed, ones)
    assert abs(host(y) - host(value).reshape(2, 35, 4)).max() > 0.1


def test_one_point_and_no_offset_is_the_identity(xp: Any) -> None:
    """K = L = 1, Δp = 0, W = W′ = I: eq. 2 returns what lies at the reference points."""
    layer = MSDeformAttn(4, 1, 2, 1).astype("float64")
    layer.sampling_offsets.bias.data[...] = 0.0
    for projection in (layer.value_proj, layer.output_proj):
        projection.weight.data[...] = xp.eye(4)
    x = Rng(0).normal((2, 12, 4), dtype="float64")
    reference = xp.broadcast_to(centres(xp, 3, 4)[None, :, None], (2, 12, 1, 2))
    assert_close(layer(x, reference, x, ((3, 4),)), host(x), rtol=1e-13)


def test_a_fixed_grid_of_points_is_a_modulated_convolution(xp: Any) -> None:
    """M = 1, K = 9, Δp the 3 × 3 grid: Σ_k m_k(p) x(p + p_k), the weights as DCN's mask."""
    height, width, channels = 4, 5, 3
    x = Rng(0).normal((1, channels, height, width), dtype="float64")
    mask = Rng(1).uniform((1, 9, height, width), dtype="float64")
    want = np.zeros(x.shape)
    padded = np.pad(host(x), ((0, 0), (0, 0), (1, 1), (1, 1)))
    for k, (i, j) in enumerate(itertools.product(range(3), range(3))):
        want += host(mask)[:, k, None] * padded[:, :, i : i + height, j : j + width]
    steps = [[j - 1.0, i - 1.0] for i in range(3) for j in range(3)]
    offsets = xp.broadcast_to(
        xp.asarray(steps)[None, None, None, None], (1, height * width, 1, 1, 9, 2)
    )
    reference = centres(xp, height, width)[None, :, None]
    at = locations_from_offsets(reference, offsets, ((height, width),))
    value = x.reshape(1, channels, -1).swapaxes(1, 2)[:, :, None]
    weights = mask.reshape(1, 9, -1).swapaxes(1, 2)[:, :, None, None]
    y = ms_deform_attn(value, ((height, width),), at, weights)
    assert_close(y.swapaxes(1, 2).reshape(x.shape), want, rtol=1e-12)
    same = ops.conv2d(x, xp.ones((channels, 1, 3, 3)), padding=1, groups=channels)
    y = ms_deform_attn(value, ((height, width),), at, xp.ones(weights.shape))
    assert_close(y.swapaxes(1, 2).reshape(x.shape), host(same), rtol=1e-12)


def test_it_is_a_deformable_convolution_whose_kernel_is_ones(xp: Any) -> None:
    """M = 1, K = 9: DCN v2 with offsets around its 3 × 3 grid and the weights as its mask."""
    height, width, channels = 4, 5, 3
    x = Rng(0).normal((2, channels, height, width), dtype="float64")
    mask = Rng(1).uniform((2, 9, height, width), dtype="float64")
    moved = Rng(2).normal((2, 9, 2, height, width), dtype="float64")  # as (Δy, Δx)
    ones = xp.ones((channels, 1, 3, 3))
    want = deform_conv2d(
        x, moved.reshape(2, 18, height, width), ones, None, (1, 1), (1, 1), (1, 1), mask
    )
    steps = xp.asarray([[i - 1.0, j - 1.0] for i in range(3) for j in range(3)])
    offsets = (moved + steps[:, :, None, None]).transpose(0, 3, 4, 1, 2)[..., ::-1]
    offsets = offsets.reshape(2, height * width, 1, 1, 9, 2)
    shapes = ((height, width),)
    reference = xp.broadcast_to(centres(xp, height, width)[:, None], (2, height * width, 1, 2))
    at = locations_from_offsets(reference, offsets, shapes)
    value = x.reshape(2, channels, -1).swapaxes(1, 2)[:, :, None]
    weights = mask.reshape(2, 9, -1).swapaxes(1, 2)[:, :, None, None]
    y = ms_deform_attn(value, shapes, at, weights)
    assert_close(y.swapaxes(1, 2).reshape(x.shape), host(want), rtol=1e-11, atol=1e-12)


def test_all_points_with_weights_of_products_are_ordinary_attention(xp: Any) -> None:
    """K = H W, the points at all pixels, A = softmax(q kᵀ / √d)."""
    height, width, heads, d = 3, 4, 2, 5
    pixels = height * width
    q, k, v = (Rng(i).normal((2, heads, pixels, d), dtype="float64") for i in range(3))
    want = ops.scaled_dot_product_attention(q, k, v)
    weights = ops.softmax(q @ k.swapaxes(-1, -2) * d**-0.5).transpose(0, 2, 1, 3)[:, :, :, None]
    at = centres(xp, height, width)[None, None, None, None]
    at = xp.broadcast_to(at, (2, pixels, heads, 1, pixels, 2))
    y = ms_deform_attn(v.transpose(0, 2, 1, 3), ((height, width),), at, weights)
    assert_close(y, host(want).transpose(0, 2, 1, 3).reshape(2, pixels, heads * d), rtol=1e-12)


@given(st.integers(0, 2**32))
def test_weights_sum_to_one(xp: Any, seed: int) -> None:
    """Whatever the query says, a constant map is read as that constant: the values are averaged."""
    layer = MSDeformAttn(4, 2, 2, 3).astype("float64")
    for name in ("attention_weights", "sampling_offsets"):
        getattr(layer, name).weight.data[...] = Rng(seed).normal(
            getattr(layer, name).weight.shape, std=0.5, dtype="float64"
        )
    for projection in (layer.value_proj, layer.output_proj):
        projection.weight.data[...] = xp.eye(4)
    layer.sampling_offsets.bias.data[...] = 0.0
    query = Rng(seed + 1).normal((2, 5, 4), dtype="float64")
    constant = Rng(seed + 2).normal((2, 1, 4), dtype="float64")
    shapes = ((64, 64), (48, 48))
    memory = xp.broadcast_to(constant, (2, 64 * 64 + 48 * 48, 4))
    reference = xp.full((2, 5, 2, 2), 0.5)
    assert_close(layer(query, reference, memory, shapes), np.repeat(host(constant), 5, axis=1))


def test_padding_is_neither_read_nor_trained(xp: Any) -> None:
    shapes = ((3, 4), (2, 2))
    layer = MSDeformAttn(4, 2, 2, 3).astype("float64")
    query, reference = Rng(0).normal((2, 5, 4), dtype="float64"), Rng(1).uniform((2, 5, 2, 2))
    reference = reference.astype("float64")
    memory = Tensor(Rng(2).normal((2, 16, 4), dtype="float64"), requires_grad=True)
    layer.value_proj.bias.data[...] = 1.0  # a mask before the projection would let this through
    padding = xp.asarray(np.arange(32).reshape(2, 16) % 3 == 0)
    y = layer(query, reference, memory, shapes, padding)
    assert not host(grad(y.sum(), memory)[0])[host(padding)].any()
    other = ops.where(padding[..., None], 100.0, memory)
    assert_close(layer(query, reference, other, shapes, padding), host(y), rtol=1e-12)
    everywhere = layer(query, reference, memory, shapes, xp.ones((2, 16), "bool"))
    assert_close(everywhere, np.broadcast_to(host(layer.output_proj.bias), (2, 5, 4)))
    assert abs(host(layer(query, reference, other, shapes) - y)).max() > 1.0


def read_at(xp: Any, row: Any, x: float) -> tuple[float, float]:
    """What a row of pixels gives at coordinate x, and the slope there."""
    width = len(row)
    at = xp.asarray([(x + 0.5) / width, 0.5], dtype="float64").reshape(1, 1, 1, 1, 1, 2)
    at = Tensor(at, requires_grad=True)
    value = xp.asarray(row, dtype="float64").reshape(1, width, 1, 1)
    y = ms_deform_attn(value, ((1, width),), at, xp.ones((1, 1, 1, 1, 1)))
    slope = host(grad(y.sum(), at)[0])[..., 0].item() / width
    return host(y).item(), slope


@pytest.mark.parametrize(
    ("x", "value", "slope"),
    [
        *((-1.5, 0, 0), (-0.75, 0.5, 2), (0.25, 2.75, 3), (1.0, 5.0, 2), (3.25, 6.0, -8)),
        *((x, 0, 0) for x in (4.0, 4.5, 1e30, -1e30, math.inf)),
    ],
)
def test_borders_and_kinks(xp: Any, x: float, value: float, slope: float) -> None:
    """Outside is 0 without a gradient, the last half pixel fades out, a pixel has its right slope.

    Truncation for floor would read 0.25 of a pixel at −0.75 with the slope of the other side.
    """
    read = read_at(xp, [2.0, 5.0, 7.0, 8.0], x)
    assert_close(np.array(read), np.array([value, slope]), rtol=1e-12, atol=1e-12)


def test_nan_is_not_hidden(xp: Any) -> None:
    """A location at nan gives nan to its own query and head, and to nothing else."""
    value, at, weights = case(0)
    whole = host(ms_deform_attn(value, ((3, 4), (2, 2)), at, weights))
    at[1, 2, 0, 1, 0, 1] = math.nan
    y = host(ms_deform_attn(value, ((3, 4), (2, 2)), at, weights))
    lost = np.zeros(y.shape, bool)
    lost[1, 2, :2] = True
    assert np.isnan(y[lost]).all()
    assert_close(y[~lost], whole[~lost], rtol=1e-12)


# Costs


@pytest.mark.parametrize("side", [4, 8])
def test_values_that_are_read(xp: Any, side: int) -> None:
    """4 L K for each query and head, whatever the size of the maps: linear, not quadratic."""
    shapes = ((side, side), (side // 2, side // 2))
    pixels = side * side * 5 // 4
    _, at, _ = case(0, shapes, n=1, queries=pixels, heads=2, points=4)
    index = module._corners(at, shapes)[0]
    assert index.size == sampled_values(pixels, 2, 2, 4) == 64 * pixels
    dense = 2 * pixels * pixels
    assert (index.size < dense) == (side == 8)


def test_memory_is_that_of_the_sparse_matrix(xp: Any) -> None:
    """The values at all neighbours would be 64 times a number and a weight."""
    if backend.current().name != "numpy":
        pytest.skip("counts the host's memory")
    value, at, weights = case(0, ((16, 16),), n=1, queries=512, heads=1, points=8, channels=64)
    gathered = sampled_values(512, 1, 1, 8) * 64 * 8
    tracemalloc.start()
    ms_deform_attn(value, ((16, 16),), at, weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.7 * gathered


# The start of training


def test_points_start_on_eight_rays(xp: Any) -> None:
    """Point k at max-norm distance k exactly, for 8 heads on the 8 neighbours of that distance."""
    offsets = host(compass_offsets(8, 2, 4)).astype("float64")
    assert_close(abs(offsets).max(axis=-1), np.broadcast_to(np.arange(1.0, 5), (8, 2, 4)), 1e-6)
    ring = {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)} - {(0, 0)}
    for k in range(4):
        assert {tuple(p) for p in offsets[:, 0, k].round(5) / (k + 1)} == ring
    angle = np.arctan2(offsets[3, ..., 1], offsets[3, ..., 0])
    assert_close(angle, np.full((2, 4), 0.75 * np.pi), rtol=1e-6)
    unscaled = np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)])
    assert abs(abs(unscaled).max(axis=0) - 1).max() > 0.2


def test_the_layer_starts_as_the_papers(xp: Any) -> None:
    """A = 1 / (L K) and the compass for every query; W and W′ Xavier uniform, without bias."""
    layer = MSDeformAttn(32, 2, 8, 4, rng=Rng(0))
    names = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
    assert [*layer.state_dict()] == [f"{n}.{w}" for n in names for w in ("weight", "bias")]
    query = Rng(1).normal((1, 3, 32))
    start = host(compass_offsets(8, 2, 4)).reshape(-1)
    assert_close(layer.sampling_offsets(query)[0, 1], start)
    a = ops.softmax(layer.attention_weights(query).reshape(3, 8, 8))
    assert_close(a, np.full((3, 8, 8), 0.125, "float32"))
    bound = math.sqrt(6 / 64)
    for projection in (layer.value_proj, layer.output_proj):
        w = host(projection.weight)
        assert not host(projection.bias).any() and 0.9 * bound < abs(w).max() <= bound
        assert abs(w.std() / (bound / math.sqrt(3)) - 1) < 0.06  # 4 standard errors
    assert abs(host(layer.value_proj.weight - layer.output_proj.weight)).max() > 0.1


def test_the_compass_is_trained(xp: Any) -> None:
    """It is set by hand, and a parameter all the same; where the map is flat it has no gradient."""
    layer = MSDeformAttn(4, 1, 2, 2, rng=Rng(0))
    before = host(layer.sampling_offsets.bias).copy()
    memory = Rng(1).normal((1, 64, 4))
    reference = xp.full((1, 3, 1, 2), 0.45, "float32")
    (layer(Rng(2).normal((1, 3, 4)), reference, memory, ((8, 8),)) * 1.0).sum().backward()
    SGD([*layer.parameters()], lr=0.1).step()
    moved = abs(host(layer.sampling_offsets.bias) - before)
    assert moved.max() > 1e-4 and all(p.grad is not None for p in layer.parameters())


def test_boxes_hold_the_points_that_training_starts_from(xp: Any) -> None:
    """Centre + k / (2 K) of the size: all inside, the K-th on the edge; unscaled, they are not."""
    box = xp.asarray([[[[0.4, 0.5, 0.2, 0.1]]]])
    offsets = compass_offsets(8, 1, 4)[None, None].astype("float64")
    at = host(locations_from_offsets(box, offsets, ((10, 20),)))
    relative = abs(at - [0.4, 0.5]) / [0.1, 0.05]  # in halves of the size
    assert_close(relative.max(axis=-1)[0, 0, :, 0], np.tile([0.25, 0.5, 0.75, 1.0], (8, 1)), 1e-6)
    unscaled = host(locations_from_offsets(box, offsets * 4, ((10, 20),)))
    assert (abs(unscaled - [0.4, 0.5]) > [0.1001, 0.0501]).any()
    point = host(locations_from_offsets(box[..., :2], offsets, ((10, 20),)))
    assert_close(point, [0.4, 0.5] + host(offsets) / [20, 10], rtol=1e-12)


# Reference points and boxes


def test_reference_points_and_padding_are_the_references(xp: Any) -> None:
    """valid_ratio, the points' way through the encoder, and the proposals' logits."""
    masks = [xp.asarray(mask) for mask in golden_padding()]
    ratios = ops.stack([boxes.valid_ratio(mask, "float64") for mask in masks], axis=1)
    assert_close(ratios, GOLDEN["ratios"], rtol=1e-15)
    padding = xp.asarray(flat(golden_padding()))
    logits, valid = boxes.encoder_proposals(padding, SHAPES, dtype="float64")
    assert_close(logits, GOLDEN["proposals.out"], rtol=1e-12, atol=1e-14)
    assert (host(valid) == GOLDEN["proposals.read"].astype(bool)).all()
    sizes = 1 / (1 + np.exp(-host(logits)[0, :, 2:]))
    assert_close(sizes[:20], 0.05)
    assert_close(sizes[20:], 0.1)


def test_centres_are_reference_points_of_every_level(xp: Any) -> None:
    """Without padding they are the centres; with it, still those of the pixel's own level."""
    shapes = ((4, 6), (2, 3))
    points = boxes.encoder_reference_points(shapes, xp.ones((1, 2, 2)))
    want = np.concatenate([host(centres(xp, *shape)) for shape in shapes])
    assert_close(points, np.repeat(want[None, :, None], 2, axis=2), rtol=1e-14)
    ratios = xp.asarray([[[0.5, 0.75], [2 / 3, 1.0]]], dtype="float64")
    points = host(boxes.encoder_reference_points(shapes, ratios))[0]
    assert_close(points[:24, 0], want[:24], rtol=1e-14)
    assert_close(points[24:, 1], want[24:], rtol=1e-14)
    other = want[:24] / [0.5, 0.75] * [2 / 3, 1.0]  # the same part of the image on the other map
    assert_close(points[:24, 1], other, rtol=1e-14)


def test_all_padding_makes_no_proposal(xp: Any) -> None:
    logits, valid = boxes.encoder_proposals(xp.ones((1, 6), "bool"), ((2, 3),))
    assert not host(valid).any() and np.isposinf(host(logits)).all()
    logits, valid = boxes.encoder_proposals(None, ((2, 3),), batch=2)
    assert host(valid).all() and logits.shape == (2, 6, 4) and logits.dtype == "float32"


@given(st.lists(st.floats(1e-4, 1 - 1e-4), min_size=4, max_size=4))
def test_no_change_leaves_the_box(xp: Any, box: list[float]) -> None:
    reference = xp.asarray([box], dtype="float64")
    assert_close(boxes.refine_boxes(xp.zeros((1, 4)), reference), host(reference), rtol=1e-9)
    refined = boxes.refine_boxes(xp.ones((1, 4)), reference)
    assert_close(boxes.inverse_sigmoid(refined), host(boxes.inverse_sigmoid(reference)) + 1)


def test_the_ends_are_clamped(xp: Any) -> None:
    x = Tensor(xp.asarray([-1.0, 0.0, 5e-6, 0.5, 1.0, 2.0], dtype="float64"), requires_grad=True)
    y = boxes.inverse_sigmoid(x)
    end = math.log(1e-5)
    want = [end, end, math.log(1e-5 / (1 - 5e-6)), 0.0, -end, -end]
    assert_close(y, np.array(want), rtol=1e-9)
    assert np.isfinite(host(grad(y.sum(), x)[0])).all()
    assert_close(
        boxes.refine_boxes(xp.zeros((1, 4)), xp.zeros((1, 4))), np.full((1, 4), 1e-5), 2e-5
    )


@pytest.mark.parametrize("coordinates", [2, 4])
def test_a_layer_is_not_trained_through_those_before(xp: Any, coordinates: int) -> None:
    """b₂ = σ(Δb₂ + σ⁻¹(b₁)): its gradient reaches Δb₂ and not Δb₁; without the cut it would."""
    rng = Rng(0)
    first, second = (
        Tensor(rng.normal((1, 3, 4), dtype="float64"), requires_grad=True) for _ in range(2)
    )
    start = Tensor(rng.uniform((1, 3, coordinates), 0.2, 0.8, "float64"), requires_grad=True)
    b1 = boxes.refine_boxes(first, start)
    b2 = boxes.refine_boxes(second, b1)
    (g,) = grad(b2.sum(), second, retain_graph=True)
    assert_close(g, host(b2) * (1 - host(b2)))
    with pytest.raises(RuntimeError, match="depends"):
        grad(b2.sum(), first)
    with pytest.raises(RuntimeError, match="depends"):
        grad(b1.sum(), start)
    uncut = ops.sigmoid(second + boxes.inverse_sigmoid(b1))
    assert abs(host(grad(uncut.sum(), first)[0])).max() > 0.01
    if coordinates == 2:
        assert_close(b1[..., 2:], 1 / (1 + np.exp(-host(first)[..., 2:])))


def test_the_best_proposals(xp: Any) -> None:
    scores = xp.asarray([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]], dtype="float64")
    made = xp.asarray(np.arange(24.0).reshape(2, 3, 4))
    best = boxes.top_proposals(scores, Tensor(made, requires_grad=True), 2)
    want = host(made)
    assert_close(best, np.stack([want[0, [1, 2]], want[1, [0, 2]]]))
    assert not isinstance(best, Tensor)
    with pytest.raises(ValueError, match="topk"):
        boxes.top_proposals(scores, made, 4)


# Dtypes, edges, refusals


def test_dtype_is_kept_and_arguments_stay(xp: Any) -> None:
    for dtype in ("float32", "float64", "float16"):
        arrays = [x.astype(dtype) for x in case(0)]
        before = [host(x).copy() for x in arrays]
        leaves = [Tensor(x, requires_grad=True) for x in arrays]
        y = ms_deform_attn(leaves[0], ((3, 4), (2, 2)), leaves[1], leaves[2])
        assert y.dtype == dtype and {g.dtype.name for g in grad(y.sum(), leaves)} == {dtype}
        for x, was in zip(arrays, before, strict=True):
            assert (host(x) == was).all()
    layer = MSDeformAttn(4, 2, 2, 3)
    args = (Rng(0).normal((1, 2, 4)), Rng(1).uniform((1, 2, 2, 4)), Rng(2).normal((1, 16, 4)))
    y = layer(*args, ((3, 4), (2, 2)), xp.zeros((1, 16), "bool"))
    assert y.dtype == "float32" and isinstance(y, mini_nn.Tensor)
    assert boxes.valid_ratio(xp.zeros((1, 2, 2), "bool")).dtype == "float32"
    assert (
        boxes.encoder_reference_points(((2, 2),), xp.ones((1, 1, 2), "float32")).dtype == "float32"
    )
    assert boxes.refine_boxes(args[0], args[0] * 0.1).dtype == "float32"


@pytest.mark.parametrize("empty", ["n", "queries", "points"])
def test_empty(xp: Any, empty: str) -> None:
    value, at, weights = case(0, **{empty: 0})
    leaves = [Tensor(x, requires_grad=True) for x in (value, at, weights)]
    y = ms_deform_attn(leaves[0], ((3, 4), (2, 2)), leaves[1], leaves[2])
    assert y.shape == (*at.shape[:2], 4) and not host(y).any()
    for leaf, g in zip(leaves, grad(y.sum(), leaves), strict=True):
        assert g.shape == leaf.shape and not host(g).any()


def test_refusals(xp: Any) -> None:
    value, at, weights = case(0)
    shapes = ((3, 4), (2, 2))
    for wrong in [
        (value, ((3, 4), (2, 3)), at, weights),
        (value[0], shapes, at, weights),
        (value, shapes, at[:, :, :, :1], weights),
        (value, shapes, at, weights[..., :1]),
        (value, shapes, at[:, :, :1], weights[:, :, :1]),
    ]:
        with pytest.raises(ValueError, match=r"S = Σ H W.*got value"):
            ms_deform_attn(*wrong)
    with pytest.raises(TypeError, match=r"float32.*float64.*astype"):
        ms_deform_attn(value, shapes, at, weights.astype("float32"))
    with pytest.raises(ValueError, match="no multiple of 3"):
        MSDeformAttn(4, n_heads=3)
    layer = MSDeformAttn(4, 2, 2, 3)
    args = Rng(0).normal((2, 5, 4)), xp.zeros((2, 5, 2, 3), "float32"), Rng(1).normal((2, 16, 4))
    with pytest.raises(ValueError, match=r"points \(N, Lq, L, 2\) or boxes"):
        layer(*args, shapes)
    with pytest.raises(ValueError, match=r"input_padding_mask is \(N, S\)"):
        layer(*args, shapes, xp.zeros((2, 15), "bool"))
    with pytest.raises(ValueError, match="changes"):
        boxes.refine_boxes(xp.zeros((1, 2)), xp.zeros((1, 2)))
    with pytest.raises(ValueError, match="2 levels"):
        boxes.encoder_reference_points(shapes, xp.ones((1, 3, 2)))
    with pytest.raises(ValueError, match=r"padding is \(N, 16\)"):
        boxes.encoder_proposals(xp.zeros((1, 15), "bool"), shapes)


def test_an_infinite_pixel_at_the_edge_stays_where_it_is(xp: Any) -> None:
    value = np.ones((1, 16, 1, 2))
    value[0, 15] = np.inf  # the last pixel of a map of 4 × 4
    at = np.array([[1.2, 1.2], [0.9, 1.2], [-0.3, 0.4], [0.375, 0.375]]).reshape(1, 4, 1, 1, 1, 2)
    weights = np.ones((1, 4, 1, 1, 1))
    leaves = [Tensor(xp.asarray(x), requires_grad=True) for x in (value, at, weights)]
    out = ms_deform_attn(leaves[0], [(4, 4)], leaves[1], leaves[2])
    assert_close(host(out)[0, :, 0], np.array([0.0, 0.0, 0.0, 1.0]), rtol=0, atol=0)
    assert all(np.isfinite(host(g)).all() for g in grad(ops.sum(out), leaves))
