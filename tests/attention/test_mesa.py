"""MesaNet: its forms, and that it reads from the solution of a least squares problem."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention.delta import delta_rule, unit_length
from mini_nn.attention.mesa import mesa, mesa_conjugate_gradient, mesa_recurrent
from mini_nn.check import check_grads
from tests.attention.delta_goldens import ARRAYS, heads_first, inputs
from tests.attention.test_gated_delta import gated_tokens
from tests.support import assert_close, host

ITERATED = partial(mesa_conjugate_gradient, steps=8)  # in four dimensions 4 are enough
RULES = [mesa, mesa_recurrent, ITERATED]
NAMES = ["exact", "looped", "iterated"]


def naive(q: Any, k: Any, v: Any, ridge: float, beta: Any, log_decay: Any) -> Any:
    """For each token the weighted ridge regression on all tokens so far, written out, in NumPy."""
    outputs = []
    for t in range(len(q)):
        weight = np.exp(np.array([log_decay[j + 1 : t + 1].sum() for j in range(t + 1)]))
        rows = (beta[: t + 1] * weight)[:, None] * k[: t + 1]
        gram = rows.T @ k[: t + 1] + ridge * np.eye(k.shape[1])
        outputs.append(q[t] @ np.linalg.solve(gram, rows.T @ v[: t + 1]))
    return np.array(outputs).reshape(len(q), v.shape[1])


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@given(n=st.integers(0, 40), seed=st.integers(0, 2**32))
def test_regression(xp: Any, rule: Any, n: int, seed: int) -> None:
    q, k, v, beta, log_decay = gated_tokens(Rng(seed), n)
    y = rule(q, k, v, 0.3, beta, log_decay, True)
    for i in range(2):
        seen = [host(x)[i] for x in (q, k, v, beta, log_decay)]
        assert_close(y[i], naive(*seen[:3], 0.3, *seen[3:]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_reference(xp: Any, rule: Any) -> None:
    x = inputs(xp)
    y, state = rule(x["q"], x["k"], x["v"], x["lamb"], x["beta"], x["g"], True, ())
    assert_close(y, heads_first("out.mesa"), rtol=1e-5, atol=1e-5)
    assert_close(state.gram, ARRAYS["out.mesa.gram"], rtol=1e-5, atol=1e-5)
    assert_close(state.moment, ARRAYS["out.mesa.moment"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@given(n=st.integers(1, 40), decays=st.booleans(), data=st.data(), seed=st.integers(0, 2**32))
def test_splitting(xp: Any, rule: Any, n: int, decays: bool, data: Any, seed: int) -> None:
    cut = data.draw(st.integers(0, n))
    q, k, v, beta, log_decay = gated_tokens(Rng(seed), n)

    def run(part: slice, state: Any) -> Any:
        gates = log_decay[:, part] if decays else None
        return rule(q[:, part], k[:, part], v[:, part], 0.5, beta[:, part], gates, True, state)

    whole, end = run(slice(0, n), ())
    first, state = run(slice(0, cut), ())
    rest, last = run(slice(cut, n), state)
    assert_close(ops.concatenate([first, rest], axis=1), whole, rtol=1e-8, atol=1e-9)
    assert_close(last.gram, end.gram)
    assert_close(last.moment, end.moment)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_causality(xp: Any, rule: Any, data: Any, seed: int) -> None:
    n = 36
    t = data.draw(st.integers(0, n - 1))
    args = gated_tokens(Rng(seed), n)
    changed = [x.copy() for x in args]
    for x in changed:
        x[:, t] = -0.4

    def run(q: Any, k: Any, v: Any, beta: Any, log_decay: Any) -> Any:
        return rule(q, k, v, 0.5, ops.square(beta), log_decay, True)

    y, other = run(*args), run(*changed)
    assert_close(other[:, :t], y[:, :t], atol=0.0 if rule is mesa_recurrent else 1e-12)
    leaves = [Tensor(x, requires_grad=True) for x in args]
    for g in grad(run(*leaves)[:, t].sum(), leaves):
        assert float(abs(g.data[:, t + 1 :]).sum()) == 0.0


@given(st.integers(1, 8), st.integers(0, 2**32))
def test_interpolation(xp: Any, n: int, seed: int) -> None:
    """Λ → 0 and at most d independent keys, orthogonal or not: every pair is recalled."""
    rng, d = Rng(seed), 8
    basis, _ = np.linalg.qr(host(rng.normal((d, d), dtype="float64")))
    k = xp.asarray(((np.eye(d) + 0.5 * np.eye(d, k=1)) @ basis)[:n])  # neighbours overlap
    v = rng.normal((n, 3), dtype="float64")
    _, state = mesa(k, k, v, 1e-9, is_causal=True, state=())
    gram = state.gram + 1e-9 * xp.eye(d)
    recalled = ops.matmul(k, ops.solve(gram, state.moment))
    assert_close(recalled, v, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("n", [8, 32])
def test_recall_of_random_keys(xp: Any, n: int) -> None:
    """n random unit keys in d = 64 dimensions: no error, where the delta rule has 0.23 and 0.54."""
    rng = Rng(0)
    k = unit_length(rng.normal((n, 64), dtype="float64"), 0.0)
    v = rng.normal((n, 64), dtype="float64")
    _, state = mesa(k, k, v, 1e-6, is_causal=True, state=())
    error = ops.matmul(k, ops.solve(state.gram + 1e-6 * xp.eye(64), state.moment)) - v
    assert float(abs(error).max()) < 1e-3
    _, plain = delta_rule(k, k, v, 1.0, True, ())
    assert float(ops.square(ops.matmul(k, plain.matrix) - v).mean()) > 0.03


def test_recursive_least_squares(xp: Any) -> None:
    """Without forgetting it is a delta rule that chooses its own step and direction.

    These are the gain P k / (1 + kᵀ P k), P = (H + Λ)⁻¹ before the token.
    """
    q, k, v, _, _ = gated_tokens(Rng(1), 12, lead=())
    x, y = host(k), host(v)
    inverse, s = np.eye(4) / 0.5, np.zeros((4, 3))
    outputs = []
    for t in range(12):
        gain = inverse @ x[t] / (1.0 + x[t] @ inverse @ x[t])
        s = s + np.outer(gain, y[t] - s.T @ x[t])
        inverse = inverse - np.outer(gain, x[t] @ inverse)
        outputs.append(s.T @ host(q)[t])
    assert_close(mesa(q, k, v, 0.5, is_causal=True), np.array(outputs))


def test_large_ridge_is_linear_attention(xp: Any) -> None:
    """λ → ∞: λ o_t goes to the linear attention of the same tokens."""
    q, k, v, _, _ = gated_tokens(Rng(2), 9)
    linear = ops.matmul(ops.tril(ops.matmul(q, ops.matrix_transpose(k))), v)
    assert_close(1e8 * mesa(q, k, v, 1e8, is_causal=True), linear, rtol=1e-5, atol=1e-6)


def test_conjugate_gradients_end_after_d_steps(xp: Any) -> None:
    """In exact arithmetic: with d of them the residual is rounding, with 1 it is not."""
    q, k, v, beta, log_decay = gated_tokens(Rng(3), 20, 5)
    args = (q, k, v, 0.2, beta, log_decay, True)
    want = mesa(*args)
    assert_close(mesa_conjugate_gradient(*args, steps=5), want, rtol=1e-8, atol=1e-10)
    assert abs(host(mesa_conjugate_gradient(*args, steps=1)) - host(want)).max() > 1e-3


def test_gradients(xp: Any) -> None:
    """Of the exact solution, also by conjugate gradients, which are not unrolled for them."""
    q, k, v, beta, log_decay = gated_tokens(Rng(4), 4, 2, 2, ())
    ridge = xp.asarray([0.5, 0.9])
    args = (q, k, v, ridge, 0.2 + beta, log_decay)
    for rule in (mesa, mesa_recurrent):
        check_grads(lambda *xs, rule=rule: rule(*xs, True), *args, order=1)
    found = []
    for rule in RULES:
        leaves = [Tensor(x, requires_grad=True) for x in args]
        found.append(grad((rule(*leaves, True) * v).sum(), leaves))
    for exact, looped, iterated in zip(*found, strict=True):
        assert_close(looped, exact)
        assert_close(iterated, exact, rtol=1e-7, atol=1e-9)


def test_gradients_of_the_iteration_need_its_steps_too(xp: Any) -> None:
    """Four dimensions need four steps, there and back: with two the gradient is another one."""
    q, k, v, _, _ = gated_tokens(Rng(6), 9)
    rules = (partial(mesa_conjugate_gradient, steps=4), mesa)
    found = []
    for rule in rules:
        leaf = Tensor(q, requires_grad=True)
        found.append(grad(ops.square(rule(leaf, k, v)).sum(), leaf)[0])
    assert_close(*found, rtol=1e-7, atol=1e-9)
    rough = Tensor(q, requires_grad=True)
    (g,) = grad(ops.square(mesa_conjugate_gradient(rough, k, v, steps=2)).sum(), rough)
    assert abs(host(g) - host(found[1])).max() > 1e-4


def test_the_iteration_has_steps_enough_by_default(xp: Any) -> None:
    """For 40 unit keys in 16 dimensions."""
    k = unit_length(Rng(7).normal((40, 16), dtype="float64"), 0.0)
    assert_close(mesa_conjugate_gradient(k, k, k), mesa(k, k, k), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_gradients_flow_through_the_state(xp: Any, rule: Any) -> None:
    """Through G for values and through H for keys: those of one pass."""
    q, k, v, _, _ = gated_tokens(Rng(8), 7)
    leaves = [Tensor(x, requires_grad=True) for x in (k, v)]
    whole = grad(rule(q, *leaves, 0.5)[:, 4:].sum(), leaves)
    _, state = rule(q[:, :4], *[x[:, :4] for x in leaves], 0.5, state=())
    y, _ = rule(q[:, 4:], *[x[:, 4:] for x in leaves], 0.5, state=state)
    for got, want in zip(grad(y.sum(), leaves), whole, strict=True):
        assert float(abs(host(want)[:, :4]).max()) > 1e-3
        assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_the_iteration_is_differentiable_once_and_says_so(xp: Any) -> None:
    """Its gradient takes the solution for a constant, so a second one would be silently wrong."""
    q, k, v, _, _ = gated_tokens(Rng(9), 4)
    leaf = Tensor(q, requires_grad=True)
    y = mesa_conjugate_gradient(leaf, k, v)
    with pytest.raises(RuntimeError, match="take mesa"):
        grad(y.sum(), leaf, create_graph=True)
    small = gated_tokens(Rng(9), 3, 2, 2, ())
    check_grads(lambda q, k, v: mesa(q, k, v), *small[:3], order=2)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_numbers_for_gates_and_ridge(xp: Any, rule: Any) -> None:
    """Of any kind, and none decides the dtype; what is not positive is no ridge."""
    q, k, v, beta, _ = gated_tokens(Rng(10), 6)
    want = rule(q, k, v, xp.full((4,), 0.5), beta, xp.full((2, 6), -0.1))
    small = [x.astype("float32") for x in (q, k, v)]
    for kind in (float, np.float32, np.float64, xp.asarray):
        args = (kind(0.5), beta, kind(-0.1))
        assert_close(rule(q, k, v, *args), want, rtol=1e-6, atol=1e-6)
        y, state = rule(*small, *args, state=())
        assert {x.dtype.name for x in (y, *state)} == {"float32"}
    half = rule(*[x.astype("float16") for x in small], 0.5, beta, -0.1)
    assert half.dtype == "float16"
    assert_close(half.astype("float64"), want, rtol=2e-2, atol=2e-2)
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            rule(q, k, v, ridge)
    with pytest.raises(ValueError, match="ridge has to broadcast"):
        rule(q, k, v, xp.ones(3))


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_refusals(xp: Any, rule: Any) -> None:
    q, k, v, _, _ = gated_tokens(Rng(11), 6)
    with pytest.raises(ValueError, match=r"\(2, 1, 4\), \(1, 6, 4\) and \(1, 6, 3\)"):
        rule(q[:, -1:], k[:1], v[:1], is_causal=False)
    _, state = rule(q[:1], k[:1], v[:1], state=())
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and \(…, d, e\) = \(2, 4, 3\) here, got"):
        rule(q, k, v, state=state)
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps={steps}"):
            mesa_conjugate_gradient(q, k, v, steps=steps)


def test_edges(xp: Any) -> None:
    """Zero keys read nothing; one token; float32; decoding from a cache; what is refused."""
    q, k, v, beta, log_decay = gated_tokens(Rng(5), 7)
    for rule in RULES:
        assert_close(rule(q, 0.0 * k, v, is_causal=True), 0.0)
        want = rule(q, k, v, 0.5, beta, log_decay, True)
        last = rule(q[:, -1:], k, v, 0.5, beta, log_decay, False)
        assert_close(last, want[:, -1:], atol=1e-9)
        small = [x.astype("float32") for x in (q, k, v)]
        leaves = [Tensor(x, requires_grad=True) for x in small]
        y = rule(*leaves, 0.5, is_causal=True)
        assert y.dtype == "float32"
        assert all(g.dtype == "float32" for g in grad(y.sum(), leaves))
        assert_close(y, rule(q, k, v, 0.5, is_causal=True), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="is_causal=True"):
            rule(q, k, v, is_causal=False)
        with pytest.raises(ValueError, match="state"):
            rule(q, k, v, is_causal=False, state=())
