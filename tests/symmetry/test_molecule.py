"""Point groups of molecules and clusters: order, closure, symmetrization, projection."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import special_ortho_group

from coset.errors import StructureError
from coset.structures import concatenate, make_structure
from coset.symmetry.crystal import (
    find_group,
    nearest_symmetric,
    symmetrize,
    symmetry_warnings,
)
from coset.symmetry.molecule import largest_closed
from coset.symmetry.projection import make_projector
from coset.workflows.evaluate import evaluate
from coset.workflows.relax import relax
from coset.workflows.relaxation import RelaxSettings
from tests.factories import molecule, rattled, structures, tiny_potential
from tests.lennard_jones import LennardJones
from tests.tolerances import AVERAGED

SYMPREC = 1e-2
CLOSED = 1e-8
GOLDEN = (1 + 5**0.5) / 2
OF_THE_NETWORK = {6: 6, 1: 1, 7: 8, 8: 8, 9: 14, 16: 29, 29: 29}


def ring(n, radius, turn=0.0, height=0.0):
    angles = 2 * np.pi * (np.arange(n) + turn) / n
    return np.stack([radius * np.cos(angles), radius * np.sin(angles), 0 * angles + height], 1)


def methane():
    corners = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
    return molecule(0.63 * np.array([(0, 0, 0), *corners]), [6, 1, 1, 1, 1])


def benzene():
    return molecule(np.concatenate([ring(6, 1.397), ring(6, 2.481)]), [6] * 6 + [1] * 6)


def sulfur_hexafluoride():
    axes = np.concatenate([np.eye(3), -np.eye(3)])
    return molecule(np.concatenate([np.zeros((1, 3)), 1.56 * axes]), [16] + [9] * 6)


def fullerene():
    """Cyclic permutations of (0, 1, 3g), (1, 2 + g, 2g), (g, 2, 2g + 1) with all signs."""
    g = GOLDEN
    corners = [(0, 1, 3 * g), (1, 2 + g, 2 * g), (g, 2, 2 * g + 1)]
    return molecule(0.71 * all_signs(corners), [6] * 60)


def all_signs(corners):
    points = [
        np.roll(corner * (1 - 2 * np.array(signs)), k)
        for corner in np.array(corners)
        for signs in np.ndindex(2, 2, 2)
        for k in range(3)
    ]
    return distinct(points)


def distinct(points):
    rounded = np.round(np.array(points), 6) + 0.0
    return np.array(points)[np.unique(rounded, axis=0, return_index=True)[1]]


def icosahedron(n_shells):
    """Mackay cluster: 13, 55, 147 atoms."""
    corners = all_signs([(0, 1, GOLDEN)])
    faces = [
        face
        for face in combinations(corners, 3)
        if all(np.linalg.norm(a - b) < 2.1 for a, b in combinations(face, 2))
    ]
    points = [np.zeros(3)]
    for n in range(1, n_shells + 1):
        for a, b, c in faces:
            points += [
                i * a + j * b + (n - i - j) * c for i, j in np.ndindex(n + 1, n + 1) if i + j <= n
            ]
    cluster = distinct(points)
    return molecule(1.3 * cluster, [29] * len(cluster))


def water():
    return molecule([(0, 0, 0.119), (0, 0.763, -0.477), (0, -0.763, -0.477)], [8, 1, 1])


def ammonia():
    return molecule(np.concatenate([[(0, 0, 0.116)], ring(3, 0.94, 0.0, -0.27)]), [7, 1, 1, 1])


def ethene():
    carbon = [(0.665, 0, 0), (-0.665, 0, 0)]
    hydrogen = [(x, y, 0) for x in (1.237, -1.237) for y in (0.923, -0.923)]
    return molecule([*carbon, *hydrogen], [6, 6, 1, 1, 1, 1])


def hydrogen_peroxide():
    half = np.radians(56)
    hydrogen = [
        (x, 0.95 * np.cos(half), s * 0.95 * np.sin(half)) for x, s in ((0.8, 1), (-0.8, -1))
    ]
    return molecule([(0.73, 0, 0), (-0.73, 0, 0), *hydrogen], [8, 8, 1, 1])


def carbon_dioxide():
    return molecule([(0, 0, 0), (1.16, 0, 0), (-1.16, 0, 0)], [6, 8, 8])


def hydrogen_cyanide():
    return molecule([(0, 0, 0), (1.06, 0, 0), (-1.15, 0, 0)], [6, 1, 7])


def ferrocene(turn):
    """Two rings of five, eclipsed (0) to staggered (0.5)."""
    rings = [ring(5, r, t, h) for h, t in ((1.65, 0), (-1.65, turn)) for r in (1.43, 2.51)]
    return molecule(np.concatenate([np.zeros((1, 3)), *rings]), [29] + ([6] * 5 + [1] * 5) * 2)


MOLECULES = {
    "methane": (methane, "Td", 24),
    "benzene": (benzene, "D6h", 24),
    "sulfur hexafluoride": (sulfur_hexafluoride, "Oh", 48),
    "fullerene": (fullerene, "Ih", 120),
    "icosahedron of 147": (lambda: icosahedron(3), "Ih", 120),
    "water": (water, "C2v", 4),
    "ammonia": (ammonia, "C3v", 6),
    "ethene": (ethene, "D2h", 8),
    "hydrogen peroxide": (hydrogen_peroxide, "C2", 2),
    "carbon dioxide": (carbon_dioxide, "D∞h", 24),
    "hydrogen cyanide": (hydrogen_cyanide, "C∞v", 12),
    "ferrocene, eclipsed": (lambda: ferrocene(0.0), "D5h", 20),
    "ferrocene, staggered": (lambda: ferrocene(0.5), "D5d", 20),
    "ferrocene, between": (lambda: ferrocene(0.2), "D5", 10),
    "atom": (lambda: molecule([(1, 2, 3)], [29]), "D∞h", 24),
}


def shuffled(one, seed):
    """Turned, mirrored or not, moved and renumbered at random."""
    rng = np.random.default_rng(seed)
    turn = special_ortho_group.rvs(3, random_state=seed) * rng.choice([1, -1])
    order = torch.from_numpy(rng.permutation(len(one.positions)))
    positions = one.positions @ torch.from_numpy(turn).mT + torch.from_numpy(9 * rng.normal(size=3))
    return replace(one, positions=positions[order], atomic_numbers=one.atomic_numbers[order])


def check_group(one, group, tolerance):
    """Operations differ, close, and put atoms where the permutation says."""
    Q = torch.from_numpy(group.cartesian_rotations)
    perms = torch.from_numpy(group.permutations)
    assert float((Q @ Q.mT - torch.eye(3)).abs().max()) < 1e-13
    images = one.positions @ Q.mT + torch.from_numpy(group.translations)[:, None]
    assert float((images - one.positions[perms]).norm(dim=2).max()) <= tolerance
    assert bool((one.atomic_numbers[perms] == one.atomic_numbers).all())
    for q, p in zip(Q, perms, strict=True):
        match = ((q @ Q)[:, None] - Q).abs().amax((2, 3)) < CLOSED
        assert bool((match.sum(1) == 1).all())
        assert bool((match.sum(0) == 1).all())
        assert torch.equal(p[perms], perms[match.int().argmax(1)])


@pytest.mark.parametrize("name", MOLECULES)
def test_order_and_closure(name):
    build, symbol, order = MOLECULES[name]
    for seed in range(3):
        one = shuffled(build(), seed)
        group = find_group(one, SYMPREC)
        assert (group.name, group.order) == (f"point group {symbol}", order)
        assert (group.number, group.warnings) == (None, ())
        check_group(one, group, 1e-8)


@pytest.mark.parametrize("name", MOLECULES)
def test_coordinates_good_to_a_thousandth(name):
    build, symbol, order = MOLECULES[name]
    one = rattled(shuffled(build(), 3), 1e-3)
    group = find_group(one, SYMPREC)
    assert (group.name, group.order) == (f"point group {symbol}", order)
    check_group(one, group, SYMPREC)
    exact = symmetrize(one, group)
    assert float((exact.positions - one.positions).norm(dim=1).max()) < 5e-3
    found = find_group(exact, 1e-8)
    assert found.order == order
    check_group(exact, found, 1e-12)
    again, moves, strain = nearest_symmetric(exact, found)
    assert moves.max() < 1e-12
    assert strain < 1e-12
    assert torch.equal(again.cell, one.cell)


def test_rough_coordinates():
    for seed in range(10):
        one = rattled(shuffled(sulfur_hexafluoride(), seed), 1e-2, seed)
        group = find_group(one, 0.1)
        assert group.name == "point group Oh"
        check_group(symmetrize(one, group), find_group(symmetrize(one, group), 1e-8), 1e-12)


@pytest.mark.parametrize("name", MOLECULES)
def test_symmetrized_molecule_is_the_nearest(name):
    """To first order: the move neither keeps the group nor turns the molecule."""
    one = rattled(shuffled(MOLECULES[name][0](), 4), 1e-4)
    group = find_group(one, SYMPREC)
    move = symmetrize(one, group).positions - one.positions
    assert float(make_projector([group]).forces(move).abs().max()) < 1e-13
    about = one.positions - one.positions.mean(0)
    assert float(torch.linalg.cross(about, move).sum(0).abs().max()) < 1e-6


def stretched(one, atoms, factor):
    positions = one.positions.clone()
    positions[atoms] *= factor
    return replace(one, positions=positions)


@pytest.mark.parametrize(
    ("one", "symbol"),
    [
        (stretched(methane(), [1], 1.05), "C3v"),
        (stretched(methane(), [1, 2], 1.05), "C2v"),
        (stretched(benzene(), [6, 9], 1.02), "D2h"),
        (stretched(benzene(), [6, 8, 10], 1.02), "D3h"),
        (stretched(sulfur_hexafluoride(), [3, 6], 1.1), "D4h"),
        (stretched(sulfur_hexafluoride(), [1, 2, 3], 1.1), "C3v"),
        (stretched(fullerene(), [7], 1.02), "Cs"),
        (stretched(icosahedron(2), [0], 1.02), "C5v"),
        (replace(benzene(), atomic_numbers=torch.tensor([7, 6, 6] * 2 + [1] * 6)), "D2h"),
        (replace(methane(), atomic_numbers=torch.tensor([6, 1, 8, 9, 7])), "C1"),
        (molecule([*ring(4, 1.5), *ring(4, 2.0, 0.2)], [6] * 4 + [1] * 4), "C4h"),
        (molecule([*ring(2, 1.5, 0, 1), *ring(2, 1.5, 0.5, -1), *ring(2, 2, 0.1, 1.4),
                   *ring(2, 2, 0.6, -1.4)], [6] * 4 + [1] * 4), "S4"),
        (molecule([(0, 1, 2), (1, 1, 0.3), (0.2, -0.9, 0.7), (0, -1, -2), (-1, -1, -0.3),
                   (-0.2, 0.9, -0.7)], [6, 1, 1] * 2), "Ci"),
    ],
)  # fmt: skip
def test_distorted_molecules_have_subgroups(one, symbol):
    group = find_group(shuffled(one, 5), SYMPREC)
    assert group.name == f"point group {symbol}"
    check_group(shuffled(one, 5), group, 1e-8)


def test_noise_like_the_tolerance_leaves_a_group():
    """Some operations are within the tolerance, their products are not: they are left out."""
    orders = set()
    for seed in range(60):
        one = rattled(benzene(), (0.1 + 0.01 * seed) * SYMPREC, seed)
        group = find_group(one, SYMPREC)
        orders.add(group.order)
        check_group(one, group, 2 * SYMPREC)
        exact = symmetrize(one, group)
        assert find_group(exact, 1e-8).order == group.order
    assert {1, 2, 24} < orders
    assert all(24 % order == 0 for order in orders)


def test_largest_closed_set():
    """Of the turns by multiples of 90 degrees, those by 0, 90 and 180 do not close."""
    turns = np.arange(4)
    products = (turns[:, None] + turns) % 4
    residual = np.array([0.0, 0.3, 0.1, 0.2])
    assert largest_closed(products, residual).tolist() == [True] * 4
    three = np.where(products[:3, :3] == 3, -1, products[:3, :3])
    assert largest_closed(three, residual[:3]).tolist() == [True, False, True]
    two = np.where(products[:2, :2] > 1, -1, products[:2, :2])
    assert largest_closed(two, np.array([0.2, 0.1])).tolist() == [True, False]


def test_ambiguity_and_refusal():
    assert symmetry_warnings(benzene(), SYMPREC) == ()
    assert symmetry_warnings(rattled(benzene(), 2e-3), SYMPREC) == ("symmetry_ambiguous",)
    one = shuffled(benzene(), 0)
    moved = one.positions.clone()
    moved[3] += 0.15
    far = replace(one, positions=moved)
    with pytest.raises(
        StructureError, match=r"point group D6h: atom 3 would move .*--symprec"
    ) as e:
        symmetrize(far, find_group(one, SYMPREC))
    assert e.value.code == "TooFarFromGroup"
    (result,) = relax(LennardJones(), boxed(far), RelaxSettings(symprec=0.4))
    assert (result.status, result.code) == ("rejected", "TooFarFromGroup")


def test_no_group_and_no_molecule():
    chiral = structures()["methane"]  # rattled
    group = find_group(chiral, SYMPREC)
    assert (group.name, group.order) == ("point group C1", 1)
    assert np.array_equal(group.cartesian_rotations, np.eye(3)[None])
    coinciding = make_structure(torch.zeros(3, 3).double(), torch.tensor([6, 6, 6]))
    assert find_group(coinciding, SYMPREC).warnings == ("symmetry_failed",)
    pair = molecule([(0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 2, 0)], [6, 6, 1, 1])
    assert find_group(pair, SYMPREC).warnings == ("symmetry_failed",)
    for name in ("chain", "chain along a"):
        chain = structures()[name]
        group = find_group(chain, SYMPREC)
        assert (group.name, group.order) == ("identity", 1)
        assert group.warnings == ("chain_symmetry_ignored",)
        (result,) = evaluate(LennardJones(), boxed(chain, 9.0), average="project")
        assert "chain_symmetry_ignored" in result.warnings
        (result,) = relax(LennardJones(), boxed(chain, 9.0), RelaxSettings(max_steps=0))
        assert "chain_symmetry_ignored" in result.warnings


def test_fixed_atoms_are_a_kind_of_their_own():
    fixed = torch.tensor([False, True, False, False, False])
    assert find_group(methane(), SYMPREC, fixed=fixed).name == "point group C3v"


def known(one):
    """The same molecule of elements of the tiny network."""
    numbers = torch.tensor([OF_THE_NETWORK[z] for z in one.atomic_numbers.tolist()])
    return replace(one, atomic_numbers=numbers)


@pytest.mark.parametrize(
    "name", ["methane", "benzene", "sulfur hexafluoride", "carbon dioxide", "hydrogen peroxide"]
)
def test_projected_forces_are_the_mean_over_copies(name):
    one = known(shuffled(MOLECULES[name][0](), 6))
    group = find_group(one, SYMPREC)
    one = symmetrize(one, group)
    potential = tiny_potential()
    Q, t = (torch.from_numpy(x) for x in (group.cartesian_rotations, group.translations))
    copies = [replace(one, positions=one.positions @ q.mT + s) for q, s in zip(Q, t, strict=True)]
    turned = potential(concatenate(copies)).forces.reshape(len(Q), -1, 3) @ Q
    raw = potential(one).forces
    projector = make_projector([group])
    projected = projector.forces(raw)
    assert float((projected - turned.mean(0)).abs().max()) < AVERAGED
    assert float((projector.forces(projected) - projected).abs().max()) < AVERAGED
    assert float((projected - raw).abs().max()) > 1e-6  # the network does break the group
    (result,) = evaluate(potential, one, average="project")
    assert float((result.properties.forces - projected).abs().max()) < AVERAGED
    assert result.space_group is None
    assert bool(result.properties.stress.isnan().all())


def boxed(one, edge=60.0):
    """With cell vectors in the open directions, which mean nothing."""
    cell = torch.where(one.pbc[:, :, None], one.cell, edge * torch.eye(3).double())
    return replace(one, cell=cell)


@pytest.mark.parametrize("noisy", [True, False])
def test_keep_never_leaves_the_group_and_free_does(noisy):
    """With random forces, and with a network that is not invariant."""
    built = [benzene(), methane(), sulfur_hexafluoride(), fullerene(), carbon_dioxide(), ammonia()]
    potential = LennardJones(noise=0.05) if noisy else tiny_potential()
    if noisy:
        built = [replace(one, positions=2.0 * one.positions) for one in built]
    start = [boxed(known(shuffled(one, 7))) for one in built]
    settings = RelaxSettings(max_steps=4, force_tolerance=1e-6)
    before = [find_group(one, SYMPREC) for one in start]
    kept = relax(potential, concatenate(start), settings)
    for result, group in zip(kept, before, strict=True):
        assert find_group(result.structures, 1e-5).order % group.order == 0
        assert "symmetry_lost" not in result.warnings
        assert result.space_group_before is result.space_group_after is None
        assert result.certificate.force_deviation > 1e-6
        raw = result.properties.forces
        assert float((make_projector([group]).forces(raw) - raw).abs().max()) < AVERAGED
    free = relax(potential, concatenate(start), replace(settings, symmetry="free"))
    for result, group in zip(free, before, strict=True):
        assert find_group(result.structures, 1e-5).order < group.order


def test_a_lost_group_is_told(monkeypatch):
    monkeypatch.setattr("coset.workflows.relax.symmetrize", lambda one, _: one)
    start = boxed(rattled(benzene(), 1e-3))
    (result,) = relax(LennardJones(), start, RelaxSettings(max_steps=0))
    assert "symmetry_lost" in result.warnings
