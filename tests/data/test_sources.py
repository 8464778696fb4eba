"""What becomes of labels in foreign files: names, units, signs, and frames that cannot be used."""

from dataclasses import replace

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from coset.ase_interface.training import LabelReading
from coset.data.cleaning import clean
from coset.data.convert import convert
from coset.data.formula import formula_hashes
from coset.data.sources import (
    CORPUS_ARRAYS,
    CORPUS_KINDS,
    MINUS,
    PLUS,
    open_source,
    read_ase,
    read_corpus,
)
from coset.data.store import Frames, Store, join_frames
from coset.errors import ConfigError, StructureError
from tests.data.labelled import make_frames, same

HARTREE, BOHR = 27.211386245988, 0.529177210903


def frames_of(path, **reading) -> Frames:
    chunks = list(read_ase(path, LabelReading(**reading)))
    assert not any(chunk.unusable for chunk in chunks)
    return join_frames([chunk.frames for chunk in chunks])


def compressed_copper() -> Atoms:
    """A crystal that wants to expand: its stress is negative where tension is positive."""
    atoms = bulk("Cu", "fcc", 3.4, cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = EMT()
    atoms.get_stress()
    return atoms


def labels_of(atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)


def bare(atoms: Atoms, info=None, arrays=None) -> Atoms:
    """A copy that carries the given labels and nothing else."""
    copy = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=info)
    for name, array in (arrays or {}).items():
        copy.set_array(name, array)
    return copy


@pytest.mark.parametrize("suffix", ["extxyz", "traj"])
def test_labels_of_a_calculator(tmp_path, suffix):
    atoms = compressed_copper()
    energy, forces, stress = labels_of(atoms)
    ase.io.write(tmp_path / f"x.{suffix}", [atoms, atoms])
    found = frames_of(tmp_path / f"x.{suffix}")
    assert len(found) == 2
    assert np.allclose(found.energy, energy, rtol=0, atol=1e-7)
    assert np.allclose(found.forces[:4], forces, rtol=0, atol=1e-7)
    assert np.allclose(found.stress[1], stress, rtol=0, atol=1e-7)
    assert found.stress[0].trace() < 0.0
    assert found.kind.tolist() == [0, 0]
    assert found.unit.tolist() == [1, 1]
    assert (found.formula_hash == formula_hashes(found.n_atoms, found.numbers)).all()


def test_forces_are_minus_the_gradient_after_reading(tmp_path):
    atoms, step = compressed_copper(), 1e-3
    frames = []
    for sign in (1, 0, -1):
        moved = atoms.copy()
        moved.positions[1, 2] += sign * step
        moved.calc = EMT()
        moved.get_stress()
        frames.append(moved)
    ase.io.write(tmp_path / "x.extxyz", frames)
    found = frames_of(tmp_path / "x.extxyz")
    slope = (found.energy[0] - found.energy[2]) / (2 * step)
    assert abs(found.forces.reshape(3, 4, 3)[1, 1, 2] + slope) < 1e-4  # the step squared


@pytest.mark.parametrize("prefix", ["", "dft_", "DFT_", "REF_"])
def test_labels_in_info_and_arrays(tmp_path, prefix):
    atoms = compressed_copper()
    energy, forces, stress = labels_of(atoms)
    info = {f"{prefix}energy": energy, f"{prefix}stress": stress, "free_energy": 1e5}
    copy = bare(atoms, info, {f"{prefix}forces": forces})
    ase.io.write(tmp_path / "x.extxyz", copy)
    found = frames_of(tmp_path / "x.extxyz")
    assert np.allclose(found.energy, energy, rtol=0, atol=1e-7)
    assert np.allclose(found.forces, forces, rtol=0, atol=1e-7)
    assert np.allclose(found.stress[0], stress, rtol=0, atol=1e-7)


def test_six_numbers_are_in_the_order_of_ase(tmp_path):
    atoms = compressed_copper()
    ase.io.write(
        tmp_path / "x.extxyz", bare(atoms, {"REF_energy": 0.0, "REF_stress": np.arange(1.0, 7.0)})
    )
    stress = frames_of(tmp_path / "x.extxyz").stress[0]
    assert stress.tolist() == [[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]]


@pytest.mark.parametrize("name", ["virial", "virials", "dft_virial"])
@pytest.mark.parametrize("as_matrix", [True, False])
def test_a_virial_is_minus_the_stress_times_the_volume(tmp_path, name, as_matrix):
    atoms = compressed_copper()
    energy, _, stress = labels_of(atoms)
    virial = -stress * atoms.get_volume()
    prefix = name.removesuffix("s").removesuffix("virial")
    info = {f"{prefix}energy": energy, name: virial if as_matrix else virial.reshape(9)}
    ase.io.write(tmp_path / "x.extxyz", bare(atoms, info))
    found = frames_of(tmp_path / "x.extxyz")
    assert np.allclose(found.stress[0], stress, rtol=0, atol=1e-7)


def test_a_file_in_atomic_units_with_compression_positive(tmp_path):
    atoms = compressed_copper()
    energy, forces, stress = labels_of(atoms)
    other = bare(
        atoms,
        {"energy": energy / HARTREE, "stress": -stress / HARTREE * BOHR**3},
        {"forces": forces / HARTREE * BOHR},
    )
    other.set_cell(atoms.cell.array / BOHR, scale_atoms=True)
    ase.io.write(tmp_path / "x.extxyz", other)
    reading = {"energy_unit": "Ha", "length_unit": "Bohr", "stress_sign": "compression"}
    found = frames_of(tmp_path / "x.extxyz", **reading)
    assert np.allclose(found.positions, atoms.positions, rtol=0, atol=1e-7)
    assert np.allclose(found.cell[0], atoms.cell.array, rtol=0, atol=1e-7)
    assert np.allclose(found.energy, energy, rtol=0, atol=1e-6)
    assert np.allclose(found.forces, forces, rtol=0, atol=1e-6)
    assert np.allclose(found.stress[0], stress, rtol=0, atol=1e-6)


def test_kcal_per_mol(tmp_path):
    one = bare(molecule("H2O"), {"energy": 23.060548}, {"forces": np.full((3, 3), 23.060548)})
    ase.io.write(tmp_path / "x.extxyz", one)
    found = frames_of(tmp_path / "x.extxyz", energy_unit="kcal/mol")
    assert abs(found.energy[0] - 1.0) < 1e-7
    assert np.abs(found.forces - 1.0).max() < 1e-6


@pytest.mark.parametrize(
    ("field", "value"),
    [("energy_unit", "erg"), ("length_unit", "inch"), ("stress_sign", "positive")],
)
def test_units_are_never_guessed(field, value):
    with pytest.raises(ConfigError, match=value):
        LabelReading(**{field: value})


def test_two_sets_of_labels_need_a_choice(tmp_path):
    atoms = compressed_copper()
    ase.io.write(tmp_path / "x.extxyz", bare(atoms, {"energy": 1.0, "REF_energy": 2.0}))
    (chunk,) = read_ase(tmp_path / "x.extxyz")
    assert chunk.unusable == {"AmbiguousLabels": 1}
    for prefix, energy in (("", 1.0), ("REF_", 2.0), ("ref_", 2.0)):
        assert frames_of(tmp_path / "x.extxyz", prefix=prefix).energy.tolist() == [energy]
    assert np.isnan(frames_of(tmp_path / "x.extxyz", prefix="other_").energy).all()


def test_stress_is_missing_unless_periodic_in_three_directions(tmp_path):
    slab = compressed_copper()
    slab.pbc = (True, True, False)
    labels = {"energy": 1.0, "forces": np.zeros((4, 3)), "stress": np.ones(6)}
    slab.calc = SinglePointCalculator(slab, **labels)
    ase.io.write(tmp_path / "x.extxyz", slab)
    (chunk,) = read_ase(tmp_path / "x.extxyz")
    frames, _, dropped = clean(chunk.frames)
    assert np.isnan(frames.stress).all()
    assert dropped == {"stress, not periodic in 3D": 1}


def test_charge_and_spin_and_atomic_energies(tmp_path):
    ion = bare(molecule("OH"), {"energy": 1.0, "charge": -1, "spin": 3})
    atoms = compressed_copper()
    ase.io.write(tmp_path / "x.extxyz", [ion, atoms])
    found = frames_of(tmp_path / "x.extxyz")
    assert found.charge.tolist() == [-1, 0]
    assert found.spin_multiplicity.tolist() == [3, 1]
    assert np.isnan(found.atomic_energies[:2]).all()
    assert abs(found.atomic_energies[2:].sum() - found.energy[1]) < 1e-6


def test_bad_frames_are_counted_and_the_others_kept(tmp_path):
    atoms = compressed_copper()
    ghost = bare(Atoms("XH", [[0, 0, 0], [0, 0, 1]]), {"energy": 1.0})
    unlabelled = bare(atoms)
    not_a_number = bare(atoms, {"energy": np.nan}, {"forces": np.ones((4, 3))})
    partly = bare(atoms, {"energy": 1.0}, {"forces": np.array([[np.nan, 0, 0]] + [[0, 0, 0]] * 3)})
    wrong = bare(atoms, {"energy": 1.0, "stress": np.ones(6)})
    path = tmp_path / "x.extxyz"
    ase.io.write(path, [atoms, ghost, unlabelled, not_a_number, partly, atoms])
    text = path.read_text() + "2\nProperties=species:S:1:pos:R:3 energy=1.0\nH 0 0 0\n"
    path.write_text(text)
    ase.io.write(tmp_path / "y.extxyz", wrong)
    broken = (tmp_path / "y.extxyz").read_text()
    assert "energy=1.0" in broken
    path.write_text(text + broken.replace("energy=1.0", "energy=lots"))
    report = convert([open_source(path)], tmp_path / "store")
    assert report.read == 8
    assert report.written == 4
    assert report.skipped == {
        "GhostAtom": 1,
        "no usable label": 1,
        "UnreadableFile": 1,
        "BadLabel": 1,
    }
    assert report.examples["GhostAtom"].startswith(f"structure {path}@1: ")
    assert report.dropped_labels == {"energy not finite": 1, "forces not finite": 1}
    assert report.labels == {"energy": 3, "forces": 3, "stress": 2, "atomic_energies": 2}


def test_a_file_of_its_own_kind(tmp_path):
    ase.io.write(tmp_path / "copper.extxyz", compressed_copper())
    facts = {"license": "MIT", "citation": "A. Author (2026)"}
    assert open_source(tmp_path / "copper.extxyz").kinds == ("copper",)
    source = open_source(tmp_path / "copper.extxyz", kind="metals", facts=facts)
    convert([source], tmp_path / "store")
    manifest = Store(tmp_path / "store").manifest
    assert manifest["kinds"] == [{"name": "metals", "structures": 1, **facts}]
    (told,) = manifest["sources"]
    assert told["name"] == "copper.extxyz"
    assert told["energy_unit"] == "eV"


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(StructureError, match="neither a file nor a store") as error:
        open_source(tmp_path / "missing")
    assert error.value.code == "UnreadableSource"
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(StructureError, match="no corpus file"):
        next(read_corpus(tmp_path / "bad.npz"))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(StructureError, match=r"expected an \.npz with ptr"):
        next(read_corpus(tmp_path / "other.npz"))


# Corpus files


def corpus_of(frames: Frames, kind, pair_id) -> dict[str, np.ndarray]:
    arrays = {
        "ptr": np.concatenate([[0], np.cumsum(frames.n_atoms)]).astype(np.int32),
        "numbers": frames.numbers,
        "positions": frames.positions.astype(np.float32),
        "cell": frames.cell.astype(np.float32),
        "pbc": frames.pbc,
        "energy": frames.energy,
        "forces": frames.forces.astype(np.float32),
        "stress": frames.stress.astype(np.float32),
        "atomic_energy": frames.atomic_energies.astype(np.float32),
        "kind": np.asarray(kind, np.uint8),
        "pair_id": np.asarray(pair_id, np.int32),
    }
    assert set(arrays) == set(CORPUS_ARRAYS)
    return arrays


def test_pairs_of_a_corpus_become_units(tmp_path):
    frames = make_frames(9)
    kind = [0, PLUS, 3, MINUS, MINUS, PLUS, PLUS, MINUS, 14]
    pair = [-1, 4, -1, 7, 4, 7, 9, 8, -1]
    np.savez(tmp_path / "x.npz", **corpus_of(frames, kind, pair))
    (chunk,) = read_corpus(tmp_path / "x.npz")
    order = [0, 1, 4, 2, 5, 3, 6, 7, 8]
    assert chunk.frames.unit.tolist() == [1, 2, 0, 1, 2, 0, 1, 1, 1]
    assert chunk.frames.kind.tolist() == [kind[k] for k in order]
    expected = frames.take(np.array(order))
    assert same(chunk.frames.positions, expected.positions, "f4")
    assert same(chunk.frames.energy, expected.energy)
    assert (chunk.frames.formula_hash == expected.formula_hash).all()


def test_chunks_of_a_corpus_part_no_pair(tmp_path, monkeypatch):
    monkeypatch.setattr("coset.data.sources.CHUNK", 3)
    frames = make_frames(20)
    kind = [PLUS, MINUS] * 10
    np.savez(tmp_path / "x.npz", **corpus_of(frames, kind, np.repeat(np.arange(10), 2)))
    chunks = [chunk.frames for chunk in read_corpus(tmp_path / "x.npz")]
    assert [len(chunk) for chunk in chunks] == [4] * 5
    assert same(join_frames(chunks).forces, frames.forces, "f4")


def test_a_corpus_and_a_store_of_it_give_the_same_store(tmp_path):
    frames = replace(make_frames(30), energy=np.arange(30.0))
    kind = np.arange(30) % len(CORPUS_KINDS)
    np.savez(tmp_path / "x.npz", **corpus_of(frames, kind, np.full(30, -1)))
    report = convert([open_source(tmp_path / "x.npz")], tmp_path / "a")
    convert([open_source(tmp_path / "a")], tmp_path / "b")
    assert report.kinds == dict.fromkeys(CORPUS_KINDS, 2)
    for name in ("shard-00000.bin", "shard-00000.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert Store(tmp_path / "b").kinds == list(CORPUS_KINDS)
