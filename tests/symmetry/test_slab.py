"""Layer groups of slabs: all 80, orientations, vacuum, supercells, symmetrization, projection."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from moyopy import operations_from_layer_number
from scipy.stats import special_ortho_group

from coset.errors import StructureError
from coset.structures import Structures, concatenate, make_structure, repeat, rotate, strain
from coset.symmetry.crystal import (
    find_group,
    nearest_symmetric,
    symmetrize,
    symmetry_warnings,
)
from coset.symmetry.projection import make_projector
from coset.workflows.evaluate import evaluate
from coset.workflows.relax import relax
from coset.workflows.relaxation import RelaxSettings
from tests.factories import rattled, tiny_potential
from tests.lennard_jones import LennardJones
from tests.tolerances import AVERAGED

SYMPREC = 1e-2
EXACT = 1e-12  # eV/Å: a mean of unit normals over at most 32 operations in float64
SQUARE = ((1.0, 0.0), (0.0, 1.0))
HEXAGONAL = ((1.0, 0.0), (-0.5, 0.75**0.5))


def slab(plane, sites, numbers, vector=(0.0, 0.0, 0.0)):
    """Sites: two fractional coordinates, then a height in Å; the open cell vector comes last."""
    cell = np.zeros((3, 3))
    cell[:2, :2], cell[2] = plane, vector
    sites = np.array(sites, dtype=float)
    positions = np.column_stack([sites[:, :2] @ cell[:2, :2], sites[:, 2]])
    return make_structure(
        torch.from_numpy(positions),
        torch.tensor(numbers),
        cell=torch.from_numpy(cell),
        pbc=(True, True, False),
    )


def stack(plane, shift, spacing, n):
    """Layers of copper, each moved by the fractional shift."""
    sites = [[k * shift[0], k * shift[1], k * spacing] for k in range(n)]
    return slab(2.55 * np.array(plane), sites, [29] * n)


def fcc100(n=3):
    return stack(SQUARE, (0.5, 0.5), 1.803, n)


def fcc110(n=5):
    return stack(np.diag([1.0, 2**0.5]), (0.5, 0.5), 1.275, n)


def fcc111(n=4):
    return stack(HEXAGONAL, (1 / 3, 2 / 3), 2.082, n)


def graphene():
    return slab(2.46 * np.array(HEXAGONAL), [[0, 0, 0], [1 / 3, 2 / 3, 0]], [6, 6])


def molybdenum_disulfide():
    sites = [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 1.56], [2 / 3, 1 / 3, -1.56]]
    return slab(3.16 * np.array(HEXAGONAL), sites, [29, 8, 8])


def wurtzite():
    """Two double layers, (0001): polar."""
    sites = [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 1.99], [2 / 3, 1 / 3, 2.6], [2 / 3, 1 / 3, 4.59]]
    return slab(3.25 * np.array(HEXAGONAL), sites, [14, 8, 14, 8])


SLABS = {
    "fcc(100)": (fcc100, 16),
    "fcc(100), even": (lambda: fcc100(4), 16),
    "fcc(110)": (fcc110, 8),
    "fcc(111)": (fcc111, 12),
    "graphene": (graphene, 24),
    "MoS2": (molybdenum_disulfide, 12),
    "wurtzite (0001)": (wurtzite, 6),
}


def placed(one, seed):
    """Turned, moved, renumbered, other images at random; another open axis with any vector."""
    rng = np.random.default_rng(seed)
    axes = rng.permutation(3)
    cell = one.cell[0].clone()
    cell[2] = torch.from_numpy(rng.choice([0.0, 1.0, 9.0]) * rng.normal(size=3))
    images = torch.from_numpy(rng.integers(-3, 4, (len(one.positions), 2))).double() @ cell[:2]
    order = torch.from_numpy(rng.permutation(len(one.positions)))
    moved = replace(
        one,
        positions=(one.positions + images + torch.from_numpy(9 * rng.normal(size=3)))[order],
        atomic_numbers=one.atomic_numbers[order],
        cell=cell[axes][None],
        pbc=one.pbc[:, axes],
    )
    return rotate(moved, torch.from_numpy(special_ortho_group.rvs(3, random_state=seed)))


@dataclass(frozen=True)
class Known:
    """A slab and all operations x -> Q x + t of its group modulo the lattice, by construction."""

    structure: Structures
    rotations: np.ndarray
    translations: np.ndarray


def general_slab(number):
    """Two general orbits and the origin's in the conventional cell, with any metric it allows."""
    rng = np.random.default_rng(number)
    operations = operations_from_layer_number(number)
    W, t = np.array(operations.rotations), np.array(operations.translations)
    general = np.array([[1.0, 0.17, 0], [0.17, 1.3, 0], [0, 0, 1.0]])
    metric = np.mean(W.transpose(0, 2, 1) @ general @ W, axis=0)
    cell = np.linalg.cholesky(metric)
    cell[:2] *= 3.2 * len(W) ** 0.5
    sites, numbers = unique(t), [29] * len(unique(t))
    for species in (8, 14):
        orbit = roomiest_orbit(rng, W, t, cell, sites)
        sites = np.concatenate([sites, orbit])
        numbers += [species] * len(orbit)
    turn = special_ortho_group.rvs(3, random_state=number)
    order, shift = rng.permutation(len(sites)), rng.random(3)
    lattice = cell @ turn.T
    Q = lattice.T @ W @ np.linalg.inv(lattice.T)
    axes = rng.permutation(3)
    structure = make_structure(
        torch.from_numpy((sites[order] + shift) @ lattice),
        torch.tensor(numbers)[order],
        cell=torch.from_numpy((lattice * np.array([1, 1, 0])[:, None])[axes]),
        pbc=[bool(axis < 2) for axis in axes],
    )
    return Known(structure, Q, (t + shift - W @ shift) @ lattice)


def unique(sites):
    inside = sites - np.floor(sites) * [1, 1, 0]
    return sites[np.unique(np.round(inside, 6) % [1, 1, 9], axis=0, return_index=True)[1]]


def roomiest_orbit(rng, W, t, cell, occupied):
    """Of ten general orbits the one whose closest contact is longest."""
    points = rng.random((10, 3)) * [1, 1, 4.0]
    orbits = [W @ point + t for point in points]
    return max(orbits, key=lambda orbit: closest(orbit, np.concatenate([orbit, occupied]), cell))


def closest(sites, others, cell):
    gap = sites[:1, None] - others[None]
    gap -= np.round(gap) * [1, 1, 0]
    return np.partition(np.linalg.norm(gap @ cell, axis=-1).ravel(), 1)[1]


def brute_permutations(known):
    """Site on which x -> Q x + t puts each atom, from all N x N distances: [operations, atoms]."""
    one = known.structure
    positions, lattice = one.positions.numpy(), one.cell[0].numpy()[one.pbc[0].numpy()]
    result = []
    for Q, t in zip(known.rotations, known.translations, strict=True):
        gap = (positions @ Q.T + t)[:, None] - positions
        gap -= np.round(gap @ np.linalg.pinv(lattice)) @ lattice
        matches = np.linalg.norm(gap, axis=2) < 1e-6
        assert (matches.sum(axis=0) == 1).all()
        assert (matches.sum(axis=1) == 1).all()
        result.append(matches.argmax(axis=1))
    return torch.from_numpy(np.array(result))


def normal(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("first", range(1, 81, 20))
def test_all_layer_groups(first):
    for number in range(first, first + 20):
        known = general_slab(number)
        group = find_group(known.structure, SYMPREC)
        assert (group.number, group.warnings) == (None, ())
        assert group.order == len(known.rotations), number
        permutations, Q = brute_permutations(known), torch.from_numpy(known.rotations)
        projector, forces = make_projector([group]), normal(known.structure.positions.shape, number)
        projected = projector.forces(forces)
        expected = (forces[permutations] @ Q).mean(0)
        assert float((projected - expected).abs().max()) < EXACT, number
        assert float((projector.forces(projected) - projected).abs().max()) < EXACT
        assert float((projected[permutations] @ Q - projected).abs().max()) < EXACT
        check_symmetrized(rattled(known.structure, 1e-3, number), group.order)


def check_symmetrized(noisy, order):
    group = find_group(noisy, SYMPREC)
    assert group.order == order
    exact = symmetrize(noisy, group)
    move = exact.positions - noisy.positions
    assert float(move.norm(dim=1).max()) < 6e-3
    assert float(make_projector([group]).forces(move).abs().max()) < 1e-13
    found = find_group(exact, 1e-8)
    assert found.order == order
    _, moves, stretch = nearest_symmetric(exact, found)
    assert moves.max() < 1e-12
    assert stretch < 1e-12
    open_axis = ~exact.pbc[0]
    assert torch.equal(exact.cell[0, open_axis], noisy.cell[0, open_axis])
    return exact


@pytest.mark.parametrize("name", SLABS)
def test_orientation_and_open_vector_do_not_matter(name):
    build, order = SLABS[name]
    for seed in range(6):
        one = placed(build(), seed)
        group = find_group(one, SYMPREC)
        assert (group.order, len(group.pure_translations)) == (order, 1)
        Q = group.cartesian_rotations
        products = (Q[:, None] @ Q)[:, :, None] - Q
        assert (abs(products).max(axis=(3, 4)) < 1e-12).sum() == order**2
        images = one.positions @ torch.from_numpy(Q).mT
        gap = images - one.positions[torch.from_numpy(group.permutations)]
        gap = gap - gap[:, :1]
        shifts = gap @ torch.linalg.pinv(one.cell[0][one.pbc[0]])
        gap = gap - shifts.round() @ one.cell[0][one.pbc[0]]
        assert float(gap.abs().max()) < 1e-12
        check_symmetrized(rattled(one, 1e-3, seed), order)


def test_noise_in_a_thick_slab_with_vacuum():
    """Where a search in three dimensions loses all operations: 25 layers, 45 Å."""
    for one, order in ((fcc100(25), 16), (fcc111(25), 12)):
        for seed in range(10):
            check_symmetrized(rattled(placed(one, seed), 1e-3, seed), order)


def test_the_normal_is_not_periodic():
    """Modulo 4 Å the heights 0, 1, 3 have a mirror, modulo 2 Å the heights 0, 1, 2 one more."""
    cases = (((0, 1, 3), 4, 8), ((0, 1, 2), 2, 16), ((0, 2, 5), 1, 8), ((0, 10, 30), 10, 8))
    for heights, height, order in cases:
        plane = 2.55 * np.eye(2)
        one = slab(plane, [[0, 0, h] for h in heights], [29] * 3, (0, 0, height))
        for shift in (0.0, 3.7, -1e4):
            moved = replace(one, positions=one.positions + torch.tensor([0, 0, shift]))
            group = find_group(moved, SYMPREC)
            assert group.order == order
            kept = symmetrize(rattled(moved, 1e-3), group)
            assert float((kept.positions - moved.positions).abs().max()) < 1e-2


@pytest.mark.parametrize(
    ("build", "repeats", "rotations"),
    [
        (fcc100, (2, 2, 1), 16),
        (fcc100, (3, 3, 1), 16),
        (fcc100, (2, 1, 1), 8),
        (graphene, (3, 3, 1), 24),
        (graphene, (3, 1, 1), 8),
        (wurtzite, (2, 2, 1), 6),
    ],
)
def test_supercells(build, repeats, rotations):
    one = placed(repeat(build(), repeats), 1)
    group = find_group(one, SYMPREC)
    n_pure = repeats[0] * repeats[1]
    assert (len(group.rotations), len(group.pure_translations)) == (rotations, n_pure)
    check_symmetrized(rattled(one, 1e-3), rotations * n_pure)
    skew = torch.eye(3).double()
    periodic = torch.nonzero(one.pbc[0])[:, 0]
    skew[periodic[0], periodic[1]] = 7.0
    assert find_group(replace(one, cell=skew @ one.cell), SYMPREC).order == rotations * n_pure


def test_subgroups():
    one = fcc100(5)
    fixed = one.positions[:, 2] < 1.0
    group = find_group(one, SYMPREC, fixed=fixed)
    assert (group.order, group.rotations[:, 2, 2].min()) == (8, 1)
    reconstructed = repeat(one, (2, 1, 1)).positions
    reconstructed[9, 2] += 0.2  # of 10 atoms, on one side
    missing = replace(repeat(one, (2, 1, 1)), positions=reconstructed)
    assert find_group(missing, SYMPREC).order == 4


@pytest.mark.parametrize("build", [molybdenum_disulfide, fcc100, fcc110])
@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 2, 1)])
def test_noise_like_the_tolerance_leaves_a_group(build, repeats):
    """Some operations are within the tolerance, their products are not: they are left out."""
    whole = find_group(repeat(build(), repeats), SYMPREC).order
    orders = set()
    for seed in range(60):
        noisy = rattled(repeat(build(), repeats), (0.1 + 0.01 * seed) * SYMPREC, seed)
        group = find_group(noisy, SYMPREC)
        orders.add(group.order)
        assert whole % group.order == 0
        assert find_group(symmetrize(noisy, group), 1e-8).order % group.order == 0
    assert {1, whole} < orders


def test_tolerance_does_not_depend_on_the_atom_that_gives_the_translation():
    one = repeat(fcc100(), (2, 2, 1))
    moved = one.positions.clone()
    moved[1, 0] += 0.6 * SYMPREC  # in the middle layer, where the search starts
    group = find_group(replace(one, positions=moved), SYMPREC)
    assert len(group.pure_translations) == 4


def test_ambiguity_and_refusal():
    assert symmetry_warnings(graphene(), SYMPREC) == ()
    assert symmetry_warnings(rattled(graphene(), 2e-3), SYMPREC) == ("symmetry_ambiguous",)
    one = repeat(fcc100(), (2, 2, 1))
    group = find_group(one, SYMPREC)
    moved = one.positions.clone()
    moved[5, 0] += 0.2
    with pytest.raises(StructureError, match=r"layer group .* atom 5 would move .*--symprec") as e:
        symmetrize(replace(one, positions=moved), group)
    assert e.value.code == "TooFarFromGroup"
    sheared = strain(one, torch.tensor([[[0, 0.05, 0], [0, 0, 0], [0, 0, 0]]]).double())
    with pytest.raises(StructureError, match="strain is 2"):
        symmetrize(sheared, group)
    coinciding = replace(one, positions=torch.zeros_like(one.positions))
    assert find_group(coinciding, SYMPREC).warnings == ("symmetry_failed",)


def test_cell_is_symmetrized_in_the_plane():
    noisy = strain(placed(graphene(), 2), 1e-3 * normal((1, 3, 3), 0))
    group = find_group(noisy, SYMPREC)
    assert group.order == 24
    exact = symmetrize(noisy, group)
    plane = exact.cell[0][exact.pbc[0]]
    lengths = plane.norm(dim=1)
    assert abs(float(lengths[0] - lengths[1])) < 1e-14
    assert abs(float(plane[0] @ plane[1] / lengths[0] ** 2)) == pytest.approx(0.5, abs=1e-14)
    assert float((exact.cell - noisy.cell).abs().max()) < 1e-2


@pytest.mark.parametrize("build", [fcc100, fcc111, molybdenum_disulfide, wurtzite, graphene])
def test_projected_forces_are_the_mean_over_copies(build):
    one = placed(repeat(build(), (2, 1, 1)), 3)
    one = symmetrize(one, find_group(one, SYMPREC))
    group = find_group(one, SYMPREC)
    lattice = torch.zeros(3, 3).double()
    lattice[one.pbc[0]] = one.cell[0][one.pbc[0]]
    copies, rotations = [], []
    potential, raw = tiny_potential(), tiny_potential()(one).forces
    for Q, permutation in zip(group.cartesian_rotations, group.permutations, strict=True):
        turn = torch.from_numpy(Q)
        moved = rotate(one, turn)
        shift = one.positions[permutation[0]] - moved.positions[0]
        for pure in torch.from_numpy(group.pure_translations):
            there = moved.positions + shift + pure @ lattice
            copies.append(replace(moved, positions=there))
            rotations.append(turn)
    turned = potential(concatenate(copies)).forces.reshape(len(copies), -1, 3)
    mean = (turned @ torch.stack(rotations)).mean(0)
    projector = make_projector([group])
    projected = projector.forces(raw)
    assert len(copies) == group.order
    assert float((projected - mean).abs().max()) < AVERAGED
    assert float((projector.forces(projected) - projected).abs().max()) < AVERAGED
    assert float((projected - raw).abs().max()) > 1e-6  # the network does break the group
    (result,) = evaluate(potential, one, average="project")
    assert float((result.properties.forces - projected).abs().max()) < AVERAGED
    assert result.space_group is None


@pytest.mark.parametrize("noisy", [True, False])
def test_keep_never_leaves_the_group_and_free_does(noisy):
    potential = LennardJones(noise=0.05) if noisy else tiny_potential()
    built = [fcc100(), fcc111(), repeat(fcc110(), (2, 1, 1)), molybdenum_disulfide(), wurtzite()]
    start = [placed(one, 4) for one in built]
    start = [replace(one, cell=with_open_vector(one)) for one in start]
    before = [find_group(one, SYMPREC) for one in start]
    settings = RelaxSettings(max_steps=4, force_tolerance=1e-6)
    kept = relax(potential, concatenate(start), settings)
    for one, result, group in zip(start, kept, before, strict=True):
        assert find_group(result.structures, 1e-5).order % group.order == 0
        assert "symmetry_lost" not in result.warnings
        assert result.space_group_before is result.space_group_after is None
        assert result.certificate.force_deviation > 1e-6
        assert float((result.structures.cell - one.cell).abs().max()) < 1e-12
        assert float((result.structures.positions - one.positions).abs().max()) > 1e-3
    free = relax(potential, concatenate(start), replace(settings, symmetry="free"))
    for result, group in zip(free, before, strict=True):
        assert find_group(result.structures, 1e-5).order < group.order


def with_open_vector(one):
    """30 Å along the normal in place of the open cell vector."""
    first, second = one.cell[0][one.pbc[0]]
    cross = torch.linalg.cross(first, second)
    return torch.where(one.pbc[:, :, None], one.cell, 30 * cross / cross.norm())
