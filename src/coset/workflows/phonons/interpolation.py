"""Force constants between dynamical matrices of a mesh and those at any wave vector.

    Phi(S) = (1/N) sum_q D(q) e^(-2 pi i q.S),   D(q) = sum_S Phi(S) e^(2 pi i q.S)

where the cell S of every pair of atoms is its nearest image in the supercell of the mesh, shared
equally among images at the same distance.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float, Int
from numpy import ndarray

from coset.structures import Structures
from coset.symmetry.crystal import reduced_basis
from coset.workflows.phonons.mesh import Mesh

SAME_DISTANCE = 1e-5
"""Å: images at distances that differ by less count as equally near."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpolation:
    """Force constants of several samples, divided by the root of both masses (eV/Å²/amu).

    cells: S. blocks: of each sample, for every S.
    """

    cells: Int[ndarray, "cells 3"]
    blocks: Float[ndarray, "samples cells dim dim"]

    def matrices(self, q: Float[ndarray, "points 3"]) -> Complex[ndarray, "samples points dim dim"]:
        """D(q) of every sample, lattice phase, fractional q."""
        n_samples, n_cells, dim, _ = self.blocks.shape
        phase = np.exp(2j * np.pi * q @ self.cells.T)
        flat = self.blocks.reshape(n_samples, n_cells, dim * dim)
        return np.asarray(phase @ flat).reshape(n_samples, len(q), dim, dim)


def force_constants(
    matrices: Complex[ndarray, "samples points dim dim"], mesh: Mesh
) -> Float[ndarray, "samples points dim dim"]:
    """Phi(S) of the periodic supercell, S in the order of the mesh; any imaginary part is lost."""
    n_samples, n_points, dim, _ = matrices.shape
    grid = matrices.reshape(n_samples, *mesh, dim, dim)
    transformed = np.fft.fftn(grid, axes=(1, 2, 3)).real / n_points
    return np.asarray(transformed.reshape(matrices.shape))


def interpolation(
    primitive: Structures, mesh: Mesh, periodic: Float[ndarray, "samples points dim dim"]
) -> Interpolation:
    """Force constants of the periodic supercell, each on the nearest images of its pair."""
    cell = primitive.cell[0].double().cpu().numpy()
    fractional = primitive.positions.double().cpu().numpy() @ np.linalg.inv(cell)
    n_atoms, n_samples = len(fractional), len(periodic)
    place, first, second, image, weight = _nearest_images(fractional, cell, mesh)
    cells, where = np.unique(image, axis=0, return_inverse=True)
    pairs = periodic.reshape(n_samples, -1, n_atoms, 3, n_atoms, 3).transpose(1, 2, 4, 0, 3, 5)
    blocks = np.zeros((len(cells), n_atoms, n_atoms, n_samples, 3, 3))
    own = pairs[place, first, second] * weight[:, None, None, None]
    np.add.at(blocks, (where.reshape(-1), first, second), own)
    ordered = blocks.transpose(3, 0, 1, 4, 2, 5)
    return Interpolation(
        cells=cells, blocks=ordered.reshape(n_samples, len(cells), 3 * n_atoms, 3 * n_atoms)
    )


def _nearest_images(
    fractional: Float[ndarray, "atoms 3"], cell: Float[ndarray, "3 3"], mesh: Mesh
) -> tuple[
    Int[ndarray, " images"],
    Int[ndarray, " images"],
    Int[ndarray, " images"],
    Int[ndarray, "images 3"],
    Float[ndarray, " images"],
]:
    """Place of S in the mesh, both atoms, S of the nearest image, and its share."""
    numbers = np.array(mesh)
    reduced = reduced_basis(numbers[:, None] * cell)
    to_reduced, to_cells = cell @ np.linalg.inv(reduced), reduced @ np.linalg.inv(cell)
    starts = np.indices(mesh).reshape(3, -1).T
    apart = fractional[None, None, :] - fractional[None, :, None] + starts[:, None, None]
    base = np.rint(apart @ to_reduced)
    steps = np.indices((3, 3, 3)).reshape(3, -1).T - 1
    shift = np.rint((steps - base[..., None, :]) @ to_cells)
    length = np.linalg.norm((apart[..., None, :] + shift) @ cell, axis=-1)
    near = length < length.min(axis=-1, keepdims=True) + SAME_DISTANCE
    place, first, second, step = np.nonzero(near)
    image = starts[place] + shift[place, first, second, step].astype(np.int64)
    weight = 1 / near.sum(axis=-1)[place, first, second]
    return place, first, second, image, weight
