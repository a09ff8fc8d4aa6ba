"""Optimisers, and the learning rate as a function of the step alone."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scaling.train.settings import OptimSettings


def learning_rate(step: int, steps: int, optim: OptimSettings) -> float:
    """The rate of optimiser step `step`, counted from 1, of `steps`.

    Rises linearly over the first warmup_steps to lr, then follows a cosine down to
    lr · final_lr_ratio at the last step, or stays.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
    fall = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return optim.lr * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * fall)


def optimizer_maker(optim: OptimSettings) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """Makes the optimiser once the parameters are where they stay."""
    options: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if optim.name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, **options)
    return lambda parameters: torch.optim.AdamW(parameters, betas=optim.betas, **options)
