"""Relaxation: closed forms, symmetry, honest status, independence of the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from scipy.optimize import minimize_scalar

from coset.ase_interface import CalculatorPotential
from coset.errors import ConfigError
from coset.structures import (
    Properties,
    Structures,
    concatenate,
    make_structure,
    repeat,
    rotate,
    split,
)
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.relax import relax
from coset.workflows.relaxation import Progress, RelaxSettings
from tests.factories import tiny_potential
from tests.lennard_jones import LennardJones

TIGHT = RelaxSettings(force_tolerance=1e-5, stress_tolerance_GPa=1e-4)
OPTIMIZERS = ("lbfgs", "fire")


def crystal(cell, sites, numbers, pbc=(True, True, True)) -> Structures:
    lattice = torch.tensor(cell, dtype=torch.float64)
    positions = torch.tensor(sites, dtype=torch.float64) @ lattice
    return make_structure(positions, torch.tensor(numbers), cell=lattice, pbc=pbc)


def fcc(a: float) -> Structures:
    sites = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    return crystal(np.eye(3) * a, sites, [13] * 4)


def hcp(a: float, c: float) -> Structures:
    cell = [[a, 0, 0], [-a / 2, a * 3**0.5 / 2, 0], [0, 0, c]]
    return crystal(cell, [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]], [12, 12])


def rutile(a: float = 4.3, c: float = 2.9, u: float = 0.31) -> Structures:
    metal = [[0, 0, 0], [0.5, 0.5, 0.5]]
    oxygen = [[u, u, 0], [-u, -u, 0], [0.5 + u, 0.5 - u, 0.5], [0.5 - u, 0.5 + u, 0.5]]
    return crystal(np.diag([a, a, c]), metal + oxygen, [22, 22, 8, 8, 8, 8])


def distorted(seed: int) -> Structures:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    strain = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    one = fcc(3.9)
    cell = one.cell @ (torch.eye(3) + 0.02 * strain)
    return replace(one, positions=one.positions + 0.15 * noise, cell=cell)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_finds_the_minimum_of_the_energy_over_the_lattice_constant(optimizer):
    potential = LennardJones()
    (result,) = relax(potential, fcc(4.3), replace(TIGHT, optimizer=optimizer))
    best = minimize_scalar(
        lambda a: float(potential(fcc(a)).energy), bracket=(3.9, 4.1), options={"xtol": 1e-12}
    )
    assert result.status == "converged"
    assert float(result.structures.cell[0, 0, 0]) == pytest.approx(best.x, abs=1e-5)
    assert result.energy == pytest.approx(best.fun, abs=1e-8)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("symmetry", ["keep", "free"])
def test_forces_and_stress_vanish_at_the_end(optimizer, symmetry):
    potential = LennardJones()
    batch = concatenate([hcp(3.1, 5.3), distorted(1), fcc(3.6), rotate(hcp(2.9, 4.4), _turn())])
    settings = replace(TIGHT, optimizer=optimizer, symmetry=symmetry, max_steps=2000)
    for result in relax(potential, batch, settings):
        assert result.status == "converged"
        again = potential(result.structures)
        assert float(again.forces.norm(dim=1).max()) < 2e-5
        assert float(again.stress.abs().max()) * GPA_PER_EV_PER_A3 < 2e-4


def _turn() -> torch.Tensor:
    return torch.linalg.qr(torch.tensor([[1.0, 2, 3], [2, -1, 1], [0, 1, 5]], dtype=torch.float64))[
        0
    ]


def test_pressure_is_reached():
    settings = replace(TIGHT, pressure_GPa=5.0)
    (result,) = relax(LennardJones(), fcc(4.0), settings)
    assert result.status == "converged"
    assert result.pressure_GPa == pytest.approx(5.0, abs=1e-3)
    stress = LennardJones()(result.structures).stress[0]
    assert float(-stress.trace() / 3) * GPA_PER_EV_PER_A3 == pytest.approx(5.0, abs=1e-3)


def test_cell_modes_relax_only_what_they_say():
    start = crystal(np.diag([3.6, 4.1, 4.4]), fcc_sites(), [13] * 4)
    modes = ("fixed", "volume", "shape", "full")
    results = [relax(LennardJones(), start, replace(TIGHT, cell=mode))[0] for mode in modes]
    assert [r.status for r in results] == ["converged"] * 4
    cells = [r.structures.cell[0] for r in results]
    volumes = [float(c.det()) for c in cells]
    before = start.cell[0]
    torch.testing.assert_close(cells[0], before, atol=1e-12, rtol=0)
    torch.testing.assert_close(cells[1] / cells[1][0, 0], before / before[0, 0], atol=1e-9, rtol=0)
    assert abs(volumes[1] - volumes[0]) > 0.1
    assert volumes[2] == pytest.approx(volumes[0], abs=1e-8)
    assert float((cells[2] - before).abs().max()) > 0.1
    energies = [r.energy for r in results]
    assert energies[3] < energies[2] < energies[0]
    assert energies[3] < energies[1] < energies[0]


def fcc_sites():
    return [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]


def test_fixed_atoms_follow_the_cell_alone():
    start = distorted(3)
    fixed = torch.tensor([True, False, False, True])
    settings = replace(TIGHT, symmetry="free", force_tolerance=1e-4, max_steps=1000)
    (result,) = relax(LennardJones(), start, settings, fixed=fixed)
    assert result.status == "converged"
    before = start.positions @ torch.linalg.inv(start.cell[0])
    after = result.structures.positions @ torch.linalg.inv(result.structures.cell[0])
    moved = (after - before).abs().amax(1)
    assert float(moved[fixed].max()) < 1e-12
    assert float(moved[~fixed].min()) > 1e-3


def test_keep_never_leaves_the_group_and_a_noisy_potential_alone_does():
    batch = concatenate([rutile(), hcp(3.1, 5.3), fcc(4.2)])
    few = RelaxSettings(max_steps=6)
    kept = relax(LennardJones(noise=0.05), batch, few)
    assert [r.space_group_before for r in kept] == [136, 194, 225]
    assert [r.space_group_after for r in kept] == [136, 194, 225]
    assert all(r.certificate.force_deviation > 1e-4 for r in kept)
    free = relax(LennardJones(noise=0.05), batch, replace(few, symmetry="free"))
    assert all(r.space_group_after < r.space_group_before for r in free)


def test_keep_holds_an_unconstrained_network_in_the_group():
    batch = concatenate([rotate(rutile(), _turn()), hcp(3.1, 5.3), fcc(4.2)])
    known = torch.where(batch.atomic_numbers == 8, 8, 29)  # elements of the tiny network
    batch = replace(batch, atomic_numbers=known)
    results = relax(tiny_potential(), batch, RelaxSettings(max_steps=8))
    assert [r.space_group_after for r in results] == [136, 194, 225]
    assert max(r.certificate.force_deviation for r in results) > 1e-6  # the network does break it


def test_supercells_relax_as_their_primitive_cell_does():
    """One evaluation of the primitive cell serves all; atoms and cell come back as they were."""
    primitive = rotate(crystal(np.eye(3) * 2.9, [[0, 0, 0]], [29]), _turn())
    large = repeat(primitive, (2, 1, 3))
    one, many = relax(tiny_potential(), concatenate([primitive, large]), RelaxSettings())
    assert many.n_evaluations == one.n_evaluations
    assert many.energy == pytest.approx(6 * one.energy, abs=1e-9)
    torch.testing.assert_close(many.structures.cell, repeat(one.structures, (2, 1, 3)).cell)
    found = tiny_potential()(many.structures)
    torch.testing.assert_close(found.energy, many.properties.energy, rtol=0, atol=1e-9)
    assert many.rmsd < 1e-12


def test_input_is_symmetrized_before_it_moves():
    generator = torch.Generator().manual_seed(0)
    start = rutile()
    noisy = replace(
        start,
        positions=start.positions
        + 2e-4 * torch.randn(6, 3, generator=generator, dtype=torch.float64),
    )
    (result,) = relax(LennardJones(), noisy, RelaxSettings(max_steps=0))
    assert (result.space_group_before, result.space_group_after) == (136, 136)
    assert result.code == "MaxSteps"


def test_every_structure_has_a_status_and_none_disturbs_another():
    broken = crystal(np.eye(3) * 4.0, fcc_sites(), [79] * 4)
    overlapping = crystal(np.eye(3) * 4.0, [[0, 0, 0], [0, 0, 1e-3]], [13, 13])
    exploding = rutile(a=12.0, c=12.0)
    start = [fcc(4.1), broken, distorted(5), overlapping, exploding, hcp(3.1, 5.3)]
    settings = replace(TIGHT, max_steps=60, symmetry="free")
    potential = LennardJones(broken=79)
    results = relax(potential, concatenate(start), settings)
    status = [(r.status, r.code) for r in results]
    assert status[0] == status[5] == ("converged", "")
    assert status[1] == ("failed", "NonFiniteOutput")
    assert status[3] == ("rejected", "AtomsOverlap")
    assert status[4][0] in ("failed", "not_converged")
    assert all(r.reason for r in results)
    for k in (0, 2, 5):
        (alone,) = relax(potential, start[k], settings)
        assert alone.n_evaluations == results[k].n_evaluations
        for name in ("positions", "cell"):
            ours, own = getattr(results[k].structures, name), getattr(alone.structures, name)
            torch.testing.assert_close(ours, own, atol=1e-8, rtol=0)


def test_collapse_stops_with_the_last_good_geometry():
    (result,) = relax(LennardJones(), fcc(4.0), replace(TIGHT, pressure_GPa=-500.0))
    assert (result.status, result.code) == ("failed", "CellCollapse")
    assert abs(np.log(float(result.structures.volume) / 64.0)) <= 1.0


def test_a_slab_has_no_cell_to_relax():
    slab = crystal(
        np.diag([4.0, 4.0, 30.0]), [[0, 0, 0.5], [0.5, 0.5, 0.5]], [13, 13], (True, True, False)
    )
    refused, allowed = (
        relax(LennardJones(), slab, RelaxSettings(cell=mode))[0] for mode in ("full", "fixed")
    )
    assert (refused.status, refused.code) == ("rejected", "CellNotPeriodic")
    assert allowed.status == "converged"
    (default,) = relax(LennardJones(), slab)
    assert default.status == "converged"
    assert torch.equal(default.structures.cell, slab.cell)


def test_too_few_steps_are_not_called_converged():
    (result,) = relax(LennardJones(), fcc(4.3), replace(TIGHT, max_steps=1))
    assert (result.status, result.code) == ("not_converged", "MaxSteps")
    assert result.n_steps == 1
    assert result.n_evaluations == 2


def test_an_observer_sees_every_step_and_can_stop():
    seen: list[Progress] = []

    def stop_at_two(progress: Progress) -> bool:
        seen.append(progress)
        return progress.step == 2

    (result,) = relax(LennardJones(), fcc(4.3), TIGHT, observer=stop_at_two)
    assert (result.status, result.code, result.n_steps) == ("not_converged", "Interrupted", 2)
    assert [p.step for p in seen] == [0, 1, 2]
    assert torch.equal(seen[-1].structures.cell, result.structures.cell)


def test_rmsd_is_blind_to_strain_and_translation():
    (result,) = relax(LennardJones(), fcc(4.3), TIGHT)
    assert result.rmsd < 1e-9
    (moved,) = relax(LennardJones(), distorted(2), replace(TIGHT, symmetry="free"))
    fractional = [
        s.positions @ torch.linalg.inv(s.cell[0]) for s in (distorted(2), moved.structures)
    ]
    difference = fractional[1] - fractional[0]
    by_hand = (difference - difference.mean(0)) @ moved.structures.cell[0]
    assert moved.rmsd == pytest.approx(float((by_hand**2).sum(1).mean().sqrt()), abs=1e-9)


def test_results_keep_the_order_of_the_input():
    batch = concatenate([fcc(4.3), hcp(3.1, 5.3), distorted(1), fcc(3.9)])
    results = relax(LennardJones(), batch, RelaxSettings(max_steps=3))
    numbers = [one.atomic_numbers.tolist() for one in split(batch)]
    assert [r.structures.atomic_numbers.tolist() for r in results] == numbers


def test_any_ase_calculator_relaxes_with_its_symmetry():
    potential = CalculatorPotential(calculator=EMT(), cutoff=6.0, elements=frozenset({29, 13}))
    copper = replace(fcc(3.7), atomic_numbers=torch.full((4,), 29))
    results = relax(potential, concatenate([copper, rutile()]), TIGHT)
    assert [r.code for r in results] == ["", "UnknownElement"]
    assert results[0].space_group_after == 225
    assert results[0].certificate.torque is None
    assert float(results[0].structures.cell[0, 0, 0]) == pytest.approx(3.59, abs=0.01)  # EMT copper


class Spring:
    """Two atoms on a stiff spring, without a cell; counts where it was evaluated."""

    cutoff, elements, level_of_theory = 5.0, frozenset({29}), "spring"

    def __init__(self, stiffness: float, offset: float = 0.0):
        self.stiffness, self.offset, self.seen = stiffness, offset, []

    def check_supported(self, structures: Structures) -> None:
        """Everything is supported."""

    def __call__(self, structures: Structures) -> Properties:
        vector = structures.positions[1] - structures.positions[0]
        length = vector.norm()
        self.seen.append(round(float(length), 9))
        pull = self.stiffness * (length - 1.0) * vector / length
        undefined = torch.full((1, 3, 3), torch.nan, dtype=torch.float64)
        energy = 0.5 * self.stiffness * (length - 1.0) ** 2 + self.offset
        forces = torch.stack([pull, -pull])
        return Properties(energy=energy.reshape(1), forces=forces, stress=undefined)


def dimer(length: float) -> Structures:
    positions = torch.tensor([[0.0, 0, 0], [length, 0, 0]], dtype=torch.float64)
    return make_structure(positions, torch.tensor([29, 29]))


def test_a_run_that_stops_does_not_return_the_step_it_would_take_back():
    (result,) = relax(Spring(1000.0), dimer(1.01), RelaxSettings(max_steps=1))
    assert result.status == "not_converged"
    assert result.max_force <= 10.0 + 1e-9  # that of the start


@pytest.mark.parametrize("offset", [0.0, -1e5])
def test_no_point_is_evaluated_twice_and_the_energy_zero_does_not_matter(offset):
    spring = Spring(200.0, offset)
    (result,) = relax(spring, dimer(1.01), RelaxSettings(force_tolerance=1e-6))
    assert result.status == "converged"
    assert len(set(spring.seen)) == len(spring.seen)
    reference = Spring(200.0)
    relax(reference, dimer(1.01), RelaxSettings(force_tolerance=1e-6))
    assert spring.seen == reference.seen


def test_fixed_atoms_are_not_symmetrized_away():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    start = rutile()
    start = replace(start, positions=start.positions + 1e-3 * noise)
    fixed = torch.tensor([True, False, False, False, False, False])
    (result,) = relax(LennardJones(), start, RelaxSettings(max_steps=0, cell="fixed"), fixed=fixed)
    assert float((result.structures.positions - start.positions)[0].norm()) < 1e-5


def test_rmsd_counts_what_symmetrization_moved():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    start = rutile()
    start = replace(start, positions=start.positions + 1e-3 * noise)
    (result,) = relax(LennardJones(), start, RelaxSettings(max_steps=0))
    assert result.space_group_after == 136
    assert 1e-4 < result.rmsd < 5e-3


def test_a_cell_cannot_relax_without_stress():
    class NoStress(LennardJones):
        def __call__(self, structures):
            return replace(super().__call__(structures), stress=None)

    (refused,) = relax(NoStress(), fcc(4.1))
    assert (refused.status, refused.code) == ("failed", "StressUndefined")
    (allowed,) = relax(NoStress(), fcc(4.1), RelaxSettings(cell="fixed"))
    assert allowed.status == "converged"


def test_stress_is_told_where_the_cell_is_fixed_and_undefined_for_molecules():
    (crystal_result,) = relax(LennardJones(), fcc(4.3), RelaxSettings(cell="fixed"))
    stress = LennardJones()(fcc(4.3)).stress[0]
    assert crystal_result.max_stress_GPa == pytest.approx(
        float(stress.abs().max()) * GPA_PER_EV_PER_A3, abs=1e-6
    )
    (molecule,) = relax(Spring(10.0), dimer(1.1))
    assert np.isnan(molecule.max_stress_GPa)


@pytest.mark.parametrize("cell", ["fixed", "shape"])
def test_a_pressure_that_does_nothing_is_refused(cell):
    with pytest.raises(ConfigError, match="does nothing"):
        RelaxSettings(cell=cell, pressure_GPa=1.0)
