"""Write ``surface.json``: the public names of the installed CuPy and the arguments each takes.

``python -m tests.device.make_surface`` needs the ``cupy`` package but neither a GPU nor a driver:
it only looks.  A signature is written as its argument names in order; ``name=`` has a default,
``*name`` takes any number, and ``...`` stands for a callable whose arguments could not be found.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

SURFACE = Path(__file__).with_name("surface.json")

KEYWORDS_OF_STARRED = {
    "einsum": ["dtype", "optimize"],
    "meshgrid": ["indexing", "sparse", "copy"],
    "pad": ["stat_length", "constant_values", "end_values", "reflect_type"],
    "reshape": ["order", "copy"],
}
"""Keywords that CuPy takes by ``**kwargs``, read off its source."""

MODULES = {
    "linalg": "cupy.linalg",
    "fft": "cupy.fft",
    "random": "cupy.random",
    "stride_tricks": "cupy.lib.stride_tricks",
    "special": "cupyx.scipy.special",
}


def load() -> dict[str, Any]:
    """The surface as committed."""
    return json.loads(SURFACE.read_text())  # type: ignore[no-any-return]


def installed() -> dict[str, Any]:
    """The surface of the CuPy that is installed; ImportError if there is none."""
    import cupy

    surface: dict[str, Any] = {"version": cupy.__version__}
    for section, module in {"cupy": "cupy", **MODULES}.items():
        surface |= _section(section, _imported(module), cupy)
    surface["scatter"] = [
        name for name in surface["cupy.ufuncs"] if getattr(cupy, name)._scatter_op is not None
    ]
    surface["methods"], surface["attributes"] = {}, []
    for name in _public(cupy.ndarray):
        member = getattr(cupy.ndarray, name)
        if callable(member):
            surface["methods"][name] = signature(name, member, method=True)
        else:
            surface["attributes"].append(name)
    surface["operators"] = sorted(
        name for name in dir(cupy.ndarray) if name.startswith("__") and name not in dir(object)
    )
    return surface


def _section(section: str, module: Any, cupy: Any) -> dict[str, Any]:
    """The ufuncs, the functions and the other names (constants, dtypes, submodules) of a module."""
    ufuncs, functions, names = [], {}, []
    for name in _public(module):
        member = getattr(module, name)
        if isinstance(member, cupy.ufunc):
            ufuncs.append(name)
        elif callable(member) and not inspect.isclass(member):
            functions[name] = signature(name, member)
        elif name != "annotations":
            names.append(name)
    found = {"ufuncs": ufuncs, "functions": functions, "names": names}
    return {f"{section}.{kind}": value for kind, value in found.items()}


def _imported(module: str) -> Any:
    from importlib import import_module

    return import_module(module)


def _public(module: Any) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_")]


def signature(name: str, function: Any, method: bool = False) -> str:
    """The arguments of a Python function, or of a Cython one by the first line of its docstring."""
    try:
        found = [
            (p.name, p.kind, p.default is not p.empty)
            for p in inspect.signature(function).parameters.values()
        ]
        arguments = [_argument(*one) for one in found]
    except (TypeError, ValueError):
        first_line = (getattr(function, "__doc__", None) or "").split("\n")[0]
        embedded = re.match(r"[\w.]+\((.*?)\)\s*(->|$)", first_line)
        if embedded is None:
            return "..."
        arguments = [_declared(part) for part in embedded[1].split(",")]
    arguments = [a for a in arguments if a not in ("", "/", "*") and not (method and a == "self")]
    if "**kwargs" in arguments or "**kwds" in arguments or "..." in arguments:
        if name not in KEYWORDS_OF_STARRED:
            return "..."
        arguments = [a for a in arguments if not a.startswith("**")]
    if name == "pad" or any(a.startswith("*") for a in arguments):
        for keyword in KEYWORDS_OF_STARRED.get(name, []):
            if f"{keyword}=" not in arguments:
                arguments.append(f"{keyword}=")
    return ", ".join(arguments)


def _argument(name: str, kind: Any, has_default: bool) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return stars.get(kind, "") + name + ("=" if has_default else "")


def _declared(part: str) -> str:
    """``Py_ssize_t axis=0`` and ``axis: int = 0`` as ``axis=``."""
    left, default, _ = part.partition("=")
    name = left.split(":")[0].split()
    return name[-1] + ("=" if default else "") if name else ""


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(installed(), indent=1, sort_keys=True) + "\n")
