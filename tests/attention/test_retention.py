"""Retention: three forms of one function, a rotation, a layer that decodes from a state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.attention.retention import (
    MultiScaleRetention,
    RetentionState,
    norm_attention,
    parallel_retention,
    recurrent_retention,
    retention,
    retention_angles,
    retention_log_decays,
    retention_scores,
    rotate_pairs,
)
from mini_nn.check import check_grads
from mini_nn.nn import functional as F
from models.gpt import GPT, Block, GPTConfig
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_decay.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in [*_file.keys()]}
    METADATA = _file.metadata()

FORMS = [retention, recurrent_retention, parallel_retention]
DECAYS = st.sampled_from([None, 0.5, 1.0, [0.99, 0.6], "array"])


def drawn(seed: int, *shapes: tuple[int, ...], dtype: str = "float64") -> list[Any]:
    rng = Rng(seed)
    return [rng.normal(shape, dtype=dtype) for shape in shapes]


def problem(seed: int, n: int, d: int = 3, e: int = 2, dtype: str = "float64") -> Any:
    """Two sequences with two heads, and a state."""
    lead = (2, 2)
    return drawn(seed, *((*lead, n, m) for m in (d, d, e)), (*lead, d, e), dtype=dtype)


def naive(q: Any, k: Any, v: Any, gammas: Any, s: Any = None) -> tuple[Any, Any]:
    """Token by token in NumPy, one γ a head."""
    q, k, v = host(q), host(k), host(v)
    s = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1])) if s is None else host(s)
    outputs = []
    for t in range(q.shape[-2]):
        s = np.asarray(gammas)[:, None, None] * s + k[..., t, :, None] * v[..., t, None, :]
        outputs.append((q[..., t, :, None] * s).sum(axis=-2))
    return np.stack(outputs, axis=-2), s


# B22: recurrent, parallel and chunked


@given(n=st.integers(1, 70), size=st.integers(1, 73), decay=DECAYS, t=st.integers(0, 70))
def test_three_forms(xp: Any, n: int, size: int, decay: Any, t: int) -> None:
    """With any decays, chunks, a first state; and cut anywhere, with the state handed on."""
    q, k, v, s = problem(n, n)
    if decay == "array":
        decay = xp.asarray([0.9, 0.3])
    gammas = [31 / 32, 63 / 64] if decay is None else np.broadcast_to(host(decay), (2,))
    wanted, end = naive(q, k, v, gammas, s)
    for form, options in ((retention, {"chunk_size": size}), (recurrent_retention, {})):
        y, state = form(q, k, v, decay, state=(s,), **options)
        assert type(state) is RetentionState
        assert_close(y, wanted, rtol=1e-9, atol=1e-10)
        assert_close(state.memory, end, rtol=1e-9, atol=1e-10)
    wanted, end = naive(q, k, v, gammas)
    for form in FORMS:
        assert_close(form(q, k, v, decay), wanted, rtol=1e-9, atol=1e-10)

    t = min(t, n)
    parts = [[x[..., at, :] for x in (q, k, v)] for at in (slice(0, t), slice(t, None))]
    first, state = retention(*parts[0], decay, state=(), chunk_size=size)
    rest, state = retention(*parts[1], decay, state=state, chunk_size=size)
    assert_close(xp.concatenate([first, rest], axis=-2), wanted, rtol=1e-9, atol=1e-10)
    assert_close(state.memory, end, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_without_decay_it_is_unnormalised_linear_attention(xp: Any, form: Any) -> None:
    q, k, v, _ = problem(0, 33)
    wanted = np.tril(host(q) @ host(k).swapaxes(-1, -2)) @ host(v)
    assert_close(form(q, k, v, 1.0), wanted, rtol=1e-10, atol=1e-11)
    last = host(q)[..., -1:, :] @ (host(k).swapaxes(-1, -2) @ host(v))
    assert_close(form(q, k, v, 1.0)[..., -1:, :], last, rtol=1e-10, atol=1e-11)


def test_one_head_without_an_axis_for_it(xp: Any) -> None:
    q, k, v, _ = problem(1, 20)
    for form in FORMS:
        wanted = form(q, k, v, 31 / 32)[0, 0]
        assert_close(form(q[0, 0], k[0, 0], v[0, 0]), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", FORMS)
def test_a_long_text(xp: Any, form: Any, dtype: str) -> None:
    """γ^i γ^{−j}, with which the paper's derivation begins, is 0 · inf for γ = ½ and 1,200 tokens.

    And float32 has no γ_h beyond h = 19 (1 − 2⁻²⁴ is the last), but it has their logarithms.
    """
    n, gamma = 1200, 0.5
    q, k, v = drawn(2, (n, 2), (n, 2), (n, 2), dtype=dtype)
    wanted, _ = naive(q[None], k[None], v[None], [gamma])
    assert_close(form(q, k, v, gamma), wanted[0].astype(dtype), rtol=1e-4, atol=1e-5)
    with np.errstate(all="ignore"):
        powers = np.power(np.float64(gamma), np.arange(n))[:, None]
        planted = np.tril((host(q) * powers) @ (host(k) / powers).T) @ host(v)
    assert not np.allclose(planted, wanted[0], rtol=1e-3)
    assert np.float32(1) - np.float32(2.0**-25) == 1
    assert np.float32(retention_log_decays(21)[20]) < 0


def test_the_decays(xp: Any) -> None:
    logs = retention_log_decays(6)
    assert_close(np.exp(logs), 1 - 2.0 ** (-5 - np.arange(6)), rtol=1e-15)
    half_lives = [round(math.log(0.5) / g) for g in logs[:3]]
    assert half_lives == [22, 44, 88]
    q, k, _, _ = problem(3, 5)
    d = host(retention_scores(q, k)) / np.where(
        np.tril(np.ones((5, 5))) > 0, host(q) @ host(k).swapaxes(-1, -2), 1.0
    )
    for h in range(2):
        for i in range(5):
            for j in range(5):
                wanted = (1 - 2.0 ** (-5 - h)) ** (i - j) if j <= i else 0.0
                assert_close(d[:, h, i, j], wanted, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**32), st.integers(1, 20))
def test_normalised_scores_are_rows_times_positive_numbers(xp: Any, seed: int, n: int) -> None:
    """Which a norm of each head takes out again (2.2): without ε the output is the same."""
    q, k, v, _ = problem(seed, n, 4, 5)
    plain, normal = (host(retention_scores(q, k, None, flag)) for flag in (False, True))
    first = normal[..., :1] / plain[..., :1]
    assert (first > 0).all()
    assert_close(normal, plain * first, rtol=1e-8, atol=1e-12)
    assert (abs(normal.sum(axis=-1)) <= 1 + 1e-12).all()
    outputs = [parallel_retention(q, k, v, normalize=flag) for flag in (False, True)]
    normed = [F.layer_norm(y, 5, eps=0.0) for y in outputs]
    assert_close(normed[0], normed[1], rtol=1e-6, atol=1e-8)


def test_the_normalisations_are_the_papers(xp: Any) -> None:
    q, k, _, _ = problem(4, 6, 4)
    gammas = np.array([31 / 32, 63 / 64])[:, None, None]
    distance = np.arange(6)[:, None] - np.arange(6)
    d = np.where(distance >= 0, gammas ** np.maximum(distance, 0), 0.0)
    d = d / np.sqrt(d.sum(axis=-1, keepdims=True))
    r = 9.0 * host(q) @ host(k).swapaxes(-1, -2) / np.sqrt(4) * d
    total = abs(r.sum(axis=-1, keepdims=True))
    assert total.min() < 1 < total.max()
    wanted = r / np.maximum(total, 1)
    assert_close(retention_scores(9.0 * q, k, normalize=True), wanted, rtol=1e-10, atol=1e-12)


# B3: nothing looks ahead


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_change_nothing(xp: Any, form: Any) -> None:
    q, k, v, _ = problem(5, 80)
    at, y = 41, host(form(q, k, v))
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[..., at:, :] = 3.0 * x[..., at:, :] + 1.0
    z = host(form(*changed))
    assert_close(z[..., :at, :], y[..., :at, :], rtol=1e-12, atol=1e-12)
    assert abs(z - y).max() > 0.1
    if form is recurrent_retention:
        assert (z[..., :at, :] == y[..., :at, :]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("i", [0, 12, 70])
def test_no_gradient_from_the_future(xp: Any, form: Any, i: int) -> None:
    leaves = [Tensor(x, requires_grad=True) for x in problem(6, 80)[:3]]
    for x in grad(ops.sum(form(*leaves)[..., i, :]), leaves):
        assert (host(x)[..., i + 1 :, :] == 0).all() and (host(x)[..., i, :] != 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_to_second_order(xp: Any, form: Any) -> None:
    q, k, v, _ = problem(7, 4, 2, 2)
    check_grads(lambda q, k, v, g: form(q, k, v, g), q, k, v, xp.asarray([0.9, 0.4]), rtol=1e-5)


def test_gradients_of_normalised_scores(xp: Any) -> None:
    q, k, v, _ = problem(8, 4, 2, 2)
    check_grads(lambda *xs: parallel_retention(*xs, normalize=True), q, k, v)


def test_in_a_gpt_with_and_without_a_cache(xp: Any) -> None:
    """It drops into the slot for attention; what a cache of keys and values gives is the same."""
    config = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    rng = Rng(0)
    blocks = [Block(config, rng, attention=retention) for _ in range(2)]
    model = GPT(config, rng, blocks).astype("float64").eval()
    ids = Rng(1).integers(0, 11, (2, 9))
    whole = model(ids)
    cache = model.new_cache(9)
    parts = [model(ids[:, :5], cache=cache)]
    parts += [model(ids[:, t : t + 1], cache=cache) for t in range(5, 9)]
    assert_close(ops.concatenate(parts, axis=1), whole, rtol=1e-9, atol=1e-11)
    other = GPT(config, Rng(0)).astype("float64").eval()
    assert abs(host(other(ids)) - host(whole)).max() > 1e-6


def test_pads_change_nothing(xp: Any) -> None:
    q, k, v, _ = problem(9, 10)
    real = np.array([0, 1, 1, 0, 0, 1, 1, 0, 1, 0], bool)
    at = xp.asarray(np.flatnonzero(real))
    wanted, end = retention(*(x[..., at, :] for x in (q, k, v)), state=())
    y, state = retention(q, k, v, key_mask=xp.asarray(real), state=(), chunk_size=4)
    assert_close(y[..., at, :], wanted, rtol=1e-10, atol=1e-12)
    assert_close(state.memory, end.memory, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", [retention, recurrent_retention])
def test_a_pad_may_hold_anything(xp: Any, form: Any) -> None:
    """Keys and values that are nan where the mask says so: 0 times nan would be nan."""
    q, k, v, _ = problem(9, 6)
    real = xp.asarray([True, True, False, True, False, True])
    hidden = [ops.where(real[:, None], x, float("nan")) for x in (k, v)]
    y, state = form(q, *hidden, key_mask=real, state=())
    wanted, end = form(q, k, v, key_mask=real, state=())
    assert_close(y, wanted, rtol=1e-12)
    assert_close(state.memory, end.memory, rtol=1e-12)
    with pytest.raises(TypeError, match="booleans"):
        form(q, k, v, key_mask=real.astype("int64"))
    with pytest.raises(ValueError, match="key_mask"):
        form(q, k, v, key_mask=real[:5])


@pytest.mark.parametrize("form", FORMS)
def test_dtypes(xp: Any, form: Any) -> None:
    """Decays in float64 leave float32 what it is; float16 is summed in float32."""
    small = [x.astype("float32") for x in problem(10, 5)[:3]]
    wanted = form(*small, [0.9, 0.8])
    for decay in (xp.asarray([0.9, 0.8]), [np.float64(0.9), np.float64(0.8)]):
        y = form(*small, decay)
        assert y.dtype == "float32"
        assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    if form is not parallel_retention:
        assert form(*small, xp.asarray([0.9, 0.8]), state=())[1].memory.dtype == "float32"
    assert form(*small, np.float64(0.9)).dtype == "float32"
    close_to_one = xp.asarray([1.0 - 2.0**-30])  # which is 1 in float32, and not its logarithm
    assert float(host(form(*[xp.ones((2, 1), "float32")] * 3, close_to_one))[1, 0]) == 2.0
    ones = xp.ones((1200, 1), "float16")
    y = form(ones * 1e-3, ones * 8, ones * 8, 1.0)
    assert y.dtype == "float16"
    assert_close(y[-1].astype("float64"), 76.8, rtol=2e-3)  # of a sum of 76,800


@pytest.mark.parametrize("form", FORMS)
def test_heads_that_are_not_there_are_asked_for(xp: Any, form: Any) -> None:
    """One head of keys for several of queries is refused, with the shapes that came in."""
    q, k, v, _ = problem(10, 5)
    for causal, query in ((True, q), (False, q[..., -1:, :])):
        shapes = rf"\(2, 2, {query.shape[-2]}, 3\), \(2, 1, 5, 3\) and \(2, 1, 5, 2\)"
        with pytest.raises(ValueError, match=shapes):
            form(query, k[:, :1], v[:, :1], 0.9, causal)


def test_refusals_and_edges(xp: Any) -> None:
    q, k, v, _ = problem(10, 5)
    for decay in (0.0, 1.5, -0.1, [], [0.9, 2.0]):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            retention(q, k, v, decay)
    with pytest.raises(ValueError, match="one for each of 2 heads"):
        retention(q, k, v, [0.9] * 3)
    with pytest.raises(ValueError, match="recurrence"):
        retention(q, k, v, is_causal=False)
    with pytest.raises(ValueError, match="query for each key"):
        retention_scores(q[..., :3, :], k)
    with pytest.raises(ValueError, match="at least one head"):
        retention_log_decays(0)
    for form in FORMS:
        assert form(q[..., :0, :], k[..., :0, :], v[..., :0, :]).shape == (2, 2, 0, 2)
        for dtype in ("float32", "float64"):
            assert form(*(x.astype(dtype) for x in (q, k, v))).dtype == dtype


# Rotation


def test_the_angles_are_the_papers_code_not_rope(xp: Any) -> None:
    angles = retention_angles(8)
    assert angles[0] == 1.0 and math.isclose(angles[-1], 1e-4)
    assert_close(np.array(angles), 10000.0 ** -np.linspace(0, 1, 4), rtol=1e-14)
    rope = 10000.0 ** (-2 * np.arange(4) / 8)
    assert not np.allclose(angles, rope, rtol=0.1)
    assert retention_angles(2) == [1.0]
    for d in (0, 3):
        with pytest.raises(ValueError, match="even"):
            retention_angles(d)


@given(st.integers(0, 2**32), st.integers(0, 500))
def test_rotation_is_relative(xp: Any, seed: int, start: int) -> None:
    """Scalar products are those of complex numbers times e^{i(n − m)θ}, wherever one starts."""
    q, k = drawn(seed, (6, 8), (6, 8))
    pairs = [host(x)[:, ::2] + 1j * host(x)[:, 1::2] for x in (q, k)]
    distance = np.arange(6)[:, None, None] - np.arange(6)[:, None]
    turn = np.exp(1j * distance * np.array(retention_angles(8)))
    wanted = (pairs[0][:, None] * turn * pairs[1].conj()).real.sum(axis=-1)
    found = rotate_pairs(q, start) @ rotate_pairs(k, start).T
    assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    norms = [(host(x) ** 2).sum(axis=-1) for x in (q, rotate_pairs(q, start))]
    assert_close(norms[0], norms[1], rtol=1e-12)
    back = rotate_pairs(rotate_pairs(q, start), -start, -1)
    assert_close(back, q, rtol=1e-10, atol=1e-11)


def test_rotation_far_into_a_text_in_float32(xp: Any) -> None:
    """Float32 cannot count to 2²⁴ + 1, nor has it digits for such angles: float64 has."""
    x = xp.asarray([[1.0, 0.0]]).astype("float32")
    start = 2**24
    y = rotate_pairs(xp.concatenate([x, x], axis=0), start)
    assert y.dtype == "float32"
    wanted = np.array([[math.cos(n), math.sin(n)] for n in (start, start + 1)], "float32")
    assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    check_grads(lambda x: rotate_pairs(x, 3), drawn(11, (2, 3, 4))[0])


# The layer


@given(n=st.integers(1, 20), t=st.integers(0, 20), value_dim=st.sampled_from([4, 12]))
def test_the_layer_and_its_state(xp: Any, n: int, t: int, value_dim: int) -> None:
    """In two parts and token by token it gives what one pass gives; the state does not grow."""
    layer = MultiScaleRetention(8, value_dim, 2, rng=Rng(n)).astype("float64")
    (x,) = drawn(n, (2, n, 8))
    y, end = layer(x, ())
    assert_close(layer(x), y, rtol=1e-12, atol=1e-14)
    t = min(t, n)
    first, state = layer(x[:, :t], ())
    rest, last = layer(x[:, t:], state)
    assert_close(ops.concatenate([first, rest], axis=1), y, rtol=1e-8, atol=1e-10)
    assert_close(last.memory, end.memory, rtol=1e-9, atol=1e-11)
    state, outputs = (), []
    for i in range(n):
        out, state = layer(x[:, i : i + 1], state)
        outputs.append(out)
        assert state.memory.shape == (2, 2, 4, value_dim // 2)
    assert_close(ops.concatenate(outputs, axis=1), y, rtol=1e-8, atol=1e-10)


def test_a_state_that_is_not_turned_is_wrong(xp: Any) -> None:
    """The planted bug: counting from 0 again with the state as it was."""
    layer = MultiScaleRetention(8, 8, 2, rng=Rng(0)).astype("float64")
    (x,) = drawn(12, (1, 9, 8))
    y = layer(x)
    _, (memory,) = layer(x[:, :5], ())
    turned_back = ops.matrix_transpose(rotate_pairs(ops.matrix_transpose(memory), 5, 0))
    planted, _ = layer(x[:, 5:], (turned_back,))
    assert abs(host(planted) - host(y)[:, 5:]).max() > 1e-3


def test_the_layer_is_its_equation(xp: Any) -> None:
    """(swish(X W_G) ∘ GroupNorm_h(heads)) W_O, each head by its n × n matrix."""
    layer = MultiScaleRetention(12, 18, 3, rng=Rng(1)).astype("float64")
    (x,) = drawn(13, (2, 7, 12))
    p = {name: host(w).T for name, w in layer.state_dict().items()}
    assert [*p] == [f"{name}_proj.weight" for name in ("q", "k", "v", "g", "out")]
    heads = []
    for h in range(3):
        q = rotate_pairs(xp.asarray(host(x) @ p["q_proj.weight"][:, 4 * h : 4 * h + 4]))
        k = rotate_pairs(xp.asarray(host(x) @ p["k_proj.weight"][:, 4 * h : 4 * h + 4] / 2))
        v = host(x) @ p["v_proj.weight"][:, 6 * h : 6 * h + 6]
        i = np.arange(7)
        d = np.where(i[:, None] >= i, (1 - 2.0 ** (-5 - h)) ** abs(i[:, None] - i), 0.0)
        heads.append((host(q) @ host(k).swapaxes(-1, -2) * d) @ v)
    rows = xp.asarray(np.concatenate(heads, axis=-1).reshape(14, 18))
    normed = host(F.group_norm(rows, 3)).reshape(2, 7, 18)
    gate = host(x) @ p["g_proj.weight"]
    wanted = (gate / (1 + np.exp(-gate)) * normed) @ p["out_proj.weight"]
    assert_close(layer(x), wanted, rtol=1e-9, atol=1e-11)


def test_causality_pads_and_gradients_of_the_layer(xp: Any) -> None:
    layer = MultiScaleRetention(4, 4, 2, rng=Rng(2)).astype("float64")
    (x,) = drawn(14, (1, 6, 4))
    leaf = Tensor(x, requires_grad=True)
    (g,) = grad(ops.sum(layer(leaf)[:, 2]), leaf)
    assert (host(g)[:, 3:] == 0).all() and (host(g)[:, :3] != 0).any()
    padded = xp.concatenate([9.0 + 0.0 * x[:, :2], x], axis=1)
    mask = xp.asarray(np.arange(8)[None] >= 2)
    assert_close(layer(padded, key_mask=mask)[:, 2:], layer(x), rtol=1e-9, atol=1e-11)
    assert abs(host(layer(padded))[:, 2:] - host(layer(x))).max() > 1e-4
    check_grads(layer, x, dtypes=("float64",))
    assert MultiScaleRetention(4, 4, 2)(x.astype("float32")).dtype == "float32"
    for sizes in ((6, 4, 2), (4, 5, 2), (4, 4, 0)):
        with pytest.raises(ValueError, match="even length"):
            MultiScaleRetention(*sizes)


def test_pads_of_the_layer_have_no_position(xp: Any) -> None:
    """Before, between and after the tokens, also in a text that goes on: as without them."""
    layer = MultiScaleRetention(8, 8, 2, rng=Rng(3)).astype("float64")
    (x,) = drawn(15, (2, 10, 8))
    real = np.array([[0, 0, 1, 1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 0, 1, 1, 1, 1, 0]], bool)
    for row in range(2):
        at = xp.asarray(np.flatnonzero(real[row]))
        wanted, end = layer(x[row][at], ())
        mask = xp.asarray(real[row])
        y, state = layer(x[row], (), mask)
        assert_close(y[at], wanted, rtol=1e-8, atol=1e-10)
        assert_close(state.memory, end.memory, rtol=1e-8, atol=1e-10)
        first, state = layer(x[row][:6], (), mask[:6])
        rest, state = layer(x[row][6:], state, mask[6:])
        assert_close(ops.concatenate([first, rest], axis=0)[at], wanted, rtol=1e-8, atol=1e-10)
        assert_close(state.memory, end.memory, rtol=1e-8, atol=1e-10)
        assert_close(layer(x, key_mask=xp.asarray(real))[row][at], wanted, rtol=1e-8, atol=1e-10)
    for wrong in (mask[:5], mask[None, None]):
        with pytest.raises(ValueError, match="key_mask"):
            layer(x, key_mask=wrong)


def test_the_layer_starts_with_xaviers_law(xp: Any) -> None:
    """Deviations gain · √(2 / (64 + 64)): 4,096 numbers, so within 2 % but for 1 in 10¹²."""
    layer = MultiScaleRetention(64, 64, 2, rng=Rng(4))
    gains = {"q_proj": 2**-2.5, "k_proj": 2**-2.5, "v_proj": 2**-2.5, "g_proj": 2**-2.5}
    for name, gain in {**gains, "out_proj": 0.5}.items():
        weight = host(getattr(layer, name).weight)
        assert_close(float(weight.std()), gain / 8, rtol=0.05)
        assert abs(weight).max() <= gain / 8 * math.sqrt(3) + 1e-7


# TransNormer


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 40), st.floats(0.01, 100.0))
def test_norm_attention(xp: Any, seed: int, n: int, t: int, scale: float) -> None:
    """RMSNorm of (Q Kᵀ ∘ M) V, which knows no scale of q; the last row sees what all see."""
    q, k, v, _ = problem(seed, n, 3, 4)
    (w,) = drawn(seed + 1, (4,))
    scores = host(q) @ host(k).swapaxes(-1, -2)
    for causal in (False, True):
        y = (np.tril(scores) if causal else scores) @ host(v)
        wanted = y / np.sqrt((y * y).mean(axis=-1, keepdims=True)) * host(w)
        found = norm_attention(q, k, v, w, 0.0, causal)
        assert_close(found, wanted, rtol=1e-7, atol=1e-9)
        assert_close(norm_attention(scale * q, k, v, w, 0.0, causal), found, rtol=1e-7, atol=1e-9)
    whole = norm_attention(q, k, v)
    assert_close(whole[..., -1, :], norm_attention(q, k, v, is_causal=True)[..., -1, :], 1e-8, 1e-9)
    assert_close(norm_attention(q[..., -1:, :], k, v), whole[..., -1:, :], rtol=1e-8, atol=1e-9)
    t = min(t, n)
    parts = [[x[..., at, :] for x in (q, k, v)] for at in (slice(0, t), slice(t, None))]
    first, state = norm_attention(*parts[0], is_causal=True, state=())
    rest, _ = norm_attention(*parts[1], is_causal=True, state=state)
    both = xp.concatenate([first, rest], axis=-2)
    assert_close(both, norm_attention(q, k, v, is_causal=True), rtol=1e-8, atol=1e-9)


def test_norm_attention_where_a_denominator_is_zero(xp: Any) -> None:
    """q k₁ + q k₂ = 0: the mean is 0 / 0 or enormous, this is of size 1, with bounded gradients."""
    q, k = xp.asarray([[1.0, 0.0]]), xp.asarray([[1.0, 0.3], [-1.0, 0.5]])
    v = xp.asarray([[1.0, 2.0], [3.0, -1.0]])
    scores = host(q) @ host(k).T
    assert scores.sum() == 0
    leaves = [Tensor(x, requires_grad=True) for x in (q, k, v)]
    y = norm_attention(*leaves)
    assert_close((host(y) ** 2).mean(axis=-1), np.ones(1), rtol=1e-5)
    assert all(abs(host(g)).max() < 10 for g in grad(ops.sum(y), leaves))
    nothing = norm_attention(0.0 * q, k, v)
    assert (host(nothing) == 0).all()
    for causal in (False, True):
        square = xp.concatenate([q, 2.0 * q + 1.0], axis=0)
        check_grads(lambda *xs, causal=causal: norm_attention(*xs, 1.0 + v[0], 1e-6, causal),
                    square, k, v, dtypes=("float64",))  # fmt: skip
    with pytest.raises(ValueError, match="is_causal=True"):
        norm_attention(q, k, v, state=())


@pytest.mark.parametrize("causal", [False, True])
def test_norm_attention_in_half_precision(xp: Any, causal: bool) -> None:
    """The sum that is normalised, 8³ · 3,000 · 2, is beyond float16; the result is 1."""
    ones = xp.full((3000, 2), 8.0, "float16")
    y = norm_attention(ones, ones, ones, is_causal=causal)
    assert y.dtype == "float16"
    assert_close(y[-1], xp.ones(2, "float16"))
    single = [x.astype("float32") for x in (ones[:4], ones[:4], ones[:4])]
    y = norm_attention(*single, xp.ones(2), np.float64(1e-6), causal)
    assert y.dtype == "float32"


# Goldens


def test_flash_linear_attention(xp: Any) -> None:
    """Their naive_retention scales q by 1/√d and computes in float32."""
    assert "fla-org/flash-linear-attention" in json.loads(METADATA["commits"])
    q, k, v = (xp.asarray(GOLDEN[f"retention.in.{name}"]) for name in "qkv")
    for form in FORMS:
        y = form(q * q.shape[-1] ** -0.5, k, v)
        assert_close(y, GOLDEN["retention.out"], rtol=1e-5, atol=2e-6)
        assert abs(host(form(q, k, v)) - GOLDEN["retention.out"]).max() > 0.1


def test_torchscales_positions(xp: Any) -> None:
    """Angles, decays and D of RetNetRelPos, whose decays are float32."""
    d, heads, n = 4, 3, GOLDEN["relpos.sin"].shape[0]
    assert_close(np.repeat(retention_angles(d), 2), GOLDEN["relpos.angle"], rtol=1e-14)
    logs = GOLDEN["relpos.log_decay"].astype("float64")
    assert_close(np.array(retention_log_decays(heads)), logs, rtol=1e-6)
    ones = xp.ones((heads, n, 1))
    mask = host(retention_scores(ones, ones))
    mask = mask / np.sqrt(mask.sum(axis=-1, keepdims=True))
    assert_close(mask, GOLDEN["relpos.mask"].astype("float64"), rtol=1e-5, atol=1e-7)
    unit = xp.asarray(np.tile([1.0, 0.0], (n, d // 2)))
    turned = host(rotate_pairs(unit))
    assert_close(turned[:, ::2], GOLDEN["relpos.cos"][:, ::2], rtol=1e-12, atol=1e-13)
    assert_close(turned[:, 1::2], GOLDEN["relpos.sin"][:, ::2], rtol=1e-12, atol=1e-13)


def test_torchscales_layer(xp: Any) -> None:
    """Its MultiScaleRetention, which normalises scores and, in float32, heads by RMSNorm."""
    norm = nn.RMSNorm(6, eps=1e-12, elementwise_affine=False)
    layer = MultiScaleRetention(12, 18, 3, norm, rng=Rng(0)).astype("float64")
    prefix = "msr.state."
    layer.load_state_dict(
        {name[len(prefix) :]: a for name, a in GOLDEN.items() if name.startswith(prefix)}
    )
    x = Tensor(xp.asarray(GOLDEN["msr.in.x"]), requires_grad=True)
    y = layer(x)
    assert_close(y, GOLDEN["msr.out"], rtol=1e-5, atol=1e-6)
    wave = np.cos(0.7 * np.arange(y.size) + 0.3).reshape(y.shape)
    (g,) = grad(y, x, xp.asarray(wave))
    scale = abs(GOLDEN["msr.grad.x"]).max()
    assert_close(g, GOLDEN["msr.grad.x"], rtol=1e-4, atol=1e-5 * float(scale))
