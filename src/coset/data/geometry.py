"""Frames of a store as a batch of structures."""

import numpy as np
import torch

from coset.data.store import Frames
from coset.structures import Structures


def structures_of(frames: Frames) -> Structures:
    """The geometry of frames as a batch, float64."""
    index = np.repeat(np.arange(len(frames)), frames.n_atoms)
    return Structures(
        positions=torch.from_numpy(frames.positions.astype(np.float64)),
        atomic_numbers=torch.from_numpy(frames.numbers.astype(np.int64)),
        system_index=torch.from_numpy(index),
        cell=torch.from_numpy(frames.cell.astype(np.float64)),
        pbc=torch.from_numpy(frames.pbc.astype(bool)),
        charge=torch.from_numpy(frames.charge.astype(np.int64)),
        spin_multiplicity=torch.from_numpy(frames.spin_multiplicity.astype(np.int64)),
    )
