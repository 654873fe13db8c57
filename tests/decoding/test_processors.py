"""mini_nn.decoding.processors: penalties against their definitions, rows against single texts.

The filters (top-k, top-p, min-p) are proven in tests/models/test_generation.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor
from mini_nn.decoding import Warper, filter_logits, no_repeat_ngram, repetition_penalty
from tests.support import assert_close, host

V = 5
TEXTS = st.lists(st.integers(0, V - 1), max_size=9)
SEEDS = st.integers(0, 2**32)
PENALTIES = st.sampled_from([0.5, 1.0, 1.3, 4.0])


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# The penalty


@given(SEEDS, TEXTS, PENALTIES)
def test_the_penalty_token_by_token(xp: Any, seed: int, text: list[int], theta: float) -> None:
    logits = Rng(seed).normal((2, V), std=3.0)
    got = host(repetition_penalty(logits, text, theta))
    assert got.dtype == np.float32
    for row, seen in zip(got, host(logits), strict=True):
        for token in range(V):
            x = seen[token]
            if token in text:
                x = x / np.float32(theta) if x > 0 else x * np.float32(theta)
            assert_close(row[token], x, 1e-6)


@given(SEEDS, TEXTS, st.floats(1.0, 10.0))
def test_repetition_becomes_less_probable(
    xp: Any, seed: int, text: list[int], theta: float
) -> None:
    """Whatever the signs; Keskar et al.'s own division makes a negative logit more probable."""
    assume(0 < len({*text}) < V)
    logits = Rng(seed).normal((V,), dtype="float64")
    again = sorted({*text})
    before, after = (
        softmax(host(x))[again].sum() for x in (logits, repetition_penalty(logits, text, theta))
    )
    assert after <= before + 1e-12
    negative = -abs(host(logits)) - 0.1
    divided = negative.copy()
    divided[again] /= theta
    assert softmax(divided)[again].sum() >= softmax(negative)[again].sum() - 1e-12


def test_penalty_limits(xp: Any) -> None:
    logits = xp.asarray(np.array([2.0, 0.0, -2.0, -np.inf], "float32"))
    got = repetition_penalty(logits, [0, 1, 2, 3, 0, 0], 2.0)  # once is as much as three times
    assert_close(got, np.array([1.0, 0.0, -4.0, -np.inf], "float32"), 0, 0)
    assert repetition_penalty(logits, [0], 1.0) is logits
    assert repetition_penalty(logits, [], 2.0) is logits
    for theta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 0"):
            repetition_penalty(logits, [0], theta)
    for text in ([4], [-1], [0, 17]):
        with pytest.raises(ValueError, match="leave out padding"):
            repetition_penalty(logits, text, 2.0)
        with pytest.raises(ValueError, match="leave out padding"):
            no_repeat_ngram(logits, text, 2)
    with pytest.raises(TypeError, match="integer"):
        repetition_penalty(logits, [0.5], 2.0)  # type: ignore[list-item]


def test_penalties_of_tensors(xp: Any) -> None:
    """They stay on the tape."""
    x = Tensor(xp.asarray(np.array([2.0, 3.0, -2.0])), requires_grad=True)
    y = no_repeat_ngram(repetition_penalty(x, [0, 2], 2.0), [1, 0, 1], 2)
    assert isinstance(y, Tensor)
    assert_close(y, [-np.inf, 3.0, -4.0], 0, 0)
    (g,) = mini_nn.grad(y, x, xp.asarray(np.ones(3)))
    assert_close(g, [0.0, 1.0, 2.0], 0, 0)


# The n-grams


def ngrams(text: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


@given(SEEDS, TEXTS, st.integers(1, 4))
def test_no_sequence_comes_twice(xp: Any, seed: int, text: list[int], n: int) -> None:
    """A token is forbidden iff the text that ends with it has its last n-gram elsewhere too."""
    repeats = [x for x in range(V) if (g := ngrams([*text, x], n)) and g[-1] in ngrams(text, n)]
    logits = Rng(seed).normal((3, V))
    if len(repeats) == V:
        with pytest.raises(ValueError, match="nothing may follow"):
            no_repeat_ngram(logits, text, n)
        return
    wanted = host(logits).copy()
    wanted[:, repeats] = -np.inf
    before = host(logits).copy()
    assert_close(no_repeat_ngram(logits, text, n), wanted, 0, 0)
    assert_close(logits, before, 0, 0)


@given(SEEDS, st.integers(1, 3))
def test_a_text_written_under_the_rule_has_no_repeated_sequence(xp: Any, seed: int, n: int) -> None:
    text: list[int] = []
    for i in range(min(V**n, 12)):
        logits = Rng(seed + i).normal((V,))
        try:
            text.append(int(host(no_repeat_ngram(logits, text, n)).argmax()))
        except ValueError:  # every continuation is used up
            break
    assert len({*ngrams(text, n)}) == len(ngrams(text, n))
    assert len(text) >= V


def test_ngram_edges(xp: Any) -> None:
    logits = xp.asarray(np.zeros(V))
    assert no_repeat_ngram(logits, [], 1) is logits
    assert no_repeat_ngram(logits, [0], 2) is logits
    assert no_repeat_ngram(logits, [0, 1], 4) is logits
    assert np.isneginf(host(no_repeat_ngram(logits, [3, 3], 1))).tolist() == [0, 0, 0, 1, 0]
    assert np.isneginf(host(no_repeat_ngram(logits, [3, 3], 2))).tolist() == [0, 0, 0, 1, 0]
    assert no_repeat_ngram(logits, [3, 3], 3) is logits
    with pytest.raises(ValueError, match="nothing may follow"):
        no_repeat_ngram(logits, range(V), 1)
    with pytest.raises(ValueError, match="at least 1"):
        no_repeat_ngram(logits, [0], 0)


# All together


WARPERS = st.builds(
    Warper,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3]),
    top_p=st.sampled_from([None, 0.0, 0.7, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.2]),
    repetition_penalty=PENALTIES,
    no_repeat_ngram_size=st.sampled_from([None, 2, 3]),
)


@given(WARPERS, SEEDS, TEXTS, st.lists(st.integers(0, V - 1), max_size=3))
def test_a_row_of_a_block_is_the_row_of_its_own_text(
    xp: Any, warper: Warper, seed: int, prefix: list[int], drafts: list[int]
) -> None:
    """Bit for bit what the draft's side, or plain decoding, computes for prefix + drafts[:i]."""
    logits = Rng(seed).normal((len(drafts) + 1, V), std=2.0)
    try:
        rows = warper(logits, prefix, drafts)
    except ValueError as refusal:
        assert "nothing may follow" in str(refusal)
        return
    assert rows.shape == logits.shape and str(rows.dtype) == "float32"
    assert_close(rows.sum(axis=-1), 1.0, 1e-5)
    for i in range(len(drafts) + 1):
        assert_close(rows[i], warper(logits[i : i + 1], [*prefix, *drafts[:i]])[0], 0, 0)


@given(WARPERS, SEEDS, TEXTS)
def test_the_order(xp: Any, warper: Warper, seed: int, text: list[int]) -> None:
    """Penalty, n-grams, temperature, top-k, top-p, min-p, softmax."""
    logits = Rng(seed).normal((V,), std=2.0, dtype="float64")
    w = warper
    try:
        x = repetition_penalty(logits, text, w.repetition_penalty)
        if w.no_repeat_ngram_size is not None:
            x = no_repeat_ngram(x, text, w.no_repeat_ngram_size)
    except ValueError:
        return
    if w.temperature == 0:
        wanted = np.eye(V)[host(x).argmax()]
    else:
        wanted = softmax(host(filter_logits(x, w.temperature, w.top_k, w.top_p, w.min_p)))
    assert_close(w(logits[None], text)[0], wanted)


def test_the_penalty_comes_before_top_k(xp: Any) -> None:
    logits = xp.asarray(np.array([[3.0, 2.0, 1.5, 0.0]]))
    got = host(Warper(top_k=2, repetition_penalty=4.0)(logits, [0]))
    assert np.flatnonzero(got[0]).tolist() == [1, 2]  # after top-k it would leave 0 and 1


def test_the_plain_warper_is_softmax(xp: Any) -> None:
    logits = Rng(0).normal((3, V), dtype="float64")
    assert_close(Warper()(logits, [], [0, 1]), softmax(host(logits)), 1e-12)
    assert_close(Warper()(Tensor(logits), [], [0, 1]), softmax(host(logits)), 1e-12)
    assert_close(Warper(temperature=1e9)(logits, [], [0, 1]), 1 / V, 1e-8)
    ties = xp.asarray(np.array([[1.0, 2.0, 2.0]], "float32"))
    assert host(Warper(temperature=0.0)(ties, [])).tolist() == [[0.0, 1.0, 0.0]]


def test_refusals(xp: Any) -> None:
    logits = Rng(0).normal((2, V))
    for wrong, drafts in ((logits, []), (logits[0], [0]), (logits, [0, 1])):
        with pytest.raises(ValueError, match="a row for each"):
            Warper()(wrong, [0], drafts)
    for options in (
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram_size": 0},
    ):
        with pytest.raises(ValueError, match=r"least|between 0 and 1|above 0"):
            Warper(**options)
