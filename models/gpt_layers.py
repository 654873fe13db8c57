"""The small layers of GPT-2; ``gpt`` puts them together and has the papers."""

from __future__ import annotations

import math
from typing import Any

from mini_nn import Rng, backend, nn, ops
from mini_nn.engine import data_of
from mini_nn.nn import Module, Parameter

from .gpt_config import ACTIVATIONS, GPTConfig


class Conv1D(Module):
    """x W + b with W (in, out): a linear layer in the layout of GPT-2's checkpoints.

    Args:
        inputs, outputs: the widths.
        std: standard deviation of the initial weights; the bias starts at 0.
        rng: where they are drawn from.
    """

    def __init__(self, inputs: int, outputs: int, std: float, rng: Rng) -> None:
        self.weight = Parameter(rng.normal((inputs, outputs), std=std))
        self.bias = Parameter(ops.zeros((outputs,)))

    def forward(self, x: Any) -> Any:
        """(…, in) to (…, out)."""
        return ops.addmm(self.bias, x, self.weight)


class Unembedding(Module):
    """Logits x Wᵀ; ``weight`` (vocab, d) may be the embedding's Parameter: they are tied then."""

    def __init__(self, weight: Parameter) -> None:
        self.weight = weight

    def forward(self, x: Any) -> Any:
        """(…, d) to (…, vocab)."""
        return ops.linear(x, self.weight)


class DroppedAttention(Module):
    """Softmax attention with dropout on its weights while training.

    The weights are what attention returns for the unit matrix as values.
    """

    def __init__(self, p: float, rng: Rng) -> None:
        self.dropout = nn.Dropout(p, rng=rng)

    def forward(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False
    ) -> Any:
        """As ``ops.scaled_dot_product_attention``."""
        attend = ops.scaled_dot_product_attention
        if not self.training:
            return attend(query, key, value, attn_mask, is_causal)
        data = data_of(key)
        unit = backend.of(data).eye(key.shape[-2], dtype=data.dtype)
        unit = backend.of(data).broadcast_to(unit, (*key.shape[:-2], *unit.shape))
        return ops.matmul(self.dropout(attend(query, key, unit, attn_mask, is_causal)), value)


class MLP(Module):
    """W₂ f(W₁ x + b₁) + b₂ with f the config's activation."""

    def __init__(self, config: GPTConfig, rng: Rng) -> None:
        std = config.initializer_range
        self.c_fc = Conv1D(config.n_embd, config.inner, std, rng)
        self.c_proj = Conv1D(config.inner, config.n_embd, std / math.sqrt(2 * config.n_layer), rng)
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop, rng=rng)

    def forward(self, x: Any) -> Any:
        """(…, d) to (…, d)."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))
