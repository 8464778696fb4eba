"""Convex hulls: by hand, by brute force, with duplicates, errors, and what is refused."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from analytic_models import silicon, stillinger_weber
from factories import FCC, crystal

from coset.errors import ConfigError, StructureError
from coset.structures import concatenate, make_structure, repeat
from coset.workflows.convex_hull import HullEntry, distance_to_hull
from coset.workflows.hull import HullSettings, functional, hull

EXACT = 1e-9
"""eV/atom: linear programming on numbers of 1 eV."""
A, B, C = 3, 8, 14


def entry(composition, per_atom, **facts):
    n = sum(composition.values())
    name = "".join(f"{z}:{k} " for z, k in composition.items())
    return HullEntry(name=name, composition=composition, energy=per_atom * n, **facts)


# Elements at -1000 and -2; AB at -1 eV/atom and A3B at -0.4 from them, AB3 at -0.3: above its tie.
def from_elements(composition, formation, **facts):
    n = sum(composition.values())
    base = (-1000.0 * composition.get(A, 0) - 2.0 * composition.get(B, 0)) / n
    return entry(composition, base + formation, **facts)


BINARY = [
    entry({A: 1}, -1000.0),
    entry({A: 2}, -999.5),
    entry({B: 2}, -2.0),
    from_elements({A: 1, B: 1}, -1.0),
    from_elements({A: 3, B: 1}, -0.6),
    from_elements({A: 1, B: 3}, -0.3),
]


def test_a_binary_hull_by_hand():
    found = distance_to_hull(BINARY[5], BINARY)
    assert found.formation_energy == pytest.approx(-0.3, abs=EXACT)
    assert found.above_hull == pytest.approx(0.2, abs=EXACT)  # half AB, half B: -0.5
    assert {p.name: round(p.share, 9) for p in found.decomposition} == {
        BINARY[3].name: 0.5,
        BINARY[2].name: 0.5,
    }
    below = distance_to_hull(from_elements({A: 2, B: 6}, -0.75), BINARY[:5])
    assert below.above_hull == pytest.approx(-0.25, abs=EXACT)
    assert distance_to_hull(BINARY[1], BINARY).above_hull == pytest.approx(0.5, abs=EXACT)


def test_vertices_are_at_zero_and_duplicates_change_nothing():
    for vertex in (BINARY[0], BINARY[2], BINARY[3], BINARY[4]):
        assert distance_to_hull(vertex, BINARY).above_hull == pytest.approx(0.0, abs=EXACT)
    doubled = [*BINARY, BINARY[3], replace(BINARY[3], name="again", composition={A: 2, B: 2},
               energy=2 * BINARY[3].energy)]  # fmt: skip
    for one in BINARY:
        both = distance_to_hull(one, BINARY), distance_to_hull(one, doubled)
        assert both[0].above_hull == pytest.approx(both[1].above_hull, abs=EXACT)
        assert both[0].formation_energy == pytest.approx(both[1].formation_energy, abs=EXACT)


def test_an_element_without_reference_is_named():
    with pytest.raises(StructureError, match="element Z = 14") as raised:
        distance_to_hull(entry({A: 1, C: 2}, -1.0), BINARY)
    assert raised.value.code == "MissingReference"


def test_a_ternary_hull_by_brute_force():
    """The lowest of all triangles of entries that contain the composition."""
    random = np.random.default_rng(3)
    entries = [entry({z: 1}, float(random.normal())) for z in (A, B, C)]
    for _ in range(25):
        counts = random.integers(0, 5, 3)
        if counts.sum():
            composition = {z: int(n) for z, n in zip((A, B, C), counts, strict=True) if n}
            entries.append(entry(composition, float(random.normal())))
    points = np.array([[e.composition.get(z, 0) / e.n_atoms for z in (A, B, C)] for e in entries])
    heights = np.array([e.energy / e.n_atoms for e in entries])
    wanted = entry({A: 2, B: 3, C: 1}, 0.1)
    target = np.array([2, 3, 1]) / 6
    lowest = math.inf
    for triangle in combinations(range(len(entries)), 3):
        matrix = points[list(triangle)].T
        if abs(np.linalg.det(matrix)) > 1e-9:
            shares = np.linalg.solve(matrix, target)
            if shares.min() > -1e-12:
                lowest = min(lowest, float(shares @ heights[list(triangle)]))
    found = distance_to_hull(wanted, entries)
    assert found.above_hull == pytest.approx(0.1 - lowest, abs=EXACT)
    assert sum(p.share for p in found.decomposition) == pytest.approx(1.0, abs=EXACT)


def test_errors_and_corrections():
    sure = distance_to_hull(BINARY[5], BINARY)
    assert (sure.error, sure.stable_probability) == (0.0, 0.0)
    noisy = [replace(one, error=0.08 * one.n_atoms) for one in BINARY[:5]]
    found = distance_to_hull(replace(BINARY[5], error=0.06 * 4), noisy)
    error = math.hypot(0.06, 0.08 * 0.5**0.5)
    assert found.error == pytest.approx(error, abs=EXACT)
    expected = 0.5 * math.erfc(0.2 / (2**0.5 * error))
    assert found.stable_probability == pytest.approx(expected, abs=EXACT)
    moved = replace(BINARY[5], correction=-0.1 * 4)
    assert distance_to_hull(moved, BINARY).above_hull == pytest.approx(0.2, abs=EXACT)
    corrected = distance_to_hull(moved, BINARY, corrected=True)
    assert corrected.above_hull == pytest.approx(0.1, abs=EXACT)


def test_levels_are_compared_by_their_functional():
    same = ("PBE(+U), Materials Project settings", "PBE+U", "pbe", "PBE (Materials Project)")
    assert {functional(level) for level in same} == {"pbe"}
    assert functional("r²SCAN") == functional("r2SCAN") != functional("SCAN")
    assert functional("PBE+D3") not in ("", "pbe")
    assert functional("PBEsol") != functional("PBE")
    potential = replace(stillinger_weber(), level_of_theory="PBE")
    reference = HullEntry(name="Si", composition={C: 1}, energy=-4.0)
    for level in ("r2SCAN", ""):
        with pytest.raises(ConfigError) as raised:
            hull(potential, silicon(), [replace(reference, level_of_theory=level)])
        assert raised.value.code == "LevelMismatch"
    settings = HullSettings(frames=3, relax=False, any_level=True)
    (found,) = hull(potential, silicon(), [reference], settings)
    assert found.status == "ok"
    (found,) = hull(
        potential,
        silicon(),
        [replace(reference, level_of_theory="PBE+U")],
        HullSettings(frames=3, relax=False),
    )
    assert found.status == "ok"


LOOSE = HullSettings(frames=4, any_level=True)


def test_structures_are_relaxed_and_one_bad_one_stops_nothing():
    """Diamond at its minimum has -2 epsilon per atom; an fcc crystal lies far above."""
    potential = stillinger_weber(turning=0.02)
    fcc = crystal(4.15 * np.array(FCC), [(0, 0, 0)], [14])
    overlapping = make_structure(torch.zeros(2, 3).double(), torch.tensor([14, 14]))
    batch = concatenate([silicon(), overlapping, fcc, repeat(silicon(), (1, 1, 2))])
    reference = HullEntry(name="Si", composition={14: 8}, energy=-4.3 * 8, error=0.001 * 8)
    first, bad, second, supercell = hull(potential, batch, [reference], LOOSE)
    assert (bad.status, bad.distance) == ("rejected", None)
    assert first.status == second.status == "ok", second.reason
    assert first.entry.error > 0.0
    assert second.distance.above_hull > first.distance.above_hull + 0.1
    assert first.distance.error == pytest.approx(math.hypot(first.entry.error / 2, 0.001))
    assert supercell.distance.above_hull == pytest.approx(first.distance.above_hull, abs=1e-5)
    missing = hull(potential, batch, [replace(reference, composition={8: 1})], LOOSE)
    assert [one.code for one in missing][::2] == ["MissingReference"] * 2
    assert missing[0].entry is not None


def test_frames_that_entries_share_take_their_errors_with_them():
    """d = e_A - (e_1 + e_2)/2 in each frame; its scatter, not that of the three, is the error."""
    own, first, second = ((-1.0, -1.2, -1.1), (-0.3, -0.5, -0.1), (-0.2, -0.1, -0.3))
    entries = [
        HullEntry(
            name=str(k),
            composition=composition,
            energy=sum(samples) / 3 * sum(composition.values()),
            error=9.0,
            samples=tuple(sum(composition.values()) * x for x in samples),
        )
        for k, (composition, samples) in enumerate(
            zip(({1: 1, 2: 1}, {1: 2}, {2: 1}), (own, first, second), strict=True)
        )
    ]
    found = distance_to_hull(entries[0], entries[1:])
    each = [a - (b + c) / 2 for a, b, c in zip(own, first, second, strict=True)]
    assert found.above_hull == pytest.approx(np.mean(each), abs=EXACT)
    assert found.error == pytest.approx(np.std(each, ddof=1) / 3**0.5, abs=EXACT)
    itself = distance_to_hull(entries[0], entries)
    assert (itself.above_hull, itself.error) == (pytest.approx(0.0, abs=EXACT), 0.0)
    # one without frames counts by its error, next to the others
    mixed = distance_to_hull(entries[0], [entries[1], replace(entries[2], samples=())])
    part = np.std([a - b / 2 for a, b in zip(own, first, strict=True)], ddof=1) / 3**0.5
    assert mixed.error == pytest.approx(math.hypot(part, 9.0 / 2), abs=EXACT)


def test_a_crystal_beside_its_copy_is_on_the_hull_for_sure():
    potential, settings = stillinger_weber(turning=0.02), replace(LOOSE, compete=True)
    first, second = hull(potential, concatenate([silicon(), silicon()]), [], settings)
    assert first.entry.error > 1e-4
    assert first.distance.above_hull == second.distance.above_hull == 0.0
    assert first.distance.error < 1e-12


def test_competitors_stand_against_each_other():
    potential = stillinger_weber()
    fcc = crystal(4.15 * np.array(FCC), [(0, 0, 0)], [14])
    reference = HullEntry(name="Si", composition={14: 1}, energy=-1.0)
    first, second = hull(
        potential, concatenate([silicon(), fcc]), [reference], replace(LOOSE, compete=True)
    )
    gap = (second.entry.energy - first.entry.energy / 2, first.entry.energy / 2 + 1.0)
    assert second.distance.above_hull == pytest.approx(gap[0], abs=EXACT)
    assert first.distance.above_hull == pytest.approx(-gap[0], abs=EXACT)
    assert first.distance.stable_probability == 1.0


def test_settings_without_meaning():
    with pytest.raises(ConfigError):
        HullSettings(frames=1)
    with pytest.raises(ConfigError):
        HullSettings(average="none")
