"""Parts of phonons: meshes and the group, interpolation, modes and errors, verdict, sums."""

import numpy as np
import phonopy
import pytest
import torch
from factories import FCC, crystal, prototype, structures, tiny_potential
from scipy import stats
from springs import Springs
from tolerances import close

from coset.derivatives import dynamical_matrices
from coset.edge_model import IDENTITY, Quadrature
from coset.errors import StructureError
from coset.structures import repeat, rotate
from coset.symmetry.average import sample_rules
from coset.symmetry.crystal import find_group, symmetrize, trivial_group
from coset.symmetry.primitive import primitive_cell
from coset.symmetry.spectrum import haar
from coset.units import EV_PER_K, EV_PER_THZ, EV_PER_UNIT, THZ_PER_ROOT
from coset.workflows.phonons.by_phonopy import band_path, lattice_of, standard_masses
from coset.workflows.phonons.dynamics import dynamics_of
from coset.workflows.phonons.instability import (
    averaged_energies,
    commensurate,
    directions,
    displaced,
    mode_displacements,
)
from coset.workflows.phonons.interpolation import force_constants, interpolation
from coset.workflows.phonons.mesh import (
    action_of,
    compatible_mesh,
    dense_mesh,
    irreducible_pairs,
    irreducible_points,
    is_compatible,
    mesh_points,
    one_of_each_star,
    opposites,
    project_mesh,
    star_average,
    supercell_mesh,
)
from coset.workflows.phonons.modes import (
    Modes,
    errors_in_thz,
    in_thz,
    modes,
    quantile,
    vibrations,
)
from coset.workflows.phonons.samples import (
    displacement_samples,
    exact_evaluator,
    exact_samples,
    irreducible_samples,
    mass_roots,
)
from coset.workflows.phonons.thermal import thermal_properties
from coset.workflows.phonons.verdict import decide, first_verdict

GENERAL = np.array([[0.13, 0.27, 0.41], [-0.31, 0.07, 0.22]])
FRAME = Quadrature(rotations=haar(1, 3), weights=torch.ones(1).double(), degree=0)


def symmetric(one):
    """A primitive cell that has its group exactly, and the action of the group."""
    exact = symmetrize(one, find_group(one, 1e-4))
    group = find_group(exact, 1e-6)
    return exact, group, action_of(exact, group)


def diamond(length=5.4):
    return crystal(length * np.array(FCC), [(0, 0, 0), (0.25, 0.25, 0.25)], [14, 14])


def tetragonal():
    cell = [(3.0, 0, 0), (0, 3.0, 0), (1.5, 1.5, 5.0)]
    return crystal(cell, [(0, 0, 0)], [29])


def wurtzite():
    """Nonsymmorphic, polar, four atoms."""
    cell = np.array([(1, 0, 0), (-0.5, 0.75**0.5, 0), (0, 0, 1.61)]) * 3.2
    sites = [(1 / 3, 2 / 3, 0), (2 / 3, 1 / 3, 0.5), (1 / 3, 2 / 3, 0.38), (2 / 3, 1 / 3, 0.88)]
    return crystal(cell, sites, [29, 29, 8, 8])


def tilted(one):
    return rotate(one, haar(1, 11)[0])


# Meshes and the group


@pytest.mark.parametrize(
    ("build", "wanted", "expected"),
    [(diamond, (3, 4, 3), (4, 4, 4)), (tetragonal, (4, 3, 1), (4, 4, 4)),
     (wurtzite, (4, 3, 2), (4, 4, 2)), (lambda: structures()["triclinic"], (2, 3, 1), (2, 3, 1))],
)  # fmt: skip
def test_a_mesh_has_the_symmetry_of_the_crystal(build, wanted, expected):
    _, _, action = symmetric(tilted(build()))
    assert compatible_mesh(np.array(wanted, dtype=float), action) == expected
    assert is_compatible(expected, action)


def test_a_mesh_without_the_symmetry_is_noticed():
    _, _, action = symmetric(diamond())
    assert not is_compatible((2, 2, 3), action)
    assert not is_compatible((4, 4, 2), symmetric(tetragonal())[2])


def test_sizes_of_meshes():
    one, _, action = symmetric(diamond())
    cell = one.cell[0].numpy()
    edge = np.linalg.norm(cell[0])
    assert supercell_mesh(cell, 2.9 * edge, action) == (3, 3, 3)
    assert supercell_mesh(cell, 3.0 * edge, action) == (3, 3, 3)
    length = 2 * np.pi / (np.linalg.inv(np.linalg.inv(cell))[0] @ [1, 1, 1]) * 3**0.5
    assert dense_mesh(cell, length / 7.5, action) == (8, 8, 8)


def test_stars_of_a_cubic_mesh():
    """The 4x4x4 mesh of fcc has eight stars; their weights are the sizes, counted by hand."""
    _, _, action = symmetric(tilted(structures()["fcc"]))
    points, weights = irreducible_points((4, 4, 4), action)
    assert sorted(np.rint(64 * weights).astype(int).tolist()) == [1, 3, 4, 6, 6, 8, 12, 24]
    assert weights.sum() == pytest.approx(1.0, abs=1e-15)
    assert len(points) == 8


@pytest.mark.parametrize("build", [diamond, wurtzite, lambda: structures()["hcp"]])
def test_operations_turn_dynamical_matrices(build):
    """D_(R g)(q) = U_g† D_R(g q) U_g at general q, where signs and phases show."""
    one, group, action = symmetric(tilted(build()))
    potential, q = tiny_potential(), torch.from_numpy(GENERAL)
    masses = torch.from_numpy(standard_masses(one))
    shifts = np.abs(group.translations - np.rint(group.translations)).max(axis=1)
    for operation in (int(shifts.argmax()), 1, len(action.inverse) - 1):
        images = action.images(GENERAL)[operation]
        there = dynamical_matrices(potential, one, torch.from_numpy(images), masses, FRAME)
        Q = torch.from_numpy(action.cartesian[operation])
        rule = Quadrature(rotations=FRAME.rotations @ Q, weights=FRAME.weights, degree=0)
        direct = dynamical_matrices(potential, one, q, masses, rule).numpy()
        found = action.pull_back(there.numpy()[None], images, operation)[0]
        assert np.abs(found - direct).max() < 1e-12


def test_projection_on_a_mesh_is_the_average_over_stars():
    one, _, action = symmetric(tilted(wurtzite()))
    masses = standard_masses(one)
    evaluate = exact_evaluator(tiny_potential(), one, [FRAME], masses)
    mesh = (2, 2, 3)
    points = mesh_points(mesh)
    projected = project_mesh(evaluate(points), mesh, action)
    stars = star_average(evaluate, points[[0, 1, 4, 11]], action)
    assert np.abs(projected[:, [0, 1, 4, 11]] - stars).max() < 1e-12
    again = project_mesh(projected, mesh, action)
    assert np.abs(again - projected).max() < 1e-13
    assert np.abs(projected - evaluate(points)).max() > 1e-4


@pytest.mark.parametrize(("build", "mesh"), [(diamond, (4, 4, 4)), (wurtzite, (3, 3, 2))])
def test_one_pair_of_every_orbit_gives_the_mesh(build, mesh):
    """Of matrices that have the symmetry, all but the columns of one pair an orbit are needless."""
    one, _, action = symmetric(tilted(build()))
    masses = standard_masses(one)
    points = mesh_points(mesh)
    whole = project_mesh(
        exact_evaluator(tiny_potential(), one, [FRAME], masses)(points), mesh, action
    )
    places, atoms = irreducible_pairs(mesh, action)
    known = np.zeros((len(points), len(masses)), dtype=bool)
    known[places, atoms] = True
    known |= known[opposites(mesh)]
    assert len(places) <= known.size / 6
    given = whole * np.repeat(known, 3, axis=1)[None, :, None, :]
    assert np.abs(project_mesh(given, mesh, action, known) - whole).max() < 1e-12


def test_without_symmetry_every_pair_of_q_and_minus_q_is_taken():
    one, mesh = tilted(wurtzite()), (2, 2, 3)
    masses, action = standard_masses(one), action_of(one, trivial_group(one))
    potential = tiny_potential()
    evaluate = exact_evaluator(potential, one, [FRAME], masses)
    expected = exact_samples(evaluate, mesh, None, masses)
    found = irreducible_samples(potential, one, [FRAME], mesh, action, masses)
    close(found.force_constants, expected.force_constants, 1e-11)
    pairs, _ = irreducible_pairs(mesh, action)
    assert len(pairs) == 4 * (12 + 4) / 2


# Interpolation


def samples_of(build, mesh, frames=3):
    one, _, action = symmetric(tilted(build()))
    masses = standard_masses(one)
    rules = [
        Quadrature(rotations=rotation[None], weights=torch.ones(1).double(), degree=0)
        for rotation in haar(frames, 5)
    ]
    evaluate = exact_evaluator(tiny_potential(), one, rules, masses)
    return one, action, evaluate, exact_samples(evaluate, mesh, action, masses)


def test_interpolation_returns_the_mesh_and_has_the_symmetry_between_its_points():
    mesh = (2, 2, 3)
    one, action, evaluate, samples = samples_of(wurtzite, mesh, 2)
    masses = standard_masses(one)
    found = interpolation(one, mesh, samples.force_constants / mass_roots(masses))
    points = mesh_points(mesh)
    expected = project_mesh(evaluate(points), mesh, action)
    assert np.abs(found.matrices(points) - expected).max() < 1e-12
    star = star_average(found.matrices, GENERAL, action)
    assert np.abs(found.matrices(GENERAL) - star).max() < 1e-12
    assert np.abs(force_constants(expected, mesh) * mass_roots(masses)
                  - samples.force_constants).max() < 1e-11  # fmt: skip


@pytest.mark.parametrize(("build", "mesh"), [(diamond, (3, 3, 3)), (wurtzite, (3, 3, 2))])
def test_interpolation_is_that_of_phonopy(build, mesh):
    one, _, _, samples = samples_of(build, mesh, 1)
    masses = standard_masses(one)
    found = interpolation(one, mesh, samples.force_constants / mass_roots(masses))
    theirs = lattice_of(one, mesh, samples.force_constants[0]).matrices(GENERAL)
    assert np.abs(found.matrices(GENERAL)[0] - theirs).max() < 1e-12


# Modes and errors


def random_samples(count, n_points, dim, spread, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n_points, dim, dim)) + 1j * rng.normal(size=(n_points, dim, dim))
    noise = rng.normal(size=(count, *base.shape)) + 1j * rng.normal(size=(count, *base.shape))
    every = base + spread * noise
    return (every + every.conj().swapaxes(-1, -2)) / 2


def test_errors_are_the_scatter_of_eigenvalues():
    samples = random_samples(400, 2, 6, 1e-3)
    found = modes(samples, GENERAL, np.ones(2), 0.0)
    actual = np.linalg.eigvalsh(samples).std(axis=0, ddof=1) / 20.0
    assert np.abs(found.errors / actual - 1.0).max() < 0.01


def test_degenerate_modes_share_one_error():
    """Scatter that splits a pair without moving its mean is no error of the pair."""
    split = np.diag([1.0, -1.0, 0, 0, 0, 0]) * 1e-9
    base = np.diag([1.0, 1.0, 2.0, 3.0, 4.0, 5.0]).astype(complex)
    samples = np.array([[base + split], [base - split]])
    found = modes(samples, GENERAL[:1], np.ones(2), 0.0)
    assert found.errors.max() < 1e-15


def test_numerical_errors_add_up():
    samples = random_samples(1, 1, 3, 0.0)
    doubt = 1e-4 * np.eye(3, dtype=complex)[None]
    found = modes(samples, GENERAL[:1], np.ones(1), 3e-4, doubt)
    assert found.errors == pytest.approx(np.hypot(1e-4, 3e-4), abs=1e-12)


def test_translations_at_gamma_are_zero_and_nothing_else_is():
    masses = np.array([3.0, 7.0])
    basis = vibrations(masses)
    translations = np.kron(np.sqrt(masses)[:, None], np.eye(3))
    assert np.abs(basis.T @ translations).max() < 1e-14
    samples = random_samples(3, 1, 6, 1e-2)
    found = modes(samples, np.zeros((1, 3)), masses, 1e-9)
    zero = found.values[0] == 0.0
    assert zero.sum() == 3
    assert (found.errors[0, zero] == 0.0).all()
    inner = basis.T @ samples.mean(0)[0] @ basis
    assert found.values[0, ~zero] == pytest.approx(np.linalg.eigvalsh(inner), abs=1e-13)


def test_frequencies_and_their_errors():
    found = Modes(values=np.array([[-0.04, 0.0, 0.25]]), errors=np.array([[1e-5, 4e-4, 1e-4]]))
    assert in_thz(found.values) == pytest.approx(THZ_PER_ROOT * np.array([[-0.2, 0.0, 0.5]]))
    linear = THZ_PER_ROOT * np.array([1e-5 / 0.4, 0.02, 1e-4 / 1.0])
    assert errors_in_thz(found)[0] == pytest.approx(linear, rel=1e-6)
    assert pytest.approx(15.633304, abs=1e-6) == THZ_PER_ROOT


def test_three_errors_are_more_with_few_samples():
    assert quantile(1) == 3.0
    for count, expected in ((6, 5.5), (8, 4.5), (12, 3.85)):
        assert quantile(count) == pytest.approx(expected, abs=0.05)
    assert quantile(30) == pytest.approx(stats.t.ppf(0.99865, 29), abs=1e-9)


# Verdict


@pytest.mark.parametrize(
    ("values", "errors", "kind", "mode"),
    [
        ((0.1, 0.2), (0.01, 0.01), "stable", 0),
        ((0.1, 0.2), (0.04, 0.01), "undecided", 0),
        ((0.1, 0.2), (0.01, 0.09), "undecided", 1),
        ((-0.1, 0.2), (0.01, 0.01), "unstable", 0),
        ((-0.1, 0.2), (0.05, 0.01), "undecided", 0),
        ((-0.1, -0.2), (0.01, 0.01), "unstable", 1),
        ((0.0, 0.2), (0.0, 0.01), "undecided", 0),
        ((0.03, 0.2), (0.01, 0.01), "undecided", 0),
        ((1e-6, 0.2), (1e-7, 0.01), "stable", 0),
    ],
)
def test_verdict_on_synthetic_modes(values, errors, kind, mode):
    assert decide(np.array(values), np.array(errors), 3.0) == (kind, mode)


def test_the_verdict_names_its_mode_and_leaves_translations_out():
    found = Modes(
        values=np.array([[0.0, 0.0, 0.0, 0.3, 0.3, 0.3], [-0.02, 0.1, 0.1, 0.2, 0.2, 0.2]]),
        errors=np.array([[0.0] * 3 + [1e-3] * 3, [1e-3] * 6]),
    )
    q = np.array([[0.0, 0, 0], [0.5, 0, 0]])
    verdict = first_verdict(q, found, 3.0)
    assert (verdict.kind, verdict.q, verdict.branch) == ("unstable", (0.5, 0.0, 0.0), 0)
    assert verdict.frequency_THz == pytest.approx(-THZ_PER_ROOT * 0.02**0.5)
    assert verdict.threshold_THz == pytest.approx(THZ_PER_ROOT * 0.003**0.5)
    calm = Modes(values=np.abs(found.values), errors=found.errors)
    assert first_verdict(q, calm, 3.0).kind == "stable"


# Sums over modes, paths


def test_thermal_properties_of_one_oscillator():
    value, kelvin = 0.09, 320.0
    energy = float(in_thz(np.array(value))) * EV_PER_THZ
    x = energy / (EV_PER_K * kelvin)
    found = thermal_properties(np.full((1, 1, 1), value), np.ones(1), np.array([0.0, kelvin]))
    assert found.free_energy == pytest.approx(
        [energy / 2, energy / 2 + EV_PER_K * kelvin * np.log(1 - np.exp(-x))], abs=1e-15
    )
    n = 1 / (np.exp(x) - 1)
    assert found.heat_capacity == pytest.approx([0, EV_PER_K * x**2 * n * (n + 1)], abs=1e-18)
    step = 0.01
    near = np.array([kelvin - step, kelvin + step])
    low, high = thermal_properties(np.full((1, 1, 1), value), np.ones(1), near).free_energy
    assert found.entropy[1] == pytest.approx(-(high - low) / (2 * step), abs=1e-12)
    assert found.free_energy_error is None


def test_imaginary_modes_are_left_out_and_counted():
    values = np.array([[[0.1, -0.1], [0.2, 0.3]]])
    found = thermal_properties(values, np.array([0.25, 0.75]), np.array([300.0]))
    real = thermal_properties(
        np.array([[[0.1, 1e9], [0.2, 0.3]]]), np.array([0.25, 0.75]), np.array([300.0])
    )
    huge = EV_PER_THZ * float(in_thz(np.array(1e9))) / 2 * 0.25
    assert found.imaginary_share == pytest.approx(0.125)
    assert found.free_energy[0] == pytest.approx(real.free_energy[0] - huge, abs=1e-7)


def test_errors_of_thermal_properties_are_those_of_a_mean():
    values = np.array([[[0.1]], [[0.2]], [[0.4]]])
    found = thermal_properties(values, np.ones(1), np.array([0.0]))
    each = in_thz(values[:, 0, 0]) * EV_PER_THZ / 2
    assert found.free_energy[0] == pytest.approx(each.mean(), abs=1e-15)
    assert found.free_energy_error[0] == pytest.approx(each.std(ddof=1) / 3**0.5, abs=1e-15)


def test_thermal_properties_are_those_of_phonopy():
    one, group, action = symmetric(crystal(2.5 * 2**0.5 * np.array(FCC), [(0, 0, 0)], [29]))
    primitive = primitive_cell(one, group)
    samples = displacement_samples(Springs(), primitive, [IDENTITY], (3, 3, 3), 0.01)
    dynamics = dynamics_of(one, samples, standard_masses(one), None)
    points, weights = irreducible_points((5, 5, 5), action)
    values = dynamics.sample_values(points)
    found = thermal_properties(values, weights, np.array([0.0, 300.0, 900.0]))
    phonon = dynamics.lattice.phonon
    phonon.run_mesh((5, 5, 5), is_gamma_center=True)
    theirs = phonon.run_thermal_properties(
        temperatures=[0.0, 300.0, 900.0], exclude_gamma_acoustic=True
    )
    unit = EV_PER_UNIT["kJ/mol"]
    assert found.imaginary_share == 0.0
    # phonopy's constants are older: 2e-6 in k, 1e-7 in THz
    assert found.free_energy / unit == pytest.approx(theirs.free_energy, abs=1e-4)
    assert found.entropy / unit * 1e3 == pytest.approx(theirs.entropy, abs=1e-3)
    assert found.heat_capacity / unit * 1e3 == pytest.approx(theirs.heat_capacity, abs=1e-3)


def test_the_band_path_is_that_of_the_cell_as_it_is():
    path = band_path(diamond())
    assert path.labels[0] == ("Γ", "X")
    assert path.labels[1][0] == "X"
    assert path.q_points[path.segments[0][1]] == pytest.approx([0.5, 0.0, 0.5], abs=1e-12)
    assert path.distances[path.segments[0][1]] == pytest.approx(2 * np.pi / 5.4, abs=1e-9)
    assert all(last - first >= 50 for first, last in path.segments)
    turned = band_path(tilted(diamond()))
    assert turned.distances == pytest.approx(path.distances, abs=1e-9)


def test_a_path_may_be_given_by_its_points():
    standard = band_path(diamond())
    own = band_path(diamond(), (("L", "Γ", "X"), ("K", "Γ")))
    assert own.labels == (("L", "Γ"), ("Γ", "X"), ("K", "Γ"))
    first, last = own.segments[1]
    assert own.q_points[first : last + 1] == pytest.approx(standard.q_points[:51], abs=1e-12)
    # A jump has no length.
    assert own.distances[own.segments[2][0]] == own.distances[last]
    with pytest.raises(StructureError, match="no point Q, Y") as caught:
        band_path(diamond(), (("Γ", "Y", "Q"),))
    assert caught.value.code == "UnknownBandPoint"
    assert "Γ, X, L" in caught.value.hint


def test_masses_are_standard():
    assert standard_masses(prototype("fcc", 3.6)) == pytest.approx([63.546] * 4, abs=1e-3)
    assert phonopy.__version__ >= "4.10"


# Along a mode


def nearly_in_a_mirror(group):
    """Both atoms of diamond against each other, half a degree out of a mirror plane."""
    traces = group.cartesian_rotations.trace(axis1=1, axis2=2)
    mirror = group.cartesian_rotations[np.abs(traces - 1.0) < 1e-6]
    mirror = mirror[np.linalg.det(mirror) < 0][0]
    normal = np.linalg.svd(mirror - np.eye(3))[2][0]
    along = np.cross(normal, [0.3, 0.5, 0.8])
    direction = along / np.linalg.norm(along) + 0.01 * normal
    return np.concatenate([direction, -direction]) / np.linalg.norm(direction) / np.sqrt(2) + 0j


@pytest.mark.parametrize(
    ("q", "lowest"),
    [
        ((0.5, 0.0, 0.5), True),
        ((1 / 3, 0.0, 1 / 3), True),
        ((0.0, 0.0, 0.0), True),
        ((0.0, 0.0, 0.0), False),
    ],
)
def test_the_energy_along_a_mode_has_the_curvature_of_its_frequency(q, lowest):
    """E(a) + E(-a) - 2 E(0) = lambda a² sum m u², for each frame averaged over the group.

    With a and 2a, so that the error is of fourth order.
    """
    one, group, action = symmetric(tilted(diamond()))
    masses, point, potential = standard_masses(one), np.array([q]), tiny_potential()
    rules = sample_rules(one, group, "project", 2, 4)
    matrices = star_average(exact_evaluator(potential, one, rules, masses), point, action)
    cells = commensurate(point[0])
    assert cells is not None
    primitive = primitive_cell(one, group)
    vector = nearly_in_a_mirror(group)
    if lowest:
        vector = directions(primitive, masses, matrices.mean(0)[0], point[0], cells)[0]
    moved = mode_displacements(one, point[0], vector, masses, cells)
    step = 1e-3
    batch = displaced(repeat(one, cells), moved, [0.0, step, -step, 2 * step, -2 * step])
    energies = averaged_energies(potential, primitive, rules, batch)
    small, large = (energies[:, k : k + 2].sum(1) - 2 * energies[:, 0] for k in (1, 3))
    found = (16 * small - large) / (12 * step**2)
    weight = float((moved.numpy() ** 2).sum(1) @ np.tile(masses, int(np.prod(cells))))
    expected = np.einsum("a,sab,b->s", vector.conj(), matrices[:, 0], vector).real * weight
    # rounding of 1e-13 eV over a² is 1e-7
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def hexagonal():
    cell = [[2.5, 0.0, 0.0], [-1.25, 2.5 * np.sqrt(0.75), 0.0], [0.0, 0.0, 6.0]]
    return crystal(np.array(cell), [(0, 0, 0)], [14])


def test_a_wave_at_k_has_its_crest_or_its_node_at_the_atom():
    """Re[c e^(2 pi i q.S)] along z: (2, -1, -1)/2 and (0, 1, -1) on the three sublattices."""
    one, group, _ = symmetric(hexagonal())
    q, masses = np.array([1 / 3, 1 / 3, 0.0]), standard_masses(one)
    soft = np.diag([1.0, 1.0, -1.0]).astype(complex)
    found = directions(primitive_cell(one, group), masses, soft, q, (3, 3, 1))
    heights = set()
    for vector in found:
        moved = mode_displacements(one, q, vector, masses, (3, 3, 1)).numpy()
        assert np.abs(moved[:, :2]).max() < 1e-12
        heights.add(tuple(sorted({round(abs(z), 6) for z in moved[:, 2]})))
    assert heights == {(0.5, 1.0), (0.0, 1.0)}


def test_one_of_each_star():
    _, _, action = symmetric(hexagonal())
    third, half = 1 / 3, 0.5
    points = np.array(
        [[0, 0, 0], [third, third, 0], [-third, 2 * third, 0], [half, 0, 0], [0, -half, 1]]
    )
    assert one_of_each_star(points, action).tolist() == [points[k].tolist() for k in (0, 1, 3)]
    assert one_of_each_star(points[:0], action).shape == (0, 3)


def test_what_is_commensurate():
    assert commensurate(np.array([0.5, 1 / 3, 0.0])) == (2, 3, 1)
    assert commensurate(np.array([0.1234, 0.0, 0.0])) is None
