"""Evaluation of a batch: a status for each, and what projection removes."""

import numpy as np
import pytest
import torch

from coset.structures import concatenate, make_structure, repeat
from coset.symmetry.average import averaged_properties
from coset.symmetry.crystal import find_group, symmetrize
from coset.symmetry.primitive import orientation
from coset.symmetry.rules import coset_rule
from coset.workflows.evaluate import evaluate
from tests.factories import prototype, rattled, tiny_potential
from tests.lennard_jones import LennardJones


def test_a_broken_structure_fails_alone():
    batch = concatenate([prototype("fcc", 3.7), prototype("fcc", 4.1, 79), prototype("bcc", 3.0)])
    results = evaluate(LennardJones(broken=79), batch)
    assert [r.status for r in results] == ["ok", "failed", "ok"]
    assert results[1].code == "NonFiniteOutput"
    for k, one in ((0, prototype("fcc", 3.7)), (2, prototype("bcc", 3.0))):
        expected = float(LennardJones()(one).energy)
        assert float(results[k].properties.energy) == pytest.approx(expected, abs=1e-12)


def test_what_a_model_does_not_know_is_rejected_alone():
    overlapping = make_structure(
        torch.tensor([[0.0, 0, 0], [0, 0, 0.05]], dtype=torch.float64), torch.tensor([29, 29])
    )
    batch = concatenate([prototype("fcc", 3.7, 92), overlapping, prototype("fcc", 3.7)])
    results = evaluate(tiny_potential(), batch)
    assert [r.code for r in results] == ["UnknownElement", "AtomsOverlap", ""]
    assert [r.status for r in results] == ["rejected", "rejected", "ok"]


def test_nothing_usable_is_not_an_error():
    (result,) = evaluate(tiny_potential(), prototype("fcc", 3.7, 92))
    assert result.status == "rejected"


def test_the_certificate_is_what_projection_removes():
    crystal = prototype("fcc", 3.7)
    (raw,) = evaluate(tiny_potential(), crystal)
    (projected,) = evaluate(tiny_potential(), crystal, average="project")
    removed = (raw.properties.stress - projected.properties.stress).abs().max()
    in_GPa = float(removed) * 160.2176634
    assert raw.certificate.stress_deviation_GPa == pytest.approx(in_GPa, abs=1e-12)
    assert in_GPa > 1e-6
    assert raw.space_group == 225
    assert float(projected.properties.forces.abs().max()) < 1e-14


def test_without_symmetry_nothing_is_removed():
    (raw,) = evaluate(tiny_potential(), rattled(prototype("fcc", 3.7), 0.1))
    assert raw.space_group == 1
    assert raw.certificate.force_deviation == 0.0
    assert raw.certificate.torque.shape == (3,)


def test_a_supercell_gives_what_its_atoms_give_one_by_one():
    """Evaluated as its primitive cell, told as it was given: totals, forces and torque."""
    one = rattled(prototype("hcp", 2.6), 1e-7)
    large = repeat(one, (2, 1, 2))
    for level in ("project", "standard"):
        (small,) = evaluate(tiny_potential(), one, average=level)
        (found,) = evaluate(tiny_potential(), large, average=level)
        assert float(found.properties.energy) == pytest.approx(
            4 * float(small.properties.energy), abs=1e-6
        )
        torch.testing.assert_close(
            found.properties.forces, small.properties.forces.repeat(4, 1), rtol=0, atol=1e-6
        )
        # Frames may differ by a symmetry of the lattice, which turns the torque of the raw average.
        large_torque, torque = (np.linalg.norm(x.certificate.torque) for x in (found, small))
        assert large_torque == pytest.approx(4 * torque, abs=1e-6)
    plain = tiny_potential()(large)
    (projected,) = evaluate(tiny_potential(), large, average="project")
    torch.testing.assert_close(plain.energy, projected.properties.energy, rtol=0, atol=1e-6)


def test_atoms_do_not_move_for_a_group_they_do_not_have():
    """Farther from the group than file rounding, its subgroup is taken, and that is said."""
    near, far = rattled(prototype("fcc", 3.7), 1e-6), rattled(prototype("fcc", 3.7), 2e-3)
    kept, reduced = evaluate(tiny_potential(), concatenate([near, far]), average="project")
    assert (kept.space_group, kept.warnings) == (225, ())
    assert float(kept.properties.forces.abs().max()) < 1e-12
    assert "symmetry_inexact" in reduced.warnings
    raw = tiny_potential()(far)
    torch.testing.assert_close(reduced.properties.forces, raw.forces, rtol=0, atol=1e-12)


def test_auto_takes_the_smallest_rule_that_keeps_the_tolerance():
    one = prototype("hcp", 2.6)
    (loose,) = evaluate(tiny_potential(), one, average="auto", rotational_tolerance=1e3)
    (project,) = evaluate(tiny_potential(), one, average="project")
    assert torch.equal(loose.properties.energy, project.properties.energy)
    (best,) = evaluate(tiny_potential(), one, average="auto", rotational_tolerance=1e-12)
    group = find_group(one, 1e-5)
    operations = torch.from_numpy(group.cartesian_rotations)
    rule = coset_rule(operations, 9, turn=orientation(one))
    expected = averaged_properties(tiny_potential(), symmetrize(one, group), [rule])
    torch.testing.assert_close(best.properties.energy, expected.energy, rtol=0, atol=1e-10)
