"""Modules: parameters with a forward pass, found by looking at attributes.

A Module is an ordinary object.  Its parameters are its attributes that are ``Parameter``s, its
children those that are Modules, both in the order in which they were defined; nothing is
intercepted when an attribute is set and nothing runs around ``forward``.  Names, order and state
dicts are torch.nn.Module's: a module's own parameters come before its children's, and one that is
reached by two names (tied weights) is trained once and saved under both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self, TypeVar

from .. import backend
from ..backend import Array
from ..engine import Tensor, data_of

T = TypeVar("T")


class Parameter(Tensor):
    """A Tensor that a Module trains: a leaf that requires a gradient unless told otherwise.

    Args:
        data: as for ``Tensor``; an array is shared, not copied.
        requires_grad: False makes a frozen parameter, which is saved but not trained.

    Raises:
        TypeError: the data are not floating point and ``requires_grad`` is True.
    """

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad=requires_grad)


class Mismatch(NamedTuple):
    """The keys that ``load_state_dict`` did not load; three empty lists mean that all fitted."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    misshaped_keys: list[str]


class Module:
    """The base class of layers and models: give it attributes in ``__init__`` and a ``forward``.

    A call of the module is a call of ``forward``.  ``Module.__init__`` does nothing and may be left
    out.  Arrays that belong to the state but are not trained (running statistics) are buffers, see
    ``register_buffer``; modules in a plain list or dict are not found: use ``ModuleList`` or
    ``ModuleDict``.
    """

    training: bool = True
    """Whether layers such as Dropout and BatchNorm behave as in training; see ``train``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What a call computes; every subclass that is called defines it."""
        raise NotImplementedError(f"{type(self).__name__} has no forward: define one in the class")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def register_buffer(self, name: str, array: Array | None, persistent: bool = True) -> None:
        """Make ``array`` the attribute ``name`` and a part of the state that is not trained.

        Args:
            name: an identifier.
            array: a plain array (None keeps the name free); setting the attribute replaces it.
            persistent: whether it belongs to the state dict.

        Raises:
            ValueError: the name is taken by something else, or contains a dot.
        """
        buffers: dict[str, bool] = vars(self).setdefault("_buffers", {})
        if "." in name or (hasattr(self, name) and name not in buffers):
            raise ValueError(
                f"a buffer of {type(self).__name__} cannot be called {name!r}: choose another"
            )
        buffers[name] = persistent
        setattr(self, name, data_of(array))

    # what is inside

    def _own(self, kind: type[T]) -> list[tuple[str, T]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, kind)]

    def _own_buffers(self, persistent_only: bool = False) -> list[tuple[str, Array]]:
        buffers: dict[str, bool] = vars(self).get("_buffers", {})
        names = [name for name, persistent in buffers.items() if persistent or not persistent_only]
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules that are attributes of this one, each once."""
        return _once(iter(self._own(Module)))

    def children(self) -> Iterator[Module]:
        """As ``named_children``, without the names."""
        return (child for _, child in self.named_children())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module (named ``prefix``) and all that are inside, each once, parents first."""
        return _once(self._walk(prefix))

    def modules(self) -> Iterator[Module]:
        """As ``named_modules``, without the names."""
        return (module for _, module in self.named_modules())

    def _walk(self, prefix: str) -> Iterator[tuple[str, Module]]:
        yield prefix, self
        for name, child in self._own(Module):
            yield from child._walk(_join(prefix, name))

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every parameter once, under the first name that leads to it."""
        return _once(
            (_join(path, name), parameter)
            for path, module in self._walk(prefix)
            for name, parameter in module._own(Parameter)
        )

    def parameters(self) -> Iterator[Parameter]:
        """As ``named_parameters``, without the names: what an optimiser takes."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Array]]:
        """Every buffer that is not None, persistent or not, once."""
        return _once(
            (_join(path, name), array)
            for path, module in self._walk(prefix)
            for name, array in module._own_buffers()
        )

    def buffers(self) -> Iterator[Array]:
        """As ``named_buffers``, without the names."""
        return (array for _, array in self.named_buffers())

    def num_parameters(self, trainable_only: bool = False) -> int:
        """The number of numbers in the parameters, tied ones counted once."""
        return sum(p.size for p in self.parameters() if p.requires_grad or not trainable_only)

    # state

    def state_dict(self, prefix: str = "") -> dict[str, Array]:
        """The arrays of all parameters and persistent buffers by name, tied ones under each name.

        The arrays are the module's own, on its backend, and change as it trains: copy them for a
        snapshot.  ``io.save_file`` takes the dict as it is.
        """
        state: dict[str, Array] = {}
        for path, module in self._walk(prefix):
            state |= {_join(path, name): p.data for name, p in module._own(Parameter)}
            state |= {_join(path, name): a for name, a in module._own_buffers(persistent_only=True)}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Mismatch:
        """Copy arrays into the parameters and buffers of these names.

        The copy is made in place, so an optimiser and tied names keep pointing at what they did.
        Numbers are converted to the dtype and moved to the backend of what they are copied into.
        Nothing is copied if an error is raised.

        Args:
            state_dict: arrays or Tensors of any backend by name.
            strict: raise unless the names and shapes are exactly the module's; otherwise load what
                fits and leave the rest alone.

        Returns:
            The keys that were not loaded: missing, unexpected and mis-shaped.

        Raises:
            ValueError: under ``strict``; names every missing, unexpected and mis-shaped key.
            TypeError: fractions for a buffer of integers, whatever ``strict`` is.
        """
        own = self.state_dict()
        given = {name: backend.as_array(data_of(value)) for name, value in state_dict.items()}
        missing = [name for name in own if name not in given]
        unexpected = [name for name in given if name not in own]
        common = [name for name in own if name in given]
        misshaped = [name for name in common if given[name].shape != own[name].shape]
        if strict and (missing or unexpected or misshaped):
            shapes = [f"{n} (has {given[n].shape}, needs {own[n].shape})" for n in misshaped]
            raise ValueError(
                f"this state dict does not fit {type(self).__name__}: missing: {_listed(missing)}; "
                f"unexpected: {_listed(unexpected)}; mis-shaped: {_listed(shapes)}. "
                "Pass strict=False to load what fits"
            )
        loaded = [name for name in common if given[name].shape == own[name].shape]
        rounded = [n for n in loaded if given[n].dtype.kind == "f" and own[n].dtype.kind in "iub"]
        if rounded:
            raise TypeError(f"fractions cannot be loaded into integers: {_listed(rounded)}")
        for name in loaded:
            own[name][...] = _moved(given[name], backend.backend_of(own[name]))
        return Mismatch(missing, unexpected, misshaped)

    # changes of state; all return the module

    def train(self, mode: bool = True) -> Self:
        """Let this module and all inside behave as in training (or, ``False``, in evaluation)."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """``train(False)``: no dropout, running statistics instead of the batch's."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let all parameters require a gradient, or none; they drop the one they have."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def freeze(self) -> Self:
        """Train none of the parameters: no gradient is computed for them."""
        return self.requires_grad_(False)

    def unfreeze(self) -> Self:
        """Train all parameters again."""
        return self.requires_grad_(True)

    def zero_grad(self) -> None:
        """Forget the gradients: each becomes None."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.grad = None

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call ``fn`` on every module inside, children first, and on this one last."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def to(self, name: str) -> Self:
        """Move parameters, their gradients and buffers to the backend of that name.

        The parameters stay the same objects, but their arrays are new ones: make an optimiser that
        holds views of them afterwards.
        """
        target = backend.get(name)
        for parameter in self.parameters():
            g = parameter.grad
            parameter.data = _moved(parameter.data, target)
            if g is not None:
                parameter.grad = _moved(g, target)
        for module in self.modules():
            for name, array in module._own_buffers():
                setattr(module, name, _moved(array, target))
        return self

    def astype(self, dtype: Any) -> Self:
        """Convert floating-point parameters and buffers; gradients are dropped, integers stay."""
        for parameter in self.parameters():
            if parameter.data.dtype.kind == "f":
                trained = parameter.requires_grad
                parameter.requires_grad = False  # a leaf of another dtype is another leaf
                parameter.data = parameter.data.astype(dtype)
                parameter.requires_grad = trained
        for module in self.modules():
            for name, array in module._own_buffers():
                if array.dtype.kind == "f":
                    setattr(module, name, array.astype(dtype))
        return self

    # how it prints

    def extra_repr(self) -> str:
        """What stands in the brackets of ``repr``: the public numbers, strings and flags."""
        plain = (bool, int, float, str, tuple, type(None))
        return ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if isinstance(value, plain) and not name.startswith("_") and name != "training"
        )

    def __repr__(self) -> str:
        lines = [f"({name}): {child!r}".replace("\n", "\n  ") for name, child in self._own(Module)]
        extra = self.extra_repr()
        if not lines:
            return f"{type(self).__name__}({extra})"
        return "\n  ".join([f"{type(self).__name__}(", *([extra] if extra else []), *lines]) + "\n)"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _once(pairs: Iterator[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """The pairs whose second member has not been seen before; by identity, as == is elementwise."""
    seen: set[int] = set()
    for name, value in pairs:
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _moved(array: Array, target: backend.Backend) -> Array:
    if isinstance(array, target.array_type):
        return array
    return target.xp.asarray(backend.to_host(array))
