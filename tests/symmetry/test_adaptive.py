"""The adaptive choice of a rule: smallest that keeps the tolerance, confirmed by frames."""

import pytest
import torch
from factories import prototype, tiny_potential

from coset.symmetry.adaptive import adaptive_rule
from coset.symmetry.crystal import find_group, symmetrize


@pytest.fixture(scope="module")
def case():
    one = prototype("hcp", 2.6)
    group = find_group(one, 1e-5)
    return symmetrize(one, group), torch.from_numpy(group.cartesian_rotations)


def test_tighter_tolerances_take_larger_rules_and_are_met(case):
    one, operations = case
    potential = tiny_potential()
    loose = adaptive_rule(potential, one, operations, 1e3)
    assert len(loose.rule.weights) == 1
    assert loose.met
    n_atoms = len(one.atomic_numbers)
    middle = adaptive_rule(potential, one, operations, 0.3 * loose.found / n_atoms)
    assert middle.found <= 0.3 * loose.found or not middle.met
    assert len(middle.rule.weights) > 1
    best = adaptive_rule(potential, one, operations, 1e-15)
    assert not best.met
    assert best.rule.degree >= 9
    assert best.found < loose.found
