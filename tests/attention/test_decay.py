"""Decays that depend on the data: chunks are the recurrence, and no product is ever divided by."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import recurrent
from mini_nn.attention.decay import (
    DecayState,
    gated_linear_attention,
    gla_log_gate,
    mamba_decay,
    recurrent_gated,
    scalar_decay_attention,
    wkv,
)
from mini_nn.check import check_grads
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_decay.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in [*_file.keys()]}
    METADATA = _file.metadata()

FORMS = [scalar_decay_attention, gated_linear_attention]


def drawn(seed: int, *shapes: tuple[int, ...], dtype: str = "float64") -> list[Any]:
    rng = Rng(seed)
    return [rng.normal(shape, dtype=dtype) for shape in shapes]


def problem(form: Any, seed: int, lead: Any, n: int, d: int, e: int, dtype: str = "float64") -> Any:
    """Queries, keys, values, logarithms of decays (a number or d of them a token), and a state."""
    gates = (*lead, n) if form is scalar_decay_attention else (*lead, n, d)
    q, k, v, g, s = drawn(
        seed, (*lead, n, d), (*lead, n, d), (*lead, n, e), gates, (*lead, d, e), dtype=dtype
    )
    return q, k, v, -abs(g), s


def naive(q: Any, k: Any, v: Any, g: Any, s: Any = None) -> tuple[Any, Any]:
    """The recurrence in NumPy; scalar decays have one axis less."""
    q, k, v, a = host(q), host(k), host(v), np.exp(host(g))
    a = a[..., None] if a.ndim < q.ndim else a
    s = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1])) if s is None else host(s)
    outputs = []
    for t in range(q.shape[-2]):
        s = a[..., t, :, None] * s + k[..., t, :, None] * v[..., t, None, :]
        outputs.append((q[..., t, :, None] * s).sum(axis=-2))
    return np.stack(outputs, axis=-2), s


def run(form: Any, size: int, *arrays: Any, **options: Any) -> Any:
    return form(*arrays, chunk_size=size, **options)


# B2: the forms are one function


@pytest.mark.parametrize("form", FORMS)
@given(
    n=st.integers(1, 70),
    size=st.integers(1, 73),
    d=st.integers(1, 4),
    e=st.integers(1, 4),
    lead=st.sampled_from([(), (2,), (2, 3)]),
    t=st.integers(0, 70),
)
def test_chunks_are_the_recurrence(
    xp: Any, form: Any, n: int, size: int, d: int, e: int, lead: Any, t: int
) -> None:
    """Any n and chunk; with a first state; and cut anywhere, the state handed on."""
    q, k, v, g, s = problem(form, n, lead, n, d, e)
    wanted, end = naive(q, k, v, g, s)
    y, state = run(form, size, q, k, v, g, state=(s,))
    assert type(state) is DecayState
    assert_close(y, wanted, rtol=1e-9, atol=1e-10)
    assert_close(state.memory, end, rtol=1e-9, atol=1e-10)
    assert_close(run(form, size, q, k, v, g), naive(q, k, v, g)[0], rtol=1e-9, atol=1e-10)
    twin = recurrent if form is scalar_decay_attention else recurrent_gated
    y, last = twin(q, k, v, g, s)
    assert_close(y, wanted, rtol=1e-9, atol=1e-10)
    assert_close(last, end, rtol=1e-9, atol=1e-10)

    t, of = min(t, n), (..., slice(None), slice(None))
    before, after = (..., slice(0, t), slice(None)), (..., slice(t, None), slice(None))
    gates = [(*part[:-1],) if g.ndim < q.ndim else part for part in (before, after, of)]
    first, state = run(form, size, q[before], k[before], v[before], g[gates[0]], state=())
    rest, state = run(form, size, q[after], k[after], v[after], g[gates[1]], state=state)
    whole, end = naive(q, k, v, g)
    assert_close(xp.concatenate([first, rest], axis=-2), whole, rtol=1e-9, atol=1e-10)
    assert_close(state.memory, end, rtol=1e-9, atol=1e-10)


@given(st.integers(1, 40), st.integers(1, 20))
def test_a_gate_that_all_channels_share_is_a_scalar(xp: Any, n: int, size: int) -> None:
    q, k, v, g, s = problem(scalar_decay_attention, n, (2,), n, 3, 2)
    y, state = gated_linear_attention(q, k, v, g[..., None], state=(s,), chunk_size=size)
    wanted, end = scalar_decay_attention(q, k, v, g, state=(s,))
    assert_close(y, wanted, rtol=1e-9, atol=1e-10)
    assert_close(state.memory, end.memory, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_without_decay_it_is_linear_attention(xp: Any, form: Any) -> None:
    """log 1 = 0: tril(Q Kᵀ) V.  And −inf everywhere leaves each token its own value."""
    q, k, v, g, _ = problem(form, 0, (2,), 37, 3, 2)
    scores = np.tril(host(q) @ host(k).swapaxes(-1, -2))
    assert_close(form(q, k, v, 0.0 * g), scores @ host(v), rtol=1e-10, atol=1e-11)
    alone = (host(q) * host(k)).sum(axis=-1, keepdims=True) * host(v)
    assert_close(form(q, k, v, 0.0 * g - float("inf")), alone, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", [-1e-3, -0.5])
def test_a_constant_decay_is_that_of_the_distance(xp: Any, form: Any, decay: float) -> None:
    q, k, v, g, _ = problem(form, 1, (), 50, 3, 2)
    distance = np.arange(50)[:, None] - np.arange(50)
    weights = np.where(distance >= 0, np.exp(decay * np.maximum(distance, 0)), 0.0)
    wanted = (host(q) @ host(k).T * weights) @ host(v)
    assert_close(form(q, k, v, 0.0 * g + decay), wanted, rtol=1e-10, atol=1e-11)


# Long products


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_decays_that_multiply_to_nothing(xp: Any, dtype: str) -> None:
    """2,000 tokens with α in (½, 0.9): Q ∘ b and K / b, as the equation has it, are 0 · inf."""
    n, d = 2000, 2
    q, k, v = (x.astype(dtype) for x in drawn(0, (n, d), (n, d), (n, d)))
    alpha = Rng(1).uniform((n, d), 0.5, 0.9, dtype="float64")
    g = xp.log(alpha).astype(dtype)
    wanted, end = naive(*(x.astype("float64") for x in (q, k, v, g)))
    tolerance = 1e-9 if dtype == "float64" else 2e-5
    for size in (16, 64):
        y, state = gated_linear_attention(q, k, v, g, state=(), chunk_size=size)
        assert y.dtype == dtype
        assert_close(y.astype("float64"), wanted, rtol=tolerance, atol=tolerance)
        assert_close(state.memory.astype("float64"), end, rtol=tolerance, atol=tolerance)
    by_token, _ = naive(q, k, v, g[:, 0])
    y = scalar_decay_attention(q, k, v, g[:, 0])
    assert_close(y.astype("float64"), by_token, rtol=tolerance, atol=tolerance)

    b = host(g).astype("float64").cumsum(axis=0)
    assert -b.min() > 709  # 1/b is beyond float64
    with np.errstate(all="ignore"):
        b = np.exp(b)
        planted = np.tril((host(q) * b) @ (host(k) / b).T) @ host(v)
    assert not np.allclose(planted, wanted, rtol=1e-3)


def test_gates_so_small_that_two_factors_would_not_do(xp: Any) -> None:
    """exp(G_i − G_start) exp(G_start − G_j) within a chunk: 0 · inf, where a neighbour is e⁻⁵⁰."""
    q, k, v, g, _ = problem(gated_linear_attention, 2, (), 32, 3, 2)
    g = 0.0 * g - 50.0
    leaves = [Tensor(x, requires_grad=True) for x in (q, k, v, g)]
    y = gated_linear_attention(*leaves)
    assert_close(y, naive(q, k, v, g)[0], rtol=1e-10, atol=1e-12)
    found = grad(ops.sum(y), leaves)
    for x, like in zip(grad(ops.sum(recurrent_gated(*leaves)[0]), leaves), found, strict=True):
        assert np.isfinite(host(x)).all()
        assert_close(like, x, rtol=1e-9, atol=1e-11)
    with np.errstate(all="ignore"):
        start = host(g).cumsum(axis=0)
        planted = np.tril((host(q) * np.exp(start)) @ (host(k) * np.exp(-start)).T) @ host(v)
    assert not np.allclose(planted, host(y), rtol=1e-3)


def test_a_channel_that_forgets(xp: Any) -> None:
    """α = 0 in one channel at one token: nothing older is left there; the others go on."""
    q, k, v, g, s = problem(gated_linear_attention, 3, (), 24, 2, 2)
    g[10, 0] = -float("inf")
    y, state = gated_linear_attention(q, k, v, g, state=(s,), chunk_size=8)
    wanted, end = naive(q, k, v, g, s)
    assert_close(y, wanted)
    assert_close(state.memory, end)
    fresh = naive(q[10:, :1], k[10:, :1], v[10:], g[10:, :1])[1]
    assert_close(state.memory[:1], fresh, rtol=1e-10, atol=1e-12)


def test_memory_is_linear(xp: Any) -> None:
    """Four times the tokens take at most about four times the memory, there and back."""
    if xp is not np:
        pytest.skip("tracemalloc sees NumPy's allocations only")

    def peak(n: int) -> int:
        q, k, v, g, _ = problem(gated_linear_attention, 0, (), n, 8, 8, "float32")
        leaves = [Tensor(x, requires_grad=True) for x in (q, k, v, g)]
        tracemalloc.start()
        grad(ops.sum(gated_linear_attention(*leaves)), leaves)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(256)
    small, large = peak(512), peak(2048)
    assert large < 6 * small
    assert large < 2048 * 2048 * 4  # not one matrix of (n, n) numbers


# B3: nothing looks ahead


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_change_nothing(xp: Any, form: Any) -> None:
    q, k, v, g, _ = problem(form, 4, (2,), 40, 3, 2)
    y, at = host(form(q, k, v, g, chunk_size=8)), 21
    tail = (slice(None), slice(at, None))
    changed = [x.copy() for x in (q, k, v, g)]
    for x in changed:
        x[tail] = 2.0 * x[tail] - 1.0
    z = host(form(*changed, chunk_size=8))
    assert_close(z[:, :at], y[:, :at], rtol=1e-12, atol=1e-12)
    assert abs(z[:, at:] - y[:, at:]).max() > 0.1
    twin = recurrent if form is scalar_decay_attention else recurrent_gated
    assert (host(twin(*changed)[0])[:, :at] == host(twin(q, k, v, g)[0])[:, :at]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("i", [0, 7, 8, 20])
def test_no_gradient_from_the_future(xp: Any, form: Any, i: int) -> None:
    q, k, v, g, _ = problem(form, 5, (2,), 30, 3, 2)
    leaves = [Tensor(x, requires_grad=True) for x in (q, k, v, g)]
    y = form(*leaves, chunk_size=8)
    for x in grad(ops.sum(y[:, i]), leaves):
        assert (host(x)[:, i + 1 :] == 0).all()
        assert i == 0 or (host(x)[:, i] != 0).any()


@pytest.mark.parametrize("form", FORMS)
def test_a_decoder_with_a_cache_asks_for_the_last_token(xp: Any, form: Any) -> None:
    q, k, v, g, _ = problem(form, 6, (2, 3), 9, 3, 2)
    last = form(q[..., -1:, :], k, v, g, is_causal=False)
    assert_close(last, form(q, k, v, g)[..., -1:, :], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="recurrence"):
        form(q, k, v, g, is_causal=False)


# Derivatives


@pytest.mark.parametrize("form", FORMS)
def test_gradients_to_second_order(xp: Any, form: Any) -> None:
    q, k, v, g, s = problem(form, 7, (2,), 5, 2, 3)

    def both(q: Any, k: Any, v: Any, g: Any, s: Any) -> Any:
        y, state = form(q, k, v, g, state=(s,), chunk_size=2)
        return y, state.memory

    check_grads(both, q, k, v, g - 0.1, s)


@pytest.mark.parametrize("shape", [(1,), (3,), (7, 1), (7, 3), (2, 1, 1), (2, 7, 1)])
def test_a_gate_shared_by_channels_tokens_or_batch(xp: Any, shape: Any) -> None:
    q, k, v, _, _ = problem(gated_linear_attention, 8, (2,), 7, 3, 2)
    g = -abs(drawn(9, shape)[0])
    check_grads(
        lambda *xs: gated_linear_attention(*xs, chunk_size=3), q, k, v, g, order=1, rtol=1e-5
    )
    wide = np.broadcast_to(host(g), (2, 7, 3))
    assert_close(gated_linear_attention(q, k, v, g), naive(q, k, v, wide)[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_are_those_of_the_recurrence(xp: Any, dtype: str) -> None:
    arrays = problem(gated_linear_attention, 10, (2, 2), 41, 3, 4, dtype)
    seeds = drawn(11, (2, 2, 41, 4), (2, 2, 3, 4), dtype=dtype)
    found = []
    for own in (True, False):
        leaves = [Tensor(x, requires_grad=True) for x in arrays]
        if own:
            y, (last,) = gated_linear_attention(*leaves[:4], state=(leaves[4],), chunk_size=8)
        else:
            y, last = recurrent_gated(*leaves)
        found.append(grad([y, last], leaves, seeds))
    tolerance = 1e-9 if dtype == "float64" else 2e-4
    for got, want in zip(*found, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, rtol=tolerance, atol=tolerance)


# Padding, edges


@pytest.mark.parametrize("form", FORMS)
def test_pads_change_nothing(xp: Any, form: Any) -> None:
    """Pads before, between and after: outputs at real tokens and the state are as without them."""
    q, k, v, g, _ = problem(form, 12, (2, 2), 12, 3, 2)
    real = np.array([0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0], bool)
    mask = xp.asarray(np.broadcast_to(real, (2, 2, 12)).copy())
    y, state = form(q, k, v, g, state=(), key_mask=mask, chunk_size=4)
    at = xp.asarray(np.flatnonzero(real))
    short = [x[:, :, at] for x in (q, k, v, g)]
    wanted, end = form(*short, state=())
    assert_close(y[:, :, at], wanted, rtol=1e-10, atol=1e-11)
    assert_close(state.memory, end.memory, rtol=1e-10, atol=1e-11)
    _, planted = form(q, ops.where(mask[..., None], k, 0.0), v, g, state=())  # the decay is left
    assert abs(host(planted.memory - end.memory)).max() > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_a_pad_may_hold_anything(xp: Any, form: Any) -> None:
    q, k, v, g, _ = problem(form, 12, (2,), 6, 3, 2)
    real = xp.asarray([True, True, False, True, False, True])
    wanted, end = form(q, k, v, g, state=(), key_mask=real)
    hidden = [ops.where(real[:, None], x, float("nan")) for x in (k, v)]
    gates = ops.where(real if g.ndim < q.ndim else real[:, None], g, float("nan"))
    y, state = form(q, *hidden, gates, state=(), key_mask=real)
    assert_close(y, wanted, rtol=1e-12)
    assert_close(state.memory, end.memory, rtol=1e-12)
    with pytest.raises(TypeError, match="booleans"):
        form(q, k, v, g, key_mask=real.astype("int64"))
    with pytest.raises(ValueError, match="key_mask"):
        form(q, k, v, g, key_mask=real[:5])


@pytest.mark.parametrize("form", [*FORMS, recurrent, recurrent_gated])
def test_a_gate_that_is_one_number(xp: Any, form: Any) -> None:
    q, k, v, g, _ = problem(gated_linear_attention, 16, (2,), 7, 3, 2)
    wanted, _ = naive(q, k, v, 0.0 * host(g) - 0.3)
    for gate in (-0.3, np.float64(-0.3), xp.asarray(-0.3)):
        found = form(q, k, v, gate)
        assert_close(found[0] if isinstance(found, tuple) else found, wanted, 1e-10, 1e-11)


@pytest.mark.parametrize("n", [0, 5])
def test_gates_do_not_decide_the_dtype(xp: Any, n: int) -> None:
    """float64 gates beside float32 queries: outputs and states are float32, the first one too."""
    for form in FORMS:
        q, k, v, g, _ = problem(form, 17, (2,), n, 3, 2, "float32")
        for gate in (g, g.astype("float64"), np.float64(-0.3)):
            y, state = form(q, k, v, gate, state=())
            assert (y.dtype, state.memory.dtype) == ("float32", "float32")
    for gate in (g, g.astype("float64")):
        assert [x.dtype for x in recurrent_gated(q, k, v, gate)] == ["float32", "float32"]
    u = xp.asarray([0.1, 0.2])
    o, state = wkv(v, v, u, u, ())
    assert {x.dtype.name for x in (o, *state)} == {"float32"}
    for x in (*mamba_decay(v, np.float64(0.1), np.float64(0.3)), gla_log_gate(v, np.float64(2.0))):
        assert x.dtype == "float32"


@pytest.mark.parametrize("form", FORMS)
def test_float16_is_summed_in_float32(xp: Any, form: Any) -> None:
    ones = xp.ones((1200, 1), "float16")
    gate = xp.zeros((1200,) if form is scalar_decay_attention else (1200, 1), "float16")
    y, state = form(ones * 1e-3, ones * 8, ones * 8, gate, state=())
    assert (y.dtype, state.memory.dtype) == ("float16", "float32")
    assert_close(y[-1].astype("float64"), 76.8, rtol=2e-3)  # of a sum of 76,800


def test_float16_in_the_small_functions(xp: Any) -> None:
    k, v, u = drawn(19, (6, 2), (6, 2), (2,))
    small = [x.astype("float16") for x in (k, v, abs(u), u)]
    o, state = wkv(*small, ())
    assert {x.dtype.name for x in state} == {"float32"} and o.dtype == "float16"
    assert_close(o.astype("float64"), naive_wkv(k, v, abs(u), u), rtol=1e-2, atol=1e-2)
    for x in (*mamba_decay(small[0], 0.5, -1.0), gla_log_gate(small[0])):
        assert x.dtype == "float16"


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_and_one(xp: Any, form: Any) -> None:
    q, k, v, g, s = problem(form, 13, (2,), 0, 3, 2)
    y, state = form(q, k, v, g, state=(s,))
    assert y.shape == (2, 0, 2)
    assert_close(state.memory, s)
    q, k, v, g, _ = problem(form, 14, (), 1, 1, 1)
    assert_close(form(q, k, v, g), host(q) * host(k) * host(v), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_refusals(xp: Any, form: Any) -> None:
    q, k, v, g, s = problem(form, 15, (2,), 5, 3, 2)
    with pytest.raises(ValueError, match=r"\(2, 5, 3\), \(2, 5, 3\) and \(2, 4, 2\)"):
        form(q, k, v[:, 1:], g)
    with pytest.raises(ValueError, match=r"log_(decay|gate)"):
        form(q, k, v, g[:, 1:])
    with pytest.raises(ValueError, match=r"\(2, 3, 2\) here, got \(2, 2, 2\)"):
        form(q, k, v, g, state=(s[:, 1:],))
    with pytest.raises(ValueError, match=r"\(2, 3, 2\) here, got \(1, 3, 2\)"):
        form(q, k, v, g, state=(s[:1],))
    with pytest.raises(ValueError, match="at least one token"):
        form(q, k, v, g, chunk_size=0)
    for causal, query in ((True, q), (False, q[:, -1:])):
        shapes = rf"\(2, {query.shape[1]}, 3\), \(1, 5, 3\) and \(1, 5, 2\)"
        with pytest.raises(ValueError, match=shapes):
            form(query, k[:1], v[:1], g, causal)


# Gates


def test_the_gates(xp: Any) -> None:
    """σ(x)^{1/16} and exp(−softplus(x + b) e^A), where they are far from 0 and 1 as well."""
    x = xp.asarray([-800.0, -3.0, 0.0, 3.0, 800.0])
    with np.errstate(all="ignore"):
        wanted = (1 / (1 + np.exp(-host(x)))) ** (1 / 16)
    assert_close(ops.exp(gla_log_gate(x))[1:], wanted[1:], rtol=1e-12)
    assert_close(gla_log_gate(x)[:1], np.array([-50.0]), rtol=1e-12)  # the power would be 0
    halved = gla_log_gate(xp.zeros(16))
    assert_close(float(host(ops.exp(ops.sum(halved)))), 0.5, rtol=1e-12)

    rate, bias = xp.asarray(0.7), xp.asarray(-1.0)
    step, log_decay = mamba_decay(x, rate, bias)
    assert_close(step[1:4], np.log1p(np.exp(host(x)[1:4] - 1.0)), rtol=1e-12)
    assert_close(log_decay, -np.exp(0.7) * host(step), rtol=1e-12)
    assert (host(log_decay) <= 0).all() and np.isfinite(host(log_decay)).all()
    with pytest.raises(ValueError, match="positive"):
        gla_log_gate(x, 0.0)
    check_grads(gla_log_gate, x[1:4])
    check_grads(mamba_decay, x[1:4], rate, bias)


def test_a_step_of_mamba_is_one_of_the_differential_equation(xp: Any) -> None:
    """h′ = −e^A h + B x over a time Δ, x held: e^{−Δ e^A} h + (1 − e^{−Δ e^A}) e^{−A} B x.

    With v = Δ x the second factor is Δ, its first order: they agree to O(Δ²).
    """
    errors = []
    for x in (-5.0, -7.0):  # Δ of 0.0067 and 0.00091
        step, log_decay = mamba_decay(xp.asarray(x), xp.asarray(0.5))
        exact = -np.expm1(float(host(log_decay))) / np.exp(0.5)
        errors.append(abs(exact - float(host(step))) / float(host(step)) ** 2)
    assert_close(errors[0], np.exp(0.5) / 2, rtol=0.02)
    assert_close(errors[1], np.exp(0.5) / 2, rtol=0.02)


# RWKV-4


def naive_wkv(k: Any, v: Any, w: Any, u: Any) -> Any:
    """Every weight of every earlier token, in float64 and without any shift."""
    k, v, w, u = map(host, (k, v, w, u))
    outputs = []
    for t in range(k.shape[-2]):
        age = (t - 1 - np.arange(t))[:, None]
        weights = np.concatenate(
            [np.exp(k[..., :t, :] - age * w), np.exp(k[..., t : t + 1, :] + u)], axis=-2
        )
        outputs.append((weights * v[..., : t + 1, :]).sum(axis=-2) / weights.sum(axis=-2))
    return np.stack(outputs, axis=-2)


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(0, 20))
def test_wkv(xp: Any, seed: int, n: int, t: int) -> None:
    """The definition; its formula with y_t in place of y_{t−1}; two parts; any shift of keys."""
    k, v, u = drawn(seed, (2, n, 3), (2, n, 3), (3,))
    w = Rng(seed).uniform((3,), 0.0, 2.0, dtype="float64")
    o = wkv(k, v, w, u)
    assert_close(o, naive_wkv(k, v, w, u), rtol=1e-9, atol=1e-10)
    assert (host(o) <= host(v).max(axis=1, keepdims=True) + 1e-12).all()
    for shift in (-5e3, 5e3):
        assert_close(wkv(k + shift, v, w, u), o, rtol=1e-8, atol=1e-9)
    t = min(t, n)
    first, state = wkv(k[:, :t], v[:, :t], w, u, ())
    rest, _ = wkv(k[:, t:], v[:, t:], w, u, state)
    assert_close(xp.concatenate([first, rest], axis=1), o, rtol=1e-9, atol=1e-10)

    lam, gamma, e = np.exp(-host(w)), np.exp(host(u)), np.exp(host(k))
    y, z = (_faded(x, lam) for x in (e * host(v), e))
    extra = (gamma * lam - 1) * e
    assert_close(o, (y + extra * host(v)) / (z + extra), rtol=1e-6, atol=1e-7)


def _faded(x: Any, lam: Any) -> Any:
    """Σ_{j ≤ t} λ^{t − j} x_j."""
    total, sums = 0.0, []
    for t in range(x.shape[-2]):
        total = lam * total + x[..., t, :]
        sums.append(total)
    return np.stack(sums, axis=-2)


def test_limits_of_wkv(xp: Any) -> None:
    """w = u = 0: a softmax of the keys so far; w → ∞: of the last two tokens only."""
    k, v = drawn(16, (9, 2), (9, 2))
    zero = xp.zeros(2)
    sees = np.tril(np.ones((9, 9)))[..., None]
    weights = np.exp(host(k)) * sees
    wanted = (weights * host(v)).sum(axis=1) / weights.sum(axis=1)
    assert_close(wkv(k, v, zero, zero), wanted, rtol=1e-10)
    close = weights * (1 - np.tril(np.ones((9, 9)), -2))[..., None]
    wanted = (close * host(v)).sum(axis=1) / close.sum(axis=1)
    assert_close(wkv(k, v, zero + 900.0, zero), wanted, rtol=1e-10)


def test_wkv_has_no_overflow(xp: Any) -> None:
    """Keys of 300 in float32: e^k is inf, the formula without a running maximum nan."""
    k, v, u = drawn(17, (12, 2), (12, 2), (2,), dtype="float32")
    k = 300.0 * k
    w = xp.asarray([0.5, 1.0]).astype("float32")
    leaves = [Tensor(x, requires_grad=True) for x in (k, v, w, u)]
    o = wkv(*leaves)
    assert o.dtype == "float32"
    wanted = naive_wkv(*(x.astype("float64") for x in (k, v, w, u)))
    assert_close(o.data.astype("float64"), wanted, rtol=1e-3, atol=1e-4)
    assert all(np.isfinite(host(x)).all() for x in grad(ops.sum(o), leaves))
    with np.errstate(all="ignore"):
        planted = naive_wkv(k, v, w, u)
    assert np.isnan(planted).any()


@pytest.mark.parametrize("key", [-3e38, 3e38])
def test_wkv_of_the_largest_keys_there_are(xp: Any, key: float) -> None:
    """All alike, whatever they are: with w = 0 a mean, also after a call without tokens."""
    (v,) = drawn(20, (5, 2), dtype="float32")
    k, zero = xp.full((5, 2), key, "float32"), xp.zeros(2, "float32")
    wanted = host(v).cumsum(axis=0) / np.arange(1, 6, dtype="float32")[:, None]
    assert_close(wkv(k, v, zero, zero), wanted, rtol=1e-5, atol=1e-6)
    _, state = wkv(k[:0], v[:0], zero, zero, ())
    o, state = wkv(k, v, zero, zero, state)
    assert_close(o, wanted, rtol=1e-5, atol=1e-6)
    assert_close(state.exponent, k[0])


def test_wkv_looks_back_only_and_has_its_gradients(xp: Any) -> None:
    k, v, u = drawn(18, (2, 6, 2), (2, 6, 2), (2,))
    w = xp.asarray([0.3, 1.2])
    leaves = [Tensor(x, requires_grad=True) for x in (k, v)]
    for x in grad(ops.sum(wkv(*leaves, w, u)[:, 3]), leaves):
        assert (host(x)[:, 4:] == 0).all() and (host(x)[:, :4] != 0).any()

    def in_two_parts(k: Any, v: Any, w: Any, u: Any) -> Any:
        first, state = wkv(k[:, :2], v[:, :2], w, u, ())
        rest, _ = wkv(k[:, 2:], v[:, 2:], w, u, state)
        return first, rest

    check_grads(in_two_parts, k, v, w, u, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"decay \(d,\)"):
        wkv(k, v, w[:1], u)
    with pytest.raises(ValueError, match=r"bonus \(d,\)"):
        wkv(k, v, w, u[:1])


# Goldens


def test_flash_linear_attention(xp: Any) -> None:
    """Their naive forms, which scale q by 1/√d and have (b, n, h, d); in float32."""
    assert "fla-org/flash-linear-attention" in json.loads(METADATA["commits"])
    for form, case, gate in (
        (scalar_decay_attention, "simple_gla", "g"),
        (gated_linear_attention, "gla", "gk"),
    ):
        q, k, v, g = (
            xp.asarray(GOLDEN[f"{case}.in.{name}"].swapaxes(1, 2)) for name in ("q", "k", "v", gate)
        )
        start = xp.asarray(GOLDEN[f"{case}.in.initial_state"])
        y, state = form(q * q.shape[-1] ** -0.5, k, v, g, state=(start,), chunk_size=8)
        assert_close(ops.swapaxes(y, 1, 2), GOLDEN[f"{case}.out"], rtol=1e-5, atol=2e-6)
        assert_close(state.memory, GOLDEN[f"{case}.state"], rtol=1e-5, atol=2e-6)
        if case == "simple_gla":
            assert_close(ops.swapaxes(y, 1, 2), GOLDEN["simple_gla.chunked"], 1e-5, 2e-6)
        unscaled = form(q, k, v, g, state=(start,))[0]
        assert abs(host(unscaled.swapaxes(1, 2)) - GOLDEN[f"{case}.out"]).max() > 0.1


def test_the_rwkv_of_transformers(xp: Any) -> None:
    """There w = e^{time_decay}; the parts of their state are ours."""
    k, v, w, u = (
        xp.asarray(GOLDEN[f"wkv.in.{name}"])
        for name in ("key", "value", "time_decay", "time_first")
    )
    o, state = wkv(k, v, ops.exp(w), u, ())
    assert_close(o, GOLDEN["wkv.out"], rtol=1e-5, atol=1e-6)
    for name, part in zip(("numerator", "denominator", "exponent"), state, strict=True):
        assert_close(part, GOLDEN[f"wkv.{name}"].astype("float64"), rtol=1e-5, atol=1e-6)
