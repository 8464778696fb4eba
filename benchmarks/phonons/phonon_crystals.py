"""The crystals of the phonon benchmarks: primitive cells at the minimum of a model."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ase.build import bulk

from coset.symmetry.crystal import find_group, symmetrize
from coset.symmetry.primitive import primitive_cell
from coset.workflows.phonons.by_phonopy import standard_masses
from coset.workflows.phonons.mesh import action_of, irreducible_points, supercell_mesh
from coset.workflows.relax import relax
from coset.workflows.relaxation import TIGHT

sys.path.insert(0, str(Path(__file__).parents[1] / "symmetry"))

from crystals import crystals, exact

MIN_EDGE = 14.0
"""Å, of supercells: the default of coset. Larger cells get what averages can afford."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A primitive cell, its supercell, and the wave vectors where frequencies are compared."""

    primitive: object
    action: object
    masses: np.ndarray
    mesh: tuple
    q: np.ndarray

    @property
    def one(self):
        """The primitive cell."""
        return self.primitive.structures


def starting_points():
    """By name: unrelaxed crystal and the least edge of its supercell."""
    known = crystals()
    return {
        "Si": (bulk("Si", "diamond", 5.431), MIN_EDGE),
        "NaCl": (bulk("NaCl", "rocksalt", 5.64), MIN_EDGE),
        "TiO2": (known["TiO2"], 9.0),
        "CaTiO3": (known["CaTiO3"], 11.5),
    }


def case_of(potential, name, average="tight"):
    """A crystal relaxed in its space group.

    Wave vectors: one of each star of the mesh; of the 40 atoms only those that are stars of one.
    """
    atoms, edge = starting_points()[name]
    (found,) = relax(potential, exact(atoms, {}), replace(TIGHT, average=average))
    if found.status != "converged":
        raise RuntimeError(f"{name}: {found.status}, {found.reason}")
    group = find_group(found.structures, 1e-5)
    whole = symmetrize(found.structures, group)
    primitive = primitive_cell(whole, group)
    action = action_of(primitive.structures, primitive.group)
    mesh = supercell_mesh(primitive.structures.cell[0].numpy(), edge, action)
    q, _ = irreducible_points(mesh, action)
    if len(primitive.structures.atomic_numbers) > 20:
        q = q[[len(np.unique(np.mod(star, 1.0), axis=0)) == 1 for star in stars(q, action)]][::3]
    return Case(
        primitive=primitive,
        action=action,
        masses=standard_masses(primitive.structures),
        mesh=mesh,
        q=q,
    )


def stars(q, action):
    """Images of every wave vector under the group."""
    return np.round(action.images(q).swapaxes(0, 1), 9)
