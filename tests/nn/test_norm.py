"""Normalisation: torch's layers, the statistics of the output, and what it is invariant to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, nn
from mini_nn.nn import functional as F
from tests.nn.goldens import LAYERS, layer_answers_as_torch
from tests.nn.test_layers import NORMS
from tests.support import assert_close, host

AXES = {"batch": (0, 2, 3), "instance": (2, 3), "layer": (1, 2, 3), "group": (2, 3, 4)}
"""What each member of the family takes its mean over: (N, C, H, W), or (N, G, C/G, H, W)."""


def normalised(kind: str, x: Any, eps: float = 1e-5) -> Any:
    """One member of the family without parameters."""
    if kind == "batch":
        return F.batch_norm(x, None, None, training=True, eps=eps)
    if kind == "instance":
        return F.instance_norm(x, eps=eps)
    if kind == "layer":
        return F.layer_norm(x, x.shape[1:], eps=eps)
    return F.group_norm(x, 2, eps=eps)


@pytest.mark.parametrize(
    "i", [pytest.param(i, id=f"{i}-{row[0]}") for i, row in enumerate(LAYERS) if row[0] in NORMS]
)
def test_torch(i: int, xp: Any) -> None:
    layer_answers_as_torch(i, xp)


@given(st.sampled_from([*AXES]), st.integers(0, 2**32), st.floats(0.1, 100.0), st.floats(-10, 10))
def test_one_formula_over_different_axes(
    xp: Any, kind: str, seed: int, scale: float, shift: float
) -> None:
    """(x − mean) / √(var + ε) over the stated axes, by NumPy on the host."""
    x = Rng(seed).normal((3, 4, 2, 5), dtype="float64") * scale + shift
    seen = host(x).reshape(3, 2, 2, 2, 5) if kind == "group" else host(x)
    mean, var = (f(axis=AXES[kind], keepdims=True) for f in (seen.mean, seen.var))
    want = ((seen - mean) / np.sqrt(var + 0.01)).reshape(x.shape)
    assert_close(normalised(kind, x, 0.01), want, rtol=1e-9, atol=1e-9)
    with pytest.raises(AssertionError):  # the classic slip: ε outside of the root
        assert_close(normalised(kind, x, 0.01), (seen - mean) / (np.sqrt(var) + 0.01), rtol=1e-9)


@given(st.sampled_from([*AXES]), st.integers(0, 2**32), st.floats(0.5, 50.0), st.floats(-50, 50))
def test_invariance(xp: Any, kind: str, seed: int, scale: float, shift: float) -> None:
    """Without ε nothing is left of a scale and a shift of the input.

    So a loss of the output has a gradient orthogonal to the input and to the constants.
    """
    x = Rng(seed).normal((3, 4, 2, 5), dtype="float64")
    y = normalised(kind, x, 0.0)
    assert_close(normalised(kind, scale * x + shift, 0.0), y, rtol=1e-7, atol=1e-9)
    leaf = Tensor(x, requires_grad=True)
    cotangent = Rng(seed + 1).normal(x.shape, dtype="float64")
    (g,) = mini_nn.grad(normalised(kind, leaf, 0.0), leaf, cotangent)
    assert abs(float((g * x).sum())) < 1e-9 and abs(float(g.sum())) < 1e-9


@given(st.integers(0, 2**32), st.floats(0.5, 50.0))
def test_rms_norm_forgets_the_scale_only(xp: Any, seed: int, scale: float) -> None:
    x = Rng(seed).normal((3, 4), dtype="float64")
    y = F.rms_norm(x, 4, eps=0.0)
    assert_close((y * y).mean(axis=-1), 1.0)
    assert_close(F.rms_norm(scale * x, 4, eps=0.0), y)
    assert float(abs(F.rms_norm(x + 1.0, 4, eps=0.0) - y).max()) > 1e-3
    centred = x - x.mean(axis=-1, keepdims=True)  # … and on centred rows it is layer norm
    assert_close(F.rms_norm(centred, 4, eps=0.1), F.layer_norm(x, 4, eps=0.1))


def test_limits_of_group_norm(xp: Any) -> None:
    """One group is layer norm over everything, a group for each channel is instance norm."""
    x = Rng(0).normal((3, 4, 2, 5), dtype="float64")
    assert_close(F.group_norm(x, 1), F.layer_norm(x, (4, 2, 5)))
    assert_close(F.group_norm(x, 4), F.instance_norm(x))


def test_batches_of_one_sample(xp: Any) -> None:
    """Batch norm of one image is instance norm."""
    x = Rng(0).normal((1, 4, 2, 5), dtype="float64")
    assert_close(F.batch_norm(x, None, None, training=True), F.instance_norm(x))


# Running statistics


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 1.0]))
def test_running_statistics(xp: Any, seed: int, momentum: float) -> None:
    """An exponential average of the means and of the unbiased variances."""
    layer = nn.BatchNorm1d(3, momentum=momentum)
    mean, var = np.zeros(3), np.ones(3)
    batches = [Rng(seed + n).normal((n, 3)) for n in (2, 5, 3)]
    for x in batches:
        layer(x)
        mean = (1 - momentum) * mean + momentum * host(x).mean(axis=0)
        var = (1 - momentum) * var + momentum * host(x).var(axis=0, ddof=1)
    assert_close(layer.running_mean, mean.astype("float32"), rtol=1e-5, atol=1e-6)
    assert_close(layer.running_var, var.astype("float32"), rtol=1e-5)
    assert int(layer.num_batches_tracked) == 3
    if momentum == 1.0:  # the classic slip: the biased variance
        biased = host(batches[-1]).var(axis=0)
        with pytest.raises(AssertionError):
            assert_close(layer.running_var, biased, rtol=1e-5)


def test_momentum_none_is_the_mean_over_all_batches(xp: Any) -> None:
    layer = nn.BatchNorm1d(2, momentum=None)
    batches = Rng(0).normal((4, 6, 2))
    for x in batches:
        layer(x)
    assert_close(layer.running_mean, host(batches).mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)
    assert_close(layer.running_var, host(batches).var(axis=1, ddof=1).mean(axis=0), rtol=1e-5)


def test_evaluation_is_affine_and_changes_nothing(xp: Any) -> None:
    """Samples do not see each other, and the statistics stay as they are."""
    layer = nn.BatchNorm2d(3)
    x = Rng(0).normal((4, 3, 2, 2))
    layer(x)
    state = {name: host(array).copy() for name, array in layer.state_dict().items()}
    layer.eval()
    assert_close(layer(x)[:1], layer(x[:1]))
    assert_close(layer(2 * x) - layer(x), layer(x) - layer(0 * x), rtol=1e-4, atol=1e-5)
    for name, array in layer.state_dict().items():
        assert_close(array, state[name], rtol=0)
    layer.train()
    assert float(abs(layer(x)[:1] - layer(x[:2])[:1]).max()) > 1e-3  # in training they do


def test_statistics_do_not_enter_the_tape(xp: Any) -> None:
    """The gradient is that of this batch's output alone; buffers stay plain arrays."""
    layer = nn.BatchNorm1d(2)
    x = Tensor(Rng(0).normal((5, 2)), requires_grad=True)
    (layer(x) * Rng(1).normal((5, 2))).sum().backward()
    assert layer.running_mean.dtype == "float32" and not isinstance(layer.running_mean, Tensor)
    assert abs(float(x.grad.sum())) < 1e-4
    frozen = nn.BatchNorm1d(2, track_running_stats=False)
    assert [*frozen.state_dict()] == ["weight", "bias"] and frozen.eval()(x).requires_grad


def test_float32_stays(xp: Any) -> None:
    """Statistics, gradients and outputs of float32 are float32 although ε and momenta are not."""
    for layer in (
        nn.BatchNorm1d(4, momentum=None),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.GroupNorm(2, 4),
    ):
        x = Tensor(Rng(0).normal((3, 4)), requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == "float32"
        assert {a.dtype.name for a in layer.state_dict().values()} <= {"float32", "int64"}


# Wrong use


def test_one_element_has_no_variance(xp: Any) -> None:
    with pytest.raises(ValueError, match="larger batch"):
        nn.BatchNorm1d(3)(xp.ones((1, 3), "float32"))
    with pytest.raises(ValueError, match="larger batch"):
        nn.BatchNorm2d(3)(xp.ones((0, 3, 2, 2), "float32"))
    with pytest.raises(ValueError, match="several"):
        nn.InstanceNorm2d(3)(xp.ones((2, 3, 1, 1), "float32"))
    one = nn.BatchNorm1d(3).eval()(xp.ones((1, 3), "float32"))
    assert_close(one, np.ones((1, 3), "float32"), rtol=1e-5)


def test_constant_input(xp: Any) -> None:
    """Without variance the output is the bias, and nothing is infinite."""
    x = Tensor(xp.full((3, 4, 2, 2), 7.0, "float32"), requires_grad=True)
    for kind in AXES:
        y = normalised(kind, x)
        assert_close(y, np.zeros(x.shape, "float32"), atol=1e-3)
        (g,) = mini_nn.grad(y, x, xp.ones(x.shape, "float32"))
        assert bool(np.isfinite(host(g)).all())


def test_empty_batches(xp: Any) -> None:
    x = xp.zeros((0, 4, 2, 2), "float32")
    for layer in (
        nn.LayerNorm((4, 2, 2)),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4),
    ):
        y = layer.eval()(x)
        assert y.shape == x.shape and y.dtype == "float32"


def test_wrong_shapes(xp: Any) -> None:
    x = xp.ones((2, 4, 3), "float32")
    wrong: list[Any] = [
        lambda: nn.BatchNorm1d(3)(x),
        lambda: nn.BatchNorm2d(4)(x),
        lambda: nn.InstanceNorm2d(4)(x),
        lambda: nn.LayerNorm(4)(x),
        lambda: nn.LayerNorm((2, 4, 3, 1))(x),
        lambda: nn.RMSNorm((2, 3))(x),
        lambda: nn.GroupNorm(2, 6)(x),
        lambda: nn.GroupNorm(3, 4),
        lambda: F.group_norm(x, 3),
        lambda: F.group_norm(x, 0),
        lambda: F.layer_norm(x, ()),
        lambda: F.layer_norm(x, 3, xp.ones(4)),
        lambda: F.batch_norm(x, None, None),
        lambda: F.batch_norm(x, None, None, xp.ones(3), training=True),
        lambda: F.batch_norm(x[0, 0], None, None, training=True),
    ]
    for use in wrong:
        with pytest.raises(ValueError):
            use()


@pytest.mark.parametrize("track", [False, True])
def test_eps_of_instance_norm(xp: Any, track: bool) -> None:
    """With ε = 3 a channel of variance 1 is halved, by its own and by running statistics."""
    layer = nn.InstanceNorm2d(1, eps=3.0, track_running_stats=track)
    x = xp.asarray([[[[-1.0, 1.0], [1.0, -1.0]]]], "float32")
    assert_close(layer(x), 0.5 * x)
    if track:
        layer.load_state_dict(nn.InstanceNorm2d(1, track_running_stats=True).state_dict())
    assert_close(layer.eval()(x), 0.5 * x)
