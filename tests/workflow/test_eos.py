"""Equations of state: fits, consistency with elastic constants, and what cannot be fitted."""

import numpy as np
import pytest
import torch
from analytic_models import lennard_jones_edges, lonsdaleite, silicon, stillinger_weber
from factories import FCC, crystal

import coset
from coset.errors import ConfigError
from coset.structures import concatenate, repeat, strain
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.elasticity.run import ElasticSettings, elastic
from coset.workflows.eos import EosSettings, eos, eos_structures
from coset.workflows.eos_fit import birch_murnaghan, fit_eos, vinet
from tests.conftest import ten_structures

FORMS = {"birch": birch_murnaghan, "vinet": vinet}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("volume", "energy", "stiffness", "derivative"),
    [(40.0, -10.8, 0.6, 4.2), (1600.0, -3e4, 0.02, 8.0), (5.6, 0.0, 2.8, 3.3)],
)
def test_fits_recover_what_made_the_points(form, volume, energy, stiffness, derivative):
    volumes = torch.linspace(0.92, 1.05, 9, dtype=torch.float64) * volume
    energies = FORMS[form](volumes.numpy(), volume, energy, stiffness, derivative)
    found = fit_eos(volumes, torch.from_numpy(energies), form)
    assert found.volume == pytest.approx(volume, rel=1e-7)
    assert found.energy == pytest.approx(energy, abs=1e-9)
    assert found.bulk_modulus_GPa == pytest.approx(stiffness * GPA_PER_EV_PER_A3, rel=1e-5)
    assert found.bulk_modulus_derivative == pytest.approx(derivative, rel=1e-4)
    assert found.rms < 1e-9 * max(1.0, abs(energy))
    assert np.allclose(found.energies(volumes.numpy()), energies, rtol=0, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_the_derivatives_of_the_forms_are_their_parameters(form):
    """B = V d²E/dV² and B' = dB/dp at V0, by differences."""
    volume, stiffness, derivative, h = 40.0, 0.6, 4.2, 0.02
    v = volume + h * np.arange(-3, 4)
    energies = FORMS[form](v, volume, 0.0, stiffness, derivative)
    polynomial = np.polynomial.Polynomial.fit(v, energies, 6)
    bulk = [x * polynomial.deriv(2)(x) for x in (volume - h, volume, volume + h)]
    pressure = [-polynomial.deriv(1)(x) for x in (volume - h, volume + h)]
    assert bulk[1] == pytest.approx(stiffness, rel=1e-5)
    slope = (bulk[2] - bulk[0]) / (pressure[1] - pressure[0])
    assert slope == pytest.approx(derivative, rel=1e-3)


def test_points_without_a_minimum_have_no_fit():
    volumes = torch.linspace(30.0, 40.0, 7, dtype=torch.float64)
    assert fit_eos(volumes, -((volumes - 35.0) ** 2), "birch") is None


def test_errors_of_a_fit_cover_noise():
    volumes = torch.linspace(38.0, 42.0, 15, dtype=torch.float64)
    clean = torch.from_numpy(birch_murnaghan(volumes.numpy(), 40.0, -10.0, 0.6, 4.0))
    generator = torch.Generator().manual_seed(1)
    noise = 1e-5 * torch.randn(15, generator=generator, dtype=torch.float64)
    found = fit_eos(volumes, clean + noise, "birch")
    off = abs(found.bulk_modulus_GPa - 0.6 * GPA_PER_EV_PER_A3)
    assert found.bulk_modulus_error_GPa > 1e-3
    assert off < 4.0 * found.bulk_modulus_error_GPa


def test_volumes_are_scaled_alike():
    cells = eos_structures(lonsdaleite(), 0.06, 5)
    ratios = cells.volume / lonsdaleite().volume
    expected = torch.tensor([0.94, 0.97, 1.0, 1.03, 1.06], dtype=torch.float64)
    assert torch.allclose(ratios, expected, rtol=0, atol=1e-12)
    shapes = cells.cell / cells.volume[:, None, None] ** (1 / 3)
    assert torch.allclose(shapes, shapes[:1].expand(5, -1, -1), rtol=0, atol=1e-12)


def test_bulk_modulus_of_fixed_and_relaxed_shape_are_those_of_voigt_and_reuss():
    """To half a percent: within ±0.5 % of volume higher derivatives still show."""
    potential, one = stillinger_weber(reach=2.1), lonsdaleite()
    (constants,) = elastic(potential, one, ElasticSettings(frames=3))
    own = constants.constants.moduli
    fixed, relaxed = (
        eos(potential, one, EosSettings(range=0.005, points=9, cell=cell))[0].fit
        for cell in ("fixed", "shape")
    )
    assert fixed.bulk_modulus_GPa == pytest.approx(own.bulk_voigt_GPa, rel=5e-3)
    assert relaxed.bulk_modulus_GPa == pytest.approx(own.bulk_reuss_GPa, rel=5e-3)
    gap = own.bulk_voigt_GPa - own.bulk_reuss_GPa
    assert gap > 0.05
    assert fixed.bulk_modulus_GPa - relaxed.bulk_modulus_GPa == pytest.approx(gap, abs=0.01)


def test_many_crystals_in_one_batch():
    """A supercell has the same numbers per atom, and a slab is refused."""
    batch = concatenate([silicon(), ten_structures()["slab"], repeat(silicon(), (2, 1, 1))])
    first, slab, large = coset.eos(stillinger_weber(), batch)
    assert (slab.status, slab.code) == ("rejected", "CellNotPeriodic")
    assert (first.status, large.status) == ("ok", "ok")
    assert first.space_group == 227
    assert first.fit.volume == pytest.approx(large.fit.volume / 2, rel=1e-6)
    assert first.fit.bulk_modulus_GPa == pytest.approx(large.fit.bulk_modulus_GPa, rel=1e-5)
    assert first.fit.bulk_modulus_GPa == pytest.approx(101.418, abs=0.2)  # ±6 % of volume
    assert abs(first.fit.bulk_modulus_GPa - first.vinet.bulk_modulus_GPa) < 0.1
    assert first.fit.energy == pytest.approx(-4.0 * 2.1682, abs=1e-4)
    volumes, energies = first.curve
    assert len(volumes) == 11
    assert int(energies.argmin()) == 5
    nearest = [float(point.structures.volume) for point in first.points]
    assert nearest == pytest.approx(volumes.tolist(), rel=1e-10)  # the volume stays


def test_bulk_modulus_of_two_powers():
    """E = a/V^4 - b/V^2 of two shells has B = 8 |E0|/V0 and B' = 8."""
    nearest = 3.0 * 2 ** (1 / 6)
    fcc = crystal(2**-0.5 * 2.0 * nearest * np.array(FCC), [(0, 0, 0)], [18])
    potential = lennard_jones_edges(2.5**0.5 * nearest, sigma=3.0)
    (found,) = eos(potential, fcc, EosSettings(range=0.01, points=9))
    fit = found.fit
    expected = 8.0 * abs(fit.energy) / fit.volume * GPA_PER_EV_PER_A3
    assert fit.bulk_modulus_GPa == pytest.approx(expected, rel=5e-4)
    assert fit.bulk_modulus_derivative == pytest.approx(8.0, abs=0.05)


def test_a_minimum_outside_the_volumes_is_said():
    squeezed = strain(silicon(), -0.05 * torch.eye(3).double()[None])
    (found,) = eos(stillinger_weber(), squeezed, EosSettings(relax=False))
    assert (found.status, found.code) == ("not_converged", "NoMinimum")
    assert found.fit is None
    assert len(found.points) == 11


def test_stopping_is_no_answer():
    (found,) = eos(stillinger_weber(), silicon(), observer=lambda now: True)
    assert (found.status, found.code) == ("not_converged", "Interrupted")
    settings = EosSettings(relax=False)
    potential = stillinger_weber(reach=2.1)
    (found,) = eos(potential, lonsdaleite(), settings, observer=lambda now: True)
    assert (found.status, found.code) == ("not_converged", "Interrupted")


@pytest.mark.parametrize(
    "changes", [{"range": 0.0}, {"range": 0.9}, {"points": 4}, {"cell": "full"}]
)
def test_settings_without_meaning(changes):
    with pytest.raises(ConfigError):
        EosSettings(**changes)
