"""What a store holds, and whether it is still what was written."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coset.data.formula import SYMBOLS, formula_hashes
from coset.data.store import (
    HAS_ATOMIC_ENERGIES,
    HAS_ENERGY,
    HAS_FORCES,
    HAS_STRESS,
    PERIODIC,
    Frames,
    Store,
    record_bytes,
    sha256_of,
)
from coset.errors import CheckpointError, ConfigError

CHUNK = 5000
MAX_PROBLEMS = 20
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
LABELS = {
    "energy": HAS_ENERGY,
    "forces": HAS_FORCES,
    "stress": HAS_STRESS,
    "atomic_energies": HAS_ATOMIC_ENERGIES,
}
ROUNDING = 1e-6
"""Largest force of the index, float32 from float64, against the one of the stored forces."""

Progress = Callable[[int, int], None]
"""Called with the number of frames checked and of all frames."""


def verify(path: str | Path, progress: Progress | None = None) -> list[str]:
    """What is wrong with a store, one sentence each; empty for a sound one.

    Checked are the sha256 of every file, the place, length and checksum of every record, and that
    values, flags, formulas, units and counts agree. At most MAX_PROBLEMS are listed.

    Raises:
        ConfigError: code `StoreNotFound`.
    """
    try:
        store = Store(path)
    except (ConfigError, CheckpointError) as error:
        if error.code == "StoreNotFound":
            raise
        return [error.reason]
    problems = []
    for problem in _problems(store, progress):
        problems.append(problem)
        if len(problems) == MAX_PROBLEMS:
            return [*problems, "and perhaps more"]
    return problems


def summary(path: str | Path) -> dict[str, Any]:
    """What a store holds: counts, elements, kinds, sizes, forces, periodicity, labels, licenses."""
    store = Store(path)
    index, manifest = store.index(), store.manifest
    flags, n_atoms = index["flags"], index["n_atoms"]
    n_periodic = sum(((flags & bit) != 0).astype(int) for bit in PERIODIC)
    forces = index["max_force"][(flags & HAS_FORCES) != 0].astype(np.float64)
    return {
        "path": str(path),
        "sha256": store.sha256,
        "structures": len(index),
        "atoms": int(n_atoms.sum()),
        "atoms_per_structure": {
            "mean": float(n_atoms.mean()),
            **_percentiles(n_atoms.astype(np.float64)),
        },
        "groups": int((index["unit"] > 1).sum()),
        "formulas": len(np.unique(index["formula_hash"])),
        "labels": {name: int(((flags & bit) != 0).sum()) for name, bit in LABELS.items()},
        "max_force_eV_per_A": _percentiles(forces),
        "periodic_directions": {str(n): int((n_periodic == n).sum()) for n in (3, 2, 1, 0)},
        "kinds": manifest["kinds"],
        "licenses": sorted({kind.get("license", "") for kind in manifest["kinds"]} - {""}),
        "elements": manifest.get("elements", {}),
        "split": manifest.get("split", {}),
        "sources": manifest.get("sources", []),
        "skipped": manifest.get("skipped", {}),
        "bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "shards": len(manifest["shards"]),
    }


def _percentiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def _problems(store: Store, progress: Progress | None) -> Iterator[str]:
    """From files to values; what rests on something broken is not looked at."""
    for name, facts in store.manifest["files"].items():
        if sha256_of(store.path / name) != facts["sha256"]:
            yield f"{name} is not the file that was written (sha256)"
    layout = list(_layout_problems(store))
    yield from layout
    if layout:
        return
    atoms = np.zeros(len(SYMBOLS), np.int64)
    for start in range(0, len(store), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(store)))
        damaged = store.damaged(rows)
        yield from (f"record {row} is damaged (crc32)" for row in damaged.tolist())
        sound = np.setdiff1d(rows, damaged)
        if len(sound):
            frames = store.read(sound)
            yield from _value_problems(frames, store.index(sound), sound)
            atoms += np.bincount(frames.numbers, minlength=len(SYMBOLS))[: len(SYMBOLS)]
        if progress is not None:
            progress(int(rows[-1]) + 1, len(store))
    yield from _count_problems(store, atoms)


def _layout_problems(store: Store) -> Iterator[str]:
    """Whether the records follow each other from the start of each shard to its end."""
    index, names = store.index(), store.manifest["shards"]
    firsts = np.flatnonzero(index["offset"] == 0)
    if len(firsts) != len(names) or (len(index) and firsts[0] != 0):
        yield f"the index knows {len(firsts)} shards, expected {len(names)}"
        return
    for name, rows in zip(names, np.split(index, firsts[1:]), strict=True):
        sizes = record_bytes(rows)
        ends = np.cumsum(sizes)
        size = (store.path / f"{name}.bin").stat().st_size
        if not np.array_equal(rows["offset"].astype(np.int64), ends - sizes) or ends[-1] != size:
            yield f"{name}: the index does not fit the records"
        elif (rows["kind"] >= len(store.kinds)).any() or (rows["n_atoms"] == 0).any():
            yield f"{name}: records without atoms or of a kind that the manifest does not name"
        elif not _are_units(rows["unit"].astype(np.int64)):
            yield f"{name}: units of records are broken"


def _are_units(units: np.ndarray) -> bool:
    """Whether every count is followed by as many zeros, less one."""
    firsts = np.flatnonzero(units)
    lengths = np.diff(np.append(firsts, len(units)))
    return bool(len(firsts)) and firsts[0] == 0 and np.array_equal(units[firsts], lengths)


def _value_problems(frames: Frames, rows: np.ndarray, numbers: np.ndarray) -> Iterator[str]:
    """Values that are not finite or do not agree with the index."""
    frame = np.repeat(np.arange(len(frames)), frames.n_atoms)
    first = np.cumsum(frames.n_atoms) - frames.n_atoms
    outside = (frames.numbers < 1) | (frames.numbers > 118)
    norms = np.linalg.norm(frames.forces.astype(np.float64), axis=1)
    largest = np.maximum.reduceat(norms, first)
    has_forces = (rows["flags"] & HAS_FORCES) != 0
    tolerance = ROUNDING * (1.0 + np.abs(rows["max_force"]))
    hashes = formula_hashes(frames.n_atoms, np.where(outside, 0, frames.numbers))
    bad = {
        "positions are not finite": _any(~np.isfinite(frames.positions).all(axis=1), frame),
        "the cell is not finite": ~np.isfinite(frames.cell).all(axis=(1, 2)),
        "an atomic number is outside 1-118": _any(outside, frame),
        "the formula is not that of the index": hashes != frames.formula_hash,
        "the energy is not finite": _flag(rows, HAS_ENERGY) & ~np.isfinite(frames.energy),
        "the stress is not finite": _flag(rows, HAS_STRESS)
        & ~np.isfinite(frames.stress).all(axis=(1, 2)),
        "the forces are not those of the index": has_forces
        & ~(np.abs(largest - rows["max_force"]) <= tolerance),
    }
    for what, where in bad.items():
        yield from (f"record {row}: {what}" for row in numbers[where].tolist())


def _any(atoms: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Whether some atom of each frame is marked."""
    marked: np.ndarray = np.bincount(frame, atoms) > 0
    return marked


def _flag(rows: np.ndarray, bit: int) -> np.ndarray:
    on: np.ndarray = (rows["flags"] & bit) != 0
    return on


def _count_problems(store: Store, atoms: np.ndarray) -> Iterator[str]:
    """Whether the manifest counts what is there."""
    index, manifest = store.index(), store.manifest
    kinds = np.bincount(index["kind"], minlength=len(store.kinds)).tolist()
    elements = {SYMBOLS[z]: int(atoms[z]) for z in np.flatnonzero(atoms)}
    told = {symbol: count["atoms"] for symbol, count in manifest.get("elements", {}).items()}
    agree = {
        "structures": manifest["structures"] == len(index),
        "atoms": manifest["atoms"] == int(index["n_atoms"].sum()),
        "kinds": [kind["structures"] for kind in manifest["kinds"]] == kinds,
        "elements": not told or told == elements,
    }
    yield from (f"the manifest miscounts {what}" for what, right in agree.items() if not right)
