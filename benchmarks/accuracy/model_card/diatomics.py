"""Energy curves of two atoms, and their forces against PBE.

Lengths are given in sums of the covalent radii. PBE bonds are never shorter than 0.55 of that sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols, covalent_radii

from coset.data.formula import held_out
from coset.structures import Structures, make_structure, split
from model_card.reference import DIATOMICS, F_ELEMENTS, read_frames, structures_of
from model_card.subjects import Progress, Subject, evaluate_all

ELEMENTS = ("H", "C", "N", "O", "F", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "Ti", "Fe", "Cu")
DISTANCES = np.geomspace(0.5, 6.0, 48)
BOX = 20.0
SHORTEST_BOND = 0.55
TOLERANCE = 0.02
"""eV; a smaller wiggle is no extremum."""

BINS = (0.4, 0.55, 0.65, 0.75, 0.85, 1.2, 2.0)
HELD_OUT = 0.15
"""Share of the elements whose pairs stay out of training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What is wrong with an energy curve.

    spurious: extrema beyond the one minimum. hole: how far the energy falls below that of the
    bond at shorter distances, eV, else 0. attraction: the same for any fall towards shorter ones.
    """

    spurious: int
    hole: float
    attraction: float


def measure(subject: Subject, data: Path, progress: Progress) -> dict:
    """Faults of the curves of common pairs, and force errors in bins of the distance."""
    return {"curves": _curves(subject, progress), "forces": _forces(subject, data, progress)}


def judge(energies: np.ndarray, lengths: np.ndarray) -> Curve:
    """Faults of E (eV) at increasing distances, given in sums of covalent radii."""
    bond = int(np.argmin(np.where(lengths >= SHORTEST_BOND, energies, np.inf)))
    inner = energies[: bond + 1]
    falls = np.maximum.accumulate(inner[::-1]) - inner[::-1]
    return Curve(
        spurious=max(turning_points(energies) - 1, 0),
        hole=float(max(energies[bond] - inner.min(), 0.0)),
        attraction=float(falls.max()),
    )


def turning_points(energies: np.ndarray) -> int:
    """Extrema of a sequence that begins falling, without wiggles below `TOLERANCE`."""
    count, sign, extreme = 0, -1.0, energies[0]
    for energy in energies[1:]:
        if sign * (energy - extreme) > 0:
            extreme = energy
        elif sign * (extreme - energy) > TOLERANCE:
            count, sign, extreme = count + 1, -sign, energy
    return count


def pair(first: int, second: int, distance: float) -> Structures:
    """Two atoms in a periodic box, as in the reference."""
    positions = torch.full((2, 3), BOX / 2, dtype=torch.float64)
    positions[1, 2] += distance
    cell = BOX * torch.eye(3, dtype=torch.float64)
    return make_structure(positions, torch.tensor([first, second]), cell=cell, pbc=(True,) * 3)


def _curves(subject: Subject, progress: Progress) -> dict:
    known = [s for s in ELEMENTS if atomic_numbers[s] in subject.potential.elements]
    pairs = list(combinations_with_replacement([atomic_numbers[s] for s in known], 2))
    singles = [pair(*both, distance) for both in pairs for distance in DISTANCES]
    found = evaluate_all(subject.potential, singles, progress)
    energies = np.array([np.nan if one is None else float(one.energy) for one in found])
    curves = {
        "".join(chemical_symbols[z] for z in both): judge(row, DISTANCES / _radii(both).sum())
        for both, row in zip(pairs, energies.reshape(len(pairs), -1), strict=True)
        if np.isfinite(row).all()
    }
    return {
        "pairs": len(pairs),
        "sound_pairs": len(curves),
        "holes_eV": {n: c.hole for n, c in curves.items() if c.hole > TOLERANCE},
        "attractions_eV": {n: c.attraction for n, c in curves.items() if c.attraction > TOLERANCE},
        "spurious_extrema": {n: c.spurious for n, c in curves.items() if c.spurious},
    }


def _forces(subject: Subject, data: Path, progress: Progress) -> dict:
    """Errors of the force along the bond in eV/Å, for elements held out from training or not.

    Slow potentials are measured on the former only.
    """
    frames = read_frames(data / DIATOMICS)
    known = [int(z) in subject.potential.elements - F_ELEMENTS for z in frames.numbers[::2]]
    wanted = np.array(known) & (held_out(frames.formula_hash, HELD_OUT) | (not subject.shortened))
    frames = frames.take(np.flatnonzero(wanted))
    bonds = frames.positions[1::2] - frames.positions[::2]
    distances = np.linalg.norm(bonds, axis=1)
    lengths = distances / (2 * _radii(frames.numbers[::2]))
    found = evaluate_all(subject.potential, split(structures_of(frames)), progress)
    own = np.array([np.full(3, np.nan) if p is None else p.forces[0].numpy() for p in found])
    along = ((own - frames.forces[::2]) * bonds).sum(1) / distances
    unseen = held_out(frames.formula_hash, HELD_OUT)
    return {
        f"{low}-{high}": {
            "unseen": _summary(along[unseen & (lengths >= low) & (lengths < high)]),
            "seen": _summary(along[~unseen & (lengths >= low) & (lengths < high)]),
        }
        for low, high in pairwise(BINS)
    }


def _radii(numbers: Sequence[int]) -> np.ndarray:
    return covalent_radii[np.asarray(numbers)]


def _summary(errors: np.ndarray) -> dict:
    sound = np.abs(errors[np.isfinite(errors)])
    if not len(sound):
        return {"count": 0}
    return {
        "count": len(sound),
        "mae_eV_per_A": float(sound.mean()),
        "median_eV_per_A": float(np.median(sound)),
    }
