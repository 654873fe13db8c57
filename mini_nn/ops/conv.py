"""Convolution: one trilinear form, whose three partial derivatives are the primitives.

What deep learning calls a convolution is a correlation.  With input x (N, C, H, W), weight
w (O, C/groups, kh, kw), stride s, padding p, dilation d and a cotangent z of the output
(N, O, Ho, Wo), all of it is in the number

    T(x, w, z) = Σ z[n, o, i] · w[o, c, k] · x[n, c, i·s + k·d − p]        (i, k: positions in 2-D)

summed over everything, where x is 0 outside its bounds and c runs over the group of channels that o
belongs to.

======================  =======================================================
``_form_z``  ∂T/∂z      of x and w: the convolution, (N, O, Ho, Wo)
``_form_x``  ∂T/∂x      of z and w: the transposed convolution, (N, C, H, W)
``_form_w``  ∂T/∂w      of x and z: the gradient of the weight, as w
======================  =======================================================

T is linear in each letter, so the derivative of one of the three along a letter that it has is
another of the three: their rules name nothing else, and derivatives of every order follow.

**How it runs.**  The padded images stand side by side in one wide picture, whose channels are lines
of numbers: pixel (h, w) of image n is at (h·N + n)·Wq + w.  A step of the kernel is then one offset
for all outputs at once, and the convolution is a sum over kernel positions k of matrix products of
w[:, :, k] (O, C) with a slice of the lines (C, Ho·N·Wq), where im2col would copy x for each k.  In
the last Wq − Wo columns of an image the window reaches into the next one: they are computed with
the others and dropped.  A stride splits the picture into s·s phases, pixels of equal h mod s and
w mod s, and inside a phase the kernel moves by offsets again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral
from typing import Any, NamedTuple

from ..engine import primitive
from .elementwise import of
from .shape import reshape

__all__ = ["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"]

STACKED = 64
"""Channels times kernel positions in one matrix product.

BLAS is slow where it sums over few channels, and a long sum costs copies instead: measured, 64 is
within some per cent of the best for 1 to 256 channels and kernels of 1×1 to 16×16.
"""

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Which input meets which weight at which output; a pair is (vertical, horizontal)."""

    size: Pair  # of the input
    kernel: Pair
    out: Pair  # the size of the output
    stride: Pair
    before: Pair  # padding above and on the left; what is below and right follows from the sizes
    dilation: Pair
    groups: int = 1

    def overlap(self, axis: int, offset: int, count: int) -> tuple[slice, slice]:
        """The steps i < count for which i·stride + offset − before is inside, and those places."""
        stride, offset = self.stride[axis], offset - self.before[axis]
        first = min(max(0, -(offset // stride)), count)
        last = max(first, min(count, -((offset - self.size[axis]) // stride)))
        start = first * stride + offset
        return slice(first, last), slice(start, start + (last - first) * stride, stride)

    def picture(self) -> Pair:
        """Rows and columns (Wq) of a phase of one image, as far as the kernel gets."""
        axes = zip(self.out, self.kernel, self.dilation, self.stride, strict=True)
        h, w = (o + (k - 1) * d // s for o, k, d, s in axes)
        return h, w

    def offsets(self, n: int) -> list[tuple[Pair, int]]:
        """For each kernel position, row by row: its phase, and its offset into the lines."""
        (sh, sw), (dh, dw), row = self.stride, self.dilation, n * self.picture()[1]
        return [
            ((a * dh % sh, b * dw % sw), a * dh // sh * row + b * dw // sw)
            for a in range(self.kernel[0])
            for b in range(self.kernel[1])
        ]


# The three forms


def _split(x: Any, groups: int) -> Any:
    """(N, C, H, W) seen as (groups, C/groups, H, N, W)."""
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2, 3, 0, 4)


def _lines(x: Any, geo: Geometry) -> dict[Pair, Any]:
    """The lines of x, (groups, C/groups, length), for each phase that the kernel visits."""
    source, (h, w), lines = _split(x, geo.groups), geo.picture(), {}
    for phase, _ in geo.offsets(0):
        if phase not in lines:
            # The slice of the last kernel position ends, with columns to be dropped, in a row more.
            picture = of(x).zeros((*source.shape[:2], h + 1, x.shape[0], w), x.dtype)
            to_h, from_h = geo.overlap(0, phase[0], h)
            to_w, from_w = geo.overlap(1, phase[1], w)
            picture[:, :, to_h, :, to_w] = source[:, :, from_h, :, from_w]
            lines[phase] = _flat(picture)
    return lines


def _line(z: Any, geo: Geometry) -> Any:
    """The outputs as lines (groups, O/groups, Ho·N·Wq), with 0 in the columns to be dropped."""
    source, wq = _split(z, geo.groups), geo.picture()[1]
    if wq == geo.out[1]:
        return _flat(source)
    line = of(z).zeros((*source.shape[:4], wq), z.dtype)
    line[..., : geo.out[1]] = source
    return _flat(line)


def _flat(picture: Any) -> Any:
    return picture.reshape(*picture.shape[:2], math.prod(picture.shape[2:]))


def _matrices(w: Any, geo: Geometry) -> Any:
    """The weight as (groups, O/groups, kh·kw, C/groups)."""
    o, c = w.shape[:2]
    split = w.reshape(geo.groups, o // geo.groups, c, math.prod(geo.kernel)).swapaxes(2, 3)
    return of(w).ascontiguousarray(split)


def _stacks(matrices: Any) -> Iterator[slice]:
    """Kernel positions to be taken together."""
    _, o, count, c = matrices.shape
    step = 1 if o == c == 1 else max(1, STACKED // max(1, c))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def _columns(lines: dict[Pair, Any], offsets: list[tuple[Pair, int]], length: int) -> Any:
    """What these kernel positions see, one below the other: (groups, …·C/groups, length)."""
    slices = [lines[phase][:, :, at : at + length] for phase, at in offsets]
    return slices[0] if len(slices) == 1 else of(slices[0]).concatenate(slices, axis=1)


def _product(a: Any, b: Any) -> Any:
    """A matrix product for each group; of one channel in and out (depthwise), a multiple."""
    return a * b if a.shape[1] == a.shape[2] == 1 else a @ b


@primitive
def _form_z(x: Any, w: Any, geo: Geometry) -> Any:
    n, o, (ho, wo), wq = x.shape[0], w.shape[0], geo.out, geo.picture()[1]
    lines, matrices, offsets = _lines(x, geo), _matrices(w, geo), geo.offsets(n)
    total: Any = None
    for some in _stacks(matrices):
        columns = _columns(lines, offsets[some], ho * n * wq)
        matrix = matrices[:, :, some].reshape(geo.groups, o // geo.groups, columns.shape[1])
        part = _product(matrix, columns)
        total = part if total is None else of(x).add(total, part, out=total)
    return of(x).ascontiguousarray(total.reshape(o, ho, n, wq)[..., :wo].transpose(2, 0, 1, 3))


@primitive
def _form_x(z: Any, w: Any, geo: Geometry) -> Any:
    xp, dtype = of(z), of(z).result_type(z.dtype, w.dtype)
    n, c, (h, wq) = z.shape[0], w.shape[1], geo.picture()
    line, matrices, offsets = _line(z, geo), _matrices(w, geo), geo.offsets(n)
    pictures = {phase: xp.zeros((geo.groups, c, h + 1, n, wq), dtype) for phase, _ in offsets}
    for some in _stacks(matrices):
        stacked = matrices[:, :, some]
        matrix = stacked.reshape(*stacked.shape[:2], stacked.shape[2] * c).swapaxes(1, 2)
        part = _product(matrix, line)
        for i, (phase, at) in enumerate(offsets[some]):
            seen = _flat(pictures[phase])[:, :, at : at + line.shape[2]]
            seen += part[:, i * c : (i + 1) * c]
    x = xp.zeros((n, geo.groups * c, *geo.size), dtype)
    target = _split(x, geo.groups)
    for phase, picture in pictures.items():
        to_h, from_h = geo.overlap(0, phase[0], h)
        to_w, from_w = geo.overlap(1, phase[1], wq)
        target[:, :, from_h, :, from_w] = picture[:, :, to_h, :, to_w]
    return x


@primitive
def _form_w(x: Any, z: Any, geo: Geometry) -> Any:
    xp, dtype = of(x), of(x).result_type(x.dtype, z.dtype)
    n, c, o = x.shape[0], x.shape[1] // geo.groups, z.shape[1]
    lines, line, offsets = _lines(x, geo), _line(z, geo), geo.offsets(n)
    matrices = xp.empty((geo.groups, o // geo.groups, len(offsets), c), dtype)
    for some in _stacks(matrices):
        columns = _columns(lines, offsets[some], line.shape[2])
        part = line @ columns.swapaxes(1, 2)
        matrices[:, :, some] = part.reshape(*part.shape[:2], some.stop - some.start, c)
    return xp.ascontiguousarray(matrices.swapaxes(2, 3)).reshape(o, c, *geo.kernel)


_form_z.derivative(
    x=lambda g, w, geo: _form_x(g, w, geo),
    w=lambda g, x, geo: _form_w(x, g, geo),
)
_form_x.derivative(
    z=lambda g, w, geo: _form_z(g, w, geo),
    w=lambda g, z, geo: _form_w(g, z, geo),
)
_form_w.derivative(
    x=lambda g, z, geo: _form_x(z, g, geo),
    z=lambda g, x, geo: _form_z(x, g, geo),
)


# torch's functions


def conv2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Any:
    """y[n, o, i] = b[o] + Σ w[o, c, k] x[n, c, i·stride + k·dilation − padding] over c and k.

    As torch.nn.functional.conv2d; a pair is (vertical, horizontal).

    Args:
        input: (N, C, H, W), or (C, H, W) for one image; N may be 0.
        weight: (O, C / groups, kh, kw).
        bias: (O,) or None.
        stride: pixels from one window to the next.
        padding: zeros on each side, or ``"valid"`` for none, or ``"same"`` for as many as keep the
            size (stride 1 only; of an odd number the greater half is below and on the right).
        dilation: pixels from one tap of the kernel to the next.
        groups: output group j sees input group j alone; C groups make it depthwise.

    Returns:
        (N, O, H', W') with H' = ⌊(H + 2 padding − dilation (kh − 1) − 1) / stride⌋ + 1; or without
        N.

    Raises:
        ValueError: shapes that do not fit together, or a kernel larger than the padded input.
    """
    return _convolve("conv2d", 2, input, weight, bias, (stride, padding, dilation, groups))


def conv1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: int | tuple[int] = 1,
    padding: int | tuple[int] | str = 0,
    dilation: int | tuple[int] = 1,
    groups: int = 1,
) -> Any:
    """``conv2d`` with one axis: input (N, C, L) or (C, L), weight (O, C / groups, k)."""
    return _convolve("conv1d", 1, input, weight, bias, (stride, padding, dilation, groups))


def conv_transpose2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    output_padding: int | Pair = 0,
    groups: int = 1,
    dilation: int | Pair = 1,
) -> Any:
    """The transpose of the linear map that ``conv2d`` with the same arguments is, plus a bias.

    Every input pixel adds its multiple of the kernel to the output.  As
    torch.nn.functional.conv_transpose2d, also in the order of its arguments.

    Args:
        input: (N, C, H, W), or (C, H, W).
        weight: (C, O / groups, kh, kw): the layout of the convolution that it is the transpose of.
        bias: (O,) or None.
        stride: output pixels from one stamp of the kernel to the next.
        padding: rows and columns taken off each side of the output.
        output_padding: of the up to ``stride`` sizes that the convolution maps to (H, W), how much
            larger than the smallest is meant; less than stride or dilation.
        groups, dilation: as in ``conv2d``.

    Returns:
        (N, O, H', W') with H' = (H − 1) stride − 2 padding + dilation (kh − 1) + output_padding +
        1; or without N.

    Raises:
        ValueError: shapes that do not fit together, or an output without pixels.
    """
    options = stride, padding, output_padding, groups, dilation
    return _transposed("conv_transpose2d", 2, input, weight, bias, options)


def conv_transpose1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: int | tuple[int] = 1,
    padding: int | tuple[int] = 0,
    output_padding: int | tuple[int] = 0,
    groups: int = 1,
    dilation: int | tuple[int] = 1,
) -> Any:
    """``conv_transpose2d`` with one axis: input (N, C, L) or (C, L), weight (C, O / groups, k)."""
    options = stride, padding, output_padding, groups, dilation
    return _transposed("conv_transpose1d", 1, input, weight, bias, options)


def _convolve(name: str, axes: int, x: Any, w: Any, bias: Any, options: tuple[Any, ...]) -> Any:
    """A convolution over one axis is one over two, the first of which has length 1."""
    stride, padding, dilation, groups = options
    taken = w.shape[1] * groups if w.ndim > 1 else 0
    _check(name, axes, x, w, bias, groups, (taken, w.shape[0] if w.ndim else 0))
    s, d = per_axis(name, "stride", stride, axes, 1), per_axis(name, "dilation", dilation, axes, 1)
    size, kernel = as_pair(x.shape[-axes:]), as_pair(w.shape[-axes:])
    reach = [d[i] * (kernel[i] - 1) for i in (0, 1)]
    if padding == "same":
        if s != (1, 1):
            raise ValueError(
                f"{name} can keep the size (padding='same') only at stride 1, got {stride}"
            )
        before, around = as_pair([r // 2 for r in reach]), reach
    else:
        before = per_axis(name, "padding", 0 if padding == "valid" else padding, axes, 0)
        around = [2 * p for p in before]
    out = as_pair([(size[i] + around[i] - reach[i] - 1) // s[i] + 1 for i in (0, 1)])
    if min(out) < 1:
        raise ValueError(
            f"{name}: a kernel {w.shape[-axes:]} with dilation {dilation} is larger than the input "
            f"{x.shape[-axes:]} with padding {padding}: pad more, or take a smaller kernel"
        )
    return _run(_form_z, axes, x, w, bias, Geometry(size, kernel, out, s, before, d, groups))


def _transposed(name: str, axes: int, x: Any, w: Any, bias: Any, options: tuple[Any, ...]) -> Any:
    stride, padding, output_padding, groups, dilation = options
    made = w.shape[1] * groups if w.ndim > 1 else 0
    _check(name, axes, x, w, bias, groups, (w.shape[0] if w.ndim else 0, made))
    s, d = per_axis(name, "stride", stride, axes, 1), per_axis(name, "dilation", dilation, axes, 1)
    p = per_axis(name, "padding", padding, axes, 0)
    more = per_axis(name, "output_padding", output_padding, axes, 0)
    out, kernel = as_pair(x.shape[-axes:]), as_pair(w.shape[-axes:])
    if any(more[i] >= max(s[i], d[i]) for i in (0, 1)):
        raise ValueError(
            f"{name}: output_padding is smaller than stride or dilation, got {output_padding} with "
            f"stride {stride} and dilation {dilation}"
        )
    size = [(out[i] - 1) * s[i] - 2 * p[i] + d[i] * (kernel[i] - 1) + more[i] + 1 for i in (0, 1)]
    if min(size) < 1:
        raise ValueError(
            f"{name}: padding {padding} takes off all that an input {x.shape[-axes:]} gives with a "
            f"kernel {w.shape[-axes:]} and stride {stride}: pad less"
        )
    return _run(_form_x, axes, x, w, bias, Geometry(as_pair(size), kernel, out, s, p, d, groups))


def _run(form: Any, axes: int, x: Any, w: Any, bias: Any, geo: Geometry) -> Any:
    one = (1,) * (2 - axes)
    count = x.shape[: -axes - 1]
    x = reshape(x, (math.prod(count), x.shape[-axes - 1], *one, *x.shape[-axes:]))
    y = form(x, reshape(w, (*w.shape[:2], *one, *w.shape[2:])), geo)
    y = y if bias is None else y + reshape(bias, (bias.shape[0], 1, 1))
    return reshape(y, (*count, y.shape[1], *y.shape[-axes:]))


def _check(
    name: str, axes: int, x: Any, w: Any, bias: Any, groups: Any, channels: tuple[int, int]
) -> None:
    taken, made = channels
    if x.ndim not in (axes + 1, axes + 2) or w.ndim != axes + 2:
        image, kernel = ("L", "k") if axes == 1 else ("H, W", "kh, kw")
        raise ValueError(
            f"{name} takes an input (N, C, {image}) or (C, {image}) and a weight (·, ·, {kernel}), "
            f"got {x.shape} and {w.shape}: reshape them"
        )
    if not isinstance(groups, Integral) or int(groups) < 1:
        raise ValueError(f"{name} takes groups as an integer of at least 1, got {groups!r}")
    if x.shape[-axes - 1] != taken or w.shape[0] % groups:
        layout = "(in, out / groups, …)" if "transpose" in name else "(out, in / groups, …)"
        raise ValueError(
            f"{name}: a weight {w.shape} {layout} with groups={groups} takes {taken} channels to "
            f"{made}, in {groups} equal parts, but the input {x.shape} has {x.shape[-axes - 1]}: "
            "change groups or the weight's first two axes"
        )
    if bias is not None and bias.shape != (made,):
        raise ValueError(
            f"{name} takes a bias ({made},), one for each output channel, got {bias.shape}"
        )


def as_pair(sizes: Any) -> Pair:
    """Two lengths; of one axis, 1 and that."""
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def per_axis(name: str, what: str, value: Any, axes: int, least: int) -> Pair:
    """An option as a pair; of an axis that is not there, the value without effect (``least``).

    Raises:
        ValueError: not one integer of at least ``least``, nor one for each axis.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes or not all(isinstance(v, Integral) and int(v) >= least for v in values):
        many = "" if axes == 1 else f" or {axes} of them"
        raise ValueError(
            f"{name} takes {what} as an integer of at least {least}{many}, got {value!r}"
        )
    return (least, int(values[0])) if axes == 1 else (int(values[0]), int(values[1]))
