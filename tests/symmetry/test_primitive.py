"""Primitive reduction: same physics per cell, exact way back, full point group."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk, make_supercell
from ase.spacegroup import crystal as ase_crystal
from factories import FCC, crystal, tiny_potential
from tolerances import close

from coset.ase_interface import from_ase
from coset.structures import repeat, rotate
from coset.symmetry.crystal import find_group, symmetrize, trivial_group
from coset.symmetry.primitive import orientation, primitive_cell
from coset.symmetry.spectrum import haar
from coset.workflows.evaluate import evaluate


def rutile():
    return ase_crystal(
        ["Cu", "Si"],
        [(0, 0, 0), (0.3, 0.3, 0)],
        spacegroup=136,
        cellpar=[4.6, 4.6, 2.95, 90, 90, 90],
    )


SUPERCELLS = {
    "fcc": (bulk("Cu", cubic=True, a=3.6) * (2, 1, 3), 24),
    "zincblende": (bulk("SiC", "zincblende", a=5.5, cubic=True), 4),
    "rutile": (rutile() * (2, 1, 1), 2),
    "hcp": (bulk("Cu", "hcp", a=2.6, c=4.2) * (2, 3, 1), 6),
    "skewed": (bulk("Cu", "bcc", a=2.9), 3),
}


def symmetric(name):
    atoms, n_cells = SUPERCELLS[name]
    if name == "skewed":
        atoms = make_supercell(atoms, [[1, 0, 2], [1, 1, 0], [0, -1, 1]])
        n_cells = len(atoms)
    rng = np.random.default_rng(3)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    atoms.set_cell(atoms.cell[:] @ turn.T, scale_atoms=True)
    atoms.positions += 0.3 + 1e-3 * rng.normal(size=(len(atoms), 3))
    one = from_ase(atoms).to(torch.float64)
    group = find_group(one, 1e-2)
    return symmetrize(one, group), group, n_cells


@pytest.mark.parametrize("name", SUPERCELLS)
def test_unfolding_returns_the_input(name):
    one, group, n_cells = symmetric(name)
    found = primitive_cell(one, group)
    assert found.n_cells == n_cells
    assert len(found.structures.atomic_numbers) * n_cells == len(one.atomic_numbers)
    assert len(found.group.pure_translations) == 1
    back = found.unfold(found.structures)
    assert torch.equal(back.atomic_numbers, one.atomic_numbers)
    torch.testing.assert_close(back.cell, one.cell, rtol=0, atol=1e-11)
    torch.testing.assert_close(back.positions, one.positions, rtol=0, atol=1e-11)
    again = found.fold(back)
    torch.testing.assert_close(again.cell, found.structures.cell, rtol=0, atol=1e-12)
    torch.testing.assert_close(again.positions, found.structures.positions, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes", [[0, 1, 2], [1, 2, 0], [1, 0, 2], [0, 2, 1]])
def test_a_primitive_cell_is_as_handed_as_its_crystal(axes):
    atoms = bulk("SiC", "zincblende", a=5.5, cubic=True)
    for turn in np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]):
        turned = make_supercell(atoms, np.diag(turn)[axes])
        one = from_ase(turned).to(torch.float64)
        found = primitive_cell(one, find_group(one, 1e-5))
        assert found.n_cells == 4
        assert torch.linalg.det(found.structures.cell) * torch.linalg.det(one.cell) > 0.0
        assert np.linalg.det(found.matrix) > 0.0


@pytest.mark.parametrize("name", SUPERCELLS)
def test_properties_are_those_of_the_input(name):
    one, group, _ = symmetric(name)
    potential = tiny_potential()
    found = primitive_cell(one, group)
    plain = potential(one)
    unfolded = found.unfold_properties(potential(found.structures))
    for field in ("energy", "forces", "stress", "torque", "atomic_energies"):
        torch.testing.assert_close(
            getattr(unfolded, field), getattr(plain, field), rtol=0, atol=1e-10, msg=field
        )


def test_a_supercell_that_breaks_the_point_group_gets_it_back():
    one, group, _ = symmetric("rutile")
    assert len(group.rotations) == 8
    assert len(primitive_cell(one, group).group.rotations) == 8
    assert len(primitive_cell(one, group, 1e-2).group.rotations) == 16


def test_primitive_charged_and_open_systems_stay():
    one, _, _ = symmetric("fcc")
    charged = from_ase(bulk("Cu", cubic=True))
    charged = replace(charged.to(torch.float64), charge=torch.tensor([1]))
    assert primitive_cell(charged, find_group(charged, 1e-3)).n_cells == 1
    assert primitive_cell(one, trivial_group(one)).structures is one


def centered():
    """Cells with pure translations, whose primitive vectors are equally long."""
    body = [(0, 0, 0), (0.5, 0.5, 0.5)]
    general = [(x + a, y + b, z + c) for a, b, c in body for x, y, z in [(0.21, 0.34, 0.4)]]
    oxygen = [(x, y, z + s) for x, y, z in ANATASE for s in (0.208, -0.208)]
    tall = np.diag([3.8, 3.8, 9.5])
    return {
        "anatase": crystal(tall, [*ANATASE, *oxygen], [14] * 4 + [8] * 8),
        "tetragonal": crystal(np.diag([3.0, 3.0, 3.9]), body, [29, 29]),
        "only translations": crystal(3.6 * np.eye(3), [*body, *general], [29, 29, 14, 14]),
        "fcc": repeat(crystal(3.7 * np.array(FCC), [(0, 0, 0)], [29]), (2, 1, 1)),
    }


ANATASE = [(0, 0, 0), (0, 0.5, 0.25), (0.5, 0.5, 0.5), (0.5, 0, 0.75)]


@pytest.mark.parametrize("name", centered())
def test_the_axes_of_a_crystal_turn_with_it(name):
    one, potential = centered()[name], tiny_potential()
    axes = orientation(one, find_group(one, 1e-4))
    (expected,) = evaluate(potential, one, average="standard", symprec=1e-4)
    for turn in haar(6, 2):
        turn = turn * torch.linalg.det(turn)  # noqa: PLW2901
        turned = rotate(one, turn)
        assert (orientation(turned, find_group(turned, 1e-4)) @ turn - axes).abs().max() < 1e-9
        (found,) = evaluate(potential, turned, average="standard", symprec=1e-4)
        close(found.properties.energy, expected.properties.energy, 1e-10)
