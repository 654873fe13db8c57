"""What every verifier is made of: where its choices come from, the residual, the verdict.

A verifier of drafted tokens is a probability rule, and its law is to be proven, not sampled.  So
it asks for its choices through two questions only, ``categorical`` and ``bernoulli``, which
``RngSource`` answers at random; a test answers them in every possible way and adds the
probabilities up.

=======================================  ==========================================  ==============
accept with probability min(1, p/q)      Leviathan, Kalman & Matias 2022, *Fast      ``accept``
                                         Inference from Transformers via
                                         Speculative Decoding*, 2211.17192, 2.3
norm((p − q)₊), drawn after a rejection  there, 2.3; C. Chen et al. 2023,            ``residual``
                                         *Accelerating Large Language Model
                                         Decoding with Speculative Sampling*,
                                         2302.01318, theorem 1
=======================================  ==========================================  ==============

Everything here works on host arrays and in float64: the rows of one target call come to the host
once, and whatever follows are a few numbers of each row.

Deviations: where rounding leaves nothing of p − q though p ≠ q (which happens when they differ by
units in the last place) the residual is p; the papers' expression is 0/0 there.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .. import backend
from ..backend import Array
from ..ops.elementwise import of
from ..rng import Rng

__all__ = ["RngSource", "Source", "Verdict", "accept", "laws", "one_hot", "ratio", "residual"]

SLACK = 1e-3
"""By how much the sum of a law may differ from 1: what float16 probabilities need."""


class Source(Protocol):
    """Where the choices of a verifier come from."""

    def categorical(self, p: Array) -> int:
        """An index drawn from p (V,), host probabilities; never one with p = 0."""

    def bernoulli(self, a: float) -> bool:
        """True with probability a; asked only for 0 < a < 1."""


class RngSource:
    """Choices at random: one uniform number of ``rng`` for each.

    Args:
        rng: drawn from, hence advanced.
    """

    def __init__(self, rng: Rng) -> None:
        self.rng = rng

    def categorical(self, p: Array) -> int:
        """The first index whose cumulated probability is above u Σp, u uniform in [0, 1).

        "Above" is strict, so that u = 0 does not pick a leading token of probability 0.

        Args:
            p: (V,) host numbers ≥ 0 with a positive sum, which need not be 1.

        Raises:
            ValueError: p has no positive, finite sum.
        """
        total = p.cumsum(dtype="float64")
        whole = float(total[-1]) if len(total) else 0.0
        if not 0.0 < whole < float("inf"):
            raise ValueError(
                f"a token is drawn from probabilities with a positive sum, got {p.shape} that sum "
                f"to {whole}: look for a row that is all zero or has nan"
            )
        target = float(self.rng.host.random()) * whole
        if target >= whole:  # rounded up, as for subnormal sums: the last index that counts
            return int(total.searchsorted(whole))
        return int(total.searchsorted(target, side="right"))

    def bernoulli(self, a: float) -> bool:
        """u < a, u uniform in [0, 1): strictly, so that a = 0 is never accepted."""
        return float(self.rng.host.random()) < a


class Verdict(NamedTuple):
    """What a verifier decided about one block of drafts.

    The round emits the accepted drafts and then ``token``: accepted + 1 tokens.
    """

    accepted: int
    """How many drafts stand, from the first on."""
    token: int
    """What follows them: the correction of the first rejected draft, or the bonus."""
    path: tuple[int, ...] = ()
    """Of a tree: the numbers of the accepted nodes, in order; a chain leaves it empty."""


def laws(name: str, p: Array) -> Array:
    """Rows of probabilities as float64, each divided by its sum.

    Args:
        name: what messages call them.
        p: (n, V), a host array; see ``backend.to_host``.

    Raises:
        TypeError: p is no array of the host.
        ValueError: p has another number of axes, or a row is no law: a number below 0 or nan, a
            sum that differs from 1 by more than 10⁻³.
    """
    if not hasattr(p, "ndim") or backend.backend_of(p).name != "numpy":
        raise TypeError(
            f"{name} is a host array, got {type(p).__name__}: bring all rows of a call to the host "
            "at once, by backend.to_host"
        )
    if p.ndim != 2:
        raise ValueError(f"{name} has a row of probabilities per token (n, V), got shape {p.shape}")
    sums = p.sum(axis=1, keepdims=True, dtype="float64")
    least = float(p.min()) if p.size else 0.0
    if not (least >= 0.0 and (abs(sums - 1.0) <= SLACK).all()):
        raise ValueError(
            f"each row of {name} is a law: numbers ≥ 0 that sum to 1; got sums "
            f"{sums[:, 0].tolist()} and the smallest number {least}: pass probabilities, not "
            "logits, and look for nan"
        )
    return p / sums


def accept(p: float, q: float, source: Source) -> bool:
    """True with probability min(1, p/q); the source is asked only if that is between 0 and 1.

    Args:
        p: what the token should have.
        q: what it was drafted with.
        source: the choices.

    Raises:
        ValueError: q is not positive, so the token cannot have been drafted.
    """
    a = ratio(p, q)
    return a >= 1.0 or (a > 0.0 and source.bernoulli(a))


def ratio(p: float, q: float) -> float:
    """p/q, where q is the probability with which a token was drafted.

    Raises:
        ValueError: q is not positive, so the token cannot have been drafted.
    """
    if not q > 0.0:
        raise ValueError(
            f"a drafted token has probability {q} in its own law: pass as q the very law that the "
            "token was drawn from (after temperature and filters; one_hot for an argmax)"
        )
    return p / q


def residual(p: Array, q: Array) -> Array:
    """norm((p − q)₊): what a rejected draft's position is drawn from.

    min(p, q) is what acceptance gives to each token, so this is, up to its factor, what it leaves.

    Args:
        p: (V,) what is to be reached; a host array.
        q: (V,) what was drafted from.

    Returns:
        (V,) that sums to 1.  Where p − q has no positive number it is p: a rejection is then only
        rounding, for p and q are equal up to it.
    """
    left = of(p).maximum(p - q, 0.0)
    total = float(left.sum())
    return left / total if total > 0.0 else p / p.sum()


def one_hot(token: int, size: int) -> Array:
    """The law of a draft that was not drawn but chosen: (size,), float64, 1 at ``token``.

    Raises:
        ValueError: the token is not in 0 … size − 1.
    """
    if not 0 <= token < size:
        raise ValueError(f"a vocabulary of {size} has the tokens 0 … {size - 1}, got {token}")
    law = backend.get("numpy").xp.zeros(size)
    law[token] = 1.0
    return law
