"""Makes attention_features.safetensors: random features of released code, for given projections.

``python tests/golden/make_attention_features.py FAST_TRANSFORMERS`` (needs torch, scikit-learn and
performer-pytorch) rewrites the file beside this script.  The argument is a clone of
idiap/fast-transformers (made with 2ad36b97), of which one file of plain torch is imported; the
metadata has the versions and the hash of that file.

    x                      (1, 2, 5, 4): batch, heads, positions, dimensions
    w                      (6, 4), the projection that everything below is given
    performer.query        softmax_kernel(x), normalised and stabilised as for queries
    performer.key          the same as for keys
    performer.relu, .gelu  generalized_kernel, likewise .bare without a projection
    fast.rbf               RandomFourierFeatures with softmax_temp = 1
    fast.smoothed          SmoothedRandomFourierFeatures of the same, smoothing = 1
    fast.favor             Favor with softmax_temp = 1/2
    fast.generalized       GeneralizedRandomFeatures, ReLU
    sklearn.{0, 1}         RBFSampler with gamma = 1/2 and all phases 0 or −π/2, of x's 10 rows
"""

from __future__ import annotations

import hashlib
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from performer_pytorch.performer_pytorch import generalized_kernel, softmax_kernel
from safetensors.torch import save_file
from sklearn.kernel_approximation import RBFSampler

FEATURES = 6


def performers(x: Any, w: Any) -> dict[str, Any]:
    return {
        "query": softmax_kernel(x, projection_matrix=w, is_query=True),
        "key": softmax_kernel(x, projection_matrix=w, is_query=False),
        "relu": generalized_kernel(x, projection_matrix=w),
        "gelu": generalized_kernel(x, projection_matrix=w, kernel_fn=torch.nn.GELU()),
        "bare": generalized_kernel(x, projection_matrix=None),
    }


def fasts(x: Any, w: Any, source: Path) -> dict[str, Any]:
    sys.path.insert(0, str(source.parents[1]))
    import feature_maps  # type: ignore[import-not-found]

    d = x.shape[-1]
    maps = {
        "rbf": feature_maps.RandomFourierFeatures(d, 2 * FEATURES, softmax_temp=1.0),
        "smoothed": feature_maps.SmoothedRandomFourierFeatures(
            d, 2 * FEATURES + 1, softmax_temp=1.0
        ),
        "favor": feature_maps.Favor(d, 2 * FEATURES, softmax_temp=0.5),
        "generalized": feature_maps.GeneralizedRandomFeatures(d, FEATURES),
    }
    for feature_map in maps.values():
        feature_map.omega = w.T
    return {name: feature_map(x) for name, feature_map in maps.items()}


def samplers(x: Any, w: Any) -> dict[str, Any]:
    rows, found = x.reshape(-1, x.shape[-1]).numpy(), {}
    for i, phase in enumerate((0.0, -0.5 * math.pi)):
        sampler = RBFSampler(gamma=0.5, n_components=FEATURES).fit(rows)
        sampler.random_weights_ = w.numpy().T
        sampler.random_offset_ = np.full(FEATURES, phase)
        found[str(i)] = torch.from_numpy(sampler.transform(rows))
    return found


def main() -> None:
    source = Path(sys.argv[1]) / "fast_transformers/feature_maps/fourier_features.py"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, w = torch.randn(1, 2, 5, 4), torch.randn(FEATURES, 4)
    parts = {
        "performer": performers(x, w),
        "fast": fasts(x, w, source),
        "sklearn": samplers(x, w),
    }
    arrays = {"x": x, "w": w}
    for part, found in parts.items():
        arrays |= {f"{part}.{name}": array.contiguous() for name, array in found.items()}
    metadata = {
        "torch": torch.__version__,
        "performer-pytorch": version("performer-pytorch"),
        "scikit-learn": version("scikit-learn"),
        "fourier_features.py": hashlib.sha256(source.read_bytes()).hexdigest(),
        "made_by": "tests/golden/make_attention_features.py",
    }
    target = Path(__file__).with_name("attention_features.safetensors")
    save_file(arrays, target, metadata=metadata)
    target.chmod(0o644)


if __name__ == "__main__":
    main()
