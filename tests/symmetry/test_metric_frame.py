"""The metric frame: exact invariance, and forces and stress that are derivatives of its energy."""

from dataclasses import replace

import pytest
import torch
from factories import structures, tiny_potential
from tolerances import FORCE_DIFFERENCE, SAME_ALGEBRA

from coset.errors import ConfigError, StructureError
from coset.potential import ModelPotential
from coset.structures import Properties, Structures, concatenate, deform, rotate, select
from coset.symmetry.metric_frame import MetricFrame, stretch_from
from coset.symmetry.rules import coset_rule, haar_offsets

NAMES = ("triclinic", "perovskite", "left-handed", "hcp")
TURNS = haar_offsets(len(NAMES), 4)
STRAIN_DIFFERENCE = 1e-8
"""eV, central differences of fourth order in a strain of 1e-4."""


def references() -> Structures:
    return concatenate([structures()[name] for name in NAMES])


def given() -> Structures:
    """The references strained by up to 8 % and turned."""
    noise = torch.randn(len(NAMES), 3, 3, generator=torch.Generator().manual_seed(2)).double()
    deformation = torch.eye(3).double() + 0.04 * noise
    return deform(references(), deformation @ TURNS.mT)


def framed(potential: ModelPotential | None = None) -> MetricFrame:
    return MetricFrame(potential=potential or tiny_potential(), reference=references().cell)


def slopes(frame: MetricFrame, one: Structures, direction: torch.Tensor) -> torch.Tensor:
    """dE/dh at x -> x (1 + h direction), every system at once."""
    h, energies = 1e-4, []
    for step in (-2.0, -1.0, 1.0, 2.0):
        strained = torch.eye(3).double() + step * h * direction
        moved = deform(one, strained.expand(len(one), 3, 3))
        energies.append(frame(moved).energy)
    return (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * h)


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_the_parts_are_a_stretch_and_a_rotation():
    one, start = given(), references().cell
    stretch = stretch_from(start, one)
    U = (stretch.axes * stretch.factors[:, None, :]) @ stretch.axes.mT
    eye = torch.eye(3).double().expand_as(U)
    assert furthest(start @ U @ stretch.turn, one.cell) < SAME_ALGEBRA
    assert furthest(stretch.turn @ stretch.turn.mT, eye) < SAME_ALGEBRA
    assert float(torch.linalg.det(stretch.turn).min()) > 0.0


def test_a_rotation_changes_nothing():
    potential, one, R = tiny_potential(), given(), haar_offsets(1, 9)[0]
    frame = framed(potential)
    before, after = frame(one), frame(rotate(one, R))
    assert furthest(before.energy, after.energy) < SAME_ALGEBRA
    assert furthest(before.forces @ R.mT, after.forces) < SAME_ALGEBRA
    assert furthest(R @ before.stress @ R.mT, after.stress) < SAME_ALGEBRA
    assert furthest(potential(one).energy, potential(rotate(one, R)).energy) > 1e-4


def test_the_reference_itself_is_left_alone():
    potential = tiny_potential()
    expected, found = potential(references()), framed(potential)(references())
    assert furthest(expected.energy, found.energy) < SAME_ALGEBRA
    assert furthest(expected.stress, found.stress) < SAME_ALGEBRA


def virial_error(frame: MetricFrame) -> float:
    """eV, of V stress against differences of the energy in all nine strains."""
    one = given()
    virial = one.volume[:, None, None] * frame(one).stress
    worst = 0.0
    for a in range(3):
        for b in range(3):
            direction = torch.zeros(3, 3).double()
            direction[a, b] = 1.0
            worst = max(worst, furthest(virial[:, a, b], slopes(frame, one, direction)))
    return worst


class WithoutTorque(ModelPotential):
    """Says that its torque is zero, which would make the stress sym(w')."""

    def __call__(self, given: Structures) -> Properties:
        found = super().__call__(given)
        return replace(found, torque=torch.zeros_like(found.torque))


def test_the_stress_is_the_derivative_of_the_energy_with_the_torque_term_only():
    potential = tiny_potential()
    fields = {name: getattr(potential, name) for name in potential.__dataclass_fields__}
    assert virial_error(framed(potential)) < STRAIN_DIFFERENCE
    assert virial_error(framed(WithoutTorque(**fields))) > 1e4 * STRAIN_DIFFERENCE


def test_forces_are_derivatives_of_the_energy():
    frame, one, h = framed(), given(), 1e-4
    forces = frame(one).forces
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        energies = []
        for step in (-2.0, -1.0, 1.0, 2.0):
            positions = one.positions.clone()
            positions[atom, axis] += step * h
            energies.append(frame(replace(one, positions=positions)).energy.sum())
        slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * h)
        assert abs(float(slope + forces[atom, axis])) < FORCE_DIFFERENCE


def test_an_average_removes_the_orientation_of_the_reference():
    rule = coset_rule(torch.eye(3).double()[None], 7)
    one, spread = select(given(), torch.tensor([0])), []
    for potential in (tiny_potential(), replace(tiny_potential(), quadrature=rule)):
        energies = [
            MetricFrame(potential=potential, reference=references().cell[:1] @ R.mT)(one).energy
            for R in haar_offsets(8, 6)
        ]
        spread.append(float(torch.cat(energies).std()))
    assert spread[1] < 0.05 * spread[0]


def test_slabs_have_the_frame_of_their_plane():
    slab, potential = structures()["slab"], tiny_potential()
    frame = MetricFrame(potential=potential, reference=1.02 * slab.cell)
    found, turned = frame(slab), frame(rotate(slab, TURNS[0]))
    assert furthest(found.energy, turned.energy) < SAME_ALGEBRA
    assert furthest(found.forces @ TURNS[0].mT, turned.forces) < SAME_ALGEBRA
    assert bool(found.stress.isnan().all())


@pytest.mark.parametrize("name", ["water", "chain"])
def test_what_has_no_frame_is_refused(name):
    one = structures()[name]
    with pytest.raises(StructureError) as error:
        MetricFrame(potential=tiny_potential(), reference=torch.eye(3)[None])(one)
    assert error.value.code == "NoMetricFrame"


def test_unfit_references_are_refused():
    one = given()
    with pytest.raises(ConfigError, match="reference cells"):
        MetricFrame(potential=tiny_potential(), reference=references().cell[:2])(one)
    mirrored, flat = references().cell.clone(), references().cell.clone()
    mirrored[1], flat[2, 0] = -mirrored[1], 0.0
    for reference, place in ((mirrored, "1"), (flat, "2")):
        with pytest.raises(StructureError) as error:
            MetricFrame(potential=tiny_potential(), reference=reference)(one)
        assert error.value.structure_id == place
