"""Averages and projections of direct forces and stress."""

import pytest
import torch
from factories import crystal, structures, tiny_checkpoint
from tolerances import AVERAGED

from coset.edge_model import IDENTITY, Quadrature
from coset.loading import LoadSettings, potential_of
from coset.structures import Structures, rotate
from coset.symmetry.average import averaged_properties, translated
from coset.symmetry.certificate import certify
from coset.symmetry.crystal import find_group
from coset.symmetry.primitive import orientation
from coset.symmetry.projection import make_projector
from coset.symmetry.rules import LEVELS, coset_rule, level_rule
from coset.symmetry.spectrum import haar
from coset.workflows.evaluate import evaluate

RUTILE = (0.31, 0.31, 0), (0.69, 0.69, 0), (0.81, 0.19, 0.5), (0.19, 0.81, 0.5)
NAMES = ("rutile", "hcp", "diamond", "rocksalt", "methane, exact", "triclinic")


def direct_potential():
    return potential_of(tiny_checkpoint(), LoadSettings(dtype="float64", forces="direct"))


def given(name: str) -> Structures:
    if name == "rutile":
        cell = torch.diag(torch.tensor([4.6, 4.6, 2.96]))
        return crystal(cell, [(0, 0, 0), (0.5, 0.5, 0.5), *RUTILE], [14, 14, 8, 8, 8, 8])
    if name == "methane, exact":
        corners = 0.63 * torch.tensor(
            [(0, 0, 0), (1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)], dtype=torch.float64
        )
        methane = structures()["methane"]
        return type(methane)(
            **{n: getattr(methane, n) for n in methane.__dataclass_fields__}
            | {"positions": corners}
        )
    return structures()[name]


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nan_to_num(a - b).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_projected_coset_average_is_the_average_over_all_orbits(name):
    """n evaluations and the projection are n |G| evaluations, for direct forces and stress too."""
    potential, one = direct_potential(), rotate(given(name), haar(1, 8)[0])
    operations = torch.from_numpy(find_group(one, 1e-4).cartesian_rotations)
    degree = 7 if len(operations) > 1 else 5
    rule = coset_rule(operations, degree, turn=orientation(one))
    nodes = (rule.rotations[:, None] @ operations[None]).flatten(0, 1)
    weights = (rule.weights[:, None] / len(operations)).expand(-1, len(operations)).flatten()
    orbit = Quadrature(rotations=nodes, weights=weights, degree=rule.degree)
    expected = averaged_properties(potential, one, [orbit])
    (found,) = evaluate(potential, one, average="standard", symprec=1e-4)
    assert found.properties.forces is None
    assert furthest(found.properties.energy, expected.energy) < AVERAGED
    assert furthest(found.properties.direct_forces, expected.direct_forces) < AVERAGED
    assert furthest(found.properties.direct_stress, expected.direct_stress) < AVERAGED


def spread(name: str, level: str) -> tuple[float, float]:
    """How much direct forces and stress depend on how the rule of a level is turned."""
    one = given(name)
    group = find_group(one, 1e-4)
    operations, projector = torch.from_numpy(group.cartesian_rotations), make_projector([group])
    rule = IDENTITY if level == "none" else level_rule(operations, level, direct=True)[0]
    own = [
        averaged_properties(direct_potential(), one, [translated(rule, turn)])
        for turn in haar(8, 3)
    ]
    if level != "none":
        own = [certify(properties, projector)[0] for properties in own]
    forces, stress = [p.direct_forces for p in own], [p.direct_stress for p in own]
    return float(torch.stack(forces).std(0).max()), float(torch.stack(stress).std(0).max())


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("rutile", ("none", "project", "standard", "tight")),
        ("triclinic", ("none", "standard", "tight")),
    ],
)
def test_the_rotational_error_of_averaged_direct_forces_falls(name, levels):
    forces, stress = zip(*[spread(name, level) for level in levels], strict=True)
    for less, more in zip(forces[1:], forces, strict=False):
        assert less < 0.75 * more
    assert forces[-1] < 0.01 * forces[0]
    assert stress[-1] < 0.01 * stress[0]


@pytest.mark.parametrize("name", ["standard", "tight", "reference"])
def test_direct_heads_get_the_next_rule_up(name):
    operations = torch.from_numpy(find_group(given("rutile"), 1e-4).cartesian_rotations)
    plain, direct = (level_rule(operations, name, direct=direct) for direct in (False, True))
    assert direct[0].degree == min(LEVELS[name].degree + 2, 9)
    assert len(direct[0].weights) >= len(plain[0].weights)


def test_the_certificate_is_of_direct_forces():
    one = rotate(given("rutile"), haar(1, 5)[0])
    (raw,) = evaluate(direct_potential(), one)
    (projected,) = evaluate(direct_potential(), one, average="project")
    before, after = raw.properties.direct_forces, projected.properties.direct_forces
    removed = float((before - after).norm(dim=1).max())
    assert raw.certificate.force_deviation == pytest.approx(removed, abs=1e-12)
    assert raw.certificate.torque is None
    (reference,) = evaluate(direct_potential(), one, average="reference")
    assert 0.0 < reference.certificate.rotational_error.forces < removed
