"""Products: random equations against NumPy's plain loops, and what they may cost."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, grad, ops, primitive
from mini_nn.check import arrays, check_grads
from tests.support import assert_close, host

LENGTHS = {"a": 2, "b": 3, "c": 2, "D": 1}


@st.composite
def equations(draw: Any) -> tuple[str, list[tuple[int, ...]]]:
    """An equation for one to three operands, and shapes: lengths of 1 in place of others too."""
    inputs, shapes, hidden = [], [], 0
    for _ in range(draw(st.integers(1, 3))):
        letters = draw(st.lists(st.sampled_from("abcD"), max_size=3))
        shrunk = {c for c in letters if letters.count(c) == 1 and draw(st.sampled_from([0, 0, 1]))}
        shape = [1 if c in shrunk else LENGTHS[c] for c in letters]
        if draw(st.sampled_from([False, False, True])):
            at, extra = (
                draw(st.integers(0, len(letters))),
                draw(st.sampled_from([(), (2,), (3, 2)])),
            )
            letters.insert(at, "...")
            shape[at:at] = extra
            hidden = max(hidden, len(extra))
        inputs.append("".join(letters))
        shapes.append(tuple(shape))
    equation = ",".join(inputs)
    if draw(st.booleans()):
        known = sorted(set(equation) - set(",."))
        kept = draw(st.lists(st.sampled_from(known), unique=True)) if known else []
        if "." in equation:
            kept.insert(draw(st.integers(0, len(kept))), "...")
        equation += "->" + "".join(kept)
    return equation, shapes


@given(equations())
def test_random_equations(xp: Any, drawn: Any) -> None:
    equation, shapes = drawn
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(shape) for shape in shapes]
    placed = [xp.asarray(x) for x in operands]
    wanted = np.einsum(equation, *operands)
    assert_close(ops.einsum(equation, *placed), np.asarray(wanted), atol=1e-12)
    leaves = [Tensor(x, requires_grad=True) for x in placed]
    g = rng.standard_normal(wanted.shape)
    found = grad(ops.einsum(equation, *leaves), leaves, xp.asarray(g))
    for i, x in enumerate(operands):  # multilinear: a derivative is a value at a unit operand
        units = np.eye(x.size).reshape(x.size, *x.shape)
        values = [np.einsum(equation, *operands[:i], u, *operands[i + 1 :]) for u in units]
        slopes = np.array([(g * v).sum() for v in values]).reshape(x.shape)
        assert_close(found[i], slopes, atol=1e-11)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("iij,jk->ik", [(2, 2, 3), (3, 2)]),
        ("ij,ij->j", [(1, 3), (2, 3)]),
        ("...ij,...j->i...", [(2, 2, 3), (1, 3)]),
        ("ab,bc,cd,da->", [(2, 3), (3, 2), (2, 2), (2, 2)]),
        ("bcx,oc->box", [(2, 3, 2), (2, 3)]),
    ],
)
def test_equations_to_the_third_order(xp: Any, equation: str, shapes: Any) -> None:
    rng = np.random.default_rng(0)
    operands = [xp.asarray(rng.standard_normal(shape)) for shape in shapes]
    check_grads(lambda *xs: ops.einsum(equation, *xs), *operands, order=3)


def test_a_rule_that_forgets_repeated_letters_is_found(xp: Any) -> None:
    @primitive
    def naive(x1: Any, x2: Any) -> Any:
        return ops.elementwise.of(x1).einsum("ii,ij->j", x1, x2)

    @primitive
    def spread(g: Any, x2: Any) -> Any:  # the gradient of every x1[i, k], not of x1[i, i]
        return ops.elementwise.of(g).einsum("j,ij,k->ik", g, x2, g * 0 + 1)

    naive.derivative(x1=lambda g, x2: spread(g, x2))
    x1, x2 = xp.asarray([[1.0, 2.0], [3.0, 4.0]]), xp.asarray([[5.0, 6.0], [7.0, 8.0]])
    with pytest.raises(AssertionError, match="argument 0"):
        check_grads(lambda a: naive(a, x2), x1, order=1, dtypes=("float64",))
    check_grads(lambda a: ops.einsum("ii,ij->j", a, x2), x1, order=1, dtypes=("float64",))


def test_what_einsum_refuses(xp: Any) -> None:
    x = xp.ones((2, 3))
    for equation, operands, message in (
        ("ij,jk", [x], "1 operands"),
        ("i!->i", [x], "malformed"),
        ("i.j->ij", [x], "malformed"),
        ("i->i", [x], r"operand 0 has shape \(2, 3\)"),
        ("ijk...->", [x], r"operand 0 has shape \(2, 3\)"),
        ("ij,ij->", [x, xp.ones((3, 3))], "lengths of 'i' differ"),
        ("ij->ik", [x], "the output"),
        ("ij->ii", [x], "the output"),
        ("...j->j", [x], "keep their '...'"),
        ("ii->i", [x], "lengths of 'i' differ"),
        ("ii->i", [x[:1]], r"diagonal of a shape \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.einsum(equation, *operands)


@pytest.mark.parametrize(
    ("equation", "shapes", "most"),
    [
        ("i,j,j->i", [(2000,), (2000,), (2000,)], 0.1),  # not i × j
        ("ij,jk,kl->il", [(2, 900), (900, 900), (900, 2)], 0.1),
        ("bhqd,bhkd->bhqk", [(2, 2, 300, 64), (2, 2, 300, 64)], 3.0),  # the result: 2.9
        ("bchw,oc->bohw", [(4, 64, 50, 50), (2, 64)], 0.2),  # the images are not copied
    ],
)
def test_einsum_takes_no_detours(xp: Any, equation: str, shapes: Any, most: float) -> None:
    operands = [Tensor(np.ones(shape)) for shape in shapes]
    ops.einsum(equation, *operands)
    tracemalloc.start()
    try:
        ops.einsum(equation, *operands)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert peak < most


# Matrices


@given(arrays((2, 3)), arrays((3, 4)))
def test_the_transpose_of_a_product(a: Any, b: Any) -> None:
    mT = ops.matrix_transpose
    assert_close(mT(ops.matmul(a, b)), ops.matmul(mT(b), mT(a)))
    assert_close(ops.dot(a, b), ops.tensordot(a, b, 1))
    assert_close(ops.inner(a, mT(b)), ops.matmul(a, b))
    assert_close(ops.outer(a, b), ops.tensordot(a.reshape(-1), b.reshape(-1), 0))


def test_the_gradient_of_a_shared_matrix_is_one_product(xp: Any) -> None:
    """Ȳ is never expanded to a product for each member of the batch."""
    x = Tensor(np.ones((400, 2, 30)))
    w = Tensor(np.ones((30, 30)), requires_grad=True)
    y = ops.matmul(x, w)
    seed = np.ones(y.shape)
    tracemalloc.start()
    try:
        (g,) = grad(y, w, seed)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_close(g, np.full((30, 30), 800.0))
    assert peak < 400 * 30 * 30 * 8 / 10


def test_vectors_are_rows_or_columns(xp: Any) -> None:
    v, m = xp.asarray([1.0, 2.0]), xp.asarray([[1.0, 2.0], [3.0, 4.0]])
    for a, b in ((v, v), (v, m), (m, v), (v, m[None, None]), (m[None, None], v)):
        y = ops.matmul(Tensor(a), Tensor(b))
        assert_close(y, np.matmul(host(a), host(b)))
        check_grads(ops.matmul, a, b)
    with pytest.raises(ValueError):
        ops.matmul(m, xp.asarray(2.0))
    with pytest.raises(ValueError):
        ops.matmul(m, xp.ones(3))


def test_tensordot_refuses(xp: Any) -> None:
    a, b = xp.ones((2, 3)), xp.ones((2, 4))
    for axes in (1, ((0,), (1,)), ((0, 1), (0,))):
        with pytest.raises(ValueError, match=r"tensordot over axes .* \(2, 3\)"):
            ops.tensordot(a, b, axes)
    assert ops.tensordot(a, b, (0, 0)).shape == (3, 4)


# Diagonals


@given(arrays((3, 4)), st.integers(-2, 3))
def test_diagonals(x: Any, k: int) -> None:
    d = ops.diag(x, k)
    assert_close(ops.sum(d), ops.trace(x, k))
    square = host(ops.diag(d, k))
    n = d.shape[0] + abs(k)
    assert square.shape == (n, n)
    assert_close(square, np.diag(np.diag(host(x), k), k))
    assert_close(ops.diag(ops.diag(d, k), k), d)
    check_grads(lambda t: ops.diagonal(t, k), x)


def test_the_trace_of_a_product_is_the_sum_of_a_product(xp: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (Tensor(xp.asarray(rng.standard_normal((3, 3))), requires_grad=True) for _ in range(2))
    y = ops.trace(ops.matmul(a, b))
    assert_close(y, ops.sum(a * ops.matrix_transpose(b)))
    ga, gb = grad(y, [a, b])
    assert_close(ga, host(b).T)
    assert_close(gb, host(a).T)


def test_diag_refuses(xp: Any) -> None:
    for shape in ((), (2, 2, 2)):
        with pytest.raises(ValueError, match="vector or a matrix"):
            ops.diag(xp.ones(shape))
