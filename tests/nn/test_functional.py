"""nn.functional against torch's answers, and the laws that no table of numbers can state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor
from mini_nn.nn import functional as F
from tests import device
from tests.nn.goldens import (
    ARRAYS,
    CALLS,
    close,
    has_torchs_signature,
    part,
    wave,
)
from tests.support import assert_close, host

NAMES = [f"{i}-{row['function']}" for i, row in enumerate(CALLS)]


def call(i: int, xp: Any, dtype: str) -> tuple[Any, dict[str, Any]]:
    """Our answer to call i, and its arguments."""
    row, arguments = CALLS[i], {}
    for name, array in part(f"{i}.in.").items():
        array = xp.asarray(array.astype(dtype) if array.dtype.kind == "f" else array)
        arguments[name] = Tensor(array, requires_grad=True) if name in row["inputs"] else array
    return getattr(F, row["function"])(**arguments, **row["options"]), arguments


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("i", range(len(CALLS)), ids=NAMES)
def test_torch(i: int, xp: Any, dtype: str) -> None:
    """Value, gradient and a product with the Hessian are torch's, in the dtype of the input."""
    row = CALLS[i]
    rtol = row["rtol"] if dtype == "float64" else 1e-4
    y, arguments = call(i, xp, dtype)
    close(y, ARRAYS[f"{i}.out"], rtol)
    for name, array in (part(f"{i}.in.") | part(f"{i}.after.")).items():
        assert_close(arguments[name], array, rtol=1e-6)  # only running statistics have moved
    if not row["inputs"]:
        return
    assert y.dtype == dtype
    inputs = [arguments[name] for name in row["inputs"]]
    cotangent = xp.asarray(wave(y.shape).astype(dtype))
    fast = mini_nn.grad(y, inputs, cotangent, retain_graph=True)
    grads = mini_nn.grad(y, inputs, cotangent, create_graph=True) if row["order"] == 2 else fast
    for name, g, other in zip(row["inputs"], grads, fast, strict=True):
        assert g.dtype == other.dtype == dtype
        close(other, ARRAYS[f"{i}.grad.{name}"], rtol)
        close(g, ARRAYS[f"{i}.grad.{name}"], rtol)
    if row["order"] < 2:
        return
    seconds = [Tensor(xp.zeros(x.shape, dtype)) for x in inputs]
    live = [g for g in grads if g.requires_grad]
    if live:
        weights = [xp.asarray(wave(g.shape).astype(dtype)) for g in live]
        seconds = mini_nn.grad(live, inputs, weights, materialize_grads=True)
    for name, g in zip(row["inputs"], seconds, strict=True):
        assert g.dtype == dtype
        close(g, ARRAYS[f"{i}.grad2.{name}"], rtol)


@pytest.mark.parametrize("name", sorted(F.__all__))
def test_signature(name: str) -> None:
    has_torchs_signature(getattr(F, name), name)


@pytest.mark.parametrize("i", range(len(CALLS)), ids=NAMES)
def test_arrays_and_host_integers(i: int, xp: Any) -> None:
    """Plain arrays give a plain array; integers may stay on the host, also as lists."""
    row = CALLS[i]
    arguments: dict[str, Any] = {
        name: xp.asarray(array.copy()) if array.dtype.kind != "i" else array
        for name, array in part(f"{i}.in.").items()
    }
    wanted = ARRAYS[f"{i}.out"]
    y = getattr(F, row["function"])(**arguments, **row["options"])
    assert not isinstance(y, Tensor)
    close(y, wanted, row["rtol"])
    lists = {
        n: a.tolist() for n, a in arguments.items() if getattr(a, "dtype", xp.float64) == "int64"
    }
    if lists and all(np.size(a) for a in lists.values()):
        close(getattr(F, row["function"])(**arguments | lists, **row["options"]), wanted, 1e-8)


def test_nothing_waits_for_the_device() -> None:
    """Forward and backward of every call run on a device without a copy to the host.

    The one exception says so: one_hot that is not told the number of classes.
    """
    device.register()
    with mini_nn.using("strict") as strict:
        waiting = []
        for i, name in enumerate(NAMES):
            try:
                with device.no_sync():
                    y, arguments = call(i, strict.xp, "float32")
                    leaves = [arguments[n] for n in CALLS[i]["inputs"]]
                    if leaves:
                        mini_nn.grad(y, leaves, strict.xp.ones(y.shape, "float32"))
            except device.DeviceSynchronized:
                waiting.append(name)
    assert waiting == [n for n, row in zip(NAMES, CALLS, strict=True) if _counts_classes(row)]
    assert len(waiting) == 1


def _counts_classes(row: dict[str, Any]) -> bool:
    return row["function"] == "one_hot" and not row["options"]


# Classification losses


def test_cross_entropy_ignores_all(xp: Any) -> None:
    """The mean over nothing is nan and its gradient 0, also where the weights of all are 0."""
    x = Tensor(xp.ones((2, 3), "float32"), requires_grad=True)
    for y in (
        F.cross_entropy(x, [-100, -100]),
        F.cross_entropy(x, [7, 7], ignore_index=7, label_smoothing=0.1),
        F.nll_loss(x, [-100, -100]),
        F.cross_entropy(x, [1, 1], weight=xp.asarray([1.0, 0.0, 1.0], "float32")),
    ):
        assert math.isnan(float(y)) and y.dtype == "float32"
        (g,) = mini_nn.grad(y, x)
        assert_close(g, np.zeros((2, 3), "float32"), rtol=0)


def test_mean_divides_by_the_weights_of_the_targets(xp: Any) -> None:
    """torch's weighted mean: Σ w l / Σ w, so the scale of the weights is nothing."""
    rng = Rng(3)
    x, target = rng.normal((5, 4), dtype="float64"), xp.asarray([0, 3, 1, 1, 2])
    weight = rng.uniform((4,), 0.5, 2.0, dtype="float64")
    for smoothing in (0.0, 0.2):
        options: dict[str, Any] = {"label_smoothing": smoothing}
        a = F.cross_entropy(x, target, weight, **options)
        assert_close(a, F.cross_entropy(x, target, 10 * weight, **options))
        losses = F.cross_entropy(x, target, weight, reduction="none", **options)
        assert_close(a, losses.sum() / weight[target].sum())
        with pytest.raises(AssertionError):  # the plain mean is something else
            assert_close(a, losses.mean())


@given(st.integers(0, 2**32), st.floats(0.0, 0.9))
def test_smoothed_labels_are_a_distribution(xp: Any, seed: int, smoothing: float) -> None:
    """Label smoothing is the cross-entropy with the smoothed one-hot distribution."""
    rng = Rng(seed)
    x = rng.normal((3, 5, 2), dtype="float64")
    target = rng.integers(0, 5, (3, 2))
    hot = xp.moveaxis(F.one_hot(target, 5), -1, 1).astype("float64")
    smooth = (1 - smoothing) * hot + smoothing / 5
    for weight in (None, rng.uniform((5,), dtype="float64")):
        for reduction in ("none", "sum"):
            a = F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing)
            assert_close(a, F.cross_entropy(x, smooth, weight, reduction=reduction))


def test_targets_are_checked(xp: Any, backend_name: str) -> None:
    x = xp.zeros((2, 3), "float32")
    for loss in (F.cross_entropy, F.nll_loss):
        with pytest.raises(ValueError, match=r"\(2,\), got \(3,\)"):
            loss(x, [0, 1, 2])
        with pytest.raises(ValueError, match="reduction"):
            loss(x, [0, 1], reduction="average")
        with pytest.raises(ValueError, match="0-d"):
            loss(xp.zeros(()), 0)
        with pytest.raises(TypeError, match="integers, got bool"):
            loss(x, xp.asarray([True, False]))
        for weight in (None, xp.ones(3, "float32")):
            for wrong in (3, -1):
                if backend_name == "numpy":
                    with pytest.raises(IndexError, match=r"\[0, 3\)"):
                        loss(x, [0, wrong], weight)
                else:  # a device is not waited for: the loss says it
                    losses = host(loss(x, [0, wrong], weight, reduction="none"))
                    assert math.isfinite(losses[0]) and math.isnan(losses[1])
    with pytest.raises(ValueError, match="astype"):
        F.cross_entropy(x, xp.asarray([0.0, 1.0]))
    with pytest.raises(TypeError, match="integers"):
        F.nll_loss(x, xp.asarray([0.0, 1.0]))


@pytest.mark.parametrize(
    "name",
    [
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "kl_div",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
    ],
)
def test_losses_of_numbers(name: str, xp: Any) -> None:
    """Nothing is broadcast silently, and the reductions are those of "none"."""
    loss, rng = getattr(F, name), Rng(0)
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4,\)"):
        loss(xp.ones((4, 1)), xp.ones(4))
    with pytest.raises(ValueError, match="reduction"):
        loss(xp.ones(4), xp.ones(4), reduction="average")
    x, t = (rng.uniform((3, 2), 0.1, 0.9, dtype="float64") for _ in "xt")
    losses = loss(x, t, reduction="none")
    assert losses.shape == x.shape
    assert_close(loss(x, t, reduction="sum"), losses.sum())
    assert_close(loss(x, t), losses.mean())
    empty = xp.zeros((0, 2), "float32")
    assert math.isnan(float(loss(empty, empty))) and float(loss(empty, empty, reduction="sum")) == 0


def test_wrong_thresholds() -> None:
    x = mini_nn.tensor([1.0])
    with pytest.raises(ValueError, match="beta"):
        F.smooth_l1_loss(x, x, beta=-1.0)
    with pytest.raises(ValueError, match="delta"):
        F.huber_loss(x, x, delta=0.0)


# Activations


@given(st.floats(-1e4, 1e4), st.sampled_from(["float32", "float64"]))
def test_identities(xp: Any, number: float, dtype: str) -> None:
    """The definitions of one by another; no argument overflows (warnings are errors here)."""
    x = Tensor(xp.asarray([number], dtype))
    assert_close(F.logsigmoid(x), F.logsigmoid(-x) + x, rtol=1e-6, atol=3e-7 * (1 + abs(number)))
    assert_close(F.glu(xp.asarray([number, number], dtype)), F.silu(x), rtol=1e-5, atol=1e-30)
    assert_close(F.elu(x, 0.0), F.relu(x))
    assert_close(F.leaky_relu(x, -1.0), abs(x))
    assert_close(F.hardtanh(x, -2.0, 3.0), x.clip(-2.0, 3.0))
    assert_close(F.softplus(x) - F.softplus(-x), x, rtol=1e-5, atol=1e-5)
    for f in (F.mish, F.selu, F.gelu, F.tanh, F.sigmoid):
        assert f(x).dtype == dtype and bool(np.isfinite(host(f(x))).all())


def test_glu_of_an_odd_axis(xp: Any) -> None:
    with pytest.raises(ValueError, match=r"axis 1.*odd"):
        F.glu(xp.zeros((2, 3)), dim=1)


def test_what_an_ignored_row_holds_does_not_matter(xp: Any) -> None:
    """Also −inf in the first class, which stands in for the label that is not there."""
    weight, target = xp.asarray([2.0, 3.0]), xp.asarray([1, -100])
    x = Tensor(xp.asarray([[0.5, -1.0], [-math.inf, 0.0]]), requires_grad=True)
    for loss in (F.cross_entropy, F.nll_loss):
        y = loss(x, target, weight)
        assert_close(y, host(loss(x[:1], target[:1], weight)))
        g = host(mini_nn.grad(y, x)[0])
        assert g[0].any() and not g[1].any()


def test_a_sign_of_all_weights_cancels_in_the_mean(xp: Any) -> None:
    x, target, weight = (
        Rng(0).normal((3, 2)),
        xp.asarray([0, 1, 1]),
        xp.asarray([2.0, 3.0], "float32"),
    )
    assert_close(F.cross_entropy(x, target, -weight), host(F.cross_entropy(x, target, weight)))


def test_a_batch_of_nothing_has_no_mean_divergence(xp: Any) -> None:
    nothing = xp.zeros((0, 3))
    assert math.isnan(float(host(F.kl_div(nothing, nothing, "batchmean"))))


@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_keeps_the_mean(xp: Any, seed: int, p: float) -> None:
    """What is kept is x / (1 − p), what is not is 0, and the gradient has the same pattern.

    The number kept is binomial: with n = 4096 it is within 7 standard deviations except with
    probability 3e-12 for each example.
    """
    n = 4096
    x = Tensor(xp.full((n,), 3.0, "float32"), requires_grad=True)
    y = F.dropout(x, p, rng=Rng(seed))
    kept = host(y) != 0
    assert abs(kept.sum() - n * (1 - p)) < 7 * math.sqrt(n * p * (1 - p))
    assert_close(y, np.where(kept, 3 / (1 - p), 0.0).astype("float32"))
    (g,) = mini_nn.grad(y.sum(), x)
    assert_close(g, np.where(kept, 1 / (1 - p), 0.0).astype("float32"))
    assert_close(F.dropout(x, p, rng=Rng(seed)), host(y), rtol=0)


def test_dropout_limits(xp: Any) -> None:
    x = Tensor(xp.ones((2, 2), "float32"), requires_grad=True)
    assert F.dropout(x, 0.5, training=False) is x and F.dropout(x, 0.0) is x
    assert_close(F.dropout(x, 1.0), np.zeros((2, 2), "float32"))
    (g,) = mini_nn.grad(F.dropout(x, 1.0).sum(), x)
    assert_close(g, np.zeros((2, 2), "float32"))
    mini_nn.manual_seed(5)
    assert_close(F.dropout(x, 0.5), host(F.dropout(x, 0.5, rng=Rng(5))))
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"):
            F.dropout(x, p)


@pytest.mark.parametrize(("here", "current"), [("strict", "numpy"), ("numpy", "strict")])
def test_dropout_draws_where_its_input_lives(here: str, current: str) -> None:
    """Also while another backend is current, and the same elements as there."""
    device.register()
    x = mini_nn.backend.get(here).xp.ones((3, 4), "float32")
    with mini_nn.using(here):
        wanted = host(F.dropout(x, 0.5, rng=Rng(1)))
    with mini_nn.using(current):
        y = F.dropout(x, 0.5, rng=Rng(1))
    assert type(y) is type(x)
    np.testing.assert_array_equal(host(y), wanted)


# Tables and attention


def test_embedding_of_wrong_numbers(xp: Any, backend_name: str) -> None:
    weight = xp.ones((3, 2), "float32")
    with pytest.raises(TypeError, match="integers"):
        F.embedding(xp.ones(2), weight)
    for padding_idx in (3, -4):
        with pytest.raises(IndexError, match="padding_idx"):
            F.embedding([0], weight, padding_idx)
    if backend_name == "numpy":
        for wrong in (3, -1):
            with pytest.raises(IndexError, match=r"\[0, 3\)"):
                F.embedding([wrong], weight)
            with pytest.raises(IndexError, match=r"\[0, 2\)"):
                F.one_hot([wrong], 2)
    with pytest.raises(ValueError, match="num_classes"):
        F.one_hot(xp.zeros(0, "int64"))
    assert F.one_hot(xp.zeros((2, 0), "int64"), 3).shape == (2, 0, 3)
    assert isinstance(F.one_hot(mini_nn.tensor([1])), Tensor)


def test_attention_dropout(xp: Any) -> None:
    """The weights are dropped, not the values: with v = 1 a row is Σ kept weights / (1 − p)."""
    rng = Rng(1)
    q, k = rng.normal((2, 6, 3), dtype="float64"), rng.normal((2, 5, 3), dtype="float64")
    v = xp.ones((2, 5, 1))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, rng=Rng(7))
    weights = F.scaled_dot_product_attention(q, k, xp.broadcast_to(xp.eye(5), (2, 5, 5)))
    kept = Rng(7).bernoulli(0.5, (2, 6, 5))
    assert_close(y[..., 0], (weights * kept * 2.0).sum(axis=-1))
    plain = F.scaled_dot_product_attention(q, k, v)
    assert_close(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0), plain)
    with pytest.raises(ValueError, match="heads"):
        F.scaled_dot_product_attention(
            xp.ones((1, 3, 2, 2)), xp.ones((1, 2, 2, 2)), xp.ones((1, 2, 2, 2)), enable_gqa=True
        )


# Directions


@given(st.integers(0, 2**32), st.sampled_from([1.0, 1.5, 2.0, 3.0, math.inf]))
def test_normalize(xp: Any, seed: int, p: float) -> None:
    """Rows of norm 1 whatever the scale; rows of zeros stay."""
    x = Rng(seed).normal((3, 4), dtype="float64") + 0.01
    y = F.normalize(x, p)
    norms = np.linalg.norm(host(y), p, axis=1)
    assert_close(norms, 1.0, rtol=1e-12)
    assert_close(F.normalize(5.0 * x, p), host(y), rtol=1e-12)
    assert_close(F.normalize(0.0 * x, p), np.zeros((3, 4)), rtol=0)


def test_cosine_similarity(xp: Any) -> None:
    x = Rng(0).normal((4, 3), dtype="float64")
    pairs = F.cosine_similarity(x[:, None], x[None], dim=-1)
    assert_close(xp.diagonal(pairs), 1.0, rtol=1e-12)
    assert_close(F.cosine_similarity(x, -2.0 * x), -1.0, rtol=1e-12)
    assert_close(F.cosine_similarity(x, 0.0 * x), 0.0)


# Borders and resolution


def test_wrong_borders(xp: Any) -> None:
    x = xp.zeros((2, 3))
    for widths, mode in (((1,), "constant"), ((1,) * 6, "constant"), ((1, 1), "mirror")):
        with pytest.raises(ValueError, match="pairs of widths"):
            F.pad(x, widths, mode)
    with pytest.raises(ValueError, match="cut"):
        F.pad(x, (-2, -2))


def test_no_border(xp: Any) -> None:
    """Neither widths of 0 nor no widths at all change anything, whatever the mode."""
    x = Tensor(Rng(0).normal((2, 3)), requires_grad=True)
    for mode in ("constant", "reflect", "replicate", "circular"):
        for widths in ((), (0, 0), (0, 0, 0, 0)):
            y = F.pad(x, widths, mode)
            assert_close(y, x, rtol=0)
            assert_close(mini_nn.grad(y, x, x.data)[0], x, rtol=0)


def test_interpolation_is_exact_where_it_can_be(xp: Any) -> None:
    """A linear image stays linear between the centres; nearest repeats pixels; one stays itself."""
    ramp = xp.broadcast_to(xp.arange(4.0)[:, None] + 2 * xp.arange(5.0), (1, 1, 4, 5))
    y = F.interpolate(ramp, (7, 9), mode="bilinear", align_corners=True)
    assert_close(y[0, 0], host(xp.arange(7.0)[:, None] / 2 + xp.arange(9.0)), atol=1e-12)
    assert_close(F.interpolate(ramp, scale_factor=2), host(ramp).repeat(2, 2).repeat(2, 3))
    one = F.interpolate(ramp[:, :, :1, :1] + 3.0, 4, mode="bilinear")
    assert_close(one, np.full((1, 1, 4, 4), 3.0))
    for wrong in ({}, {"size": 2, "scale_factor": 2}, {"size": 2, "mode": "cubic"}):
        with pytest.raises(ValueError, match="interpolate"):
            F.interpolate(ramp, **wrong)
    with pytest.raises(ValueError, match="multiple of 4"):
        F.pixel_shuffle(ramp, 2)


@given(st.integers(1, 9), st.integers(1, 9))
def test_adaptive_pooling_of_equal_parts_is_average_pooling(
    xp: Any, parts: int, length: int
) -> None:
    x = Rng(parts).normal((1, 2, parts * length, 3), dtype="float64")
    y = F.adaptive_avg_pool2d(x, (parts, None))
    assert_close(y, x.reshape(1, 2, parts, length, 3).mean(axis=3))
