"""Promises that hold whatever the accuracy: nothing collapses, forces are the gradient, rotations.

The crystals are those of examples/crystals.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coset.ase_interface import read_structures
from coset.data.random import orthogonal
from coset.structures import Structures, concatenate, rotate, strain
from coset.workflows.relax import relax
from coset.workflows.relaxation import RelaxSettings
from model_card.statistics import percent
from model_card.subjects import Progress, Subject

CRYSTALS = Path(__file__).parents[3] / "examples" / "crystals"
MAX_VOLUME_CHANGE = 25.0
GRADIENT_CRYSTALS = ("Si", "NaCl", "ZnO-wurtzite", "SiO2-quartz", "SrTiO3-perovskite")
RATTLE = 0.05
STEP = 1e-4
"""Å, of central differences in float64: their own error is about 1e-7 eV/Å."""

STRAIN = 1e-5
AXES = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
ROTATIONS = 24


def measure(subject: Subject, data: Path, progress: Progress) -> dict:
    """Relaxation of the example crystals, errors of forces, and change under rotations."""
    crystals = {name: one for name, one in example_crystals().items() if subject.knows(one)}
    progress(0, 3)
    relaxation = _relaxation(subject, crystals)
    progress(1, 3)
    chosen = {name: rattled(one) for name, one in crystals.items() if name in GRADIENT_CRYSTALS}
    has_float64 = subject.precise is not subject.potential
    gradient = _gradient_errors(subject, chosen) if has_float64 else {}
    progress(2, 3)
    rotation = _rotation([rattled(one) for one in crystals.values()], subject)
    return {"relaxation": relaxation, "gradient": gradient, "rotation": rotation}


def example_crystals() -> dict[str, Structures]:
    """The example crystals by the names of their files."""
    paths = sorted(str(path) for path in CRYSTALS.glob("*.cif"))
    return {Path(one.input).stem: one.structures for one in read_structures(paths)}


def rattled(one: Structures) -> Structures:
    """The same structure with Gaussian displacements of its atoms."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(one.positions.shape, generator=generator, dtype=torch.float64)
    return replace(one, positions=one.positions + RATTLE * noise)


def _relaxation(subject: Subject, crystals: dict[str, Structures]) -> dict:
    """What became of each crystal with the settings of the command line."""
    results = relax(subject.potential, concatenate(list(crystals.values())), RelaxSettings())
    rows = {}
    for (name, given), result in zip(crystals.items(), results, strict=True):
        change = float("nan")
        if result.structures is not None:
            change = percent(float(result.structures.volume), float(given.volume))
        rows[name] = {
            "status": result.status,
            "volume_change_percent": change,
            "group_kept": result.space_group_after == result.space_group_before,
            "evaluations": result.n_evaluations,
        }
    changes = [abs(row["volume_change_percent"]) for row in rows.values()]
    return {
        "crystals": len(rows),
        "converged": sum(row["status"] == "converged" for row in rows.values()),
        "group_kept": sum(row["group_kept"] for row in rows.values()),
        "within_25_percent": sum(change <= MAX_VOLUME_CHANGE for change in changes),
        "largest_volume_change_percent": max(changes),
        "rows": rows,
    }


def _gradient_errors(subject: Subject, crystals: dict[str, Structures]) -> dict:
    """Largest differences of forces and stress from central differences of the energy."""
    forces, stresses = {}, {}
    for name, one in crystals.items():
        predicted = subject.precise(one)
        slopes = _slopes(subject, _moved(one), STEP)
        forces[name] = float((slopes + predicted.forces.reshape(-1)).abs().max())
        strains = [_unit_strain(*axes) for axes in AXES]
        strained = [strain(one, s * e) for e in strains for s in (STRAIN, -STRAIN)]
        expected = torch.stack([(e * predicted.stress).sum() for e in strains])
        difference = _slopes(subject, strained, STRAIN) / one.volume - expected
        stresses[name] = float(difference.abs().max())
    return {"largest_force_error_eV_per_A": forces, "largest_stress_error_eV_per_A3": stresses}


def _moved(one: Structures) -> list[Structures]:
    """The structure with each coordinate displaced, up and down."""
    count = one.positions.numel()
    steps = STEP * torch.eye(count, dtype=torch.float64).reshape(count, -1, 3)
    return [replace(one, positions=one.positions + s * d) for d in steps for s in (1, -1)]


def _unit_strain(first: int, second: int) -> Tensor:
    """A symmetric strain of size 1, for a batch of one."""
    matrix = torch.zeros(1, 3, 3, dtype=torch.float64)
    matrix[0, first, second] = matrix[0, second, first] = 1.0
    return matrix


def _slopes(subject: Subject, pairs: list[Structures], step: float) -> Tensor:
    """Central differences of the energy between each structure and the next."""
    energies = subject.precise(concatenate(pairs)).energy
    return (energies[::2] - energies[1::2]) / (2 * step)


def _rotation(crystals: list[Structures], subject: Subject) -> dict:
    """Root mean square deviations over rotations and reflections, which an exact model lacks."""
    rotations = torch.from_numpy(orthogonal(0, "model card", np.arange(ROTATIONS)))
    energies, forces = [], []
    for one in crystals:
        turned = subject.potential(concatenate([rotate(one, matrix) for matrix in rotations]))
        energy = turned.energy / len(one.positions)
        back = turned.forces.reshape(ROTATIONS, -1, 3) @ rotations
        energies.append(energy - energy.mean())
        forces.append((back - back.mean(0)).reshape(-1))
    return {
        "crystals": len(crystals),
        "rotations": ROTATIONS,
        "rattle_A": RATTLE,
        "energy_rms_meV_per_atom": 1e3 * float(torch.cat(energies).square().mean().sqrt()),
        "forces_rms_meV_per_A": 1e3 * float(torch.cat(forces).square().mean().sqrt()),
    }
