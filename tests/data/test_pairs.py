from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import VARIANTS, structures, tiny_checkpoint
from tolerances import close
from training_data import frames_of, make_store

from coset.data import pairs
from coset.data.geometry import structures_of
from coset.data.store import Store
from coset.edge_model import edge_gradient, forces_and_virial
from coset.loading import network_of
from coset.neighbors import assemble, edge_vectors, neighbor_list
from coset.structures import concatenate

BATCH = concatenate([s for s in structures().values() if len(s) == 1])


def results(network, batch, graph):
    vectors = edge_vectors(batch, graph)
    readout, gradient = edge_gradient(network, graph, vectors)
    forces, virial = forces_and_virial(vectors, gradient, graph)
    return readout.atomic_energies, forces, virial


@pytest.mark.parametrize("variant", ["converged", "solver10", "grid", "fixed", "zbl"])
def test_pairs_left_out_change_nothing(variant):
    network = network_of(tiny_checkpoint(variant), torch.float64)
    reach = network.hypers.cutoff.cutoff
    full = results(network, BATCH, neighbor_list(BATCH, reach))
    kept = pairs.needed_pairs(BATCH, network)
    for a, b in zip(full, results(network, BATCH, assemble(BATCH, kept)), strict=True):
        close(a, b, 1e-12)


def test_adaptive_cutoffs_leave_most_pairs_out():
    network = network_of(tiny_checkpoint("converged"), torch.float64)
    all_pairs = len(neighbor_list(BATCH, network.hypers.cutoff.cutoff).centers) // 2
    assert sum(len(p[0]) for p in pairs.needed_pairs(BATCH, network)) < 0.7 * all_pairs


def test_the_cache_returns_what_a_search_finds(tmp_path):
    store = Store(make_store(tmp_path / "store"))
    hypers = VARIANTS["converged"]
    cache = pairs.build(store, hypers)
    rows = np.array([5, 0, 17, 24, 25])
    frames = store.read(rows)
    network = network_of(tiny_checkpoint("converged"), torch.float64)
    found = pairs.needed_pairs(structures_of(frames), network)
    for cached, fresh in zip(cache.read(rows), found, strict=True):
        for a, b in zip(cached, fresh, strict=True):
            assert (a == b).all()
    assert cache.counts[rows].tolist() == [len(p[0]) for p in found]


def test_another_cutoff_has_another_cache(tmp_path):
    store = Store(make_store(tmp_path / "store"))
    hypers = VARIANTS["converged"]
    wider = replace(hypers, cutoff=replace(hypers.cutoff, n_neighbors=12.0))
    assert pairs.cache_path(store, hypers) != pairs.cache_path(store, wider)
    assert pairs.build(store, wider).counts.sum() > pairs.build(store, hypers).counts.sum()


def test_frames_become_the_structures_they_were():
    again = structures_of(frames_of(BATCH))
    assert (again.atomic_numbers == BATCH.atomic_numbers).all()
    assert (again.pbc == BATCH.pbc).all()
    close(again.positions, BATCH.positions.float().double(), 0.0)
