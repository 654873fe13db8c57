"""Normalisation: torch's layers, the statistics of the output, and what it is invariant to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, nn, ops
from mini_nn.check import check_grads
from mini_nn.nn import functional as F
from mini_nn.nn.norm import (
    dyisru,
    dyt,
    instance_rms_norm,
    modulated_conv2d,
    normalize,
    weight_norm,
)
from tests.nn.goldens import LAYERS, layer_answers_as_torch
from tests.nn.test_layers import NORMS
from tests.support import assert_close, host

GOLDEN = safetensors.numpy.load_file(Path(__file__).parents[1] / "golden" / "norm.safetensors")

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


# The family: one function, and its members as instances


MEMBERS: dict[str, tuple[Any, Any]] = {
    "batch": (
        lambda x, eps: F.batch_norm(x, None, None, training=True, eps=eps),
        lambda x, eps: normalize(x, (0, 2, 3), eps=eps),
    ),
    "instance": (
        lambda x, eps: F.instance_norm(x, eps=eps),
        lambda x, eps: normalize(x, (2, 3), eps=eps),
    ),
    "instance, not centred": (
        lambda x, eps: instance_rms_norm(x, eps=eps),
        lambda x, eps: normalize(x, (2, 3), centre=False, eps=eps),
    ),
    "group": (
        lambda x, eps: F.group_norm(x, 2, eps=eps),
        lambda x, eps: normalize(x.reshape(3, 2, 2, 2, 5), (2, 3, 4), eps=eps).reshape(x.shape),
    ),
    "layer": (
        lambda x, eps: F.layer_norm(x, (4, 2, 5), eps=eps),
        lambda x, eps: normalize(x, (1, 2, 3), eps=eps),
    ),
    "last axis": (
        lambda x, eps: F.layer_norm(x, 5, eps=eps),
        lambda x, eps: normalize(x, -1, eps=eps),
    ),
    "root mean square": (
        lambda x, eps: F.rms_norm(x, (4, 2, 5), eps=eps),
        lambda x, eps: normalize(x, (1, 2, 3), centre=False, eps=eps),
    ),
    "length": (
        lambda x, eps: x / ops.sqrt(ops.sum(x * x, axis=1, keepdims=True) + eps),
        lambda x, eps: normalize(x, 1, centre=False, scale="length", eps=eps),
    ),
    "mean only": (
        lambda x, eps: x - ops.mean(x, axis=(2, 3), keepdims=True),
        lambda x, eps: normalize(x, (2, 3), scale=None, eps=eps),
    ),
}


def derivatives(f: Any, x: Any, seed: int) -> list[Any]:
    """Value, gradient and one product with the Hessian of ⟨random, f⟩."""
    leaf = Tensor(x, requires_grad=True)
    y = f(leaf)
    cotangent = Rng(seed).normal(y.shape, dtype="float64")
    direction = Rng(seed + 1).normal(x.shape, dtype="float64")
    (g,) = mini_nn.grad(y, leaf, cotangent, create_graph=True)
    if not g.requires_grad:  # linear
        return [y, g]
    (h,) = mini_nn.grad(g, leaf, direction)
    return [y, g, h]


@given(st.sampled_from([*MEMBERS]), st.integers(0, 2**32), st.sampled_from([1e-5, 0.3]))
def test_each_member_is_an_instance_of_normalize(
    xp: Any, member: str, seed: int, eps: float
) -> None:
    """The value, the gradient and the Hessian of each norm are those of one call."""
    x = 2.0 * Rng(seed).normal((3, 4, 2, 5), dtype="float64") + 1.0
    norm, instance = (lambda z, f=f: f(z, eps) for f in MEMBERS[member])
    got, want = derivatives(norm, x, seed + 2), derivatives(instance, x, seed + 2)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_instances_differ(xp: Any) -> None:
    """The table's columns matter: no two members are the same function."""
    x = 2.0 * Rng(0).normal((3, 4, 2, 5), dtype="float64") + 1.0
    results = [host(instance(x, 1e-5)) for _, instance in MEMBERS.values()]
    for i, one in enumerate(results):
        assert all(np.abs(one - other).max() > 1e-2 for other in results[:i])


@given(st.integers(0, 2**32), st.floats(0.1, 50.0), st.booleans(), st.floats(-9.0, 9.0))
def test_scale_sign_and_shift(xp: Any, seed: int, size: float, flip: bool, shift: float) -> None:
    """LN(a x + c) = sign(a) LN(x), RMS(a x) = sign(a) RMS(x), LN(x) = RMS(x − mean x)."""
    a, sign = (-size, -1.0) if flip else (size, 1.0)
    x = Rng(seed).normal((3, 6), dtype="float64")
    layer, rms = F.layer_norm(x, 6, eps=0.0), F.rms_norm(x, 6, eps=0.0)
    assert_close(F.layer_norm(a * x + shift, 6, eps=0.0), sign * layer, rtol=1e-7, atol=1e-9)
    assert_close(F.rms_norm(a * x, 6, eps=0.0), sign * rms)
    assert_close(F.rms_norm(x - x.mean(axis=-1, keepdims=True), 6, eps=0.0), layer)
    assert_close(layer.mean(axis=-1), 0.0, atol=1e-12)
    assert_close((layer * layer).mean(axis=-1), 1.0, rtol=1e-10)


@given(st.integers(0, 2**32))
def test_jacobians(xp: Any, seed: int) -> None:
    """RMS: J = (I − y yᵀ/d) / rms.  LN: J = (I − 1 1ᵀ/d − y yᵀ/d) / std.

    So J x = 0 and yᵀ J = 0, and layer norm's kills the ones on both sides as well.
    """
    d = 5
    x = Rng(seed).normal((d,), dtype="float64")

    def jacobian(f: Any) -> Any:
        leaf = Tensor(x, requires_grad=True)
        y = f(leaf)
        rows = [mini_nn.grad(y, leaf, e, retain_graph=True)[0] for e in xp.eye(d)]
        return host(y), np.stack([host(row) for row in rows])

    seen, one = host(x), np.ones(d)
    y, j = jacobian(lambda z: F.rms_norm(z, d, eps=0.0))
    assert_close(j, (np.eye(d) - np.outer(y, y) / d) / np.sqrt((seen**2).mean()), atol=1e-9)
    assert_close(j @ seen, np.zeros(d), atol=1e-9)
    assert_close(y @ j, np.zeros(d), atol=1e-9)
    assert np.abs(j @ one).max() > 1e-6
    y, j = jacobian(lambda z: F.layer_norm(z, d, eps=0.0))
    want = (np.eye(d) - 1.0 / d - np.outer(y, y) / d) / seen.std()
    assert_close(j, want, rtol=1e-8, atol=1e-8 * np.abs(want).max())
    for zero in (j @ (seen - seen.mean()), y @ j, j @ one, one @ j):
        assert_close(zero, np.zeros(d), atol=1e-8 * max(1.0, np.abs(want).max()))


def test_batch_norm_is_layer_norm_of_the_transpose(xp: Any) -> None:
    x = Rng(0).normal((6, 4), dtype="float64")
    assert_close(F.batch_norm(x, None, None, training=True), F.layer_norm(x.T, 6).T)


@given(st.integers(0, 2**32), st.floats(0.01, 0.99), st.integers(1, 30))
def test_running_statistics_of_a_constant_stream(
    xp: Any, seed: int, momentum: float, steps: int
) -> None:
    """What is left of the start after t batches is (1 − momentum)^t, exactly."""
    x = 3.0 * Rng(seed).normal((5, 2), dtype="float64") + 1.0
    mean, var = xp.zeros(2), xp.ones(2)
    for _ in range(steps):
        F.batch_norm(x, mean, var, training=True, momentum=momentum)
    left, seen = (1.0 - momentum) ** steps, host(x)
    assert_close(mean, (1 - left) * seen.mean(axis=0), rtol=1e-10, atol=1e-12)
    want = left + (1 - left) * seen.var(axis=0, ddof=1)
    assert_close(var, want, rtol=1e-10)
    wrong = momentum**steps  # the other convention, TensorFlow's
    if abs(wrong - left) > 1e-6:
        with pytest.raises(AssertionError):
            assert_close(mean, (1 - wrong) * seen.mean(axis=0), rtol=1e-10, atol=1e-12)


def test_a_bias_before_the_norm(xp: Any) -> None:
    """Before batch norm it does nothing, before layer norm its mean does nothing; RMS feels it."""
    x, b = Rng(0).normal((6, 4), dtype="float64"), Rng(1).normal((4,), dtype="float64")
    batch = F.batch_norm(x, None, None, training=True)
    assert_close(F.batch_norm(x + b, None, None, training=True), batch, rtol=1e-8, atol=1e-10)
    assert_close(F.layer_norm(x + 7.0, 4), F.layer_norm(x, 4), rtol=1e-8, atol=1e-10)
    assert_close(F.layer_norm(x + b, 4), F.layer_norm(x + (b - b.mean()), 4), rtol=1e-8, atol=1e-10)
    assert float(abs(F.layer_norm(x + b, 4) - F.layer_norm(x, 4)).max()) > 1e-2
    assert float(abs(F.rms_norm(x + 7.0, 4) - F.rms_norm(x, 4)).max()) > 1e-2


# Where nothing is left to divide by


@pytest.mark.parametrize("name", ["layer", "rms", "instance_rms", "batch", "length"])
def test_rows_of_zeros_and_constants(xp: Any, name: str) -> None:
    """The result is the bias, and the gradient finite: 1/√ε times what passes."""
    zero = Tensor(xp.zeros((2, 3, 2, 2), "float32"), requires_grad=True)
    norms: dict[str, Any] = {
        "layer": lambda x: F.layer_norm(x, 2, None, xp.full(2, 0.25, "float32"), 1e-4),
        "rms": lambda x: F.rms_norm(x, 2, eps=1e-4) + 0.25,
        "instance_rms": lambda x: instance_rms_norm(x, None, xp.full(3, 0.25, "float32"), 1e-4),
        "batch": lambda x: F.batch_norm(
            x, None, None, None, xp.full(3, 0.25, "float32"), True, eps=1e-4
        ),
        "length": lambda x: normalize(x, 1, False, "length", 1e-4) + 0.25,
    }
    y = norms[name](zero)
    assert_close(y, 0.25, rtol=1e-6)
    cotangent = Rng(0).normal(y.shape)
    (g,) = mini_nn.grad(y, zero, cotangent)
    over = {"layer": -1, "batch": (0, 2, 3)}.get(name)
    passes = host(cotangent)
    if over is not None:
        passes = passes - passes.mean(axis=over, keepdims=True)
    assert_close(g, 100.0 * passes, rtol=1e-4, atol=1e-3)
    if name in ("layer", "batch"):  # any constant, not only 0
        assert_close(norms[name](zero + 3.0), 0.25, rtol=1e-4)


def test_a_single_element(xp: Any) -> None:
    """d = 1: layer norm gives 0, RMS norm the sign; images of one pixel too."""
    x = xp.asarray([[-2.0], [3.0], [0.0]], "float64")
    assert_close(F.layer_norm(x, 1), np.zeros((3, 1)))
    assert_close(F.rms_norm(x, 1, eps=1e-12), np.sign(host(x)), rtol=1e-9)
    pixel = x.reshape(1, 3, 1, 1)
    assert_close(instance_rms_norm(pixel, eps=1e-12), np.sign(host(pixel)), rtol=1e-9)
    assert_close(nn.InstanceRMSNorm2d(3, eps=1e-12)(pixel), np.sign(host(pixel)), rtol=1e-9)
    with pytest.raises(ValueError, match="several"):
        F.instance_norm(pixel)


# Norms of weights


def test_weight_norm_is_torchs(xp: Any) -> None:
    v, g, h = (xp.asarray(GOLDEN[f"weight_norm.{name}"]) for name in "vgh")
    assert_close(weight_norm(v, g), GOLDEN["weight_norm.dim0"], rtol=1e-12)
    assert_close(weight_norm(v, h, dim=1), GOLDEN["weight_norm.dim1"], rtol=1e-12)
    whole = weight_norm(v, xp.asarray(2.0), dim=None)
    assert_close((whole * whole).sum(), 4.0)


@given(st.integers(0, 2**32), st.floats(0.1, 10.0), st.floats(0.001, 1.0))
def test_weight_norm_turns_and_lengthens(xp: Any, seed: int, factor: float, lr: float) -> None:
    """‖w‖ = g whatever the length of v; the gradient is orthogonal to v, so steps only lengthen."""
    rng = Rng(seed)
    v, g = rng.normal((4, 3, 2), dtype="float64"), rng.uniform((4, 1, 1), 0.5, 2.0, "float64")
    w = weight_norm(v, g)
    assert_close((w * w).sum(axis=(1, 2)), host(g * g).ravel(), rtol=1e-10)
    assert_close(weight_norm(factor * v, g), w, rtol=1e-10)
    leaf = Tensor(v, requires_grad=True)
    (down,) = mini_nn.grad(weight_norm(leaf, g), leaf, rng.normal(v.shape, dtype="float64"))
    assert_close((down * v).sum(axis=(1, 2)), np.zeros(4), atol=1e-10)
    after = v - lr * down
    assert bool(((after * after).sum(axis=(1, 2)) >= (v * v).sum(axis=(1, 2))).all())


def test_weight_norm_refuses(xp: Any) -> None:
    with pytest.raises(ValueError, match=r"reshape\(-1, 1"):
        weight_norm(xp.ones((4, 3)), xp.ones(4))
    with pytest.raises(ValueError, match="rms"):
        normalize(xp.ones(3), 0, scale="std")  # type: ignore[arg-type]


def modulated_by_hand(x: Any, weight: Any, style: Any, padding: int, eps: float) -> Any:
    """Scale the channels of the input, convolve once for all samples, scale the outputs."""
    y = F.conv2d(x * style[:, :, None, None], weight, padding=padding)
    sizes = ops.sum((weight[None] * style[:, None, :, None, None]) ** 2, axis=(2, 3, 4))
    return y * ops.rsqrt(sizes + eps)[:, :, None, None]


@given(st.integers(0, 2**32), st.sampled_from([0, 1]), st.floats(0.1, 20.0))
def test_modulated_convolution(xp: Any, seed: int, padding: int, factor: float) -> None:
    """The grouped convolution is the scaling of inputs and outputs, and forgets a style's size."""
    rng = Rng(seed)
    x, weight = rng.normal((3, 4, 5, 6), dtype="float64"), rng.normal((2, 4, 3, 3), dtype="float64")
    style = rng.normal((3, 4), dtype="float64") + 0.1
    y = modulated_conv2d(x, weight, style, padding=padding)
    assert_close(y, modulated_by_hand(x, weight, style, padding, 1e-8), rtol=1e-10, atol=1e-10)
    scaled = modulated_conv2d(x, weight, factor * style, padding=padding, eps=0.0)
    want = modulated_conv2d(x, weight, style, padding=padding, eps=0.0)
    assert_close(scaled, want, rtol=1e-9, atol=1e-10)
    plain = modulated_conv2d(x, weight, style, demodulate=False, padding=padding)
    assert_close(plain, F.conv2d(x * style[:, :, None, None], weight, padding=padding))
    again = modulated_conv2d(x, weight, factor * style, demodulate=False, padding=padding)
    assert_close(again, factor * plain, rtol=1e-9, atol=1e-9)


def test_demodulated_outputs_have_variance_1(xp: Any) -> None:
    """For independent inputs of variance 1, exactly: the squared responses to each one add up."""
    rng = Rng(5)
    weight, style = 3.0 * rng.normal((5, 4, 3, 3), dtype="float64"), rng.normal((1, 4))
    inputs = xp.eye(36).reshape(36, 4, 3, 3)
    styles = xp.broadcast_to(style.astype("float64"), (36, 4))
    responses = modulated_conv2d(inputs, weight, styles, eps=0.0)
    assert_close((responses * responses).sum(axis=0), np.ones((5, 1, 1)), rtol=1e-10)
    without = modulated_conv2d(inputs, weight, styles, demodulate=False)
    assert float(abs((without * without).sum(axis=0) - 1.0).min()) > 0.5


def test_modulated_convolution_differentiates(xp: Any) -> None:
    rng = Rng(6)
    args = [rng.normal(s, dtype="float64") for s in ((2, 2, 3, 3), (2, 2, 2, 2), (2, 2))]
    check_grads(modulated_conv2d, *args, order=2)


def test_modulated_convolution_as_a_layer(xp: Any) -> None:
    """Demodulation takes the gain out again; no samples give no outputs; misfits are named."""
    layer = nn.ModulatedConv2d(4, 6, 3, padding="same", rng=Rng(0))
    x, style = Rng(1).normal((2, 4, 5, 5)), Rng(2).normal((2, 4))
    assert layer(x, style).shape == (2, 6, 5, 5) and layer(x, style).dtype == "float32"
    layer.eps = 0.0
    without_gain = modulated_conv2d(x, layer.weight, style, padding="same", eps=0.0)
    assert_close(layer(x, style), without_gain, rtol=1e-4, atol=1e-5)
    assert layer(x[:0], style[:0]).shape == (0, 6, 5, 5)
    for wrong in (style[:1], style[:, :3], x):
        with pytest.raises(ValueError, match=r"style \(N, C\)"):
            layer(x, wrong)


# float16


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "batch_norm"])
def test_float16_is_torchs(xp: Any, name: str) -> None:
    """Numbers up to 27,000, whose squares float16 does not have; the classic slip squares them."""
    x, weight, bias, one, other = (
        xp.asarray(GOLDEN[f"half.{n}"])
        for n in ("x", "weight", "bias", "channel_weight", "channel_bias")
    )
    calls: dict[str, Any] = {
        "layer_norm": lambda z: F.layer_norm(z, 5, weight, bias),
        "rms_norm": lambda z: F.rms_norm(z, 5, weight, 1e-5),
        "group_norm": lambda z: F.group_norm(z, 2, one, other),
        "batch_norm": lambda z: F.batch_norm(z, None, None, one, other, True),
    }
    leaf = Tensor(x, requires_grad=True)
    y = calls[name](leaf)
    assert y.dtype == "float16"
    assert_close(y, GOLDEN[f"half.{name}"], rtol=2e-3, atol=1e-3)
    (g,) = mini_nn.grad(y, leaf, xp.ones(x.shape, "float16"))
    assert g.dtype == "float16" and bool(np.isfinite(host(g)).all())
    if name != "batch_norm":  # its statistics have both small and large numbers
        layer = nn.LayerNorm(5).astype("float16")(x) if name == "layer_norm" else y
        assert bool(np.isfinite(host(layer)).all())
    with pytest.warns(RuntimeWarning, match="overflow"):
        assert not np.isfinite(host(x) * host(x)).all()


def test_float16_statistics(xp: Any) -> None:
    """Running statistics in float32 are those of the numbers, not of their rounded squares."""
    x = xp.asarray(GOLDEN["half.x"])
    mean, var = xp.zeros(4, "float32"), xp.ones(4, "float32")
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert_close(var, host(x).astype("float64").var(axis=(0, 2), ddof=1), rtol=1e-4)
    evaluated = F.batch_norm(x, mean, var)
    assert evaluated.dtype == "float16" and bool(np.isfinite(host(evaluated)).all())


# In the place of a norm


@given(st.integers(0, 2**32), st.floats(0.0, 1.0))
def test_rms_norm_is_dyisru_with_the_right_constant(xp: Any, seed: int, eps: float) -> None:
    """With C = Σ of the other elements' squares + d ε it is the same; with any one C it is not."""
    x = Rng(seed).normal((3, 5), dtype="float64")
    others = (x * x).sum(axis=-1, keepdims=True) - x * x
    assert_close(dyisru(x, others + 5 * eps), F.rms_norm(x, 5, eps=eps), rtol=1e-8)
    c = (others + 5 * eps).mean()
    assert float(abs(dyisru(x, c) - F.rms_norm(x, 5, eps=eps)).max()) > 1e-6


def test_dynamic_functions(xp: Any) -> None:
    """Slope at 0, limits and first parameters: γ tanh(α x) + β and γ √d x / √(x² + C) + β."""
    dyt, isru = nn.DyT((2, 3)), nn.DyISRU(3)
    x = Rng(0).normal((4, 2, 3))
    assert_close(dyt(x), np.tanh(0.5 * host(x)), rtol=1e-5, atol=1e-6)
    assert_close(isru(x), host(x) / np.sqrt(1 + host(x) ** 2 / 3), rtol=1e-5, atol=1e-6)
    far = xp.asarray([[1e6, -1e6, 0.0]], "float32")
    assert_close(isru(far), [[3**0.5, -(3**0.5), 0.0]], rtol=1e-5)
    assert_close(dyt(xp.broadcast_to(far, (2, 3))), [[1.0, -1.0, 0.0]] * 2, rtol=1e-5)
    assert [*dyt.state_dict()] == ["alpha", "weight", "bias"]
    assert [*isru.state_dict()] == ["c", "weight", "bias"]
    for layer in (dyt, isru):
        leaf = Tensor(x, requires_grad=True)
        y = layer(leaf)
        y.sum().backward()
        grads = [leaf.grad, *(p.grad for p in layer.parameters())]
        assert {g.dtype.name for g in grads} == {"float32"} and y.dtype == "float32"


def test_dynamic_functions_differentiate(xp: Any) -> None:
    x, one, row = Rng(0).normal((2, 3)), Rng(1).uniform((1,), 0.5, 2.0), Rng(2).normal((3,))
    for f in (dyt, dyisru):
        check_grads(f, *(a.astype("float64") for a in (x, one, row, row + 1.0)), order=2)


def test_dyisru_in_float16(xp: Any) -> None:
    x = xp.asarray([[1000.0, -2.0, 0.5]], "float16")
    y = dyisru(x, xp.asarray([3.0], "float32"))
    want = 3**0.5 * host(x).astype("float64") / np.sqrt(host(x).astype("float64") ** 2 + 3)
    assert y.dtype == "float16"
    assert_close(y, want, rtol=2e-3)


def test_new_layers_refuse(xp: Any) -> None:
    x = xp.ones((2, 4, 3, 3), "float32")
    wrong: list[Any] = [
        lambda: nn.DyISRU(3, c0=0.0),
        lambda: nn.DyISRU(4)(x),
        lambda: nn.DyT((4, 3))(x),
        lambda: nn.InstanceRMSNorm2d(3)(x),
        lambda: nn.InstanceRMSNorm2d(4)(x[0]),
        lambda: instance_rms_norm(x, xp.ones(3)),
        lambda: dyisru(xp.ones(()), xp.ones(())),
    ]
    for use in wrong:
        with pytest.raises(ValueError):
            use()


def test_instance_rms_layer(xp: Any) -> None:
    """With weight 2 and bias 1: the mean square of each channel is 1 before, the shape stays."""
    layer = nn.InstanceRMSNorm2d(3, affine=True)
    layer.weight.data[...] = 2.0
    layer.bias.data[...] = 1.0
    x = Rng(0).normal((2, 3, 4, 5)) + 5.0
    normal = (host(layer(x)) - 1.0) / 2.0
    assert_close((normal**2).mean(axis=(2, 3)), np.ones((2, 3), "float32"), rtol=1e-5)
    assert normal.mean() > 0.9  # the mean stays, where instance norm takes it out
    empty = layer(x[:0])
    assert empty.shape == (0, 3, 4, 5) and empty.dtype == "float32"
