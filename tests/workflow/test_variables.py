"""The energy is one function of the variables, and its gradient is exact, torque included."""

from dataclasses import replace

import pytest
import torch
from ase.spacegroup import crystal as ase_crystal
from factories import tiny_potential, triclinic

from coset.ase_interface import from_ase
from coset.symmetry.crystal import find_group, symmetrize
from coset.symmetry.projection import make_projector
from coset.workflows.variables import (
    at_rest,
    full_virial,
    gradient,
    moved,
    strain_length,
)


def random_field(reference, size, seed):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(reference.positions.shape, generator=generator, dtype=torch.float64)
    strain = torch.randn(reference.cell.shape, generator=generator, dtype=torch.float64)
    strain = 0.5 * (strain + strain.mT) * strain_length(reference)[:, None, None]
    return replace(
        at_rest(reference), atoms=size * (atoms - atoms.mean(0)), strain=0.3 * size * strain
    )


def gradient_at(potential, reference, variables, *, torque=True):
    structures = moved(reference, variables)
    found = potential(structures)
    if not torque:
        found = replace(found, torque=None)
    return gradient(reference, variables, found.forces, full_virial(structures, found))


def differences(potential, reference, variables, direction):
    """Fourth-order difference of the energy along a direction."""
    h = 1e-3

    def energy(step):
        return potential(moved(reference, variables.plus(direction, step))).energy

    return (8 * (energy(h) - energy(-h)) - (energy(2 * h) - energy(-2 * h))) / (12 * h)


@pytest.mark.parametrize("size", [0.0, 0.1])
def test_gradient_is_the_derivative_of_the_energy(size):
    potential, reference = tiny_potential(), triclinic()
    here = random_field(reference, size, 1)
    direction = random_field(reference, 0.3, 2)
    found = gradient_at(potential, reference, here).dot(direction)
    expected = differences(potential, reference, here, direction)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_away_from_the_reference_the_torque_is_part_of_it():
    """Strains that do not commute turn the crystal, which an unconstrained model sees."""
    potential, reference = tiny_potential(), triclinic()
    here, direction = random_field(reference, 0.3, 1), random_field(reference, 0.3, 2)
    expected = differences(potential, reference, here, direction)
    without = gradient_at(potential, reference, here, torque=False).dot(direction)
    assert float((without - expected).abs().max()) > 1e-6
    found = gradient_at(potential, reference, here).dot(direction)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


CRYSTALS = {
    "rutile": (["Ti", "O"], [(0, 0, 0), (0.3, 0.3, 0)], 136, [4.6, 4.6, 2.95, 90, 90, 90]),
    "quartz": (
        ["Si", "O"],
        [(0.47, 0, 2 / 3), (0.41, 0.27, 0.78)],
        152,
        [4.9, 4.9, 5.4, 90, 90, 120],
    ),
    "monoclinic": (
        ["Cu", "O"],
        [(0.1, 0.2, 0.3), (0.4, 0.1, 0.7)],
        14,
        [4.1, 5.2, 6.3, 90, 102, 90],
    ),
}


@pytest.mark.parametrize("name", CRYSTALS)
def test_projected_variables_keep_the_group_however_far_they_go(name):
    symbols, sites, number, cellpar = CRYSTALS[name]
    atoms = ase_crystal(symbols, sites, spacegroup=number, cellpar=cellpar)
    one = from_ase(atoms).to(torch.float64)
    group = find_group(one, 1e-3)
    reference = symmetrize(one, group)
    projector = make_projector([group])
    far = random_field(reference, 0.2, 3)
    symmetric = replace(far, atoms=projector.forces(far.atoms), strain=projector.stress(far.strain))
    assert find_group(moved(reference, symmetric), 1e-8).order % group.order == 0
    assert find_group(moved(reference, far), 1e-3).order < group.order
