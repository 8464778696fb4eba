"""Second derivatives of a crystal in several frames: their mean, their scatter, a Newton step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from coset.derivatives import StrainDerivatives, strain_derivatives
from coset.edge_model import Quadrature
from coset.potential import ModelPotential
from coset.structures import Structures
from coset.symmetry.crystal import CrystalSymmetry
from coset.symmetry.tensors import PAIRS, project_rank_four, voigt_matrix
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.elasticity.tensor import (
    cauchy_constants,
    optical_modes,
    projected,
    pseudo_inverse,
    relaxed_constants,
)

ATOMS_AT_ONCE = 64  # atoms times nodes of a rule in one graph
THREE_SIGMA = 0.99865  # of a normal distribution, one-sided
ROUNDING = 1e-9  # of an eigenvalue, relative to the largest


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """Derivatives projected on the group: of each frame, and their mean.

    violation_GPa: largest component that the projection took from the clamped constants, mean over
    the frames.
    """

    each: tuple[StrainDerivatives, ...]
    mean: StrainDerivatives
    volume: float
    violation_GPa: float

    @property
    def stress(self) -> Float[Tensor, "3 3"]:
        """Of the mean, eV/Å³."""
        return self.mean.strain_gradient / self.volume

    @property
    def max_force(self) -> float:
        """Longest force of the mean, eV/Å."""
        return float(self.mean.gradient.norm(dim=1).max())

    @property
    def quantile(self) -> float:
        """What stands for three standard deviations with so few frames (Student)."""
        return float(stdtrit(len(self.each) - 1, THREE_SIGMA))

    def error_of(self, values: Sequence[Tensor]) -> Tensor:
        """Standard error of the mean of one value per frame."""
        error: Tensor = torch.stack(list(values)).std(0) / len(values) ** 0.5
        return error

    def constants(
        self, found: StrainDerivatives, *, relaxed: bool, cauchy: bool
    ) -> Float[Tensor, "6 6"]:
        """Elastic constants of a frame or of the mean in eV/Å³, symmetric."""
        energy = found.strain / self.volume
        if relaxed:
            energy = relaxed_constants(found, self.volume)
        if cauchy:
            energy = cauchy_constants(energy, found.strain_gradient / self.volume)
        matrix = voigt_matrix(energy)
        return 0.5 * (matrix + matrix.mT)

    def softest_mode(self) -> tuple[float, float]:
        """Smallest optical eigenvalue of the Hessian and its error, eV/Å²; infinite for one atom.

        d lambda_j = e (H_j - H) e in each frame j.
        """
        values, vectors = optical_modes(self.mean.hessian)
        if not len(values):
            return float("inf"), 0.0
        vector = vectors[:, 0].reshape(-1, 3)
        own = [torch.einsum("ia,iajb,jb->", vector, one.hessian, vector) for one in self.each]
        return float(values[0]), float(self.error_of(own)) + ROUNDING * float(values[-1])

    @property
    def softest_sign(self) -> int:
        """Of the smallest optical eigenvalue, 0 if it is within three errors of zero."""
        value, error = self.softest_mode()
        return 0 if abs(value) <= self.quantile * error else int(math.copysign(1, value))

    def newton_step(
        self, pressure_GPa: float, *, cell: bool
    ) -> tuple[Float[Tensor, "atoms 3"], Float[Tensor, "3 3"]]:
        """Displacements (Å) and strain to the minimum of E + pV in the quadratic approximation.

        Without `cell` the strain is zero.
        """
        mean, n = self.mean, len(self.mean.gradient)
        inverse = pseudo_inverse(mean.hessian)
        coupling, pull = mean.internal_strain.reshape(3 * n, 9), mean.gradient.flatten()
        strain = torch.zeros_like(mean.strain_gradient)
        if cell:
            external = pressure_GPa / GPA_PER_EV_PER_A3 * torch.eye(3).to(strain)
            relaxed = (
                self.stress + external - (coupling.mT @ inverse @ pull).reshape(3, 3) / self.volume
            )
            stiffness = self.constants(mean, relaxed=True, cauchy=True)
            strain = _matrix(-torch.linalg.solve(stiffness, _vector(relaxed)))
        moved = -inverse @ (pull + coupling @ strain.flatten())
        return moved.reshape(n, 3), strain


def evaluate_frames(
    potential: ModelPotential, one: Structures, group: CrystalSymmetry, rules: Sequence[Quadrature]
) -> Frames:
    """Derivatives of one crystal that has the group exactly, in the frames of each rule."""
    volume = float(one.volume[0])
    each, violations = [], []
    for rule in rules:
        raw = _derivatives(potential, one, rule)
        each.append(projected(raw, group))
        removed = raw.strain - project_rank_four(raw.strain, group)
        violations.append(float(removed.abs().max()) / volume * GPA_PER_EV_PER_A3)
    return Frames(
        each=tuple(each),
        mean=_weighted(each, [1.0 / len(each)] * len(each)),
        volume=volume,
        violation_GPa=sum(violations) / len(violations),
    )


def _derivatives(potential: ModelPotential, one: Structures, rule: Quadrature) -> StrainDerivatives:
    """Derivatives of an average, some nodes at a time: a graph keeps all its nodes in memory."""
    size = max(1, ATOMS_AT_ONCE // len(one.atomic_numbers))
    parts, shares = [], []
    for rotations, weights in zip(
        torch.split(rule.rotations, size), torch.split(rule.weights, size), strict=True
    ):
        share = float(weights.sum())
        part = Quadrature(rotations=rotations, weights=weights / share, degree=0)
        parts.append(strain_derivatives(potential, one, part))
        shares.append(share)
    return _weighted(parts, shares)


def _weighted(parts: Sequence[StrainDerivatives], weights: Sequence[float]) -> StrainDerivatives:
    def total(name: str) -> Tensor:
        terms = [w * getattr(part, name) for part, w in zip(parts, weights, strict=True)]
        return torch.stack(terms).sum(0).cpu()

    return StrainDerivatives(**{f.name: total(f.name) for f in fields(StrainDerivatives)})


def _vector(stress: Float[Tensor, "3 3"]) -> Float[Tensor, "6"]:
    return torch.stack([stress[a, b] for a, b in PAIRS])


def _matrix(strain: Float[Tensor, "6"]) -> Float[Tensor, "3 3"]:
    """The symmetric strain of Voigt's six numbers, whose shears are doubled."""
    result = strain.new_zeros(3, 3)
    for value, (a, b) in zip(strain, PAIRS, strict=True):
        result[a, b] += 0.5 * value
        result[b, a] += 0.5 * value
    return result
