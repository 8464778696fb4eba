"""What is subtracted from and divided out of labels: composition baseline and scales.

The baseline is a least-squares fit of energies to compositions in float64; scales are root mean
squares over the usable records, of energies per atom, of forces per element, and of stresses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coset.data.store import HAS_ENERGY, HAS_FORCES, Frames, Store
from coset.errors import ConfigError

CHUNK = 4096
N_NUMBERS = 119


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Baseline and scales of a training set.

    baseline [119]: eV per atom by atomic number; energy: eV per atom; forces [119]: eV/Å by
    atomic number; stress: eV/Å³; counts [119]: atoms of each element.
    """

    baseline: np.ndarray
    energy: float
    forces: np.ndarray
    stress: float
    counts: np.ndarray


def usable(
    store: Store, elements: Sequence[int], *, max_force: float, max_atoms: int
) -> np.ndarray:
    """Which records have a label, known elements alone, small enough forces and few enough atoms.

    A pair that belongs together is usable as a whole or not at all.
    """
    index = store.index()
    good = (index["flags"] & (HAS_ENERGY | HAS_FORCES)) != 0
    good &= ~(index["max_force"] > max_force)
    good &= index["n_atoms"] <= max_atoms
    unknown = np.ones(N_NUMBERS, bool)
    unknown[list(elements)] = False
    for rows in _chunks(store, good):
        good[rows] = ~(composition(store.read(rows)) > 0)[:, unknown].any(1)
    return whole_units(index, good)


def whole_units(index: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask without units of which a record is left out."""
    starts = np.flatnonzero(index["unit"])
    whole = np.logical_and.reduceat(mask, starts) if len(starts) else mask
    return np.repeat(whole, index["unit"][starts])


def fit_statistics(
    stores: Sequence[Store], masks: Sequence[np.ndarray], max_energy: float
) -> tuple[Statistics, list[np.ndarray]]:
    """Baseline and scales over the records of the masks, and the masks without outliers.

    Records further than `max_energy` (eV/atom) from the baseline are left out and the fit repeated.
    """
    counts, energies = _compositions(stores, masks)
    n_atoms = counts.sum(1)
    known = np.isfinite(energies)
    if not known.any():
        raise ConfigError("no training record has an energy, expected at least one")
    for _ in range(2):
        weights = 1.0 / n_atoms[known]
        baseline = np.zeros(N_NUMBERS)
        present = counts[known].any(0)
        solution = np.linalg.lstsq(
            counts[known][:, present] * weights[:, None], energies[known] * weights, rcond=None
        )
        baseline[present] = solution[0]
        residual = (energies - counts @ baseline) / n_atoms
        inside = ~(np.abs(residual) > max_energy)
        known = np.isfinite(energies) & inside
    kept, start = [], 0
    for mask in masks:
        rows = np.flatnonzero(mask)
        good = mask.copy()
        good[rows] = inside[start : start + len(rows)]
        kept.append(good)
        start += len(rows)
    forces, stress = _scales(stores, kept)
    statistics = Statistics(
        baseline=baseline,
        energy=float(np.sqrt((residual[known] ** 2).mean())) or 1.0,
        forces=forces,
        stress=stress,
        counts=counts.sum(0),
    )
    return statistics, kept


def _chunks(store: Store, mask: np.ndarray) -> list[np.ndarray]:
    rows = np.flatnonzero(mask)
    return [rows[k : k + CHUNK] for k in range(0, len(rows), CHUNK)]


def _compositions(
    stores: Sequence[Store], masks: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of every element [records, 119] and total energies [records]."""
    counts, energies = [], []
    for store, mask in zip(stores, masks, strict=True):
        for rows in _chunks(store, mask):
            frames = store.read(rows)
            counts.append(composition(frames).astype(np.float32))
            energies.append(frames.energy)
    return np.concatenate(counts).astype(np.float64), np.concatenate(energies)


def composition(frames: Frames) -> np.ndarray:
    """Atoms of every atomic number, [frames, 119]."""
    frame = np.repeat(np.arange(len(frames)), frames.n_atoms)
    flat = np.bincount(frame * N_NUMBERS + frames.numbers, minlength=len(frames) * N_NUMBERS)
    return flat.reshape(len(frames), N_NUMBERS)


def _scales(stores: Sequence[Store], masks: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    squares, numbers = np.zeros(N_NUMBERS), np.zeros(N_NUMBERS)
    stress_square, n_stress = 0.0, 0
    for store, mask in zip(stores, masks, strict=True):
        for rows in _chunks(store, mask):
            frames = store.read(rows)
            force = (frames.forces.astype(np.float64) ** 2).sum(1)
            real = np.isfinite(force)
            squares += np.bincount(frames.numbers[real], force[real], N_NUMBERS)
            numbers += np.bincount(frames.numbers[real], minlength=N_NUMBERS)
            stress = frames.stress[np.isfinite(frames.stress).all((1, 2))].astype(np.float64)
            stress_square += float((stress**2).sum())
            n_stress += stress.size
    forces = np.sqrt(np.divide(squares, 3.0 * numbers, out=np.zeros(N_NUMBERS), where=numbers > 0))
    forces[forces == 0.0] = 1.0
    return forces, float(np.sqrt(stress_square / n_stress)) if stress_square else 1.0
