"""Makes nn.safetensors: what torch.nn and torch.nn.functional answer, in float64.

``python -m tests.golden.make_nn`` (needs torch) rewrites the file beside this script.  The file
describes itself: its metadata hold the tables ``calls`` (of functions), ``layers`` and
``signatures`` as JSON, so the tests need neither torch nor this script.

For call number i the arrays are

    i.in.NAME      an argument, as it was passed
    i.after.NAME   the argument afterwards, if the call changed it (running statistics)
    i.out          the result y
    i.grad.NAME    ∂⟨c, y⟩/∂NAME with the cotangent c = ``wave(y.shape)``
    i.grad2.NAME   ∂(Σ ⟨wave, grad.OTHER⟩)/∂NAME: one product with the Hessian

for each NAME among the differentiated arguments.  For layer number i they are

    layer.i.before.NAME  its state, set to numbers without pattern
    layer.i.x.K          the inputs, one after the other
    layer.i.train.K      the outputs in training
    layer.i.eval.K       the outputs in evaluation, after all of training
    layer.i.after.NAME   the state then, where it has changed
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

_rng = np.random.default_rng(20)


def wave(shape: tuple[int, ...]) -> Any:
    """Numbers without pattern that need not be stored."""
    return np.cos(0.7 * np.arange(int(np.prod(shape))) + 0.3).reshape(shape)


def normal(*shape: int) -> Any:
    return np.round(_rng.standard_normal(shape), 3)


def unit(*shape: int) -> Any:
    return np.round(_rng.uniform(0.05, 0.95, shape), 3)


def distribution(*shape: int) -> Any:
    p = _rng.uniform(0.1, 1.0, shape)
    return p / p.sum(axis=1, keepdims=True)


def call(
    function: str,
    *,
    constant: tuple[str, ...] = (),
    order: int = 2,
    rtol: float = 1e-11,
    **arguments: Any,
) -> Any:
    """One row of the table; floating-point arrays are differentiated unless named ``constant``."""
    arrays = {name: a for name, a in arguments.items() if isinstance(a, np.ndarray)}
    options = {name: a for name, a in arguments.items() if name not in arrays}
    inputs = [n for n, a in arrays.items() if a.dtype.kind == "f" and n not in constant]
    row = {"function": function, "options": options, "inputs": inputs, "order": order, "rtol": rtol}
    return row, arrays


KINKS = np.array([-30.0, -1.5, -1.0, -0.25, 0.0, 0.25, 1.0, 1.5, 30.0])
LABELS = np.array([2, 0, -100, 1])
FAR = np.array([[800.0, -800.0, 3.0], [-1e4, 1e4, 0.0]])
CHANNELS = {"weight": normal(4), "bias": normal(4)}
IMAGES = normal(2, 4, 3, 3)
QUERIES = {"query": normal(2, 3, 2), "key": normal(2, 4, 2), "value": normal(2, 4, 3)}
ALLOWED = np.array([[True, False, True, True], [False, True, False, False], [True] * 4])


def running() -> dict[str, Any]:
    return {
        "running_mean": np.array([0.1, -0.2, 0.3, 0.0]),
        "running_var": np.array([1.0, 0.5, 2.0, 1.5]),
        "constant": ("running_mean", "running_var"),
    }


def table() -> list[Any]:
    calls = [
        call(name, input=KINKS)
        for name in ("relu", "silu", "mish", "sigmoid", "tanh", "logsigmoid", "hardtanh")
    ]
    calls += [
        call("hardtanh", input=KINKS, min_val=-0.5, max_val=2.0),
        call("gelu", input=KINKS),
        call("gelu", input=KINKS, approximate="tanh"),
        # at 0 itself torch's second derivative of elu is not that of its first
        call("elu", input=KINKS, order=1),
        call("elu", input=KINKS[KINKS != 0], alpha=1.3),
        call("selu", input=KINKS, order=1),
        call("selu", input=KINKS[KINKS != 0]),
        call("leaky_relu", input=KINKS),
        call("leaky_relu", input=KINKS, negative_slope=0.2),
        call("softplus", input=KINKS),
        call("softplus", input=KINKS, beta=2.0, threshold=2.5),
        call("glu", input=normal(2, 4, 3), dim=1),
        call("softmax", input=normal(2, 4, 3), dim=1),
        call("softmax", input=FAR, dim=-1),
        call("log_softmax", input=normal(2, 4, 3), dim=0),
        call("log_softmax", input=FAR, dim=-1),
        call("linear", input=normal(2, 3, 4), weight=normal(5, 4), bias=normal(5)),
        call("embedding", input=np.array([[1, 0, 3], [1, 4, 1]]), weight=normal(5, 2)),
        call(
            "embedding", input=np.array([[1, 0, 3], [1, 4, 1]]), weight=normal(5, 2), padding_idx=-4
        ),
        call("one_hot", tensor=np.array([[1, 0], [3, 1]]), num_classes=5),
        call("one_hot", tensor=np.array([[1, 0], [3, 1]])),
        # attention
        call("scaled_dot_product_attention", **QUERIES),
        call("scaled_dot_product_attention", **QUERIES, attn_mask=ALLOWED, scale=0.3),
        call("scaled_dot_product_attention", **QUERIES, attn_mask=normal(3, 4)),
        call("scaled_dot_product_attention", **QUERIES, is_causal=True),
        call(
            "scaled_dot_product_attention",
            query=normal(1, 4, 3, 2),
            key=normal(1, 2, 3, 2),
            value=normal(1, 2, 3, 2),
            enable_gqa=True,
        ),
        # normalisation
        call("layer_norm", input=normal(3, 4), normalized_shape=[4], **CHANNELS),
        call("layer_norm", input=normal(2, 2, 3), normalized_shape=[2, 3], eps=0.1),
        call("layer_norm", input=normal(2, 2, 3), normalized_shape=[2, 3], weight=normal(2, 3)),
        call("rms_norm", input=normal(3, 4), normalized_shape=[4], weight=normal(4)),
        call("rms_norm", input=normal(2, 2, 3), normalized_shape=[2, 3], eps=0.1),
        call("batch_norm", input=IMAGES, training=True, **CHANNELS, **running()),
        call("batch_norm", input=normal(3, 4), training=True, momentum=0.3, **running()),
        call("batch_norm", input=IMAGES, **CHANNELS, **running(), eps=0.01),
        call("group_norm", input=IMAGES, num_groups=2, **CHANNELS),
        call("group_norm", input=normal(3, 4), num_groups=2),
        call("instance_norm", input=IMAGES, **CHANNELS),
        call("instance_norm", input=IMAGES, **running(), momentum=0.2),
        call("instance_norm", input=IMAGES, **running(), use_input_stats=False),
        # convolution and pooling
        call("conv1d", input=normal(2, 2, 6), weight=normal(3, 2, 3), bias=normal(3), padding=1),
        call("conv1d", input=normal(2, 2, 6), weight=normal(4, 1, 2), stride=2, groups=2),
        call("conv2d", input=normal(2, 2, 5, 4), weight=normal(3, 2, 3, 2), bias=normal(3)),
        call(
            "conv2d",
            input=normal(2, 2, 5, 6),
            weight=normal(4, 1, 2, 3),
            stride=[2, 1],
            padding=[1, 2],
            dilation=[1, 2],
            groups=2,
        ),
        call("conv2d", input=normal(1, 2, 3, 4), weight=normal(2, 2, 3, 2), padding="same"),
        call("conv_transpose2d", input=normal(2, 2, 3, 2), weight=normal(2, 3, 2, 3)),
        call(
            "conv_transpose2d",
            input=normal(1, 2, 3, 3),
            weight=normal(2, 2, 3, 2),
            bias=normal(4),
            stride=2,
            padding=1,
            output_padding=1,
            groups=2,
            dilation=[1, 2],
        ),
        call("unfold", input=normal(2, 2, 4, 3), kernel_size=[2, 3], padding=1, stride=[2, 1]),
        call("unfold", input=normal(1, 1, 5, 4), kernel_size=2, dilation=2),
        call("fold", input=normal(1, 8, 6), output_size=[4, 3], kernel_size=2),
        call("fold", input=normal(1, 4, 6), output_size=[4, 3], kernel_size=2, padding=1, stride=2),
        call("avg_pool2d", input=normal(1, 2, 5, 4), kernel_size=2),
        call("avg_pool2d", input=normal(1, 2, 5, 4), kernel_size=3, stride=2, padding=1),
        call(
            "avg_pool2d",
            input=normal(1, 2, 5, 4),
            kernel_size=[3, 2],
            stride=2,
            padding=1,
            ceil_mode=True,
            count_include_pad=False,
        ),
        call("max_pool2d", input=normal(1, 2, 5, 4), kernel_size=2),
        call("max_pool2d", input=normal(1, 2, 5, 6), kernel_size=[3, 2], stride=2, padding=1),
        call("max_pool2d", input=normal(1, 2, 6, 6), kernel_size=2, dilation=2, ceil_mode=True),
        call("adaptive_avg_pool2d", input=normal(2, 2, 5, 4), output_size=[3, 2]),
        call("adaptive_avg_pool2d", input=normal(2, 2, 5, 4), output_size=1),
        # borders and resolution
        call("pad", input=normal(2, 3), pad=[1, 2, 0, 1], value=0.5),
        call("pad", input=normal(3, 4), pad=[-1, 1, 1, -2]),
        call("pad", input=normal(1, 2, 4), pad=[3, 2], mode="reflect"),
        call("pad", input=normal(1, 1, 3, 2), pad=[1, 1, 2, 0], mode="reflect"),
        call("pad", input=normal(1, 1, 3, 2), pad=[1, 3, 2, 0], mode="replicate"),
        call("pad", input=normal(1, 1, 3, 2), pad=[1, 2, 3, 0], mode="circular"),
        call("interpolate", input=normal(1, 2, 3, 2), size=[5, 3]),
        call("interpolate", input=normal(1, 1, 4, 5), scale_factor=0.6),
        call("interpolate", input=normal(1, 1, 3, 2), size=[5, 3], mode="bilinear"),
        call("interpolate", input=normal(1, 1, 4, 5), scale_factor=[1.7, 0.5], mode="bilinear"),
        call("interpolate", input=normal(1, 1, 3, 4), size=7, mode="bilinear", align_corners=True),
        call("pixel_shuffle", input=normal(1, 8, 2, 1), upscale_factor=2),
        # losses of classes
        call("cross_entropy", input=normal(4, 3), target=LABELS),
        call("cross_entropy", input=normal(3), target=np.array(1)),
        call("cross_entropy", input=FAR, target=np.array([1, 2]), reduction="none"),
        call("cross_entropy", input=normal(2, 3, 2, 2), target=np.array([[[0, 2], [1, 1]]] * 2)),
        call("cross_entropy", input=normal(4, 3), target=LABELS % 3, ignore_index=1),
        call("cross_entropy", input=normal(4, 3), target=LABELS, reduction="sum"),
        call("cross_entropy", input=normal(4, 3), target=LABELS, label_smoothing=0.2),
        call("cross_entropy", input=normal(2, 3), target=np.array([-100, -100])),
        call("cross_entropy", input=normal(2, 3), target=np.array([-100, -100]), reduction="sum"),
        call("cross_entropy", input=normal(0, 3), target=np.zeros(0, "int64")),
    ]
    weight = {"weight": np.array([0.5, 2.0, 1.25]), "constant": ("weight",)}
    spread = {"input": normal(2, 3, 2), "target": np.array([[0, 2], [-100, 1]])}
    calls += [
        call("cross_entropy", **spread, **weight, reduction=how, label_smoothing=smooth)
        for how, smooth in (("mean", 0.0), ("mean", 0.3), ("sum", 0.3), ("none", 0.3))
    ]
    calls += [
        call("cross_entropy", input=normal(3, 4), target=distribution(3, 4)),
        call("cross_entropy", input=normal(4), target=np.array([0.1, 0.2, 0.3, 0.4])),
        call(
            "cross_entropy",
            input=normal(2, 3, 2),
            target=distribution(2, 3, 2),
            label_smoothing=0.1,
            **weight,
        ),
        call("nll_loss", input=normal(4, 3), target=LABELS),
        call("nll_loss", **spread, **weight),
        call("nll_loss", **spread, **weight, reduction="none"),
        # losses of numbers
        call("mse_loss", input=normal(2, 3), target=normal(2, 3)),
        call("mse_loss", input=normal(0, 3), target=normal(0, 3)),
        call("l1_loss", input=KINKS, target=np.zeros(9), reduction="sum"),
        call("smooth_l1_loss", input=KINKS, target=np.zeros(9)),
        call("smooth_l1_loss", input=KINKS, target=np.zeros(9), beta=0.25, reduction="none"),
        call("smooth_l1_loss", input=KINKS, target=np.zeros(9), beta=0.0),
        call("huber_loss", input=KINKS, target=np.zeros(9), delta=0.25),
        call("binary_cross_entropy_with_logits", input=KINKS * 10, target=unit(9)),
        call(
            "binary_cross_entropy_with_logits",
            input=normal(2, 3),
            target=unit(2, 3),
            weight=unit(3),
            pos_weight=unit(3),
            constant=("weight", "pos_weight"),
        ),
        # torch guards these by an ε that is rounded to float32, and added where it need not be
        call(
            "binary_cross_entropy",
            rtol=1e-8,
            input=unit(2, 3),
            target=unit(2, 3),
            weight=unit(3),
            constant=("weight",),
        ),
        call(
            "binary_cross_entropy",
            input=np.array([0.0, 0.0, 1.0, 1.0]),
            target=np.array([0.0, 1.0, 0.0, 1.0]),
            constant=("target",),
            order=1,
            rtol=1e-8,
            reduction="none",
        ),
        call("kl_div", input=normal(2, 3), target=distribution(2, 3), reduction="batchmean"),
        call("kl_div", input=normal(2, 3), target=normal(2, 3), log_target=True),
        call(
            "kl_div",
            input=normal(2, 2),
            target=np.array([[0.0, 1.0], [0.5, 0.5]]),
            constant=("target",),
            reduction="none",
        ),
        # directions
        call("normalize", input=normal(3, 4)),
        call("normalize", input=normal(2, 3, 2), p=1.0, dim=-1),
        call("normalize", input=normal(3, 4), p=3.0, dim=0),
        call("normalize", input=np.array([[0.0, 0.0], [3.0, -4.0]]), order=1),
        call("cosine_similarity", x1=normal(3, 4), x2=normal(3, 4)),
        call("cosine_similarity", x1=normal(2, 3, 2), x2=normal(3, 2), dim=-1),
        call("cosine_similarity", x1=np.array([[0.0, 0.0], [3.0, -4.0]]), x2=normal(2, 2), order=1),
    ]
    return calls


def answer(row: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """torch's answer to one call."""
    import torch

    tensors = {
        name: torch.from_numpy(a.copy()).requires_grad_(name in row["inputs"])
        for name, a in arrays.items()
    }
    first, *others = tensors  # the first by position: one_hot's has another name than it says
    named = {name: tensors[name] for name in others}
    y = getattr(torch.nn.functional, row["function"])(tensors[first], **named, **row["options"])
    found = {f"in.{n}": a for n, a in arrays.items()}
    found["out"] = y.detach().numpy()
    for name, before in arrays.items():
        after = tensors[name].detach().numpy()
        if not np.array_equal(before, after):
            found[f"after.{name}"] = after
    inputs = [tensors[name] for name in row["inputs"]]
    if not inputs:
        return found
    options: dict[str, Any] = {"create_graph": True, "materialize_grads": True}
    grads = torch.autograd.grad(y, inputs, torch.from_numpy(wave(y.shape)), **options)
    found |= {f"grad.{n}": g.detach().numpy() for n, g in zip(row["inputs"], grads, strict=True)}
    if row["order"] < 2:
        return found
    slope = sum((g * torch.from_numpy(wave(g.shape))).sum() for g in grads)
    seconds = [torch.zeros_like(x) for x in inputs]
    if slope.requires_grad:
        seconds = torch.autograd.grad(slope, inputs, materialize_grads=True, allow_unused=True)
    return found | {
        f"grad2.{n}": g.numpy(force=True) for n, g in zip(row["inputs"], seconds, strict=True)
    }


UNASKED = ("alpha_dropout", "avg_pool1d", "conv_transpose1d", "dropout", "max_pool1d")
LOSSES = ("BCEWithLogitsLoss", "CrossEntropyLoss", "MSELoss", "SmoothL1Loss")


def layers() -> list[Any]:
    """Class, arguments, keyword arguments, and the inputs of each call."""
    images = [normal(2, 4, 3, 3), normal(3, 4, 3, 3)]
    x = [KINKS]
    numbers = [normal(2, 3), normal(2, 3)]
    bare = {"affine": False, "track_running_stats": False}
    return [
        ("Linear", [4, 3], {}, [normal(2, 2, 4)]),
        ("Linear", [4, 3], {"bias": False}, [normal(4)]),
        ("Embedding", [5, 2], {}, [np.array([[1, 4, 0]])]),
        ("Embedding", [5, 2], {"padding_idx": -2}, [np.array([3, 1])]),
        ("LayerNorm", [4], {}, [normal(3, 4)]),
        ("LayerNorm", [[2, 3]], {"eps": 0.1, "bias": False}, [normal(2, 2, 3)]),
        ("LayerNorm", [4], {"elementwise_affine": False}, [normal(3, 4)]),
        ("RMSNorm", [4], {}, [normal(3, 4)]),
        ("RMSNorm", [[2, 3]], {"eps": 0.1, "elementwise_affine": False}, [normal(2, 2, 3)]),
        ("BatchNorm1d", [4], {}, [normal(3, 4), normal(5, 4)]),
        ("BatchNorm1d", [4], {"momentum": None}, [normal(3, 4), normal(2, 4, 3), normal(5, 4)]),
        ("BatchNorm2d", [4], {"eps": 0.1, "momentum": 0.3}, images),
        ("BatchNorm2d", [4], bare, images),
        ("GroupNorm", [2, 4], {}, images),
        ("GroupNorm", [4, 4], {"eps": 0.1, "affine": False}, images),
        ("InstanceNorm2d", [4], {}, images),
        ("InstanceNorm2d", [4], {"affine": True, "track_running_stats": True}, images),
        ("Conv1d", [2, 4, 3], {"padding": 1}, [normal(1, 2, 5)]),
        ("Conv2d", [2, 4, [2, 3]], {"stride": 2, "padding": [1, 2]}, [normal(1, 2, 4, 3)]),
        ("Conv2d", [4, 4, 2], {"groups": 4, "bias": False}, images[:1]),
        (
            "ConvTranspose2d",
            [4, 6, 3],
            {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
            [normal(1, 4, 2, 3)],
        ),
        ("Flatten", [], {}, images[:1]),
        ("Flatten", [-2], {}, images[:1]),
        ("Identity", [], {}, x),
        ("ReLU", [], {}, x),
        ("GELU", [], {"approximate": "tanh"}, x),
        ("SiLU", [], {}, x),
        ("Tanh", [], {}, x),
        ("Sigmoid", [], {}, x),
        ("ELU", [], {"alpha": 0.5}, x),
        ("SELU", [], {}, x),
        ("LeakyReLU", [], {"negative_slope": 0.3}, x),
        ("Softplus", [], {"beta": 2.0, "threshold": 1.0}, x),
        ("Softmax", [], {"dim": 0}, numbers[:1]),
        ("LogSoftmax", [], {"dim": 1}, numbers[:1]),
        ("MaxPool2d", [2], {"padding": 1}, images[:1]),
        ("MaxPool2d", [2, 1], {"ceil_mode": True, "dilation": 2}, images[:1]),
        ("AvgPool2d", [2], {}, images[:1]),
        ("AvgPool2d", [[3, 2], 2], {"padding": 1, "count_include_pad": False}, images[:1]),
        ("AdaptiveAvgPool2d", [[2, None]], {}, images[:1]),
        ("Mish", [], {}, x),
    ]


def answer_of_layer(name: str, args: Any, options: Any, inputs: list[Any]) -> dict[str, Any]:
    """torch's answer to one layer."""
    import torch

    layer = getattr(torch.nn, name)(*args, **options).double()
    with torch.no_grad():
        for array in layer.state_dict().values():
            if array.dtype == torch.float64:
                array.copy_(torch.from_numpy(1.0 + 0.5 * wave(tuple(array.shape))))
    before = {k: a.numpy().copy() for k, a in layer.state_dict().items()}
    found = {f"before.{k}": a for k, a in before.items()}
    for mode in ("train", "eval"):
        layer.train(mode == "train")
        for k, x in enumerate(inputs):
            found[f"x.{k}"] = x
            found[f"{mode}.{k}"] = layer(torch.from_numpy(x)).detach().numpy()
    after = {k: a.numpy() for k, a in layer.state_dict().items()}
    changed = [k for k, a in after.items() if not np.array_equal(a, before[k])]
    return found | {f"after.{k}": after[k] for k in changed}


def signature(home: Any, name: str) -> list[Any]:
    """The names of the arguments and their defaults ("required" where there is none)."""
    thing = getattr(home, name)
    try:
        parameters = inspect.signature(thing).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if named or inspect.isclass(thing):
            required = inspect.Parameter.empty
            return [(p.name, "required" if p.default is required else p.default) for p in named]
    except ValueError:
        pass  # built in: the documentation says it
    stated = re.search(rf"^\s*{name}\((.*?)\)( ->|$)", thing.__doc__, re.S | re.M)
    assert stated, name
    arguments = ast.parse(f"def f({stated[1]}): pass").body[0].args  # type: ignore[attr-defined]
    defaults = ["required"] * (len(arguments.args) - len(arguments.defaults))
    defaults += [ast.literal_eval(default) for default in arguments.defaults]
    return list(zip([argument.arg for argument in arguments.args], defaults, strict=True))


def main() -> None:
    import safetensors.numpy
    import torch

    for enable in (
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ):
        enable(False)  # only attention's plain form has second derivatives
    rows, stored = [], {}
    for i, (row, arrays) in enumerate(table()):
        found = answer(row, arrays)
        rows.append(row)
        stored |= {f"{i}.{name}": np.asarray(a, order="C") for name, a in found.items()}
    made, names = layers(), []
    for i, row in enumerate(made):
        found = answer_of_layer(*row)
        names.append([n.removeprefix("before.") for n in found if n.startswith("before.")])
        stored |= {f"layer.{i}.{name}": np.asarray(a, order="C") for name, a in found.items()}
    functions = sorted({row["function"] for row in rows} | {*UNASKED})
    classes = sorted({name for name, *_ in made} | {"AlphaDropout", "Dropout", *LOSSES})
    signatures = {name: signature(torch.nn.functional, name) for name in functions}
    signatures |= {name: signature(torch.nn, name) for name in classes}
    metadata = {
        "calls": json.dumps(rows),
        "layers": json.dumps([(*row[:3], n) for row, n in zip(made, names, strict=True)]),
        "signatures": json.dumps(signatures),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    safetensors.numpy.save_file(stored, Path(__file__).with_name("nn.safetensors"), metadata)


if __name__ == "__main__":
    main()
