"""mini_nn: a small autograd engine over NumPy and CuPy, and the mechanisms of twelve articles.

A first look::

    >>> import mini_nn
    >>> x = mini_nn.tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    array([2., 4., 6.], dtype=float32)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import ops
from .backend import tune_allocator, use, using
from .engine import Tensor, grad, primitive
from .rng import Rng, default_rng, manual_seed
from .shapes import shapes
from .tape import no_grad
from .transforms import checkpoint, hvp, jvp, vjp

if TYPE_CHECKING:
    from . import check as check
    from . import io as io
    from . import nn as nn
    from . import optim as optim

__version__ = "0.1.0"

__all__ = [
    "Rng", "Tensor", "check", "checkpoint", "default_rng", "from_dlpack", "grad", "hvp", "io",
    "jvp", "manual_seed", "nn", "no_grad", "ops", "optim", "primitive", "shapes", "tensor",
    "tune_allocator", "use", "using", "vjp",
]  # fmt: skip


def tensor(data: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
    """A Tensor with a copy of ``data``, as torch.tensor; see ``Tensor`` for the types.

    ``Tensor(array)`` shares the array instead of copying it.
    """
    made = Tensor(data, dtype)
    return Tensor(made.data.copy(), requires_grad=requires_grad)


def from_dlpack(x: Any) -> Tensor:
    """A Tensor that shares the memory of a torch, CuPy, JAX or NumPy array: nothing is copied.

    Raises:
        TypeError: ``x`` does not speak the DLPack protocol.
    """
    from .backend import from_dlpack as share

    return Tensor(share(x))


def __getattr__(name: str) -> Any:
    """Submodules that not every program needs are imported at first use."""
    if name in ("check", "io", "nn", "optim"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
