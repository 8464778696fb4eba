"""Do cubic perovskites leave cubic by themselves, or because a model is not invariant?

Usage: python perovskites.py [--model NAME] [--threads 1] [--out FILE.json]

Every ABO3 starts in the cubic five-atom cell, turned at random, and relaxes (float64, 1e-4 eV/Å,
0.01 GPa) without and with its group. A plain relaxation of an unconstrained model leaves cubic
whatever the physics is. With the group kept, the Hessian at Gamma says whether a distortion lowers
the energy by more than the rotational error of the model: unstable, stable, or undecided.
"""

import argparse
import json
import platform
import warnings
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

import coset
from coset.loading import LoadSettings
from coset.structures import rotate
from coset.symmetry.rules import haar_offsets
from coset.workflows.evaluate import evaluate

CUBIC = {
    "SrTiO3": 3.94,
    "BaTiO3": 4.03,
    "PbTiO3": 3.97,
    "CaTiO3": 3.89,
    "KTaO3": 4.03,
    "KNbO3": 4.06,
    "NaNbO3": 3.98,
    "LaAlO3": 3.81,
    "BaZrO3": 4.24,
    "SrHfO3": 4.11,
}
"""Lattice constants near PBE's, Å."""
MEV = 1e3


def cubic(name: str, a: float) -> Atoms:
    """A at the corner, B in the center, O on the faces."""
    sites = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
    return Atoms(name, scaled_positions=sites, cell=a * np.eye(3), pbc=True)


def angles(one) -> list[float]:
    """Cell angles in degrees."""
    return [round(float(x), 4) for x in coset.to_ase(one)[0].cell.angles()]


def judged(potential, name: str, a: float, seed: int) -> dict:
    """One row: groups and angles after free relaxation; verdict and energies."""
    turn = haar_offsets(1, seed)[0]
    start = rotate(coset.from_ase(cubic(name, a)).to(torch.float64), turn)
    base = {"force_tolerance": 1e-4, "stress_tolerance_GPa": 0.01}
    (free,) = coset.relax(potential, start, coset.RelaxSettings(symmetry="free", **base))
    (keep,) = coset.relax(potential, start, coset.RelaxSettings(check_stability=True, **base))
    (level,) = evaluate(potential, keep.structures, average="reference")
    stability = keep.stability
    return {
        "formula": name,
        "free_group_after": free.space_group_after,
        "free_angles": angles(free.structures),
        "free_status": free.status,
        "keep_group_after": keep.space_group_after,
        "keep_angles": angles(keep.structures),
        "a": float(keep.structures.cell[0].det().abs() ** (1 / 3)),
        "verdict": stability.verdict,
        "curvature": stability.curvature,
        "curvature_error": stability.error,
        "energy_gain_meV_per_atom": MEV * (keep.energy - free.energy) / 5,
        "torque_eV": float(np.linalg.norm(keep.certificate.torque)),
        "rotational_error_meV_per_atom": MEV
        * abs(float(level.properties.energy[0]) - keep.energy)
        / 5,
    }


def main() -> None:
    """Print the table; write the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coset-xs-0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    potential = coset.load_model(options.model, LoadSettings(dtype="float64"))
    rows = [judged(potential, name, a, k) for k, (name, a) in enumerate(CUBIC.items())]
    print("| crystal | free: group, angles | keep: a (Å) | curvature at Γ, eV/Å² | verdict |")
    print("|---|---|---|---|---|")
    for row in rows:
        low, high = min(row["free_angles"]), max(row["free_angles"])
        print(
            f"| {row['formula']} | {row['free_group_after']}, {low:.2f} to {high:.2f}° | "
            f"{row['a']:.3f} | {row['curvature']:.2f} ± {row['curvature_error']:.2f} | "
            f"{row['verdict']} |"
        )
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "model": options.model,
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
