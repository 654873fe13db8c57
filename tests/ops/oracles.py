"""What functions of ``mini_nn.ops`` that NumPy does not have should give: loops and formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special
import scipy.stats


def per_axis(value: Any, n: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * n


def windows(places: Any, kernel: Any, stride: Any, dilation: Any) -> Any:
    """For each place of the output of a correlation, the slices of the input that it looks at."""
    for place in np.ndindex(*places):
        steps = zip(place, kernel, stride, dilation, strict=True)
        yield place, tuple(slice(i * s, i * s + d * (k - 1) + 1, d) for i, k, s, d in steps)


def conv(
    x: Any,
    w: Any,
    b: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """(N, C, *size), (O, C/groups, *kernel): one output after the other, in any dimension."""
    n = x.ndim - 2
    stride, padding, dilation = (per_axis(v, n) for v in (stride, padding, dilation))
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    lengths = zip(x.shape[2:], w.shape[2:], stride, dilation, strict=True)
    out = [(m - d * (k - 1) - 1) // s + 1 for m, k, s, d in lengths]
    y = np.zeros((x.shape[0], w.shape[0], *out))
    for o in range(w.shape[0]):
        first = o // (w.shape[0] // groups) * w.shape[1]
        for place, window in windows(out, w.shape[2:], stride, dilation):
            seen = x[(slice(None), slice(first, first + w.shape[1]), *window)]
            y[(slice(None), o, *place)] = np.sum(seen * w[o], axis=tuple(range(1, n + 2)))
    return y if b is None else y + b.reshape(-1, *[1] * n)


def conv_transpose(
    x: Any,
    w: Any,
    b: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """(N, C, *size), (C, O/groups, *kernel): each input stamps its multiple of the kernel."""
    n = x.ndim - 2
    options = (stride, padding, output_padding, dilation)
    stride, padding, extra, dilation = (per_axis(v, n) for v in options)
    lengths = zip(x.shape[2:], w.shape[2:], stride, extra, dilation, strict=True)
    full = [(m - 1) * s + d * (k - 1) + 1 + e for m, k, s, e, d in lengths]
    y = np.zeros((x.shape[0], w.shape[1] * groups, *full))
    for c in range(x.shape[1]):
        first = c // (x.shape[1] // groups) * w.shape[1]
        for place, window in windows(x.shape[2:], w.shape[2:], stride, dilation):
            stamp = x[(slice(None), c, *place)].reshape(-1, *[1] * (n + 1)) * w[c]
            y[(slice(None), slice(first, first + w.shape[1]), *window)] += stamp
    y = y[(..., *(slice(p, m - p) for p, m in zip(padding, full, strict=True)))]
    return y if b is None else y + b.reshape(-1, *[1] * n)


def unfold(x: Any, kernel: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Any:
    """(N, C, H, W) → (N, C·kh·kw, L): a correlation with every kernel that is one 1."""
    weights = np.eye(x.shape[1] * kernel[0] * kernel[1]).reshape(-1, x.shape[1], *kernel)
    y = conv(x, weights, None, stride, padding, dilation)
    return y.reshape(*y.shape[:2], -1)


def fold(
    x: Any, size: Any, kernel: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Any:
    """The transpose of ``unfold``, as the transpose of its matrix."""
    channels = x.shape[1] // (kernel[0] * kernel[1])
    basis = np.eye(channels * size[0] * size[1]).reshape(-1, channels, *size)
    matrix = unfold(basis, kernel, dilation, padding, stride)
    return np.einsum("pcl,ncl->np", matrix, x).reshape(-1, channels, *size)


def avg_pool(x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0) -> Any:
    return _pool(np.mean, 0.0, x, kernel_size, stride, padding, 1)


def max_pool(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1
) -> Any:
    return _pool(np.max, -np.inf, x, kernel_size, stride, padding, dilation)


def _pool(reduce: Any, border: float, x: Any, *sizes: Any) -> Any:
    n = x.ndim - 2
    kernel, stride, padding, dilation = (per_axis(sizes[0] if v is None else v, n) for v in sizes)
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)], constant_values=border)
    lengths = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    y = np.zeros((*x.shape[:2], *((m - d * (k - 1) - 1) // s + 1 for m, k, s, d in lengths)))
    for place, window in windows(y.shape[2:], kernel, stride, dilation):
        y[(..., *place)] = reduce(x[(..., *window)], axis=tuple(range(2, n + 2)))
    return y


def scatter(values: Any, key: Any, shape: Any) -> Any:
    y = np.zeros(shape)
    np.add.at(y, key, values)
    return y


def segment_sum(values: Any, index: Any, count: int) -> Any:
    return scatter(values, index, (count, *values.shape[1:]))


def scatter_add(x: Any, key: Any, values: Any) -> Any:
    y = np.array(x)
    np.add.at(y, key, values)
    return y


def gather(x: Any, dim: int, index: Any) -> Any:
    y = np.empty(index.shape)
    for place in np.ndindex(*index.shape):
        source = list(place)
        source[dim] = index[place]
        y[place] = x[tuple(source)]
    return y


def topk(x: Any, k: int, axis: int = -1) -> Any:
    places = np.flip(np.argsort(x, axis), axis).take(range(k), axis)
    return np.take_along_axis(x, places, axis), places


def cross_entropy(
    logits: Any, target: Any, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Any:
    losses = np.zeros(len(logits))
    for i, (row, label) in enumerate(zip(logits, target, strict=True)):
        if label != ignore_index:
            q = np.full(len(row), label_smoothing / len(row))
            q[label] += 1 - label_smoothing
            losses[i] = -(q * (row - scipy.special.logsumexp(row))).sum()
    return losses


def layer_norm(x: Any, weight: Any = 1.0, bias: Any = 0.0, eps: float = 1e-5) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x: Any, weight: Any = 1.0, eps: float = 1e-6) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def gelu(x: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        return x * scipy.stats.norm.cdf(x)
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(
    q: Any, k: Any, v: Any, mask: Any = None, is_causal: bool = False, scale: Any = None
) -> Any:
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    return scipy.special.softmax(scores, -1) @ v
