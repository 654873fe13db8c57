"""Modules: what they find, what they save and load, and how they change state."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, backend, nn
from tests import device
from tests.support import assert_close, host


class Block(nn.Module):
    """A child before the parameters, a frozen parameter, a buffer, an absent bias."""

    def __init__(self, xp: Any) -> None:
        self.inner = nn.Linear(2, 3, rng=Rng(1))
        self.scale = nn.Parameter(xp.ones(3, "float32"))
        self.bias = None
        self.fixed = nn.Parameter(xp.full((2,), 7.0, "float32"), requires_grad=False)
        self.register_buffer("count", xp.zeros((), "int64"))
        self.width = 3

    def forward(self, x: Any) -> Any:
        return self.inner(x) * self.scale


class Tied(nn.Module):
    """An output projection that is the embedding, as in GPT-2."""

    def __init__(self, xp: Any) -> None:
        self.embed = nn.Embedding(5, 4, rng=Rng(2))
        self.head = nn.Linear(4, 5, bias=False, rng=Rng(3))
        self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.embed(ids))


# What is inside


def test_names_and_order(xp: Any) -> None:
    """A module's own come before its children's; both in the order of definition, as in torch."""
    model = nn.Sequential(Block(xp), nn.ReLU(), nn.Linear(3, 1, bias=False))
    names = ["0.scale", "0.fixed", "0.inner.weight", "0.inner.bias", "2.weight"]
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_parameters("net")] == [f"net.{name}" for name in names]
    assert [name for name, _ in model.named_modules()] == ["", "0", "0.inner", "1", "2"]
    assert [name for name, _ in model.named_children()] == ["0", "1", "2"]
    assert [name for name, _ in model.named_buffers()] == ["0.count"]
    assert [*model.state_dict()] == [*names[:2], "0.count", *names[2:]]
    assert [p is q for p, (_, q) in zip(model.parameters(), model.named_parameters(), strict=True)]
    assert [*model.modules()][2] is model[0].inner
    assert [*model.children()] == [*model]
    assert model.num_parameters() == 3 + 2 + 9 + 3
    assert model.num_parameters(trainable_only=True) == 3 + 9 + 3


def test_attributes_are_only_attributes(xp: Any) -> None:
    """Replacing or deleting one is seen at once; one that is no Parameter is not trained."""
    block = Block(xp)
    block.scale = nn.Parameter(xp.zeros(3, "float32"))
    assert dict(block.named_parameters())["scale"] is block.scale
    block.scale = Tensor(xp.zeros(3, "float32"))
    del block.fixed
    assert [name for name, _ in block.named_parameters()] == ["inner.weight", "inner.bias"]


def test_tied_parameters(xp: Any) -> None:
    """Trained once, saved under both names, and still one after loading."""
    model = Tied(xp)
    assert [name for name, _ in model.named_parameters()] == ["embed.weight"]
    assert [*model.state_dict()] == ["embed.weight", "head.weight"]
    assert model.num_parameters() == 20
    model.load_state_dict({name: xp.ones((5, 4)) for name in model.state_dict()})
    assert model.head.weight is model.embed.weight
    model(xp.asarray([1, 2])).sum().backward()
    (weight,) = model.parameters()
    # Σ over rows of W Wᵀ: both uses give a gradient, Σ_c W_c to rows 1 and 2, W_1 + W_2 to all
    want = np.full((5, 4), 2.0)
    want[1:3] += 5.0
    assert_close(weight.grad, want, rtol=1e-6)


def test_shared_modules(xp: Any) -> None:
    """One that stands twice is applied twice and trained once."""
    layer = nn.Linear(2, 2, rng=Rng(0))
    model = nn.Sequential(layer, layer)
    assert len([*model.parameters()]) == 2
    assert [*model.state_dict()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = xp.ones((1, 2), "float32")
    assert_close(model(x), layer(layer(x)))
    assert [name for name, _ in model.named_modules()] == ["", "0"]


def test_buffers(xp: Any) -> None:
    module = nn.Module()
    module.register_buffer("mean", xp.zeros(2))
    module.register_buffer("cache", xp.ones(3), persistent=False)
    module.register_buffer("absent", None)
    assert [*module.state_dict()] == ["mean"]
    assert [name for name, _ in module.named_buffers()] == ["mean", "cache"]
    assert len([*module.buffers()]) == 2 and not [*module.parameters()]
    module.mean = xp.full((2,), 3.0)
    assert_close(module.state_dict()["mean"], 3.0)
    module.absent = xp.ones(1)
    assert [*module.state_dict()] == ["mean", "absent"]
    module.register_buffer("mean", Tensor(xp.ones(2)))
    assert type(module.mean) is type(xp.ones(2))
    for name in ("forward", "train", "training", "a.b"):
        with pytest.raises(ValueError, match=name):
            module.register_buffer(name, xp.zeros(1))


# State dicts


def _loads_in_place(load: Any, xp: Any) -> None:
    """The law that lets an optimiser, a tied name and a frozen flag survive a load."""
    model = Tied(xp)
    model.embed.freeze()
    (held,) = model.parameters()
    array = held.data
    load(model, {name: xp.ones((5, 4), "float32") for name in model.state_dict()})
    assert_close(held, 1.0)
    assert held.data is array
    assert [p is held for p in model.parameters()] == [True]
    assert not held.requires_grad


def test_load_is_in_place(xp: Any) -> None:
    _loads_in_place(lambda model, state: model.load_state_dict(state), xp)


def test_load_that_replaces_parameters_is_caught(xp: Any) -> None:
    def careless(model: Any, state: Any) -> None:
        model.embed.weight = nn.Parameter(state["embed.weight"])
        model.head.weight = nn.Parameter(state["head.weight"])

    with pytest.raises(AssertionError):
        _loads_in_place(careless, xp)


def test_strict_load_names_everything_at_once_and_changes_nothing(xp: Any) -> None:
    model = nn.Sequential(Block(xp), nn.Linear(3, 1, rng=Rng(4)))
    before = {name: host(array).copy() for name, array in model.state_dict().items()}
    state = {name: array + 1 for name, array in model.state_dict().items()}
    del state["0.scale"], state["1.bias"]
    state |= {"0.inner.weight": xp.zeros((2, 3)), "0.fixed": xp.zeros(()), "2.weight": xp.zeros(1)}
    with pytest.raises(ValueError) as error:
        model.load_state_dict(state)
    missing, unexpected, misshaped = str(error.value).split(";")
    assert "missing: 0.scale, 1.bias" in missing
    assert "unexpected: 2.weight" in unexpected
    assert "0.fixed (has (), needs (2,))" in misshaped
    assert "0.inner.weight (has (2, 3), needs (3, 2))" in misshaped
    assert "strict=False" in misshaped
    for name, array in model.state_dict().items():
        assert_close(array, before[name], rtol=0)

    left = model.load_state_dict(state, strict=False)
    assert left.missing_keys == ["0.scale", "1.bias"]
    assert left.unexpected_keys == ["2.weight"]
    assert left.misshaped_keys == ["0.fixed", "0.inner.weight"]
    for name, array in model.state_dict().items():
        loaded = name not in (*left.missing_keys, *left.misshaped_keys)
        assert_close(array, before[name] + loaded, rtol=0)


def test_load_converts(xp: Any) -> None:
    """To the dtype and the backend of what is loaded into; fractions never become integers."""
    block = Block(xp)
    state = {name: host(array).astype("float64") for name, array in block.state_dict().items()}
    state["count"] = np.asarray(3)
    state["scale"] = Tensor(xp.asarray([1.0, 0.1, 2.0]))
    state["fixed"] = [4.0, 5.0]
    assert block.load_state_dict(state) == ([], [], [])
    assert block.scale.dtype == "float32" and block.scale.requires_grad
    assert_close(block.scale, np.asarray([1.0, 0.1, 2.0], "float32"), rtol=0)
    assert_close(block.fixed, [4.0, 5.0])
    assert int(block.count) == 3
    kind = type(xp.zeros(1))
    assert all(type(array) is kind for array in block.state_dict().values())
    with pytest.raises(TypeError, match="count"):
        block.load_state_dict(state | {"count": np.asarray(2.5)})
    with pytest.raises(TypeError, match="from_dlpack"):
        block.load_state_dict(state | {"scale": object()})


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> Any:
    """A module with parameters, buffers, children and ties, described by nested tuples."""
    count = draw(st.integers(0, 2))
    own = [draw(st.sampled_from(["parameter", "buffer", "tie", "none"])) for _ in range(count)]
    children = draw(st.lists(trees(depth - 1), max_size=2)) if depth else []
    return own, children


def build(tree: Any, xp: Any, pool: list[Any]) -> nn.Module:
    own, children = tree
    module = nn.Module()
    for i, child in enumerate(children):
        setattr(module, f"child{i}", build(child, xp, pool))
    for i, kind in enumerate(own):
        shape = (len(pool) % 3, 2)
        if kind == "buffer":
            module.register_buffer(f"b{i}", xp.full(shape, len(pool), "float32"))
        elif kind == "tie" and pool:
            setattr(module, f"p{i}", pool[len(pool) // 2])
        elif kind != "none":
            pool.append(nn.Parameter(xp.full(shape, len(pool), "float32")))
            setattr(module, f"p{i}", pool[-1])
    return module


@given(trees())
def test_state_goes_around(xp: Any, tree: Any) -> None:
    """Loading what was saved changes nothing, into a copy it gives that state; ties count once."""
    pool: list[Any] = []
    module = build(tree, xp, pool)
    assert {id(p) for p in module.parameters()} == {id(p) for p in pool}
    assert module.num_parameters() == sum(p.size for p in pool)
    assert {name for name, _ in module.named_parameters()} <= {*module.state_dict()}
    state = {name: host(a).copy() for name, a in module.state_dict().items()}
    other = build(tree, xp, [])
    for array in other.state_dict().values():
        array[...] = -1.0
    assert other.load_state_dict(state) == ([], [], [])
    assert [*other.state_dict()] == [*state]
    for name, array in other.state_dict().items():
        assert_close(array, state[name], rtol=0)


# Changes of state


def test_train_and_eval(xp: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5)))
    assert all(module.training for module in model.modules())
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    assert model.train()[1][0].training
    assert not nn.Sequential(model).train(False)[0][1][0].training


def test_freeze(xp: Any) -> None:
    """Frozen parameters get no gradient and lose what they had; those before them still get one."""
    model = nn.Sequential(nn.Linear(2, 2, rng=Rng(0)), nn.Linear(2, 1, rng=Rng(1)))
    x = xp.ones((3, 2), "float32")
    model(x).sum().backward()
    assert model[1].freeze() is model[1]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    assert model[1].weight.grad is None
    model.zero_grad()
    assert model[0].weight.grad is None
    model(x).sum().backward()
    assert model[1].weight.grad is None
    assert_close(model[0].bias.grad, 3 * host(model[1].weight)[0])
    assert all(p.requires_grad for p in model.unfreeze().parameters())
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())
    assert not model(x).requires_grad


def test_apply_visits_children_first(xp: Any) -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh())
    assert model.apply(lambda module: seen.append(type(module).__name__)) is model
    assert seen == ["ReLU", "Sequential", "Tanh", "Sequential"]


def test_astype(xp: Any) -> None:
    model = nn.Sequential(Block(xp), nn.BatchNorm1d(3))
    model(xp.ones((2, 2), "float32")).sum().backward()
    held = [*model.parameters()]
    assert model.astype("float64") is model
    assert all(p is q for p, q in zip(held, model.parameters(), strict=True))
    assert {str(p.dtype) for p in model.parameters()} == {"float64"}
    assert model[0].count.dtype == model[1].num_batches_tracked.dtype == "int64"
    assert model[1].running_mean.dtype == "float64"
    assert model[0].scale.grad is None and not model[0].fixed.requires_grad
    y = model(xp.ones((2, 2), "float64"))
    assert y.dtype == "float64"
    y.sum().backward()
    assert model[0].scale.grad.dtype == "float64"


def test_to(xp: Any, backend_name: str) -> None:
    """There and back: the same parameters, gradients included, on another backend."""
    model = nn.Sequential(nn.Linear(2, 2, rng=Rng(0)), nn.BatchNorm1d(2))
    model(xp.asarray([[1.0, 2.0], [0.0, 1.0]], "float32")).sum().backward()
    held = [*model.parameters()]
    state = {name: host(array).copy() for name, array in model.state_dict().items()}
    gradient = host(model[0].weight.grad).copy()
    assert model.to("numpy") is model
    assert all(isinstance(array, np.ndarray) for array in model.state_dict().values())
    assert isinstance(model[0].weight.grad, np.ndarray)
    model.to(backend_name)
    assert all(p is q for p, q in zip(held, model.parameters(), strict=True))
    for name, array in model.state_dict().items():
        assert backend.backend_of(array).name == backend_name
        assert_close(array, state[name], rtol=0)
    assert_close(model[0].weight.grad, gradient, rtol=0)
    with pytest.raises(ValueError, match="numpy"):
        model.to("abacus")


def test_deepcopy_is_independent(xp: Any) -> None:
    """As for an exponential average or a teacher: nothing is shared, what was tied still is."""
    model = Tied(xp)
    double = copy.deepcopy(model)
    assert double.head.weight is double.embed.weight
    assert double.head.weight is not model.head.weight
    double(xp.asarray([0])).sum().backward()
    assert model.embed.weight.grad is None and double.embed.weight.grad is not None
    model.embed.weight.data[...] = 0.0
    assert float(abs(double.embed.weight).sum()) > 0


def test_a_module_dies_with_its_last_reference(xp: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(Block(xp), nn.Linear(3, 1))
        model(xp.ones((1, 2), "float32")).sum().backward()
        ghost = weakref.ref(model[0].inner)
        del model
        assert ghost() is None
    finally:
        gc.enable()


# How it looks, and wrong use


def test_repr(xp: Any) -> None:
    model = nn.Sequential(Block(xp), nn.Dropout(0.1))
    assert repr(model) == (
        "Sequential(\n"
        "  (0): Block(\n"
        "    bias=None, width=3\n"
        "    (inner): Linear(in_features=2, out_features=3)\n"
        "  )\n"
        "  (1): Dropout(p=0.1)\n"
        ")"
    )
    assert repr(nn.Linear(1, 2, bias=False)) == "Linear(in_features=1, out_features=2, bias=None)"
    assert repr(nn.ReLU()) == "ReLU()"


def test_parameters(xp: Any) -> None:
    array = xp.ones(2, "float32")
    parameter = nn.Parameter(array)
    assert parameter.data is array and parameter.requires_grad
    assert isinstance(parameter, Tensor) and type(parameter * 2) is Tensor
    assert nn.Parameter([1.0]).dtype == "float32"
    with pytest.raises(TypeError, match="floating-point"):
        nn.Parameter(xp.ones(2, "int64"))
    assert nn.Parameter(xp.ones(2, "int64"), requires_grad=False).dtype == "int64"


def test_a_module_without_forward_says_so() -> None:
    with pytest.raises(NotImplementedError, match="ModuleList"):
        nn.ModuleList()(1)


# Containers


def test_module_list(xp: Any) -> None:
    a, b, c = nn.Linear(1, 1), nn.ReLU(), nn.Tanh()
    modules = nn.ModuleList([a, b])
    assert modules.append(c) is modules and modules.extend([a]) is modules
    assert [*modules] == [a, b, c, a] and len(modules) == 4
    assert modules[0] is a and modules[-2] is c
    assert [*modules[1:3]] == [b, c] and type(modules[1:3]) is nn.ModuleList
    modules[-3] = c
    assert modules[1] is c
    assert [name for name, _ in modules.named_parameters()] == ["0.weight", "0.bias"]
    with pytest.raises(IndexError):
        modules[4]
    with pytest.raises(TypeError, match="function"):
        nn.ModuleList([lambda x: x])


def test_sequential(xp: Any) -> None:
    double, half = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    double.load_state_dict({"weight": [[2.0]]})
    half.load_state_dict({"weight": [[0.5]]})
    x = xp.asarray([[-3.0]], "float32")
    assert_close(nn.Sequential(double, nn.ReLU(), half)(x), 0.0)
    assert_close(nn.Sequential(double, half, nn.ReLU())[:2](x), -3.0)
    assert type(nn.Sequential(double)[:1]) is nn.Sequential
    assert nn.Sequential()(x) is x
    named = nn.Sequential({"first": double, "second": half})
    assert [*named.state_dict()] == ["first.weight", "second.weight"]
    assert_close(named(x), -3.0)
    named[1] = double
    assert named.second is double
    for name in ("forward", "a.b"):
        with pytest.raises(ValueError, match=name):
            nn.Sequential({name: half})


def test_module_dict(xp: Any) -> None:
    a, b = nn.Linear(1, 1), nn.ReLU()
    modules = nn.ModuleDict({"a": a})
    modules["b"] = b
    assert modules["a"] is a and "b" in modules and "c" not in modules
    assert [*modules] == modules.keys() == ["a", "b"] and len(modules) == 2
    assert modules.values() == [a, b] and modules.items() == [("a", a), ("b", b)]
    assert [*modules.state_dict()] == ["a.weight", "a.bias"]
    modules["a"] = b
    assert modules["a"] is b
    with pytest.raises(KeyError):
        modules["c"]
    with pytest.raises(ValueError, match="keys"):
        modules["keys"] = a
    with pytest.raises(TypeError, match="int"):
        modules["d"] = 1  # type: ignore[assignment]


@pytest.mark.parametrize(("here", "there"), [("numpy", "strict"), ("strict", "numpy")])
def test_gradients_move_with_their_parameters(here: str, there: str) -> None:
    device.register()
    with mini_nn.using(here):
        parameter = nn.Parameter(mini_nn.backend.current().xp.ones((2, 3), "float32"))
        (parameter * parameter).sum().backward()
    module = nn.Module()
    module.weight = parameter
    module.to(there)
    assert type(parameter.grad) is type(parameter.data) is mini_nn.backend.get(there).array_type
    assert_close(parameter.grad, np.full((2, 3), 2.0, "float32"))
