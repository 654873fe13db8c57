"""Softmax attention: torch's, in blocks, with a cache, and put together from parts."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import (
    KeyValues,
    blockwise_attention,
    combine,
    partial_attention,
    softmax_attention,
)
from mini_nn.check import check_grads
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_softmax.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in [*_file.keys()]}
    OPTIONS = json.loads(_file.metadata()["options"])

lengths = st.integers(1, 23)


def operands(seed: int, n: int, m: int, lead: Any = (2,), dtype: str = "float64") -> list[Any]:
    """Queries (…, n, 3), keys (…, m, 3) and values (…, m, 2)."""
    rng = Rng(seed)
    return [rng.normal((*lead, *shape), dtype=dtype) for shape in ((n, 3), (m, 3), (m, 2))]


def slopes(fn: Any, arrays: list[Any]) -> list[Any]:
    """Results, and the gradients for a wave as the cotangent of each."""
    leaves = [Tensor(x, requires_grad=True) for x in arrays]
    results = fn(*leaves)
    results = [*results] if isinstance(results, tuple) else [results]
    return [*results, *grad(results, leaves, [wave(y) for y in results])]


def wave(y: Any) -> Any:
    steps = 0.7 * np.arange(y.size) + 0.3
    made = mini_nn.backend.current().xp.asarray(np.cos(steps).reshape(y.shape))
    return made.astype(y.dtype)


def by_loops(query: Any, key: Any, value: Any, sees: Any, scale: float) -> Any:
    """One query and one key after the other, in plain Python."""
    q, k, v = map(host, (query, key, value))
    y, total = np.zeros((len(q), v.shape[1])), np.full(len(q), -math.inf)
    for i in range(len(q)):
        weights = {j: math.exp(scale * float(q[i] @ k[j])) for j in range(len(k)) if sees(i, j)}
        if weights:
            total[i] = math.log(sum(weights.values()))
            y[i] = sum(w * v[j] for j, w in weights.items()) / sum(weights.values())
    return y, total


# Against torch, and against loops


@pytest.mark.parametrize("case", OPTIONS)
def test_torch(case: str, xp: Any) -> None:
    names = ("query", "key", "value")
    arrays = [xp.asarray(GOLDEN[f"{case}.in.{name}"]) for name in names]
    mask = GOLDEN.get(f"{case}.in.mask")
    attends = [softmax_attention]
    if mask is None:
        attends += [blockwise_attention]
    for attend in attends:
        options = OPTIONS[case] | ({} if mask is None else {"attn_mask": xp.asarray(mask)})
        if attend is blockwise_attention:
            options["block_size"] = 2
        y, *gradients = slopes(lambda *x, f=attend, o=options: f(*x, **o), arrays)
        assert_close(y, GOLDEN[f"{case}.out"], rtol=1e-12, atol=1e-12)
        for name, g in zip(names, gradients, strict=True):
            assert_close(g, GOLDEN[f"{case}.grad.{name}"], rtol=1e-12, atol=1e-12)
    if mask is None:
        _, total = partial_attention(*arrays, **OPTIONS[case], block_size=3)
        assert_close(total, GOLDEN[f"{case}.logsumexp"], rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32), st.integers(0, 9), st.integers(0, 9), st.integers(-9, 9))
def test_loops(xp: Any, seed: int, n: int, m: int, offset: int) -> None:
    """Any offset: also where no query, or no key, has anything to look at."""
    arrays = operands(seed, n, m, ())
    for causal in (False, True):
        sees = lambda i, j, c=causal: not c or j <= i + offset  # noqa: E731
        y, total = partial_attention(*arrays, causal, 0.7, 2, offset)
        for found, wanted in zip((y, total), by_loops(*arrays, sees, 0.7), strict=True):
            assert_close(found, wanted)


# Blocks


@given(st.integers(0, 2**32), lengths, lengths, st.integers(1, 9), st.booleans())
def test_blocks_are_the_definition(
    xp: Any, seed: int, n: int, m: int, block: int, causal: bool
) -> None:
    """Outputs, L and all gradients, for blocks that need not divide anything."""
    arrays, offset = operands(seed, n, m), seed % 5 - 2
    options = {"is_causal": causal, "offset": offset}
    found = slopes(lambda *x: partial_attention(*x, block_size=block, **options), arrays)
    wanted = slopes(lambda *x: partial_attention.composite(*x, **options), arrays)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-11)
    if offset == 0:
        y = softmax_attention(*arrays, is_causal=causal)
        assert_close(blockwise_attention(*arrays, causal, block_size=block), y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(130, 130), (70, 1100), (1100, 70), (1, 300)])
def test_blocks_of_the_usual_size(xp: Any, causal: bool, n: int, m: int) -> None:
    arrays = operands(n, n, m, ())
    found = slopes(lambda *x: blockwise_attention(*x, is_causal=causal), arrays)
    wanted = slopes(lambda *x: softmax_attention(*x, is_causal=causal), arrays)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(xp: Any, causal: bool) -> None:
    """By differences, to order 2, through the output and through L."""
    arrays = operands(3, 5, 6, ())
    check_grads(lambda *x: partial_attention(*x, causal, block_size=2), *arrays, order=2)
    check_grads(lambda *x: blockwise_attention(*x, causal, block_size=2), *arrays, order=2)


def test_each_gradient_alone(xp: Any) -> None:
    arrays = operands(3, 5, 6)
    _, *wanted = slopes(lambda *x: blockwise_attention(*x, block_size=2), arrays)
    for i in range(3):
        given = [Tensor(x, requires_grad=i == j) for j, x in enumerate(arrays)]
        y = blockwise_attention(*given, block_size=2)
        (g,) = grad((y * wave(y)).sum(), given[i])
        assert_close(g, wanted[i], rtol=1e-13, atol=1e-14)


def test_one_head_of_keys_for_several_of_queries(xp: Any) -> None:
    """Leading axes broadcast, and gradients come back in the shape of what was broadcast."""
    query, key, value = operands(1, 5, 6, (2, 3))
    shared = [query, key[:, :1], value[:, :1]]
    repeated = [query, *(xp.broadcast_to(x, (2, 3, 6, x.shape[-1])) for x in shared[1:])]
    found = slopes(lambda *x: blockwise_attention(*x, block_size=2), shared)
    wanted = slopes(lambda *x: blockwise_attention(*x, block_size=2), repeated)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert_close(one, other)
    for one, other in zip(found[2:], wanted[2:], strict=True):
        assert_close(one, other.sum(axis=1, keepdims=True))


def test_large_and_infinite_scores(xp: Any) -> None:
    """The running maximum: without it the exponential of 1000 overflows."""
    for dtype in ("float32", "float64"):
        query, key, value = operands(2, 5, 7, (), dtype)
        best = (host(query) @ host(key).T).argmax(axis=-1)
        y, total = partial_attention(query, key, value, False, 1e4, 2)
        assert y.dtype == dtype and total.dtype == dtype
        assert_close(y, host(value)[best])
        assert np.isfinite(host(total)).all() and float(host(abs(total)).max()) > 1000
        found = slopes(lambda *x: blockwise_attention(*x, False, 1e4, 2), [query, key, value])
        assert all(np.isfinite(host(g)).all() and g.dtype == dtype for g in found)
        rising = xp.arange(7, dtype=dtype)[:, None] * xp.ones((7, 3), dtype)  # new maxima
        y = blockwise_attention(xp.ones((1, 3), dtype), rising, value, False, 100.0, 1)
        assert_close(y[0], host(value)[-1])
        hidden = xp.array(key)
        hidden[3] = -math.inf  # a key that no query may look at
        positive = abs(query) + 1.0
        rest = [0, 1, 2, 4, 5, 6]
        one = blockwise_attention(positive, hidden, value, block_size=2)
        assert_close(one, blockwise_attention(positive, key[rest], value[rest], block_size=2))


def test_queries_that_look_nowhere(xp: Any) -> None:
    """Zeros, L = −inf and gradient 0; no keys and no queries are no special case."""
    arrays = operands(4, 5, 6)
    y, total, *gradients = slopes(
        lambda *x: partial_attention(*x, True, block_size=2, offset=-2), arrays
    )
    assert not host(y)[:, :2].any() and host(y)[:, 2:].all()
    assert (host(total)[:, :2] == -math.inf).all() and np.isfinite(host(total)[:, 2:]).all()
    assert not host(gradients[0])[:, :2].any()
    assert all(np.isfinite(host(g)).all() for g in gradients)
    for n, m in ((3, 0), (0, 3), (0, 0)):
        y, *gradients = slopes(blockwise_attention, operands(0, n, m))
        assert y.shape == (2, n, 2) and not host(y).any()
        assert not any(host(g).any() for g in gradients)


def test_scores_that_are_all_minus_infinity(xp: Any) -> None:
    """They count as hidden: zeros, L = −inf, and values that get gradient 0 rather than nan."""
    query, key, value = operands(4, 5, 6, ())
    query, key = abs(query) + 1.0, xp.full((6, 3), -math.inf)
    leaf = Tensor(value, requires_grad=True)
    y, total = partial_attention(query, key, leaf, block_size=1)
    assert not host(y).any() and (host(total) == -math.inf).all()
    (g,) = grad(y, leaf, wave(y))
    assert_close(g, xp.zeros((6, 2)))


def test_causality(xp: Any) -> None:
    """What comes later changes no bit and gets no gradient; without the mask it would."""
    arrays, i = operands(5, 9, 9), 4
    changed = [xp.array(x) for x in arrays]
    for x in changed:
        x[:, i + 1 :] += 10.0
    for attend in (softmax_attention, blockwise_attention):
        for causal in (True, False):
            before, after = (host(attend(*x, is_causal=causal)) for x in (arrays, changed))
            same = (before[:, : i + 1] == after[:, : i + 1]).all()
            leaves = [Tensor(x, requires_grad=True) for x in arrays]
            y = attend(*leaves, is_causal=causal)[:, : i + 1]
            later = [host(g)[:, i + 1 :].any() for g in grad((y * wave(y)).sum(), leaves)]
            assert same == causal and later == [False, not causal, not causal]


@given(st.integers(0, 2**32), lengths, lengths)
def test_weights(xp: Any, seed: int, n: int, m: int) -> None:
    """The result is a mean of values; the order of the keys and a shift of all do not matter."""
    query, key, value = operands(seed, n, m, ())
    unit = xp.eye(m, dtype="float64")
    for attend in (softmax_attention, lambda *x: blockwise_attention(*x, block_size=3)):
        weights = attend(query, key, unit)
        assert float(host(weights).min()) >= 0.0
        assert_close(weights.sum(axis=-1), 1.0)
        y = attend(query, key, value)
        assert_close(y, weights @ value)
        low, high = host(value).min(axis=0), host(value).max(axis=0)
        assert (host(y) >= low - 1e-9).all() and (host(y) <= high + 1e-9).all()
        order = Rng(seed).permutation(m)
        assert_close(attend(query, key[order], value[order]), y)
        assert_close(attend(query, key + key[:1], value), y)  # q·k₀ is added to a whole row


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 5))
def test_memory_is_linear(xp: Any, seed: int, n: int, block: int) -> None:
    """The rule keeps no array with n m numbers; that of the dense one does."""
    query, key, value = (Tensor(x, requires_grad=True) for x in operands(seed, n + 3, n + 4, ()))
    for attend, is_linear in ((softmax_attention, False), (blockwise_attention, True)):
        y = attend(query, key, value)
        node = y.node.parents[0] if is_linear else y.node
        sizes = [x.size for x in arrays_in(node.kept)]
        assert (max(sizes) >= (n + 3) * (n + 4)) != is_linear or n < 2


def arrays_in(kept: Any) -> list[Any]:
    """All arrays in nested tuples, lists and dicts."""
    if isinstance(kept, dict):
        kept = [*kept.values()]
    if isinstance(kept, (list, tuple)):
        return [x for part in kept for x in arrays_in(part)]
    return [kept] if hasattr(kept, "size") else []


def test_peak_memory(backend_name: str) -> None:
    """Forward and backward at 1,024 tokens: at most a fifth of what the dense one takes."""
    if backend_name != "numpy":
        pytest.skip("tracemalloc sees the memory of NumPy")
    arrays = operands(0, 1024, 1024, (), "float32")

    def peak(attend: Any) -> int:
        leaves = [Tensor(x, requires_grad=True) for x in arrays]
        tracemalloc.start()
        y = attend(*leaves)
        grad(y, leaves, y.data)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(lambda *x: blockwise_attention(*x, block_size=64)) < peak(softmax_attention) / 5


# The cache


@given(st.integers(0, 2**32), st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_cached_is_uncached(xp: Any, seed: int, parts: list[int]) -> None:
    """Any cut of the sequence: outputs and gradients are those of one pass."""
    n = sum(parts)
    arrays = operands(seed, n, n)
    if n == 0:
        return
    for attend in (softmax_attention, lambda *x, **o: blockwise_attention(*x, block_size=2, **o)):

        def in_parts(*leaves: Any, attend: Any = attend) -> Any:
            state: Any = ()
            outputs, at = [], 0
            for count in parts:
                some = [x[:, at : at + count] for x in leaves]
                y, state = attend(*some, is_causal=True, state=state)
                assert isinstance(state, KeyValues) and state.key.shape[-2] == at + count
                outputs.append(y)
                at += count
            return ops.concatenate(outputs, axis=-2)

        found = slopes(in_parts, arrays)
        wanted = slopes(lambda *x, attend=attend: attend(*x, is_causal=True), arrays)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_the_last_n_of_m(xp: Any) -> None:
    """New tokens see the whole cache and each other's past, which the mask of a square is not."""
    query, key, value = operands(7, 7, 7)
    _, state = softmax_attention(query[:, :4], key[:, :4], value[:, :4], is_causal=True, state=())
    before = [host(x).copy() for x in state]
    rest = [x[:, 4:] for x in (query, key, value)]
    y, after = softmax_attention(*rest, is_causal=True, state=state)
    whole = softmax_attention(query, key, value, is_causal=True)
    assert_close(y, whole[:, 4:])
    planted = softmax_attention(rest[0], key, value, is_causal=True)  # counts from the first key
    assert float(host(abs(planted - y)).max()) > 0.1
    assert_close(after.key, key)
    for old, now in zip(before, state, strict=True):
        np.testing.assert_array_equal(host(now), old)


def test_masks_of_a_continued_sequence(xp: Any) -> None:
    """Booleans and numbers, over all keys so far, hold beside causality."""
    query, key, value = operands(8, 6, 6)
    numbers = Rng(1).normal((6, 6), dtype="float64")
    numbers[:, 0] = 0.5
    for mask in (numbers, numbers > 0.0):
        whole = softmax_attention(query, key, value, mask, is_causal=True)
        state: Any = ()
        for start, stop in ((0, 2), (2, 5), (5, 6)):
            some = [x[:, start:stop] for x in (query, key, value)]
            part = mask[start:stop, :stop]
            y, state = softmax_attention(*some, part, is_causal=True, state=state)
            assert_close(y, whole[:, start:stop])


@pytest.mark.parametrize("attend", [softmax_attention, blockwise_attention])
def test_the_scale_of_a_continued_sequence(xp: Any, attend: Any) -> None:
    """Of the first tokens, of a single one and of several: the factor is that of one pass."""
    arrays = operands(9, 6, 6)
    whole = attend(*arrays, is_causal=True, scale=0.3)
    state: Any = ()
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        some = [x[:, start:stop] for x in arrays]
        y, state = attend(*some, is_causal=True, scale=0.3, state=state)
        assert_close(y, whole[:, start:stop])
    assert float(host(abs(attend(*arrays, is_causal=True) - whole)).max()) > 1e-2


def test_a_learned_mask_of_a_continued_sequence(xp: Any) -> None:
    """Numbers added to the scores of old and new keys get their gradient; hidden ones get 0."""
    query, key, value = operands(10, 6, 6, ())
    bias = Rng(11).normal((2, 6), dtype="float64")

    def continued(q: Any, k: Any, v: Any, bias: Any) -> Any:
        state = KeyValues(k[:4], v[:4])
        return softmax_attention(q[4:], k[4:], v[4:], bias, True, state=state)[0]

    check_grads(continued, query, key, value, bias)
    leaf = Tensor(bias, requires_grad=True)
    y = continued(query, key, value, leaf)
    (g,) = grad((y * wave(y)).sum(), leaf)
    assert host(g)[:, :5].all() and host(g)[1, 5] != 0.0 and host(g)[0, 5] == 0.0


@pytest.mark.parametrize("attend", [softmax_attention, blockwise_attention])
def test_dtypes(xp: Any, attend: Any) -> None:
    """float16 is summed in float32; a scale of NumPy's float64 does not widen float32."""
    many, value = xp.ones((1, 1, 3), "float16"), xp.full((1, 9000, 1), 8.0, "float16")
    y = attend(many, xp.ones((1, 9000, 3), "float16"), value)  # 72,000 is no number of float16
    assert y.dtype == "float16"
    assert_close(y, xp.full((1, 1, 1), 8.0, "float16"))
    leaves = [Tensor(x, requires_grad=True) for x in operands(12, 4, 4, (), "float32")]
    y, state = attend(*leaves, is_causal=True, scale=np.float64(0.3), state=())
    assert y.dtype == "float32"
    assert {x.dtype.name for x in (*state, *grad(y.sum(), leaves))} == {"float32"}
    assert_close(y, attend(*leaves, is_causal=True, scale=0.3))
    assert attend(leaves[0][:1], *leaves[1:], scale=np.float64(0.3)).dtype == "float32"


# Parts


@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.integers(1, 6),
    st.booleans(),
)
def test_parts_of_the_keys(xp: Any, seed: int, sizes: list[int], n: int, causal: bool) -> None:
    """Ring attention: parts of the keys, in any order and grouping, make attention to all."""
    m = sum(sizes)
    arrays = operands(seed, n, m)

    def whole(*x: Any) -> Any:
        return partial_attention(*x, is_causal=causal)

    def joined(query: Any, key: Any, value: Any) -> Any:
        parts, at = [], 0
        for size in sizes:
            some = key[:, at : at + size], value[:, at : at + size]
            parts.append(partial_attention(query, *some, causal, block_size=2, offset=-at))
            at += size
        order = host(Rng(seed).permutation(len(parts)))
        parts = [parts[i] for i in order]
        first, rest = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        groups = [combine(*zip(*some, strict=True)) for some in (first, rest) if some]
        return combine(*zip(*groups, strict=True))

    found, wanted = slopes(joined, arrays), slopes(whole, arrays)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-11)
    if m and len([s for s in sizes if s]) > 1 and not causal:  # the slip: a plain mean
        parts = np.split(np.arange(m), np.cumsum(sizes)[:-1])
        query, key, value = arrays
        mean = sum(
            host(softmax_attention(query, key[:, p], value[:, p])) for p in map(list, parts) if p
        ) / len([s for s in sizes if s])
        assert abs(mean - host(found[0])).max() > 1e-9


def test_gradients_of_parts(xp: Any) -> None:
    query, key, value = operands(1, 3, 5, ())

    def joined(q: Any, k: Any, v: Any) -> Any:
        parts = [partial_attention(q, k[a:b], v[a:b], block_size=1) for a, b in ((0, 2), (2, 5))]
        return combine(*zip(*parts, strict=True))

    check_grads(joined, query, key, value, order=2)


# What is refused


def test_errors(xp: Any) -> None:
    query, key, value = operands(0, 3, 3)
    for attend in (softmax_attention, blockwise_attention):
        with pytest.raises(ValueError, match=r"attention takes query .* got"):
            attend(query, key[..., :2], value)
        with pytest.raises(ValueError, match="needs is_causal=True"):
            attend(query, key, value, state=())
        with pytest.raises(ValueError, match="a query and a key, got 2 and 3"):
            attend(query[:, :2], key, value, is_causal=True, state=())
        with pytest.raises(ValueError, match="cannot go on with"):
            attend(query, key, value, is_causal=True, state=KeyValues(key[:1], value[:1]))
        for narrower in ((key[..., :2], value), (key, value[..., :1])):
            with pytest.raises(ValueError, match="cannot go on with"):
                attend(query, key, value, is_causal=True, state=KeyValues(*narrower))
        with pytest.raises(TypeError, match="a state is a tuple"):
            attend(query, key, value, is_causal=True, state=key)
        with pytest.raises(
            ValueError, match=r"leading axes broadcast, got \(2, 3, 3\), \(3, 3, 3\)"
        ):
            attend(query, xp.ones((3, 3, 3)), xp.ones((3, 3, 2)))
    with pytest.raises(ValueError, match="block_size=0"):
        blockwise_attention(query, key, value, block_size=0)
    with pytest.raises(ValueError, match="at least one part, got 0 and 0"):
        combine([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        combine([query], [query[..., 0], query[..., 0]])
