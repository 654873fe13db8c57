"""Layers against torch's: names, layouts, outputs; and the laws of their first weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import mini_nn
from mini_nn import Rng, Tensor, nn
from tests.nn.goldens import LAYERS, has_torchs_signature, layer_answers_as_torch
from tests.support import assert_close, host

NORMS = ("LayerNorm", "RMSNorm", "BatchNorm1d", "BatchNorm2d", "GroupNorm", "InstanceNorm2d")
OWN = (
    "Mismatch", "Module", "ModuleDict", "ModuleList", "Parameter", "Sequential", "functional",
    "Corrected", "DyISRU", "DyT", "Erf", "InstanceRMSNorm2d", "ModulatedConv2d", "gaussian", "init",
    "layer_drop", "parametrization", "residual", "schemes",
    "ChunkedFeedForward", "ReversibleBlock", "ReversibleSequence", "by_chunks",
)  # fmt: skip
"""What torch.nn has not, or not with a signature."""


@pytest.mark.parametrize(
    "i",
    [pytest.param(i, id=f"{i}-{row[0]}") for i, row in enumerate(LAYERS) if row[0] not in NORMS],
)
def test_torch(i: int, xp: Any) -> None:
    layer_answers_as_torch(i, xp)


@pytest.mark.parametrize("name", sorted({*nn.__all__} - {*OWN}))
def test_signature(name: str) -> None:
    has_torchs_signature(getattr(nn, name), name)


# First weights


def _follows_the_uniform_law(array: Any, bound: float) -> None:
    """All in [−bound, bound], with the mean and the variance of U(−bound, bound).

    With u = x / bound, the mean of n numbers has standard deviation √(1/3n), and that of u² around
    1/3 has √(4/45n); 6 of them are exceeded with probability 2e-9.
    """
    u = host(array).astype("float64").ravel() / bound
    assert np.abs(u).max() <= 1 + 1e-6
    assert abs(u.mean()) < 6 / math.sqrt(3 * u.size)
    assert abs((u * u).mean() - 1 / 3) < 6 * math.sqrt(4 / 45 / u.size)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Linear(50, 80, rng=Rng(0)), 50),
        (nn.Conv1d(8, 40, 5, groups=2, rng=Rng(1)), 4 * 5),
        (nn.Conv2d(12, 60, (3, 2), rng=Rng(2)), 12 * 6),
        # as torch has it: the fan of the transposed layout, output channels
        (nn.ConvTranspose2d(30, 24, 3, groups=2, rng=Rng(3)), 12 * 9),
    ],
    ids=["Linear", "Conv1d", "Conv2d", "ConvTranspose2d"],
)
def test_uniform_initialisation(layer: Any, fan_in: int) -> None:
    """Weights and biases are U(−1/√fan_in, 1/√fan_in); the variance is a sixth of He's 2/fan_in."""
    _follows_the_uniform_law(layer.bias, 1 / math.sqrt(fan_in))
    _follows_the_uniform_law(layer.weight, 1 / math.sqrt(fan_in))
    for factor in (math.sqrt(0.5), math.sqrt(2), math.sqrt(6)):  # a bound that forgets one
        with pytest.raises(AssertionError):
            _follows_the_uniform_law(layer.weight, factor / math.sqrt(fan_in))


def test_embedding_initialisation() -> None:
    """N(0, 1): mean and variance within 6 standard deviations, √(1/n) and √(2/n)."""
    layer = nn.Embedding(100, 60, rng=Rng(0))
    x = host(layer.weight).astype("float64")
    assert abs(x.mean()) < 6 / math.sqrt(x.size)
    assert abs((x * x).mean() - 1) < 6 * math.sqrt(2 / x.size)


def test_the_generator_decides(xp: Any) -> None:
    """The same seed gives the same weights; without a generator the default one is used."""
    a, b = (nn.Conv2d(2, 3, 2, rng=Rng(4)).state_dict() for _ in range(2))
    assert all((host(a[name]) == host(b[name])).all() for name in a)
    mini_nn.manual_seed(4)
    assert_close(nn.Linear(3, 4).weight, host(nn.Linear(3, 4, rng=Rng(4)).weight), rtol=0)
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    assert float(abs(first.weight - second.weight).sum()) > 0


# Layers


def test_padding_row(xp: Any) -> None:
    """It starts as zeros and never moves, and the others do."""
    layer = nn.Embedding(4, 3, padding_idx=-1, rng=Rng(0))
    assert layer.padding_idx == 3
    assert_close(layer.weight[3], 0.0)
    layer(xp.asarray([[3, 1], [3, 3]])).sum().backward()
    assert_close(layer.weight.grad, np.asarray([[0.0], [1], [0], [0]], "float32").repeat(3, 1))
    with pytest.raises(IndexError, match="padding_idx"):
        nn.Embedding(4, 3, padding_idx=4)


def test_dropout(xp: Any) -> None:
    layer = nn.Dropout(0.5, rng=Rng(3))
    x = Tensor(xp.ones((4, 5), "float32"))
    y, z = host(layer(x)), host(layer(x))
    assert set(np.unique(y)) == {0.0, 2.0} and (y != z).any()
    assert_close(nn.Dropout(0.5, rng=Rng(3))(x), y)
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="probability"):
        nn.Dropout(1.5)


def test_transposed_convolution_is_the_transpose(xp: Any) -> None:
    """⟨conv x, y⟩ = ⟨x, convᵀ y⟩ with the same weight."""
    options: Any = {"stride": (2, 1), "padding": 1, "groups": 2, "bias": False}
    conv = nn.Conv2d(4, 6, 3, **options, rng=Rng(0)).astype("float64")
    back = nn.ConvTranspose2d(6, 4, 3, **options, output_padding=(1, 0)).astype("float64")
    back.load_state_dict(conv.state_dict())
    x = Rng(1).normal((2, 4, 6, 5), dtype="float64")
    y = Rng(2).normal((2, 6, 3, 5), dtype="float64")
    assert back(y).shape == x.shape
    assert_close((conv(x) * y).sum(), (x * back(y)).sum())


def test_wrong_groups() -> None:
    for layer in (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d):
        with pytest.raises(ValueError, match="4 groups, got 6 in and 8 out"):
            layer(6, 8, 3, groups=4)


def test_layers_without_inputs(xp: Any) -> None:
    """No features in: the output is the bias; no features out, no samples: an empty array."""
    assert_close(nn.Linear(0, 2)(xp.ones((3, 0), "float32")), np.zeros((3, 2), "float32"))
    assert nn.Linear(2, 0)(xp.ones((3, 2), "float32")).shape == (3, 0)
    layer = nn.Linear(2, 3)
    y = layer(xp.ones((0, 2), "float32"))
    assert y.shape == (0, 3) and y.dtype == "float32"
    y.sum().backward()
    assert_close(layer.weight.grad, np.zeros((3, 2), "float32"))


# Losses


def test_losses_are_the_functions(xp: Any) -> None:
    """Each option reaches the function; weights belong to the state."""
    F, rng = nn.functional, Rng(0)
    x, t = rng.normal((4, 3), dtype="float64"), rng.uniform((4, 3), dtype="float64")
    w, target = rng.uniform((3,), dtype="float64"), xp.asarray([0, 2, 1, 1])
    pairs: list[Any] = [
        (
            nn.CrossEntropyLoss(w, 2, "sum", 0.1)(x, target),
            F.cross_entropy(x, target, w, 2, "sum", 0.1),
        ),
        (nn.MSELoss("sum")(x, t), F.mse_loss(x, t, "sum")),
        (nn.SmoothL1Loss("sum", 0.3)(x, t), F.smooth_l1_loss(x, t, "sum", 0.3)),
        (
            nn.BCEWithLogitsLoss(w, "sum", 2 * w)(x, t),
            F.binary_cross_entropy_with_logits(x, t, w, "sum", 2 * w),
        ),
        (nn.BCEWithLogitsLoss()(x, t), F.binary_cross_entropy_with_logits(x, t)),
    ]
    for ours, wanted in pairs:
        assert_close(ours, wanted)
    assert [*nn.CrossEntropyLoss(w).state_dict()] == ["weight"]
    assert [*nn.CrossEntropyLoss().state_dict()] == []


def test_a_network_learns(xp: Any) -> None:
    """Gradient descent solves exclusive or, which no linear model can."""
    model = nn.Sequential(nn.Linear(2, 16, rng=Rng(1)), nn.GELU(), nn.Linear(16, 2, rng=Rng(2)))
    x = Rng(0).normal((64, 2))
    target = (x[:, 0] * x[:, 1] > 0).astype("int64")
    losses = []
    for _ in range(200):
        loss = nn.CrossEntropyLoss()(model(Tensor(x)), target)
        losses.append(float(loss))
        model.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.data -= 1.0 * parameter.grad
    assert losses[-1] < losses[0] / 4
