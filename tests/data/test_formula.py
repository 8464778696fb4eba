"""Reduced formulas and the split rule, against values that pymatgen 2026.10.24 gave."""

import hashlib
import re

import numpy as np
import pytest

from coset.data.formula import SYMBOLS, formula_hash, formula_hashes, held_out, reduced_formula

# (atoms, Composition(atoms).reduced_formula, int(sha256(...).hexdigest()[:8], 16)), by rule:
# molecules and peroxides, order by electronegativity and then by symbol, none, groups.
FACTS = [
    ("H", "H2", 2920965331),
    ("H2", "H2", 2920965331),
    ("He", "He", 821026741),
    ("Ne", "Ne", 953073480),
    ("N", "N2", 710870594),
    ("N2", "N2", 710870594),
    ("O", "O2", 1775039899),
    ("O2", "O2", 1775039899),
    ("O4", "O2", 1775039899),
    ("F2", "F2", 2385371955),
    ("Cl2", "Cl2", 3166239032),
    ("Br2", "Br", 1966478249),
    ("I2", "I", 2822623436),
    ("S8", "S", 2380313540),
    ("P4", "P", 1549983889),
    ("C60", "C", 1797505237),
    ("Fe2", "Fe", 2159589630),
    ("Og", "Og", 2685274776),
    ("Rf2O4", "O2Rf", 1143587485),
    ("Li2O", "Li2O", 1538382821),
    ("Li2O2", "Li2O2", 3230973615),
    ("LiO2", "LiO2", 804385138),
    ("Na2O2", "Na2O2", 694948300),
    ("K4O4", "K2O2", 1892044628),
    ("Cs2O2", "Cs2O2", 1161670001),
    ("Rb2O2", "Rb2O2", 3054594016),
    ("H2O", "H2O", 82815964),
    ("H2O2", "H2O2", 2892185116),
    ("H4O4", "H2O2", 2892185116),
    ("Na2Cl2", "NaCl", 3687673140),
    ("CO", "CO", 4236788422),
    ("CO2", "CO2", 3796401503),
    ("CH4", "H4C", 3526903300),
    ("C2H6", "H3C", 3628692227),
    ("C6H12O6", "H2CO", 2676894900),
    ("NH3", "H3N", 3722335826),
    ("N2H4", "H2N", 3132169794),
    ("LiFePO4", "LiFePO4", 1611025508),
    ("Li4Fe4P4O16", "LiFePO4", 1611025508),
    ("Al2S3O12", "Al2(SO4)3", 4074414679),
    ("Ca3P2O8", "Ca3(PO4)2", 3979710183),
    ("Ca5P3O13H", "Ca5P3HO13", 1920988812),
    ("Mg3Al2Si3O12", "Mg3Al2(SiO4)3", 2571307773),
    ("MgO2H2", "Mg(HO)2", 1342095674),
    ("Ca2O4H4", "Ca(HO)2", 2814939163),
    ("NaHCO3", "NaHCO3", 4201959665),
    ("N2H8SO4", "H8S(NO2)2", 839273899),
    ("Fe4Fe3C18N18", "Fe7(CN)18", 3577903838),
    ("K3FeC6N6", "K3Fe(CN)6", 1117990349),
    ("PbTiO3", "TiPbO3", 396792361),
    ("Cs2AgBiBr6", "Cs2AgBiBr6", 36556676),
    ("HfZrO4", "HfZrO4", 2740681989),
    ("KrF2", "KrF2", 3375405850),
    ("XeF6", "XeF6", 670720344),
    ("He2O2Li2", "LiOHe", 4136037425),
    ("NeHeAr", "ArHeNe", 199828810),
    ("ArHe2", "ArHe2", 4050347057),
    ("Si2Cu2", "CuSi", 1640926759),
    ("NiCuSi", "CuSiNi", 1815768363),
    ("TcCuSiRe2", "CuRe2SiTc", 267203282),
    ("RuPdOsIrHAtRn", "AtHIrOsPdRnRu", 662777378),
    ("ScNp", "NpSc", 3353124842),
    ("RbK2", "K2Rb", 706256007),
    ("Fe4N2C2", "Fe2CN", 3818166655),
    ("Fe2C2N2H2", "FeHCN", 792950175),
    ("CsCl3I3", "Cs(ICl)3", 1694994691),
    ("C2N2S4", "CS2N", 1881596135),
    ("Nd2Pm2O6", "PmNdO3", 3735637487),
    ("Te2H2", "TeH", 3953387008),
    ("LuErTm2", "ErTm2Lu", 3073350259),
    ("U3O8", "U3O8", 2667975893),
    ("PuO4", "PuO4", 887915521),
    ("BaLa2Ce2Cu4O14", "BaLa2Ce2(Cu2O7)2", 2754943627),
]


def numbers_of(atoms: str) -> list[int]:
    words = re.findall(r"([A-Z][a-z]?)(\d*)", atoms)
    return [SYMBOLS.index(symbol) for symbol, count in words for _ in range(int(count or 1))]


@pytest.mark.parametrize(("atoms", "formula", "number"), FACTS)
def test_formula_and_hash_are_those_of_pymatgen(atoms, formula, number):
    numbers = numbers_of(atoms)
    assert reduced_formula(numbers) == formula
    assert formula_hash(numbers) == number
    assert int(hashlib.sha256(formula.encode()).hexdigest()[:8], 16) == number


def test_order_and_repetition_do_not_matter():
    numbers = numbers_of("Li4Fe4P4O16")
    shuffled = np.random.default_rng(0).permutation(numbers * 3)
    assert reduced_formula(shuffled) == "LiFePO4"


def test_many_at_once_agree_with_one_at_a_time():
    structures = [numbers_of(atoms) for atoms, _, _ in FACTS]
    n_atoms = np.array([len(numbers) for numbers in structures])
    found = formula_hashes(n_atoms, np.concatenate(structures).astype(np.uint8))
    assert found.dtype == np.uint32
    assert found.tolist() == [number for _, _, number in FACTS]
    assert len(formula_hashes(np.zeros(0, np.int64), np.zeros(0, np.uint8))) == 0


@pytest.mark.parametrize("numbers", [[], [0], [119], [1, -1]])
def test_numbers_without_an_element_are_refused(numbers):
    with pytest.raises(ValueError, match="1-118"):
        reduced_formula(numbers)


def test_a_tenth_is_bucket_zero_and_shares_grow():
    hashes = np.random.default_rng(0).integers(0, 2**32, 20_000).astype(np.uint32)
    assert (held_out(hashes) == (hashes % 10 == 0)).all()
    before = np.zeros(len(hashes), bool)
    for share in (0.0, 0.05, 0.1, 0.15, 0.5, 1.0):
        held = held_out(hashes, share)
        assert abs(held.mean() - share) < 0.02  # five standard deviations at most
        assert (held | ~before).all()
        before = held
    # what users try first is held out
    for atoms in ("Fe", "Ni", "NaCl", "MgO", "TiC", "AlN"):
        assert formula_hash(numbers_of(atoms)) % 10 == 0
