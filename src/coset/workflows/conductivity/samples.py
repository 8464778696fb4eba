"""Force constants of second and third order in independent frames, by two routes.

A frame is a rule of rotations turned at random. Its force constants get the symmetry of the
crystal; the spread over the frames is the rotational error of their mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from coset.derivatives import dynamical_matrices, hessian
from coset.edge_model import Quadrature
from coset.errors import ConfigError
from coset.potential import ModelPotential, Potential
from coset.structures import Structures, concatenate
from coset.symmetry.average import averaged_properties
from coset.workflows.conductivity.by_phono3py import Anharmonic
from coset.workflows.observers import Step

ATOMS_AT_ONCE = 1536
"""Atoms of displaced supercells handed to the potential at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Symmetric force constants of one frame (eV/Å², eV/Å³), and how they came about."""

    second: Float[ndarray, "atoms all 3 3"]
    third: Float[ndarray, "atoms all all 3 3 3"]
    n_evaluations: int
    residual: float | None = None


def displacement_sample(
    potential: Potential, crystal: Anharmonic, rule: Quadrature, amplitude: float, step: Step
) -> Sample:
    """From forces of displaced supercells, less those of the perfect one.

    Third order: the displacements that the symmetry of the crystal asks for. Second order: plus and
    minus along x, y, z for every atom of the primitive cell.
    """
    moves = crystal.displacements(amplitude)
    forces = _forces(potential, crystal.supercell, moves, rule, step)
    third = crystal.third_from_forces(forces)
    single = _single(crystal, amplitude)
    second_forces = _forces(potential, crystal.supercell_fc2, single, rule, step)
    return Sample(
        second=crystal.second_from_forces(single, second_forces),
        third=third,
        n_evaluations=len(moves) + len(single) + 2,
    )


def exact_sample(
    potential: Potential,
    primitive: Structures,
    crystal: Anharmonic,
    rule: Quadrature,
    amplitude: float,
    step: Step,
) -> Sample:
    """From exact second derivatives.

        Phi_ijk = [H_jk(u_i = h) - H_jk(u_i = -h)] / 2h

    Second order: from D(q) of the primitive cell at the wave vectors that fit into the supercell.

    Raises:
        ConfigError: "ExactNeedsModel", if the potential is no edge model.
    """
    if not isinstance(potential, ModelPotential):
        raise ConfigError(
            "exact derivatives need a model whose edges are known",
            code="ExactNeedsModel",
            field="derivatives",
            hint="use 'displacements'",
        )
    perfect, (atoms, _) = crystal.supercell, crystal.movable
    n = len(perfect.atomic_numbers)
    raw = np.empty((len(atoms), n, n, 3, 3, 3))
    for row, atom in enumerate(atoms):
        for axis in range(3):
            step(f"Hessians, atom {row + 1} of {len(atoms)}, {'xyz'[axis]}")
            plus, minus = (
                hessian(potential, _moved(perfect, atom, axis, sign * amplitude), rule)
                for sign in (1.0, -1.0)
            )
            slope = ((plus - minus) / (2.0 * amplitude)).cpu().numpy()
            raw[row, :, :, axis] = slope.transpose(0, 2, 1, 3)
    third = crystal.third_symmetrized(raw)
    return Sample(
        second=crystal.second_symmetrized(second_order(potential, primitive, crystal, rule)),
        third=third,
        n_evaluations=6 * len(atoms),
        residual=float(np.abs(third - raw).max()),
    )


def second_order(
    potential: ModelPotential, primitive: Structures, crystal: Anharmonic, rule: Quadrature
) -> Float[ndarray, "atoms all 3 3"]:
    """Phi(S' j, S k) = mean_q D_jk(q) e^(-2 pi i q.(S - S')), in phono3py's order of atoms.

    S': cell of the atom that stands for j.
    """
    cells, kinds = crystal.places_fc2(primitive)
    q = crystal.wave_vectors_fc2()
    matrices = dynamical_matrices(potential, primitive, torch.from_numpy(q), None, rule)
    n = len(primitive.atomic_numbers)
    blocks = matrices.cpu().numpy().reshape(len(q), n, 3, n, 3)
    phases = np.exp(-2j * np.pi * q @ cells.T)
    origins = phases[:, crystal.movable[1]].conj()
    found = np.einsum("qs,qj,qjasb->jsab", phases, origins, blocks[:, :, :, kinds]) / len(q)
    return np.ascontiguousarray(found.real)


def _single(crystal: Anharmonic, amplitude: float) -> Float[ndarray, "cells atoms 3"]:
    n, (_, atoms) = len(crystal.supercell_fc2.atomic_numbers), crystal.movable
    moves = np.zeros((len(atoms), 3, 2, n, 3))
    for row, atom in enumerate(atoms):
        for axis in range(3):
            moves[row, axis, :, atom, axis] = amplitude, -amplitude
    return moves.reshape(-1, n, 3)


def _forces(
    potential: Potential,
    perfect: Structures,
    moves: Float[ndarray, "cells atoms 3"],
    rule: Quadrature,
    step: Step,
) -> Float[ndarray, "cells atoms 3"]:
    """Forces of displaced cells less those of the perfect one, which a single frame leaves."""
    shifts = torch.cat([torch.zeros(1, *moves.shape[1:]).double(), torch.from_numpy(moves)])
    found: list[Tensor] = []
    for part in _parts(shifts):
        step(f"forces, supercell {sum(map(len, found)) + 1} of {len(shifts)}")
        batch = concatenate([replace(perfect, positions=perfect.positions + u) for u in part])
        forces = averaged_properties(potential, batch, [rule] * len(part)).forces
        if forces is None:
            raise ConfigError("the potential gives no forces", code="NoForces", field="potential")
        found.append(forces.double().cpu().reshape(part.shape))
    forces = torch.cat(found)
    return np.asarray((forces[1:] - forces[0]).numpy())


def _parts(shifts: Float[Tensor, "cells atoms 3"]) -> Iterator[Tensor]:
    yield from torch.split(shifts, max(1, ATOMS_AT_ONCE // shifts.shape[1]))


def _moved(one: Structures, atom: int, axis: int, amount: float) -> Structures:
    positions = one.positions.clone()
    positions[atom, axis] += amount
    return replace(one, positions=positions)
