"""What a source file takes from an array namespace, read off its syntax tree.

A namespace is what ``of(x)`` or ``of_any(…)`` returns, an attribute ``.xp``, the name ``xp``, or
a name that was bound to one of these; ``special(x)`` and ``.special`` likewise.  ``problems``
compares with CuPy's surface: a mistake is found without running the line and without CuPy.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

UFUNC_KEYWORDS = {"out", "dtype", "casting"}
UFUNC_METHODS = {
    "at": {"add", "bitwise_and", "bitwise_or", "bitwise_xor", "maximum", "minimum", "subtract"},
    "reduce": {"add", "multiply"},
    "accumulate": {"add", "multiply"},
    "reduceat": {"add"},
}
HOST_ONLY_KEYWORDS = {
    name: set(keywords.split())
    for names, keywords in {
        "sum prod max min": "where initial",
        "mean var std any all": "where",
        "sort argsort": "stable order",
        "take": "mode",
    }.items()
    for name in names.split()
}
"""Keywords that NumPy's methods take and CuPy's do not."""

HOST_ONLY_MEMBERS = {"ctypes", "setflags", "writeable", "newbyteorder", "__array_interface__"}


class Use(NamedTuple):
    """A dotted name of a namespace, and the keywords it is called with."""

    line: int
    kind: str  # "cupy" or "special"
    name: str
    keywords: tuple[str, ...]


class Reader(ast.NodeVisitor):
    """Collects the uses, and the mistakes that need no surface to be seen."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.mistakes: list[tuple[int, str]] = []
        self.members: list[tuple[int, str]] = []  # which host arrays do have
        self.bound: dict[str, str] = {"xp": "cupy"}
        self.called: dict[ast.expr, ast.Call] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside = dict(self.bound)
        self.generic_visit(node)
        self.bound = outside

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                kind = self.namespace(value)
                if kind and isinstance(name, ast.Name):
                    self.bound[name.id] = kind
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.op, ast.MatMult):
            self.mistakes.append((node.lineno, "a @= b binds a to a new array on CuPy"))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.called[node.func] = node
        function = node.func
        if isinstance(function, ast.Name) and function.id == "getattr" and len(node.args) > 1:
            self._getattr(node)
        if isinstance(function, ast.Attribute):
            given = {keyword.arg for keyword in node.keywords}
            for keyword in sorted(HOST_ONLY_KEYWORDS.get(function.attr, set()) & given):
                self.mistakes.append(
                    (node.lineno, f".{function.attr}({keyword}=) is NumPy's alone")
                )
        self.generic_visit(node)

    def _getattr(self, node: ast.Call) -> None:
        kind, name = self.namespace(node.args[0]), node.args[1]
        if kind and isinstance(name, ast.Constant):
            self.uses.append(Use(node.lineno, kind, str(name.value), ()))
        elif kind:
            self.mistakes.append((node.lineno, "getattr with a computed name cannot be checked"))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path: list[str] = []
        base: ast.expr = node
        kind = None
        while isinstance(base, ast.Attribute) and not kind:
            path.insert(0, base.attr)
            base = base.value
            kind = self.namespace(base)
        if kind:
            call = self.called.get(node)
            keywords = tuple(k.arg for k in call.keywords if k.arg) if call else ()
            self.uses.append(Use(node.lineno, kind, ".".join(path), keywords))
            self.visit(base)
            return
        if node.attr in HOST_ONLY_MEMBERS:
            self.members.append((node.lineno, f".{node.attr} is NumPy's alone"))
        self.generic_visit(node)

    def namespace(self, node: ast.expr) -> str | None:
        """Which surface an expression belongs to, if it is a namespace."""
        if isinstance(node, ast.Name):
            return self.bound.get(node.id)
        if isinstance(node, ast.Attribute):
            return {"xp": "cupy", "special": "special"}.get(node.attr)
        if isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "id", getattr(function, "attr", None))
            return {"of": "cupy", "of_any": "cupy", "special": "special"}.get(str(name))
        return None


def read(source: str) -> Reader:
    """The uses and mistakes of a source text."""
    reader = Reader()
    reader.visit(ast.parse(source))
    return reader


def problems(source: str, surface: dict[str, Any], host: bool = True) -> Iterator[str]:
    """``line: what is wrong`` for everything in a source text that CuPy would not do.

    ``host`` says whether the file may import NumPy by name and work on host arrays.
    """
    reader = read(source)
    for line, mistake in reader.mistakes + (reader.members if not host else []):
        yield f"{line}: {mistake}"
    for use in reader.uses:
        wrong = _refused(use, surface)
        if wrong:
            yield f"{use.line}: {wrong}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not host:
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            if any(module.split(".")[0] in ("numpy", "scipy") for module in modules):
                yield f"{node.lineno}: arrays decide the namespace: NumPy is not imported by name"


def _refused(use: Use, surface: dict[str, Any]) -> str | None:
    section, path = use.kind, use.name.split(".")
    if path[:2] == ["lib", "stride_tricks"]:
        section, path = "stride_tricks", path[2:]
    elif section == "cupy" and path[0] in ("linalg", "fft", "random"):
        section, path = path[0], path[1:]
    if not path:
        return None
    name, keywords = path[0], {*use.keywords}
    if name in surface[f"{section}.ufuncs"] or name == "matmul":
        method = path[1] if len(path) > 1 else None
        if method in UFUNC_METHODS and name not in UFUNC_METHODS[method]:
            return f"CuPy has no {name}.{method}"
        extra = keywords - UFUNC_KEYWORDS if method is None else set()
    elif name in surface[f"{section}.functions"]:
        signature = surface[f"{section}.functions"][name].split(", ")
        known = {part.strip("*=") for part in signature}
        extra = set() if "..." in known else keywords - known
    elif name in surface[f"{section}.names"]:
        return None
    else:
        return f"{section} of CuPy has no {name!r}"
    return f"{section}'s {name} of CuPy takes no {sorted(extra)}" if extra else None


def sources(root: Path, package: str) -> list[Path]:
    """The Python files of a package of the repository."""
    return sorted((root / package).rglob("*.py"))
