"""The ASE calculator never answers from memory what it would not answer fresh."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from coset.ase_interface import Calculator, from_ase
from coset.structures import rotate
from coset.symmetry.average import averaged_properties
from coset.symmetry.crystal import find_group
from coset.symmetry.rules import coset_rule
from coset.symmetry.spectrum import haar
from coset.workflows.evaluate import evaluate
from tests.factories import tiny_potential


def copper() -> Atoms:
    atoms = bulk("Cu", "fcc", 3.7, cubic=True)
    atoms.rattle(0.1, seed=3)
    return atoms


def potential():
    return tiny_potential("conditioned")


def fresh(atoms: Atoms, **options) -> dict[str, np.ndarray]:
    """What a new calculator says of a copy."""
    return answers(atoms.copy(), Calculator(potential(), **options))


def answers(atoms: Atoms, calculator: Calculator) -> dict[str, np.ndarray]:
    atoms.calc = calculator
    found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        found["stress"] = atoms.get_stress()
    return found | {"energies": atoms.get_potential_energies()}


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in found
    )


def move(atoms: Atoms) -> None:
    atoms.positions[1, 2] += 1e-15 + 1e-12


def swap(atoms: Atoms) -> None:
    atoms.positions[[0, 1]] = atoms.positions[[1, 0]]


def stretch(atoms: Atoms) -> None:
    atoms.cell[2, 0] += 1e-12


def scale(atoms: Atoms) -> None:
    atoms.set_cell(1.01 * atoms.cell, scale_atoms=True)


def open_c(atoms: Atoms) -> None:
    atoms.pbc[2] = False


def transmute(atoms: Atoms) -> None:
    atoms.numbers[0] = 14


def charge(atoms: Atoms) -> None:
    atoms.info["charge"] = 1


def spin(atoms: Atoms) -> None:
    atoms.info["spin"] = 3


def drop(atoms: Atoms) -> None:
    del atoms[2]


CHANGES = (move, swap, stretch, scale, open_c, transmute, charge, spin, drop)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_in_place_is_seen(change):
    atoms, calculator = copper(), Calculator(potential())
    before = answers(atoms, calculator)
    change(atoms)
    after = answers(atoms, calculator)
    assert same(after, fresh(atoms))
    assert not same(after, before)


@pytest.mark.parametrize("key", ["charge", "spin"])
def test_what_is_no_longer_given_is_forgotten(key):
    atoms, calculator = copper(), Calculator(potential())
    plain = answers(atoms, calculator)
    atoms.info[key] = 2
    assert not same(answers(atoms, calculator), plain)
    del atoms.info[key]
    assert same(answers(atoms, calculator), plain)


def test_nothing_passes_between_structures():
    calculator = Calculator(potential())
    water = molecule("H2O", vacuum=3.0)
    given = [copper(), water, copper().repeat((2, 1, 1)), copper()]
    expected = [fresh(atoms) for atoms in given]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (1, 1, 2, 0)):
        for k in order:
            assert same(answers(given[k], calculator), expected[k])


def test_nothing_is_left_of_a_structure_that_failed():
    atoms, calculator = copper(), Calculator(potential())
    expected = answers(atoms, calculator)
    bad = atoms.copy()
    bad.positions[1] = bad.positions[0] + 0.01
    bad.calc = calculator
    with pytest.raises(ValueError, match="apart"):
        bad.get_potential_energy()
    assert not calculator.results
    assert same(answers(atoms, calculator), expected)


def test_an_open_structure_has_no_stress_of_the_one_before():
    atoms, calculator = copper(), Calculator(potential())
    answers(atoms, calculator)
    water = molecule("H2O", vacuum=3.0)
    water.calc = calculator
    water.get_potential_energy()
    assert "stress" not in calculator.results
    with pytest.raises(NotImplementedError):
        water.get_stress()


def test_results_are_copies():
    atoms, calculator = copper(), Calculator(potential())
    expected = fresh(atoms)
    for found in (answers(atoms, calculator), dict(calculator.export_properties())):
        for value in found.values():
            if isinstance(value, np.ndarray):
                value[...] = 7.0
        assert same(answers(atoms, calculator), expected)


def test_the_calculator_keeps_no_part_of_the_structure():
    """Neither the structure given nor the one it shows can change what it remembers."""
    atoms, calculator = copper(), Calculator(potential())
    expected = answers(atoms, calculator)
    shown = calculator.atoms
    assert not np.shares_memory(shown.positions, atoms.positions)
    shown.positions[0] += 0.2
    assert same(answers(shown, calculator), fresh(shown))
    assert same(answers(atoms, calculator), expected)
    calculator.atoms.positions[0] += 0.2
    assert calculator.get_potential_energy() == fresh(calculator.atoms)["energy"]


def test_another_potential_or_kind_of_forces_is_seen():
    direct = tiny_potential("conditioned")
    atoms, calculator = copper(), Calculator(direct)
    before = answers(atoms, calculator)
    calculator.potential = tiny_potential("conditioned", seed=1)
    other = answers(atoms, calculator)
    assert other["energy"] != before["energy"]
    calculator.potential = direct
    assert same(answers(atoms, calculator), before)
    calculator.forces = "direct"
    with pytest.raises(ValueError, match="no direct forces"):
        atoms.get_forces()


def test_averaged_and_plain_calls_leave_each_other_alone():
    plain = potential()
    atoms = bulk("Cu", "fcc", 3.7, cubic=True)
    atoms.set_cell(atoms.cell @ haar(1, 5)[0].numpy().T, scale_atoms=True)
    one = from_ase(atoms)
    operations = torch.from_numpy(find_group(one, 1e-3).cartesian_rotations)
    rule = coset_rule(operations, 5)
    averaged = Calculator(replace(plain, quadrature=rule))
    expected, mean = fresh(atoms), float(averaged_properties(plain, one, [rule]).energy[0])
    assert abs(mean - expected["energy"]) > 1e-6
    calculator = Calculator(plain)
    for _ in range(2):
        assert same(answers(atoms, calculator), expected)
        assert answers(atoms, averaged)["energy"] == mean
        evaluate(plain, rotate(one, haar(1, 6)[0]), average="tight")
