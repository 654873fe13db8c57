"""Makes vision_dcnv3.safetensors: what InternImage's reference form in PyTorch answers, in float64.

``python -m tests.golden.make_vision_dcnv3 CHECKOUT`` (needs torch) rewrites the file beside this
script; CHECKOUT is a work tree of the authors' repository InternImage (MIT licence), of which
``classification/ops_dcnv3/functions/dcnv3_func.py`` is run.  Each case is a prefix ``K.`` with
``in.NAME``, ``out`` and ``grad.NAME`` (of Σ cos(0.7 i + 0.3) outᵢ); the metadata has the options,
the versions, and the hash of the file that was run.

The reference pads height by ``pad_w`` and width by ``pad_h``; the cases have one padding for both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

# image, channels, kernel, stride, pad, dilation, groups, offset scale
CASES: list[Any] = [
    ((2, 5, 6), 4, (3, 3), 1, 1, 1, 2, 1.0),
    ((1, 6, 5), 6, (3, 3), 1, 2, 2, 3, 2.0),
    ((2, 7, 6), 4, (3, 3), 2, 1, 1, 1, 0.5),
    ((1, 6, 7), 4, (3, 1), 1, 1, 1, 2, 1.0),
]

_rng = np.random.default_rng(8)


def normal(*shape: int) -> Any:
    return np.round(_rng.standard_normal(shape), 3)


def wave(shape: tuple[int, ...]) -> Any:
    return np.cos(0.7 * np.arange(int(np.prod(shape))) + 0.3).reshape(shape)


def reference(path: Path) -> Any:
    """The authors' function, without the extension that its file imports."""
    for name in ("DCNv3", "pkg_resources"):
        sys.modules[name] = ModuleType(name)
    installed = SimpleNamespace(version="1.1")
    sys.modules["pkg_resources"].get_distribution = lambda name: installed  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("dcnv3_func", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dcnv3_core_pytorch


def main() -> None:
    import torch
    from safetensors.numpy import save_file

    torch.set_default_dtype(torch.float64)
    source = Path(sys.argv[1]) / "classification/ops_dcnv3/functions/dcnv3_func.py"
    f = reference(source)
    arrays: dict[str, Any] = {}
    for k, ((n, h, w), c, (kh, kw), stride, pad, dilation, groups, scale) in enumerate(CASES):
        height = (h + 2 * pad - dilation * (kh - 1) - 1) // stride + 1
        width = (w + 2 * pad - dilation * (kw - 1) - 1) // stride + 1
        places = groups * kh * kw
        inputs = {
            "input": normal(n, h, w, c),
            "offset": normal(n, height, width, 2 * places),
            "mask": np.round(_rng.uniform(size=(n, height, width, places)), 3),
        }
        leaves = {name: torch.tensor(x, requires_grad=True) for name, x in inputs.items()}
        out = f(*leaves.values(), kh, kw, stride, stride, pad, pad, dilation, dilation,
                groups, c // groups, scale, 0)  # fmt: skip
        (out * torch.tensor(wave(tuple(out.shape)))).sum().backward()
        arrays |= {f"{k}.in.{name}": x for name, x in inputs.items()}
        arrays |= {f"{k}.grad.{name}": leaf.grad.numpy() for name, leaf in leaves.items()}
        arrays[f"{k}.out"] = out.detach().numpy()
    names = ("kernel_size", "stride", "pad", "dilation", "group", "offset_scale")
    options = [dict(zip(names, case[2:], strict=True)) for case in CASES]
    path = Path(__file__).with_name("vision_dcnv3.safetensors")
    metadata = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "dcnv3_func.py": f"sha256 {hashlib.sha256(source.read_bytes()).hexdigest()}",
        "options": json.dumps(options),
    }
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, path, metadata)


if __name__ == "__main__":
    main()
