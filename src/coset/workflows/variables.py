"""The variables of a relaxation: displacements and one symmetric logarithmic strain per system.

From a reference (x0, h0) that never changes during a relaxation,

    D = exp(S),   x = (x0 + u) D,   cell = h0 D,   S symmetric.

A symmetric S never turns a cell, none turns it inside out, and the energy is one function of
(u, S): with symmetry kept, u lies in the free Wyckoff parameters and S in the strains that the
group allows, because projected gradients lie there. Fractional coordinates depend on u alone.
With the full virial W_ab = dE/de_ab for x -> x (1 + e),

    dE/du = -F D,     dE/dS: the adjoint of dD -> sum_ab W_ab (D^-1 dD)_ab.

W is not symmetric for an unconstrained model: D^-1 dD turns the crystal where S and dS do not
commute, and so the torque enters.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coset.structures import Properties, Structures, deform

STRAIN_LENGTH = 1.0
"""Å per square root of an atom: turns a strain into a length of about the same stiffness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One vector per system: displacements of atoms (Å) and strain times its length (Å).

    Also gradients with respect to them (eV/Å).
    """

    atoms: Float[Tensor, "atoms 3"]
    strain: Float[Tensor, "systems 3 3"]
    system_index: Int[Tensor, " atoms"]

    def dot(self, other: "Field") -> Float[Tensor, " systems"]:
        """Scalar product of each system."""
        by_strain: Tensor = (self.strain * other.strain).sum((1, 2))
        by_atom = (self.atoms * other.atoms).sum(1)
        return by_strain.index_add(0, self.system_index, by_atom)

    def plus(self, other: "Field", factor: Float[Tensor, " systems"] | float = 1.0) -> "Field":
        """Self + factor * other, with one factor per system."""
        scaled = other.times(factor)
        return replace(self, atoms=self.atoms + scaled.atoms, strain=self.strain + scaled.strain)

    def times(self, factor: Float[Tensor, " systems"] | float) -> "Field":
        """Every system times its factor."""
        if isinstance(factor, float):
            return replace(self, atoms=self.atoms * factor, strain=self.strain * factor)
        return replace(
            self,
            atoms=self.atoms * factor[self.system_index, None],
            strain=self.strain * factor[:, None, None],
        )

    def where(self, chosen: Bool[Tensor, " systems"], other: "Field") -> "Field":
        """This field for the chosen systems, the other one elsewhere (NaN does not leak)."""
        return replace(
            self,
            atoms=torch.where(chosen[self.system_index, None], self.atoms, other.atoms),
            strain=torch.where(chosen[:, None, None], self.strain, other.strain),
        )

    def largest(self) -> Float[Tensor, " systems"]:
        """Longest atomic vector or norm of the strain part of each system."""
        longest: Tensor = torch.linalg.matrix_norm(self.strain)
        lengths = torch.linalg.vector_norm(self.atoms, dim=1)
        return longest.scatter_reduce(0, self.system_index, lengths, "amax")

    def select(self, rows: Int[Tensor, " atoms"], systems: Tensor, index: Tensor) -> "Field":
        """The given systems and their atoms."""
        return Field(atoms=self.atoms[rows], strain=self.strain[systems], system_index=index)


def at_rest(reference: Structures) -> Field:
    """No displacement, no strain."""
    return Field(
        atoms=torch.zeros_like(reference.positions),
        strain=torch.zeros_like(reference.cell),
        system_index=reference.system_index,
    )


def strain_length(structures: Structures) -> Float[Tensor, " systems"]:
    """Length in Å by which strains are multiplied: c sqrt(atoms)."""
    return STRAIN_LENGTH * structures.n_atoms.to(structures.cell).sqrt()


def moved(reference: Structures, variables: Field) -> Structures:
    """The structures at these variables."""
    displaced = replace(reference, positions=reference.positions + variables.atoms)
    return deform(displaced, _deformation(reference, variables.strain))


def gradient(
    reference: Structures,
    variables: Field,
    forces: Float[Tensor, "atoms 3"],
    virial: Float[Tensor, "systems 3 3"],
) -> Field:
    """Derivative of the energy with respect to the variables, from forces (eV/Å) and W (eV)."""
    strain = variables.strain.detach().requires_grad_()
    with torch.enable_grad():
        deformation = _deformation(reference, strain)
        seed = torch.linalg.solve(deformation.detach().mT, virial)
        (by_strain,) = torch.autograd.grad(deformation, strain, seed)
    by_atoms = -torch.einsum("ai,aij->aj", forces, deformation.detach()[reference.system_index])
    return Field(
        atoms=by_atoms,
        strain=0.5 * (by_strain + by_strain.mT),
        system_index=reference.system_index,
    )


def full_virial(structures: Structures, properties: Properties) -> Float[Tensor, "systems 3 3"]:
    """W in eV from V stress and the torque; 0 where the stress is undefined."""
    assert properties.stress is not None
    virial = properties.stress * structures.volume[:, None, None]
    if properties.torque is not None:
        x, y, z = (0.5 * properties.torque).unbind(1)
        zero = torch.zeros_like(x)
        turn = torch.stack([zero, z, -y, -z, zero, x, y, -x, zero], dim=1).reshape(-1, 3, 3)
        virial = virial + turn
    return virial.nan_to_num(0.0)


def _deformation(
    reference: Structures, strain: Float[Tensor, "systems 3 3"]
) -> Float[Tensor, "systems 3 3"]:
    deformation: Tensor = torch.linalg.matrix_exp(strain / strain_length(reference)[:, None, None])
    return deformation
