"""Linear attention: five forms of one function, what it sees, its weights, its rank, its pads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, ops
from mini_nn.attention import (
    LinearState,
    OuterState,
    chunked,
    cosine_features,
    elu_plus_one,
    exp_features,
    linear_attention,
    linear_attention_cumulative,
    linear_attention_parallel,
    linear_attention_recurrent,
    linear_attention_weights,
    recurrent,
    relu_features,
    softmax_features,
    taylor_features,
    unnormalized_attention,
)
from mini_nn.check import check_grads
from models.gpt import GPT, Block, GPTConfig
from tests.support import assert_close, host

SEEDS = st.integers(0, 2**32)
LEADS = st.sampled_from([(), (2,), (2, 3)])
MAPS = (elu_plus_one, cosine_features, taylor_features, (softmax_features, exp_features))
MAP = st.sampled_from(MAPS)


def draw(seed: int, n: int, d: int, e: int, lead: Any = (), m: int | None = None) -> Any:
    """Queries, keys and values in float64."""
    rng, m = Rng(seed), n if m is None else m
    shapes = ((*lead, n, d), (*lead, m, d), (*lead, m, e))
    return [rng.normal(shape, dtype="float64") for shape in shapes]


def part(xs: Any, start: int, stop: int | None) -> Any:
    return [x[..., start:stop, :] for x in xs]


def golden(prefix: str, xp: Any) -> Any:
    """What the authors' code answered: see golden/make_attention_linear.py."""
    path = Path(__file__).parents[1] / "golden" / "attention_linear.safetensors"
    with safetensors.safe_open(path, framework="np") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {n.removeprefix(prefix): xp.asarray(file.get_tensor(n)) for n in names}


# One function in five forms


@given(SEEDS, st.integers(0, 70), st.integers(1, 4), st.integers(1, 4), LEADS, MAP)
def test_causal_forms_agree(
    xp: Any, seed: int, n: int, d: int, e: int, lead: Any, phi: Any
) -> None:
    """Recurrent = cumulative sum = chunked = masked matrix."""
    qkv = draw(seed, n, d, e, lead)
    got = linear_attention(*qkv, phi, is_causal=True)
    assert got.shape == (*lead, n, e)
    for form in (linear_attention_recurrent, linear_attention_cumulative):
        assert_close(form(*qkv, phi), host(got), rtol=1e-9, atol=1e-10)
    parallel = linear_attention_parallel(*qkv, phi, is_causal=True)
    assert_close(parallel, host(got), rtol=1e-9, atol=1e-10)


@given(SEEDS, st.integers(1, 70), st.data())
def test_chunks_of_any_size(xp: Any, seed: int, n: int, data: Any) -> None:
    """S and z in one state, in chunks of 1 … n + 3 tokens: the recurrence, and its gradients."""
    size = data.draw(st.integers(1, n + 3))
    q, k, v = draw(seed, n, 3, 2, (2,))
    f, g = elu_plus_one(q), elu_plus_one(k)
    widened = xp.concatenate([v, xp.ones((2, n, 1))], axis=-1)
    sums, last = chunked(f, g, widened, None, None, size)
    got = host(sums)[..., :-1] / host(sums)[..., -1:]
    wanted, state = linear_attention_recurrent(q, k, v, state=())
    assert_close(got, host(wanted), rtol=1e-10, atol=1e-11)
    assert_close(last[..., :-1], host(state.kv), rtol=1e-10)
    assert_close(last[..., -1], host(state.normalizer), rtol=1e-10)


@given(SEEDS, st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), LEADS, MAP)
def test_order_of_the_products(
    xp: Any, seed: int, n: int, m: int, e: int, lead: Any, phi: Any
) -> None:
    """(φ(Q) ϕ(K)ᵀ) V = φ(Q) (ϕ(K)ᵀ V), and the normaliser is φ(Q) (ϕ(K)ᵀ 1); so without φ."""
    q, k, v = draw(seed, n, 3, e, lead, m)
    got = linear_attention(q, k, v, phi)
    assert_close(linear_attention_parallel(q, k, v, phi), host(got), rtol=1e-9, atol=1e-10)
    ones = linear_attention(q, k, xp.ones((*lead, m, 1)), phi)
    assert_close(ones, np.ones((*lead, n, 1)), rtol=1e-12)
    scores = host(q) @ np.swapaxes(host(k), -1, -2)
    assert_close(unnormalized_attention(q, k, v), scores @ host(v), rtol=1e-10, atol=1e-10)
    if n == m:
        causal = unnormalized_attention(q, k, v, is_causal=True)
        assert_close(causal, np.tril(scores) @ host(v), rtol=1e-10, atol=1e-10)
        assert_close(recurrent(q, k, v)[0], host(causal), rtol=1e-10, atol=1e-10)


@given(SEEDS, st.integers(1, 70), st.data(), MAP)
def test_splitting_a_sequence(xp: Any, seed: int, n: int, data: Any, phi: Any) -> None:
    """Cut anywhere, the state handed on: outputs, last state and gradients of one pass."""
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    qkv = draw(seed, n, 3, 2, (2,))
    whole = [Tensor(x, requires_grad=True) for x in qkv]
    pieces = [Tensor(x, requires_grad=True) for x in qkv]
    y, last = linear_attention(*whole, phi, is_causal=True, state=())
    for step in (linear_attention, linear_attention_recurrent):
        state: Any = ()
        outputs = []
        for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
            extra: Any = {"is_causal": True} if step is linear_attention else {}
            out, state = step(*part(pieces, start, stop), phi, state=state, **extra)
            outputs.append(out)
        assert isinstance(state, LinearState) and isinstance(last, LinearState)
        joined = ops.concatenate(outputs, axis=-2)
        assert_close(joined, host(y), rtol=1e-9, atol=1e-10)
        for a, b in zip(state, last, strict=True):
            assert_close(a, host(b), rtol=1e-9, atol=1e-10)
        weights = Rng(1).normal(y.shape, dtype="float64")
        slopes = [
            mini_nn.grad(ops.sum(out * weights) + ops.sum(end.kv), leaves, retain_graph=True)
            for out, end, leaves in ((y, last, whole), (joined, state, pieces))
        ]
        for a, b in zip(*slopes, strict=True):
            assert_close(b, host(a), rtol=1e-8, atol=1e-8)


def test_splitting_without_a_normaliser(xp: Any) -> None:
    qkv = draw(0, 9, 3, 2)
    whole, last = unnormalized_attention(*qkv, is_causal=True, state=())
    first, state = unnormalized_attention(*part(qkv, 0, 4), is_causal=True, state=())
    rest, state = unnormalized_attention(*part(qkv, 4, None), is_causal=True, state=state)
    assert isinstance(state, OuterState)
    assert_close(xp.concatenate([first, rest]), host(whole), rtol=1e-10)
    assert_close(state.kv, host(last.kv), rtol=1e-10)


def test_a_state_is_not_changed(xp: Any) -> None:
    """A prefix may be continued twice."""
    qkv = draw(1, 6, 3, 2)
    _, state = linear_attention(*part(qkv, 0, 3), is_causal=True, state=())
    before = [host(x).copy() for x in state]
    one, _ = linear_attention(*part(qkv, 3, 5), is_causal=True, state=state)
    two, _ = linear_attention(*part(qkv, 3, 5), is_causal=True, state=state)
    assert_close(one, host(two), rtol=0.0)
    for x, old in zip(state, before, strict=True):
        assert_close(x, old, rtol=0.0)


@pytest.mark.parametrize("phi", MAPS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_derivatives(xp: Any, phi: Any, is_causal: bool) -> None:
    check_grads(
        lambda q, k, v: linear_attention(q, k, v, phi, is_causal=is_causal),
        *draw(2, 4, 2, 2),
        order=2,
    )


def test_derivatives_of_state_and_plain_sums(xp: Any) -> None:
    qkv = draw(3, 3, 2, 2)
    kv, z = Rng(4).uniform((2, 2), dtype="float64"), Rng(5).uniform((2,), 1.0, dtype="float64")

    def continued(q: Any, k: Any, v: Any, kv: Any, z: Any) -> Any:
        y, end = linear_attention(q, k, v, is_causal=True, state=(kv, z))
        return y, end.kv, end.normalizer

    check_grads(continued, *qkv, kv, z, order=2)
    check_grads(lambda *x: unnormalized_attention(*x, is_causal=True), *qkv, order=2)


# What a token sees


@pytest.mark.parametrize("phi", MAPS)
@given(SEEDS, st.integers(1, 70), st.data())
def test_causality(xp: Any, phi: Any, seed: int, n: int, data: Any) -> None:
    """What changes at t leaves everything before as it is: bitwise where it is a recurrence."""
    t = data.draw(st.integers(0, n - 1))
    qkv = draw(seed, n, 3, 2)
    other = [
        xp.concatenate([x[:t], 5.0 * y[t:]]) for x, y in zip(qkv, draw(9, n, 3, 2), strict=True)
    ]

    def chunks(*x: Any) -> Any:
        return linear_attention(*x, phi, is_causal=True)

    def masked(*x: Any) -> Any:
        return linear_attention_parallel(*x, phi, is_causal=True)

    def steps(*x: Any) -> Any:
        return linear_attention_recurrent(*x, phi)

    assert (host(steps(*qkv))[:t] == host(steps(*other))[:t]).all()
    for form in (chunks, masked):
        assert_close(form(*other)[:t], host(form(*qkv))[:t], rtol=1e-12, atol=1e-12)
    leaves = [Tensor(x, requires_grad=True) for x in qkv]
    for form in (chunks, masked, steps):
        for g in mini_nn.grad(ops.sum(form(*leaves)[:t]), leaves):
            assert not host(g)[t:].any()
    for g in mini_nn.grad(ops.sum(unnormalized_attention(*leaves, is_causal=True)[:t]), leaves):
        assert not host(g)[t:].any()


def test_without_is_causal_it_would_leak(xp: Any) -> None:
    qkv = draw(0, 5, 3, 2)
    other = [*qkv[:2], xp.concatenate([qkv[2][:4], qkv[2][4:] + 1.0])]
    for form in (linear_attention, linear_attention_parallel, unnormalized_attention):
        assert abs(host(form(*qkv)) - host(form(*other)))[:4].max() > 1e-3


def test_a_normaliser_of_all_keys_leaks(xp: Any) -> None:
    """What is planted: causal sums over the normaliser of the whole sequence."""

    def planted(q: Any, k: Any, v: Any) -> Any:
        sums, _ = chunked(elu_plus_one(q), elu_plus_one(k), v)
        return sums / (elu_plus_one(q) @ elu_plus_one(k).sum(axis=-2)[:, None])

    qkv = draw(0, 5, 3, 2)
    other = [x.copy() for x in qkv]
    other[1][4] += 1.0
    for form, leak in (
        (planted, True),
        (lambda *x: linear_attention(*x, is_causal=True), False),
    ):
        moved = abs(host(form(*qkv)) - host(form(*other)))[:4].max()
        assert (moved > 1e-3) == leak


# Weights


@given(SEEDS, st.integers(1, 12), st.booleans(), MAP)
def test_weights(xp: Any, seed: int, n: int, is_causal: bool, phi: Any) -> None:
    """Not negative, with sum 1: the result is in the convex hull of the values."""
    q, k, v = draw(seed, n, 3, 2)
    a = host(linear_attention_weights(q, k, phi, None, is_causal))
    assert (a >= -1e-12).all()
    assert_close(a.sum(axis=-1), np.ones(n), rtol=1e-12)
    y, v = host(linear_attention(q, k, v, phi, None, is_causal)), host(v)
    assert_close(y, a @ v, rtol=1e-9, atol=1e-10)
    for u in np.random.default_rng(seed).standard_normal((5, 2)):  # in every half-plane with them
        assert (y @ u <= (v @ u).max() + 1e-9).all()
    if is_causal:
        assert not np.triu(a, 1).any()
        assert_close(y[:1], v[:1], rtol=1e-9, atol=1e-10)


def test_a_product_instead_of_the_quotient_has_other_weights(xp: Any) -> None:
    """What is planted: the reciprocal of the normaliser forgotten."""
    q, k, _ = draw(0, 6, 3, 2)
    scores = host(elu_plus_one(q)) @ host(elu_plus_one(k)).T
    planted = scores * scores.sum(axis=-1, keepdims=True)
    assert abs(planted.sum(axis=-1) - 1).min() > 1.0
    assert_close(linear_attention_weights(q, k).sum(axis=-1), np.ones(6), rtol=1e-12)


@given(SEEDS, st.integers(1, 12), st.floats(1e-3, 1e3), st.booleans())
def test_invariances(xp: Any, seed: int, n: int, c: float, is_causal: bool) -> None:
    """To a factor of each φ(q), to one factor of all ϕ(k), to the order of the pairs (k, v)."""
    q, k, v = draw(seed, n, 3, 2)
    factors = Rng(seed).uniform((n, 1), 0.1, 10.0, dtype="float64")

    def of_queries(x: Any) -> Any:
        return elu_plus_one(x) * factors

    def of_keys(x: Any) -> Any:
        return c * elu_plus_one(x)

    wanted = host(linear_attention(q, k, v, is_causal=is_causal))
    got = linear_attention(q, k, v, (of_queries, of_keys), is_causal=is_causal)
    assert_close(got, wanted, rtol=1e-10, atol=1e-11)
    order = Rng(seed).permutation(n)
    assert_close(
        linear_attention(q, k[order], v[order]),
        host(linear_attention(q, k, v)),
        rtol=1e-9,
        atol=1e-11,
    )
    bent = linear_attention(q, k, v, (elu_plus_one, of_queries), is_causal=is_causal)
    assert n == 1 or abs(host(bent) - wanted).max() > 1e-6  # a factor of each key is another thing


# The similarity 1 + cos, and its edges


@given(SEEDS, st.integers(1, 8), st.booleans())
def test_cosine_similarity(xp: Any, seed: int, n: int, is_causal: bool) -> None:
    """Σ (1 + cos) v / Σ (1 + cos), whatever the lengths of queries and keys."""
    q, k, v = draw(seed, n, 3, 2)
    lengths = np.linalg.norm(host(q), axis=1)[:, None] * np.linalg.norm(host(k), axis=1)
    sim = 1 + host(q) @ host(k).T / lengths
    sim = np.tril(sim) if is_causal else sim
    wanted = sim @ host(v) / sim.sum(axis=-1, keepdims=True)
    got = linear_attention(q, k, v, cosine_features, is_causal=is_causal)
    assert_close(got, wanted, rtol=1e-7, atol=1e-8)
    stretch = Rng(seed).uniform((2, n, 1), 0.01, 100.0, dtype="float64")
    again = linear_attention(q * stretch[0], k * stretch[1], v, cosine_features, None, is_causal)
    assert_close(again, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_to_see(xp: Any, is_causal: bool) -> None:
    """The only key is the opposite of the query: 0/0 in the formula, 0 here, all gradients finite.

    So for features that vanish, and for keys that all are pads.
    """
    q, v = xp.asarray([[2.0, 0.0]]), xp.asarray([[3.0]])
    none = xp.asarray([False])
    for k, phi, mask in (
        (-3.0 * q, cosine_features, None),
        (q, (relu_features, lambda x: relu_features(-x)), None),
        (q, elu_plus_one, none),
    ):
        leaves = [Tensor(x, requires_grad=True) for x in (q, k, v)]
        y = linear_attention(*leaves, phi, mask, is_causal)
        assert_close(y, np.zeros((1, 1)), atol=0.0)
        for g in mini_nn.grad(y.sum(), leaves):
            assert np.isfinite(host(g)).all()


def test_a_query_without_direction_sees_all_alike(xp: Any) -> None:
    q, k, v = draw(0, 4, 3, 2)
    leaf = Tensor(0.0 * q, requires_grad=True)
    y = linear_attention(leaf, k, v, cosine_features)
    assert_close(y, np.tile(host(v).mean(axis=0), (4, 1)), rtol=1e-10)
    (g,) = mini_nn.grad(y.sum(), leaf)
    assert_close(g, np.zeros((4, 3)))


# The second-order Taylor polynomial


@given(SEEDS, st.integers(1, 40), st.booleans(), st.floats(0.1, 20.0))
def test_taylor_similarity(xp: Any, seed: int, n: int, is_causal: bool, scale: float) -> None:
    """The masked matrix of 1 + s + s²/2; normalisers of at least half the number of keys."""
    q, k, v = draw(seed, n, 3, 2)
    q = q * scale
    s = host(q) @ host(k).T / 3**0.5
    sim = 1 + s + s * s / 2
    sim = np.tril(sim) if is_causal else sim
    wanted = sim @ host(v) / sim.sum(axis=-1, keepdims=True)
    got = linear_attention(q, k, v, taylor_features, is_causal=is_causal)
    assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    _, state = linear_attention(q, k, v, taylor_features, is_causal=True, state=())
    normalizer = host(taylor_features(q)) @ host(state.normalizer)
    assert (normalizer >= n / 2 - 1e-9 * (1 + abs(normalizer))).all()


# Rank


def test_rank(xp: Any) -> None:
    """At most D, where softmax has all; a diagonal restores it, and so does a band."""
    n, d = 200, 8
    q, k, _ = draw(0, n, d, 1)
    rank = np.linalg.matrix_rank
    logits = q @ k.T
    softmax = host(ops.softmax(logits, axis=-1))
    full = host(linear_attention_weights(q, k))
    assert rank(softmax) == n and rank(full) == d
    assert rank(host(linear_attention_weights(q, k, cosine_features))) == d + 1
    assert rank(host(linear_attention_weights(q, k, taylor_features))) == 1 + d + d * (d + 1) // 2
    causal = host(linear_attention_weights(q, k, is_causal=True))
    assert (np.diag(causal) > 0).all() and rank(causal[:50, :50]) == 50
    band = abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 3
    assert rank(full * band) > 10 * d


@given(SEEDS, st.integers(1, 12))
def test_causal_weights_are_invertible(xp: Any, seed: int, n: int) -> None:
    """Triangular with a positive diagonal: the values can be had back from the outputs."""
    q, k, v = draw(seed, n, 3, 2)
    a = host(linear_attention_weights(q, k, is_causal=True))
    assert np.linalg.slogdet(a)[0] == 1.0
    y = host(linear_attention(q, k, v, is_causal=True))
    found = np.linalg.solve(a, y)
    assert_close(found, host(v), rtol=1e-6, atol=1e-8 * np.linalg.cond(a))


# Pads


@given(SEEDS, st.integers(1, 10), st.integers(0, 6), MAP, st.booleans())
def test_pads_change_nothing(
    xp: Any, seed: int, n: int, pads: int, phi: Any, is_causal: bool
) -> None:
    """On either side, whatever stands there; and nothing flows back to them."""
    rng = Rng(seed)
    lead = int(rng.host.integers(0, pads + 1))
    qkv = draw(seed, n + pads, 3, 2, (2,))
    real = xp.arange(n + pads)
    mask = (real >= lead) & (real < lead + n)
    inside = part(qkv, lead, lead + n)
    junk = xp.asarray(np.full((2, n + pads, 2), np.nan))
    leaves = [Tensor(x, requires_grad=True) for x in qkv[:2]]
    v = Tensor(xp.where(mask[:, None], qkv[2], junk), requires_grad=True)
    for given_mask in (mask, xp.broadcast_to(mask, (2, n + pads))):
        y = linear_attention(*leaves, v, phi, given_mask, is_causal)
        got = y[..., lead : lead + n, :]
        wanted = linear_attention(*inside, phi, is_causal=is_causal)
        assert_close(got, host(wanted), rtol=1e-9, atol=1e-10)
        gradients = mini_nn.grad(ops.sum(got), [leaves[1], v])
        outside = ~host(mask)
        assert not any(host(g)[:, outside].any() for g in gradients)
        parallel = linear_attention_parallel(*leaves, qkv[2], phi, given_mask, is_causal)
        assert_close(parallel, host(y), rtol=1e-9, atol=1e-10)
    if is_causal:
        for form in (linear_attention_recurrent, linear_attention_cumulative):
            assert_close(form(*qkv, phi, mask), host(y), rtol=1e-9, atol=1e-10)
    plain = unnormalized_attention(*leaves, v, mask, is_causal)[..., lead : lead + n, :]
    wanted = unnormalized_attention(*inside, is_causal=is_causal)
    assert_close(plain, host(wanted), rtol=1e-9, atol=1e-10)


def test_masking_before_the_map_leaves_pads_in_the_normaliser(xp: Any) -> None:
    """What is planted: values and keys set to 0 at pads, where elu(0) + 1 = 1 still counts."""
    q, k, v = draw(0, 8, 3, 2)
    mask = xp.arange(8) < 4
    wanted = host(linear_attention(q, k[:4], v[:4]))
    planted = host(linear_attention(q, k * mask[:, None], v * mask[:, None]))
    assert abs(planted / wanted - 1).max() > 0.3
    assert_close(linear_attention(q, k, v, key_mask=mask), wanted, rtol=1e-10)


# Numbers


def test_float16_is_summed_in_float32(xp: Any) -> None:
    """4,000 tokens: the sums of float16 end at 65,504, and beyond 2,048 they lose ones."""
    n = 4000
    x = xp.full((n, 2), 5.0, "float16")
    v = xp.asarray(np.linspace(-1.0, 1.0, n)[:, None]).astype("float16")
    q, k, values = (Tensor(a, requires_grad=True) for a in (x, x, v))
    y = linear_attention(q, k, values, is_causal=True)
    assert y.dtype == "float16"
    means = np.cumsum(host(v).astype("float64")) / np.arange(1, n + 1)
    assert_close(host(y).astype("float64")[:, 0], means, rtol=2e-3, atol=1e-3)
    for g in mini_nn.grad(ops.sum(y), [q, k, values]):
        assert g.dtype == "float16" and np.isfinite(host(g)).all()
    _, state = linear_attention(x, x, v, is_causal=True, state=())
    assert state.kv.dtype == state.normalizer.dtype == "float32"
    with np.errstate(over="ignore"):
        planted = np.cumsum(np.full(n, 36.0, "float16"), dtype="float16")
    assert np.isinf(planted[-1])


@given(st.integers(1, 5), st.floats(-40.0, 40.0))
def test_large_numbers(xp: Any, n: int, size: float) -> None:
    """float32: a mean of the values, however small or large all features are."""
    x = xp.full((n, 2), size, "float32")
    v = Rng(n).normal((n, 2))
    for is_causal in (False, True):
        y = linear_attention(x, x, v, is_causal=is_causal)
        assert y.dtype == "float32"
        counts = np.arange(1, n + 1)[:, None] if is_causal else n
        sums = np.cumsum(host(v), axis=0) if is_causal else np.tile(host(v).sum(axis=0), (n, 1))
        assert_close(y, sums / counts, atol=1e-5)
    gone = linear_attention(0.0 * x - 60.0, 0.0 * x - 60.0, v)  # e^-120 is no number of float32
    assert not host(gone).any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_empty_and_single(xp: Any, is_causal: bool) -> None:
    for dtype in ("float32", "float64"):
        q, k, v = xp.zeros((2, 0, 3), dtype), xp.zeros((2, 0, 3), dtype), xp.zeros((2, 0, 4), dtype)
        for form in (linear_attention, linear_attention_parallel, unnormalized_attention):
            y = form(q, k, v, is_causal=is_causal)
            assert y.shape == (2, 0, 4) and y.dtype == dtype
    y, state = linear_attention(q, k, v, is_causal=True, state=())
    assert not host(state.kv).any() and state.kv.shape == (2, 3, 4)
    if not is_causal:  # queries without a key
        y = linear_attention(xp.ones((2, 5, 3)), k, v)
        assert_close(y, np.zeros((2, 5, 4)))
    one = draw(0, 1, 1, 1)
    for form in (linear_attention, linear_attention_parallel):
        assert_close(form(*one, is_causal=is_causal), host(one[2]), rtol=1e-12)


def recurrent_form(*arrays: Any, is_causal: bool, **options: Any) -> Any:
    assert is_causal
    return linear_attention_recurrent(*arrays, **options)


def cumulative_form(*arrays: Any, is_causal: bool, **options: Any) -> Any:
    assert is_causal
    return linear_attention_cumulative(*arrays, **options)


every_form = pytest.mark.parametrize(
    "form",
    [
        linear_attention,
        linear_attention_parallel,
        recurrent_form,
        cumulative_form,
        unnormalized_attention,
    ],
)


@every_form
@pytest.mark.parametrize(
    "leads",
    [
        ((2, 3), (2, 1), (2, 1)),
        ((3,), (), ()),
        ((), (3,), ()),
        ((), (), (3,)),
        ((1, 3), (2, 1), ()),
    ],
)
def test_heads_of_keys_that_several_queries_share(xp: Any, form: Any, leads: Any) -> None:
    """In any form as with all three repeated; gradients come back in the shapes given."""
    arrays = [draw(1, 5, 3, 2, lead)[i] for i, lead in enumerate(leads)]
    common = np.broadcast_shapes(*leads)
    leaves = [Tensor(x, requires_grad=True) for x in arrays]
    y = form(*leaves, is_causal=True)
    repeated = [xp.broadcast_to(x, (*common, *x.shape[-2:])) for x in arrays]
    assert_close(y, host(form(*repeated, is_causal=True)), rtol=1e-10, atol=1e-11)
    for g, x in zip(mini_nn.grad(ops.sum(y), leaves), arrays, strict=True):
        assert g.shape == x.shape


@pytest.mark.parametrize("form", [linear_attention, recurrent_form])
def test_the_state_of_shared_keys(xp: Any, form: Any) -> None:
    """It has the leading axes of query, key and value together."""
    q, k, v = draw(1, 5, 3, 2, (2, 3))
    arrays = (q, k[:, :1], v[:, :1])
    y, last = form(*arrays, is_causal=True, state=())
    first, state = form(*part(arrays, 0, 2), is_causal=True, state=())
    rest, state = form(*part(arrays, 2, None), is_causal=True, state=state)
    assert state.kv.shape == (2, 3, 3, 2) and state.normalizer.shape == (2, 3, 3)
    assert_close(ops.concatenate([first, rest], axis=-2), host(y), rtol=1e-10)
    assert_close(state.kv, host(last.kv), rtol=1e-10)


@every_form
def test_the_dtype_is_that_of_the_arguments(xp: Any, form: Any) -> None:
    """float16 comes back as such; ε as a float64 of NumPy does not widen float32."""
    options = {} if form is unnormalized_attention else {"eps": np.float64(1e-6)}
    for dtype in ("float16", "float32"):
        leaves = [Tensor(x.astype(dtype), requires_grad=True) for x in draw(0, 5, 3, 2)]
        y = form(*leaves, is_causal=True, **options)
        assert y.dtype == dtype
        assert {g.dtype.name for g in mini_nn.grad(ops.sum(y), leaves)} == {dtype}
    half = [x.astype("float16") for x in draw(0, 5, 3, 2)]
    assert unnormalized_attention(*half).dtype == linear_attention(*half).dtype == "float16"


@every_form
def test_keys_and_values_of_pads_may_be_nan(xp: Any, form: Any) -> None:
    q, k, v = draw(0, 6, 3, 2)
    real = xp.arange(6) > 1
    dirty = [xp.where(real[:, None], x, float("nan")) for x in (k, v)]
    leaves = [Tensor(x, requires_grad=True) for x in dirty]
    y = form(q, *leaves, key_mask=real, is_causal=True)
    assert_close(y[2:], host(form(q[2:], k[2:], v[2:], is_causal=True)), rtol=1e-10, atol=1e-11)
    for g in mini_nn.grad(ops.sum(y), leaves):
        assert np.isfinite(host(g)).all() and not host(g)[:2].any()


def test_refusals(xp: Any) -> None:
    q, k, v = draw(0, 4, 3, 2)
    s = xp.zeros((3, 2))
    for use, seen in (
        (lambda: linear_attention(q, k[:, :2], v), "query"),
        (lambda: linear_attention(q, k[:3], v), "query"),
        (lambda: linear_attention(q[:2], k, v, is_causal=True), "2 and 4"),
        (lambda: unnormalized_attention(q[:2], k, v, is_causal=True), "2 and 4"),
        (lambda: linear_attention(q, k, v, state=()), "is_causal=True"),
        (lambda: linear_attention(q, k, v, key_mask=xp.ones(3) > 0), "key_mask"),
        (lambda: linear_attention_recurrent(q, k[:3], v), "query"),
        (lambda: linear_attention(q, k, v, is_causal=True, state=(v, k)), "the state is S"),
        (lambda: linear_attention_recurrent(q, k, v, state=(v, k)), "the state is S"),
        (lambda: unnormalized_attention(q, k, v, is_causal=True, state=(v,)), "the state is"),
        (lambda: linear_attention_cumulative(q[:1], k, v), "1 and 4"),
        (lambda: linear_attention(q, k, v, is_causal=True, state=(s, s[:1, 0])), "the state is S"),
        (lambda: linear_attention_recurrent(q, k, v, state=(s, s[:1, 0])), "the state is S"),
        (lambda: linear_attention(q, xp.stack([k, k]), xp.stack([v] * 3)), "broadcast, got"),
    ):
        with pytest.raises(ValueError, match=seen):
            use()
    with pytest.raises(TypeError, match="booleans"):
        linear_attention(q, k, v, key_mask=xp.ones(4))
    with pytest.raises(TypeError, match="a state is a tuple"):
        linear_attention(q, k, v, is_causal=True, state=s)


# The authors' answers


def test_fast_transformers(xp: Any) -> None:
    """LinearAttention, CausalLinearAttention and RecurrentLinearAttention, with their ε."""
    g = golden("fast.", xp)
    qkv, eps = (g["query"], g["key"], g["value"]), 1e-6
    mask = xp.broadcast_to(g["mask"][:, None], g["key"].shape[:-1])
    close = {"rtol": 1e-10, "atol": 1e-11}
    assert_close(linear_attention(*qkv, eps=eps), g["full"], **close)
    assert_close(linear_attention(*qkv, key_mask=mask, eps=eps), g["padded"], **close)
    y, state = linear_attention(*qkv, is_causal=True, state=(), eps=eps)
    assert_close(y, g["causal"], **close)
    assert_close(
        linear_attention(*qkv, elu_plus_one, mask, True, eps=eps), g["causal_padded"], **close
    )
    steps, end = linear_attention_recurrent(*qkv, state=(), eps=eps)
    assert_close(steps, g["recurrent"], **close)
    assert_close(linear_attention_cumulative(*qkv, eps=eps), g["recurrent"], **close)
    for last in (state, end):
        assert_close(last.kv, g["kv"], **close)
        assert_close(last.normalizer, g["normalizer"], **close)
    assert abs(host(linear_attention(*qkv)) - host(g["full"])).max() > 1e-9  # ε is there


def test_flash_linear_attention(xp: Any) -> None:
    """Without features; they divide queries by √d, which only the unnormalised form shows."""

    def same(x: Any) -> Any:
        return x

    g = golden("fla.", xp)
    qkv = (g["query"], g["key"], g["value"])
    scaled = (0.5 * qkv[0], *qkv[1:])
    plain, last = unnormalized_attention(*scaled, is_causal=True, state=(g["kv"],))
    assert_close(plain, g["plain"], rtol=1e-5, atol=1e-5)
    start = (g["kv"], g["normalizer"])
    y, state = linear_attention(*qkv, same, is_causal=True, state=start)
    assert_close(y, g["normal"], rtol=1e-5, atol=1e-5)
    assert_close(state.kv, g["kv_last"], rtol=1e-5, atol=1e-5)
    assert_close(last.kv, g["kv_last"], rtol=1e-5, atol=1e-5)
    assert_close(state.normalizer, g["normalizer_last"], rtol=1e-5)
    long = (g["long_query"], g["long_key"], g["long_value"])
    assert_close(
        linear_attention(*long, same, is_causal=True), g["long_normal"], rtol=1e-7, atol=1e-8
    )


def test_based(xp: Any) -> None:
    g = golden("based.", xp)
    qkv = (g["query"], g["key"], g["value"])
    y = linear_attention(*qkv, taylor_features, is_causal=True, eps=1e-6)
    assert_close(y, g["parallel"], rtol=1e-10, atol=1e-11)
    assert_close(y, g["chunked"], rtol=1e-10, atol=1e-11)
    features = [taylor_features(x) for x in qkv[:2]]
    plain = unnormalized_attention(*features, qkv[2], is_causal=True)
    assert_close(plain, g["plain"], rtol=1e-10, atol=1e-10)


# In a model


def test_as_the_attention_of_a_gpt(xp: Any) -> None:
    """A cache of keys and values gives what one pass gives, and no logit sees a later token."""
    config = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    rng = Rng(0)
    blocks = [Block(config, rng, attention=linear_attention) for _ in range(config.n_layer)]
    model = GPT(config, rng, blocks)
    ids = xp.asarray([[1, 5, 2, 9, 3, 3, 7, 0]])
    logits = host(model(ids))
    other = xp.concatenate([ids[:, :5], ids[:, 5:] + 1], axis=1)
    assert_close(host(model(other))[:, :5], logits[:, :5], rtol=1e-6, atol=1e-7)
    cached = model.generate([[1, 5, 2]], 6, temperature=0)
    plain = [1, 5, 2]
    for _ in range(6):
        plain.append(int(host(model(xp.asarray([plain])))[0, -1].argmax()))
    assert host(cached)[0].tolist()[-6:] == plain[-6:]
