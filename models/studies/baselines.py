"""What text costs without a network, in bits per byte: counts of bytes and pairs, and compressors.

====================  ==============================================================================
``unigram_bits``      p(b) = (n_b + α / 256) / (n + α)
``bigram_bits``       p(b | a) = (n_ab + β p(b)) / (n_a + β): MacKay & Peto 1995, *A hierarchical
                      Dirichlet language model*, with the unigram above as the mean
``conditional_bits``  8 (C(train + text) - C(train)) / |text|: the part of a compressed size that is
                      new, as in the distance of Cilibrasi & Vitányi 2005, arXiv:cs/0312044
====================  ==============================================================================

α and β are chosen on the training text alone: of a grid of powers of two, those under which its
bytes are most probable when each is left out of the counts that predict it (leave-one-out, as in
Ney, Essen & Kneser 1994).  Nothing is fitted to the text that is scored.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Probabilities = NDArray[np.float64]

GRID = tuple(2.0**k for k in range(-6, 13))
"""Candidates for α and β, in pseudo-counts."""


def _bytes(text: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(text, np.uint8)


def _best(score: Callable[[float], float]) -> float:
    return max(GRID, key=score)


def _leave_one_out(
    counts: Counts, totals: NDArray[np.int64], mean: Probabilities, mass: float
) -> float:
    """Σ n log((n - 1 + m p) / (N - 1 + m)): each occurrence scored by the counts of all others."""
    n, total, p = np.broadcast_arrays(counts, totals, mean)
    seen = n > 0
    n, total, p = n[seen], total[seen], p[seen]
    return float((n * np.log((n - 1 + mass * p) / (total - 1 + mass))).sum())


def unigram(train: bytes) -> Probabilities:
    """p(b), shape (256,), of a text of at least one byte."""
    counts = np.bincount(_bytes(train), minlength=256)
    total = np.array(len(train))
    uniform = np.full(256, 1 / 256)
    alpha = _best(lambda mass: _leave_one_out(counts, total, uniform, mass))
    return (counts + alpha * uniform) / (total + alpha)


def bigram(train: bytes) -> Probabilities:
    """p(b | a) at [a, b], shape (256, 256), of a text of at least two bytes."""
    codes = _bytes(train)
    pairs = codes[:-1].astype(np.int64) * 256 + codes[1:]
    counts = np.bincount(pairs, minlength=256 * 256).reshape(256, 256)
    totals = counts.sum(1, keepdims=True)
    mean = unigram(train)
    beta = _best(lambda mass: _leave_one_out(counts, totals, mean, mass))
    return (counts + beta * mean) / (totals + beta)


def unigram_bits(train: bytes, text: bytes) -> float:
    """Bits per byte of ``text`` under the frequencies of bytes in ``train``."""
    return float(-np.log2(unigram(train)[_bytes(text)]).mean())


def bigram_bits(train: bytes, text: bytes) -> float:
    """Bits per byte of ``text``, which follows ``train``, under the frequencies of its pairs."""
    before = _bytes(train[-1:] + text[:-1])
    return float(-np.log2(bigram(train)[before, _bytes(text)]).mean())


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda text: gzip.compress(text, 9, mtime=0),
    "LZMA": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    "bzip2": lambda text: bz2.compress(text, 9),
}
"""Those of Python's standard library, at their strongest.

gzip looks back 32 KiB, LZMA and bzip2 over all of a text this size.
"""


def conditional_bits(compressor: str, train: bytes, text: bytes) -> float:
    """Bits per byte of ``text`` for a compressor that has just compressed ``train``.

    The size of both together minus that of ``train`` alone: headers cancel, and the compressor may
    copy from ``train`` as from a dictionary.
    """
    compress = COMPRESSORS[compressor]
    return 8 * (len(compress(train + text)) - len(compress(train))) / len(text)


def bits(nats: float) -> float:
    """A cross-entropy from nats to bits."""
    return nats / math.log(2)
