"""From the plan to tensors: what one forward pass of training needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from coset.data.batching import ATOM_COST, MicroBatch, Pool
from coset.data.geometry import structures_of
from coset.data.pairs import PairCache
from coset.data.random import orthogonal
from coset.data.statistics import composition
from coset.data.store import (
    HAS_ENERGY,
    HAS_FORCES,
    HAS_STRESS,
    Frames,
    Store,
    join_frames,
)
from coset.edge_model import Quadrature
from coset.neighbors import Edges, Pairs, assemble, edge_vectors
from coset.structures import Properties, Structures


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Labels over which the terms of the loss are averaged: over the whole step, on all ranks."""

    energies: int = 0
    atoms: int = 0
    stresses: int = 0
    pair_atoms: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Counts of both."""
        return Counts(
            energies=self.energies + other.energies,
            atoms=self.atoms + other.atoms,
            stresses=self.stresses + other.stresses,
            pair_atoms=self.pair_atoms + other.pair_atoms,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Structures with their graph and labels; energies without the baseline.

    quadrature: one random element of O(3) per system, which the network sees; everything else is in
    the frame of the labels. pairs: systems (plus, minus) whose force difference is a label.
    """

    structures: Structures
    graph: Edges
    vectors: Float[Tensor, "edges 3"]
    labels: Properties
    quadrature: Quadrature
    pairs: Int[Tensor, "pairs 2"]
    names: str = ""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        if device.type == "cpu":
            return self
        return Batch(
            structures=self.structures.to(device),
            graph=self.graph.to(device),
            vectors=self.vectors.to(device),
            labels=self.labels.to(device),
            quadrature=self.quadrature,
            pairs=self.pairs.to(device),
            names=self.names,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A store with the pairs of this network's cutoff."""

    store: Store
    pairs: PairCache
    index: np.ndarray

    def pool(self, mask: np.ndarray, share: float) -> Pool:
        """Its usable units and their cost."""
        first = np.flatnonzero((self.index["unit"] > 0) & mask)
        length = self.index["unit"][first].astype(np.int64)
        cost = 2.0 * self.pairs.counts + ATOM_COST * self.index["n_atoms"]
        total = np.concatenate([[0.0], np.cumsum(cost)])
        return Pool(
            first=first, length=length, cost=total[first + length] - total[first], share=share
        )


def count_labels(sources: Sequence[Source], batches: Sequence[MicroBatch]) -> Counts:
    """Labels of these micro-batches, from the index alone."""
    total = Counts()
    for batch in batches:
        for number, source in enumerate(sources):
            rows = source.index[batch.row[batch.store == number]]
            n_atoms, flags = rows["n_atoms"].astype(np.int64), rows["flags"]
            with_forces = (flags & HAS_FORCES) != 0
            paired = rows["unit"] != 1
            total += Counts(
                energies=int(((flags & HAS_ENERGY) != 0).sum()),
                atoms=int(n_atoms[with_forces].sum()),
                stresses=int(((flags & HAS_STRESS) != 0).sum()),
                pair_atoms=int(n_atoms[with_forces & paired].sum()) // 2,
            )
    return total


def make_batch(
    sources: Sequence[Source],
    batch: MicroBatch,
    baseline: np.ndarray,
    seed: int | None,
) -> Batch:
    """Read the records of a micro-batch; without a seed nothing is rotated."""
    parts: list[Frames] = []
    pairs: list[Pairs] = []
    slots = []
    for number, source in enumerate(sources):
        own = batch.store == number
        if own.any():
            parts.append(source.store.read(batch.row[own]))
            pairs += source.pairs.read(batch.row[own])
            slots.append(batch.slot[own])
    frames = join_frames(parts)
    names = ", ".join(f"{s}:{r}" for s, r in zip(batch.store, batch.row, strict=True))
    return batch_of(frames, pairs, baseline, seed, np.concatenate(slots), names)


def batch_of(
    frames: Frames,
    pairs: Sequence[Pairs],
    baseline: np.ndarray,
    seed: int | None,
    slots: np.ndarray,
    names: str = "",
) -> Batch:
    """Frames and their neighbor pairs as tensors."""
    structures = structures_of(frames)
    graph = assemble(structures, pairs)
    energy = frames.energy - composition(frames) @ baseline
    if seed is None:
        rotations = np.broadcast_to(np.eye(3), (len(frames), 3, 3)).copy()
    else:
        rotations = orthogonal(seed, "rotation", slots)
    first = np.flatnonzero(frames.unit == 2)
    return Batch(
        structures=structures,
        graph=graph,
        vectors=edge_vectors(structures, graph),
        labels=Properties(
            energy=torch.from_numpy(energy),
            forces=torch.from_numpy(frames.forces.astype(np.float64)),
            stress=torch.from_numpy(frames.stress.astype(np.float64)),
        ),
        quadrature=Quadrature(
            rotations=torch.from_numpy(rotations)[None],
            weights=torch.ones(1, len(frames), dtype=torch.float64),
            degree=0,
        ),
        pairs=torch.from_numpy(np.stack([first, first + 1], axis=1)),
        names=names,
    )
