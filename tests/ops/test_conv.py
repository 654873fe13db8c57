"""Convolution: random geometries against loops, what it equals in its limits, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, grad, ops
from mini_nn.check import check_grads
from mini_nn.ops import conv as module
from tests.ops import oracles
from tests.support import assert_close, host


def numbers(xp: Any, *shape: int, seed: int = 0, dtype: str = "float64") -> Any:
    return xp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype=dtype)


@st.composite
def geometries(draw: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Shapes of an input and a weight over one axis or two, and options that fit."""
    axes = draw(st.sampled_from([1, 2]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    kernel, stride, dilation, padding = each(1, 3), each(1, 3), each(1, 3), each(0, 2)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    size = tuple(n + draw(st.integers(0, 4)) for n in least)
    groups, c, o, n = (draw(st.integers(1, 3)) for _ in range(4))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (n, groups * c, *size), (groups * o, c, *kernel), options


@given(geometries())
def test_any_geometry(xp: Any, drawn: Any) -> None:
    """The loops' values; and each gradient is the transpose of the map along its letter."""
    shape, kernel, options = drawn
    conv = ops.conv1d if len(shape) == 3 else ops.conv2d
    x, w = numbers(xp, *shape), numbers(xp, *kernel, seed=1)
    bias = numbers(xp, kernel[0], seed=2)
    y = conv(x, w, bias, **options)
    assert_close(y, oracles.conv(host(x), host(w), host(bias), **options), atol=1e-12)
    leaves = [Tensor(a, requires_grad=True) for a in (x, w, bias)]
    z = numbers(xp, *y.shape, seed=3)
    gx, gw, gb = grad(conv(*leaves, **options), leaves, z)
    other_x, other_w = numbers(xp, *shape, seed=4), numbers(xp, *kernel, seed=5)
    at_x = oracles.conv(host(other_x), host(w), **options)
    at_w = oracles.conv(host(x), host(other_w), **options)
    assert_close((gx.data * other_x).sum(), (host(z) * at_x).sum(), rtol=1e-10, atol=1e-10)
    assert_close((gw.data * other_w).sum(), (host(z) * at_w).sum(), rtol=1e-10, atol=1e-10)
    assert_close(gb, host(z).sum(axis=(0, *range(2, z.ndim))), atol=1e-12)


@given(geometries(), st.data())
def test_any_transposed_geometry(xp: Any, drawn: Any, data: Any) -> None:
    """A transposed convolution reaches every size that the convolution maps to its input's."""
    shape, kernel, options = drawn
    conv, back = (
        (ops.conv1d, ops.conv_transpose1d)
        if len(shape) == 3
        else (ops.conv2d, ops.conv_transpose2d)
    )
    x, w = numbers(xp, *shape), numbers(xp, *kernel, seed=1)
    z = numbers(xp, *conv(x, w, **options).shape, seed=2)
    steps = zip(shape[2:], z.shape[2:], kernel[2:], *list(options.values())[:3], strict=True)
    missing = tuple(n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in steps)
    y = back(z, w, output_padding=missing, **options)
    assert_close(y, oracles.conv_transpose(host(z), host(w), output_padding=missing, **options))
    assert_close((y * x).sum(), (z * conv(x, w, **options)).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 2, 4, 5), (3, 2, 2, 3), {"padding": 1}),
        ((1, 4, 5, 4), (4, 2, 3, 2), {"stride": (2, 1), "groups": 2, "dilation": (1, 2)}),
        ((2, 3, 4, 4), (3, 1, 3, 3), {"groups": 3, "padding": "same"}),
    ],
)
def test_the_three_forms_to_the_third_order(
    xp: Any, shape: Any, kernel: Any, options: dict[str, Any]
) -> None:
    x, w, b = numbers(xp, *shape), numbers(xp, *kernel, seed=1), numbers(xp, kernel[0], seed=2)
    check_grads(lambda *xs: ops.conv2d(*xs, **options), x, w, b, order=3)


def test_the_transposed_convolution_to_the_third_order(xp: Any) -> None:
    z, w = numbers(xp, 2, 2, 3, 2), numbers(xp, 2, 2, 3, 2, seed=1)
    options = {"stride": 2, "padding": 1, "output_padding": (1, 0), "groups": 2}
    check_grads(lambda *xs: ops.conv_transpose2d(*xs, **options), z, w, order=3)


@pytest.mark.parametrize("stacked", [1, 4, 7, 10_000])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_how_many_positions_are_stacked_changes_nothing(
    xp: Any, monkeypatch: pytest.MonkeyPatch, stacked: int, groups: int
) -> None:
    x, w = numbers(xp, 2, 4, 6, 5), numbers(xp, 4, 4 // groups, 3, 2, seed=1)
    monkeypatch.setattr(module, "STACKED", stacked)
    leaves = [Tensor(a, requires_grad=True) for a in (x, w)]
    y = ops.conv2d(*leaves, None, (2, 1), 1, 1, groups)
    assert_close(y, oracles.conv(host(x), host(w), None, (2, 1), 1, 1, groups), atol=1e-12)
    gx, gw = grad(y, leaves, y.data)  # of |y|²/2, whose slope along x and along w is |y|²
    square = (y.data * y.data).sum()
    assert_close((gx.data * x).sum(), square, rtol=1e-12)
    assert_close((gw.data * w).sum(), square, rtol=1e-12)


# What it equals


def test_it_is_a_matrix_product_with_the_windows(xp: Any) -> None:
    x, w = numbers(xp, 2, 3, 6, 5), numbers(xp, 4, 3, 3, 2, seed=1)
    columns = ops.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=2)
    y = ops.conv2d(x, w, None, 2, 1, (1, 2))
    assert_close(y.reshape(2, 4, -1), w.reshape(4, -1) @ columns, atol=1e-12)


def test_it_does_not_flip_the_kernel_and_its_transpose_does(xp: Any) -> None:
    """A correlation of sequences, not a flipped one; the transpose multiplies polynomials."""
    a, b = numbers(xp, 7), numbers(xp, 3, seed=1)
    three = b.reshape(1, 1, 3)
    assert_close(
        ops.conv1d(a.reshape(1, 7), three)[0], np.correlate(host(a), host(b), "valid"), atol=1e-12
    )
    assert_close(
        ops.conv_transpose1d(a.reshape(1, 7), three)[0], np.convolve(host(a), host(b)), atol=1e-12
    )
    flipped = ops.conv1d(a.reshape(1, 7), three[..., ::-1])[0]
    with pytest.raises(AssertionError):
        assert_close(flipped, np.correlate(host(a), host(b), "valid"))


def test_a_1x1_kernel_mixes_channels(xp: Any) -> None:
    x, w = numbers(xp, 2, 3, 4, 5), numbers(xp, 6, 3, seed=1)
    y = ops.conv2d(x, w.reshape(6, 3, 1, 1))
    assert_close(y, np.einsum("oc,nchw->nohw", host(w), host(x)), atol=1e-12)


def test_groups_are_convolutions_of_their_own(xp: Any) -> None:
    x, w = numbers(xp, 2, 6, 5, 4), numbers(xp, 4, 3, 2, 3, seed=1)
    y = ops.conv2d(x, w, groups=2)
    assert_close(y[:, :2], ops.conv2d(x[:, :3], w[:2]), atol=1e-12)
    assert_close(y[:, 2:], ops.conv2d(x[:, 3:], w[2:]), atol=1e-12)


def test_dilation_is_a_kernel_with_holes_and_stride_leaves_outputs_out(xp: Any) -> None:
    x, w = numbers(xp, 1, 2, 9, 8), numbers(xp, 3, 2, 3, 2, seed=1)
    holes = np.zeros((3, 2, 7, 3))
    holes[:, :, ::3, ::2] = host(w)
    dilated = ops.conv2d(x, w, None, 1, 2, (3, 2))
    assert_close(dilated, ops.conv2d(x, xp.asarray(holes), None, 1, 2), atol=1e-12)
    assert_close(ops.conv2d(x, w, None, (2, 3), 2, (3, 2)), dilated[:, :, ::2, ::3], atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 2), (3, 4), (5, 2)])
def test_same_keeps_the_size_with_the_greater_half_behind(
    xp: Any, kernel: tuple[int, int], dilation: int
) -> None:
    x, w = numbers(xp, 1, 2, 6, 7), numbers(xp, 2, 2, *kernel, seed=1)
    y = ops.conv2d(x, w, None, 1, "same", dilation)
    assert y.shape == (1, 2, 6, 7)
    sides = [(dilation * (k - 1) // 2, -(-dilation * (k - 1) // 2)) for k in kernel]
    padded = xp.asarray(np.pad(host(x), [(0, 0), (0, 0), *sides]))
    assert_close(y, ops.conv2d(padded, w, None, 1, "valid", dilation), atol=1e-12)


def test_images_that_stand_side_by_side_do_not_mix(xp: Any) -> None:
    """A nan stays in the image that it is in, and in its own windows there, forward and back."""
    x, w = host(numbers(xp, 3, 2, 4, 4)), numbers(xp, 2, 2, 3, 3, seed=1)
    x[1, 0, 0, 3] = np.nan
    leaf = Tensor(xp.asarray(x), requires_grad=True)
    y = ops.conv2d(leaf, w, padding=1)
    touched = np.zeros((3, 2, 4, 4), dtype=bool)
    touched[1, :, :2, 2:] = True
    assert (np.isnan(host(y)) == touched).all()
    z = np.where(touched, np.nan, 1.0)
    (gx,) = grad(y, leaf, xp.asarray(z))
    reached = np.zeros((3, 2, 4, 4), dtype=bool)
    reached[1, :, :3, 1:] = True
    assert (np.isnan(host(gx)) == reached).all()


def test_one_image_without_its_axis(xp: Any) -> None:
    x, w = numbers(xp, 1, 2, 5, 4), numbers(xp, 3, 2, 3, 3, seed=1)
    assert_close(ops.conv2d(x[0], w), ops.conv2d(x, w)[0])
    line = numbers(xp, 1, 2, 5)
    assert_close(ops.conv1d(line[0], w[..., 0]), ops.conv1d(line, w[..., 0])[0])
    assert_close(
        ops.conv_transpose2d(x[0], numbers(xp, 2, 3, 2, 2)),
        ops.conv_transpose2d(x, numbers(xp, 2, 3, 2, 2))[0],
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("groups", [1, 2])
def test_no_images_and_short_numbers(xp: Any, groups: int, dtype: str) -> None:
    x = Tensor(numbers(xp, 0, 2, 5, 4, dtype=dtype), requires_grad=True)
    w = Tensor(numbers(xp, 2, 2 // groups, 3, 3, dtype=dtype), requires_grad=True)
    y = ops.conv2d(x, w, groups=groups, stride=2)
    assert y.shape == (0, 2, 2, 1)
    gx, gw = grad(y, (x, w), y.data)
    assert gx.shape == x.shape and (host(gw) == 0).all()
    assert {str(a.dtype) for a in (y, gx, gw)} == {dtype}


def test_the_tape_keeps_the_input_and_the_weight_alone(xp: Any) -> None:
    """No copy of the input for each kernel position, and none of a padded one."""
    x = Tensor(numbers(xp, 2, 2, 5, 4), requires_grad=True)
    w = Tensor(numbers(xp, 2, 2, 3, 3), requires_grad=True)
    y = ops.conv2d(x, w)
    kept: list[int] = []
    stack, seen = [y.node], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += node.parents
        kept += [v.size for v in (node.kept or {}).values() if hasattr(v, "dtype")]
    assert sum(kept) == x.size + w.size


# What it refuses


@pytest.mark.parametrize(
    ("name", "x", "w", "options", "message"),
    [
        ("conv2d", (3, 5), (4, 3, 3, 3), {}, r"\(N, C, H, W\) or \(C, H, W\).*\(3, 5\)"),
        ("conv2d", (1, 3, 5, 5), (4, 3, 3), {}, r"weight.*kh, kw.*\(4, 3, 3\)"),
        ("conv1d", (1, 2, 3, 5), (4, 3, 3), {}, r"\(N, C, L\) or \(C, L\)"),
        ("conv2d", (1, 3, 5, 5), (4, 2, 3, 3), {}, r"takes 2 channels.*has 3"),
        ("conv2d", (1, 4, 5, 5), (3, 2, 3, 3), {"groups": 2}, r"groups=2 .*to 3"),
        ("conv2d", (1, 3, 5, 5), (4, 3, 3, 3), {"groups": 0}, r"groups .* at least 1, got 0"),
        ("conv2d", (1, 3, 5, 5), (4, 3, 3, 3), {"stride": 0}, r"stride .* at least 1.*got 0"),
        ("conv2d", (1, 3, 5, 5), (4, 3, 3, 3), {"padding": -1}, r"padding .* at least 0.*got -1"),
        ("conv2d", (1, 3, 5, 5), (4, 3, 3, 3), {"padding": "full"}, r"padding .*'full'"),
        ("conv2d", (1, 3, 5, 5), (4, 3, 3, 3), {"dilation": (1, 2, 3)}, r"dilation .*2 of them"),
        ("conv2d", (1, 3, 5, 5), (4, 3, 3, 3), {"dilation": 1.5}, r"dilation .*1\.5"),
        ("conv2d", (1, 3, 5, 5), (4, 3, 3, 3), {"dilation": 3}, r"kernel \(3, 3\).*pad more"),
        ("conv2d", (1, 3, 2, 9), (4, 3, 3, 3), {}, r"larger than the input \(2, 9\)"),
        ("conv1d", (1, 3, 2), (4, 3, 3), {}, r"a kernel \(3,\).*\(2,\)"),
        ("conv2d", (1, 3, 5, 5), (4, 3, 3, 3), {"padding": "same", "stride": 2}, r"at stride 1"),
        ("conv_transpose2d", (1, 3, 5, 5), (4, 3, 3, 3), {}, r"\(in, out / groups.*takes 4"),
        ("conv_transpose2d", (1, 3, 5, 5), (3, 2, 3, 3), {"groups": 2}, r"2 equal parts"),
        ("conv_transpose2d", (1, 3, 1, 1), (3, 2, 1, 1), {"padding": 1}, r"pad less"),
        ("conv_transpose1d", (1, 3, 5), (3, 2, 3), {"output_padding": 1}, r"output_padding is"),
    ],
)
def test_it_says_what_does_not_fit(
    xp: Any, name: str, x: Any, w: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}[: ].*{message}"):
        getattr(ops, name)(numbers(xp, *x), numbers(xp, *w), **options)


def test_a_bias_of_another_length(xp: Any) -> None:
    x, w = numbers(xp, 1, 3, 5, 5), numbers(xp, 4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"a bias \(4,\).*got \(3,\)"):
        ops.conv2d(x, w, numbers(xp, 3))
    with pytest.raises(ValueError, match=r"a bias \(3,\).*got \(4,\)"):
        ops.conv_transpose2d(numbers(xp, 1, 4, 5, 5), w, numbers(xp, 4))
