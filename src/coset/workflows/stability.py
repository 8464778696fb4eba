"""Whether a symmetric minimum is one: the lowest mode at Gamma that breaks the symmetry.

A relaxation that keeps its group ends where the energy is stationary; it may be a saddle. With the
Hessian P H of the relaxed cell and the projector S onto displacements that keep the group,

    lambda = lowest eigenvalue of (1 - S) P H (1 - S) off rigid translations,   v its vector,
    error = sd_j(v^T P H_j v)/sqrt(m)   over m random frames j of the rule,

the verdict is `stable` if lambda > 2 error, `unstable` if lambda < -2 error, else `undecided`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from coset.derivatives import hessian
from coset.edge_model import Quadrature
from coset.potential import ModelPotential
from coset.structures import Structures
from coset.symmetry.average import translated
from coset.symmetry.crystal import CrystalSymmetry
from coset.symmetry.projection import make_projector, project_hessian
from coset.symmetry.rules import haar_offsets

N_FRAMES = 6
SEED = 1
N_SIGMA = 2.0
NUMERICAL_ERROR = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Of an eigenvalue, relative to the largest."""

Verdict = Literal["stable", "unstable", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stability:
    """Lowest curvature at Gamma along displacements that break the group.

    curvature, error: eV/Å². mode: unit displacements of the atoms of the relaxed cell; None with
    curvature NaN if no displacement breaks the group.
    """

    verdict: Verdict
    curvature: float
    error: float
    mode: Float[ndarray, "atoms 3"] | None
    n_frames: int


def stability(
    potential: ModelPotential, one: Structures, group: CrystalSymmetry, rule: Quadrature
) -> Stability:
    """Verdict for one system that has its group exactly and is relaxed in it.

    rule: the rotations of the relaxation; every frame is a random translate of it.
    """
    device = one.cell.device
    samples = torch.stack(
        [
            project_hessian(
                hessian(potential, one, translated(rule, offset.to(device))).to(device), group
            )
            for offset in haar_offsets(N_FRAMES, SEED)
        ]
    )
    dim = 3 * len(one.atomic_numbers)
    samples = samples.reshape(N_FRAMES, dim, dim)
    breaking = _breaking(one, group)
    if not breaking.shape[1]:
        return Stability(
            verdict="stable", curvature=float("nan"), error=0.0, mode=None, n_frames=N_FRAMES
        )
    mean = samples.mean(0)
    values, vectors = torch.linalg.eigh(breaking.T @ mean @ breaking)
    mode = breaking @ vectors[:, 0]
    spread = torch.einsum("i,nij,j->n", mode, samples, mode).std() / N_FRAMES**0.5
    floor = NUMERICAL_ERROR[potential.dtype] * float(torch.linalg.eigvalsh(mean).abs().max())
    error = (float(spread) ** 2 + floor**2) ** 0.5
    return Stability(
        verdict=verdict_of(float(values[0]), error),
        curvature=float(values[0]),
        error=error,
        mode=mode.reshape(-1, 3).cpu().numpy(),
        n_frames=N_FRAMES,
    )


def verdict_of(curvature: float, error: float) -> Verdict:
    """What a curvature with this standard error allows to say."""
    if curvature > N_SIGMA * error:
        return "stable"
    return "unstable" if curvature < -N_SIGMA * error else "undecided"


def _breaking(one: Structures, group: CrystalSymmetry) -> Float[Tensor, "dim directions"]:
    """Orthonormal displacements that break the group and are no rigid moves."""
    projector = make_projector([group], one.cell.device)
    unit = torch.eye(3 * len(one.atomic_numbers)).to(one.cell)
    kept = torch.stack([projector.forces(row.reshape(-1, 3)).reshape(-1) for row in unit])
    rigid = _rigid(one)
    values, vectors = torch.linalg.eigh((unit - kept) @ (unit - rigid @ rigid.T))
    directions: Tensor = vectors[:, values > 0.5]
    return directions


def _rigid(one: Structures) -> Float[Tensor, "dim moves"]:
    """Orthonormal rigid translations, of a molecule rotations too; the group maps them to such."""
    axes = torch.eye(3).to(one.cell)
    moves = axes[:, None, :].expand(3, len(one.positions), 3)
    if not bool(one.pbc.any()):
        arms = one.positions - one.positions.mean(0)
        turns = torch.linalg.cross(moves, arms.expand_as(moves))
        moves = torch.cat([moves, turns])
    vectors, sizes, _ = torch.linalg.svd(moves.flatten(1).T, full_matrices=False)
    independent: Tensor = vectors[:, sizes > 1e-6 * sizes[0]]
    return independent
