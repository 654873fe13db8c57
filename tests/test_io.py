"""Files: every layout and dtype, every way to be broken, and kill -9 at any moment."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import mini_nn
from mini_nn import Rng, Tensor, backend, io, nn, optim
from tests.support import host

ROOT = Path(__file__).parents[1]
DTYPES = ["float16", "float32", "float64", "bool"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


def same(actual: Any, desired: Any) -> None:
    """Bit for bit, nan included."""
    got, want = host(actual), np.asarray(desired)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


def craft(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    """A file with a header of our choice."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + body)
    return path


# Arrays


@given(
    st.dictionaries(
        st.text(max_size=5).filter(lambda name: name.isprintable()),
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
        ),
        max_size=4,
    )
)
def test_what_is_saved_is_loaded(
    xp: Any, tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"round-{os.getpid()}.safetensors"
    as_tensor = [
        Tensor(xp.asarray(x)) if i % 2 else xp.asarray(x) for i, x in enumerate(arrays.values())
    ]
    io.save_file(dict(zip(arrays, as_tensor, strict=True)), path)
    loaded = io.load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, x in arrays.items():
        assert isinstance(loaded[name], backend.current().array_type)
        same(loaded[name], x)
        same(safetensors.numpy.load_file(path)[name], x)  # the file is an ordinary one


LAYOUTS = {
    "transposed": lambda x: x.T,
    "reversed": lambda x: x[::-1],
    "every other": lambda x: x[:, ::2],
    "columns reversed": lambda x: x[1:, ::-1],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_memory_layout_does_not_matter(xp: Any, tmp_path: Path, layout: str) -> None:
    x = np.arange(12.0).reshape(3, 4)
    view = LAYOUTS[layout](xp.asarray(x))
    io.save_file({"x": view}, tmp_path / "x.safetensors")
    same(io.load_file(tmp_path / "x.safetensors")["x"], LAYOUTS[layout](x).copy())


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_package_alone_would_reorder_them(layout: str) -> None:
    # amid a larger array: the package reads on past the first element of a reversed view
    x = np.arange(36.0).reshape(9, 4)[3:6]
    view = LAYOUTS[layout](x)
    direct = safetensors.numpy.load(safetensors.numpy.save({"x": view}))["x"]
    if np.array_equal(direct, view):
        pytest.skip(f"safetensors {safetensors.__version__} copies such arrays in C order")
    assert direct.shape == view.shape  # and nothing is said


def test_byte_order_does_not_matter(tmp_path: Path) -> None:
    x = np.arange(5.0)
    io.save_file({"x": x.astype(">f8"), "i": np.arange(3, dtype=">i2")}, tmp_path / "x")
    with backend.using("numpy"):
        loaded = io.load_file(tmp_path / "x")
    same(loaded["x"], x)
    same(loaded["i"], np.arange(3, dtype="i2"))


def test_an_ordinary_file_is_read_onto_the_current_backend(xp: Any, tmp_path: Path) -> None:
    x = np.arange(6, dtype="float32").reshape(2, 3)
    safetensors.numpy.save_file({"x": x}, tmp_path / "x", {"from": "elsewhere"})
    loaded = io.load_file(tmp_path / "x")["x"]
    assert isinstance(loaded, backend.current().array_type)
    loaded[...] = loaded * 2  # it may be written to
    same(loaded, x * 2)
    assert io.load_metadata(tmp_path / "x") == {"from": "elsewhere"}


def test_bfloat16_is_read_exactly_as_float32(xp: Any, tmp_path: Path) -> None:
    wanted = np.array([1.0, -2.5, 3.0e38, 2.0**-126, np.inf, 0.0], "float32")
    upper = (wanted.view("u4") >> 16).astype("<u2")
    header = {"x": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
    loaded = io.load_file(craft(tmp_path / "x", header, upper.tobytes()))["x"]
    same(loaded, (upper.astype("u4") << 16).view("float32").reshape(2, 3))
    assert (host(loaded)[0] == np.array([1.0, -2.5, host(loaded)[0, 2]])).all()


def test_a_boolean_is_true_or_false(xp: Any, tmp_path: Path) -> None:
    header = {"x": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    loaded = io.load_file(craft(tmp_path / "x", header, b"\x00\x01\x07"))["x"]
    same(loaded, np.array([False, True, True]))


def test_metadata(xp: Any, tmp_path: Path) -> None:
    notes = {"ü": "{}", "": "\n"}
    io.save_file({"x": xp.zeros(2)}, tmp_path / "x", notes)
    assert io.load_metadata(tmp_path / "x") == notes
    io.save_file({}, tmp_path / "x")
    assert io.load_metadata(tmp_path / "x") == io.load_file(tmp_path / "x") == {}


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "says"),
    [
        ({"x": np.zeros(2, "complex128")}, None, TypeError, "complex128.*astype"),
        ({"x": np.array(["a"])}, None, TypeError, "'x' has dtype <U1"),
        ({"x": np.array([None])}, None, TypeError, "object"),
        ({"x": [1.0, 2.0]}, None, TypeError, "'x' is a list"),
        ({"x": 1.0}, None, TypeError, "'x' is a float"),
        ({1: np.zeros(2)}, None, TypeError, "strings, got 1"),
        ({"__metadata__": np.zeros(2)}, None, ValueError, "__metadata__"),
        ({}, {"step": 3}, TypeError, "'step': 3"),
        ({}, {3: "step"}, TypeError, "3: 'step'"),
    ],
)
def test_what_cannot_be_saved_is_refused(
    tmp_path: Path, tensors: Any, metadata: Any, error: type[Exception], says: str
) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(error, match=says):
        io.save_file(tensors, tmp_path / "x", metadata)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for use in (lambda: io.save_file({}, tmp_path / "x"), lambda: io.load_file(tmp_path / "x")):
        with pytest.raises(ImportError, match=r"pip install 'mini-nn\[io\]'"):
            use()


# Broken files


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    io.save_file({"a": np.arange(3.0), "b": np.ones(2, "float32")}, path, {"k": "v"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors is not a whole .*cut short"):
            io.load_file(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="not a whole"):
        io.load_file(path)


def entry(dtype: str = "F32", shape: Any = (2,), start: int = 0, stop: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        ({"x": entry()}, b"1234", None),  # less data than it says
        ({"x": entry()}, b"1234567890", None),  # more
        ({"x": entry(shape=(3,))}, b"12345678", None),  # shape against offsets
        ({"x": entry(shape=(2**62, 8))}, b"12345678", None),  # overflowing shape
        ({"x": entry(shape=(-2,))}, b"12345678", None),
        ({"x": entry(start=8, stop=0)}, b"12345678", None),
        ({"x": entry(stop=2**63)}, b"12345678", None),
        ({"x": entry(), "y": entry()}, b"12345678", None),  # overlapping
        ({"x": entry(stop=8), "y": entry(start=12, stop=20)}, b"1" * 20, None),  # a hole
        ({"x": entry(dtype="F99")}, b"12345678", None),
        ({"x": {"dtype": "F32"}}, b"", None),
        ({"x": None}, b"", None),
        ([1, 2], b"", None),
        (b"{", b"", None),
        (b"\xff\xfe{}", b"", None),
        (b"[" * 100_000, b"", None),
        ({}, b"", 2**63),
        ({}, b"", 2**40),
        (b"\x80\x04K\x01.", b"", None),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, header: Any, body: bytes, length: int | None
) -> None:
    path = craft(tmp_path / "lies.safetensors", header, body, length)
    for read in (io.load_file, io.load_metadata):
        with pytest.raises(ValueError, match=r"lies\.safetensors .*convert it"):
            read(path)


def test_a_dtype_that_numpy_lacks_is_named(tmp_path: Path) -> None:
    path = craft(tmp_path / "f8", {"x": entry(dtype="F8_E4M3")}, b"12345678")
    with pytest.raises(ValueError, match=r"'x' as F8_E4M3.*convert it to float32"):
        io.load_file(craft(path, {"x": entry("F8_E4M3", (8,))}, b"12345678"))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00v\x00{", b"a text\n" * 9]
)
def test_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.bin is not a whole safetensors file"):
        io.load_file(tmp_path / "other.bin")


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_loads_or_says_so(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged-{os.getpid()}"
    model = {"w": np.arange(6.0).reshape(2, 3), "flag": np.array([True, False])}
    io.save_file(model, path, {io.TRAINING: json.dumps({"step": 3, "extra": {}})})
    data = bytearray(path.read_bytes())
    for at, byte in damage:
        data[at % len(data)] = byte
    path.write_bytes(data)
    for read in (io.load_file, lambda p: io.load_training(p, Linear(0))):
        with contextlib.suppress(ValueError):
            read(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for path, error in [
        (tmp_path / "folder", IsADirectoryError),
        (tmp_path / "none" / "x", FileNotFoundError),
        (tmp_path / "file" / "x", NotADirectoryError),
    ]:
        with pytest.raises(error, match=path.name):
            io.load_file(path)
        with pytest.raises(error, match=f"cannot save here.*folder that exists.*{path.name}"):
            io.save_file({"x": np.zeros(2)}, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot save here"):
            io.save_file({}, tmp_path / "x")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("code", [13, 28, 30])  # permission denied, no space left, read-only
def test_a_refusing_disk_is_reported_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*args: Any) -> Any:
        raise OSError(code, os.strerror(code), "somewhere")

    monkeypatch.setattr(io, "open", refuse, raising=False)
    with pytest.raises(OSError, match=f"{os.strerror(code)}.*model.safetensors") as caught:
        io.save_file({}, tmp_path / "model.safetensors")
    assert caught.value.errno == code


# Atomic and durable


def test_the_order_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    events: list[Any] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else ""
        size = os.fstat(descriptor).st_size
        events.append(("fsync", name, size))
        fsync(descriptor)

    def watched_replace(source: Any, target: Any) -> None:
        events.append(("replace", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    io.save_file({"x": np.zeros(10)}, path)  # less than a buffer, which must be flushed first
    (first, flushed, size), (second, source, target), (third, folder, _) = events
    assert (first, second, third) == ("fsync", "replace", "fsync")
    assert target == str(path)
    assert Path(source).parent == tmp_path  # the same folder, so the same disk: rename is atomic
    assert size == path.stat().st_size > 80  # everything had been written when it was flushed
    if sys.platform == "linux":
        assert (flushed, folder) == (source, str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    path = tmp_path / "x.safetensors"
    io.save_file({"x": np.zeros(3)}, path)

    def crash(*args: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, where, crash)
        with pytest.raises(type(error)):
            io.save_file({"x": np.ones(3)}, path)
    same(io.load_file(path)["x"], np.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    io.save_file({"x": np.ones(3)}, path)
    same(io.load_file(path)["x"], np.ones(3))


def test_a_reader_finds_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    io.save_file({"x": np.full(20_000, 0.0)}, path)
    done, seen = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            with backend.using("numpy"):
                x = io.load_file(path)["x"]
            seen.append(bool((x == x[0]).all()))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for i in range(40):
            io.save_file({"x": np.full(20_000 + i, float(i))}, path)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert len(seen) >= 2
    assert all(seen)


def test_leftovers_of_killed_saves_are_swept_when_old(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".x[1].aa.tmp", ".x[1].bb.tmp", ".y.aa.tmp"))
    for leftover in (old, young, other):
        leftover.write_bytes(b"half")
    for leftover in (old, other):
        os.utime(leftover, (0, 0))
    io.save_file({}, tmp_path / "x[1]")
    assert {p.name for p in tmp_path.iterdir()} == {"x[1]", young.name, other.name}


@pytest.mark.skipif(os.name != "posix", reason="symbolic links and file modes of POSIX")
def test_links_and_modes(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "x")
    io.save_file({"x": np.zeros(2)}, link)
    io.save_file({"x": np.ones(2)}, link)
    assert link.is_symlink()
    same(io.load_file(tmp_path / "real" / "x")["x"], np.ones(2))
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "real" / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Training states


class Linear(nn.Module):
    """y = W x with noise of its own."""

    def __init__(self, seed: int) -> None:
        rng = Rng(seed)
        self.w = nn.Parameter(rng.normal((2, 3)))
        self.noise = Rng(seed + 1)

    def forward(self, x: Any) -> Any:
        return x @ self.w + Tensor(self.noise.normal((3,)))


def build(seed: int) -> dict[str, Any]:
    """A model and everything that trains it; no two seeds agree in anything."""
    model = Linear(seed)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": optim.Schedule(optimizer, lambda t: 1 / (1 + t)),
        "ema": optim.EMA(model.parameters(), 0.5),
        "rngs": {"data": Rng(seed + 2)},
    }


def advance(run: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        run["optimizer"].zero_grad()
        x = Tensor(run["rngs"]["data"].normal((4, 2)) + mini_nn.default_rng().normal((4, 2)))
        y = run["model"](x)
        (y * y).sum().backward()
        run["optimizer"].step()
        run["schedule"].step()
        run["ema"].update()


@pytest.mark.parametrize("forgotten", [None, "optimizer", "schedule", "ema", "rngs"])
def test_a_resumed_run_has_the_same_bits(xp: Any, tmp_path: Path, forgotten: str | None) -> None:
    path, default = tmp_path / "run.safetensors", mini_nn.default_rng().state_dict()
    whole = build(0)
    advance(whole, 3)
    io.save_training(path, **whole, step=3, extra={"best": 0.1, "names": ["a"]})
    advance(whole, 4)
    resumed = build(100)
    mini_nn.manual_seed(7)
    restored = {key: part for key, part in resumed.items() if key != forgotten}
    progress = io.load_training(path, **restored)
    assert progress == (3, {"best": 0.1, "names": ["a"]})
    advance(resumed, 4)

    def result(run: dict[str, Any]) -> tuple[bytes, ...]:
        return (host(run["model"].w).tobytes(), host(run["ema"].averages[0]).tobytes())

    assert (result(resumed) == result(whole)) == (forgotten is None)
    mini_nn.default_rng().load_state_dict(default)


def test_a_checkpoint_may_be_read_for_the_model_alone(xp: Any, tmp_path: Path) -> None:
    run, alone = build(0), Linear(9)
    advance(run, 2)
    io.save_training(tmp_path / "x", **run, step=2)
    assert io.load_training(tmp_path / "x", alone).step == 2
    same(alone.w, host(run["model"].w))
    arrays = io.load_file(tmp_path / "x")  # an ordinary file, whose arrays have speaking names
    assert arrays.keys() == {"model.w", "optimizer.0.exp_avg", "optimizer.0.exp_avg_sq", "ema.0"}
    same(arrays["model.w"], host(run["model"].w))


def test_a_file_that_does_not_fit_is_named(xp: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    run = build(0)

    def refused(says: str, **parts: Any) -> None:
        with pytest.raises(ValueError, match=rf"x\.safetensors .*{says}"):
            io.load_training(path, **{"model": run["model"], **parts})

    io.save_file({"model.w": xp.zeros((2, 3))}, path)
    refused("no training state: read it with load_file")
    io.save_training(path, run["model"], rngs={"data": Rng(0)})
    refused("saved without optimizer=", optimizer=run["optimizer"])
    refused("saved without ema=", ema=run["ema"])
    refused(r"holds generators \['data'\], wanted are \['eval'\]", rngs={"eval": Rng(0)})
    refused(r"mis-shaped: w \(has", model=nn_with_shape(xp, (3, 2)))
    advance(run, 1)
    io.save_training(path, run["model"], run["optimizer"])
    refused("same kind of optimiser", optimizer=optim.SGD(run["model"].parameters()))


def nn_with_shape(xp: Any, shape: tuple[int, ...]) -> Linear:
    model = Linear(0)
    model.w = nn.Parameter(xp.zeros(shape, "float32"))
    return model


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"step": "three", "extra": {}}',
        '{"step": Infinity, "extra": {}}',
        '{"step": 1, "extra": 5}',
        '{"step": 1, "extra": {}}',
        '{"step": 1, "extra": {}, "model": []}',
        '{"step": 1, "extra": {}, "model": {}, "default_rng": {}}',
        '{"step": 1, "extra": {}, "model": {}, "default_rng": {"bit_generator": "PCG64"}}',
        "[" * 100_000,
        "9" * 5_000,
    ],
)
def test_hostile_notes_are_refused(xp: Any, tmp_path: Path, text: str) -> None:
    io.save_file({"model.w": xp.zeros((2, 3), "float32")}, tmp_path / "x", {io.TRAINING: text})
    before = mini_nn.default_rng().state_dict()
    with pytest.raises(ValueError, match="x does not fit this run"):
        io.load_training(tmp_path / "x", Linear(0))
    assert mini_nn.default_rng().state_dict() == before


def test_notes_that_json_cannot_hold_are_refused(xp: Any, tmp_path: Path) -> None:
    for extra in ({"loss": np.float32(1.0)}, {"seen": {1, 2}}):
        with pytest.raises(TypeError, match=r"convert NumPy numbers in `extra`"):
            io.save_training(tmp_path / "x", Linear(0), extra=extra)
    assert not [*tmp_path.iterdir()]


# kill -9

SUPERVISOR = """
import json, os, random, signal, sys, time, traceback
from functools import partial
from mini_nn import Rng, Tensor, io, nn, optim

class Net(nn.Module):
    def __init__(self):
        rng = Rng(0)
        self.inner = nn.Parameter(rng.normal((8, 16), std=0.3))
        self.outer = nn.Parameter(rng.normal((16, 1), std=0.3))
        self.noise = Rng(1)

    def forward(self, x):
        h = (x @ self.inner).clip(0.0)
        return (h * Tensor(self.noise.bernoulli(0.8, h.shape).astype("float32"))) @ self.outer

def die_in_the_fifth(name, moment):
    real, calls = getattr(os, name), [0]
    def dying(*args):
        calls[0] += 1
        if calls[0] == 5 and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        if calls[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, name, dying)

def run(path, fatal, tell):
    model, data, step = Net(), Rng(2), 0
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    schedule = optim.Schedule(optimizer, partial(optim.warmup_cosine, warmup=50, total=STEPS))
    ema = optim.EMA(model.parameters(), 0.9)
    parts = {"optimizer": optimizer, "schedule": schedule, "ema": ema, "rngs": {"data": data}}
    if os.path.exists(path):
        step = io.load_training(path, model, **parts).step
    if fatal:
        die_in_the_fifth(*fatal)
    os.write(tell, str(step).encode())
    while step < STEPS:
        optimizer.zero_grad()
        x = Tensor(data.normal((16, 8)))
        error = model(x) - x.sum(axis=1, keepdims=True)
        (error * error).mean().backward()
        optimizer.step()
        schedule.step()
        ema.update()
        step += 1
        if step % 4 == 0:
            io.save_training(path, model, **parts, step=step)

def live(path, fatal=None, delay=None):
    hear, tell = os.pipe()
    pid = os.fork()  # a fresh life: this process imports, but never trains or draws
    if pid == 0:
        try:
            run(path, fatal, tell)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    begun = int(os.read(hear, 20))
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(hear)
    os.close(tell)
    return begun, status

STEPS, whole, killed = 240, *sys.argv[1:]
moments = ("fsync", "before"), ("replace", "before"), ("replace", "after")
lives = [live(killed, fatal) for fatal in moments]
lives += [live(killed, delay=random.uniform(0.0, 0.05)) for _ in range(6)]
lives += [live(killed), live(whole)]
print(json.dumps(lives))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and the signals of POSIX")
def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("MINI_NN_BACKEND", None)
    command = [sys.executable, "-W", "error", "-c", SUPERVISOR, str(whole), str(killed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    begun, status = zip(*json.loads(done.stdout), strict=True)
    assert status[:3] == (-signal.SIGKILL,) * 3
    assert set(status[3:9]) <= {-signal.SIGKILL, 0}  # a late kill may find the run already over
    assert status[9:] == (0, 0)
    assert begun[:4] == (0, 8, 24, 44)  # each life saved what it should have, and no more
    assert list(begun[:10]) == sorted(begun[:10])
    assert begun[10] == 0
    assert killed.read_bytes() == whole.read_bytes()


# Never pickled


def test_nothing_in_the_library_can_unpickle() -> None:
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch"}
    calls = {"save", "savez", "savez_compressed", "load", "fromfile", "eval", "exec", "loadtxt"}
    for path in (ROOT / "mini_nn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not modules & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id in ("np", "numpy", "xp") and node.attr in calls), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), path
