"""The Reformer: transformers' answers, what it may see, what it needs, and that it learns."""

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

from mini_nn import Rng, Tensor, grad, nn, no_grad, ops, optim
from mini_nn.attention import LSHAttention
from models.reformer import (
    AxialPositions,
    Embeddings,
    FeedForward,
    Reformer,
    ReformerConfig,
    local_attention,
)
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_lsh.safetensors", framework="np"
) as _file:
    GOLDEN = {
        name.removeprefix("model."): _file.get_tensor(name)
        for name in [*_file.keys()]
        if name.startswith("model.")
    }
    OPTIONS = json.loads(_file.metadata()["options"])

SMALL: dict[str, Any] = {
    "vocab_size": 7, "hidden_size": 8, "num_attention_heads": 2, "attention_head_size": 4,
    "attn_layers": ("local", "lsh", "lsh"), "feed_forward_size": 16, "axial_pos_shape": (6, 5),
    "axial_pos_embds_dim": (2, 6), "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 3,
    "num_buckets": 4, "num_hashes": 2, "chunk_size_feed_forward": 3, "initializer_range": 0.3,
}  # fmt: skip


def small(**options: Any) -> Reformer:
    return Reformer(ReformerConfig(**{**SMALL, **options}), Rng(0)).astype("float64")


def part(prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): a for k, a in GOLDEN.items() if k.startswith(prefix)}


def test_golden_model(xp: Any) -> None:
    """Embeddings in two axes, local and LSH attention, both branches, the reversible walk back.

    Its text fits into one chunk, which transformers then does not hash: rotations of 0 do that too.
    """
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in OPTIONS.items()}
    model = Reformer(ReformerConfig(**options)).astype("float64")
    model.load_state_dict(part("state."))
    layer = model.reformer.encoder.layers[1].attention.self_attention.lsh
    layer.rotations = lambda *args: (xp.zeros((1, 3, 1)),)
    logits = model(GOLDEN["ids"])
    assert_close(logits, GOLDEN["logits"], rtol=1e-5, atol=1e-5)  # its keys have an ε of 1e-6
    cotangent = np.cos(0.7 * np.arange(logits.size) + 0.3).reshape(logits.shape)
    (logits * xp.asarray(cotangent)).sum().backward()
    wanted = part("grad.")
    found = {name: p.grad for name, p in model.named_parameters()}
    assert {*found} - {*wanted} <= {"lm_head.bias"} and len(wanted) > 25
    for name, g in wanted.items():
        assert_close(found[name], g, rtol=1e-4, atol=1e-4 * np.abs(g).max())


def test_reversible_is_the_same_network(xp: Any) -> None:
    """In training, with dropout, new hashes and chunks that run again: as with everything kept."""
    ids = np.arange(22).reshape(2, 11) % 7
    results = []
    for fast in (True, False):
        model = small(hidden_dropout_prob=0.2)
        encoder = model.reformer.encoder
        if not fast:
            encoder.forward = lambda x, e=encoder: kept(e, x)
        logits = model(ids)
        gs = grad((logits * logits).sum(), [*model.parameters()])
        results.append([host(logits), *map(host, gs)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, rtol=1e-8, atol=1e-9)


def kept(encoder: Any, x: Any) -> Any:
    x1 = x2 = x
    for layer in encoder.layers:
        x1, x2 = layer(x1, x2)
    return encoder.dropout(encoder.layer_norm(ops.concatenate([x1, x2], axis=-1)))


@given(st.integers(2, 30), st.data())
def test_causality(xp: Any, n: int, data: Any) -> None:
    """Earlier logits do not depend on what follows, nor on where the text ends."""
    model = small().eval()
    t = data.draw(st.integers(1, n - 1))
    rng = np.random.default_rng(n)
    ids, changed = rng.integers(0, 7, (2, 1, n))
    changed[:, :t] = ids[:, :t]
    with no_grad():
        first = host(model(ids))
        assert_close(host(model(changed))[:, :t], first[:, :t], rtol=1e-10, atol=1e-10)
        assert_close(model(ids[:, :t]), first[:, :t], rtol=1e-10, atol=1e-10)


def test_the_paper_s_form_is_not_quite_causal(xp: Any) -> None:
    """In some of 40 texts the last token changes an earlier logit; in the strict form in none."""
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 7, (40, 30))
    changed = texts.copy()
    changed[:, -1] = (changed[:, -1] + 1) % 7
    moved = []
    for strict in (False, True):
        model = small(strict=strict, num_buckets=2, num_hashes=1).eval()
        model.reformer.embeddings.word_embeddings.weight.data *= 10.0
        with no_grad():
            before, after = host(model(texts)), host(model(changed))
        moved.append(int((np.abs(before - after)[:, :-1].max(axis=(1, 2)) > 1e-9).sum()))
    assert moved[0] > 0 == moved[1]


# Its parts


def test_local_attention(xp: Any) -> None:
    """Softmax attention under a mask of chunks, for lengths that chunks do and do not divide."""
    for n, m in [(1, 3), (6, 3), (7, 3), (11, 4), (5, 5), (4, 9), (9, 1)]:
        q, k, v = Rng(n).normal((3, 2, n, 4), dtype="float64")
        i, j = np.arange(n)[:, None], np.arange(n)
        mask = (j <= i) & (i // m - j // m <= 1)
        want = ops.scaled_dot_product_attention(q, k, v, xp.asarray(mask))
        assert_close(local_attention(q, k, v, m), want)
        if n > 2 * m > 2:
            window = xp.asarray((j <= i) & (i - j < 2 * m))
            wrong = ops.scaled_dot_product_attention(q, k, v, window)
            assert np.abs(host(local_attention(q, k, v, m)) - host(wrong)).max() > 1e-3


def test_axial_positions(xp: Any) -> None:
    """h d₁ + w d₂ numbers make h w different rows; row t is [A[t div w], B[t mod w]]."""
    table = AxialPositions((3, 4), (2, 5), Rng(0))
    a, b = (host(p) for p in table.parameters())
    assert a.size + b.size == 3 * 2 + 4 * 5 == table.num_parameters()
    rows = host(table(11))
    for t in range(11):
        assert_close(rows[t], np.concatenate([a[t // 4, 0], b[0, t % 4]]))
    assert len(np.unique(host(table(12)), axis=0)) == 12


def test_plain_positions(xp: Any) -> None:
    model = small(axial_pos_embds_dim=None)
    assert model.reformer.embeddings.position_embeddings.embedding.weight.shape == (30, 8)
    assert model([[1, 2, 3]]).shape == (1, 3, 7)


# Its options


def test_options_reach_the_layers(xp: Any) -> None:
    model = small(layer_norm_eps=0.25, num_hashes=3)
    norms = [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert norms == [0.25] * 7
    hashes = [m for m in model.modules() if isinstance(m, LSHAttention)]
    assert [(m.rounds, m.chunk_size, m.num_buckets) for m in hashes] == [(3, 3, (4,))] * 2


@pytest.mark.parametrize(("size", "chunks"), [(0, [5]), (2, [2, 2, 1]), (9, [5])])
def test_feed_forward_takes_so_many_positions(xp: Any, size: int, chunks: list[int]) -> None:
    layer = FeedForward(ReformerConfig(**{**SMALL, "chunk_size_feed_forward": size}), Rng(0))
    seen, positions = [], layer.positions

    def noted(x: Any) -> Any:
        seen.append(x.shape[1])
        return positions(x)

    layer.positions = noted  # type: ignore[method-assign]
    assert layer(xp.ones((1, 5, 8), dtype="float32")).shape == (1, 5, 8)
    assert seen == chunks


def test_initial_weights(xp: Any) -> None:
    """Tokens and linear layers have the range that is asked for, positions 1; 40,000 numbers."""
    model = small(vocab_size=5000, feed_forward_size=5000, initializer_range=0.3)
    places = small(axial_pos_embds_dim=None, axial_pos_shape=(100, 50))
    for weight, std in (
        (model.reformer.embeddings.word_embeddings.weight, 0.3),
        (model.reformer.encoder.layers[0].feed_forward.dense.dense.weight, 0.3),
        (places.reformer.embeddings.position_embeddings.embedding.weight, 1.0),
    ):
        assert host(weight).std() == pytest.approx(std, rel=0.02)
    biases = [p for name, p in model.named_parameters() if name.endswith("dense.bias")]
    assert len(biases) == 6 and not any(host(p).any() for p in biases)


def test_what_is_dropped(xp: Any) -> None:
    """Tokens and positions, what both branches return, and what the head reads: all, if p is 1."""
    config = ReformerConfig(**{**SMALL, "hidden_dropout_prob": 1.0})
    assert not host(Embeddings(config, Rng(0))(np.zeros((1, 3), int))).any()
    model, x = Reformer(config, Rng(0)), Rng(1).normal((1, 5, 8))
    for layer in model.reformer.encoder.layers:
        layer.feed_forward.output.dense.bias = nn.Parameter(xp.ones(8, dtype="float32"))
        assert not host(layer.f(x)).any() and not host(layer.g(x)).any()
    model.lm_head.bias = nn.Parameter(xp.arange(7.0, dtype="float32"))
    assert_close(model([[1, 2]])[0], np.tile(np.arange(7.0, dtype="float32"), (2, 1)))
    branch, widths = FeedForward(config, Rng(0)), []

    def noted(x: Any) -> Any:
        widths.append(x.shape[-1])
        return x

    branch.dropout = noted  # type: ignore[assignment]
    branch(x[:, :3])
    assert widths == [16, 8]  # the hidden layer, too


def test_memory_is_flat_in_depth(xp: Any, backend_name: str) -> None:
    """16 layers need what 4 do, but for their parameters and gradients."""
    if backend_name == "cupy":
        pytest.skip("tracemalloc does not see the memory of a device")
    peaks = []
    for depth in (4, 16):
        model = small(
            attn_layers=("local", "lsh") * (depth // 2), axial_pos_shape=(16, 16),
            chunk_size_feed_forward=64, lsh_attn_chunk_length=16,
        )  # fmt: skip
        ids = np.arange(256)[None] % 7
        tracemalloc.start()
        (model(ids) ** 2).sum().backward()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0]


def test_it_learns(xp: Any) -> None:
    """Four random texts by heart, while the hashes change at each step."""
    ids = np.random.default_rng(0).integers(0, 7, (4, 18))
    model = Reformer(ReformerConfig(**{**SMALL, "chunk_size_feed_forward": 0}), Rng(0))
    adam = optim.Adam(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(50):
        logits = model(ids)[:, :-1].reshape(-1, 7)
        loss = ops.cross_entropy(logits, xp.asarray(ids[:, 1:].reshape(-1))).mean()
        losses.append(float(loss))
        model.zero_grad()
        loss.backward()
        adam.step()
    assert losses[0] > 1.8 and losses[-1] < 0.8


def test_wrong_use(xp: Any) -> None:
    with pytest.raises(ValueError, match="add up to the width"):
        small(axial_pos_embds_dim=(3, 6))
    with pytest.raises(ValueError, match="'local' or 'lsh'"):
        small(attn_layers=("local", "global"))
    for options in (
        {"local_attn_chunk_length": 0}, {"lsh_attn_chunk_length": 0},
        {"chunk_size_feed_forward": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="a chunk has at least one token"):
            small(**options)
    x = xp.ones((1, 4, 2))
    for key, size in ((x, 0), (x[:, :2], 2)):
        with pytest.raises(ValueError, match="chunks of at least one token, got"):
            local_attention(x, key, x, size)
    with pytest.raises(ValueError, match="make 12 positions, wanted 13"):
        AxialPositions((3, 4), (2, 5), Rng(0))(13)
    with pytest.raises(ValueError, match="30 positions"):
        small()([[0] * 31])
    with pytest.raises(TypeError, match="integers"):
        small()([[0.5]])
    assert isinstance(small()([[0]]), Tensor)
