"""Errors of energies, forces and stresses on labelled frames.

A frame is `unseen` if its reduced formula is in bucket 0 of the split rule, and `seen` otherwise:
then it may have been trained on (mpf-TP never is, only its formulas). `shared` is a fixed random
subset for those potentials that are too slow for the whole set.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coset.data.random import hashed
from coset.data.store import Frames
from coset.structures import Properties, split
from model_card.reference import CORPUS, read_frames, structures_of
from model_card.subjects import Progress, Subject, evaluate_all

SETS = {
    "corpus-valid": CORPUS,
    "mptrj-random-1k": "dft/mptrj-random-1k.xyz",
    "alexandria-random-1k": "dft/alexandria-random-1k.xyz",
    "mptrj-highest-stress-1k": "dft/mptrj-highest-stress-1k.xyz",
    "mpf-TP": "dft/mpf-TP.xyz",
}
SHARED = {
    "corpus-valid": 500,
    "mptrj-random-1k": 200,
    "alexandria-random-1k": 300,
    "mptrj-highest-stress-1k": 200,
}
"""Frames, periodic in three directions, of the subset of a set."""


@dataclass(frozen=True, kw_only=True)
class FrameErrors:
    """Errors of S frames; NaN where undefined.

    energy [S]: meV/atom. force [S]: mean absolute component in meV/Å, over n_atoms [S]. stress [S]:
    mean absolute component in meV/Å³.
    """

    energy: np.ndarray
    force: np.ndarray
    stress: np.ndarray
    n_atoms: np.ndarray


def measure(subject: Subject, data: Path, progress: Progress) -> dict:
    """Errors of each set, for all of its frames and for groups of them."""
    return {
        name: _of_set(subject, name, read_frames(data / path), progress)
        for name, path in SETS.items()
    }


def _of_set(subject: Subject, name: str, frames: Frames, progress: Progress) -> dict:
    groups = _groups(name, frames, shortened=subject.shortened)
    singles = split(structures_of(frames))
    wanted = np.any(list(groups.values()), axis=0)
    rows = [k for k in np.flatnonzero(wanted) if subject.knows(singles[k])]
    found = evaluate_all(subject.potential, [singles[k] for k in rows], progress)
    errors = _errors(frames.take(np.array(rows)), found, energy_zero=subject.energy_zero)
    return {
        group: _summary(errors, chosen[rows]) | {"frames_in_set": int(chosen.sum())}
        for group, chosen in groups.items()
    }


def _groups(name: str, frames: Frames, *, shortened: bool) -> dict[str, np.ndarray]:
    """Which frames belong to each group of a set."""
    groups = {"all": np.ones(len(frames), bool)}
    unseen = frames.formula_hash % 10 == 0
    if not unseen.all():
        groups |= {"unseen": unseen, "seen": ~unseen}
    if name not in SHARED:
        return groups
    groups["shared"] = _subset(frames, SHARED[name])
    return {g: groups[g] for g in ("unseen", "shared") if g in groups} if shortened else groups


def _subset(frames: Frames, size: int) -> np.ndarray:
    """The same random frames at every run, among those that every potential can take."""
    rows = np.flatnonzero(frames.pbc.all(1))
    order = np.argsort(hashed(0, "model card", frames.energy[rows].view(np.uint64)))
    chosen = np.zeros(len(frames), bool)
    chosen[rows[order[:size]]] = True
    return chosen


def _errors(frames: Frames, found: list[Properties | None], *, energy_zero: bool) -> FrameErrors:
    ends = np.cumsum(frames.n_atoms)
    columns = []
    for k, properties in enumerate(found):
        if properties is None:
            columns.append((np.nan, np.nan, np.nan))
            continue
        atoms = slice(ends[k] - frames.n_atoms[k], ends[k])
        energy = (float(properties.energy) - frames.energy[k]) / frames.n_atoms[k]
        force = np.abs(properties.forces.numpy() - frames.forces[atoms]).mean()
        stress = np.abs(properties.stress[0].numpy() - frames.stress[k]).mean()
        columns.append((energy if energy_zero else np.nan, force, stress))
    energy, force, stress = 1e3 * np.array(columns).T
    return FrameErrors(energy=energy, force=force, stress=stress, n_atoms=frames.n_atoms)


def _summary(errors: FrameErrors, chosen: np.ndarray) -> dict:
    energy, force = np.abs(errors.energy[chosen]), errors.force[chosen]
    stress, n_atoms = errors.stress[chosen], errors.n_atoms[chosen]
    sound = np.isfinite(force)
    return {
        "frames": int(sound.sum()),
        "atoms": int(n_atoms[sound].sum()),
        "energy_mae_meV_per_atom": _mean(energy),
        "energy_median_meV_per_atom": _median(energy),
        "forces_mae_meV_per_A": _mean(force, n_atoms),
        "forces_median_of_frames_meV_per_A": _median(force),
        "stress_mae_meV_per_A3": _mean(stress),
        "stress_median_of_frames_meV_per_A3": _median(stress),
    }


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    sound = np.isfinite(values)
    if not sound.any():
        return float("nan")
    return float(np.average(values[sound], weights=None if weights is None else weights[sound]))


def _median(values: np.ndarray) -> float:
    sound = values[np.isfinite(values)]
    return float(np.median(sound)) if len(sound) else float("nan")
