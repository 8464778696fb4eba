"""Levels of averaging in evaluation and relaxation."""

import math
from dataclasses import replace

import pytest
import torch
from factories import structures, tiny_potential
from tolerances import AVERAGED, close

from coset.edge_model import Quadrature
from coset.errors import ConfigError
from coset.structures import concatenate, rotate
from coset.symmetry.average import averaged_properties, sample_rules
from coset.symmetry.crystal import find_group
from coset.symmetry.primitive import orientation
from coset.symmetry.rules import coset_rule
from coset.symmetry.spectrum import haar
from coset.workflows.evaluate import evaluate
from coset.workflows.relax import relax
from coset.workflows.relaxation import RelaxSettings
from coset.workflows.rotational import N_FRAMES

NAMES = ("fcc", "hcp", "diamond", "rocksalt", "perovskite", "triclinic", "left-handed", "sc")


def turned(name, seed=8):
    turn = haar(1, seed)[0]
    return rotate(structures()[name], turn)


@pytest.mark.parametrize("level", ["standard", "tight"])
@pytest.mark.parametrize("name", [*NAMES, "slab"])
def test_averages_turn_with_the_crystal(name, level):
    """Whatever the rule leaves out is the same for all proper rotations, to rounding."""
    potential, one, turn = tiny_potential(), structures()[name], haar(1, 8)[0]
    turn = turn * torch.linalg.det(turn)
    (found,), (other,) = (
        evaluate(potential, x, average=level, symprec=1e-4) for x in (one, rotate(one, turn))
    )
    close(other.properties.energy, found.properties.energy, AVERAGED)
    close(other.properties.forces, found.properties.forces @ turn.mT, AVERAGED)
    if name != "slab":
        close(other.properties.stress, turn @ found.properties.stress @ turn.mT, AVERAGED)
    plain, whirled = potential(one), potential(rotate(one, turn))
    assert (plain.energy - whirled.energy).abs() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_projected_coset_average_is_the_average_over_all_orbits(name):
    """n evaluations and the projection are n |G| evaluations: energy, forces and stress."""
    potential, one = tiny_potential(), turned(name)
    operations = torch.from_numpy(find_group(one, 1e-4).cartesian_rotations)
    rule = coset_rule(operations, 5, turn=orientation(one))
    nodes = (rule.rotations[:, None] @ operations[None]).flatten(0, 1)
    weights = (rule.weights[:, None] / len(operations)).expand(-1, len(operations)).flatten()
    orbit = Quadrature(rotations=nodes, weights=weights, degree=5)
    expected = averaged_properties(potential, one, [orbit])
    (found,) = evaluate(potential, one, average="standard", symprec=1e-4)
    if len(operations) > 1:
        close(found.properties.energy, expected.energy, AVERAGED)
        close(found.properties.forces, expected.forces, AVERAGED)
        close(found.properties.stress, expected.stress, AVERAGED)
    else:
        assert found.space_group == 1


def test_higher_levels_depend_less_on_the_orientation():
    potential, one = tiny_potential(), turned("hcp")
    group, spread = find_group(one, 1e-4), {}
    for level in ("project", "light", "standard", "tight"):
        rules = sample_rules(one, group, level, 24)
        energies = [replace(potential, quadrature=rule)(one).energy[0] for rule in rules]
        spread[level] = float(torch.stack(energies).std())
    # Of a network with random weights, whose high harmonics are large: light may beat standard.
    assert spread["project"] > 2 * spread["light"] > 0.0
    assert spread["project"] > 1.3 * spread["standard"] > 2 * spread["tight"] > 0.0


def test_the_reference_comes_with_its_error():
    (found,) = evaluate(tiny_potential(), turned("hcp"), average="reference")
    error = found.certificate.rotational_error
    assert 0.0 < error.energy < 5e-2
    assert error.stress_GPa > 0.0
    others = [evaluate(tiny_potential(), turned("hcp"), average=a) for a in ("none", "tight")]
    assert all(o[0].certificate.rotational_error is None for o in others)


def test_structures_of_many_groups_share_a_call():
    batch = concatenate([turned(name, k) for k, name in enumerate(NAMES)])
    together = evaluate(tiny_potential(), batch, average="tight")
    for k, name in enumerate(NAMES):
        (alone,) = evaluate(tiny_potential(), turned(name, k), average="tight")
        close(together[k].properties.energy, alone.properties.energy, AVERAGED)
        close(together[k].properties.forces, alone.properties.forces, AVERAGED)


def test_an_averaged_relaxation_counts_its_evaluations_and_keeps_the_group():
    settings = RelaxSettings(max_steps=4, average="standard")
    (found,) = relax(tiny_potential(), structures()["hcp"], settings)
    assert found.n_evaluations == 6 * (found.n_steps + 1 + N_FRAMES)
    assert found.space_group_after == found.space_group_before == 194
    assert math.isfinite(found.energy)


@pytest.mark.parametrize(("symmetry", "average"), [("keep", "none"), ("free", "project")])
def test_levels_without_meaning_are_refused(symmetry, average):
    with pytest.raises(ConfigError, match="average"):
        RelaxSettings(symmetry=symmetry, average=average)
    with pytest.raises(ConfigError, match="average"):
        evaluate(tiny_potential(), structures()["fcc"], average="best")
