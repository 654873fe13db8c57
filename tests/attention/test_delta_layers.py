"""DeltaNet and gated DeltaNet as layers: what they are made of, decoding, causality, training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.attention.delta_layers import DeltaNet, GatedDeltaNet
from mini_nn.check import check_grads
from mini_nn.optim import Adam
from tests.support import assert_close, host

LAYERS = [DeltaNet, GatedDeltaNet]


def make(kind: Any, dim: int = 8, heads: int = 2, width: int = 3) -> Any:
    return kind(dim, heads, width, rng=Rng(1)).astype("float64")


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def by_hand(layer: Any, x: Any, gated: bool) -> Any:
    """One sequence, head by head and token by token, in NumPy."""
    p = {name: host(array) for name, array in layer.state_dict().items()}
    t, d = x.shape
    heads, size = layer.heads, d // layer.heads
    width = layer.conv.width
    padded = np.concatenate([np.zeros((width - 1, 3 * d)), x @ p["qkv.weight"].T])
    mixed = sum(padded[j : j + t] * p["conv.weight"][:, j] for j in range(width))
    mixed = (mixed * sigmoid(mixed)).reshape(t, 3, heads, size)
    rates = x @ p["rates.weight"].T
    outputs = np.zeros((t, heads, size))
    for h in range(heads):
        q, k, v = (mixed[:, i, h] for i in range(3))
        q, k = (z / np.sqrt((z * z).sum(axis=1, keepdims=True) + 1e-6) for z in (q, k))
        s = np.zeros((size, size))
        for i in range(t):
            if gated:
                step = np.log1p(np.exp(rates[i, heads + h] + p["rate_bias"][h]))
                s = s * np.exp(-np.exp(p["log_a"][h]) * step)
            s = s + sigmoid(rates[i, h]) * np.outer(k[i], v[i] - s.T @ k[i])
            outputs[i, h] = s.T @ q[i]
    scale = np.sqrt((outputs * outputs).mean(axis=-1, keepdims=True) + 1e-5)
    y = (outputs / scale * p["norm.weight"]).reshape(t, d)
    if gated:
        gate = x @ p["gate.weight"].T
        y = y * gate * sigmoid(gate)
    return y @ p["out.weight"].T


@pytest.mark.parametrize("kind", LAYERS)
def test_definition(xp: Any, kind: Any) -> None:
    layer, x = make(kind), Rng(2).normal((2, 37, 8), dtype="float64")
    y = layer(x)
    for i in range(2):
        assert_close(y[i], by_hand(layer, host(x)[i], kind is GatedDeltaNet))


@pytest.mark.parametrize("kind", LAYERS)
@given(t=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**32))
def test_splitting(xp: Any, kind: Any, t: int, data: Any, seed: int) -> None:
    cut = data.draw(st.integers(0, t))
    layer, x = make(kind), Rng(seed).normal((2, t, 8), dtype="float64")
    whole, _ = layer(x, ())
    first, state = layer(x[:, :cut], ())
    rest, _ = layer(x[:, cut:], state)
    assert_close(ops.concatenate([first, rest], axis=1), whole)
    assert_close(layer(x), whole)


@pytest.mark.parametrize("kind", LAYERS)
def test_token_by_token(xp: Any, kind: Any) -> None:
    """A decoder that keeps the state only: memory does not grow with what was read."""
    layer, x = make(kind), Rng(3).normal((1, 6, 8), dtype="float64")
    state, rows, sizes = (), [], set()
    for i in range(6):
        y, state = layer(x[:, i : i + 1], state)
        rows.append(y)
        sizes.add((state.conv.inputs.size, state.rule.matrix.size))
    assert_close(ops.concatenate(rows, axis=1), layer(x))
    assert sizes == {(2 * 24, 2 * 4 * 4)}


@pytest.mark.parametrize("kind", LAYERS)
def test_causality(xp: Any, kind: Any) -> None:
    layer, x = make(kind), Rng(4).normal((2, 40, 8), dtype="float64")
    changed = x.copy()
    changed[:, 33] = -1.0
    assert_close(layer(changed)[:, :33], layer(x)[:, :33], atol=1e-12)
    leaf = Tensor(x, requires_grad=True)
    (g,) = grad(layer(leaf)[:, 33].sum(), leaf)
    assert float(abs(g.data[:, 34:]).sum()) == 0.0


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(xp: Any, kind: Any) -> None:
    """Of the input and of every parameter."""
    layer = make(kind, 4, 2, 2)
    x = Rng(5).normal((1, 4, 4), dtype="float64")
    check_grads(layer, x, order=1, dtypes=("float64",))
    layer(Tensor(x)).sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0.0).any()) for p in layer.parameters())


def test_start(xp: Any) -> None:
    """a in [1, 16] and a step in [0.001, 0.1] at x = 0, so γ is between e^−1.6 and e^−0.001."""
    layer = GatedDeltaNet(64, 64, rng=Rng(6))
    a, step = np.exp(host(layer.log_a)), np.log1p(np.exp(host(layer.rate_bias)))
    assert a.min() >= 1.0 and a.max() <= 16.0 and a.std() > 3.0
    assert step.min() >= 0.000999 and step.max() <= 0.1001 and np.log(step).std() > 1.0
    assert GatedDeltaNet(8, 2, rng=Rng(1)).log_a.dtype == "float32"


def test_learns_to_recall(xp: Any) -> None:
    """Pairs key, value and then a key again: the layer learns to answer with the value.

    Chance is log 8; the loss is that of the last token alone.
    """
    rng, pairs, symbols, width = Rng(7), 3, 8, 32
    table = nn.Embedding(2 * symbols, width, rng=rng)
    layer, head = DeltaNet(width, 2, 2, rng=rng), nn.Linear(width, symbols, rng=rng)
    parameters = [*table.parameters(), *layer.parameters(), *head.parameters()]
    optimizer = Adam(parameters, lr=0.01)
    host_rng, losses = np.random.default_rng(8), []
    for _ in range(150):
        keys = np.argsort(host_rng.random((64, symbols)), axis=1)[:, :pairs]
        values = host_rng.integers(0, symbols, (64, pairs))
        asked = host_rng.integers(0, pairs, 64)
        text = np.empty((64, 2 * pairs + 1), "int64")
        text[:, 0:-1:2], text[:, 1::2] = keys, values + symbols
        text[:, -1] = keys[np.arange(64), asked]
        x = table(xp.asarray(text))
        logits = head(x + layer(x))[:, -1]
        target = xp.asarray(values[np.arange(64), asked])
        loss = ops.cross_entropy(logits, target).mean()
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-20:]) < 0.5 * np.log(symbols)


def test_errors(xp: Any) -> None:
    for kind in LAYERS:
        with pytest.raises(ValueError, match="equal heads"):
            kind(6, 4)
        with pytest.raises(ValueError, match="equal heads"):
            kind(0, 1)
        with pytest.raises(ValueError, match=r"takes \(b, t, 8\), got \(1, 2, 6\)"):
            make(kind)(xp.ones((1, 2, 6)))
        with pytest.raises(ValueError, match=r"\(b, t, 8\)"):
            make(kind)(xp.ones((2, 8)))
