"""How far a potential is from rotational invariance, and what each level of averaging leaves."""

from dataclasses import dataclass
from typing import Literal

import torch

from coset.errors import StructureError
from coset.potential import Potential
from coset.structures import Structures, split
from coset.symmetry.crystal import find_group, symmetrize
from coset.symmetry.primitive import orientation
from coset.symmetry.rules import LEVELS, identify, level_rule
from coset.symmetry.spectrum import Spectrum, anisotropy_spectrum, highest_degree
from coset.workflows.guards import refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelCost:
    """What a level takes and leaves: evaluations, and rms of the energy over orientations (eV)."""

    level: str
    n_evaluations: int
    residual: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivariance:
    """Outcome for one structure; spectrum and levels are empty unless the status is `ok`."""

    status: Literal["ok", "rejected"]
    code: str = ""
    reason: str = ""
    n_atoms: int = 0
    space_group: int | None = None
    point_group: str = ""
    spectrum: Spectrum | None = None
    levels: tuple[LevelCost, ...] = ()


def equivariance(
    potential: Potential, structures: Structures, *, max_degree: int = 10, symprec: float = 1e-2
) -> list[Equivariance]:
    """One result per structure, in input order; each is symmetrized to its group at `symprec` (Å).

    The spectrum goes up to `max_degree`, lower where that takes more than 2000 unknowns.
    """
    results = []
    for number, one in enumerate(split(structures)):
        try:
            refuse(potential, one, number)
            results.append(_equivariance(potential, one.to(torch.float64), max_degree, symprec))
        except StructureError as error:
            results.append(Equivariance(status="rejected", code=error.code, reason=error.reason))
    return results


def _equivariance(
    potential: Potential, one: Structures, max_degree: int, symprec: float
) -> Equivariance:
    group = find_group(one, symprec)
    exact = symmetrize(one, group)
    operations = torch.from_numpy(group.cartesian_rotations)
    degree = highest_degree(operations, max_degree)
    spectrum = anisotropy_spectrum(potential, exact, operations, max_degree=degree)
    levels = []
    for level in LEVELS:
        rules = level_rule(operations, level, turn=orientation(exact))
        cost = sum(len(rule.weights) for rule in rules)
        left = sum(spectrum.residual(rule) ** 2 for rule in rules) ** 0.5 / len(rules)
        levels.append(LevelCost(level=level, n_evaluations=cost, residual=left))
    return Equivariance(
        status="ok",
        n_atoms=len(one.atomic_numbers),
        space_group=group.number,
        point_group=identify(operations).hermann_mauguin,
        spectrum=spectrum,
        levels=tuple(levels),
    )
