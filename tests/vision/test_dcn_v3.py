"""DCN v3 and v4: the authors' numbers, loops, averages, and what they share with older versions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.check import check_grads
from mini_nn.nn import functional as F
from mini_nn.vision import DCNv3, DCNv4, dcn_v3, dcn_v4, deform_conv2d
from tests.support import assert_close, host
from tests.vision.goldens import wave

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "vision_dcnv3.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in [*_file.keys()]}
    OPTIONS = json.loads(_file.metadata()["options"])


@pytest.mark.parametrize("k", range(len(OPTIONS)))
def test_the_authors_reference(xp: Any, k: int) -> None:
    """Its grid is in float32, whence the tolerance."""
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in OPTIONS[k].items()}
    names = ("input", "offset", "mask")
    leaves = [Tensor(xp.asarray(GOLDEN[f"{k}.in.{n}"]), requires_grad=True) for n in names]
    out = dcn_v3(*leaves, **options)
    assert_close(out, GOLDEN[f"{k}.out"], rtol=1e-5, atol=1e-5)
    for name, g in zip(names, grad(out, leaves, xp.asarray(wave(out.shape))), strict=True):
        assert_close(g, GOLDEN[f"{k}.grad.{name}"], rtol=1e-4, atol=1e-4)


def in_loops(input: Any, offset: Any, mask: Any, k: Any, options: dict[str, Any]) -> Any:
    """Place by place, x outer and y inner, offsets as (x, y)."""
    (kh, kw), s = k, options["offset_scale"]
    stride, pad, dilation, groups = (options[n] for n in ("stride", "pad", "dilation", "group"))
    n, h, w, c = input.shape
    y = np.zeros((n, *offset.shape[1:3], c))
    for b, i, j, g in np.ndindex(*y.shape[:3], groups):
        channels = slice(g * c // groups, (g + 1) * c // groups)
        for place, (a, r) in enumerate(np.ndindex(kw, kh)):
            at = 2 * (g * kh * kw + place)
            half_x, half_y = dilation * (kw - 1) // 2, dilation * (kh - 1) // 2
            x0, y0 = j * stride - pad + half_x, i * stride - pad + half_y
            px = x0 + s * (a * dilation - half_x + offset[b, i, j, at])
            py = y0 + s * (r * dilation - half_y + offset[b, i, j, at + 1])
            for row, column in np.ndindex(h, w):
                weight = max(0, 1 - abs(row - py)) * max(0, 1 - abs(column - px))
                m = mask[b, i, j, at // 2]
                y[b, i, j, channels] += m * weight * input[b, row, column, channels]
    return y


def case(seed: int, k: Any = (3, 3), group: int = 2, n: int = 1) -> list[Any]:
    rng, places = Rng(seed), group * k[0] * k[1]
    return [
        rng.normal((n, 5, 6, 4), dtype="float64"),
        rng.normal((n, 5, 6, 2 * places), dtype="float64"),
        rng.uniform((n, 5, 6, places), dtype="float64"),
    ]


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_the_equation_in_loops(xp: Any, scale: float) -> None:
    arrays = case(1)
    options = {"stride": 1, "pad": 1, "dilation": 1, "group": 2, "offset_scale": scale}
    want = in_loops(*(host(a) for a in arrays), (3, 3), options)
    assert_close(dcn_v3(*arrays, (3, 3), **options), want, rtol=1e-10, atol=1e-12)


def test_gradients_to_the_second_order(xp: Any) -> None:
    input, offset, mask = case(2)
    offset = xp.floor(offset) + 0.1 + 0.8 * (offset - xp.floor(offset))
    check_grads(
        lambda *a: dcn_v3(*a, group=2),
        input[:, :2, :3],
        offset[:, :2, :3],
        mask[:, :2, :3],
        order=2,
    )


def test_no_offsets_and_even_masks_average(xp: Any) -> None:
    input, offset, mask = case(3)
    found = dcn_v3(input, 0.0 * offset, 0.0 * mask + 1 / 9, group=2)
    want = F.avg_pool2d(input.transpose(0, 3, 1, 2), 3, 1, 1).transpose(0, 2, 3, 1)
    assert_close(found, want, rtol=1e-9, atol=1e-11)


def test_it_is_v2_with_a_shared_weight_and_the_places_transposed(xp: Any) -> None:
    input, offset, mask = case(4)
    v3 = dcn_v3(input, offset, mask, group=2)
    x_first = offset.reshape(1, 5, 6, 2, 3, 3, 2)  # (g, kx, ky, (x, y))
    y_first = ops.flip(x_first.swapaxes(4, 5), axis=-1).reshape(1, 5, 6, 36)
    masks = mask.reshape(1, 5, 6, 2, 3, 3).swapaxes(4, 5).reshape(1, 5, 6, 18)
    unit = xp.ones((4, 1, 3, 3), "float64")  # depthwise: each channel its sum over places
    args = [a.transpose(0, 3, 1, 2) for a in (input, y_first, masks)]
    v2 = deform_conv2d(args[0], args[1], unit, padding=1, mask=args[2])
    assert_close(v3, v2.transpose(0, 2, 3, 1), rtol=1e-10, atol=1e-11)
    # the order of v2 read as that of v3 is something else
    wrong = deform_conv2d(
        args[0], offset.transpose(0, 3, 1, 2), unit, padding=1, mask=mask.transpose(0, 3, 1, 2)
    )
    assert abs(host(v3) - host(wrong.transpose(0, 2, 3, 1))).max() > 0.1


def test_height_and_width_have_their_own_padding(xp: Any) -> None:
    """The released reference interchanges them."""
    input, _, _ = case(5)
    shape = (1, 5 + 4 - 2, 6 + 0 - 2)
    offset, mask = xp.zeros((*shape, 18)), xp.ones((*shape, 9))
    found = dcn_v3(input, offset, mask, pad=(2, 0))
    padded = np.pad(host(input), ((0, 0), (2, 2), (0, 0), (0, 0)))
    want = sum(padded[:, i : i + 7, j : j + 4] for i in range(3) for j in range(3))
    assert_close(found, want, rtol=1e-10, atol=1e-11)


def test_v4_has_both_in_one_array_and_any_weight(xp: Any) -> None:
    input, offset, mask = case(6)
    weights = 7.0 * mask - 3.0
    parts = [
        ops.concatenate(
            [offset[..., 18 * g : 18 * g + 18], weights[..., 9 * g : 9 * g + 9]], axis=-1
        )
        for g in range(2)
    ]
    rest = xp.full((1, 5, 6, 2), 1e9)  # what fills up to a multiple of 8
    joint = ops.concatenate([*parts, rest], axis=-1)
    found = dcn_v4(input, joint, group=2)
    assert_close(found, dcn_v3(input, offset, weights, group=2), rtol=1e-12)
    # all offsets first, as v3 has them, is something else
    wrong = ops.concatenate([offset, weights], axis=-1)
    assert abs(host(dcn_v4(input, wrong, group=2)) - host(found)).max() > 0.1
    leaf = Tensor(joint, requires_grad=True)
    (g,) = grad(ops.sum(ops.sin(dcn_v4(input, leaf, group=2))), [leaf])
    assert (host(g)[..., 54:] == 0).all()


def test_an_even_kernel_of_v4_has_room_with_an_even_dilation(xp: Any) -> None:
    layer = DCNv4(8, 2, 2, group=2, rng=Rng(0))
    assert layer(Rng(1).normal((1, 5, 6, 8))).shape == (1, 5, 6, 8)


V3_KEYS = [
    "center_feature_scale_proj_bias", "center_feature_scale_proj_weight", "dw_conv.0.bias",
    "dw_conv.0.weight", "dw_conv.1.1.bias", "dw_conv.1.1.weight", "input_proj.bias",
    "input_proj.weight", "mask.bias", "mask.weight", "offset.bias", "offset.weight",
    "output_proj.bias", "output_proj.weight",
]  # fmt: skip


def test_the_layers_have_the_released_names_and_start_as_stated(xp: Any) -> None:
    x = Rng(0).normal((2, 5, 6, 8))
    v3 = DCNv3(8, group=2, center_feature_scale=True, rng=Rng(1))
    assert sorted(v3.state_dict()) == V3_KEYS
    value = v3.input_proj(x)
    mean = F.avg_pool2d(value.transpose(0, 3, 1, 2), 3, 1, 1).transpose(0, 2, 3, 1)
    assert_close(v3(x), v3.output_proj(0.5 * mean + 0.5 * value), rtol=1e-4, atol=1e-5)
    plain = DCNv3(8, group=2, rng=Rng(1))
    assert_close(plain(x), plain.output_proj(mean), rtol=1e-4, atol=1e-5)
    v4 = DCNv4(8, group=2, dw_kernel_size=3, rng=Rng(1))
    assert v4.offset_mask.out_features == 8 * math.ceil(3 * 18 / 8) == 56
    assert sorted(name.split(".")[0] for name in v4.state_dict() if name.endswith("weight")) == [
        "offset_mask", "offset_mask_dw", "output_proj", "value_proj",
    ]  # fmt: skip
    assert_close(v4(x), host(v4.output_proj.bias) + np.zeros(x.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_the_unmoved_input_is_mixed_in_by_what_each_version_looks_at(xp: Any, make: Any) -> None:
    """v3 decides from the features that make the offsets, v4 from what it has sampled."""
    layer = make(8, group=2, center_feature_scale=True, rng=Rng(1))
    for p in layer.parameters():
        p.data[...] = 0.4 * Rng(5).normal(p.shape)
    x = Rng(0).normal((2, 5, 6, 8))
    if make is DCNv3:
        value, query = layer.input_proj(x), layer.dw_conv(x.transpose(0, 3, 1, 2))
        mask = ops.softmax(layer.mask(query).reshape(2, 5, 6, 2, 9)).reshape(2, 5, 6, 18)
        sampled = dcn_v3(value, layer.offset(query), mask, group=2)
        seen = query
    else:
        value = layer.value_proj(x)
        sampled = seen = dcn_v4(value, layer.offset_mask(x), group=2)
    w, b = layer.center_feature_scale_proj_weight, layer.center_feature_scale_proj_bias
    s = np.repeat(1 / (1 + np.exp(-(host(seen) @ host(w).T + host(b)))), 4, axis=-1)
    mixed = host(sampled) * (1 - s) + host(value) * s
    want = mixed @ host(layer.output_proj.weight).T + host(layer.output_proj.bias)
    assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


def test_the_masks_of_v3_add_up_to_one_and_those_of_v4_need_not(xp: Any) -> None:
    """On an image of ones, away from its edge, y is the sum of the masks."""
    ones = xp.ones((1, 9, 9, 8), "float32")
    for layer, bounded in (
        (DCNv3(8, group=2, rng=Rng(2)), True),
        (DCNv4(8, group=2, rng=Rng(2)), False),
    ):
        for name, p in layer.named_parameters():
            if "mask" in name:
                p.data[...] = Rng(3).normal(p.shape)
            if name.startswith(("offset.", "offset_mask")):
                p.data[...] = 0.3 * Rng(4).normal(p.shape)
        for projection in ("input_proj", "value_proj", "output_proj"):
            if hasattr(layer, projection):
                getattr(layer, projection).weight.data[...] = xp.eye(8, dtype="float32")
        inner = host(layer(ones))[:, 3:-3, 3:-3]
        assert (abs(inner - 1) < 1e-4).all() == bounded


def test_a_stride_reaches_the_branch_of_offsets(xp: Any) -> None:
    x = Rng(0).normal((1, 7, 8, 8))
    assert DCNv3(8, stride=2, group=2, rng=Rng(1))(x).shape == (1, 4, 4, 8)


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_every_parameter_of_a_layer_is_trained(xp: Any, make: Any) -> None:
    layer = make(8, group=2, center_feature_scale=True, rng=Rng(1))
    for p in layer.parameters():
        p.data[...] = 0.3 * Rng(5).normal(p.shape)
    out = layer(Rng(0).normal((1, 5, 5, 8)))
    found = grad(ops.sum(ops.sin(out)), [*layer.parameters()])
    moved = {
        n: bool((host(g) != 0).any())
        for (n, _), g in zip(layer.named_parameters(), found, strict=True)
    }
    assert all(moved.values()), moved
    assert all(g.dtype == "float32" for g in found)


def test_what_does_not_fit_is_refused(xp: Any) -> None:
    input, offset, mask = case(7)
    with pytest.raises(ValueError, match="groups divide"):
        dcn_v3(input, offset, mask, group=3)
    with pytest.raises(ValueError, match=r"mask is \(1, 5, 6, 18\)"):
        dcn_v3(input, offset, mask[..., 1:], group=2)
    with pytest.raises(ValueError, match="larger than images"):
        dcn_v3(input, offset, mask, kernel_size=9, group=2)
    with pytest.raises(TypeError, match="astype"):
        dcn_v3(input.astype("float32"), offset, mask, group=2)
    for options in ({"kernel_size": 2}, {"dw_kernel_size": 2}):
        with pytest.raises(ValueError, match="keeps the size"):
            DCNv4(8, group=2, **options)
    with pytest.raises(ValueError, match="at least 3"):
        dcn_v4(input, offset, group=2)
    with pytest.raises(ValueError, match="do not divide"):
        DCNv3(8, group=3)
    with pytest.raises(ValueError, match="odd"):
        DCNv3(8, 4)
