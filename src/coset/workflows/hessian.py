"""Hessians of many systems."""

import torch
from jaxtyping import Float
from torch import Tensor

from coset.derivatives import hessians
from coset.potential import ModelPotential
from coset.structures import Structures, select

MOST_ATOMS = 32
"""Of one batch, unless one system has more: beyond, nothing is faster and memory grows."""

MOST_UNEQUAL = 1.5
"""Largest system of a batch over the smallest; all take as many passes as the largest."""


def hessian(
    potential: ModelPotential, structures: Structures
) -> list[Float[Tensor, "atoms 3 atoms 3"]]:
    """H = d²E/dx dx of every system in eV/Å², float64; periodic images move together.

    Systems of similar size are computed together. As the potential is, so without the symmetry that
    it lacks: `project_hessian` of `coset.symmetry.projection` gives that of the group.
    """
    found: dict[int, Tensor] = {}
    for places in _batches(structures.n_atoms.tolist()):
        batch = select(structures, torch.tensor(places))
        found.update(zip(places, hessians(potential, batch), strict=True))
    return [found[number] for number in range(len(structures))]


def _batches(sizes: list[int]) -> list[list[int]]:
    """Places of systems that are computed together, by size."""
    batches: list[list[int]] = []
    room = 0.0
    for place in sorted(range(len(sizes)), key=lambda k: sizes[k]):
        size = sizes[place]
        if not batches or size > room or size > MOST_UNEQUAL * sizes[batches[-1][0]]:
            batches.append([])
            room = MOST_ATOMS
        batches[-1].append(place)
        room -= size
    return batches
