"""Optimisers, gradient clipping, learning-rate schedules and averages of parameters.

Names, argument order, defaults and formulas are torch.optim's.  A training step::

    optimizer = AdamW(model.parameters(), lr=3e-4)
    schedule = Schedule(optimizer, partial(warmup_cosine, warmup=100, total=5000))
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

Each optimiser has two forms: a function that is the equation (``sgd_step``, ``adam_step``,
``adamw_step``), to be read, and to be differentiated on Tensors; and a class that computes the same
in place, a block of elements at a time.
"""

from .adam import Adam, AdamW, adam_step, adamw_step
from .base import Optimizer
from .clip import clip_grad_norm_, clip_grad_value_
from .ema import EMA
from .schedule import LambdaLR, Schedule, noam, warmup_cosine
from .sgd import SGD, sgd_step

__all__ = [
    "EMA", "SGD", "Adam", "AdamW", "LambdaLR", "Optimizer", "Schedule", "adam_step",
    "adamw_step", "clip_grad_norm_", "clip_grad_value_", "noam", "sgd_step", "warmup_cosine",
]  # fmt: skip
