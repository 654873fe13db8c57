"""Reversible blocks give what stored activations give, for memory that does not grow with depth."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, checkpoint, grad, nn, no_grad, ops
from mini_nn.check import check_grads
from mini_nn.nn import ReversibleBlock, ReversibleSequence, by_chunks
from mini_nn.nn import reversible as module
from tests.support import assert_close, host


class Branch(nn.Module):
    """Dropout of tanh(x W + b)."""

    def __init__(self, seed: int, d: int = 4, p: float = 0.0, rng: Rng | None = None) -> None:
        self.linear = nn.Linear(d, d, rng=Rng(seed)).astype("float64")
        self.dropout = nn.Dropout(p, rng=rng)
        self.runs = 0

    def forward(self, x: Any) -> Any:
        self.runs += 1
        return self.dropout(ops.tanh(self.linear(x)))


def sequence(depth: int, p: float = 0.0, rng: Rng | None = None, d: int = 4) -> ReversibleSequence:
    return ReversibleSequence(
        [ReversibleBlock(Branch(2 * i, d, p, rng), Branch(2 * i + 1, d, p, rng))
         for i in range(depth)]
    )  # fmt: skip


def leaves(seed: int = 0, shape: tuple[int, ...] = (3, 4)) -> tuple[Tensor, Tensor]:
    rng = Rng(seed)
    first, second = (Tensor(rng.normal(shape, dtype="float64")) for _ in range(2))
    first.requires_grad = second.requires_grad = True
    return first, second


def loss(y1: Any, y2: Any) -> Any:
    return (y1 * y1 * y2 + ops.sin(y2)).sum()


def gradients(fn: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[Any]:
    return [host(g) for g in grad(loss(*fn(*inputs[:2])), [*inputs], **options)]


def alike(found: Any, wanted: Any, rtol: float = 1e-10) -> None:
    for g, w in zip(found, wanted, strict=True):
        assert_close(g, w, rtol=rtol, atol=rtol)


# The block


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_what_goes_in_comes_back(xp: Any, seed: int, depth: int) -> None:
    """For any F and G, neither of which has an inverse: here a comparison and a constant, too."""
    blocks = [ReversibleBlock(Branch(seed + i), lambda x: ops.abs(x) - 0.3) for i in range(depth)]
    blocks.append(ReversibleBlock(lambda x: (x > 0).astype("float64"), ops.ones_like))
    seq = ReversibleSequence(blocks)
    x = leaves(seed)
    y = seq(*x)
    alike(seq.inverse(*y), x, 1e-12)
    alike(blocks[0].inverse(*blocks[0](*x)), x, 1e-12)
    assert np.abs(host(y[0]) - host(x[0])).max() > 1e-2


def test_the_order_of_the_two_halves_matters(xp: Any) -> None:
    """y₂ reads y₁, not x₁; going back in the other order does not lead home."""
    f, g = Branch(0), Branch(1)
    x1, x2 = leaves()
    y1, y2 = ReversibleBlock(f, g)(x1, x2)
    assert_close(y1, x1 + f(x2))
    assert_close(y2, x2 + g(x1 + f(x2)))
    assert np.abs(host(y1 - f(y2)) - host(x1)).max() > 1e-2


# The sequence against stored activations


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_values_and_gradients(xp: Any, seed: int, depth: int) -> None:
    """Of inputs and parameters, to 1e-10; forwards to the last bit."""
    seq, x = sequence(depth), leaves(seed)
    for found, want in zip(seq(*x), seq.kept(*x), strict=True):
        np.testing.assert_array_equal(host(found), host(want))
    inputs = (*x, *seq.parameters())
    assert len(inputs) == 2 + 4 * depth
    alike(gradients(seq, *inputs), gradients(seq.kept, *inputs))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_may_be_left_unused(xp: Any, used: int) -> None:
    seq, x = sequence(1), leaves()
    found, want = (grad(fn(*x)[used].sum(), x, allow_unused=True) for fn in (seq, seq.kept))
    alike(found, want)
    parameters = [*seq.blocks[0].parameters()]  # type: ignore[attr-defined]
    found, want = (
        grad(fn(*x)[used].sum(), parameters, materialize_grads=True) for fn in (seq, seq.kept)
    )
    alike(found, want)


def test_backward_and_frozen_parameters(xp: Any) -> None:
    """Leaves accumulate; what is frozen gets nothing, and inputs need not have gradients."""
    seq, (x1, x2) = sequence(3), leaves()
    seq.blocks[1].freeze()
    loss(*seq(x1.detach(), x2.detach())).backward()
    found = [p.grad for p in seq.parameters() if p.requires_grad]
    seq.zero_grad()
    loss(*seq.kept(x1, x2)).backward()
    alike(found, [p.grad for p in seq.parameters() if p.requires_grad])
    assert len(found) == 8
    seq.freeze()
    assert all(y.node is None for y in seq(x1.detach(), x2.detach()))
    first = x1.grad
    x1.grad = None
    loss(*seq(x1, x2)).backward()
    assert_close(x1.grad, first, rtol=1e-10)


def test_one_tensor_for_both_streams(xp: Any) -> None:
    """As the Reformer starts; both gradients add up."""
    seq, (x, _) = sequence(2), leaves()
    found, want = (grad(loss(*fn(x, x)), x) for fn in (seq, seq.kept))
    alike(found, want)


def test_shared_parameters(xp: Any) -> None:
    """One block several times, one branch in both halves: every use counts."""
    f, g = Branch(0), Branch(1)
    block = ReversibleBlock(f, g)
    seq = ReversibleSequence([block, block, ReversibleBlock(g, g), block])
    inputs = (*leaves(), *seq.parameters())
    assert len(inputs) == 6
    want = gradients(seq.kept, *inputs)
    alike(gradients(seq, *inputs), want)
    once = gradients(ReversibleSequence([block, ReversibleBlock(g, g)]), *inputs)
    assert np.abs(once[2] - want[2]).max() > 1e-2


def test_what_a_branch_closes_over(xp: Any) -> None:
    """Also what was computed before, and from the inputs themselves."""
    x1, x2 = leaves()
    gate = ops.sigmoid(x1 * x2)
    seq = ReversibleSequence(
        [ReversibleBlock(lambda x: x * gate, Branch(0)), ReversibleBlock(ops.sin, lambda x: x1 * x)]
    )
    inputs = (x1, x2, *seq.parameters())
    alike(*(gradients(fn, *inputs, retain_graph=True) for fn in (seq, seq.kept)))
    alike(*(grad(loss(*fn(x1, x2)), gate, retain_graph=True) for fn in (seq, seq.kept)))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_second_order(xp: Any, p: float) -> None:
    """Through the definition, whose inputs are rebuilt and whose draws are repeated."""
    rng, results = Rng(3), []
    seq, x = sequence(3, p, rng), leaves()
    inputs = [*x, *seq.parameters()]
    for fn in (seq, seq.kept):
        rng.load_state_dict(Rng(3).state_dict())
        slopes = grad(loss(*fn(*x)), inputs, create_graph=True)
        curve = grad(sum([(g * g).sum() for g in slopes]), inputs)
        results.append([host(g) for g in (*slopes, *curve)])
    alike(*results)


def test_derivatives_are_numerically_right(xp: Any) -> None:
    seq = sequence(2)
    check_grads(lambda a, b: seq(a, b), *leaves(shape=(1, 4)), dtypes=("float64",))


# Dropout


def test_dropout_is_replayed(xp: Any) -> None:
    """One generator serves all branches; after the backward pass it stands where it stood."""
    rng = Rng(5)
    seq, x = sequence(4, 0.4, rng), leaves()
    inputs = (*x, *seq.parameters())
    results, states = [], []
    for fn in (seq, seq.kept):
        rng.load_state_dict(Rng(5).state_dict())
        results.append(gradients(fn, *inputs))
        states.append(rng.state_dict())
    alike(*results)
    assert states[0] == states[1] != Rng(5).state_dict()


def test_dropout_not_replayed(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic bug, planted: neither the activations nor the gradients are those of before."""
    from contextlib import nullcontext

    rng = Rng(5)
    seq, x = sequence(4, 0.4, rng), leaves()
    want = gradients(seq.kept, *x)
    rng.load_state_dict(Rng(5).state_dict())
    monkeypatch.setattr(module, "replaying", lambda draws: nullcontext())
    wrong = gradients(seq, *x)
    assert max(np.abs(a - b).max() for a, b in zip(wrong, want, strict=True)) > 1e-2


# In company


def test_without_a_tape_it_is_the_definition(xp: Any) -> None:
    seq, x = sequence(2), leaves()
    branch = seq.blocks[0].f  # type: ignore[attr-defined]
    with no_grad():
        y = seq(*x)
    assert branch.runs == 1 and all(z.node is None for z in y)
    alike(y, seq.kept(*x), 1e-15)
    arrays = [z.data for z in x]
    seq.freeze()
    for part in seq.parameters():
        assert part.node is None
    assert ReversibleSequence([])(*x) == x
    plain = ReversibleSequence([ReversibleBlock(lambda z: z * 2.0, lambda z: z + 1.0)])
    assert not any(isinstance(z, Tensor) for z in plain(*arrays))


def test_how_often_a_branch_runs(xp: Any) -> None:
    """Once forwards and once backwards; twice backwards under create_graph."""
    seq, x = sequence(2), leaves()
    branch = seq.blocks[1].f  # type: ignore[attr-defined]
    y = loss(*seq(*x))
    assert branch.runs == 1
    grad(y, x, retain_graph=True)
    assert branch.runs == 2
    grad(y, x, create_graph=True)
    assert branch.runs == 4


class Halves(nn.Module):
    """A reversible sequence inside a branch, on the halves of the last axis."""

    def __init__(self, inner: ReversibleSequence) -> None:
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return ops.concatenate(self.inner(x[..., :2], x[..., 2:]), axis=-1)


def test_nested_and_under_checkpoint(xp: Any) -> None:
    """A sequence inside a branch of another, inside a checkpoint; with dropout on all floors."""
    rng = Rng(7)
    results = []
    for fast in (True, False):
        rng.load_state_dict(Rng(7).state_dict())
        inner, x = sequence(2, 0.3, rng, d=2), leaves()
        outer = ReversibleSequence(
            [ReversibleBlock(Halves(inner), Branch(9, 4, 0.3, rng)),
             ReversibleBlock(Branch(8), Halves(inner))]
        )  # fmt: skip
        inputs = (*x, *outer.parameters())
        if fast:
            results.append(gradients(lambda a, b, f=outer: checkpoint(f, a, b), *inputs))
            rng.load_state_dict(Rng(7).state_dict())
            results.append(gradients(outer, *inputs))
        else:
            inner.forward = inner.kept  # type: ignore[method-assign]
            results.append(gradients(outer.kept, *inputs))
    alike(results[0], results[2])
    alike(results[1], results[2])


def test_use_releases_the_graph(xp: Any) -> None:
    seq, x = sequence(2), leaves()
    y = loss(*seq(*x))
    first = grad(y, x, retain_graph=True)
    alike(grad(y, x), first, 1e-15)
    with pytest.raises(RuntimeError, match="retain_graph"):
        grad(y, x)


def test_float32_rounds_a_little_more(xp: Any) -> None:
    """What is rebuilt is not bit for bit what was there; after 16 blocks 5 digits are left."""
    seq = sequence(16).astype("float32")
    x = [Tensor(z.data.astype("float32"), requires_grad=True) for z in leaves()]
    found, want = gradients(seq, *x), gradients(seq.kept, *x)
    assert all(g.dtype == "float32" for g in found)
    assert all(
        np.abs(g - w).max() < 1e-5 * np.abs(w).max() for g, w in zip(found, want, strict=True)
    )
    assert any((g != w).any() for g, w in zip(found, want, strict=True))


def test_wrong_shapes(xp: Any) -> None:
    x1, x2 = leaves()
    for other in (x2[:2], x2.astype("float32")):
        with pytest.raises(ValueError, match="one shape and dtype"):
            sequence(1)(x1, other)
    with pytest.raises(ValueError, match="keeps shape and dtype"):
        ReversibleSequence([ReversibleBlock(lambda x: x[:1], ops.sin)])(x1, x2)
    with pytest.raises(ValueError, match="keeps shape and dtype"):
        ReversibleSequence([ReversibleBlock(lambda x: x.astype("float32"), ops.sin)])(x1, x2)


@pytest.mark.parametrize("half", [0, 1])
def test_a_branch_that_broadcasts_is_refused_everywhere(xp: Any, half: int) -> None:
    """Whether or not there is a tape, by the block alone too: x + F(x) would hide the mistake."""
    branches: list[Callable[[Any], Any]] = [ops.sin, ops.sin]
    branches[half] = lambda x: x[:1]
    block = ReversibleBlock(*branches)
    for run in (block, ReversibleSequence([block])):
        with pytest.raises(ValueError, match=r"\(3, 4\) float64 became \(1, 4\)"):
            run(*leaves())
        with no_grad(), pytest.raises(ValueError, match=r"\(3, 4\) float64 became \(1, 4\)"):
            run(*leaves())


# Memory


def peak(fn: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        fn()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reversible", [True, False])
def test_memory_is_flat_in_depth(xp: Any, backend_name: str, reversible: bool) -> None:
    """32 blocks need as much as 4, forwards and backwards together; stored activations do not.

    Nor do checkpoints, which keep a pair for each block.
    """
    if backend_name == "cupy":
        pytest.skip("tracemalloc does not see the memory of a device")
    x = leaves(shape=(64, 1024))
    array = x[0].data.nbytes
    peaks = []
    for depth in (4, 32):
        blocks = [ReversibleBlock(ops.tanh, ops.sin) for _ in range(depth)]
        seq = ReversibleSequence(blocks)

        def stored(a: Any, b: Any, blocks: Any = blocks) -> Any:
            for block in blocks:
                a, b = checkpoint(block, a, b)
            return a, b

        fn = seq if reversible else stored
        peaks.append(peak(lambda fn=fn: grad(loss(*fn(*x)), x)))  # type: ignore[misc]
    if reversible:
        assert peaks[1] < peaks[0] + 0.5 * array
    else:
        assert peaks[1] > peaks[0] + 28 * array


# Chunked feed-forward


def wide(d: int = 4, hidden: int = 64, dtype: str = "float64") -> nn.Module:
    return nn.Sequential(
        nn.Linear(d, hidden, rng=Rng(0)), nn.GELU(), nn.Linear(hidden, d, rng=Rng(1))
    ).astype(dtype)


@given(st.integers(0, 20), st.integers(1, 23), st.sampled_from([(), (2,), (2, 3)]))
def test_chunks_are_the_whole(xp: Any, n: int, size: int, lead: tuple[int, ...]) -> None:
    """Values and gradients, whether or not the chunk divides n."""
    net = wide(hidden=6)
    x = Tensor(Rng(2).normal((*lead, n, 4), dtype="float64"), requires_grad=True)
    layer = nn.ChunkedFeedForward(net, size)
    assert len([*layer.parameters()]) == 4
    inputs = [x, *net.parameters()]
    found, want = (fn(x) for fn in (layer, net))
    assert_close(found, want, rtol=1e-12, atol=1e-12)
    alike(*(grad((y * y).sum(), inputs) for y in (found, want)), rtol=1e-10)


def test_chunks_along_another_axis_and_second_order(xp: Any) -> None:
    x, _ = leaves(shape=(4, 3, 2))
    y = by_chunks(lambda z: ops.sin(z) * 2.0, x, 3, axis=0)
    assert_close(y, ops.sin(x) * 2.0)
    check_grads(lambda z: by_chunks(lambda a: ops.tanh(a) * a, z, 2), x, dtypes=("float64",))


def test_chunks_mix_nothing(xp: Any) -> None:
    """What looks at several positions is not the same by chunks: not for attention."""
    x, _ = leaves()
    whole = x - x.mean(axis=-2, keepdims=True)
    parts = by_chunks(lambda z: z - z.mean(axis=-2, keepdims=True), x, 2)
    assert np.abs(host(whole) - host(parts)).max() > 1e-2


def test_chunks_save_memory(xp: Any, backend_name: str) -> None:
    """The hidden layer of 16 positions at a time instead of 1,024, backwards too."""
    if backend_name == "cupy":
        pytest.skip("tracemalloc does not see the memory of a device")
    net = wide(8, 256)
    x = Tensor(Rng(0).normal((1024, 8), dtype="float64"), requires_grad=True)
    whole, parts = (
        peak(lambda fn=fn: grad((fn(x) ** 2).sum(), [x, *net.parameters()]))  # type: ignore[misc]
        for fn in (net, nn.ChunkedFeedForward(net, 16))
    )
    assert parts < whole / 5


@pytest.mark.parametrize("size", [2, 5, 9])
def test_every_chunk_runs_again(xp: Any, size: int) -> None:
    """Once for each chunk and once more backwards, also where one chunk is all there is."""
    branch, (x, _) = Branch(0), leaves(shape=(5, 4))
    y = by_chunks(branch, x, size)
    chunks = -(-5 // size)
    assert branch.runs == chunks
    grad(y.sum(), x)
    assert branch.runs == 2 * chunks


def test_dropout_in_chunks_is_replayed(xp: Any) -> None:
    rng = Rng(4)
    layer = nn.ChunkedFeedForward(Branch(0, 4, 0.5, rng), 2)
    x, _ = leaves(shape=(5, 4))
    y = layer(x)
    assert rng.state_dict() != Rng(4).state_dict()
    state = rng.state_dict()
    g = host(grad(y.sum(), x)[0])
    assert rng.state_dict() == state
    assert (host(y) == 0).any() and np.isfinite(g).all()
    dropped = (host(y) == 0).all(axis=-1)
    assert not g[dropped].any()


def test_no_chunks_of_0(xp: Any) -> None:
    for use in (lambda: nn.ChunkedFeedForward(nn.Identity(), 0), lambda: by_chunks(ops.sin, 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            use()
