"""Whether derivatives are right: a checker for primitives and functions, and data to feed it.

``check_grads`` compares the derivatives that the engine computes with numerical ones.  The other
functions are Hypothesis strategies for shapes and values; only they need ``pip install
'mini-nn[test]'``::

    @given(away_from([0.0]))
    def test_my_primitive(x):
        check_grads(my_primitive, x)

Two numerical derivatives of h along d are used.  The complex step Im h(x + iεd) / ε has no
cancellation, so ε can be 1e-30 and the result is exact to rounding (Squire & Trapp 1998, SIAM
Review 40(1), p. 110), but h must be analytic and take complex numbers.  The central difference
(h(x + εd) − h(x − εd)) / 2ε takes any h and gives about 10 digits; where the two disagree, it is
the one that counts.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from . import backend
from .backend import Array
from .engine import Tensor, data_of
from .rng import Rng
from .transforms import pullback

__all__ = [
    "arrays", "away_from", "broadcastable_shapes", "check_grads", "separated",
    "shapes_with_axis",
]  # fmt: skip

COMPLEX_STEP = 1e-30
CENTRAL_STEP = 6e-6  # the cube root of float64's precision balances truncation and rounding
MOST_ELEMENTS = 64  # of an argument that are looked at one by one


def check_grads(
    fn: Callable[..., Any],
    *args: Any,
    order: int = 2,
    rtol: float | None = None,
    atol: float | None = None,
    rng: Rng | None = None,
    dtypes: Sequence[str] = ("float32", "float64"),
) -> None:
    """Check the derivatives of ``fn(*args)`` by numerical ones, and the laws that primitives obey.

    Every floating-point array among ``args`` is differentiated, in float64, with random cotangents;
    order 2 does the same to the function that maps the arguments and the cotangents to the
    gradients, and so on.  Of arguments with more than 64 elements a random 64 are compared one by
    one, and all together along a random direction.  Also checked:

    * arrays give the values that Tensors give;
    * float32 in gives float32 out, float64 gives float64; gradients have their argument's dtype and
      shape;
    * a gradient is the same whether it is recorded (``create_graph``) or not;
    * ``fn`` and its rules write neither to the arguments nor to the cotangents;
    * two arguments that are one and the same Tensor get the sum of the two gradients.

    Args:
        fn: takes Tensors and arrays, returns one of them or a tuple.
        args: arrays or Tensors, away from kinks of ``fn``; anything else is passed on as it is.
        order: how often to differentiate; 0 checks only the laws.
        rtol: relative tolerance (default: 1e-9 with the complex step, 1e-5 with differences).
        atol: absolute tolerance (default: ``rtol`` times the argument's largest derivative, plus
            the rounding error of a difference).
        rng: draws the cotangents (default: ``Rng(0)``).
        dtypes: those that the laws are checked in; leave one out if ``fn`` holds arrays of its own
            in the other.

    Raises:
        AssertionError: a law does not hold, or a derivative is wrong; the message names the
            argument, the element and both values.
        TypeError: no argument is a floating-point array.

    A wrong sign is found and named::

        >>> import numpy as np
        >>> from mini_nn import ops, primitive
        >>> @primitive
        ... def cosine(x):
        ...     return np.cos(x)
        >>> cosine.derivative(x=lambda g, x: g * ops.sin(x))
        >>> check_grads(cosine, np.array([0.0, 1.0]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        AssertionError: order 1, argument 0, element (1,): expected -0.304..., got 0.304...
        >>> cosine.rules.clear()
        >>> cosine.derivative(x=lambda g, x: -g * ops.sin(x))
        >>> check_grads(cosine, np.array([0.0, 1.0]))
    """
    rng = Rng(0) if rng is None else rng
    values = [data_of(arg) for arg in args]
    places = [i for i, v in enumerate(values) if hasattr(v, "ndim") and v.dtype.kind == "f"]
    if not places:
        raise TypeError(
            "check_grads differentiates floating-point arrays and found none among its arguments "
            f"of types {[type(arg).__name__ for arg in args]}"
        )

    def of_floats(*xs: Any) -> Any:
        given = dict(zip(places, xs, strict=True))
        return fn(*[given.get(i, value) for i, value in enumerate(values)])

    names = [f"argument {i}" for i in places]
    for dtype in dtypes:
        _check_laws(of_floats, [values[i].astype(dtype) for i in places], names, rng)
    level: Callable[..., Any] = of_floats
    xs = [values[i].astype("float64") for i in places]
    for k in range(1, order + 1):
        leaves = _leaves(xs)
        outputs = _floats(level(*leaves))
        vs = _cotangents(outputs, rng)
        recorded = pullback(outputs, leaves, vs, True)
        grads = [_host(g) for g in pullback(outputs, leaves, vs)]
        pairs = zip(outputs, vs, strict=True)
        noise = 1e-9 * float(sum(abs(_host(o) * _host(v)).sum() for o, v in pairs))
        for i, (name, g, twin) in enumerate(zip(names, grads, map(_host, recorded), strict=True)):
            _check_values(
                f"order {k}, {name}", _shifted(level, xs, vs, i), g, noise, (rtol, atol), rng
            )
            close = np.allclose(g, twin, 1e-8, 1e-8)
            _require(close, f"order {k}, {name}: gradient\n{g}\nbut with create_graph=True\n{twin}")
        if k == 1:
            _check_aliases(level, xs, vs, names, order)
        level, xs = _gradient_of(level, len(xs)), [*xs, *vs]
        names += [f"order-{k} cotangent {n}" for n in range(len(vs))]


def _host(x: Any) -> Any:
    return np.asarray(backend.to_host(data_of(x)))


def _leaves(xs: Iterable[Array]) -> list[Tensor]:
    return [Tensor(x, requires_grad=x.dtype.kind == "f") for x in xs]


def _outputs(result: Any) -> list[Any]:
    return [*result] if isinstance(result, (tuple, list)) else [result]


def _floats(result: Any) -> list[Any]:
    return [out for out in _outputs(result) if data_of(out).dtype.kind in "fc"]


def _cotangents(outputs: list[Any], rng: Rng) -> list[Array]:
    """Random numbers of the outputs' shapes and dtypes: equal ones would hide a wrong axis."""
    drawn = [np.asarray(rng.host.standard_normal(out.shape), out.dtype) for out in outputs]
    return [backend.of(data_of(out)).asarray(v) for out, v in zip(outputs, drawn, strict=True)]


def _gradient_of(fn: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The map from ``fn``'s arguments and a cotangent of each output to ``fn``'s gradients."""

    def gradient(*args: Any) -> Any:
        return pullback(_floats(fn(*args[:count])), args[:count], args[count:], True)

    return gradient


def _require(holds: Any, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _check_laws(fn: Callable[..., Any], xs: list[Array], names: list[str], rng: Rng) -> None:
    leaves = _leaves(_read_only(xs))
    before = [_host(x).copy() for x in xs]
    try:
        outputs, plain = _outputs(fn(*leaves)), _outputs(fn(*_read_only(xs)))
        for i, out in enumerate(outputs):
            _require(isinstance(out, Tensor), f"output {i} for Tensors is a {type(out).__name__}")
        vs = _cotangents(_floats(outputs), rng)
        before += [_host(v).copy() for v in vs]
        grads = pullback(_floats(outputs), leaves, _read_only(vs))
    except ValueError as error:
        _require("read-only" not in str(error), f"an argument or cotangent is changed: {error}")
        raise
    for i, (out, array) in enumerate(zip(outputs, plain, strict=True)):
        fits = out.dtype.kind != "f" or out.dtype == xs[0].dtype
        _require(fits, f"output {i} for {xs[0].dtype} arguments has dtype {out.dtype}")
        one, other = _host(out), _host(array)
        same = one.shape == other.shape and np.allclose(one, other, 1e-5, 1e-6, equal_nan=True)
        _require(same, f"output {i} differs: for Tensors\n{one}\nfor arrays\n{other}")
    for name, x, g in zip(names, xs, grads, strict=True):
        seen = f"the gradient of {name} has shape {g.shape} and dtype {g.dtype}"
        _require((g.shape, g.dtype) == (x.shape, x.dtype), f"{seen}, not {x.shape} and {x.dtype}")
    for i, (x, old) in enumerate(zip([*xs, *vs], before, strict=True)):
        name = names[i] if i < len(xs) else f"cotangent {i - len(xs)}"
        _require(np.array_equal(_host(x), old, equal_nan=True), f"{name} is changed")


def _read_only(xs: list[Array]) -> list[Array]:
    """Views that NumPy refuses to write to; other libraries have no such flag."""
    views = [x.view() for x in xs]
    for view in views:
        if isinstance(view, np.ndarray):
            view.flags.writeable = False
    return views


def _check_aliases(
    fn: Callable[..., Any], xs: list[Array], vs: list[Array], names: list[str], order: int
) -> None:
    """One Tensor in two places gets the sum of what two equal Tensors get, at every order."""

    def slopes(args: list[Tensor], leaves: list[Tensor], weights: Array) -> list[Any]:
        """The summed gradients of Σ ⟨v, output⟩, of the weighed sum of those, and so on."""
        results: list[Any] = []
        heads: Sequence[Tensor] = _floats(fn(*args))
        seeds = vs
        for _ in range(order):
            heads = pullback(heads, leaves, seeds, True)
            seeds = [weights] * len(heads)
            results.append(sum(_host(g) for g in heads))
        return results

    for i, j in itertools.combinations(range(len(xs)), 2):
        if xs[i].shape != xs[j].shape:
            continue
        once, twice = _leaves(xs), _leaves(xs)
        once[j], twice[j] = once[i], Tensor(xs[i], requires_grad=True)
        with np.errstate(all="ignore"):
            try:
                wanted = slopes(twice, [twice[i], twice[j]], xs[j])
            except (ValueError, np.linalg.LinAlgError):
                continue  # not a value that both arguments may have
            found = slopes(once, [once[i]], xs[j])
        _require(
            np.allclose(found, wanted, 1e-8, 1e-8, equal_nan=True),
            f"one Tensor as {names[i]} and {names[j]} has gradients\n{found}\nbut two equal ones "
            f"have gradients that add up to\n{wanted}",
        )


def _shifted(fn: Callable[..., Any], xs: list[Array], vs: list[Array], i: int) -> Any:
    """The function of a shift of argument ``i`` that gives Σ ⟨v, output⟩."""

    def total(shift: Any) -> Any:
        moved = backend.of(xs[i]).asarray(_host(xs[i]) + shift)
        outputs = _floats(fn(*_leaves([*xs[:i], moved, *xs[i + 1 :]])))
        return sum((_host(o) * _host(v)).sum() for o, v in zip(outputs, vs, strict=True))

    return total


def _central(total: Callable[[Any], Any], d: Any) -> float:
    return float(total(CENTRAL_STEP * d) - total(-CENTRAL_STEP * d)) / (2 * CENTRAL_STEP)


def _complex(total: Callable[[Any], Any], d: Any) -> float:
    return float(np.imag(total(1j * COMPLEX_STEP * d))) / COMPLEX_STEP


def _is_analytic(total: Callable[[Any], Any], d: Any, noise: float) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # dropping an imaginary part is only a warning
            exact = _complex(total, d)
    except Exception:  # whatever says that complex numbers are not welcome
        return False
    central = _central(total, d)
    return abs(exact - central) <= 1e-5 * abs(central) + noise


def _check_values(
    name: str, total: Any, g: Any, noise: float, tolerances: tuple[Any, Any], rng: Rng
) -> None:
    """Compare the gradient ``g`` with numerical ones, by element and along a random direction."""
    if g.size == 0:
        return
    some = rng.host.permutation(g.size)[:MOST_ELEMENTS]
    units = np.zeros((len(some), *g.shape))
    units.reshape(len(some), -1)[np.arange(len(some)), some] = 1.0
    directions = [*units, rng.host.standard_normal(g.shape)]
    analytic = _is_analytic(total, directions[-1], noise + 1e-9)
    derive = _complex if analytic else _central
    wanted = np.array([derive(total, d) for d in directions])
    found = np.array([(g * d).sum() for d in directions])
    rtol, atol = tolerances
    rtol = rtol if rtol is not None else 1e-9 if analytic else 1e-5
    if atol is None:
        atol = rtol * np.abs(wanted).max() + (1e-12 if analytic else noise + 1e-12)
    wrong = ~(np.abs(found - wanted) <= atol + rtol * np.abs(wanted))  # nan is wrong too
    if wrong.any():
        k = int(wrong.argmax())
        places = [f"element {tuple(map(int, np.unravel_index(n, g.shape)))}" for n in some]
        raise AssertionError(
            f"{name}, {[*places, 'a random direction'][k]}: expected {wanted[k]:.10g}, "
            f"got {found[k]:.10g} ({'complex step' if analytic else 'central difference'})"
        )


# Hypothesis strategies


def _hypothesis() -> tuple[Any, Any]:
    try:
        import hypothesis.extra.numpy
        import hypothesis.strategies
    except ImportError as missing:
        raise ImportError(
            "the strategies of mini_nn.check need Hypothesis: pip install 'mini-nn[test]'"
        ) from missing
    return hypothesis.strategies, hypothesis.extra.numpy


def broadcastable_shapes(n: int, max_dims: int = 3, min_side: int = 1, max_side: int = 4) -> Any:
    """Tuples of ``n`` shapes that broadcast together.

    >>> from hypothesis import find
    >>> find(broadcastable_shapes(2), lambda shapes: True)
    ((), ())
    """
    return (
        _hypothesis()[1]
        .mutually_broadcastable_shapes(
            num_shapes=n, max_dims=max_dims, min_side=min_side, max_side=max_side
        )
        .map(lambda drawn: tuple(drawn.input_shapes))
    )


def shapes_with_axis(max_dims: int = 3, min_side: int = 1, max_side: int = 4) -> Any:
    """Pairs of a shape of at least one axis and one of its axes, from the front or from the back.

    >>> from hypothesis import find
    >>> find(shapes_with_axis(), lambda pair: len(pair[0]) == 2)
    ((1, 1), 0)
    """
    st, hnp = _hypothesis()
    return hnp.array_shapes(max_dims=max_dims, min_side=min_side, max_side=max_side).flatmap(
        lambda shape: st.tuples(st.just(shape), st.integers(-len(shape), len(shape) - 1))
    )


def arrays(shape: Any = None, dtype: str = "float64", low: float = -3.0, high: float = 3.0) -> Any:
    """Arrays on the current backend with values in [low, high].

    Args:
        shape: a shape or a strategy for one (default: at most 3 axes of 1 to 4 elements).
        dtype: a floating-point dtype.
        low, high: the bounds of the values.
    """
    return away_from((), shape, dtype, low, high)


def away_from(
    kinks: Sequence[float],
    shape: Any = None,
    dtype: str = "float64",
    low: float = -3.0,
    high: float = 3.0,
    margin: float = 0.05,
) -> Any:
    """As ``arrays``, with no value nearer than ``margin`` to one of the ``kinks``.

    >>> from hypothesis import find
    >>> find(away_from([0.0], (1,)), lambda x: x[0] < 0)
    array([-1.])
    """
    st, hnp = _hypothesis()
    width = 8 * np.dtype(dtype).itemsize
    values = st.floats(low, high, width=width, allow_subnormal=False).filter(
        lambda x: all(abs(x - kink) >= margin for kink in kinks)
    )
    drawn = hnp.arrays(dtype, _shapes(shape), elements=values)
    return drawn.map(lambda x: backend.current().xp.asarray(x))


def separated(shape: Any = None, dtype: str = "float64", margin: float = 0.1) -> Any:
    """Arrays on the current backend whose values are pairwise ``margin`` apart: for max and sort.

    The values are multiples of twice the margin around 0 in random order, each moved by at most
    half of the margin.

    >>> from hypothesis import find
    >>> find(separated((3,)), lambda x: True)
    array([-0.2,  0. ,  0.2])
    """
    st, hnp = _hypothesis()

    def values(lengths: tuple[int, ...]) -> Any:
        grid = 2 * margin * (np.arange(np.prod(lengths)) - (np.prod(lengths) - 1) / 2)
        moved = hnp.arrays("float64", grid.size, elements=st.floats(-margin / 2, margin / 2))
        return st.tuples(st.permutations(range(grid.size)), moved).map(
            lambda drawn: backend.current().xp.asarray(
                (grid[np.array(drawn[0], int)] + drawn[1]).reshape(lengths).astype(dtype)
            )
        )

    return _shapes(shape).flatmap(values)


def _shapes(shape: Any) -> Any:
    st, hnp = _hypothesis()
    if shape is None:
        return hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=4)
    return shape if hasattr(shape, "flatmap") else st.just(shape)
