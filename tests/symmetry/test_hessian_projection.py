"""Projection of Hessians on the group of a molecule, slab or crystal."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from coset.structures import concatenate, repeat, rotate
from coset.symmetry.crystal import find_group, symmetrize
from coset.symmetry.projection import make_projector, project_hessian
from tests.factories import FCC_SITES, crystal, molecule, prototype, tiny_potential
from tests.tolerances import HESSIAN_DIFFERENCE

SYMPREC = 1e-2
EXACT = 1e-12  # eV/Å²: a mean of unit normals over at most 192 operations in float64
STEP = 1e-4  # Å


def methane():
    corners = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
    return turned(molecule(0.63 * np.array([(0, 0, 0), *corners]), [6, 1, 1, 1, 1]))


def carbon_dioxide():
    return turned(molecule([(0, 0, 0), (1.16, 0, 0), (-1.16, 0, 0)], [6, 8, 8]))


def slab():
    """Three layers of fcc(100), doubled along one direction."""
    cell = np.diag([2.55, 2.55, 20.0])
    sites = [(0, 0, 0), (0.5, 0.5, 0.09), (0, 0, 0.18)]
    return turned(repeat(crystal(cell, sites, [29] * 3, (True, True, False)), (2, 1, 1)))


def rutile():
    """Doubled along one of two equal directions: half of the rotations are lost."""
    u = 0.305
    oxygen = [(u, u, 0), (-u, -u, 0), (0.5 + u, 0.5 - u, 0.5), (0.5 - u, 0.5 + u, 0.5)]
    cell = np.diag([4.594, 4.594, 2.959])
    whole = crystal(cell, [(0, 0, 0), (0.5, 0.5, 0.5), *oxygen], [14] * 2 + [8] * 4)
    return turned(repeat(whole, (2, 1, 1)))


def rocksalt():
    """The conventional cell, with centering translations."""
    sites = np.concatenate([FCC_SITES, np.array(FCC_SITES) + 0.5])
    return turned(crystal(4.3 * np.eye(3), sites, [29] * 4 + [8] * 4))


def turned(one):
    matrix = torch.tensor([[1.0, 2, 3], [2, -1, 1], [0, 1, 5]], dtype=torch.float64)
    return rotate(one, torch.linalg.qr(matrix)[0])


CASES = {
    "methane": (methane, 24),
    "carbon dioxide": (carbon_dioxide, 24),
    "slab": (slab, 16),
    "rutile": (rutile, 16),
    "rocksalt": (rocksalt, 192),
    "copper": (lambda: prototype("fcc", 3.6), 192),
}


def operations(one, group):
    """Q and permutation of every operation, from all distances."""
    cell = one.cell[0].numpy() * one.pbc[0].numpy()[:, None]
    inverse = np.linalg.pinv(cell)
    x = one.positions.numpy()
    for Q, permutation in zip(group.cartesian_rotations, group.permutations, strict=True):
        for pure in group.pure_translations:
            there = x[permutation] + pure @ cell
            gap = there[:, None] - x
            gap -= np.round(gap @ inverse) @ cell
            yield torch.from_numpy(Q), torch.from_numpy(np.linalg.norm(gap, axis=2).argmin(axis=1))


def normal(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_projection_is_the_mean_over_the_group(name):
    build, order = CASES[name]
    one = build()
    group, n = find_group(one, SYMPREC), len(one.positions)
    hessian = normal((n, 3, n, 3), 0)
    projected = project_hessian(hessian, group)
    assert group.order == order
    every = list(operations(one, group))
    assert len({(*q.ravel().tolist(), *p.tolist()) for q, p in every}) == order
    mean = torch.zeros_like(hessian)
    for Q, p in every:
        mean += torch.einsum("ba,ibjc,cd->iajd", Q, hessian[p][:, :, p], Q) / order
    assert float((projected - mean).abs().max()) < EXACT
    assert float((project_hessian(projected, group) - projected).abs().max()) < EXACT
    for Q, p in every:
        image = torch.einsum("ba,ibjc,cd->iajd", Q, projected[p][:, :, p], Q)
        assert float((image - projected).abs().max()) < EXACT
    removed = hessian - projected
    assert abs(float((removed * projected).sum())) < 1e-10  # orthogonal


@pytest.mark.parametrize("name", CASES)
def test_what_a_hessian_has_stays(name):
    """Its symmetry, the acoustic sum rule, the response to displacements that keep the group."""
    one = CASES[name][0]()
    group, n = find_group(one, SYMPREC), len(one.positions)
    raw = normal((n, 3, n, 3), 1)
    raw = raw + raw.permute(2, 3, 0, 1)
    raw = raw - raw.mean(2, keepdim=True)
    raw = raw - raw.mean(0, keepdim=True)
    projected = project_hessian(raw, group)
    assert float((projected - projected.permute(2, 3, 0, 1)).abs().max()) < EXACT
    assert float(projected.sum(2).abs().max()) < EXACT
    projector = make_projector([group])
    kept = projector.forces(normal((n, 3), 2))
    response = torch.einsum("iajb,jb->ia", raw, kept)
    found = torch.einsum("iajb,jb->ia", projected, kept)
    assert float((projector.forces(response) - found).abs().max()) < 1e-11


def test_result_is_float64_and_without_symmetry_nothing_changes():
    one = molecule([(0, 0, 0), (1.1, 0, 0), (0.2, 1.3, 0), (0.3, 0.4, 1.7)], [8, 1, 6, 14])
    hessian = normal((4, 3, 4, 3), 3).float()
    projected = project_hessian(hessian, find_group(one, SYMPREC))
    assert projected.dtype == torch.float64
    assert torch.equal(projected, hessian.double())


def hessian_of(potential, one):
    """Central differences of forces: [atoms, 3, atoms, 3]."""
    n = len(one.positions)
    steps = STEP * torch.eye(3 * n).double().reshape(3 * n, n, 3)
    moved = [replace(one, positions=one.positions + s * step) for step in steps for s in (1, -1)]
    forces = potential(concatenate(moved)).forces.reshape(n, 3, 2, n, 3)
    return -((forces[:, :, 0] - forces[:, :, 1]) / (2 * STEP)).permute(2, 3, 0, 1)


@pytest.mark.parametrize("name", ["methane", "carbon dioxide", "slab"])
def test_mean_over_the_hessians_of_copies(name):
    one = CASES[name][0]()
    one = symmetrize(one, find_group(one, SYMPREC))
    group, potential = find_group(one, SYMPREC), tiny_potential()
    raw = hessian_of(potential, one)
    projected = project_hessian(raw, group)
    mean = torch.zeros_like(raw)
    for Q in torch.from_numpy(group.cartesian_rotations):
        copy = hessian_of(potential, rotate(one, Q))
        mean += torch.einsum("ba,ibjc,cd->iajd", Q, copy, Q) / len(group.cartesian_rotations)
    assert float((projected - mean).abs().max()) < HESSIAN_DIFFERENCE
    assert float((projected - raw).abs().max()) > 1e-4  # the network does break the group
