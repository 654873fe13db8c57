"""Divergences between a draft and its target, and what speculative decoding trains with them.

===========================================  ============================  =====================
KL(p ‖ q), KL(q ‖ p), β KL(p ‖ m) + (1 − β)  Zhou et al. 2023,             ``forward_kl``,
KL(q ‖ m) with m = β p + (1 − β) q, and      *DistillSpec*, 2310.08461,    ``reverse_kl``,
½ Σ |p − q|                                  2 and table 1                 ``jensen_shannon``,
                                                                           ``total_variation``
α = 1 − E TV(p, q)                           there, 3; Leviathan, Kalman & ``acceptance_rate``
                                             Matias 2022, 2211.17192, 3.3
contexts whose draft was rejected, with the  X. Liu et al. 2023, *Online   ``OnlineBuffer``
target's law; train after every m requests   Speculative Decoding*,
                                             2310.07177, alg. 2
D(p(· | fixed point) ‖ q(· | state)) over a  Kou et al. 2024, *CLLMs*,     ``global_``
Jacobi trajectory                            2403.00835, eq. 3             ``consistency``
the same between neighbours on it            there, eq. 4                  ``local_consistency``
L_GC + w L_AR                                there, eq. 6                  ``cllm_loss``
===========================================  ============================  =====================

p is the target's (teacher's) law, q the draft's (student's).  Every divergence takes logits of
both, student first as in torch, and is differentiable to any order in both; a teacher that is not
trained comes without a tape (``no_grad``, or plain arrays).  ln p is as good as logits, and so is
−∞ for what has p = 0, as after a filter.  DistillSpec takes the texts from the draft, whose
drawing has no gradient: that is the business of who makes the batch.

Deviations: losses are means over tokens (``reduction``), where the papers sum over a text: their
learning rates and w refer to that.  The consistency losses average over a whole trajectory, of
which the paper draws one state at random: this is its expectation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..nn import functional as F
from ..ops.elementwise import of

__all__ = [
    "OnlineBuffer", "Rejected", "acceptance_rate", "before_end", "cllm_loss", "forward_kl",
    "global_consistency", "jensen_shannon", "local_consistency", "reverse_kl", "total_variation",
]  # fmt: skip

Divergence = Callable[..., Any]
"""``divergence(input, target, mask, reduction)``: any of the four below."""


# Divergences


def forward_kl(input: Any, target: Any, mask: Any = None, reduction: str = "mean") -> Any:
    """KL(p ‖ q) = Σ p ln(p/q): the student is to cover all that the teacher says.

    Args:
        input: the student's logits (…, V).
        target: the teacher's logits, or ln p, of the same shape.
        mask: (…), true where a token counts; None for all.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"``.

    Returns:
        A 0-d array, or (…) for ``"none"``, 0 where a token does not count.  A mean of no tokens is
        nan.  ∞ where the student excludes (q = 0) what the teacher does not; p = 0 costs nothing.

    Raises:
        ValueError: the shapes differ, or ``reduction`` is unknown.
    """
    log_q, log_p = _logs(input, target, mask)
    return _reduced(_kl(log_p, log_q), mask, reduction)


def reverse_kl(input: Any, target: Any, mask: Any = None, reduction: str = "mean") -> Any:
    """KL(q ‖ p) = Σ q ln(q/p): the student is to say only what the teacher would.

    Arguments, result and errors are those of ``forward_kl``.  ∞ where the student gives anything
    to what the teacher excludes.
    """
    log_q, log_p = _logs(input, target, mask)
    return _reduced(_kl(log_q, log_p), mask, reduction)


def jensen_shannon(
    input: Any, target: Any, mask: Any = None, reduction: str = "mean", beta: float = 0.5
) -> Any:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q; always finite.

    It is at most the entropy of (β, 1 − β), ln 2 for β = ½.  Divided by β it tends to KL(p ‖ q) as
    β → 0.

    Args:
        beta: β in (0, 1).

    Raises:
        ValueError: β is not inside of (0, 1), or as ``forward_kl``.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta is between 0 and 1, which are left out, got {beta}")
    log_q, log_p = _logs(input, target, mask)
    p, q = ops.exp(log_p), ops.exp(log_q)
    m = beta * p + (1.0 - beta) * q
    log_m = ops.log(ops.where(data_of(m) > 0.0, m, 1.0))
    losses = beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)
    return _reduced(losses, mask, reduction)


def total_variation(input: Any, target: Any, mask: Any = None, reduction: str = "mean") -> Any:
    """½ Σ |p − q|, in [0, 1]: the probability that a draft of q is rejected.

    So its descent is the ascent of the acceptance itself.  Where p = q the derivative is 0.
    Arguments, result and errors are those of ``forward_kl``.
    """
    log_q, log_p = _logs(input, target, mask)
    gaps = ops.abs(ops.exp(log_p) - ops.exp(log_q))
    return _reduced(0.5 * ops.sum(gaps, axis=-1), mask, reduction)


def acceptance_rate(input: Any, target: Any, mask: Any = None) -> Any:
    """α = 1 − E TV = E Σ min(p, q): the share of drafts that stand, on these contexts; 0-d."""
    return 1.0 - total_variation(input, target, mask)


def _logs(input: Any, target: Any, mask: Any) -> tuple[Any, Any]:
    if input.ndim == 0 or input.shape != target.shape:
        raise ValueError(
            "a divergence takes logits of student and teacher, (…, V) both, got "
            f"{input.shape} and {target.shape}"
        )
    if mask is not None and data_of(mask).shape != input.shape[:-1]:
        raise ValueError(
            f"mask has a boolean for each token, {input.shape[:-1]}, got {data_of(mask).shape}"
        )
    return ops.log_softmax(input, axis=-1), ops.log_softmax(target, axis=-1)


def _kl(log_a: Any, log_b: Any) -> Any:
    """Σ a ln(a/b) over the last axis; where a = 0 a term is 0, and no −∞ is met on the way."""
    some = data_of(log_a) > -math.inf
    gap = ops.where(some, log_a, 0.0) - ops.where(some, log_b, 0.0)
    return ops.sum(ops.exp(log_a) * gap, axis=-1)


def _reduced(losses: Any, mask: Any, reduction: str) -> Any:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is 'none', 'mean' or 'sum', got {reduction!r}")
    count = losses.size
    if mask is not None:
        counts = data_of(mask) != 0
        losses = ops.where(counts, losses, 0.0)
        if reduction == "mean":  # stays on the device; no token at all gives nan
            number = counts.sum().astype(losses.dtype)
            xp = of(number)
            return ops.sum(losses) * xp.where(number > 0, 1.0 / xp.maximum(number, 1), math.nan)
    if reduction == "none":
        return losses
    total = ops.sum(losses)
    if reduction == "sum":
        return total
    return total * (1.0 / count if count else math.nan)


# Consistency


def before_end(tokens: Any, ends: Collection[int]) -> Array:
    """Where a token counts: up to and including the first of those that end a text.

    Args:
        tokens: (…, n) integers, an array.
        ends: the tokens that end a text.

    Returns:
        (…, n) booleans.
    """
    tokens = data_of(tokens)
    xp = of(tokens)
    hits = xp.zeros(tokens.shape, "int64")
    for end in ends:
        hits = hits + (tokens == end)
    return hits.cumsum(axis=-1) == hits


def global_consistency(
    states: Any,
    fixed_point: Any,
    mask: Any = None,
    divergence: Divergence = forward_kl,
    reduction: str = "mean",
) -> Any:
    """From every state of a Jacobi trajectory, guess what the fixed point makes certain.

    Kou et al. 2024, 2403.00835, eq. 3.  At the fixed point it is 0.

    Args:
        states: logits (…, J, n, V) of the model where it is given the tokens of each of J states;
            row i is what it thinks of token i.
        fixed_point: its logits (…, n, V) where it is given those of the fixed point: taken as they
            are, no gradient flows into them.
        mask: (…, n), true where a token of the fixed point counts, see ``before_end``; or None.
        divergence: with the fixed point as its teacher.
        reduction: as ``forward_kl``; the mean is over tokens and states.

    Raises:
        ValueError: the shapes do not fit.
    """
    anchor = data_of(fixed_point)
    if states.ndim < 3 or (*states.shape[:-3], *states.shape[-2:]) != anchor.shape:
        raise ValueError(
            "states are logits (…, J, n, V) and those of the fixed point (…, n, V), got "
            f"{states.shape} and {anchor.shape}"
        )
    xp = of(anchor)
    anchor = xp.broadcast_to(anchor[..., None, :, :], states.shape)
    return divergence(states, anchor, _per_state(mask, states), reduction)


def local_consistency(
    states: Any,
    mask: Any = None,
    divergence: Divergence = forward_kl,
    reduction: str = "mean",
) -> Any:
    """From every state of a Jacobi trajectory, guess what the next one is given to say.

    Kou et al. 2024, 2403.00835, eq. 4.

    Args:
        states: logits (…, J + 1, n, V) as for ``global_consistency``, in the trajectory's order and
            with the fixed point last.  Each is the teacher of the one before it, and no gradient
            flows into it as such.
        mask, divergence, reduction: as for ``global_consistency``.

    Raises:
        ValueError: there are fewer than two states, or the shapes do not fit.
    """
    if states.ndim < 3 or states.shape[-3] < 2:
        raise ValueError(
            f"states are logits (…, J + 1, n, V) of two or more of them, got {states.shape}"
        )
    students, teachers = states[..., :-1, :, :], data_of(states)[..., 1:, :, :]
    return divergence(students, teachers, _per_state(mask, students), reduction)


def cllm_loss(
    states: Any,
    fixed_point: Any,
    logits: Any,
    labels: Any,
    weight: float = 10.0,
    mask: Any = None,
) -> Any:
    """L_GC + w L_AR: quick, and still a language model.

    Kou et al. 2024, 2403.00835, eq. 6; w = 10 in the authors' code.

    Args:
        states, fixed_point, mask: as for ``global_consistency``.
        logits: (…, V) of the model on a text.
        labels: (…) integers, its next tokens; −100 where there is none.
        weight: w.
    """
    plain = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), data_of(labels).reshape(-1))
    return global_consistency(states, fixed_point, mask) + weight * plain


def _per_state(mask: Any, states: Any) -> Any:
    if mask is None:
        return None
    mask = data_of(mask)
    if mask.shape != (*states.shape[:-3], states.shape[-2]):
        raise ValueError(
            f"mask has a boolean for each token, {(*states.shape[:-3], states.shape[-2])}, got "
            f"{mask.shape}"
        )
    return of(mask).broadcast_to(mask[..., None, :], states.shape[:-1])


# Online


class Rejected(NamedTuple):
    """A place where the draft was wrong."""

    context: list[int]
    """The text up to there: verified, with the drafts that stood."""
    law: Array
    """What the target thinks of the next token, p (V,), host."""


class OnlineBuffer:
    """What a draft got wrong while it served requests, until it is trained on it.

    Liu et al. 2023, 2310.07177, algorithm 2.  Only contexts whose draft was rejected are kept.

    Args:
        every: m, after how many requests it is time to train.
        capacity: how many contexts are kept at most, the latest ones; None for all.

    Attributes:
        rejected: a deque of ``Rejected``, oldest first.
        requests: how many have ended since ``take``.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, every: int, capacity: int | None = None) -> None:
        if every < 1 or (capacity is not None and capacity < 1):
            raise ValueError(f"every and capacity are at least 1, got {every} and {capacity}")
        self.every = every
        self.rejected: deque[Rejected] = deque(maxlen=capacity)
        self.requests = 0

    def add(self, text: Sequence[int], drafts: Sequence[int], p: Array, accepted: int) -> None:
        """Look at one round.

        Args:
            text: what was verified before it.
            drafts: g tokens.
            p: (g + 1, V) the target's laws, of which at most one row is kept, as a copy.
            accepted: how many drafts stood; if all did, nothing is kept.

        Raises:
            ValueError: p has another number of rows, or ``accepted`` is not in 0 … g.
        """
        if len(p) != len(drafts) + 1 or not 0 <= accepted <= len(drafts):
            raise ValueError(
                f"{len(drafts)} drafts have {len(drafts) + 1} rows of p, and 0 … {len(drafts)} of "
                f"them stand, got {len(p)} rows and {accepted}"
            )
        if accepted < len(drafts):
            self.rejected.append(Rejected([*text, *drafts[:accepted]], p[accepted].copy()))

    def end_request(self) -> bool:
        """Count one more request; whether it is time to train."""
        self.requests += 1
        return self.requests >= self.every

    def take(self) -> list[Rejected]:
        """All that is kept, oldest first; the buffer is empty afterwards."""
        found = [*self.rejected]
        self.rejected.clear()
        self.requests = 0
        return found
