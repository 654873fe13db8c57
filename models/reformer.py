"""Reformer: a language model whose memory grows neither with the depth nor with the square of n.

Kitaev, Kaiser, Levskaya 2020, "Reformer: The Efficient Transformer", arXiv:2001.04451.  Names and
layouts are those of Hugging Face's ``ReformerModelWithLMHead``.

=============================================  ====================================================
x₁ = x₂ = E[ids] + P                           ``Embeddings``
P[t] = [A[t div w], B[t mod w]]                ``AxialPositions``: h d₁ + w d₂ numbers for h w t's
y₁ = x₁ + Attention(LN(x₂)), alternately of    ``Layer.f``: ``local_attention``, ``LSHAttention``
neighbours and of a bucket
y₂ = x₂ + W₂ relu(W₁ LN(y₁) + b₁) + b₂         ``Layer.g``, some positions at a time: ``by_chunks``
nothing is kept between layers                 ``mini_nn.nn.ReversibleSequence``
logits = W LN([y₁, y₂]) + b                    ``Reformer``
=============================================  ====================================================

Deviations: as in ``mini_nn.attention.lsh``, of which the strict form is the default here, since
otherwise the probability of a token depends a little on those after it; Hugging Face's texts of at
most one chunk are not hashed at all.  Dropout of attention weights is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mini_nn import Rng, backend, nn, ops
from mini_nn.attention import LSHAttention
from mini_nn.attention.lsh import with_previous
from mini_nn.engine import data_of
from mini_nn.nn import Module, Parameter

from .generation import as_ids

__all__ = ["AxialPositions", "Layer", "Reformer", "ReformerConfig", "local_attention"]


@dataclass(frozen=True)
class ReformerConfig:
    """The sizes and options, most under Hugging Face's names and with its defaults.

    Args:
        vocab_size: the number of tokens; 256 is that of bytes.
        hidden_size: width of each of the two streams.
        num_attention_heads, attention_head_size: their product need not be the width.
        attn_layers: "local" or "lsh" for each layer.
        feed_forward_size: width of the hidden layer.
        axial_pos_shape: (h, w), for texts of at most h w tokens.
        axial_pos_embds_dim: (d₁, d₂), which add up to the width; None for one embedding for each of
            the h w positions.
        local_attn_chunk_length, lsh_attn_chunk_length: tokens in a chunk.
        num_buckets, num_hashes: b, even, and the rounds.
        chunk_size_feed_forward: positions at a time; 0 for all.
        hidden_dropout_prob: after embeddings and layers.
        layer_norm_eps: added to the variance.
        initializer_range: standard deviation of the initial weights; positions have 1.
        strict: see ``lsh_attention``.

    Raises:
        ValueError: an unknown kind of layer, widths of positions that do not add up, chunks of
            less than one token.
    """

    vocab_size: int = 256
    hidden_size: int = 256
    num_attention_heads: int = 12
    attention_head_size: int = 64
    attn_layers: tuple[str, ...] = ("local", "lsh", "local", "lsh", "local", "lsh")
    feed_forward_size: int = 512
    axial_pos_shape: tuple[int, int] = (64, 64)
    axial_pos_embds_dim: tuple[int, int] | None = (64, 192)
    local_attn_chunk_length: int = 64
    lsh_attn_chunk_length: int = 64
    num_buckets: int = 128
    num_hashes: int = 1
    chunk_size_feed_forward: int = 0
    hidden_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    strict: bool = True

    def __post_init__(self) -> None:
        unknown = {*self.attn_layers} - {"local", "lsh"}
        if unknown:
            raise ValueError(f"attn_layers are 'local' or 'lsh', got {sorted(unknown)}")
        chunks = self.local_attn_chunk_length, self.lsh_attn_chunk_length
        if min(chunks) < 1 or self.chunk_size_feed_forward < 0:
            raise ValueError(
                "a chunk has at least one token, and chunk_size_feed_forward is 0 for all, got "
                f"local_attn_chunk_length={chunks[0]}, lsh_attn_chunk_length={chunks[1]} and "
                f"chunk_size_feed_forward={self.chunk_size_feed_forward}"
            )
        if self.axial_pos_embds_dim and sum(self.axial_pos_embds_dim) != self.hidden_size:
            raise ValueError(
                f"axial_pos_embds_dim {self.axial_pos_embds_dim} has to add up to the width "
                f"{self.hidden_size}"
            )


def local_attention(query: Any, key: Any, value: Any, chunk_size: int) -> Any:
    """Causal softmax attention to the own chunk and the one before: to the last m … 2m − 1 tokens.

    (…, n, d), (…, n, d), (…, n, e) → (…, n, e); the last chunk may be shorter than m.

    Raises:
        ValueError: the shapes do not fit, or m is below 1.
    """
    if query.shape != key.shape or value.shape[:-1] != key.shape[:-1] or chunk_size < 1:
        raise ValueError(
            "local attention takes query and key (…, n, d), value (…, n, e) and chunks of at least "
            f"one token, got {query.shape}, {key.shape}, {value.shape} and chunk_size={chunk_size}"
        )
    *lead, n, _ = query.shape
    m = max(1, min(chunk_size, n))
    count = -(-n // m)
    fill = [(0, 0)] * len(lead) + [(0, count * m - n), (0, 0)]
    q, k, v = (ops.pad(x, fill).reshape(*lead, count, m, x.shape[-1]) for x in (query, key, value))
    i = backend.of(data_of(query)).arange(count * m).reshape(count, m)
    j = with_previous((i + 1)[..., None])[..., 0] - 1  # −1 before the first chunk
    mask = (j[:, None, :] >= 0) & (j[:, None, :] <= i[:, :, None])
    y = ops.scaled_dot_product_attention(q, with_previous(k), with_previous(v), mask)
    return y.reshape(*lead, count * m, value.shape[-1])[..., :n, :]


def _linear(inputs: int, outputs: int, bias: bool, config: ReformerConfig, rng: Rng) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias, rng=rng)
    layer.weight = Parameter(rng.normal((outputs, inputs), std=config.initializer_range))
    if bias:
        layer.bias = Parameter(ops.zeros((outputs,)))
    return layer


class AxialPositions(Module):
    """(n, d₁ + d₂): row n div w of one table beside row n mod w of the other."""

    def __init__(self, shape: tuple[int, int], dims: tuple[int, int], rng: Rng) -> None:
        (h, w), (d1, d2) = shape, dims
        self.weights = Module()
        setattr(self.weights, "0", Parameter(rng.normal((h, 1, d1))))
        setattr(self.weights, "1", Parameter(rng.normal((1, w, d2))))

    def forward(self, n: int) -> Any:
        """The first n positions.

        Raises:
            ValueError: there are not so many.
        """
        a, b = self.weights.parameters()
        h, w = a.shape[0], b.shape[1]
        if n > h * w:
            raise ValueError(f"tables of {h} and {w} rows make {h * w} positions, wanted {n}")
        parts = [ops.broadcast_to(x, (h, w, x.shape[-1])) for x in (a, b)]
        return ops.concatenate(parts, axis=-1).reshape(h * w, -1)[:n]


class Embeddings(Module):
    """Tokens and positions."""

    def __init__(self, config: ReformerConfig, rng: Rng) -> None:
        d, std = config.hidden_size, config.initializer_range
        self.word_embeddings = nn.Embedding(config.vocab_size, d, rng=rng)
        self.word_embeddings.weight.data *= std
        self.position_embeddings = Module()
        if config.axial_pos_embds_dim:
            shape, dims = config.axial_pos_shape, config.axial_pos_embds_dim
            self.position_embeddings = AxialPositions(shape, dims, rng)
        else:
            self.position_embeddings.embedding = nn.Embedding(
                math.prod(config.axial_pos_shape), d, rng=rng
            )
        self.dropout = nn.Dropout(config.hidden_dropout_prob, rng=rng)

    def forward(self, ids: Any) -> Any:
        """(b, n) → (b, n, d)."""
        places, n = self.position_embeddings, ids.shape[1]
        rows = places(n) if isinstance(places, AxialPositions) else places.embedding.weight[:n]
        return self.dropout(self.word_embeddings(ids)) + self.dropout(rows)


class SelfAttention(Module):
    """The projections of one layer's heads, and how they attend."""

    def __init__(self, kind: str, config: ReformerConfig, rng: Rng) -> None:
        self.heads = config.num_attention_heads
        names = ("query", "key", "value") if kind == "local" else ("query_key", "value")
        width = config.num_attention_heads * config.attention_head_size
        for name in names:
            setattr(self, name, _linear(config.hidden_size, width, False, config, rng))
        self.names = names
        self.chunk = config.local_attn_chunk_length
        if kind == "lsh":
            self.lsh = LSHAttention(
                config.num_buckets, config.lsh_attn_chunk_length, config.num_hashes,
                config.strict, scale=1.0, rng=rng,
            )  # fmt: skip

    def forward(self, x: Any) -> Any:
        """(b, n, d) → (b, n, heads · size)."""
        b, n, _ = x.shape
        split = [
            getattr(self, name)(x).reshape(b, n, self.heads, -1).swapaxes(1, 2)
            for name in self.names
        ]
        if len(split) == 3:
            y = local_attention(*split, self.chunk)
        else:
            y = self.lsh(split[0], *split, is_causal=True)
        return y.swapaxes(1, 2).reshape(b, n, -1)


class Attention(Module):
    """LN, attention, output: the branch F."""

    def __init__(self, kind: str, config: ReformerConfig, rng: Rng) -> None:
        width = config.num_attention_heads * config.attention_head_size
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attention = SelfAttention(kind, config, rng)
        self.output = Module()
        self.output.dense = _linear(width, config.hidden_size, False, config, rng)
        self.dropout = nn.Dropout(config.hidden_dropout_prob, rng=rng)

    def forward(self, x: Any) -> Any:
        """(b, n, d) to the same."""
        return self.dropout(self.output.dense(self.self_attention(self.layer_norm(x))))


class FeedForward(Module):
    """LN and two layers, some positions at a time: the branch G."""

    def __init__(self, config: ReformerConfig, rng: Rng) -> None:
        d, hidden = config.hidden_size, config.feed_forward_size
        self.chunk_size = config.chunk_size_feed_forward
        self.layer_norm = nn.LayerNorm(d, config.layer_norm_eps)
        self.dense, self.output = Module(), Module()
        self.dense.dense = _linear(d, hidden, True, config, rng)
        self.output.dense = _linear(hidden, d, True, config, rng)
        self.dropout = nn.Dropout(config.hidden_dropout_prob, rng=rng)

    def positions(self, x: Any) -> Any:
        """(…, d) to the same, each position by itself."""
        hidden = ops.relu(self.dropout(self.dense.dense(self.layer_norm(x))))
        return self.dropout(self.output.dense(hidden))

    def forward(self, x: Any) -> Any:
        """(b, n, d) to the same."""
        if not self.chunk_size:
            return self.positions(x)
        return nn.by_chunks(self.positions, x, self.chunk_size)


class Layer(nn.ReversibleBlock):
    """One reversible block."""

    def __init__(self, kind: str, config: ReformerConfig, rng: Rng) -> None:
        self.attention = Attention(kind, config, rng)
        self.feed_forward = FeedForward(config, rng)

    @property
    def f(self) -> Module:
        """The branch F."""
        return self.attention

    @property
    def g(self) -> Module:
        """The branch G."""
        return self.feed_forward


class Encoder(Module):
    """The reversible layers, and the norm of both streams side by side."""

    def __init__(self, config: ReformerConfig, rng: Rng) -> None:
        self.layers = nn.ModuleList([Layer(kind, config, rng) for kind in config.attn_layers])
        self.layer_norm = nn.LayerNorm(2 * config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob, rng=rng)

    def forward(self, x: Any) -> Any:
        """(b, n, d) → (b, n, 2 d)."""
        streams = nn.ReversibleSequence(self.layers)(x, x)
        return self.dropout(self.layer_norm(ops.concatenate(streams, axis=-1)))


class Reformer(Module):
    """A causal language model.

    Args:
        config: sizes and options.
        rng: for the initial weights, dropout and, while training, the hashes; None for ``Rng(0)``.
    """

    def __init__(self, config: ReformerConfig, rng: Rng | None = None) -> None:
        rng = Rng(0) if rng is None else rng
        self.config = config
        self.reformer, self.lm_head = Module(), Module()
        self.reformer.embeddings = Embeddings(config, rng)
        self.reformer.encoder = Encoder(config, rng)
        width = 2 * config.hidden_size
        self.lm_head.decoder = _linear(width, config.vocab_size, False, config, rng)
        self.lm_head.bias = Parameter(ops.zeros((config.vocab_size,)))

    def forward(self, ids: Any) -> Any:
        """Integers (b, n) → the logits of the token after each, (b, n, vocab_size).

        Pads at a row's end change nothing before them, where ``config.strict``.

        Raises:
            TypeError: ``ids`` are not integers.
            ValueError: they are not (b, n), or more than there are positions.
        """
        ids = as_ids(ids, self.lm_head.bias.data)
        longest = math.prod(self.config.axial_pos_shape)
        if ids.shape[1] > longest:
            raise ValueError(
                f"{ids.shape[1]} tokens do not fit into the {longest} positions of this model: "
                "pass fewer, or make axial_pos_shape larger"
            )
        hidden = self.reformer.encoder(self.reformer.embeddings(ids))
        return self.lm_head.decoder(hidden) + self.lm_head.bias
