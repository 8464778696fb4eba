"""Write the crystals of this folder as CIF files, from lattice constants and Wyckoff positions.

    python examples/make_crystals.py [FOLDER]

Sources:
[W] R. W. G. Wyckoff, Crystal Structures, 2nd edition, volumes 1 and 2, Interscience (1963-64);
[K] E. H. Kisi and M. M. Elcombe, Acta Cryst. C 45, 1867 (1989);
[L] L. Levien, C. T. Prewitt and D. J. Weidner, Am. Mineral. 65, 920 (1980);
[N] R. E. Newnham and Y. M. de Haan, Z. Krist. 117, 235 (1962);
[B] K. D. Bronsema, J. L. de Boer and F. Jellinek, Z. anorg. allg. Chem. 540, 15 (1986);
[G] D. L. Graf, Am. Mineral. 46, 1283 (1961).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import ase.io
from ase.spacegroup import crystal

from coset import from_ase
from coset.symmetry.crystal import space_group_number

Site = tuple[float, float, float]


@dataclass(frozen=True)
class Crystal:
    """One atom per Wyckoff position; lengths in Å, angles in degrees."""

    name: str
    group: int
    sites: tuple[tuple[str, Site], ...]
    a: float
    c: float | None = None
    hexagonal: bool = False


THIRD = 1 / 3
ORIGIN, QUARTER, HALF = (0.0, 0.0, 0.0), (0.25, 0.25, 0.25), (0.5, 0.5, 0.5)
TRIANGLE = (THIRD, 2 * THIRD, 0.25)
CRYSTALS = (
    Crystal("Al", 225, (("Al", ORIGIN),), 4.0496),  # W
    Crystal("Cu", 225, (("Cu", ORIGIN),), 3.6147),  # W
    Crystal("Fe", 229, (("Fe", ORIGIN),), 2.8665),  # W
    Crystal("W", 229, (("W", ORIGIN),), 3.1650),  # W
    Crystal("Mg", 194, (("Mg", TRIANGLE),), 3.2094, 5.2105, hexagonal=True),  # W
    Crystal("Si", 227, (("Si", ORIGIN),), 5.4307),  # W
    Crystal(
        "C-graphite", 194, (("C", (0, 0, 0.25)), ("C", TRIANGLE)), 2.456, 6.696, hexagonal=True
    ),  # W
    Crystal("GaAs", 216, (("Ga", ORIGIN), ("As", QUARTER)), 5.6537),  # W
    Crystal(
        "ZnO-wurtzite",
        186,
        (("Zn", (THIRD, 2 * THIRD, 0)), ("O", (THIRD, 2 * THIRD, 0.3817))),
        3.2501,
        5.2071,
        hexagonal=True,
    ),  # K
    Crystal("NaCl", 225, (("Na", ORIGIN), ("Cl", HALF)), 5.6406),  # W
    Crystal("MgO", 225, (("Mg", ORIGIN), ("O", HALF)), 4.2112),  # W
    Crystal("CsCl", 221, (("Cs", ORIGIN), ("Cl", HALF)), 4.123),  # W
    Crystal("CaF2-fluorite", 225, (("Ca", ORIGIN), ("F", QUARTER)), 5.4630),  # W
    Crystal("TiO2-rutile", 136, (("Ti", ORIGIN), ("O", (0.3053, 0.3053, 0))), 4.5937, 2.9581),  # W
    Crystal(
        "SiO2-quartz",
        154,
        (("Si", (0.4697, 0, 2 * THIRD)), ("O", (0.4135, 0.2669, 0.1191 + 2 * THIRD))),
        4.916,
        5.4054,
        hexagonal=True,
    ),  # L
    Crystal(
        "Al2O3-corundum",
        167,
        (("Al", (0, 0, 0.3523)), ("O", (0.3064, 0, 0.25))),
        4.7589,
        12.991,
        hexagonal=True,
    ),  # N
    Crystal(
        "SrTiO3-perovskite", 221, (("Sr", ORIGIN), ("Ti", HALF), ("O", (0.5, 0.5, 0))), 3.9051
    ),  # W
    Crystal(
        "MoS2-2H",
        194,
        (("Mo", TRIANGLE), ("S", (THIRD, 2 * THIRD, 0.6211))),
        3.1601,
        12.294,
        hexagonal=True,
    ),  # B
    Crystal(
        "CaCO3-calcite",
        167,
        (("Ca", ORIGIN), ("C", (0, 0, 0.25)), ("O", (0.2578, 0, 0.25))),
        4.9900,
        17.061,
        hexagonal=True,
    ),  # G
    Crystal("FeS2-pyrite", 205, (("Fe", ORIGIN), ("S", (0.386, 0.386, 0.386))), 5.4067),  # W
)
SYMPREC = 1e-2
"""Å."""


def main() -> None:
    """Build, check the space group, write."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "crystals"
    folder.mkdir(parents=True, exist_ok=True)
    for entry in CRYSTALS:
        atoms = crystal(
            [symbol for symbol, _ in entry.sites],
            [site for _, site in entry.sites],
            spacegroup=entry.group,
            cellpar=[entry.a] * 2 + [entry.c or entry.a, 90, 90, 120 if entry.hexagonal else 90],
        )
        found = space_group_number(from_ase(atoms), SYMPREC)
        if found != entry.group:
            raise SystemExit(f"{entry.name}: space group {found}, expected {entry.group}")
        ase.io.write(folder / f"{entry.name}.cif", atoms)
        print(f"{entry.name:18s} {atoms.symbols!s:14s} space group {found}")


if __name__ == "__main__":
    main()
