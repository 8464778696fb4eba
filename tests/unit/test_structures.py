"""Batches: taken apart and put together, moved, repeated, wrapped, checked."""

from copy import copy
from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
import torch
from factories import all_structures, crystal, molecule, structures, triclinic
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import close

from coset.errors import StructureError
from coset.structures import (
    Properties,
    Structures,
    complete_cell,
    concatenate,
    deform,
    fault,
    inverse_cell,
    join_properties,
    make_structure,
    properties_of,
    regularity,
    repeat,
    rotate,
    select,
    split,
    strain,
    validate,
    wrap,
    wrapping_shifts,
)

POOL = structures()
EXACT = settings(deadline=None, database=None, derandomize=True, max_examples=100)
PBC = list(product((False, True), repeat=3))


def assert_equal(a, b):
    """Two batches agree in every field, to the last bit."""
    for field in fields(Structures):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def random_rotation(seed, determinant=1.0):
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return torch.tensor(q * np.sign(np.linalg.det(q)) * determinant)


def distances(one):
    """All interatomic distances within the given positions, without images."""
    vectors = one.positions[:, None] - one.positions[None]
    return torch.linalg.norm(vectors, dim=-1)


# Taking apart and putting together

batches = st.lists(st.sampled_from(list(POOL)), min_size=1, max_size=8)


@EXACT
@given(batches)
def test_splitting_undoes_concatenating(names):
    members = [POOL[name] for name in names]
    batch = concatenate(members)
    assert len(batch) == len(members)
    assert batch.n_atoms.tolist() == [len(one.positions) for one in members]
    for one, original in zip(split(batch), members, strict=True):
        assert_equal(one, original)


@EXACT
@given(batches, st.data())
def test_concatenating_is_associative(names, data):
    members = [POOL[name] for name in names]
    cut = data.draw(st.integers(1, len(members)))
    parts = [concatenate(members[:cut]), *members[cut:]]
    assert_equal(concatenate(parts), concatenate(members))


@EXACT
@given(batches, st.data())
def test_selected_systems_come_in_the_order_asked_for(names, data):
    members = [POOL[name] for name in names]
    picked = data.draw(st.lists(st.integers(0, len(members) - 1), max_size=6))
    chosen = select(concatenate(members), torch.tensor(picked, dtype=torch.int64))
    assert len(chosen) == len(picked)
    if picked:
        assert_equal(chosen, concatenate([members[k] for k in picked]))


def test_charges_and_spins_stay_with_their_system():
    a = molecule([(0, 0, 0)], [6], charge=2, spin_multiplicity=3)
    b = molecule([(0, 0, 0)], [8], charge=-1)
    batch = select(concatenate([a, b, a]), torch.tensor([1, 0]))
    assert batch.charge.tolist() == [-1, 2]
    assert batch.spin_multiplicity.tolist() == [1, 3]


def test_no_structures_are_an_error():
    with pytest.raises(StructureError, match="at least one"):
        concatenate([])


def test_properties_are_taken_apart_and_joined():
    names = ["hcp", "slab", "water"]
    batch = concatenate([POOL[name] for name in names])
    n_atoms = len(batch.positions)
    whole = Properties(
        energy=torch.arange(3.0),
        forces=torch.arange(3.0 * n_atoms).reshape(-1, 3),
        stress=torch.arange(27.0).reshape(3, 3, 3),
        torque=torch.arange(9.0).reshape(3, 3),
        atomic_energies=torch.arange(float(n_atoms)),
        direct_forces=torch.arange(3.0 * n_atoms).reshape(-1, 3) + 0.5,
    )
    parts = [properties_of(whole, batch, k) for k in range(3)]
    assert [len(part.forces) for part in parts] == [2, 3, 3]
    assert parts[1].atomic_energies.tolist() == [2.0, 3.0, 4.0]
    assert parts[2].energy.tolist() == [2.0]
    joined = join_properties(parts)
    for field in fields(Properties):
        value = getattr(whole, field.name)
        if value is None:
            assert getattr(joined, field.name) is None
        else:
            assert torch.equal(getattr(joined, field.name), value), field.name


# Moving


@pytest.mark.parametrize("determinant", [1.0, -1.0])
def test_rotations_keep_lengths_and_volume(determinant):
    batch, rotation = all_structures(), random_rotation(1, determinant)
    turned = rotate(batch, rotation)
    for before, after in zip(split(batch), split(turned), strict=True):
        assert close(distances(before), distances(after), atol=1e-12)
        gram = before.cell @ before.cell.mT
        assert close(gram, after.cell @ after.cell.mT, atol=1e-12)
    signed = torch.linalg.det(batch.cell) * determinant
    assert close(torch.linalg.det(turned.cell), signed, atol=1e-9)
    back = rotate(turned, rotation.mT)
    assert close(back.positions, batch.positions, atol=1e-12)


def test_a_rotation_is_active():
    """A quarter turn about z takes x to y."""
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    one = make_structure(
        torch.tensor([[1.0, 0, 0]]).double(),
        torch.tensor([6]),
        cell=torch.diag(torch.tensor([2.0, 3.0, 4.0])).double(),
        pbc=(True, True, True),
    )
    turned = rotate(one, quarter)
    assert turned.positions.tolist() == [[0.0, 1.0, 0.0]]
    assert turned.cell[0, 0].tolist() == [0.0, 2.0, 0.0]


def test_strain_moves_atoms_with_the_cell():
    """Fractional coordinates stay, V' = det(1 + strain) V, each system by its own strain."""
    names = ["triclinic", "left-handed", "perovskite"]
    batch = concatenate([POOL[name] for name in names])
    own = 0.1 * torch.tensor(np.random.default_rng(3).normal(size=(3, 3, 3)))
    strained = strain(batch, own)
    before = torch.linalg.solve(batch.cell[batch.system_index].mT, batch.positions)
    after = torch.linalg.solve(strained.cell[batch.system_index].mT, strained.positions)
    assert close(before, after, atol=1e-12)
    ratio = torch.linalg.det(torch.eye(3).double() + own)
    assert close(strained.volume, ratio.abs() * batch.volume, atol=1e-10)
    assert close(strained.cell, batch.cell + batch.cell @ own, atol=1e-12)


def test_strain_acts_on_rows():
    """x -> x (1 + e): e_xy moves y in proportion to x."""
    shear = torch.zeros(1, 3, 3, dtype=torch.float64)
    shear[0, 0, 1] = 0.5
    moved = strain(molecule([(2.0, 0, 0), (0, 2.0, 0)], [6, 6]), shear)
    assert moved.positions.tolist() == [[2.0, 1.0, 0.0], [0.0, 2.0, 0.0]]


def test_two_deformations_are_their_product():
    batch = concatenate([triclinic(), POOL["hcp"]])
    rng = np.random.default_rng(5)
    first = torch.eye(3).double() + 0.1 * torch.tensor(rng.normal(size=(2, 3, 3)))
    second = torch.eye(3).double() + 0.1 * torch.tensor(rng.normal(size=(2, 3, 3)))
    one_by_one, at_once = deform(deform(batch, first), second), deform(batch, first @ second)
    assert close(one_by_one.positions, at_once.positions, atol=1e-12)
    assert close(one_by_one.cell, at_once.cell, atol=1e-12)


@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 1, 1), (2, 3, 1), (1, 2, 2)])
def test_supercells_hold_every_image_once(repeats):
    """Atoms lie at x + n cell for all n below the repeats, in cells so many times larger."""
    batch = concatenate([POOL["triclinic"], POOL["left-handed"]])
    large = repeat(batch, repeats)
    n_images = int(np.prod(repeats))
    assert large.n_atoms.tolist() == [n_images * n for n in batch.n_atoms.tolist()]
    factors = torch.tensor(repeats).double()
    assert close(large.cell, batch.cell * factors[:, None], atol=1e-12)
    for one, many in zip(split(batch), split(large), strict=True):
        images = many.positions.reshape(n_images, -1, 3) - one.positions
        assert (many.atomic_numbers.reshape(n_images, -1) == one.atomic_numbers).all()
        shifts = torch.linalg.solve(one.cell[0].mT, images.reshape(-1, 3).mT).mT
        assert close(shifts, shifts.round(), atol=1e-12)
        found = {tuple(row) for row in shifts.round().int().tolist()}
        assert found == set(product(*[range(n) for n in repeats]))


def test_supercells_need_positive_repeats():
    with pytest.raises(StructureError, match="positive"):
        repeat(triclinic(), (1, 0, 1))


# Wrapping


@pytest.mark.parametrize("seed", range(5))
def test_wrapping_does_not_see_lattice_vectors(seed):
    """Atoms moved by any lattice vectors wrap to the same place, inside the cell."""
    batch = all_structures()
    rng = np.random.default_rng(seed)
    shifts = torch.tensor(rng.integers(-50, 51, (len(batch.positions), 3))).double()
    shifts = shifts * batch.pbc[batch.system_index]
    moved = replace(
        batch,
        positions=batch.positions
        + torch.einsum("ai,aij->aj", shifts, batch.cell[batch.system_index]),
    )
    plain, wrapped = wrap(batch), wrap(moved)
    inverse = inverse_cell(batch.cell, batch.pbc)[batch.system_index]
    difference = torch.einsum("ai,aij->aj", wrapped.positions - plain.positions, inverse)
    # An atom on a face may wrap to either side of the cell.
    assert close(difference, difference.round(), atol=1e-12)
    fractional = torch.einsum("ai,aij->aj", wrapped.positions, inverse)
    assert float(fractional.min()) >= -1e-12
    assert float(fractional.max()) <= 1.0 + 1e-12
    open_part = (wrapped.positions - moved.positions) - torch.einsum(
        "ai,aij->aj", -wrapping_shifts(moved), batch.cell[batch.system_index]
    )
    assert float(open_part.abs().max()) <= 1e-12


def test_wrapping_twice_changes_nothing():
    once = wrap(all_structures())
    assert_equal(wrap(once), once)


def test_wrapping_leaves_everything_but_positions():
    batch = all_structures()
    wrapped = wrap(batch)
    assert_equal(replace(wrapped, positions=batch.positions), batch)


# Cells


@pytest.mark.parametrize("pbc", PBC, ids=lambda pbc: "".join("FT"[x] for x in pbc))
@pytest.mark.parametrize("zero", [True, False])
def test_the_inverse_cell_gives_fractional_coordinates(pbc, zero):
    """Lattice points have integer coordinates; open directions count nothing and move nothing."""
    rng = np.random.default_rng(4)
    cell = torch.tensor(rng.normal(size=(1, 3, 3)) * 4)
    mask = torch.tensor([pbc])
    if zero:
        cell = torch.where(mask[:, :, None], cell, 0.0)
    inverse = inverse_cell(cell, mask)
    assert not inverse[0][:, ~mask[0]].any()
    numbers = torch.tensor(rng.integers(-5, 6, (20, 3))).double() * mask
    points = numbers @ cell[0]
    assert close(points @ inverse[0], numbers, atol=1e-12)
    complete = complete_cell(cell, mask)
    across = complete[0][~mask[0]]
    assert close(across @ inverse[0], torch.zeros(len(across), 3).double(), atol=1e-12)


@pytest.mark.parametrize("pbc", PBC, ids=lambda pbc: "".join("FT"[x] for x in pbc))
def test_open_directions_are_unit_normals(pbc):
    cell = torch.tensor(np.random.default_rng(6).normal(size=(1, 3, 3)) * 4)
    mask = torch.tensor(pbc)
    complete = complete_cell(cell, mask[None])[0]
    assert torch.equal(complete[mask], cell[0][mask])
    normals = complete[~mask]
    assert close(normals @ normals.mT, torch.eye(len(normals)).double(), atol=1e-12)
    assert close(
        normals @ complete[mask].mT, torch.zeros(len(normals), sum(pbc)).double(), atol=1e-12
    )


def test_volume_is_defined_for_crystals_only():
    batch = concatenate([POOL["left-handed"], POOL["slab, open first"], POOL["water"]])
    a, b, c = batch.cell[0]
    assert float(batch.volume[0]) == pytest.approx(
        abs(float(torch.dot(a, torch.linalg.cross(b, c))))
    )
    assert batch.volume[1:].isnan().all()


def test_regularity_of_a_cell():
    """1 for right angles whatever the lengths, sin(angle) for one oblique angle, any handedness."""
    cell = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
    cell[1] = torch.diag(torch.tensor([1.0, 2.0, 300.0]))
    cell[2, 1] = torch.tensor([np.cos(np.radians(30)), np.sin(np.radians(30)), 0]) * 7
    cell[3] = cell[2][[1, 0, 2]]
    pbc = torch.ones(4, 3, dtype=torch.bool)
    assert close(regularity(cell, pbc), torch.tensor([1.0, 1.0, 0.5, 0.5]).double(), atol=1e-12)
    slab = torch.tensor([[True, True, False]]).expand(4, 3)
    assert close(regularity(cell, slab), torch.tensor([1.0, 1.0, 0.5, 0.5]).double(), atol=1e-12)


def test_one_type_or_device_for_all_lengths():
    batch = all_structures().to(torch.float32)
    assert (batch.positions.dtype, batch.cell.dtype) == (torch.float32, torch.float32)
    assert batch.atomic_numbers.dtype == torch.int64
    assert batch.to("cpu").positions.dtype == torch.float32


# Faults

FLAT = [(1.0, 0, 0), (0, 1.0, 0), (1.0, 1.0, 1e-9)]
GOOD = triclinic()


def with_value(field, index, value):
    changed = getattr(GOOD, field).clone()
    changed[index] = value
    return replace(GOOD, **{field: changed})


def misshapen():
    """One position too few, past the shape checks of the tests."""
    changed = copy(GOOD)
    object.__setattr__(changed, "positions", torch.zeros(3, 3).double())
    return changed


BAD = {
    "EmptyStructure": (
        make_structure(torch.zeros(0, 3).double(), torch.zeros(0, dtype=torch.int64)),
        "no atoms",
    ),
    "ShapeMismatch": (misshapen(), "(3, 3) for 4 atomic"),
    "GhostAtom": (with_value("atomic_numbers", 2, 0), "atom 2 is a ghost"),
    "BadSpecies": (with_value("atomic_numbers", 1, 119), "atom 1 has atomic number 119"),
    "SingularCell": (crystal(FLAT, [(0, 0, 0)], [6]), "singular"),
    "PbcWithoutVector": (
        crystal(np.diag([3.0, 3.0, 0.0]), [(0, 0, 0)], [6]),
        "along axis 2 but the cell vector is zero",
    ),
    "NonFiniteInput": (with_value("positions", (2, 1), torch.nan), "positions[2, 1] is not finite"),
}
MORE = {
    "infinite cell": (
        with_value("cell", (0, 1, 2), torch.inf),
        "NonFiniteInput",
        "cell[1, 2] is not finite",
    ),
    "meters": (with_value("positions", (0, 0), 3e9), "NonFiniteInput", "reach 3e+09 Å"),
    "negative": (with_value("atomic_numbers", 0, -6), "BadSpecies", "atom 0"),
    "coplanar slab": (
        crystal([(3, 0, 0), (6, 1e-6, 0), (0, 0, 0)], [(0, 0, 0)], [6], (True, True, False)),
        "SingularCell",
        "singular",
    ),
}
CASES = [(one, code, text) for code, (one, text) in BAD.items()] + list(MORE.values())


@pytest.mark.parametrize(("one", "code", "text"), CASES, ids=[*BAD, *MORE])
def test_what_is_wrong_is_named(one, code, text):
    error = fault(one, "mp-1")
    assert error is not None
    assert error.code == code
    assert text in str(error)
    assert error.structure_id == "mp-1"
    assert "mp-1" in str(error)
    assert error.field in {"positions", "cell", "atomic_numbers"}
    assert error.hint


@pytest.mark.parametrize("name", POOL)
def test_good_structures_have_no_fault(name):
    assert fault(POOL[name]) is None


def test_the_first_bad_system_of_a_batch_is_named():
    batch = concatenate([GOOD, BAD["GhostAtom"][0], BAD["BadSpecies"][0]])
    with pytest.raises(StructureError) as caught:
        validate(batch)
    assert (caught.value.code, caught.value.structure_id) == ("GhostAtom", "1")
    with pytest.raises(StructureError) as caught:
        validate(batch, ["a", "b", "c"])
    assert caught.value.structure_id == "b"
    validate(select(batch, torch.tensor([0, 0])))
