"""What holds on every backend: the same numbers, no hidden waiting, files that any of them reads.

The backend under test is held against NumPy; where that is NumPy itself, the strict stand-in takes
its place, so that each run checks a second backend.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mini_nn import Rng, backend, io, no_grad
from mini_nn.nn import functional as F
from mini_nn.optim import AdamW, clip_grad_norm_
from models.data import corpus
from models.gpt import GPT, GPTConfig
from models.studies.text import TextConfig, batches, codes
from tests import device
from tests.support import assert_close, host

SIZES = GPTConfig(256, 16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.1)
STUDY = TextConfig(steps=4, context=8, batch=3)


class Device(NamedTuple):
    """A backend that is not NumPy, and what is known of its waiting for the host."""

    name: str
    no_sync: Callable[[], AbstractContextManager[None]]
    error: type[Exception]
    """What leaving the device raises inside ``no_sync()``."""
    counts: Callable[[], dict[str, int]] | None
    """Copies to the host so far, as ``d2h``; None where nobody counts: on a GPU."""


@contextmanager
def _cupys_no_sync() -> Iterator[None]:
    import cupyx

    with warnings.catch_warnings():  # CuPy calls it deprecated, for not seeing what others do
        warnings.simplefilter("ignore")
        forbidden = cupyx.allow_synchronize(False)
        forbidden.__enter__()
    try:
        yield
    finally:
        forbidden.__exit__(None, None, None)


@pytest.fixture(scope="module")
def other(backend_name: str) -> Device:
    """The backend under test, or the strict stand-in."""
    if backend_name == "cupy":
        import cupyx

        rig = sys.modules.get("tests.cupy_on_cpu.fakecupy")  # not on a GPU
        counts = rig.stats if rig else None
        return Device("cupy", _cupys_no_sync, cupyx.DeviceSynchronized, counts)
    device.register()
    return Device("strict", device.no_sync, device.DeviceSynchronized, device.counts)


def copies(other: Device, run: Callable[[], Any]) -> int:
    """How many times ``run`` copies from the device to the host."""
    if other.counts is None:
        pytest.skip("a GPU does not count its copies; the laws with no_sync() hold on it too")
    before = other.counts()["d2h"]
    run()
    return other.counts()["d2h"] - before


class Training:
    """A small GPT on real text, step by step, on the current backend."""

    def __init__(self) -> None:
        weights, self.drawn = Rng(7).split(2)
        self.model = GPT(SIZES, weights)
        self.optimizer = AdamW(self.model.parameters(), lr=1e-2)
        self.text = codes(corpus("hamlet")[:2000])

    def batch(self) -> tuple[Any, Any]:
        return batches(self.text, STUDY, self.drawn)

    def step(self, leak: bool = False) -> Any:
        """The loss before the step, on the device."""
        inputs, targets = self.batch()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(inputs).reshape(-1, 256), targets.reshape(-1))
        loss.backward()
        if leak:
            loss.item()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.data

    def rngs(self) -> dict[str, Rng]:
        return {"batches": self.drawn}


# The same numbers


def _same_bits(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        x, y = one[name], two[name]
        if not hasattr(x, "dtype"):
            assert x == y, name
            continue
        x, y = host(x), host(y)
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert x.tobytes() == y.tobytes(), name


def test_one_seed_gives_the_same_weights_to_the_bit(other: Device) -> None:
    with backend.using("numpy"):
        wanted = Training().model.state_dict()
    with backend.using(other.name) as chosen:
        got = Training().model.state_dict()
    assert {type(x) for x in got.values()} == {chosen.array_type}
    _same_bits(got, wanted)


def test_one_seed_gives_the_same_batches(other: Device) -> None:
    def drawn() -> list[Any]:
        training = Training()
        return [x for _ in range(3) for x in training.batch()]

    with backend.using("numpy"):
        wanted = drawn()
    with backend.using(other.name) as chosen:
        got = drawn()
    assert all(type(x) is chosen.array_type for x in got)
    assert all((host(x) == y).all() for x, y in zip(got, wanted, strict=True))
    assert not (wanted[0] == wanted[2]).all(), "the batches of two steps differ"


def _run(steps: int = 6) -> tuple[list[float], dict[str, Any]]:
    training = Training()
    losses = [float(training.step()) for _ in range(steps)]
    return losses, {name: host(x) for name, x in training.model.state_dict().items()}


def test_one_seed_gives_the_same_training_run(other: Device) -> None:
    with backend.using("numpy"):
        losses, weights = _run()
    with backend.using(other.name):
        device_losses, device_weights = _run()
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(device_losses, losses, rtol=1e-5)
    for name, wanted in weights.items():
        # Adam divides a gradient by its size: where it is nearly 0 so is no digit of it certain
        assert_close(device_weights[name], wanted, rtol=1e-3, atol=1e-3)
    moved = max(abs(weights[n] - host(x)).max() for n, x in _initial().items())
    assert moved > 1e-2, "the tolerance is small beside what training changes"


def _initial() -> dict[str, Any]:
    with backend.using("numpy"):
        return Training().model.state_dict()


def test_one_seed_gives_the_same_text(other: Device) -> None:
    def text() -> Any:
        return host(Training().model.generate([[72, 97, 109]], 8, top_k=20, rng=Rng(1)))

    with backend.using("numpy"):
        wanted = text()
    with backend.using(other.name):
        np.testing.assert_array_equal(text(), wanted)


# No hidden waiting


def test_a_training_step_waits_for_nothing(other: Device) -> None:
    with backend.using(other.name):
        training = Training()
        training.step()
        with other.no_sync():
            loss = training.step()
        assert copies(other, training.step) == 0
        assert copies(other, lambda: float(loss)) == 1, "printing the loss is one copy"


def test_an_item_in_a_step_is_caught(other: Device) -> None:
    with backend.using(other.name):
        training = Training()
        with pytest.raises(other.error), other.no_sync():
            training.step(leak=True)
        assert copies(other, lambda: training.step(leak=True)) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("ends", [[], [300]])
def test_generation_copies_at_most_once_a_token(
    other: Device, temperature: float, ends: list[int]
) -> None:
    """Once, to see whether all rows have ended; never, if none can end."""
    tokens = 6
    with backend.using(other.name) as chosen:
        model = Training().model
        prompt = chosen.xp.asarray(np.array([[72, 97], [104, 101]]))

        def generate() -> None:
            model.generate(prompt, tokens, temperature, top_k=9, eos_token_id=ends, rng=Rng(0))

        generate()
        assert copies(other, generate) == (tokens if ends else 0)
        if not ends:
            with other.no_sync():
                generate()


# Files


@pytest.fixture(params=["from numpy", "to numpy"])
def route(request: pytest.FixtureRequest, other: Device) -> Iterator[tuple[str, str]]:
    """The backend that writes and the one that reads."""
    both = ("numpy", other.name)
    yield both if request.param == "from numpy" else both[::-1]


def test_a_checkpoint_of_one_backend_loads_on_the_other(
    route: tuple[str, str], tmp_path: Path
) -> None:
    """Weights, moments, step and generators bit for bit; then the run goes on as it would have."""
    writer, reader = route
    path = tmp_path / "run.safetensors"
    with backend.using(writer):
        ours = Training()
        for _ in range(2):
            ours.step()
        io.save_training(path, ours.model, ours.optimizer, step=2, rngs=ours.rngs())
    with backend.using(reader) as chosen:
        theirs = Training()
        assert io.load_training(path, theirs.model, theirs.optimizer, rngs=theirs.rngs()).step == 2
        assert {type(x) for x in theirs.model.state_dict().values()} == {chosen.array_type}
        _same_bits(theirs.model.state_dict(), ours.model.state_dict())
        theirs_moments, ours_moments = theirs.optimizer.state_dict(), ours.optimizer.state_dict()
        _same_bits(theirs_moments, ours_moments)
        again = tmp_path / "again.safetensors"
        io.save_training(again, theirs.model, theirs.optimizer, step=2, rngs=theirs.rngs())
        assert again.read_bytes() == path.read_bytes()
        loss = float(theirs.step())
    with backend.using(writer):
        assert loss == pytest.approx(float(ours.step()), rel=1e-5)


def test_weights_travel_both_ways(other: Device) -> None:
    with backend.using("numpy"):
        model = Training().model
    before = {name: x.tobytes() for name, x in model.state_dict().items()}
    ids = [[72, 97, 109, 108]]
    model.eval()
    with no_grad():
        with backend.using("numpy"):
            wanted = host(model(ids))
        model.to(other.name)
        assert {backend.backend_of(x).name for x in model.state_dict().values()} == {other.name}
        with backend.using(other.name):
            assert_close(model(ids), wanted)
    model.to("numpy")
    assert {name: x.tobytes() for name, x in model.state_dict().items()} == before
