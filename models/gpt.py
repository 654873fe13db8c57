"""GPT-2: a decoder-only Transformer whose weights are those of the released checkpoints.

Radford, Wu, Child, Luan, Amodei, Sutskever 2019, "Language Models are Unsupervised Multitask
Learners", §2.3; the block is that of Radford et al. 2018 with the norms moved to the branches'
inputs.  Names and layouts follow Hugging Face's ``GPT2LMHeadModel``.

======================================  =====================================================
x₀ = E[ids] + P[0 … t−1]                ``Transformer``: wte, wpe
x ← x + A(LN₁(x))                       ``Block``, ``CausalSelfAttention``, ``pre_norm``
x ← x + W₂ gelu(W₁ LN₂(x))              ``MLP``
logits = LN_f(x) Eᵀ                     ``Unembedding``, tied to E
N(0, 0.02), branches' ends / √(2N)      the layers' constructors, N = n_layer
======================================  =====================================================

Deviations: dropout rates are 0 by default (GPT-2 trained with 0.1); biases and gains start at 0 and
1, on which the paper is silent; the vocabulary is that of bytes by default.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

from mini_nn import Rng, Tensor, backend, io, nn, ops
from mini_nn.backend import Array
from mini_nn.engine import data_of, primitive
from mini_nn.nn import Module, Parameter
from mini_nn.nn.residual import Residual, pre_norm

from .generation import GenerationMixin, KVCache, LayerCache, as_ids, at_home, on_arrays

Attention = Callable[..., Any]
"""``attention(query, key, value, is_causal=…)`` or ``attn_mask=…``: see ``CausalSelfAttention``."""


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


@primitive
def split_heads(x: Any, heads: int) -> Any:
    """Queries, keys and values side by side, (b, t, 3d), as three views (b, heads, t, d/heads).

    One entry on the tape and one copy in the backward pass, where split, reshape and swapaxes make
    seven and three.
    """
    b, t, width = x.shape
    return tuple(x.reshape(b, t, 3, heads, width // (3 * heads)).transpose(2, 0, 3, 1, 4))


def _split_heads_rule(g: Any, like: Any) -> Any:
    return ops.stack([part.swapaxes(1, 2) for part in g], axis=2).reshape(like.shape)


split_heads.derivative(x=_split_heads_rule)


class CausalSelfAttention(Module):
    """Multi-head attention in which a token sees itself and those before it.

    Args:
        config: the model's.
        rng: for the initial weights and dropout.
        attention: what maps queries, keys and values (b, h, t, d) to (b, h, t, d); None for softmax
            attention.  Given ``is_causal=True`` it hides the future itself; ``attn_mask``
            (booleans, true where a query may look) comes instead where there are pads, or a cache
            and several new tokens.
    """

    def __init__(self, config: GPTConfig, rng: Rng, attention: Attention | None = None) -> None:
        d, std = config.n_embd, config.initializer_range
        self.heads = config.n_head
        self.c_attn = Conv1D(d, 3 * d, std, rng)
        self.c_proj = Conv1D(d, d, std / math.sqrt(2 * config.n_layer), rng)
        if attention is None and config.attn_pdrop:
            attention = DroppedAttention(config.attn_pdrop, rng)
        self.attention = attention or ops.scaled_dot_product_attention
        self.resid_dropout = nn.Dropout(config.resid_pdrop, rng=rng)

    def forward(self, x: Any, mask: Any = None, cache: LayerCache | None = None) -> Any:
        """(b, t, d) to (b, t, d); ``mask`` None means that everything earlier may be seen."""
        b, t, d = x.shape
        query, key, value = split_heads(self.c_attn(x), self.heads)
        if cache is not None:
            key, value = cache.append(key, value)
        if mask is None:
            y = self.attention(query, key, value, is_causal=t > 1)
        else:
            y = self.attention(query, key, value, attn_mask=mask)
        return self.resid_dropout(self.c_proj(y.swapaxes(1, 2).reshape(b, t, d)))


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


class Block(Module):
    """Attention and an MLP, each a branch beside the residual stream.

    Args:
        config: the model's.
        rng: for the initial weights and dropout.
        attention: see ``CausalSelfAttention``.
        mlp: a Module (b, t, d) → (b, t, d) in place of ``MLP``.
        residuals: how the two branches are wrapped, see ``mini_nn.nn.residual``; a wrapper with
            parameters is a Module of its own for each branch.
        norm: makes the norm of a branch; None for ``LayerNorm``.  For wrappers that use none,
            ``nn.Identity`` leaves out its parameters.
    """

    def __init__(
        self,
        config: GPTConfig,
        rng: Rng,
        attention: Attention | None = None,
        mlp: Module | None = None,
        residuals: tuple[Residual, Residual] = (pre_norm, pre_norm),
        norm: Callable[[], Module] | None = None,
    ) -> None:
        norm = norm or partial(nn.LayerNorm, config.n_embd, config.layer_norm_epsilon)
        self.ln_1 = norm()
        self.attn = CausalSelfAttention(config, rng, attention)
        self.ln_2 = norm()
        self.mlp = mlp or MLP(config, rng)
        self.attn_residual, self.mlp_residual = residuals

    def forward(self, x: Any, mask: Any = None, cache: LayerCache | None = None) -> Any:
        """(b, t, d) to (b, t, d)."""
        x = self.attn_residual(x, self.ln_1, self.attn, mask, cache)
        return self.mlp_residual(x, self.ln_2, self.mlp)


class Transformer(Module):
    """Embeddings, blocks and the last norm: token numbers in, hidden states out."""

    def __init__(
        self,
        config: GPTConfig,
        rng: Rng,
        blocks: Iterable[Module] | None,
        norm: Callable[[], Module] | None = None,
    ) -> None:
        std = config.initializer_range
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, rng=rng)  # draws from N(0, 1)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd, rng=rng)
        for table in (self.wte, self.wpe):
            table.weight.data *= std
        self.drop = nn.Dropout(config.embd_pdrop, rng=rng)
        if blocks is None:
            blocks = [Block(config, rng) for _ in range(config.n_layer)]
        self.h = nn.ModuleList(blocks)
        self.ln_f = norm() if norm else nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def forward(self, ids: Array, attention_mask: Any = None, cache: KVCache | None = None) -> Any:
        """(b, t) integers to (b, t, d); the arguments are those of ``GPT.forward``."""
        batch, count = ids.shape
        start = 0 if cache is None else cache.length
        stop, longest = start + count, self.wpe.weight.shape[0]
        if stop > longest:
            raise ValueError(
                f"{stop} tokens do not fit into the {longest} positions of this model: pass only "
                f"the last {longest}"
            )
        if attention_mask is not None:  # a pad may be a number outside the vocabulary
            ids = ops.where(attention_mask, ids, 0)
        real = attention_mask if cache is None else cache.note(attention_mask, batch, count)
        if real is None:
            positions = self.wpe.weight[start:stop]
        else:  # pads do not count; that of a pad itself is never looked at
            seen = real.astype("int64").cumsum(axis=1)[:, start:]
            positions = self.wpe(ops.maximum(seen - 1, 0))
        x = self.drop(self.wte(ids) + positions)
        mask = visible(ids, start, real)
        layers = [None] * len(self.h) if cache is None else cache.layers
        for block, layer in zip(self.h, layers, strict=True):
            x = block(x, mask, layer)
        return self.ln_f(x)


def visible(ids: Array, start: int, real: Array | None) -> Array | None:
    """Which keys (b or nothing, 1 or nothing, t, start + t) each new token may look at.

    None says all that are earlier, where attention can do that by itself: no pads, and the first
    token is the first of all or the only new one.
    """
    count = ids.shape[1]
    if real is None and (start == 0 or count == 1):
        return None
    places = backend.of(ids).arange(start + count)
    earlier = places[start:, None] >= places
    return earlier if real is None else earlier & real[:, None, None, :]


class GPT(GenerationMixin, Module):
    """A language model over tokens: GPT-2, or with other blocks whatever they make of it.

    Args:
        config: sizes and options.
        rng: for the initial weights and dropout; None for ``Rng(0)``.
        blocks: ``config.n_layer`` Modules ``block(x, mask, cache)`` in place of GPT-2's, such as
            ``[Block(config, rng, attention=…) for _ in range(config.n_layer)]``.
        norm: makes the norm before the logits; None for ``LayerNorm``, ``nn.Identity`` for none.

    Raises:
        ValueError: the number of blocks is not ``config.n_layer``.
    """

    def __init__(
        self,
        config: GPTConfig,
        rng: Rng | None = None,
        blocks: Iterable[Module] | None = None,
        norm: Callable[[], Module] | None = None,
    ) -> None:
        rng = Rng(0) if rng is None else rng
        self.config = config
        self.transformer = Transformer(config, rng, blocks, norm)
        if len(self.transformer.h) != config.n_layer:
            raise ValueError(
                f"config.n_layer is {config.n_layer}, got {len(self.transformer.h)} blocks"
            )
        table = self.transformer.wte.weight
        if not config.tie_word_embeddings:
            table = Parameter(rng.normal(table.shape, std=config.initializer_range))
        self.lm_head = Unembedding(table)

    def forward(self, ids: Any, attention_mask: Any = None, cache: KVCache | None = None) -> Any:
        """The logits of the token after each of ``ids``.

        Args:
            ids: (b, t) integers in [0, vocab_size): an array, a Tensor or lists.
            attention_mask: (b, t), 0 or False where a token is a pad: any number, which has no
                position and is not looked at.  What comes out there means nothing.
            cache: from ``new_cache``; ``ids`` then continue what it holds, and are added to it.
                The result then has no history, and dropout is off.

        Returns:
            (b, t, vocab_size).

        Raises:
            TypeError: ``ids`` are not integers.
            IndexError: a token is out of range.
            ValueError: the shapes do not fit, or the context is longer than ``n_positions``.
        """
        numbers = as_ids(ids, data_of(self.transformer.wte.weight))
        if attention_mask is not None:
            attention_mask = at_home(attention_mask, numbers) != 0
            if attention_mask.shape != numbers.shape:
                raise ValueError(
                    f"attention_mask has the shape of ids, {numbers.shape}, got "
                    f"{attention_mask.shape}"
                )
        if cache is None:
            return self.lm_head(self.transformer(numbers, attention_mask))
        view = on_arrays(self)
        return Tensor(view.lm_head(view.transformer(numbers, attention_mask, cache)))

    def next_logits(self, ids: Array, attention_mask: Any, cache: KVCache | None) -> Any:
        """The logits (b, vocab_size) after the last of ``ids`` only, checked by the caller."""
        return self.lm_head(self.transformer(ids, attention_mask, cache)[:, -1])

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: Any = "float32") -> Self:
        """A GPT-2 checkpoint as Hugging Face writes it: config.json and model.safetensors.

        Weights may be in several files with an index, and may lack the prefix ``transformer.`` and
        carry the masks of attention as buffers, as in the first release.  The model is in
        evaluation mode.

        Raises:
            FileNotFoundError: one of the files is not there.
            ValueError: an option that is not supported; missing, unexpected and mis-shaped weights
                by name; an output layer that should be tied and is not the embedding.
        """
        folder = Path(folder)
        config = GPTConfig.from_dict(json.loads((folder / "config.json").read_text("utf-8")))
        state: dict[str, Any] = {}
        for name, value in _read_weights(folder).items():
            if not name.endswith((".attn.bias", ".attn.masked_bias")):
                inside = name.startswith(("transformer.", "lm_head."))
                state[name if inside else f"transformer.{name}"] = value
        table, head = "transformer.wte.weight", "lm_head.weight"
        if config.tie_word_embeddings and table in state:
            shared = state[table]
            own = state.setdefault(head, shared)
            if own is not shared and (own.shape != shared.shape or bool((own != shared).any())):
                raise ValueError(
                    f"the config ties {head} to {table}, but they differ in {folder}: set "
                    "tie_word_embeddings to false in config.json"
                )
        model = cls(config, _Blank(0)).astype(dtype)
        model.load_state_dict(state)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which Hugging Face and ``from_pretrained`` read.

        Each file replaces its predecessor in one step, the config last, so a reader never sees half
        of one.  A tied output layer is not stored twice.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        io.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        _replace(folder / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")


class _Blank(Rng):
    """Zeros instead of random numbers, for weights that are about to be loaded."""

    def normal(
        self, shape: Any = (), mean: float = 0.0, std: float = 1.0, dtype: Any = "float32"
    ) -> Any:
        return backend.current().xp.zeros(shape, dtype)


def _replace(path: Path, text: str) -> None:
    """Write a file so that its name leads to the old text or to all of the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _read_weights(folder: Path) -> dict[str, Array]:
    """All arrays of model.safetensors, or of the files that its index lists."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if not (folder / files[0]).exists() and index.exists():
        files = sorted({*json.loads(index.read_text("utf-8"))["weight_map"].values()})
    weights: dict[str, Array] = {}
    for file in files:
        weights |= io.load_file(folder / file)
    return weights
