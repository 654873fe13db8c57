"""A GPT whose attention carries a state, which need not grow with the text.

Katharopoulos, Vyas, Pappas & Fleuret 2020, "Transformers are RNNs", arXiv:2006.16236, §3.4: a
causal attention that is a linear function of a sum over the past needs only that sum to write on.
So the time and memory of one more token are the same after ten tokens and after ten thousand.

A mixer is a Module ``mixer(x)`` from (b, t, d) to (b, t, d) in which no token sees a later one;
``mixer(x, state=state)`` continues a text and returns the next state too, as the functions of
``mini_nn.attention`` do.  ``SelfAttention`` makes one of any such function.

Deviations: GPT-2's learned positions are kept, so a text still has at most ``n_positions`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mini_nn import Rng, backend
from mini_nn.backend import Array
from mini_nn.nn import Module

from .generation import KVCache, LayerCache, as_ids, at_home
from .gpt import GPT, Block, CausalSelfAttention, split_heads
from .gpt_config import GPTConfig

__all__ = ["Mixer", "RecurrentGPT", "SelfAttention", "StateCache", "TextState"]

Mixer = Callable[[GPTConfig, Rng], Module]
"""``mixer(config, rng)`` makes the Module that stands in a block for attention."""


class StateCache(LayerCache):
    """The state of one layer after the tokens so far, in place of all their keys and values."""

    state: Any = ()

    def append(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Not for a recurrence: TypeError."""
        raise TypeError("a StateCache holds a state, not keys and values: use a KVCache")

    def copy(self, capacity: int, rows: Array = None) -> StateCache:
        """Another one with this capacity, which goes on by itself; of these rows of the batch."""
        made = StateCache(capacity)
        made.length = self.length
        made.state = self.state if rows is None else _rows(self.state, rows)
        return made


class TextState(KVCache):
    """A ``StateCache`` for each layer."""

    def __init__(self, n_layer: int, capacity: int) -> None:
        super().__init__(n_layer, capacity)
        self.layers = [StateCache(capacity) for _ in range(n_layer)]

    def truncate(self, length: int) -> None:
        """ValueError unless there is nothing to forget."""
        if length < self.length:
            raise ValueError(
                f"a state cannot go back from {self.length} tokens to {length}: fork() before "
                "what may have to be taken back"
            )

    def select(self, positions: Sequence[int] | Sequence[Sequence[int]]) -> None:
        """ValueError unless all tokens are to be kept, in their order."""
        if [*positions] != [*range(self.length)]:
            raise ValueError("a state cannot choose among the tokens in it: fork() before")

    def note(self, attention_mask: Array | None, batch: int, count: int) -> None:
        """ValueError if one of the next tokens is a pad."""
        self.layers[0].place(count)
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("a state takes in every token: pads cannot be hidden from it")

    def _copy(self, capacity: int, rows: Sequence[int] | None) -> TextState:
        leaves = _arrays(self.layers[0].state)
        chosen = None if rows is None or not leaves else backend.of(leaves[0]).asarray([*rows])
        made = TextState(0, capacity)
        made.layers = [layer.copy(capacity, chosen) for layer in self.layers]
        return made


class SelfAttention(CausalSelfAttention):
    """GPT-2's projections around an attention that can carry on a state.

    Args:
        config: the model's.
        rng: for the initial weights and dropout.
        attention: ``f(query, key, value, is_causal=True, state=None)`` on (b, h, t, d), such as
            ``mini_nn.attention.linear_attention``.
    """

    def forward(self, x: Any, state: Any = None) -> Any:  # type: ignore[override]
        """(b, t, d) to (b, t, d), and the next state if there is one."""
        b, t, d = x.shape
        query, key, value = split_heads(self.c_attn(x), self.heads)
        y = self.attention(query, key, value, is_causal=True, state=state)
        if state is not None:
            y, state = y
        y = self.resid_dropout(self.c_proj(y.swapaxes(1, 2).reshape(b, t, d)))
        return y if state is None else (y, state)


class Carried(Module):
    """A mixer in the place of a block's attention: its state is kept in the layer's cache."""

    def __init__(self, mixer: Module) -> None:
        self.mixer = mixer

    def forward(self, x: Any, mask: Any = None, cache: StateCache | None = None) -> Any:
        """(b, t, d) to (b, t, d); a mask of two axes can only be that of the order of the tokens.

        Raises:
            ValueError: a mask that hides pads.
        """
        if mask is not None and mask.ndim > 2:
            raise ValueError("a recurrence takes in every token: pads cannot be hidden from it")
        if cache is None:
            return self.mixer(x)
        _, stop = cache.place(x.shape[1])
        y, cache.state = self.mixer(x, state=cache.state)
        cache.length = stop  # not before: a call that the mixer refuses leaves all as it was
        return y


class RecurrentGPT(GPT):
    """A GPT with a mixer in place of the attention of each block.

    ``generate`` carries states on.  What it cannot do is go back: padded batches, trees of tokens,
    and speculative decoding with it as the target need a cache of keys and values.

    Args:
        config: sizes and options.
        mixer: makes the mixer of a block, ``mixer(config, rng)``.
        rng: for the initial weights and dropout; None for ``Rng(0)``.

    Raises:
        ValueError: dropout on the attention's weights (``attn_pdrop``), which no recurrence has.
    """

    def __init__(self, config: GPTConfig, mixer: Mixer, rng: Rng | None = None) -> None:
        if config.attn_pdrop > 0.0:
            raise ValueError(
                "a recurrence has no weights of pairs to drop: set attn_pdrop to 0, got "
                f"{config.attn_pdrop}"
            )
        rng = Rng(0) if rng is None else rng
        blocks = [
            Block(config, rng, attn=Carried(mixer(config, rng))) for _ in range(config.n_layer)
        ]
        super().__init__(config, rng, blocks)

    def new_cache(self, capacity: int) -> TextState:
        """The state before the first token."""
        return TextState(self.config.n_layer, capacity)

    def forward(
        self,
        ids: Any,
        attention_mask: Any = None,
        cache: KVCache | None = None,
        positions: Any = None,
        mask: Any = None,
    ) -> Any:
        """As ``GPT.forward``, without pads and without a mask.

        Raises:
            ValueError: there is a pad, or a mask; or ``attention_mask`` has not the shape of
                ``ids``.
        """
        if mask is not None:
            raise ValueError("a recurrence takes in every token: a mask cannot hide any from it")
        if attention_mask is not None:
            ids = as_ids(ids, self.transformer.wte.weight.data)
            real = at_home(attention_mask, ids) != 0
            attention_mask = None if real.shape == ids.shape and bool(real.all()) else real
        return super().forward(ids, attention_mask, cache, positions)


def _arrays(state: Any) -> list[Any]:
    """The arrays of a state, which may be tuples of tuples."""
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in _arrays(part)]
    return [] if state is None else [state]


def _rows(state: Any, rows: Array) -> Any:
    """These rows of the batch, of every array of a state."""
    if isinstance(state, tuple):
        parts = [_rows(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return None if state is None else state[rows]
