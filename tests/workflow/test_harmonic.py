"""Frequencies of a given supercell: phonopy, closed forms, two routes, two cells of one crystal."""

import numpy as np
import phonopy
import pytest
import torch
from analytic_models import lonsdaleite, silicon, stillinger_weber
from phonopy.structure.atoms import PhonopyAtoms

from coset.errors import StructureError
from coset.structures import make_structure
from coset.workflows.harmonic import HarmonicSettings, harmonic_primitive, harmonic_supercell
from tests.protocols.reference_folder import PRIMITIVE, conventional

Q = np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.13, 0.31, 0.22]])
EXACT = HarmonicSettings()
DISPLACED = HarmonicSettings(route="displacements", amplitude=0.002)


@pytest.fixture(scope="module")
def potential():
    return stillinger_weber()


@pytest.fixture(scope="module")
def exact(potential):
    return harmonic_supercell(potential, conventional(), EXACT, (2, 2, 2))


def test_modes_of_a_conventional_cell_are_those_that_phonopy_finds(potential, exact):
    """Both leave the anharmonic error of displacements of 0.002 Å."""
    one = exact.structures
    atoms = PhonopyAtoms(
        numbers=one.atomic_numbers.tolist(),
        cell=one.cell[0].numpy(),
        positions=one.positions.numpy(),
    )
    phonon = phonopy.Phonopy(atoms, supercell_matrix=[2, 2, 2], primitive_matrix=PRIMITIVE)
    phonon.generate_displacements(distance=0.002, is_plusminus=True)
    forces = []
    for cell in phonon.supercells_with_displacements:
        moved = make_structure(
            torch.from_numpy(cell.positions),
            torch.tensor(cell.numbers),
            cell=torch.from_numpy(cell.cell),
            pbc=(True,) * 3,
        )
        forces.append(potential(moved).forces.detach().numpy())
    phonon.forces = forces
    phonon.produce_force_constants()
    expected = phonon.run_qpoints(Q).frequencies
    found = exact.frequencies_THz(Q @ np.linalg.inv(PRIMITIVE))
    assert found.shape == (3, 6)
    assert np.abs(found - expected)[1:].max() < 1e-4
    assert np.abs(found[0, :3]).max() < 1e-4


def test_displacements_give_the_same(potential, exact):
    displaced = harmonic_supercell(potential, conventional(), DISPLACED, (2, 2, 2))
    q = Q[1:] @ np.linalg.inv(PRIMITIVE)
    assert np.abs(displaced.frequencies_THz(q) - exact.frequencies_THz(q)).max() < 1e-4
    assert np.abs(displaced.frequencies_THz(np.zeros((1, 3)))[0, :3]).max() < 1e-4


def test_thermal_properties_do_not_know_which_cell_was_given(potential):
    """The heat capacity per atom, and its classical limit."""
    small, large = (
        harmonic_primitive(potential, one, EXACT, 6.0).thermal(0.4, (300.0, 1e5))
        for one in (silicon(), conventional())
    )
    assert np.allclose(small.heat_capacity, large.heat_capacity, rtol=0, atol=1e-9)
    assert abs(small.heat_capacity[1] / (3 * 2 * 8.617333262e-5) - 1.0) < 0.01  # without Gamma
    assert small.imaginary_share == 0.0


def test_a_supercell_that_breaks_the_symmetry_is_refused(potential):
    with pytest.raises(StructureError, match="breaks the symmetry"):
        harmonic_supercell(potential, conventional(), EXACT, (2, 2, 3))


def test_a_cell_that_is_primitive_already(potential):
    found = harmonic_supercell(potential, lonsdaleite(), EXACT, (2, 2, 1))
    assert len(found.atoms) == 4
    assert found.frequencies_THz(np.array([[0.1, 0.0, 0.2]])).shape == (1, 12)
