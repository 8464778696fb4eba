from dataclasses import fields

import numpy as np
import pytest
import torch
from factories import structures, tiny_checkpoint, tiny_potential
from lennard_jones import LennardJones
from scipy.spatial.transform import Rotation
from tolerances import AVERAGED, close

from coset.edge_model import Quadrature
from coset.errors import StructureError
from coset.loading import LoadSettings, potential_of
from coset.structures import Properties, concatenate, deform, rotate, select
from coset.symmetry.average import average_of_copies, averaged_properties, stacked

BATCH = concatenate([s for s in structures().values() if len(s) == 1])


def rule(nodes, seed):
    """Random nodes, half of them improper, with random weights."""
    rotations = Rotation.random(nodes, rng=np.random.default_rng(seed)).as_matrix()
    rotations[1::2] *= -1.0
    weights = np.random.default_rng(seed).uniform(0.5, 1.5, nodes)
    return Quadrature(
        rotations=torch.from_numpy(rotations),
        weights=torch.from_numpy(weights / weights.sum()),
        degree=0,
    )


RULES = [rule(1 + k % 4, k) for k in range(len(BATCH))]


def same(one: Properties, two: Properties):
    for field in fields(Properties):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None:
            close(torch.nan_to_num(a), torch.nan_to_num(b), AVERAGED)


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_rotated_edge_vectors_and_rotated_copies_agree(forces):
    settings = LoadSettings(dtype="float64", forces=forces)
    potential = potential_of(tiny_checkpoint(), settings)
    fast = averaged_properties(potential, BATCH, RULES)
    for size in (1, 2, 3, 4):
        systems = torch.tensor([k for k, r in enumerate(RULES) if len(r.weights) == size])
        own = [RULES[k] for k in systems.tolist()]
        slow = average_of_copies(potential, select(BATCH, systems), stacked(own))
        same(averaged_properties(potential, select(BATCH, systems), own), slow)
        close(fast.energy[systems], slow.energy, AVERAGED)


def test_systems_keep_their_places():
    potential = tiny_potential()
    together = averaged_properties(potential, BATCH, RULES)
    first = 0
    for k in range(len(BATCH)):
        one = select(BATCH, torch.tensor([k]))
        alone = averaged_properties(potential, one, [RULES[k]])
        rows = slice(first, first + len(one.atomic_numbers))
        close(together.energy[k : k + 1], alone.energy, AVERAGED)
        close(together.forces[rows], alone.forces, AVERAGED)
        close(together.torque[k : k + 1], alone.torque, AVERAGED)
        first = rows.stop


def test_an_invariant_potential_is_left_alone():
    crystals = concatenate([s for s in structures().values() if bool(s.pbc.all())])
    # a lattice vector as long as the cutoff, where this potential jumps, is a matter of rounding
    crystals = deform(crystals, 1.0007 * torch.eye(3).expand(len(crystals), 3, 3).double())
    plain = LennardJones()(crystals)
    averaged = average_of_copies(LennardJones(), crystals, rule(5, 3))
    scale = plain.forces.abs().max()
    close(plain.forces / scale, averaged.forces / scale, 1e-11)
    close(
        plain.stress / plain.stress.abs().max(), averaged.stress / plain.stress.abs().max(), 1e-11
    )


def test_a_rule_that_turns_with_the_crystal_gives_the_same_average():
    """Nodes R_k V^T for the crystal turned by V are the nodes R_k for the crystal."""
    potential, turn = tiny_potential(), rule(1, 99).rotations[0]
    turned_rules = [
        Quadrature(rotations=r.rotations @ turn.mT, weights=r.weights, degree=0) for r in RULES
    ]
    before = averaged_properties(potential, BATCH, RULES)
    after = averaged_properties(potential, rotate(BATCH, turn), turned_rules)
    close(before.energy, after.energy, AVERAGED)
    close(before.forces, after.forces @ turn, AVERAGED)
    close(
        torch.nan_to_num(before.stress), torch.nan_to_num(turn.mT @ after.stress @ turn), AVERAGED
    )


def test_the_gradient_of_the_average_is_its_force():
    potential = tiny_potential()
    one = structures()["triclinic"]
    rules, h = [rule(4, 7)], 1e-4
    forces = averaged_properties(potential, one, rules).forces
    for atom, axis in ((0, 0), (2, 1), (3, 2)):
        energies = []
        for step in (-2.0, -1.0, 1.0, 2.0):
            positions = one.positions.clone()
            positions[atom, axis] += step * h
            moved = select(one, torch.tensor([0]))
            moved = type(one)(
                **{f.name: getattr(moved, f.name) for f in fields(moved)} | {"positions": positions}
            )
            energies.append(averaged_properties(potential, moved, rules).energy[0])
        slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * h)
        assert abs(float(slope + forces[atom, axis])) < 1e-8


def test_faults_are_reported_by_place():
    potential = tiny_potential()
    heavy = torch.where(BATCH.system_index == 5, 92, BATCH.atomic_numbers)
    broken = type(BATCH)(
        **{f.name: getattr(BATCH, f.name) for f in fields(BATCH)} | {"atomic_numbers": heavy}
    )
    with pytest.raises(StructureError) as error:
        averaged_properties(potential, broken, RULES)
    assert error.value.structure_id == "5"
