"""Force constants of independent samples: the same rule of rotations, each time turned anew.

A sample has the space group; the spread over the samples is the rotational error of their mean.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Complex, Float
from numpy import ndarray
from torch import Tensor

from coset.derivatives import dynamical_columns, dynamical_matrices
from coset.edge_model import Quadrature
from coset.errors import ConfigError, StructureError
from coset.neighbors import neighbor_list
from coset.potential import ModelPotential, Potential
from coset.structures import Structures, concatenate, repeat
from coset.symmetry.average import averaged_properties
from coset.symmetry.primitive import Primitive
from coset.workflows.phonons.by_phonopy import symmetrized_force_constants
from coset.workflows.phonons.interpolation import force_constants
from coset.workflows.phonons.mesh import (
    Action,
    Evaluate,
    Mesh,
    irreducible_pairs,
    mesh_points,
    opposites,
    project_mesh,
)

BATCH = 24
"""Displaced supercells handed to the potential at a time."""

BROKEN = "NonFiniteOutput"


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Force constants Phi(S) of the periodic supercell in eV/Å², one set for each sample.

    doubt: what the finite displacements may have left in the mean, None without displacements.
    asymmetry: largest |D - D†|/2 before projection (eV/Å²/amu), the rounding of the network; of the
    blocks on the diagonal where no others are known.
    """

    mesh: Mesh
    force_constants: Float[ndarray, "samples cells dim dim"]
    doubt: Float[ndarray, "cells dim dim"] | None = None
    asymmetry: float = 0.0


def exact_evaluator(
    potential: Potential,
    primitive: Structures,
    rules: Sequence[Quadrature],
    masses: Float[ndarray, " atoms"],
) -> Evaluate:
    """Dynamical matrices from the primitive cell, before projection.

    Raises:
        ConfigError: "ExactNeedsModel", if the potential is no edge model.
        StructureError: "NoNeighbors".
    """
    model = _checked(potential, primitive)
    device = model.baseline.device
    weights = torch.from_numpy(masses).to(device)

    def evaluate(
        q: Float[ndarray, "points 3"],
    ) -> Complex[ndarray, "samples points dim dim"]:
        points = torch.from_numpy(np.ascontiguousarray(q)).to(device)
        parts = [dynamical_matrices(model, primitive, points, weights, rule) for rule in rules]
        return _finite(torch.stack(parts))

    return evaluate


def _checked(potential: Potential, primitive: Structures) -> ModelPotential:
    if not isinstance(potential, ModelPotential):
        raise ConfigError(
            "exact derivatives need a model whose edges are known",
            code="ExactNeedsModel",
            field="method",
            hint="use method 'displacements'",
        )
    if not len(neighbor_list(primitive, potential.cutoff).centers):
        raise StructureError(
            f"no two atoms are within the cutoff of {potential.cutoff:g} Å",
            code="NoNeighbors",
            hint="such atoms do not vibrate",
        )
    return potential


def irreducible_samples(
    potential: Potential,
    primitive: Structures,
    rules: Iterable[Quadrature],
    mesh: Mesh,
    action: Action,
    masses: Float[ndarray, " atoms"],
) -> Samples:
    """From one wave vector and atom of every orbit, the rest of the mesh by symmetry.

    Fewer columns than `exact_samples`, by up to twice the order of the group, and so the error of
    a single orientation where that takes the mean over the group.

    Raises:
        ConfigError: "ExactNeedsModel".
        StructureError: "NoNeighbors".
    """
    model = _checked(potential, primitive)
    places, atoms = irreducible_pairs(mesh, action)
    q, opposite = torch.from_numpy(mesh_points(mesh)[places]), opposites(mesh)
    weights = torch.from_numpy(masses)
    known = np.zeros((len(opposite), len(masses)), dtype=bool)
    known[places, atoms] = known[opposite[places], atoms] = True
    device, size, asymmetry = model.baseline.device, 3 * len(masses), 0.0
    own = (opposite[places] == places)[:, None, None]
    matrices: list[ndarray] = []
    for rule in rules:
        args = (q.to(device), torch.from_numpy(atoms).to(device), weights.to(device), rule)
        found = _finite(dynamical_columns(model, primitive, *args)).swapaxes(-1, -2)
        sample = np.zeros((*known.shape, 3, size), dtype=np.complex128)
        sample[opposite[places], atoms] = found.conj()
        sample[places, atoms] = np.where(own, found.real, found)
        matrices.append(sample.reshape(-1, size, size).swapaxes(-1, -2))
        blocks = found.reshape(len(atoms), 3, -1, 3)[np.arange(len(atoms)), :, atoms]
        gap = np.abs(blocks - blocks.conj().swapaxes(-1, -2)).max() / 2
        asymmetry = max(asymmetry, float(gap))
    projected = project_mesh(np.stack(matrices), mesh, action, known)
    return Samples(
        mesh=mesh,
        force_constants=force_constants(projected, mesh) * mass_roots(masses),
        asymmetry=asymmetry,
    )


def exact_samples(
    evaluate: Evaluate, mesh: Mesh, action: Action | None, masses: Float[ndarray, " atoms"]
) -> Samples:
    """From D(q) at half of the points of a mesh; projected on the group if there is an `action`."""
    return mesh_samples(evaluate(half_mesh(mesh)), mesh, action, masses)


def half_mesh(mesh: Mesh) -> Float[ndarray, "half 3"]:
    """One of q and -q of every point of a mesh, the one that comes first."""
    points = mesh_points(mesh)
    return points[np.arange(len(points)) <= opposites(mesh)]


def mesh_samples(
    half: Complex[ndarray, "samples half dim dim"],
    mesh: Mesh,
    action: Action | None,
    masses: Float[ndarray, " atoms"],
) -> Samples:
    """The same from matrices at the points of `half_mesh`."""
    opposite = opposites(mesh)
    kept = np.flatnonzero(np.arange(len(opposite)) <= opposite)
    asymmetry = np.abs(half - half.conj().swapaxes(-1, -2)).max() / 2
    half = (half + half.conj().swapaxes(-1, -2)) / 2
    matrices = np.empty((len(half), len(opposite), *half.shape[2:]), dtype=np.complex128)
    matrices[:, opposite[kept]] = half.conj()
    own = kept == opposite[kept]
    half[:, own] = half[:, own].real
    matrices[:, kept] = half
    if action is not None:
        matrices = project_mesh(matrices, mesh, action)
    return Samples(
        mesh=mesh,
        force_constants=force_constants(matrices, mesh) * mass_roots(masses),
        asymmetry=float(asymmetry),
    )


def displacement_samples(
    potential: Potential,
    primitive: Primitive,
    rules: Iterable[Quadrature],
    mesh: Mesh,
    amplitude: float,
) -> Samples:
    """From the forces of supercells with every primitive atom moved by ±h and ±2h along x, y, z.

    Phi = (4 Phi(h) - Phi(2h))/3, each a central difference, which the residual forces leave alone,
    projected on the space group, the sum rule and the exchange of atoms. The doubt is a third of
    the difference of both.
    """
    found: list[ndarray] = []
    doubts: list[ndarray] = []
    for rule in rules:
        small, large = (
            symmetrized_force_constants(
                primitive.structures, mesh, _differences(potential, primitive, rule, mesh, step)
            )
            for step in (amplitude, 2.0 * amplitude)
        )
        found.append((4.0 * small - large) / 3.0)
        doubts.append((small - large) / 3.0)
    if not np.any(found):
        raise StructureError("no atom feels another", code="NoNeighbors", hint="give a crystal")
    return Samples(
        mesh=mesh, force_constants=np.stack(found), doubt=np.asarray(np.mean(doubts, axis=0))
    )


def mass_roots(masses: Float[ndarray, " atoms"]) -> Float[ndarray, "dim dim"]:
    """sqrt(m_i m_j) for every pair of coordinates."""
    root = np.repeat(np.sqrt(masses), 3)
    return np.asarray(np.outer(root, root))


def _differences(
    potential: Potential, primitive: Primitive, rule: Quadrature, mesh: Mesh, step: float
) -> Float[ndarray, "cells dim dim"]:
    """-(F(+step) - F(-step))/2 step on all atoms, for each coordinate of the first cell."""
    one = primitive.structures
    supercell, dim = repeat(one, mesh), 3 * len(one.atomic_numbers)
    moved = [
        _moved(supercell, coordinate // 3, coordinate % 3, sign * step)
        for coordinate in range(dim)
        for sign in (1.0, -1.0)
    ]
    forces = torch.cat([_forces(potential, batch, rule) for batch in _batches(moved)])
    pairs = _finite(forces).reshape(dim, 2, -1, dim)
    return np.asarray((pairs[:, 1] - pairs[:, 0]).transpose(1, 0, 2) / (2.0 * step))


def _finite(values: Tensor) -> ndarray:
    """The values as an array, or a StructureError if one is not finite."""
    found: ndarray = values.cpu().numpy()
    if not np.isfinite(found).all():
        raise StructureError(
            "the potential returned a force or derivative that is not finite",
            code=BROKEN,
            hint="check the structure",
        )
    return found


def _moved(one: Structures, atom: int, axis: int, step: float) -> Structures:
    positions = one.positions.clone()
    positions[atom, axis] += step
    return replace(one, positions=positions)


def _batches(moved: Sequence[Structures]) -> Iterator[Structures]:
    for first in range(0, len(moved), BATCH):
        yield concatenate(moved[first : first + BATCH])


def _forces(potential: Potential, batch: Structures, rule: Quadrature) -> Float[Tensor, "atoms 3"]:
    forces = averaged_properties(potential, batch, [rule] * len(batch)).forces
    if forces is None:
        raise ConfigError("the potential gives no forces", code="NoForces", field="potential")
    return forces
