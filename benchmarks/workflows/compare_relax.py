"""Relax the example crystals: one batched call against ASE with FixSymmetry, one by one.

Usage: python compare_relax.py MODEL FILES... [--threads 2] [--fmax 0.02] [--smax 0.1]

The same potential everywhere. ASE runs FixSymmetry with FrechetCellFilter and BFGS or FIRE until
the same thresholds hold (force in eV/Å, stress in GPa). Prints evaluations, wall time and whether
the space group at symprec 1e-5 is that of the input at 1e-2, and adds JSON rows to
benchmarks/results/relax.jsonl.
"""

import argparse
import json
import platform
import time
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE

import coset
from coset.ase_interface import Calculator, from_ase
from coset.structures import concatenate
from coset.symmetry.crystal import space_group_number
from coset.units import GPA_PER_EV_PER_A3

RESULTS = Path(__file__).parent.parent / "results" / "relax.jsonl"
MAX_STEPS = 500


def relax_with_ase(potential, loaded, optimizer, settings):
    """Status, evaluations, energy per atom and final space group of one crystal."""
    atoms = loaded.atoms.copy()
    atoms.set_constraint(FixSymmetry(atoms, symprec=settings.symprec))
    counter = Counted(potential)
    atoms.calc = Calculator(counter)
    run = optimizer(FrechetCellFilter(atoms), logfile=None)
    converged = False
    for _ in run.irun(fmax=0.0, steps=MAX_STEPS):
        force = np.linalg.norm(atoms.get_forces(), axis=1).max()
        stress = np.abs(atoms.get_stress()).max() * GPA_PER_EV_PER_A3
        converged = force <= settings.force_tolerance and stress <= settings.stress_tolerance_GPa
        if converged:
            break
    energy = atoms.get_potential_energy() / len(atoms)
    return converged, counter.calls, energy, space_group_number(from_ase(atoms), 1e-5)


class Counted:
    """A potential that counts its calls."""

    def __init__(self, potential):
        """No calls yet."""
        self.potential, self.calls = potential, 0

    def __getattr__(self, name):
        """Everything else is the potential's."""
        return getattr(self.potential, name)

    def __call__(self, structures):
        """Evaluate and count."""
        self.calls += 1
        return self.potential(structures)


def relax_with_coset(potential, loaded, settings):
    """All crystals in one call; a row of the table, and one line for each crystal."""
    structures = concatenate([one.structures for one in loaded])
    start = time.perf_counter()
    results = coset.relax(potential, structures, settings)
    seconds = time.perf_counter() - start
    for one, result in zip(loaded, results, strict=True):
        print(
            f"{Path(one.input).name:24s} {result.status:14s} {result.code:12s}"
            f" {result.n_evaluations:4d} evaluations, group {result.space_group_before} ->"
            f" {result.space_group_after}, {result.reason}"
        )
    return {
        "code": f"coset {settings.optimizer}, one batch",
        "seconds": seconds,
        "evaluations": sum(r.n_evaluations for r in results),
        "converged": sum(r.status == "converged" for r in results),
        "group_kept": sum(r.space_group_after == r.space_group_before for r in results),
        "energies": [r.energy / len(r.structures.atomic_numbers) for r in results],
    }


def relax_one_by_one(potential, loaded, optimizer, settings):
    """The same with ASE; a row of the table."""
    before = [space_group_number(one.structures, settings.symprec) for one in loaded]
    start = time.perf_counter()
    found = [relax_with_ase(potential, one, optimizer, settings) for one in loaded]
    return {
        "code": f"ASE FixSymmetry {optimizer.__name__}, one by one",
        "seconds": time.perf_counter() - start,
        "evaluations": sum(f[1] for f in found),
        "converged": sum(bool(f[0]) for f in found),
        "group_kept": sum(f[3] == number for f, number in zip(found, before, strict=True)),
        "energies": [f[2] for f in found],
    }


def main():
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fmax", type=float, default=0.02)
    parser.add_argument("--smax", type=float, default=0.1)
    parser.add_argument("--dtype", default="mixed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    potential = coset.load_model(options.model, coset.LoadSettings(dtype=options.dtype))
    loaded = coset.read_structures(options.files)
    settings = coset.RelaxSettings(
        force_tolerance=options.fmax, stress_tolerance_GPa=options.smax, max_steps=MAX_STEPS
    )
    potential(loaded[0].structures)
    rows = [
        relax_with_coset(potential, loaded, settings),
        relax_with_coset(potential, loaded, replace(settings, optimizer="fire")),
        relax_one_by_one(potential, loaded, BFGS, settings),
        relax_one_by_one(potential, loaded, FIRE, settings),
    ]
    report(rows, len(loaded), options)


def report(rows, count, options):
    """Print the table and keep the rows."""
    RESULTS.parent.mkdir(exist_ok=True)
    reference = rows[0]["energies"]
    for row in rows:
        worst = float(np.abs(np.subtract(row.pop("energies"), reference)).max())
        print(
            f"{row['code']:36s} {row['seconds']:8.1f} s {row['evaluations']:6d} evaluations"
            f" {row['converged']:3d}/{count} converged {row['group_kept']:3d}/{count} groups kept,"
            f" energies within {1e3 * worst:.2g} meV/atom of the first"
        )
        row |= {
            "benchmark": "relax",
            "crystals": count,
            "largest_energy_difference_eV_per_atom": worst,
            "threads": options.threads,
            "machine": platform.machine(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
