"""Optimizer, learning rate and averaged weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from coset.training.settings import OptimizerSettings, StageSettings


def make_optimizer(network: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW (I. Loshchilov, F. Hutter, 2019) with decay on the matrices of linear maps alone."""
    matrices = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear)}
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (id(p) in matrices) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, foreach=True)


def learning_rate(stage: StageSettings, step: int) -> float:
    """Rate of step 0, 1, ... of a stage: linear warm-up, then its schedule; of the step alone."""
    warmup = round(stage.warmup * stage.steps)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    if stage.schedule == "cosine":
        done = (step - warmup) / max(stage.steps - warmup, 1)
        factor = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        left = (stage.steps - step) / max(stage.decay * stage.steps, 1.0)
        factor = min(1.0, left)
    return stage.final_lr + (stage.lr - stage.final_lr) * factor


class AveragedWeights:
    """Exponential moving average of the weights, with a short memory at the start."""

    def __init__(self, weights: Iterable[Tensor], decay: float) -> None:
        """Start from the weights as they are."""
        self.decay = decay
        self.values = [weight.detach().clone() for weight in weights]

    def update(self, weights: Iterable[Tensor], step: int) -> None:
        """Move towards the weights after step 0, 1, ...: decay min(d, (1 + t)/(10 + t))."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        current = [weight.detach() for weight in weights]
        torch._foreach_lerp_(self.values, current, 1.0 - decay)
