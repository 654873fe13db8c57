"""The short convolution: its definition, causality, decoding, and why linear attention needs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention.delta import delta_rule
from mini_nn.attention.short_conv import ConvolutionState, ShortConvolution, short_conv
from mini_nn.check import check_grads
from mini_nn.nn import functional as F
from tests.support import assert_close, host

WIDTHS = st.integers(1, 5)


@given(st.integers(0, 12), WIDTHS, st.integers(0, 2**32))
def test_definition(xp: Any, t: int, width: int, seed: int) -> None:
    rng = Rng(seed)
    x, weight = rng.normal((2, t, 3), dtype="float64"), rng.normal((3, width), dtype="float64")
    want = np.zeros((2, t, 3))
    for i in range(t):
        for j in range(width):
            if i - width + 1 + j >= 0:
                want[:, i] += host(weight)[:, j] * host(x)[:, i - width + 1 + j]
    y = short_conv(x, weight)
    assert_close(y, want)
    if t:  # as a depthwise convolution with zeros on the left
        padded = xp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (width - 1, 0)))
        assert_close(y, F.conv1d(padded, weight[:, None], groups=3).swapaxes(1, 2))


@given(st.integers(0, 12), WIDTHS, st.data(), st.integers(0, 2**32))
def test_splitting(xp: Any, t: int, width: int, data: Any, seed: int) -> None:
    cut = data.draw(st.integers(0, t))
    x = Rng(seed).normal((2, t, 3), dtype="float64")
    layer = ShortConvolution(3, width, bias=True, rng=Rng(1)).astype("float64")
    whole, end = layer(x, ())
    first, state = layer(x[:, :cut], ())
    rest, last = layer(x[:, cut:], state)
    assert_close(ops.concatenate([first, rest], axis=1), whole)
    assert_close(last.inputs, end.inputs)
    assert_close(layer(x), whole)
    assert end.inputs.shape == (2, width - 1, 3)


def test_causality(xp: Any) -> None:
    """Bitwise, and the gradient of what comes later is 0; padding on both sides would leak."""
    x, weight = Rng(2).normal((1, 9, 2), dtype="float64"), Rng(3).normal((2, 4), dtype="float64")
    changed = x.copy()
    changed[:, 5] = 7.0
    assert_close(short_conv(changed, weight)[:, :5], short_conv(x, weight)[:, :5], atol=1e-300)
    leaf = Tensor(x, requires_grad=True)
    (g,) = grad(short_conv(leaf, weight)[:, 5].sum(), leaf)
    assert float(abs(g.data[:, 6:]).sum()) == 0.0 and float(abs(g.data[:, 2:6]).min()) > 0.0
    around = [xp.pad(z.swapaxes(1, 2), ((0, 0), (0, 0), (1, 2))) for z in (x, changed)]
    leaks = [F.conv1d(z, weight[:, None], groups=2)[:, :, :5] for z in around]
    assert abs(host(leaks[0]) - host(leaks[1])).max() > 0.1


def test_the_layer_starts_uniform_and_adds_its_bias(xp: Any) -> None:
    """U(−½, ½) for four tokens: 40,000 draws come as close to the ends as 10⁻³; the bias is 0."""
    weight = host(ShortConvolution(10_000, 4, rng=Rng(6)).weight)
    assert 0.499 < weight.max() <= 0.5 and -0.5 <= weight.min() < -0.499
    assert abs(weight.std() - 12**-0.5) < 0.01
    assert ShortConvolution(3, 2, rng=Rng(6)).bias is None
    layer = ShortConvolution(3, 2, True, rng=Rng(6))
    assert (host(layer.bias) == 0).all() and layer.bias.shape == (3,)
    x = Rng(7).normal((2, 5, 3))
    plain = layer(x)
    layer.bias.data[...] = xp.asarray([1.0, 2.0, 3.0])
    assert_close(layer(x), plain + layer.bias)


def test_gradients(xp: Any) -> None:
    x, weight = Rng(4).normal((2, 5, 2), dtype="float64"), Rng(5).normal((2, 3), dtype="float64")
    check_grads(short_conv, x, weight, weight[:, 0] + 0.0, order=2)


def test_a_layer_completes_what_it_has_seen(xp: Any) -> None:
    """a b … a → b: keys that are the token before recall the successor, plain ones the token."""
    words = xp.eye(8)
    sentence = [0, 1, 2, 3, 4, 5, 6, 2]  # … 2 3 … 2: what came after 2 was 3
    x = words[xp.asarray(sentence)]
    before = xp.zeros((8, 2))
    before[:, 0] = 1.0
    keys = short_conv(x, before)  # the weight of the token before
    assert_close(delta_rule(x, keys, x, is_causal=True)[-1], words[3])
    assert_close(delta_rule(x, x, x, is_causal=True)[-1], words[2])


def test_errors(xp: Any) -> None:
    with pytest.raises(ValueError, match=r"\(…, t, d\) and a weight"):
        short_conv(xp.ones((2, 3)), xp.ones((2, 4)))
    x, weight = xp.ones((1, 6, 4)), xp.ones((4, 3))
    for rows in (5, 1):
        with pytest.raises(ValueError, match=rf"\(1, 2, 4\) here, got \(1, {rows}, 4\)"):
            short_conv(x, weight, None, ConvolutionState(xp.zeros((1, rows, 4))))
    for size in (1, 5):
        with pytest.raises(ValueError, match=rf"\(4,\) here, got \({size},\)"):
            short_conv(x, weight, xp.ones(size))
    with pytest.raises(ValueError, match="width=0"):
        ShortConvolution(3, 0)
