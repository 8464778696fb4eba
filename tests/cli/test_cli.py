"""The command line contract: fields, exit codes, files, and nothing but JSON on standard output."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import ase.io
import numpy as np
import pytest
import torch
import typer
from ase.build import bulk, fcc100, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from coset.checkpoint import save_checkpoint
from coset.cli import app, main
from coset.pet.hypers import Target
from tests.factories import tiny_checkpoint

ENERGY_A = Target(name="energy/a", quantity="energy")
ENERGY_B = Target(name="energy/b", quantity="energy")
DIRECT = Target(name="non_conservative_forces", quantity="direct_forces")
FIELDS = {"input", "index", "formula", "n_atoms", "status", "code", "reason", "warnings"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_checkpoint(tiny_checkpoint(), tmp_path_factory.mktemp("model") / "tiny")


def run(*arguments, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, with its exit code and what it wrote."""
    words, output, errors = [str(a) for a in arguments], io.StringIO(), io.StringIO()
    hook, threads = sys.excepthook, torch.get_num_threads()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        mock.patch.object(sys, "argv", ["coset", *words]),
        pytest.raises(SystemExit) as stopped,
    ):
        main()
    sys.excepthook = hook
    torch.set_num_threads(threads)
    code = int(stopped.value.code or 0)
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


def run_process(*arguments, cwd: Path, stdin: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "coset", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture
def crystals(tmp_path) -> Path:
    ase.io.write(tmp_path / "Cu.cif", bulk("Cu", "fcc", 3.7, cubic=True))
    ase.io.write(tmp_path / "Si.vasp", bulk("Si", "diamond", 5.4))
    return tmp_path


def document(result: subprocess.CompletedProcess[str]) -> dict:
    lines = result.stdout.splitlines()
    assert len(lines) == 1, result.stdout + result.stderr
    return json.loads(lines[0])


def test_evaluate_gives_the_fields_of_the_contract(crystals, model):
    result = run("evaluate", "Cu.cif", "Si.vasp", "-m", model, "--json", cwd=crystals)
    assert result.returncode == 0, result.stderr
    found = document(result)
    assert set(found) == {"coset", "command", "model", "settings", "results"}
    assert set(found["model"]) == {"name", "sha256", "level_of_theory"}
    assert [r["input"] for r in found["results"]] == ["Cu.cif", "Si.vasp"]
    for record in found["results"]:
        assert set(record) >= FIELDS
        assert record["status"] == "ok"
        assert np.shape(record["forces_eV_per_A"]) == (record["n_atoms"], 3)
        assert np.shape(record["stress_eV_per_A3"]) == (3, 3)
        assert record["energy_eV"] == pytest.approx(
            record["energy_per_atom_eV"] * record["n_atoms"], abs=1e-12
        )
        assert set(record["certificate"]) == {
            "torque_eV",
            "force_deviation_eV_per_A",
            "stress_deviation_GPa",
            "rotational_error",
        }


def test_undefined_stress_is_null_and_forces_keep_the_order_of_the_input(crystals, model):
    water = molecule("H2O")
    water.numbers[water.numbers == 1] = 6  # an element of the tiny network
    ase.io.write(crystals / "molecule.xyz", water)
    slab = fcc100("Cu", (1, 1, 3), vacuum=6.0)
    slab.info.clear()
    ase.io.write(crystals / "slab.xyz", slab, format="extxyz")
    result = run(
        "evaluate", "molecule.xyz", "slab.xyz", "-m", model, "--json", "--dtype", "float64",
        cwd=crystals,
    )  # fmt: skip
    records = document(result)["results"]
    assert result.returncode == 0, result.stderr
    assert [r["stress_eV_per_A3"] for r in records] == [None, None]
    assert all("StressUndefined" in r["warnings"] for r in records)
    assert records[0]["space_group"] is None


def test_projected_forces_have_the_symmetry_of_the_crystal(crystals, model):
    result = run("evaluate", "Cu.cif", "-m", model, "--json", "--average", "project", cwd=crystals)
    (record,) = document(result)["results"]
    assert np.abs(record["forces_eV_per_A"]).max() < 1e-12
    stress = np.array(record["stress_eV_per_A3"])
    assert np.abs(stress - np.eye(3) * stress[0, 0]).max() < 1e-15
    assert record["certificate"]["stress_deviation_GPa"] > 0.0


def test_relax_writes_what_it_says(crystals, model):
    result = run(
        "relax", "Cu.cif", "Si.vasp", "-m", model, "--json", "--max-steps", "3", cwd=crystals
    )
    records = document(result)["results"]
    assert result.returncode == (0 if all(r["status"] == "converged" for r in records) else 1)
    for record, group, name in zip(
        records, (225, 227), ("Cu-relaxed.cif", "Si-relaxed.vasp"), strict=True
    ):
        expected = {"n_steps", "n_evaluations", "max_force_eV_per_A", "max_stress_GPa"}
        expected |= {"pressure_GPa", "space_group_before", "space_group_after", "rmsd_A"}
        assert set(record) >= FIELDS | expected | {"certificate", "energy_eV"}
        assert record["space_group_before"] == record["space_group_after"] == group
        assert len(ase.io.read(crystals / name)) == record["n_atoms"]
        assert name in result.stderr


def test_one_output_file_holds_all_in_input_order(crystals, model):
    (crystals / "bad.cif").write_text("data_x\nnot a structure\n")
    ase.io.write(crystals / "Pb.cif", bulk("Pb", "fcc", 4.9))
    result = run(
        "relax", "Cu.cif", "bad.cif", "Pb.cif", "Si.vasp", "-m", model, "--json",
        "--max-steps", "1", "-o", "all.extxyz", cwd=crystals,
    )  # fmt: skip
    assert result.returncode == 1
    records = document(result)["results"]
    assert [r["status"] for r in records][1:3] == ["rejected", "rejected"]
    assert records[2]["code"] == "UnknownElement"
    assert records[1]["reason"]
    frames = ase.io.read(crystals / "all.extxyz", index=":")
    assert [str(f.symbols) for f in frames] == ["Cu4", "Pb", "Si2"]


def test_nothing_is_overwritten_without_force(crystals, model):
    arguments = ("relax", "Cu.cif", "-m", model, "--max-steps", "0")
    assert run(*arguments, cwd=crystals).returncode == 1  # not converged, but written
    before = (crystals / "Cu-relaxed.cif").read_bytes()
    refused = run(*arguments, cwd=crystals)
    assert refused.returncode == 74
    assert "--force" in refused.stderr
    assert (crystals / "Cu-relaxed.cif").read_bytes() == before
    assert run(*arguments, "--force", cwd=crystals).returncode == 1


def test_standard_input_and_trajectory(crystals, model):
    text = (
        '2\nLattice="3.2 0 0 0 3.2 0 0 0 3.2" Properties=species:S:1:pos:R:3 pbc="T T T"\n'
        "Cu 0 0 0\nO 1.6 1.6 1.6\n"
    )
    result = run_process(
        "relax", "-", "-m", model, "--json", "--max-steps", "2", "--trajectory",
        cwd=crystals, stdin=text,
    )  # fmt: skip
    (record,) = document(result)["results"]
    assert record["input"] == "-"
    frames = ase.io.read(crystals / "stdin-trajectory.extxyz", index=":")
    assert len(frames) == record["n_evaluations"]
    assert frames[-1].get_potential_energy() == pytest.approx(record["energy_eV"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("evaluate", "Cu.cif", "-m", "no-such-model"), 65, "no-such-model"),
        (("evaluate", "missing.cif", "-m", "MODEL"), 65, "missing.cif"),
        (("evaluate", "Cu.cif", "-m", "Cu.cif"), 65, ""),
        (("evaluate", "Cu.cif", "-m", "MODEL", "--dtype", "float16"), 2, "float16"),
        (("evaluate", "Cu.cif", "-m", "MODEL", "--target", "dos"), 2, "energy"),
        (("evaluate", "Cu.cif", "-m", "MODEL", "--device", "cuda:7"), 2, "cuda:7"),
        (("relax", "Cu.cif", "-m", "MODEL", "--fmax", "-1"), 2, "force_tolerance"),
        (("relax", "Cu.cif", "-m", "MODEL", "--unknown"), 2, "unknown"),
        (("models", "get", "no-such-model"), 65, "no-such-model"),
        (("info", "MODEL"), 0, ""),
        (("models",), 0, "pet-mad-s"),
    ],
)
def test_exit_codes(crystals, model, arguments, code, says):
    chosen = [model if a == "MODEL" else a for a in arguments]
    result = run(*chosen, cwd=crystals)
    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_several_targets_and_none_chosen_lists_them(crystals, tmp_path):
    path = save_checkpoint(tiny_checkpoint(targets=(ENERGY_A, ENERGY_B)), tmp_path / "variants")
    refused = run("evaluate", "Cu.cif", "-m", path, cwd=crystals)
    assert refused.returncode == 2
    assert "energy/a" in refused.stderr
    assert "energy/b" in refused.stderr
    energies = []
    for name in ("energy/a", "energy/b"):
        result = run("evaluate", "Cu.cif", "-m", path, "--json", "--target", name, cwd=crystals)
        energies.append(document(result)["results"][0]["energy_eV"])
    assert energies[0] != energies[1]


def test_direct_forces_are_used_when_asked(crystals, tmp_path):
    targets = (Target(name="energy", quantity="energy"), DIRECT)
    path = save_checkpoint(tiny_checkpoint(targets=targets), tmp_path / "direct")
    found = {}
    for forces in ("direct", "conservative"):
        result = run("evaluate", "Si.vasp", "-m", path, "--json", "--forces", forces, cwd=crystals)
        assert result.returncode == 0, result.stderr
        found[forces] = document(result)["results"][0]
    assert found["direct"]["energy_eV"] == pytest.approx(
        found["conservative"]["energy_eV"], abs=1e-6
    )
    assert found["direct"]["forces_eV_per_A"] != found["conservative"]["forces_eV_per_A"]
    assert np.abs(np.sum(found["direct"]["forces_eV_per_A"], axis=0)).max() < 1e-9
    assert found["direct"]["certificate"] is None


def test_convert_and_info_agree(crystals, model):
    golden = Path(__file__).parents[1] / "golden" / "solver.ckpt"
    result = run("convert", golden, "-o", "converted", "--json", cwd=crystals)
    assert result.returncode == 0, result.stderr
    facts = document(result)
    shown = document(run("info", "converted", "--json", cwd=crystals))
    assert shown["parameters"] == facts["parameters"]
    assert shown["adaptive_cutoff"] == "solver10"
    refused = run("convert", golden, "-o", "converted", cwd=crystals)
    assert refused.returncode == 65
    rewritten = run("convert", golden, "-o", "exact", "--converged", "--json", cwd=crystals)
    assert document(rewritten)["adaptive_cutoff"] == "converged"
    assert "solver10 -> converged" in document(rewritten)["conversions"]
    values = [
        document(run("evaluate", "Cu.cif", "-m", m, "--json", "--dtype", "float64", cwd=crystals))
        for m in (golden, "converted", "exact")
    ]
    energies = [v["results"][0]["energy_eV"] for v in values]
    assert energies[0] == energies[1]
    assert energies[2] == pytest.approx(energies[0], abs=1e-9)


def test_doctor_finds_a_file_in_the_wrong_unit(crystals):
    sound = run("doctor", "Cu.cif", "--json", cwd=crystals)
    assert sound.returncode == 0, sound.stdout
    atoms = bulk("Cu", "fcc", 3.6 / 0.529177)
    ase.io.write(crystals / "bohr.cif", atoms)
    found = run("doctor", "bohr.cif", "--json", cwd=crystals)
    assert found.returncode == 1
    assert document(found)["findings"][0]["code"] == "UnitsSuspicious"


def test_doctor_finds_forces_of_the_wrong_sign_or_unit(crystals):
    for sign, code in ((1.0, 0), (-1.0, 1), (51.42, 1)):
        frames = []
        for step in range(8):
            atoms = bulk("Cu", "fcc", 3.6, cubic=True)
            atoms.rattle(0.02 * (step + 1), seed=1)
            atoms.calc = EMT()
            labels = {"energy": atoms.get_potential_energy(), "forces": sign * atoms.get_forces()}
            atoms.calc = SinglePointCalculator(atoms, **labels)
            frames.append(atoms)
        ase.io.write(crystals / "labels.extxyz", frames)
        result = run("doctor", "labels.extxyz", "--json", cwd=crystals)
        assert result.returncode == code, result.stdout


def test_an_interrupted_relaxation_writes_what_it_has(crystals, model):
    big = bulk("Cu", "fcc", 3.6, cubic=True) * (4, 4, 4)
    big.rattle(0.2, seed=0)
    ase.io.write(crystals / "big.extxyz", big)
    command = [
        sys.executable, "-m", "coset", "relax", "big.extxyz", "-m", str(model),
        "--symmetry", "free", "--fmax", "1e-12", "--max-steps", "100000", "--trajectory",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=crystals, stderr=subprocess.PIPE, text=True)
    trajectory = crystals / "big-trajectory.extxyz"
    deadline = time.monotonic() + 60.0
    while not (trajectory.exists() and trajectory.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted" in errors
    assert len(ase.io.read(crystals / "big-relaxed.extxyz")) == 256


def test_results_do_not_depend_on_the_batch(crystals, model):
    together = document(
        run(
            "evaluate",
            "Cu.cif",
            "Si.vasp",
            "-m",
            model,
            "--json",
            "--dtype",
            "float64",
            cwd=crystals,
        )
    )
    alone = document(
        run("evaluate", "Si.vasp", "-m", model, "--json", "--dtype", "float64", cwd=crystals)
    )
    first, second = together["results"][1], alone["results"][0]
    difference = torch.tensor(first["forces_eV_per_A"]) - torch.tensor(second["forces_eV_per_A"])
    assert float(difference.abs().max()) < 1e-10


def test_a_rejected_structure_takes_nothing_from_the_others(crystals, model):
    ase.io.write(crystals / "Pb.cif", bulk("Pb", "fcc", 4.9))
    result = run(
        "relax", "Cu.cif", "Pb.cif", "Si.vasp", "-m", model, "--json", "--max-steps", "1",
        "-o", "all.extxyz", cwd=crystals,
    )  # fmt: skip
    records = document(result)["results"]
    frames = ase.io.read(crystals / "all.extxyz", index=":")
    assert [f.info["coset_input"] for f in frames] == ["Cu.cif", "Pb.cif", "Si.vasp"]
    assert [f.info["coset_status"] for f in frames] == [r["status"] for r in records]
    for k in (0, 2):
        energy = frames[k].get_potential_energy()
        assert energy == pytest.approx(records[k]["energy_eV"], abs=1e-6)
        assert frames[k].get_forces().shape == (len(frames[k]), 3)
    assert frames[1].calc is None


def test_a_rejected_structure_alone_is_not_called_relaxed(crystals, model):
    ase.io.write(crystals / "Pb.cif", bulk("Pb", "fcc", 4.9))
    result = run("relax", "Pb.cif", "-m", model, cwd=crystals)
    assert result.returncode == 65
    assert "nothing to write" in result.stderr
    assert not list(crystals.glob("*relaxed*"))


@pytest.mark.parametrize("command", ["relax", "evaluate"])
def test_one_file_for_all_is_extended_xyz(crystals, model, command):
    result = run(command, "Cu.cif", "-m", model, "-o", "out.cif", cwd=crystals)
    assert result.returncode == 2
    assert not (crystals / "out.cif").exists()


def test_trajectories_never_mix_or_overwrite(crystals, model):
    for folder, metal in (("a", "Cu"), ("b", "Cu")):
        (crystals / folder).mkdir()
        ase.io.write(crystals / folder / "x.cif", bulk(metal, "fcc", 3.6, cubic=folder == "a"))
    arguments = ("relax", "a/x.cif", "b/x.cif", "-m", model, "--max-steps", "1", "--trajectory")
    arguments = (*arguments, "-o", "new/")
    assert run(*arguments, cwd=crystals).returncode in (0, 1)
    sizes = []
    for name in ("x-trajectory", "x-trajectory-2"):
        frames = ase.io.read(crystals / "new" / f"{name}.extxyz", index=":")
        sizes.append({len(f) for f in frames})
    assert sizes == [{4}, {1}]
    for path in (crystals / "new").glob("x-relaxed*"):
        path.unlink()
    before = (crystals / "new" / "x-trajectory.extxyz").read_bytes()
    assert run(*arguments, cwd=crystals).returncode == 74
    assert (crystals / "new" / "x-trajectory.extxyz").read_bytes() == before


@pytest.mark.parametrize("command", ["relax", "evaluate"])
def test_json_is_one_document_whatever_happens(crystals, model, command):
    (crystals / "empty.xyz").write_text("")
    unusable = run(command, "empty.xyz", "-m", model, "--json", cwd=crystals)
    assert unusable.returncode == 65
    assert document(unusable)["results"][0]["code"] == "EmptyFile"
    missing = run(command, "Cu.cif", "-m", "no-model", "--json", cwd=crystals)
    assert document(missing)["error"]["code"] == "ModelNotFound"
    (crystals / "out.extxyz").write_text("precious")
    exists = run(command, "Cu.cif", "-m", model, "--json", "-o", "out.extxyz", cwd=crystals)
    assert exists.returncode == 74
    assert document(exists)["error"]["code"] == "CannotWrite"


def test_names_are_printed_as_they_are(crystals, model):
    ase.io.write(crystals / "Cu[old].cif", bulk("Cu", "fcc", 3.6))
    shown = run("evaluate", "Cu[old].cif", "-m", model, cwd=crystals)
    assert "Cu[old].cif" in shown.stderr
    refused = run("info", "no[/such]", cwd=crystals)
    assert refused.returncode == 65
    assert "no[/such]" in refused.stderr


def test_debug_keeps_the_exit_code(crystals, capfd):
    assert run("--debug", "evaluate", "Cu.cif", "-m", "no-model", cwd=crystals).returncode == 65


def test_direct_forces_are_projected_and_averaged(crystals, model):
    deviation = {}
    for average in ("none", "project", "standard"):
        options = ("--forces", "direct", "--average", average)
        result = run("evaluate", "Si.vasp", "-m", model, "--json", *options, cwd=crystals)
        assert result.returncode == 0, result.stderr
        (record,) = document(result)["results"]
        largest = np.abs(record["forces_eV_per_A"]).max()
        assert (largest < 1e-12) == (average != "none")  # no free coordinate in diamond
        deviation[average] = record["certificate"]["force_deviation_eV_per_A"]
    assert deviation["none"] == deviation["project"] > deviation["standard"]


def test_diagnose_says_what_averaging_would_leave(crystals, model):
    plot = ("--plot", "spectrum.png")
    result = run("diagnose", "Cu.cif", "-m", model, "--json", *plot, cwd=crystals)
    (record,) = document(result)["results"]
    assert result.returncode == 0, result.stderr
    assert record["point_group"] == "m-3m"
    assert {s["degree"] for s in record["spectrum"]} == {4, 6, 8, 9, 10}
    levels = {level["level"]: level for level in record["levels"]}
    assert [levels[name]["n_evaluations"] for name in ("project", "standard", "tight")] == [1, 4, 7]
    left = [levels[name]["residual_per_atom_eV"] for name in ("none", "standard", "tight")]
    assert left[0] > left[1] > left[2]
    assert (crystals / "spectrum.png").stat().st_size > 10_000
    again = run("diagnose", "Cu.cif", "-m", model, *plot, cwd=crystals)
    assert again.returncode == 2


SHARED = {"--model", "--target", "--device", "--dtype", "--threads", "--json", "--drop-ghosts"}
SHARED |= {"--ignore-charge", "--output", "--force"}
OPTIONS = {
    "evaluate": SHARED | {"--forces", "--average", "--rotational-tolerance", "--symprec"},
    "relax": SHARED
    | {"--symmetry", "--symprec", "--fmax", "--smax", "--max-steps", "--cell", "--pressure"}
    | {"--tight", "--optimizer", "--trajectory", "--average", "--rotational-tolerance"}
    | {"--check-stability"},
    "elastic": SHARED
    | {"--ions", "--no-relax", "--pressure", "--symprec", "--average", "--frames", "--plot"},
    "eos": SHARED
    | {"--range", "--points", "--cell", "--no-relax", "--symprec", "--average", "--plot"}
    | {"--quasi-harmonic", "--highest"},
    "phonons": SHARED
    | {"--method", "--supercell", "--mesh", "--path", "--symprec", "--average", "--frames"}
    | {"--temperatures", "--born", "--no-relax", "--follow", "--double", "--quick", "--plot"},
    "conductivity": SHARED
    | {"--method", "--temperatures", "--mesh", "--supercell", "--supercell-fc2", "--derivatives"}
    | {"--amplitude", "--no-isotopes", "--boundary", "--allow-imaginary", "--no-relax", "--born"}
    | {"--symprec", "--average", "--frames", "--plot"},
    "hull": SHARED
    | {"--references", "--model-references", "--any-level", "--corrections", "--compete"}
    | {"--no-relax", "--fmax", "--symprec", "--average", "--frames"},
    "bench": {"--data", "--model", "--all", "--limit", "--plot", "--target", "--output"}
    | {"--device", "--dtype", "--threads", "--json"},
    "diagnose": (SHARED - {"--output"}) | {"--equivariance", "--max-degree", "--symprec", "--plot"},
    "convert": {"--output", "--converged", "--verify", "--force", "--half", "--json"},
    "info": {"--model", "--json"},
    "models": {"--json"},
    "doctor": {"--json"},
    "train": {"--resume", "--set", "--max-time", "--threads", "--json"},
    "plan": {"--set", "--json"},
    "data": set(),
}


def test_the_options_are_a_promise():
    command = typer.main.get_command(app)
    found = {
        name: {opt for p in sub.params for opt in p.opts if opt.startswith("--")} - {"--help"}
        for name, sub in command.commands.items()
    }
    assert found == OPTIONS


@pytest.mark.parametrize("command", ["relax", "evaluate"])
def test_results_that_cannot_be_written_are_still_one_document(crystals, model, command):
    where = "coset.cli.outputs" if command == "relax" else "coset.cli.evaluate"
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch(f"{where}.write_structures", full):
        result = run(command, "Cu.cif", "-m", model, "--json", "-o", "out.extxyz", cwd=crystals)
    assert result.returncode == 74
    assert "No space left" in result.stderr
    assert "energy_eV" in document(result)["results"][0]
