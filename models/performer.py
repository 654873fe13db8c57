"""GPT-2 and an encoder with the Performer's attention in place of softmax attention.

Choromanski et al. 2021, "Rethinking Attention with Performers", arXiv:2009.14794, §4: all but the
attention is as it was, so the weights of one can be loaded into the other and be trained on.
Deviations: GPT-2's sizes, positions and initial weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mini_nn import Rng
from mini_nn.attention.performer import favor_attention
from mini_nn.attention.performer_layer import PerformerAttention
from mini_nn.nn import Module

from .gpt import GPT, Block, GPTConfig

__all__ = ["PerformerEncoder", "performer", "redraw"]


def performer(
    config: GPTConfig,
    rng: Rng | None = None,
    num_features: int | None = None,
    attention: Callable[..., Any] = favor_attention,
    redraw_interval: int | None = None,
) -> GPT:
    """A GPT with a ``PerformerAttention`` in each block; its last three arguments are the layer's.

    A GPT's checkpoint lacks only the projections: ``load_state_dict(state, strict=False)`` takes
    it.  Pads are refused, and when the model is made what names features that there are not.
    """
    rng = Rng(0) if rng is None else rng
    d, k = config.n_embd // config.n_head, redraw_interval
    make = partial(PerformerAttention, d, num_features, attention, redraw_interval=k, rng=rng)
    return GPT(config, rng, [Block(config, rng, make()) for _ in range(config.n_layer)])


class PerformerEncoder(Module):
    """Blocks in which every token looks at every other, and a norm; arguments as ``performer``."""

    def __init__(
        self,
        config: GPTConfig,
        rng: Rng | None = None,
        num_features: int | None = None,
        attention: Callable[..., Any] = favor_attention,
        redraw_interval: int | None = None,
    ) -> None:
        model = performer(config, rng, num_features, attention, redraw_interval)
        self.h, self.ln_f = model.transformer.h, model.transformer.ln_f
        for block in self.h:
            block.attn.attention = _BothWays(block.attn.attention)

    def forward(self, x: Any, real: Any = None) -> Any:
        """(b, t, d) to (b, t, d); ``real`` (b, t) is true where a token is no pad."""
        for block in self.h:
            x = block(x, None if real is None else real[:, None])
        return self.ln_f(x)


class _BothWays(Module):
    """An attention without order, that takes the mask of a block (b, 1, t) for that of the keys."""

    def __init__(self, inner: PerformerAttention) -> None:
        self.inner = inner

    def forward(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False
    ) -> Any:
        return self.inner(query, key, value, key_mask=attn_mask)


def redraw(model: Module) -> None:
    """Draw the projections of all layers inside anew."""
    for module in (m for m in model.modules() if isinstance(m, PerformerAttention)):
        module.redraw()
