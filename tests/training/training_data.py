"""Small stores with labels of an analytic potential, and settings of runs on them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import HYPERS, rattled, structures
from lennard_jones import LennardJones

from coset.data.formula import formula_hash
from coset.data.store import Frames, StoreWriter
from coset.structures import Structures, complete_cell, concatenate, split
from coset.training.settings import (
    BatchSettings,
    DataSettings,
    LossSettings,
    RunSettings,
    StageSettings,
    StoreShare,
    Term,
    TrainSettings,
)

DIRECT = LossSettings(
    energy=Term(weight=0.1, delta=0.02),
    direct_forces=Term(weight=1.0, delta=0.02),
    direct_stress=Term(weight=0.1, delta=0.02),
)
CONSERVATIVE = LossSettings(
    energy=Term(weight=1.0, delta=0.02),
    forces=Term(weight=1.0, delta=0.05),
    virial=Term(weight=0.5, delta=0.05),
    hessian=Term(weight=0.1, delta=0.05),
    direct_forces=Term(weight=0.01, delta=0.05),
    direct_stress=Term(weight=0.01, delta=0.05),
)


POTENTIAL = LennardJones(epsilon=2.0, sigma=1.1)
"""Short enough for the bonds of hydrogen, deep enough for those of copper to matter."""


def frames_of(batch: Structures, unit: list[int] | None = None) -> Frames:
    """Structures as frames with Lennard-Jones labels."""
    filled = replace(batch, cell=complete_cell(batch.cell, batch.pbc))
    labels = POTENTIAL(filled)
    periodic = batch.pbc.all(1)[:, None, None]
    ones = split(batch)
    return Frames(
        n_atoms=batch.n_atoms.numpy(),
        numbers=batch.atomic_numbers.numpy().astype(np.uint8),
        positions=batch.positions.numpy().astype(np.float32),
        cell=batch.cell.numpy().astype(np.float32),
        pbc=batch.pbc.numpy(),
        energy=labels.energy.numpy(),
        forces=labels.forces.numpy().astype(np.float32),
        stress=torch.where(periodic, labels.stress, torch.nan).numpy().astype(np.float32),
        atomic_energies=np.full(len(batch.atomic_numbers), np.nan, np.float32),
        charge=np.zeros(len(batch), np.int64),
        spin_multiplicity=np.ones(len(batch), np.int64),
        kind=np.zeros(len(batch), np.uint8),
        unit=np.array(unit or [1] * len(batch), np.uint8),
        formula_hash=np.array([formula_hash(o.atomic_numbers.numpy()) for o in ones], np.uint32),
    )


def training_structures(count: int, seed: int = 0) -> Structures:
    """Rattled copies of small crystals, slabs and molecules."""
    small = [s for s in structures().values() if len(s) == 1 and len(s.atomic_numbers) <= 8]
    calm = [s for s in small if np.abs(frames_of(s).forces).max() < 5.0]
    return concatenate([rattled(calm[k % len(calm)], 0.08, seed + k) for k in range(count)])


def displaced_pair(one: Structures, step: float = 0.02) -> Structures:
    """The structure moved forwards and backwards along a random direction."""
    u = torch.randn(one.positions.shape, generator=torch.Generator().manual_seed(5)).double()
    shift = step * u / u.norm()
    return concatenate(
        [replace(one, positions=one.positions + sign * shift) for sign in (1.0, -1.0)]
    )


def make_store(path: Path, count: int = 24, seed: int = 0) -> Path:
    """A store with `count` structures and two displaced pairs."""
    writer = StoreWriter(path, kinds=["all"], facts={})
    batch = training_structures(count, seed)
    writer.append(frames_of(batch))
    for one in split(batch)[:2]:
        writer.append(frames_of(displaced_pair(one), unit=[2, 0]))
    return writer.finish()


def make_settings(folder: Path, **run: Any) -> TrainSettings:
    """Six direct steps, six conservative ones and three that continue them."""
    store = folder / "store"
    if not store.exists():
        make_store(store)
        make_store(folder / "valid", count=6, seed=100)
    stages = (
        StageSettings(name="direct", steps=6, lr=3e-3, warmup=0.2, loss=DIRECT),
        StageSettings(name="conservative", steps=6, lr=1e-3, final_lr=1e-4, loss=CONSERVATIVE),
        StageSettings(
            name="finish", steps=3, lr=1e-4, warmup=0.0, continues=True, loss=CONSERVATIVE
        ),
    )
    directory = run.pop("directory", str(folder / "run"))
    return TrainSettings(
        data=DataSettings(train=(StoreShare(path=str(store)),), valid=(str(folder / "valid"),)),
        model=HYPERS,
        stages=stages,
        run=RunSettings(directory=directory, seed=3, log_every=1, valid_every=4, **run),
        batch=BatchSettings(structures=8, micro_batches=2, window=4),
    )
