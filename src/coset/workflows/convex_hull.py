"""The lower convex hull of energies per atom over composition, by linear programming."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import erfc, sqrt

import numpy as np
from scipy.optimize import linprog

from coset.errors import StructureError

SMALLEST_SHARE = 1e-9  # of a decomposition: what linear programming leaves of zero


@dataclass(frozen=True, kw_only=True, slots=True)
class HullEntry:
    """A compound with its energy.

    composition: atoms of each element in the entry, by atomic number. energy: eV of these atoms;
    error: its standard error. samples: energies of single frames, if known. correction: eV, to be
    added where corrections are asked for.
    """

    name: str
    composition: Mapping[int, float]
    energy: float
    error: float = 0.0
    samples: tuple[float, ...] = ()
    correction: float = 0.0
    level_of_theory: str = ""

    @property
    def n_atoms(self) -> float:
        """Atoms in the entry."""
        return sum(self.composition.values())

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers."""
        return frozenset(self.composition)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Part of a decomposition: the share of all atoms that are in this entry."""

    name: str
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """Where an entry lies, in eV per atom.

    formation_energy: from the elements. above_hull: negative below it. error: standard error of
    above_hull, with those of the phases; frame by frame where there are frames, so that an entry
    that is its own reference has none. decomposition: the phases of the hull at its composition.
    """

    formation_energy: float
    above_hull: float
    error: float
    decomposition: tuple[Phase, ...]

    @property
    def stable_probability(self) -> float:
        """P = erfc(E_hull / (sqrt(2) error)) / 2 that the entry is on or below the hull."""
        if self.error == 0.0:
            return float(self.above_hull <= 0.0)
        return 0.5 * erfc(self.above_hull / (sqrt(2.0) * self.error))


def distance_to_hull(
    entry: HullEntry, others: Sequence[HullEntry], *, corrected: bool = False
) -> Distance:
    """Formation energy and distance to the lower hull of the others, which need not hold the entry.

        E_hull = e - min_x sum_k x_k e_k,   sum_k x_k c_k = c,   x >= 0

    e: energy per atom, c: composition per atom. corrected: add the corrections of the entries.

    Raises:
        StructureError: "MissingReference", an element of the entry is not among the others.
    """
    elements = sorted(entry.elements)
    usable = [one for one in others if one.elements <= entry.elements]
    energies = np.array([_per_atom(one, corrected=corrected) for one in usable])
    shares = np.array([_fractions(one, elements) for one in usable]).reshape(-1, len(elements))
    elemental = [_lowest(energies, shares, column) for column in range(len(elements))]
    missing = [str(z) for z, e in zip(elements, elemental, strict=True) if e == float("inf")]
    if missing:
        raise StructureError(
            f"no reference for the element Z = {', '.join(missing)}",
            code="MissingReference",
            field="references",
            hint="add an entry of the pure element, with the level of theory of the others",
        )
    own, fractions = _per_atom(entry, corrected=corrected), _fractions(entry, elements)
    floor = np.array(elemental) @ fractions
    # Differences from the elements: numbers of 1 eV instead of the 10⁴ eV of total energies.
    found = linprog(energies - shares @ np.array(elemental), A_eq=shares.T, b_eq=fractions)
    if found.status != 0:
        raise StructureError(f"no hull: {found.message}", code="HullFailed", field="references")
    phases = [(-float(share), one) for share, one in zip(found.x, usable, strict=True)]
    return Distance(
        formation_energy=float(own - floor),
        above_hull=float(own - floor - found.fun),
        error=_error_of_sum([(1.0, entry), *phases]),
        decomposition=tuple(
            Phase(name=usable[k].name, share=float(found.x[k]))
            for k in np.flatnonzero(found.x > SMALLEST_SHARE)
        ),
    )


def _error_of_sum(terms: Sequence[tuple[float, HullEntry]]) -> float:
    """Standard error of a sum of energies per atom: of frames together, of the rest apart.

    The first term says how many frames there are.
    """
    n_frames = len(terms[0][1].samples)
    together = np.zeros(n_frames)
    variance = 0.0
    for weight, one in terms:
        if n_frames > 1 and len(one.samples) == n_frames:
            together += weight * np.array(one.samples) / one.n_atoms
        else:
            variance += (weight * one.error / one.n_atoms) ** 2
    if n_frames > 1:
        variance += together.var(ddof=1) / n_frames
    return float(np.sqrt(variance))


def _per_atom(entry: HullEntry, *, corrected: bool) -> float:
    return (entry.energy + (entry.correction if corrected else 0.0)) / entry.n_atoms


def _fractions(entry: HullEntry, elements: Sequence[int]) -> np.ndarray:
    return np.array([entry.composition.get(number, 0.0) for number in elements]) / entry.n_atoms


def _lowest(energies: np.ndarray, shares: np.ndarray, column: int) -> float:
    """Energy per atom of the most stable form of one element, infinite without any."""
    return float(np.min(energies[shares[:, column] == 1.0], initial=float("inf")))
