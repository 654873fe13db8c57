"""A strict stand-in for a GPU: CuPy's names and refusals on NumPy, for machines without one.

``register()`` makes it known to ``mini_nn`` as the backend ``strict``; ``pytest --backend strict``
runs the whole suite on it.  What it cannot show: a GPU's rounding, races and the order of atomic
additions, streams, memory running out, speed, and whatever CuPy accepts by name and then refuses.
"""

from __future__ import annotations

from mini_nn import backend

from .counters import DeviceSynchronized, counts, no_sync, reset

__all__ = ["DeviceSynchronized", "counts", "no_sync", "register", "reset"]


def register() -> None:
    """Make the stand-in known as the backend ``strict``."""
    backend.register("strict", _load)


def _load() -> backend.Backend:
    from .array import ndarray
    from .functions import asnumpy, scatter_add
    from .strict import special, xp

    return backend.Backend("strict", xp, special, ndarray, asnumpy, scatter_add)
