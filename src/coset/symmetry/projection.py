"""Projection of forces and stress onto the groups of a batch, of a Hessian onto one group.

    (P F)_i = mean_g Q_g^T F_perm[g, i]        P S = mean_g Q_g^T S Q_g
    (P H)_ij = mean_g Q_g^T H_perm[g, i],perm[g, j] Q_g

over all operations, pure translations included, in float64 whatever the potential runs in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from coset.errors import StructureError
from coset.potential import Potential
from coset.structures import Properties, Structures
from coset.symmetry.crystal import CrystalSymmetry


@dataclass(frozen=True, kw_only=True, slots=True)
class Projector:
    """Mean over the groups of a batch, one group per system.

        (P F)_i = mean_g Q_g^T F_perm[g, i]        P S = mean_g Q_g^T S Q_g

    P is linear and orthogonal, P² = P, and a zero sum of forces stays zero. Rows are (operation,
    orbit under T) of all systems in order: at most 48 per atom of the primitive cell.
    """

    groups: tuple[CrystalSymmetry, ...]
    n_atoms: Int[Tensor, " systems"]
    orbit: Int[Tensor, " atoms"]
    orbit_weight: Float[Tensor, " orbits"]
    source: Int[Tensor, " rows"]
    target: Int[Tensor, " rows"]
    operation: Int[Tensor, " rows"]
    rotations: Float[Tensor, "operations 3 3"]
    weight: Float[Tensor, " operations"]
    system: Int[Tensor, " operations"]

    def forces(self, forces: Float[Tensor, "atoms 3"]) -> Float[Tensor, "atoms 3"]:
        """P F in float64; any other polar vector per atom transforms alike."""
        empty = forces.new_zeros(len(self.orbit_weight), 3, dtype=torch.float64)
        folded = empty.index_add(0, self.orbit, forces.double()) * self.orbit_weight[:, None]
        turned = torch.einsum("ri,rij->rj", folded[self.source], self.rotations[self.operation])
        weighted = turned * self.weight[self.operation][:, None]
        return empty.index_add(0, self.target, weighted)[self.orbit]

    def stress(self, stress: Float[Tensor, "systems 3 3"]) -> Float[Tensor, "systems 3 3"]:
        """P S in float64, for a stress or for the full (not symmetric) virial."""
        turned: Tensor = self.rotations.mT @ stress.double()[self.system] @ self.rotations
        empty = torch.zeros_like(stress, dtype=torch.float64)
        return empty.index_add(0, self.system, turned * self.weight[:, None, None])

    def deviation(
        self, forces: Float[Tensor, "atoms 3"], stress: Float[Tensor, "systems 3 3"]
    ) -> tuple[Float[Tensor, " systems"], Float[Tensor, " systems"]]:
        """What P removes from each system: largest |F_i - (P F)_i| and largest entry of |S - P S|.

        Blind inside the symmetric subspace: energy, pressure, forces along free coordinates.
        """
        removed = torch.linalg.norm(forces.double() - self.forces(forces), dim=1)
        system_index = torch.repeat_interleave(self.n_atoms)
        largest = removed.new_zeros(len(stress)).scatter_reduce(0, system_index, removed, "amax")
        return largest, (stress.double() - self.stress(stress)).abs().amax(dim=(1, 2))

    def select(self, systems: Int[Tensor, " selected"]) -> "Projector":
        """Projector of the given systems, in the given order."""
        return make_projector([self.groups[k] for k in systems.tolist()], self.orbit.device)


def make_projector(
    groups: Sequence[CrystalSymmetry], device: torch.device | str = "cpu"
) -> Projector:
    """Projector of a batch whose systems have these groups, in order."""
    images = [g.translation_orbit[g.permutations[:, g.first_atoms]] for g in groups]
    n_operations, n_orbits = np.array([i.shape for i in images]).T
    n_atoms = np.array([len(g.translation_orbit) for g in groups])
    n_pure = np.array([len(g.pure_translations) for g in groups])
    first = np.cumsum(n_orbits) - n_orbits
    row_first = np.repeat(first, n_operations * n_orbits)
    arrays = {
        "n_atoms": n_atoms,
        "orbit": np.concatenate([g.translation_orbit for g in groups]) + np.repeat(first, n_atoms),
        "orbit_weight": np.repeat(1 / n_pure, n_orbits),
        "source": np.concatenate([i.ravel() for i in images]) + row_first,
        "target": np.concatenate([np.indices(i.shape)[1].ravel() for i in images]) + row_first,
        "operation": np.repeat(np.arange(n_operations.sum()), np.repeat(n_orbits, n_operations)),
        "rotations": np.concatenate([g.cartesian_rotations for g in groups]),
        "weight": np.repeat(1 / n_operations, n_operations),
        "system": np.repeat(np.arange(len(groups)), n_operations),
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return Projector(groups=tuple(groups), **tensors)


def project_hessian(
    hessian: Float[Tensor, "atoms 3 atoms 3"], group: CrystalSymmetry
) -> Float[Tensor, "atoms 3 atoms 3"]:
    """P H in float64: (P H)_ij = mean_g Q_g^T H_perm[g, i],perm[g, j] Q_g, for one small system.

    The Hessian is that of the symmetric structure, in a periodic system the sum over the images of
    j. Its symmetry H_ij = H_ji^T and a zero sum over j stay.
    """
    folded = torch.zeros_like(hessian, dtype=torch.float64)
    for p in torch.from_numpy(_pure_permutations(group)):
        folded += hessian[p][:, :, p]
    projected = torch.zeros_like(folded)
    rotations = torch.from_numpy(group.cartesian_rotations).to(hessian.device)
    for Q, p in zip(rotations, torch.from_numpy(group.permutations), strict=True):
        projected += torch.einsum("ab,iajc,cd->ibjd", Q, folded[p][:, :, p], Q)
    return projected / group.order


def _pure_permutations(group: CrystalSymmetry) -> Int[ndarray, "pure atoms"]:
    """Site on which each pure translation puts each atom."""
    pure, orbit, index = group.pure_translations, group.translation_orbit, group.translation_index
    atoms = np.empty((len(group.first_atoms), len(pure)), dtype=np.int64)
    atoms[orbit, index] = np.arange(len(orbit))
    result = np.empty((len(pure), len(orbit)), dtype=np.int64)
    for row, translation in enumerate(pure):
        gap = (translation + pure)[:, None] - pure
        sums = abs(gap - np.rint(gap)).max(axis=2).argmin(axis=1)
        result[row] = atoms[orbit, sums[index]]
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectedPotential:
    """A potential whose forces and stress are projected; energy and raw torque stay as they are.

    The projected force is the gradient of the energy along displacements that keep the group. It is
    wrong for displaced atoms of lower symmetry.
    """

    potential: Potential
    projector: Projector

    @property
    def cutoff(self) -> float:
        """Longest edge, Å."""
        return self.potential.cutoff

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it knows."""
        return self.potential.elements

    @property
    def level_of_theory(self) -> str:
        """What its energies approximate."""
        return self.potential.level_of_theory

    def check_supported(self, structures: Structures) -> None:
        """Raise a StructureError for what the potential cannot take."""
        self.potential.check_supported(structures)

    def __call__(self, structures: Structures) -> Properties:
        """Predictions for every system, forces and stress projected (float64)."""
        if not torch.equal(structures.n_atoms, self.projector.n_atoms):
            expected = self.projector.n_atoms.tolist()
            message = f"systems have {structures.n_atoms.tolist()} atoms, their groups {expected}"
            raise StructureError(message, code="ShapeMismatch", hint="select the same systems")
        found = self.potential(structures)
        forces = None if found.forces is None else self.projector.forces(found.forces)
        stress = None if found.stress is None else self.projector.stress(found.stress)
        return replace(found, forces=forces, stress=stress)
