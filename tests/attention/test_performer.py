"""The Performer: what its estimate is, what keeps it finite, and that nothing of it looks ahead."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mini_nn import Rng, Tensor, backend, grad, ops
from mini_nn.attention.chunked import chunked
from mini_nn.attention.performer import (
    FavorState,
    _running_maximum,
    exponential_attention,
    favor_attention,
    generalized_kernel_attention,
    oprf_attention,
    released_favor_attention,
)
from mini_nn.attention.performer_layer import ExponentialAttention, PerformerAttention
from mini_nn.attention.random_matrix import gaussian_matrix, orthogonal_matrix
from mini_nn.check import check_grads
from mini_nn.io import load_training, save_training
from mini_nn.transforms import checkpoint
from tests.support import assert_close, host

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "attention_performer.safetensors")
INPUTS = ("query", "key", "value")
CAUSAL = {"all": False, "causal": True}

LINEAR = {
    "positive": favor_attention,
    "hyperbolic": partial(favor_attention, feature="hyperbolic"),
    "trigonometric": partial(favor_attention, feature="trigonometric"),
    "oprf": partial(oprf_attention, mean_square=2.0),
    "exponential": exponential_attention,
    "generalized": generalized_kernel_attention,
}
"""Every attention of the file as ``f(query, key, value, projection, is_causal=…, …)``."""

POSITIVE = [name for name in LINEAR if name != "trigonometric"]


def draw(seed: int, *shape: int, scale: float = 1.0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape) * scale


def problem(xp: Any, n: int = 9, d: int = 5, e: int = 3, m: int = 7, scale: float = 1.0) -> Any:
    """Queries, keys, values and a projection in float64, of four different widths."""
    rows = (draw(0, 2, n, d, scale=scale), draw(1, 2, n, d, scale=scale), draw(2, 2, n, e))
    return [xp.asarray(x) for x in (*rows, draw(3, m, d))]


# The definitions, by matrices


def features(name: str, x: Any, w: Any) -> Any:
    """φ(x) as the papers write it, with nothing done against overflow."""
    x = x if name == "exponential" else x * x.shape[-1] ** -0.25
    u, half = x @ w.T, 0.5 * (x * x).sum(-1, keepdims=True)
    if name == "positive":
        return np.exp(u - half)
    if name == "hyperbolic":
        return np.exp(np.concatenate([u, -u], -1) - half)
    if name == "trigonometric":
        return np.concatenate([np.cos(u), np.sin(u)], -1) * np.exp(half)
    if name == "exponential":
        return np.exp(u)
    if name == "generalized":
        return np.maximum(u, 0.0) / math.sqrt(len(w)) + 1e-3
    d, s = x.shape[-1], 2.0
    rho = (math.sqrt((2 * s + d) ** 2 + 8 * d * s) - 2 * s - d) / (4 * s)
    a = (1 - 1 / rho) / 8
    return np.exp(a * (w * w).sum(-1) + math.sqrt(1 - 4 * a) * u - half)


def weights(name: str, query: Any, key: Any, w: Any, is_causal: bool, mask: Any = True) -> Any:
    scores = features(name, query, w) @ features(name, key, w).swapaxes(-1, -2)
    scores = np.where(mask, np.tril(scores) if is_causal else scores, 0.0)
    return scores / scores.sum(-1, keepdims=True)


def softmax_weights(query: Any, key: Any) -> Any:
    e = np.exp(query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1]))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_the_linear_form_is_the_matrix_of_features_times_the_values(
    xp: Any, name: str, is_causal: bool
) -> None:
    query, key, value, w = problem(xp, scale=0.5)
    found = LINEAR[name](query, key, value, w, is_causal=is_causal)
    matrix = weights(name, host(query), host(key), host(w), is_causal)
    assert_close(found, matrix @ host(value), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", POSITIVE)
def test_with_positive_features_a_row_is_a_mean_of_values(
    xp: Any, name: str, is_causal: bool
) -> None:
    query, key, _, w = problem(xp, scale=3.0)
    unit = xp.broadcast_to(xp.eye(9), (2, 9, 9))
    matrix = host(LINEAR[name](query, key, unit, w, is_causal=is_causal))
    assert (matrix >= 0).all()
    assert_close(matrix.sum(-1), 1.0, rtol=1e-12)


def test_trigonometric_weights_may_be_negative(xp: Any) -> None:
    query, key, _, w = problem(xp, scale=3.0)
    unit = xp.broadcast_to(xp.eye(9), (2, 9, 9))
    assert host(favor_attention(query, key, unit, w, "trigonometric")).min() < -0.1


def test_the_error_falls_as_one_over_the_root_of_the_number_of_features(xp: Any) -> None:
    """40 fixed draws for each m; rows of norm 1, where every moment of the estimate is small."""
    query, key, value = draw(0, 12, 4), draw(1, 12, 4), draw(2, 12, 3)
    query /= np.linalg.norm(query, axis=-1, keepdims=True)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    exact = softmax_weights(query, key) @ value
    arrays = [xp.asarray(x) for x in (query, key, value)]
    rng, counts = Rng(0), [16, 64, 256, 1024]
    for law in (gaussian_matrix, orthogonal_matrix):
        errors = []
        for m in counts:
            draws = [law(m, 4, rng, dtype="float64") for _ in range(40)]
            gaps = [np.abs(host(favor_attention(*arrays, w)) - exact).max() for w in draws]
            errors.append(np.mean(gaps))
        slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert -0.6 < slope < -0.4, errors


# The authors' numbers


@pytest.mark.parametrize("form", CAUSAL)
def test_without_epsilon_it_is_the_released_attention_with_its_gradients(
    xp: Any, form: str
) -> None:
    leaves = [Tensor(xp.asarray(GOLDEN[name]), requires_grad=True) for name in INPUTS]
    w = xp.asarray(GOLDEN["projection"])
    out = favor_attention(*leaves, w, is_causal=CAUSAL[form])
    assert_close(out, GOLDEN[f"{form}.0.0"], rtol=1e-10, atol=1e-12)
    wave = xp.asarray(np.cos(0.7 * np.arange(out.size) + 0.3).reshape(out.shape))
    for name, g in zip(INPUTS, grad(out, leaves, wave), strict=True):
        assert_close(g, GOLDEN[f"grad.{form}.{name}"], rtol=1e-9, atol=1e-11)


def test_the_released_stabiliser_and_its_epsilon(xp: Any) -> None:
    query, key, value, w = (xp.asarray(GOLDEN[name]) for name in (*INPUTS, "projection"))
    for eps in (0.0, 1e-4):
        found = released_favor_attention(query, key, value, w, eps)
        assert_close(found, GOLDEN[f"all.{eps}"], rtol=1e-10, atol=1e-12)
    far = xp.asarray(np.concatenate([GOLDEN["key"][:, :, :-1], 4 * GOLDEN["key"][:, :, -1:]], 2))
    found = released_favor_attention(query, far, value, w)
    assert_close(found, GOLDEN["moved.all"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", CAUSAL)
def test_generalised_attention_is_the_released_one(xp: Any, form: str) -> None:
    """Theirs leaves out 1/√m, so its ε is √m times as small as ours would be."""
    query, key, value, w = (xp.asarray(GOLDEN[name]) for name in (*INPUTS, "projection"))
    eps = 1e-3 / math.sqrt(7)
    found = generalized_kernel_attention(query, key, value, w, eps=eps, is_causal=CAUSAL[form])
    assert_close(found, GOLDEN[f"relu.{form}"], rtol=1e-10, atol=1e-12)
    found = generalized_kernel_attention(query, key, value)
    assert_close(found, GOLDEN["relu.none"], rtol=1e-10, atol=1e-12)


# Nothing looks ahead


def leaking(query: Any, key: Any, value: Any, w: Any, eps: float = 1e-4) -> Any:
    """The released recipe made causal as in the released code: one maximum of all keys, and ε."""
    query, key = (x * x.shape[-1] ** -0.25 for x in (query, key))
    uq, uk = query @ w.T, key @ w.T
    fq = np.exp(uq - 0.5 * (query * query).sum(-1, keepdims=True) - uq.max(-1, keepdims=True))
    fk = np.exp(uk - 0.5 * (key * key).sum(-1, keepdims=True) - uk.max((-1, -2), keepdims=True))
    scores = np.tril((fq + eps) @ (fk + eps).swapaxes(-1, -2))
    return scores / scores.sum(-1, keepdims=True) @ value


def test_the_planted_leak_is_the_released_code() -> None:
    arrays = [GOLDEN[name] for name in (*INPUTS, "projection")]
    assert_close(leaking(*arrays), GOLDEN["causal.0.0001"], rtol=1e-10, atol=1e-12)


def test_scaling_the_last_key_moves_no_earlier_output(xp: Any) -> None:
    """Not by a bit; the released recipe is moved by 0.84, with values of variance 1."""
    query, key, value, w = problem(xp, n=12, d=16, m=64)
    far = xp.asarray(np.concatenate([host(key)[:, :-1], 4.0 * host(key)[:, -1:]], axis=1))
    for attend in LINEAR.values():
        before, after = (
            host(attend(query, k, value, w, is_causal=True))[:, :-1] for k in (key, far)
        )
        assert_close(after, before, rtol=0.0, atol=0.0)
    before, after = (leaking(*map(host, (query, k, value, w)))[:, :-1] for k in (key, far))
    assert np.abs(after - before).max() > 0.8
    moved = GOLDEN["moved.causal"] - GOLDEN["causal.0.0001"]
    assert np.abs(moved[:, :, :-1]).max() > 0.01


@pytest.mark.parametrize("name", LINEAR)
def test_no_gradient_comes_from_what_is_later(xp: Any, name: str) -> None:
    leaves = [Tensor(x, requires_grad=True) for x in problem(xp, n=70, scale=2.0)[:3]]
    out = LINEAR[name](*leaves, problem(xp)[3], is_causal=True)
    for i in (0, 5, 63, 64):
        for g in grad(out[:, i].sum(), leaves, retain_graph=True):
            assert not host(g)[:, i + 1 :].any()
        assert host(g)[:, : i + 1].all()


def test_a_mean_square_of_the_batch_would_leak(xp: Any) -> None:
    query, key, value, w = problem(xp)
    with pytest.raises(ValueError, match="leak"):
        oprf_attention(query, key, value, w, is_causal=True)
    with pytest.raises(ValueError, match="whole sequence"):
        released_favor_attention(query, key, value, w, is_causal=True)
    outputs = []
    for last in (1.0, 4.0):  # what would happen
        k = np.concatenate([host(key)[:, :-1], last * host(key)[:, -1:]], axis=1)
        z = (host(query)[:, :, None] + k[:, None]) / 5**0.25
        s = (z * z).sum(-1).mean(axis=(1, 2))
        s = xp.asarray(s[:, None, None])
        outputs.append(oprf_attention(query, xp.asarray(k), value, w, s, is_causal=True))
    assert np.abs(host(outputs[0] - outputs[1])[:, :-1]).max() > 1e-3


# One pass, pieces, tokens


@pytest.mark.parametrize("name", LINEAR)
@given(cuts=st.lists(st.integers(0, 131), max_size=3))
def test_a_sequence_may_be_cut_anywhere(xp: Any, name: str, cuts: list[int]) -> None:
    query, key, value, w = problem(xp, n=131, scale=1.5)
    attend = LINEAR[name]
    whole = attend(query, key, value, w, is_causal=True)
    parts, state, places = [], (), [0, *sorted(cuts), 131]
    for start, stop in itertools.pairwise(places):
        piece = [x[:, start:stop] for x in (query, key, value)]
        part, state = attend(*piece, w, is_causal=True, state=state)
        parts.append(host(part))
    assert_close(np.concatenate(parts, axis=1), whole, rtol=1e-9, atol=1e-11)
    assert isinstance(state, FavorState) and state.memory.shape[-1] == 4


def test_token_by_token_is_the_same(xp: Any) -> None:
    query, key, value, w = problem(xp, n=20, scale=2.0)
    whole, state = host(favor_attention(query, key, value, w, is_causal=True)), ()
    for t in range(20):
        token = [x[:, t : t + 1] for x in (query, key, value)]
        y, state = favor_attention(*token, w, is_causal=True, state=state)
        assert_close(y, whole[:, t : t + 1], rtol=1e-10, atol=1e-12)
        # the same for one query that looks at all keys so far, as with a cache of keys
        y = favor_attention(token[0], key[:, : t + 1], value[:, : t + 1], w)
        assert_close(y, whole[:, t : t + 1], rtol=1e-10, atol=1e-12)


def test_gradients_flow_through_a_state(xp: Any) -> None:
    arrays = problem(xp, n=8)
    leaves = [Tensor(x, requires_grad=True) for x in arrays[:3]]
    first, state = favor_attention(*[x[:, :5] for x in leaves], arrays[3], is_causal=True, state=())
    rest, _ = favor_attention(*[x[:, 5:] for x in leaves], arrays[3], is_causal=True, state=state)
    cut = grad((first * first).sum() + (rest * rest).sum(), leaves)
    out = favor_attention(*leaves, arrays[3], is_causal=True)
    for one, other in zip(cut, grad((out * out).sum(), leaves), strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LINEAR)
def test_one_head_of_keys_serves_several_of_queries(xp: Any, name: str) -> None:
    query, key, value, w = problem(xp)
    one, same = (key[:1], value[:1]), [xp.concatenate([x[:1]] * 2) for x in (key, value)]
    real = xp.asarray(np.arange(9) != 2)
    for options in ({}, {"is_causal": True}, {"is_causal": True, "key_mask": real}):
        found, want = (LINEAR[name](query, *kv, w, **options) for kv in (one, same))
        assert_close(found, want, rtol=1e-12)
    first, state = (x[:, :4] for x in (query, *one)), ()
    head, state = LINEAR[name](*first, w, is_causal=True, state=state)
    rest = (x[:, 4:] for x in (query, *one))
    tail, _ = LINEAR[name](*rest, w, is_causal=True, state=state)
    want = LINEAR[name](query, *same, w, is_causal=True)
    assert_close(np.concatenate([host(head), host(tail)], axis=1), want, rtol=1e-11)


def test_the_running_maximum_is_that_of_a_loop(xp: Any) -> None:
    """CuPy has no maximum.accumulate."""
    for n in (0, 1, 2, 3, 7, 64, 100):
        x = draw(n, 3, n)
        x[0, : n // 2] = float("-inf")
        want = np.maximum.accumulate(x, axis=-1)
        assert_close(_running_maximum(xp.asarray(x)), want, rtol=0, atol=0)


# What divides out


def test_a_factor_of_each_query_divides_out_and_one_of_each_key_does_not() -> None:
    query, key, w = draw(0, 9, 5), draw(1, 9, 5), draw(3, 7, 5)
    fq, fk = features("positive", query, w), features("positive", key, w)

    def attention(fq: Any, fk: Any) -> Any:
        return fq @ fk.T / (fq @ fk.T).sum(-1, keepdims=True)

    plain = attention(fq, fk)
    half = 0.5 * (query * query).sum(-1, keepdims=True) / math.sqrt(5)
    of_queries = np.exp(draw(4, 9, 1, scale=3.0))
    for factor in (np.exp(half), of_queries):
        assert_close(attention(factor * fq, fk), plain, rtol=1e-12)
    key_half = np.exp(0.5 * (key * key).sum(-1, keepdims=True) / math.sqrt(5))
    assert np.abs(attention(fq, key_half * fk) - plain).max() > 0.05
    own_maximum = attention(fq, fk / fk.max(-1, keepdims=True))  # of each key: wrong
    assert np.abs(own_maximum - plain).max() > 0.05
    equal = key / np.linalg.norm(key, axis=-1, keepdims=True)
    fk = features("positive", equal, w)
    assert_close(attention(fq, math.exp(0.5 / math.sqrt(5)) * fk), attention(fq, fk), rtol=1e-12)


def test_exponential_attention_of_keys_of_one_length_is_favor(xp: Any) -> None:
    """Without the factor e^(−‖k‖²/2) there is a difference only if that differs among the keys."""
    query, key, value, w = problem(xp)
    scaled = w * 5**-0.25
    equal = key / xp.sqrt((key * key).sum(axis=-1, keepdims=True))
    found = exponential_attention(query, equal, value, scaled)
    assert_close(found, favor_attention(query, equal, value, w), rtol=1e-10, atol=1e-12)
    other = exponential_attention(query, key, value, scaled) - favor_attention(query, key, value, w)
    assert np.abs(host(other)).max() > 0.01


def test_with_epsilon_nothing_divides_out(xp: Any) -> None:
    """The error of a row in L1, at inputs of one, two and four times the size."""
    query, key, _, w = problem(xp, n=12, d=16, m=64)
    unit = xp.broadcast_to(xp.eye(12), (2, 12, 12))
    errors = []
    for scale in (1.0, 2.0, 4.0):
        ours = favor_attention(scale * query, scale * key, unit, w)
        theirs = released_favor_attention(scale * query, scale * key, unit, w)
        errors.append(np.abs(host(ours - theirs)).sum(-1).max())
        exact = released_favor_attention(scale * query, scale * key, unit, w, eps=0.0)
        assert_close(ours, exact, rtol=1e-7, atol=1e-9)
    assert errors[0] > 0.02 and errors[1] > 0.5 and errors[2] > 1.0


# The backward pass


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_gradients(xp: Any, name: str, is_causal: bool) -> None:
    query, key, value, w = problem(xp, n=4, d=2, e=2, m=3)
    attend = partial(LINEAR[name], is_causal=is_causal)
    if name == "generalized":  # ReLU has kinks
        attend = partial(attend, f=ops.sigmoid)
    check_grads(lambda q, k, v: attend(q, k, v, w), query[0], key[0], value[0], rtol=1e-4)


def test_a_trained_projection_gets_a_gradient(xp: Any) -> None:
    query, key, value, w = problem(xp, n=4, d=2, e=2, m=3)
    for is_causal in (False, True):
        check_grads(
            lambda w, c=is_causal: exponential_attention(query, key, value, w, c), w,
            order=1, dtypes=("float64",),
        )  # fmt: skip


def test_the_backward_pass_is_that_of_the_matrix(xp: Any) -> None:
    """Against plain operations on n × n numbers, over more than one chunk."""
    arrays = problem(xp, n=150, scale=0.7)

    def matrix(q: Any, k: Any, v: Any) -> Any:
        q, k = q * 5**-0.25, k * 5**-0.25
        half = 0.5 * ops.sum(k * k, axis=-1, keepdims=True)
        w = xp.swapaxes(arrays[3], 0, 1)
        scores = ops.matmul(ops.exp(ops.matmul(q, w)), ops.exp(ops.matmul(k, w) - half).mT)
        scores = ops.tril(scores)
        return ops.matmul(scores, v) / ops.sum(scores, axis=-1, keepdims=True)

    found = []
    for f in (matrix, lambda *x: favor_attention(*x, arrays[3], is_causal=True)):
        leaves = [Tensor(x, requires_grad=True) for x in arrays[:3]]
        out = f(*leaves)
        found.append([out, *grad((out * out).sum(), leaves)])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-10)


def rewound(q: Any, k: Any, v: Any, g: Any) -> Any:
    """Q̄ of Σ g · Sᵀq with S gone back to by subtraction, which needs no memory for it."""
    s, found = np.zeros((k.shape[1], v.shape[1]), k.dtype), np.empty_like(q)
    for t in range(len(k)):
        s = s + k[t][:, None] * v[t]
    for t in reversed(range(len(k))):
        found[t] = s @ g[t]
        s = s - k[t][:, None] * v[t]
    return found


def test_sums_that_are_gone_back_to_by_subtraction_drift() -> None:
    """10,000 tokens in float32, with features that grow over six orders of magnitude, or do not."""
    n, worst = 10_000, {}
    q, v, g = (draw(i, n, w).astype("float32") for i, w in enumerate((4, 3, 3)))
    for growth in (0.0, 6.0):
        k = np.abs(draw(3, n, 4)) * 10 ** (growth * (np.arange(n) / n - 1.0))[:, None]
        k = k.astype("float32")
        states = np.cumsum(k[:, :, None].astype("float64") * v[:, None], axis=0)
        exact = np.einsum("tde,te->td", states, g)
        leaf = Tensor(q, requires_grad=True)
        (ours,) = grad(chunked(leaf, k, v)[0], leaf, g)
        sizes = np.abs(states).max(axis=(1, 2), keepdims=True)[..., 0]
        worst[growth] = [
            float((np.abs(found - exact) / sizes).max())
            for found in (host(ours), rewound(q, k, v, g))
        ]
    assert worst[0.0][0] < 1e-4 and worst[6.0][0] < 1e-4
    assert worst[6.0][1] > 1.0  # the early sums are lost in the rounding of the late ones
    assert worst[0.0][1] > 10.0 * worst[0.0][0]


# Edges


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_pads_change_nothing(xp: Any, name: str, is_causal: bool) -> None:
    query, key, value, w = (host(x) for x in problem(xp))
    real = np.array([[0, 1, 0, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 0, 1, 1, 1, 0]], bool)
    found = []
    for noise in (0.0, 30.0, math.nan):
        k, v = (x + np.where(real, 0.0, noise)[..., None] for x in (key, value))
        arrays = [xp.asarray(x) for x in (query, k, v, w)]
        mask = xp.asarray(real)
        found.append(host(LINEAR[name](*arrays, is_causal=is_causal, key_mask=mask)))
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    assert_close(found[0], found[2], rtol=1e-12, atol=1e-14)
    if is_causal:
        assert not found[0][0, 0].any()  # a row without a key
    for b, row in enumerate(real):  # and what is left is attention to the real tokens alone
        rows = np.flatnonzero(row)
        alone = [xp.asarray(x[b, rows]) for x in (query, key, value)]
        want = LINEAR[name](*alone, xp.asarray(w), is_causal=is_causal)
        assert_close(found[0][b, rows], want, rtol=1e-9, atol=1e-11)


def test_pads_at_the_start_come_before_the_first_state(xp: Any) -> None:
    query, key, value, w = problem(xp)
    none = xp.zeros((2, 9), "bool")
    nothing, state = favor_attention(query, key, value, w, is_causal=True, state=(), key_mask=none)
    assert not host(nothing).any()
    assert not host(favor_attention(query, key, value, w, key_mask=none)).any()
    found, _ = favor_attention(query, key, value, w, is_causal=True, state=state)
    assert_close(found, favor_attention(query, key, value, w, is_causal=True), rtol=1e-12)


@pytest.mark.parametrize("attend", [*LINEAR.values(), oprf_attention, released_favor_attention])
def test_without_a_key_there_is_nothing(xp: Any, attend: Any) -> None:
    query, key, value, w = problem(xp)
    assert not host(attend(query, key, value, w, key_mask=xp.zeros((2, 9), "bool"))).any()
    if attend is not released_favor_attention:
        assert not host(attend(query, key[:, :0], value[:, :0], w)).any()


def test_pads_change_nothing_in_the_released_form(xp: Any) -> None:
    """Nor is the maximum of keys one of a pad, not even where it is far below 0."""
    query, key, value, w = (host(x) for x in problem(xp))
    real = np.arange(9) != 4
    for keys, rows in ((key, w), (-np.abs(key), np.ones((1, 5))), (key - 999.0, np.ones((1, 5)))):
        short = [xp.asarray(x) for x in (query, keys[:, real], value[:, real], rows)]
        want = released_favor_attention(*short)
        for pad in (-50.0, 50.0, math.nan):
            k, v = (np.where(real[:, None], x, pad) for x in (keys, value))
            arrays = [xp.asarray(x) for x in (query, k, v, rows)]
            found = released_favor_attention(*arrays, key_mask=xp.asarray(real))
            assert_close(found, want, rtol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_nan_stays_nan(xp: Any, name: str, is_causal: bool) -> None:
    """Every row that sees a nan is one: a row of zeros would say that there is no key."""
    for place, scale in itertools.product((1, 2), (1.0, 60.0)):
        arrays = problem(xp, scale=scale)
        arrays[place][:, 3] = math.nan
        found = host(LINEAR[name](*arrays, is_causal=is_causal))
        assert np.isnan(found[:, 3 if is_causal else 0 :]).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_float16_is_summed_in_float32(xp: Any, name: str, is_causal: bool) -> None:
    """The result is that of the same numbers in float32; the values here add up to 108,000."""
    arrays = [x.astype("float16") for x in problem(xp, n=2000)[:3]]
    arrays[2] = arrays[2] * 0 + xp.asarray(np.array([54.0, 0.125, -1.0]), dtype="float16")
    arrays[2][:, ::3] *= 0.5
    w = problem(xp)[3]
    found = LINEAR[name](*arrays, w, is_causal=is_causal)
    want = LINEAR[name](*[x.astype("float32") for x in arrays], w, is_causal=is_causal)
    assert found.dtype == "float16" and want.dtype == "float32"
    assert_close(host(found), host(want).astype("float16"), rtol=2e-3, atol=1e-4)
    if is_causal:
        half = [x[:, :5] for x in arrays]
        _, state = LINEAR[name](*half, w, is_causal=True, state=())
        assert state.memory.dtype == state.maximum.dtype == "float32"


def test_the_released_form_in_float16(xp: Any) -> None:
    arrays = [x.astype("float16") for x in problem(xp)[:3]]
    w = problem(xp)[3]
    found = released_favor_attention(*arrays, w)
    want = released_favor_attention(*[x.astype("float32") for x in arrays], w)
    assert found.dtype == "float16"
    assert_close(found, host(want).astype("float16"), rtol=2e-3, atol=1e-4)


def test_numbers_of_numpy_do_not_widen(xp: Any) -> None:
    arrays, number = [x.astype("float32") for x in problem(xp)], np.float64(0.5)
    assert oprf_attention(*arrays, mean_square=number).dtype == "float32"
    assert generalized_kernel_attention(*arrays, eps=number).dtype == "float32"
    assert released_favor_attention(*arrays, eps=number).dtype == "float32"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", POSITIVE)
def test_rows_of_norm_50_are_finite(xp: Any, name: str, dtype: str, is_causal: bool) -> None:
    arrays = [x.astype(dtype) for x in problem(xp, n=30, d=16, m=64)]
    query, key = (50.0 * x / xp.sqrt((x * x).sum(axis=-1, keepdims=True)) for x in arrays[:2])
    leaves = [Tensor(x, requires_grad=True) for x in (query, key, arrays[2])]
    out = LINEAR[name](*leaves, arrays[3], is_causal=is_causal)
    assert out.dtype == dtype
    for x in (out, *grad((out * out).sum(), leaves)):
        assert x.dtype == dtype and np.isfinite(host(x)).all()


def test_trigonometric_features_do_not_overflow_either(xp: Any) -> None:
    """e^(‖k‖²/2) is e^312 for each key here: in float32 beyond everything, and it divides out."""
    arrays = [x.astype("float32") for x in problem(xp, d=4)]
    key = 50.0 * arrays[1] / xp.sqrt((arrays[1] * arrays[1]).sum(axis=-1, keepdims=True))
    for is_causal in (False, True):
        found = favor_attention(arrays[0], key, *arrays[2:], "trigonometric", is_causal)
        u = host(arrays[0]).astype("f8") * 4**-0.25, host(key).astype("f8") * 4**-0.25
        waves = [x @ host(arrays[3]).T.astype("f8") for x in u]
        scores = np.cos(waves[0][:, :, None] - waves[1][:, None]).sum(-1)
        scores = np.tril(scores) if is_causal else scores
        total = scores.sum(-1, keepdims=True)
        want = scores @ host(arrays[2]) / total
        assert_close(host(found) * total, want * total, rtol=1e-3, atol=2e-3)


def test_where_a_normaliser_underflows(xp: Any) -> None:
    """Opposite features: the causal row is 0 with gradient 0, the other form loses nothing."""
    w = xp.asarray(np.array([[1.0], [-1.0]]))
    query = xp.asarray(np.array([[0.0], [900.0]]))
    key = xp.asarray(np.array([[-900.0], [-900.0]]))
    value = xp.asarray(np.array([[1.0], [3.0]]))
    leaves = [Tensor(x, requires_grad=True) for x in (query, key, value)]
    out = favor_attention(*leaves, w, is_causal=True)
    assert_close(out, [[1.0], [0.0]], rtol=1e-12)
    for g in grad(out[1].sum(), leaves):
        assert not host(g).any()
    assert_close(favor_attention(*leaves, w), [[2.0], [2.0]], rtol=1e-12)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 8.3e-25), ("float64", 4.6e-277)])
def test_the_smallest_normaliser_that_is_divided_by(xp: Any, dtype: str, least: float) -> None:
    """The features of the query are (1, e^−h), those of the key (e^−h, 1): the sum is 2 e^−h."""
    value = xp.asarray(np.array([[3.0, -1.0]]), dtype=dtype)
    for factor in (2.0, 0.5):
        h = -math.log(factor * least / 2.0)
        query, key = (xp.asarray(np.array([x]), dtype=dtype) for x in ((0.0, -h), (-h, 0.0)))
        found = exponential_attention(query, key, value, is_causal=True)
        assert_close(found, value if factor > 1.0 else 0.0 * value, rtol=1e-5)


def test_small_cases(xp: Any) -> None:
    query, key, value, w = problem(xp, d=5)
    for name, attend in LINEAR.items():
        for is_causal in (False, True):
            one = attend(query[:, :1], key[:, :1], value[:, :1], w, is_causal=is_causal)
            assert_close(one, value[:, :1], rtol=1e-9), name
    zero = xp.zeros_like(query)
    mean = host(value).mean(axis=1, keepdims=True).repeat(9, axis=1)
    for arrays in ((zero, zero), (query, zero)):  # all keys alike: the mean of values
        assert_close(favor_attention(*arrays, value, w), mean, rtol=1e-12)
    single = orthogonal_matrix(1, 1, Rng(0), dtype="float64")
    assert favor_attention(query[..., :1], key[..., :1], value, single).shape == (2, 9, 3)
    # one feature: no query matters
    rows = host(favor_attention(query, key, value, w[:1]))
    assert_close(rows, rows[:, :1].repeat(9, axis=1), rtol=1e-12)
    none = [x[:, :0] for x in (query, key, value)]
    assert favor_attention(*none, w).shape == (2, 0, 3)
    empty, state = favor_attention(*none, w, is_causal=True, state=())
    assert empty.shape == (2, 0, 3)
    found, _ = favor_attention(query, key, value, w, is_causal=True, state=state)
    assert_close(found, favor_attention(query, key, value, w, is_causal=True), rtol=1e-12)
    assert not host(favor_attention(query, none[1], none[2], w)).any()


def test_relu_without_epsilon_may_see_nothing(xp: Any) -> None:
    """All features of the first query vanish: 0/0 in the released code, 0 here."""
    query = xp.asarray(np.array([[-1.0, -2.0], [1.0, 0.5]]))
    key = xp.asarray(np.array([[1.0, 0.0], [0.5, 1.0]]))
    for is_causal in (False, True):
        found = host(generalized_kernel_attention(query, key, key, eps=0.0, is_causal=is_causal))
        assert not found[0].any() and found[1].all()


def test_generalised_attention_with_known_functions(xp: Any) -> None:
    """f = exp is the exponential map; f = identity weighs by q·k itself."""
    query, key, value, w = problem(xp)
    found = generalized_kernel_attention(query, key, value, w, ops.exp, eps=0.0)
    assert_close(found, exponential_attention(query, key, value, w * 5**-0.25), rtol=1e-10)
    query, key = xp.abs(query), xp.abs(key)
    found = generalized_kernel_attention(query, key, value, f=lambda x: x, eps=0.0)
    scores = host(query) @ host(key).swapaxes(-1, -2)
    want = scores / scores.sum(-1, keepdims=True) @ host(value)
    assert_close(found, want, rtol=1e-10)


# What linear attention can and cannot do


def test_rank(xp: Any) -> None:
    """At most the number of features, softmax and the causal form have all of it."""
    n, m = 24, 6
    query, key, _, w = problem(xp, n=n, m=m)
    unit = xp.broadcast_to(xp.eye(n), (2, n, n))

    def rank(matrix: Any) -> int:
        return int(np.linalg.matrix_rank(matrix, tol=1e-10))

    both = host(favor_attention(query, key, unit, w))[0]
    assert rank(both) == m
    assert rank(host(favor_attention(query, key, unit, w, "hyperbolic"))[0]) == 2 * m
    assert rank(host(favor_attention(query, key, unit, w, is_causal=True))[0]) == n
    assert rank(softmax_weights(host(query), host(key))[0]) > 2 * m
    places = np.arange(n)
    band = both * (np.abs(places[:, None] - places) <= 2)  # a band of it has a higher rank
    assert rank(band) > m


def test_rows_of_linear_attention_are_flatter_than_softmax(xp: Any) -> None:
    """ln n − entropy of ReLU features, against softmax on the same logits, at two lengths."""
    for n in (32, 512):
        query, key, _, _ = problem(xp, n=n, d=8, scale=1.5)
        unit = xp.broadcast_to(xp.eye(n), (2, n, n))
        missing = []
        for p in (
            host(generalized_kernel_attention(query, key, unit)),
            softmax_weights(host(query), host(key)),
        ):
            missing.append(math.log(n) + (p * np.log(np.maximum(p, 1e-300))).sum(-1).mean())
        assert missing[0] < 0.5 * missing[1]


# FAVOR++


def test_oprf_at_zero_is_favor(xp: Any) -> None:
    query, key, value, w = problem(xp)
    for is_causal in (False, True):
        found = oprf_attention(query, key, value, w, 0.0, is_causal)
        want = favor_attention(query, key, value, w, is_causal=is_causal)
        assert_close(found, want, rtol=1e-10)


def test_the_mean_square_is_that_of_all_pairs(xp: Any) -> None:
    query, key, value, w = problem(xp)
    z = (host(query)[:, :, None] + host(key)[:, None]) / 5**0.25
    s = xp.asarray((z * z).sum(-1).mean(axis=(1, 2))[:, None, None])
    assert_close(
        oprf_attention(query, key, value, w), oprf_attention(query, key, value, w, s), rtol=1e-10
    )
    real = xp.asarray(np.arange(9) < 6)
    found = oprf_attention(query, key, value, w, key_mask=real)
    z = z[:, :, :6]
    s = xp.asarray((z * z).sum(-1).mean(axis=(1, 2))[:, None, None])
    want = oprf_attention(query, key[:, :6], value[:, :6], w, s)
    assert_close(found, want, rtol=1e-10)


def test_oprf_has_the_smaller_error(xp: Any) -> None:
    """The mean over 200 fixed draws of the squared error of the output, at logits of sd 1."""
    query, key, value, _ = problem(xp, n=16, d=8)
    exact = softmax_weights(host(query), host(key)) @ host(value)
    rng, squares = Rng(0), np.zeros(2)
    for _ in range(200):
        w = gaussian_matrix(16, 8, rng, dtype="float64")
        for i, f in enumerate((favor_attention, oprf_attention)):
            squares[i] += np.square(host(f(query, key, value, w)) - exact).mean()
    assert squares[1] < squares[0]


# The layer


def layer(**options: Any) -> PerformerAttention:
    return PerformerAttention(5, 7, rng=Rng(3), **options).astype("float64")


def test_evaluation_repeats_itself_and_training_draws_by_calls(xp: Any) -> None:
    arrays = problem(xp)[:3]
    attend = layer(redraw_interval=3)
    first = attend.eval()(*arrays)
    for _ in range(7):
        assert_close(attend(*arrays), first, rtol=0, atol=0)
    attend.train()
    outputs = [host(attend(*arrays)) for _ in range(7)]
    changed = [bool((a != b).any()) for a, b in itertools.pairwise(outputs)]
    assert changed == [False, False, True, False, False, True]
    assert_close(outputs[0], first, rtol=0, atol=0)
    last = attend.eval()(*arrays)
    assert_close(last, outputs[-1], rtol=0, atol=0)
    again = layer(redraw_interval=3)  # a seed is a sequence of projections
    for want in outputs:
        assert_close(again(*arrays), want, rtol=0, atol=0)
    never = layer()
    assert not any((host(never(*arrays)) != host(first)).any() for _ in range(9))


def test_the_projection_is_saved_and_gets_no_gradient(xp: Any) -> None:
    arrays = [Tensor(x, requires_grad=True) for x in problem(xp)[:3]]
    attend = layer()
    assert [*attend.state_dict()] == ["projection"] and not [*attend.parameters()]
    other = PerformerAttention(5, 7, rng=Rng(4)).astype("float64")
    other.load_state_dict(attend.state_dict())
    assert_close(other(*arrays), attend(*arrays), rtol=0, atol=0)
    old = attend.projection
    attend.redraw()
    assert attend.projection.shape == old.shape and attend.projection.dtype == old.dtype
    assert (host(attend.projection) != host(old)).all()
    kept = host(attend.projection).copy()
    twin = copy.deepcopy(attend)
    attend.redraw()
    assert_close(twin.projection, kept, rtol=0, atol=0)
    twin.redraw()
    assert_close(twin.projection, attend.projection, rtol=0, atol=0)


def test_laws_and_kinds_of_features(xp: Any) -> None:
    arrays = problem(xp)[:3]
    gaussian = layer(law=gaussian_matrix)
    rows = host(layer().projection)[:5]
    off = (rows @ rows.T)[~np.eye(5, dtype=bool)]
    assert np.abs(off).max() < 1e-5 < np.abs(host(gaussian.projection)[:5]).min()
    kinds = [
        favor_attention,
        generalized_kernel_attention,
        partial(oprf_attention, mean_square=1.0),
    ]
    found = [host(layer(attention=kind)(*arrays, is_causal=True)) for kind in kinds]
    for i, kind in enumerate(kinds):
        assert_close(found[i], kind(*arrays, layer().projection, is_causal=True), rtol=1e-12)


def test_it_is_drawn_anew_by_the_same_law(xp: Any) -> None:
    drawn = []

    def law(m: int, d: int, rng: Rng, dtype: Any = "float32") -> Any:
        drawn.append(rng.normal((m, d), dtype=dtype))
        return drawn[-1]

    attend = layer(law=law)
    attend.redraw()
    assert len(drawn) == 2 and attend.projection is drawn[1]
    assert attend.projection.dtype == "float64"


def test_the_released_form_in_the_layer(xp: Any) -> None:
    """It takes what the layer hands on, but for a state and causality, which it refuses."""
    query, key, value, _ = problem(xp)
    attend, real = layer(attention=released_favor_attention), xp.asarray(np.arange(9) < 6)
    want = released_favor_attention(query, key[:, :6], value[:, :6], attend.projection)
    assert_close(attend(query, key, value, key_mask=real), want, rtol=1e-12)
    for options in ({"is_causal": True}, {"is_causal": True, "state": ()}):
        with pytest.raises(ValueError, match="use favor_attention"):
            attend(query, key, value, **options)


@pytest.mark.parametrize("interval", [1, 2])
def test_a_checkpointed_block_meets_its_own_projection(xp: Any, interval: int) -> None:
    """Four blocks run, with draws between them, and run again backwards; nothing counts twice."""
    arrays = problem(xp)[:3]
    results = []
    for wrap in (lambda f, *x: f(*x), checkpoint):
        attend = layer(redraw_interval=interval)
        leaves = [Tensor(x, requires_grad=True) for x in arrays]
        loss = sum((wrap(attend, *leaves) * (i + 1.0)).sum() for i in range(4))
        results.append([loss, *grad(loss, leaves), attend.projection, attend(*arrays)])
        assert attend.draws.calls == 5
    for one, other in zip(*results, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_loaded_projection_survives_a_replay(xp: Any) -> None:
    """It was drawn by nobody here, so going back must not draw it."""
    arrays = problem(xp)
    attend = layer(redraw_interval=1)
    attend.load_state_dict({"projection": 0.5 * arrays[3]})
    leaf = Tensor(arrays[0], requires_grad=True)
    out = checkpoint(lambda x: attend(x, *arrays[1:3]), leaf)
    attend(*arrays[:3])
    (found,) = grad(out.sum(), leaf)
    (want,) = grad(favor_attention(leaf, *arrays[1:3], 0.5 * arrays[3]).sum(), leaf)
    assert_close(found, want, rtol=1e-12)


def test_a_run_goes_on_with_the_same_draws(xp: Any, tmp_path: Path) -> None:
    arrays = problem(xp)[:3]
    attend = layer(redraw_interval=3)
    for _ in range(5):
        attend(*arrays)
    save_training(tmp_path / "state.safetensors", attend)
    want = [host(attend(*arrays)) for _ in range(5)]
    fresh = PerformerAttention(5, 7, redraw_interval=3, rng=Rng(9)).astype("float64")
    load_training(tmp_path / "state.safetensors", fresh)
    for y in want:
        assert_close(fresh(*arrays), y, rtol=0, atol=0)
    assert (want[0] != want[-1]).any()


def test_a_redraw_stays_where_the_projection_is(backend_name: str) -> None:
    with backend.using("numpy"):
        attend = PerformerAttention(4, rng=Rng(0))
        attend.to(backend_name).redraw()  # although new arrays are NumPy's here
    assert isinstance(attend.projection, backend.get(backend_name).array_type)
    assert attend.projection.shape == (16, 4) and attend.projection.dtype == "float32"


def test_exponential_layer_trains_its_projection(xp: Any) -> None:
    arrays = [x.astype("float32") for x in problem(xp)[:3]]
    attend = ExponentialAttention(5, rng=Rng(0))
    assert attend.weight.shape == (20, 5)
    out = attend(*arrays, is_causal=True)
    out.sum().backward()
    assert out.dtype == "float32" and host(attend.weight.grad).all()
    with pytest.raises(ValueError, match="attn_mask"):
        attend(*arrays, attn_mask=xp.ones((9, 9), "bool"))


def test_exponential_layer_hands_on_its_arguments(xp: Any) -> None:
    arrays, attend = problem(xp)[:3], ExponentialAttention(5, rng=Rng(0)).astype("float64")
    real = xp.asarray(np.arange(9) < 6)
    found = attend(*arrays, key_mask=real)
    assert_close(found, attend(arrays[0], arrays[1][:, :6], arrays[2][:, :6]), rtol=1e-12)
    whole = attend(*arrays, is_causal=True)
    first, state = attend(*[x[:, :4] for x in arrays], is_causal=True, state=())
    rest, _ = attend(*[x[:, 4:] for x in arrays], is_causal=True, state=state)
    assert_close(np.concatenate([host(first), host(rest)], axis=1), whole, rtol=1e-11)


def test_exponential_layer_starts_at_the_scale_of_favor(xp: Any) -> None:
    """A deviation of d^(−1/4) is W ~ N(0, I) on x d^(−1/4); 64,000 numbers know it to 0.3 %."""
    weight = host(ExponentialAttention(64, 1000, rng=Rng(0)).weight)
    assert weight.std() / 64**-0.25 == pytest.approx(1.0, abs=0.015)
    assert abs(weight.mean()) < 5 * 64**-0.25 / 64_000**0.5


# What is refused


def test_errors(xp: Any) -> None:
    query, key, value, w = problem(xp)
    with pytest.raises(ValueError, match=r"attn_mask of shape \(9, 9\).*key_mask.*rotary"):
        layer()(query, key, value, attn_mask=xp.zeros((9, 9)))
    with pytest.raises(ValueError, match="positive, hyperbolic, trigonometric, got 'cosine'"):
        favor_attention(query, key, value, w, "cosine")
    with pytest.raises(ValueError, match=r"\(features, d\) with d = 5"):
        favor_attention(query, key, value, w[:, :4])
    with pytest.raises(ValueError, match="3 and 9"):
        favor_attention(query[:, :3], key, value, w, is_causal=True)
    with pytest.raises(ValueError, match="is_causal"):
        favor_attention(query, key, value, w, state=())
    with pytest.raises(ValueError, match="key_mask"):
        favor_attention(query, key, value, w, key_mask=xp.ones((4,), "bool"))
    with pytest.raises(ValueError, match="query"):
        favor_attention(query, key[..., :4], value, w)
    with pytest.raises(ValueError, match=r"got \(3, 7, 5\)"):
        favor_attention(query, key, value, xp.zeros((3, 7, 5)))
    with pytest.raises(TypeError, match="booleans"):
        favor_attention(query, key, value, w, key_mask=xp.ones((9,), "int64"))
    with pytest.raises(ValueError, match=r"\(2, 9, 5\), \(3, 9, 5\) and \(1, 9, 3\)"):
        favor_attention(query, xp.ones((3, 9, 5)), value[:1], w, is_causal=True)
    _, state = favor_attention(query, key, value, w, is_causal=True, state=())
    with pytest.raises(ValueError, match=r"leading axes \(2,\), not \(1,\)"):
        favor_attention(query[:1], key[:1], value[:1], w, is_causal=True, state=state)
    with pytest.raises(ValueError, match="at least 0"):
        oprf_attention(query, key, value, w, mean_square=-1.0)
    with pytest.raises(ValueError, match="got 'cosine'"):
        layer(attention=partial(favor_attention, feature="cosine"))
    with pytest.raises(TypeError, match="got 'positive'"):
        layer(attention="positive")
    for options in ({"num_features": 0}, {"redraw_interval": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            PerformerAttention(5, **options)
