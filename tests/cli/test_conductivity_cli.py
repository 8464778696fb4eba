"""coset conductivity with the embedded model, end to end on the smallest supercells."""

import sys

import ase.io
import numpy as np
import pytest
from ase.build import bulk, fcc100

from tests.cli.test_cli import FIELDS, document, run

TINY = ("--supercell", "2x2x2", "--supercell-fc2", "2x2x2", "--mesh", "3x3x3")
FILES = {"conductivity.json", "primitive.vasp", "phono3py_params.yaml", "fc2.hdf5", "fc3.hdf5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("conductivity")
    ase.io.write(where / "Si.cif", bulk("Si", "diamond", 5.45))
    slab = fcc100("Al", (1, 1, 3), vacuum=6.0)
    slab.info.clear()
    ase.io.write(where / "slab.xyz", slab, format="extxyz")
    return where


def test_without_phono3py_the_exit_code_is_69(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "phono3py", None)
    result = run("conductivity", "Si.cif", "--json", cwd=folder)
    assert result.returncode == 69
    assert document(result)["error"]["code"] == "MissingExtraError"
    assert "pip install coset[conductivity]" in result.stderr


@pytest.mark.slow
def test_fields_and_files_of_the_contract(folder):
    pytest.importorskip("phono3py")
    result = run("conductivity", "Si.cif", "slab.xyz", *TINY, "--temperatures", "200,300",
                 "--frames", "2", "--json", "--plot", "--allow-imaginary", cwd=folder)  # fmt: skip
    assert result.returncode == 1, result.stderr  # the slab
    found = document(result)
    first, slab = found["results"]
    assert set(first) >= FIELDS
    assert (first["status"], first["space_group"]) == ("ok", 227)
    assert first["temperature_K"] == [200.0, 300.0]
    kappa, error = (np.array(first[f"kappa{name}_W_per_mK"]) for name in ("", "_error"))
    assert kappa.shape == error.shape == (2, 3, 3)
    assert np.allclose(kappa[0], kappa[0, 0, 0] * np.eye(3), atol=1e-5 * kappa[0, 0, 0])
    assert kappa[0, 0, 0] > kappa[1, 0, 0] > 0.0
    assert found["settings"]["method"] == "wigner"
    assert (slab["status"], slab["code"]) == ("rejected", "CellNotPeriodic")
    names = {path.name for path in (folder / "Si-conductivity").iterdir()}
    assert names == FILES | {"conductivity.png"}
    again = run("conductivity", "Si.cif", *TINY, cwd=folder)
    assert again.returncode == 74


@pytest.mark.slow
def test_the_table(folder):
    pytest.importorskip("phono3py")
    options = ("--no-relax", "--frames", "1", "--method", "rta", "-o", "table", "--allow-imaginary")
    result = run("conductivity", "Si.cif", *TINY, *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    for word in ("κ W/mK", "3x3x3", "Si-conductivity"):
        assert word in result.stderr
    wrong = run("conductivity", "Si.cif", "--mesh", "3x3", "-o", "wrong", cwd=folder)
    assert wrong.returncode == 2
