"""Drafts that ask a model: a small one, a part of the target, heads on top of it.

===========================================  ============================  =====================
a small model with the same vocabulary       Leviathan, Kalman & Matias    ``ModelDraft``
                                             2022, 2211.17192, 2.1
logits of layer E by the last norm and head; Elhoushi et al. 2024,         ``EarlyExit``
the other L − E layers verify, from the      *LayerSkip*, 2404.16710, 4.3
hidden states that layer E left
the same with a trained layer of attention   F. Liu et al. 2024,           ``Kangaroo``,
between the exit and the head                *Kangaroo*, 2404.18911, 3     ``ExitAdapter``
the target without some of its sublayers,    J. Zhang et al. 2023, *Draft  ``SkippedLayers``
on the target's keys and values              & Verify*, 2309.08168, 3.1
h + W′ⱼ relu(W h + b) + b′ⱼ, and the shared  Stern, Shazeer & Uszkoreit    ``BlockwiseHeads``,
head: the token 1 + j places on              2018, 1811.03115, 4 and 6     ``BlockwiseDraft``
q on the tokens that both models have,       Timor et al. 2025,            ``SharedTokens``
divided by its sum                           2502.05202, *TLI*
===========================================  ============================  =====================

A draft that shares its computation with the target has an attribute ``target``, which is what to
pass for it: ``speculative_generate(draft.target, draft, [text], n)``.  With another target of the
same weights the text is the same, and only the sharing is lost.  To stop at a doubt (Kangaroo's
second exit, and that of 2309.08168) wrap it: ``Stopping(draft, Confidence(0.6), draft.law)``.

Deviations: the exit of Kangaroo uses the norms of GPT-2 instead of RMSNorm.  Which sublayers are
skipped, which 2309.08168 searches for by Bayesian optimisation, is an argument; and the prompt is
first read by the draft, since it is asked first.  Heads of blockwise decoding are all proposals:
the target's own head stays as it is, so that k in the paper is one more than here.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mini_nn import Rng, backend, nn, ops
from mini_nn.backend import Array
from mini_nn.decoding import Source, Warper
from mini_nn.decoding.draft import Proposal, draw_chain
from mini_nn.nn import Module, Parameter

from .cached import ROOM, CachedModel, shared
from .generation import KVCache, LayerCache, on_arrays
from .gpt import GPT, Block, CausalSelfAttention, visible
from .gpt_config import GPTConfig

__all__ = [
    "BlockwiseDraft", "BlockwiseHeads", "EarlyExit", "ExitAdapter", "HiddenModel", "Kangaroo",
    "ModelDraft", "SharedTokens", "SkippedLayers", "layer_states",
]  # fmt: skip


class ModelDraft:
    """A GPT with the target's vocabulary, which draws one token after the other.

    Its cache is that of the text it was asked about last; asked about another one, it keeps what
    the two have in common, so a rejected draft costs nothing but the rows that were wrong.

    Args:
        model: a GPT, shared, not copied; or what can be asked as a ``CachedModel`` can.

    Attributes:
        model: a ``CachedModel``, which counts calls and seconds.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = CachedModel(model) if isinstance(model, GPT) else model
        self._last: tuple[list[int], Array] | None = None

    def rows(self, tokens: Sequence[int], count: int) -> Array:
        """``mini_nn.decoding.draft.Rows``: (count, V) host float64 logits."""
        return self.model.logits(tokens, count).astype("float64", copy=False)

    def law(self, text: Sequence[int]) -> Array:
        """softmax of the logits after the text, (V,): how sure the draft is, at any temperature."""
        return ops.softmax(self._row(text, 1)[0])

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As ``Draft``: ``count`` tokens, each drawn from its row of q; fewer at the last position.

        At temperature 0 they are the model's greedy choices, and q is one-hot.
        """
        room = self.model.model.config.n_positions - len(text) + 1
        return draw_chain(self._row, text, max(min(count, room), 0), warper, source)

    def _row(self, tokens: Sequence[int], count: int) -> Array:
        """One row; that of the last call is not asked for again."""
        if self._last is None or self._last[0] != [*tokens]:
            self._last = ([*tokens], self.rows(tokens, count))
        return self._last[1]


# What a model leaves behind


class HiddenModel(CachedModel):
    """A ``CachedModel`` that also keeps what its head is given, so that others can use it.

    A row that is asked for again is not computed again.

    Args:
        model: shared, not copied.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__(model)
        self._hidden: Array = None  # (capacity, d), of the tokens whose rows the cache holds

    def _feed(
        self, ids: list[list[int]], mask: Any = None, positions: Any = None, visible: Any = None
    ) -> Array:
        start = self.cache.length
        new = super()._feed(ids, mask, positions, visible)
        stop = start + new.shape[1]
        if self._hidden is None or stop > len(self._hidden):
            old = self._hidden
            room = self.cache.layers[0].capacity
            self._hidden = backend.of(new).empty((room, new.shape[2]), new.dtype)
            if old is not None:
                self._hidden[:start] = old[:start]
        self._hidden[start:stop] = new[0]
        return new

    def states(self, tokens: Sequence[int], rows: int = 1) -> Array:
        """What the head is given for the last tokens of a text: (rows, d), on the model's backend.

        The arguments and errors are those of ``logits``; rows may be 0.  It is a view, which the
        next call may overwrite.
        """
        text = list(tokens)
        if not 0 <= rows <= len(text):
            raise ValueError(f"a text of {len(text)} tokens has as many states, got rows={rows}")
        began = time.perf_counter()
        start = shared(self.tokens, text)
        if start < len(text):
            self._cut(start)
            self._feed([text[start:]])
            self.tokens = text
            self.fed += len(text) - start
        self.seconds += time.perf_counter() - began
        return self._hidden[len(text) - rows : len(text)]

    def logits(self, tokens: Sequence[int], rows: int = 1) -> Array:
        """As ``CachedModel.logits``."""
        _check_rows(tokens, rows)
        states = self.states(tokens, rows)
        began = time.perf_counter()
        found = self._logits(states)
        self.seconds += time.perf_counter() - began
        return found

    def keep(self, text: Sequence[int], path: Sequence[int]) -> None:
        """As ``CachedModel.keep``."""
        tree, start = self._tree, len(self.tokens) - 1
        super().keep(text, path)
        assert tree is not None  # or super has raised
        rows = backend.of(self._hidden).asarray(tree.compact(path, start).tolist())
        self._hidden[: len(rows)] = self._hidden[rows]


def _check_rows(tokens: Sequence[int], rows: int) -> None:
    if not 1 <= rows <= len(tokens):
        raise ValueError(
            f"a text of {len(tokens)} tokens has 1 … {len(tokens)} rows of logits, got rows={rows}"
        )


def layer_states(model: GPT, ids: Array) -> Iterator[Any]:
    """The hidden states after each of the L layers, (b, t, d), on the tape: for losses of exits.

    An exit's logits are ``model.lm_head(model.transformer.ln_f(state))``; the last are the model's.

    Args:
        model: a GPT.
        ids: (b, t) integers, on the model's backend.
    """
    x, mask = model.transformer.embed(ids)
    for block in model.transformer.h:
        x = block(x, mask, None)
        yield x


# Early exits


def _first_layers(model: GPT, count: int) -> GPT:
    """A view of the first layers with the norm and the head at their end; the norm is in the head,
    so that what the head is given is what the next layer is given.
    """
    view = copy.copy(model)
    view.config = replace(model.config, n_layer=count)
    view.transformer = copy.copy(model.transformer)
    view.transformer.h = nn.ModuleList([*model.transformer.h][:count])
    view.transformer.ln_f = nn.Identity()
    view.lm_head = nn.Sequential(model.transformer.ln_f, model.lm_head)  # type: ignore[assignment]
    return view


class _OtherLayers:
    """The target as the layers behind an exit: a ``Target`` of one text."""

    def __init__(self, model: GPT, first: HiddenModel) -> None:
        self.model, self.first, self.tokens = model, first, list[int]()
        done = first.model.config.n_layer
        self.view = on_arrays(model)
        self.blocks = [*self.view.transformer.h][done:]
        self.cache = KVCache(len(self.blocks), ROOM)
        self.calls, self.fed, self.seconds = 0, 0, 0.0

    def logits(self, tokens: Sequence[int], rows: int = 1) -> Array:
        """As ``CachedModel.logits``; the time of the first layers is counted there."""
        text = list(tokens)
        _check_rows(text, rows)
        start = min(shared(self.tokens, text), len(text) - rows)
        self.cache.truncate(start)
        self.tokens = self.tokens[:start]
        x = self.first.states(text, len(text) - start)[None]
        began = time.perf_counter()
        self.cache.reserve(self.first.cache.layers[0].capacity)
        mask = visible(x, start, None)
        for block, layer in zip(self.blocks, self.cache.layers, strict=True):
            x = block(x, mask, layer)
        self.tokens = text
        self.calls, self.fed = self.calls + 1, self.fed + len(text) - start
        transformer, home = self.view.transformer, self.first.home
        found = home.to_host(self.view.lm_head(transformer.ln_f(x[0, -rows:])))
        self.seconds += time.perf_counter() - began
        return found


class EarlyExit(ModelDraft):
    """The target's first layers, with its own norm and head, draft for the whole of it.

    Elhoushi et al. 2024, 2404.16710, 4.3.  Its keys, values and exit states stay, and the target
    (``target``) goes on from them; a token that was never drafted is fed through the first layers
    then.  So each token passes each layer once, up to drafts that were rejected.

    Args:
        target: a GPT, shared.
        exit_layer: E, how many layers draft, 1 … L − 1.

    Attributes:
        model: the first layers.
        target: all of them, for one text: pass it to ``speculative_generate``.

    Raises:
        ValueError: E is out of its range.
    """

    def __init__(self, target: GPT, exit_layer: int) -> None:
        if not 1 <= exit_layer < target.config.n_layer:
            raise ValueError(
                f"a model of {target.config.n_layer} layers has exits behind the layers "
                f"1 … {target.config.n_layer - 1}, got {exit_layer}"
            )
        first = HiddenModel(_first_layers(target, exit_layer))
        super().__init__(first)
        self.target = _OtherLayers(target, first)


class ExitAdapter(Module):
    """N′(x + A(N(x))) with A causal attention: what Kangaroo trains between an exit and the head.

    Liu et al. 2024, 2404.18911, 3.1.

    Args:
        config: of the model; one layer's width and heads.
        rng: for the initial weights.
    """

    def __init__(self, config: GPTConfig, rng: Rng) -> None:
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, rng)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def forward(self, x: Any, mask: Any = None, cache: LayerCache | None = None) -> Any:
        """(b, t, d) to (b, t, d)."""
        return self.ln_2(x + self.attn(self.ln_1(x), mask, cache))


class Kangaroo(EarlyExit):
    """An early exit with a trained adapter before the shared head.

    Liu et al. 2024, 2404.18911.  Train the adapter with ``layer_states`` and a loss of
    ``mini_nn.losses.distillation`` between ``lm_head(adapter(state))`` and the model's logits.

    Args:
        target: a GPT, shared and frozen.
        exit_layer: E; shallow, 2 or 3 of 32 in the paper.
        adapter: maps the states (b, t, d) after layer E to what the head is given.

    Attributes:
        model, target: as those of ``EarlyExit``.
    """

    def __init__(self, target: GPT, exit_layer: int, adapter: ExitAdapter) -> None:
        super().__init__(target, exit_layer)
        self.adapter = on_arrays(adapter)
        self.cache = KVCache(1, ROOM)
        self.tokens: list[int] = []
        self._own = 0.0

    @property
    def seconds(self) -> float:
        """Time in the first layers and the adapter."""
        return float(self.model.seconds + self._own)

    def rows(self, tokens: Sequence[int], count: int) -> Array:
        """As ``ModelDraft.rows``."""
        text = list(tokens)
        _check_rows(text, count)
        start = min(shared(self.tokens, text), len(text) - count)
        self.cache.truncate(start)
        self.tokens = self.tokens[:start]
        x = self.model.states(text, len(text) - start)[None]
        began = time.perf_counter()
        self.cache.reserve(self.model.cache.layers[0].capacity)
        x = self.adapter(x, visible(x, start, None), self.cache.layers[0])
        self.tokens = text
        found = self.model.home.to_host(self.target.view.lm_head(x[0, -count:]))
        self._own += time.perf_counter() - began
        return found.astype("float64", copy=False)


# Skipped sublayers


class _Shortened:
    """The target with sublayers left out, on its cache, behind the rows that are the target's."""

    def __init__(self, target: CachedModel, attention: frozenset[int], mlp: frozenset[int]) -> None:
        self.model, self.target = target.model, target
        self.attention, self.mlp = attention, mlp
        self.calls, self.fed, self.seconds = 0, 0, 0.0
        self._base: list[int] | None = None  # the target's tokens when our rows were written
        self._own: list[int] = []  # the tokens of those rows

    def logits(self, tokens: Sequence[int], rows: int = 1) -> Array:
        target, text = self.target, list(tokens)
        _check_rows(text, rows)
        longest, size = target.model.config.n_positions, target.model.config.vocab_size
        if len(text) > longest:
            raise ValueError(
                f"{len(text)} tokens do not fit into the {longest} positions of this model"
            )
        if not 0 <= min(text) <= max(text) < size:
            raise IndexError(f"the tokens of this model are 0 … {size - 1}, got {text}")
        began = time.perf_counter()
        common = min(shared(target.tokens, text), len(text) - rows)
        if common < len(target.tokens):
            target.rollback(text[:common])
        if target.tokens is not self._base:  # the target was called, which overwrote our rows
            self._base, self._own = target.tokens, []
        start = min(common + shared(self._own, text[common:]), len(text) - rows)
        target.cache.truncate(start)
        self._own = self._own[: start - common]
        room = target.cache.layers[0].capacity
        if len(text) > room:
            target.cache.reserve(max(len(text), 2 * room))
        hidden = self._pass(text, start)
        self._own = text[common:]
        self.calls, self.fed = self.calls + 1, self.fed + len(text) - start
        found = target.home.to_host(target.view.lm_head(hidden[0, -rows:]))
        self.seconds += time.perf_counter() - began
        return found

    def _pass(self, text: list[int], start: int) -> Array:
        """Positions are given, for a layer without attention has no rows to count them by."""
        xp, transformer = self.target.home.xp, self.target.view.transformer
        ids = xp.asarray([text[start:]], dtype="int64")
        x, _ = transformer.embed(ids, positions=xp.arange(start, len(text)))
        mask = visible(ids, start, None)
        layers = self.target.cache.layers
        blocks: list[Any] = [*transformer.h]
        for number, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            if number not in self.attention:
                x = block.attn_residual(x, block.ln_1, block.attn, mask, layer)
            if number not in self.mlp:
                x = block.mlp_residual(x, block.ln_2, block.mlp)
        return transformer.ln_f(x)


class SkippedLayers(ModelDraft):
    """The target drafts for itself with some sublayers replaced by the identity.

    Zhang et al. 2023, 2309.08168, 3.1.  The draft attends to the target's own keys and values of
    the verified text, and adds rows of its own that the target overwrites.  With nothing skipped
    every draft stands.

    Args:
        target: a GPT, shared, of ``models.gpt.Block``s.
        attention: numbers of the layers, from 0, whose attention is skipped.
        mlp: those whose MLP is skipped.

    Attributes:
        model: the shortened target.
        target: for one text, with the cache that both use.

    Raises:
        ValueError: there is no such layer.
        TypeError: a block has no sublayers that could be skipped.
    """

    def __init__(
        self, target: GPT, attention: Collection[int] = (), mlp: Collection[int] = ()
    ) -> None:
        layers = target.config.n_layer
        wrong = sorted(number for number in {*attention, *mlp} if not 0 <= number < layers)
        if wrong:
            raise ValueError(f"the layers of this model are 0 … {layers - 1}, got {wrong}")
        strange = [x for x in target.transformer.h if not isinstance(x, Block)]
        if strange:
            raise TypeError(
                "SkippedLayers skips the sublayers of a models.gpt.Block, got "
                f"{type(strange[0]).__name__}"
            )
        self.target = CachedModel(target)
        super().__init__(_Shortened(self.target, frozenset(attention), frozenset(mlp)))


# Heads


class BlockwiseHeads(Module):
    """Proposals for the tokens 2, 3 … places behind a hidden state, in one layer of all heads.

    Stern et al. 2018, 1811.03115, section 6: one hidden layer of k dₕ numbers, and from it one
    output of width d for each head, beside the state itself.

    Args:
        dim: d.
        heads: how many proposals there are.
        hidden: dₕ, per head; None for d.
        rng: for the initial weights.  W′ starts at 0, so every head starts as the model's own.

    Raises:
        ValueError: there is no head.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int | None = None, rng: Rng | None = None
    ) -> None:
        if heads < 1:
            raise ValueError(f"blockwise decoding has at least 1 proposal, got {heads}")
        self.heads = heads
        width = heads * (dim if hidden is None else hidden)
        self.c_fc = nn.Linear(dim, width, rng=rng)
        zeros = backend.current().xp.zeros
        self.weight = Parameter(zeros((heads * dim, width), dtype="float32"))
        self.bias = Parameter(zeros((heads * dim,), dtype="float32"))

    def forward(self, h: Any) -> Any:
        """States (…, d) to (…, heads, d), each of which the shared head turns into logits."""
        out = ops.linear(ops.relu(self.c_fc(h)), self.weight, self.bias)
        return h[..., None, :] + out.reshape(*h.shape[:-1], self.heads, h.shape[-1])


class BlockwiseDraft:
    """Every call of the target also proposes the next block: no other model is asked.

    Stern et al. 2018, 1811.03115, section 4.  The state that gave the last token of the text gives
    the heads' laws of those behind it.  They do not know of one another, which q says.

    Args:
        target: a GPT, shared.
        heads: trained on its hidden states.

    Attributes:
        target: for one text; its states of the verification are those of the next proposal.
        seconds: time in the heads.
    """

    def __init__(self, target: GPT, heads: BlockwiseHeads) -> None:
        self.target = HiddenModel(target)
        self.heads = on_arrays(heads)
        self.seconds = 0.0

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft; at most as many tokens as heads, and none behind a single token."""
        if len(text) < 2 or count < 1:
            return Proposal([], None)
        state = self.target.states(text[:-1])
        began = time.perf_counter()
        logits = self.target.home.to_host(self.target.view.lm_head(self.heads(state)[0]))
        self.seconds += time.perf_counter() - began
        start, logits = len(text), logits.astype("float64", copy=False)

        def rows(tokens: Sequence[int], _: int) -> Array:
            return logits[len(tokens) - start][None]

        return draw_chain(rows, text, min(count, len(logits)), warper, source)


# Another vocabulary


class SharedTokens(ModelDraft):
    """A draft with a vocabulary of its own, of which it draws only tokens that the target has too.

    Timor et al. 2025, 2502.05202, token-level intersection.  Its law is that of the shared tokens,
    divided by its sum, in the target's numbers: so it is exact under every rule, and a token that
    the draft lacks is only ever a correction or a bonus.

    Args:
        model: as for ``ModelDraft``, with V′ tokens.
        numbers: for each of them the target's number, or −1 where it has no such token.
        size: V, the target's vocabulary.
        encode: from a text in the target's numbers to one in the draft's, at least one token; for
            instance its characters, tokenised anew.

    Raises:
        ValueError: a number is not in 0 … V − 1, or given twice; no token is shared.
    """

    def __init__(
        self,
        model: Any,
        numbers: Sequence[int],
        size: int,
        encode: Callable[[Sequence[int]], Sequence[int]],
    ) -> None:
        super().__init__(model)
        self.encode, self.size = encode, size
        self.kept = [own for own, number in enumerate(numbers) if number != -1]
        self.numbers = [numbers[own] for own in self.kept]
        wrong = [number for number in self.numbers if not 0 <= number < size]
        if wrong or not self.kept or len({*self.numbers}) < len(self.numbers):
            raise ValueError(
                f"numbers has the target's number, 0 … {size - 1} and each once, of the shared "
                f"tokens (−1 for others), and at least one, got {[*numbers]}"
            )

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft; the re-encoded text has to fit into the draft's positions."""
        return draw_chain(self._row, text, count, warper, source)

    def rows(self, tokens: Sequence[int], count: int) -> Array:
        """As ``ModelDraft.rows``, in the target's numbers; −∞ for a token that is not shared."""
        text = list(tokens)
        _check_rows(text, count)
        xp = backend.get("numpy").xp
        found = xp.full((count, self.size), -xp.inf)
        for j in range(count):
            own = self.encode(text[: len(text) - count + 1 + j])
            found[j, self.numbers] = self.model.logits(own, 1)[0, self.kept]
        return found
