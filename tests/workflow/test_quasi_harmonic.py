"""Thermal expansion: the minimum of the free energy obeys Maxwell's relation."""

from dataclasses import replace

import numpy as np
import pytest
from analytic_models import silicon, stillinger_weber

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
    settings = QuasiHarmonicSettings(highest=200.0, step=100.0, supercell=SUPERCELL, mesh=MESH)
    found = quasi_harmonic(stillinger_weber(), few, settings)
    assert found.status == "failed"
    assert "widen --range" in found.reason
    nothing = quasi_harmonic(stillinger_weber(), replace(curve, points=()), settings)
    assert "no good volumes" in nothing.reason
