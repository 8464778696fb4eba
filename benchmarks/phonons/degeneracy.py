"""Branches of silicon that symmetry makes equal, along Δ and Λ: how far each route splits them.

Usage: python degeneracy.py [MODEL] [--frames 4] [--threads 1]

One model in single random frames, 4x4x4 primitive cells. Displacements of ±0.01 Å by phonopy, with
its own force constants, symmetrized: irreducible ones, and those of every primitive atom without
use of the space group. Exact derivatives without projection; the same projected on the space group,
which is what `coset phonons` does. The splitting is that of the two transverse acoustic branches,
the largest in any frame, the scatter the largest standard deviation of a frequency over the frames.
Writes benchmarks/results/phonons-degeneracy.json and docs/phonons-degeneracy.png.
"""

import argparse
import json
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from ase import Atoms
from phonon_crystals import case_of
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

import coset
from coset.ase_interface import from_ase
from coset.loading import LoadSettings
from coset.symmetry.average import averaged_properties, sample_rules
from coset.workflows.phonons.interpolation import interpolation
from coset.workflows.phonons.modes import in_thz
from coset.workflows.phonons.samples import (
    exact_evaluator,
    half_mesh,
    mass_roots,
    mesh_samples,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
LINES = {"Δ": (0.5, 0.0, 0.5), "Λ": (0.5, 0.5, 0.5)}
POINTS = 50
ROUTES = {
    "irreducible": "phonopy, irreducible",
    "every atom": "phonopy, every atom",
    "raw": "exact, not projected",
    "project": "exact, projected",
}


def by_phonopy(potential, case, rule, points):
    """Squared frequencies of displacements in one frame, with and without the space group."""
    one = case.one
    cell = PhonopyAtoms(
        numbers=one.atomic_numbers.tolist(),
        cell=one.cell[0].numpy(),
        positions=one.positions.numpy(),
    )
    found = []
    for is_symmetry in (True, False):
        phonon = Phonopy(cell, list(case.mesh), "P", symprec=1e-5, is_symmetry=is_symmetry)
        phonon.generate_displacements(distance=0.01, is_plusminus=True)
        phonon.forces = np.array([forces_of(potential, x, rule) for x in moved_cells(phonon)])
        phonon.produce_force_constants()
        phonon.symmetrize_force_constants()
        found.append(eigenvalues_of(phonon, points))
    return found


def moved_cells(phonon):
    """Displaced supercells."""
    return [from_ase(atoms_of(x)) for x in phonon.supercells_with_displacements]


def atoms_of(cell):
    """The same in ASE."""
    return Atoms(cell.symbols, positions=cell.positions, cell=cell.cell, pbc=True)


def forces_of(potential, one, rule):
    """eV/Å, in the frame of the rule."""
    return averaged_properties(potential, one.to(torch.float64), [rule]).forces.numpy()


def eigenvalues_of(phonon, points):
    """eV/Å²/amu."""
    found = phonon.run_qpoints(points, with_dynamical_matrices=True)
    return np.linalg.eigvalsh(np.array(found.dynamical_matrices))


def by_derivatives(potential, case, rule, points):
    """Squared frequencies of exact derivatives in one frame, raw and projected."""
    half = exact_evaluator(potential, case.one, [rule], case.masses)(half_mesh(case.mesh))
    found = []
    for action in (None, case.action):
        samples = mesh_samples(half, case.mesh, action, case.masses)
        constants = samples.force_constants / mass_roots(case.masses)
        matrices = interpolation(case.one, case.mesh, constants).matrices(points)[0]
        found.append(np.linalg.eigvalsh(matrices))
    return found


def frequencies_of(potential, case, points, frames):
    """THz, by route and frame."""
    found = {route: [] for route in ROUTES}
    for rule in sample_rules(case.one, case.primitive.group, "project", frames, 40):
        values = by_phonopy(potential, case, rule, points)
        values += by_derivatives(potential, case, rule, points)
        for route, own in zip(ROUTES, values, strict=True):
            found[route].append(in_thz(own))
    return {route: np.array(own) for route, own in found.items()}


def figure(found, path):
    """Both transverse acoustic branches of every frame, less their mean after projection."""
    share = np.arange(1, POINTS) / POINTS
    shape = (len(found), len(ROUTES))
    canvas, axes = plt.subplots(*shape, figsize=(9, 4.2), sharex=True, sharey=True)
    for row, (line, by_route) in zip(axes, found.items(), strict=True):
        center = by_route["project"][..., :2].mean(axis=(0, 2))[:, None]
        for axis, (route, label) in zip(row, ROUTES.items(), strict=True):
            for number, one in enumerate(by_route[route]):
                axis.plot(share, one[:, :2] - center, color=f"C{number}", linewidth=1)
            if line == "Δ":
                axis.set_title(label, fontsize=8)
        row[0].set_ylabel({"Δ": "Δ, Γ to X (THz)", "Λ": "Λ, Γ to L (THz)"}[line])
    canvas.supxlabel("fraction of the way", fontsize=9)
    canvas.tight_layout()
    canvas.savefig(path, dpi=150)


def main() -> None:
    """Compute, tell, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="coset-xs-0")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    settings = LoadSettings(dtype="float64", device="cpu")
    potential = coset.load_model(options.model, settings)
    case = case_of(potential, "Si")
    share = np.arange(1, POINTS) / POINTS
    found, table = {}, {}
    for line, end in LINES.items():
        found[line] = frequencies_of(potential, case, np.outer(share, end), options.frames)
        table[line] = {
            "splitting_THz": {
                k: float((x[..., 1] - x[..., 0]).max()) for k, x in found[line].items()
            },
            "scatter_THz": {k: float(x.std(axis=0, ddof=1).max()) for k, x in found[line].items()},
        }
    print(json.dumps(table, indent=1, ensure_ascii=False))
    facts = {"model": Path(options.model).name, "mesh": case.mesh, "frames": options.frames}
    path = ROOT / "benchmarks" / "results" / "phonons-degeneracy.json"
    path.write_text(json.dumps(facts | table, indent=1, ensure_ascii=False) + "\n")
    figure(found, ROOT / "docs" / "phonons-degeneracy.png")


if __name__ == "__main__":
    main()
