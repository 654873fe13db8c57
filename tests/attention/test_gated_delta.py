"""Delta rules with a decay: forget before the error, or after; and what goes over into what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention.chunked import chunked
from mini_nn.attention.delta import DeltaState, delta_rule, unit_length
from mini_nn.attention.delta_chunks import recurrent_delta
from mini_nn.attention.gated_delta import (
    as_comba,
    comba,
    comba_recurrent,
    comba_weights,
    gated_delta_rule,
    gated_delta_rule_recurrent,
    gated_delta_weights,
    log_gate,
)
from mini_nn.check import check_grads
from models.gpt import GPT, Block, GPTConfig
from tests.attention.delta_goldens import ARRAYS, heads_first, inputs
from tests.attention.test_delta import descend, tokens
from tests.support import assert_close, host

GATED = [gated_delta_rule, gated_delta_rule_recurrent]
COMBA = [comba, comba_recurrent]


def gated_tokens(rng: Rng, n: int, d: int = 4, e: int = 3, lead: tuple[int, ...] = (2,)) -> Any:
    """Queries, keys of length 1, values, β and log γ."""
    gates = -rng.uniform((*lead, n), 0.01, 1.0, dtype="float64")
    return *tokens(rng, n, d, e, lead), gates


def naive(q: Any, k: Any, v: Any, beta: Any, log_decay: Any, error_first: bool) -> Any:
    """One sequence, by the definition, in NumPy."""
    s, outputs = np.zeros((k.shape[1], v.shape[1])), []
    for t in range(len(k)):
        kept = np.exp(log_decay[t]) * s
        error = v[t] - (s if error_first else kept).T @ k[t]
        s = kept + beta[t] * np.outer(k[t], error)
        outputs.append(s.T @ q[t])
    return np.array(outputs).reshape(len(k), v.shape[1])


@given(st.sampled_from([*GATED, *COMBA]), st.integers(0, 40), st.integers(0, 2**32))
def test_definition(xp: Any, rule: Any, n: int, seed: int) -> None:
    args = gated_tokens(Rng(seed), n)
    y = rule(*args, is_causal=True)
    for i in range(2):
        assert_close(y[i], naive(*[host(x)[i] for x in args], rule in COMBA))


@given(st.integers(8, 40), st.integers(0, 2**32))
def test_matrix_forms(xp: Any, n: int, seed: int) -> None:
    """D in the inverse gives the rule that forgets first, D_{i−1,j} the one that forgets last."""
    args = gated_tokens(Rng(seed), n)
    q, k, v, beta, log_decay = args
    first = ops.matmul(gated_delta_weights(q, k, beta, log_decay), v)
    last = ops.matmul(comba_weights(q, k, beta, log_decay), v)
    assert_close(gated_delta_rule(*args, True), first)
    assert_close(comba(*args, is_causal=True), last)
    assert abs(host(first) - host(last)).max() > 1e-5


def test_which_comes_first(xp: Any) -> None:
    """The two rules with the same letters are far apart: neither is a misprint of the other."""
    args = gated_tokens(Rng(0), 40, 8, 8)
    apart = host(gated_delta_rule(*args, True)) - host(comba(*args, is_causal=True))
    assert abs(apart).max() > 0.3


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_conversion(xp: Any, n: int, seed: int) -> None:
    """γ, γ β, v / γ in Comba is γ, β, v in the gated rule; leaving v as it is does not do."""
    q, k, v, beta, log_decay = gated_tokens(Rng(seed), n)
    value, rate = as_comba(v, beta, log_decay)
    want = gated_delta_rule(q, k, v, beta, log_decay, True)
    assert_close(comba(q, k, value, rate, log_decay, is_causal=True), want)
    assert abs(host(comba(q, k, v, rate, log_decay, is_causal=True)) - host(want)).max() > 1e-6


@pytest.mark.parametrize("name", ["recurrent_gated", "chunk_gated"])
@pytest.mark.parametrize("rule", GATED)
def test_reference_gated(xp: Any, rule: Any, name: str) -> None:
    x = inputs(xp)
    start = DeltaState(x["state"])
    y, state = rule(x["scaled"], x["k"], x["v"], x["beta"], x["g"], True, start)
    assert_close(y, heads_first(f"out.{name}"), rtol=1e-5, atol=1e-5)
    assert_close(state.matrix, ARRAYS[f"out.{name}.state"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", COMBA)
def test_reference_comba(xp: Any, rule: Any) -> None:
    """The reference's chunks take the error first, as its paper; its loop forgets first."""
    x = inputs(xp)
    args = (x["scaled"], x["k"], x["v"], x["beta"], x["g"])
    y, state = rule(*args, x["p"], True, DeltaState(x["state"]))
    assert_close(y, heads_first("out.chunk_comba"), rtol=1e-5, atol=1e-5)
    assert_close(state.matrix, ARRAYS["out.chunk_comba.state"], rtol=1e-5, atol=1e-5)
    other, last = recurrent_delta(*args, x["state"], x["p"], False)
    assert_close(other, heads_first("out.recurrent_comba"), rtol=1e-5, atol=1e-5)
    assert_close(last, ARRAYS["out.recurrent_comba.state"], rtol=1e-5, atol=1e-5)
    assert abs(host(other) - host(y)).max() > 0.1


@pytest.mark.parametrize("rule", [*GATED, *COMBA])
@given(n=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**32))
def test_splitting(xp: Any, rule: Any, n: int, data: Any, seed: int) -> None:
    cut = data.draw(st.integers(0, n))
    args = gated_tokens(Rng(seed), n)
    whole, end = rule(*args, is_causal=True, state=())
    first, state = rule(*[x[:, :cut] for x in args], is_causal=True, state=())
    rest, last = rule(*[x[:, cut:] for x in args], is_causal=True, state=state)
    assert_close(ops.concatenate([first, rest], axis=1), whole)
    assert_close(last.matrix, end.matrix)


@pytest.mark.parametrize("rule", [*GATED, *COMBA])
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_causality(xp: Any, rule: Any, data: Any, seed: int) -> None:
    t = data.draw(st.integers(0, 39))
    args = gated_tokens(Rng(seed), 40)
    changed = [x.copy() for x in args]
    for x in changed:
        x[:, t] = -0.5
    y, other = rule(*args, is_causal=True), rule(*changed, is_causal=True)
    looped = rule in (gated_delta_rule_recurrent, comba_recurrent)
    assert_close(other[:, :t], y[:, :t], atol=0.0 if looped else 1e-12)
    leaves = [Tensor(x, requires_grad=True) for x in args]
    for g in grad(rule(*leaves, is_causal=True)[:, t].sum(), leaves):
        assert float(abs(g.data[:, t + 1 :]).sum()) == 0.0


def test_limits(xp: Any) -> None:
    """γ = 1 is the delta rule; β = 0 in Comba's erasing only, p = 0, is linear attention."""
    q, k, v, beta, log_decay = gated_tokens(Rng(1), 37)
    want = delta_rule(q, k, v, beta, True)
    for rule in [*GATED, *COMBA]:
        assert_close(rule(q, k, v, beta, is_causal=True), want)
    linear, _ = chunked(q, k, beta[..., None] * v, log_decay)
    assert_close(comba(q, k, v, beta, log_decay, 0.0 * k, True), linear)
    for rule in GATED:
        last = rule(q[:, -1:], k, v, beta, log_decay, False)  # as a decoder with a cache asks
        assert_close(last, rule(q, k, v, beta, log_decay, True)[:, -1:])


def test_defaults(xp: Any) -> None:
    """β = 1, γ = 1, and causal: all of them are the delta rule then."""
    q, k, v, _, log_decay = gated_tokens(Rng(9), 7)
    want = delta_rule(q, k, v, 1.0, True)
    for rule in [*GATED, *COMBA]:
        assert_close(rule(q, k, v), want)
        assert_close(rule(q, k, v, log_decay=log_decay), rule(q, k, v, 1.0, log_decay))
    for rule in (gated_delta_rule, comba):
        with pytest.raises(ValueError, match="chunk_size=0"):
            rule(q, k, v, chunk_size=0)


@pytest.mark.parametrize("rule", [*GATED, *COMBA])
def test_dtypes_and_heads(xp: Any, rule: Any) -> None:
    """Rates in float64 leave float32; float16 is summed wider; other heads are refused."""
    q, k, v, beta, log_decay = gated_tokens(Rng(10), 7)
    want = rule(q, k, v, beta, log_decay)
    for dtype, error in (("float32", 1e-4), ("float16", 2e-2)):
        y, state = rule(*[x.astype(dtype) for x in (q, k, v)], beta, log_decay, state=())
        assert (y.dtype, state.matrix.dtype) == (dtype, "float32")
        assert_close(y.astype("float64"), want, rtol=error, atol=error)
    with pytest.raises(ValueError, match=r"\(2, 1, 4\), \(1, 7, 4\) and \(1, 7, 3\)"):
        rule(q[:, -1:], k[:1], v[:1], beta, log_decay, is_causal=False)


def test_gates_and_conversion_keep_the_dtype(xp: Any) -> None:
    q, k, v, _, _ = (x.astype("float32") for x in gated_tokens(Rng(11), 7))
    rate, decay = np.float64(0.5), np.float64(-0.3)
    value, scaled = as_comba(v, rate, decay)
    assert (value.dtype, scaled.dtype) == ("float32", "float32")
    assert_close(
        comba(q, k, value, scaled, decay), gated_delta_rule(q, k, v, rate, decay), 1e-4, 1e-5
    )
    assert log_gate(q, np.float64(0.1), np.float64(0.2)).dtype == "float32"


@pytest.mark.parametrize("rule", [gated_delta_rule, comba])
def test_gradients(xp: Any, rule: Any) -> None:
    args = gated_tokens(Rng(2), 4, 2, 2, ())
    check_grads(lambda *xs: rule(*xs, is_causal=True, chunk_size=2), *args, order=2)


@pytest.mark.parametrize("weights", [gated_delta_weights, comba_weights])
def test_gradients_of_weights(xp: Any, weights: Any) -> None:
    q, k, _, beta, log_decay = gated_tokens(Rng(3), 4, 2, 2, ())
    check_grads(lambda *xs: weights(*xs), q, k, beta, log_decay, order=1)


@given(st.floats(0.05, 1.0), st.floats(0.1, 0.99), st.integers(0, 2**32))
def test_comba_is_a_descent(xp: Any, eta: float, gamma: float, seed: int) -> None:
    """Of ½ ‖Sᵀk − v‖² + (1 − γ)/(2η) ‖S‖², with the step η.

    With (1 − γ)/η for the last factor, as kexue.fm 11033 prints it, the decay would be 2γ − 1.
    """
    rng = Rng(seed)
    q, k, v, _ = tokens(rng, 1, lead=())
    s = rng.normal((4, 3), dtype="float64")

    def loss(weight: float) -> Any:
        def of_state(state: Any) -> Any:
            error = ops.matmul(k, state) - v
            return 0.5 * ops.square(error).sum() + weight * ops.square(state).sum()

        return of_state

    def after(decay: float) -> Any:
        kept = decay * s + eta * xp.swapaxes(k, 0, 1) * (v - k @ s)
        return kept

    log_decay = xp.full((1,), float(np.log(gamma)))
    _, state = comba(q, k, v, eta, log_decay, is_causal=True, state=DeltaState(s))
    assert_close(descend(loss((1.0 - gamma) / (2.0 * eta)), s, eta), state.matrix)
    printed = descend(loss((1.0 - gamma) / eta), s, eta)
    assert_close(printed, after(2.0 * gamma - 1.0))
    # the gated rule: the same step of the plain error, from the state that has forgotten
    _, gated = gated_delta_rule(q, k, v, eta, log_decay, True, DeltaState(s))
    assert_close(descend(lambda x: loss(0.0)(x), gamma * s, eta), gated.matrix)


def test_log_gate(xp: Any) -> None:
    """γ = e^(−a softplus(x + b)) is in (0, 1), and σ(−x − b) for a = 1."""
    x = Rng(4).normal((5, 3), dtype="float64")
    bias = Rng(5).normal((3,), dtype="float64")
    gates = log_gate(x, 0.0 * bias, bias)
    assert_close(np.exp(host(gates)), 1.0 / (1.0 + np.exp(host(x + bias))))
    check_grads(log_gate, x, bias, bias + 1.0, order=2)


@pytest.mark.parametrize("rule", [*GATED, *COMBA])
def test_pads(xp: Any, rule: Any) -> None:
    """A pad is a token of β = 0 and log γ = 0: wherever it stands, the others do not notice.

    With β = 0 alone it would still make them forget.
    """
    q, k, v, beta, log_decay = gated_tokens(Rng(6), 7)
    places = xp.asarray([1, 2, 5, 6, 7, 9, 11])
    wide = []
    for x in (q, k, v, beta, log_decay):
        padded = Rng(7).normal((2, 12, *x.shape[2:]), dtype="float64")
        padded[:, places] = x
        wide.append(padded)
    real = xp.zeros(12)
    real[places] = 1.0
    want = rule(q, k, v, beta, log_decay, is_causal=True)
    y = rule(*wide[:3], wide[3] * real, wide[4] * real, is_causal=True)
    assert_close(y[:, places], want)
    forgets = wide[4] * real - abs(wide[4]) * (1.0 - real)
    forgetful = rule(*wide[:3], wide[3] * real, forgets, is_causal=True)
    assert abs(host(forgetful)[:, host(places)] - host(want)).max() > 1e-3


def test_in_place_of_softmax(xp: Any) -> None:
    """In a GPT's slot, and with its cache of keys and values, which the state makes superfluous."""

    def attention(query: Any, key: Any, value: Any, is_causal: bool = False) -> Any:
        return gated_delta_rule(query, unit_length(key), value, 0.5, -0.1, is_causal)

    config = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    rng = Rng(8)
    model = GPT(config, rng, [Block(config, rng, attention) for _ in range(2)])
    ids = xp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
    want, cache = model(ids), model.new_cache(16)
    parts = [model(ids[:, i : i + 1], cache=cache) for i in range(8)]
    assert_close(ops.concatenate(parts, axis=1), want, rtol=1e-4, atol=1e-5)
