"""Divergences against NumPy, their laws and gradients; consistency; what the buffer keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.check import check_grads
from mini_nn.decoding import acceptance, jacobi_iterate
from mini_nn.losses import (
    OnlineBuffer,
    acceptance_rate,
    before_end,
    cllm_loss,
    forward_kl,
    global_consistency,
    jensen_shannon,
    local_consistency,
    reverse_kl,
    total_variation,
)
from mini_nn.nn import functional as F
from mini_nn.optim import SGD
from models.gpt import GPT, GPTConfig
from models.speculative import speculative_generate
from tests.support import assert_close, host


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def xlogy(a: Any, b: Any, c: Any) -> float:
    """Σ a ln(b/c) in a loop, with 0 ln 0 = 0."""
    terms = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    return math.fsum(x * math.log(y / z) for x, y, z in terms if x > 0.0)


def skew(p: Any, q: Any, beta: float = 0.5) -> float:
    m = beta * p + (1.0 - beta) * q
    return beta * xlogy(p, p, m) + (1.0 - beta) * xlogy(q, q, m)


ORACLES: dict[Callable[..., Any], Callable[[Any, Any], float]] = {
    forward_kl: lambda p, q: xlogy(p, p, q),
    reverse_kl: lambda p, q: xlogy(q, q, p),
    jensen_shannon: skew,
    total_variation: lambda p, q: 0.5 * math.fsum(np.abs(p - q).tolist()),
}
LOSSES = pytest.mark.parametrize("loss", ORACLES, ids=lambda f: f.__name__)


def pair(seed: int, shape: Any = (2, 3, 5), dtype: str = "float64") -> tuple[Any, Any]:
    return tuple(Rng(seed + i).normal(shape, std=1.5, dtype=dtype) for i in (0, 1))  # type: ignore[return-value]


@LOSSES
def test_values(xp: Any, loss: Any) -> None:
    """Each token against a loop; mean, sum, and a mask that leaves tokens out."""
    student, teacher = pair(0)
    q, p = softmax(host(student)), softmax(host(teacher))
    wanted = np.array([[ORACLES[loss](p[i, j], q[i, j]) for j in range(3)] for i in range(2)])
    assert_close(loss(student, teacher, reduction="none"), wanted)
    assert_close(loss(student, teacher), np.asarray(wanted.mean()))
    assert_close(loss(student, teacher, reduction="sum"), np.asarray(wanted.sum()))
    mask = np.array([[True, False, True], [False, False, True]])
    on = xp.asarray(mask)
    assert_close(loss(student, teacher, on), np.asarray(wanted[mask].mean()))
    assert_close(loss(student, teacher, on, "none"), np.where(mask, wanted, 0.0))
    assert np.isnan(host(loss(student, teacher, xp.zeros((2, 3), dtype=bool))))
    assert host(loss(student, teacher, xp.zeros((2, 3), dtype=bool), "sum")) == 0.0
    for shift in (3.0, -7.0):  # logits are logits
        assert_close(loss(student + shift, teacher), loss(student, teacher))


@LOSSES
def test_gradients_to_second_order(xp: Any, loss: Any) -> None:
    student, teacher = pair(3, (3, 4))
    check_grads(loss, student, teacher)
    mask = xp.asarray([True, False, True])
    check_grads(lambda a, b: loss(a, b, mask), student, teacher)
    check_grads(lambda a, b: loss(a, b, None, "none"), student, teacher)


def test_gradient_of_the_forward_kl_is_q_minus_p(xp: Any) -> None:
    student, teacher = pair(4, (1, 6))
    x = Tensor(student, requires_grad=True)
    (g,) = grad(forward_kl(x, teacher), x)
    assert_close(g, softmax(host(student)) - softmax(host(teacher)))


@given(seed=st.integers(0, 1000), beta=st.floats(0.05, 0.95))
def test_laws(xp: Any, seed: int, beta: float) -> None:
    a, b = pair(2 * seed, (4, 6))
    none = {"reduction": "none"}
    tv, kl = host(total_variation(a, b, **none)), host(forward_kl(a, b, **none))
    js = host(jensen_shannon(a, b, beta=beta, **none))
    assert (tv >= 0.0).all() and (tv <= 1.0).all()
    assert (kl >= 2.0 * tv * tv - 1e-12).all()  # Pinsker
    assert_close(reverse_kl(a, b, **none), forward_kl(b, a, **none))
    assert_close(total_variation(b, a, **none), tv)
    assert_close(js, jensen_shannon(b, a, beta=1.0 - beta, **none))
    entropy = -beta * math.log(beta) - (1.0 - beta) * math.log(1.0 - beta)
    assert (js >= 0.0).all() and (js <= entropy + 1e-12).all()
    wanted = [acceptance(x, y) for x, y in zip(softmax(host(a)), softmax(host(b)), strict=True)]
    assert_close(acceptance_rate(a, b), np.asarray(np.mean(wanted)))


def test_the_skewed_divergence_tends_to_the_forward_kl(xp: Any) -> None:
    student, teacher = pair(5)
    gaps = [
        float(host(jensen_shannon(student, teacher, beta=beta) / beta))
        - float(host(forward_kl(student, teacher)))
        for beta in (1e-3, 1e-6)
    ]
    assert abs(gaps[1]) < 1e-4 < 10.0 * abs(gaps[0])
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="beta is between"):
            jensen_shannon(student, teacher, beta=beta)


@LOSSES
def test_nothing_to_learn_from_an_equal(xp: Any, loss: Any) -> None:
    """KL 0 ⇒ α = 1; value and gradient are 0, the total variation's at its kink included."""
    x = Tensor(pair(6)[0], requires_grad=True)
    value = loss(x, x.data)
    assert abs(float(host(value))) < 1e-15
    (g,) = grad(value, x)
    assert np.abs(host(g)).max() < 1e-15
    assert float(host(acceptance_rate(x.data, x.data))) == 1.0


@LOSSES
def test_a_teacher_that_excludes_tokens(xp: Any, loss: Any) -> None:
    """ln p = −∞: no nan; the reverse KL is truly infinite, the others are not."""
    student, teacher = (host(x) for x in pair(7, (2, 4)))
    q = softmax(student)
    teacher[:, 1] = -np.inf
    p = softmax(teacher)
    with np.errstate(divide="ignore"):
        logs = xp.asarray(np.log(p))
    x = Tensor(xp.asarray(student), requires_grad=True)
    value = loss(x, logs, reduction="none")
    if loss is reverse_kl:
        assert (host(value) == np.inf).all()
        return
    assert_close(value, np.array([ORACLES[loss](p[i], q[i]) for i in range(2)]))
    (g,) = grad(ops.sum(value), x)
    assert np.isfinite(host(g)).all()
    # both exclude the same: the rest is as if there were no such token
    student[:, 1] = -np.inf
    x = Tensor(xp.asarray(student), requires_grad=True)
    value = loss(x, logs, reduction="none")
    rest = [xp.asarray(y[:, [0, 2, 3]]) for y in (student, host(logs))]
    assert_close(value, host(loss(*rest, reduction="none")))
    (g,) = grad(ops.sum(value), x)
    assert np.isfinite(host(g)).all()
    assert (host(g)[:, 1] == 0.0).all()


@LOSSES
def test_dtypes_and_errors(xp: Any, loss: Any) -> None:
    student, teacher = pair(8, (2, 3, 5), "float32")
    mask = xp.asarray(np.array([[True, False, True], [True, True, True]]))
    for reduction in ("none", "mean", "sum"):
        x = Tensor(student, requires_grad=True)
        value = loss(x, teacher, mask, reduction)
        assert value.dtype == "float32"
        (g,) = grad(ops.sum(value), x)
        assert g.dtype == "float32"
    assert np.isnan(host(loss(student[:, :0], teacher[:, :0])))
    with pytest.raises(ValueError, match="logits of student and teacher"):
        loss(student, teacher[:1])
    with pytest.raises(ValueError, match="mask has a boolean for each token"):
        loss(student, teacher, mask[0])
    with pytest.raises(ValueError, match="reduction is"):
        loss(student, teacher, reduction="batch")


@LOSSES
def test_descent_raises_the_acceptance(xp: Any, loss: Any) -> None:
    """Free logits: every divergence does in the end, and of equal steps TV's does at each."""
    student, teacher = pair(9, (20, 6))
    x = Tensor(student, requires_grad=True)
    rates = []
    for _ in range(60):
        rates.append(float(host(acceptance_rate(x.data, teacher))))
        (g,) = grad(loss(x, teacher, reduction="sum"), x)
        x = Tensor(x.data - 0.3 * g.data, requires_grad=True)
    assert rates[-1] > rates[0] + 0.1
    if loss is total_variation:
        assert all(b > a - 1e-3 for a, b in itertools.pairwise(rates))


def model(seed: int, layers: int = 1) -> GPT:
    config = GPTConfig(9, 24, 8, layers, 2, initializer_range=0.5)
    return GPT(config, Rng(seed)).astype("float64")


def test_a_distilled_draft_stands_more_often(xp: Any) -> None:
    """On the draft's own texts, as in DistillSpec; counted by decoding, not by the loss."""
    target, draft = model(0, 2).eval(), model(1)
    prompts = [[i % 9, (3 * i) % 9] for i in range(12)]

    def rate() -> float:
        rngs = [Rng(50 + i) for i in range(12)]
        run = speculative_generate(target, draft, prompts, 18, count=3, rng=rngs)
        emitted = sum(one.emitted for one in run.counts)
        return emitted / sum(one.rounds for one in run.counts)

    before = rate()
    optimizer = SGD([*draft.parameters()], 0.5)
    for step in range(25):
        texts = host(draft.generate(xp.asarray(prompts), 10, rng=Rng(step)))
        ids = xp.asarray(texts)
        optimizer.zero_grad()
        loss = total_variation(draft(ids), target(ids).data)
        loss.backward()
        optimizer.step()
    assert rate() > before + 0.3


# Consistency


def trajectory(made: GPT, text: list[int], start: list[int]) -> list[list[int]]:
    def rows(tokens: Any, count: int) -> Any:
        return host(made([[*tokens]]))[0, -count:]

    return jacobi_iterate(rows, text, start).states


def logits_of(made: GPT, text: list[int], states: list[list[int]], xp: Any) -> Any:
    """(J, n, V): row i of a state is what the model thinks of its token i."""
    ids = xp.asarray([[*text, *state[:-1]] for state in states])
    return made(ids)[:, len(text) - 1 :]


def test_consistency_on_a_real_trajectory(xp: Any) -> None:
    made, text = model(2), [1, 2, 3]
    states = trajectory(made, text, [0, 0, 0, 0, 0])
    assert len(states) > 2
    logits = logits_of(made, text, states, xp)
    laws = softmax(host(logits))
    n = len(states) - 1
    wanted = [[xlogy(p, p, q) for p, q in zip(laws[-1], laws[j], strict=True)] for j in range(n)]
    got = global_consistency(logits[:-1], logits[-1])
    assert_close(got, np.asarray(np.mean(wanted)))
    local = [[xlogy(p, p, q) for p, q in zip(laws[j + 1], laws[j], strict=True)] for j in range(n)]
    assert_close(local_consistency(logits), np.asarray(np.mean(local)))
    # row i looks at the tokens before i only: what agrees with the fixed point costs nothing
    each = host(global_consistency(logits[:-1], logits[-1], reduction="none"))
    for j, state in enumerate(states[:-1]):
        same = 0
        while state[same] == states[-1][same]:
            same += 1
        assert np.abs(each[j, : same + 1]).max() < 1e-12
    assert each.max() > 1e-3
    # at the fixed point there is nothing to learn
    fixed = logits_of(made, text, [states[-1]] * 3, xp)
    assert abs(float(host(global_consistency(fixed[:-1], fixed[-1])))) < 1e-15
    assert abs(float(host(local_consistency(fixed)))) < 1e-15


def test_no_gradient_flows_into_the_teacher(xp: Any) -> None:
    states = Tensor(Rng(0).normal((3, 4, 5), dtype="float64"), requires_grad=True)
    (g,) = grad(global_consistency(states[:-1], states[-1]), states)
    assert (host(g)[-1] == 0.0).all()
    assert np.abs(host(g)[:-1]).min() > 0.0
    (g,) = grad(local_consistency(states), states)
    assert (host(g)[-1] == 0.0).all()
    # each state is a student of the next one, and only that: as with the teachers held fixed
    x = Tensor(states.data[:-1], requires_grad=True)
    (wanted,) = grad(forward_kl(x, states.data[1:]), x)
    assert_close(host(g)[:-1], host(wanted))


def test_gradients_of_consistency(xp: Any) -> None:
    states = Rng(1).normal((2, 3, 4), dtype="float64")
    anchor = host(Rng(2).normal((3, 4), dtype="float64"))

    def run(x: Any) -> Any:
        fixed = xp.asarray(anchor.astype(x.dtype))
        return global_consistency(x, fixed, xp.asarray([True, True, False]))

    check_grads(run, states)
    check_grads(lambda x: global_consistency(x, xp.asarray(anchor), None, reverse_kl), states,
                dtypes=["float64"])  # fmt: skip


def test_tokens_after_the_end_do_not_count(xp: Any) -> None:
    tokens = xp.asarray([[3, 7, 1, 7, 2], [1, 2, 3, 4, 5], [8, 7, 8, 8, 8]])
    assert host(before_end(tokens, [7, 8])).tolist() == [
        [True, True, False, False, False],
        [True] * 5,
        [True, False, False, False, False],
    ]
    assert host(before_end(tokens, [])).all()
    states = Rng(0).normal((3, 2, 5, 4), dtype="float64")
    fixed = Rng(1).normal((3, 5, 4), dtype="float64")
    mask = before_end(tokens, [7, 8])
    x = Tensor(states, requires_grad=True)
    value = global_consistency(x, fixed, mask)
    (g,) = grad(value, x)
    on = np.broadcast_to(host(mask)[:, None], (3, 2, 5))
    assert (host(g)[~on] == 0.0).all()
    each = host(global_consistency(states, fixed, reduction="none"))
    assert_close(value, np.asarray(each[on].mean()))
    with pytest.raises(ValueError, match="mask has a boolean"):
        global_consistency(states, fixed, mask[0])
    with pytest.raises(ValueError, match="of the fixed point"):
        global_consistency(states, fixed[:2])
    with pytest.raises(ValueError, match="two or more"):
        local_consistency(states[:, :1])


def test_the_whole_loss_of_a_consistency_model(xp: Any) -> None:
    states, fixed = pair(10, (2, 3, 4))[0], pair(11, (3, 4))[0]
    logits, labels = pair(12, (2, 3, 4))[0], xp.asarray([[0, 1, -100], [3, -100, 2]])
    plain = F.cross_entropy(logits.reshape(-1, 4), labels.reshape(-1))
    for weight in (0.0, 10.0):
        got = cllm_loss(states, fixed, logits, labels, weight)
        assert_close(got, host(global_consistency(states, fixed)) + weight * host(plain))


# Online


def test_the_buffer_keeps_rejected_contexts_only() -> None:
    buffer = OnlineBuffer(every=2)
    p = np.arange(12.0).reshape(3, 4)
    buffer.add([1, 2], [3, 0], p, 2)
    assert not buffer.rejected
    buffer.add([1, 2], [], p[:1], 0)  # a bonus: nothing was drafted, so nothing was wrong
    assert not buffer.rejected
    buffer.add([1, 2], [3, 0], p, 1)
    buffer.add([5], [1, 1], p, 0)
    p[...] = -1.0  # rows are copies
    assert not buffer.end_request()
    assert buffer.end_request()
    first, second = buffer.take()
    assert first.context == [1, 2, 3] and first.law.tolist() == [4.0, 5.0, 6.0, 7.0]
    assert second.context == [5] and second.law.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert buffer.take() == []
    assert not buffer.end_request()  # counted anew


def test_the_latest_are_kept() -> None:
    buffer = OnlineBuffer(1, capacity=2)
    for i in range(5):
        buffer.add([i], [0], np.full((2, 2), 0.5), 0)
    assert [one.context for one in buffer.take()] == [[3], [4]]
    with pytest.raises(ValueError, match="2 drafts have 3 rows"):
        buffer.add([0], [1, 2], np.ones((2, 2)), 0)
    with pytest.raises(ValueError, match="3 rows and 3"):
        buffer.add([0], [1, 2], np.ones((3, 2)), 3)
    for wrong in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            OnlineBuffer(*wrong)


def test_the_buffer_teaches_what_was_rejected(xp: Any) -> None:
    """Filled by a verifier's verdicts on real models; training on it raises α there."""
    target, draft, text = model(0, 2).eval(), model(1), [1, 2, 3]
    buffer = OnlineBuffer(1)
    for seed in range(10):
        rng, drafts = Rng(seed), []
        for _ in range(3):
            q = softmax(host(draft([[*text, *drafts]]))[0, -1])
            drafts.append(int(rng.host.choice(9, p=q)))
        rows = host(draft([[*text, *drafts]]))[0, -4:-1]
        p, q = softmax(host(target([[*text, *drafts]]))[0, -4:]), softmax(rows)
        stands = [rng.host.random() < p[i, x] / q[i, x] for i, x in enumerate(drafts)]
        accepted = stands.index(False) if False in stands else 3
        buffer.add(text, drafts, p, accepted)
        if accepted < 3:
            assert buffer.rejected[-1].context == [*text, *drafts[:accepted]]
            assert_close(buffer.rejected[-1].law, p[accepted])
    kept = buffer.take()
    assert 0 < len(kept) <= 10

    def loss() -> Any:
        parts = [
            forward_kl(draft([one.context])[0, -1:], xp.asarray(np.log(one.law)[None]))
            for one in kept
        ]
        return ops.sum(ops.stack(parts)) * (1.0 / len(parts))

    def rate() -> float:
        rows = [softmax(host(draft([one.context]))[0, -1]) for one in kept]
        return float(np.mean([acceptance(x.law, q) for x, q in zip(kept, rows, strict=True)]))

    before, optimizer = rate(), SGD([*draft.parameters()], 0.3)
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert rate() > before + 0.1
