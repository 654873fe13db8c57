"""Longformer against loops and against transformers; pads, causality, and what it costs."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import (
    LongformerSelfAttention,
    local_attention,
    longformer_attention,
    sliding_window_mask,
    sparse,
)
from mini_nn.check import check_grads
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_sparse.safetensors", framework="np"
) as _file:
    GOLDEN = {name[11:]: _file.get_tensor(name) for name in [*_file.keys()] if name[0] == "l"}


def normal(seed: int, *shape: int) -> Any:
    return Rng(seed).normal(shape, dtype="float64")


def six(seed: int, n: int, m: int, lead: tuple[int, ...] = (2, 3)) -> list[Any]:
    """query, key, value and the same for global tokens."""
    return [
        normal(seed + s, *lead, length, width)
        for s, (length, width) in enumerate([(n, 3), (m, 3), (m, 4)] * 2)
    ]


def by_loops(
    arrays: Any, window: int, chosen: Any, is_causal: bool, real: Any, dilation: int
) -> Any:
    """Row by row; the masks are (…, m) of the arrays' leading axes."""
    q, k, v, gq, gk, gv = map(host, arrays)
    n, m = q.shape[-2], k.shape[-2]
    y = np.zeros((*q.shape[:-1], v.shape[-1]))
    for place in np.ndindex(*q.shape[:-2]):
        is_global = chosen[place] & real[place]
        for row in range(n):
            i = m - n + row
            near = {i + dilation * t for t in range(-window, window + 1)}
            keys = [
                j
                for j in range(m)
                if real[place][j]
                and (j <= i or not is_causal)
                and (is_global[i] or is_global[j] or j in near)
            ]
            if keys:
                queries, others, values = (gq, gk, gv) if is_global[i] else (q, k, v)
                s = others[place][keys] @ queries[place][row] / np.sqrt(q.shape[-1])
                weights = np.exp(s - s.max())
                y[place][row] = weights @ values[place][keys] / weights.sum()
    return y


@given(
    st.tuples(st.integers(1, 9), st.integers(0, 5)),
    st.integers(0, 4),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 999),
)
def test_against_loops(
    xp: Any, lengths: Any, window: int, dilation: int, is_causal: bool, seed: int
) -> None:
    """Global tokens and pads that differ from text to text, none or all of them too."""
    n, m = lengths[0], sum(lengths)
    arrays = six(seed, n, m)
    rate = (seed % 5) / 4
    chosen = Rng(seed).bernoulli(rate, (2, 1, m))
    real = Rng(seed + 1).bernoulli(0.8, (2, 1, m))
    args = (*arrays[:3], window, chosen, *arrays[3:], is_causal, real, dilation)
    masks = [np.broadcast_to(host(x), (2, 3, m)) for x in (chosen, real)]
    want = by_loops(arrays, window, masks[0], is_causal, masks[1], dilation)
    assert_close(longformer_attention(*args), want, rtol=1e-11, atol=1e-12)


def test_long_against_the_dense_mask(xp: Any) -> None:
    """More than one block; without projections of its own a global row is one of the matrix."""
    q, k, v = six(0, 150, 150)[:3]
    chosen = Rng(0).bernoulli(0.03, (2, 1, 150))
    dense = sliding_window_mask(150, 5, 2, chosen)
    want = ops.scaled_dot_product_attention(q, k, v, dense)
    got = longformer_attention(q, k, v, 5, chosen, dilation=2)
    assert_close(got, want, rtol=1e-11, atol=1e-12)


# Limits


@pytest.mark.parametrize("is_causal", [False, True])
def test_limits(xp: Any, is_causal: bool) -> None:
    """A window over all is full attention; so are global tokens only, with their projections."""
    q, k, v, gq, gk, gv = six(0, 7, 7)
    full = ops.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    for window in (6, 7, 50):
        got = longformer_attention(q, k, v, window, is_causal=is_causal)
        assert_close(got, full, rtol=1e-12)
        none = xp.zeros(7, "bool")
        got = longformer_attention(q, k, v, window, none, gq, gk, gv, is_causal)
        assert_close(got, full, rtol=1e-12)
    every = xp.ones(7, "bool")
    got = longformer_attention(q, k, v, 1, every, gq, gk, gv, is_causal)
    want = ops.scaled_dot_product_attention(gq, gk, gv, is_causal=is_causal)
    assert_close(got, want, rtol=1e-12)
    got = longformer_attention(q, k, v, 2, is_causal=is_causal)
    assert_close(got, local_attention(q, k, v, 2, is_causal), rtol=1e-12)


def test_a_dilation_for_each_head(xp: Any) -> None:
    arrays = six(0, 20, 20)
    chosen = Rng(3).bernoulli(0.1, (2, 1, 20))
    real = Rng(4).bernoulli(0.9, (2, 3, 20))
    got = longformer_attention(
        *arrays[:3], 2, chosen, *arrays[3:], key_mask=real, dilation=(1, 4, 2)
    )
    for h, dilation in enumerate((1, 4, 2)):
        mine = [x[:, h] for x in arrays]
        want = longformer_attention(
            *mine[:3], 2, chosen[:, 0], *mine[3:], key_mask=real[:, h], dilation=dilation
        )
        assert_close(got[:, h], want, rtol=1e-12)


def test_a_global_token_in_the_window_counts_once(xp: Any) -> None:
    """The classic bug, planted: global columns are added and not taken out of the window."""
    q, k, v = six(0, 9, 9)[:3]
    chosen = xp.arange(9) == 4
    past = sparse.joined(q, k, v, False, None, None)
    allowed = xp.ones((1, 1), "bool")
    column = sparse.Part(k[..., 4:5, :], v[..., 4:5, :], allowed, lambda x: x, lambda y: y)
    want = host(longformer_attention(q, k, v, 2, chosen))
    local = host(~chosen)
    once = past._replace(seen=~chosen)
    for where, right in ((once, True), (past, False)):
        got = host(sparse.attend(q, [sparse.window_part(9, where, 2, False), column]))
        assert np.allclose(got[..., local, :], want[..., local, :], rtol=1e-12) == right


# Causality, pads, edges


def leak(xp: Any, is_causal: bool, chosen: Any) -> tuple[float, float]:
    """How much outputs before 6 change with what comes from 6 on, and their gradient there."""
    arrays = six(0, 11, 11, (2,))
    changed = [
        xp.concatenate([x[:, :6], x[:, 6:] + normal(9, 2, 5, x.shape[-1])], axis=1) for x in arrays
    ]

    def call(*x: Any) -> Any:
        return longformer_attention(*x[:3], 2, chosen, *x[3:], is_causal)

    moved = abs(host(call(*changed)) - host(call(*arrays)))[:, :6].max()
    leaves = [Tensor(x, requires_grad=True) for x in arrays]
    y = call(*leaves)[:, :6]
    grads = grad((y * y).sum(), leaves)
    return float(moved), max(float(abs(host(g)[:, 6:]).max()) for g in grads)


def test_causality(xp: Any) -> None:
    """Also with global tokens on both sides; without is_causal the same measure sees the leak."""
    chosen = (xp.arange(11) == 3) | (xp.arange(11) == 8)
    moved, slope = leak(xp, True, chosen)
    assert moved <= 1e-12 and slope == 0.0
    moved, slope = leak(xp, False, chosen)
    assert moved > 1e-2 and slope > 1e-2


def test_pads_change_nothing(xp: Any) -> None:
    """Nor do global tokens among them."""
    arrays = six(0, 12, 12)
    chosen = (xp.arange(12) % 4) == 1
    real = xp.arange(12) < 8
    got = longformer_attention(*arrays[:3], 2, chosen, *arrays[3:], key_mask=real)
    short = [x[..., :8, :] for x in arrays]
    want = longformer_attention(*short[:3], 2, chosen[:8], *short[3:])
    assert_close(got[..., :8, :], want, rtol=1e-12)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("is_causal", [False, True])
def test_pads_may_hold_nan(xp: Any, is_causal: bool, own: bool) -> None:
    """Neither in windows nor in global rows, with keys and values of their own or without."""
    arrays = six(0, 12, 12)[: 6 if own else 3]
    chosen, real = (xp.arange(12) % 4) == 1, Rng(3).bernoulli(0.6, (2, 3, 12))

    def call(*x: Any) -> Any:
        return longformer_attention(
            *x[:3], 2, chosen, *(x[3:] or (None,) * 3), is_causal=is_causal, key_mask=real
        )

    dirty = [xp.where(real[..., None], x, float("nan")) for x in arrays]
    dirty[::3] = arrays[::3]  # not the queries
    leaves = [Tensor(x, requires_grad=True) for x in dirty]
    y = call(*leaves)
    assert_close(y, call(*arrays), rtol=1e-12)
    for i, g in enumerate(grad((y * y).sum(), leaves)):
        assert np.isfinite(host(g)).all()
        assert i % 3 == 0 or not host(g)[~host(real)].any()


@pytest.mark.parametrize("dilation", [1, np.int64(2), (1, 2, 3)])
def test_masks_and_keys_that_broadcast(xp: Any, dilation: Any) -> None:
    """Masks (…, 1) are of all tokens; a head of keys serves three of queries, dilated or not."""
    q, k, v, gq, gk, gv = six(0, 9, 9)
    chosen = Rng(1).bernoulli(0.3, (2, 1, 9))
    shared = [x[:, :1] for x in (k, v, gk, gv)]
    every = [xp.broadcast_to(x, (2, 3, *x.shape[2:])) for x in shared]
    got, want = (
        longformer_attention(q, *x[:2], 2, chosen, gq, *x[2:], dilation=dilation)
        for x in (shared, every)
    )
    assert_close(got, want, rtol=1e-12)
    real = xp.asarray([True, False])[:, None, None]  # of a whole text
    some = longformer_attention(q, k, v, 2, chosen, key_mask=real, dilation=dilation)
    full = longformer_attention(q, k, v, 2, chosen, dilation=dilation)
    assert_close(some[0], full[0], rtol=1e-12)
    assert not host(some[1]).any()
    got, want = (
        longformer_attention(q, k, v, 2, xp.ones(n, "bool"), dilation=dilation) for n in (1, 9)
    )
    assert_close(got, want, rtol=1e-12)


def test_float16_is_summed_in_float32(xp: Any) -> None:
    """900 keys alike, in a window, and in global rows and columns: 900 · 100 is beyond float16."""
    x, v = xp.ones((900, 2), "float16"), xp.full((900, 1), 100.0, "float16")
    for chosen in (None, xp.arange(900) % 2 == 0):
        y = longformer_attention(x, x, v, 900, chosen)
        assert y.dtype == "float16"
        assert_close(y, v)


def test_nothing_to_see(xp: Any) -> None:
    leaves = [Tensor(x, requires_grad=True) for x in six(0, 6, 6)]
    nothing, chosen = xp.zeros(6, "bool"), xp.arange(6) == 2
    y = longformer_attention(*leaves[:3], 1, chosen, *leaves[3:], key_mask=nothing)
    assert not host(y).any()
    grads = grad(y.sum() + sum((x * 0.0).sum() for x in leaves), leaves)
    assert all(not host(g).any() for g in grads)


def test_gradients(xp: Any) -> None:
    arrays = [normal(s, 4, 1 + s % 2) for s in (1, 3, 2, 5, 7, 4)]
    chosen = xp.arange(4) % 3 == 1
    for is_causal in (False, True):
        check_grads(
            lambda q, k, v, gq, gk, gv, c=is_causal: longformer_attention(
                q, k, v, 1, chosen, gq, gk, gv, c
            ),
            *arrays,
        )


def test_gradients_are_the_dense_ones(xp: Any) -> None:
    """Of many positions, where scattering takes another way."""
    q, k, v = six(0, 150, 150)[:3]
    chosen = Rng(0).bernoulli(0.1, (2, 1, 150))
    found = []
    for call in (
        lambda q, k, v: longformer_attention(q, k, v, 5, chosen),
        lambda q, k, v: ops.scaled_dot_product_attention(
            q, k, v, sliding_window_mask(150, 5, 1, chosen)
        ),
    ):
        leaves = [Tensor(x, requires_grad=True) for x in (q, k, v)]
        found.append(grad((call(*leaves) * normal(4, 2, 3, 150, 4)).sum(), leaves))
    for ours, want in zip(*found, strict=True):
        assert_close(ours, want, rtol=1e-10, atol=1e-12)


def test_memory(xp: Any, backend_name: str) -> None:
    """n = 4096 with 4 global tokens, forward and backward: an n × n array would be 64 MiB."""
    if backend_name == "cupy":
        pytest.skip("tracemalloc does not see the memory of a device")
    leaves = [Tensor(Rng(s).normal((4096, 8)), requires_grad=True) for s in range(3)]
    chosen = xp.arange(4096) % 1024 == 5
    tracemalloc.start()
    try:
        grad(longformer_attention(*leaves, 16, chosen).sum(), leaves)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 4096**2 / 4


# The module


@pytest.mark.parametrize("case", ["window", "pads", "globals", "both", "one"])
def test_transformers(xp: Any, case: str) -> None:
    """Outputs and gradients of transformers' layer with the same weights.

    Both are float32; the gradients of weights are sums of 24 tokens.
    """
    module = LongformerSelfAttention(8, 2, 4)
    state = {k.removeprefix("state."): a for k, a in GOLDEN.items() if k.startswith("state.")}
    module.load_state_dict(state)
    part = {k.removeprefix(f"{case}."): a for k, a in GOLDEN.items() if k.startswith(f"{case}.")}
    x = Tensor(xp.asarray(part["x"]), requires_grad=True)
    y = module(x, xp.asarray(part["key_mask"]), xp.asarray(part["global_mask"]))
    assert_close(y, part["out"], rtol=1e-5, atol=1e-5)
    assert not host(y)[~part["key_mask"]].any()
    wave = np.cos(0.7 * np.arange(y.size) + 0.3).reshape(y.shape).astype("float32")
    names = [name for name, _ in module.named_parameters() if f"grad.state.{name}" in part]
    weights = [p for name, p in module.named_parameters() if name in names]
    assert len(names) == (12 if part["global_mask"].any() else 6)
    first, *others = grad((y * xp.asarray(wave)).sum(), [x, *weights])
    assert_close(first, part["grad.x"], rtol=1e-4, atol=1e-4)
    for name, g in zip(names, others, strict=True):
        assert_close(g, part[f"grad.state.{name}"], rtol=1e-4, atol=1e-4)


def test_the_module(xp: Any) -> None:
    """Names, and the start of the global projections; any n, and each head its dilation."""
    module = LongformerSelfAttention(6, 3, 2, dilation=(1, 2, 1), rng=Rng(0))
    layers = ("query", "key", "value", "query_global", "key_global", "value_global")
    want = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert [*module.state_dict()] == want
    for layer in layers[:3]:
        mine, other = getattr(module, layer), getattr(module, f"{layer}_global")
        assert_close(mine.weight, other.weight, atol=0.0)
        assert_close(mine.bias, other.bias, atol=0.0)
        assert mine.weight.data is not other.weight.data
    x = Rng(1).normal((2, 7, 6))
    chosen = xp.zeros((2, 7), "bool")
    assert_close(module(x, global_mask=chosen), module(x), rtol=1e-6, atol=1e-7)
    assert "attention_window=2" in repr(module)
    plain = LongformerSelfAttention(6, 3, 2, rng=Rng(0))  # with the same weights
    moved = abs(host(module(x)) - host(plain(x))).max(axis=(0, 1))
    assert moved[2:4].min() > 1e-4 and moved[[0, 1, 4, 5]].max() < 1e-6  # the second head alone


def test_refuses(xp: Any) -> None:
    q, k, v = six(0, 5, 5)[:3]
    for error, use, message in (
        (ValueError, lambda: longformer_attention(q, k, v, -1), "window ≥ 0"),
        (ValueError, lambda: longformer_attention(q, k, v, 1, dilation=0), "dilation ≥ 1"),
        (ValueError, lambda: longformer_attention(q, k, v, 1, dilation=(1, 2)), "one for each"),
        (TypeError, lambda: longformer_attention(q, k, v, 1, xp.ones(5)), "global_mask has bool"),
        (TypeError, lambda: longformer_attention(q, k, v, 1, key_mask=xp.ones(5)), "key_mask has"),
        (ValueError, lambda: longformer_attention(q, k, v, 1, xp.ones(4, "bool")), "to broadcast"),
        (
            ValueError,
            lambda: longformer_attention(
                q, k, v, 1, key_mask=xp.ones((2, 4, 5), "bool"), dilation=(1, 2, 1)
            ),
            "key_mask has to broadcast",
        ),
        (ValueError, lambda: longformer_attention(q, k[..., :4, :], v[..., :4, :], 1), "last n"),
        (ValueError, lambda: LongformerSelfAttention(6, 4, 2), "do not divide"),
        (ValueError, lambda: LongformerSelfAttention(6, 2, 3), "even and positive"),
        (ValueError, lambda: LongformerSelfAttention(6, 2, 0), "even and positive"),
    ):
        with pytest.raises(error, match=message):
            use()
