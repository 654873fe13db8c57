"""Funnel-Transformer: pooling and repetition as released, stride 1, pads, and the strided FFN."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.attention import (
    Funnel,
    FunnelLayer,
    pool_sequence,
    pooled_length,
    softmax_attention,
    upsample,
)
from mini_nn.check import check_grads
from mini_nn.nn.residual import post_norm
from tests.attention.test_linear import LEADS, SEEDS
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_funnel.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118

MODES = st.sampled_from(["mean", "max"])


def normal(seed: int, *shape: int) -> Any:
    return Rng(seed).normal(shape, dtype="float64")


# Pooling


@given(SEEDS, st.integers(0, 9), st.integers(1, 4), MODES, st.booleans(), st.booleans(), LEADS)
def test_pooling_by_loops(
    xp: Any, seed: int, n: int, stride: int, mode: Any, cls: bool, cut: bool, lead: Any
) -> None:
    """Runs of tokens, of the real ones only; [CLS] apart, the end cut."""
    x = normal(seed, *lead, n, 2)
    real = Rng(seed + 1).bernoulli(0.6, (n,))
    for mask in (None, real):
        y, left = pool_sequence(x, stride, mode, cls, cut, mask)
        a = host(x)
        there = np.ones(n, bool) if mask is None else host(mask)
        first = [[0]] if cls and n else []
        rest = list(range(len(first), n))
        if cls and cut:
            rest = rest[: max(len(rest) - (stride - 1), 0)]
        runs = first + [rest[i : i + stride] for i in range(0, len(rest), stride)]
        assert y.shape[-2] == len(runs) == pooled_length(n, stride, cls, cut)
        assert host(left).tolist() == [bool(there[run].any()) for run in runs]
        for i, run in enumerate(runs):
            kept = [j for j in run if there[j]]
            pooled = {"mean": np.mean, "max": np.max}[mode]
            wanted = pooled(a[..., kept, :], axis=-2) if kept else np.zeros((*lead, 2))
            assert_close(y[..., i, :], wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [4, 6, 7, 8, 9])
def test_released_pooling(xp: Any, n: int) -> None:
    x = xp.asarray(GOLDEN["pool.x"])[:, :n]
    for cls, cut in itertools.product((False, True), repeat=2):
        for mode in ("mean", "max"):
            once, _ = pool_sequence(x, 2, mode, cls, cut)  # type: ignore[arg-type]
            y, _ = pool_sequence(once, 2, mode, cls, cut)  # type: ignore[arg-type]
            assert_close(y, GOLDEN[f"pool.{n}.{mode}.{cls}.{cut}"], rtol=1e-12, atol=1e-13)
            if mode == "mean":
                wanted = GOLDEN[f"up.{n}.{cls}.{cut}"]
                got = upsample(y, 4, n, cls, cut)
                # transformers stops short where a cut was not of a power of 2
                assert got.shape[-2] == n
                assert_close(got[:, : wanted.shape[1]], wanted, rtol=1e-12, atol=1e-13)
                assert not host(got)[:, wanted.shape[1] :].any()


def test_powers_of_two(xp: Any) -> None:
    """With [CLS] apart and the end cut, 2^k places become 2^(k−1); without the cut one more."""
    for k in range(1, 8):
        assert pooled_length(2**k) == 2 ** (k - 1)
        assert pooled_length(2**k, truncate=False) == 2 ** (k - 1) + 1
        assert pooled_length(2**k, separate_cls=False) == 2 ** (k - 1)


@given(SEEDS, st.integers(1, 9), st.integers(1, 4), st.booleans(), st.booleans())
def test_upsample(xp: Any, seed: int, n: int, stride: int, cls: bool, cut: bool) -> None:
    """What is constant on every run comes back, but for the tokens that were cut off: zeros."""
    places = pooled_length(n, stride, cls, cut)
    y = normal(seed, places, 2)
    x = upsample(y, stride, n, cls, cut)
    assert x.shape == (n, 2)
    if stride > 1:
        again, _ = pool_sequence(x, stride, "mean", cls, cut)
        assert_close(again, host(y), rtol=1e-12, atol=1e-13)
    repeated = 0 if not cls else 1
    for i in range(n):
        run = 0 if cls and i == 0 else repeated + (i - repeated) // stride
        wanted = host(y)[run] if run < places else np.zeros(2)
        assert_close(x[i], wanted, rtol=0.0, atol=0.0)


def test_cls_is_not_repeated(xp: Any) -> None:
    """What is planted: the repetition of all places, which moves every token by one."""
    y = normal(0, 4, 2)
    planted = ops.repeat(y, 2, axis=0)
    assert abs(host(planted)[1:7] - host(upsample(y, 2, 8))[1:7]).max() > 0.1


# The model


def test_released_model(xp: Any) -> None:
    """transformers' encoder and decoder, with pads too where real tokens are all that is asked."""
    model = Funnel(4, 2, 6, [1, 2, 1], 1)
    state = {n[12:]: a for n, a in GOLDEN.items() if n.startswith("model.state.")}
    for p in model.parameters():
        p.data = p.data.astype("float64")
    model.load_state_dict(state)
    x, mask = xp.asarray(GOLDEN["model.x"]), xp.asarray(GOLDEN["model.mask"])
    for prefix, real in (("model", None), ("masked", mask)):
        first, last = model.encode(x, real)
        found = {"block": first, "encoded": last, "decoded": model(x, real)}
        keep = np.ones((2, 16), bool) if real is None else GOLDEN["model.mask"]
        short = np.ones((2, 4), bool) if real is None else np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
        for name, y in found.items():
            rows = (short if name == "encoded" else keep).astype(bool)
            wanted = GOLDEN[f"{prefix}.{name}"]
            assert_close(host(y)[rows], wanted[rows], rtol=1e-9, atol=1e-10)


def by_parts(layer: FunnelLayer, x: Any) -> Any:
    """The same weights as a plain layer of a Transformer, from other parts."""
    attention, ffn = layer.attention, layer.ffn

    def attend(y: Any) -> Any:
        heads = [
            part(y).reshape((*y.shape[:-1], attention.n_head, -1)).swapaxes(1, 2)
            for part in (attention.q_head, attention.k_head, attention.v_head)
        ]
        return attention.post_proj(softmax_attention(*heads).swapaxes(1, 2).reshape(y.shape))

    def feed(y: Any) -> Any:
        return ffn.linear_2(nn.functional.gelu(ffn.linear_1(y), approximate="tanh"))

    return post_norm(post_norm(x, attention.layer_norm, attend), ffn.layer_norm, feed)


def test_stride_one_is_a_transformer(xp: Any) -> None:
    """B21; with stride 2 it is not."""
    x = Rng(0).normal((2, 6, 8))
    model = Funnel(8, 2, 12, [1, 2], 0, stride=1, rng=Rng(1))
    y = first = by_parts(model.blocks[0][0], x)
    for layer in model.blocks[1]:  # type: ignore[attr-defined]
        y = by_parts(layer, y)
    assert_close(model.encode(x)[1], host(y), rtol=2e-5, atol=5e-6)
    assert_close(model(x), host(y + first), rtol=2e-5, atol=5e-6)
    model.stride = 2
    assert model.encode(x)[1].shape == (2, 3, 8)


def test_keys_are_not_pooled(xp: Any) -> None:
    """Two sequences with equal means of pairs: pooled queries see what is lost, pooled keys not."""
    model = Funnel(4, 2, 6, [1, 1], 0, rng=Rng(0))
    head = model.blocks[1][0]
    x = normal(0, 1, 8, 4)
    swing = normal(1, 1, 3, 1, 4)
    pairs = x[:, 1:7].reshape(1, 3, 2, 4) + xp.concatenate([swing, -swing], axis=2)
    other = xp.concatenate([x[:, :1], pairs.reshape(1, 6, 4), x[:, 7:]], axis=1)
    pooled = [pool_sequence(a)[0] for a in (x, other)]
    assert_close(pooled[0], host(pooled[1]), rtol=1e-10, atol=1e-12)
    ours = [host(head(p, a)) for p, a in zip(pooled, (x, other), strict=True)]
    planted = [host(head(p)) for p in pooled]
    assert_close(planted[0], planted[1], rtol=1e-9, atol=1e-10)
    assert abs(ours[0] - ours[1]).max() > 1e-2


@given(SEEDS, st.integers(1, 9), st.integers(0, 9))
def test_pads_change_nothing(xp: Any, seed: int, n: int, pads: int) -> None:
    """A text alone has the same vectors, but that the cut is at the end of the padded one."""
    model = Funnel(4, 2, 6, [1, 1, 1], 1, rng=Rng(0))
    model.truncate = False
    x = normal(seed, 2, n + pads, 4)
    real = xp.arange(n + pads) < n
    y = model(xp.where(real[:, None], x, 1e3), real)
    assert_close(y[:, :n], host(model(x[:, :n])), rtol=1e-7, atol=1e-8)
    both = model(x, xp.stack([real, xp.ones(n + pads, "bool")]))
    assert_close(both[:1, :n], host(y)[:1, :n], rtol=1e-7, atol=1e-8)


def test_pads_in_the_mean(xp: Any) -> None:
    """What is planted: pooling of all tokens, as released."""
    x, real = normal(0, 6, 2), xp.arange(6) < 4
    y, left = pool_sequence(x, separate_cls=True, truncate=False, key_mask=real)
    planted, _ = pool_sequence(x, separate_cls=True, truncate=False)
    assert_close(y[:2], host(planted)[:2], rtol=1e-12)
    assert host(left).tolist() == [True, True, True, False]
    assert abs(host(planted - y))[2].max() > 0.1


def test_it_leaks(xp: Any) -> None:
    """Pooling alone, with a causal mask over the pooled places, shows token 1 what token 2 is."""
    x = normal(0, 9, 2)
    other = xp.concatenate([x[:2], x[2:] + 1.0])

    def planted(a: Any) -> Any:
        h, _ = pool_sequence(a, truncate=False)
        return host(upsample(softmax_attention(h, h, h, is_causal=True), 2, 9, truncate=False))

    moved = abs(planted(other) - planted(x))
    assert not moved[0].any() and moved[1].min() > 1e-3
    leaf = Tensor(normal(1, 1, 8, 4), requires_grad=True)
    model = Funnel(4, 2, 6, [1, 1], 0, rng=Rng(0))
    (g,) = grad(ops.sum(model(leaf)[:, 0] * normal(2, 4)), leaf)
    assert host(g)[:, 1:7].all()


def test_derivatives(xp: Any) -> None:
    x = normal(0, 2, 5, 2)
    check_grads(lambda a: pool_sequence(a, 2, "mean")[0], x, order=2)
    check_grads(lambda a: pool_sequence(a, 2, "max", key_mask=xp.arange(5) < 4)[0], x, order=1)
    check_grads(lambda a: upsample(a, 3, 12), x, order=2)
    model = Funnel(2, 1, 3, [1, 1], 1, rng=Rng(0))
    for p in model.parameters():
        p.data = p.data.astype("float64")
    check_grads(model, 3.0 * normal(1, 1, 5, 2), order=1, dtypes=("float64",))


def test_errors(xp: Any) -> None:
    x = normal(0, 4, 2)
    with pytest.raises(ValueError, match="stride of at least 1"):
        pool_sequence(x, 0)
    with pytest.raises(ValueError, match="'sum'"):
        pool_sequence(x, 2, "sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stride ≥ 1"):
        upsample(x, 0, 4)
    with pytest.raises(ValueError, match="do not divide"):
        FunnelLayer(8, 3, 12)
    for sizes in ([], [1, 0]):
        with pytest.raises(ValueError, match="at least one layer"):
            Funnel(4, 2, 6, sizes)
    y = Funnel(4, 2, 6, [1, 1, 1], 1, rng=Rng(0))(Rng(0).normal((2, 1, 4)))
    assert y.shape == (2, 1, 4) and y.dtype == "float32"
