"""Frequencies at given wave vectors from force constants in a given supercell, and nothing else.

What benchmarks need of phonons: one frame, no path, no verdict. The supercell is one of the cell
given, primitive or not; modes are those of the primitive cell all the same. With the position phase

    D_jk(q) = (m_j m_k)^-½ sum_l Phi(j, l) e^(2 pi i q.(x_l - x_j))

over all atoms l of the crystal that translations of the lattice make of atom k, the images of every
pair shared as in `coset.workflows.phonons.interpolation`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Complex, Float, Int
from numpy import ndarray

from coset.errors import ConfigError, StructureError, check_choice, check_range
from coset.potential import Potential
from coset.structures import Structures, concatenate, repeat
from coset.symmetry.average import sample_rules
from coset.symmetry.crystal import CrystalSymmetry, find_group, symmetrize
from coset.symmetry.primitive import primitive_cell
from coset.workflows.crystals import relaxed_crystals
from coset.workflows.phonons.by_phonopy import standard_masses
from coset.workflows.phonons.interpolation import Interpolation, interpolation
from coset.workflows.phonons.mesh import (
    Mesh,
    action_of,
    dense_mesh,
    irreducible_points,
    is_compatible,
    supercell_mesh,
)
from coset.workflows.phonons.modes import in_thz, is_gamma
from coset.workflows.phonons.samples import exact_evaluator, exact_samples, mass_roots
from coset.workflows.phonons.thermal import Thermal, thermal_properties
from coset.workflows.relaxation import TIGHT, Relaxation, RelaxSettings

RELAXED_SYMPREC = 1e-5  # Å: a relaxed structure has its group exactly
BATCH = 8  # displaced supercells at a time
ROUTES = ("exact", "displacements")


@dataclass(frozen=True, kw_only=True, slots=True)
class HarmonicSettings:
    """How force constants are found.

    route: `exact`, derivatives of a model in one frame, projected on the space group; or
    `displacements`, central differences of `amplitude` (Å) of any potential, projected too.
    relaxation: before, in the space group.
    """

    route: Literal["exact", "displacements"] = "exact"
    amplitude: float = 0.01
    relaxation: RelaxSettings = TIGHT

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check_choice("route", self.route, ROUTES)
        check_range("amplitude", self.amplitude, 1e-4, 0.2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Harmonic:
    """A crystal at its minimum with its force constants.

    atoms: the first of each set that translations of the lattice make one of.
    """

    structures: Structures
    group: CrystalSymmetry
    atoms: Int[ndarray, " primitive"]
    constants: Interpolation
    status: Literal["ok", "not_converged"]
    code: str
    reason: str

    def squares(self, q: Float[ndarray, "points 3"]) -> Float[ndarray, "points branches"]:
        """Squared frequencies (eV/Å²/amu) of the primitive cell, ascending.

        q: fractional in the reciprocal vectors of the cell of `structures`.
        """
        n_points, n_atoms, size = len(q), len(self.atoms), len(self.structures.atomic_numbers)
        matrices = self.constants.matrices(q)[0].reshape(n_points, size, 3, size, 3)
        phase = np.exp(2j * np.pi * q @ _fractional(self.structures).T)
        copies = (
            self.group.translation_orbit[None] == self.group.translation_orbit[self.atoms, None]
        )
        folded = np.einsum(
            "qj,qjalb,ql,kl->qjakb",
            phase[:, self.atoms].conj(),
            matrices[:, self.atoms],
            phase,
            copies.astype(float),
            optimize=True,
        )
        flat = folded.reshape(n_points, 3 * n_atoms, 3 * n_atoms)
        hermitian = (flat + flat.conj().swapaxes(-1, -2)) / 2.0
        return np.asarray(np.linalg.eigvalsh(hermitian))

    def frequencies_THz(  # noqa: N802
        self, q: Float[ndarray, "points 3"]
    ) -> Float[ndarray, "points branches"]:
        """Frequencies, ascending, imaginary ones as negative."""
        return in_thz(self.squares(q))

    def thermal(self, spacing: float, temperatures: tuple[float, ...]) -> Thermal:
        """Thermal properties on a mesh; spacing: Å^-1 with 2 pi. For a primitive cell only."""
        action = action_of(self.structures, self.group)
        mesh = dense_mesh(self.structures.cell[0].cpu().numpy(), spacing, action)
        points, weights = irreducible_points(mesh, action)
        squares = self.squares(points)
        for row in np.flatnonzero(is_gamma(points)):
            squares[row, np.argsort(np.abs(squares[row]))[:3]] = 0.0  # translations
        return thermal_properties(squares[None], weights, np.array(temperatures))


def harmonic_primitive(
    potential: Potential, one: Structures, settings: HarmonicSettings, min_edge: float
) -> Harmonic:
    """Of the primitive cell, in a supercell with edges of at least `min_edge` (Å).

    Raises:
        StructureError: what cannot be taken or relaxed.
    """
    start = _relaxed(potential, one, settings)
    assert start.structures is not None
    group = find_group(start.structures, RELAXED_SYMPREC)
    primitive = primitive_cell(symmetrize(start.structures, group), group)
    action = action_of(primitive.structures, primitive.group)
    mesh = supercell_mesh(primitive.structures.cell[0].cpu().numpy(), min_edge, action)
    return _harmonic(potential, primitive.structures, primitive.group, settings, mesh, start)


def harmonic_supercell(
    potential: Potential, one: Structures, settings: HarmonicSettings, supercell: Mesh
) -> Harmonic:
    """Of the cell given, in multiples of it.

    Raises:
        StructureError: what cannot be taken or relaxed; "AsymmetricMesh".
    """
    start = _relaxed(potential, one, settings)
    assert start.structures is not None
    group = find_group(start.structures, RELAXED_SYMPREC)
    exact = symmetrize(start.structures, group)
    if not is_compatible(supercell, action_of(exact, group)):
        raise StructureError(
            f"supercell = {supercell} breaks the symmetry of the cell",
            code="AsymmetricMesh",
            field="supercell",
            hint="give equal numbers along equivalent vectors",
        )
    return _harmonic(potential, exact, group, settings, supercell, start)


def _relaxed(potential: Potential, one: Structures, settings: HarmonicSettings) -> Relaxation:
    (start,) = relaxed_crystals(potential, one, settings.relaxation)
    if start.structures is None or start.status in ("rejected", "failed"):
        raise StructureError(start.reason, code=start.code)
    return start


def _harmonic(
    potential: Potential,
    one: Structures,
    group: CrystalSymmetry,
    settings: HarmonicSettings,
    mesh: Mesh,
    start: Relaxation,
) -> Harmonic:
    routes: dict[str, Callable[..., Float[ndarray, "cells dim dim"]]] = {
        "exact": _exact,
        "displacements": _displaced,
    }
    masses = standard_masses(one)
    periodic = routes[settings.route](potential, one, group, mesh, settings.amplitude)
    missing = start.status == "not_converged"
    return Harmonic(
        structures=one,
        group=group,
        atoms=group.first_atoms,
        constants=interpolation(one, mesh, (periodic / mass_roots(masses))[None]),
        status="not_converged" if missing else "ok",
        code=start.code if missing else "",
        reason=start.reason if missing else "",
    )


def _exact(
    potential: Potential, one: Structures, group: CrystalSymmetry, mesh: Mesh, amplitude: float
) -> Float[ndarray, "cells dim dim"]:
    """Phi(S) from D(q) in a frame turned at random."""
    masses = standard_masses(one)
    rules = sample_rules(one, group, "project", 1)
    evaluate = exact_evaluator(potential, one, rules, masses)
    samples = exact_samples(evaluate, mesh, action_of(one, group), masses)
    return np.asarray(samples.force_constants[0])


def _displaced(
    potential: Potential, one: Structures, group: CrystalSymmetry, mesh: Mesh, amplitude: float
) -> Float[ndarray, "cells dim dim"]:
    """Phi(S), projected as the exact ones, with the sum over all atoms zero."""
    masses = standard_masses(one)
    raw = _translated(_rows(potential, one, group, mesh, amplitude), one, group, mesh)
    cells = np.indices(mesh).reshape(3, -1).T

    def evaluate(
        q: Float[ndarray, "points 3"],
    ) -> Complex[ndarray, "samples points dim dim"]:
        found = np.tensordot(np.exp(2j * np.pi * q @ cells.T), raw, axes=1)
        return np.asarray((found / mass_roots(masses))[None])

    samples = exact_samples(evaluate, mesh, action_of(one, group), masses)
    found = np.array(samples.force_constants[0])
    size = len(masses)
    excess = found.sum(axis=0).reshape(3 * size, size, 3).sum(axis=1).reshape(size, 3, 3)
    for atom, block in enumerate(excess):
        own = slice(3 * atom, 3 * atom + 3)
        found[0, own, own] -= (block + block.T) / 2.0
    return found


def _rows(
    potential: Potential, one: Structures, group: CrystalSymmetry, mesh: Mesh, amplitude: float
) -> Float[ndarray, "cells dim dim"]:
    """Rows of the first atoms: Phi(j, l) = -(F_l(u_j = h) - F_l(u_j = -h))/2h."""
    supercell, dim = repeat(one, mesh), 3 * len(one.atomic_numbers)
    rows = [3 * int(atom) + axis for atom in group.first_atoms for axis in range(3)]
    steps = [(row, sign) for row in rows for sign in (amplitude, -amplitude)]
    forces = np.concatenate(
        [
            _forces(potential, supercell, steps[first : first + BATCH])
            for first in range(0, len(steps), BATCH)
        ]
    ).reshape(len(rows), 2, -1, dim)
    found: ndarray = np.zeros((forces.shape[2], dim, dim))
    found[:, rows] = ((forces[:, 1] - forces[:, 0]) / (2.0 * amplitude)).transpose(1, 0, 2)
    return found


def _translated(
    rows: Float[ndarray, "cells dim dim"], one: Structures, group: CrystalSymmetry, mesh: Mesh
) -> Float[ndarray, "cells dim dim"]:
    """All rows: atom j = T i has Phi(j, l) = Phi(i, T^-1 l)."""
    fractional, size = _fractional(one), len(one.atomic_numbers)
    grid = rows.reshape(*mesh, size, 3, size, 3)
    first = group.first_atoms[group.translation_orbit]
    for atom in np.flatnonzero(first != np.arange(size)):
        apart = fractional[:, None] - (fractional[atom] - fractional[first[atom]]) - fractional
        image = np.abs(apart - np.rint(apart)).max(axis=-1).argmin(axis=1)
        for other, back in enumerate(image):
            shift = np.rint(apart[other, back]).astype(int)
            block = grid[..., first[atom], :, back, :]
            grid[..., atom, :, other, :] = np.roll(block, tuple(-shift), axis=(0, 1, 2))
    return grid.reshape(rows.shape)


def _forces(
    potential: Potential, supercell: Structures, steps: list[tuple[int, float]]
) -> Float[ndarray, "steps all"]:
    moved = []
    for row, size in steps:
        positions = supercell.positions.clone()
        positions[row // 3, row % 3] += size
        moved.append(replace(supercell, positions=positions))
    forces = potential(concatenate(moved)).forces
    if forces is None:
        raise ConfigError("the potential gives no forces", code="NoForces", field="potential")
    values: ndarray = forces.detach().cpu().numpy()
    return values.reshape(len(steps), -1)


def _fractional(one: Structures) -> Float[ndarray, "atoms 3"]:
    cell = one.cell[0].double().cpu().numpy()
    return np.asarray(one.positions.double().cpu().numpy() @ np.linalg.inv(cell))
