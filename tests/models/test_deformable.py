"""Deformable DETR's layers: the port's numbers under the authors' names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.vision.boxes import encoder_reference_points
from models.deformable import (
    DeformableConfig,
    DeformableEncoder,
    DeformableTransformerDecoderLayer,
    DeformableTransformerEncoderLayer,
    MultiheadAttention,
    decode,
    from_transformers,
)
from tests.support import assert_close, host
from tests.vision.test_deformable_attention import (
    GOLDEN,
    SHAPES,
    flat,
    golden_padding,
    part,
    wave,
)

SIZES = DeformableConfig(8, 6, n_levels=2, n_heads=2, n_points=3, num_layers=1)
SELF = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]


def leaves(xp: Any, case: str) -> dict[str, Any]:
    return {k: Tensor(xp.asarray(a), requires_grad=True) for k, a in part(f"{case}.in.").items()}


def gradients_are_the_ports(module: Any, case: str, decoder: bool) -> None:
    """Under the names that the port's gradients have once they are converted."""
    wanted = from_transformers(part(f"{case}.grad.state."), decoder)
    for name, p in module.named_parameters():
        if name in wanted:
            assert_close(p.grad, wanted.pop(name), rtol=1e-9, atol=1e-10)
    assert not wanted


def test_the_encoder_is_the_ports(xp: Any) -> None:
    """On padded maps, with their reference points; numbers and gradients."""
    model = DeformableEncoder(replace(SIZES, num_layers=2)).astype("float64")
    state = from_transformers(part("encoder.state."), decoder=False)
    model.encoder.load_state_dict(state)
    model.level_embed.data[...] = 0.0  # the port adds it outside of its encoder
    x = leaves(xp, "encoder")
    masks = [xp.asarray(mask) for mask in golden_padding()]

    def maps(pixels: Any) -> Any:
        ends, levels = np.cumsum([0, *[h * w for h, w in SHAPES]]), []
        for (height, width), start, stop in zip(SHAPES, ends[:-1], ends[1:], strict=True):
            level = pixels[:, int(start) : int(stop)].swapaxes(1, 2)
            levels.append(level.reshape(2, 8, height, width))
        return levels

    y = model(maps(x["src"]), masks, maps(x["pos"]))
    assert_close(y, GOLDEN["encoder.out"], rtol=1e-10, atol=1e-11)
    y.backward(xp.asarray(wave(y.shape)))
    for name, leaf in x.items():
        assert_close(leaf.grad, GOLDEN[f"encoder.grad.{name}"], rtol=1e-9, atol=1e-10)
    gradients_are_the_ports(model.encoder, "encoder", decoder=False)
    # without the valid ratios the points of the padded image are elsewhere
    unpadded = [xp.zeros(mask.shape, "bool") for mask in masks]
    assert abs(host(model(maps(x["src"]), unpadded, maps(x["pos"])) - y))[1].max() > 0.01


class Decoder(nn.Module):
    """Where the authors' state has its decoder."""

    def __init__(self) -> None:
        self.layers = nn.ModuleList([DeformableTransformerDecoderLayer(SIZES) for _ in range(2)])
        self.bbox_embed = nn.ModuleList([nn.Linear(8, 4) for _ in range(2)])


@pytest.mark.parametrize("case", ["decoder", "decoder_boxes"])
def test_the_decoder_is_the_ports(xp: Any, case: str) -> None:
    """From points and from boxes, each layer looking around what the one before has predicted."""
    model = Decoder().astype("float64")
    model.load_state_dict(from_transformers(part("decoder.state."), decoder=True))
    x = leaves(xp, case)
    padding, ratios = xp.asarray(flat(golden_padding())), xp.asarray(GOLDEN["ratios"])
    geometry = (x["reference"], x["memory"], SHAPES, ratios, padding)
    y, boxes = decode(model.layers, model.bbox_embed, x["tgt"], x["pos"], *geometry)
    assert_close(y, GOLDEN[f"{case}.out"], rtol=1e-10, atol=1e-11)
    assert_close(ops.stack(boxes, axis=1), GOLDEN[f"{case}.out0"], rtol=1e-10, atol=1e-11)
    y.backward(xp.asarray(wave(y.shape)))
    for name, leaf in x.items():
        assert_close(leaf.grad, GOLDEN[f"{case}.grad.{name}"], rtol=1e-9, atol=1e-10)
    gradients_are_the_ports(model, case, decoder=True)
    fixed, none = decode(model.layers, None, x["tgt"], x["pos"], *geometry)
    assert not none and abs(host(fixed - y)).max() > 1e-3


def test_names_are_those_of_the_released_checkpoints(xp: Any) -> None:
    """transformer.encoder.layers.0.… and transformer.decoder.layers.0.…, read off their keys."""
    weights = ("weight", "bias")
    attention = [f"self_attn.{n}.{w}" for n in SELF for w in weights]
    plain = [f"{n}.{w}" for n in ("norm1", "linear1", "linear2", "norm2") for w in weights]
    assert [*DeformableTransformerEncoderLayer(SIZES).state_dict()] == attention + plain
    cross = [f"cross_attn.{n}.{w}" for n in SELF for w in weights]
    ordinary = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    names = {*cross, *(f"self_attn.{n}" for n in ordinary)}
    parts = ("norm1", "norm2", "linear1", "linear2", "norm3")
    names |= {f"{n}.{w}" for n in parts for w in weights}
    assert {*DeformableTransformerDecoderLayer(SIZES).state_dict()} == names
    state = DeformableEncoder(SIZES).state_dict()
    assert {*state} == {"level_embed", *(f"encoder.layers.0.{n}" for n in attention + plain)}
    assert state["level_embed"].shape == (2, 8)
    layer = DeformableTransformerDecoderLayer(DeformableConfig()).state_dict()
    assert layer["self_attn.in_proj_weight"].shape == (768, 256)
    assert layer["cross_attn.sampling_offsets.weight"].shape == (256, 256)
    assert layer["linear1.weight"].shape == (1024, 256)


def test_former_names_of_the_port(xp: Any) -> None:
    """fc1 without mlp and out_proj for o_proj mean the same."""
    now = part("decoder.state.")
    then = {k.replace("mlp.", "").replace("o_proj", "out_proj"): a for k, a in now.items()}
    assert then.keys() != now.keys()
    one, other = from_transformers(now, True), from_transformers(then, True)
    assert one.keys() == other.keys()
    assert all((host(one[k]) == host(other[k])).all() for k in one)
    swapped = from_transformers(now, decoder=False)  # an encoder counts its norms differently
    assert swapped.keys() != one.keys()


def test_a_head_of_ordinary_attention_in_loops(xp: Any) -> None:
    layer = MultiheadAttention(4, 2, rng=Rng(0)).astype("float64")
    layer.in_proj_bias.data[...] = Rng(1).normal((12,), dtype="float64")
    q, k, v = (host(Rng(i).normal((1, 3, 4), dtype="float64")) for i in (2, 3, 4))
    w, b = host(layer.in_proj_weight), host(layer.in_proj_bias)
    rows = [x[0] @ w[4 * i : 4 * i + 4].T + b[4 * i : 4 * i + 4] for i, x in enumerate((q, k, v))]
    heads = []
    for h in range(2):
        a, c, d = (x[:, 2 * h : 2 * h + 2] for x in rows)
        scores = np.exp(a @ c.T / np.sqrt(2))
        heads.append(scores / scores.sum(axis=1, keepdims=True) @ d)
    want = np.concatenate(heads, axis=1) @ host(layer.out_proj.weight).T
    assert_close(layer(*(xp.asarray(x) for x in (q, k, v)))[0], want + host(layer.out_proj.bias))
    with pytest.raises(ValueError, match="divide into 3"):
        MultiheadAttention(4, 3)


def test_queries_of_the_decoder_are_a_set(xp: Any) -> None:
    """Another order of the queries gives the same answers in that order."""
    layer = DeformableTransformerDecoderLayer(SIZES, rng=Rng(0)).astype("float64")
    tgt, pos = (Rng(i).normal((1, 4, 8), dtype="float64") for i in (1, 2))
    points = Rng(3).uniform((1, 4, 2, 2), dtype="float64")
    memory, order = Rng(4).normal((1, 26, 8), dtype="float64"), xp.asarray([2, 0, 3, 1])
    y = layer(tgt, pos, points, memory, SHAPES)
    turned = layer(tgt[:, order], pos[:, order], points[:, order], memory, SHAPES)
    assert_close(turned, host(y)[:, [2, 0, 3, 1]])


def test_levels_are_told_apart_by_their_embedding(xp: Any) -> None:
    """Two equal maps give equal outputs without it and others with it; it is trained."""
    model = DeformableEncoder(SIZES, rng=Rng(0)).astype("float64")
    attention = model.encoder.layers[0].self_attn
    attention.attention_weights.weight.data[...] = Rng(2).normal((12, 8), dtype="float64")
    attention.sampling_offsets.weight.data[...] = Rng(5).normal((24, 8), dtype="float64")
    x, pos = (Rng(i).normal((1, 8, 3, 3), dtype="float64") for i in (1, 3))
    mask = xp.zeros((1, 3, 3), "bool")
    y = model([x, x], [mask, mask], [pos, pos])
    assert abs(host(y[:, :9] - y[:, 9:])).max() > 1e-3
    assert abs(host(grad((y * y * y).sum(), model.level_embed)[0])).max() > 1e-6
    model.level_embed.data[1] = model.level_embed.data[0]
    y = model([x, x], [mask, mask], [pos, pos])
    assert_close(y[:, :9], host(y[:, 9:]))
    with pytest.raises(ValueError, match="takes 2 maps"):
        model([x], [mask], [pos])


def test_dropout_is_off_in_evaluation(xp: Any) -> None:
    layer = DeformableTransformerEncoderLayer(replace(SIZES, dropout=0.5), rng=Rng(0)).eval()
    x = Rng(1).normal((1, 26, 8))
    points = encoder_reference_points(SHAPES, xp.ones((1, 2, 2), "float32"))
    y = layer(x, None, points, SHAPES)
    assert y.dtype == "float32"
    assert_close(layer(x, None, points, SHAPES), host(y), rtol=0, atol=0)
    layer.train()
    assert abs(host(layer(x, None, points, SHAPES) - y)).max() > 0.01
