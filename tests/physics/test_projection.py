"""Projection onto the space group, against a brute-force mean over all operations."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from moyopy import operations_from_number
from scipy.stats import special_ortho_group

from coset.errors import StructureError
from coset.structures import (
    Properties,
    Structures,
    concatenate,
    make_structure,
    repeat,
    rotate,
    select,
)
from coset.symmetry.crystal import CrystalSymmetry, find_group, symmetrize, trivial_group
from coset.symmetry.primitive import primitive_cell
from coset.symmetry.projection import ProjectedPotential, make_projector

EXACT = 1e-12  # eV/Å: a mean of unit normals over at most 192 operations in float64
SYMPREC = 1e-3
SUPERCELLS = {14, 82, 146, 152, 167, 186, 198}  # 2x2x2 of the primitive cell as well


@dataclass(frozen=True)
class Crystal:
    """A structure with its group as Cartesian operations x -> Q x + t, known by construction."""

    structure: Structures
    rotations: np.ndarray
    translations: np.ndarray
    pure: np.ndarray


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of tiny products: threads only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("first", range(1, 231, 46))
def test_all_space_groups(first):
    for number in range(first, first + 46):
        conventional = general_crystal(number)
        primitive = primitive_crystal(conventional)
        cases = [conventional, primitive] if len(conventional.pure) > 1 else [conventional]
        if number in SUPERCELLS:
            cases.append(supercell(primitive))
        for case in cases:
            group = find_group(case.structure, SYMPREC)
            assert group.number == number
            assert group.order == len(case.rotations) * len(case.pure)
            assert len(group.rotations) <= 48
            assert group.is_complete
            check_projection(case, group, seed=number)
            if len(case.pure) > 1:
                check_primitive(case.structure, group)


def check_primitive(one: Structures, group: CrystalSymmetry):
    """The group modulo pure translations, against the one found anew in the primitive cell."""
    exact = symmetrize(one, group)
    found = primitive_cell(exact, group)
    own, new = found.group, find_group(found.structures, 1e-6)
    assert (own.number, own.order) == (new.number, new.order)
    assert own.order == len(group.rotations)
    shift = own.rotations[:, None] == new.rotations[None]
    same = shift.all(axis=(2, 3)).argmax(axis=1)
    assert sorted(same) == list(range(own.order))
    assert np.abs(own.cartesian_rotations - new.cartesian_rotations[same]).max() < EXACT
    assert (own.permutations == new.permutations[same]).all()
    gap = own.translations - new.translations[same]
    assert np.abs(gap - np.rint(gap)).max() < 1e-6
    cell = found.structures.cell[0].numpy()
    sites = found.structures.positions.numpy() @ np.linalg.inv(cell)
    images = sites @ own.rotations.mT + own.translations[:, None] - sites[own.permutations]
    assert np.abs(images - np.rint(images)).max() < EXACT


def test_cell_that_breaks_the_point_group():
    whole = rutile()
    assert len(find_group(whole, SYMPREC).rotations) == 16
    broken = repeat(whole, (2, 1, 1))
    group = find_group(broken, SYMPREC)
    assert group.number == 136
    assert len(group.rotations) == 8
    assert not group.is_complete
    check_projection(crystal_of(broken, group), group, seed=0)
    cube = repeat(whole, (2, 2, 1))
    assert len(find_group(cube, SYMPREC).rotations) == 16


def test_left_handed_cell():
    crystal = general_crystal(152)
    left = replace(crystal.structure, cell=crystal.structure.cell[:, [1, 0, 2]])
    assert det(left) < 0
    group = find_group(left, SYMPREC)
    assert group.number == 152
    check_projection(replace(crystal, structure=left), group, seed=1)


def test_skewed_and_long_cells():
    crystal = primitive_crystal(general_crystal(62))
    for transformation in ([[1, 5, 0], [0, 1, -4], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [7, 9, 1]]):
        cell = torch.tensor(transformation, dtype=torch.float64) @ crystal.structure.cell
        skewed = replace(crystal.structure, cell=cell)
        group = find_group(skewed, SYMPREC)
        assert group.order == 8
        check_projection(replace(crystal, structure=skewed), group, seed=2)
    long = repeat(fcc(), (1, 1, 20))
    group = find_group(long, SYMPREC)
    assert group.order == 16 * 80
    check_projection(crystal_of(long, group), group, seed=3)


def test_one_operation_per_rotation_is_not_a_projector():
    """Negative control: mixed centering translations instead of the mean over all of them."""
    one = fcc()
    group = find_group(one, SYMPREC)
    mixed = np.random.default_rng(0).integers(4, size=48)
    shifts = group.pure_translations[mixed]
    wrong = replace(
        group,
        permutations=brute_permutations(
            one, cartesian(group, one)[0], (group.translations + shifts) @ one.cell[0].numpy()
        ),
        pure_translations=np.zeros((1, 3)),
        translation_orbit=np.arange(4),
    )
    forces = normal((4, 3), 0)
    assert float(make_projector([group]).forces(forces).abs().max()) < EXACT  # cubic site: F = 0
    projector = make_projector([wrong])
    once = projector.forces(forces)
    assert float(once.abs().max()) > 1e-2
    assert float((projector.forces(once) - once).abs().max()) > 1e-2


def test_batch_is_each_alone():
    batch, groups = mixed_batch()
    projector = make_projector(groups)
    forces, stress = normal((len(batch.atomic_numbers), 3), 4), normal((len(groups), 3, 3), 5)
    together, together_stress = projector.forces(forces), projector.stress(stress)
    for k, group in enumerate(groups):
        alone = make_projector([group])
        mine = batch.system_index == k
        assert_close(together[mine], alone.forces(forces[mine]), 1e-15)
        assert_close(together_stress[k], alone.stress(stress[k : k + 1])[0], 1e-15)
    unchanged = batch.system_index >= 3  # P1 and a molecule
    assert torch.equal(together[unchanged], forces[unchanged])
    assert torch.equal(together_stress[3:], stress[3:])


def test_select():
    batch, groups = mixed_batch()
    projector = make_projector(groups)
    kept = torch.tensor([4, 0, 2])
    selected, direct = projector.select(kept), make_projector([groups[4], groups[0], groups[2]])
    forces = normal((int(batch.n_atoms[kept].sum()), 3), 6)
    stress = normal((3, 3, 3), 7)
    assert torch.equal(selected.n_atoms, batch.n_atoms[kept])
    assert torch.equal(selected.forces(forces), direct.forces(forces))
    assert torch.equal(selected.stress(stress), direct.stress(stress))


def test_undefined_stress_stays_in_its_system():
    _, groups = mixed_batch()
    stress = normal((len(groups), 3, 3), 8)
    stress[4] = torch.nan
    projected = make_projector(groups).stress(stress)
    assert bool(torch.isfinite(projected[:4]).all())
    assert bool(torch.isnan(projected[4]).all())


def test_result_is_float64_and_differentiable():
    batch, groups = mixed_batch()
    projector = make_projector(groups)
    forces = normal((len(batch.atomic_numbers), 3), 9)
    single = forces.float()
    assert projector.forces(single).dtype == torch.float64
    assert projector.stress(normal((len(groups), 3, 3), 0).float()).dtype == torch.float64
    assert_close(projector.forces(single), projector.forces(single.double()), 0.0)
    forces.requires_grad_(True)
    other = normal(forces.shape, 10)
    (gradient,) = torch.autograd.grad((projector.forces(forces) * other).sum(), forces)
    assert_close(gradient, projector.forces(other), EXACT)  # P is its own transpose


def test_deviation():
    batch, groups = mixed_batch()
    projector = make_projector(groups)
    forces = projector.forces(normal((len(batch.atomic_numbers), 3), 11))
    stress = projector.stress(normal((len(groups), 3, 3), 12))
    for value in projector.deviation(forces, stress):
        assert float(value.max()) < EXACT
    forces[0] += torch.tensor([3.0, 0.0, 4.0])  # fcc: P removes all of it
    forces[1] += torch.tensor([0.0, 2.0, 0.0])
    stress[1, 0, 1] += 2.0  # tetragonal
    force_deviation, stress_deviation = projector.deviation(forces, stress)
    assert_close(force_deviation, torch.tensor([5.0, 0, 0, 0, 0]).double(), EXACT)
    assert_close(stress_deviation, torch.tensor([0.0, 2, 0, 0, 0]).double(), EXACT)


@dataclass(frozen=True)
class Anisotropic:
    """A potential with random forces and stress."""

    cutoff: float = 5.0
    elements: frozenset[int] = frozenset({13, 22, 8})
    level_of_theory: str = "none"

    def __call__(self, structures):
        return Properties(
            energy=normal((len(structures),), 13),
            forces=normal(structures.positions.shape, 14).float(),
            stress=normal((len(structures), 3, 3), 15).float(),
            torque=normal((len(structures), 3), 16),
        )


def test_projected_potential():
    batch, groups = mixed_batch()
    projector = make_projector(groups)
    potential = ProjectedPotential(potential=Anisotropic(), projector=projector)
    assert (potential.cutoff, potential.level_of_theory) == (5.0, "none")
    assert potential.elements == frozenset({13, 22, 8})
    raw, found = Anisotropic()(batch), potential(batch)
    assert torch.equal(found.energy, raw.energy)
    assert torch.equal(found.torque, raw.torque)
    assert torch.equal(found.forces, projector.forces(raw.forces))
    assert torch.equal(found.stress, projector.stress(raw.stress))
    with pytest.raises(StructureError, match="select the same systems"):
        potential(select(batch, torch.tensor([1, 0, 2, 3, 4])))  # as many atoms in all


def test_energy_only_potential():
    @dataclass(frozen=True)
    class EnergyOnly(Anisotropic):
        def __call__(self, structures):
            return Properties(energy=normal((len(structures),), 0))

    batch, groups = mixed_batch()
    found = ProjectedPotential(potential=EnergyOnly(), projector=make_projector(groups))(batch)
    assert found.forces is None
    assert found.stress is None


def check_projection(crystal, group, seed):
    """P is the brute-force mean over the group, a projector, and its image is invariant."""
    one = crystal.structure
    steps = [(crystal.rotations, crystal.translations), (identities(crystal.pure), crystal.pure)]
    permutations = [brute_permutations(one, *step) for step in steps]
    forces = normal(one.positions.shape, seed)
    stress = normal((1, 3, 3), seed + 1000)
    projector = make_projector([group])
    projected, projected_stress = projector.forces(forces), projector.stress(stress)

    expected = forces
    for (rotations, _), permutation in reversed(list(zip(steps, permutations, strict=True))):
        expected = brute_mean(expected, rotations, permutation)
    assert_close(projected, expected, EXACT)
    assert_close(projector.forces(projected), projected, EXACT)
    for (rotations, _), permutation in zip(steps, permutations, strict=True):
        Q = torch.from_numpy(rotations)
        turned = torch.einsum("ai,gij->gaj", projected, Q.mT)
        assert_close(projected[torch.from_numpy(permutation)], turned, EXACT)

    Q = torch.from_numpy(crystal.rotations)
    assert_close(projected_stress[0], (Q.mT @ stress @ Q).mean(dim=0), EXACT)
    assert_close(projector.stress(projected_stress), projected_stress, EXACT)
    assert_close(Q.mT @ projected_stress @ Q, projected_stress.expand_as(Q), EXACT)

    other = normal(one.positions.shape, seed + 1)
    assert_close((other * projected).sum(), (projector.forces(other) * forces).sum(), 1e-11)
    balanced = projector.forces(forces - forces.mean(dim=0))
    assert_close(balanced.sum(dim=0), torch.zeros(3).double(), 1e-11)


def brute_permutations(one, rotations, translations):
    """Site on which x -> Q x + t puts each atom, from all N x N distances: [operations, atoms]."""
    positions, cell = one.positions.numpy(), one.cell[0].numpy()
    inverse = np.linalg.inv(cell)
    numbers = one.atomic_numbers.numpy()
    result = []
    for Q, t in zip(rotations, translations, strict=True):
        images = (positions @ Q.T + t) @ inverse
        gap = images[:, None] - (positions @ inverse)[None]
        gap -= np.round(gap)
        matches = (np.abs(gap) < 1e-6).all(axis=2)
        assert (matches.sum(axis=0) == 1).all()
        assert (matches.sum(axis=1) == 1).all()
        permutation = matches.argmax(axis=1)
        assert (numbers[permutation] == numbers).all()
        result.append(permutation)
    return np.array(result)


def brute_mean(forces, rotations, permutations):
    """mean_g Q^T F_perm[g, i]."""
    turned = [
        forces[torch.from_numpy(p)] @ torch.from_numpy(Q)
        for Q, p in zip(rotations, permutations, strict=True)
    ]
    return torch.stack(turned).mean(dim=0)


def general_crystal(number):
    """Conventional cell with two general orbits and the origin's, rotated, shifted and shuffled."""
    rng = np.random.default_rng(number)
    operations = operations_from_number(number)
    W, t = np.array(operations.rotations), np.array(operations.translations)
    cell = conventional_cell(number) * len(W) ** (1 / 3)
    metric = cell @ cell.T
    assert np.allclose(W.transpose(0, 2, 1) @ metric @ W, metric)
    sites = unique(t)
    numbers = [22] * len(sites)
    for species in (8, 13):
        orbit = roomiest_orbit(rng, W, t, cell, sites)
        sites = np.concatenate([sites, orbit])
        numbers += [species] * len(orbit)
    turn = special_ortho_group.rvs(3, random_state=number)
    order, shift = rng.permutation(len(sites)), rng.random(3)
    structure = make_structure(
        torch.from_numpy((sites[order] + shift) @ cell @ turn.T),
        torch.tensor(numbers)[order],
        cell=torch.from_numpy(cell @ turn.T),
        pbc=(True, True, True),
    )
    lattice = (cell @ turn.T).T
    Q = lattice @ W @ np.linalg.inv(lattice)
    moved = t + shift - W @ shift
    is_pure = (np.eye(3) == W).all(axis=(1, 2))
    _, chosen = np.unique(W.reshape(-1, 9), axis=0, return_index=True)
    return Crystal(structure, Q[chosen], moved[chosen] @ lattice.T, t[is_pure] @ lattice.T)


def roomiest_orbit(rng, W, t, cell, occupied):
    """Of ten general orbits the one whose closest contact is longest."""
    orbits = [(W @ point + t) % 1 for point in rng.random((10, 3))]
    return max(orbits, key=lambda orbit: closest(orbit, np.concatenate([orbit, occupied]), cell))


def closest(sites, others, cell):
    gap = sites[:1, None] - others[None]
    distance = np.linalg.norm((gap - np.round(gap)) @ cell, axis=-1)
    return np.partition(distance.ravel(), 1)[1]


def unique(sites):
    wrapped = np.round(sites % 1, 6) % 1
    return sites[np.unique(wrapped, axis=0, return_index=True)[1]]


def conventional_cell(number):
    """Cell of unit scale with the metric of the crystal system (default settings)."""
    a, b, c = 1.0, 1.13, 1.29
    alpha, beta, gamma = 90.0, 90.0, 90.0
    if number <= 2:
        alpha, beta, gamma = 81.0, 97.0, 104.0
    elif number <= 15:
        beta = 103.0
    elif number > 194:
        b = c = a
    elif number > 74:
        b = a
        gamma = 120.0 if number > 142 else 90.0
    ca, cb, cg = np.cos(np.radians([alpha, beta, gamma]))
    sg = np.sqrt(1 - cg**2)
    cy = (ca - cb * cg) / sg
    return 2.2 * np.array(
        [[a, 0, 0], [b * cg, b * sg, 0], [c * cb, c * cy, c * np.sqrt(1 - cb**2 - cy**2)]]
    )


def primitive_crystal(crystal):
    """The same crystal in a primitive cell."""
    one = crystal.structure
    candidates = np.concatenate([one.cell[0].numpy(), crystal.pure])
    target = det(one) / len(crystal.pure)
    cells = (
        candidates[[i, j, k]]
        for i in range(len(candidates))
        for j in range(i)
        for k in range(j)
        if abs(abs(np.linalg.det(candidates[[i, j, k]])) - target) < 1e-6 * target
    )
    cell = next(cells)
    fractional = one.positions.numpy() @ np.linalg.inv(cell)
    kept = np.sort(np.unique(np.round(fractional % 1, 6) % 1, axis=0, return_index=True)[1])
    structure = make_structure(
        one.positions[kept],
        one.atomic_numbers[kept],
        cell=torch.from_numpy(cell),
        pbc=(True, True, True),
    )
    return replace(crystal, structure=structure, pure=np.zeros((1, 3)))


def supercell(primitive):
    """2x2x2 of a primitive cell."""
    corners = np.indices((2, 2, 2)).reshape(3, -1).T
    return replace(
        primitive,
        structure=repeat(primitive.structure, (2, 2, 2)),
        pure=corners @ primitive.structure.cell[0].numpy(),
    )


def crystal_of(structure, group):
    """The operations that a group claims, as Cartesian maps."""
    rotations, translations = cartesian(group, structure)
    pure = group.pure_translations @ structure.cell[0].numpy()
    return Crystal(structure, rotations, translations, pure)


def cartesian(group: CrystalSymmetry, one):
    lattice = one.cell[0].numpy().T
    return lattice @ group.rotations @ np.linalg.inv(lattice), group.translations @ lattice.T


def identities(translations):
    return np.tile(np.eye(3), (len(translations), 1, 1))


def mixed_batch():
    """Conventional fcc, rutile, a rotated supercell, a crystal without symmetry, a molecule."""
    generator = torch.Generator().manual_seed(0)
    rattled = rutile()
    noise = 0.3 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    rattled = replace(rattled, positions=rattled.positions + noise)
    molecule = make_structure(noise[:4] * 5, torch.tensor([8, 8, 22, 13]))
    turn = torch.from_numpy(special_ortho_group.rvs(3, random_state=1))
    systems = [fcc(), rutile(), rotate(repeat(rutile(), (1, 2, 2)), turn), rattled, molecule]
    groups = [find_group(one, SYMPREC) for one in systems]
    assert [g.order for g in groups] == [192, 16, 32, 1, 1]
    assert [g.number for g in groups] == [225, 136, 136, 1, None]
    assert groups[4].order == trivial_group(molecule).order
    return concatenate(systems), groups


def fcc():
    sites = torch.tensor([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]).double()
    return periodic(sites, [13] * 4, torch.eye(3).double() * 4.05)


def rutile(u=0.305):
    cell = torch.diag(torch.tensor([4.594, 4.594, 2.959], dtype=torch.float64))
    oxygen = [[u, u, 0], [-u, -u, 0], [0.5 + u, 0.5 - u, 0.5], [0.5 - u, 0.5 + u, 0.5]]
    sites = torch.tensor([[0, 0, 0], [0.5, 0.5, 0.5], *oxygen], dtype=torch.float64)
    return periodic(sites, [22, 22, 8, 8, 8, 8], cell)


def periodic(sites, numbers, cell):
    return make_structure(sites @ cell, torch.tensor(numbers), cell=cell, pbc=(True, True, True))


def det(one):
    return float(torch.linalg.det(one.cell[0]))


def normal(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_close(found, expected, tolerance):
    assert float((found - expected).abs().max()) <= tolerance
