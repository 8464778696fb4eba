"""Cutoff functions, and the adaptive radius that gives every atom about the same neighborhood.

The radius r_i of atom i is the root of a smooth count (PET, arXiv 2601.16195, appendix):

    n_i(r) = sum_j bump(d_ij; r, w) + N (r/R)^3 = N

strictly increasing with n(0) = 0 and n(R) >= N, so that [0, R] always holds exactly one root.
The cutoff of a pair is (r_i + r_j)/2.

Methods: `converged` (guaranteed root, exact derivatives of every order), and for imported
checkpoints `solver10` (ten Newton-bisection steps, not always converged) and `grid` (a weighted
mean over probes).
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coset.pet.hypers import CutoffHypers

EDGE = 1e-6
GRID_CHUNK = 4_000_000


def bump(
    distances: Float[Tensor, "..."], cutoff: Float[Tensor, "..."] | float, width: float
) -> Float[Tensor, "..."]:
    """Factor f = (1 + tanh(cot(pi t)))/2, t = (d - (rc - w))/w: 1 below rc - w, 0 beyond rc."""
    t = ((distances - (cutoff - width)) / width).clamp(EDGE, 1.0 - EDGE)
    return 0.5 * (1.0 + torch.tanh(1.0 / torch.tan(torch.pi * t)))


def cosine(
    distances: Float[Tensor, " edges"], cutoff: Float[Tensor, " edges"] | float, width: float
) -> Float[Tensor, " edges"]:
    """Factor f = (1 + cos(pi t))/2, t = (d - (rc - w))/w."""
    t = ((distances - (cutoff - width)) / width).clamp(0.0, 1.0)
    return 0.5 * (1.0 + torch.cos(torch.pi * t))


CUTOFF_FUNCTIONS = {"bump": bump, "cosine": cosine}


def bump_with_slope(
    distances: Float[Tensor, " edges"], cutoff: Float[Tensor, " edges"], width: float
) -> tuple[Float[Tensor, " edges"], Float[Tensor, " edges"]]:
    """Value f and slope df/drc at the price of one; where t is clamped the slope is exactly 0."""
    t = ((distances - (cutoff - width)) / width).clamp(EDGE, 1.0 - EDGE)
    cotangent = torch.tan(torch.pi * t).reciprocal()
    tangent = torch.tanh(cotangent)
    slope = (1.0 - tangent * tangent) * (1.0 + cotangent * cotangent)
    return 0.5 * (1.0 + tangent), slope * (0.5 * torch.pi / width)


def bump_slope(
    distances: Float[Tensor, " edges"], cutoff: Float[Tensor, " edges"], width: float
) -> Float[Tensor, " edges"]:
    """df/drc = (pi/2w) (1 - tanh^2(cot(pi t)))/sin^2(pi t) for 0 < t < 1, else 0."""
    return bump_with_slope(distances, cutoff, width)[1]


def adaptive_radii(
    distances: Float[Tensor, " edges"],
    centers: Int[Tensor, " edges"],
    n_atoms: int,
    hypers: CutoffHypers,
) -> Float[Tensor, " atoms"]:
    """Radius of every atom in Å, float64, differentiable; needs all edges up to hypers.cutoff."""
    d = distances.double()
    if hypers.adaptive == "grid":
        radii: Tensor = _GridRadii.apply(d, centers, n_atoms, hypers)  # type: ignore[no-untyped-call]
        return radii
    find = _converged_root if hypers.adaptive == "converged" else _solver10_root
    shell = _Shell(d.detach(), centers, n_atoms, hypers)
    root: Tensor = _ImplicitRoot.apply(d, find(shell), centers, hypers)  # type: ignore[no-untyped-call]
    return root


class _Shell:
    """n(r) - N and its slope for all atoms at once, on detached distances."""

    def __init__(
        self,
        distances: Float[Tensor, " edges"],
        centers: Int[Tensor, " edges"],
        n_atoms: int,
        hypers: CutoffHypers,
    ) -> None:
        assert hypers.n_neighbors is not None
        self.distances, self.centers, self.n_atoms = distances, centers, n_atoms
        self.target, self.limit = float(hypers.n_neighbors), hypers.cutoff
        self.width = hypers.adaptive_width

    def excess(self, r: Float[Tensor, " atoms"]) -> Float[Tensor, " atoms"]:
        counts = bump(self.distances, r[self.centers], self.width)
        return self._sum(counts) + self.target * (r / self.limit) ** 3 - self.target

    def excess_and_slope(self, r: Float[Tensor, " atoms"]) -> tuple[Tensor, Tensor]:
        counts, slopes = bump_with_slope(self.distances, r[self.centers], self.width)
        excess = self._sum(counts) + self.target * (r / self.limit) ** 3 - self.target
        return excess, self._sum(slopes) + 3.0 * self.target * r**2 / self.limit**3

    def start(self) -> tuple[Float[Tensor, " atoms"], Float[Tensor, " atoms"]]:
        lowest = self.distances.new_zeros(self.n_atoms)
        return lowest, torch.full_like(lowest, self.limit)

    def _sum(self, values: Float[Tensor, " edges"]) -> Float[Tensor, " atoms"]:
        return values.new_zeros(self.n_atoms).index_add_(0, self.centers, values)


def _converged_root(
    shell: _Shell, bisections: int = 20, newton: int = 4
) -> Float[Tensor, " atoms"]:
    """Bisection to R 2^-21, then Newton clamped to the bracket: exact to 4e-15 Å."""
    low, high = shell.start()
    for _ in range(bisections):
        r = 0.5 * (low + high)
        below = shell.excess(r) <= 0.0
        low, high = torch.where(below, r, low), torch.where(below, high, r)
    r = 0.5 * (low + high)
    for _ in range(newton):
        excess, slope = shell.excess_and_slope(r)
        below = excess <= 0.0
        low, high = torch.where(below, r, low), torch.where(below, high, r)
        step = r - excess / slope.clamp_min(1e-12)
        r = torch.minimum(torch.maximum(step, low), high)
    return r


def _solver10_root(shell: _Shell) -> Float[Tensor, " atoms"]:
    """Ten safeguarded Newton steps and a last one, as metatrain does; it may not converge."""
    low, high = shell.start()
    r = 0.5 * high
    for _ in range(10):
        excess, slope = shell.excess_and_slope(r)
        below = excess <= 0.0
        low, high = torch.where(below, r, low), torch.where(below, high, r)
        step = r - excess / slope.clamp_min(1e-6)
        inside = (step >= low) & (step <= high)
        r = torch.where(inside, step, 0.5 * (low + high))
    excess, slope = shell.excess_and_slope(r)
    return (r - excess / slope.clamp_min(1e-6)).clamp(shell.limit / 16.0, shell.limit)


class _ImplicitRoot(torch.autograd.Function):
    """r(d) where n(r; d) is constant: dr/dd_j = b'_j/n_r, exact to every order.

    The backward pass uses the saved output r, so differentiating it again passes through this very
    function.
    """

    @staticmethod
    def forward(d: Tensor, root: Tensor, centers: Tensor, hypers: CutoffHypers) -> Tensor:
        return root.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        d, _, centers, ctx.hypers = inputs
        ctx.save_for_backward(d, output, centers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        d, r, centers = ctx.saved_tensors
        hypers = ctx.hypers
        slopes = bump_slope(d, r[centers], hypers.adaptive_width)
        baseline = 3.0 * hypers.n_neighbors * r**2 / hypers.cutoff**3
        total = torch.zeros_like(r).index_add(0, centers, slopes) + baseline
        return (grad / total)[centers] * slopes, None, None, None


def _grid_radii(
    distances: Float[Tensor, " edges"],
    centers: Int[Tensor, " edges"],
    n_atoms: int,
    hypers: CutoffHypers,
) -> Float[Tensor, " atoms"]:
    """Mean of probe radii, weighted by how near the count at each is to its target."""
    assert hypers.n_neighbors is not None
    width, target = hypers.adaptive_width, hypers.n_neighbors
    steps = torch.arange(0.5, hypers.cutoff, width / 4.0, dtype=torch.float64)
    probes = steps.to(distances)
    counts = bump(distances[:, None], probes[None, :], width)
    count = counts.new_zeros(n_atoms, len(probes)).index_add(0, centers, counts)
    ramp = torch.linspace(0.0, 1.0, len(probes), dtype=torch.float64).to(distances) ** 3
    offset = count - target + target * ramp
    if len(probes) == 1:
        scale = 0.5 * offset.abs() + 1e-12
    else:
        scale = torch.gradient(offset, dim=1)[0].abs().clamp_min(1e-12)
    weights = torch.softmax(-0.5 * (offset / scale) ** 2, dim=1)
    return (probes * weights).sum(1)


class _GridRadii(torch.autograd.Function):
    """`_grid_radii` over chunks of atoms, recomputed in the backward pass to save memory."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        d: Tensor,
        centers: Tensor,
        n_atoms: int,
        hypers: CutoffHypers,
    ) -> Tensor:
        ctx.hypers, ctx.n_atoms = hypers, n_atoms
        ctx.save_for_backward(d, centers)
        parts = [
            _grid_radii(d[rows], centers[rows] - first, last - first, hypers)
            for first, last, rows in _atom_chunks(centers, n_atoms, hypers)
        ]
        return torch.cat(parts) if parts else d.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        d, centers = ctx.saved_tensors
        gradients = []
        for first, last, rows in _atom_chunks(centers, ctx.n_atoms, ctx.hypers):
            local = partial(
                _grid_radii, centers=centers[rows] - first, n_atoms=last - first, hypers=ctx.hypers
            )
            pull_back: Any = torch.func.vjp(local, d[rows])[1]
            gradients.append(pull_back(grad[first:last])[0])
        return torch.cat(gradients) if gradients else torch.zeros_like(d), None, None, None


def _atom_chunks(
    centers: Int[Tensor, " edges"], n_atoms: int, hypers: CutoffHypers
) -> list[tuple[int, int, slice]]:
    """Ranges of atoms and of their (consecutive) edges, small enough for all probes at once."""
    n_probes = max(int(4 * hypers.cutoff / hypers.adaptive_width), 1)
    counts = torch.bincount(centers, minlength=n_atoms)
    ends = [0, *torch.cumsum(counts, 0).tolist()]
    chunks, first = [], 0
    for atom in range(1, n_atoms + 1):
        full = (ends[atom] - ends[first]) * n_probes >= GRID_CHUNK
        if full or atom == n_atoms:
            chunks.append((first, atom, slice(ends[first], ends[atom])))
            first = atom
    return chunks
