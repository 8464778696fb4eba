"""The crystals of the cost benchmark, exactly in their groups."""

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal

from coset.ase_interface import from_ase
from coset.structures import Structures
from coset.symmetry.crystal import find_group, symmetrize

TILTS = (0.12, 0.12, 0.15)
"""rad, of the octahedra of the perovskite about x, y and z."""


def tilted_perovskite(a: float, numbers: tuple[int, int, int]) -> Atoms:
    """ABX3 with the tilts a+a+c-: P4_2/nmc, 40 atoms in the primitive cell.

    Octahedron (i, j, k) is turned by its three small angles; signs alternate in the directions
    perpendicular to the axis, for c- along it, too.
    """
    names, sites = [], []
    for i, j, k in np.ndindex(2, 2, 2):
        signs = (-1.0) ** np.array([j + k, i + k, i + j + k])
        center = np.array([i, j, k], dtype=float)
        sites += [center + 0.5, center]
        names += numbers[:2]
        for axis in np.eye(3):
            sites.append(center + 0.5 * axis + np.cross(signs * TILTS, 0.5 * axis))
            names.append(numbers[2])
    cell = 2 * a * np.diag([1.0, 1.0, 0.99])
    return Atoms(names, scaled_positions=np.array(sites) / 2, cell=cell, pbc=True)


def crystals() -> dict[str, Atoms]:
    """By name."""
    rutile = crystal(
        ("Ti", "O"), [(0, 0, 0), (0.3053, 0.3053, 0)], spacegroup=136,
        cellpar=[4.594, 4.594, 2.959, 90, 90, 90],
    )  # fmt: skip
    return {
        "Si": bulk("Si", "diamond", 5.431, cubic=True),
        "Al": bulk("Al", "fcc", 4.046),
        "TiO2": rutile,
        "ZnO": bulk("ZnO", "wurtzite", 3.250, c=5.207, u=0.382),
        "CaTiO3": tilted_perovskite(3.85, (20, 22, 8)),
    }


def exact(atoms: Atoms, substitutes: dict[int, int]) -> Structures:
    """The crystal with other elements if asked, symmetric to rounding, float64."""
    numbers = [substitutes.get(number, number) for number in atoms.numbers]
    one = from_ase(Atoms(numbers, positions=atoms.positions, cell=atoms.cell, pbc=True))
    group = find_group(one.to(torch.float64), 1e-3)
    return symmetrize(one, group)
