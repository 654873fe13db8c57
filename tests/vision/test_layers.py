"""Layers that move their grid: how they start, what they load, and what they are equivariant to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.nn import functional as F
from mini_nn.optim import SGD
from mini_nn.vision import (
    ActiveConv2d,
    DCNv4,
    DeformConv2d,
    DeformConvPack,
    ModulatedDeformConvPack,
    MSDeformAttn,
    SpatialTransformer,
    bilinear_sample,
    deform_conv2d,
    from_mmcv,
    grid_sample,
    offset_groups,
)
from tests.support import assert_close, host

OPTIONS: list[dict[str, Any]] = [
    {"padding": 1},
    {"padding": 2, "dilation": 2, "stride": 2, "groups": 2},
    {"padding": 1, "deform_groups": 2, "bias": False},
]


def convolved(layer: Any, x: Any) -> Any:
    return F.conv2d(
        x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_layers_start_as_convolutions(xp: Any, options: dict[str, Any]) -> None:
    x = Rng(0).normal((2, 4, 7, 8))
    v1 = DeformConvPack(4, 6, 3, **options, rng=Rng(1))
    assert_close(v1(x), convolved(v1, x), rtol=1e-4, atol=1e-5)
    v2 = ModulatedDeformConvPack(4, 6, 3, **options, rng=Rng(1))
    bias = 0.0 if v2.bias is None else host(v2.bias)[:, None, None]
    assert_close(host(v2(x)) - bias, 0.5 * (host(convolved(v2, x)) - bias), rtol=1e-4, atol=1e-5)
    full = ModulatedDeformConvPack(4, 6, 3, **options, mask_scale=2.0, rng=Rng(1))
    assert_close(full(x), convolved(full, x), rtol=1e-4, atol=1e-5)
    groups = options.get("deform_groups", 1)
    assert v1.conv_offset.out_channels == 18 * groups
    assert v2.conv_offset_mask.out_channels == 27 * groups


def test_the_thirds_of_the_branch_are_pairs_pairs_and_masks(xp: Any) -> None:
    layer = ModulatedDeformConvPack(2, 3, 3, padding=1, rng=Rng(0))
    branch = layer.conv_offset_mask
    for p in branch.parameters():
        p.data[...] = Rng(2).normal(p.shape)
    x = Rng(1).normal((1, 2, 6, 6))
    found = branch(x)
    first, second, mask = (found[:, 9 * k : 9 * k + 9] for k in range(3))
    want = deform_conv2d(
        x,
        ops.concatenate([first, second], axis=1),
        layer.weight,
        layer.bias,
        padding=1,
        mask=ops.sigmoid(mask),
    )
    assert_close(layer(x), want, rtol=1e-5, atol=1e-6)
    assert_close(layer.offsets(x), found[:, :18], rtol=0, atol=0)
    # the thirds are not "all Δy" and "all Δx"
    interleaved = ops.stack([first, second], axis=2).reshape(first.shape[0], 18, 6, 6)
    wrong = deform_conv2d(
        x, interleaved, layer.weight, layer.bias, padding=1, mask=ops.sigmoid(mask)
    )
    assert abs(host(want) - host(wrong)).max() > 0.05


def test_names_are_the_released_ones_and_mmcvs_load_too(xp: Any) -> None:
    v1, v2 = (make(2, 3, 3, rng=Rng(0)) for make in (DeformConvPack, ModulatedDeformConvPack))
    assert [*v1.state_dict()] == ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]
    names = ["weight", "bias", "conv_offset_mask.weight", "conv_offset_mask.bias"]
    assert [*v2.state_dict()] == names
    theirs = {
        "stage.0.weight": 1, "stage.0.conv_offset.weight": 2, "stage.0.conv_offset.bias": 3,
    }  # fmt: skip
    assert from_mmcv(theirs) == {
        "stage.0.weight": 1,
        "stage.0.conv_offset_mask.weight": 2,
        "stage.0.conv_offset_mask.bias": 3,
    }
    saved = ModulatedDeformConvPack(2, 3, 3, rng=Rng(1))
    for p in saved.parameters():
        p.data[...] = Rng(2).normal(p.shape)
    mmcvs = {n.replace("offset_mask", "offset"): x for n, x in saved.state_dict().items()}
    with pytest.raises((KeyError, ValueError), match="conv_offset"):
        v2.load_state_dict(mmcvs)
    v2.load_state_dict(from_mmcv(mmcvs))
    x = Rng(3).normal((1, 2, 5, 6))
    assert_close(v2(x), saved(x), rtol=0, atol=0)


def test_offsets_are_an_argument_of_the_plain_layer(xp: Any) -> None:
    layer, rng = DeformConv2d(2, 3, 3, padding=1, rng=Rng(0)), Rng(1)
    x, offset = rng.normal((1, 2, 5, 5)), rng.normal((1, 18, 5, 5))
    mask = rng.uniform((1, 9, 5, 5))
    want = deform_conv2d(x, offset, layer.weight, layer.bias, padding=1, mask=mask)
    assert_close(layer(x, offset, mask), want, rtol=0, atol=0)
    assert [*layer.state_dict()] == ["weight", "bias"]


def test_branches_learn_slower(xp: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), DeformConvPack(2, 2, 3), ActiveConv2d(2, 2, 3))
    usual, slow = offset_groups(model, 0.5)
    assert (usual["lr"], slow["lr"]) == (0.5, 0.05)
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)] for p in slow["params"]} == {
        "1.conv_offset.weight", "1.conv_offset.bias", "2.offset",
    }  # fmt: skip
    assert len(usual["params"]) + len(slow["params"]) == len([*model.parameters()])
    before = {name: host(p).copy() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = p.data * 0.0 + 1.0
    SGD([usual, slow], lr=0.5).step()
    # v4 and multi-scale attention have names of their own for it
    deep = nn.Sequential(DCNv4(8, group=2, dw_kernel_size=3), MSDeformAttn(8, 1, 2, 2))
    slow_names = {n for n, p in deep.named_parameters() if any(p is q for q in
                  offset_groups(deep, 1.0)[1]["params"])}  # fmt: skip
    assert slow_names == {
        f"{part}.{kind}" for part in ("0.offset_mask", "0.offset_mask_dw", "1.sampling_offsets")
        for kind in ("weight", "bias")
    }  # fmt: skip
    for name, p in model.named_parameters():
        step = 0.05 if "offset" in name else 0.5
        assert_close(before[name] - host(p), np.full(p.shape, step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [DeformConvPack, ModulatedDeformConvPack])
def test_offsets_from_the_image_move_with_it(xp: Any, make: Any) -> None:
    """Inside, a shifted image gives a shifted output; with offsets that stay it does not."""
    layer = make(1, 2, 3, padding=1, rng=Rng(0)).astype("float64")
    for name, p in layer.named_parameters():
        if "conv_offset" in name:
            p.data[...] = 0.2 * Rng(1).normal(p.shape, dtype="float64")
    wide = Rng(2).normal((1, 1, 16, 16), dtype="float64")
    here, there = wide[:, :, :14, :14], wide[:, :, 2:, 1:15]
    inside = (slice(None), slice(None), slice(5, 9), slice(5, 9))
    moved = (slice(None), slice(None), slice(3, 7), slice(4, 8))
    assert_close(host(layer(there))[moved], host(layer(here))[inside], rtol=1e-9, atol=1e-10)
    fixed = deform_conv2d(there, layer.offsets(here), layer.weight, layer.bias, padding=1)
    still = deform_conv2d(here, layer.offsets(here), layer.weight, layer.bias, padding=1)
    assert abs(host(fixed)[moved] - host(still)[inside]).max() > 1e-2


def disc_response(xp: Any, angle: float, swap: bool) -> tuple[float, float, float]:
    """On the image |p|², the response at the centre of a 3 × 3 kernel of equal weights.

    Returns:
        That of the turned grid, of the plain one, and what sampling between pixels adds: of a
        square, t² + f (1 − f) with f the part of t after the point.
    """
    size, centre = 15, 7
    i, j = np.mgrid[:size, :size] - centre
    image = xp.asarray((i * i + j * j)[None, None].astype("float64"))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    places = np.array([[y, x] for y in (-1, 0, 1) for x in (-1, 0, 1)])
    turned = places @ turn.T
    part = turned - np.floor(turned)
    moved = turned - places
    moved = (moved[:, ::-1] if swap else moved).reshape(1, 18, 1, 1)
    offset = xp.asarray(np.broadcast_to(moved, (1, 18, size, size)).copy())
    weight = xp.ones((1, 1, 3, 3), "float64")
    found, plain = (
        host(deform_conv2d(image, o, weight, padding=1))[0, 0, centre, centre]
        for o in (offset, 0.0 * offset)
    )
    return float(found), float(plain), float((part * (1.0 - part)).sum())


@given(st.floats(-math.pi, math.pi))
def test_a_rotated_grid_sees_a_round_image_alike(xp: Any, angle: float) -> None:
    found, plain, added = disc_response(xp, angle, swap=False)
    assert_close(np.array(found - added), np.array(plain), rtol=1e-10, atol=1e-10)


def test_a_grid_with_x_and_y_interchanged_is_not_rotated(xp: Any) -> None:
    found, plain, added = disc_response(xp, 0.6, swap=True)
    assert abs(found - added - plain) > 0.1


def test_active_convolution_shares_its_grid(xp: Any) -> None:
    layer = ActiveConv2d(2, 3, 3, stride=2, padding=1, rng=Rng(0))
    x = Rng(1).normal((2, 2, 7, 6))
    assert_close(layer(x), convolved(layer, x), rtol=1e-4, atol=1e-5)
    layer.offset.data[...] = Rng(2).normal((9, 2))
    y = layer(x)
    offset = np.broadcast_to(host(layer.offset).reshape(1, 18, 1, 1), (2, 18, *y.shape[2:])).copy()
    want = deform_conv2d(x, xp.asarray(offset), layer.weight, layer.bias, 2, 1)
    assert_close(y, want, rtol=1e-5, atol=1e-6)
    (g,) = grad(ops.sum(ops.sin(y)), [layer.offset])
    assert g.shape == (9, 2)
    assert (host(g) != 0).all()


def identity(xp: Any, inputs: int) -> nn.Module:
    layer = nn.Linear(inputs, 6)
    layer.weight.data[...] = 0.0
    layer.bias.data[...] = xp.asarray([1.0, 0, 0, 0, 1, 0], dtype="float32")
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize("align_corners", [False, True])
def test_a_spatial_transformer_starts_as_the_identity_and_then_moves(
    xp: Any, align_corners: bool
) -> None:
    x = Rng(0).normal((2, 3, 6, 6))
    layer = SpatialTransformer(identity(xp, 108), align_corners=align_corners)
    assert_close(layer(x), x, rtol=1e-4, atol=1e-5)
    found = grad(ops.sum(ops.sin(layer(x))), [*layer.parameters()])
    assert all((host(g) != 0).any() for g in found)
    assert SpatialTransformer(identity(xp, 108), (3, 4))(x).shape == (2, 3, 3, 4)


def test_an_affine_map_is_also_a_warp_by_offsets(xp: Any) -> None:
    """A 1 × 1 kernel with the offsets θ p − p is the spatial transformer with aligned corners."""
    x = Rng(0).normal((1, 2, 7, 7), dtype="float64")
    theta = np.array([[0.8, 0.3, 0.1], [-0.2, 0.9, -0.05]])
    i, j = np.mgrid[:7, :7]
    unit = np.stack([(2 * j - 6) / 6, (2 * i - 6) / 6, np.ones((7, 7))])
    at = np.einsum("ab,bij->aij", theta, unit) * 3 + 3  # (x, y) in pixels
    offset = xp.asarray(np.stack([at[1] - i, at[0] - j])[None])
    eye = xp.eye(2, dtype="float64").reshape(2, 2, 1, 1)
    warped = deform_conv2d(x, offset, eye)
    constant = xp.asarray(theta.reshape(1, 6))
    layer = SpatialTransformer(lambda x: Tensor(constant), align_corners=True)
    assert_close(layer(x), warped, rtol=1e-10, atol=1e-11)
    aligned = xp.asarray(np.stack([at[0] / 3 - 1, at[1] / 3 - 1], axis=-1)[None])
    assert_close(grid_sample(x, aligned, align_corners=True), warped, rtol=1e-10, atol=1e-11)
    shifted = SpatialTransformer(lambda x: Tensor(constant), align_corners=False)
    assert abs(host(shifted(x)) - host(warped)).max() > 0.05
    points = xp.asarray(np.stack([at[1], at[0]], axis=-1).reshape(1, 49, 2))
    assert_close(
        warped, host(bilinear_sample(x, points)).reshape(1, 2, 7, 7), rtol=1e-10, atol=1e-11
    )


def test_a_localization_of_another_size_is_refused(xp: Any) -> None:
    layer = SpatialTransformer(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))
    with pytest.raises(ValueError, match=r"\(n, 6\)"):
        layer(xp.ones((2, 1, 4, 4), "float32"))


def test_options_that_do_not_fit_are_refused(xp: Any) -> None:
    for make in (DeformConvPack, ModulatedDeformConvPack):
        for groups in (0, 3):
            with pytest.raises(ValueError, match="deform_groups divides"):
                make(4, 2, 3, deform_groups=groups)
    with pytest.raises(ValueError, match="padding"):
        ActiveConv2d(1, 1, 3, padding="same")(xp.ones((1, 1, 4, 4), "float32"))
    with pytest.raises(ValueError, match="larger than images"):
        ActiveConv2d(1, 1, 5)(xp.ones((1, 1, 2, 2), "float32"))
    with pytest.raises(ValueError, match="larger than"):
        DeformConvPack(1, 1, 5)(xp.ones((1, 1, 4, 4), "float32"))


@pytest.mark.parametrize("make", [DeformConvPack, ModulatedDeformConvPack, ActiveConv2d])
def test_every_parameter_is_trained_in_its_own_dtype(xp: Any, make: Any) -> None:
    """Also from the start, where all offsets are 0."""
    layer = make(2, 3, 3, 2, 1, rng=Rng(0))
    y = layer(Rng(1).normal((2, 2, 6, 7)))
    found = grad(ops.sum(ops.sin(y)), [*layer.parameters()])
    assert y.dtype == "float32"
    for p, g in zip(layer.parameters(), found, strict=True):
        assert (g.dtype, g.shape) == ("float32", p.shape)
        assert (host(g) != 0).any()
    assert layer(xp.zeros((0, 2, 6, 7), "float32")).shape == (0, 3, 3, 4)
