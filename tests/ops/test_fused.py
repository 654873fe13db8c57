"""Fused layers where their definitions are delicate: −inf, large numbers, what is not asked for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, Tensor, grad, ops
from tests.support import assert_close, host

from . import catalogue_layers  # noqa: F401  (it fills the list of cases)
from .cases import CASES, Case
from .test_primitives import place

MODES = pytest.mark.parametrize("record", [False, True], ids=["first order", "recorded"])


def has_twin(case: Case) -> bool:
    return getattr(getattr(ops, case.name), "composite", None) is not None


def slope(fn: Any, x: Any, weights: Any, record: bool) -> Any:
    leaf = Tensor(x, requires_grad=True)
    return grad(fn(leaf), leaf, weights, create_graph=record)[0]


@MODES
def test_rows_of_minus_infinity(xp: Any, record: bool) -> None:
    """All of a row: softmax 0, log_softmax −inf, no gradient.  Some of it: as if they were not."""
    x = xp.asarray([[-math.inf, -math.inf, -math.inf], [-math.inf, 0.5, 1.0]])
    rest, g = x[1:, 1:], xp.asarray([[1.0, 2.0, 4.0], [3.0, 5.0, -1.0]])
    for fn, empty in ((ops.softmax, 0.0), (ops.log_softmax, -math.inf)):
        for form in (fn, fn.composite):
            y = host(form(Tensor(x)))
            assert (y[0] == empty).all() and y[1, 0] == empty
            assert_close(y[1:, 1:], fn(rest))
        found = host(slope(fn, x, g, record))
        assert not found[0].any() and found[1, 0] == 0
        assert_close(found[1:, 1:], slope(fn, rest, g[1:, 1:], record))


@MODES
@pytest.mark.parametrize("shift", [1e4, -1e6])
def test_a_shift_of_all_logits_changes_nothing(xp: Any, shift: float, record: bool) -> None:
    """Not by a bit, in float32, neither in the fused form nor in its twin.

    ln Σ eˣ taken off in one step would carry the rounding error of the shift into every result.
    """
    x = xp.asarray([[1.0, 2.0, -3.0], [0.0, 0.5, 0.25]], dtype="float32")
    target = xp.asarray([2, 0])
    moved = x + xp.asarray(shift, dtype="float32")

    def loss(logits: Any) -> Any:
        return ops.cross_entropy(logits, target, label_smoothing=0.1)

    def twin(logits: Any) -> Any:
        return ops.cross_entropy.composite(logits, target, label_smoothing=0.1)

    np.testing.assert_array_equal(host(moved - shift), host(x))
    pairs = (ops.softmax, ops.softmax.composite), (ops.log_softmax, ops.log_softmax.composite)
    for fn in itertools.chain(*pairs, (loss, twin)):
        y = fn(Tensor(x))
        np.testing.assert_array_equal(host(fn(Tensor(moved))), host(y))
        g = Rng(0).normal(y.shape)
        found, wanted = (slope(fn, z, g, record) for z in (moved, x))
        assert_close(found, wanted, rtol=1e-3 if fn is loss else 1e-6, atol=2e-3 * (fn is loss))


@MODES
def test_cotangents_of_ignored_rows_do_not_matter(xp: Any, record: bool) -> None:
    """Whatever comes back at an ignored row, also nan, its logits get 0; others their own."""
    x = Rng(1).normal((3, 4), dtype="float64")
    target = xp.asarray([1, -100, 3])
    for smoothing in (0.0, 0.3):

        def loss(logits: Any, smoothing: float = smoothing) -> Any:
            return ops.cross_entropy(logits, target, label_smoothing=smoothing)

        cotangents = [xp.asarray([1.0, other, 2.0]) for other in (0.0, 7.0, math.nan)]
        found = [host(slope(loss, x, g, record)) for g in cotangents]
        for g in found:
            assert not g[1].any()
            np.testing.assert_array_equal(g, found[0])
        assert found[0][0].any() and abs(found[0].sum(axis=1)).max() < 1e-12  # p − q sums to 0


def test_smoothing_is_a_mixture_of_two_losses(xp: Any) -> None:
    """(1 − ε) times the plain loss and ε times the mean over all labels, for any number of rows."""
    x = Rng(1).normal((5, 3), dtype="float64")
    target = xp.asarray([0, 1, 2, 1, 0])
    every = ops.stack([ops.cross_entropy(x, xp.full(5, label)) for label in range(3)]).mean(axis=0)
    mixed = 0.75 * ops.cross_entropy(x, target) + 0.25 * every
    assert_close(ops.cross_entropy(x, target, label_smoothing=0.25), mixed)
    leaf = Tensor(x, requires_grad=True)
    (g,) = grad(ops.cross_entropy(leaf, target, label_smoothing=0.25).sum(), leaf)
    hot = ops.one_hot(target, 3, "float64")
    assert_close(g, ops.softmax(x) - (0.75 * hot + 0.25 / 3))


def test_what_is_asked_for_does_not_matter(xp: Any) -> None:
    """Each subset of the gradients of a joint rule is the same as all of them together."""
    x, w, b = (
        Rng(i).normal(shape, dtype="float64") for i, shape in enumerate(((2, 3), (3,), (3,)))
    )
    m = Rng(4).normal((3, 3), dtype="float64")
    calls: list[tuple[Any, list[Any]]] = [
        (ops.layer_norm, [x, w, b]),
        (ops.rms_norm, [x, w]),
        (ops.linear, [x, m, b]),
        (ops.addmm, [b, x, m]),
    ]
    for fn, arrays in calls:
        for record in (False, True):
            results = {}
            for size in range(len(arrays), 0, -1):
                for some in itertools.combinations(range(len(arrays)), size):
                    leaves = [Tensor(a, requires_grad=i in some) for i, a in enumerate(arrays)]
                    wanted = [leaves[i] for i in some]
                    y = fn(*leaves)
                    found = grad(y, wanted, ops.cos(Tensor(x)).data, create_graph=record)
                    for i, g in zip(some, found, strict=True):
                        assert_close(g, results.setdefault(i, g), rtol=1e-12, atol=1e-12)


def test_a_bias_without_a_weight(xp: Any) -> None:
    """It is added to the result alone: a weight of ones changes neither values nor gradients."""
    x, b = Rng(2).normal((3, 4), dtype="float64"), Rng(3).normal((4,), dtype="float64")
    results = []
    for weight in (None, xp.ones(4)):
        leaves = [Tensor(x, requires_grad=True), Tensor(b, requires_grad=True)]
        y = ops.layer_norm(leaves[0], weight, leaves[1])
        results.append([y, *grad(y, leaves, xp.cos(x))])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if has_twin(c)], ids=lambda case: case.label)
def test_values_of_the_twin(xp: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The readable definition computes what the oracle does, as the fused form does."""
    function = getattr(ops, case.name)
    monkeypatch.setattr(function, "forward", function.composite)
    inputs = place(xp, case.inputs())
    assert_close(case.call(*inputs), case.oracle(*map(host, inputs)), rtol=1e-10, atol=1e-10)
