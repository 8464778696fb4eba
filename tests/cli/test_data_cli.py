"""coset data: what it writes, counts and says, and its exit codes."""

import signal
from contextlib import contextmanager
from unittest import mock

import ase.io
import numpy as np
import pytest
import typer
from ase.build import bulk
from ase.calculators.emt import EMT

from coset.cli import app
from coset.data.store import Store
from tests.cli.test_cli import document, run

FORMULAS = ("Cu", "Ni", "Al", "Pd", "Ag", "Au", "Pt")
HELD_OUT = {"Ni", "Pd"}


@pytest.fixture
def metals(tmp_path):
    """Three frames each of a few metals; Ni and Pd are among the formulas held out."""
    frames = []
    for symbol in FORMULAS:
        for scale in (0.95, 1.0, 1.05):
            atoms = bulk(symbol, cubic=True)
            atoms.set_cell(atoms.cell * scale, scale_atoms=True)
            atoms.rattle(0.03, seed=1)
            atoms.calc = EMT()
            atoms.get_stress()
            frames.append(atoms)
    ase.io.write(tmp_path / "metals.extxyz", frames)
    return tmp_path


def test_convert_writes_what_it_says(metals):
    result = run(
        "data", "convert", "metals.extxyz", "-o", "store", "--license", "MIT", "--citation", "us",
        "--json", cwd=metals,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = document(result)
    assert found["command"] == "data convert"
    assert found["settings"]["energy_unit"] == "eV"
    (told,) = found["results"]
    assert told["status"] == "ok"
    assert told["read"] == told["written"] == 21
    assert told["elements"]["Cu"] == {"structures": 3, "atoms": 12}
    store = Store(metals / "store")
    assert len(store) == 21
    assert store.manifest["kinds"] == [
        {"name": "metals", "structures": 21, "license": "MIT", "citation": "us"}
    ]
    assert "wrote store: 21 of 21 structures" in result.stderr


@pytest.mark.parametrize(("part", "expected"), [("train", 15), ("valid", 6), ("all", 21)])
def test_parts_by_formula(metals, part, expected):
    result = run(
        "data", "convert", "metals.extxyz", "-o", "store", "--split", part, "--json", cwd=metals
    )
    (told,) = document(result)["results"]
    assert told["written"] == expected
    assert sum(told["skipped"].values()) == 21 - expected
    elements = {"train": set(FORMULAS) - HELD_OUT, "valid": HELD_OUT, "all": set(FORMULAS)}
    assert set(told["elements"]) == elements[part]
    assert ("skipped" in result.stderr) == (part != "all")


def test_split_parts_a_store(metals):
    assert run("data", "convert", "metals.extxyz", "-o", "all", cwd=metals).returncode == 0
    result = run("data", "split", "all", "-o", "parts", "--json", cwd=metals)
    assert result.returncode == 0, result.stderr
    assert [told["written"] for told in document(result)["results"]] == [15, 6]
    for name, n_frames in (("train", 15), ("valid", 6)):
        assert len(Store(metals / "parts" / name)) == n_frames
        assert run("data", "verify", metals / "parts" / name, cwd=metals).returncode == 0


def test_shift_and_units(metals):
    for name, options in {
        "plain": (),
        "shifted": ("--shift", "Cu=-0.5", "--shift", "Al=1"),
        "hartree": ("--energy-unit", "Ha"),
        "turned": ("--stress-sign", "compression"),
    }.items():
        arguments = ("data", "convert", "metals.extxyz", "-o", name, *options)
        assert run(*arguments, cwd=metals).returncode == 0
    rows = np.arange(21)
    plain, shifted, hartree, turned = (
        Store(metals / name).read(rows) for name in ("plain", "shifted", "hartree", "turned")
    )
    moved = (shifted.energy - plain.energy) / 4
    expected = {"Cu": -0.5, "Al": 1.0}
    assert np.allclose(moved, np.repeat([expected.get(s, 0.0) for s in FORMULAS], 3), atol=1e-9)
    assert np.allclose(hartree.energy, plain.energy * 27.211386245988, rtol=1e-12)
    assert np.allclose(turned.stress, -plain.stress, atol=1e-9)
    assert Store(metals / "shifted").manifest["shifts_eV_per_atom"] == {"Cu": -0.5, "Al": 1.0}


def test_info_shows_elements_licenses_and_labels(metals):
    run("data", "convert", "metals.extxyz", "-o", "store", "--license", "MIT", cwd=metals)
    facts = document(run("data", "info", "store", "--json", cwd=metals))
    assert facts["structures"] == 21
    assert facts["licenses"] == ["MIT"]
    assert facts["labels"] == {"energy": 21, "forces": 21, "stress": 21, "atomic_energies": 21}
    assert facts["periodic_directions"] == {"3": 21, "2": 0, "1": 0, "0": 0}
    shown = run("data", "info", "store", cwd=metals)
    assert shown.returncode == 0
    assert not shown.stdout
    for word in ("Pd 3", "MIT", "metals.extxyz", "max force"):
        assert word in shown.stderr


def test_verify_finds_damage(metals):
    run("data", "convert", "metals.extxyz", "-o", "store", cwd=metals)
    sound = run("data", "verify", "store", "--json", cwd=metals)
    assert sound.returncode == 0
    assert document(sound)["results"] == [{"store": "store", "status": "ok", "problems": []}]
    file = metals / "store" / "shard-00000.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    damaged = run("data", "verify", "store", "--json", cwd=metals)
    assert damaged.returncode == 1
    (told,) = document(damaged)["results"]
    assert told["status"] == "failed"
    assert "record 0 is damaged (crc32)" in told["problems"]
    assert "record 0 is damaged (crc32)" in damaged.stderr
    file.write_bytes(content[:-8])
    assert "bytes, expected" in run("data", "verify", "store", cwd=metals).stderr


def test_a_stopped_conversion_is_taken_up_again(metals):
    @contextmanager
    def interrupting(total, what):
        yield lambda done, note: signal.raise_signal(signal.SIGINT)

    arguments = ("data", "convert", "metals.extxyz", "-o", "store", "--shard-bytes", "900")
    with (
        mock.patch("coset.data.sources.CHUNK", 5),
        mock.patch("coset.cli.data.progress", interrupting),
    ):
        stopped = run(*arguments, cwd=metals)
    assert stopped.returncode == 130
    assert "the same command goes on" in stopped.stderr
    assert not (metals / "store" / "manifest.json").exists()
    (told,) = document(run(*arguments, "--json", cwd=metals))["results"]
    assert 0 < told["resumed"] < told["written"] == 21
    assert run("data", "verify", "store", cwd=metals).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("convert", "missing.extxyz", "-o", "new"), 65, "missing.extxyz"),
        (("convert", "metals.extxyz", "-o", "store"), 2, "finished store"),
        (("convert", "metals.extxyz", "-o", "new", "--energy-unit", "erg"), 2, "erg"),
        (("convert", "metals.extxyz", "-o", "new", "--shift", "Cu"), 2, "SYMBOL=EV"),
        (("convert", "metals.extxyz", "-o", "new", "--shift", "Xx=1"), 2, "Xx"),
        (("convert", "metals.extxyz", "-o", "new", "--held-out", "2"), 2, "share"),
        (("convert", "metals.extxyz", "-o", "new", "--label-prefix", "x_"), 65, "no usable label"),
        (("convert", "metals.extxyz"), 2, "output"),
        (("info", "metals.extxyz"), 2, "no finished store"),
        (("verify", "nowhere"), 2, "no finished store"),
        (("split", "store", "-o", "metals.extxyz"), 74, "metals.extxyz"),
    ],
)
def test_exit_codes(metals, arguments, code, says):
    run("data", "convert", "metals.extxyz", "-o", "store", cwd=metals)
    result = run("data", *arguments, cwd=metals)
    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_the_options_are_a_promise():
    group = typer.main.get_command(app).commands["data"]
    found = {
        name: {opt for p in sub.params for opt in p.opts if opt.startswith("--")} - {"--help"}
        for name, sub in group.commands.items()
    }
    assert found == {
        "convert": {"--output", "--split", "--held-out", "--kind", "--license", "--citation"}
        | {"--energy-unit", "--length-unit", "--stress-sign", "--label-prefix", "--shift"}
        | {"--shard-bytes", "--json"},
        "info": {"--json"},
        "verify": {"--json"},
        "split": {"--output", "--held-out", "--json"},
    }
