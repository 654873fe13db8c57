"""What a device would have done: copies, waits and kernel launches, counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

import numpy as np

_COUNTED = ("h2d", "d2h", "sync", "launch")
_count = dict.fromkeys(_COUNTED, 0)
_forbidden: ContextVar[bool] = ContextVar("mini_nn_strict_no_sync", default=False)


class DeviceSynchronized(RuntimeError):
    """The host waited for the device inside ``no_sync()``; cupyx has an error of this name too."""


def counts() -> dict[str, int]:
    """Since ``reset``: copies to the device and back, waits (a copy back is one), launches."""
    return dict(_count)


def reset() -> None:
    """Start all counts at 0."""
    _count.update(dict.fromkeys(_COUNTED, 0))


@contextmanager
def no_sync() -> Iterator[None]:
    """Inside the block, whatever makes the host wait for the device raises DeviceSynchronized."""
    token = _forbidden.set(True)
    try:
        yield
    finally:
        _forbidden.reset(token)


def to_device() -> None:
    """Count a copy from the host, for which nobody waits."""
    _count["h2d"] += 1


def waits(what: str) -> None:
    """Count a wait for the device, or refuse it inside ``no_sync()``."""
    if _forbidden.get():
        raise DeviceSynchronized(f"{what} makes the host wait for the device")
    _count["sync"] += 1


def to_host(what: str) -> None:
    """Count a copy to the host, which is a wait too."""
    waits(what)
    _count["d2h"] += 1


class _Quiet(threading.local):
    """NumPy's floating-point warnings are off in here: a device gives none.

    The state that ``np.errstate`` changes belongs to a context, and entering a prepared context
    costs a tenth of entering ``np.errstate``; a context belongs to one thread at a time.
    """

    def __init__(self) -> None:
        self.context = copy_context()
        self.context.run(np.seterr, all="ignore")


_quiet = _Quiet()


def launch(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a NumPy function as a kernel: counted, and without floating-point warnings."""
    _count["launch"] += 1
    return _quiet.context.run(function, *args, **kwargs)
