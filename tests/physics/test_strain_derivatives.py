"""Derivatives in displacements and strains against differences of first derivatives."""

import importlib

import pytest
import torch
from analytic_models import stillinger_weber
from factories import FCC, crystal, rattled, structures, tiny_potential
from tolerances import SAME_ALGEBRA, close

import coset
from coset.derivatives import STRAINS, hessian, hessians, strain_derivatives
from coset.edge_model import Quadrature, edge_gradient, forces_and_virial
from coset.neighbors import edge_vectors, neighbor_list
from coset.structures import concatenate, strain
from coset.symmetry.spectrum import haar

STEP = 1e-4  # Å, and of strain
DIFFERENCE = 1e-8
"""eV, eV/Å: fourth order; rounding of 1e-13 over 1e-4, and h⁴ = 1e-16 times a sixth derivative."""


def first_derivatives(potential, one, e):
    """dE/du and dE/de of E(u, e), edge vectors (r + v)(1 + e), at a strain e."""
    strained = strain(one, e[None])
    graph = neighbor_list(strained, potential.cutoff)
    r = edge_vectors(strained, graph)
    _, g = edge_gradient(potential.model, graph, r, outputs=potential.outputs)
    forces, virial = forces_and_virial(r, g, graph)
    matrix = torch.eye(3).double() + e
    unstrained = torch.linalg.solve(matrix, virial[0])
    return -forces @ matrix, 0.5 * (unstrained + unstrained.mT)


def by_differences(potential, one, e):
    """Fourth order in the step."""
    steps = [first_derivatives(potential, one, k * STEP * e) for k in (-2.0, -1.0, 1.0, 2.0)]
    return [(a - 8 * b + 8 * c - d) / (12 * STEP) for a, b, c, d in zip(*steps, strict=True)]


def unit_strain(a, b):
    e = torch.zeros(3, 3).double()
    e[a, b] += 0.5
    e[b, a] += 0.5
    return e


@pytest.mark.parametrize("variant", ["converged", "zbl", "cosine", "analytic"])
def test_derivatives_with_strain_are_differences(variant):
    """On a triclinic cell with forces and stress, where every term counts."""
    one = structures()["triclinic"]
    potential = tiny_potential(variant) if variant != "analytic" else stillinger_weber(turning=0.1)
    if variant == "analytic":
        one = rattled(
            crystal(5.3 * torch.tensor(FCC), ((0, 0, 0), (0.25, 0.25, 0.25)), [14] * 2), 0.1
        )
    found = strain_derivatives(potential, one)
    by_atoms, by_strain = first_derivatives(potential, one, torch.zeros(3, 3).double())
    assert close(found.gradient, by_atoms, SAME_ALGEBRA)
    assert close(found.strain_gradient, by_strain, SAME_ALGEBRA)
    assert close(found.hessian, hessian(potential, one), SAME_ALGEBRA)
    assert float(by_atoms.abs().max()) > 0.01
    for a, b in STRAINS:
        internal, second = by_differences(potential, one, unit_strain(a, b))
        assert close(found.internal_strain[:, :, a, b], internal, DIFFERENCE)
        assert close(found.internal_strain[:, :, b, a], internal, DIFFERENCE)
        assert close(found.strain[:, :, a, b], second, DIFFERENCE)
    assert close(found.strain, found.strain.permute(2, 3, 0, 1), SAME_ALGEBRA)


def test_derivatives_of_an_average_are_averages_of_derivatives():
    potential, one = tiny_potential(), structures()["triclinic"]
    nodes, weights = haar(3, 4), torch.tensor([0.2, 0.5, 0.3]).double()
    found = strain_derivatives(
        potential, one, Quadrature(rotations=nodes, weights=weights, degree=0)
    )
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        rule = Quadrature(rotations=node[None], weights=torch.ones(1).double(), degree=0)
        total = total + weight * strain_derivatives(potential, one, rule).strain
    assert close(found.strain, total, SAME_ALGEBRA)


def test_hessians_of_many_systems(monkeypatch):
    """In batches by size, each as it is alone."""
    potential = tiny_potential()
    names = ("water", "fcc", "triclinic", "bcc", "fcc")
    singles = [structures()[name] for name in names]
    sizes = []

    def counted(potential, batch, own=hessians):
        sizes.append(batch.n_atoms.tolist())
        return own(potential, batch)

    monkeypatch.setattr(importlib.import_module("coset.workflows.hessian"), "hessians", counted)
    found = coset.hessian(potential, concatenate(singles))
    assert sorted(n for batch in sizes for n in batch) == sorted(len(o.positions) for o in singles)
    assert len(sizes) < len(singles)
    for one, exact in zip(singles, found, strict=True):
        assert exact.shape == (len(one.positions), 3, len(one.positions), 3)
        assert close(exact, hessian(potential, one), SAME_ALGEBRA)
