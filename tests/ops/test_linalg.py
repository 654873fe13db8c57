"""Norms at their kinks, and factorisations by the theorems about them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mini_nn import Tensor, grad, ops, primitive
from mini_nn.check import arrays, away_from, check_grads
from tests.support import assert_close, host

ORDERS = (None, 1, 2, 3, 1.5, 0.5, math.inf, -math.inf)
MATRIX_ORDERS = (None, "fro", 1, -1, math.inf, -math.inf)


def slope(fn: Any, x: Any, g: Any = None) -> Any:
    leaf = Tensor(x, requires_grad=True)
    return host(grad(fn(leaf), leaf, g)[0])


def transposed(x: Any) -> Any:
    return ops.matrix_transpose(x)


def identity(n: int, like: Any) -> Any:
    return ops.elementwise.of(like).eye(n)


@st.composite
def regular(draw: Any, shape: tuple[int, ...] = (3, 3)) -> Any:
    """Matrices with eigenvalues well away from 0: 2 + a small matrix."""
    x = draw(arrays(shape, low=-1.0, high=1.0))
    return 0.4 * x + 2 * identity(shape[-1], x)


# Norms


@pytest.mark.parametrize("ord", ORDERS)
@given(x=away_from([0.0], (4,)))
def test_euler_s_theorem_for_norms(x: Any, ord: Any) -> None:
    """⟨x, ∇‖x‖⟩ = ‖x‖, since a norm is homogeneous of degree 1; and ∇ has dual norm 1."""
    y = float(host(ops.norm(x, ord)))
    g = slope(lambda t: ops.norm(t, ord), x)
    assert_close((host(x) * g).sum(), y, rtol=1e-9)
    p = 2.0 if ord is None else float(ord)
    if p >= 1:
        dual = math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)
        assert_close(np.linalg.norm(g, dual), 1.0, rtol=1e-9)


@given(arrays((3, 4)), arrays((3, 4)), st.sampled_from(MATRIX_ORDERS[:3]), st.floats(-3, 3))
def test_norms_are_norms(x: Any, y: Any, ord: Any, factor: float) -> None:
    nx, ny, total = (float(host(ops.norm(t, ord))) for t in (x, y, x + y))
    assert total <= nx + ny + 1e-9
    assert_close(ops.norm(factor * x, ord), np.asarray(abs(factor) * nx), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ord", ORDERS)
def test_every_derivative_of_a_norm_at_0_is_0(xp: Any, ord: Any, dtype: str) -> None:
    rows = xp.asarray([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]], dtype)
    leaf = Tensor(rows, requires_grad=True)
    (first,) = grad(ops.norm(leaf, ord, 1).sum(), leaf, create_graph=True)
    (second,) = grad((first * first).sum(), leaf, create_graph=True, materialize_grads=True)
    third = second  # of order 1 and inf, whose second derivative is the constant 0
    if second.node is not None:
        (third,) = grad((second * leaf).sum(), leaf, materialize_grads=True)
    for found in (first, second, third):
        assert found.dtype == dtype
        assert not host(found)[:2].any() and np.isfinite(host(found)).all()
    assert host(first)[2].any()


@pytest.mark.parametrize("ord", MATRIX_ORDERS)
def test_every_derivative_of_a_matrix_norm_at_0_is_0(xp: Any, ord: Any) -> None:
    leaf = Tensor(xp.zeros((2, 3)), requires_grad=True)
    (first,) = grad(ops.norm(leaf, ord), leaf, create_graph=True)
    (second,) = grad(first.sum(), leaf, materialize_grads=True)
    assert not host(first).any() and not host(second).any()


def test_the_plain_formula_has_nan_at_0(xp: Any) -> None:
    x = xp.zeros(3)
    with np.errstate(all="ignore"):
        plain = slope(lambda t: ops.sqrt(ops.sum(t * t)), x)
    assert np.isnan(plain).all() and not slope(ops.norm, x).any()


def test_elements_at_0_of_other_norms_get_0(xp: Any) -> None:
    x = xp.asarray([0.0, 3.0, -4.0])
    for ord in ORDERS[:-1]:
        leaf = Tensor(x, requires_grad=True)
        (first,) = grad(ops.norm(leaf, ord), leaf, create_graph=True)
        (second,) = grad((first * first).sum(), leaf, materialize_grads=True)
        assert host(first)[0] == 0 and np.isfinite(host(second)).all()


def test_the_largest_of_equal_elements_share(xp: Any) -> None:
    x = xp.asarray([2.0, -2.0, 1.0])
    assert slope(lambda t: ops.norm(t, math.inf), x).tolist() == [0.5, -0.5, 0.0]
    same = xp.asarray([[1.0, -2.0], [2.0, 1.0]])
    wanted = [[0.5, -0.5], [0.5, 0.5]]
    assert slope(lambda t: ops.norm(t, math.inf), same).tolist() == wanted


def test_what_norm_refuses(xp: Any) -> None:
    x = xp.ones((2, 3))
    with pytest.raises(ValueError, match="'nuc'"):
        ops.norm(x, "nuc")
    with pytest.raises(ValueError, match="got 2"):
        ops.norm(x, 2)  # the largest singular value
    for ord in ("fro", -1):
        with pytest.raises(ValueError, match=f"got {ord!r}"):
            ops.norm(x, ord, 1)
    with pytest.raises(ValueError, match="needs its axis"):
        ops.norm(xp.ones((2, 2, 2)), 1)


# Systems of equations


@given(regular(), arrays((3, 2)))
def test_solve_and_inv_undo_matmul(a: Any, b: Any) -> None:
    assert_close(ops.matmul(a, ops.solve(a, b)), b, atol=1e-9)
    assert_close(ops.matmul(ops.inv(a), b), ops.solve(a, b), atol=1e-9)
    assert_close(ops.inv(ops.inv(a)), a, atol=1e-9)


@given(regular((2, 2, 2)), arrays((2,)))
def test_a_vector_is_one_column(a: Any, b: Any) -> None:
    column = ops.solve(a, b.reshape(2, 1))
    assert_close(ops.solve(a, b), column.reshape(2, 2))
    check_grads(ops.solve, a, b, order=1)


def test_solving_with_the_matrix_itself_in_the_rule_is_found(xp: Any) -> None:
    @primitive
    def solved(a: Any, b: Any) -> Any:
        return ops.elementwise.of(a).linalg.solve(a, b)

    solved.derivative(b=lambda g, a: ops.solve(a, g))  # A⁻¹ instead of A⁻ᵀ
    a, b = np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([[1.0], [2.0]])
    with pytest.raises(AssertionError):
        check_grads(lambda t: solved(ops.astype(xp.asarray(a), t.dtype), t), xp.asarray(b))
    check_grads(lambda t: ops.solve(ops.astype(xp.asarray(a), t.dtype), t), xp.asarray(b))


# Determinants


@given(regular())
def test_jacobi_s_formula(a: Any) -> None:
    """∇ ln |det A| = A⁻ᵀ and ∇ det A = det A · A⁻ᵀ, so ⟨A, ∇ det A⟩ = n det A."""
    sign, logabs = ops.slogdet(a)
    det = host(ops.det(a))
    assert_close(host(sign) * np.exp(host(logabs)), det, rtol=1e-9)
    assert_close(slope(lambda t: ops.slogdet(t)[1], a), host(ops.inv(a)).T, atol=1e-12)
    assert_close((host(a) * slope(ops.det, a)).sum(), 3 * float(det), rtol=1e-9)


@given(regular(), regular())
def test_the_determinant_of_a_product(a: Any, b: Any) -> None:
    product = host(ops.det(a)) * host(ops.det(b))
    assert_close(ops.det(ops.matmul(a, b)), product, rtol=1e-9)


def test_singular_matrices(xp: Any) -> None:
    a = Tensor(xp.asarray([[1.0, 2.0], [2.0, 4.0]]), requires_grad=True)
    assert float(ops.det(a)) == 0
    sign, logabs = ops.slogdet(a)
    assert (float(sign), float(logabs)) == (0.0, -math.inf)
    if xp is np:  # CuPy gives inf instead of an error
        for fn in (ops.det, lambda t: ops.slogdet(t)[1], ops.inv):
            with pytest.raises(np.linalg.LinAlgError):
                grad(fn(a).sum(), a)


def test_the_sign_has_no_gradient(xp: Any) -> None:
    a = xp.asarray([[1.0, 2.0], [3.0, 4.0]])
    assert not slope(lambda t: ops.slogdet(t)[0], a).any()


# Factorisations


@given(regular((2, 3, 3)))
def test_cholesky(x: Any) -> None:
    a = ops.matmul(x, transposed(x))
    lower = ops.cholesky(a)
    assert_close(ops.matmul(lower, transposed(lower)), a, atol=1e-9)
    assert_close(ops.tril(lower), lower)
    g = slope(ops.cholesky, a, lower)
    assert_close(g, np.swapaxes(g, -1, -2), atol=1e-12)
    assert_close(g, 0.5 * np.eye(3) * np.ones((2, 1, 1)), atol=1e-9)  # of tr(LᵀL)/2 = tr(A)/2


def test_cholesky_along_a_symmetric_direction(xp: Any) -> None:
    rng = np.random.default_rng(0)
    a, d, g = rng.standard_normal((3, 3, 3))
    a, d = a @ a.T + np.eye(3), d + d.T
    step = 1e-6
    ahead, behind = (np.linalg.cholesky(a + s * d) for s in (step, -step))
    found = (slope(ops.cholesky, xp.asarray(a), xp.asarray(g)) * d).sum()
    assert_close(found, (g * (ahead - behind)).sum() / (2 * step), rtol=1e-7)


def test_cholesky_without_half_the_diagonal_is_found(xp: Any) -> None:
    @primitive
    def factor(a: Any) -> Any:
        return ops.elementwise.of(a).linalg.cholesky(a)

    def rule(g: Any, y: Any) -> Any:
        product = ops.tril(ops.matmul(transposed(y), ops.tril(g)))
        s = ops.solve(transposed(y), transposed(ops.solve(transposed(y), product)))
        return 0.5 * (s + transposed(s))

    factor.derivative(a=rule)
    x = xp.asarray([[2.0, 0.5], [0.3, 1.5]])
    with pytest.raises(AssertionError):
        check_grads(lambda t: factor(ops.matmul(t, transposed(t))), x)
    check_grads(lambda t: ops.cholesky(ops.matmul(t, transposed(t))), x)


@given(arrays((4, 3)))
def test_qr(x: Any) -> None:
    assume(np.linalg.svd(host(x), compute_uv=False)[-1] > 0.1)
    q, r = ops.qr(x)
    assert_close(ops.matmul(q, r), x, atol=1e-9)
    assert_close(ops.matmul(transposed(q), q), np.eye(3), atol=1e-9)
    assert_close(ops.triu(r), r)
    leaf = Tensor(x, requires_grad=True)
    (g,) = grad((ops.qr(leaf)[1] ** 2).sum(), leaf)  # Σ R² = Σ A²
    assert_close(g, 2 * host(x), atol=1e-7)
    (g,) = grad((ops.qr(leaf)[0] ** 2).sum(), leaf)  # Σ Q² = 3, whatever A
    assert_close(g, np.zeros((4, 3)), atol=1e-7)


def test_qr_of_one_output_and_of_wide_matrices(xp: Any) -> None:
    x = xp.asarray([[2.0, 0.3], [0.1, 1.5], [0.7, -0.2]])
    for part in (0, 1):
        check_grads(lambda t, i=part: ops.qr(t)[i], x)
    with pytest.raises(ValueError, match=r"m ≥ n, got shape \(2, 3\)"):
        ops.qr(x.T)


def test_float32_stays(xp: Any) -> None:
    a = xp.asarray([[2.0, 0.5], [0.5, 1.0]], "float32")
    for fn in (ops.inv, ops.det, ops.cholesky, lambda t: ops.solve(t, a), lambda t: ops.qr(t)[0]):
        leaf = Tensor(a, requires_grad=True)
        y = fn(leaf)
        (first,) = grad(y.sum(), leaf, create_graph=True)
        (second,) = grad(first.sum(), leaf)
        assert y.dtype == first.dtype == second.dtype == "float32"
