"""The graph against a brute-force search, and its cutting into batches."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from factories import crystal, structures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coset import neighbors
from coset.errors import StructureError
from coset.neighbors import (
    batched_neighbor_lists,
    cut_by_budget,
    edge_vectors,
    estimated_edges,
    neighbor_list,
    overlap,
)
from coset.structures import concatenate, make_structure

TIE = 1e-9
"""Å: edges this near the cutoff may be found or not, depending on rounding."""

PBC = list(product((False, True), repeat=3))


def brute_force(one, cutoff):
    """Distance of every (i, j, S) within the cutoff, by trying all shifts that could matter."""
    positions, periodic = one.positions.numpy(), np.flatnonzero(one.pbc[0].numpy())
    cell = one.cell[0].numpy()[periodic]
    inverse = np.linalg.pinv(cell)
    reach = (cutoff + TIE) * np.linalg.norm(inverse, axis=0)
    found = {}
    for i, j in product(range(len(positions)), repeat=2):
        vector = positions[j] - positions[i]
        nearest = -vector @ inverse
        lowest, highest = np.floor(nearest - reach), np.ceil(nearest + reach)
        ranges = [np.arange(a, b + 1) for a, b in zip(lowest, highest, strict=True)]
        shifts = np.array(list(product(*ranges)))
        distances = np.linalg.norm(vector + shifts @ cell, axis=1)
        for row in np.flatnonzero(distances <= cutoff + TIE):
            shift = np.zeros(3, dtype=int)
            shift[periodic] = shifts[row]
            if i != j or shift.any():
                found[i, j, *shift.tolist()] = distances[row]
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
    assert all(a <= b for a, b in pairwise(rows) if a[0] != b[0])
    assert sorted(reverse) == list(range(len(rows)))
    for (i, j, *shift), back in zip(rows, reverse, strict=True):
        assert rows[back] == (j, i, *(-s for s in shift))
    vectors = edge_vectors(batch, edges)
    assert torch.equal(vectors[edges.reverse], -vectors)


def cell_of(lengths, angles):
    """Rows a, b, c with the given lengths and angles (degrees), or None if there is none."""
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


def test_a_primitive_cell_has_its_shells():
    """fcc, a = 4 Å: 12 neighbors at a/√2, 6 at a, 24 at a √(3/2), all of them images of itself."""
    one = structures()["fcc"]
    scaled = crystal(4.0 / 3.615 * one.cell[0].numpy(), [(0, 0, 0)], [29])
    counts = [len(neighbor_list(scaled, r).centers) for r in (2.8, 2.9, 4.1, 4.95)]
    assert counts == [0, 12, 18, 42]


@pytest.mark.parametrize("name", ["slab", "slab, open first", "chain", "chain along a"])
def test_vectors_of_open_directions_mean_nothing(name):
    """Whatever stands in the open rows of the cell, the edges are the same and stay inside."""
    one = structures()[name]
    other = one.cell.clone()
    other[~one.pbc] = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    changed = neighbor_list(replace(one, cell=other), 5.0)
    plain = neighbor_list(one, 5.0)
    assert sorted(keys(plain)) == sorted(keys(changed))
    assert len(plain.centers) > 10
    assert not plain.cell_shifts[:, ~one.pbc[0]].any()


# Batches


def mixed_batch():
    """Twenty small structures with one of 500 atoms among them."""
    small = [one for one in structures().values() if len(one.positions) <= 5]
    grid = list(product(range(10), range(10), range(5)))
    big = crystal(np.diag([24.0, 24.0, 12.0]), np.array(grid) / (10, 10, 5), [29] * 500)
    return [*small[:9], big, *small[9:20]]


def shifted_keys(edges, first_atom):
    return [(i + first_atom, j + first_atom, *shift) for i, j, *shift in keys(edges)]


@pytest.mark.parametrize("budget", [0.0, 700.0, 1e9])
def test_batches_are_the_single_graphs_within_the_budget(budget):
    members = mixed_batch()
    assert len(members) == 21
    whole = concatenate(members)
    single = [neighbor_list(one, 4.0) for one in members]

    def cost(n_atoms, n_edges):
        return 3.0 * n_atoms + n_edges

    costs = [cost(len(m.positions), len(e.centers)) for m, e in zip(members, single, strict=True)]
    seen = []
    for systems, batch, edges in batched_neighbor_lists(whole, 4.0, cost, budget):
        numbers = systems.tolist()
        assert len(numbers) == 1 or sum(costs[k] for k in numbers) <= budget
        following = numbers[-1] + 1
        if following < len(members):
            assert sum(costs[k] for k in numbers) + costs[following] > budget
        seen += numbers
        assert_consistent(batch, edges)
        assert torch.equal(batch.n_atoms, whole.n_atoms[systems])
        assert torch.equal(edges.atomic_numbers, batch.atomic_numbers)
        assert torch.equal(edges.system_index, batch.system_index)
        begin = (torch.cumsum(batch.n_atoms, 0) - batch.n_atoms).tolist()
        alone = [shifted_keys(single[k], b) for k, b in zip(numbers, begin, strict=True)]
        assert keys(edges) == [key for part in alone for key in part]
    assert seen == list(range(21))
    assert len(neighbor_list(whole, 4.0).centers) == sum(len(e.centers) for e in single)


def test_groups_are_cut_only_where_the_budget_ends():
    assert cut_by_budget([1, 1, 1, 5, 1], 3) == [[0, 1, 2], [3], [4]]
    assert cut_by_budget([4, 4], 3) == [[0], [1]]
    assert cut_by_budget([], 3) == []


def test_a_subset_is_the_graph_of_the_kept_edges():
    one = structures()["twelve"]
    edges, vectors = neighbor_list(one, 5.0), edge_vectors(one, neighbor_list(one, 5.0))
    kept = torch.nonzero(torch.linalg.norm(vectors, dim=1) <= 3.5)[:, 0]
    part = edges.subset(kept)
    assert 0 < len(part.centers) < len(edges.centers)
    assert sorted(keys(part)) == sorted(keys(neighbor_list(one, 3.5)))
    assert_consistent(one, part)


# Too many, too near


def refuse_to_search(*_, **__):
    raise AssertionError("searched")


def layer(pbc, cell):
    lattice = torch.tensor(cell, dtype=torch.float64)
    position = torch.zeros(1, 3, dtype=torch.float64)
    return make_structure(position, torch.tensor([29]), cell=lattice, pbc=pbc)


HUGE = {
    "crystal": (layer((True, True, True), np.eye(3)), 300.0),
    "slab": (layer((True, True, False), np.diag([0.01, 0.01, 0.0])), 80.0),
    "chain": (layer((True, False, False), np.diag([1e-6, 0.0, 0.0])), 80.0),
}


@pytest.mark.parametrize("name", HUGE)
def test_too_many_edges_are_refused_before_the_search(name, monkeypatch):
    one, cutoff = HUGE[name]
    monkeypatch.setattr(neighbors, "NeighborList", refuse_to_search)
    batch = concatenate([structures()["water"], one])
    with pytest.raises(StructureError) as caught:
        neighbor_list(batch, cutoff)
    assert caught.value.code == "TooManyEdges"
    assert caught.value.structure_id == "1"


def test_the_estimate_of_a_crystal_is_good():
    one = layer((True, True, True), np.eye(3))
    n_edges = len(neighbor_list(one, 10.0).centers)
    assert abs(float(estimated_edges(one, 10.0)[0]) / n_edges - 1) < 0.2
    eight = crystal(2 * np.eye(3), list(product((0, 0.5), repeat=3)), [29] * 8)
    assert float(estimated_edges(eight, 10.0)[0]) == pytest.approx(
        8 * 4 / 3 * np.pi * 1000, rel=1e-9
    )


@pytest.mark.parametrize("name", ["slab", "chain", "ring"])
def test_the_estimate_of_open_systems_has_the_right_size(name):
    """Within a factor of three: it only guards against wrong units."""
    one = structures()[name]
    n_edges = len(neighbor_list(one, 5.0).centers)
    assert n_edges / 3 < float(estimated_edges(one, 5.0)[0]) < 3 * n_edges


def test_a_large_cluster_is_no_reason_to_refuse():
    """11,000 atoms, 2.5 Å apart, without a cell: 1.2e8 pairs, but 6 neighbors each within 3 Å."""
    grid = torch.cartesian_prod(torch.arange(22), torch.arange(25), torch.arange(20))
    one = make_structure(2.5 * grid.double(), torch.full((len(grid),), 29))
    faces = 22 * 25 + 25 * 20 + 20 * 22
    assert len(neighbor_list(one, 3.0).centers) == 6 * len(grid) - 2 * faces


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, False)])
def test_overlapping_atoms_are_found_across_the_boundary(pbc):
    positions = [(0.02, 1.0, 1.0), (3.97, 1.0, 1.0), (2.0, 2.0, 2.0)]
    cell = torch.eye(3, dtype=torch.float64) * 4.0
    numbers = torch.tensor([29, 29, 8])
    one = make_structure(torch.tensor(positions).double(), numbers, cell=cell, pbc=pbc)
    error = overlap(one, "x")
    assert (error is None) == (not pbc[0])
    if error is not None:
        assert error.code == "AtomsOverlap"
        assert "atoms 0 and 1 are 0.05 Å apart" in str(error)
        assert error.structure_id == "x"


def test_distances_in_a_batch_are_those_of_each_cell():
    """Edge vectors take the cell of their own system."""
    members = [structures()[name] for name in ("triclinic", "hcp", "slab")]
    batch = concatenate(members)
    together = edge_vectors(batch, neighbor_list(batch, 4.0))
    alone = [edge_vectors(one, neighbor_list(one, 4.0)) for one in members]
    assert torch.equal(together, torch.cat(alone))
    for one, vectors in zip(members, alone, strict=True):
        lengths = sorted(torch.linalg.norm(vectors, dim=1).tolist())
        np.testing.assert_allclose(
            lengths, sorted(brute_force(one, 4.0).values()), rtol=0, atol=1e-12
        )


def test_no_edge_joins_two_systems():
    batch = concatenate(mixed_batch())
    edges = neighbor_list(batch, 4.0)
    system = batch.system_index
    assert torch.equal(system[edges.centers], system[edges.neighbors])
