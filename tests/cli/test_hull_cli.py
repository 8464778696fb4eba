"""coset hull with the embedded model, end to end."""

import json

import ase.io
import numpy as np
import pytest
from ase.build import bulk

from coset.ase_interface.references import read_references
from coset.errors import StructureError
from tests.cli.test_cli import FIELDS, document, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("hull")
    nickel, aluminium = bulk("Ni", "fcc", 3.5), bulk("Al", "fcc", 4.05)
    ase.io.write(where / "NiAl.cif", bulk("NiAl", "cesiumchloride", 2.88))
    ase.io.write(where / "rocksalt.cif", bulk("NiAl", "rocksalt", 5.0))
    (where / "bad.cif").write_text("data_x\n")
    ase.io.write(where / "elements.extxyz", [nickel, aluminium])
    return where


@pytest.fixture(scope="module")
def computed(folder):
    files = ("NiAl.cif", "bad.cif", "rocksalt.cif")
    return run("hull", *files, "--references", "elements.extxyz", "--model-references", "--json",
               "--frames", "3", "--compete", cwd=folder)  # fmt: skip


def test_the_hull_of_the_model(folder, computed):
    assert computed.returncode == 1, computed.stderr  # the bad file
    found = document(computed)
    first, bad, second = found["results"]
    assert set(first) >= FIELDS | {"energy_eV", "stable_probability"}
    assert (first["status"], bad["status"], second["status"]) == ("ok", "rejected", "ok")
    assert found["settings"]["corrections"] is False
    assert first["formation_energy_per_atom_eV"] < -0.2
    assert first["energy_above_hull_per_atom_eV"] < 0.0 < second["energy_above_hull_per_atom_eV"]
    assert first["energy_above_hull_error_per_atom_eV"] > 0.0
    assert first["stable_probability"] > 0.9
    (phase,) = second["decomposition"]
    assert (phase["name"], round(phase["atom_share"], 6)) == ("AlNi", 1.0)
    names = {path.name for path in (folder / "NiAl-hull").iterdir()}
    assert names == {"hull.json", "relaxed.extxyz"}
    assert not (folder / "bad-hull").exists()


def test_levels_corrections_and_tables(folder, computed):
    energies = {"Ni": -5.5, "Al": -3.7}
    rows = [{"formula": s, "energy_per_atom_eV": e, "functional": "PBE"}
            for s, e in energies.items()]  # fmt: skip
    (folder / "pbe.json").write_text(json.dumps(rows))
    (folder / "scan.json").write_text(json.dumps([r | {"functional": "r2SCAN"} for r in rows]))
    options = ("--no-relax", "--frames", "3", "-o", "tables", "--references")
    result = run("hull", "NiAl.cif", *options, "pbe.json", "--corrections", cwd=folder)
    assert result.returncode == 0, result.stderr
    for word in ("formation eV/atom", "0.5 Ni + 0.5 Al", "NiAl-hull"):
        assert word in result.stderr
    wrong = run("hull", "NiAl.cif", *options, "scan.json", "--json", "--force", cwd=folder)
    assert wrong.returncode == 2
    assert document(wrong)["error"]["code"] == "LevelMismatch"
    any_level = run("hull", "NiAl.cif", *options, "scan.json", "--any-level", "--json", "--force",
                    "--corrections", cwd=folder)  # fmt: skip
    assert any_level.returncode == 0
    (record,) = document(any_level)["results"]
    assert record["warnings"] == ["NoCorrection"]
    none = run(
        "hull", "NiAl.cif", *options, "elements.extxyz", "--force", "--any-level", cwd=folder
    )
    assert none.returncode == 65
    assert "--model-references" in none.stderr


def test_references_in_files(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([
        {"formula": "Fe2O3", "energy_per_atom_eV": -2.0, "correction": -1.5, "name": "hematite"},
        {"formula": "O2", "energy_eV": -9.0, "energy_error_eV": 0.1, "level_of_theory": "PBE"},
    ]))  # fmt: skip
    iron, oxygen = read_references(str(path)).entries
    assert (iron.name, iron.energy, iron.correction) == ("hematite", -10.0, -1.5)
    assert dict(iron.composition) == {26: 2, 8: 3}
    assert (oxygen.energy, oxygen.error, oxygen.level_of_theory) == (-9.0, 0.1, "PBE")
    atoms = bulk("NaCl", "rocksalt", 5.6)
    atoms.info |= {"energy_per_atom_eV": -3.0, "functional": "PBE", "correction": 0.25}
    ase.io.write(tmp_path / "frames.extxyz", [atoms])
    (salt,) = read_references(str(tmp_path / "frames.extxyz")).entries
    assert (salt.name, salt.energy, salt.correction) == ("NaCl", -6.0, 0.25)
    assert np.isclose(salt.n_atoms, 2)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"formula": "Fe"}, "energy_eV or energy_per_atom_eV"),
        ({"formula": "Qq", "energy_eV": -1.0}, "no formula"),
        ({"formula": "Fe", "energy_eV": "-1"}, "expected a finite number"),
        ({"formula": "Fe", "energy_eV": -1.0, "energy_per_atom_eV": -1.0}, "both"),
        ({"formula": "Fe", "energy_eV": -1.0, "corection": 1.0}, "did you mean correction"),
        (3, "expected an object"),
    ],
)
def test_bad_references_are_named(tmp_path, row, says):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"formula": "Fe", "energy_eV": -8.0}, row]))
    with pytest.raises(StructureError, match=says) as raised:
        read_references(str(path))
    assert "entry 1" in str(raised.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"a":' * 100_000, "[1, 2", "[\xff"])
def test_references_that_are_no_json_are_refused(tmp_path, text):
    path = tmp_path / "list.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StructureError, match="is no JSON"):
        read_references(str(path))
