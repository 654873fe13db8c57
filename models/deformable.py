"""Deformable DETR's Transformer layers, under the released checkpoints' names; small networks.

Zhu, Su, Lu, Li, Wang, Dai 2020, "Deformable DETR: Deformable Transformers for End-to-End Object
Detection", arXiv:2010.04159.

=========================================  =====================================================
§4.1 encoder: deformable self-attention    ``DeformableTransformerEncoderLayer``
§4.1 its input: maps, level embedding      ``DeformableEncoder``
§4.1 decoder: ordinary self-attention,     ``MultiheadAttention``,
     then deformable cross-attention       ``DeformableTransformerDecoderLayer``
app. A.4 iterative box refinement          ``decode``
=========================================  =====================================================

Names and layouts are those of the authors' repository, where they stand behind ``transformer.``.
``from_transformers`` renames the state of the Hugging Face port:

======================================================  ============================================
port                                                    here
======================================================  ============================================
``self_attn_layer_norm`` (encoder), of the decoder      ``norm1``, ``norm2``
``encoder_attn``, ``encoder_attn_layer_norm``           ``cross_attn``, ``norm1``
``final_layer_norm`` (encoder), of the decoder          ``norm2``, ``norm3``
``mlp.fc1``, ``mlp.fc2`` (formerly ``fc1``, ``fc2``)    ``linear1``, ``linear2``
``self_attn.q_proj``, ``k_proj``, ``v_proj``            ``self_attn.in_proj_…``, one under the other
``self_attn.o_proj`` (formerly ``out_proj``)            ``self_attn.out_proj``
======================================================  ============================================

Deviations: sizes come as a ``DeformableConfig``; dropout is 0 by default (the authors train with
0.1), and the attention weights of the decoder's self-attention are not dropped out; batches come
first everywhere.  In the released code the first layer's boxes, unlike all others', pass a gradient
on to the points that they start from; as in the paper's formula, none do here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mini_nn import Rng, nn, ops
from mini_nn.backend import Array, of
from mini_nn.engine import data_of
from mini_nn.nn import Dropout, LayerNorm, Linear, Module, ModuleList, Parameter
from mini_nn.nn import functional as F
from mini_nn.rng import default_rng
from mini_nn.vision import DeformConvPack, ModulatedDeformConvPack
from mini_nn.vision.boxes import encoder_reference_points, refine_boxes, valid_ratio
from mini_nn.vision.deformable_attention import MSDeformAttn

Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class DeformableConfig:
    """Sizes, with the authors' names and defaults.

    Args:
        d_model: C.
        d_ffn: the width of the MLPs.
        dropout: the rate, of every branch and inside of the MLPs.
        n_levels, n_heads, n_points: as for ``MSDeformAttn``.
        num_layers: of an encoder.
    """

    d_model: int = 256
    d_ffn: int = 1024
    dropout: float = 0.0
    n_levels: int = 4
    n_heads: int = 8
    n_points: int = 4
    num_layers: int = 6

    def attention(self, rng: Rng) -> MSDeformAttn:
        """A deformable attention of these sizes."""
        return MSDeformAttn(self.d_model, self.n_levels, self.n_heads, self.n_points, rng=rng)


def _xavier(rows: int, columns: int, rng: Rng) -> Parameter:
    bound = math.sqrt(6.0 / (rows + columns))
    return Parameter(rng.uniform((rows, columns), -bound, bound))


def _xavier_linear(in_features: int, out_features: int, rng: Rng) -> Linear:
    layer = Linear(in_features, out_features, rng=rng)
    layer.weight = _xavier(out_features, in_features, rng)
    return layer


class MultiheadAttention(Module):
    """Ordinary attention with the state of torch.nn.MultiheadAttention.

    Args:
        embed_dim: C.
        num_heads: a divisor of C.
        rng: what the weights are drawn from, Xavier uniform (None: ``default_rng()``).

    Attributes:
        in_proj_weight, in_proj_bias: (3 C, C) and (3 C,): of queries, keys and values.
        out_proj: Linear(C, C).

    Raises:
        ValueError: C is not divisible by the number of heads.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, rng: Rng | None = None) -> None:
        if embed_dim % num_heads:
            raise ValueError(f"{embed_dim} channels do not divide into {num_heads} heads")
        rng = default_rng() if rng is None else rng
        self.num_heads = num_heads
        self.in_proj_weight = _xavier(3 * embed_dim, embed_dim, rng)
        self.in_proj_bias = Parameter(rng.uniform((3 * embed_dim,), 0.0, 0.0))
        self.out_proj = _xavier_linear(embed_dim, embed_dim, rng)
        self.out_proj.bias.data[...] = 0.0  # type: ignore[union-attr]

    def forward(self, query: Array, key: Array, value: Array) -> Array:
        """(N, Lq, C), (N, Lk, C), (N, Lk, C) → (N, Lq, C)."""
        weights, biases = ops.split(self.in_proj_weight, 3), ops.split(self.in_proj_bias, 3)
        heads = []
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
            y = ops.linear(x, weight, bias)
            heads.append(y.reshape(*y.shape[:2], self.num_heads, -1).swapaxes(1, 2))
        y = ops.scaled_dot_product_attention(*heads).swapaxes(1, 2)
        return self.out_proj(y.reshape(*query.shape))


class DeformableTransformerEncoderLayer(Module):
    """Deformable self-attention and an MLP, each with its residual and then its norm.

    Args:
        config: the sizes.
        rng: what the weights are drawn from (None: ``default_rng()``).
    """

    def __init__(self, config: DeformableConfig, *, rng: Rng | None = None) -> None:
        rng = default_rng() if rng is None else rng
        self.self_attn = config.attention(rng)
        self.norm1 = LayerNorm(config.d_model)
        self.linear1 = _xavier_linear(config.d_model, config.d_ffn, rng)
        self.linear2 = _xavier_linear(config.d_ffn, config.d_model, rng)
        self.norm2 = LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout, rng=rng)

    def forward(
        self,
        src: Array,
        pos: Array | None,
        reference_points: Array,
        spatial_shapes: Shapes,
        padding_mask: Array | None = None,
    ) -> Array:
        """(N, S, C) → (N, S, C); ``pos`` is added to the queries only."""
        query = src if pos is None else src + pos
        seen = self.self_attn(query, reference_points, src, spatial_shapes, padding_mask)
        src = self.norm1(src + self.dropout(seen))
        hidden = self.dropout(ops.relu(self.linear1(src)))
        return self.norm2(src + self.dropout(self.linear2(hidden)))


class DeformableTransformerDecoderLayer(Module):
    """Self-attention among the queries, deformable attention to the memory, and an MLP.

    Args:
        config: the sizes.
        rng: what the weights are drawn from (None: ``default_rng()``).
    """

    def __init__(self, config: DeformableConfig, *, rng: Rng | None = None) -> None:
        rng = default_rng() if rng is None else rng
        self.cross_attn = config.attention(rng)
        self.norm1 = LayerNorm(config.d_model)
        self.self_attn = MultiheadAttention(config.d_model, config.n_heads, rng=rng)
        self.norm2 = LayerNorm(config.d_model)
        self.linear1 = _xavier_linear(config.d_model, config.d_ffn, rng)
        self.linear2 = _xavier_linear(config.d_ffn, config.d_model, rng)
        self.norm3 = LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout, rng=rng)

    def forward(
        self,
        tgt: Array,
        query_pos: Array | None,
        reference_points: Array,
        src: Array,
        src_spatial_shapes: Shapes,
        src_padding_mask: Array | None = None,
    ) -> Array:
        """(N, Lq, C) → (N, Lq, C); ``reference_points`` (N, Lq, L, 2) or (N, Lq, L, 4)."""
        query = tgt if query_pos is None else tgt + query_pos
        tgt = self.norm2(tgt + self.dropout(self.self_attn(query, query, tgt)))
        query = tgt if query_pos is None else tgt + query_pos
        seen = self.cross_attn(query, reference_points, src, src_spatial_shapes, src_padding_mask)
        tgt = self.norm1(tgt + self.dropout(seen))
        hidden = self.dropout(ops.relu(self.linear1(tgt)))
        return self.norm3(tgt + self.dropout(self.linear2(hidden)))


class _Layers(Module):
    def __init__(self, layers: Sequence[Module]) -> None:
        self.layers = ModuleList(layers)


class DeformableEncoder(Module):
    """The encoder on several maps, whose pixels know their level by an embedding.

    Args:
        config: the sizes.
        rng: what the weights are drawn from (None: ``default_rng()``).

    Attributes:
        encoder: holds the ``layers``.
        level_embed: (L, C), drawn from N(0, 1), added to the position of every pixel of a level.
    """

    def __init__(self, config: DeformableConfig, *, rng: Rng | None = None) -> None:
        rng = default_rng() if rng is None else rng
        layers = range(config.num_layers)
        self.encoder = _Layers([DeformableTransformerEncoderLayer(config, rng=rng) for _ in layers])
        self.level_embed = Parameter(rng.normal((config.n_levels, config.d_model)))

    def forward(
        self, srcs: Sequence[Array], masks: Sequence[Array], pos_embeds: Sequence[Array]
    ) -> Array:
        """All levels together.

        Args:
            srcs: the L maps (N, C, H, W).
            masks: their padding, (N, H, W) booleans, True for padding.
            pos_embeds: their position embeddings, (N, C, H, W) each.

        Returns:
            (N, S, C), the pixels of all levels one after the other.

        Raises:
            ValueError: there are not as many maps as levels.
        """
        if not len(srcs) == len(masks) == len(pos_embeds) == len(self.level_embed):
            raise ValueError(
                f"the encoder takes {len(self.level_embed)} maps with a mask and a position each, "
                f"got {len(srcs)}, {len(masks)} and {len(pos_embeds)}"
            )
        spatial_shapes = [src.shape[2:] for src in srcs]
        x = ops.concatenate([_flat(src) for src in srcs], axis=1)
        pairs = zip(pos_embeds, self.level_embed, strict=True)
        pos = ops.concatenate([_flat(pos) + level for pos, level in pairs], axis=1)
        padding = ops.concatenate([mask.reshape(mask.shape[0], -1) for mask in masks], axis=1)
        ratios = ops.stack([valid_ratio(mask, x.dtype) for mask in masks], axis=1)
        reference_points = encoder_reference_points(spatial_shapes, ratios)
        for layer in self.encoder.layers:
            x = layer(x, pos, reference_points, spatial_shapes, padding)
        return x


def _flat(maps: Array) -> Array:
    """(N, C, H, W) → (N, H W, C)."""
    return maps.reshape(*maps.shape[:2], -1).swapaxes(1, 2)


def decode(
    layers: Sequence[Callable[..., Any]],
    heads: Sequence[Callable[..., Any]] | None,
    tgt: Array,
    query_pos: Array | None,
    reference: Array,
    memory: Array,
    spatial_shapes: Shapes,
    valid_ratios: Array,
    padding: Array | None = None,
) -> tuple[Array, list[Array]]:
    """Run decoder layers, each of which looks around the boxes that the one before has left.

    Args:
        layers: ``DeformableTransformerDecoderLayer``s.
        heads: one for each layer, (N, Lq, C) → Δb (N, Lq, 4); None leaves the reference alone.
        tgt, query_pos: (N, Lq, C).
        reference: (N, Lq, 2) points or (N, Lq, 4) boxes, in parts of the image.
        memory: (N, S, C), from the encoder.
        spatial_shapes: (H, W) of each level.
        valid_ratios: (N, L, 2).
        padding: (N, S) booleans.

    Returns:
        The last layer's (N, Lq, C), and the boxes (N, Lq, 4) that each layer predicts.
    """
    boxes: list[Array] = []
    ratios = data_of(valid_ratios)[:, None]
    for i, layer in enumerate(layers):
        scale = ratios if reference.shape[-1] == 2 else ops.concatenate((ratios, ratios), axis=-1)
        points = reference[:, :, None] * scale
        tgt = layer(tgt, query_pos, points, memory, spatial_shapes, padding)
        if heads is not None:
            boxes.append(refine_boxes(heads[i](tgt), reference))
            reference = data_of(boxes[-1])
    return tgt, boxes


_RENAMED = {
    r"\bmlp\.": "",
    r"\bfc([12])\.": r"linear\1.",
    r"\bo_proj\.": "out_proj.",
    r"\bencoder_attn\.": "cross_attn.",
    r"\bencoder_attn_layer_norm\.": "norm1.",
}


def from_transformers(state: Mapping[str, Any], decoder: bool) -> dict[str, Any]:
    """The state of a Hugging Face encoder or decoder, or one layer of it, under our names.

    Args:
        state: arrays by name.
        decoder: whether it is a decoder's, whose norms are counted in another order.
    """
    own, last = ("norm2.", "norm3.") if decoder else ("norm1.", "norm2.")
    norms = {r"\bself_attn_layer_norm\.": own, r"\bfinal_layer_norm\.": last}
    made: dict[str, Any] = {}
    for name, array in state.items():
        if re.search(r"\b[kv]_proj\.", name):
            continue  # taken together with the queries'
        if re.search(r"\bq_proj\.", name):
            three = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            name, array = name.replace("q_proj.", "in_proj_"), ops.concatenate(three, axis=0)
        for pattern, ours in {**_RENAMED, **norms}.items():
            name = re.sub(pattern, ours, name)
        made[name] = array
    return made


# the study's networks


class PixelAttention(Module):
    """Deformable attention of all pixels to their own map, in the place of a convolution.

    Args:
        channels: of the map, a multiple of 4, which is the number of heads.
        points: that each head samples.
        rng: for the initial weights.
    """

    def __init__(self, channels: int, points: int = 4, *, rng: Rng | None = None) -> None:
        self.attention = MSDeformAttn(channels, 1, 4, points, rng=rng)

    def forward(self, input: Any) -> Any:
        """(n, c, h, w) to the same."""
        n, c, h, w = input.shape
        pixels = input.reshape(n, c, h * w).transpose(0, 2, 1)
        whole = of(data_of(input)).ones((n, 1, 2), input.dtype)
        centres = encoder_reference_points([(h, w)], whole)
        seen = self.attention(pixels, centres, pixels, [(h, w)])
        return seen.transpose(0, 2, 1).reshape(n, c, h, w)


def _attention(inputs: int, outputs: int, kernel_size: int, padding: int, rng: Rng) -> Module:
    """A ``PixelAttention`` by a convolution's arguments."""
    return PixelAttention(inputs, rng=rng)


LAYERS: dict[str, Callable[..., Module]] = {
    "conv": nn.Conv2d,
    "dcn_v1": DeformConvPack,
    "dcn_v2": partial(ModulatedDeformConvPack, mask_scale=2.0),
    "attention": _attention,
}
"""What the last two layers of a ``PixelNet`` may be; the first three start as one convolution."""


class PixelNet(Module):
    """A class for each pixel, by five convolutions: the third and fourth are of one of ``LAYERS``.

    Args:
        kind: a name of ``LAYERS``.
        inputs: channels of the image.
        classes: channels of the output.
        width: channels between layers.
        rng: for the initial weights.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str, inputs: int, classes: int, width: int, rng: Rng) -> None:
        if kind not in LAYERS:
            raise ValueError(f"kind is one of {', '.join(LAYERS)}, got {kind!r}")
        self.kind = kind
        make = LAYERS[kind]
        self.first = nn.Conv2d(inputs, width, 3, padding=1, rng=rng)
        self.second = nn.Conv2d(width, width, 3, padding=1, rng=rng)
        self.third = make(width, width, 3, padding=1, rng=rng)
        self.fourth = make(width, width, 3, padding=1, rng=rng)
        self.head = nn.Conv2d(width, classes, 1, rng=rng)
        for layer in (self.first, self.second, self.third, self.fourth):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", rng=rng)

    def before_last(self, image: Any) -> Any:
        """What the fourth layer is given: (n, inputs, h, w) to (n, width, h, w)."""
        x = image
        for layer in (self.first, self.second, self.third):
            x = F.relu(layer(x))
        return x

    def offsets(self, image: Any) -> Any:
        """The offsets (n, 18, h, w) that the fourth layer chooses; zeros of a plain convolution.

        Raises:
            ValueError: it is no convolution.
        """
        if self.kind == "attention":
            raise ValueError("attention has points for each head, and no grid that is moved")
        x = self.before_last(image)
        if self.kind == "conv":
            n, _, height, width = x.shape
            return ops.zeros((n, 18, height, width), x.dtype)
        return self.fourth.offsets(x)

    def forward(self, image: Any) -> Any:
        """(n, inputs, h, w) to logits (n, classes, h, w)."""
        return self.head(F.relu(self.fourth(self.before_last(image))))
