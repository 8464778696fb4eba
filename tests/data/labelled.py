"""Labelled structures for the tests of the store, its sources and what is made from it."""

import numpy as np

from coset.data.formula import formula_hashes
from coset.data.store import Frames


def make_frames(n_frames: int = 12, *, seed: int = 0, units: bool = False) -> Frames:
    """Random frames: one atom to nine, every periodicity, some labels missing.

    units: every third frame and the next one belong together.
    """
    rng = np.random.default_rng(seed)
    n_atoms = rng.integers(1, 10, n_frames)
    n_atoms[0] = 1
    total = int(n_atoms.sum())
    pbc = np.array([[True] * 3, [False] * 3, [True, True, False], [False, True, False]])
    pbc = pbc[np.arange(n_frames) % 4]
    frame = np.repeat(np.arange(n_frames), n_atoms)
    cell = np.eye(3) * 9.0 + rng.normal(size=(n_frames, 3, 3))
    stress = rng.normal(size=(n_frames, 3, 3)) * 0.1
    stress = stress + stress.transpose(0, 2, 1)
    stress[~pbc.all(axis=1)] = np.nan
    energy = rng.normal(size=n_frames) * 100.0
    energy[3::5] = np.nan
    forces = rng.normal(size=(total, 3))
    forces[frame % 6 == 1] = np.nan
    atomic = rng.normal(size=total)
    atomic[frame % 2 == 1] = np.nan
    numbers = rng.choice([1, 6, 8, 14, 26, 29], total).astype(np.uint8)
    unit = np.ones(n_frames, np.uint8)
    if units:
        unit[0::3][: len(unit[1::3])] = 2
        unit[1::3] = 0
    return Frames(
        n_atoms=n_atoms,
        numbers=numbers,
        positions=rng.normal(size=(total, 3)) * 4.0,
        cell=np.where(pbc.any(axis=1)[:, None, None], cell, 0.0),
        pbc=pbc,
        energy=energy,
        forces=forces,
        stress=stress,
        atomic_energies=atomic,
        charge=rng.integers(-3, 4, n_frames),
        spin_multiplicity=rng.integers(1, 5, n_frames),
        kind=rng.integers(0, 2, n_frames).astype(np.uint8),
        unit=unit,
        formula_hash=formula_hashes(n_atoms, numbers),
    )


def same(a: np.ndarray, b: np.ndarray, dtype: str | None = None) -> bool:
    """Equal in every bit after rounding `b` as it is stored."""
    expected = np.ascontiguousarray(b if dtype is None else b.astype(dtype))
    return np.array_equal(np.ascontiguousarray(a).astype(expected.dtype), expected, equal_nan=True)
