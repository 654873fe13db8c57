"""The sizes and options of a GPT-2, and what Hugging Face's ``config.json`` says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from mini_nn import ops


def gelu_new(x: Any) -> Any:
    """The tanh approximation of GELU, under Hugging Face's name."""
    return ops.gelu(x, "tanh")


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu": ops.gelu,
    "relu": ops.relu,
    "silu": ops.silu,
    "swish": ops.silu,
}

SUPPORTED = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Options of Hugging Face's GPT2Config that change what is computed, with the value we compute."""


@dataclass(frozen=True)
class GPTConfig:
    """The sizes and options of a GPT, under Hugging Face's names.

    Args:
        vocab_size: the number of tokens; 256 is that of bytes.
        n_positions: the longest context.
        n_embd: width of the residual stream.
        n_layer: number of blocks.
        n_head: number of heads, a divisor of ``n_embd``.
        n_inner: width of the MLP; None for 4 ``n_embd``.
        activation_function: one of ``ACTIVATIONS``.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout after a branch, after the embeddings, on the
            attention weights.
        layer_norm_epsilon: added to the variance.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: whether the output layer is the transposed embedding.
        bos_token_id: stored only.
        eos_token_id: the token, or tokens, at which ``generate`` ends a row.

    Raises:
        ValueError: a size is below 1, the heads do not divide the width, an unknown activation.
    """

    vocab_size: int = 256
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd is divided among the heads, but {self.n_embd} is no multiple of "
                f"n_head = {self.n_head}"
            )
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function is one of {', '.join(ACTIVATIONS)}, got "
                f"{self.activation_function!r}"
            )

    @property
    def inner(self) -> int:
        """The width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def num_parameters(self) -> int:
        """The number of trained numbers, tied ones once; GPT-2 small has 124,439,808."""
        d, m = self.n_embd, self.inner
        block = 2 * 2 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * m + (m + 1) * d
        tables = self.vocab_size * (1 if self.tie_word_embeddings else 2) + self.n_positions
        return tables * d + self.n_layer * block + 2 * d

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> GPTConfig:
        """From what ``config.json`` holds; keys that do not change the computation are ignored.

        Raises:
            ValueError: a size is missing, or an option that is not supported is on.
        """
        missing = [name for name in SIZES if name not in options]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}: it is not that of a GPT-2")
        for name, needed in SUPPORTED.items():
            if options.get(name, needed) != needed:
                raise ValueError(
                    f"the config says {name} = {options[name]!r}, but only {needed!r} is supported"
                )
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds, so that Hugging Face reads it too."""
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **asdict(self)}


SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
