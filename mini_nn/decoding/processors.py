"""From logits to the law that is drawn from: temperature, filters, penalties, the same for all.

===============================================  =============================  ==================
keep the k largest                               Fan, Lewis & Dauphin 2018,     ``top_k_filter``
                                                 1805.04833, 5.2.1
the smallest set with probability ≥ p            Holtzman et al. 2019,          ``top_p_filter``
                                                 1904.09751, 3.1
probability ≥ p · the largest one                Nguyen et al. 2024,            ``min_p_filter``
                                                 2407.01082
logits of tokens of the text ÷ θ (× θ below 0)   Keskar et al. 2019, 1909.05858 ``repetition_``
                                                 (*CTRL*), 4.1                  ``penalty``
no sequence of n tokens twice                    Paulus, Xiong & Socher 2017,   ``no_repeat_ngram``
                                                 1705.04304, 2.5
===============================================  =============================  ==================

Names, order and meaning are those of Hugging Face's ``generate``: the penalty, the n-grams, the
temperature, top-k, top-p, min-p; temperature 0 is greedy decoding.

Speculation is exact for the *processed* law of the target (Leviathan et al. 2022, 2211.17192, 2.2),
whatever law the draft is drawn from, if that law is what the verifier is told.  ``Warper`` is all
of it in one call for either side; what looks at the text (penalty, n-grams) sees, in row i, the
text with the first i drafts.

Deviations: CTRL divides by θ whatever the sign, which makes a negative logit more probable; below 0
it is multiplied, as everyone does since.  Paulus et al. forbid at the level of beams.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import backend, ops
from ..backend import Array
from ..engine import data_of
from ..shapes import shapes

__all__ = [
    "Warper", "filter_logits", "min_p_filter", "no_repeat_ngram", "repetition_penalty",
    "top_k_filter", "top_p_filter",
]  # fmt: skip

FORBIDDEN = float("-inf")


# Filters: logits (…, V) to logits (…, V) in which the tokens that may not be drawn are −inf


@shapes("... v, ? -> ... v")
def top_k_filter(logits: Any, k: int) -> Any:
    """Keep the k largest logits of each row.

    Args:
        logits: (…, V), an array or a Tensor.
        k: at least 1; k ≥ V keeps all.

    Returns:
        (…, V).  Tokens that tie with the k-th are kept too: more than k survive only then.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"top_k keeps at least 1 token, got {k}: pass None to keep all")
    x = data_of(logits)
    vocabulary = x.shape[-1]
    if k >= vocabulary:
        return logits
    at = vocabulary - k
    threshold = backend.of(x).partition(x, at, axis=-1)[..., at : at + 1]
    return ops.where(x >= threshold, logits, FORBIDDEN)


@shapes("... v, ? -> ... v")
def top_p_filter(logits: Any, p: float) -> Any:
    """Keep the smallest set of most probable tokens whose probabilities sum to at least p.

    Args:
        logits: (…, V), an array or a Tensor.
        p: in [0, 1]; 0 keeps the most probable token and 1 keeps all, whatever underflows.

    Returns:
        (…, V).  Of tokens that tie at the border those with the lower numbers are kept, so that the
        set is the smallest one and the same on each call.  A sum is compared with p after rounding.

    Raises:
        ValueError: p is outside [0, 1].
    """
    _check_fraction("top_p", p)
    if p == 1:
        return logits
    x = data_of(logits)
    xp = backend.of(x)
    ascending = xp.argsort(-x, axis=-1, kind="stable")[..., ::-1]
    probabilities = ops.softmax(xp.take_along_axis(x, ascending, axis=-1))
    kept = probabilities.cumsum(axis=-1) > 1 - p  # adding up from the tail is the more accurate way
    kept[..., -1:] = True
    allowed = xp.empty(x.shape, "bool")
    xp.put_along_axis(allowed, ascending, kept, axis=-1)
    return ops.where(allowed, logits, FORBIDDEN)


@shapes("... v, ? -> ... v")
def min_p_filter(logits: Any, p: float) -> Any:
    """Keep the tokens that are at least p times as probable as the most probable one.

    Args:
        logits: (…, V), an array or a Tensor.
        p: in [0, 1]; 0 keeps all and 1 only the most probable token and those that tie with it.

    Returns:
        (…, V).  Logits are compared with max + ln p, so no probability underflows.

    Raises:
        ValueError: p is outside [0, 1].
    """
    _check_fraction("min_p", p)
    if p == 0:
        return logits
    x = data_of(logits)
    return ops.where(x >= x.max(axis=-1, keepdims=True) + math.log(p), logits, FORBIDDEN)


def filter_logits(
    logits: Any,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Any:
    """Temperature, top-k, top-p and min-p, in this order; None leaves one out.

    The result's softmax is the law that ``generate`` draws from, for any temperature above 0.

    Raises:
        ValueError: the temperature is not positive, or as the filters.
    """
    if not temperature > 0:
        raise ValueError(f"logits are divided by a temperature above 0, got {temperature}")
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None:
        logits = top_k_filter(logits, top_k)
    if top_p is not None:
        logits = top_p_filter(logits, top_p)
    return logits if min_p is None else min_p_filter(logits, min_p)


# What looks at the text


@shapes("... v, ?, ? -> ... v")
def repetition_penalty(logits: Any, prefix: Iterable[int], penalty: float) -> Any:
    """Make the tokens of the text less probable: logits above 0 are divided, others multiplied.

    Keskar et al. 2019, 1909.05858, section 4.1.  How often a token occurs does not count.  Unlike
    all else here it is not invariant to a number added to all logits.

    Args:
        logits: (…, V), an array or a Tensor; all rows follow the same text.
        prefix: the text's tokens, host integers; none leaves the logits alone.
        penalty: θ > 0; 1 is off, and below 1 repetition is favoured.

    Returns:
        (…, V).

    Raises:
        ValueError: θ is not positive, or a token is not in 0 … V − 1.
    """
    _check_penalty(penalty)
    seen = sorted({*_ids(prefix, logits.shape[-1])})
    if penalty == 1 or not seen:
        return logits
    chosen = _mask(logits, seen)
    return ops.where(chosen, ops.where(logits > 0, logits / penalty, logits * penalty), logits)


@shapes("... v, ?, ? -> ... v")
def no_repeat_ngram(logits: Any, prefix: Iterable[int], size: int) -> Any:
    """Forbid what would make the text's last ``size`` tokens a sequence that it has already.

    Paulus et al. 2017, 1705.04304, section 2.5.

    Args:
        logits: (…, V), an array or a Tensor; all rows follow the same text.
        prefix: the text's tokens, host integers.
        size: at least 1; 1 forbids every token of the text.

    Returns:
        (…, V), −inf where forbidden.  A text shorter than ``size`` tokens forbids nothing.

    Raises:
        ValueError: ``size`` is below 1, a token is not in 0 … V − 1, or all V are forbidden.
    """
    if size < 1:
        raise ValueError(f"n-grams have at least 1 token, got {size}: pass None to allow all")
    vocabulary = logits.shape[-1]
    text = _ids(prefix, vocabulary)
    last = len(text) - size + 1  # where an n-gram that ends with the next token starts
    tail = text[max(last, 0) :]
    followers = {text[i + size - 1] for i in range(last) if text[i : i + size - 1] == tail}
    if not followers:
        return logits
    if len(followers) == vocabulary:
        raise ValueError(
            f"each of the {vocabulary} tokens would repeat a sequence of {size}: nothing may "
            "follow, so end the text or take a larger size"
        )
    return ops.where(_mask(logits, sorted(followers)), FORBIDDEN, logits)


@dataclass(frozen=True)
class Warper:
    """Logits to probabilities, the same way for the target, the draft and plain decoding.

    Args:
        temperature: divides the logits; 0 puts everything on the largest one (the lowest number of
            those that tie), and needs no filter.
        top_k: see ``top_k_filter``; None is off.
        top_p: see ``top_p_filter``; None is off.
        min_p: see ``min_p_filter``; None is off.
        repetition_penalty: see the function; 1 is off.
        no_repeat_ngram_size: see ``no_repeat_ngram``; None is off.

    Raises:
        ValueError: an argument is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is at least 0 (greedy), got {self.temperature}")
        for name, least in (("top_k", 1), ("no_repeat_ngram_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is at least {least}, got {value}: pass None for none")
        _check_fraction("top_p", self.top_p or 0.0)
        _check_fraction("min_p", self.min_p or 0.0)
        _check_penalty(self.repetition_penalty)

    def __call__(self, logits: Any, prefix: Iterable[int], drafts: Iterable[int] = ()) -> Array:
        """The laws of the tokens that follow the prefix, each given the drafts before it.

        Args:
            logits: (n + 1, V), an array or a Tensor of any backend.
            prefix: the text so far, host integers.
            drafts: n tokens, host integers.  A draft model, which writes them one by one, passes
                one row and those it has written as part of the prefix; so does the node of a tree.

        Returns:
            (n + 1, V) probabilities, an array of the backend and dtype of the logits; row i is that
            of the text prefix + drafts[:i].

        Raises:
            ValueError: the rows are not one more than the drafts, or as the functions.
        """
        x, text = data_of(logits), [*prefix]
        start = len(text)
        text.extend(drafts)
        rows = len(text) - start + 1
        if x.ndim != 2 or x.shape[0] != rows:
            raise ValueError(
                f"logits have a row for each of {rows - 1} drafts and one for what follows, "
                f"({rows}, V), got {x.shape}"
            )
        if self.repetition_penalty != 1 or self.no_repeat_ngram_size is not None:
            x = ops.stack([self._after(x[i], text[: start + i]) for i in range(rows)])
        if self.temperature == 0:
            numbers = backend.of(x).arange(x.shape[1])
            return (numbers == x.argmax(axis=1)[:, None]).astype(x.dtype)
        return ops.softmax(
            filter_logits(x, self.temperature, self.top_k, self.top_p, self.min_p), axis=-1
        )

    def _after(self, x: Array, text: Sequence[int]) -> Array:
        """One row of logits, processed by what looks at the text."""
        x = repetition_penalty(x, text, self.repetition_penalty)
        size = self.no_repeat_ngram_size
        return x if size is None else no_repeat_ngram(x, text, size)


def _mask(logits: Any, tokens: list[int]) -> Array:
    """(V,) booleans, true at these tokens."""
    xp = backend.of(data_of(logits))
    mask = xp.zeros(logits.shape[-1], "bool")
    mask[xp.asarray(tokens)] = True
    return mask


def _ids(tokens: Iterable[int], vocabulary: int) -> list[int]:
    ids = [operator.index(token) for token in tokens]
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(
            f"a text has tokens from 0 to {vocabulary - 1}, got {min(ids)} … {max(ids)}: leave out "
            "padding"
        )
    return ids


def _check_penalty(penalty: float) -> None:
    if not 0 < penalty < math.inf:
        raise ValueError(f"a repetition penalty is above 0 (1 is off), got {penalty}")


def _check_fraction(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name} is between 0 and 1, got {p}")
