"""A training step of a GPT: forward, backward, AdamW.  Dropout 0, tied head, tanh-GELU.

Ours and PyTorch's use what each library offers a user: fused layers, attention and optimiser.  HIPS
autograd and MyGrad have none of these, so their model is composed from their own primitives by the
same formulas, and AdamW is written in NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .workloads import milliseconds


@dataclass(frozen=True)
class Size:
    """Layers, width, heads, context, batch and vocabulary."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocabulary: int


SIZES = {
    "small": Size(4, 128, 4, 128, 16, 256),
    "nano": Size(6, 384, 6, 256, 8, 256),
}
RATE = 1e-3
# float32 scalars: MyGrad makes a Python float a float64 array, which would promote everything
EPS, CUBIC, HALF, ONE = (np.float32(c) for c in (1e-5, 0.044715, 0.5, 1.0))
ROOT = np.float32(math.sqrt(2 / math.pi))


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """The time of one training step on a fixed batch, in milliseconds."""
    size = SIZES[name.rsplit("_", 1)[1]]
    ids = np.random.default_rng(0).integers(0, size.vocabulary, (size.batch, size.context + 1))
    make = {"mini_nn": _ours, "torch": _torch, "autograd": _autograd, "mygrad": _mygrad}
    return milliseconds(make[implementation](size, ids[:, :-1], ids[:, 1:]), threads)


def our_gpt(size: Size) -> Any:
    """The model in mini_nn."""
    import mini_nn
    from models.gpt import GPT, GPTConfig

    sizes = GPTConfig(size.vocabulary, size.context, size.width, size.layers, size.heads)
    return GPT(sizes, rng=mini_nn.Rng(0))


def _ours(size: Size, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    from mini_nn import optim
    from mini_nn.nn import functional as F

    model = our_gpt(size)
    optimizer = optim.AdamW(model.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        logits = model(x)
        F.cross_entropy(logits.reshape(-1, size.vocabulary), y.reshape(-1)).backward()
        optimizer.step()

    return step


def torch_gpt(size: Size) -> Any:
    """The same model in PyTorch; its forward takes a KV cache, a list with an entry per layer."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            d = size.width
            self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x: Any, past: Any) -> Any:
            b, t, d = x.shape
            q, k, v = self.qkv(self.ln_1(x)).split(d, dim=2)
            q, k, v = (a.view(b, t, size.heads, -1).transpose(1, 2) for a in (q, k, v))
            if past is not None:
                if "k" in past:
                    k, v = torch.cat([past["k"], k], 2), torch.cat([past["v"], v], 2)
                past["k"], past["v"] = k, v
            a = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
            x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
            return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(size.vocabulary, size.width)
            self.wpe = nn.Embedding(size.context, size.width)
            self.blocks = nn.ModuleList(Block() for _ in range(size.layers))
            self.ln_f = nn.LayerNorm(size.width)

        def forward(self, ids: Any, start: int = 0, cache: Any = None) -> Any:
            x = self.wte(ids) + self.wpe(torch.arange(start, start + ids.shape[1]))
            for block, past in zip(self.blocks, cache or [None] * size.layers, strict=True):
                x = block(x, past)
            return self.ln_f(x) @ self.wte.weight.T

    return Model()


def _torch(size: Size, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    model = torch_gpt(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    ids, target = torch.from_numpy(x), torch.from_numpy(y.reshape(-1).copy())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(ids).view(-1, size.vocabulary), target).backward()
        optimizer.step()

    return step


# Composed from NumPy-like primitives: the same code for HIPS autograd and for MyGrad.


def _weights(size: Size) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    d = size.width

    def normal(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    def ones_and_zeros(n: int) -> list[np.ndarray]:
        return [np.ones(n, np.float32), np.zeros(n, np.float32)]

    weights = [normal(size.vocabulary, d), normal(size.context, d)]
    for _ in range(size.layers):
        weights += ones_and_zeros(d)
        weights += [normal(d, 3 * d), np.zeros(3 * d, np.float32)]
        weights += [normal(d, d), np.zeros(d, np.float32)]
        weights += ones_and_zeros(d)
        weights += [normal(d, 4 * d), np.zeros(4 * d, np.float32)]
        weights += [normal(4 * d, d), np.zeros(d, np.float32)]
    return weights + ones_and_zeros(d)


def _composed_loss(
    m: Any,
    value: Callable[[Any], np.ndarray],
    size: Size,
    weights: Any,
    x: np.ndarray,
    hot: np.ndarray,
) -> Any:
    """Mean cross-entropy; ``m`` is the namespace, ``value`` takes the numbers out of the tape."""
    d, h = size.width, size.heads
    b, t = x.shape
    parameters = iter(weights)
    wte, wpe = next(parameters), next(parameters)

    def norm(a: Any, scale: Any, shift: Any) -> Any:
        centred = a - m.mean(a, axis=-1, keepdims=True)
        spread = m.sqrt(m.mean(centred * centred, axis=-1, keepdims=True) + EPS)
        return centred / spread * scale + shift

    def affine(a: Any) -> Any:
        w, bias = next(parameters), next(parameters)
        return m.matmul(a, w) + bias

    def heads(a: Any) -> Any:
        return m.transpose(m.reshape(a, (b, t, h, d // h)), (0, 2, 1, 3))

    forbidden = np.triu(np.full((t, t), -1e9, np.float32), 1)
    z = wte[x] + wpe[np.arange(t)]
    for _ in range(size.layers):
        qkv = affine(norm(z, next(parameters), next(parameters)))
        q, k, v = (heads(qkv[..., i * d : (i + 1) * d]) for i in range(3))
        scores = m.matmul(q, m.swapaxes(k, -1, -2)) * np.float32((d // h) ** -0.5) + forbidden
        e = m.exp(scores - np.max(value(scores), -1, keepdims=True))
        mixed = m.matmul(e / m.sum(e, axis=-1, keepdims=True), v)
        z = z + affine(m.reshape(m.transpose(mixed, (0, 2, 1, 3)), (b, t, d)))
        u = affine(norm(z, next(parameters), next(parameters)))
        inner = ROOT * (u + CUBIC * (u * u * u))
        z = z + affine(HALF * u * (ONE + m.tanh(inner)))
    z = norm(z, next(parameters), next(parameters))
    logits = m.reshape(m.matmul(z, m.transpose(wte)), (b * t, size.vocabulary))
    top = np.max(value(logits), -1, keepdims=True)
    logp = logits - top - m.log(m.sum(m.exp(logits - top), axis=-1, keepdims=True))
    return -m.sum(logp * hot) / np.float32(b * t)


def _adamw(weights: list[np.ndarray]) -> Callable[[list[np.ndarray]], None]:
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    count = 0

    def update(grads: list[np.ndarray]) -> None:
        nonlocal count
        count += 1
        root = math.sqrt(1 - 0.999**count)
        for w, g, m, v in zip(weights, grads, first, second, strict=True):
            w *= 1 - RATE * 0.01
            m *= 0.9
            m += 0.1 * g
            v *= 0.999
            v += 0.001 * (g * g)
            w -= (RATE * root / (1 - 0.9**count)) * m / (np.sqrt(v) + 1e-8 * root)

    return update


def _onehot(size: Size, y: np.ndarray) -> np.ndarray:
    return np.eye(size.vocabulary, dtype=np.float32)[y.reshape(-1)]


def _autograd(size: Size, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    import autograd
    import autograd.numpy as anp
    from autograd.tracer import getval

    weights, onehot = _weights(size), _onehot(size, y)
    update = _adamw(weights)

    def loss(weights: Any) -> Any:
        return _composed_loss(anp, getval, size, weights, x, onehot)

    slope = autograd.grad(loss)
    return lambda: update(slope(weights))


def _mygrad(size: Size, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    import mygrad

    weights, onehot = _weights(size), _onehot(size, y)
    update = _adamw(weights)

    def step() -> None:
        tensors = [mygrad.tensor(w, copy=False) for w in weights]
        _composed_loss(mygrad, lambda t: t.data, size, tensors, x, onehot).backward()
        update([tensor.grad for tensor in tensors])

    return step
