"""Makes init.safetensors: what torch.nn.init and the T5 of transformers answer.

``python tests/golden/make_init.py`` (needs torch and transformers) rewrites the file beside this
script.  Its metadata hold, as JSON:

    fans        [shape, fan_in, fan_out], …
    gains       [nonlinearity, param or null, gain], …
    laws        [function, arguments, shape, the numbers it gave to normal_ or uniform_], …
    signatures  for each function its parameters: [name, default], …
    t5          the config and for each weight the standard deviation that it is drawn with

The arrays ``dirac.SHAPE.GROUPS`` and ``eye.SHAPE`` are those of ``dirac_`` and ``eye_``.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import save_file
from torch.nn import init
from transformers.models.t5 import modeling_t5

SHAPES = [
    (3, 5), (5, 3), (1, 1), (7, 1), (8, 4, 3), (6, 2, 5), (16, 3, 3, 3), (4, 2, 1, 7),
    (2, 3, 2, 2, 4),
]  # fmt: skip
GAINS: list[tuple[str, float | None]] = [
    *((f"conv{kind}{n}d", None) for kind in ("", "_transpose") for n in (1, 2, 3)),
    *((name, None) for name in ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu")),
    ("leaky_relu", 0.0), ("leaky_relu", 0.2), ("leaky_relu", 5**0.5), ("leaky_relu", 1.0),
]  # fmt: skip
LAWS: list[tuple[str, dict[str, Any]]] = [
    ("xavier_normal_", {}), ("xavier_normal_", {"gain": 1.7}), ("xavier_uniform_", {"gain": 0.3}),
    ("kaiming_normal_", {}), ("kaiming_normal_", {"a": 0.5, "mode": "fan_out"}),
    ("kaiming_normal_", {"nonlinearity": "tanh"}), ("kaiming_uniform_", {"a": 5**0.5}),
    ("kaiming_uniform_", {"mode": "fan_out", "nonlinearity": "selu"}),
]  # fmt: skip
FUNCTIONS = [
    "calculate_gain", "constant_", "dirac_", "eye_", "kaiming_normal_", "kaiming_uniform_",
    "normal_", "ones_", "orthogonal_", "trunc_normal_", "uniform_", "xavier_normal_",
    "xavier_uniform_", "zeros_",
]  # fmt: skip
DIRACS = [((4, 3, 3), 1), ((6, 2, 3, 4), 3), ((3, 5, 2, 2), 1), ((4, 1, 1, 3, 2), 2)]
EYES = [(3, 3), (2, 4), (5, 2)]


def drawn(function: str, options: dict[str, Any], shape: tuple[int, ...]) -> list[float]:
    """The mean and std, or the bounds, that torch's function passes to the sampler."""
    seen: list[float] = []

    def note(_: Any, first: float, second: float, **rest: Any) -> None:
        seen.extend((first, second))

    with mock.patch.multiple(torch.Tensor, normal_=note, uniform_=note):
        getattr(init, function)(torch.empty(shape), **options)
    return seen


def t5() -> dict[str, Any]:
    """``_init_weights`` for widths that all differ, with the table of positions."""
    config = {"d_model": 6, "d_kv": 5, "num_heads": 3, "d_ff": 7, "num_layers": 1, "vocab_size": 11}
    stds: dict[int, float] = {}

    def note(tensor: Any, mean: float = 0.0, std: float = 1.0, **rest: Any) -> Any:
        stds[id(tensor)] = float(std)
        return tensor

    with mock.patch.object(modeling_t5.init, "normal_", note):
        model = transformers.T5Model(transformers.T5Config(**config))
        for module in reversed([*model.modules()]):  # parents last, as transformers does
            model._init_weights(module)
        named = {n: stds[id(p)] for n, p in model.named_parameters() if id(p) in stds}
    return {"config": config, "stds": named}


def signature(name: str) -> list[list[Any]]:
    parameters = inspect.signature(getattr(init, name)).parameters.values()
    return [
        [p.name, "required" if p.default is inspect.Parameter.empty else p.default]
        for p in parameters
    ]


def main() -> None:
    arrays = {
        f"dirac.{'x'.join(map(str, shape))}.{groups}": init.dirac_(torch.empty(shape), groups)
        for shape, groups in DIRACS
    }
    arrays |= {f"eye.{m}x{n}": init.eye_(torch.empty(m, n)) for m, n in EYES}
    fans = [[s, *init._calculate_fan_in_and_fan_out(torch.empty(s))] for s in SHAPES]
    answers = {
        "fans": fans,
        "gains": [[name, param, init.calculate_gain(name, param)] for name, param in GAINS],
        "laws": [[f, o, s, drawn(f, o, s)] for f, o in LAWS for s in SHAPES],
        "signatures": {name: signature(name) for name in FUNCTIONS},
        "t5": t5(),
    }
    metadata = {name: json.dumps(answer) for name, answer in answers.items()}
    metadata |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "made_by": "tests/golden/make_init.py",
    }
    target = Path(__file__).with_name("init.safetensors")
    save_file(arrays, target, metadata=metadata)
    target.chmod(0o644)


if __name__ == "__main__":
    main()
