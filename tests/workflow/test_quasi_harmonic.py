"""Thermal expansion: the minimum of the free energy obeys Maxwell's relation."""

from dataclasses import replace

import numpy as np
import pytest
from analytic_models import silicon, stillinger_weber

from coset.errors import StructureError
from coset.workflows import quasi_harmonic as module
from coset.workflows.eos import EosSettings, eos
from coset.workflows.phonons.results import PhononSettings
from coset.workflows.phonons.run import phonons
from coset.workflows.quasi_harmonic import QuasiHarmonicSettings, quasi_harmonic

SUPERCELL, MESH = (2, 2, 2), (9, 9, 9)


@pytest.fixture(scope="module")
def curve():
    (found,) = eos(stillinger_weber(), silicon(), EosSettings(range=0.03, points=13))
    assert found.status == "ok"
    return found


def test_expansion_is_the_change_of_entropy_with_volume_over_the_bulk_modulus(curve):
    settings = QuasiHarmonicSettings(highest=400.0, step=50.0, supercell=SUPERCELL, mesh=MESH)
    found = quasi_harmonic(stillinger_weber(), replace(curve, points=curve.points[::2]), settings)
    assert found.status == "ok", found.reason
    k = int(np.argmin(np.abs(found.temperature - 300.0)))
    entropies, volumes = [], []
    for place in (4, 8):
        one = curve.points[place].structures
        asked = PhononSettings(
            relax=False, frames=1, supercell=SUPERCELL, mesh=MESH, temperatures=(300.0,)
        )
        (at,) = phonons(stillinger_weber(), one, asked)
        entropies.append(at.result.thermal.entropy[0])
        volumes.append(float(at.result.primitive.volume[0]))
    slope = (entropies[1] - entropies[0]) / (volumes[1] - volumes[0])
    expected = slope / (found.bulk_modulus_GPa[k] / 160.2176634)
    assert found.expansion[k] == pytest.approx(expected, rel=0.03)  # of the differences, 1 % volume
    assert 0.0 < found.expansion[k] < 2e-5
    assert np.all(np.diff(found.gibbs) < 0.0)
    assert np.all(np.diff(found.heat_capacity[1:]) > 0.0)


def test_too_narrow_a_curve_is_told(curve):
    few = replace(curve, points=curve.points[8:])
    settings = replace(HOT, highest=200.0)
    found = quasi_harmonic(stillinger_weber(), few, settings)
    assert found.status == "failed"
    assert "widen --range" in found.reason
    nothing = quasi_harmonic(stillinger_weber(), replace(curve, points=()), settings)
    assert "no good volumes" in nothing.reason


HOT = QuasiHarmonicSettings(highest=1500.0, step=100.0, supercell=SUPERCELL, mesh=MESH, frames=1)


@pytest.fixture(scope="module")
def short_curve(curve):
    return replace(curve, points=curve.points[:8])


def test_temperatures_within_the_volumes_are_kept(curve, short_curve):
    whole = quasi_harmonic(stillinger_weber(), curve, HOT)
    part = quasi_harmonic(stillinger_weber(), short_curve, HOT)
    assert (whole.status, whole.reason) == ("ok", "")
    assert len(whole.temperature) == 16
    kept = len(part.temperature)
    assert part.status == "ok"
    assert 3 <= kept < 16
    assert f"{100 * kept} K; widen --range" in part.reason
    assert part.volume == pytest.approx(whole.volume[:kept], rel=1e-4)
    assert part.volume.max() <= max(part.volumes) < whole.volume[kept:].max()


def test_a_temperature_without_a_fit_ends_the_table(curve, monkeypatch):
    minimized = module.minimized_free_energy

    def one_missing(*given):
        found = minimized(*given)
        names = ("temperature", "volume", "expansion", "bulk_modulus_GPa", "gibbs")
        names += ("heat_capacity",)
        return found._replace(**{name: np.delete(getattr(found, name), 5) for name in names})

    monkeypatch.setattr(module, "minimized_free_energy", one_missing)
    found = quasi_harmonic(stillinger_weber(), curve, HOT)
    assert found.status == "ok"
    assert list(found.temperature) == [0.0, 100.0, 200.0, 300.0, 400.0]
    assert "at 500 K" in found.reason


def test_no_fit_at_all_is_a_failure_with_a_reason(curve, monkeypatch):
    def impossible(*_):
        raise StructureError("no minimum", code="NoFreeEnergyFit")

    monkeypatch.setattr(module, "minimized_free_energy", impossible)
    found = quasi_harmonic(stillinger_weber(), curve, HOT)
    assert (found.status, found.reason) == ("failed", "no minimum")


def test_a_stop_is_told(curve):
    found = quasi_harmonic(stillinger_weber(), curve, HOT, observer=lambda *_: True)
    assert (found.status, found.reason) == ("failed", "stopped before it ended")


def test_frames_give_errors_and_the_energies_are_those_of_the_curve(monkeypatch):
    """Each frame is fitted to the same E(V); what differs between them is F(V, T)."""
    potential = stillinger_weber(turning=0.02)
    (curve,) = eos(potential, silicon(), EosSettings(range=0.03, points=5, center=0.01))
    ratios = [point.volume / curve.fit.volume - 1.0 for point in curve.points]
    assert ratios[0] == pytest.approx(-0.02, abs=2e-3)
    assert ratios[-1] == pytest.approx(0.04, abs=2e-3)
    minimized, seen = module.minimized_free_energy, []

    def watched(lattices, energies, *rest):
        seen.append(list(energies))
        return minimized(lattices, energies, *rest)

    monkeypatch.setattr(module, "minimized_free_energy", watched)
    settings = replace(HOT, highest=300.0, frames=3)
    told = []
    found = quasi_harmonic(
        potential, curve, settings, observer=lambda n, note: bool(told.append(n))
    )
    assert found.status == "ok", found.reason
    own = np.array([point.energy for point in curve.points])
    assert np.abs(np.array(seen) - own).max() < 1e-12
    assert len(seen) == 3
    assert max(told) == 14
    single = quasi_harmonic(potential, curve, replace(settings, frames=1))
    assert single.errors is None
    for name in ("volume", "expansion", "bulk_modulus_GPa", "gibbs"):
        error, value = getattr(found.errors, name), getattr(found, name)
        assert error.shape == value.shape == (4,)
        assert 0.0 < error[-1] < 0.5 * abs(value[-1])
        far = abs(getattr(single, name)[-1] - value[-1])
        assert 0.0 < far < 5 * error[-1]  # of three frames one is at most 2 of these off
