"""How a bad or odd input is judged; the table of cases is test_bad_inputs.py.

Refusals are checked three ways: as an exception of the single-structure call, as a status in a
batch whose other members do not notice, and, for files, as a frame with an error.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms, FixCartesian
from factories import crystal, molecule, tiny_potential
from tolerances import SAME_ALGEBRA, SAME_PHYSICS, close

from coset.ase_interface import Calculator, fixed_atoms, from_ase, read_structures, to_ase
from coset.errors import StructureError
from coset.neighbors import estimated_edges, neighbor_list
from coset.structures import concatenate, deform, repeat, strain
from coset.workflows.evaluate import evaluate

SLOPE = 1e-8
"""eV/Å, a central difference over 2e-5 Å: 1e-14 eV of rounding and h² times third derivatives."""
FLAGS = [flags for flags in product((False, True), repeat=3) if any(flags)]
WATER = "3\n\nO 0 0 0\nH 0 0.76 0.59\nH 0 -0.76 0.59\n"
CIF = """data_x
_cell_length_a 5.64
_cell_length_b 5.64
_cell_length_c 5.64
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
"""
POSCAR = "Si\n1.0\n5.43 0 0\n0 5.43 0\n0 0 5.43\nSi\n1\nDirect\n0 0 0\n"


# Checks: how a case is judged


def refused(tools, one, code, field):
    """By the potential alone, and in the middle of a batch."""
    good = tools.structures["Si"]
    with pytest.raises(StructureError) as caught:
        tools.pet(one)
    error = caught.value
    assert (error.code, error.field, error.structure_id) == (code, field, "0")
    before, middle, after = evaluate(tools.pet, concatenate([good, one, good]))
    assert (middle.status, middle.code) == ("rejected", code)
    assert middle.reason
    assert middle.properties is None
    alone = tools.pet(good)
    for neighbor in (before, after):
        assert neighbor.status == "ok"
        assert close(neighbor.properties.energy, alone.energy, SAME_PHYSICS)
        assert close(neighbor.properties.forces, alone.forces, SAME_PHYSICS)


def refused_frame(tools, atoms, code, field):
    """When ASE's atoms become structures."""
    with pytest.raises(StructureError) as caught:
        fixed_atoms(atoms, "7") if field == "constraints" else from_ase([Atoms("H"), atoms])
    name = "7" if field == "constraints" else "1"
    assert (caught.value.code, caught.value.field) == (code, field)
    assert caught.value.structure_id == name


def files(tools, content, codes, name="file.xyz", **options):
    """The codes of the frames of a file, `` for good ones; good files beside it do not notice."""
    path, good = tools.path / name, tools.path / "good.xyz"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    good.write_text(WATER)
    frames = read_structures([str(good), str(path), str(good)], **options)
    assert [f.error.code if f.error else "" for f in frames[1:-1]] == codes
    for frame in frames:
        assert (frame.error is None) == (frame.structures is not None)
    for frame in (frames[0], frames[-1]):
        assert frame.error is None
        assert len(frame.structures.atomic_numbers) == 3
    return frames[1:-1]


def warned(tools, content, warning, name="file.xyz", **options):
    (frame,) = files(tools, content, [""], name, **options)
    assert warning in frame.warnings


def same(tools, one, other, atol=SAME_PHYSICS):
    """The same physics described in two ways, atom by atom."""
    first, second = tools.pet(one), tools.pet(other)
    assert torch.isfinite(first.energy).all()
    assert close(first.energy, second.energy, atol)
    assert close(first.forces, second.forces, atol)
    assert torch.equal(first.stress.isnan(), second.stress.isnan())
    assert close(first.stress.nan_to_num(), second.stress.nan_to_num(), atol)


# 2.1 Geometry and chemistry


def error_of(potential, one):
    try:
        potential(one)
    except StructureError as error:
        return error
    return None


def elements(tools):
    """Exactly the elements of the model are accepted, whatever the atomic number."""
    potential = tools.few
    accepted = set()
    for number in range(-5, 201):
        error = error_of(potential, molecule([(0, 0, 0)], [number]))
        if error is None:
            accepted.add(number)
        elif number < 1 or number > 118:
            assert error.code in ("GhostAtom", "BadSpecies")
        else:
            assert error.code == "UnknownElement"
            assert f"Z = {number} is unknown" in str(error)
            assert "1, 6, 8, 14, 29" in str(error)
    assert accepted == potential.elements == {1, 6, 8, 14, 29}


def unknown_element(tools):
    """Polonium among silicon."""
    known, unknown = molecule([(0, 0, 0)], [14]), molecule([(0, 0, 0)], [84])
    results = evaluate(tools.few, concatenate([known, unknown, known]))
    assert [r.code for r in results] == ["", "UnknownElement", ""]
    assert "Z = 84" in results[1].reason


def ghosts_dropped(tools):
    text = WATER.replace("3\n", "5\n", 1) + "X 5 5 5\nBq 6 6 6\n"
    (frame,) = files(tools, text, [""], drop_ghosts=True)
    assert frame.warnings == ("ghosts_dropped:3,4",)
    assert frame.structures.atomic_numbers.tolist() == [8, 1, 1]


def heavy_water(tools):
    (frame,) = files(tools, WATER.replace("H", "D", 1).replace("H", "T", 1), [""])
    assert frame.structures.atomic_numbers.tolist() == [8, 1, 1]
    assert "hydrogen_isotopes" in frame.warnings
    assert np.allclose(frame.atoms.get_masses(), [15.999, 2.014, 3.016], rtol=0, atol=1e-3)


def wrong_numbers(tools, dtype):
    atoms = Atoms("Si")
    atoms.arrays["numbers"] = np.array([14.0]).astype(dtype)
    refused_frame(tools, atoms, "BadSpecies", "atomic_numbers")


def lone_atoms(tools):
    """E is that of the isolated atom, alone, in a batch, anywhere, in a large cell; F = 0."""
    atoms = [molecule([(0, 0, 0)], [z]) for z in range(1, 119)]
    together = tools.pet(concatenate(atoms))
    energies = together.energy
    assert torch.isfinite(energies).all()
    assert float(together.forces.abs().max()) == 0.0
    for k in range(0, 118, 9):
        assert close(tools.pet(atoms[k]).energy, energies[k : k + 1], SAME_ALGEBRA)
    moved = [replace(one, positions=one.positions + 1e3) for one in atoms]
    assert close(tools.pet(concatenate(moved)).energy, energies, SAME_ALGEBRA)
    boxes = [crystal(30.0 * np.eye(3), [(0.3, 0.4, 0.5)], [z]) for z in range(1, 119)]
    boxed = tools.pet(concatenate(boxes))
    assert close(boxed.energy, energies, SAME_ALGEBRA)
    assert float(boxed.stress.abs().max()) == 0.0


def tiny_cell(tools):
    """Images only: dE/da follows from the stress, so E is smooth where neighbors come and go."""
    lengths = torch.linspace(1.5, 20.0, 75, dtype=torch.float64)
    step = 1e-5

    def cubes(values):
        return tools.pet(
            concatenate([crystal(float(a) * np.eye(3), [(0, 0, 0)], [29]) for a in values])
        )

    middle = cubes(lengths)
    slope = (cubes(lengths + step).energy - cubes(lengths - step).energy) / (2 * step)
    trace = middle.stress.diagonal(dim1=1, dim2=2).sum(1) * lengths**2
    assert float(middle.forces.abs().max()) < SAME_ALGEBRA
    assert float((slope - trace).abs().max()) < SLOPE


def isolated(tools, count):
    positions = 25.0 * np.stack(np.meshgrid(*[np.arange(10)] * 3), -1).reshape(-1, 3)[:count]
    expected = count * float(tools.pet(molecule([(0, 0, 0)], [26])).energy)
    results = tools.pet(molecule(positions, [26] * count))
    assert abs(float(results.energy) - expected) < count * SAME_ALGEBRA
    assert float(results.forces.abs().max()) == 0.0


def layer(positions, numbers):
    """The fields that say which atoms a system has."""
    one = molecule(positions, numbers)
    names = ("positions", "atomic_numbers", "system_index")
    return {name: getattr(one, name) for name in names}


def slab_and_atom(tools):
    """A slab and an atom (with its images) 24 Å above it are the sum of both."""
    slab = tools.structures["slab"]
    atom = replace(slab, **layer([(1.0, 0.7, 4.05 + 24.0)], [8]))
    positions = torch.cat([slab.positions, atom.positions]).tolist()
    both = replace(slab, **layer(positions, [13, 13, 13, 8]))
    parts = tools.pet(concatenate([slab, atom]))
    results = tools.pet(both)
    assert abs(float(results.energy - parts.energy.sum())) < SAME_PHYSICS
    assert close(results.forces, parts.forces, SAME_PHYSICS)


def pair(distance):
    return molecule([(0, 0, 0), (0.6 * distance, 0, 0.8 * distance)], [14, 14])


def image_at(distance):
    """Two atoms that meet across the face of a cell."""
    return crystal(4.0 * np.eye(3), [(0, 0, 0), (1 - distance / 4, 0, 0)], [14, 14])


def near_overlap(tools):
    for one in (pair(0.101), image_at(0.101)):
        results = tools.pet(one)
        assert torch.isfinite(results.energy).all()
        assert torch.isfinite(results.forces).all()


def with_value(tools, name, field, value):
    one = tools.structures[name]
    array = getattr(one, field).clone()
    array.view(-1, 3)[1, 2] = value
    refused(tools, replace(one, **{field: array}), "NonFiniteInput", field)


def translated(tools, name):
    """By 10^k Å: coordinates are multiples of 2^-23 Å, so that the input itself is exact."""
    one = tools.structures[name]
    exact = replace(one, positions=torch.round(one.positions * 2**23) / 2**23)
    energy = tools.pet(exact).energy
    for k in range(1, 8):
        shift = torch.tensor([10.0**k, -(10.0**k), 2 * 10.0**k], dtype=torch.float64)
        moved = tools.pet(replace(exact, positions=exact.positions + shift))
        assert close(moved.energy, energy, 1e-9)
    far = replace(exact, positions=exact.positions + 1e9)
    refused(tools, far, "NonFiniteInput", "positions")


def arrays(tools, kind):
    """Views, read-only and Fortran arrays are copied and stay as they were."""
    positions = np.arange(12.0).reshape(4, 3) * 1.1
    given = {
        "strided": np.repeat(positions, 2, axis=0)[::2],
        "reversed": positions[::-1].copy()[::-1],
        "fortran": np.asfortranarray(positions),
        "read-only": positions.copy(),
        "single": positions.astype(np.float32),
        "integers": (positions * 10).astype(np.int32),
    }[kind]
    given.flags.writeable = kind != "read-only"
    atoms, before = Atoms("Si4"), given.copy()
    atoms.arrays["positions"] = given
    atoms.cell.array.flags.writeable = kind != "read-only"
    one = from_ase(atoms)
    assert np.array_equal(one.positions.numpy(), before)
    one.positions.add_(1.0)
    assert np.array_equal(given, before)


def array_of(dtype):
    atoms = Atoms("Si2")
    atoms.arrays["positions"] = np.zeros((2, 3)).astype(dtype)
    return atoms


def charges(tools):
    """Whole charges reach a model that knows them; it refuses 11, others refuse any but 0."""
    plain, knowing = tools.few, tiny_potential("conditioned")
    neutral = Atoms("CO", positions=[(0, 0, 0), (0, 0, 1.1)])
    energies = {}
    for charge in (0, 1, -1, np.int32(1), 2.0, 11):
        atoms = neutral.copy()
        atoms.info["charge"] = charge
        one = from_ase(atoms)
        assert int(one.charge) == charge
        if charge == 11:
            with pytest.raises(StructureError, match="charge 11"):
                knowing(one)
        else:
            energies[charge] = float(knowing(one).energy)
        if charge:
            assert evaluate(plain, one)[0].code == "BadCharge"
            ignoring = replace(plain, ignore_charge=True)
            assert torch.equal(ignoring(one).energy, plain(from_ase(neutral)).energy)
    assert len(set(energies.values())) == 4


def charged(value, key="charge"):
    atoms = Atoms("CO", positions=[(0, 0, 0), (0, 0, 1.1)])
    atoms.info[key] = value
    return atoms


def longer(count):
    atoms = Atoms("Si4")
    atoms.arrays["positions"] = np.zeros((4 + count, 3))
    return atoms


def constrained(constraint):
    return Atoms("Si3", positions=np.eye(3) * 3, constraint=constraint)


def held(tools):
    for constraints, expected in (
        ([FixAtoms([0, 2])], [True, False, True]),
        ([FixAtoms(mask=[False, True, False])], [False, True, False]),
        ([FixCartesian([1])], [False, True, False]),
        (
            [FixCartesian([1], (True, True, False)), FixCartesian(1, (False, False, True))],
            [0, 1, 0],
        ),
        ([FixCartesian([0], (False, False, False))], [False, False, False]),
        ([], [False, False, False]),
    ):
        assert fixed_atoms(constrained(constraints)).tolist() == [bool(x) for x in expected]


# 2.2 Cells and boundary conditions


def cell_of(rows, pbc=(True, True, True)):
    return crystal(rows, [(0, 0, 0)], [14], pbc=pbc)


def singular(gap):
    return cell_of([(4, 0, 0), (0, 4, 0), (2, 2, gap * 4)])


def collinear():
    return cell_of([(4, 0, 0), (8, 0, 0), (0, 0, 4)])


def missing_vectors(tools, flags):
    refused(tools, cell_of(np.zeros((3, 3)), flags), "PbcWithoutVector", "cell")


def left_handed(tools):
    """Exchanging two vectors changes the sign of the determinant and nothing else."""
    for name in ("TiO2", "Mg", "left-handed"):
        one = tools.structures[name]
        swapped = replace(one, cell=one.cell[:, [1, 0, 2]])
        assert float(torch.linalg.det(one.cell) * torch.linalg.det(swapped.cell)) < 0
        assert torch.equal(one.volume > 0, swapped.volume > 0)
        same(tools, one, swapped, SAME_ALGEBRA)


def mirrored(tools):
    """For an invariant potential, everything is the mirror image."""
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    for name in ("TiO2", "left-handed"):
        one = strain(tools.structures[name], 0.01 * torch.ones(1, 3, 3, dtype=torch.float64))
        first, second = tools.lj(one), tools.lj(deform(one, mirror[None]))
        assert close(first.energy, second.energy, SAME_ALGEBRA * float(first.energy.abs()))
        scale = float(first.forces.abs().max()) + 1.0
        assert close(first.forces @ mirror, second.forces, SAME_ALGEBRA * scale)
        assert close(mirror @ first.stress @ mirror, second.stress, SAME_ALGEBRA * scale)


def skewed(tools):
    """50 crystals described by a short and by a very skewed cell (angles down to 20° and below)."""
    rng = np.random.default_rng(0)
    short, long, sharpest = [], [], 90.0
    for _ in range(50):
        cell = 3.2 * np.eye(3) + 0.4 * rng.normal(size=(3, 3))
        change = np.eye(3, dtype=int)
        while np.abs(change).sum() < 8:
            row, other = rng.choice(3, 2, replace=False)
            change[row] += rng.choice((-1, 1)) * change[other]
        sites = rng.uniform(size=(1, 3)) + np.array([(0, 0, 0), (0.5, 0.5, 0.45)])
        short.append(crystal(cell, sites, [29, 8]))
        rows = torch.tensor(change @ cell)
        long.append(replace(short[-1], cell=rows[None]))
        units = rows / rows.norm(dim=1, keepdim=True)
        cosine = (units @ units.T - torch.eye(3)).abs().max()
        sharpest = min(sharpest, float(torch.rad2deg(torch.acos(cosine))))
    assert sharpest < 25
    same(tools, concatenate(short), concatenate(long))


def many_images(tools):
    """One atom in a cube of 1 Å within 10 Å: estimated to 20 %, and it works."""
    one = crystal(np.eye(3), [(0, 0, 0)], [1])
    count = len(neighbor_list(one, 10.0).centers)
    assert abs(float(estimated_edges(one, 10.0)) - count) < 0.2 * count
    assert torch.isfinite(tools.pet(one).energy).all()


def too_many_edges(tools):
    grid = np.stack(np.meshgrid(*[np.arange(20)] * 3), -1).reshape(-1, 3) / 20
    one = crystal(20 * 0.3 * np.eye(3), grid, [1] * 8000)
    with pytest.raises(StructureError, match=r"about 9.05e\+0[0-9] edges") as caught:
        neighbor_list(one, 9.0)
    assert caught.value.code == "TooManyEdges"


def elongated(tools):
    """A cell that the search cannot cut (the process would end) is refused; an open one works."""
    long = crystal(np.diag([3.0, 3.0, 1e7]), [(0, 0, 0)], [14])
    refused(tools, long, "CellTooElongated", "cell")
    both = molecule([(0, 0, 0), (0, 0, 3e7)], [14, 8])
    parts = [molecule([(0, 0, 0)], [z]) for z in (14, 8)]
    expected = tools.pet(concatenate(parts)).energy.sum()
    assert abs(float(tools.pet(both).energy - expected)) < SAME_ALGEBRA


def vacuum(tools, flags):
    """The vectors of open directions do not matter: 0, 10 or 1e4 Å, even along periodic ones."""
    base = np.array([(3.1, 0.2, 0), (0.4, 3.3, 0.1), (0.2, -0.3, 3.5)])
    sites = torch.tensor([(0.1, 0.2, 0.3), (1.7, 1.6, 1.8)], dtype=torch.float64)
    variants = []
    for length in (0.0, 10.0, 1e4):
        rows = base.copy()
        for axis in range(3):
            if not flags[axis]:
                rows[axis] *= length / 3.5
        variants.append(replace(crystal(rows, [(0, 0, 0)] * 2, [29, 8], flags), positions=sites))
    rows = base.copy()
    rows[~np.array(flags)] = base[flags.index(True)]
    variants.append(replace(crystal(rows, [(0, 0, 0)] * 2, [29, 8], flags), positions=sites))
    results = tools.pet(concatenate(variants))
    assert float((results.energy - results.energy[0]).abs().max()) < SAME_ALGEBRA
    forces = results.forces.view(-1, 2, 3)
    assert float((forces - forces[0]).abs().max()) < SAME_ALGEBRA


def images(tools, name):
    """Atoms shifted by up to 50 lattice vectors, and another origin."""
    one = tools.structures[name]
    generator = torch.Generator().manual_seed(3)
    shifts = torch.randint(-50, 51, one.positions.shape, generator=generator) * one.pbc
    moved = one.positions + shifts.double() @ one.cell[0] + torch.tensor([0.3, -0.7, 1.1])
    same(tools, one, replace(one, positions=moved))


def supercells(tools, name):
    one = tools.structures[name]
    repeats = tuple(2 if periodic else 1 for periodic in one.pbc[0].tolist())
    count = int(np.prod(repeats))
    single, whole = tools.pet(one), tools.pet(repeat(one, repeats))
    assert abs(float(whole.energy) / count - float(single.energy)) < SAME_PHYSICS
    assert close(whole.forces, single.forces.repeat(count, 1), SAME_PHYSICS)


def no_stress(tools, name):
    """Undefined is NaN and a warning, never a number; ASE is told that there is none."""
    one = tools.structures[name]
    (result,) = evaluate(tools.pet, one)
    assert (result.status, result.warnings) == ("ok", ("StressUndefined",))
    assert bool(result.properties.stress.isnan().all())
    (atoms,) = to_ase(one)
    atoms.calc = Calculator(tools.pet)
    with pytest.raises(PropertyNotImplementedError, match="three periodic directions"):
        atoms.get_stress()
    assert np.isfinite(atoms.get_potential_energy())
    assert "stress" not in atoms.calc.results
