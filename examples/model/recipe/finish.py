"""Turn the trained checkpoint into the demo model, with its errors on the validation frames.

Usage: python finish.py MODEL.ckpt VALID.xyz OUTPUT

The ten-step adaptive cutoff of the training code is replaced by its exact root, and the errors are
those of the converted weights.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import ase.io
import torch

import coset
from coset.checkpoint import Checkpoint
from coset.loading import LoadSettings, potential_of, with_converged_cutoff
from coset.structures import concatenate

PROVENANCE = {
    "name": "demo",
    "version": "1",
    "description": "Small stand-in for the examples and for trying the commands; not for research.",
    "level_of_theory": "PBE(+U), Materials Project energy zero, uncorrected (distilled)",
    "training_data": (
        "46,244 frames of 28 elements labeled with the potential nequix-oam-1 "
        "(weights MIT, T. Koker); recipe in examples/model/recipe"
    ),
    "license": "BSD-3-Clause",
    "citation": ("arXiv:2601.07742", "arXiv:2508.16067", "arXiv:2601.16195"),
    "authors": ("The coset developers",),
}


def errors(checkpoint: Checkpoint, frames: list) -> dict[str, float]:
    """Mean absolute errors of energy per atom, force components and stress components."""
    potential = potential_of(checkpoint, LoadSettings(dtype="mixed", device="cpu"))
    structures = concatenate([coset.from_ase(atoms) for atoms in frames])
    found = potential(structures)
    energies = torch.tensor([atoms.info["E"] for atoms in frames], dtype=torch.float64)
    forces = torch.cat([torch.from_numpy(atoms.arrays["F"]) for atoms in frames])
    energy_errors = (found.energy - energies).abs() / structures.n_atoms
    return {
        "energy_mae_meV_per_atom": round(1000.0 * float(energy_errors.mean()), 1),
        "energy_median_error_meV_per_atom": round(1000.0 * float(energy_errors.median()), 1),
        "forces_mae_meV_per_A": round(1000.0 * float((found.forces - forces).abs().mean()), 1),
        "mean_absolute_force_component_meV_per_A": round(1000.0 * float(forces.abs().mean()), 1),
        "frames": len(frames),
    }


def main() -> None:
    """Convert, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("frames", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    read = with_converged_cutoff(coset.import_metatrain(options.checkpoint))
    card = errors(read, ase.io.read(options.frames, index=":"))
    finished = replace(
        read,
        provenance=replace(read.provenance, **PROVENANCE),
        card={"validation, formulas not trained on, against the teacher": card},
    )
    coset.save_checkpoint(finished, options.output, overwrite=True)
    print(card)


if __name__ == "__main__":
    main()
