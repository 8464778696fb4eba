"""Optimizer, learning rate and averaged weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from coset.pet.attention import Attention, FeedForward
from coset.training.parallel import Ranks, has_bfloat16, sum_over_ranks
from coset.training.settings import OptimizerSettings, StageSettings

SMALLEST_HIDDEN = 8
MOST_ROWS = 128
"""Of a map that Muon makes orthogonal as one. The work is rows² x columns: blocks of 96 rows of the
node network cost a tenth of a step of coset-xs-0, all 384 half of one, and learn as well."""


class Optimizer:
    """AdamW (I. Loshchilov, F. Hutter, 2019), or Muon on the hidden matrices and AdamW elsewhere.

    Decay acts on the matrices of linear maps alone. Hidden are those of the trunk: embeddings and
    heads stay with AdamW.
    """

    def __init__(self, network: nn.Module, settings: OptimizerSettings, ranks: Ranks) -> None:
        """No moments yet."""
        self.names: dict[Tensor, str] = {p: name for name, p in network.named_parameters()}
        blocks = hidden_matrices(network) if settings.name == "muon" else {}
        matrices = {m.weight for m in network.modules() if isinstance(m, nn.Linear)}
        rest = [p for p in self.names if p not in blocks]
        groups = [
            {"params": [p for p in rest if (p in matrices) == decayed], "weight_decay": decay}
            for decayed, decay in ((True, settings.weight_decay), (False, 0.0))
        ]
        adamw = torch.optim.AdamW(
            groups, lr=0.0, betas=settings.betas, eps=settings.eps, foreach=True
        )
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if blocks:
            self.parts.append(Muon(blocks, ranks, weight_decay=settings.weight_decay))

    def step(self, lr: float) -> None:
        """Move every parameter that has a gradient."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def forget(self) -> None:
        """Start again without moments."""
        for part in self.parts:
            part.state.clear()

    def moments(self) -> dict[str, Tensor]:
        """All that it remembers, by `name of parameter:name of moment`."""
        return {
            f"{self.names[parameter]}:{moment}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for moment, value in state.items()
        }

    def remember(self, moments: dict[str, Tensor]) -> None:
        """Take up what `moments` told, in memory of its own."""
        owners = {p: part for part in self.parts for g in part.param_groups for p in g["params"]}
        parameters = {name: p for p, name in self.names.items()}
        for key, value in moments.items():
            name, _, moment = key.rpartition(":")
            parameter = parameters[name]
            device = "cpu" if moment == "step" else parameter.device
            state = owners[parameter].state[parameter]
            state[moment] = value.to(device, copy=True)


def hidden_matrices(network: nn.Module) -> dict[Tensor, int]:
    """Matrices of the trunk, and into how many blocks of rows each is divided.

    Query, key and value share a matrix, as do value and gate of a gated layer; large maps are
    halved until a side has at most `MOST_ROWS`.
    """
    blocks: dict[Tensor, int] = {}
    for name, module in network.named_modules():
        head = name.split(".")[0].endswith(("_heads", "_last_layers"))
        if not isinstance(module, nn.Linear) or head or min(module.weight.shape) < SMALLEST_HIDDEN:
            continue
        owner = network.get_submodule(name.rpartition(".")[0])
        gated = isinstance(owner, FeedForward) and owner.glu and module is owner.w_in
        fused = isinstance(owner, Attention) and module is owner.input_linear
        n = 3 if fused else 2 if gated else 1
        rows, columns = module.weight.shape
        while min(rows // n, columns) > MOST_ROWS and rows % (2 * n) == 0:
            n *= 2
        blocks[module.weight] = n
    return blocks


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix of the momentum (K. Jordan and others, 2024).

    Each block of rows of a matrix is made orthogonal for itself. A step is scaled by
    0.2 sqrt(larger side), the size of one of AdamW, whose rates serve (arXiv 2502.16982, eq. 4).
    """

    def __init__(
        self,
        blocks: dict[Tensor, int],
        ranks: Ranks,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """blocks: matrices, and into how many blocks of rows each is divided."""
        self.blocks, self.ranks, self.momentum = blocks, ranks, momentum
        super().__init__(list(blocks), {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient; blocks of one shape are worked on together."""
        (group,) = self.param_groups
        lr, decay = group["lr"], group["weight_decay"]
        shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1.0 - self.momentum)
            direction = parameter.grad.lerp(state["momentum"], self.momentum)
            n = self.blocks[parameter]
            for part, along in zip(parameter.chunk(n), direction.chunk(n), strict=True):
                shapes.setdefault(part.shape, []).append((part, along))
        for shape, pairs in shapes.items():
            parts = [part for part, _ in pairs]
            steps = self._orthogonalized([along for _, along in pairs])
            torch._foreach_mul_(parts, 1.0 - lr * decay)
            scale = 0.2 * math.sqrt(max(shape))
            torch._foreach_add_(parts, list(steps.unbind()), alpha=-lr * scale)

    def _orthogonalized(self, matrices: list[Tensor]) -> Tensor:
        """Of all matrices of one shape; every rank works on its share of them."""
        steps = torch.zeros(len(matrices), *matrices[0].shape).to(matrices[0])
        if own := matrices[self.ranks.rank :: self.ranks.world]:
            steps[self.ranks.rank :: self.ranks.world] = orthogonalize(torch.stack(own))
        return sum_over_ranks(steps)


def orthogonalize(matrices: Tensor) -> Tensor:
    """U Vᵀ of the singular value decompositions U S Vᵀ, up to singular values of 0.7 to 1.2.

    Five steps of X -> a X + (b X Xᵀ + c (X Xᵀ)²) X (K. Jordan and others, 2024), in bfloat16
    where the device has it.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    if has_bfloat16(x.device):
        x = x.to(torch.bfloat16)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


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
