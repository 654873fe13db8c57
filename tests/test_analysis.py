"""What is measured is what a loop over samples finds, and wide networks do what is predicted."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.analysis import MeanField, cosine, signals, watching
from mini_nn.nn import functional as F
from tests.support import assert_close, host


class Stack(nn.Module):
    """Linear layers with an activation before all but the first."""

    def __init__(self, f: Any, width: int, depth: int, weight_variance: float, rng: Rng) -> None:
        self.f = f
        self.layers = nn.ModuleList(nn.Linear(width, width, rng=rng) for _ in range(depth))
        for place, layer in enumerate(self.layers):
            std = math.sqrt((weight_variance if place else 1.0) / width)
            layer.weight.data[...] = rng.normal((width, width), std=std)
            layer.bias.data[...] = 0.0

    def forward(self, x: Any) -> Any:
        for place, layer in enumerate(self.layers):
            x = layer(self.f(x) if place else x)
        return x


# signals


def test_rotations_keep_size_angle_and_gradient(xp: Any) -> None:
    rng, model = (
        Rng(0),
        nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6))).astype("float64"),
    )
    for layer in model:
        q, _ = np.linalg.qr(host(rng.normal((8, 8), dtype="float64")))
        layer.weight.data[...] = xp.asarray(q)
    x = rng.normal((5, 8), dtype="float64")
    for row in signals(model, x):
        assert_close(row.second_moment, float(host((x * x).mean())), rtol=1e-12)
        assert_close(row.cosine, cosine(x), rtol=1e-9)
        assert_close(row.gradient, 1.0, rtol=1e-12)  # the last cotangent is made of signs


def test_the_cosine_is_the_mean_over_pairs(xp: Any) -> None:
    x = Rng(1).normal((4, 2, 3), dtype="float64")
    rows = host(x).reshape(4, 6)
    pairs = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in combinations(rows, 2)]
    assert_close(cosine(x), np.mean(pairs), rtol=1e-12)


def test_one_sample_has_no_cosine(xp: Any) -> None:
    assert math.isnan(cosine(xp.ones((1, 3))))


def test_gradients_are_those_of_the_signed_sum(xp: Any) -> None:
    model = Stack(F.tanh, 4, 3, 1.0, Rng(2)).astype("float64")
    x = Rng(3).normal((3, 4), dtype="float64")
    rows = signals(model, x, rng=Rng(7))
    signs = Rng(7).bernoulli(0.5, (3, 4)).astype("float64") * 2.0 - 1.0
    state, states = Tensor(x, requires_grad=True), []
    for place, layer in enumerate(model.layers):
        state = layer(F.tanh(state) if place else state)
        states.append(state)
    for row, g in zip(rows, grad(ops.sum(state * signs), states), strict=True):
        assert_close(row.gradient, float(host((g.data * g.data).mean())), rtol=1e-12)


def test_the_layers_are_the_members_of_lists_and_other_children(xp: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            self.first = nn.Linear(3, 4)
            self.inner = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Any) -> Any:
            x = self.first(x)
            for layer in self.inner:
                x = layer(x)
            return x

    model, x = Model(), Rng(0).normal((2, 3))
    assert [row.name for row in signals(model, x)] == ["first", "inner.0", "inner.1"]
    chosen = {"late": model.inner[1]}
    assert [row.name for row in signals(model, x, layers=chosen)] == ["late"]


def test_a_layer_that_is_called_twice_has_two_rows(xp: Any) -> None:
    layer = nn.Linear(3, 3)
    rows = signals(nn.Sequential(layer, layer), Rng(0).normal((2, 3)), layers={"both": layer})
    assert [row.name for row in rows] == ["both", "both"]
    assert rows[0] != rows[1]


def test_a_layer_that_nothing_depends_on_has_no_gradient(xp: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            self.idle, self.used = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Any) -> Any:
            self.idle(x)
            return self.used(x)

    idle, used = signals(Model(), Rng(0).normal((2, 3)))
    assert idle.gradient == 0.0 < used.gradient


def test_integers_go_in_too(xp: Any) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    rows = signals(model, xp.asarray([[1, 2], [3, 4]]))
    assert [row.name for row in rows] == ["0", "1"]
    assert all(row.gradient > 0 for row in rows)


def test_a_model_without_a_history_is_refused(xp: Any) -> None:
    model = nn.Sequential(nn.Embedding(5, 4)).freeze()
    with pytest.raises(ValueError, match="history"):
        signals(model, xp.asarray([1, 2]))
    with pytest.raises(ValueError, match="none was called"):
        signals(nn.Linear(3, 3), Rng(0).normal((2, 3)))


def test_watching_leaves_no_trace(xp: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    before = [{**vars(module)} for module in model.modules()]
    with pytest.raises(RuntimeError), watching(dict(model.named_modules())) as seen:
        model(Rng(0).normal((2, 3)))
        raise RuntimeError
    assert [name for name, _ in seen] == ["0", "1", ""]
    assert [{**vars(module)} for module in model.modules()] == before
    model(Rng(0).normal((2, 3)))
    assert len(seen) == 3


# the mean field


def test_relu_keeps_everything_but_the_angle() -> None:
    theory = MeanField(F.relu, 2.0)
    assert_close(theory.second_moments(50, 3.0), np.full(50, 3.0), rtol=1e-9)
    assert_close(theory.gradients(50, 3.0), np.ones(50), rtol=1e-6)
    c = [-0.3]
    for _ in range(19):  # Cho & Saul 2009, the arc-cosine kernel of degree 1
        angle = math.acos(c[-1])
        c.append((math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi)
    assert_close(theory.cosines(20, -0.3, 3.0), np.array(c), rtol=1e-6)


@given(st.floats(0.05, 20.0), st.floats(0.5, 3.0), st.floats(0.0, 1.0), st.floats(-0.9, 0.95))
def test_erf_in_closed_form(q: float, w: float, b: float, c: float) -> None:
    theory = MeanField(ops.erf, w, b)
    following = w * 2 / math.pi * math.asin(2 * q / (1 + 2 * q)) + b
    both = w * 2 / math.pi * math.asin(2 * q * c / (1 + 2 * q)) + b
    assert_close(theory.second_moments(2, q)[1], following, rtol=1e-8)
    assert_close(theory.cosines(2, c, q)[1], both / following, rtol=1e-6, atol=1e-8)
    assert_close(theory.gradients(2, q)[0], w * 4 / math.pi / math.sqrt(1 + 4 * q), rtol=1e-8)


def test_a_wide_network_does_what_is_predicted(xp: Any) -> None:
    # 16 samples and 512 channels have some 6 % of noise per layer, which adds up, over 8 draws
    depth, width, runs = 8, 512, 8
    for f, w in ((F.tanh, 1.5), (F.elu, 1.5), (F.relu, 2.0)):
        rows = [
            signals(Stack(f, width, depth, w, Rng(seed)), Rng(50 + seed).normal((16, width)))
            for seed in range(runs)
        ]
        q = np.mean([[row.second_moment for row in run] for run in rows], axis=0)
        g = np.mean([[row.gradient for row in run] for run in rows], axis=0)
        c = np.mean([[row.cosine for row in run] for run in rows], axis=0)
        theory = MeanField(f, w)
        assert_close(q, np.array(theory.second_moments(depth, q[0])), rtol=0.12)
        assert_close(g, np.array(theory.gradients(depth, q[0])), rtol=0.2)
        assert_close(c, np.array(theory.cosines(depth, c[0], q[0])), rtol=0, atol=0.03)
        wrong = MeanField(f, w / 1.1)  # a law that is off by a tenth must be seen
        assert max(abs(q / np.array(wrong.second_moments(depth, q[0])) - 1)) > 0.3


def test_an_explosion_is_inf_and_no_error() -> None:
    q = MeanField(F.gelu, 3.0).second_moments(3000)
    assert q[-1] == math.inf
