"""mini_nn asks no more of an array library than CuPy has: no machine of the project has a GPU.

The source is compared with the names and keywords of the real CuPy; mistakes of every known kind
are planted and must be caught by the stand-in device; and a training step on it copies nothing to
the host and gives NumPy's numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mini_nn
from mini_nn import Rng, Tensor, backend, grad, nn, ops, optim, primitive
from tests import device
from tests.device import make_surface, names
from tests.support import assert_close, host

ROOT = Path(__file__).parents[1]
HOST_FILES = {"backend.py", "check.py", "io.py", "rng.py", "nn/gaussian.py"}
"""Files of mini_nn that import NumPy (as models do for data): the rest follows its arrays."""


# The names and keywords


def _complaints(surface: dict[str, Any]) -> list[str]:
    found = []
    for path in [*names.sources(ROOT, "mini_nn"), *names.sources(ROOT, "models")]:
        package = path.relative_to(ROOT).parts[0]
        inside = path.relative_to(ROOT / package).as_posix()
        on_host = package == "models" or inside in HOST_FILES
        for problem in names.problems(path.read_text(), surface, on_host):
            found.append(f"{path.relative_to(ROOT)}:{problem}")
    return found


def test_every_name_and_keyword_is_cupys() -> None:
    assert not _complaints(make_surface.load())


def test_every_name_and_keyword_is_the_installed_cupys() -> None:
    pytest.importorskip("cupy")
    assert not _complaints(make_surface.installed())


def test_the_reader_sees_what_the_source_takes() -> None:
    uses = [u for path in names.sources(ROOT, "mini_nn") for u in names.read(path.read_text()).uses]
    seen = {(use.kind, use.name) for use in uses}
    assert len(uses) > 200
    assert {("cupy", "exp"), ("cupy", "where"), ("cupy", "asarray"), ("special", "erf")} <= seen
    assert any(use.name.startswith("linalg.") for use in uses)


PLANTED = """
import numpy as np
def f(x, y):
    xp, n = of(x), 3
    a = xp.vecdot(x, y)
    b = of(x).sum(x, where=y)
    c = xp.linalg.vector_norm(x)
    d = special(x).owens_t(x, y)
    e = xp.maximum.reduce(x)
    x @= y
    g = getattr(xp, "insert")(x, 0, 1.0)
    h = x.sum(axis=0, initial=1.0)
    i = backend.current().xp.exp(x, where=y)
    j = getattr(xp, n)
    k = x.flags.writeable
    return xp.take(x, y, mode="clip")
"""
GOOD = """
def f(x, y):
    xp = of(x)
    a = xp.take(x, y, axis=0).sum(axis=0, keepdims=True) @ y
    xp.add.at(x, y, xp.einsum("ij->i", x, optimize=True))
    b = special(x).logsumexp(x, axis=0, keepdims=True)
    c = xp.lib.stride_tricks.sliding_window_view(x, 3, axis=1)
    return xp.linalg.qr(a, mode="reduced"), xp.exp(x, out=x), xp.float32, xp.finfo(x.dtype).eps
"""


def test_the_reader_finds_what_is_planted() -> None:
    surface = make_surface.load()
    lines = {int(p.partition(":")[0]) for p in names.problems(PLANTED, surface, host=False)}
    assert lines == {2, *range(5, 17)}
    assert not [*names.problems(GOOD, surface, host=False)]


# Planted mistakes: each runs on NumPy and not on the stand-in


@pytest.fixture(scope="module", params=["numpy", "strict"])
def name(request: pytest.FixtureRequest) -> str:
    device.register()
    return str(request.param)


@primitive
def hidden_asarray(x: Any) -> Any:
    return backend.of(x).exp(np.asarray(x))


@primitive
def host_constant(x: Any) -> Any:
    return x * np.linspace(0.0, 1.0, x.shape[-1])


@primitive
def numpys_keyword(x: Any) -> Any:
    return backend.of(x).sum(x, axis=0, where=x > 0)


@primitive
def numpys_function(x: Any) -> Any:
    return backend.of(x).vecdot(x, x)


@primitive
def numpys_reduce(x: Any) -> Any:
    return backend.of(x).logaddexp.reduce(x, axis=0)


@primitive
def device_number_as_shape(x: Any) -> Any:
    return backend.of(x).zeros((x > 0).sum())


@primitive
def rows_written_twice(x: Any) -> Any:
    out = backend.of(x).zeros(x.shape, x.dtype)
    out[backend.of(x).asarray([0, 0])] += x[:2]
    return out


hidden_rule = primitive(lambda x: x * 2.0)
hidden_rule.derivative(x=lambda g: 2.0 * np.ones(g.shape) * g)

MISTAKES = {
    "hidden np.asarray": hidden_asarray,
    "host array in an expression": host_constant,
    "keyword of NumPy": numpys_keyword,
    "function of NumPy": numpys_function,
    "ufunc.reduce of NumPy": numpys_reduce,
    "0-d array as a length": device_number_as_shape,
    "rows written twice": rows_written_twice,
    "host array in a derivative": lambda x: grad(hidden_rule(x).sum(), x)[0],
    "function of the host": lambda x: ops.exp(np.minimum(x.data, 0.0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake: str, name: str) -> None:
    with backend.using(name):
        x = mini_nn.tensor([[0.5, -1.0, 2.0], [1.0, 3.0, -0.5]], requires_grad=True)
        if name == "numpy":
            MISTAKES[mistake](x)
        else:
            with pytest.raises((TypeError, AttributeError, ValueError, NotImplementedError)):
                MISTAKES[mistake](x)


def test_a_label_out_of_range_is_nobodys_error_but_ours(name: str) -> None:
    """Code that leaves the check to the indexing reads another row on a GPU."""
    with backend.using(name):
        rows = mini_nn.tensor([[1.0], [2.0], [3.0]]).data
        label = mini_nn.tensor([-100]).data
        if name == "numpy":
            with pytest.raises(IndexError):
                rows[label]
        else:
            assert rows[label].tolist() == [[3.0]]


# A training step


class Net(nn.Module):
    """What a Transformer is made of, small."""

    def __init__(self, rng: Rng) -> None:
        self.embed = nn.Embedding(11, 8, rng=rng)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 24, rng=rng)
        self.drop = nn.Dropout(0.1, rng=rng)
        self.head = nn.Linear(8, 11, rng=rng)

    def forward(self, ids: Any) -> Tensor:
        x = self.embed(ids)
        q, k, v = ops.split(self.mix(self.norm(x)), 3, axis=-1)
        x = x + self.drop(ops.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(ops.gelu(x))


def _loss(net: Net, ids: Any, labels: Any) -> Tensor:
    return nn.functional.cross_entropy(net(ids).reshape(-1, 11), labels.reshape(-1))


def _train(name: str, leak: bool = False) -> tuple[list[float], list[Any], dict[str, int]]:
    with backend.using(name):
        rng = Rng(3)
        net = Net(rng)
        optimizer = optim.AdamW(net.parameters(), lr=1e-2)
        ids, labels = rng.integers(0, 11, (2, 5)), rng.integers(0, 11, (2, 5))
        losses = []
        device.reset()
        for _ in range(4):
            with device.no_sync():
                optimizer.zero_grad()
                loss = _loss(net, ids, labels)
                loss.backward()
                if leak:
                    loss.item()
                optim.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
            losses.append(loss)
        counted = device.counts()
        return [float(x) for x in losses], [host(p) for p in net.parameters()], counted


def test_a_training_step_copies_nothing_to_the_host() -> None:
    device.register()
    counted = _train("strict")[2]
    assert counted["launch"] > 100
    assert counted["d2h"] == counted["sync"] == 0


def test_an_item_in_the_training_step_is_caught() -> None:
    device.register()
    _train("numpy", leak=True)
    with pytest.raises(device.DeviceSynchronized):
        _train("strict", leak=True)


def test_one_seed_gives_the_same_weights_and_losses_everywhere() -> None:
    device.register()
    losses, weights, _ = _train("numpy")
    device_losses, device_weights, _ = _train("strict")
    assert losses[0] > losses[-1]
    np.testing.assert_allclose(device_losses, losses, rtol=1e-6)
    for one, other in zip(device_weights, weights, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-6)
