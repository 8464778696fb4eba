"""Detection of space groups, permutations, symmetrization and its refusals."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import special_ortho_group

from coset.errors import StructureError
from coset.structures import concatenate, make_structure, repeat, rotate, strain
from coset.symmetry import crystal as crystal_module
from coset.symmetry.crystal import (
    find_group,
    nearest_symmetric,
    space_group_number,
    symmetrize,
    symmetry_warnings,
    trivial_group,
)
from coset.symmetry.projection import make_projector

SYMPREC = 1e-2


def crystal(cell, numbers, sites):
    lattice = torch.tensor(np.array(cell, dtype=float))
    positions = torch.tensor(np.array(sites, dtype=float)) @ lattice
    return make_structure(positions, torch.tensor(numbers), cell=lattice, pbc=(True, True, True))


def hexagonal(a, c):
    return [[a, 0, 0], [-a / 2, a * 3**0.5 / 2, 0], [0, 0, c]]


def fcc():
    sites = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    return crystal(np.eye(3) * 4.05, [13] * 4, sites)


def rutile(u=0.305):
    oxygen = [[u, u, 0], [-u, -u, 0], [0.5 + u, 0.5 - u, 0.5], [0.5 - u, 0.5 + u, 0.5]]
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], *oxygen]
    return crystal(np.diag([4.594, 4.594, 2.959]), [22, 22, 8, 8, 8, 8], sites)


def quartz():
    x, u, v, w = 0.4697, 0.4135, 0.2669, 0.1191
    silicon = [[x, 0, 2 / 3], [0, x, 1 / 3], [-x, -x, 0]]
    oxygen = [
        [u, v, w + 2 / 3],
        [-v, u - v, w + 1 / 3],
        [v - u, -u, w],
        [v, u, -w + 1 / 3],
        [u - v, -v, -w + 2 / 3],
        [-u, v - u, -w],
    ]
    sites = np.array(silicon + oxygen)
    return crystal(hexagonal(4.9137, 5.4047), [14] * 3 + [8] * 6, sites)


def wurtzite():
    sites = [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5], [1 / 3, 2 / 3, 0.382], [2 / 3, 1 / 3, 0.882]]
    return crystal(hexagonal(3.25, 5.2), [30, 30, 8, 8], sites)


def zirconia():
    """Monoclinic, P2_1/c."""
    general = [[0.2754, 0.0395, 0.2083], [0.0700, 0.3317, 0.3447], [0.4496, 0.7569, 0.4792]]
    beta = np.radians(99.23)
    cell = [[5.150, 0, 0], [0, 5.212, 0], [5.317 * np.cos(beta), 0, 5.317 * np.sin(beta)]]
    sites = [
        site
        for x, y, z in general
        for site in ([x, y, z], [-x, y + 0.5, 0.5 - z], [-x, -y, -z], [x, 0.5 - y, z + 0.5])
    ]
    return crystal(cell, [40] * 4 + [8] * 8, sites)


def diamond_primitive():
    return crystal(5.43 * (0.5 - np.eye(3) / 2), [14, 14], [[0, 0, 0], [0.25, 0.25, 0.25]])


def molecule():
    sites = [[0, 0, 0], [1.1, 0, 0], [0.2, 1.3, 0], [0.3, 0.4, 1.7]]
    return make_structure(torch.tensor(sites).double(), torch.tensor([8, 1, 6, 7]))


KNOWN = {
    "fcc": (fcc, 225),
    "rutile": (rutile, 136),
    "wurtzite": (wurtzite, 186),
    "zirconia": (zirconia, 14),
    "diamond": (diamond_primitive, 227),
    "quartz": (quartz, 154),
}


def rattled(one, amplitude, seed=0, cell_amplitude=0.0):
    """Atoms moved by normal noise (Å), the cell strained and turned by normal noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(one.positions.shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(1, 3, 3, generator=generator, dtype=torch.float64)
    moved = replace(one, positions=one.positions + amplitude * noise)
    return strain(moved, cell_amplitude * gradient)


@pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING:DeprecationWarning")
@pytest.mark.parametrize("name", KNOWN)
def test_number_is_that_of_spglib(name):
    spglib = pytest.importorskip("spglib")
    build, number = KNOWN[name]
    one = build()
    assert space_group_number(one, SYMPREC) == number
    fractional = one.positions @ torch.linalg.inv(one.cell[0])
    cell = (one.cell[0].numpy(), fractional.numpy(), one.atomic_numbers.numpy())
    dataset = spglib.get_symmetry_dataset(cell, symprec=SYMPREC)
    assert dataset.number == number
    assert find_group(one, SYMPREC).order == len(dataset.rotations)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 2, 2)])
def test_symmetrize_in_one_pass(name, repeats):
    build, number = KNOWN[name]
    turn = torch.from_numpy(special_ortho_group.rvs(3, random_state=1))
    ideal = rotate(repeat(build(), repeats), turn)
    noisy = rattled(ideal, 1e-3, cell_amplitude=1e-5)
    group = find_group(noisy, SYMPREC)
    assert group.number == number
    assert group.order == find_group(ideal, SYMPREC).order
    assert space_group_number(noisy, 1e-5) != number

    exact = symmetrize(noisy, group)
    found = find_group(exact, 1e-5)
    assert (found.number, found.order) == (number, group.order)
    assert float((exact.positions - noisy.positions).norm(dim=1).max()) < 6e-3
    again, moves, stretch = nearest_symmetric(exact, found)
    assert moves.max() < 1e-12
    assert stretch < 1e-12
    assert float((again.positions - exact.positions).abs().max()) < 1e-12
    # a symmetric stretch: the deformation of the cell is symmetric, so nothing was turned
    deformation = torch.linalg.solve(noisy.cell[0], exact.cell[0])
    assert float((deformation - deformation.mT).abs().max()) < 1e-14


@pytest.mark.parametrize(
    "shear", [[[1, 0, 0], [0, 1, 0], [150, 80, 1]], [[1, 0, 0], [70, 1, 0], [0, 0, 1]]]
)
def test_noise_in_a_skewed_cell(shear):
    """In fractional coordinates of these cells the wrong site is nearer than the right one."""
    noisy = rattled(zirconia(), 1.2e-2)
    skewed = replace(noisy, cell=torch.tensor(shear, dtype=torch.float64) @ noisy.cell)
    group, reference = find_group(skewed, 0.1), find_group(noisy, 0.1)
    assert (group.number, group.order, group.warnings) == (14, 4, ())
    rows = {tuple(row) for row in reference.permutations.tolist()}
    assert {tuple(row) for row in group.permutations.tolist()} == rows
    exact = symmetrize(skewed, group)
    assert float((exact.positions - noisy.positions).norm(dim=1).max()) < 0.06
    assert find_group(exact, 1e-5).order == 4


def test_noise_in_a_long_cell(monkeypatch):
    """Across, the noise is a larger fraction of the cell than the bonds are along it.

    moyo itself finds only P-1 there, so the operations are those of the ideal crystal.
    """
    heights = np.array([-2.0, -0.7, 0.7, 2.0]) / 600
    ideal = crystal(np.diag([3.0, 3.0, 600.0]), [13] * 4, [[0, 0, z] for z in heights])
    dataset = crystal_module._detect(crystal_module._crystal(ideal), 0.1)
    monkeypatch.setattr(crystal_module, "_detect", lambda *_: dataset)
    noisy = rattled(ideal, 1e-2)
    group = find_group(noisy, 0.1)
    assert (group.number, group.order, group.warnings) == (123, 16, ())
    moves = nearest_symmetric(noisy, group)[1]
    assert moves.max() < 0.06


@pytest.mark.parametrize("name", KNOWN)
def test_symmetrized_structure_is_the_nearest(name):
    """The move has no component that keeps the group: P (x_exact - x) = 0."""
    noisy = rattled(repeat(KNOWN[name][0](), (2, 1, 1)), 1e-3)
    group = find_group(noisy, SYMPREC)
    move = symmetrize(noisy, group).positions - noisy.positions
    assert float(make_projector([group]).forces(move).abs().max()) < 1e-13


def test_rotations_are_orthogonal_for_a_distorted_cell():
    noisy = rattled(rutile(), 0.0, cell_amplitude=5e-4)
    Q = find_group(noisy, SYMPREC).cartesian_rotations
    assert len(Q) == 16
    assert np.abs(Q @ Q.transpose(0, 2, 1) - np.eye(3)).max() < 1e-14


def test_symmetrized_sites_are_translation_equivalent():
    noisy = rattled(repeat(zirconia(), (2, 2, 2)), 1e-3)
    exact = symmetrize(noisy, find_group(noisy, SYMPREC))
    images = exact.positions.reshape(8, -1, 3)
    offsets = images - images[:1]
    shifts = (offsets @ torch.linalg.inv(exact.cell[0])).mean(dim=1, keepdim=True) * 2
    assert float((shifts - shifts.round()).abs().max()) < 1e-14
    assert float((offsets - offsets[:, :1]).abs().max()) < 1e-13


def test_symmetrize_keeps_images_and_dtype_is_double():
    one = rutile()
    far = replace(one, positions=one.positions + 7 * one.cell[0, :1])
    noisy = rattled(far, 1e-3).to(torch.float32)
    exact = symmetrize(noisy, find_group(noisy, SYMPREC))
    assert exact.positions.dtype == exact.cell.dtype == torch.float64
    assert float((exact.positions - noisy.positions).abs().max()) < 6e-3
    assert space_group_number(exact, 1e-5) == 136


def test_far_structures_are_refused():
    ideal = repeat(rutile(), (1, 1, 2))
    group = find_group(ideal, SYMPREC)
    moved = ideal.positions.clone()
    moved[3, 1] += 0.2
    with pytest.raises(StructureError, match=r"group 136: atom 3 would move .*--symprec") as caught:
        symmetrize(replace(ideal, positions=moved), group)
    assert caught.value.code == "TooFarFromGroup"
    sheared = strain(ideal, torch.tensor([[[0, 0.05, 0], [0, 0, 0], [0, 0, 0]]]).double())
    with pytest.raises(StructureError, match="strain is 2"):
        symmetrize(sheared, group)


def test_lost_operations_are_refused(monkeypatch):
    group = find_group(rutile(), SYMPREC)
    monkeypatch.setattr(crystal_module, "find_group", lambda one, _: trivial_group(one))
    with pytest.raises(StructureError, match="operations are lost"):
        symmetrize(rutile(), group)


def test_gain_is_accepted():
    """Symmetrizing to a subgroup of what the structure has is harmless."""
    one = repeat(fcc(), (2, 2, 2))
    fixed = torch.zeros(32, dtype=torch.bool)
    fixed[0] = True
    group = find_group(one, SYMPREC, fixed=fixed)
    assert group.order == 48
    exact = symmetrize(one, group)
    assert find_group(exact, 1e-5).order == 48 * 32


def test_open_systems_and_failures():
    group = find_group(molecule(), SYMPREC)
    assert (group.number, group.order, group.warnings) == (None, 1, ())
    assert space_group_number(molecule(), SYMPREC) is None
    assert symmetry_warnings(molecule(), SYMPREC) == ()
    slab = replace(fcc(), pbc=torch.tensor([[True, True, False]]))
    assert find_group(slab, SYMPREC).number is None
    one = molecule()
    assert torch.equal(symmetrize(one, group).positions, one.positions)
    assert symmetrize(one.to(torch.float32), group).positions.dtype == torch.float64

    coinciding = replace(fcc(), positions=fcc().positions * torch.tensor([0.0, 0, 0, 0])[:, None])
    failed = find_group(coinciding, SYMPREC)
    assert (failed.number, failed.order) == (1, 1)
    assert failed.warnings == ("symmetry_failed",)
    with pytest.raises(StructureError, match="batch of one"):
        find_group(concatenate([fcc(), fcc()]), SYMPREC)


@pytest.mark.parametrize(
    ("sign", "shift", "mapping", "symprec", "order"),
    [
        (-1, 0.4, [0, 1], SYMPREC, 2),  # right
        (-1, 0.39, [0, 1], SYMPREC, 1),  # images 0.1 Å away from any site
        (-1, 0.15, [0, 1], 5.0, 1),  # both atoms land on the first
        (-1, 0.4, [0, 0], SYMPREC, 1),  # one orbit, but no pure translation
        (1, 0.4, [0, 1], SYMPREC, 1),  # a pure translation, but two orbits
        (1, 0.39, [0, 0], SYMPREC, 1),  # a pure translation 0.1 Å away from any pair
        (1, 0.4, [0, 0], 1e-3, 1),  # a pure translation between species, see below
    ],
)
def test_wrong_operations_are_not_believed(monkeypatch, sign, shift, mapping, symprec, order):
    second = 22 if symprec == 1e-3 else 13
    one = crystal(np.eye(3) * 10, [13, second], [[0, 0, 0], [0.4, 0, 0]])
    operations = SimpleNamespace(
        rotations=[np.eye(3, dtype=int), sign * np.eye(3, dtype=int)],
        translations=[[0.0, 0.0, 0.0], [shift, 0.0, 0.0]],
    )
    dataset = SimpleNamespace(
        number=2, symprec=symprec, operations=operations, mapping_std_prim=mapping
    )
    monkeypatch.setattr(crystal_module, "_detect", lambda *_: dataset)
    group = find_group(one, symprec)
    assert group.order == order
    assert group.warnings == (() if order == 2 else ("symmetry_failed",))


def test_ambiguity():
    assert symmetry_warnings(rutile(), SYMPREC) == ()
    assert symmetry_warnings(rattled(rutile(), 1e-3), SYMPREC) == ("symmetry_ambiguous",)
    assert symmetry_warnings(rattled(rutile(), 2e-2), SYMPREC) == ("symmetry_ambiguous",)


def test_large_supercell():
    """1372 atoms, 65,856 operations: kept as 48 and one orbit."""
    one = rattled(repeat(fcc(), (7, 7, 7)), 1e-3)
    start = time.process_time()
    group = find_group(one, SYMPREC)
    projector = make_projector([group])
    assert time.process_time() - start < 10.0
    assert group.order == 65856
    assert group.permutations.shape == (48, 1372)
    assert len(projector.source) == 48
    arrays = [getattr(group, name) for name in group.__slots__]
    assert sum(a.nbytes for a in arrays if isinstance(a, np.ndarray)) < 1e6
    forces = torch.randn(1372, 3, dtype=torch.float64)
    assert float(projector.forces(forces).abs().max()) < 1e-14
    exact = symmetrize(one, group)
    assert find_group(exact, 1e-5).order == 65856


def layer(one):
    return one.positions[:, 2] < 2.0


def lonely(one):
    return torch.arange(len(one.positions)) == 5


def two_thirds(one):
    return torch.rand(len(one.positions), generator=torch.Generator().manual_seed(3)) < 0.66


@pytest.mark.parametrize(("mask", "order"), [(layer, 16 * 8), (lonely, 48), (two_thirds, 2)])
def test_group_of_fixed_atoms(mask, order):
    one = repeat(fcc(), (2, 2, 2))
    fixed = mask(one)
    group = find_group(one, SYMPREC, fixed=fixed)
    assert bool((fixed[torch.from_numpy(group.permutations)] == fixed).all())
    inverse = np.linalg.inv(one.cell[0].numpy())
    sites = one.positions.numpy() @ inverse
    whole = find_group(one, SYMPREC)
    count = 0
    for W, t in zip(whole.rotations, whole.translations, strict=True):
        for shift in whole.pure_translations:
            gap = (sites @ W.T + t + shift)[:, None] - sites[None]
            permutation = np.abs(gap - np.round(gap)).max(axis=2).argmin(axis=1)
            count += bool((fixed[torch.from_numpy(permutation)] == fixed).all())
    assert (group.order, count) == (order, order)


@pytest.mark.parametrize("name", KNOWN)
def test_permutations_are_those_of_brute_force(name):
    one = rattled(repeat(KNOWN[name][0](), (2, 1, 1)), 1e-3)
    group = find_group(one, SYMPREC)
    cell = one.cell[0].numpy()
    sites = one.positions.numpy() @ np.linalg.inv(cell)
    for W, t, permutation in zip(
        group.rotations, group.translations, group.permutations, strict=True
    ):
        gap = (sites @ W.T + t)[:, None] - sites[None]
        distance = np.linalg.norm((gap - np.round(gap)) @ cell, axis=2)
        assert (distance.argmin(axis=1) == permutation).all()
        assert (one.atomic_numbers.numpy()[permutation] == one.atomic_numbers.numpy()).all()
    gap = sites - sites[group.first_atoms][group.translation_orbit]
    gap -= group.pure_translations[group.translation_index]
    assert np.linalg.norm((gap - np.round(gap)) @ cell, axis=1).max() < 1e-2
