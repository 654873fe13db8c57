"""Every attention of the room, called alike: ``f(query, key, value, is_causal)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mini_nn import Rng
from mini_nn import attention as A
from mini_nn.backend import Array
from tests.support import host

D = 8
"""Numbers in a query, a key and a value."""

Method = Callable[..., Any]


def rates(query: Any) -> Any:
    """A number between 0 and 1 for each token, the same for every call."""
    return Rng(50).uniform((64,), 0.1, 0.9, dtype=query.dtype)[: query.shape[-2]]


def logs(query: Any) -> Any:
    """Logarithms of decays likewise."""
    return -rates(query)


def projection(query: Any) -> Any:
    return A.orthogonal_matrix(16, D, Rng(51), dtype=query.dtype)


def with_rates(rule: Method, **others: Callable[[Any], Any]) -> Method:
    """The rule with gates that are drawn once, cut to the length of the queries."""

    def method(query: Any, key: Any, value: Any, is_causal: bool) -> Any:
        made = {name: make(query) for name, make in others.items()}
        return rule(query, key, value, is_causal=is_causal, **made)

    return method


def channel_gates(query: Any) -> Any:
    return -Rng(52).uniform((64, D), 0.1, 0.9, dtype=query.dtype)[: query.shape[-2]]


def directions(query: Any) -> Any:
    return A.unit_length(Rng(53).normal((64, D), dtype=query.dtype)[: query.shape[-2]])


def unit(rule: Method) -> Method:
    """With keys of length 1, as the delta rules want them."""

    def method(query: Any, key: Any, value: Any, is_causal: bool) -> Any:
        return rule(query, A.unit_length(key), value, is_causal=is_causal)

    return method


def hashed(strict: bool) -> Method:
    def method(query: Any, key: Any, value: Any, is_causal: bool) -> Any:
        rotations = Rng(54).normal((2, D, 2), dtype=query.dtype)
        return A.lsh_attention(key, value, rotations, 4, is_causal, strict=strict)

    return method


def projected(query: Any, key: Any, value: Any, is_causal: bool) -> Any:
    """Linformer from 17 tokens to 4 mixtures."""
    e, f = Rng(58).normal((2, 4, key.shape[-2]), dtype=query.dtype)
    return A.linformer_attention(query, key, value, e, f, is_causal=is_causal)


SAME_SIZE = (A.elu_plus_one, A.softmax_features)

CAUSAL: dict[str, Method] = {
    "softmax": A.softmax_attention,
    "softmax, in blocks": partial(A.blockwise_attention, block_size=4),
    "top-k": partial(A.topk_attention, k=3),
    "Taylor softmax": A.taylor_attention,
    "generalized": partial(A.generalized_attention, similarity=A.gaussian_similarity),
    "local": partial(A.local_attention, window=3),
    "atrous": partial(A.atrous_attention, dilation=3),
    "strided": partial(A.strided_attention, window=2, stride=3),
    "fixed": partial(A.fixed_attention, block=4),
    "Longformer": partial(A.longformer_attention, window=3),
    "LSH, strict": hashed(True),
    "linear, ELU + 1": A.linear_attention,
    "linear, cosine": partial(A.linear_attention, feature_map=A.cosine_features),
    "linear, Taylor": partial(A.linear_attention, feature_map=A.taylor_features),
    "linear, pair": partial(A.linear_attention, feature_map=SAME_SIZE),
    "unnormalized": A.unnormalized_attention,
    "efficient, causal": A.causal_efficient_attention,
    "TransNormer": A.norm_attention,
    "retention": partial(A.retention, decay=[0.9]),
    "Mamba-2": with_rates(A.scalar_decay_attention, log_decay=logs),
    "GLA": with_rates(A.gated_linear_attention, log_gate=channel_gates),
    "delta rule": unit(A.delta_rule),
    "gated delta rule": unit(with_rates(A.gated_delta_rule, beta=rates, log_decay=logs)),
    "Comba": unit(with_rates(A.comba, beta=rates, log_decay=logs)),
    "mesa": with_rates(A.mesa, beta=rates, log_decay=logs),
    "mesa, by conjugate gradients": A.mesa_conjugate_gradient,
    "PaTH": with_rates(A.path_attention, direction=directions, beta=rates),
    "DeltaFormer": A.deltaformer,
    "FAVOR+": with_rates(A.favor_attention, projection=projection),
    "FAVOR, trigonometric": with_rates(
        partial(A.favor_attention, feature="trigonometric"), projection=projection
    ),
    "FAVOR++": with_rates(partial(A.oprf_attention, mean_square=1.0), projection=projection),
    "ReLU features": with_rates(A.generalized_kernel_attention, projection=projection),
    "exp features": A.exponential_attention,
}
"""What can be causal."""

NEED_ALL_TOKENS = {
    "Mamba-2", "GLA", "gated delta rule", "Comba", "mesa", "PaTH", "DeltaFormer", "LSH, strict",
}  # fmt: skip
"""What takes more of each token than its key and value, or its place, to answer one query."""

WHOLE: dict[str, Method] = {
    "efficient": A.efficient_attention,
    "A²-Nets": A.double_attention,
    "Linformer": projected,
    "Nyströmformer": partial(A.nystrom_attention, landmarks=4),
    "released FAVOR+": with_rates(A.released_favor_attention, projection=projection),
}
"""What looks at the whole sequence by its nature, and refuses ``is_causal``."""


def perturbed(method: Method, is_causal: bool, t: int, n: int = 17) -> tuple[Array, Array]:
    """How much each output changes, (n,), when key, value and query of token t do."""
    arrays = [x * 0.7 for x in Rng(55).normal((3, n, D), dtype="float64")]
    before = host(method(*arrays, is_causal=is_causal))
    after = [x.copy() for x in arrays]
    for x, shift in zip(after, (0.4, -1.3, 0.8), strict=True):
        x[t] += shift
    change = abs(host(method(*after, is_causal=is_causal)) - before).max(axis=-1)
    return change[:t], change[t:]
