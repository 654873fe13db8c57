"""Sparse attention without the matrix against the same with it, in pieces, and its memory."""

from __future__ import annotations

import functools
import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import (
    atrous_attention,
    atrous_mask,
    fixed_attention,
    fixed_mask,
    local_attention,
    local_mask,
    longformer_attention,
    sliding_window_mask,
    sparse,
    strided_attention,
    strided_mask,
    topk_attention,
)
from mini_nn.check import check_grads
from models.gpt import GPT, Block, GPTConfig
from tests.support import assert_close, host

Pair = tuple[Callable[..., Any], Callable[..., Any]]

KINDS: dict[str, tuple[Pair, list[tuple[int, ...]]]] = {
    "local": ((local_attention, local_mask), [(0,), (1,), (3,), (50,)]),
    "atrous": ((atrous_attention, atrous_mask), [(1,), (2,), (5,), (50,)]),
    "strided": ((strided_attention, strided_mask), [(0, 4), (2, 3), (4, 4), (7, 2), (50, 3)]),
    "fixed": ((fixed_attention, fixed_mask), [(1, 1), (4, 1), (5, 2), (3, 3), (50, 2)]),
}
CASES = [(*pair, sizes) for pair, every in KINDS.values() for sizes in every]
ONE_EACH = [
    (local_attention, local_mask, (2,)),
    (atrous_attention, atrous_mask, (3,)),
    (strided_attention, strided_mask, (2, 3)),
    (fixed_attention, fixed_mask, (4, 2)),
]
each = pytest.mark.parametrize(("attention", "mask", "sizes"), ONE_EACH)


def normal(seed: int, *shape: int) -> Any:
    return Rng(seed).normal(shape, dtype="float64")


def arrays(seed: int, n: int, m: int, lead: tuple[int, ...] = (2,)) -> tuple[Any, Any, Any]:
    return (
        normal(seed, *lead, n, 3),
        normal(seed + 1, *lead, m, 3),
        normal(seed + 2, *lead, m, 4),
    )


# With the matrix


@given(st.sampled_from(CASES), st.integers(0, 45), st.integers(0, 20), st.booleans())
def test_against_the_dense_mask(xp: Any, case: Any, n: int, more: int, is_causal: bool) -> None:
    """Whatever n is, divisible or not, also for n = 0 and for fewer queries than keys."""
    attention, mask, sizes = case
    q, k, v = arrays(n, n, n + more)
    dense = mask(n, *sizes, is_causal=is_causal, m=n + more)
    want = ops.scaled_dot_product_attention(q, k, v, dense)
    got = attention(q, k, v, *sizes, is_causal=is_causal)
    assert_close(got, want, rtol=1e-11, atol=1e-12)


@given(st.sampled_from(CASES), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_pads(xp: Any, case: Any, n: int, is_causal: bool, seed: int) -> None:
    """As with a mask of pads, which differ from text to text; rows of pads only are zeros."""
    attention, mask, sizes = case
    q, k, v = arrays(seed, n, n, (2, 3))
    real = Rng(seed).bernoulli(0.6, (2, 1, n))
    dense = mask(n, *sizes, is_causal=is_causal) & real[..., None, :]
    want = ops.scaled_dot_product_attention(q, k, v, dense)
    got = attention(q, k, v, *sizes, is_causal=is_causal, key_mask=real)
    assert_close(got, want, rtol=1e-11, atol=1e-12)
    noise = xp.where(real[..., None], 0.0, 100.0)
    again = attention(q, k + noise, v + noise, *sizes, is_causal=is_causal, key_mask=real)
    assert_close(again, got, atol=0.0, rtol=1e-14)


@each
@pytest.mark.parametrize("shape", [(9,), (1,), (1, 1), (2, 1), (1, 9)])
def test_masks_that_broadcast(xp: Any, attention: Any, mask: Any, sizes: Any, shape: Any) -> None:
    """A mask (…, 1) is of all keys: written out it hides the same, and in a state as well."""
    q, k, v = arrays(0, 9, 9)
    real = Rng(4).bernoulli(0.5, shape)
    written = xp.broadcast_to(real, (2, 9))
    got, want = (attention(q, k, v, *sizes, key_mask=x) for x in (real, written))
    assert_close(got, want, rtol=0.0)
    causal: Any = {"is_causal": True, "state": ()}
    (got, state), (want, other) = (
        attention(q, k, v, *sizes, key_mask=x, **causal) for x in (real, written)
    )
    assert_close(got, want, rtol=0.0)
    assert np.array_equal(host(state.seen), host(other.seen))


@each
@pytest.mark.parametrize("is_causal", [False, True])
def test_pads_may_hold_nan(xp: Any, attention: Any, mask: Any, sizes: Any, is_causal: bool) -> None:
    """It reaches neither the result nor a gradient."""
    q, k, v = arrays(0, 40, 40)
    real = Rng(4).bernoulli(0.5, (2, 40))
    want = attention(q, k, v, *sizes, is_causal=is_causal, key_mask=real)
    dirty = [xp.where(real[..., None], x, float("nan")) for x in (k, v)]
    leaves = [Tensor(x, requires_grad=True) for x in (q, *dirty)]
    y = attention(*leaves, *sizes, is_causal=is_causal, key_mask=real)
    assert_close(y, want, rtol=1e-13)
    grads = [host(g) for g in grad(y.sum(), leaves)]
    assert all(np.isfinite(g).all() for g in grads)
    assert not any(g[~host(real)].any() for g in grads[1:])


@each
def test_float16_is_summed_in_float32(xp: Any, attention: Any, mask: Any, sizes: Any) -> None:
    """900 keys alike, in sizes for which all are seen: 900 · 100 is beyond float16."""
    x, v = xp.ones((900, 2), "float16"), xp.full((900, 1), 100.0, "float16")
    full = {local_attention: (900,), atrous_attention: (1,), fixed_attention: (2, 2)}
    y = attention(x, x, v, *full.get(attention, (0, 1)))
    assert y.dtype == "float16"
    assert_close(y, v)


@given(st.integers(0, 6), st.integers(1, 9), st.integers(0, 40), st.integers(0, 9), st.booleans())
def test_dilated_windows(xp: Any, w: int, d: int, n: int, more: int, is_causal: bool) -> None:
    q, k, v = arrays(n, n, n + more)
    dense = sliding_window_mask(n, w, d, None, is_causal, n + more)
    want = ops.scaled_dot_product_attention(q, k, v, dense)
    got = local_attention(q, k, v, w, is_causal, dilation=d)
    assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_limits(xp: Any) -> None:
    """A window over all, every key, and one block are full attention; window 0 gives the value."""
    q, k, v = arrays(0, 9, 9)
    for is_causal in (False, True):
        full = ops.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        for got in (
            local_attention(q, k, v, 8, is_causal),
            atrous_attention(q, k, v, 1, is_causal),
            strided_attention(q, k, v, 0, 1, is_causal),
            strided_attention(q, k, v, 8, 9, is_causal),
            fixed_attention(q, k, v, 9, 1, is_causal),
            fixed_attention(q, k, v, 2, 2, is_causal),
        ):
            assert_close(got, full, rtol=1e-12)
        assert_close(local_attention(q, k, v, 0, is_causal), v, rtol=1e-12)
        assert_close(atrous_attention(q, k, v, 9, is_causal), v, rtol=1e-12)


@each
def test_weights_are_weights(xp: Any, attention: Any, mask: Any, sizes: Any) -> None:
    """Not negative, sum 1, and above 0 exactly where the pattern is: the values are unit rows."""
    q, k, _ = arrays(0, 11, 11)
    weights = host(attention(q, k, xp.broadcast_to(xp.eye(11), (2, 11, 11)), *sizes))
    assert_close(weights.sum(axis=-1), np.ones((2, 11)), rtol=1e-12)
    assert np.array_equal(weights > 0.0, np.broadcast_to(host(mask(11, *sizes)), weights.shape))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_counting_the_overlap_twice_is_caught(xp: Any, kind: str, is_causal: bool) -> None:
    """The classic bug of a union: keys near by that are on the stride, or summaries of one's own
    block, take part in both softmaxes.
    """
    q, k, v = arrays(0, 11, 11)
    past = sparse.joined(q, k, v, is_causal, None, None)
    if kind == "strided":
        near = sparse.window_part(11, past, 2, is_causal)
        parts = [near, sparse._class_part(11, past, 3, is_causal)]
        want = strided_attention(q, k, v, 2, 3, is_causal)
        right = [near, sparse._class_part(11, past, 3, is_causal, beyond=0)]
        assert_close(sparse.attend(q, right), want, rtol=1e-12)  # 2 < 3: only i itself is in both
    else:
        own, rest = sparse._fixed_parts(11, past, 4, 2, is_causal)
        allowed = xp.ones((11, rest.key.shape[-2]), "bool")
        if is_causal:
            last = xp.asarray([2, 3, 6, 7, 10, 11])
            allowed = last <= xp.arange(11)[:, None]
        allowed[:, -1] = False  # position 11 does not exist
        parts = [own, rest._replace(allowed=allowed)]
        want = fixed_attention(q, k, v, 4, 2, is_causal)
    assert abs(host(sparse.attend(q, parts)) - host(want)).max() > 1e-2


# Edges


@each
@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_to_see(xp: Any, attention: Any, mask: Any, sizes: Any, is_causal: bool) -> None:
    """A caller who masks everything gets zeros, and gradients of 0, not nan; so for a row."""
    q, k, v = (Tensor(x, requires_grad=True) for x in arrays(0, 9, 9))
    y = attention(q, k, v, *sizes, is_causal=is_causal, key_mask=xp.zeros(9, "bool"))
    assert not host(y).any()
    assert all(not host(g).any() for g in grad(y.sum(), [q, k, v]))
    y = attention(q, k, v, *sizes, is_causal=is_causal, key_mask=xp.arange(9) == 8)
    assert np.isfinite(host(y)).all()
    grads = grad((y * y).sum(), [q, k, v])
    assert all(np.isfinite(host(g)).all() for g in grads)
    assert host(grads[2])[:, 8].any() and not host(grads[2])[:, :8].any()


@each
def test_large_scores(xp: Any, attention: Any, mask: Any, sizes: Any) -> None:
    """Scores of ±10⁶ and beyond what exp can take, also in float32."""
    q, k, v = arrays(0, 9, 9)
    q, k = 1e3 * q, 1e3 * k
    want = ops.scaled_dot_product_attention(q, k, v, mask(9, *sizes))
    assert_close(attention(q, k, v, *sizes), want, rtol=1e-9)
    single = [Tensor(x.astype("float32"), requires_grad=True) for x in (q, k, v)]
    y = attention(*single, *sizes)
    assert y.dtype == "float32"
    assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert all(np.isfinite(host(g)).all() for g in grad(y.sum(), single))


@each
def test_one_token_and_one_number(xp: Any, attention: Any, mask: Any, sizes: Any) -> None:
    for is_causal in (False, True):
        v = normal(2, 1, 4)
        y = attention(normal(0, 1, 3), normal(1, 1, 3), v, *sizes, is_causal=is_causal)
        assert_close(y, v, rtol=1e-12)
        q, k, v = normal(0, 10, 1), normal(1, 10, 1), normal(2, 10, 1)
        dense = mask(10, *sizes, is_causal=is_causal)
        want = ops.scaled_dot_product_attention(q, k, v, dense)
        assert_close(attention(q, k, v, *sizes, is_causal=is_causal), want, rtol=1e-12)


# Gradients


@each
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(xp: Any, attention: Any, mask: Any, sizes: Any, is_causal: bool) -> None:
    q, k, v = normal(0, 5, 2), normal(1, 7, 2), normal(2, 7, 2)
    check_grads(lambda q, k, v: attention(q, k, v, *sizes, is_causal=is_causal), q, k, v)


@each
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_the_dense_ones(
    xp: Any, attention: Any, mask: Any, sizes: Any, is_causal: bool
) -> None:
    """With pads and more than one block; keys that serve two heads get the sum."""
    q, k, v = (normal(s, *shape) for s, shape in ((0, (2, 70, 3)), (1, (70, 3)), (2, (70, 4))))
    real = xp.arange(70) % 7 != 2
    dense = mask(70, *sizes, is_causal=is_causal) & real
    found = []
    for call in (
        functools.partial(ops.scaled_dot_product_attention, attn_mask=dense),
        lambda q, k, v: attention(q, k, v, *sizes, is_causal=is_causal, key_mask=real),
    ):
        leaves = [Tensor(x, requires_grad=True) for x in (q, k, v)]
        y = call(*leaves)
        found.append(grad((y * normal(4, 2, 70, 4)).sum(), leaves))
    for ours, want in zip(found[1], found[0], strict=True):
        assert_close(ours, want, rtol=1e-10, atol=1e-12)


# Causality


def leak(xp: Any, call: Callable[..., Any], n: int, t: int) -> tuple[float, float]:
    """How much outputs before t change with what comes from t on, and their gradient there."""
    q, k, v = arrays(0, n, n)
    changed = [
        xp.concatenate([x[:, :t], x[:, t:] + normal(9, 2, n - t, x.shape[-1])], axis=1)
        for x in (q, k, v)
    ]
    moved = abs(host(call(*changed)) - host(call(q, k, v)))[:, :t].max()
    leaves = [Tensor(x, requires_grad=True) for x in (q, k, v)]
    y = call(*leaves)[:, :t]
    grads = grad((y * y).sum(), leaves)
    return float(moved), max(float(abs(host(g)[:, t:]).max()) for g in grads)


@each
@pytest.mark.parametrize("t", [1, 4, 8, 33, 64])
def test_causality(xp: Any, attention: Any, mask: Any, sizes: Any, t: int) -> None:
    moved, slope = leak(xp, lambda *x: attention(*x, *sizes, is_causal=True), 70, t)
    assert moved <= 1e-12 and slope == 0.0


@each
def test_without_is_causal_it_leaks(xp: Any, attention: Any, mask: Any, sizes: Any) -> None:
    """The negative twin, under the same measure."""
    moved, slope = leak(xp, lambda *x: attention(*x, *sizes), 70, 33)
    assert moved > 1e-2 and slope > 1e-2


# In pieces


@each
@pytest.mark.parametrize("with_pads", [False, True])
def test_a_sequence_in_pieces(
    xp: Any, attention: Any, mask: Any, sizes: Any, with_pads: bool
) -> None:
    """Split anywhere, twice, it is one pass; so are its gradients, through the state."""
    n = 11
    q, k, v = (Tensor(x, requires_grad=True) for x in arrays(0, n, n))
    real = Rng(3).bernoulli(0.7, (2, n)) if with_pads else None
    whole = attention(q, k, v, *sizes, is_causal=True, key_mask=real)
    cotangent = normal(7, 2, n, 4)
    wanted = grad((whole * cotangent).sum(), [q, k, v], retain_graph=True)
    for first, second in [(0, 0), (0, 5), (1, 2), (4, 8), (10, 11), (11, 11)]:
        state: Any = ()
        pieces = []
        for part in (slice(0, first), slice(first, second), slice(second, n)):
            args = (q[:, part], k[:, part], v[:, part], *sizes)
            pads = None if real is None else real[:, part]
            y, state = attention(*args, is_causal=True, state=state, key_mask=pads)
            pieces.append(y)
        got = ops.concatenate(pieces, axis=1)
        assert_close(got, whole, rtol=1e-12, atol=1e-13)
        for g, want in zip(grad((got * cotangent).sum(), [q, k, v]), wanted, strict=True):
            assert_close(g, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("window", "dilation"), [(0, 1), (3, 1), (2, 3)])
def test_the_state_of_a_window_is_the_window(xp: Any, window: int, dilation: int) -> None:
    """Token by token; the state never holds more, and what was handed over is not changed."""
    q, k, v = arrays(0, 15, 15)
    whole = local_attention(q, k, v, window, True, dilation=dilation)
    state: Any = ()
    for t in range(15):
        now = (slice(None), slice(t, t + 1))
        before = [host(x).copy() for x in state]
        handed = state
        y, state = local_attention(
            q[now], k[now], v[now], window, True, state=state, dilation=dilation
        )
        assert_close(y, whole[now], rtol=1e-12, atol=1e-13)
        assert state.key.shape == (2, min(window * dilation, t + 1), 3)
        assert all(np.array_equal(host(x), b) for x, b in zip(handed, before, strict=True))


@each
def test_the_last_query_alone(xp: Any, attention: Any, mask: Any, sizes: Any) -> None:
    """What a decoder with a cache of keys asks for: one query, all keys, without is_causal."""
    q, k, v = arrays(0, 23, 23)
    whole = attention(q, k, v, *sizes, is_causal=True)
    for t in range(1, 24):
        y = attention(q[:, t - 1 : t], k[:, :t], v[:, :t], *sizes)
        assert_close(y, whole[:, t - 1 : t], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [*KINDS, "longformer", "topk"])
def test_in_the_slot_of_a_gpt(xp: Any, kind: str) -> None:
    """The whole text at once, and the same tokens one by one against a cache of keys."""
    attention = {
        "local": functools.partial(local_attention, window=3),
        "atrous": functools.partial(atrous_attention, dilation=3),
        "strided": functools.partial(strided_attention, window=2, stride=3),
        "fixed": functools.partial(fixed_attention, block=4),
        "longformer": functools.partial(longformer_attention, window=3),
        "topk": functools.partial(topk_attention, k=3),
    }[kind]
    config = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    blocks = [Block(config, Rng(i), attention=attention) for i in range(2)]
    model = GPT(config, Rng(0), blocks).astype("float64").eval()
    ids = Rng(5).integers(0, 11, (2, 13))
    whole, cache = model(ids), model.new_cache(13)
    pieces = [model(ids[:, :6], cache=cache)]
    pieces += [model(ids[:, t : t + 1], cache=cache) for t in range(6, 13)]
    assert_close(ops.concatenate(pieces, axis=1), whole, rtol=1e-10, atol=1e-12)


# Memory


@pytest.fixture
def peak(backend_name: str) -> Iterator[Callable[[Callable[[], object]], int]]:
    """The bytes in use at most during a call, beyond those before."""
    if backend_name == "cupy":
        pytest.skip("tracemalloc does not see the memory of a device")
    tracemalloc.start()

    def measure(call: Callable[[], object]) -> int:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call()
        return tracemalloc.get_traced_memory()[1] - before

    yield measure
    tracemalloc.stop()


def step(attention: Any, n: int, *sizes: int) -> Callable[[], object]:
    q, k, v = (Tensor(Rng(s).normal((n, 8)), requires_grad=True) for s in range(3))

    def forward_and_backward() -> object:
        return grad(attention(q, k, v, *sizes, is_causal=True).sum(), [q, k, v])

    return forward_and_backward


def test_memory_of_a_window_is_linear(xp: Any, peak: Any) -> None:
    """n = 4096, forward and backward, in float32: one n × n array of it would be 64 MiB."""
    sizes = {n: peak(step(local_attention, n, 32)) for n in (2048, 4096)}
    assert sizes[4096] < 4 * 4096**2 / 8
    assert sizes[4096] < 2.2 * sizes[2048]


@pytest.mark.parametrize("attention", [strided_attention, fixed_attention])
def test_memory_of_factorised_patterns(xp: Any, peak: Any, attention: Any) -> None:
    """With a block of √n, n √n: twice the n takes 2.8 times as much, not 4 times."""
    sizes = {}
    for n in (1024, 4096):
        root = math.isqrt(n)
        sizes[n] = peak(step(attention, n, root, root if attention is strided_attention else 1))
    assert sizes[4096] < 4 * 4096**2 / 2
    assert sizes[4096] < 9.0 * sizes[1024]  # 4 times the n: 8 times


def test_memory_of_the_dense_mask_is_not(xp: Any, peak: Any) -> None:
    """The negative twin: the same measure sees the matrix."""
    q = Rng(0).normal((2048, 8))
    dense = local_mask(2048, 32, is_causal=True)
    assert peak(lambda: ops.scaled_dot_product_attention(q, q, q, dense)) > 4 * 2048**2


def test_refuses(xp: Any) -> None:
    q, k, v = arrays(0, 5, 5)
    for error, use, message in (
        (ValueError, lambda: local_attention(q, k, v, -1), "window is at least 0"),
        (ValueError, lambda: local_attention(q, k, v, 1, dilation=0), "dilation is at least 1"),
        (ValueError, lambda: atrous_attention(q, k, v, 0), "dilation is at least 1"),
        (ValueError, lambda: strided_attention(q, k, v, 1, 0), "stride is at least 1"),
        (ValueError, lambda: fixed_attention(q, k, v, 2, 3), "summary ≤ block"),
        (ValueError, lambda: local_attention(q, k[:, :4], v[:, :4], 1), "last n of m"),
        (ValueError, lambda: local_attention(q, k, v[:, :4], 1), r"value \(…, m, e\)"),
        (ValueError, lambda: local_attention(q, k, v, 1, state=()), "needs is_causal"),
        (
            ValueError,
            lambda: local_attention(q[:, :2], k, v, 1, True, state=()),
            "as many queries as keys",
        ),
        (TypeError, lambda: local_attention(q, k, v, 1, key_mask=xp.ones(5)), "boolean"),
        (
            ValueError,
            lambda: local_attention(q, k, v, 1, key_mask=xp.ones(4, "bool")),
            "key_mask has to broadcast to",
        ),
        (
            ValueError,
            lambda: local_attention(q, k, v, 1, key_mask=xp.ones((3, 2, 5), "bool")),
            "key_mask has to broadcast to",
        ),
        (
            ValueError,
            lambda: local_attention(q, k, v, 1, True, state=(k[:1], v[:1], k[:1, :, 0] > 0)),
            "cannot go on with",
        ),
        (
            ValueError,
            lambda: local_attention(q, k, v, 1, True, state=(k, v)),
            r"the state is \(key, value, seen\)",
        ),
        (TypeError, lambda: local_attention(q, k, v, 1, True, state=k), "a state is a tuple"),
    ):
        with pytest.raises(error, match=message):
            use()
