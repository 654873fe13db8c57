"""The delta rule: its forms, what it remembers, when it explodes, and what it is the descent of."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention.chunked import chunked, recurrent
from mini_nn.attention.delta import (
    DeltaState,
    delta_rule,
    delta_rule_recurrent,
    delta_weights,
    exact_step,
    per_token,
    reflecting_step,
    unit_length,
)
from mini_nn.check import check_grads
from tests.attention.delta_goldens import ARRAYS, inputs
from tests.support import assert_close, host

RULES = [delta_rule, delta_rule_recurrent]


def tokens(rng: Rng, n: int, d: int = 4, e: int = 3, lead: tuple[int, ...] = (2,)) -> Any:
    """Queries, keys of length 1, values and β."""
    q, k = (rng.normal((*lead, n, d), dtype="float64") for _ in range(2))
    v = rng.normal((*lead, n, e), dtype="float64")
    return q, unit_length(k, 0.0), v, rng.uniform((*lead, n), dtype="float64")


def naive(q: Any, k: Any, v: Any, beta: Any, state: Any = None) -> Any:
    """One sequence, by the definition, in NumPy."""
    s = np.zeros((k.shape[1], v.shape[1])) if state is None else state
    outputs = []
    for t in range(len(k)):
        s = s + beta[t] * np.outer(k[t], v[t] - s.T @ k[t])
        outputs.append(s.T @ q[t])
    return np.array(outputs).reshape(len(k), v.shape[1]), s


# The forms


@pytest.mark.parametrize("rule", RULES)
@given(n=st.integers(0, 40), seed=st.integers(0, 2**32))
def test_definition(xp: Any, rule: Any, n: int, seed: int) -> None:
    q, k, v, beta = tokens(Rng(seed), n)
    y, state = rule(q, k, v, beta, True, ())
    for i in range(2):
        want, s = naive(*[host(x)[i] for x in (q, k, v, beta)])
        assert_close(y[i], want)
        assert_close(state.matrix[i], s)


def variants(q: Any, k: Any, v: Any, beta: Any) -> dict[str, Any]:
    """The matrix form and its classic misprints, in NumPy."""
    n, kk, unit = len(k), beta[:, None] * (k @ k.T), np.eye(len(k))

    def form(reads: int = 0, erases: int = -1, sign: float = 1.0, rate: Any = beta) -> Any:
        inverse = np.linalg.inv(unit + sign * np.tril(kk, erases))
        return np.tril(q @ k.T, reads) @ inverse @ (rate[:, None] * v)

    return {
        "right": form(),
        "a token that does not read itself": form(reads=-1),
        "a token that erases itself": form(erases=0),
        "the wrong sign": form(sign=-1.0),
        "values without beta": form(rate=np.ones(n)),
    }


@given(st.integers(8, 40), st.integers(0, 2**32))
def test_matrix_form(xp: Any, n: int, seed: int) -> None:
    """The recurrence is the matrix of 2406.06484, and none of the misprints of it."""
    q, k, v, beta = tokens(Rng(seed), n)
    y = delta_rule(q, k, v, beta, True)
    assert_close(ops.matmul(delta_weights(q, k, beta), v), y)
    forms = variants(*[host(x)[0] for x in (q, k, v, beta)])
    assert_close(y[0], forms.pop("right"))
    for name, wrong in forms.items():
        assert abs(host(y)[0] - wrong).max() > 1e-4, name


@pytest.mark.parametrize("name", ["delta_rule_recurrence", "delta_rule_chunkwise"])
@pytest.mark.parametrize("rule", RULES)
def test_reference(xp: Any, rule: Any, name: str) -> None:
    """flash-linear-attention, which divides queries by √d."""
    x = inputs(xp)
    start = DeltaState(x["state"]) if name == "delta_rule_recurrence" else ()
    y, state = rule(x["scaled"], x["k"], x["v"], x["beta"], True, start)
    assert_close(y, ARRAYS[f"out.{name}"], rtol=1e-5, atol=1e-5)
    assert_close(state.matrix, ARRAYS[f"out.{name}.state"], rtol=1e-5, atol=1e-5)
    unscaled, _ = rule(x["q"], x["k"], x["v"], x["beta"], True, start)
    assert abs(host(unscaled) - ARRAYS[f"out.{name}"]).max() > 0.1


@pytest.mark.parametrize("rule", RULES)
@given(n=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**32))
def test_splitting(xp: Any, rule: Any, n: int, data: Any, seed: int) -> None:
    """Cut anywhere, with the state handed on, a sequence is itself; the state is not changed."""
    cut = data.draw(st.integers(0, n))
    args = tokens(Rng(seed), n)
    whole, end = rule(*args, True, ())
    first, state = rule(*[x[:, :cut] for x in args], True, ())
    before = host(state.matrix).copy()
    rest, last = rule(*[x[:, cut:] for x in args], True, state)
    assert_close(ops.concatenate([first, rest], axis=1), whole)
    assert_close(last.matrix, end.matrix)
    assert_close(state.matrix, before, rtol=0.0, atol=1e-300)
    assert_close(rule(*args, True), whole)


@pytest.mark.parametrize("rule", RULES)
def test_arguments(xp: Any, rule: Any) -> None:
    """It is causal unless told otherwise; rates may be float64; float16 comes out as such."""
    q, k, v, beta = tokens(Rng(11), 5)
    assert_close(rule(q, k, v, beta), rule(q, k, v, beta, True))
    small = [x.astype("float32") for x in (q, k, v)]
    for rate in (0.5, np.float64(0.5), np.float32(0.5), xp.asarray(0.5), beta):
        y, state = rule(*small, rate, state=())
        assert (y.dtype, state.matrix.dtype) == ("float32", "float32")
        assert_close(y, rule(q, k, v, rate), rtol=1e-4, atol=1e-5)
    half = rule(*[x.astype("float16") for x in small], beta)
    assert half.dtype == "float16"
    assert_close(half.astype("float64"), rule(q, k, v, beta), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"\(2, 1, 4\), \(1, 5, 4\) and \(1, 5, 3\)"):
        rule(q[:, -1:], k[:1], v[:1], beta, False)
    if rule is delta_rule:
        with pytest.raises(ValueError, match="chunk_size=0"):
            rule(q, k, v, beta, chunk_size=0)


def test_gradients_flow_through_the_state(xp: Any) -> None:
    q, k, v, beta = tokens(Rng(0), 7)
    leaf = Tensor(v, requires_grad=True)
    (whole,) = grad(delta_rule(q, k, leaf, beta, True)[:, 4:].sum(), leaf)
    leaf = Tensor(v, requires_grad=True)
    _, state = delta_rule(q[:, :4], k[:, :4], leaf[:, :4], beta[:, :4], True, ())
    y, _ = delta_rule(q[:, 4:], k[:, 4:], leaf[:, 4:], beta[:, 4:], True, state)
    (parts,) = grad(y.sum(), leaf)
    assert_close(parts, whole)


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_causality(xp: Any, rule: Any, data: Any, seed: int) -> None:
    """What comes later changes nothing, and gets no gradient."""
    n = 40
    t = data.draw(st.integers(0, n - 1))
    args = tokens(Rng(seed), n)
    changed = [x.copy() for x in args]
    for x in changed:
        x[:, t] = 0.5
    y, other = rule(*args, True), rule(*changed, True)
    assert_close(other[:, :t], y[:, :t], atol=0.0 if rule is delta_rule_recurrent else 1e-12)
    assert abs(host(other)[:, t] - host(y)[:, t]).max() > 0.0
    leaves = [Tensor(x, requires_grad=True) for x in args]
    for g in grad(rule(*leaves, True)[:, t].sum(), leaves):
        assert float(abs(g.data[:, t + 1 :]).sum()) == 0.0


def test_decoding(xp: Any) -> None:
    """In place of softmax with a cache: one query for the last of all keys."""
    q, k, v, beta = tokens(Rng(1), 9)
    for rule in RULES:
        want = rule(q, k, v, beta, True)[:, -1:]
        assert_close(rule(q[:, -1:], k, v, beta, False), want)
        with pytest.raises(ValueError, match="is_causal=True"):
            rule(q, k, v, beta, False)


@pytest.mark.parametrize("rule", RULES)
def test_gradients(xp: Any, rule: Any) -> None:
    check_grads(lambda *xs: rule(*xs, True), *tokens(Rng(2), 5, 2, 2, ()), order=2)


def test_memory_is_linear(xp: Any) -> None:
    """4,096 tokens, forward and backward, without one array of n² numbers."""
    n, leaves = 4096, [Tensor(x, requires_grad=True) for x in tokens(Rng(10), 4096, 4, 4, ())]
    tracemalloc.start()
    grad(delta_rule(*leaves, True).sum(), leaves)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * n * 8 / 6


def test_edges(xp: Any) -> None:
    """Zero keys, d = 1, one token, rates that are numbers or broadcast."""
    q, k, v, beta = tokens(Rng(3), 5)
    assert_close(delta_rule(q, 0.0 * k, v, beta, True), 0.0)
    y, state = delta_rule(q, k, v, 0.0, True, DeltaState(q[:, :4, :3]))  # η = 0 writes nothing
    assert_close(state.matrix, q[:, :4, :3])
    assert_close(y, ops.matmul(q, q[:, :4, :3]))
    one = delta_rule(q[..., :1], k[..., :1], v, beta, True)
    assert_close(one, delta_rule_recurrent(q[..., :1], k[..., :1], v, beta, True))
    ones = xp.ones((2, 5))
    assert_close(delta_rule(q, k, v, is_causal=True), delta_rule(q, k, v, ones, True))
    assert_close(
        delta_rule(q, k, v, beta[:1], True)[1],
        delta_rule(q, k, v, xp.stack([beta[0]] * 2), True)[1],
    )
    with pytest.raises(ValueError, match="a rate for each token"):
        delta_rule(q, k, v, beta[:, :3], True)
    assert per_token(0.5, k).dtype == k.dtype


# What it remembers


@given(st.integers(1, 8), st.integers(0, 2**32))
def test_orthonormal_keys_are_recalled(xp: Any, n: int, seed: int) -> None:
    """S_tᵀ k_j = v_j for every j ≤ t, up to d pairs, in whatever order they came."""
    d = 8
    basis, _ = np.linalg.qr(host(Rng(seed).normal((d, d), dtype="float64")))
    k, v = xp.asarray(basis[:n]), Rng(seed + 1).normal((n, 5), dtype="float64")
    _, state = delta_rule(k, k, v, 1.0, True, ())
    assert_close(ops.matmul(k, state.matrix), v)


def test_rewriting(xp: Any) -> None:
    """The same unit key again: the new value replaces the old one, where linear attention adds."""
    rng = Rng(4)
    k = unit_length(rng.normal((1, 6), dtype="float64"), 0.0)
    v = rng.normal((2, 3), dtype="float64")
    twice = xp.concatenate([k, k])
    assert_close(delta_rule(twice, twice, v, 1.0, True)[1], v[1])
    assert_close(chunked(twice, twice, v)[0][1], v[0] + v[1])


@pytest.mark.parametrize(("n", "delta"), [(8, 0.23), (32, 0.54), (64, 0.78), (128, 1.03)])
def test_recall_of_random_keys(xp: Any, n: int, delta: float) -> None:
    """RMS error of reading back n pairs with random unit keys, d = 64: linear √((n − 1)/d).

    The delta rule's own numbers are those measured for the article.  Means over 10 draws.
    """
    d, errors = 64, []
    for seed in range(10):
        rng = Rng(seed)
        k = unit_length(rng.normal((n, d), dtype="float64"), 0.0)
        v = rng.normal((n, d), dtype="float64")
        _, linear = chunked(k, k, v)
        _, state = delta_rule(k, k, v, 1.0, True, ())
        found = [host(ops.matmul(k, s)) - host(v) for s in (linear, state.matrix)]
        errors.append([(e * e).mean() for e in found])
    got = np.sqrt(np.mean(errors, axis=0))
    assert_close(got[0], ((n - 1) / d) ** 0.5, rtol=0.05)
    assert_close(got[1], delta, rtol=0.06)


# When it explodes


def transition(k: Any, beta: Any) -> Any:
    """I − β k kᵀ, as what one token of value 0 makes of a state that is the identity."""
    xp = ops.elementwise.of(k)
    unit = xp.eye(k.shape[-1], dtype=k.dtype)
    _, state = delta_rule(k[None], k[None], 0.0 * k[None], beta, True, DeltaState(unit))
    return host(state.matrix)


@given(st.floats(0.0, 3.0), st.floats(0.1, 2.0), st.integers(0, 2**32))
def test_eigenvalues(xp: Any, beta: float, length: float, seed: int) -> None:
    """1 − β ‖k‖² once and 1 otherwise; with the exact step e^(−β ‖k‖²), in (0, 1]."""
    k = length * unit_length(Rng(seed).normal((5,), dtype="float64"), 0.0)
    square = length * length
    for step, along in (
        (beta, 1.0 - beta * square),
        (exact_step(beta, k[None]), np.exp(-beta * square)),
    ):
        values = np.sort(np.linalg.eigvalsh(transition(k, step)))
        assert_close(values, np.sort([along, 1.0, 1.0, 1.0, 1.0]), atol=1e-10)


@pytest.mark.parametrize("along", [-1.5, -1.0, 0.0, 0.5, 1.0])
def test_amplified_or_not(xp: Any, along: float) -> None:
    """One key again and again with β ‖k‖² = 1 − λ: what the state holds goes as λⁿ."""
    k = xp.zeros((60, 3))
    k[:, 0] = 1.0
    start = DeltaState(xp.ones((3, 2)))
    _, state = delta_rule(k, k, xp.zeros((60, 2)), 1.0 - along, True, start)
    assert_close(state.matrix[0], along**60, rtol=1e-9, atol=1e-12)
    assert_close(state.matrix[1:], 1.0)


def test_state_is_not_bounded(xp: Any) -> None:
    """With keys of length 1 and β = 1 each new value adds its square, if the key avoids the state.

    Nor is it for β ‖k‖² = 2, where signs that alternate with the reflections add up.
    """
    s, one = DeltaState(xp.asarray([[1.0], [0.0]])), xp.ones((1, 1))
    for _ in range(99):
        turned = xp.flip(s.matrix[:, 0], 0) * xp.asarray([1.0, -1.0])
        k = unit_length(turned[None], 0.0)
        _, s = delta_rule(k, k, one, 1.0, True, s)
    assert_close((s.matrix * s.matrix).sum(), 100.0)
    k, signs = xp.ones((50, 1)), xp.asarray((-1.0) ** np.arange(50))[:, None]
    _, s = delta_rule(k, k, signs, 2.0, True, ())
    assert_close(abs(s.matrix), xp.full((1, 1), 100.0))


def test_keys_as_they_come_explode(xp: Any) -> None:
    """The classic bug: keys of ‖k‖² ≈ d.  Of length 1, or with the exact step, they do not."""
    rng = Rng(5)
    k, v = rng.normal((200, 16), dtype="float64"), rng.normal((200, 16), dtype="float64")
    sizes = {
        name: float(abs(host(delta_rule(key, key, v, beta, True, ())[1].matrix)).max())
        for name, key, beta in (
            ("raw", k, 1.0),
            ("unit", unit_length(k), 1.0),
            ("exact", k, exact_step(1.0, k)),
        )
    }
    assert sizes["raw"] > 1e50 and sizes["unit"] < 20.0 and sizes["exact"] < 20.0


def test_exact_step_is_the_flow(xp: Any) -> None:
    """Many small Euler steps towards one pair are one exact step; one Euler step is not."""
    rng = Rng(6)
    k, v, start = (rng.normal(s, dtype="float64") for s in ((1, 4), (1, 3), (4, 3)))
    eta, parts = 0.7, 20000
    many = (xp.concatenate([k] * parts), xp.concatenate([v] * parts))
    _, flow = delta_rule(many[0], *many, eta / parts, True, DeltaState(start))
    _, once = delta_rule(k, k, v, exact_step(eta, k), True, DeltaState(start))
    assert_close(once.matrix, flow.matrix, rtol=0.0, atol=2e-3)
    _, euler = delta_rule(k, k, v, eta, True, DeltaState(start))
    assert float(abs(host(euler.matrix) - host(flow.matrix)).max()) > 0.1


def test_exact_step_at_zero(xp: Any) -> None:
    """Its limit is η; the gradient is finite, and right beside 0."""
    k = xp.zeros((3, 4))
    k[1, 0], k[2, 0] = 1e-8, 0.5
    leaf = Tensor(k, requires_grad=True)
    beta = exact_step(0.3, leaf)
    assert_close(beta[:2], 0.3, rtol=1e-12)
    (g,) = grad(beta.sum(), leaf)
    assert_close(g[0], 0.0, atol=1e-300)
    assert np.isfinite(host(g)).all()
    check_grads(lambda eta, key: exact_step(eta, key), xp.asarray([0.3, 0.8]), k[1:] + 0.4, order=2)


def test_exact_step_bends_at_zero(xp: Any) -> None:
    """(1 − e^(−η s)) / s = η − η² s / 2 + …: at η = 0 its slope is 1 and its curvature −s."""
    eta = Tensor(xp.zeros(()), requires_grad=True)
    (slope,) = grad(exact_step(eta, xp.ones((1, 2))).sum(), eta, create_graph=True)
    assert_close(slope, 1.0)
    assert_close(grad(slope, eta)[0], -2.0)


def test_counting_modulo_two(xp: Any) -> None:
    """With β = 2 a token reflects, so one number of the state is the parity of the bits so far.

    With β ≤ 1 the eigenvalue is not negative, and no product of them ever changes the sign.
    """
    bits = host(Rng(7).uniform((50,))) > 0.5
    k, v, start = xp.ones((50, 1)), xp.zeros((50, 1)), DeltaState(xp.ones((1, 1)))
    y = delta_rule(k, k, v, xp.asarray(2.0 * bits), True, start)[0]
    assert_close(y[:, 0], (-1.0) ** np.cumsum(bits))
    slow = delta_rule(k, k, v, xp.asarray(1.0 * bits), True, start)[0]
    assert float(slow.min()) >= 0.0
    x = Rng(8).normal((9,), dtype="float64")
    step = reflecting_step(x)
    assert bool((step > 0.0).all()) and bool((step < 2.0).all()) and bool((step > 1.0).any())
    assert_close(step, 1.0 + np.tanh(host(x) / 2.0))


def test_unit_length(xp: Any) -> None:
    x = Rng(9).normal((3, 4), dtype="float64")
    x[1] = 0.0
    leaf = Tensor(x, requires_grad=True)
    y = unit_length(leaf)
    assert_close((y * y).sum(axis=-1), [1.0, 0.0, 1.0], rtol=1e-5, atol=1e-300)
    (g,) = grad(y.sum(), leaf)
    assert np.isfinite(host(g)).all()
    for eps in (1e-6, np.float64(1e-6)):
        assert unit_length(x.astype("float32"), eps).dtype == "float32"
    tiny = xp.full((1, 4), 1e-3)  # of which ‖x‖² = 4 · 10⁻⁶ is no larger than ε
    assert_close(unit_length(tiny), tiny / (4e-6 + 1e-6) ** 0.5)


# What it is the descent of


def descend(loss: Any, state: Any, step: float) -> Any:
    """S − η ∂loss/∂S, by the engine."""
    leaf = Tensor(state, requires_grad=True)
    (g,) = grad(loss(leaf), leaf)
    return state - step * g.data


@given(st.floats(0.05, 1.0), st.floats(0.1, 0.99), st.integers(0, 2**32))
def test_rules_are_descents(xp: Any, eta: float, gamma: float, seed: int) -> None:
    """2407.04620: one step of gradient descent for each token, and the loss makes the rule."""
    rng = Rng(seed)
    q, k, v, _ = tokens(rng, 1, lead=())
    s = rng.normal((4, 3), dtype="float64")

    def agreement(state: Any) -> Any:
        return -(ops.matmul(k, state) * v).sum()

    def error(state: Any) -> Any:
        return 0.5 * ops.square(ops.matmul(k, state) - v).sum()

    def retention(state: Any) -> Any:
        return agreement(state) + 0.5 * (1.0 - gamma) * ops.square(state).sum()

    assert_close(descend(agreement, s, 1.0), recurrent(q, k, v, None, s)[1])
    decay = xp.full((1,), np.log(gamma))
    assert_close(descend(retention, s, 1.0), recurrent(q, k, v, decay, s)[1])
    _, state = delta_rule(q, k, v, eta, True, DeltaState(s))
    assert_close(descend(error, s, eta), state.matrix)
