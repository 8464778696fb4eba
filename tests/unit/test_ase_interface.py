"""ASE frames, files and calculators: round trips, results that are never stale, names of files."""

import gzip
import io
import os
import sys
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.stress import voigt_6_to_full_3x3_stress
from factories import rattled, tiny_potential
from lennard_jones import CUTOFF, LennardJones
from tolerances import FORCE_DIFFERENCE, SAME_ALGEBRA, STRESS_DIFFERENCE, close

from coset.ase_interface import (
    Calculator,
    CalculatorPotential,
    from_ase,
    read_structures,
    result_file,
    to_ase,
    write_structures,
)
from coset.errors import ConfigError
from coset.structures import Structures, concatenate, split
from coset.symmetry.crystal import space_group_number

TEXT_PRECISION = 1e-8
"""Å, extended XYZ is written with eight decimals."""


def assert_equal(a, b):
    for field in fields(Structures):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


@dataclass
class Counting:
    """A potential that counts how often it is asked."""

    potential: object
    calls: int = 0

    def __call__(self, structures):
        self.calls += 1
        return self.potential(structures)


# Atoms


def test_round_trip_to_the_last_bit(fixed_structures):
    batch = concatenate(list(fixed_structures.values()))
    count = torch.arange(len(batch))
    batch = replace(batch, charge=count - 3, spin_multiplicity=count % 3 + 1)
    frames = to_ase(batch)
    assert_equal(from_ase(frames), batch)
    for frame, one in zip(frames, split(batch), strict=True):
        assert_equal(from_ase(frame), one)
        assert set(frame.info) <= {"charge", "spin"}
        assert set(frame.arrays) == {"numbers", "positions"}
        assert frame.constraints == []
        assert frame.calc is None


def test_defaults_leave_no_trace():
    (frame,) = to_ase(from_ase(bulk("Si")))
    assert frame.info == {}


def test_nothing_is_shared(few_elements_pet):
    atoms = Atoms("CO", positions=[(0, 0, 0), (0, 0.2, 1.1)], info={"list": [1, 2], "charge": 0})
    atoms.set_constraint(FixAtoms([0]))
    before = deepcopy(atoms)
    one = from_ase(atoms)
    few_elements_pet(one)
    one.positions.add_(1.0)
    (back,) = to_ase(one)
    back.positions += 1.0
    atoms.calc = Calculator(few_elements_pet)
    atoms.get_forces()[:] = 7.0
    atoms.calc.results["forces"][:] = 7.0
    assert atoms == before
    assert atoms.info == before.info
    assert atoms.arrays.keys() == before.arrays.keys()
    assert close(one.positions - 1.0, torch.tensor(before.positions), SAME_ALGEBRA)


# A potential for ASE


@pytest.fixture(scope="module")
def knowing():
    """Knows charges up to 2 and multiplicities up to 3."""
    return tiny_potential("conditioned")


def crystal_atoms():
    cell = [(3.1, 0.2, -0.4), (0.7, 3.6, 0.3), (-0.5, 0.9, 4.2)]
    return Atoms("CuOSiC", scaled_positions=np.eye(4, 3) * 0.5, cell=cell, pbc=True)


def test_results_are_those_of_the_potential(few_elements_pet):
    atoms = crystal_atoms()
    counting = Counting(few_elements_pet)
    atoms.calc = Calculator(counting)
    expected = few_elements_pet(from_ase(atoms))
    assert atoms.get_potential_energy() == float(expected.energy)
    assert atoms.get_potential_energy(force_consistent=True) == float(expected.energy)
    assert np.array_equal(atoms.get_forces(), expected.forces.numpy())
    assert np.array_equal(atoms.get_potential_energies(), expected.atomic_energies.numpy())
    assert np.array_equal(atoms.get_stress(voigt=False), expected.stress[0].numpy())
    assert np.array_equal(atoms.calc.results["torque"], expected.torque[0].numpy())
    assert counting.calls == 1
    named = atoms.get_properties(["energy", "forces", "stress"])
    assert named["energy"] == float(expected.energy)
    assert all(value.dtype == np.float64 for value in (atoms.get_forces(), atoms.get_stress()))


def test_forces_and_stress_in_the_convention_of_ase(few_elements_pet):
    atoms = crystal_atoms()
    atoms.calc = Calculator(few_elements_pet)
    forces = calculate_numerical_forces(atoms, eps=1e-5)
    assert np.abs(forces - atoms.get_forces()).max() < FORCE_DIFFERENCE
    stress = calculate_numerical_stress(atoms, eps=1e-6)
    assert np.abs(stress - atoms.get_stress()).max() < 10 * STRESS_DIFFERENCE  # first order in eps
    squeezed = bulk("Al", cubic=True)
    squeezed.set_cell(3.9 * np.eye(3), scale_atoms=True)
    squeezed.calc = Calculator(LennardJones())
    assert squeezed.get_stress()[:3].max() < 0


CHANGES = {
    "positions": lambda atoms: atoms.positions.__setitem__((1, 0), atoms.positions[1, 0] + 1e-9),
    "cell": lambda atoms: atoms.set_cell(atoms.cell.array * 1.001),
    "pbc": lambda atoms: atoms.set_pbc((True, True, False)),
    "numbers": lambda atoms: atoms.numbers.__setitem__(0, 14),
    "charge": lambda atoms: atoms.info.update(charge=1),
    "spin": lambda atoms: atoms.info.update(spin=3),
    "atoms": lambda atoms: atoms.__delitem__(3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_results_are_never_stale(knowing, name):
    atoms = crystal_atoms()
    counting = Counting(knowing)
    atoms.calc = Calculator(counting)
    before = atoms.get_potential_energy()
    atoms.get_forces()
    atoms.get_stress()
    assert counting.calls == 1
    CHANGES[name](atoms)
    assert atoms.calc.calculation_required(atoms, ["energy"])
    fresh = knowing(from_ase(atoms))
    assert np.array_equal(atoms.get_forces(), fresh.forces.numpy())
    assert atoms.get_potential_energy() == float(fresh.energy) != before
    assert counting.calls == 2
    atoms.calc.reset()
    atoms.get_forces()
    assert counting.calls == 3


def test_what_no_model_sees_changes_nothing(few_elements_pet):
    atoms = crystal_atoms()
    counting = Counting(few_elements_pet)
    atoms.calc = Calculator(counting)
    raw = atoms.get_forces()
    atoms.set_initial_magnetic_moments([1.0] * 4)
    atoms.info["label"] = "x"
    atoms.set_constraint(FixAtoms([0]))
    assert np.array_equal(atoms.get_forces(apply_constraint=False), raw)
    assert not atoms.get_forces()[0].any()
    assert counting.calls == 1


def test_one_calculator_for_several_atoms(few_elements_pet):
    calculator = Calculator(few_elements_pet)
    first, second = crystal_atoms(), bulk("Cu")
    first.calc = second.calc = calculator
    energies = [first.get_potential_energy(), second.get_potential_energy()]
    assert energies == [float(few_elements_pet(from_ase(a)).energy) for a in (first, second)]
    assert first.get_potential_energy() == energies[0]


def test_direct_forces(few_elements_pet, lennard_jones):
    atoms = crystal_atoms()
    atoms.calc = Calculator(few_elements_pet, forces="direct")
    with pytest.raises(ConfigError, match="no direct forces"):
        atoms.get_forces()
    outputs = replace(
        few_elements_pet.outputs, direct_forces="direct_forces", direct_stress="direct_stress"
    )
    potential = replace(few_elements_pet, outputs=outputs)
    atoms.calc = Calculator(potential, forces="direct")
    expected = potential(from_ase(atoms))
    assert np.array_equal(atoms.get_forces(), expected.direct_forces.numpy())
    assert np.array_equal(atoms.get_stress(voigt=False), expected.direct_stress[0].numpy())
    assert np.abs(atoms.get_forces() - expected.forces.numpy()).max() > 1e-3
    with pytest.raises(ConfigError, match="'conservative' or 'direct'"):
        Calculator(lennard_jones, forces="both")


def test_optimizers_of_ase(lennard_jones):
    """Rattled fcc returns to the perfect crystal: no force, no stress."""
    atoms = to_ase(rattled(from_ase(bulk("Al", cubic=True)), 0.1, seed=1))[0]
    atoms.calc = Calculator(lennard_jones)
    with BFGS(FrechetCellFilter(atoms), logfile=None) as optimizer:
        assert optimizer.run(fmax=1e-4, steps=200)
    assert np.abs(atoms.get_forces()).max() < 1e-3
    assert np.abs(atoms.get_stress()).max() < 1e-4
    assert space_group_number(from_ase(atoms), 1e-2) == 225


def test_energy_is_conserved_to_the_order_of_the_integrator(few_elements_pet):
    """Velocity Verlet: halving the step divides the error of the energy by four."""
    errors = []
    for steps in (20, 40):
        atoms = crystal_atoms() * (2, 1, 1)
        atoms.calc = Calculator(few_elements_pet)
        momenta = np.random.default_rng(0).normal(size=(8, 3))
        atoms.set_momenta(momenta * np.sqrt(atoms.get_masses() * units.kB * 300)[:, None])
        start = atoms.get_total_energy()
        with VelocityVerlet(atoms, timestep=5.0 / steps * units.fs) as dynamics:
            energies = [atoms.get_total_energy() for _ in dynamics.irun(steps)]
        errors.append(np.abs(np.array(energies) - start).max())
    assert errors[0] < 1e-2
    assert 3.5 < errors[0] / errors[1] < 4.5


# A calculator of ASE as a potential


class FullStress(AseLennardJones):
    """Returns its stress as a matrix, as some published calculators do."""

    def get_property(self, name, *arguments, **options):
        found = super().get_property(name, *arguments, **options)
        return voigt_6_to_full_3x3_stress(found) if name == "stress" else found


def test_calculators_may_give_the_stress_as_a_matrix(fixed_structures):
    one = fixed_structures["Al"]
    plain, full = (
        CalculatorPotential(calculator=kind(sigma=2.0, rc=CUTOFF), cutoff=CUTOFF)(one)
        for kind in (AseLennardJones, FullStress)
    )
    assert close(plain.stress, full.stress, 0.0)


def test_calculator_as_a_potential(fixed_structures):
    """ASE's Lennard-Jones against ours, written independently."""
    ours = LennardJones()
    calculator = AseLennardJones(sigma=ours.sigma, epsilon=ours.epsilon, rc=CUTOFF)
    theirs = CalculatorPotential(calculator=calculator, cutoff=CUTOFF, level_of_theory="LJ")
    names = [name for name in fixed_structures if name != "water"]  # 1e9 eV at these lengths
    batch = concatenate([fixed_structures[name] for name in names])
    expected, results = ours(batch), theirs(batch)
    scale = 1e-13 * (1.0 + float(expected.forces.abs().max()))
    assert close(results.energy, expected.energy, scale * len(batch.positions))
    assert close(results.forces, expected.forces, scale * len(batch.positions))
    periodic = batch.pbc.all(dim=1)
    assert close(results.stress[periodic], expected.stress[periodic], scale)
    assert bool(results.stress[~periodic].isnan().all())
    assert theirs.elements == frozenset(range(1, 119))


class Charged(AseCalculator):
    """Energy that is the charge, compared as ASE does: without looking at `info`."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=(), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] = float(atoms.info.get("charge", 0))
        self.results["forces"] = np.zeros((len(atoms), 3))


def test_foreign_results_are_not_stale_either():
    one = from_ase(bulk("Si"))
    batch = concatenate([replace(one, charge=torch.tensor([q])) for q in (0, 1, -1, 1)])
    results = CalculatorPotential(calculator=Charged(), cutoff=1.0)(batch)
    assert results.energy.tolist() == [0.0, 1.0, -1.0, 1.0]
    assert bool(results.stress.isnan().all())


def test_there_and_back(few_elements_pet):
    inner = CalculatorPotential(calculator=Calculator(few_elements_pet), cutoff=5.0)
    batch = from_ase([crystal_atoms(), Atoms("CO", positions=[(0, 0, 0), (0, 0, 1.1)])])
    expected, results = few_elements_pet(batch), inner(batch)
    assert close(results.energy, expected.energy, SAME_ALGEBRA)
    assert close(results.forces, expected.forces, SAME_ALGEBRA)
    assert close(results.stress[0], expected.stress[0], SAME_ALGEBRA)
    assert bool(results.stress[1].isnan().all())


# Files in


def test_formats(tmp_path):
    """What ASE writes is read with its format, and the structures are right."""
    silicon = bulk("Si", cubic=True)
    expected = from_ase(silicon)
    names = {
        "Si.cif": "cif",
        "POSCAR": "vasp",
        "Si.vasp": "vasp",
        "CONTCAR_2": "vasp",
        "Si.xyz": "extxyz",
        "Si.extxyz": "extxyz",
        "Si.traj": "traj",
        "Si.json": "json",
        "Si.db": "db",
        "Si.xsf": "xsf",
        "Si.pwi": "espresso-in",
        "Si.gen": "gen",
        "Si.cif.gz": "cif",
        "Si.xyz.gz": "extxyz",
        "odd@name.xyz": "extxyz",
        "train.dat": "extxyz",
    }
    for name, form in names.items():
        options = {"pseudopotentials": {"Si": "x"}} if form == "espresso-in" else {}
        ase.io.write(tmp_path / name, silicon, format=form, **options)
    frames = read_structures([str(tmp_path / name) for name in names])
    assert [frame.format for frame in frames] == list(names.values())
    for frame in frames:
        assert frame.error is None, frame.error
        one = frame.structures
        assert close(one.positions, expected.positions, 1e-6), frame.input  # POSCAR: 7 digits
        assert close(one.cell, expected.cell, 1e-6)
        assert one.pbc.all()
        assert not frame.fixed.any()
        assert frame.warnings == ()


def test_many_frames_and_files(tmp_path):
    path, bad = tmp_path / "many.xyz", tmp_path / "bad.cif"
    charges = {"charge": -1, "spin": 2}
    ase.io.write(path, [Atoms("H", info=charges), Atoms("X"), Atoms("He2"), Atoms("Li")])
    bad.write_text("data_\n")
    frames = read_structures([str(path), str(bad), str(tmp_path / "none.cif"), str(path)])
    assert [(f.input, f.index) for f in frames] == [
        *((str(path), k) for k in range(4)),
        (str(bad), 0),
        (str(tmp_path / "none.cif"), 0),
        *((str(path), k) for k in range(4)),
    ]
    codes = ["", "GhostAtom", "AtomsOverlap", ""]
    expected = [*codes, "EmptyFile", "UnreadableFile", *codes]
    assert [f.error.code if f.error else "" for f in frames] == expected
    assert frames[1].error.structure_id == f"{path}@1"
    assert (int(frames[0].structures.charge), int(frames[0].structures.spin_multiplicity)) == (
        -1,
        2,
    )


def test_blocks_of_a_cif_fail_for_themselves(tmp_path):
    text = io.BytesIO()
    ase.io.write(text, [bulk("Si"), bulk("Al"), bulk("Cu")], format="cif")
    content = text.getvalue().decode().replace("Al  Al1 ", "Qq  Qq1 ")
    path = tmp_path / "three.cif"
    path.write_text("data_references\n_journal_year 1963\n" + content)
    frames = read_structures([str(path)])
    assert [f.error.code if f.error else "" for f in frames] == ["", "UnreadableFile", ""]
    assert [f.index for f in frames] == [0, 1, 2]


def test_selective_dynamics(tmp_path):
    slab = bulk("Al", cubic=True)
    slab.set_constraint(FixAtoms([1, 2]))
    ase.io.write(tmp_path / "POSCAR", slab)
    ase.io.write(tmp_path / "slab.xyz", slab)
    text = (tmp_path / "POSCAR").read_text()
    (tmp_path / "POSCAR_partly").write_text(text.replace("F   F   F", "F   T   F", 1))
    frames = read_structures([str(tmp_path / n) for n in ("POSCAR", "slab.xyz", "POSCAR_partly")])
    for frame in frames[:2]:
        assert frame.fixed.tolist() == [False, True, True, False]
    assert frames[2].error.code == "UnsupportedConstraint"


def test_standard_input(monkeypatch):
    text = "1\n\nSi 0 0 0\n2\n\nSi 0 0 0\nSi 0 0 2\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    frames = read_structures(["-"])
    assert [len(frame.structures.positions) for frame in frames] == [1, 2]
    assert {frame.input for frame in frames} == {"-"}


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.cif")
    (tmp_path / "folder.cif").mkdir()
    (tmp_path / "loop.cif").symlink_to(tmp_path / "loop.cif")
    ase.io.write(tmp_path / "real.cif", bulk("Si"))
    (tmp_path / "link.cif").symlink_to(tmp_path / "real.cif")
    names = ["fifo.cif", "folder.cif", "loop.cif", "link.cif"]
    frames = read_structures([*(str(tmp_path / name) for name in names), "/dev/zero"])
    codes = [f.error.code if f.error else "" for f in frames]
    assert codes == ["UnreadableFile"] * 3 + ["", "UnreadableFile"]


def test_remarks_of_readers_are_kept(tmp_path):
    text = io.BytesIO()
    ase.io.write(text, bulk("Si", cubic=True), format="cif")
    content = text.getvalue().decode() + "_symmetry_cell_setting cubic\n"
    (tmp_path / "Si.cif").write_text(content)
    (frame,) = read_structures([str(tmp_path / "Si.cif")])
    assert frame.error is None
    assert any("crystal system" in warning for warning in frame.warnings)


EXAMPLES = {
    "Al": 225,
    "Al2O3-corundum": 167,
    "C-graphite": 194,
    "CaCO3-calcite": 167,
    "CaF2-fluorite": 225,
    "CsCl": 221,
    "Cu": 225,
    "Fe": 229,
    "FeS2-pyrite": 205,
    "GaAs": 216,
    "Mg": 194,
    "MgO": 225,
    "MoS2-2H": 194,
    "NaCl": 225,
    "Si": 227,
    "SiO2-quartz": 154,
    "SrTiO3-perovskite": 221,
    "TiO2-rutile": 136,
    "W": 229,
    "ZnO-wurtzite": 186,
}


def test_example_crystals():
    """The files that the documentation uses have the space groups that they are named for."""
    folder = Path(__file__).parents[2] / "examples" / "crystals"
    paths = sorted(folder.glob("*.cif"))
    assert [path.stem for path in paths] == sorted(EXAMPLES)
    for frame, path in zip(read_structures([str(path) for path in paths]), paths, strict=True):
        assert (frame.error, frame.warnings) == (None, ())
        assert space_group_number(frame.structures, 1e-2) == EXAMPLES[path.stem]


# Files out


@pytest.mark.parametrize(
    ("source", "form", "name", "expected"),
    [
        ("Si.cif", "cif", "Si", ("Si-relaxed.cif", "cif")),
        ("a/b/TiO2-rutile.cif", "cif", "TiO2", ("TiO2-rutile-relaxed.cif", "cif")),
        ("Si.cif.gz", "cif", "Si", ("Si-relaxed.cif", "cif")),
        ("POSCAR", "vasp", "Si", ("POSCAR-relaxed", "vasp")),
        ("Si.vasp", "vasp", "Si", ("Si-relaxed.vasp", "vasp")),
        ("POSCAR", "vasp", "slab", ("POSCAR-relaxed.extxyz", "extxyz")),
        ("Si.vasp", "vasp", "two", ("Si-relaxed.extxyz", "extxyz")),
        ("left.cif", "cif", "left-handed", ("left-relaxed.extxyz", "extxyz")),
        ("w.xyz", "extxyz", "water", ("w-relaxed.xyz", "extxyz")),
        ("w.traj", "traj", "two", ("w-relaxed.traj", "traj")),
        ("w.pdb", "proteindatabank", "water", ("w-relaxed.extxyz", "extxyz")),
        ("-", "extxyz", "two", ("stdin-relaxed.extxyz", "extxyz")),
    ],
)
def test_names_of_results(fixed_structures, source, form, name, expected):
    two = concatenate([fixed_structures["Si"]] * 2)
    assert result_file(source, form, {**fixed_structures, "two": two}[name]) == expected


@pytest.mark.parametrize(
    ("name", "form", "precision"),
    [
        ("x.cif", "cif", 1e-12),
        ("POSCAR", "vasp", 1e-12),
        ("x.traj", "traj", 0.0),
        ("x.xyz", "extxyz", TEXT_PRECISION),
    ],
)
def test_what_is_written_is_read(tmp_path, fixed_structures, name, form, precision):
    """Distances survive in every format, and so does the space group at 1e-5 Å."""
    one = fixed_structures["TiO2"]
    path = tmp_path / name
    write_structures(path, one, format=form)
    (frame,) = read_structures([str(path)])
    assert (frame.error, frame.format) == (None, form)
    inverse = torch.linalg.inv(one.cell[0])
    found = frame.structures.positions @ torch.linalg.inv(frame.structures.cell[0])
    difference = found - one.positions @ inverse
    assert float((difference - difference.round()).abs().max()) <= precision + 1e-15
    assert close(frame.structures.cell, one.cell, precision)
    assert space_group_number(frame.structures, 1e-5) == 136


def test_results_and_identity_are_kept(tmp_path, fixed_structures, pet):
    batch = concatenate([fixed_structures["Si"], fixed_structures["water"]])
    originals = to_ase(batch)
    originals[0].info.update(material_id="mp-149", number=7, energy_above_hull=0.1, REF=[1.0, 2.0])
    originals[0].set_constraint(FixAtoms([1]))
    originals[1].set_masses([16, 2, 2])
    originals[1].new_array("REF_forces", np.ones((3, 3)))
    properties = pet(batch)
    path = tmp_path / "both.xyz"
    write_structures(path, batch, properties=properties, originals=originals)
    first, second = ase.io.read(path, ":")
    assert first.info == {"material_id": "mp-149", "number": 7}
    assert first.constraints[0].index.tolist() == [1]
    assert second.get_masses().tolist() == [16, 2, 2]
    assert "REF_forces" not in second.arrays
    for frame, energy in zip((first, second), properties.energy.tolist(), strict=True):
        assert frame.get_potential_energy() == energy
    forces = np.concatenate([f.get_forces(apply_constraint=False) for f in (first, second)])
    assert np.abs(forces - properties.forces.numpy()).max() < TEXT_PRECISION
    assert np.abs(first.get_stress(voigt=False) - properties.stress[0].numpy()).max() < 1e-15
    assert "stress" not in second.calc.results


def test_nothing_is_overwritten_unless_asked(tmp_path, fixed_structures):
    path = tmp_path / "x.xyz"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="--force"):
        write_structures(path, fixed_structures["Si"])
    (tmp_path / "dangling.xyz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        write_structures(tmp_path / "dangling.xyz", fixed_structures["Si"])
    assert path.read_text() == "precious"
    write_structures(path, fixed_structures["Si"], overwrite=True)
    assert read_structures([str(path)])[0].error is None


def test_a_failing_writer_leaves_the_old_file(tmp_path, fixed_structures):
    path = tmp_path / "x.cif"
    path.write_text("precious")
    slab_without_vector = replace(
        fixed_structures["slab"], cell=fixed_structures["slab"].cell.clone()
    )
    slab_without_vector.cell[0, 2] = 0.0
    with pytest.raises(ValueError, match="CIF"):
        write_structures(path, slab_without_vector, format="cif", overwrite=True)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_compressed_input_equals_plain(tmp_path):
    ase.io.write(tmp_path / "a.cif", bulk("Si"))
    (tmp_path / "b.cif.gz").write_bytes(gzip.compress((tmp_path / "a.cif").read_bytes()))
    plain, packed = read_structures([str(tmp_path / "a.cif"), str(tmp_path / "b.cif.gz")])
    assert_equal(plain.structures, packed.structures)
