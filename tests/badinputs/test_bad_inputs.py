"""Bad and odd inputs: one table of cases, which can only grow. Rows are those of the promises."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import bad_input_checks as check
import numpy as np
import pytest
from ase.constraints import FixBondLength, FixCartesian, FixedLine, FixedPlane, Hookean
from bad_input_checks import CIF, FLAGS, POSCAR, WATER
from factories import molecule
from tolerances import SAME_PHYSICS, close

from coset.structures import concatenate


@dataclass(frozen=True)
class Case:
    row: int
    name: str
    check: object
    arguments: tuple = ()


def case(row, name, check, *arguments, **options):
    return Case(row, name, partial(check, **options), arguments)


EMPTY = molecule(np.zeros((0, 3)), np.zeros(0, dtype=int))
NA = "Na1 Na {} 0 0 {}\n"
CASES = [
    case(1, "exact set of elements", check.elements),
    case(1, "in a batch", check.unknown_element),
    case(2, "Z = 0", check.refused, molecule([(0, 0, 0)], [0]), "GhostAtom", "atomic_numbers"),
    *(
        case(2, f"symbol {s}", check.files, f"1\n\n{s} 0 0 0\n", ["GhostAtom"])
        for s in ("X", "Bq", "Gh")
    ),
    case(2, "dropped", check.ghosts_dropped),
    case(
        2, "nothing but ghosts", check.files, "1\n\nX 0 0 0\n", ["EmptyStructure"], drop_ghosts=True
    ),
    case(3, "deuterium and tritium", check.heavy_water),
    *(
        case(
            4, f"Z = {z}", check.refused, molecule([(0, 0, 0)], [z]), "BadSpecies", "atomic_numbers"
        )
        for z in (-1, 119, 2**40)
    ),
    *(
        case(4, f"numbers are {d}", check.wrong_numbers, d)
        for d in ("f8", "f4", "?", "U2", "O", "c16")
    ),
    case(5, "partial", check.files, CIF + NA.format(0, 0.5), ["DisorderedStructure"], "a.cif"),
    case(
        5,
        "mixed",
        check.files,
        CIF + NA.format(0, 0.5) + "K1 K 0 0 0 0.5\n",
        ["DisorderedStructure"],
        "a.cif",
    ),
    case(
        5,
        "two species",
        check.files,
        CIF + NA.format(0, 1.0) + "K1 K 0 0 0 1.0\n",
        ["DisorderedStructure"],
        "a.cif",
    ),
    case(5, "vacancy", check.files, CIF + NA.format(0, 0.0), ["DisorderedStructure"], "a.cif"),
    case(5, "ordered", check.files, CIF + NA.format(0, 1.0), [""], "a.cif"),
    case(6, "no atoms", check.refused, EMPTY, "EmptyStructure", "positions"),
    case(
        6, "in a file", check.files, f"0\n\n{WATER}0\n\n", ["EmptyStructure", "", "EmptyStructure"]
    ),
    case(7, "118 lone atoms", check.lone_atoms),
    case(8, "1.5 to 20 Å", check.tiny_cell),
    *(case(9, f"{n} isolated atoms", check.isolated, n) for n in (1, 2, 1000)),
    case(10, "slab and far atom", check.slab_and_atom),
    *(
        case(12, f"{d} Å", check.refused, check.pair(d), "AtomsOverlap", "positions")
        for d in (0.0, 1e-12, 1e-6, 0.05, 0.099)
    ),
    *(
        case(
            12,
            f"{d} Å across a face",
            check.refused,
            check.image_at(d),
            "AtomsOverlap",
            "positions",
        )
        for d in (0.0, 1e-6, 0.099)
    ),
    case(12, "0.101 Å works", check.near_overlap),
    *(
        case(15, f"{v} in {f} of {n}", check.with_value, n, f, v)
        for v in (np.nan, np.inf, -np.inf)
        for n, f in (("Si", "positions"), ("Si", "cell"), ("water", "positions"))
    ),
    *(
        case(16, f"{name} moved", check.translated, name)
        for name in ("Si", "water", "slab", "chain")
    ),
    *(
        case(18, kind, check.arrays, kind)
        for kind in ("strided", "reversed", "fortran", "read-only", "single", "integers")
    ),
    *(
        case(
            18,
            f"positions are {d}",
            check.refused_frame,
            check.array_of(d),
            "BadArray",
            "positions",
        )
        for d in ("O", "U8", "?", "c16")
    ),
    case(
        20,
        "0 and 1",
        check.files,
        CIF + NA.format(0, 1) + NA.format(1, 1),
        ["DuplicateSite"],
        "a.cif",
    ),
    case(
        20,
        "POSCAR",
        check.files,
        POSCAR.replace("\n1\n", "\n2\n") + "0 0 1\n",
        ["AtomsOverlap"],
        "POSCAR",
    ),
    case(21, "all directions", check.held),
    *(
        case(
            21,
            type(c).__name__,
            check.refused_frame,
            check.constrained(c),
            "UnsupportedConstraint",
            "constraints",
        )
        for c in (
            FixCartesian(0, (True, False, False)),
            FixedPlane(0, (0, 0, 1)),
            FixedLine(0, (0, 0, 1)),
            FixBondLength(0, 1),
            Hookean(0, 1, 2.0, 3.0),
        )
    ),
    case(22, "whole numbers", check.charges),
    *(
        case(22, f"charge {v!r}", check.refused_frame, check.charged(v), "BadCharge", "charge")
        for v in (0.5, "one", True, None, np.nan, [1])
    ),
    *(
        case(22, f"spin {v!r}", check.refused_frame, check.charged(v, "spin"), "BadCharge", "spin")
        for v in (1.5, "triplet")
    ),
    case(
        23,
        "moments",
        check.warned,
        "1\nProperties=species:S:1:pos:R:3:initial_magmoms:R:1\nFe 0 0 0 2\n",
        "magmoms_ignored",
    ),
    *(
        case(24, f"{n:+d} atom", check.refused_frame, check.longer(n), "ShapeMismatch", "positions")
        for n in (-1, 1)
    ),
    *(
        case(26, f"height {g:g}", check.refused, check.singular(g), "SingularCell", "cell")
        for g in (0, 1e-6, 5e-4)
    ),
    case(26, "collinear", check.refused, check.collinear(), "SingularCell", "cell"),
    *(case(27, f"pbc {f}", check.missing_vectors, f) for f in FLAGS),
    case(28, "exchanged vectors", check.left_handed),
    case(28, "mirror image", check.mirrored),
    case(29, "50 unimodular changes", check.skewed),
    case(30, "1 Å cube", check.many_images),
    case(30, "too many", check.too_many_edges),
    case(31, "elongated", check.elongated),
    *(case(32, f"pbc {f}", check.vacuum, f) for f in FLAGS if not all(f)),
    *(case(33, name, check.no_stress, name) for name in ("slab", "chain")),
    case(34, "molecule", check.no_stress, "water"),
    *(
        case(39, f"images of {name}", check.images, name)
        for name in ("Al", "Si", "TiO2", "left-handed", "slab", "chain", "one atom")
    ),
    *(
        case(39, f"supercell of {name}", check.supercells, name)
        for name in ("Si", "Mg", "left-handed", "slab", "chain", "one atom")
    ),
    case(
        41, "too few atoms", check.files, WATER.replace("3", "4", 1) + WATER, ["UnreadableFile", ""]
    ),
    case(
        41,
        "too many atoms",
        check.files,
        WATER.replace("3", "2", 1) + WATER,
        ["UnreadableFile", ""],
    ),
    case(41, "truncated", check.files, WATER + WATER[:-8], ["", "UnreadableFile"]),
    case(41, "NaN", check.files, WATER.replace("0.76", "nan", 1) + WATER, ["NonFiniteInput", ""]),
    case(
        41,
        "no number",
        check.files,
        WATER.replace("0.76", "0.7x", 1) + WATER,
        ["UnreadableFile", ""],
    ),
    case(
        41,
        "bad lattice",
        check.files,
        WATER.replace("\n\n", '\nLattice="1 2 3 4 5 6 7 8"\n') + WATER,
        ["UnreadableFile", ""],
    ),
    case(41, "garbage first", check.files, "some words\n" + WATER, ["UnreadableFile", ""]),
    case(52, "byte order mark", check.files, b"\xef\xbb\xbf" + WATER.encode(), [""]),
    case(52, "CRLF", check.files, WATER.replace("\n", "\r\n"), [""]),
    case(
        52, "not UTF-8", check.files, WATER.encode() + b"1\n\xff\nH 0 0 0\n", ["", "UnreadableFile"]
    ),
    case(58, "decimal comma", check.files, WATER.replace("0.76", "0,76", 1), ["UnreadableFile"]),
    *(
        case(59, f"empty {n}", check.files, "", ["EmptyFile"], n)
        for n in ("a.cif", "a.xyz", "POSCAR")
    ),
    case(59, "blank", check.files, " \n\n", ["EmptyFile"], "a.xyz"),
    case(59, "only comments", check.files, "# nothing\n", ["EmptyFile"], "a.cif"),
    case(60, "CIF named xyz", check.files, CIF + NA.format(0, 1), ["FormatMismatch"], "a.xyz"),
    case(60, "xyz named cif", check.files, WATER, ["FormatMismatch"], "a.cif"),
    case(60, "POSCAR named cif", check.files, POSCAR, ["FormatMismatch"], "a.cif"),
    case(60, "CIF named POSCAR", check.files, CIF + NA.format(0, 1), ["FormatMismatch"], "POSCAR"),
    case(60, "words named cif", check.files, "some words\n", ["UnreadableFile"], "a.cif"),
    case(60, "words", check.files, "some words\n", ["UnreadableFile"], "a.unknown"),
]
ROWS = [1, 2, 4, 6, 7, 8, 9, 10, 12, 15, 16, 18, 22, 24, 26, 27, 28, 29, 30, 32, 33, 34]


@pytest.fixture
def tools(pet, few_elements_pet, lennard_jones, fixed_structures, tmp_path):
    return SimpleNamespace(
        pet=pet,
        few=few_elements_pet,
        lj=lennard_jones,
        structures=fixed_structures,
        path=tmp_path,
    )


@pytest.mark.parametrize("entry", [pytest.param(c, id=f"{c.row:02d} {c.name}") for c in CASES])
def test_input(entry, tools):
    entry.check(tools, *entry.arguments)


def test_no_row_is_lost():
    assert set(ROWS) <= {entry.row for entry in CASES}
    assert len({(entry.row, entry.name) for entry in CASES}) == len(CASES) >= 144


def test_all_kinds_in_one_batch(any_pet, fixed_structures):
    """Bulk, slab, chain and molecule in one batch are each what they are alone."""
    batch = concatenate(list(fixed_structures.values()))
    together = any_pet(batch)
    for k, one in enumerate(fixed_structures.values()):
        alone, rows = any_pet(one), batch.system_index == k
        assert close(together.energy[k : k + 1], alone.energy, SAME_PHYSICS)
        assert close(together.forces[rows], alone.forces, SAME_PHYSICS)
