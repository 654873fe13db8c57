"""MesaNet: each token reads from the best linear map from keys to values, not from a step to it.

The state matrix that minimises the (forgetting, regularised) squared error over all tokens so far,
½ Σ_{j ≤ t} ζ_tj β_j ‖Sᵀ k_j − v_j‖² + ½ tr(Sᵀ Λ S) with ζ_tj = γ_{j+1} … γ_t, is (H_t + Λ)⁻¹ G_t:

====================================================  ========================================
H_t = γ_t H_{t−1} + β_t k_t k_tᵀ                      von Oswald et al. 2025, "MesaNet: Sequence
G_t = γ_t G_{t−1} + β_t k_t v_tᵀ                      Modeling by Locally Optimal Test-Time
o_t = G_tᵀ (H_t + Λ)⁻¹ q_t                            Training", arXiv:2506.05233:
                                                      ``mesa_recurrent``, ``mesa``
(H_t + Λ) x = q_t by conjugate gradients for all t    there: ``mesa_conjugate_gradient``
at once, H x being linear attention
====================================================  ========================================

With Λ → 0 and at most d independent keys the map interpolates: S_tᵀ k_j = v_j for all j ≤ t.
Λ keeps H + Λ invertible before there are d keys; it must be positive, and is not forgotten.

Deviations: conjugate gradients start at 0 and divide without a constant added to the denominators;
gradients of ``mesa_conjugate_gradient`` are those of the exact solution, by a second solve.
float16 is summed in float32: outputs are float16, states float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import ops
from ..engine import Tensor, data_of, primitive
from ..ops.elementwise import of
from .arguments import as_recurrence, check_lead, narrow, rate_of, wide
from .chunked import chunked, state_shape
from .delta import per_token

__all__ = ["MesaState", "mesa", "mesa_conjugate_gradient", "mesa_recurrent"]

CHUNK = 32


class MesaState(NamedTuple):
    """What is handed on: ``gram`` H, (…, d, d), and ``moment`` G, (…, d, e)."""

    gram: Any
    moment: Any


def mesa_recurrent(
    query: Any,
    key: Any,
    value: Any,
    ridge: Any = 1.0,
    beta: Any = 1.0,
    log_decay: Any = None,
    is_causal: bool = True,
    state: Any = None,
) -> Any:
    """``mesa`` as it is defined, token by token; the arguments are the same."""
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    like, (query, key, value) = value, map(wide, (query, key, value))
    weighted, log_decay = _weighted(key, beta, log_decay)
    gram, moment = _start(key, value, state)
    ridge = _ridge(ridge, key)
    penalty, outputs = _diagonal(ridge), []
    for t in range(key.shape[-2]):
        token = (..., slice(t, t + 1), slice(None))
        if log_decay is not None:
            decay = ops.exp(log_decay[..., t, None, None])
            gram, moment = gram * decay, moment * decay
        column = ops.matrix_transpose(weighted[token])
        gram, moment = gram + column * key[token], moment + column * value[token]
        x = ops.solve(gram + penalty, ops.matrix_transpose(query[token]))
        outputs.append(ops.matmul(ops.matrix_transpose(x), moment))
    y = ops.concatenate(outputs, axis=-2) if outputs else value
    y = narrow(rows(y), like)
    return y if state is None else (y, MesaState(gram, moment))


def mesa(
    query: Any,
    key: Any,
    value: Any,
    ridge: Any = 1.0,
    beta: Any = 1.0,
    log_decay: Any = None,
    is_causal: bool = True,
    state: Any = None,
) -> Any:
    """o_t = G_tᵀ (H_t + Λ)⁻¹ q_t by an exact solve for each token: n d³ time, n d² memory.

    Args:
        query, key: (…, n, d).
        value: (…, n, e).
        ridge: the diagonal of Λ, above 0: a number, or broadcastable to (…, d) and not checked.
        beta: β ≥ 0, the weight of each token: a number or broadcastable to (…, n).
        log_decay: log γ likewise, at most 0; None for γ = 1.
        is_causal: False is refused, unless there is one query for the last key.
        state: None for a whole sequence; ``()`` or a ``MesaState`` to get the next one, too.

    Returns:
        (…, n, e); with a state a pair of that and the next ``MesaState``.

    Raises:
        ValueError: the shapes do not fit, ``ridge`` is a number that is not positive, or the
            future is asked for.
        LinAlgError: H + Λ is singular, which a positive Λ excludes but for rounding.
    """
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    like, (query, key, value) = value, map(wide, (query, key, value))
    weighted, log_decay = _weighted(key, beta, log_decay)
    gram, moment = _start(key, value, state)
    ridge = _ridge(ridge, key)
    penalty, n = _diagonal(ridge)[..., None, :, :], key.shape[-2]
    solutions = []
    for start in range(0, n, CHUNK):
        part = (..., slice(start, min(start + CHUNK, n)), slice(None))
        products = weighted[part][..., :, None] * key[part][..., None, :]
        grams = ops.cumsum(products, axis=-3) + gram[..., None, :, :]
        if log_decay is not None:
            # H of each token: the identity attention reads back the state's rows
            grams = _decayed(products, log_decay[part[:-1]], gram)
        gram = grams[..., -1, :, :]
        x = ops.solve(grams + penalty, query[part][..., None])
        solutions.append(x.reshape(query[part].shape))
    x = ops.concatenate(solutions, axis=-2) if solutions else query
    y, moment = chunked(x, weighted, value, log_decay, moment)
    y = narrow(rows(y), like)
    return y if state is None else (y, MesaState(gram, moment))


def _decayed(products: Any, log_decay: Any, gram: Any) -> Any:
    """H_t of every token of a chunk: linear attention with the products as values."""
    lead, (c, d) = products.shape[:-3], products.shape[-3:-1]
    places = of(data_of(log_decay)).arange(c)
    steps = ops.where(places[:, None] > places, log_decay[..., None], 0.0)
    between = ops.tril(ops.exp(ops.cumsum(steps, axis=-2)))
    flat = ops.matmul(between, products.reshape((*lead, c, d * d)))
    start = ops.exp(ops.cumsum(log_decay, axis=-1))[..., None, None]
    return flat.reshape((*lead, c, d, d)) + start * gram[..., None, :, :]


def mesa_conjugate_gradient(
    query: Any,
    key: Any,
    value: Any,
    ridge: Any = 1.0,
    beta: Any = 1.0,
    log_decay: Any = None,
    is_causal: bool = True,
    state: Any = None,
    steps: int = 30,
) -> Any:
    """``mesa`` by conjugate gradients in place of the solve: memory linear in n.

    There are ``steps`` of them, and as many again from the residual that is left.  In exact
    arithmetic d steps are enough; fewer do if H + Λ has few distinct eigenvalues or a small
    condition number.  The other arguments and errors are those of ``mesa``.

    Differentiable once: the gradient takes the solution itself for a constant.

    Raises:
        ValueError: as ``mesa``, or ``steps`` is below 1.
        RuntimeError: a gradient that is to be differentiated again (``create_graph=True``); take
            ``mesa``.
    """
    if steps < 1:
        raise ValueError(f"conjugate gradients take at least one step, got steps={steps}")
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    like, (query, key, value) = value, map(wide, (query, key, value))
    weighted, log_decay = _weighted(key, beta, log_decay)
    gram, moment = _start(key, value, state)
    ridge = _ridge(ridge, key)
    system = (weighted, key, ridge[..., None, :], log_decay, gram)
    constants = tuple([data_of(part) for part in system])
    x = _solve(data_of(query), *constants, steps)
    # The value is one refinement of x; the derivative is that of the exact solution, since with
    # x held fixed d(A⁻¹ q) = A⁻¹ (dq − dA x).
    product, gram = _product(x, *system)
    x = x + _solve(query - product, *constants, steps)
    y, moment = chunked(x, weighted, value, log_decay, moment)
    y = narrow(rows(y), like)
    return y if state is None else (y, MesaState(gram, moment))


def _product(
    x: Any, weighted: Any, key: Any, ridge: Any, log_decay: Any, gram: Any
) -> tuple[Any, Any]:
    """(H_t + Λ) x_t for every t, and the last H: causal linear attention with keys as values."""
    y, last = chunked(x, weighted, key, log_decay, gram)
    return y + ridge * x, last


@primitive
def _solve(
    rhs: Any,
    weighted: Any,
    key: Any,
    ridge: Any,
    log_decay: Any,
    gram: Any,
    steps: int,
) -> Any:
    """x_t with (H_t + Λ) x_t ≈ rhs_t (Hestenes & Stiefel 1952), for all t at once."""
    x, r = 0.0 * rhs, rhs
    p, size = r, (r * r).sum(axis=-1, keepdims=True)
    for _ in range(steps):
        product, _ = _product(p, weighted, key, ridge, log_decay, gram)
        step = _ratio(size, (p * product).sum(axis=-1, keepdims=True))
        x = x + step * p
        r = r - step * product
        size, last = (r * r).sum(axis=-1, keepdims=True), size
        p = r + _ratio(size, last) * p
    return x


def _ratio(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is 0: there is nothing left to do."""
    xp, done = of(a), b == 0
    return xp.where(done, 0.0, a / xp.where(done, 1.0, b))


def _solve_rule(
    g: Any, weighted: Any, key: Any, ridge: Any, log_decay: Any, gram: Any, steps: int
) -> Any:
    """The same solve, which is symmetric; the other arguments come as constants."""
    if isinstance(g, Tensor):
        raise RuntimeError(
            "mesa_conjugate_gradient is differentiable once, and create_graph=True asks for more: "
            "take mesa"
        )
    return _solve(g, weighted, key, ridge, log_decay, gram, steps)


_solve.derivative(rhs=_solve_rule)


def _weighted(key: Any, beta: Any, log_decay: Any) -> tuple[Any, Any]:
    """β k, and log γ for each token."""
    if log_decay is not None:
        log_decay = per_token(log_decay, key)
    return per_token(beta, key)[..., None] * key, log_decay


def _start(key: Any, value: Any, state: Any) -> tuple[Any, Any]:
    shapes = [state_shape(key, key), state_shape(key, value)]
    if not state:
        xp = of(data_of(key))
        return xp.zeros(shapes[0], key.dtype), xp.zeros(shapes[1], value.dtype)
    if [x.shape for x in state] != shapes:
        raise ValueError(
            f"the state is (…, d, d) = {shapes[0]} and (…, d, e) = {shapes[1]} here, got "
            f"{' and '.join(str(x.shape) for x in state)}"
        )
    return rate_of(state[0], key), rate_of(state[1], key)


def _ridge(ridge: Any, key: Any) -> Any:
    """The diagonal of Λ, (d,) or (…, d)."""
    if isinstance(ridge, (int, float)) and not ridge > 0.0:
        raise ValueError(f"Λ has to be positive, or H + Λ may be singular, got ridge={ridge}")
    ridge = rate_of(ridge, key)
    wanted = (*key.shape[:-2], key.shape[-1])
    ends = zip(ridge.shape[::-1], wanted[::-1], strict=False)
    if ridge.ndim > len(wanted) or any(a not in (1, b) for a, b in ends):
        raise ValueError(f"ridge has to broadcast to (…, d) = {wanted}, got {ridge.shape}")
    return ops.broadcast_to(ridge, (*ridge.shape[:-1], key.shape[-1]))


def _diagonal(ridge: Any) -> Any:
    """Λ, (…, d, d)."""
    return ridge[..., None] * of(data_of(ridge)).eye(ridge.shape[-1], dtype=ridge.dtype)
