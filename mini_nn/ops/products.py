"""Products of matrices and tensors: from ``matmul`` to ``einsum``, and the diagonals they need.

Names, arguments and defaults are NumPy's.  Ȳ is the cotangent of Y and Aᵀ swaps the last two axes.
All but ``matmul`` and the diagonal is composed, so derivatives of every order follow from those two
and every sum of products runs as a product of matrices.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from ..engine import primitive
from .elementwise import multiply, of
from .reduce import sum as total
from .shape import broadcast_to, expand_dims, reshape, swapaxes, transpose

__all__ = [
    "diag", "diagonal", "dot", "einsum", "inner", "matmul", "outer", "tensordot", "trace",
]  # fmt: skip


@primitive
def matmul(x1: Any, x2: Any) -> Any:
    """Y = A B for (…, n, k) and (…, k, m); a one-dimensional operand is a row on the left, a column
    on the right, and its axis of length 1 is not in the result.

    Raises:
        ValueError: the shapes do not fit together, or an operand has no axes.
    """
    return of(x1).matmul(x1, x2)


def _left(g: Any, x2: Any, like: Any) -> Any:
    """Ā = Ȳ Bᵀ; the engine sums over broadcast batches, and over the row that a vector was."""
    if x2.ndim == 1:
        return expand_dims(g, -1) * x2
    if len(like.shape) == 1:
        g = expand_dims(g, -2)
    return matmul(g, swapaxes(x2, -1, -2))


def _right(g: Any, x1: Any, like: Any) -> Any:
    """B̄ = Aᵀ Ȳ, in one product where one matrix B served a whole batch."""
    if x1.ndim == 1:
        return x1 * g if len(like.shape) == 1 else expand_dims(x1, -1) * expand_dims(g, -2)
    if len(like.shape) == 1:
        rows = reshape(x1, (math.prod(x1.shape[:-1]), x1.shape[-1]))
        return matmul(reshape(g, (rows.shape[0],)), rows)
    if len(like.shape) == 2 and x1.ndim > 2:
        x1 = reshape(x1, (math.prod(x1.shape[:-1]), x1.shape[-1]))
        g = reshape(g, (x1.shape[0], g.shape[-1]))
    return matmul(swapaxes(x1, -1, -2), g)


matmul.derivative(x1=_left, x2=_right)


def dot(x1: Any, x2: Any) -> Any:
    """Σ over the last axis of the first and the last but one of the second (its only one, if 1-D).

    A number multiplies.  Unlike ``matmul``, leading axes are not broadcast but all combined.
    """
    if not getattr(x1, "ndim", 0) or not getattr(x2, "ndim", 0):
        return multiply(x1, x2)
    return matmul(x1, x2) if x2.ndim <= 2 else tensordot(x1, x2, ((-1,), (-2,)))


def inner(x1: Any, x2: Any) -> Any:
    """Σ over the last axes of both."""
    if not getattr(x1, "ndim", 0) or not getattr(x2, "ndim", 0):
        return multiply(x1, x2)
    return tensordot(x1, x2, ((-1,), (-1,)))


def outer(x1: Any, x2: Any) -> Any:
    """yᵢⱼ = aᵢ bⱼ of the flattened operands."""
    return multiply(reshape(x1, (-1, 1)), reshape(x2, (1, -1)))


def tensordot(x1: Any, x2: Any, axes: Any = 2) -> Any:
    """Σ over pairs of axes; the result has the other axes of the first, then those of the second.

    Args:
        x1, x2: any shapes.
        axes: how many of the last axes of the first go with as many first axes of the second, or
            two lists: the axes of the first and of the second that go together.

    Raises:
        ValueError: axes that go together differ in length or number.
    """
    if isinstance(axes, int):
        axes = (range(x1.ndim - axes, x1.ndim), range(axes))
    first, second = [[a] if isinstance(a, int) else [*a] for a in axes]
    if len(first) != len(second) or [x1.shape[a] for a in first] != [x2.shape[a] for a in second]:
        raise ValueError(
            f"tensordot over axes {first} of {x1.shape} and {second} of {x2.shape}: they differ in "
            "number or length"
        )
    left: list[Any] = [*range(x1.ndim)]
    right: list[Any] = [*range(x1.ndim, x1.ndim + x2.ndim)]
    for a, b in zip(first, second, strict=True):
        right[b] = left[a]
    output = sorted({*left} ^ {*right})
    return _arrange(*_pair(x1, left, x2, right, output), output)


def einsum(equation: str, *operands: Any) -> Any:
    """Einstein's summation: ``einsum("bhqd,bhkd->bhqk", q, k)``.

    Each letter names an axis.  Letters that are not in the output are summed over; a letter twice
    in one operand takes the diagonal; axes of length 1 broadcast against the same letter elsewhere;
    ``...`` stands for any axes, aligned at the right.  Without ``->`` the output has the axes of
    ``...`` and then, in alphabetical order, the letters that occur once.

    It is a composition: diagonals, sums over letters of one operand, and then one pair of operands
    after the other as a product of matrices (batch × rows × summed) (batch × summed × columns),
    always the pair next that leaves least behind.

    Raises:
        ValueError: the equation is malformed or does not fit the operands' shapes.
    """
    inputs, output = _parse(equation, [x.shape for x in operands])
    terms = [_without_repeats(x, labels) for x, labels in zip(operands, inputs, strict=True)]
    while len(terms) > 1:
        i, j = _cheapest(terms, output)
        (b, right), (a, left) = terms.pop(j), terms.pop(i)
        later = {*output}.union(*[labels for _, labels in terms])
        a, left = _summed(a, left, later | {*right})
        b, right = _summed(b, right, later | {*left})
        wanted = dict.fromkeys(output + left + right)
        kept = [label for label in wanted if label in later and label in left + right]
        terms.append(_pair(a, left, b, right, kept))
    x, labels = _summed(*terms[0], {*output})
    return _arrange(x, labels, output)


def _parse(equation: str, shapes: list[Any]) -> tuple[list[list[str]], list[str]]:
    """The labels of each operand and of the output; axes of ``...`` are numbered from the right."""
    before, arrow, after = equation.replace(" ", "").replace("...", "_").partition("->")
    parts = before.split(",")
    allowed = all(c.isalpha() or c == "_" for c in "".join(parts) + after)
    if not allowed or len(parts) != len(shapes) or any(p.count("_") > 1 for p in [*parts, after]):
        raise ValueError(f"einsum {equation!r} is malformed, or not for {len(shapes)} operands")
    most = 0
    inputs: list[list[str]] = []
    lengths: dict[str, int] = {}
    for part, shape in zip(parts, shapes, strict=True):
        hidden = len(shape) - len(part) + 1 if "_" in part else 0
        labels = _expand(part, hidden)
        if len(labels) != len(shape) or hidden < 0:
            raise ValueError(
                f"einsum {equation!r}: operand {len(inputs)} has shape {shape}, which does not fit"
            )
        for label, n in zip(labels, shape, strict=True):
            if lengths.setdefault(label, n) == 1:
                lengths[label] = n
            if n not in (1, lengths[label]):
                raise ValueError(f"einsum {equation!r}: lengths of {label!r} differ in {shapes}")
        inputs.append(labels)
        most = max(most, hidden)
    letters = [c for c in before if c.isalpha()]
    if not arrow:
        after = "_" + "".join(sorted(c for c in {*letters} if letters.count(c) == 1))
    output = _expand(after, most)
    if (most and "_" not in after) or len({*output}) < len(output) or not {*output} <= {*lengths}:
        raise ValueError(
            f"einsum {equation!r}: the output must name each of its axes once, all of them axes of "
            "the operands, and keep their '...'"
        )
    return inputs, output


def _expand(part: str, hidden: int) -> list[str]:
    return [t for c in part for t in ([str(i) for i in range(hidden, 0, -1)] if c == "_" else [c])]


def _without_repeats(x: Any, labels: list[Any]) -> tuple[Any, list[Any]]:
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            i = labels.index(label)
            j = labels.index(label, i + 1)
            if x.shape[i] != x.shape[j]:
                raise ValueError(f"einsum: {label!r} takes the diagonal of a shape {x.shape}")
            x = diagonal(x, 0, i, j)
            labels = [*labels[:i], *labels[i + 1 : j], *labels[j + 1 :], label]
    return x, labels


def _summed(x: Any, labels: list[Any], wanted: set[Any]) -> tuple[Any, list[Any]]:
    lonely = tuple([i for i, label in enumerate(labels) if label not in wanted])
    return (total(x, lonely) if lonely else x), [label for label in labels if label in wanted]


def _cheapest(terms: list[tuple[Any, list[Any]]], output: list[Any]) -> tuple[int, int]:
    """The pair whose product is smallest compared with the two."""
    if len(terms) == 2:
        return 0, 1

    def growth(pair: tuple[int, int]) -> int:
        rest = [labels for i, (_, labels) in enumerate(terms) if i not in pair]
        later = {*output}.union(*rest)
        lengths: dict[Any, int] = {}
        for x, labels in (terms[i] for i in pair):
            for label, n in zip(labels, x.shape, strict=True):
                lengths[label] = max(n, lengths.get(label, 1))
        size: int = math.prod([n for label, n in lengths.items() if label in later])
        before: int = sum(terms[i][0].size for i in pair)
        return size - before

    return min(combinations(range(len(terms)), 2), key=growth)


def _pair(
    a: Any, left: list[Any], b: Any, right: list[Any], output: list[Any]
) -> tuple[Any, list[Any]]:
    """The product of two operands, every letter of which is in the output or in both.

    Returns:
        The product and the labels of its axes: those of ``output``, perhaps in another order.
    """
    over = [label for label in left if label in right and label not in output]
    batch = [label for label in output if label in left and label in right]
    rows = [label for label in output if label in left and label not in right]
    columns = [label for label in output if label in right and label not in left]
    if not over:
        return multiply(_spread(a, left, output), _spread(b, right, output)), output
    for label in over:  # a sum over a broadcast axis is over all of its length
        i, j = left.index(label), right.index(label)
        if a.shape[i] != b.shape[j]:
            n = max(a.shape[i], b.shape[j])
            a = broadcast_to(a, [n if k == i else m for k, m in enumerate(a.shape)])
            b = broadcast_to(b, [n if k == j else m for k, m in enumerate(b.shape)])
    ahead = _ahead(left, rows, over) + _ahead(right, columns, over)
    batch += ahead
    rows, columns = ([label for label in free if label not in ahead] for free in (rows, columns))
    y = matmul(
        _matrices(a, left, batch, rows, over),
        _matrices(b, right, batch, over, columns),
    )
    lengths = dict(zip([*left, *right], [*a.shape, *b.shape], strict=True))
    shape = (*y.shape[: len(batch)], *(lengths[label] for label in rows + columns))
    return _shaped(y, shape), batch + rows + columns


def _ahead(labels: list[Any], free: list[Any], over: list[Any]) -> list[Any]:
    """The free axes before the summed ones, if there are also free axes behind those.

    Joining the two would copy; as batch axes each of them is a matrix as it stands, like the images
    (c × hw) in bchw,oc->bohw.
    """
    first = min(labels.index(label) for label in over)
    ahead = [label for label in free if labels.index(label) < first]
    return ahead if len(ahead) < len(free) else []


def _matrices(
    x: Any, labels: list[Any], batch: list[Any], rows: list[Any], columns: list[Any]
) -> Any:
    x = _spread(x, labels, batch + rows + columns)
    ahead, middle = len(batch), len(batch) + len(rows)
    row, column = math.prod(x.shape[ahead:middle]), math.prod(x.shape[middle:])
    return _shaped(x, (*x.shape[:ahead], row, column))


def _shaped(x: Any, shape: tuple[int, ...]) -> Any:
    return x if x.shape == shape else reshape(x, shape)


def _arrange(x: Any, labels: list[Any], output: list[Any]) -> Any:
    return x if labels == output else transpose(x, tuple([labels.index(label) for label in output]))


def _spread(x: Any, labels: list[Any], output: list[Any]) -> Any:
    """The axes in the order of the output, with length 1 where x has none."""
    x = _arrange(x, labels, [label for label in output if label in labels])
    lengths = iter(x.shape)
    return _shaped(x, tuple([next(lengths) if label in labels else 1 for label in output]))


# Diagonals


@primitive
def diagonal(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    """The elements x[i, i + offset] of two axes, as a new last axis: a view."""
    return of(x).diagonal(x, offset, axis1, axis2)


@primitive
def _from_diagonal(values: Any, shape: Any, offset: int, axis1: int, axis2: int) -> Any:
    xp = of(values)
    y = xp.zeros(shape, values.dtype)
    i = xp.arange(values.shape[-1])
    xp.moveaxis(y, (axis1, axis2), (0, 1))[i + max(-offset, 0), i + max(offset, 0)] = xp.moveaxis(
        values, -1, 0
    )
    return y


diagonal.derivative(
    x=lambda g, like, offset, axis1, axis2: _from_diagonal(g, like.shape, offset, axis1, axis2)
)
_from_diagonal.derivative(
    values=lambda g, offset, axis1, axis2: diagonal(g, offset, axis1, axis2),
)


def diag(x: Any, k: int = 0) -> Any:
    """Diagonal ``k`` of a matrix, or the matrix of zeros whose diagonal ``k`` is a vector.

    Raises:
        ValueError: x has neither one axis nor two.
    """
    if x.ndim == 2:
        return diagonal(x, k)
    if x.ndim != 1:
        raise ValueError(f"diag takes a vector or a matrix, got shape {x.shape}: see diagonal")
    n = x.shape[0] + abs(k)
    return _from_diagonal(x, (n, n), k, 0, 1)


def trace(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    """The sum of a diagonal."""
    return total(diagonal(x, offset, axis1, axis2), -1)
