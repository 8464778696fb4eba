"""Elastic constants: known ones, finite strain, symmetry, errors, and what cannot be computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic_models import lennard_jones_edges, lonsdaleite, silicon, stillinger_weber
from factories import BCC, FCC, crystal, fail_once
from tolerances import close

import coset
from coset.derivatives import dynamical_matrices, strain_derivatives
from coset.edge_model import Quadrature
from coset.errors import ConfigError
from coset.structures import concatenate, repeat, rotate, strain
from coset.symmetry.average import merged, sample_rules
from coset.symmetry.crystal import find_group
from coset.symmetry.primitive import primitive_cell
from coset.symmetry.spectrum import haar
from coset.symmetry.tensors import project_internal_strain, project_rank_four, voigt_matrix
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.elasticity import tensor
from coset.workflows.elasticity.finite_strain import FixedAverage, finite_strain
from coset.workflows.elasticity.frames import evaluate_frames
from coset.workflows.elasticity.run import ElasticSettings, elastic
from coset.workflows.elasticity.tensor import moduli, young_modulus
from tests.conftest import ten_structures

SMALL = (-1e-3, -5e-4, 5e-4, 1e-3)
EXACT = 1e-10
"""GPa and relative: linear algebra on numbers of 100 GPa."""
SILICON_GPA = {"C11": 151.418, "C12": 76.419, "C44": 56.447, "clamped": 109.751}
"""Stillinger-Weber, by sums over bonds (design notes); literature 151.4, 76.4, 56.4, 109.8."""


def cubic(tensor):
    return float(tensor[0, 0]), float(tensor[0, 1]), float(tensor[3, 3])


def test_silicon_has_the_constants_of_the_literature():
    (found,) = elastic(stillinger_weber(), silicon())
    own = found.constants
    assert (found.status, own.ions, own.measure, own.born_stable) == (
        "ok",
        "relaxed",
        "energy",
        True,
    )
    expected = torch.zeros(6, 6).double()
    expected[:3, :3] = SILICON_GPA["C12"]
    for row, name in enumerate(["C11"] * 3 + ["C44"] * 3):
        expected[row, row] = SILICON_GPA[name]
    assert close(own.tensor_GPa, expected, 0.01)
    assert float(own.clamped_GPa[3, 3]) == pytest.approx(SILICON_GPA["clamped"], abs=0.01)
    assert float(own.error_GPa.max()) < EXACT  # an invariant potential
    assert own.symmetry_violation_GPa < EXACT
    assert found.energy == pytest.approx(-2.0 * 2.0 * 2.1682, abs=1e-6)


def test_truncated_lennard_jones():
    """Central forces: C12 = C44 (Cauchy). In units of epsilon and sigma."""
    spacing = 1.0902285558
    fcc = crystal(2**0.5 * spacing * np.array(FCC), [(0, 0, 0)], [18])
    (found,) = elastic(lennard_jones_edges(12.0), fcc, ElasticSettings(relax=False, frames=3))
    C11, C12, C44 = (x / GPA_PER_EV_PER_A3 for x in cubic(found.constants.tensor_GPa))
    assert (pytest.approx(105.10780, abs=1e-4), pytest.approx(60.13757, abs=1e-4)) == (C11, C12)
    assert abs(C12 - C44) < 1e-6  # the stress at this spacing is 1e-8
    assert found.energy == pytest.approx(-8.6049325737, abs=1e-8)
    assert found.constants.softest_mode == float("inf")


def test_lennard_jones_without_end():
    """Sums over the whole fcc lattice (C. Kittel, Introduction to Solid State Physics, chapter 3).

    E = 2 e [A12 (s/R)^12 - A6 (s/R)^6] is lowest at R = (2 A12/A6)^(1/6) s, with E = -e A6²/(2 A12)
    and, as a sum of V^-4 and V^-2, with the bulk modulus 8 |E|/V. What the cutoff takes away is an
    integral over r^-6 at constant density, t = -8 pi/(3 V r³), itself like V^-2.
    """
    sum12, sum6, cutoff = 12.13188, 14.45392, 12.0
    spacing = (2 * sum12 / sum6) ** (1 / 6)
    volume, energy = spacing**3 / 2**0.5, -(sum6**2) / (2 * sum12)
    tail = -8 * np.pi / (3 * volume * cutoff**3)
    fcc = crystal(2**0.5 * spacing * np.array(FCC), [(0, 0, 0)], [18])
    (found,) = elastic(lennard_jones_edges(cutoff), fcc, ElasticSettings(relax=False, frames=3))
    assert found.energy + tail == pytest.approx(energy, abs=1e-4)
    own = found.constants
    stress = own.stress_GPa / GPA_PER_EV_PER_A3 - 2 * tail / volume * torch.eye(3).double()
    assert close(stress, torch.zeros(3, 3).double(), 1e-4)
    bulk = own.moduli.bulk_voigt_GPa / GPA_PER_EV_PER_A3 + 6 * tail / volume
    assert bulk == pytest.approx(8 * abs(energy) / volume, rel=1e-5)
    assert abs(6 * tail / volume) > 1e-4 * bulk  # the integral matters


@pytest.mark.parametrize("pressure", [0.0, 6.7])
def test_constants_are_slopes_of_the_stress_with_relaxed_ions(pressure):
    potential = stillinger_weber(reach=2.1)
    settings = ElasticSettings(pressure_GPa=pressure, frames=3)
    (found,) = elastic(potential, lonsdaleite(), settings)
    own = found.constants
    assert found.status == "ok", found.reason
    assert own.measure == ("cauchy" if pressure else "energy")
    assert close(own.stress_GPa, -pressure * torch.eye(3).double(), 2e-3)
    checked = finite_strain(potential, found.structures, amplitudes=SMALL, force_tolerance=1e-7)
    assert checked.residual_GPa < 1e-4
    assert close(checked.tensor_GPa, own.tensor_GPa, 0.02)  # 2e-3 GPa of stress, and h⁴
    assert float((own.tensor_GPa - own.clamped_GPa).abs().max()) > 1.0  # ions do relax
    clamped = finite_strain(potential, found.structures, ions="clamped", amplitudes=SMALL)
    assert close(clamped.tensor_GPa, own.clamped_GPa, 0.02)


def test_default_strains_agree_to_a_fifth_of_a_percent():
    potential = stillinger_weber()
    (found,) = elastic(potential, lonsdaleite(), ElasticSettings(frames=3))
    checked = finite_strain(potential, found.structures)
    own = found.constants.tensor_GPa
    large = own.abs() > 1.0
    assert int(large.sum()) == 12
    assert float((checked.tensor_GPa / own - 1.0)[large].abs().max()) < 2e-3
    assert float(checked.tensor_GPa[~large].abs().max()) < 2e-3 * float(own.max())


@pytest.mark.parametrize("direction", [(1.0, 0, 0), (0, 0.6, 0.8), (0.48, 0.6, 0.64)])
def test_long_waves_have_the_speeds_of_christoffel(direction):
    """A third route: rho omega² of the acoustic branches at small k is eig(C n n) k²."""
    potential = stillinger_weber(reach=2.1)
    (found,) = elastic(potential, lonsdaleite(), ElasticSettings(frames=3))
    one, n = found.structures, torch.tensor(direction, dtype=torch.float64)
    wave = 2e-3  # 1/Å; the dispersion is of second order in it
    q = one.cell[0] @ n * wave / (2.0 * torch.pi)
    masses = torch.full((4,), 28.0855, dtype=torch.float64)
    (matrix,) = dynamical_matrices(potential, one, q[None], masses)
    density = float(masses.sum() / one.volume)
    waves = torch.linalg.eigvalsh(matrix)[:3] * density / wave**2 * GPA_PER_EV_PER_A3
    index = torch.tensor([[0, 5, 4], [5, 1, 3], [4, 3, 2]])
    full = found.constants.tensor_GPa[index[:, :, None, None], index]
    christoffel = torch.linalg.eigvalsh(torch.einsum("abcd,b,d->ac", full, n, n))
    assert close(waves, christoffel, 0.05)


def test_an_average_of_a_potential_that_turns_is_that_of_all_its_frames():
    """The mean over frames, projected, is the average over frames times the group."""
    potential = stillinger_weber(turning=0.05, reach=2.1)
    settings = ElasticSettings()
    (found,) = elastic(potential, lonsdaleite(), settings)
    assert found.status == "ok", found.reason
    group = find_group(found.structures, 1e-5)
    rule = merged(sample_rules(found.structures, group, "project", settings.frames))
    operations = torch.from_numpy(group.cartesian_rotations)
    nodes = (rule.rotations[:, None] @ operations).reshape(-1, 3, 3)
    weights = rule.weights.repeat_interleave(len(operations)) / len(operations)
    whole = Quadrature(rotations=nodes, weights=weights, degree=0)
    averaged = FixedAverage(model=potential, rule=whole)
    checked = finite_strain(averaged, found.structures, amplitudes=SMALL, force_tolerance=1e-6)
    assert close(checked.tensor_GPa, found.constants.tensor_GPa, 0.02)
    assert found.constants.symmetry_violation_GPa > 0.1
    assert float(found.constants.error_GPa.max()) > 0.1


def test_the_tensor_has_the_symmetry_of_the_crystal_exactly():
    potential = stillinger_weber(turning=0.05)
    (found,) = elastic(potential, silicon())
    tensor = found.constants.tensor_GPa
    C11, C12, C44 = cubic(tensor)
    expected = torch.zeros(6, 6).double()
    expected[:3, :3] = C12
    expected += torch.diag(torch.tensor([C11 - C12] * 3 + [C44] * 3, dtype=torch.float64))
    assert close(tensor, expected, EXACT)
    assert torch.equal(tensor, tensor.mT)


def test_errors_cover_what_more_frames_find():
    potential = stillinger_weber(turning=0.05)
    (few,) = elastic(potential, silicon(), ElasticSettings(frames=12))
    (many,) = elastic(potential, silicon(), ElasticSettings(frames=100))
    own, more = few.constants, many.constants
    off = (own.tensor_GPa - more.tensor_GPa).abs()
    # Twelve frames: one entry in 500 is farther off, Student's t with eleven degrees of freedom.
    assert bool((off <= 4.0 * own.error_GPa + 1e-6).all())
    assert float(own.error_GPa[0, 0]) > 1.5 * float(more.error_GPa[0, 0])


def test_rotations_of_a_rule_leave_less_error():
    potential = stillinger_weber(turning=0.05)
    single, rule = (
        elastic(potential, silicon(), ElasticSettings(average=level))[0].constants
        for level in ("project", "standard")
    )
    assert float(rule.error_GPa.max()) < 1e-6  # the turning term has degree 4
    assert float(single.error_GPa.max()) > 1e-2


def test_axes_are_those_of_the_input_and_cells_do_not_matter():
    potential = stillinger_weber(reach=2.1)
    cell = lonsdaleite()
    turn = haar(1, 3)[0]
    batch = concatenate([cell, rotate(cell, turn), repeat(cell, (1, 1, 2))])
    plain, turned, large = (
        one.constants.tensor_GPa for one in elastic(potential, batch, ElasticSettings(frames=3))
    )
    index = torch.tensor([[0, 5, 4], [5, 1, 3], [4, 3, 2]])
    full = plain[index[:, :, None, None], index]
    expected = voigt_matrix(torch.einsum("pqrs,ap,bq,cr,ds->abcd", full, turn, turn, turn, turn))
    assert close(turned, expected, 0.01)  # where relaxations stop
    assert close(large, plain, 0.01)


def test_projections_are_means_over_all_operations():
    """On a supercell, so that pure translations count."""
    one = repeat(lonsdaleite(), (1, 1, 2))
    group = find_group(one, 1e-3)
    generator = torch.Generator().manual_seed(0)
    internal = torch.randn(8, 3, 3, 3, generator=generator).double()
    internal = internal + internal.mT
    second = torch.randn(3, 3, 3, 3, generator=generator).double()
    projected, fourth = project_internal_strain(internal, group), project_rank_four(second, group)
    assert close(project_internal_strain(projected, group), projected, 1e-12)
    assert close(project_rank_four(fourth, group), fourth, 1e-12)
    for Q, p in zip(
        torch.from_numpy(group.cartesian_rotations),
        torch.from_numpy(group.permutations),
        strict=True,
    ):
        image = torch.einsum("ipqr,pa,qb,rc->iabc", projected[p], Q, Q, Q)
        assert close(image, projected, 1e-12)
        assert close(torch.einsum("pqrs,pa,qb,rc,sd->abcd", fourth, Q, Q, Q, Q), fourth, 1e-12)
    exact = strain_derivatives(stillinger_weber(), one)
    assert close(project_internal_strain(exact.internal_strain, group), exact.internal_strain, 1e-9)
    assert close(project_rank_four(exact.strain, group), exact.strain, 1e-9)


def test_newton_steps_find_the_minimum_of_the_mean():
    potential = stillinger_weber(turning=0.1, reach=2.1)
    (found,) = elastic(potential, lonsdaleite())
    assert found.status == "ok", found.reason
    group = find_group(found.structures, 1e-5)
    primitive = primitive_cell(found.structures, group)
    frames = evaluate_frames(
        potential,
        primitive.structures,
        group,
        sample_rules(primitive.structures, group, "project", 6),
    )
    assert frames.max_force < 1e-4
    assert float(frames.stress.abs().max()) * GPA_PER_EV_PER_A3 < 0.01


def test_under_a_given_stress_the_cell_stays():
    squeezed = strain(silicon(), -0.02 * torch.eye(3).double()[None])
    (found,) = elastic(stillinger_weber(), squeezed, ElasticSettings(relax=False, frames=3))
    assert found.status == "ok"
    assert found.constants.measure == "cauchy"
    assert close(found.structures.cell, squeezed.cell, 1e-12)
    assert float(found.constants.stress_GPa[0, 0]) < -5.0


def test_a_lattice_that_shears_apart_is_not_born_stable():
    """bcc with pair forces has C11 < C12."""
    bcc = crystal(3.7 * np.array(BCC), [(0, 0, 0)], [18])
    (found,) = elastic(lennard_jones_edges(12.0, sigma=3.0), bcc, ElasticSettings(frames=3))
    own = found.constants
    C11, C12, _ = cubic(own.tensor_GPa)
    assert C11 < C12
    assert own.born_stable is False
    assert np.isnan(own.moduli.shear_GPa)
    assert own.moduli.bulk_GPa == pytest.approx((C11 + 2 * C12) / 3, rel=1e-9)


def test_ions_at_a_saddle_have_clamped_constants_only():
    """Beyond the inflection of all bonds."""
    wide = crystal(1.6 * np.eye(3), ((0, 0, 0), (0.5, 0.5, 0.5)), [18, 10])
    settings = ElasticSettings(relax=False, frames=3)
    (found,) = elastic(lennard_jones_edges(3.0), wide, settings)
    assert (found.status, found.code) == ("not_converged", "UnstableMode")
    assert found.constants.ions == "clamped"
    assert torch.equal(found.constants.tensor_GPa, found.constants.clamped_GPa)
    assert found.constants.softest_mode < 0.0


def test_frames_are_added_until_they_tell_whether_ions_are_at_a_minimum():
    """Stretched silicon, whose optical mode goes to zero, with bonds that prefer a direction."""
    settings = ElasticSettings(relax=False, frames=3)
    stretched = (crystal(a * np.array(FCC), ((0, 0, 0), (0.25,) * 3), [14] * 2) for a in (6.8, 7.1))
    told, open_ = elastic(stillinger_weber(turning=0.2), concatenate(list(stretched)), settings)
    assert (told.status, told.constants.n_frames, told.constants.ions) == ("ok", 6, "relaxed")
    assert (open_.status, open_.code) == ("not_converged", "UndecidedMode")
    assert (open_.constants.n_frames, open_.constants.ions) == (12, "clamped")
    assert "take more frames" in open_.reason


def test_a_bad_structure_stops_no_other():
    fine, slab = silicon(), ten_structures()["slab"]
    close_atoms = replace(fine, positions=fine.positions * 0.0)
    batch = concatenate([slab, fine, close_atoms])
    first, second, third = coset.elastic(stillinger_weber(), batch)
    assert (first.status, first.code) == ("rejected", "CellNotPeriodic")
    assert second.status == "ok"
    assert (third.status, third.code) == ("rejected", "AtomsOverlap")


def test_stopping_keeps_what_is_done():
    batch = concatenate([silicon(), silicon()])
    told = []
    first, second = elastic(
        stillinger_weber(), batch,
        observer=lambda n_done, note: n_done == 1,
        on_result=lambda number, result: told.append((number, result)),
    )  # fmt: skip
    assert told == [(0, first), (1, second)]
    assert first.status == "ok"
    assert (second.status, second.code) == ("not_converged", "Interrupted")


def test_moduli_of_an_isotropic_solid():
    bulk, shear = 100.0, 40.0
    tensor = torch.zeros(6, 6).double()
    tensor[:3, :3] = bulk - 2.0 * shear / 3.0
    tensor += torch.diag(torch.tensor([2.0 * shear] * 3 + [shear] * 3, dtype=torch.float64))
    found = moduli(tensor)
    for value in (found.bulk_voigt_GPa, found.bulk_reuss_GPa, found.bulk_GPa):
        assert value == pytest.approx(bulk, rel=1e-12)
    for value in (found.shear_voigt_GPa, found.shear_reuss_GPa, found.shear_GPa):
        assert value == pytest.approx(shear, rel=1e-12)
    assert found.anisotropy == pytest.approx(0.0, abs=1e-12)
    # Uniaxial stress along x: E = 1/S11, nu = -S12/S11.
    compliance = torch.linalg.inv(tensor)
    assert found.young_GPa == pytest.approx(1.0 / float(compliance[0, 0]), rel=1e-12)
    ratio = -float(compliance[0, 1] / compliance[0, 0])
    assert found.poisson == pytest.approx(ratio, rel=1e-12)


def test_moduli_of_an_anisotropic_solid_are_bounds():
    (found,) = elastic(stillinger_weber(), silicon(), ElasticSettings(frames=3))
    own = found.constants.moduli
    C11, C12, C44 = cubic(found.constants.tensor_GPa)
    assert own.shear_voigt_GPa == pytest.approx((C11 - C12 + 3 * C44) / 5, rel=1e-12)
    reuss = 5 * (C11 - C12) * C44 / (4 * C44 + 3 * (C11 - C12))
    assert own.shear_reuss_GPa == pytest.approx(reuss, rel=1e-12)
    assert own.anisotropy > 0.0


def test_young_modulus_along_axes_and_diagonals():
    """Cubic: 1/E = S11 - 2 (S11 - S12 - S44/2) (l²m² + m²n² + n²l²)."""
    tensor = torch.zeros(6, 6).double()
    tensor[:3, :3] = 60.0
    tensor += torch.diag(torch.tensor([100.0] * 3 + [80.0] * 3).double())
    S11, S12 = torch.linalg.inv(tensor)[0, :2]
    n = torch.tensor([[1.0, 0, 0], [1.0, 1, 0], [1.0, 1, 1]]).double()
    n = n / n.norm(dim=1, keepdim=True)
    shape = torch.tensor([0.0, 1 / 4, 1 / 3], dtype=torch.float64)
    expected = 1.0 / (S11 - 2.0 * (S11 - S12 - 0.5 / 80.0) * shape)
    assert close(young_modulus(tensor, n), expected, EXACT)


@pytest.mark.parametrize(
    "changes",
    [{"ions": "frozen"}, {"average": "none"}, {"frames": 2}, {"relax": False, "pressure_GPa": 1.0}],
)
def test_settings_without_meaning(changes):
    with pytest.raises(ConfigError):
        ElasticSettings(**changes)


def test_an_unforeseen_error_ends_its_own_crystal_only(monkeypatch):
    fail_once(monkeypatch, tensor, "project_rank_four", ValueError("not as expected"))
    batch = concatenate([silicon(), silicon()])
    first, second = elastic(stillinger_weber(), batch, ElasticSettings(frames=3))
    assert (first.status, first.code) == ("failed", "InternalError")
    assert second.status == "ok"
