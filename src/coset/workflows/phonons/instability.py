"""Whether an imaginary frequency is real: the energy along its mode in a commensurate cell."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

import numpy as np
import torch
from jaxtyping import Complex, Float
from numpy import ndarray
from torch import Tensor

from coset.edge_model import Quadrature
from coset.potential import ModelPotential, Potential
from coset.structures import Structures, concatenate, repeat, select
from coset.symmetry.average import averaged_properties
from coset.symmetry.crystal import find_group
from coset.symmetry.primitive import Primitive
from coset.workflows.observers import Step
from coset.workflows.phonons.mesh import Mesh
from coset.workflows.phonons.modes import DEGENERATE, is_gamma, vibrations

AMPLITUDES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
"""Å, of the atom that moves most."""

MAX_DENOMINATOR = 12
MAX_ATOMS = 256
MAX_DIRECTIONS = 3
SAME_AXIS = 1e-4
SMALLEST_SHARE = 0.1  # of a displaced atom in an eigenspace
SYMPREC = 1e-3
"""Å: below the smallest amplitude, so that the mode is not symmetrized away."""

REAL = 1e-9
SAME_ATOM = 1e-7  # Å: a mode may nearly keep an operation, and only what it keeps counts
SAME_OPERATION = 1e-3
SIGNIFICANT = 5.0
"""Rotational standard deviations that the energy has to drop."""

SMALLEST_DROP = 1e-6
"""eV, of a cell: what rounding and an unfinished relaxation may do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Descent:
    """The lowest energy along a mode: amplitude (Å, signed), drop and its error (eV per cell).

    falls: whether the smallest two amplitudes already lower the energy.
    """

    amplitude: float
    drop: float
    drop_error: float
    falls: bool
    cell: Structures

    @property
    def is_real(self) -> bool:
        """Whether the energy drops by more than its error."""
        return self.falls and self.drop > max(SIGNIFICANT * self.drop_error, SMALLEST_DROP)


def commensurate(q: Float[ndarray, "3"]) -> Mesh | None:
    """The smallest supercell in which a wave vector is periodic, None if it is too large."""
    parts = [Fraction(float(x)).limit_denominator(MAX_DENOMINATOR) for x in q]
    near = max(abs(float(part) - x) for part, x in zip(parts, q, strict=True))
    first, second, third = (part.denominator for part in parts)
    return (first, second, third) if near < REAL**0.5 else None


def mode_displacements(
    primitive: Structures,
    q: Float[ndarray, "3"],
    vector: Complex[ndarray, " dim"],
    masses: Float[ndarray, " atoms"],
    mesh: Mesh,
) -> Float[Tensor, "images 3"]:
    """Re[e_j e^(2 pi i q.S)]/sqrt(m_j) in a supercell, scaled to a largest displacement of 1 Å."""
    cells = np.indices(mesh).reshape(3, -1).T
    phase = np.exp(2j * np.pi * cells @ q)
    polarization = (vector / np.repeat(np.sqrt(masses), 3)).reshape(-1, 3)
    waves = phase[:, None, None] * polarization
    moved = waves.real.reshape(-1, 3)
    return torch.from_numpy(moved / np.linalg.norm(moved, axis=1).max())


def directions(
    primitive: Primitive,
    masses: Float[ndarray, " atoms"],
    matrix: Complex[ndarray, "dim dim"],
    q: Float[ndarray, "3"],
    cells: Mesh,
) -> list[Complex[ndarray, " dim"]]:
    """Unit vectors of the lowest eigenspace that keep the largest, mutually different groups.

    Atoms moved along rotation axes, projected on the eigenspace. Where -q is not q, the wave has
    its crest or its node at the atom, which makes different crystals of one mode.
    """
    real = np.abs(2 * q - np.rint(2 * q)).max() < REAL
    space = _lowest_space(matrix.real if real else matrix, q, masses)
    if real and space.shape[1] == 1:
        return [space[:, 0].astype(complex)]
    one, axes = primitive.structures, _axes(primitive.group.cartesian_rotations)
    still, found = repeat(one, cells), dict[tuple[int, int], ndarray]()
    for atom, axis, phase in product(range(len(masses)), axes, (1.0,) if real else (1.0, 1j)):
        moved = np.zeros((len(masses), 3), dtype=complex)
        moved[atom] = phase * axis
        vector = space @ (space.conj().T @ moved.reshape(-1))
        if (length := np.linalg.norm(vector)) < SMALLEST_SHARE:
            continue
        vector = vector / length
        shift = mode_displacements(one, q, vector, masses, cells)
        group = find_group(displaced(still, shift, [0.1]), SYMPREC)
        found.setdefault((group.order, group.number or 0), vector)
    return [found[key] for key in sorted(found, reverse=True)[:MAX_DIRECTIONS]]


def _lowest_space(
    matrix: Complex[ndarray, "dim dim"] | Float[ndarray, "dim dim"],
    q: Float[ndarray, "3"],
    masses: Float[ndarray, " atoms"],
) -> Complex[ndarray, "dim space"] | Float[ndarray, "dim space"]:
    """Orthonormal eigenvectors of the lowest eigenvalue, without translations at Gamma."""
    basis = vibrations(masses) if bool(is_gamma(q[None])[0]) else np.eye(len(matrix))
    values, vectors = np.linalg.eigh(basis.T @ matrix @ basis)
    lowest = values < values[0] + DEGENERATE * np.abs(values).max()
    return np.asarray(basis @ vectors[:, lowest])


def _axes(operations: Float[ndarray, "operations 3 3"]) -> list[Float[ndarray, "3"]]:
    """Unit vectors along rotation axes and normal to mirrors: top eigenvectors of R + R^T."""
    proper = operations * np.linalg.det(operations)[:, None, None]
    axes: list[ndarray] = []
    for rotation in proper[np.trace(proper, axis1=1, axis2=2) < 3.0 - SAME_AXIS]:
        axis = np.linalg.eigh(rotation + rotation.T)[1][:, -1]
        if all(abs(axis @ other) < 1.0 - SAME_AXIS for other in axes):
            axes.append(axis)
    return axes or list(np.eye(3))


def follow(
    potential: Potential,
    primitive: Primitive,
    rules: Sequence[Quadrature],
    displacements: Float[Tensor, "images 3"],
    mesh: Mesh,
    step: Step = lambda note: None,
) -> Descent:
    """The lowest of the energies at both signs of all amplitudes."""
    still = repeat(primitive.structures, mesh)
    steps = [0.0, *(sign * a for a in AMPLITUDES for sign in (1.0, -1.0))]
    batch = displaced(still, displacements, steps)
    energies = averaged_energies(potential, primitive, rules, batch, step)
    changes = energies[:, 1:] - energies[:, :1]
    mean = changes.mean(axis=0)
    best = int(mean.argmin())
    spread = float(changes[:, best].std(ddof=1)) if len(rules) > 1 else 0.0
    return Descent(
        amplitude=steps[1 + best],
        drop=-float(mean[best]),
        drop_error=spread,
        falls=bool((mean[0:4:2] + mean[1:4:2] < 0.0).all()),
        cell=select(batch, torch.tensor([1 + best])),
    )


def displaced(
    still: Structures, displacements: Float[Tensor, "atoms 3"], steps: Sequence[float]
) -> Structures:
    """A batch of one structure with its atoms moved by multiples of their displacements."""
    moved = displacements.to(still.positions)
    return concatenate([replace(still, positions=still.positions + s * moved) for s in steps])


def averaged_energies(
    potential: Potential,
    primitive: Primitive,
    rules: Sequence[Quadrature],
    batch: Structures,
    step: Step = lambda note: None,
) -> Float[ndarray, "rules steps"]:
    """Energies (eV) of a crystal moved along one mode, the last system moved most.

    Each rule is averaged over the images of the mode under the group of the crystal: the energy
    whose second derivatives are the projected force constants.
    """
    images = _images(batch, primitive)
    plain = replace(potential, forces=False) if isinstance(potential, ModelPotential) else potential
    found = []
    for number, rule in enumerate(rules):
        step(f"energy along a mode, frame {number + 1} of {len(rules)}")
        found.append(_energies(plain, batch, _over_images(rule, images)))
    return np.array(found)


def _energies(
    potential: Potential, batch: Structures, rule: Quadrature
) -> Float[ndarray, " steps"]:
    energy = averaged_properties(potential, batch, [rule] * len(batch)).energy
    assert energy is not None
    return energy.cpu().numpy()


def _images(batch: Structures, primitive: Primitive) -> Float[Tensor, "images 3 3"]:
    """Operations of the crystal that turn the displaced one differently: one of each coset.

    Of its own group at the largest amplitude, whatever the others have is a part.
    """
    group = primitive.group.cartesian_rotations
    farthest = select(batch, torch.tensor([len(batch) - 1]))
    kept = find_group(farthest, SAME_ATOM).cartesian_rotations
    chosen: list[ndarray] = []
    covered = np.zeros(len(group), dtype=bool)
    for operation in group:
        same = np.abs(group - operation).max(axis=(1, 2)) < SAME_OPERATION
        if covered[same].any():
            continue
        chosen.append(operation)
        for other in operation @ kept:
            covered |= np.abs(group - other).max(axis=(1, 2)) < SAME_OPERATION
    return torch.from_numpy(np.array(chosen))


def _over_images(rule: Quadrature, images: Float[Tensor, "images 3 3"]) -> Quadrature:
    """R_k Q_g for all nodes and operations: E of R_k x averaged over the images of x."""
    nodes = (rule.rotations[:, None] @ images).reshape(-1, 3, 3)
    weights = (rule.weights[:, None] / len(images)).expand(-1, len(images)).reshape(-1)
    return Quadrature(rotations=nodes, weights=weights, degree=rule.degree)
