"""Neighbor pairs that matter to one network, found once and kept beside the store.

Rotations change no distance, so the edges that survive an adaptive cutoff are a property of the
structure. Each pair is stored once, atoms as u2 and cell shifts as i1: 7 bytes.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from coset.atomic_files import write_file
from coset.data.geometry import structures_of
from coset.data.store import Store, spans
from coset.errors import ConfigError
from coset.neighbors import Pairs, batched_neighbor_lists, edge_vectors
from coset.pet.hypers import PetHypers
from coset.pet.model import Pet
from coset.structures import Structures

CHUNK = 256
ATOM, SHIFT = "<u2", "i1"


class PairCache:
    """Pairs of every record of a store for one cutoff, read through memory maps."""

    def __init__(self, store: Store, hypers: PetHypers) -> None:
        """Open the cache; `build` makes it."""
        self.path = cache_path(store, hypers)
        ends = np.load(self.path / "ends.npy", mmap_mode="r", allow_pickle=False)
        self.counts = np.diff(ends, prepend=0).astype(np.int64)
        self._first = (ends - self.counts).astype(np.int64)
        self._atoms = np.load(self.path / "atoms.npy", mmap_mode="r", allow_pickle=False)
        self._shifts = np.load(self.path / "shifts.npy", mmap_mode="r", allow_pickle=False)

    def read(self, rows: np.ndarray) -> list[Pairs]:
        """Half lists of the given records."""
        places = spans(self._first, self.counts, rows)
        atoms = self._atoms[places].astype(np.int64)
        shifts = self._shifts[places].astype(np.int64)
        cuts = np.cumsum(self.counts[rows])[:-1]
        return [
            (pair[:, 0], pair[:, 1], shift)
            for pair, shift in zip(np.split(atoms, cuts), np.split(shifts, cuts), strict=True)
        ]


def cache_path(store: Store, hypers: PetHypers) -> Path:
    """Folder of the pairs of this cutoff, named after everything they depend on."""
    facts = {**asdict(hypers.cutoff), "zbl": hypers.zbl, "store": store.sha256}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return store.path / f"pairs-{digest[:16]}"


def build(
    store: Store, hypers: PetHypers, progress: Callable[[int, int], None] | None = None
) -> PairCache:
    """The cache, made if it is not there: one neighbor search of the whole store."""
    path = cache_path(store, hypers)
    if not (path / "ends.npy").exists():
        network = Pet(hypers)
        counts, atoms, shifts = [], [], []
        for start in range(0, len(store), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(store)))
            for first, second, shift in needed_pairs(structures_of(store.read(rows)), network):
                counts.append(len(first))
                atoms.append(np.stack([first, second], axis=1).astype(ATOM))
                shifts.append(shift.astype(SHIFT))
            if progress is not None:
                progress(int(rows[-1]) + 1, len(store))
        _save(path / "atoms.npy", np.concatenate([np.zeros((0, 2), ATOM), *atoms]))
        _save(path / "shifts.npy", np.concatenate([np.zeros((0, 3), SHIFT), *shifts]))
        _save(path / "ends.npy", np.cumsum(np.array(counts, np.uint64)))
    return PairCache(store, hypers)


def needed_pairs(structures: Structures, network: Pet) -> list[Pairs]:
    """Half lists without the pairs that the network does not see."""
    pairs: list[Pairs] = []
    batches = batched_neighbor_lists(
        structures, network.hypers.cutoff.cutoff, lambda atoms, edges: float(edges), 500_000.0
    )
    for _, batch, graph in batches:
        kept = graph.subset(network.candidates(edge_vectors(batch, graph), graph))
        half = torch.arange(len(kept.reverse)) < kept.reverse
        first, second = kept.centers[half].numpy(), kept.neighbors[half].numpy()
        shifts = kept.cell_shifts[half].numpy()
        n_atoms = batch.n_atoms.numpy()
        system = batch.system_index.numpy()[first]
        offset = (np.cumsum(n_atoms) - n_atoms)[system]
        _refuse_wide(n_atoms, shifts)
        cuts = np.cumsum(np.bincount(system, minlength=len(n_atoms)))[:-1]
        parts = zip(
            np.split(first - offset, cuts),
            np.split(second - offset, cuts),
            np.split(shifts, cuts),
            strict=True,
        )
        pairs.extend(parts)
    return pairs


def _refuse_wide(n_atoms: np.ndarray, shifts: np.ndarray) -> None:
    if n_atoms.max() > np.iinfo(ATOM).max or np.abs(shifts).max(initial=0) > np.iinfo(SHIFT).max:
        raise ConfigError(
            f"a record has {n_atoms.max()} atoms and cell shifts up to "
            f"{np.abs(shifts).max(initial=0)}; the pair cache holds 65535 and 127",
            code="PairsTooWide",
            hint="remove the record, or wrap its atoms into the cell",
        )


def _save(path: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_file(path, buffer.getvalue())
