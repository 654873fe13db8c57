"""Ways to wrap a branch F beside a residual stream x, and what each does to a deep stack.

A wrapper is called as ``wrapper(x, norm, branch, *context)`` and returns the next state;
``context`` goes to the branch after its input.  Whatever wraps the branches of
``models.gpt.Block`` is one of these: functions where nothing is kept, Modules, one for each branch,
where something is.  N stands for the norm that is handed over.

===============================  ==========================================  ==================
x + F(x)                         He et al. 2015, arXiv:1512.03385, eq. 1     ``plain``
N(x + F(x))                      Vaswani et al. 2017, arXiv:1706.03762, 3.1  ``post_norm``
x + F(N(x))                      Xiong et al. 2020, arXiv:2002.04745, tab.1  ``pre_norm``
x + N'(F(N(x)))                  Ding et al. 2021, CogView,                  ``Sandwich``
                                 arXiv:2105.13290, section 2 (Sandwich-LN)
N(α x + F(x))                    Wang et al. 2022, arXiv:2203.00555, 3       ``DeepNorm``
x + α F(x), α trained            De & Smith 2020, arXiv:2002.10444           ``SkipInit``
the same, from α = 0             Bachlechner et al. 2020, arXiv:2003.04887   ``ReZero``
x + min(1, t/T) F(x)             Su 2021, kexue.fm/archives/8620             ``ScheduledAlpha``
x + λ ⊙ F(N(x))                  Touvron et al. 2021, arXiv:2103.17239, 2    ``LayerScale``
x + s F(x + b) + b'              Zhang et al. 2019, arXiv:1901.09321, 3      ``Fixup``
N(ω ⊙ x + F(x))                  Liu et al. 2020, arXiv:2004.08249, 4        ``Admin``
x + ε F(N(x)), ε = 1/√branches   Su 2022, kexue.fm/archives/8994             ``SmallBranch``
===============================  ==========================================  ==================

At initialisation, with branches of unit variance: post-norm takes a share 1/√2 of everything older
with each branch, x_l = 2^(−l/2) x₀ + Σ_t 2^(−(l−t+1)/2) F_t, and so it does with the gradient on
its way past the branches; pre-norm weighs all of them alike, and the stream's second moment grows
as l + 1; a branch multiplied by 0 leaves the identity, whose Jacobian is exactly 1.

Not here: Sub-LN (Wang et al. 2022, arXiv:2210.06423, fig. 2) is ``pre_norm`` around a branch that
has a second norm inside, before its last weight, W₂ N'(f(W₁ N(x))), where ``Sandwich`` has it
after; it is the branch's business, such as the ``mlp`` of ``models.gpt.Block``.

Deviations: LayerScale, SmallBranch and Sandwich normalise with the norm that is handed over; the
scalar biases inside a branch of Fixup are the branch's own.  Scalars that start at 0 should have no
weight decay, which pulls them back to where nothing is learnt: ``decay_groups``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ..backend import Array, current
from .module import Module, Parameter
from .norm import LayerNorm

__all__ = [
    "Admin", "Branch", "DeepNorm", "Fixup", "LayerScale", "ReZero", "Residual", "Sandwich",
    "ScheduledAlpha", "SkipInit", "SmallBranch", "decay_groups", "plain", "post_norm", "pre_norm",
]  # fmt: skip

Branch = Callable[..., Any]


class Residual(Protocol):
    """What wraps a branch."""

    def __call__(self, x: Any, norm: Branch, branch: Branch, *context: Any) -> Any: ...


def plain(x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
    """x + F(x): no norm.

    With F linear and of unit gain, the second moments of stream and gradient double at each branch.
    """
    return x + branch(x, *context)


def post_norm(x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
    """N(x + F(x)): the first Transformer. Deep stacks need a warm-up to start at all.

    Past a branch of unit variance the gradient is multiplied by 1/√2.
    """
    return norm(x + branch(x, *context))


def pre_norm(x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
    """x + F(N(x)): GPT-2's way to wrap a branch. The stream needs one more norm at its end.

    Past a branch the gradient is untouched; through the l-th it is divided by the stream's √l.
    """
    return x + branch(norm(x), *context)


def _scalar(value: float) -> Parameter:
    return Parameter(current().xp.full((), value, "float32"))


def _vector(dim: int, value: float) -> Parameter:
    return Parameter(current().xp.full((dim,), value, "float32"))


class Sandwich(Module):
    """x + N'(F(N(x))): a second norm bounds what a branch may add.

    Past a branch the gradient is untouched; into it, it is divided by the branch's own size, so
    scaling the branch's last weight by c scales that weight's gradient by 1/c.

    Args:
        dim: the length of the last axis; N' is a ``LayerNorm`` over it.
        eps: of N'.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        self.norm = LayerNorm(dim, eps)

    def forward(self, x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
        """(…, dim) to the same."""
        return x + self.norm(branch(norm(x), *context))


class DeepNorm(Module):
    """N(α x + F(x)): post-norm with a stream that weighs more. Nothing is trained.

    Past a branch of variance v the gradient is multiplied by α/√(α² + v) at initialisation, close
    to 1.  LN(α x + F) = LN(x + F/α) only if the second's ε is ε/α².

    Args:
        alpha: α, see ``schemes.deepnorm_constants``, which also has the β of the branch's weights.

    Raises:
        ValueError: α is not positive.
    """

    def __init__(self, alpha: float) -> None:
        if not alpha > 0:
            raise ValueError(f"DeepNorm's alpha is positive, got {alpha}")
        self.alpha = alpha

    def forward(self, x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
        """Any shape that the branch and the norm keep."""
        return norm(self.alpha * x + branch(x, *context))


class SkipInit(Module):
    """x + α F(x) without a norm; α is a trained number.

    It comes from residual networks whose batch norms are taken out, where α starts at 0 or at a
    constant of at most 1/√branches.  If it starts at 0 the output is x bit for bit, its Jacobian
    the identity, the branch gets a gradient of 0, and α gets ⟨∂L/∂y, F(x)⟩.

    Args:
        alpha: where α starts.

    Attributes:
        alpha: the parameter, 0-d.
    """

    def __init__(self, alpha: float = 0.0) -> None:
        self.alpha = _scalar(alpha)

    def forward(self, x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
        """Any shape that the branch keeps; ``norm`` is not used."""
        return x + self.alpha * branch(x, *context)


class ReZero(SkipInit):
    """x + α F(x) without a norm, α trained and from 0 in every kind of network.

    The equation is ``SkipInit``'s; ReZero always starts as the identity, takes branches of any
    kind, and was shown on Transformers, whose layer norms it leaves out.
    """

    def __init__(self) -> None:
        super().__init__(0.0)


class ScheduledAlpha(Module):
    """x + α F(x) with α = min(1, t/T) after t calls of ``advance``: nothing to train, or to decay.

    At t = 0 the output is x and the branch gets a gradient of 0, so nothing is learnt until the
    first ``advance``; from step T on it is ``plain``, bit for bit.  Call ``advance`` after each
    step of the optimiser; one instance may wrap all branches of a model and is then advanced once.

    Args:
        steps: T, at least 1.

    Attributes:
        step: t, a buffer, so that a checkpoint goes on where it was.

    Raises:
        ValueError: T is below 1.
    """

    step: Array

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"ScheduledAlpha takes at least 1 step, got {steps}")
        self.steps = steps
        self.register_buffer("step", current().xp.zeros((), "int64"))

    def advance(self) -> None:
        """One optimiser step has been taken."""
        self.step[...] += 1

    def forward(self, x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
        """Any shape that the branch keeps; ``norm`` is not used."""
        # the quotient is float64: float16 has no number for a T above 65504
        alpha = (self.step / self.steps).clip(None, 1.0).astype(x.dtype)
        return x + alpha * branch(x, *context)


class LayerScale(Module):
    """x + λ ⊙ F(N(x)) with a trained weight for each channel that starts small.

    The branch's gradient is λ times what it would be at first, and λ's is the sum of ∂L/∂y ⊙ F over
    all axes but the last: unlike from 0, both learn from the first step.

    Args:
        dim: the length of the last axis.
        init: where λ starts: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond (their section 2).

    Attributes:
        gamma: λ (dim,).
    """

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        self.gamma = _vector(dim, init)

    def forward(self, x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
        """(…, dim) to the same."""
        return x + self.gamma * branch(norm(x), *context)


class Fixup(Module):
    """x + s F(x + b) + b': no norm; one multiplier and two biases, all numbers.

    The branch starts at 0 because its last layer does, see ``schemes.fixup_``, which scales the
    others by L^(−1/(2m−2)).  At first only that last layer and b' get a gradient, and not even
    these if the head is 0 too.  b' is the bias before what follows; those before the inner layers
    and activations are the branch's own.

    Attributes:
        scale: s, starts at 1.
        bias_in, bias_out: b and b', start at 0.
    """

    def __init__(self) -> None:
        self.scale = _scalar(1.0)
        self.bias_in = _scalar(0.0)
        self.bias_out = _scalar(0.0)

    def forward(self, x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
        """Any shape that the branch keeps; ``norm`` is not used."""
        return x + self.scale * branch(x + self.bias_in, *context) + self.bias_out


class Admin(Module):
    """N(ω ⊙ x + F(x)) with a trained weight of the stream for each channel.

    Past a branch of variance v the gradient is multiplied by ω/√(ω² + v) at initialisation; with
    ω² the variance of all that came before, the product over the branches is pre-norm's.

    Args:
        dim: the length of the last axis.
        omega: where ω starts; ``schemes.admin_`` measures it on data.

    Attributes:
        omega: ω (dim,).
    """

    def __init__(self, dim: int, omega: float = 1.0) -> None:
        self.omega = _vector(dim, omega)

    def forward(self, x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
        """(…, dim) to the same."""
        return norm(self.omega * x + branch(x, *context))


class SmallBranch(Module):
    """x + ε F(N(x)), ε = 1/√n for n branches, not trained.

    Second moments of stream and gradient grow by at most (1 + ε²)^n ≤ e if branches are independent
    of the stream.

    Args:
        branches: n, of the whole stack.

    Raises:
        ValueError: n is below 1.
    """

    def __init__(self, branches: int) -> None:
        if branches < 1:
            raise ValueError(
                f"SmallBranch takes the number of branches, at least 1, got {branches}"
            )
        self.epsilon = 1.0 / math.sqrt(branches)

    def forward(self, x: Any, norm: Branch, branch: Branch, *context: Any) -> Any:
        """Any shape that the branch and the norm keep."""
        return x + self.epsilon * branch(norm(x), *context)


def decay_groups(parameters: Iterable[Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weights of two axes or more decay; the rest does not.

    What starts at 0 and should leave it (ReZero's α, biases), or at 1 and should stay near it
    (gains), is not pulled to 0.

    Args:
        parameters: such as ``model.parameters()``.
        weight_decay: of parameters with two axes or more.

    Returns:
        Two groups; one of them may be empty.
    """
    parameters = [*parameters]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
