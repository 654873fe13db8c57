"""Saving and loading: safetensors files, written so that a crash at any moment leaves a whole one.

``save_file`` and ``load_file`` are safetensors.numpy's, with what that leaves to its caller: arrays
of any memory layout and byte order, arrays of any backend, and a write that is atomic and durable.
``save_training`` and ``load_training`` keep everything that a run needs to go on exactly as if it
had never stopped, in one such file.  Nothing is ever pickled, so loading a file runs no code of it.

The order of a write is what makes it safe: the bytes go to another file of the same folder and are
flushed to the disk (fsync), then that file takes the name of the old one in one step (rename), then
the folder is flushed.  Whoever opens the name, whenever, finds the old file or the new one.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import backend
from .backend import Array
from .engine import Tensor, data_of
from .rng import Rng, default_rng

PathLike = str | os.PathLike[str]

# little-endian, as the format demands
DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
}

TRAINING = "mini_nn.training"
"""The key of a training state's JSON in the metadata of its file."""

UNFIT = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a well-formed file with the wrong things in it makes Python raise."""

STALE = 3600.0
"""Age in seconds at which a half-written file of a killed process is swept away."""


class Stateful(Protocol):
    """A module, an optimiser, a schedule or an average: what has a flat state."""

    def state_dict(self) -> dict[str, Any]:
        """Arrays, and values that JSON can hold, by name."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Go on from there."""


class Progress(NamedTuple):
    """What ``load_training`` returns: the number of steps taken, and the caller's own notes."""

    step: int
    extra: dict[str, Any]


def save_file(
    tensors: Mapping[str, Any], path: PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays by name into a safetensors file, as safetensors.numpy.save_file.

    Until the new file is safely on the disk an old one of that name stays as it was; a half-written
    one is removed if an error is raised.  A killed process leaves a hidden ``.name.….tmp`` beside
    it, which a later save removes.

    Args:
        tensors: Tensors or arrays of any backend, memory layout and byte order; 0-d and empty ones
            too.  Arrays that share memory are written once for each name.
        path: the file; its folder must exist.  A symbolic link stays one.
        metadata: text by name, kept in the header.

    Raises:
        TypeError: a value is not an array or has a dtype that the format lacks, or a name or a
            piece of metadata is not a string.
        ValueError: an array is called ``__metadata__``, the format's own name.
        OSError: the file cannot be written; names it.
        ImportError: safetensors is not installed.
    """
    hosts = {name: _host(name, value) for name, value in tensors.items()}
    texts = dict(metadata or {})
    for key, text in texts.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(
                f"metadata are strings by name, got {key!r}: {text!r:.40}: use json.dumps"
            )
    _write(path, _safetensors().numpy.save(hosts, texts or None))


def load_file(path: PathLike) -> dict[str, Array]:
    """The arrays of a safetensors file by name, as safetensors.numpy.load_file.

    They are plain arrays of the current backend, which may be written to.  NumPy has no bfloat16:
    such arrays come as float32, which holds the same numbers.

    Raises:
        OSError: the file cannot be read (missing, a folder, …); names it.
        ValueError: it is truncated, damaged, of another format, or holds a dtype that NumPy lacks
            (the 8-bit floats); names it.
        ImportError: safetensors is not installed.
    """
    return _read(path)[0]


def load_metadata(path: PathLike) -> dict[str, str]:
    """The metadata of a safetensors file; raises as ``load_file``."""
    return _read(path)[1]


def save_training(
    path: PathLike,
    model: Stateful,
    optimizer: Stateful | None = None,
    *,
    step: int = 0,
    rngs: Mapping[str, Rng] | None = None,
    schedule: Stateful | None = None,
    ema: Stateful | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write all that a run needs to continue with the same bits, as safely as ``save_file``.

    Arrays are called ``model.…``, ``optimizer.…`` and ``ema.…``; numbers stand as JSON in the
    metadata.  The default generator and those that are attributes of the model's modules (dropout)
    are always among it.

    Args:
        path: one file; the previous state in it is replaced only by a whole new one.
        model, optimizer, schedule, ema: whatever has ``state_dict`` and ``load_state_dict``.
        step: how many steps have been taken.
        rngs: the other generators of the run by name, such as the one that draws batches.
        extra: notes of the caller that JSON can hold; it turns tuples into lists and keys into
            strings.

    Raises:
        TypeError: JSON cannot hold ``extra`` or a part of the state.
        Otherwise as ``save_file``.
    """
    arrays: dict[str, Any] = {}
    notes: dict[str, Any] = {
        "step": step,
        "extra": dict(extra or {}),
        "default_rng": default_rng().state_dict(),
        "model_rngs": {name: rng.state_dict() for name, rng in _generators(model)},
        "rngs": {name: rng.state_dict() for name, rng in (rngs or {}).items()},
    }
    for part, owner in _parts(model, optimizer, schedule, ema):
        notes[part] = {}
        for name, value in owner.state_dict().items():
            if hasattr(value, "dtype"):
                arrays[f"{part}.{name}"] = value
            else:
                notes[part][name] = value
    try:
        text = json.dumps(notes)
    except (TypeError, ValueError) as problem:
        raise TypeError(
            f"a training state holds arrays and what JSON can hold, but {problem}: convert NumPy "
            "numbers in `extra` with int() or float()"
        ) from None
    save_file(arrays, path, {TRAINING: text})


def load_training(
    path: PathLike,
    model: Stateful,
    optimizer: Stateful | None = None,
    *,
    rngs: Mapping[str, Rng] | None = None,
    schedule: Stateful | None = None,
    ema: Stateful | None = None,
) -> Progress:
    """Restore, in place, everything that is given to what it was at ``save_training``.

    The default generator and those inside the model are restored too.  What is not given is not:
    the model alone serves to evaluate a checkpoint.  What was restored before an error stays so.

    Raises:
        ValueError: the file is no training state, holds none of something that is given, or
            something does not fit; names the file.
        Otherwise as ``load_file``.
    """
    tensors, metadata = _read(path)
    if TRAINING not in metadata:
        raise ValueError(
            f"{path} holds arrays but no training state: read it with load_file, or give the file "
            "that save_training wrote"
        )
    try:
        notes = json.loads(metadata[TRAINING])
        progress = Progress(int(notes["step"]), dict(notes["extra"]))
        for part, owner in _parts(model, optimizer, schedule, ema):
            if part not in notes:
                raise ValueError(f"it was saved without {part}=")
            start = f"{part}."
            state = {n.removeprefix(start): a for n, a in tensors.items() if n.startswith(start)}
            owner.load_state_dict({**state, **notes[part]})
        default_rng().load_state_dict(notes["default_rng"])
        _restore(dict(_generators(model)), notes["model_rngs"])
        if rngs is not None:
            _restore(rngs, notes["rngs"])
    except UNFIT as problem:
        raise ValueError(f"{path} does not fit this run: {problem}") from problem
    return progress


def _parts(
    model: Stateful, optimizer: Stateful | None, schedule: Stateful | None, ema: Stateful | None
) -> list[tuple[str, Stateful]]:
    # the optimiser stands before the schedule, which writes the optimiser's learning rates
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    return [(name, owner) for name, owner in parts.items() if owner is not None]


def _generators(model: Any) -> Iterator[tuple[str, Rng]]:
    """The generators that are attributes of the modules inside a model."""
    for path, module in model.named_modules() if hasattr(model, "named_modules") else ():
        for name, value in vars(module).items():
            if isinstance(value, Rng):
                yield f"{path}.{name}", value


def _restore(rngs: Mapping[str, Rng], states: dict[str, Any]) -> None:
    if rngs.keys() != states.keys():
        raise ValueError(f"it holds generators {sorted(states)}, wanted are {sorted(rngs)}")
    for name, rng in rngs.items():
        rng.load_state_dict(states[name])


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as missing:
        raise ImportError(
            f"saving and loading needs safetensors: pip install 'mini-nn[io]' ({missing})"
        ) from None
    return safetensors


def _host(name: Any, value: Any) -> Any:
    """The array as the format wants it: on the host, C-contiguous, little-endian."""
    if not isinstance(name, str):
        raise TypeError(f"arrays are saved under strings, got {name!r}")
    if name == "__metadata__":
        raise ValueError("'__metadata__' is the format's own name: call the array something else")
    if not isinstance(value, Tensor) and not hasattr(value, "dtype"):
        raise TypeError(f"{name!r} is a {type(value).__name__}, not an array: use mini_nn.tensor")
    x = backend.to_host(data_of(value))
    wanted = x.dtype.newbyteorder("<")
    if wanted not in [np.dtype(code) for code in DTYPES.values()]:
        raise TypeError(
            f"{name!r} has dtype {x.dtype}, which safetensors cannot hold: convert it with "
            "astype to float32, float64, float16, an integer or bool"
        )
    return np.asarray(x, dtype=wanted, order="C")  # ascontiguousarray would make 0-d arrays 1-d


def _write(path: PathLike, data: bytes) -> None:
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException as failure:  # also an interrupt: no half-written file is left behind
        with contextlib.suppress(OSError):
            aside.unlink()
        if not isinstance(failure, OSError):
            raise
        raise OSError(
            failure.errno,
            f"cannot save here ({failure.strerror}); give a file in a folder that exists and may "
            "be written to, on a disk with space left",
            os.fspath(path),
        ) from failure
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is flushed with it
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > STALE:
                stale.unlink()


def _read(path: PathLike) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays and the metadata of a file, all of it checked by safetensors first."""
    package = _safetensors()
    data = Path(path).read_bytes()
    try:
        entries = package.deserialize(data)
    except package.SafetensorError as problem:
        raise ValueError(
            f"{path} is not a whole safetensors file ({problem}): it was cut short or damaged, "
            "so copy or download it again, or is of another format, so convert it where it was made"
        ) from None
    xp = backend.current().xp
    arrays = {name: xp.asarray(_array(path, name, entry)) for name, entry in entries}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return arrays, header.get("__metadata__") or {}


def _array(path: PathLike, name: str, entry: dict[str, Any]) -> Any:
    code, shape, data = entry["dtype"], entry["shape"], entry["data"]
    if code == "BF16":  # the upper half of a float32
        upper = np.frombuffer(data, "<u2").astype("<u4")
        return (upper << 16).view("<f4").reshape(shape)
    if code not in DTYPES:
        raise ValueError(
            f"{path} holds {name!r} as {code}, which NumPy lacks: convert it to float32 or float16 "
            "where it was made"
        )
    if code == "BOOL":  # a byte that is neither 0 nor 1 would be a boolean that equals neither
        return (np.frombuffer(data, "u1") != 0).reshape(shape)
    return np.frombuffer(data, DTYPES[code]).reshape(shape)
