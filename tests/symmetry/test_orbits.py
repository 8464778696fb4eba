"""Projected coset average = average over whole orbits, in the groups whose frames are awkward.

In 28 space groups the rotation to the standard setting does not lead to the axes of the rules.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import tiny_potential
from physics.test_projection import general_crystal, primitive_crystal
from tolerances import AVERAGED, close

from coset.edge_model import Quadrature
from coset.structures import deform, rotate
from coset.symmetry.average import averaged_properties
from coset.symmetry.crystal import find_group, symmetrize
from coset.symmetry.projection import make_projector
from coset.symmetry.rules import coset_rule

AWKWARD = (*range(3, 16), *range(115, 121), 149, 151, 153, 157, 159, 162, 163, 187, 188)
OTHERS = (1, 2, 19, 62, 82, 136, 152, 167, 186, 198, 205, 216)
MAX_NODES = 600
SPECIES = {22: 29, 8: 8, 13: 14}


def crystal(number):
    """In random orientation, of elements that the tiny network knows, about 12 Å³ an atom."""
    one = primitive_crystal(general_crystal(number)).structure
    numbers = torch.tensor([SPECIES[z] for z in one.atomic_numbers.tolist()])
    density = float(one.volume) / len(numbers)
    scaled = deform(one, (12.0 / density) ** (1 / 3) * torch.eye(3).double()[None])
    return replace(scaled, atomic_numbers=numbers)


@pytest.mark.parametrize("number", [*AWKWARD, *OTHERS])
def test_projected_coset_average_is_the_average_over_the_orbits(number):
    potential, one = tiny_potential(), crystal(number)
    group = find_group(one, 1e-4)
    assert group.number == number
    one = symmetrize(one, group)
    operations = torch.from_numpy(group.cartesian_rotations)
    rule = coset_rule(operations, 3)
    nodes = (rule.rotations[:, None] @ operations[None]).flatten(0, 1)
    assert len(nodes) <= MAX_NODES
    weights = (rule.weights[:, None] / len(operations)).expand(-1, len(operations)).flatten()
    orbit = Quadrature(rotations=nodes, weights=weights, degree=3)
    whole = averaged_properties(potential, one, [orbit])
    few = averaged_properties(potential, one, [rule])
    projector = make_projector([group])
    scale = max(1.0, float(whole.forces.abs().max()))
    close(few.energy / scale, whole.energy / scale, 10 * AVERAGED)
    close(projector.forces(few.forces) / scale, whole.forces / scale, AVERAGED)
    close(projector.stress(few.stress) / scale, whole.stress / scale, AVERAGED)


def test_torque_is_the_derivative_under_rotation_to_1e10():
    """By differences of eighth order, which leave 1e-11."""
    potential, one, h = tiny_potential(), crystal(14), 2e-3
    found = potential(one).torque[0]
    steps, factors = np.arange(1, 5), np.array([4 / 5, -1 / 5, 4 / 105, -1 / 280])
    for axis in range(3):
        turns = []
        for angle in np.concatenate([steps, -steps]) * h:
            generator = torch.linalg.cross(
                torch.eye(3).double()[axis].expand(3, 3), torch.eye(3).double(), dim=1
            ).T
            turns.append(torch.linalg.matrix_exp(angle * generator))
        energies = np.array([float(potential(rotate(one, R)).energy) for R in turns])
        derivative = factors @ (energies[:4] - energies[4:]) / h
        assert abs(derivative - float(found[axis])) < 1e-10
    assert float(found.abs().max()) > 1e-2
