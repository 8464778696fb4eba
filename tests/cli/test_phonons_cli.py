"""The command `coset phonons`: fields, files, exit codes."""

import json

import ase.io
import numpy as np
import phonopy
import pytest
from ase.build import bulk
from test_cli import document, run

from coset.cli.words import mesh_of, path_of, temperatures_of
from coset.errors import ConfigError

QUICK = ("--supercell", "2x2x2", "--mesh", "3x3x3", "--frames", "4", "--threads", "1")
FILES = {"phonons.json", "primitive.vasp", "phonopy_params.yaml", "FORCE_CONSTANTS"}


@pytest.fixture
def silicon(tmp_path):
    ase.io.write(tmp_path / "Si.cif", bulk("Si", "diamond", 5.43))
    return tmp_path


def test_silicon_from_end_to_end(silicon):
    result = run("phonons", "Si.cif", "--json", "--plot", *QUICK, cwd=silicon)
    assert result.returncode == 0, result.stderr
    (record,) = document(result)["results"]
    assert record["status"] == "ok"
    frequencies, q = np.array(record["frequency_THz"]), np.array(record["q_points"])
    assert frequencies.shape == np.shape(record["frequency_error_THz"]) == (len(q), 6)
    assert (np.diff(frequencies, axis=1) >= 0.0).all()
    assert record["verdict"] == "stable"
    # the Raman line of silicon is at 15.5 THz, of this small model lower
    gamma = frequencies[np.abs(q).max(axis=1) < 1e-9]
    assert np.abs(gamma[:, :3]).max() == 0.0
    assert 9.0 < gamma[0, 3] == pytest.approx(gamma[0, 5], abs=1e-6)
    assert record["space_group"] == 227
    assert record["temperature_K"][3] == 300.0
    assert len(record["free_energy_eV"]) == 11
    folder = silicon / "Si-phonons"
    assert {path.name for path in folder.iterdir()} == FILES | {"phonons.png"}
    assert json.loads((folder / "phonons.json").read_text())["verdict"] == "stable"
    theirs = phonopy.load(folder / "phonopy_params.yaml").run_qpoints(q[::40]).frequencies
    assert np.abs(theirs - frequencies[::40]).max() < 1e-5


def test_titanium_falls_from_bcc_to_hcp(tmp_path):
    """The path of Burgers: the transverse mode at N, then the cell."""
    ase.io.write(tmp_path / "Ti.cif", bulk("Ti", "bcc", 3.25))
    result = run("phonons", "Ti.cif", "--follow", "--quick", "--json", *QUICK, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (record,) = document(result)["results"]
    assert (record["space_group"], record["verdict"]) == (229, "unstable")
    (listed,) = [one for one in record["instabilities"] if "minimum 0" in one["outcomes"]]
    assert sorted(np.abs(listed["q_point"])) == [0.0, 0.0, 0.5]
    assert listed["frequency_THz"] < -10 * listed["frequency_error_THz"]
    below = record["minima"][0]
    assert (below["space_group"], below["n_atoms"], below["parent"]) == (194, 2, -1)
    assert below["accepted"]
    assert below["energy_drop_per_atom_eV"] > 10 * below["energy_drop_error_per_atom_eV"]
    cell = ase.io.read(tmp_path / "Ti-phonons" / "minimum-0.vasp").cell
    edge = cell.lengths().min()
    # c/a of hcp titanium is 1.59
    assert cell.volume / (edge**3 * np.sqrt(0.75)) == pytest.approx(1.6, abs=0.06)
    assert "nothing to follow" not in result.stderr


def test_what_is_stable_is_not_followed(silicon):
    result = run("phonons", "Si.cif", "--follow", "--quick", *QUICK, cwd=silicon)
    assert "Si.cif: nothing to follow, it is stable" in result.stderr


def test_nothing_is_overwritten(silicon):
    (silicon / "Si-phonons").mkdir()
    result = run("phonons", "Si.cif", *QUICK, cwd=silicon)
    assert result.returncode == 74
    assert "--force" in result.stderr


def test_results_land_where_asked_with_human_words(silicon):
    result = run(
        "phonons", "Si.cif", "-o", "out", "--method", "displacements", "--no-relax",
        "--temperatures", "300", *QUICK, cwd=silicon,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "stable" in result.stderr
    assert {path.name for path in (silicon / "out" / "Si-phonons").iterdir()} == FILES


def test_a_bad_file_is_rejected(silicon):
    (silicon / "bad.cif").write_text("nothing")
    result = run("phonons", "bad.cif", "--json", *QUICK, cwd=silicon)
    assert result.returncode == 65
    assert document(result)["results"][0]["status"] == "rejected"


def test_words_for_meshes_and_temperatures():
    assert mesh_of("4x4x2", "mesh") == mesh_of("4 4 2", "mesh") == (4, 4, 2)
    assert mesh_of(None, "mesh") is None
    assert temperatures_of("0:300:100") == (0.0, 100.0, 200.0, 300.0)
    assert path_of("auto") is None
    assert path_of("G-X-U|K Γ,GAMMA-L") == (("Γ", "X", "U"), ("K", "Γ"), ("Γ", "L"))
    for text in ("", "X", "G-X|", "G-GAMMA", "X-X-L"):
        with pytest.raises(ConfigError, match="path"):
            path_of(text)
    assert temperatures_of("77,300") == (77.0, 300.0)
    for text in ("4x4", "0x1x1", "a"):
        with pytest.raises(ConfigError):
            mesh_of(text, "mesh")
    for text in ("hot", "0:1", "0:1:0"):
        with pytest.raises(ConfigError):
            temperatures_of(text)


def test_settings_without_meaning_are_refused_at_once(silicon):
    (silicon / "charges").write_bytes(b"\xff\xfe\x00\x01")
    for option, word in (("--temperatures", "1000:0:100"), ("--born", "charges")):
        result = run("phonons", "Si.cif", option, word, *QUICK, cwd=silicon)
        assert result.returncode == 2, result.stderr
        assert option[2:] in result.stderr
