"""Phonons of whole crystals: closed forms, two routes, files of phonopy, verdicts, bad inputs."""

import numpy as np
import phonopy
import pytest
import torch
from analytic_models import lennard_jones_edges, spring_edges
from factories import (
    FCC,
    HEXAGONAL,
    crystal,
    fail_once,
    molecule,
    prototype,
    structures,
    tiny_potential,
)
from lennard_jones import LennardJones
from springs import Springs

import coset
from coset.edge_model import IDENTITY
from coset.errors import ConfigError
from coset.structures import Properties, concatenate, repeat, rotate
from coset.symmetry.crystal import find_group, symmetrize
from coset.symmetry.primitive import primitive_cell
from coset.symmetry.spectrum import haar
from coset.workflows.conductivity.by_phono3py import anharmonic
from coset.workflows.phonons import run as run_module
from coset.workflows.phonons.by_phonopy import standard_masses
from coset.workflows.phonons.dynamics import dynamics_of
from coset.workflows.phonons.instability import follow
from coset.workflows.phonons.modes import in_thz
from coset.workflows.phonons.results import PhononSettings
from coset.workflows.phonons.run import phonons
from coset.workflows.phonons.samples import displacement_samples, exact_evaluator

STIFFNESS, LENGTH = 3.0, 2.5
SMALL = {"relax": False, "supercell": (2, 2, 2), "mesh": (4, 4, 4), "frames": 3}


def tilted(one):
    return rotate(one, haar(1, 11)[0])


def of_springs(one, mesh, born=None):
    """Dynamics of a primitive cell whose springs have their natural length."""
    exact = symmetrize(one, find_group(one, 1e-4))
    primitive = primitive_cell(exact, find_group(exact, 1e-6))
    potential = Springs(stiffness=STIFFNESS, length=LENGTH)
    samples = displacement_samples(potential, primitive, [IDENTITY], mesh, 0.005)
    masses = standard_masses(primitive.structures)
    return primitive.structures, masses, dynamics_of(primitive.structures, samples, masses, born)


def test_rocksalt_of_springs_is_three_diatomic_chains():
    """Along each axis of the cube k(1/m1 + 1/m2) ± k sqrt((1/m1 + 1/m2)² - 4 sin²(q a)/(m1 m2))."""
    cube = 2 * LENGTH * np.eye(3)
    one, masses, dynamics = of_springs(
        crystal(cube @ np.array(FCC), [(0, 0, 0), (0.5, 0.5, 0.5)], [11, 17]), (3, 3, 3)
    )
    q = np.array([[0.13, 0.27, 0.41], [0.5, 0.0, 0.5], [0.2, 0.2, 0.0]])
    waves = 2 * np.pi * q @ np.linalg.inv(one.cell[0].numpy()).T
    sines = np.sin(waves * LENGTH) ** 2
    total, product = (1 / masses).sum(), masses.prod()
    root = np.sqrt(total**2 - 4 * sines / product)
    expected = STIFFNESS * np.sort(np.hstack([total - root, total + root]), axis=1)
    found = np.linalg.eigvalsh(dynamics.matrices(q)[0])
    # displacements of h leave (h/length)^4 of the force constants after extrapolation
    assert np.abs(found - expected).max() < 1e-8
    potential = spring_edges(STIFFNESS, LENGTH)
    exact = exact_evaluator(potential, one, [IDENTITY], masses)(q)[0]
    assert np.abs(np.linalg.eigvalsh(exact) - expected).max() < 1e-12


def test_lennard_jones_is_a_sum_over_neighbors():
    """D(q) = sum_R [f'' n n + f'/R (1 - n n)] (1 - cos q.R)/m with n = R/|R|, at general q."""
    sigma, cutoff = 3.0, 11.0
    one = crystal(2**0.5 * 1.1 * sigma * np.array(FCC), [(0, 0, 0)], [18])
    masses, cell = standard_masses(one), one.cell[0].numpy()
    shifts = np.stack(np.meshgrid(*[np.arange(-6, 7)] * 3), -1).reshape(-1, 3)
    distances = np.linalg.norm(shifts @ cell, axis=1)
    near = (distances > 0.0) & (distances < cutoff)
    shifts, r = shifts[near], distances[near]
    n = shifts @ cell / r[:, None]
    s6 = (sigma / r) ** 6
    slope, curvature = 4 * (6 * s6 - 12 * s6**2) / r, 4 * (156 * s6**2 - 42 * s6) / r**2
    along = np.einsum("ea,eb->eab", n, n)
    constants = (curvature - slope / r)[:, None, None] * along
    constants = constants + (slope / r)[:, None, None] * np.eye(3)
    q = np.array([[0.13, 0.27, 0.41], [0.5, 0.25, 0.75], [0.05, 0.0, 0.0]])
    factor = 1.0 - np.cos(2 * np.pi * q @ shifts.T)
    expected = np.einsum("qe,eab->qab", factor, constants) / masses[0]
    exact = exact_evaluator(lennard_jones_edges(cutoff, sigma), one, [IDENTITY], masses)(q)[0]
    assert np.abs(exact - expected).max() < 1e-12 * np.abs(expected).max()


def test_fcc_of_springs_at_the_zone_boundary():
    """At X the squared frequencies are 8 k/m and twice 4 k/m."""
    edge = LENGTH * 2**0.5
    _, masses, dynamics = of_springs(
        tilted(crystal(edge * np.array(FCC), [(0, 0, 0)], [29])), (3, 3, 3)
    )
    found = np.linalg.eigvalsh(dynamics.matrices(np.array([[0.5, 0.0, 0.5]]))[0, 0])
    assert found == pytest.approx(STIFFNESS / masses[0] * np.array([4, 4, 8]), abs=1e-8)


def diamond():
    return tilted(crystal(5.4 * np.array(FCC), [(0, 0, 0), (0.25, 0.25, 0.25)], [14, 14]))


@pytest.fixture(scope="module")
def exact():
    (found,) = phonons(tiny_potential(), diamond(), PhononSettings(**SMALL))
    return found


def test_a_result_has_all_parts(exact):
    assert exact.status == "ok"
    found = exact.result
    n_points = len(found.bands.path.q_points)
    assert found.bands.frequency_THz.shape == found.bands.error_THz.shape == (n_points, 6)
    assert (np.diff(found.bands.frequency_THz, axis=1) >= 0.0).all()
    assert found.space_group == 227
    assert found.gamma_residual_THz < 1e-4
    assert found.interpolation_error_THz > 0.02
    assert "InterpolationError" in exact.warnings
    assert np.isfinite(found.energy)


def test_the_dos_counts_all_modes(exact):
    dos = exact.result.dos
    assert np.trapezoid(dos.states, dos.frequency_THz) == pytest.approx(6.0, abs=0.1)


def test_projection_makes_branches_degenerate(exact):
    """Along the fourfold and threefold axes: exact in the projected, not in the raw network."""
    (raw,) = phonons(tiny_potential(), diamond(), PhononSettings(**SMALL | {"average": "none"}))
    splits = []
    for found in (exact.result, raw.result):
        path = found.bands.path
        own = [path.segments[k] for k, names in enumerate(path.labels) if set(names) < set("ΓXL")]
        values = np.concatenate([found.bands.frequency_THz[a + 1 : b] for a, b in own])
        gaps = np.diff(values, axis=1)
        splits.append(np.sort(gaps, axis=1)[:, :2].max())
    assert splits[0] < 1e-6
    assert splits[1] > 1e-3


def test_one_frame_has_no_errors():
    (found,) = phonons(tiny_potential(), diamond(), PhononSettings(**SMALL | {"average": "none"}))
    assert found.result.bands.error_THz is None
    assert found.result.thermal.free_energy_error is None


def test_displacements_give_what_derivatives_give(exact):
    (other,) = phonons(tiny_potential(), diamond(), PhononSettings(**SMALL, method="displacements"))
    a, b = exact.result.bands, other.result.bands
    real = np.abs(a.frequency_THz) > 0.5  # a root magnifies errors near zero
    assert np.abs(a.frequency_THz - b.frequency_THz)[real].max() < 5e-3
    assert other.result.interpolation_error_THz is None
    assert other.result.verdict.kind == exact.result.verdict.kind


@pytest.mark.parametrize("method", ["exact", "displacements"])
def test_a_supercell_has_the_phonons_of_its_primitive_cell(method):
    settings = PhononSettings(**SMALL | {"supercell": (2, 2, 1)}, method=method)
    one = tilted(structures()["hcp"])
    (small,), (large,) = (
        phonons(tiny_potential(), x, settings) for x in (one, repeat(one, (1, 2, 1)))
    )
    assert len(large.result.primitive.atomic_numbers) == 2
    a, b = (np.sort(x.result.thermal.free_energy) for x in (small, large))
    assert a == pytest.approx(b, abs=1e-6)


def test_phonopy_reads_the_same_frequencies(exact, tmp_path):
    found = exact.result
    yaml, constants = found.lattice.write(tmp_path)
    q = found.bands.path.q_points[::20]
    for name in ({}, {"force_constants_filename": constants}):
        phonon = phonopy.load(yaml, **name)
        theirs = phonon.run_qpoints(q).frequencies
        ours = found.bands.frequency_THz[::20]
        # conversion factors differ by 1.2e-7; the root of 1e-15 is 1e-7
        assert np.abs(ours - theirs).max() < 1e-5


def test_levels_and_frames_are_samples_of_one_mean():
    """Averages over rules scatter less than single frames."""
    (single,), (rule,) = (
        phonons(tiny_potential(), diamond(), PhononSettings(**SMALL | {"average": level}))
        for level in ("project", "tight")
    )
    errors = [np.median(x.result.bands.error_THz) for x in (single, rule)]
    assert errors[1] < 0.5 * errors[0]


# Verdicts


def test_a_crystal_at_its_minimum_is_stable():
    one = prototype("fcc", 4.0)
    settings = PhononSettings(method="displacements", supercell=(3, 3, 3), frames=1, mesh=(6, 6, 6))
    (found,) = phonons(LennardJones(), one, settings)
    assert found.status == "ok"
    assert found.relaxation.max_force < 1e-4
    assert found.result.verdict.kind == "stable"
    assert found.result.bands.frequency_THz.min() > -1e-3
    assert found.result.thermal.imaginary_share == 0.0


def test_a_simple_cubic_crystal_of_pairs_is_unstable_and_the_mode_is_followed():
    one = crystal(2.75 * np.eye(3), [(0, 0, 0)], [29])
    settings = PhononSettings(
        method="displacements", supercell=(2, 2, 2), frames=2, mesh=(4, 4, 4), relax=False
    )
    (found,) = phonons(LennardJones(), one, settings)
    verdict = found.result.verdict
    assert verdict.kind == "unstable"
    assert verdict.frequency_THz < -verdict.threshold_THz < 0.0
    assert verdict.drop > 5 * verdict.drop_error
    assert 0.0 < abs(verdict.amplitude) <= 0.6
    assert set(np.abs(verdict.q)) <= {0.0, 0.5}
    assert "ImaginaryModesLeftOut" in found.warnings


class Well:
    """E = -u²/2 + u⁴/(4 w²) of the distance u of two sublattices, lowest at w."""

    def __init__(self, width):
        self.width = width

    def __call__(self, structures):
        first, second = structures.positions.view(-1, 2, 3).unbind(1)
        fraction = torch.einsum("sa,sab->sb", second - first, torch.linalg.inv(structures.cell))
        square = torch.einsum("sa,sab->sb", fraction - 0.5, structures.cell).square().sum(1)
        return Properties(energy=-square / 2 + square**2 / (4 * self.width**2))


@pytest.mark.parametrize(("width", "amplitude"), [(0.06, 0.02), (0.3, 0.15)])
def test_a_mode_that_ends_in_a_shallow_well_is_followed(width, amplitude):
    """Each of the two atoms moves by half of the distance."""
    one = crystal(4.0 * np.eye(3), [(0, 0, 0), (0.5, 0.5, 0.5)], [11, 17])
    primitive = primitive_cell(one, find_group(one, 1e-5))
    along = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]], dtype=torch.float64)
    found = follow(Well(width), primitive, (IDENTITY,), along, (1, 1, 1))
    u = 2 * amplitude
    assert found.is_real
    assert abs(found.amplitude) == amplitude
    assert found.drop == pytest.approx(u**2 / 2 - u**4 / (4 * width**2), rel=1e-9)


def test_polar_terms_split_optical_modes_at_gamma():
    """By 14.4 eV Å Z² 4 pi/(epsilon mu V) for two charges ±Z, along any direction."""
    born = "14.4\n3 0 0 0 3 0 0 0 3\n1.2 0 0 0 1.2 0 0 0 1.2\n-1.2 0 0 0 -1.2 0 0 0 -1.2\n"
    edge = 2 * LENGTH
    one, masses, dynamics = of_springs(
        crystal(edge * np.array(FCC), [(0, 0, 0), (0.5, 0.5, 0.5)], [11, 17]), (2, 2, 2), born
    )
    volume, reduced = edge**3 / 4, masses.prod() / masses.sum()
    split = 14.4 * 4 * np.pi * 1.2**2 / (3 * reduced * volume)
    gamma, directions = np.zeros((2, 3)), np.array([[0.5, 0.0, 0.5], [0.1, 0.2, 0.4]])
    found = dynamics.modes(gamma, directions).values
    plain = 2 * STIFFNESS / reduced
    expected = [plain, plain, plain + split]
    assert found[0, 3:] == pytest.approx(expected, abs=1e-5)
    assert found[1, 3:] == pytest.approx(expected, abs=1e-5)
    assert len(one.atomic_numbers) == 2


def test_conductivity_has_the_same_polar_terms():
    pytest.importorskip("phono3py")
    born = "14.4\n3 0 0 0 3 0 0 0 3\n1.2 0 0 0 1.2 0 0 0 1.2\n-1.2 0 0 0 -1.2 0 0 0 -1.2\n"
    edge, mesh = 2 * LENGTH, (2, 2, 2)
    given = crystal(edge * np.array(FCC), [(0, 0, 0), (0.5, 0.5, 0.5)], [11, 17])
    one, _, dynamics = of_springs(given, mesh, born)
    polar = anharmonic(one, 2 * np.eye(3, dtype=int), 2 * np.eye(3, dtype=int), born)
    lattice = dynamics.lattice
    polar.phono3py.fc2 = np.array(lattice.phonon.force_constants)
    polar.phono3py.mesh_numbers = [3, 3, 3]
    polar.phono3py.init_phph_interaction()
    polar.phono3py.run_phonon_solver()
    found, _, addresses = polar.phono3py.get_phonon_data()
    q = addresses / 3.0
    off = np.abs(q).max(axis=1) > 0.0
    expected = in_thz(dynamics.modes(q[off], np.zeros_like(q[off])).values)
    assert np.abs(found[off] - expected).max() < 1e-4
    plain = in_thz(of_springs(given, mesh)[2].modes(q[off], np.zeros_like(q[off])).values)
    assert np.abs(expected - plain).max() > 0.1


def test_charges_that_do_not_fit_are_refused():
    settings = PhononSettings(**SMALL, born="14.4\n1 0 0\n")
    (found,) = phonons(tiny_potential(), diamond(), settings)
    assert found.code == "BadBornFile"


# Inputs


def test_a_bad_crystal_stops_nothing():
    overlapping = crystal(3 * np.eye(3), [(0, 0, 0), (0, 0, 0.01)], [29, 29])
    batch = concatenate(
        [overlapping, molecule([(0, 0, 0), (0, 0, 1.1)], [6, 8]), prototype("fcc", 3.7, 92),
         structures()["fcc"]]
    )  # fmt: skip
    told = []
    results = phonons(
        tiny_potential(), batch, PhononSettings(**SMALL),
        observer=lambda done, note: bool(told.append((done, note))),
    )  # fmt: skip
    assert [r.status for r in results] == ["rejected", "rejected", "rejected", "ok"]
    assert [r.code for r in results[:3]] == ["AtomsOverlap", "CellNotPeriodic", "UnknownElement"]
    assert told[0] == (0, "relaxing")
    assert [done for done, note in told if not note] == [3]
    assert {note for done, note in told if done == 3} > {"derivatives", "verdict"}


@pytest.mark.parametrize("method", ["exact", "displacements"])
def test_atoms_out_of_reach_are_refused(method):
    settings = PhononSettings(**SMALL, method=method)
    (found,) = phonons(tiny_potential(), structures()["sparse"], settings)
    assert (found.status, found.code) == ("rejected", "NoNeighbors")


def test_a_potential_that_breaks_fails_alone():
    batch = concatenate([prototype("fcc", 4.1, 79), prototype("fcc", 4.0)])
    settings = PhononSettings(**SMALL | {"frames": 1}, method="displacements")
    potential = LennardJones(broken=79)
    results = phonons(potential, batch, settings)
    assert [(r.status, r.code) for r in results] == [("failed", "NonFiniteOutput"), ("ok", "")]


@pytest.mark.parametrize("method", ["exact", "displacements"])
def test_images_of_atoms_do_not_matter(method):
    settings = PhononSettings(**SMALL, method=method)
    (inside,), (outside,) = (
        phonons(tiny_potential(), structures()[name], settings)
        for name in ("triclinic", "unwrapped")
    )
    a, b = (x.result.bands.frequency_THz for x in (inside, outside))
    assert np.abs(np.sign(a) * a**2 - np.sign(b) * b**2).max() < 1e-5
    assert inside.result.dos.states == pytest.approx(outside.result.dos.states, abs=1e-3)


@pytest.mark.parametrize("average", ["project", "standard"])
def test_frequencies_and_their_errors_do_not_depend_on_the_orientation(average):
    settings = PhononSettings(**SMALL, average=average, double=True)
    one = structures()["hcp"]
    found, other = (
        phonons(tiny_potential(), x, settings)[0].result.bands for x in (one, tilted(one))
    )
    a, b = found.frequency_THz, other.frequency_THz
    assert np.abs(np.sign(a) * a**2 - np.sign(b) * b**2).max() < 1e-8
    moved = np.abs(a) > 0.1
    assert np.abs(found.error_THz - other.error_THz)[moved].max() < 1e-6
    assert found.error_THz.max() > 1e-4


@pytest.mark.parametrize("name", ["quick", "double"])
def test_options_of_exact_derivatives_are_refused_elsewhere(name):
    with pytest.raises(ConfigError, match=f"{name} is for exact"):
        PhononSettings(method="displacements", **{name: True})


def test_a_run_that_is_stopped_says_so():
    batch = concatenate([structures()["fcc"], structures()["bcc"]])
    told = []
    results = phonons(
        tiny_potential(), batch, PhononSettings(**SMALL),
        observer=lambda done, note: done == 1,
        on_result=lambda number, result: told.append(number),
    )  # fmt: skip
    assert [r.code for r in results] == ["", "Interrupted"]
    assert told == [0, 1]


@pytest.mark.parametrize("options", [{}, {"quick": True}, {"method": "displacements"}])
def test_a_run_may_be_stopped_within_a_crystal(options):
    settings = PhononSettings(**SMALL, **options)
    (found,) = phonons(
        tiny_potential(), structures()["fcc"], settings,
        observer=lambda done, note: note == "frames to go: 1",
    )  # fmt: skip
    assert (found.status, found.code) == ("not_converged", "Interrupted")


def test_exact_derivatives_need_a_model():
    with pytest.raises(ConfigError, match="displacements"):
        phonons(LennardJones(), prototype("fcc", 4.0), PhononSettings(**SMALL))


def test_a_supercell_that_breaks_the_symmetry_is_refused():
    (found,) = phonons(
        tiny_potential(), diamond(), PhononSettings(**SMALL | {"supercell": (2, 2, 3)})
    )
    assert (found.status, found.code) == ("rejected", "AsymmetricMesh")


@pytest.mark.parametrize(
    "changes",
    [{"method": "magic"}, {"average": "most"}, {"frames": 0}, {"supercell": (0, 1, 1)},
     {"amplitude": -0.1}, {"temperatures": (-1.0,)}],
)  # fmt: skip
def test_settings_without_meaning_are_refused(changes):
    with pytest.raises(ConfigError):
        PhononSettings(**changes)


def test_the_supercell_is_enlarged_until_interpolation_is_good():
    one = crystal(
        np.array(HEXAGONAL) * 2.56, [(1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)], [29] * 2
    )
    settings = PhononSettings(
        relax=False, frames=1, mesh=(3, 3, 3), min_edge=5.0, max_edge=13.0,
        interpolation_tolerance_THz=0.2,
    )  # fmt: skip
    (found,) = phonons(tiny_potential("fixed"), one, settings)
    edges = np.array(found.result.supercell) * [2.56, 2.56, 4.18]
    assert edges.min() > 7.0
    assert found.result.interpolation_error_THz < 0.2


def test_public_names():
    assert coset.phonons is phonons
    assert coset.PhononSettings is PhononSettings
    assert torch.get_default_dtype() == torch.float32


def test_following_an_instability_finds_lower_minima_of_lower_symmetry():
    one = crystal(2.75 * np.eye(3), [(0, 0, 0)], [29])
    settings = PhononSettings(
        method="displacements", supercell=(2, 2, 2), frames=2, mesh=(4, 4, 4), relax=False,
        follow=True,
    )  # fmt: skip
    potential = LennardJones()
    (found,) = phonons(potential, one, settings)
    assert found.result.minima
    above = float(potential(one).energy)
    for minimum in found.result.minima:
        n_atoms = len(minimum.structures.atomic_numbers)
        below = float(potential(minimum.structures).energy) / n_atoms
        assert minimum.drop == pytest.approx(above - below, abs=1e-9)
        assert minimum.accepted
        assert minimum.parent == -1
        assert n_atoms in (1, 2, 4, 8)
        assert minimum.space_group != 221
    assert max(m.drop for m in found.result.minima) > 0.5
    listed = found.result.instabilities
    assert {one.q for one in listed} <= {(0.0, 0.0, 0.5), (0.0, 0.5, 0.5), (0.5, 0.5, 0.5)}
    assert all(one.frequency_THz < 0.0 < one.n_modes for one in listed)
    words = [word for one in listed for word in one.outcomes]
    assert [w for w in words if w.startswith("minimum")] == [
        f"minimum {k}" for k in range(len(found.result.minima))
    ]
    for word in ("energy along a mode, frame 2 of 2", "structure 1 below", "energies of what"):
        (stopped,) = phonons(
            potential, one, settings, observer=lambda done, note, w=word: w in note
        )
        assert (stopped.status, stopped.code) == ("not_converged", "Interrupted")


@pytest.mark.parametrize(
    "wrong",
    [{"path": (("Γ", "Q"),)}, {"mesh": (4, 4, 3)}, {"born": "no numbers"}],
    ids=["path", "mesh", "born"],
)
def test_wrong_settings_cost_no_derivatives(wrong):
    def notes_of(changes):
        notes = []
        settings = PhononSettings(**SMALL | changes)
        (found,) = phonons(
            tiny_potential(), diamond(), settings, observer=lambda _, note: notes.append(note)
        )
        return found, notes

    found, notes = notes_of(wrong)
    assert found.result is None
    assert found.code in ("UnknownBandPoint", "AsymmetricMesh", "BadBornFile")
    assert not any("derivatives" in note for note in notes), notes
    right, notes = notes_of({})
    assert right.result is not None
    assert any("derivatives" in note for note in notes), notes


def test_an_unforeseen_error_ends_its_own_crystal_only(monkeypatch):
    fail_once(monkeypatch, run_module, "band_path", RuntimeError("out of memory"))
    first, second = phonons(
        tiny_potential(), concatenate([diamond(), diamond()]), PhononSettings(**SMALL)
    )
    assert (first.status, first.code) == ("failed", "InternalError")
    assert first.reason.startswith("RuntimeError: out of memory (factories.py, line")
    assert second.result is not None


def test_the_relaxation_is_told_and_stops():
    notes = []

    def observer(_, note):
        notes.append(note)
        return note.startswith("relaxing, step")

    settings = PhononSettings(**SMALL | {"relax": True})
    (found,) = phonons(tiny_potential(), diamond(), settings, observer=observer)
    assert (found.status, found.code) == ("not_converged", "Interrupted")
    assert sum(note.startswith("relaxing, step") for note in notes) == 1
