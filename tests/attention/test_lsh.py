"""LSH attention against a loop over its definition, the laws of its hash, and what it promises."""

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

from mini_nn import Rng, Tensor, grad, no_grad, ops
from mini_nn.attention import LSHAttention, lsh, lsh_attention, lsh_hash
from mini_nn.check import check_grads
from models.gpt import GPT, Block, GPTConfig
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_lsh.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in [*_file.keys()]}
    CASES, CHUNK = json.loads(_file.metadata()["cases"]), int(_file.metadata()["chunk"])


def reached(
    buckets: Any, m: int, is_causal: bool = False, strict: bool = False, stable: bool = True
) -> list[dict[int, int]]:
    """For each of n tokens whom it may attend to, and in how many of the rounds: by the words."""
    rounds, n = buckets.shape
    found: list[dict[int, int]] = [{} for _ in range(n)]
    for r in range(rounds):
        order = sorted(range(n), key=lambda i: (buckets[r, i], i if stable else -i))
        place = {token: at for at, token in enumerate(order)}
        for i in range(n):
            for j in range(n):
                back = place[i] - place[j]
                near = 0 < back <= m if strict else place[i] // m - place[j] // m in (0, 1)
                if i != j and buckets[r, i] == buckets[r, j] and near and not (is_causal and j > i):
                    found[i][j] = found[i].get(j, 0) + 1
    return found


def by_loop(
    x: Any, v: Any, found: list[dict[int, int]], discount: bool = True, self_too: bool = False
) -> tuple[Any, Any]:
    """softmax over the multiset of what the rounds reach, each counted as often or once."""
    keys = x / np.linalg.norm(x, axis=-1, keepdims=True)
    outputs, sizes = [], []
    for i, counts in enumerate(found):
        weights = dict(counts)
        if self_too or not weights:
            weights[i] = max(1, len(weights) and max(weights.values()))
        j = [*weights]
        s = keys[j] @ x[i] / math.sqrt(x.shape[-1])
        s = s + (0.0 if discount else np.log([weights[k] for k in j]))
        e = np.exp(s - s.max())
        outputs.append(e @ v[j] / e.sum())
        sizes.append(np.log(e.sum()) + s.max())
    return np.stack(outputs), np.stack(sizes)


def arguments(seed: int, n: int, rounds: int, b: int, d: int = 3, e: int = 2) -> tuple[Any, ...]:
    rng = Rng(seed)
    shapes = ((n, d), (n, e), (rounds, d, b // 2))
    return tuple(rng.normal(shape, dtype="float64") for shape in shapes)


# The definition


@given(
    st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 3), st.sampled_from([2, 4, 6]),
    st.integers(1, 33), st.sampled_from([(False, False), (True, False), (True, True)]),
)  # fmt: skip
def test_it_is_a_softmax_over_the_union(
    xp: Any, seed: int, n: int, rounds: int, b: int, m: int, mode: tuple[bool, bool]
) -> None:
    """Whatever n, m and the rounds: each token that any round reaches counts once."""
    is_causal, strict = mode
    x, v, rotations = arguments(seed, n, rounds, b)
    y, size = lsh_attention(x, v, rotations, m, is_causal, strict=strict, return_logsumexp=True)
    found = reached(host(lsh_hash(x, rotations)), min(m, n), is_causal, strict)
    want, total = by_loop(host(x), host(v), found)
    assert_close(y, want, rtol=1e-10, atol=1e-12)
    assert_close(size, total, rtol=1e-10, atol=1e-12)


def test_the_classic_bugs_are_seen(xp: Any) -> None:
    """Duplicates not discounted, itself attended to, an order that is not stable: all differ."""
    x, v, rotations = arguments(0, 24, 3, 4)
    y = host(lsh_attention(x, v, rotations, 5, is_causal=True))
    buckets = host(lsh_hash(x, rotations))
    found = reached(buckets, 5, True)
    assert max(max(counts.values(), default=0) for counts in found) > 1
    x, v = host(x), host(v)
    assert_close(y, by_loop(x, v, found)[0])
    for wrong in (
        by_loop(x, v, found, discount=False),
        by_loop(x, v, found, self_too=True),
        by_loop(x, v, reached(buckets, 5, True, stable=False)),
        by_loop(x, v, reached(buckets, 4, True)),
        by_loop(x, v, reached(buckets[:1], 5, True)),
    ):
        assert np.abs(y - wrong[0]).max() > 1e-2


def test_the_discount_planted_away(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Nᵢⱼ the result is the softmax over the multiset, in which some tokens count twice."""
    x, v, rotations = arguments(1, 24, 3, 4)
    targets = lsh._targets
    monkeypatch.setattr(lsh, "_targets", lambda *args: (targets(*args)[0], xp.ones((), "int64")))
    found = reached(host(lsh_hash(x, rotations)), 5)
    y = lsh_attention(x, v, rotations, 5)
    assert_close(y, by_loop(host(x), host(v), found, discount=False)[0])


def test_heads_batch_and_rounds_at_once(xp: Any) -> None:
    """Each head has its rotations; one array serves them all if it has no axis for them."""
    rng = Rng(2)
    x, v = rng.normal((2, 3, 17, 4), dtype="float64"), rng.normal((2, 3, 17, 5), dtype="float64")
    for lead in ((), (3,), (2, 3)):
        rotations = rng.normal((*lead, 2, 4, 2), dtype="float64")
        each = xp.broadcast_to(rotations, (2, 3, 2, 4, 2))
        y = lsh_attention(x, v, rotations, 4, is_causal=True)
        for b in range(2):
            for h in range(3):
                alone = lsh_attention(x[b, h], v[b, h], each[b, h], 4, is_causal=True)
                assert_close(y[b, h], alone)


@given(st.integers(0, 2**32), st.integers(1, 20), st.booleans())
def test_one_bucket_and_one_chunk_are_full_attention(
    xp: Any, seed: int, n: int, is_causal: bool
) -> None:
    """With shared QK, and without the diagonal unless there is nothing else."""
    x, v, _ = arguments(seed, n, 1, 2)
    y = lsh_attention(x, v, xp.zeros((2, 3, 1)), n, is_causal)
    mask = (np.tril(np.ones((n, n)), -1) if is_causal else 1 - np.eye(n)).astype(bool)
    mask[~mask.any(axis=-1), ~mask.any(axis=-1)] = True
    keys = host(x) / np.linalg.norm(host(x), axis=-1, keepdims=True)
    want = ops.scaled_dot_product_attention(x, xp.asarray(keys), v, xp.asarray(mask))
    assert_close(y, want, rtol=1e-10, atol=1e-12)
    if n > 1:
        diagonal = xp.asarray(mask | np.eye(n, dtype=bool))
        wrong = ops.scaled_dot_product_attention(x, xp.asarray(keys), v, diagonal)
        assert np.abs(host(y) - host(wrong)).max() > 1e-6


def test_convexity_and_a_scale(xp: Any) -> None:
    """Rows of weights are at least 0 and add up to 1; large logits choose the nearest key."""
    x, _, rotations = arguments(3, 20, 2, 4)
    weights = host(lsh_attention(x, xp.eye(20), rotations, 6))
    assert weights.min() >= 0.0
    assert_close(weights.sum(axis=-1), np.ones(20))
    found = reached(host(lsh_hash(x, rotations)), 6)
    assert all(set(np.flatnonzero(w)) == set(f or {i: 1}) for i, (w, f) in
               enumerate(zip(weights, found, strict=True)))  # fmt: skip
    sharp = host(lsh_attention(x, xp.eye(20), rotations, 6, scale=1e6))
    keys = host(x) / np.linalg.norm(host(x), axis=-1, keepdims=True)
    for i, f in enumerate(found):
        assert sharp[i, max(f or {i: 1}, key=lambda j: keys[j] @ host(x)[i])] == 1.0


# The hash


@pytest.mark.parametrize("share", [0, 1, 3, 8, 16])
def test_two_buckets_agree_with_probability_1_minus_θ_over_π(xp: Any, share: int) -> None:
    """Exactly: over 32 directions all around the circle, none of them on the border of a bucket."""
    θ = math.pi * share / 16
    around = 2 * np.pi * (np.arange(32) + 0.5) / 32
    rotations = xp.asarray(np.stack([np.cos(around), np.sin(around)], axis=-1)[:, :, None])
    x = xp.asarray([[1.0, 0.0], [math.cos(θ), math.sin(θ)]])
    first, second = host(lsh_hash(x, rotations)).T
    assert (first == second).mean() == 1 - θ / math.pi


def test_agreement_falls_with_the_angle(xp: Any) -> None:
    """For 8 buckets, by 20,000 rotations common to all angles.

    Neighbouring estimates differ by at least 0.03, 8 standard deviations of √(2 / 4 · 20,000).
    """
    angles = np.linspace(0, np.pi, 7)
    x = np.zeros((7, 4))
    x[:, 0], x[:, 1] = np.cos(angles), np.sin(angles)
    buckets = host(lsh_hash(xp.asarray(x), Rng(0).normal((20_000, 4, 4), dtype="float64")))
    agree = (buckets == buckets[:, :1]).mean(axis=0)
    assert agree[0] == 1.0 and agree[-1] == 0.0
    assert (np.diff(agree[:5]) < -0.03).all() and (np.diff(agree) <= 0).all()


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3), st.sampled_from([2, 4, 10]))
def test_the_hash_sees_directions_only(xp: Any, seed: int, c: float, b: int) -> None:
    x, _, rotations = arguments(seed, 12, 2, b)
    buckets = host(lsh_hash(x, rotations))
    assert buckets.min() >= 0 and buckets.max() < b
    np.testing.assert_array_equal(host(lsh_hash(c * x, rotations)), buckets)
    np.testing.assert_array_equal(host(lsh_hash(-x, rotations)), (buckets + b // 2) % b)


@given(st.integers(0, 2**32))
def test_a_hash_in_factors_agrees_where_all_factors_agree(xp: Any, seed: int) -> None:
    """And attention, pads included, takes it as it takes a hash by one matrix."""
    x, v, first = arguments(seed, 30, 2, 4)
    second = arguments(seed + 1, 30, 2, 6)[2]
    a, b, both = (host(lsh_hash(x, r)) for r in (first, second, (first, second)))
    np.testing.assert_array_equal(both, a + 4 * b)
    y = lsh_attention(x, v, (first, second), 4)
    assert_close(y, by_loop(host(x), host(v), reached(both, 4))[0], rtol=1e-10, atol=1e-12)
    real = xp.arange(30) < 25
    padded = lsh_attention(x, v, (first, second), 4, key_mask=real)
    assert_close(padded[:25], lsh_attention(x[:25], v[:25], (first, second), 4))


def test_the_hash_has_no_gradient(xp: Any) -> None:
    x, v, rotations = arguments(4, 10, 2, 4)
    leaf = Tensor(rotations, requires_grad=True)
    assert not isinstance(lsh_hash(Tensor(x, requires_grad=True), leaf), Tensor)
    y = lsh_attention(Tensor(x, requires_grad=True), v, leaf, 3)
    assert grad(y.sum(), leaf, allow_unused=True) == (None,)


# Causality


@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(1, 12), st.data())
def test_strict_attention_does_not_see_the_future(
    xp: Any, seed: int, n: int, m: int, data: Any
) -> None:
    """Whatever happens to token t, and wherever the text ends: what is before t stays."""
    x, v, rotations = arguments(seed, n, 2, 4)
    t = data.draw(st.integers(1, n - 1))
    y = host(lsh_attention(x, v, rotations, m, True, strict=True))
    changed, other = x.copy(), v.copy()
    changed[t:], other[t:] = -2.0 * x[t:] + 1.0, 3.0
    after = host(lsh_attention(changed, other, rotations, m, True, strict=True))
    assert_close(after[:t], y[:t], rtol=1e-12, atol=1e-12)
    short = lsh_attention(x[:t], v[:t], rotations, m, True, strict=True)
    assert_close(short, y[:t], rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32), st.integers(2, 25), st.data())
def test_small_buckets_do_not_see_the_future(xp: Any, seed: int, n: int, data: Any) -> None:
    """The paper's form, if no bucket has more than m + 1 tokens; m = n − 1 is always enough."""
    x, v, rotations = arguments(seed, n, 2, 6)
    t = data.draw(st.integers(1, n - 1))
    changed = x.copy()
    changed[t] = Rng(seed + 1).normal((3,), dtype="float64")
    both = [host(lsh_hash(z, rotations)) for z in (x, changed)]
    largest = max(int(np.bincount(row).max()) for buckets in both for row in buckets)
    for m in {max(1, largest - 1), n - 1, n}:
        y, after = (host(lsh_attention(z, v, rotations, m, True)) for z in (x, changed))
        assert_close(after[:t], y[:t], rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(1, 8))
def test_how_far_back_the_paper_s_form_sees(seed: int, n: int, m: int) -> None:
    """The last m earlier tokens of the bucket always, never more than the last 2 m − 1.

    By the definition in this file, which the tests above hold the code to.
    """
    buckets = np.random.default_rng(seed).integers(0, 2, (1, n))
    for i, found in enumerate(reached(buckets, m, is_causal=True)):
        earlier = [j for j in range(i) if buckets[0, j] == buckets[0, i]]
        assert {*earlier[-m:]} <= {*found} <= {*earlier[-(2 * m - 1) :]}
        assert {*found} == {*earlier[len(earlier) - len(found) :]}


def test_large_buckets_let_the_future_move_a_border(xp: Any) -> None:
    """The paper's form: token 9 changes its bucket, and token 8 gets to see another set.

    Directions right (0) or left (1); ten to the right and m = 3.  Sorted, token 8 is the ninth of
    bucket 1 behind one token of bucket 0, or behind two.
    """
    x = np.tile([[-1.0, 0.0]], (10, 1)) + 0.01 * np.arange(10)[:, None] * [0.0, 1.0]
    x[0] = [1.0, 0.0]
    changed = x.copy()
    changed[9] = [1.0, 0.5]
    rotations, v = xp.asarray([[[1.0], [0.0]]]), xp.eye(10)
    seen = [
        [
            {*np.flatnonzero(host(lsh_attention(xp.asarray(z), v, rotations, 3, True,
                                                strict=strict))[8])}
            for z in (x, changed)
        ]
        for strict in (False, True)
    ]  # fmt: skip
    assert seen[0] == [{3, 4, 5, 6, 7}, {5, 6, 7}]
    assert seen[1] == [{5, 6, 7}, {5, 6, 7}]


@pytest.mark.parametrize("strict", [False, True])
def test_no_gradient_comes_from_the_future(xp: Any, strict: bool) -> None:
    """Exactly 0 for all j > i in both forms; the form that looks both ways has some."""
    x, v, rotations = arguments(5, 14, 2, 2)
    x, v = Tensor(x, requires_grad=True), Tensor(v, requires_grad=True)
    y = lsh_attention(x, v, rotations, 3, True, strict=strict)
    both_ways = lsh_attention(x, v, rotations, 3)
    leaks = 0.0
    for i in range(14):
        for g in grad(y[i].sum(), [x, v], retain_graph=True):
            assert not host(g)[i + 1 :].any()
        leaks += sum(np.abs(host(g)[i + 1 :]).sum() for g in
                     grad(both_ways[i].sum(), [x, v], retain_graph=True))  # fmt: skip
    assert leaks > 1.0


# Pads


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(0, 7), st.booleans())
def test_pads_change_nothing(xp: Any, seed: int, n: int, pads: int, is_causal: bool) -> None:
    """Wherever they stand and whatever they hold, nan too: a text comes out as without them."""
    x, v, rotations = arguments(seed, n + pads, 2, 4)
    real = np.zeros(n + pads, bool)
    real[np.random.default_rng(seed).permutation(n + pads)[:n]] = True
    x[xp.asarray(~real)], v[xp.asarray(~real)] = math.nan, math.inf
    args: Any = (rotations, min(4, n), is_causal)
    y, size = lsh_attention(x, v, *args, xp.asarray(real), return_logsumexp=True)
    keep = xp.asarray(np.flatnonzero(real))
    want, total = lsh_attention(x[keep], v[keep], *args, return_logsumexp=True)
    assert_close(host(y)[real], want, rtol=1e-12, atol=1e-13)
    assert_close(host(size)[real], total, rtol=1e-12, atol=1e-13)
    assert not host(y)[~real].any() and (host(size)[~real] == -math.inf).all()


def test_pads_get_no_gradient_and_one_mask_serves_all_heads(xp: Any) -> None:
    rng = Rng(6)
    x, v = (Tensor(rng.normal((2, 3, 9, 4), dtype="float64"), requires_grad=True) for _ in "xv")
    rotations = rng.normal((3, 2, 4, 2), dtype="float64")
    real = xp.asarray(np.arange(9) < np.array([[9], [6]]))
    y = lsh_attention(x, v, rotations, 4, False, real[:, None])
    for g in grad((y * y).sum(), [x, v]):
        assert np.isfinite(host(g)).all() and not host(g)[1, :, 6:].any()
        assert host(g)[1, :, :6].any()


# Derivatives, dtypes, edges


@pytest.mark.parametrize(("is_causal", "strict"), [(False, False), (True, False), (True, True)])
def test_derivatives(xp: Any, is_causal: bool, strict: bool) -> None:
    """To order 2, of the logsumexp too; the last chunk is not full and some tokens are alone."""
    x, v, rotations = arguments(7, 8, 2, 4)
    check_grads(
        lambda x, v: lsh_attention(
            x, v, rotations, 3, is_causal, strict=strict, return_logsumexp=True
        ),
        x, v, dtypes=("float64",),
    )  # fmt: skip


def test_float32_stays_float32(xp: Any) -> None:
    x, v, rotations = (a.astype("float32") for a in arguments(8, 11, 2, 4))
    x, v = Tensor(x, requires_grad=True), Tensor(v, requires_grad=True)
    y, size = lsh_attention(
        x, v, rotations, 3, True, xp.arange(11) > 1, scale=0.5, return_logsumexp=True
    )
    assert y.dtype == size.dtype == "float32"
    assert all(g.dtype == "float32" for g in grad(y.sum() + size[2:].sum(), [x, v]))


def test_a_token_that_is_alone_gets_its_own_value(xp: Any) -> None:
    """Exactly, also the first of a text; its logit is its own length times the scale."""
    x, v, rotations = arguments(9, 1, 3, 2)
    for m in (1, 5):
        y, size = lsh_attention(x, v, rotations, m, True, return_logsumexp=True)
        np.testing.assert_array_equal(host(y), host(v))
        assert_close(size, np.linalg.norm(host(x), axis=-1) / math.sqrt(3))


def test_edges(xp: Any) -> None:
    """No tokens, no texts, d = 1, zero vectors, large logits."""
    x, v, rotations = arguments(10, 7, 2, 4)
    assert lsh_attention(x[:0], v[:0], rotations, 3).shape == (0, 2)
    assert lsh_attention(x[:0], v[:0], rotations, 3, return_logsumexp=True)[1].shape == (0,)
    none = xp.zeros((0, 2, 7, 3)), xp.zeros((0, 2, 7, 2))
    assert lsh_attention(*none, rotations, 3).shape == (0, 2, 7, 2)
    assert lsh_attention(x[:, :1], v, rotations[:, :1], 3).shape == (7, 2)
    zero = Tensor(xp.zeros((7, 3)), requires_grad=True)
    y = lsh_attention(zero, v, rotations, 7)
    others = (host(v).sum(axis=0) - host(v)) / 6
    assert_close(y, others)
    assert np.isfinite(host(grad(y.sum(), zero)[0])).all()
    large = Tensor(1e4 * x, requires_grad=True)
    y = lsh_attention(large, v, rotations, 3)
    assert np.isfinite(host(y)).all() and np.isfinite(host(grad(y.sum(), large)[0])).all()


def test_float16_is_summed_in_float32(xp: Any) -> None:
    """Of the same numbers; the squares of a vector add up to 80,000 here, the values to 180,000."""
    x, v, rotations = (a.astype("float16") for a in arguments(8, 3000, 1, 2))
    x, v = x * 0 + xp.asarray([200.0, 200.0, 0.0], dtype="float16"), v * 0 + 60.0
    half = lsh_attention(x, v, rotations, 3000, return_logsumexp=True)
    assert half[0].dtype == half[1].dtype == "float16"
    assert_close(host(half[0]), host(v), rtol=1e-3)
    assert_close(host(half[1]), math.sqrt(80_000 / 3) + math.log(2999), rtol=2e-3)


def test_numbers_of_numpy_and_lists(xp: Any) -> None:
    """A scale of NumPy's does not widen; factors of a hash may be a list."""
    x, v, first = (a.astype("float32") for a in arguments(8, 11, 2, 4))
    y = lsh_attention(x, v, first, 3, scale=np.float64(0.5))
    assert y.dtype == "float32"
    assert_close(y, lsh_attention(x, v, first, 3, scale=0.5), rtol=0, atol=0)
    np.testing.assert_array_equal(
        host(lsh_hash(x, [first, first])), host(lsh_hash(x, (first, first)))
    )
    shapes = [r.shape for r in LSHAttention([4, 2], 3, rng=Rng(0)).rotations((), 3, "float32")]
    assert shapes == [(1, 3, 2), (1, 3, 1)]


def test_wrong_arguments(xp: Any) -> None:
    x, v, rotations = arguments(11, 6, 2, 4)
    with pytest.raises(ValueError, match=r"value \(…, n, e\)"):
        lsh_attention(x, v[:5], rotations, 3)
    with pytest.raises(ValueError, match="rotations"):
        lsh_attention(x, v, rotations[0], 3)
    with pytest.raises(ValueError, match="rotations"):
        lsh_attention(x, v, rotations[:, :2], 3)
    with pytest.raises(ValueError, match="leading axes of rotations"):
        lsh_attention(x, v, xp.stack([rotations, rotations]), 3)
    with pytest.raises(ValueError, match="chunk_size"):
        lsh_attention(x, v, rotations, 0)
    with pytest.raises(ValueError, match="is_causal=True"):
        lsh_attention(x, v, rotations, 3, strict=True)
    with pytest.raises(ValueError, match=r"value \(…, n, e\)"):
        lsh_attention(x[0], v[0], rotations, 3)
    for mask, error, words in (
        (xp.ones(6, dtype="int64"), TypeError, "booleans"),
        (xp.ones(6), TypeError, "booleans"),
        (xp.ones(5, dtype="bool"), ValueError, "key_mask"),
    ):
        with pytest.raises(error, match=words):
            lsh_attention(x, v, rotations, 3, key_mask=mask)
    wrongs: Any = [(3, 2, 1), (0, 2, 1), (4, 0, 1), (4, 2, 0), ((4, 3), 2, 1), ((), 2, 1)]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="even number of buckets"):
            LSHAttention(*wrong)
    with pytest.raises(ValueError, match="as many queries as keys"):
        LSHAttention(4, 2)(x[:2], x, v)
    with pytest.raises(ValueError, match=r"query \(…, n, d\)"):
        LSHAttention(4, 2)(x[:, :2], x, v)
    with pytest.raises(ValueError, match="same leading axes"):
        LSHAttention(4, 2)(xp.stack([x, x]), x[None], v[None])


def test_no_matrix_of_n_by_n(xp: Any, backend_name: str) -> None:
    """The largest array has r n · 2 m numbers: four times the tokens, four times the memory."""
    import tracemalloc

    if backend_name == "cupy":
        pytest.skip("tracemalloc does not see the memory of a device")
    peaks = []
    for n, b in ((512, 8), (2048, 16)):  # about 8 tokens in each of b² buckets
        x, v, first = arguments(12, n, 2, b)
        rotations = first, arguments(13, n, 2, b)[2]
        tracemalloc.start()
        lsh_attention(x, v, rotations, 16, is_causal=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4.5 * peaks[0]
    assert peaks[1] < 2048 * 2048 * 8


# The module


def test_the_module_draws_in_training_only(xp: Any) -> None:
    """In evaluation the hashes are the same at each call, and those of another layer are not."""
    rng = Rng(0)
    x, v = rng.normal((2, 3, 12, 4)), rng.normal((2, 3, 12, 4))
    layer, other = LSHAttention(4, 3, 2, rng=Rng(1)), LSHAttention(4, 3, 2, rng=Rng(2))
    first, second = host(layer(x, x, v)), host(layer(x, x, v))
    assert (first != second).any()
    layer.eval()
    state = layer.rng.state_dict()
    np.testing.assert_array_equal(host(layer(x, x, v)), host(layer(x, x, v)))
    assert layer.rng.state_dict() == state
    assert (host(layer(x, x, v)) != host(other.eval()(x, x, v))).any()
    np.testing.assert_array_equal(host(layer(7.0 * x, x, v)), host(layer(x, x, v)))
    rotations = layer.rotations((3,), 4, "float32")
    assert [r.shape for r in rotations] == [(3, 2, 4, 2)]
    factors = LSHAttention((2, 6), 3, rng=Rng(3)).rotations((), 4, "float64")
    assert [r.shape for r in factors] == [(1, 4, 1), (1, 4, 3)]
    assert_close(layer(x, x, v), lsh_attention(x, v, rotations, 3))


def test_the_last_query_knows_the_pads(xp: Any) -> None:
    """One query is the last row of the causal call, with the same mask of the keys."""
    rng = Rng(4)
    x, v = (rng.normal((2, 3, 12, 4), dtype="float64") for _ in "xv")
    layer = LSHAttention(4, 3, 2, rng=Rng(1)).eval()
    real = xp.asarray(np.arange(12) % 5 != 2)
    want = host(layer(x, x, v, is_causal=True, key_mask=real))[..., -1:, :]
    assert_close(layer(x[..., -1:, :], x, v, key_mask=real), want)
    assert np.abs(host(layer(x[..., -1:, :], x, v)) - want).max() > 1e-3


def test_a_mask_for_logits_is_refused(xp: Any) -> None:
    """It stands where the other layers have it, and a GPT's pads come as one."""
    x = xp.ones((1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"attn_mask of shape \(3, 3\).*key_mask"):
        LSHAttention(4, 3)(x, x, x, xp.ones((3, 3), dtype="bool"))
    config = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = GPT(config, Rng(0), [Block(config, Rng(0), LSHAttention(4, 3, rng=Rng(0)))])
    with pytest.raises(ValueError, match="key_mask"):
        model([[1, 2, 3]], attention_mask=xp.asarray([[0, 1, 1]]))


def test_in_a_gpt(xp: Any) -> None:
    """Strict attention with a cache, token by token, gives the logits of one pass."""
    config = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    blocks = [
        Block(config, Rng(i), LSHAttention(4, 3, 2, strict=True, rng=Rng(i))) for i in range(2)
    ]
    model = GPT(config, Rng(0), blocks).astype("float64").eval()
    ids = [[1, 5, 2, 8, 3, 3, 9, 0, 10, 4]]
    cache = model.new_cache(10)
    with no_grad():
        whole = host(model(ids))
        steps = [host(model([[token]], cache=cache))[:, 0] for token in ids[0]]
    assert_close(np.stack(steps, axis=1), whole, rtol=1e-9, atol=1e-10)
    model.train()
    loss = model(ids).sum()
    loss.backward()
    g = host(model.transformer.h[0].attn.c_attn.weight.grad)
    assert not g[:, :8].any() and g[:, 8:16].any() and g[:, 16:].any()


# Goldens


@pytest.mark.parametrize("k", range(len(CASES)))
def test_golden_attention(xp: Any, k: int) -> None:
    """reformer-pytorch's layer and gradients; it adds 1e-9 to Nᵢⱼ."""
    rounds, is_causal = CASES[k]
    part = {name: GOLDEN[f"attend.{k}.{name}"] for name in ("in.qk", "in.v", "rotations", "out")}
    rotations = xp.asarray(part["rotations"].transpose(1, 0, 2))
    assert len(rotations) == rounds
    x, v = (Tensor(xp.asarray(part[f"in.{name}"]), requires_grad=True) for name in ("qk", "v"))
    y = lsh_attention(x, v, rotations, CHUNK, is_causal)
    assert_close(y, part["out"], rtol=1e-7, atol=1e-8)
    cotangent = xp.asarray(np.cos(0.7 * np.arange(y.size) + 0.3).reshape(y.shape))
    for name, g in zip(("qk", "v"), grad(y, [x, v], cotangent), strict=True):
        assert_close(g, GOLDEN[f"attend.{k}.grad.{name}"], rtol=1e-7, atol=1e-8)


def test_golden_hash(xp: Any) -> None:
    """transformers' buckets; a pad's is the one behind all others."""
    x, rotations = xp.asarray(GOLDEN["hash.x"]), GOLDEN["hash.rotations"].transpose(0, 2, 1, 3)
    buckets = host(lsh_hash(x, xp.asarray(rotations)))
    np.testing.assert_array_equal(buckets, GOLDEN["hash.all"])
    factors = xp.asarray(rotations[..., :1]), xp.asarray(rotations[..., 1:])
    np.testing.assert_array_equal(host(lsh_hash(x, factors)), GOLDEN["hash.factors"])
    padded = np.where(GOLDEN["hash.real"][:, None, None, :], buckets, 6)
    np.testing.assert_array_equal(padded, GOLDEN["hash.padded"])


def test_golden_single_bucket(xp: Any) -> None:
    """transformers' layer, whose scale is 1; it does not look at buckets, so here all are one."""
    x = GOLDEN["one.x"]

    def heads(name: str) -> Any:
        y = x @ GOLDEN[f"one.{name}"].T
        return xp.asarray(y.reshape(*x.shape[:2], 2, 4).transpose(0, 2, 1, 3))

    y = lsh_attention(
        heads("query_key"), heads("value"), xp.zeros((3, 4, 2)), CHUNK, True, scale=1.0
    )
    assert_close(host(y).transpose(0, 2, 1, 3).reshape(x.shape), GOLDEN["one.out"], rtol=1e-9)
