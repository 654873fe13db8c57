"""PaTH: the closed form against the product of reflections; DeltaFormer against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention.delta import delta_weights
from mini_nn.attention.path import deltaformer, path_attention, path_logits
from mini_nn.check import check_grads
from tests.attention.delta_goldens import heads_first, inputs
from tests.support import assert_close, host


def tokens(rng: Rng, n: int, d: int = 4, e: int = 3, lead: tuple[int, ...] = (2,)) -> Any:
    """Query, key, value, direction (of any length), β and log f."""
    q, k, w = (rng.normal((*lead, n, d), dtype="float64") for _ in range(3))
    beta = rng.uniform((*lead, n), 0.0, 2.0, dtype="float64")
    forget = -rng.uniform((*lead, n), 0.0, 1.0, dtype="float64")
    return q, k, rng.normal((*lead, n, e), dtype="float64"), 0.5 * w, beta, forget


def product(q: Any, k: Any, w: Any, beta: Any) -> Any:
    """q_iᵀ H_i ⋯ H_{j+1} k_j by multiplying matrices, one sequence, in NumPy."""
    n, logits = len(q), np.zeros((len(q), len(q)))
    for j in range(n):
        moved = k[j]
        for i in range(j, n):
            if i > j:
                moved = moved - beta[i] * w[i] * (w[i] @ moved)
            logits[i, j] = q[i] @ moved
    return logits


def naive(logits: Any, v: Any) -> Any:
    """Causal softmax attention with these logits, in NumPy."""
    rows = []
    for i in range(len(v)):
        e = np.exp(logits[i, : i + 1] - logits[i, : i + 1].max())
        rows.append(e / e.sum() @ v[: i + 1])
    return np.array(rows).reshape(v.shape)


@given(st.integers(0, 40), st.integers(0, 2**32))
def test_closed_form_is_the_product(xp: Any, n: int, seed: int) -> None:
    q, k, _, w, beta, _ = tokens(Rng(seed), n)
    logits = path_logits(q, k, w, beta)
    for i in range(2):
        want = product(*[host(x)[i] for x in (q, k, w, beta)])
        assert_close(logits[i], want, rtol=1e-8, atol=1e-9 * max(1.0, abs(want).max(initial=0.0)))


def test_misprints(xp: Any) -> None:
    """The triangles have to be what they are: H_i counts for q_i, H_j does not for k_j."""
    q, k, _, w, beta, _ = tokens(Rng(0), 12, lead=())
    q, k, w, beta = host(q), host(k), host(w), host(beta)
    steps, want = beta[:, None] * w, product(q, k, w, beta)

    def form(inner: int, reads: int, moves: int) -> Any:
        inverse = np.linalg.inv(np.eye(12) + np.tril(steps @ w.T, inner))
        part = np.tril(q @ w.T, reads) @ inverse @ np.tril(steps @ k.T, moves)
        return np.tril(np.tril(q @ k.T) - part)

    assert abs(form(-1, 0, -1) - want).max() < 1e-10
    for wrong in ((0, 0, -1), (-1, -1, -1), (-1, 0, 0)):
        assert abs(form(*wrong) - want).max() > 0.01


@given(st.integers(1, 30), st.integers(0, 2**32))
def test_directions_of_the_keys_give_deltanet(xp: Any, n: int, seed: int) -> None:
    """W = K: the logits are the weights of the delta rule, but for the factor β of each key."""
    q, k, _, _, beta, _ = tokens(Rng(seed), n)
    k = k / (k * k).sum(axis=-1, keepdims=True) ** 0.5
    assert_close(path_logits(q, k, k, 1.0), delta_weights(q, k, 1.0))
    assert_close(path_logits(q, k, k, beta) * beta[:, None, :], delta_weights(q, k, beta))


def test_limits(xp: Any) -> None:
    """β = 0, or directions of 0, is plain causal attention; a forget gate is FoX's bias."""
    q, k, v, w, _, forget = tokens(Rng(1), 9)
    plain = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(path_attention(q, k, v, w, 0.0, is_causal=True), plain)
    assert_close(path_attention(q, k, v, 0.0 * w, is_causal=True), plain)
    total = xp.cumsum(forget, axis=-1)
    bias = xp.where(xp.tril(xp.ones((9, 9))) > 0.0, total[..., :, None] - total[..., None, :], 0.0)
    bias = bias - 1e30 * (1.0 - xp.tril(xp.ones((9, 9))))
    fox = ops.scaled_dot_product_attention(q, k, v, bias)
    assert_close(path_attention(q, k, v, w, 0.0, forget, is_causal=True), fox)


def test_reflections_keep_lengths(xp: Any) -> None:
    """β ‖w‖² = 2 throughout: every H is a reflection, so ‖a_ij‖ ≤ ‖q_i‖ ‖k_j‖, with equality in one
    dimension, where the sign counts the tokens in between."""
    q, k = Rng(2).normal((8, 1), dtype="float64"), Rng(3).normal((8, 1), dtype="float64")
    logits = host(path_logits(q, k, xp.ones((8, 1)), 2.0))
    i, j = np.tril_indices(8)
    want = host(q)[i, 0] * host(k)[j, 0] * (-1.0) ** (i - j)
    assert_close(logits[i, j], want)


def test_attention(xp: Any) -> None:
    q, k, v, w, beta, _ = tokens(Rng(4), 11)
    y = path_attention(q, k, v, w, beta, scale=0.7, is_causal=True)
    for i in range(2):
        logits = product(*[host(x)[i] for x in (q, k, w, beta)])
        assert_close(y[i], naive(0.7 * logits, host(v)[i]))


def test_reference(xp: Any) -> None:
    x = inputs(xp)
    args = (x["q"], x["k"], x["v"], x["w"], x["beta"])
    y = path_attention(*args, is_causal=True)
    assert_close(y, heads_first("out.path"), rtol=1e-5, atol=1e-5)
    y = path_attention(*args, x["g"], 1.0, True)
    assert_close(y, heads_first("out.path_forget"), rtol=1e-5, atol=1e-5)
    y = deltaformer(*args[:3], None, x["beta"], is_causal=True)
    assert_close(y, heads_first("out.deltaformer"), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 25), st.booleans(), st.data(), st.integers(0, 2**32))
def test_splitting(xp: Any, n: int, forgets: bool, data: Any, seed: int) -> None:
    """With the keys moved along, a sequence may be cut anywhere, twice."""
    cuts = sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2)))
    args = tokens(Rng(seed), n)

    def path(part: slice, state: Any) -> Any:
        q, k, v, w, beta, forget = (x[:, part] for x in args)
        gates = forget if forgets else None
        return path_attention(q, k, v, w, beta, gates, is_causal=True, state=state)

    def former(part: slice, state: Any) -> Any:
        q, k, v, w, beta, _ = (x[:, part] for x in args)
        return deltaformer(q, k, v, w, beta, is_causal=True, state=state)

    for run in (path, former):
        whole, end = run(slice(0, n), ())
        assert_close(run(slice(0, n), None), whole)
        parts, state = [], ()
        for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
            y, state = run(slice(start, stop), state)
            parts.append(y)
        assert_close(ops.concatenate(parts, axis=1), whole, rtol=1e-8, atol=1e-9)
        for got, want in zip(state, end, strict=True):
            if want is not None:
                assert_close(got, want, rtol=1e-8, atol=1e-8)


@given(st.data(), st.integers(0, 2**32))
def test_causality(xp: Any, data: Any, seed: int) -> None:
    n = 20
    t = data.draw(st.integers(0, n - 1))
    args = tokens(Rng(seed), n)
    changed = [x.copy() for x in args]
    for x in changed:
        x[:, t] = -0.4

    def path(*xs: Any) -> Any:
        return path_attention(*xs, is_causal=True)

    def former(q: Any, k: Any, v: Any, w: Any, beta: Any, _: Any) -> Any:
        return deltaformer(q, k, v, w, beta, is_causal=True)

    for run in (path, former):
        assert_close(run(*changed)[:, :t], run(*args)[:, :t], atol=1e-12)
        leaves = [Tensor(x, requires_grad=True) for x in args]
        used = leaves[: 6 if run is path else 5]
        for g in grad(run(*leaves)[:, t].sum(), used):
            assert float(abs(g.data[:, t + 1 :]).sum()) == 0.0


@given(st.integers(1, 15), st.integers(0, 2**32))
def test_deltaformer(xp: Any, n: int, seed: int) -> None:
    """u_i = v_i − β_i Σ_{j<i} p_ij u_j one after the other, and β = 0 is softmax attention."""
    q, k, v, w, beta, _ = tokens(Rng(seed), n)
    y = deltaformer(q, k, v, w, beta, 0.5, is_causal=True)
    plain = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(deltaformer(q, k, v, w, 0.0, is_causal=True), plain)
    for b in range(2):
        qs, ks, vs, ws, rate = (host(x)[b] for x in (q, k, v, w, beta))
        u = np.array(vs)
        for i in range(1, n):
            p = np.exp(0.5 * ks[:i] @ ws[i])
            u[i] = vs[i] - rate[i] * (p / p.sum()) @ u[:i]
        assert_close(y[b], naive(0.5 * qs @ ks.T, u))


def test_gradients(xp: Any) -> None:
    q, k, v, w, beta, forget = tokens(Rng(5), 4, 2, 2, ())
    check_grads(path_logits, q, k, w, beta, order=2)
    check_grads(lambda *xs: path_attention(*xs, is_causal=True), q, k, v, w, beta, forget, order=1)
    check_grads(lambda *xs: deltaformer(*xs, is_causal=True), q, k, v, w, beta, order=1)


def test_edges(xp: Any) -> None:
    """One token reads its value; large logits; float32; decoding from a cache; what is refused."""
    q, k, v, w, beta, _ = tokens(Rng(6), 7)
    for rule in (path_attention, deltaformer):
        assert_close(rule(q[:, :1], k[:, :1], v[:, :1], w[:, :1], is_causal=True), v[:, :1])
        large = rule(1e4 * q, k, v, w, 0.1 * beta, is_causal=True)
        assert np.isfinite(host(large)).all()
        small = [x.astype("float32") for x in (q, k, v, w, beta)]
        assert rule(*small, is_causal=True).dtype == "float32"
        with pytest.raises(ValueError, match="is_causal=True"):
            rule(q, k, v, w, is_causal=False)
    last = path_attention(q[:, -1:], k, v, w, beta, is_causal=False)
    assert_close(last, path_attention(q, k, v, w, beta, is_causal=True)[:, -1:])
    with pytest.raises(ValueError, match="pass direction"):
        deltaformer(q[:, -1:], k, v)


def test_scale(xp: Any) -> None:
    """Of both softmaxes of DeltaFormer, where it is a factor of queries that are directions too."""
    q, k, v, w, beta, forget = tokens(Rng(7), 6)
    ratio = 0.7 / 0.5  # 1/√4 is the default
    assert_close(deltaformer(q, k, v, scale=0.7), deltaformer(q * ratio, k, v))
    assert_close(
        path_attention(q, k, v, w, beta, forget, 0.7),
        path_attention(q * ratio, k, v, w, beta, forget),
    )


def test_numbers_of_any_kind(xp: Any) -> None:
    """For β, log f and the scale; none decides the dtype, and float16 is summed in float32."""
    q, k, v, w, _, _ = tokens(Rng(8), 6)
    full = path_attention(q, k, v, w, xp.full((2, 6), 0.5), xp.full((2, 6), -0.1), 0.3)
    want = {path_attention: full, deltaformer: deltaformer(q, k, v, w, xp.full((2, 6), 0.5), 0.3)}
    small = [x.astype("float32") for x in (q, k, v, w)]
    for kind in (float, np.float32, np.float64, xp.asarray):
        for rule, args in (
            (path_attention, (kind(0.5), kind(-0.1), kind(0.3))),
            (deltaformer, (kind(0.5), kind(0.3))),
        ):
            assert_close(rule(q, k, v, w, *args), want[rule], rtol=1e-6, atol=1e-6)
            for dtype in ("float32", "float16"):
                y, state = rule(*[x.astype(dtype) for x in small], *args, state=())
                assert y.dtype == dtype
                assert {x.dtype.name for x in state} == {"float32"}
                assert_close(y.astype("float64"), want[rule], rtol=2e-2, atol=2e-2)
    assert path_logits(*small[:2], small[3], np.float64(0.5)).dtype == "float32"


def test_gradients_flow_through_the_state(xp: Any) -> None:
    """To the keys and values of earlier calls: those of one pass."""
    q, k, v, w, beta, forget = tokens(Rng(9), 7)

    def path(part: slice, k: Any, v: Any, state: Any) -> Any:
        args = (q[:, part], k[:, part], v[:, part], w[:, part], beta[:, part], forget[:, part])
        return path_attention(*args, state=state)

    def former(part: slice, k: Any, v: Any, state: Any) -> Any:
        return deltaformer(
            q[:, part], k[:, part], v[:, part], w[:, part], beta[:, part], state=state
        )

    for run in (path, former):
        leaves = [Tensor(x, requires_grad=True) for x in (k, v)]
        whole = grad(run(slice(0, 7), *leaves, None)[:, 4:].sum(), leaves)
        _, state = run(slice(0, 4), *leaves, ())
        y, _ = run(slice(4, 7), *leaves, state)
        for got, want in zip(grad(y.sum(), leaves), whole, strict=True):
            assert float(abs(host(want)[:, :4]).max()) > 1e-3
            assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_a_sequence_forgets_throughout_or_never(xp: Any) -> None:
    """Log f in one part only would be dropped, or is missing: refused; 0 forgets nothing."""
    q, k, v, w, beta, forget = tokens(Rng(10), 6)
    first = [x[:, :4] for x in (q, k, v, w, beta)]
    rest = [x[:, 4:] for x in (q, k, v, w, beta)]
    _, with_gate = path_attention(*first, forget[:, :4], state=())
    _, without = path_attention(*first, state=())
    for gate, state in ((None, with_gate), (forget[:, 4:], without)):
        with pytest.raises(ValueError, match=r"\(0\.0 forgets nothing\)"):
            path_attention(*rest, gate, state=state)
    _, state = path_attention(*first, 0.0, state=())
    y, _ = path_attention(*rest, forget[:, 4:], state=state)
    late = xp.concatenate([0.0 * forget[:, :4], forget[:, 4:]], axis=1)
    assert_close(y, path_attention(q, k, v, w, beta, late)[:, 4:])


def test_refusals(xp: Any) -> None:
    q, k, v, w, beta, _ = tokens(Rng(11), 6)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 6, 4\)"):
        path_logits(q[:, :3], k, w)
    for wrong in (w[:, :5], w[..., :3], w[0, 0], xp.concatenate([w, w], axis=0)):
        with pytest.raises(ValueError, match="direction is"):
            path_logits(q, k, wrong)
        for rule in (path_attention, deltaformer):
            with pytest.raises(ValueError, match="direction is"):
                rule(q, k, v, wrong, beta)
