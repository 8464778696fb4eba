"""Stability of symmetric minima: curvature along symmetry-breaking modes, errors, verdicts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import molecule, prototype, rattled, tiny_potential
from lennard_jones import LennardJones

from coset.edge_model import IDENTITY
from coset.errors import ConfigError
from coset.structures import concatenate, rotate
from coset.symmetry.average import averaged_properties, translated
from coset.symmetry.crystal import find_group, symmetrize
from coset.symmetry.primitive import primitive_cell
from coset.symmetry.projection import make_projector
from coset.symmetry.rules import haar_offsets
from coset.workflows.examination import NOT_CHECKED
from coset.workflows.relax import relax
from coset.workflows.relaxation import RelaxSettings
from coset.workflows.stability import N_FRAMES, SEED, stability, verdict_of


def symmetric(name, lattice_constant, number=29):
    one = prototype(name, lattice_constant, number)
    group = find_group(one, 1e-5)
    return symmetrize(one, group), group


def averaged_energy(potential, one, group):
    """Mean over the frames and the group: rotated copies of a displaced crystal."""
    frames = [translated(IDENTITY, V) for V in haar_offsets(N_FRAMES, SEED)]
    copies = [rotate(one, torch.from_numpy(Q)) for Q in group.cartesian_rotations]
    batch = concatenate([copy for copy in copies for _ in frames])
    return averaged_properties(potential, batch, frames * len(copies)).energy.mean()


@pytest.mark.parametrize(("name", "a"), [("diamond", 5.4), ("hcp", 2.6)])
def test_curvature_is_the_second_derivative_along_a_mode_that_breaks_the_group(name, a):
    potential = tiny_potential()
    one, group = symmetric(name, a)
    found = stability(potential, one, group, IDENTITY)
    mode = torch.from_numpy(found.mode)
    projector = make_projector([group])
    assert float(projector.forces(mode).abs().max()) < 1e-10
    assert float(mode.sum(0).abs().max()) < 1e-10
    assert float(mode.norm()) == pytest.approx(1.0, abs=1e-12)
    h = 7e-4
    at = [
        averaged_energy(potential, replace(one, positions=one.positions + k * h * mode), group)
        for k in (-2, -1, 0, 1, 2)
    ]
    second = (-at[0] + 16 * at[1] - 30 * at[2] + 16 * at[3] - at[4]) / (12 * h * h)
    assert float(second) == pytest.approx(found.curvature, abs=1e-5)
    assert found.error > 0


def test_nothing_can_break_a_crystal_of_one_atom():
    atom = primitive_cell(*symmetric("fcc", 3.6))
    found = stability(tiny_potential(), atom.structures, atom.group, IDENTITY)
    assert (found.verdict, found.mode) == ("stable", None)


def test_turning_a_molecule_breaks_nothing():
    """Of nine displacements of three atoms six are rigid, two keep the group, one is left."""
    one = molecule([(0, 0, 0), (0.76, 0.59, 0), (-0.76, 0.59, 0)], [8, 1, 1])
    group = find_group(one, 1e-3)
    exact = symmetrize(one, group)
    found = stability(tiny_potential(), exact, group, IDENTITY)
    mode, arms = torch.from_numpy(found.mode), exact.positions - exact.positions.mean(0)
    assert float(torch.linalg.cross(arms, mode).sum(0).abs().max()) < 1e-10
    assert abs(found.curvature) > 1e-2  # a rigid turn would have almost none


@pytest.mark.parametrize(
    ("curvature", "error", "verdict"),
    [
        (1.0, 0.4, "stable"),
        (1.0, 0.6, "undecided"),
        (-1.0, 0.6, "undecided"),
        (-1, 0.4, "unstable"),
    ],
)
def test_verdicts(curvature, error, verdict):
    assert verdict_of(curvature, error) == verdict


def test_relax_reports_it_and_says_when_it_cannot():
    one = prototype("diamond", 5.4, 14)
    settings = RelaxSettings(check_stability=True, cell="fixed")
    (found,) = relax(tiny_potential(), one, settings)
    assert found.status == "converged"
    assert found.stability.verdict in ("stable", "unstable", "undecided")
    assert np.isfinite(found.stability.curvature)
    (other,) = relax(LennardJones(), one, settings)
    assert other.stability is None
    assert NOT_CHECKED in other.warnings
    with pytest.raises(ConfigError, match="check_stability"):
        RelaxSettings(check_stability=True, symmetry="free")


def test_averaged_relaxations_tell_their_rotational_error():
    one = rattled(prototype("diamond", 5.4, 14), 1e-4)
    settings = RelaxSettings(average="standard", max_steps=2)
    (found,) = relax(tiny_potential(), one, settings)
    error = found.certificate.rotational_error
    assert 0 < error.energy < 1e-1
    assert error.stress_GPa > 0
    (plain,) = relax(tiny_potential(), one, replace(settings, average=None))
    assert plain.certificate.rotational_error is None
    (tight,) = relax(tiny_potential(), one, replace(settings, average="tight"))
    assert tight.certificate.rotational_error.energy < error.energy
