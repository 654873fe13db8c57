"""What optimisers share: groups of parameters, their state, how it is saved, and a walk in blocks.

Why blocks: an update reads and writes the same few arrays a dozen times.  Taken 2¹⁵ elements at a
time they stay in a core's cache between those passes, and two scratch arrays made once replace
every temporary.  Parameters stay arrays of their own: joining them in one flat buffer saved less
than a tenth of an update of 10 million parameters, and gathering the gradients cost more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any

from .. import backend
from ..backend import Array, of
from ..engine import Tensor, data_of

Group = dict[str, Any]

BLOCK = 1 << 15


class Blocks:
    """Walks through arrays of one shape in pieces, each with two scratch arrays of its size."""

    def __init__(self) -> None:
        self._scratch: dict[Any, list[Array]] = {}

    def __call__(self, target: Array, source: Array, *state: Array) -> Iterator[tuple[Array, ...]]:
        """Pieces of every array, to be written to except ``source``'s; the last two are scratch.

        On a device, where a call costs more than a cache miss, and where an array to be written to
        is not C-contiguous, everything is one piece.
        """
        xp, dtype, size = of(target), target.dtype, target.size
        contiguous = all(a.flags.c_contiguous for a in (target, *state))
        if not contiguous or backend.backend_of(target).name != "numpy":
            scratch = (xp.empty(target.shape, dtype), xp.empty(target.shape, dtype))
            yield target, source, *state, *scratch
            return
        if dtype not in self._scratch:
            self._scratch[dtype] = [xp.empty(BLOCK, dtype), xp.empty(BLOCK, dtype)]
        # views, except of a strided source, whose copy costs less than a dozen strided passes
        arrays = [a.reshape(-1) for a in (target, source, *state)]
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            scratch_here = [a[: stop - start] for a in self._scratch[dtype]]
            yield *(a[start:stop] for a in arrays), *scratch_here


class Optimizer:
    """The base class; an optimiser adds the check, the state and the update of one parameter.

    Args:
        params: Tensors, or dicts ``{"params": Tensors, "lr": …}`` whose other entries override
            ``defaults`` for that group.
        defaults: the hyperparameters.

    Raises:
        TypeError: something is not a Tensor, or a hyperparameter is not a number.
        ValueError: no parameters, a parameter given twice or not a leaf, an unknown hyperparameter
            or one outside its range.
    """

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        if isinstance(params, (Tensor, dict, set)):
            raise TypeError(
                f"an optimiser takes a list of Tensors or of dicts, got a {type(params).__name__}: "
                "write [x], or sort a set, whose order a saved state could not refer to"
            )
        self.defaults = defaults
        self.param_groups: list[Group] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._blocks = Blocks()
        given = [*params]
        if not given:
            raise ValueError("an optimiser needs at least one parameter, got an empty list")
        for group in given if isinstance(given[0], dict) else [{"params": given}]:
            self.add_param_group(group)

    def add_param_group(self, group: Group) -> None:
        """Train more parameters, with hyperparameters of their own; raises as the constructor."""
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f"a group is a dict with the key 'params', got {group!r:.80}")
        unknown = [name for name in group if name != "params" and name not in self.defaults]
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no hyperparameter {', '.join(unknown)}: "
                f"it has {', '.join(self.defaults)}"
            )
        params = [group["params"]] if isinstance(group["params"], Tensor) else [*group["params"]]
        seen = {id(p) for p in self._params()}
        for i, p in enumerate(params):
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"parameter {i} is a {type(p).__name__}, not a Tensor: pass model.parameters()"
                )
            if p.node is not None and p.node.primitive is not None:
                raise ValueError(
                    f"parameter {i}, of shape {p.shape}, was computed from others: only leaves are "
                    "trained; pass those, or p.detach()"
                )
            if id(p) in seen:
                raise ValueError(f"parameter {i}, of shape {p.shape}, is given twice: list it once")
            seen.add(id(p))
        made = {**self.defaults, **group, "params": params}
        self._check(made)
        self.param_groups.append(made)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; ``set_to_none=False`` fills them with zeros instead, in place."""
        for p in self._params():
            if p.grad is not None:
                if set_to_none:
                    p.grad = None
                else:
                    p.grad[...] = 0

    def step(self) -> None:
        """Update, in place, every parameter that has a gradient; the others are left alone."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state.setdefault(p, {"step": 0})
                state["step"] += 1
                for name in self._buffers(group):
                    if name not in state:
                        state[name] = of(p.data).zeros(p.shape, p.dtype)
                self._update(p.data, p.grad, state, group)

    def state_dict(self) -> dict[str, Any]:
        """The state as a flat dict: arrays by ``"i.name"`` for parameter i, the rest fit for JSON.

        The arrays are the optimiser's own, which the next step changes: copy or save them first.
        """
        params = self._params()
        state: dict[str, Any] = {
            "param_groups": self._numbered(),
            "steps": [self.state[p]["step"] if p in self.state else 0 for p in params],
        }
        for i, p in enumerate(params):
            arrays = self.state.get(p, {}).items()
            state |= {f"{i}.{name}": array for name, array in arrays if name != "step"}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the result of ``state_dict``; arrays are copied to the parameters' backend.

        Raises:
            ValueError: other groups, other hyperparameters, or arrays that are missing, unexpected
                or of another shape, all of them named; nothing is changed.
        """
        params, saved, own = self._params(), state["param_groups"], self._numbered()
        steps = [int(n) for n in state["steps"]]
        if [g["params"] for g in saved] != [g["params"] for g in own] or len(steps) != len(params):
            raise ValueError(
                f"the saved optimiser has groups of {[len(g['params']) for g in saved]} parameters "
                f"and this one of {[len(g['params']) for g in own]}: build it as it was built then"
            )
        groups: list[Group] = []
        wanted: dict[str, int] = {}
        for before, group in zip(saved, own, strict=True):
            if before.keys() != group.keys():
                raise ValueError(
                    f"the saved groups have {sorted(before)} and those of {type(self).__name__} "
                    f"have {sorted(group)}: load the state of the same kind of optimiser"
                )
            groups.append({**before, "params": [params[i] for i in before["params"]]})
            self._check(groups[-1])
            for i in before["params"]:
                wanted |= {f"{i}.{name}": i for name in self._buffers(groups[-1]) if steps[i]}
        arrays = {key: a for key, a in state.items() if key not in ("param_groups", "steps")}
        wrong = [f"{key} is missing" for key in wanted if key not in arrays]
        wrong += [f"{key} is unexpected" for key in arrays if key not in wanted]
        wrong += [
            f"{key} has shape {tuple(a.shape)} but its parameter {params[wanted[key]].shape}"
            for key, a in arrays.items()
            if key in wanted and a.shape != params[wanted[key]].shape
        ]
        if wrong:
            raise ValueError(f"the saved optimiser does not fit: {'; '.join(wrong)}")
        self.state = {p: {"step": n} for p, n in zip(params, steps, strict=True) if n}
        for key, i in wanted.items():
            self.state[params[i]][key.partition(".")[2]] = copy_like(arrays[key], params[i].data)
        for group, loaded in zip(self.param_groups, groups, strict=True):
            group.update(loaded)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _numbered(self) -> list[Group]:
        """The groups with numbers, counted through all of them, in place of the parameters."""
        place = {id(p): i for i, p in enumerate(self._params())}
        return [{**g, "params": [place[id(p)] for p in g["params"]]} for g in self.param_groups]

    def _check(self, group: Group) -> None:
        """Raise for hyperparameters outside their range; make numbers Python floats.

        A NumPy float64 among them would turn every float32 operation into a float64 one.
        """
        raise NotImplementedError

    def _buffers(self, group: Group) -> tuple[str, ...]:
        """The names of the arrays that are the state of a parameter of this group."""
        raise NotImplementedError

    def _update(self, target: Array, grad: Array, state: dict[str, Any], group: Group) -> None:
        """One step of one parameter, written into ``target`` and the arrays of ``state``."""
        raise NotImplementedError


def number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, below: bool = False
) -> float:
    """``value`` as a Python float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not in [low, high], or, with ``below``, it is ``high`` itself.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a number, got {type(value).__name__}")
    result = float(value)
    if not low <= result <= high or (below and result == high):
        raise ValueError(f"{name} is in [{low}, {high}{')' if below else ']'}, got {value}")
    return result


def copy_like(x: Any, like: Array) -> Array:
    """A C-contiguous copy of an array or Tensor, with the dtype and on the backend of ``like``."""
    home, x = backend.backend_of(like), data_of(x)
    x = x if isinstance(x, home.array_type) else backend.to_host(x)
    return home.xp.array(x, dtype=like.dtype, order="C")
