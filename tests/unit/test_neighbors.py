"""The graph against a brute-force search, and its cutting into batches."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))


from coset.neighbors import (
    edge_vectors,
    neighbor_list,
)
from coset.structures import make_structure

TIE = 1e-9
"""Å: edges this near the cutoff may be found or not, depending on rounding."""

PBC = list(product((False, True), repeat=3))


def brute_force(one, cutoff):
    """Distance of every (i, j, S) within the cutoff, by trying all shifts that could matter."""
    positions, cell = one.positions.numpy(), one.cell[0].numpy()
    ranges = [range(1)] * 3
    periodic = np.flatnonzero(one.pbc[0].numpy())
    spread = np.linalg.norm(positions[:, None] - positions[None], axis=-1).max()
    for axis in periodic:
        others = cell[[k for k in periodic if k != axis]]
        plane = np.linalg.qr(others.T)[0] if len(others) else np.zeros((3, 0))
        height = np.linalg.norm(cell[axis] - plane @ (plane.T @ cell[axis]))
        reach = int(np.ceil((cutoff + spread) / height))
        ranges[axis] = range(-reach, reach + 1)
    shifts = np.array(list(product(*ranges)))
    vectors = positions[None] - positions[:, None]
    found = {}
    for i, j in product(range(len(positions)), repeat=2):
        distances = np.linalg.norm(vectors[i, j] + shifts @ cell, axis=1)
        for row in np.flatnonzero(distances <= cutoff + TIE):
            shift = tuple(int(s) for s in shifts[row])
            if i != j or any(shift):
                found[i, j, *shift] = distances[row]
    return found


def keys(edges):
    """(i, j, S) of every edge."""
    columns = [edges.centers[:, None], edges.neighbors[:, None], edges.cell_shifts]
    return [tuple(row) for row in torch.cat(columns, dim=1).tolist()]


def assert_is_the_graph(one, cutoff):
    edges = neighbor_list(one, cutoff)
    expected, listed = brute_force(one, cutoff), keys(edges)
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(expected)
    missing = {key for key in set(expected) - set(listed) if expected[key] < cutoff - TIE}
    assert not missing
    assert_consistent(one, edges)


def assert_consistent(batch, edges):
    """Sorted by center, the reverse of every edge is its reverse, to the last bit."""
    rows, reverse = keys(edges), edges.reverse.tolist()
    assert all(a <= b for a, b in zip(rows, rows[1:], strict=False) if a[0] != b[0])
    assert sorted(reverse) == list(range(len(rows)))
    for (i, j, *shift), back in zip(rows, reverse, strict=True):
        assert rows[back] == (j, i, *(-s for s in shift))
    vectors = edge_vectors(batch, edges)
    assert torch.equal(vectors[edges.reverse], -vectors)


def cell_of(lengths, angles):
    """Rows a, b, c with the given lengths and angles (degrees), or None if there is no such cell."""
    alpha, beta, gamma = np.cos(np.radians(angles))
    sine = np.sqrt(1 - gamma**2)
    y = (alpha - beta * gamma) / sine
    rest = 1 - beta**2 - y**2
    if rest < 1e-3:
        return None
    rows = [(1, 0, 0), (gamma, sine, 0), (beta, y, np.sqrt(rest))]
    return np.array(rows) * np.array(lengths)[:, None]


@st.composite
def cases(draw):
    """A batch of one and a cutoff; sizes and flags are drawn, numbers come from a seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_atoms = draw(st.integers(1, 6))
    pbc = np.array(draw(st.sampled_from(PBC)))
    aspect = draw(st.sampled_from([1.0, 3.0, 50.0]))
    longest = draw(st.sampled_from([1.5, 4.0, 9.0])) * aspect ** (2 / 3)
    lengths = longest * aspect ** -rng.permutation([0.0, rng.uniform(), 1.0])
    cell = None
    while cell is None:
        cell = cell_of(lengths, rng.uniform(20, 160, 3))
    cell = cell @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    if draw(st.booleans()):
        cell[[0, 1]] = cell[[1, 0]]
    inside = rng.uniform(size=(n_atoms, 3)) @ cell
    outside = draw(st.sampled_from([0, 1, 4])) * rng.integers(-1, 2, (n_atoms, 3)) * pbc
    empty = draw(st.sampled_from(["kept", "zero"]))
    if empty == "zero":
        cell[~pbc] = 0.0
    volume = abs(np.linalg.det(np.where(pbc[:, None], cell, np.eye(3) * longest)))
    budget = 300.0 / n_atoms  # edges of one atom, so that the brute force ends
    cutoff = min(rng.uniform(0.5, 6.0), (budget * max(volume, 0.1) / n_atoms / 4.2) ** (1 / 3))
    one = make_structure(
        torch.tensor(inside + outside @ cell),
        torch.full((n_atoms,), 29),
        cell=torch.tensor(cell),
        pbc=[bool(x) for x in pbc],
    )
    return one, float(max(cutoff, 0.3))


COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=100, derandomize=True, **COMMON)
@given(cases())
def test_edges_are_those_of_a_brute_force_search(case):
    assert_is_the_graph(*case)


@pytest.mark.slow
@settings(max_examples=500, **COMMON)
@given(cases())
def test_edges_are_those_of_a_brute_force_search_500_times(case):
    assert_is_the_graph(*case)
