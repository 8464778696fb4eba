"""Point groups, frames and quadratures: every promise of the rules by their own harmonics."""

import json
from importlib import resources

import numpy as np
import pytest
import torch
from moyopy import Cell, MoyoDataset, operations_from_number
from scipy.stats import special_ortho_group

from coset.edge_model import IDENTITY, Quadrature
from coset.errors import ConfigError, StructureError
from coset.structures import make_structure
from coset.symmetry.crystal import find_group
from coset.symmetry.rules import (
    LEVELS,
    coset_rule,
    haar_offsets,
    identify,
    level_rule,
    rotation_group,
)
from recipes.rules.find_rules import find

KILLED = 1e-12  # sums of at most 300 nodes times 120 operations of order 1, in float64
ALIVE = 1e-3
DEGREES = (3, 5, 7, 9)
N_NODES = {
    "C1": (23, 60, 160, 300),
    "C2": (12, 30, 80, 150),
    "C3": (8, 20, 56, 100),
    "C4": (6, 22, 40, 80),
    "C5": (12, 12, 60, 60),
    "C6": (6, 12, 32, 56),
    "D2": (6, 15, 40, 75),
    "D3": (4, 10, 28, 50),
    "D4": (3, 11, 20, 40),
    "D5": (6, 6, 30, 30),
    "D6": (3, 6, 17, 28),
    "T": (2, 5, 14, 25),
    "O": (1, 4, 7, 15),
    "I": (1, 1, 5, 5),
}
"""For degrees 3, 5, 7, 9, by rotation group."""

ROTATIONS_OF = {
    "C1": "C1 Ci Cs",
    "C2": "C2 C2h C2v S4",
    "C3": "C3 C3i C3v C3h",
    "C4": "C4 C4h C4v",
    "C6": "C6 C6h C6v",
    "D2": "D2 D2h D2d",
    "D3": "D3 D3d D3h",
    "D4": "D4 D4h",
    "D6": "D6 D6h",
    "T": "T Th Td",
    "O": "O Oh",
}
"""The 32 crystallographic point groups by the group of their rotations."""

MOLECULES = {"C5": "C5 C5h C5v C5i", "D5": "D5 D5h D5d", "I": "I Ih"}
ROTATIONS = {
    name: proper for proper, names in (ROTATIONS_OF | MOLECULES).items() for name in names.split()
}
LAST_NUMBERS = {
    "1": 1,
    "-1": 2,
    "2": 5,
    "m": 9,
    "2/m": 15,
    "222": 24,
    "mm2": 46,
    "mmm": 74,
    "4": 80,
    "-4": 82,
    "4/m": 88,
    "422": 98,
    "4mm": 110,
    "-42m": 122,
    "4/mmm": 142,
    "3": 146,
    "-3": 148,
    "32": 155,
    "3m": 161,
    "-3m": 167,
    "6": 173,
    "-6": 174,
    "6/m": 176,
    "622": 182,
    "6mm": 186,
    "-6m2": 190,
    "6/mmm": 194,
    "23": 199,
    "m-3": 206,
    "432": 214,
    "-43m": 220,
    "m-3m": 230,
}
"""The last space group of each crystal class, from the International Tables."""

MISLED = {*range(3, 16), *range(115, 121), 149, 151, 153, 157, 159, 162, 163, 187, 188}
"""Where the rotation to the standard setting does not lead to the rule axes."""


def turned(symbol, seed):
    """A point group in a random orientation, its operations in random order."""
    V = haar_offsets(1, seed)[0]
    group = V @ rotation_group(symbol) @ V.T
    return group[torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))]


def residuals(rule, operations, degree):
    """max_ab |sum_k w_k mean_g det(g)^p P_l(a . R_k g b)| of both p, for l = 0 ... degree + 1.

    The 2l + 2 random unit vectors a and b span all elements of D^l.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 2 * degree + 4, 3, generator=generator, dtype=torch.float64)
    a, b = vectors / vectors.norm(dim=2, keepdim=True)
    rows = (a @ rule.rotations).flatten(0, 1)
    columns = (operations @ b.T).permute(0, 2, 1).flatten(0, 1)
    cosines = (rows @ columns.T).reshape(len(rule.weights), len(a), len(operations), len(b))
    parities = torch.stack([torch.ones(len(operations)).double(), torch.linalg.det(operations)])
    previous, current = torch.zeros_like(cosines), torch.ones_like(cosines)
    result = []
    for l in range(degree + 2):  # noqa: E741
        mean = torch.einsum("kagb,k,pg->pab", current, rule.weights, parities) / len(operations)
        result.append(float(mean.abs().max()))
        following = ((2 * l + 1) * cosines * current - l * previous) / (l + 1)
        previous, current = current, following
    return result


def same_set(first, second, tolerance=1e-8):
    gap = (first[:, None] - second[None]).abs().amax(dim=(2, 3))
    return len(first) == len(second) and bool((gap.amin(dim=1) < tolerance).all())


@pytest.mark.parametrize("symbol", ROTATIONS)
def test_rules_kill_their_harmonics_and_no_more(symbol):
    """Only rotations count: 32 crystallographic groups by 11 sets of rules, and nine more."""
    for seed, degree in enumerate(DEGREES):
        group = turned(symbol, seed)
        for offset in (None, haar_offsets(1, seed + 10)[0]):
            rule = coset_rule(group, degree, offset=offset)
            assert rule.degree >= degree
            _, *killed, alive = residuals(rule, group, rule.degree)
            assert max(killed) < KILLED
            assert alive > ALIVE
            assert len(rule.weights) == N_NODES[ROTATIONS[symbol]][seed]
            assert float(rule.weights.min()) > 0
            assert abs(float(rule.weights.sum()) - 1) < 1e-15 * len(rule.weights)
            assert torch.linalg.det(rule.rotations).allclose(torch.ones(1).double(), atol=1e-14)


@pytest.mark.parametrize(("symbol", "degree"), [("O", 3), ("I", 5)])
def test_rotation_groups_as_rules_without_symmetry(symbol, degree):
    rotations = rotation_group(symbol)
    weights = torch.full((len(rotations),), 1 / len(rotations), dtype=torch.float64)
    rule = Quadrature(rotations=rotations, weights=weights, degree=degree)
    _, *killed, alive = residuals(rule, rotation_group("C1"), degree)
    assert max(killed) < KILLED
    assert alive > ALIVE


def test_wrong_axes_are_noticed():
    """Negative control: the rule in rule axes is none for a turned crystal."""
    rule = coset_rule(rotation_group("D4h"), 5)
    assert max(residuals(rule, turned("D4h", 0), 5)[1:-1]) > 0.01


def test_stored_rules():
    """Unit quaternions, positive weights, and each rule is the smallest for something."""
    text = resources.files("coset.symmetry").joinpath("rules.json").read_text("utf-8")
    sizes = set()
    for stored in json.loads(text):
        nodes = np.array(stored["nodes"])
        assert np.abs(np.linalg.norm(nodes[:, :4], axis=1) - 1).max() < 1e-15
        assert nodes[:, 4].min() >= 0.25 / len(nodes)
        n_nodes = len(nodes) * len(rotation_group(stored["left"]))
        sizes.add((stored["group"], stored["degree"], n_nodes))
    smallest = {
        (group, rule.degree, len(rule.weights))
        for group in N_NODES
        for rule in (coset_rule(rotation_group(group), degree) for degree in DEGREES)
    }
    assert sizes <= smallest


def test_next_degree():
    for degree in range(1, 10):
        rule = coset_rule(turned("D6", 0), degree)
        assert rule.degree == min(one for one in DEGREES if one >= degree)


@pytest.mark.parametrize("symbol", ROTATIONS)
def test_identify(symbol):
    group = turned(symbol, 3)
    found = identify(group)
    U = found.frame
    assert found.schoenflies == symbol
    assert float((U @ U.T - torch.eye(3)).abs().max()) < 1e-14
    assert same_set(U @ rotation_group(symbol) @ U.T, group)
    shuffled = turned(symbol, 3).flip(0).repeat(2, 1, 1)
    assert float((identify(shuffled).frame - U).abs().max()) < 1e-13
    proper = torch.linalg.det(group) > 0
    rule, same = coset_rule(group, 5), coset_rule(group[proper].flip(0), 5)
    assert float((rule.rotations - same.rotations).abs().max()) < 1e-13


def test_lab_axes_are_kept_where_they_fit():
    for symbol in ROTATIONS:
        assert float((identify(rotation_group(symbol)).frame - torch.eye(3)).abs().max()) < 0.1


@pytest.mark.parametrize(("fold", "known"), [(7, "C1"), (8, "C4"), (10, "C5"), (12, "C6")])
def test_unknown_groups_of_molecules_use_a_subgroup(fold, known):
    """C_n v, whose rotations contain a known group."""
    angle = torch.arange(fold, dtype=torch.float64) * 2 * torch.pi / fold
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = [(c, -s, zero), (s, c, zero), (zero, zero, one)]
    rotations = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    mirrors = rotations * torch.tensor([-1.0, 1, 1], dtype=torch.float64)
    V = haar_offsets(1, fold)[0]
    group = V @ torch.cat([rotations, mirrors]) @ V.T
    assert identify(group).schoenflies == {"C1": "Cs"}.get(known, known + "v")
    rule = coset_rule(group, 5)
    assert len(rule.weights) == N_NODES[known][1]
    assert max(residuals(rule, group, 5)[1:-1]) < KILLED


# Space groups


@pytest.mark.parametrize("first", range(1, 231, 46))
def test_frames_of_all_space_groups(first):
    for number in range(first, first + 46):
        cell, sites, labels = general_crystal(number)
        dataset = MoyoDataset(Cell(cell.tolist(), sites.tolist(), labels.tolist()), symprec=1e-4)
        whole = operations_of(cell, sites, labels)
        found = identify(whole)
        U, S = found.frame, rotation_group(found.schoenflies)
        expected = next(name for name, last in LAST_NUMBERS.items() if number <= last)
        assert (dataset.number, found.hermann_mauguin) == (number, expected)
        assert same_set(U @ S @ U.T, whole)

        R = torch.tensor(dataset.std_rotation_matrix, dtype=torch.float64)
        assert same_set(R.T @ S @ R, whole, 1e-4) == (number not in MISLED)

        reduced = MoyoDataset(
            Cell(cell.tolist(), sites.tolist(), labels.tolist()), symprec=1e-4, rotate_basis=False
        ).prim_std_cell
        part = operations_of(*map(np.array, (reduced.basis, reduced.positions, reduced.numbers)))
        assert same_set(part, whole)
        rules = coset_rule(whole, 5), coset_rule(part, 5)
        assert float((rules[0].rotations - rules[1].rotations).abs().max()) < 1e-8
        assert max(residuals(rules[0], whole, 3)[1:-1]) < 1e-9


def operations_of(cell, sites, labels):
    """Cartesian rotations of a crystal."""
    structure = make_structure(
        torch.from_numpy(sites @ cell),
        torch.from_numpy(labels),
        cell=torch.from_numpy(cell),
        pbc=(True, True, True),
    )
    return torch.from_numpy(find_group(structure, 1e-4).cartesian_rotations)


def general_crystal(number):
    """General positions of two species (three in P1) in the conventional cell, turned."""
    rng = np.random.default_rng(number)
    operations = operations_from_number(number)
    W, t = np.array(operations.rotations), np.array(operations.translations)
    points = rng.random((3 if number == 1 else 2, 3))
    sites = np.concatenate([W @ point + t for point in points]) % 1
    labels = np.repeat(np.arange(len(points)) + 5, len(W))
    cell = conventional_cell(number) * len(sites) ** (1 / 3)
    assert np.allclose(W.transpose(0, 2, 1) @ cell @ cell.T @ W, cell @ cell.T)
    return cell @ special_ortho_group.rvs(3, random_state=number).T, sites, labels


def conventional_cell(number):
    """Cell of unit scale with the metric of the crystal system (default settings)."""
    a, b, c = 2.2, 2.5, 2.9
    alpha, beta, gamma = 90.0, 90.0, 90.0
    if number <= 2:
        alpha, beta, gamma = 81.0, 97.0, 104.0
    elif number <= 15:
        beta = 103.0
    elif number > 194:
        b = c = a
    elif number > 74:
        b, gamma = a, 120.0 if number > 142 else 90.0
    ca, cb, cg = np.cos(np.radians([alpha, beta, gamma]))
    sg = np.sqrt(1 - cg**2)
    cy = (ca - cb * cg) / sg
    return np.array(
        [[a, 0, 0], [b * cg, b * sg, 0], [c * cb, c * cy, c * np.sqrt(1 - cb**2 - cy**2)]]
    )


# Levels, offsets, refusals


@pytest.mark.parametrize(
    ("symbol", "light", "standard", "tight", "reference"),
    [
        ("Oh", 1, 4, 7, 15),
        ("D4h", 3, 11, 20, 40),
        ("C2h", 12, 30, 80, 150),
        ("Cs", 23, 23, 60, 160),
    ],
)
def test_levels(symbol, light, standard, tight, reference):
    group = turned(symbol, 5)
    for level in ("none", "project"):
        assert level_rule(group, level) == (IDENTITY,)
    for level, n_nodes in (("light", light), ("standard", standard), ("tight", tight)):
        (rule,) = level_rule(group, level)
        assert len(rule.weights) == n_nodes
    rules = level_rule(group, "reference", seed=4)
    again = level_rule(group, "reference", seed=4)
    assert [len(rule.weights) for rule in rules] == [reference] * 3
    assert all(torch.equal(a.rotations, b.rotations) for a, b in zip(rules, again, strict=True))
    assert not torch.allclose(rules[0].rotations, rules[1].rotations)
    for rule in rules:
        assert max(residuals(rule, group, rule.degree)[1:-1]) < KILLED
    assert [name for name, level in LEVELS.items() if not level.projects] == ["none"]


def test_offsets_are_uniform():
    offsets = haar_offsets(20000, 1)
    assert offsets.dtype == torch.float64
    assert torch.equal(offsets[:7], haar_offsets(20000, 1)[:7])
    assert not torch.equal(offsets, haar_offsets(20000, 2))
    assert float((offsets @ offsets.mT - torch.eye(3)).abs().max()) < 1e-14
    assert float((torch.linalg.det(offsets) - 1).abs().max()) < 1e-14
    # entries of D^1 and D^2: mean 0, variance 1/3 and 1/5 over 20000
    assert float(offsets.mean(dim=0).abs().max()) < 5 * (3 * 20000) ** -0.5
    assert abs(float((1.5 * offsets[:, 2, 2] ** 2 - 0.5).mean())) < 5 * (5 * 20000) ** -0.5


def test_refusals():
    group = rotation_group("D4h")
    for degree in (0, 10):
        with pytest.raises(ConfigError, match=rf"degree = {degree} is outside \[1, 9\]"):
            coset_rule(group, degree)
    with pytest.raises(ConfigError, match="expected one of none, project, light, standard"):
        level_rule(group, "exact")
    for bad in (group[:-1], 1.001 * group, group + 1e-3, group[:0]):
        with pytest.raises(StructureError, match="no group"):
            coset_rule(bad, 5)


# The generator of the rules


def test_generator():
    rule = find("D4", 3, "C1", 3, n_starts=1, seed=0)
    assert rule.weights.sum() == pytest.approx(1, abs=1e-14)
    found = Quadrature(
        rotations=torch.from_numpy(rule.nodes.as_matrix()),
        weights=torch.from_numpy(rule.weights),
        degree=3,
    )
    assert max(residuals(found, rotation_group("D4"), 3)[1:-1]) < KILLED
    assert find("O", 5, "C1", 3, n_starts=2, seed=0) is None
