"""Modules that hold other modules: in a row, in a list, by name.

Members are attributes like any other ("0", "1", … in a list), which is where the names in a state
dict come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .module import Module


def _adopt(owner: Module, name: str, module: Module) -> None:
    kind = type(owner).__name__
    if not isinstance(module, Module):
        raise TypeError(f"{kind} holds Modules, got {type(module).__name__}")
    if "." in name or not isinstance(getattr(owner, name, module), Module):
        raise ValueError(f"a member of a {kind} cannot be called {name!r}: choose another name")
    setattr(owner, name, module)


class ModuleList(Module):
    """A list of modules whose parameters are found; it has no forward of its own.

    Args:
        modules: the members; one that is listed twice is shared.

    Raises:
        TypeError: a member is not a Module.
        IndexError: there is no such member.
    """

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        self.extend(modules)

    def append(self, module: Module) -> ModuleList:
        """Add one member at the end."""
        return self.extend([module])

    def extend(self, modules: Iterable[Module]) -> ModuleList:
        """Add members at the end."""
        for module in modules:
            _adopt(self, str(len(self)), module)
        return self

    def _members(self) -> list[Module]:
        return [module for _, module in self._own(Module)]

    def __len__(self) -> int:
        return len(self._members())

    def __iter__(self) -> Iterator[Module]:
        return iter(self._members())

    def __getitem__(self, index: int | slice) -> Any:
        members = self._members()[index]
        return members if isinstance(members, Module) else type(self)._of(members)

    def __setitem__(self, index: int, module: Module) -> None:
        names = [name for name, _ in self._own(Module)]
        _adopt(self, names[index], module)

    @classmethod
    def _of(cls, members: list[Module]) -> ModuleList:
        return ModuleList(members)


class Sequential(ModuleList):
    """Modules applied one after the other, each to the output of the one before.

    Args:
        modules: the members in order, or one dict of names and members.
    """

    def __init__(self, *modules: Any) -> None:
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            for name, module in modules[0].items():
                _adopt(self, name, module)
        else:
            self.extend(modules)

    def forward(self, input: Any) -> Any:
        """The output of the last member; the input itself if there is none."""
        for module in self:
            input = module(input)
        return input

    @classmethod
    def _of(cls, members: list[Module]) -> Sequential:
        return Sequential(*members)


class ModuleDict(Module):
    """Modules by name, in the order in which they were added; it has no forward of its own.

    Args:
        modules: names and members.

    Raises:
        TypeError: a member is not a Module.
        ValueError: a name contains a dot or is one that every Module has, such as ``forward``.
        KeyError: there is no member of that name.
    """

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        for name, module in (modules or {}).items():
            self[name] = module

    def __setitem__(self, name: str, module: Module) -> None:
        _adopt(self, name, module)

    def __getitem__(self, name: str) -> Module:
        return dict(self._own(Module))[name]

    def __contains__(self, name: str) -> bool:
        return name in self.keys()

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The names."""
        return [name for name, _ in self._own(Module)]

    def values(self) -> list[Module]:
        """The members."""
        return [module for _, module in self._own(Module)]

    def items(self) -> list[tuple[str, Module]]:
        """The names and the members."""
        return self._own(Module)
