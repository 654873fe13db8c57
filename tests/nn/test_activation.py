"""Corrected activations and alpha-dropout; torch's own functions are in test_functional."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, nn, ops
from mini_nn.nn import functional as F
from mini_nn.nn.gaussian import gaussian_moments
from tests.support import assert_close, host

GOLDEN = safetensors.numpy.load_file(Path(__file__).parents[1] / "golden" / "norm.safetensors")
FUNCTIONS: dict[str, Any] = {
    "relu": F.relu, "sigmoid": F.sigmoid, "tanh": F.tanh, "erf": ops.erf, "elu": F.elu,
    "selu": F.selu, "softplus": F.softplus, "gelu": F.gelu, "silu": F.silu, "mish": F.mish,
    "module": nn.GELU("tanh"), "hardtanh": F.hardtanh,
}  # fmt: skip


# Corrected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_corrected_moments(name: str) -> None:
    """E f~² = 1; centred, E f~ = 0 and Var f~ = 1."""
    f = FUNCTIONS[name]
    assert_close(gaussian_moments(nn.Corrected(f))[1], 1.0, rtol=1e-12)
    mean, square = gaussian_moments(nn.Corrected(f, centre=True))
    assert abs(mean) < 1e-12 and abs(square - 1.0) < 1e-11


def test_corrected_values(xp: Any) -> None:
    """ReLU times √2; sigmoid less 1/2, over the root of its variance; float32 stays float32."""
    x = Rng(0).normal((3, 4))
    assert_close(nn.Corrected(F.relu)(x), math.sqrt(2.0) * host(F.relu(x)))
    layer = nn.Corrected(F.sigmoid, centre=True)
    assert_close(layer.shift, 0.5, rtol=1e-13)
    want = (host(F.sigmoid(x)) - 0.5) / math.sqrt(0.2933790358580 - 0.25)
    assert_close(layer(x), want.astype("float32"), rtol=1e-5, atol=1e-6)
    leaf = Tensor(x, requires_grad=True)
    y = layer(leaf)
    (g,) = mini_nn.grad(y.sum(), leaf)
    assert y.dtype == g.dtype == "float32"
    assert not layer.state_dict() and "scale=0.2082" in repr(layer)


def test_corrected_refuses() -> None:
    """A constant has no variance, and 0 no second moment."""
    with pytest.raises(ValueError, match="divide by"):
        nn.Corrected(lambda x: 0.0 * x + 2.0, centre=True)
    with pytest.raises(ValueError, match="divide by"):
        nn.Corrected(lambda x: 0.0 * x)
    assert_close(nn.Corrected(lambda x: 0.0 * x + 2.0).scale, 2.0, rtol=1e-12)


@pytest.mark.parametrize(
    ("layer", "f"), [(nn.Erf(), ops.erf), (nn.Mish(), F.mish)], ids=["Erf", "Mish"]
)
def test_modules_are_their_functions(xp: Any, layer: Any, f: Any) -> None:
    x = Tensor(Rng(0).normal((3, 4)), requires_grad=True)
    assert_close(layer(x), f(x), rtol=0)
    assert layer(x).requires_grad


# Alpha-dropout


def outcomes(value: float, p: float, xp: Any, f: Any = F.alpha_dropout) -> tuple[float, float]:
    """What an element of this value becomes if it is kept, and if it is dropped."""
    x = xp.full(400, value, "float64")
    keep = host(Rng(0).bernoulli(1.0 - p, (400,)))
    y = host(f(x, p, True, Rng(0)))
    assert keep.any() and not keep.all()
    assert np.ptp(y[keep]) == np.ptp(y[~keep]) == 0.0
    return float(y[keep][0]), float(y[~keep][0])


@given(st.floats(0.05, 0.95))
def test_alpha_dropout_keeps_mean_and_variance(xp: Any, p: float) -> None:
    """Exactly, by enumeration: x = ±1 with equal odds, which has mean 0 and variance 1.

    The same for any such x, since the result is affine in it; plain dropout has variance 1/q.
    """

    def moments(f: Any) -> tuple[float, float]:
        mean = square = 0.0
        for value in (-1.0, 1.0):
            for y, odds in zip(outcomes(value, p, xp, f), (1 - p, p), strict=True):
                mean += 0.5 * odds * y
                square += 0.5 * odds * y * y
        return mean, square

    assert_close(moments(F.alpha_dropout), (0.0, 1.0), rtol=1e-10, atol=1e-12)
    assert_close(moments(F.dropout), (0.0, 1 / (1 - p)), rtol=1e-10, atol=1e-12)
    kept, dropped = outcomes(0.0, p, xp)  # the dropped ones go to selu's lower limit
    limit = float(host(F.selu(xp.asarray([-800.0], "float64")))[0])
    a = outcomes(1.0, p, xp)[0] - kept
    assert_close(dropped - kept, a * limit, rtol=1e-10)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_alpha_dropout_is_torchs(xp: Any, p: float) -> None:
    assert_close(outcomes(1.0, p, xp), GOLDEN[f"alpha_dropout.{p}"], rtol=1e-12)


def test_alpha_dropout_after_selu(xp: Any) -> None:
    """A deep SELU network with it stays at mean 0 and variance 1; with plain dropout it does not.

    256 units of 64 samples in 16 layers: over 30 seeds the mean stays within 0.03 of 0 and the
    second moment within 0.04 of 1, where plain dropout has 2.6 at least.
    """

    def last(f: Any) -> tuple[float, float]:
        rng = Rng(3)
        x = rng.normal((64, 256))
        for _ in range(16):
            x = f(F.selu(x @ rng.normal((256, 256), std=1 / 16.0)), 0.2, True, rng)
        return float(host(x).mean()), float((host(x) ** 2).mean())

    mean, square = last(F.alpha_dropout)
    assert abs(mean) < 0.05 and abs(square - 1.0) < 0.08
    assert last(F.dropout)[1] > 2.0


def test_alpha_dropout_as_a_layer(xp: Any) -> None:
    """In evaluation the identity; p = 1 gives zeros; the gradient is a where kept, 0 elsewhere."""
    layer = nn.AlphaDropout(0.4, rng=Rng(1))
    x = Rng(0).normal((30, 4))
    leaf = Tensor(x, requires_grad=True)
    y = layer(leaf)
    (g,) = mini_nn.grad(y.sum(), leaf)
    kept = host(Rng(1).bernoulli(0.6, (30, 4)))
    low = -F.activation.SELU_SCALE * F.activation.SELU_ALPHA
    a = (0.6 + low * low * 0.4 * 0.6) ** -0.5
    assert_close(g, np.where(kept, np.float32(a), np.float32(0.0)), rtol=1e-6)
    assert y.dtype == g.dtype == "float32" and "p=0.4" in repr(layer)
    assert layer.eval()(leaf) is leaf and nn.AlphaDropout(0.0)(leaf) is leaf
    assert_close(nn.AlphaDropout(1.0)(x), np.zeros((30, 4), "float32"), atol=1e-30)
    for wrong in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="probability"):
            nn.AlphaDropout(wrong)
        with pytest.raises(ValueError, match="probability"):
            F.alpha_dropout(x, wrong)
