"""coset elastic and coset eos with the embedded model, end to end."""

import ase.io
import numpy as np
import pytest
from ase.build import bulk, fcc100

from tests.cli.test_cli import FIELDS, document, run

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("elastic")
    ase.io.write(where / "Al.cif", bulk("Al", "fcc", 4.05))
    slab = fcc100("Al", (1, 1, 3), vacuum=6.0)
    slab.info.clear()
    ase.io.write(where / "slab.xyz", slab, format="extxyz")
    return where


@pytest.fixture(scope="module")
def elastic(folder):
    return run("elastic", "Al.cif", "slab.xyz", "--json", "--plot", cwd=folder)


@pytest.fixture(scope="module")
def eos(folder):
    return run("eos", "Al.cif", "slab.xyz", "--json", "--plot", "--range", "0.01", cwd=folder)


def test_elastic_gives_the_fields_of_the_contract(elastic):
    assert elastic.returncode == 1  # the slab
    found = document(elastic)
    assert found["settings"]["dtype"] == "float64"
    first, slab = found["results"]
    assert set(first) >= FIELDS | {"energy_eV", "bulk_modulus_GPa", "shear_modulus_GPa"}
    assert (first["status"], first["space_group"], first["ions"]) == ("ok", 225, "relaxed")
    tensor, errors = (np.array(first[f"elastic_tensor{kind}_GPa"]) for kind in ("", "_error"))
    assert tensor.shape == errors.shape == (6, 6)
    assert np.array_equal(tensor, tensor.T)
    assert np.allclose(tensor[:3, :3].sum() / 9, first["bulk_modulus_GPa"], atol=1e-8)
    assert first["born_stable"] is True
    assert errors[0, 0] > 0.0
    assert first["symmetry_violation_GPa"] > 0.0
    assert (slab["status"], slab["code"]) == ("rejected", "CellNotPeriodic")


def test_elastic_writes_its_folder_once(folder, elastic):
    names = {path.name for path in (folder / "Al-elastic").iterdir()}
    assert names == {"elastic.json", "elastic.png", "relaxed.extxyz"}
    assert (folder / "Al-elastic" / "elastic.png").read_bytes().startswith(PNG)
    (record, _) = document(elastic)["results"]
    relaxed = ase.io.read(folder / "Al-elastic" / "relaxed.extxyz")
    assert relaxed.get_volume() == pytest.approx(record["volume_A3"], rel=1e-6)
    assert not (folder / "slab-elastic").exists()
    again = run("elastic", "Al.cif", "--json", cwd=folder)
    assert again.returncode == 74
    assert "--force" in again.stderr


def test_clamped_ions_pressure_and_tables(folder):
    options = ("--ions", "clamped", "--pressure", "5", "--frames", "3", "-o", "squeezed")
    result = run("elastic", "Al.cif", *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    for word in ("clamped", "stable", "K GPa", "squeezed"):
        assert word in result.stderr


def test_eos_gives_the_fields_of_the_contract(folder, eos):
    assert eos.returncode == 1
    first, slab = document(eos)["results"]
    assert set(first) >= FIELDS | {"volume_A3", "energy_eV", "bulk_modulus_derivative"}
    assert first["status"] == "ok"
    assert len(first["curve"]["volume_A3"]) == len(first["curve"]["energy_eV"]) == 11
    assert slab["code"] == "CellNotPeriodic"
    names = {path.name for path in (folder / "Al-eos").iterdir()}
    assert names == {"eos.json", "eos.png", "volumes.extxyz"}
    assert len(ase.io.read(folder / "Al-eos" / "volumes.extxyz", index=":")) == 11


def test_both_commands_find_one_bulk_modulus(elastic, eos):
    """Single frames against their mean: to the spread of the frames, of 0.2 %."""
    (by_strain, _), (by_volume, _) = (document(one)["results"] for one in (elastic, eos))
    expected = by_strain["bulk_modulus_GPa"]
    assert by_volume["bulk_modulus_GPa"] == pytest.approx(expected, rel=0.01)


def test_the_table_of_eos(folder):
    result = run("eos", "Al.cif", "--points", "5", "-o", "short", "--cell", "fixed", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "Birch and Murnaghan" in result.stderr
    wrong = run("eos", "Al.cif", "--points", "4", "-o", "wrong", cwd=folder)
    assert wrong.returncode == 2
