"""Reduced formulas, and the split rule that rests on them.

A data set is split by composition, never by frame: every frame of one reduced formula lies on the
same side, whatever file it came from. The formula is written as pymatgen writes it
(`Composition(...).reduced_formula`), so that hashes made elsewhere agree.
"""

import hashlib
import math
from collections.abc import Iterable

import numpy as np

HELD_OUT = 0.1
"""Share of formulas that is held out unless asked otherwise: bucket 0 of 10."""

SYMBOLS = tuple(
    word
    for row in (
        "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge",
        "As Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm",
        "Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U",
        "Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og",
    )
    for word in row.split()
)
"""Chemical symbols by atomic number; X stands for none."""

# Pauling scale by atomic number, nan where there is no value; as in pymatgen's periodic table
# (after A. L. Allred, J. Inorg. Nucl. Chem. 17, 215 (1961) and later compilations). It orders
# the symbols of a formula and must therefore not be "improved".
ELECTRONEGATIVITY = [
    float(word)
    for word in (
        "nan 2.20 nan 0.98 1.57 2.04 2.55 3.04 3.44 3.98 nan 0.93 1.31 1.61 1.90 2.19 2.58 3.16 "
        "nan 0.82 1.00 1.36 1.54 1.63 1.66 1.55 1.83 1.88 1.91 1.90 1.65 1.81 2.01 2.18 2.55 2.96 "
        "3.00 0.82 0.95 1.22 1.33 1.60 2.16 1.90 2.20 2.28 2.20 1.93 1.69 1.78 1.96 2.05 2.10 2.66 "
        "2.60 0.79 0.89 1.10 1.12 1.13 1.14 1.13 1.17 1.20 1.20 1.10 1.22 1.23 1.24 1.25 1.10 1.27 "
        "1.30 1.50 2.36 1.90 2.20 2.20 2.28 2.54 2.00 1.62 2.33 2.02 2.00 2.20 2.20 0.70 0.90 1.10 "
        "1.30 1.50 1.38 1.36 1.28 1.30 1.30 1.30 1.30 1.30 1.30 1.30 1.30 1.30 " + "nan " * 15
    ).split()
]
POLYANION_BOND = 1.65
"""Two last elements closer in electronegativity than this are written as one group."""

# Molecules and peroxides, which keep their factor of two.
UNREDUCED = {
    "LiO": "Li2O2", "NaO": "Na2O2", "KO": "K2O2", "HO": "H2O2", "CsO": "Cs2O2", "RbO": "Rb2O2",
    "O": "O2", "N": "N2", "F": "F2", "Cl": "Cl2", "H": "H2",
}  # fmt: skip


def reduced_formula(numbers: Iterable[int]) -> str:
    """Formula of the given atomic numbers: by electronegativity, smallest integers, groups.

    Raises:
        ValueError: an atomic number outside 1-118, or none at all.
    """
    counts: dict[int, int] = {}
    for number in numbers:
        counts[int(number)] = counts.get(int(number), 0) + 1
    if not counts or min(counts) < 1 or max(counts) > 118:
        raise ValueError(f"atomic numbers {sorted(counts)}, expected some of 1-118")
    return _formula(counts)


def formula_hash(numbers: Iterable[int]) -> int:
    """First 32 bits of the sha256 of the reduced formula; `formula_hash % 10` is its bucket."""
    return _hash(reduced_formula(numbers))


def formula_hashes(n_atoms: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The hash of every frame [S], as uint32; n_atoms [S] says how `numbers` [A] is cut."""
    frame = np.repeat(np.arange(len(n_atoms)), n_atoms)
    counts = np.zeros((len(n_atoms), len(SYMBOLS)), np.int32)
    np.add.at(counts, (frame, numbers), 1)
    compositions, which = np.unique(counts, axis=0, return_inverse=True)
    hashes = [
        _hash(_formula({int(z): int(row[z]) for z in np.flatnonzero(row)})) for row in compositions
    ]
    return np.array(hashes, np.uint32)[which.reshape(-1)]


def held_out(hashes: np.ndarray, share: float = HELD_OUT) -> np.ndarray:
    """Whether each hash belongs to the held-out share of all formulas: bool [S].

    The share 0.1 is exactly bucket 0 (hash % 10); a smaller share is a part of it, a larger one
    adds to it, so that what is held out at one share is held out at every larger one.
    """
    hashes = np.asarray(hashes, np.int64)
    place = hashes % 10 * 1000 + hashes // 10 % 1000
    held: np.ndarray = place < round(share * 10_000)
    return held


def _hash(formula: str) -> int:
    return int(hashlib.sha256(formula.encode()).hexdigest()[:8], 16)


def _formula(counts: dict[int, int]) -> str:
    order = sorted(counts, key=_place)
    divisor = math.gcd(*counts.values())
    amounts = [(z, counts[z] // divisor) for z in order]
    group = ""
    if len(order) > 2:
        difference = ELECTRONEGATIVITY[order[-1]] - ELECTRONEGATIVITY[order[-2]]
        times = math.gcd(amounts[-1][1], amounts[-2][1])
        if difference < POLYANION_BOND and times > 1:  # nan: never
            group = f"({_written((z, n // times) for z, n in amounts[-2:])}){times}"
            amounts = amounts[:-2]
    formula = _written(amounts) + group
    return UNREDUCED.get(formula, formula)


def _place(number: int) -> tuple[float, str]:
    """Where an element stands in a formula; without electronegativity at the end."""
    value = ELECTRONEGATIVITY[number]
    return (math.inf if math.isnan(value) else value, SYMBOLS[number])


def _written(amounts: Iterable[tuple[int, int]]) -> str:
    return "".join(f"{SYMBOLS[z]}{n if n > 1 else ''}" for z, n in amounts)
